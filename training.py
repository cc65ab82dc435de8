"""How one network is trained: stages, the optimizer, and callbacks that survive a kill.

After each epoch `ResumableCheckpoint` saves everything that training needs to continue: weights, codebook, optimizer,
and the best weights so far. Everything else is a function of (seed, epoch) and needs no saving. A run that was killed
and continued is therefore bitwise identical to an uninterrupted one.
"""

import contextlib
import functools
import json
import os
import sys
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from PIL import Image

import console
import devices
import seeds
from run import Run, RunError, atomic_path, checksum, remove

MAX_CHECKPOINTS = 2  # Kept per stage. The older one is used if the newer one is damaged.
Logs = Mapping[str, Any]


@dataclass(frozen=True)
class Stage:
    """How one network is trained.

    Attributes:
        name: Name of the network; its file is NAME.keras, its rows in history.csv have this stage.
        make: Creates the untrained network.
        batches: Returns the training batches of an epoch, counted from 0, this process's shard of each.
        validation: This process's shard of the validation batches.
        steps: Number of training batches per epoch.
        monitor: Name of the validation metric that decides which epoch is best; lower is better.
        epochs: Number of epochs. The learning rate reaches 0 at the end of the last one.
        learning_rate: Peak of the learning rate.
        part: Returns the part of the network that is saved and used; the rest is needed in training only.
        made_from: Names of the results and facts of the run that determine the network; see `Run.make`.
        preview: Draws a small sheet of images, (H, W) in [0, 1], with a network that is not trained to the end yet.
        shown: Names of the metrics in the line that is printed per epoch.
        learning_rate_option: Name of the constant that sets the learning rate, for messages.
    """

    name: str
    make: Callable[[], keras.Model]
    batches: Callable[[int], tf.data.Dataset]
    validation: tf.data.Dataset
    steps: int
    monitor: str
    epochs: int
    learning_rate: float
    part: Callable[[keras.Model], keras.Model] = lambda network: network
    made_from: Sequence[str] = ("slices",)
    preview: Callable[[keras.Model], np.ndarray] | None = None
    shown: Sequence[str] = ("loss",)
    learning_rate_option: str = "learning_rate"


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
            load_weights(kept, run.folder / file)
        kept.set_weights(devices.broadcast_from_main(kept.get_weights()))
        return kept
    if stage.name in keep:
        _set_initial_weights(network, network, run, file, start_from)
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
            _set_initial_weights(trained, network, run, file, start_from)
        if epochs_done < stage.epochs:
            fit(trained, stage, epochs_done, _callbacks(stage, run, seed, network, checkpoint, previews))
    network.set_weights(checkpoint.best_weights)
    print(f"best epoch: {checkpoint.counters['best_epoch']}")
    return _save(kept, stage, run, made_from)


def _save(network: keras.Model, stage: Stage, run: Run | None, made_from: Sequence[str]) -> keras.Model:
    """Save and record what a stage has trained, if this process writes files. Returns it."""
    if run:
        file = f"{stage.name}.keras"
        save_model(network, run.folder / file)
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
            validation_data=stage.validation,
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


def _set_initial_weights(
    trained: keras.Model, network: keras.Model, run: Run | None, file: str, start_from: Path | None
) -> None:
    """Set a network that is not trained yet to the weights of the network to start from, if there is one.

    Args:
        trained: The network.
        network: A network of the same architecture to load the weights into.
        run: The run; None in a process that gets the weights from the main process.
        file: Name of the network's file.
        start_from: Folder of the network to start from.

    Raises:
        RunError: The network to start from is not the one that the run was started with.
    """
    weights = None
    if run:
        for folder in ("logs", "previews"):  # Of an earlier training.
            remove(run.folder / folder / Path(file).stem)
        if expected := run.facts.get(f"start_from/{file}"):
            path = (start_from or Path()) / file
            if not path.is_file() or checksum(path) != expected:
                raise RunError(
                    f"start_from is {start_from}: {file} is missing there or differs from the one that {run.folder} "
                    "was started with; restore it, or choose another run_dir"
                )
            load_weights(network, path)
            weights = network.get_weights()
    weights = devices.broadcast_from_main(weights)
    if weights is not None:
        print(f"{Path(file).stem}: beginning with the weights of {start_from}")
        trained.set_weights(weights)


