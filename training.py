"""How one network is trained: stages, the optimizer, and the weights to begin with.

After each epoch `ResumableCheckpoint` saves everything that training needs to continue: weights, codebook, optimizer,
and the best weights so far. Everything else is a function of (seed, epoch) and needs no saving. A run that was killed
and continued is therefore bitwise identical to an uninterrupted one.
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

import devices
import saving
from callbacks import (
    CSVHistory,
    EpochSummary,
    Previews,
    ReseedEachEpoch,
    ResumableCheckpoint,
    TensorBoardScalars,
    TerminateOnNonFinite,
)
from run import Run, RunError, checksum, remove

# Settings that change what a network computes, but not the shapes of its weights.
COMPARED_SETTINGS = ("background_threshold", "use_position")


@dataclass(frozen=True)
class Stage:
    """How one network is trained.

    Attributes:
        name: Name of the network; its file is NAME.keras, its rows in history.csv have this stage.
        make: Creates the untrained network.
        batches: Given an epoch, counted from 0, returns its training batches, of each only this process's shard.
        validation: Returns this process's shard of the validation batches.
        steps: Number of training batches per epoch.
        monitor: Name of the validation metric that decides which epoch is best; lower is better.
        epochs: Number of epochs. The learning rate reaches 0 at the end of the last one.
        learning_rate: Peak of the learning rate.
        learning_rate_option: Name of the constant that sets it, for messages.
        part: Returns the part of the network that is saved and used; the rest is needed in training only.
        made_from: Names of the results and facts of the run that determine the network; see `Run.make`.
        preview: Draws a small sheet of images, (H, W) in [0, 1], with a network that is not trained to the end yet.
        shown: Names of the metrics in the line that is printed per epoch.
    """

    name: str
    make: Callable[[], keras.Model]
    batches: Callable[[int], tf.data.Dataset]
    validation: Callable[[], tf.data.Dataset]
    steps: int
    monitor: str
    epochs: int
    learning_rate: float
    learning_rate_option: str
    part: Callable[[keras.Model], keras.Model] = lambda network: network
    made_from: Sequence[str] = ("slices",)
    preview: Callable[[keras.Model], np.ndarray] | None = None
    shown: Sequence[str] = ("loss",)


def train(
    stage: Stage,
    run: Run | None,
    seed: int,
    precision: str = "float32",
    num_devices: int = 1,
    start_from: Path | None = None,
    keep: Sequence[str] = (),
    previews: int = 0,
) -> keras.Model:
    """Train a stage's network, or continue to, and save the best one on validation; load it if that is done already.

    Args:
        stage: What to train.
        run: Where to save; None in a process that does not write files.
        seed: Together with the epoch, it determines dropout and restarts of codes.
        precision: Keras dtype policy of training. The network that is returned and saved uses float32.
        num_devices: Number of devices of this process that share each batch.
        start_from: Folder of the network whose weights training begins with, if `Run.start` was given its checksum.
        keep: Names of the networks that are taken from there as they are, without training.
        previews: Number of sheets that `Stage.preview` draws, evenly over the epochs.

    Returns:
        The network, or the part of it that is used, with the weights of its best epoch.

    Raises:
        RunError: A file of the run folder or the network to start from cannot be used, or the loss is not finite.
    """
    network, file = stage.make(), f"{stage.name}.keras"
    kept = stage.part(network)
    initial = f"start_from/{file}"
    made_from = [*stage.made_from, *([initial] if run and initial in run.facts else [])]
    if devices.broadcast_from_main(run is not None and run.is_up_to_date(file, made_from)):
        if run:
            saving.load_weights(kept, run.folder / file)
        kept.set_weights(devices.broadcast_from_main(kept.get_weights()))
        return kept
    if stage.name in keep:
        _begin(network, network, stage, run, start_from)
        return _save(kept, stage, run, made_from)
    with devices.distribution_scope(num_devices):
        with dtype_policy(precision):
            trained = stage.make()
        trained.compile(make_optimizer(stage.learning_rate, stage.epochs, stage.steps))
        checkpoint = ResumableCheckpoint(run, stage.name, stage.monitor, made_from)
        epochs_done = checkpoint.restore(trained)
        if run and epochs_done < stage.epochs:
            _refuse_unrecorded(run, file)
        print(
            f"\ntraining {stage.name}: {network.count_params():,} parameters, {stage.epochs} epochs of "
            f"{stage.steps} steps"
        )
        if epochs_done:
            print(f"continuing after epoch {epochs_done}")
        else:
            _begin(trained, network, stage, run, start_from)
        if epochs_done < stage.epochs:
            fit(trained, stage, epochs_done, _callbacks(stage, run, seed, network, checkpoint, previews))
    network.set_weights(checkpoint.best_weights)
    print(f"best epoch: {checkpoint.counters['best_epoch']}")
    return _save(kept, stage, run, made_from)


def _save(network: keras.Model, stage: Stage, run: Run | None, made_from: Sequence[str]) -> keras.Model:
    """Save and record what a stage has trained, if this process writes files. Returns it."""
    if run:
        file = f"{stage.name}.keras"
        saving.save_model(network, run.folder / file)
        run.record([file], made_from, history=run.history_checksum(stage.name))
    return network


def fit(network: keras.Model, stage: Stage, epochs_done: int, callbacks: Sequence[keras.callbacks.Callback]) -> None:
    """Train a compiled network for the epochs of a stage that are not done yet, each on batches of its own."""
    for epoch in range(epochs_done, stage.epochs):
        network.fit(
            stage.batches(epoch),
            initial_epoch=epoch,
            epochs=epoch + 1,
            steps_per_epoch=stage.steps,
            shuffle=False,  # The batches are shuffled already.
            validation_data=stage.validation(),
            verbose=0,
            callbacks=[*callbacks],
        )


def _refuse_unrecorded(run: Run, file: str) -> None:
    """Raise RunError if training would replace a network that the run has not recorded."""
    if (run.folder / file).exists():
        raise RunError(
            f"{run.folder / file}: is not in manifest.json, so it is not known what it was made from; restore "
            "manifest.json, or remove the network to train it again"
        )


def _begin(trained: keras.Model, network: keras.Model, stage: Stage, run: Run | None, start_from: Path | None) -> None:
    """Remove what an earlier training of this network has left, and set the weights to begin with, if there are any.

    Args:
        trained: The network to train.
        network: A network of the same architecture to load the weights into; it may be the same one.
        stage: How it is trained.
        run: The run; None in a process that gets the weights from the main process.
        start_from: Folder of the network to start from.

    Raises:
        RunError: The network to start from is not the one that the run was started with.
    """
    if run:
        for folder in ("logs", "previews"):
            remove(run.folder / folder / stage.name)
    weights = devices.broadcast_from_main(_initial_weights(network, run, f"{stage.name}.keras", start_from))
    if weights is not None:
        print(f"{stage.name}: beginning with the weights of {start_from}")
        trained.set_weights(weights)


def _initial_weights(
    network: keras.Model, run: Run | None, file: str, start_from: Path | None
) -> list[np.ndarray] | None:
    """Load and return the weights to begin with; None without a run or a network to start from. See `_begin`."""
    expected = run.facts.get(f"start_from/{file}") if run else None
    if not run or not expected:
        return None
    path = (start_from or Path()) / file
    if not path.is_file() or checksum(path) != expected:
        raise RunError(
            f"start_from is {start_from}: {file} is missing there or differs from the one that {run.folder} was "
            "started with; restore it, or choose another run_dir"
        )
    saving.load_weights(network, path)
    return network.get_weights()


def _callbacks(
    stage: Stage,
    run: Run | None,
    seed: int,
    network: keras.Model,
    checkpoint: ResumableCheckpoint,
    previews: int,
) -> list[keras.callbacks.Callback]:
    """The callbacks of a stage. The checkpoint comes last: an epoch counts once everything else has recorded it."""
    writing: list[keras.callbacks.Callback] = []
    if run:
        logs = _log_folder(run, stage)
        writing = [CSVHistory(run, stage.name), TensorBoardScalars(logs)]
        if stage.preview and previews:
            folder = run.folder / "previews" / stage.name
            writing.append(Previews(stage.preview, network, stage.epochs, previews, folder, logs))
    return [
        ReseedEachEpoch(seed),
        TerminateOnNonFinite(checkpoint, stage.learning_rate_option, network, stage.part(network)),
        EpochSummary(stage.epochs, stage.shown),
        *writing,
        checkpoint,
    ]


def _log_folder(run: Run, stage: Stage) -> str:
    """The folder of a stage's logs, as TensorFlow needs it: in UTF-8, whatever the locale. Raises RunError."""
    try:
        return os.fsencode(run.folder / "logs" / stage.name).decode("utf-8")
    except UnicodeDecodeError as error:
        raise RunError(
            f"run_dir is {run.folder}: TensorFlow cannot use a folder whose name is not UTF-8; choose another run_dir"
        ) from error