def _callbacks(
    stage: Stage,
    run: Run | None,
    seed: int,
    network: keras.Model,
    checkpoint: "ResumableCheckpoint",
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
        TerminateOnNonFinite(checkpoint, stage.learning_rate_option, network),
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


# -------------------------------------------------------------------------------------------------- models


def save_model(network: keras.Model, path: Path) -> None:
    """Save a network as a .keras file that depends on the network only: the date that Keras adds is removed.

    Raises:
        RunError: The file cannot be written.
    """
    with atomic_path(path) as unfinished:
        network.save(unfinished)
        with zipfile.ZipFile(unfinished) as archive:
            parts = {name: archive.read(name) for name in archive.namelist()}
        metadata = json.loads(parts["metadata.json"])
        del metadata["date_saved"]
        parts["metadata.json"] = json.dumps(metadata).encode()
        with zipfile.ZipFile(unfinished, "w") as archive:
            for name, content in parts.items():
                archive.writestr(zipfile.ZipInfo(name), content)


def load_weights(network: keras.Model, path: Path) -> None:
    """Set a network's weights to those of a .keras file. Nothing else in the file is used, so no code in it can run.

    Raises:
        RunError: The file is damaged, or contains a different network.
    """
    try:
        network.load_weights(path)
    except Exception as error:  # A damaged file can raise anything.
        damaged = not zipfile.is_zipfile(path) or isinstance(error, zipfile.BadZipFile | OSError | EOFError)
        problem = "is damaged" if damaged else "contains a different network than this run's"
        raise RunError(f"{path}: {problem}; remove it to train it again, or choose another run_dir") from error


def load_model(path: Path, network_class: type[keras.Model]) -> keras.Model:
    """Load a network of a known class from a .keras file: its settings and its weights, no code.

    Args:
        path: A file that `save_model` has written.
        network_class: `model.VQVAE` or `model.PixelCNN`.

    Raises:
        RunError: The file is missing, damaged, or contains a different network.
    """
    if not path.exists():
        raise RunError(f"{path}: no such file; finish the run first, or choose another run folder")
    try:
        with zipfile.ZipFile(path) as archive:
            saved = json.loads(archive.read("config.json"))
        if saved["class_name"] != network_class.__name__:
            raise RunError(f"{path}: contains a {saved['class_name']}, not a {network_class.__name__}; choose another")
        network = network_class(**saved["config"])
    except (OSError, EOFError, zipfile.BadZipFile, ValueError, TypeError, KeyError) as error:
        raise RunError(f"{path}: is damaged ({error}); train it again, or choose another run folder") from error
    load_weights(network, path)
    return network


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
    other = load_model(path, type(network))
    here, there = network.get_config(), other.get_config()
    shapes = [[tuple(weights.shape) for weights in one.weights] for one in (network, other)]
    if shapes[0] == shapes[1] and here.get("background_threshold") == there.get("background_threshold"):
        return
    differing = [name for name in here if here[name] != there[name] and name not in ("seed", "data_variance")]
    shown = "; ".join(f"{name} is {there[name]} there, {here[name]} here" for name in differing)
    raise RunError(
        f"start_from is {path.parent}: {path.name} has another architecture than the network of this run ({shown}); "
        "use the same options, or choose another start_from"
    )


# ----------------------------------------------------------------------------------------------- callbacks


class ResumableCheckpoint(keras.callbacks.Callback):
    """Keeps the weights of the best epoch, and lets training continue after a kill.

    After each epoch it saves weights, optimizer, the best weights on validation, its counters, and the checksums of
    what the network is made from in one .npz file in checkpoint/ of the run folder.

    Args:
        run: The run; None in a process that does not write files and gets the state from the main process.
        stage: Name of the stage.
        monitor: Name of the metric to judge by; lower is better.
        made_from: Names of the results and facts that the network is made from. Checkpoints of a network that was
            made from others are not used.

    Attributes:
        counters: The number of epochs done, `epoch`, the lowest value of the metric, `best`, and the number of epochs
            that led to it, `best_epoch`.
        best_weights: Weights of the best epoch, None before the first one.
    """

    def __init__(
        self,
        run: Run | None,
        stage: str,
        monitor: str,
        made_from: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.run, self.stage, self.monitor = run, stage, monitor
        self.inputs = run.checksums(made_from) if run else {}
        self.folder = run.folder / "checkpoint" if run else None
        self.counters: dict[str, Any] = {"epoch": 0, "best": float("inf"), "best_epoch": 0}
        self.best_weights: list[np.ndarray] | None = None

    def restore(self, network: keras.Model) -> int:
        """Set a compiled network to its newest intact checkpoint and return the number of epochs that it has done.

        A damaged checkpoint is reported and removed, and the one before it is used.
        """
        network.optimizer.build(network.trainable_variables)
        found = devices.broadcast_from_main(self._read(network) if self.run else None)
        if found:
            self.counters, arrays = found
            for name, variable in self._state(network).items():
                variable.assign(arrays[name])
            self.best_weights = [arrays[f"best_{i:03d}"] for i in range(len(network.weights))]
        return self.counters["epoch"]

    def _read(self, network: keras.Model) -> tuple[dict[str, Any], dict[str, np.ndarray]] | None:
        """Counters and arrays of the newest intact checkpoint, None if there is none."""
        assert self.run
        for path in reversed(self._paths()):
            try:
                with np.load(path, allow_pickle=False) as file:
                    arrays = {name: file[name] for name in file.files}  # Compares the zip file's checksums.
                counters, inputs, history = json.loads(str(arrays.pop("state")))
                self._check(network, arrays)
            except Exception as error:  # A damaged file can raise anything.
                console.warn(f"{path}: is damaged ({error}); continuing from the checkpoint before it")
                remove(path)
                continue
            if inputs != self.inputs:
                print(f"{path}: was made from other networks or slices, so it is not used")
                remove(path)
                continue
            self.run.check_history({self.stage: history}, counters["epoch"])
            return counters, arrays
        return None

    def _paths(self) -> list[Path]:
        """Checkpoints of this stage, the newest last."""
        return sorted(self.folder.glob(f"{self.stage}_epoch_*.npz")) if self.folder else []

    def _check(self, network: keras.Model, arrays: dict[str, np.ndarray]) -> None:
        """Raise KeyError or ValueError if the arrays are not this network's."""
        expected = self._state(network) | {f"best_{i:03d}": weights for i, weights in enumerate(network.weights)}
        for name, variable in expected.items():
            if arrays[name].shape != tuple(variable.shape):
                raise ValueError(f"{name} has the shape {arrays[name].shape}, not {tuple(variable.shape)}")

    @staticmethod
    def _state(network: keras.Model) -> dict[str, keras.Variable]:
        weights = {f"weights_{i:03d}": variable for i, variable in enumerate(network.weights)}
        return weights | {f"optimizer_{i:03d}": variable for i, variable in enumerate(network.optimizer.variables)}

    def on_epoch_end(self, epoch: int, logs: Logs | None = None) -> None:
        logs = logs or {}
        value = float(logs[self.monitor])
        self.counters["epoch"] = epoch + 1
        if value < self.counters["best"]:
            self.counters |= {"best": value, "best_epoch": epoch + 1}
            self.best_weights = self.model.get_weights()
        if not self.folder:
            return
        arrays = {name: keras.ops.convert_to_numpy(variable) for name, variable in self._state(self.model).items()}
        arrays |= {f"best_{i:03d}": weights for i, weights in enumerate(self.best_weights or [])}
        assert self.run
        state = [self.counters, self.inputs, self.run.history_checksum(self.stage)]
        path = self.folder / f"{self.stage}_epoch_{epoch + 1:04d}.npz"
        with atomic_path(path) as unfinished, open(unfinished, "wb") as file:
            np.savez(file, state=np.array(json.dumps(state)), **arrays)
        for old in self._paths()[:-MAX_CHECKPOINTS]:
            remove(old)


class CSVHistory(keras.callbacks.Callback):
    """Writes a row of history.csv per epoch: stage, epoch, seconds, metrics of training and validation, learning rate.

    Args:
        run: The run.
        stage: Name of the stage.
    """

    # Columns in this order; with two levels, a level's name precedes some of them, as in top_codebook.
    ORDER = ("loss", "reconstruction", "codebook", "commitment", "ssim", "codes_used", "perplexity", "bits_per_code")

    def __init__(self, run: Run, stage: str) -> None:
        super().__init__()
        self.run, self.stage, self.started = run, stage, time.monotonic()

    def on_epoch_end(self, epoch: int, logs: Logs | None = None) -> None:
        logs = logs or {}
        trained = sorted((name for name in logs if not name.startswith("val_")), reverse=True)  # top before bottom
        names = [name for last in self.ORDER for name in trained if name == last or name.endswith(f"_{last}")]
        now = time.monotonic()
        row = {"stage": self.stage, "epoch": epoch + 1, "seconds": round(now - self.started, 2)}
        self.started = now  # The next epoch includes the time to make its batches, which comes before it begins.
        row |= {name: logs[name] for name in names} | {f"val_{name}": logs[f"val_{name}"] for name in names}
        row["learning_rate"] = current_learning_rate(self.model)
        self.run.add_epoch(row)


class TensorBoardScalars(keras.callbacks.Callback):
    """Writes the metrics of each epoch for TensorBoard, those of training and of validation in a folder each.

    Keras' own callback would begin new files with each call of `fit`, of which there is one per epoch.

    Args:
        folder: The folder that contains the two.
    """

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.folder = folder

    @functools.cached_property
    def writers(self) -> dict[str, Any]:
        return {kind: tf.summary.create_file_writer(f"{self.folder}/{kind}") for kind in ("train", "validation")}

    def on_epoch_end(self, epoch: int, logs: Logs | None = None) -> None:
        for name, value in (logs or {}).items():
            with self.writers["validation" if name.startswith("val_") else "train"].as_default():
                tf.summary.scalar(name.removeprefix("val_"), value, step=epoch + 1)
        for writer in self.writers.values():
            writer.flush()


class Previews(keras.callbacks.Callback):
    """Draws sheets of images while a network is trained, as PNGs and for TensorBoard.

    Args:
        draw: Draws a sheet with a network; see `Stage`.
        network: A network of the same architecture in float32, which gets the weights of the trained one.
        epochs: Number of epochs.
        count: Number of sheets, evenly over the epochs. The last one comes after the last epoch.
        folder: Where the PNGs are written.
        logs: Folder of the stage's logs.
    """

    def __init__(
        self,
        draw: Callable[[keras.Model], np.ndarray],
        network: keras.Model,
        epochs: int,
        count: int,
        folder: Path,
        logs: str,
    ) -> None:
        super().__init__()
        self.draw, self.network, self.epochs, self.count = draw, network, epochs, count
        self.folder, self.logs = folder, logs

    @functools.cached_property
    def writer(self) -> Any:
        return tf.summary.create_file_writer(f"{self.logs}/previews")

    def on_epoch_end(self, epoch: int, logs: Logs | None = None) -> None:
        if (epoch + 1) * self.count // self.epochs == epoch * self.count // self.epochs:
            return
        self.network.set_weights(self.model.get_weights())
        sheet = (np.clip(self.draw(self.network), 0, 1) * 255).round().astype(np.uint8)
        with atomic_path(self.folder / f"epoch_{epoch + 1:03d}.png") as unfinished:
            Image.fromarray(sheet).save(unfinished, "PNG")
        with self.writer.as_default():
            tf.summary.image("preview", sheet[None, ..., None], step=epoch + 1)
        self.writer.flush()


class EpochSummary(keras.callbacks.Callback):
    """Prints one line per epoch, and a progress bar within the epoch on terminals.

    Args:
        epochs: Maximum number of epochs.
        shown: Names of the metrics to print, of training and validation.
    """

    def __init__(self, epochs: int, shown: Sequence[str]) -> None:
        super().__init__()
        self.epochs, self.shown, self.started = epochs, shown, time.monotonic()

    def on_epoch_begin(self, epoch: int, logs: Logs | None = None) -> None:
        self.progress = console.progress(self.params["steps"], "steps")

    def on_train_batch_end(self, batch: int, logs: Logs | None = None) -> None:
        self.progress.update(1)

    def on_epoch_end(self, epoch: int, logs: Logs | None = None) -> None:
        self.progress.close()
        logs = logs or {}
        parts = [
            f"{name.replace('_', ' ')} {logs[name]:.4f} (validation {logs[f'val_{name}']:.4f})" for name in self.shown
        ]
        now = time.monotonic()
        head = f"epoch {epoch + 1:>{len(str(self.epochs))}}/{self.epochs}  {now - self.started:4.0f} s"
        self.started = now
        print("  ".join([head, *parts]))
        sys.stdout.flush()


class ReseedEachEpoch(keras.callbacks.Callback):
    """Makes dropout and restarts of codes a function of (seed, epoch), whatever ran before."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = seed

    def on_epoch_begin(self, epoch: int, logs: Logs | None = None) -> None:
        states = [v for v in self.model.non_trainable_variables if v.path.endswith("seed_generator_state")]
        for i, state in enumerate(states):
            state.assign(seeds.sequence(self.seed, "layers", epoch, i).generate_state(2))


class TerminateOnNonFinite(keras.callbacks.Callback):
    """Stop training if the loss is NaN or infinite (raises RunError) or a stop signal is pending (raises Stopped).

    Args:
        checkpoint: Its best weights are saved in checkpoint/ of the run folder, if there are any.
        learning_rate_option: Name of the constant that sets the learning rate.
        network: A network to put the best weights into.
    """

    def __init__(self, checkpoint: ResumableCheckpoint, learning_rate_option: str, network: keras.Model) -> None:
        super().__init__()
        self.checkpoint, self.learning_rate_option, self.network = checkpoint, learning_rate_option, network

    def on_epoch_begin(self, epoch: int, logs: Logs | None = None) -> None:
        self.epoch = epoch

    def on_train_batch_end(self, batch: int, logs: Logs | None = None) -> None:
        console.raise_if_stopped()
        self._check((logs or {})["loss"], f"in epoch {self.epoch + 1}")

    def on_epoch_end(self, epoch: int, logs: Logs | None = None) -> None:
        self._check((logs or {})[self.checkpoint.monitor], f"on the validation split after epoch {epoch + 1}")

    def _check(self, loss: float, when: str) -> None:
        if np.isfinite(loss):
            return
        kept = ""
        if self.checkpoint.folder and self.checkpoint.best_weights is not None:
            path = self.checkpoint.folder / f"{self.checkpoint.stage}.keras"
            self.network.set_weights(self.checkpoint.best_weights)
            save_model(self.network, path)
            kept = f"; the best model so far, of epoch {self.checkpoint.counters['best_epoch']}, is {path}"
        option, rate = self.learning_rate_option, current_learning_rate(self.model)
        raise RunError(
            f"{option}: the loss is {float(loss)} {when}, at a learning rate of {rate:.2g}; choose a lower {option} "
            f"and another run_dir{kept}"
        )


def current_learning_rate(network: keras.Model) -> float:
    """The learning rate that a compiled network uses now."""
    return float(keras.ops.convert_to_numpy(network.optimizer.learning_rate))