@contextlib.contextmanager
def dtype_policy(name: str) -> Iterator[None]:
    """Context manager: networks made inside use this policy, those made outside float32."""
    keras.config.set_dtype_policy(name)
    try:
        yield
    finally:
        keras.config.set_dtype_policy("float32")


def make_optimizer(learning_rate: float, epochs: int, steps: int) -> keras.optimizers.Optimizer:
    """Adam whose learning rate rises over the first steps and then falls to 0 along a cosine.

    Gradients are clipped to a global norm of 1.

    Args:
        learning_rate: Peak of the learning rate.
        epochs: Number of epochs after which it reaches 0.
        steps: Number of steps per epoch.
    """
    warmup = min(steps, 20)
    schedule = keras.optimizers.schedules.CosineDecay(
        0.0, max(epochs * steps - warmup, 1), warmup_target=learning_rate, warmup_steps=warmup
    )
    return keras.optimizers.Adam(schedule, global_clipnorm=1.0)


# ----------------------------------------------------------------------------------------- weights to begin with


def initial_networks(
    start_from: Path | None, makers: Mapping[str, Callable[[], keras.Model]], run: Run, keep: Sequence[str] = ()
) -> dict[str, str]:
    """Find the networks that training begins with.

    Args:
        start_from: Folder of a finished run, or of its networks. None if training begins from scratch.
        makers: Functions that make the untrained networks of this run, by name.
        run: The run that is about to start. If it exists already, the folder is no longer needed.
        keep: Names of the networks that the folder must contain, because they are not trained.

    Returns:
        Checksums of those networks that the folder contains, by file name. The others begin untrained.

    Raises:
        RunError: The run is new, and the folder contains no VQ-VAE or a network of another architecture.
    """
    if start_from is None:
        return {}
    found = {name: path for name in makers if (path := start_from / f"{name}.keras").is_file()}
    if run.is_new:
        for name in ("vqvae", *keep):
            if name not in found:
                raise RunError(
                    f"start_from is {start_from}: contains no {name}.keras; give the folder of a finished run"
                )
        for name, path in found.items():
            _check_architecture(makers[name](), path)
        for name in sorted(makers.keys() - found.keys()):
            print(f"{start_from} contains no {name}.keras: this network is trained from scratch")
    return {path.name: checksum(path) for path in found.values()}


def _check_architecture(network: keras.Model, path: Path) -> None:
    """Raise RunError unless a .keras file in the folder `start_from` contains weights for this network."""
    other = saving.load_model(path, type(network))
    here, there = network.get_config(), other.get_config()
    shapes = [[tuple(weights.shape) for weights in one.weights] for one in (network, other)]
    if shapes[0] == shapes[1] and all(here.get(name) == there.get(name) for name in COMPARED_SETTINGS):
        return
    differing = [name for name in here if here[name] != there[name] and name not in ("seed", "data_variance")]
    shown = "; ".join(f"{name} is {there[name]} there, {here[name]} here" for name in differing)
    raise RunError(
        f"start_from is {path.parent}: {path.name} has another architecture than the network of this run ({shown}); "
        "use the same options, or choose another start_from"
    )
