"""Learn brain MRI slices and make new ones: VQ-VAE, PixelCNN prior, sampling, numbers and pictures.

    python driver.py                             synthetic slices, for trying it out
    python driver.py --data-dir /path/to/slices  OASIS slices

Everything goes to the run folder. Killed or stopped at any moment and started again with the same constants, a run
goes on after its last finished epoch or step, to the same bytes.
"""

import os
import signal

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # TensorFlow is chatty where there is no GPU
if __name__ == "__main__":  # Ctrl-C while the imports below take their seconds; from then on see checkpoint.Stopped
    signal.signal(signal.SIGINT, lambda number, frame: os._exit(128 + number))
    usual = os.dup(2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what TensorFlow 2.21 says at import, no setting silences
    try:
        import tensorflow  # noqa: F401
    finally:
        os.dup2(usual, 2)

import argparse
import contextlib
import dataclasses
import difflib
import json
import platform
import sys
import typing
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import keras
import numpy as np
import tensorflow as tf
import tyro
from PIL import Image

import checkpoint
import dataset
import devices
import metrics
import model
import plots
import report
import sampling

PROJECT_VERSION = "0.4.0"


@dataclass(frozen=True)
class Config:
    """Every constant. Edit them here or pass them, as in --image-size 128."""

    data_dir: Path | None = None  # folder of OASIS PNG slices; None makes synthetic ones
    name: str = "oasis96"  # of the run: a preset's, or your own
    run_dir: Path | None = (
        None  # where everything of this run goes; None: runs/ and the name, "-synthetic" without data
    )
    skip_broken_slices: bool = False  # leave files that cannot be read out, listing each; else they end the run
    seed: int = 0  # fixes initial weights, shuffles, restarts, dropout, samples and synthetic people

    image_size: int = 96  # height and width in pixels; slices are resized to it
    grids: tuple[int, ...] = (12,)  # side of each level's code grid, one or two, the coarsest first, as in 32 64
    channels: int = 64  # of the encoder's first convolution; coarser resolutions have twice as many
    residual_blocks: int = 2  # at a code grid, in encoder and decoder; half as many at twice its resolution
    num_embeddings: int = 512  # K: codes in the codebook
    embedding_dim: int = 32  # D: length of a code
    codebook: Literal["ema", "gradient"] = "ema"  # codes follow moving averages, or the loss of equation 3
    ema_decay: float = 0.98  # γ of the moving averages
    commitment_weight: float = 0.25  # β of the commitment loss
    restart_below: float = 0.1  # share of the mean use below which a code restarts; 0 never restarts
    bottom_dropout: float = (
        0.25  # of two levels: share of training slices decoded from the top alone, so that it learns
    )
    mse_weight: float = 1.0  # of MSE / variance of the data in the reconstruction loss
    l1_weight: float = 1.0  # of the mean absolute error
    ssim_weight: float = 1.0  # of 1 − SSIM

    augment: bool = True  # mirror, brighten, turn and stretch the slices that the VQ-VAE trains on
    batch_size: int = 16  # slices in a training step, all stages
    precision: Literal["float32", "mixed_float16", "mixed_bfloat16"] = "float32"  # mixed is for GPUs and TPUs
    devices: int = 1  # GPUs of each process that a training step's batch is shared between; CPUs where there are none
    coordinator: str | None = None  # of several processes (JAX): HOST:PORT of the first, or "cluster": ask SLURM
    num_processes: int = 1  # that share a training step's batch, where coordinator is HOST:PORT
    process_index: int = 0  # of this process, from 0; only the first writes files
    vqvae_epochs: int = 50  # at most
    vqvae_learning_rate: float = 1e-3  # peak; rises over the first steps, then falls to 0 by a cosine
    vqvae_patience: int = 10  # epochs without a better validation reconstruction before stopping

    prior: Literal["gated", "plain"] = "gated"  # gated two-stack PixelCNN, or plain masked convolutions
    prior_filters: int = 128  # channels; of two levels, the top's
    bottom_prior_filters: int = 64  # channels of the bottom's, which has several times as many codes to go through
    prior_blocks: int = 6  # residual blocks
    prior_kernel_size: int = 3  # of the blocks' masked convolutions, odd; the first is 7 × 7
    prior_dropout: float = 0.2  # share of a block's activations dropped in training
    prior_uses_position: bool = True  # tell the prior the slice position
    prior_epochs: int = 20  # at most
    prior_learning_rate: float = 1e-3  # peak, as above
    prior_patience: int = 4  # epochs without a better validation loss before stopping

    num_samples: int = 20  # new brains
    sample_positions: tuple[int, ...] = ()  # slice positions to draw, in turn; none: as in the training data
    temperature: float = 1.0  # below 1 draws likelier codes, above 1 more varied ones
    top_k: int = 0  # draw among the k likeliest codes only; 0: all
    top_p: float = 1.0  # draw among the likeliest codes that hold this share of the probability

    def __post_init__(self):
        """Takes a path given as text, and a list of numbers, for what they mean."""
        for field, given, meant in (
            ("data_dir", str, Path),
            ("run_dir", str, Path),
            ("grids", list, tuple),
            ("sample_positions", list, tuple),
        ):
            if isinstance(getattr(self, field), given):
                object.__setattr__(self, field, meant(getattr(self, field)))


@dataclass(frozen=True)
class Preset:
    """A configuration with a name, and what it is."""

    config: Config
    about: str


def _preset(name: str, about: str, **constants) -> dict[str, Preset]:
    return {name: Preset(Config(name=name, **constants), about)}


# What all earlier systems share, where they differ from this one.
_EARLIER = {
    "codebook": "gradient",
    "restart_below": 0.0,
    "bottom_dropout": 0.0,
    "augment": False,
    "l1_weight": 0.0,
    "ssim_weight": 0.0,
}

PRESETS = {
    **_preset("oasis96", "one level of 12 × 12 codes; 40 min on 2 cores, test SSIM 0.940 at 760 bits an image"),
    **_preset(
        "oasis128",
        "two levels, 16 × 16 and 32 × 32, at 128 × 128; 42 min on 2 cores, test SSIM 0.972 at 4,071 bits an image",
        image_size=128,
        grids=(16, 32),
        channels=32,
        vqvae_epochs=25,
        prior_epochs=8,
    ),
    **_preset(
        "oasis256",
        "two levels, 32 × 32 and 64 × 64, at 256 × 256; 76 min on 2 cores, test SSIM 0.980 at 12,447 bits an image",
        image_size=256,
        grids=(32, 64),
        channels=32,
        bottom_dropout=0.15,
        batch_size=4,
        vqvae_epochs=8,
        prior_epochs=3,
    ),
    **_preset(
        "student96",
        "as earlier work: 12 × 12 codes, 128 of 16 dimensions, no residual blocks, plain prior; 10 min on 2 cores, "
        "test SSIM 0.903 at 261 bits an image",
        channels=32,
        residual_blocks=0,
        num_embeddings=128,
        embedding_dim=16,
        prior="plain",
        **_EARLIER,
    ),
    **_preset(
        "student256",
        "as earlier work: 256 × 256, 64 × 64 codes, 128 of 32 dimensions, plain prior; not run here",
        image_size=256,
        grids=(64,),
        channels=32,
        residual_blocks=0,
        num_embeddings=128,
        embedding_dim=32,
        prior="plain",
        **_EARLIER,
    ),
    **_preset(
        "residual256",
        "as earlier work: 256 × 256, residual, 64 × 64 codes, 512 of 256 dimensions; not run here",
        image_size=256,
        grids=(64,),
        embedding_dim=256,
        **_EARLIER,
    ),
    **_preset(
        "hierarchical256",
        "as earlier work: 256 × 256, two levels of 32 × 32 and 64 × 64 codes, 128; not run here",
        image_size=256,
        grids=(32, 64),
        num_embeddings=128,
        **_EARLIER,
    ),
    **_preset(
        "ssim256",
        "as earlier work: 256 × 256, three down-samplings, residual blocks, SSIM loss, gated prior; not run here",
        image_size=256,
        grids=(32,),
        **{**_EARLIER, "mse_weight": 0.0, "ssim_weight": 1.0},
    ),
}


PLACE_CONSTANTS = ("run_dir", "devices", "coordinator", "num_processes", "process_index")  # where a run takes place
SAMPLING_CONSTANTS = ("num_samples", "sample_positions", "temperature", "top_k", "top_p")
FILES_OF_SAMPLES = (  # what depends on those
    "samples",
    "metrics.json",
    *(f"images/{name}.png" for name in ("samples", "samples_by_position", "power_spectrum", "copies")),
)


def prior_names(config: Config) -> tuple[str, ...]:
    """The stages after the VQ-VAE, a prior for each level, the coarsest first."""
    return tuple(f"{level}_prior".lstrip("_") for level in model.level_names(len(config.grids)))


def prefixes(config: Config) -> list[str]:
    """What stands before the names of each level's files and columns: nothing where there is one level."""
    return [f"{level}_".lstrip("_") for level in model.level_names(len(config.grids))]


def picture_names(config: Config) -> tuple[str, ...]:
    """All files of images/."""
    names = ("vqvae_loss", "prior_loss", "ssim", "code_usage", "reconstructions", "worst", "by_position")
    names += ("power_spectrum", "codes", "codebook", "samples", "samples_by_position", "copies")
    return tuple(f"{name}.png" for name in (*names, *(["levels"] if len(config.grids) > 1 else [])))


class ConfigError(Exception):
    """A constant that cannot work. The message is one line that names it and says what to do."""


def check(config: Config) -> None:
    """Refuse what cannot work, before anything is loaded or written.

    Raises:
        ConfigError: names the first such field, its value and what it must be.
    """

    def require(field: str, holds: Callable, must: str) -> None:
        value = getattr(config, field)
        if not holds(value):
            raise ConfigError(f"{field} is {value}: must be {must}")

    for field, kind in typing.get_type_hints(Config).items():
        require(field, lambda v, kind=kind: _is_a(v, kind), _described(kind))
    positive = ("image_size", "channels", "num_embeddings", "embedding_dim", "batch_size", "vqvae_epochs")
    positive += ("vqvae_patience", "prior_filters", "bottom_prior_filters", "prior_blocks", "prior_epochs")
    positive += ("prior_patience", "num_samples", "devices", "num_processes")
    for field in positive:
        require(field, lambda v: v >= 1, "at least 1")
    for field in ("vqvae_learning_rate", "prior_learning_rate", "temperature"):
        require(field, lambda v: 0 < v < float("inf"), "a positive number")
    for field in ("commitment_weight", "mse_weight", "l1_weight", "ssim_weight"):
        require(field, lambda v: 0 <= v < float("inf"), "0 or a positive number")
    for field in ("seed", "residual_blocks", "top_k", "process_index"):
        require(field, lambda v: v >= 0, "0 or more")
    require("seed", lambda v: v < 2**32, "below 4294967296")
    for field in ("ema_decay", "restart_below", "bottom_dropout", "prior_dropout"):
        require(field, lambda v: 0 <= v < 1, "from 0 to below 1")
    require("num_embeddings", lambda v: v >= 2, "at least 2")
    require("top_p", lambda v: 0 < v <= 1, "above 0 and at most 1")
    require("image_size", lambda v: v >= 16, "at least 16 (SSIM's window is 11 pixels wide)")
    require("image_size", lambda v: v <= 4096, "at most 4096")
    require("prior_kernel_size", lambda v: v >= 3 and v % 2 == 1, "odd, and at least 3")
    require("coordinator", _is_coordinator, f'HOST:PORT of the first process, "{devices.CLUSTER}" or None')
    if config.coordinator and not devices.on_jax():
        raise ConfigError(f"coordinator is {config.coordinator}: several processes need JAX; set KERAS_BACKEND=jax")
    if config.num_processes > 1 and not config.coordinator:
        raise ConfigError(f"num_processes is {config.num_processes}: needs coordinator, the first one's HOST:PORT")
    require("process_index", lambda v: v < config.num_processes, f"below num_processes, {config.num_processes}")
    if config.mse_weight + config.l1_weight + config.ssim_weight == 0:
        raise ConfigError(
            f"mse_weight is {config.mse_weight}: one of mse_weight, l1_weight and ssim_weight must be positive"
        )
    if config.sample_positions and not config.prior_uses_position:
        raise ConfigError("sample_positions is set: needs prior_uses_position, else the prior cannot follow it")
    try:
        model.check_grids(config.image_size, config.grids)
    except ValueError as error:
        raise ConfigError(f"grids: {error}") from error
    for grid in config.grids:
        try:
            model.block_dilations(grid, model.PixelCNN.FIRST_KERNEL, config.prior_kernel_size, config.prior_blocks)
        except ValueError as error:
            raise ConfigError(f"prior_blocks is {config.prior_blocks}: {error}") from error


def check_devices(config: Config) -> None:
    """Refuse devices that there are not, or that cannot share a batch. Raises ConfigError."""
    there, sharing = len(devices.names()), devices.count(config.devices)
    if config.devices > there:
        raise ConfigError(f"devices is {config.devices}: this process has {there}; choose no more")
    if config.batch_size % sharing:
        raise ConfigError(
            f"batch_size is {config.batch_size}: must be a multiple of the {sharing} devices that share it"
        )


def check_alike(config: Config, fingerprint: str) -> None:
    """Refuse constants or slices that are not the first process'.

    Raises:
        ConfigError: a constant differs.
        dataset.DataError: the slices differ.
    """
    own = json_constants(config) | {"data_dir": None, "devices": config.devices}  # folders may have other names here
    first, first_fingerprint = devices.from_first((own, fingerprint))
    for name, value in own.items():
        if value != first[name]:
            raise ConfigError(f"{name} is {value}: the first process has {first[name]}; give all processes the same")
    if fingerprint != first_fingerprint:
        raise dataset.DataError(
            f"data_dir is {config.data_dir}: holds other slices than the first process has; give all processes the same"
        )


def _is_coordinator(value: str | None) -> bool:
    host, _, port = (value or "").rpartition(":")
    return value in (None, devices.CLUSTER) or bool(host) and port.isdecimal() and 0 < int(port) < 65536


def _is_a(value, kind) -> bool:
    """Whether a constant is of the type that `Config` says."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return value in arguments
    if origin is tuple:
        return isinstance(value, tuple) and all(_is_a(item, arguments[0]) for item in value)
    if arguments:
        return any(_is_a(value, one) for one in arguments)
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def _described(kind) -> str:
    names = {int: "a whole number", float: "a number", bool: "True or False", str: "text in quotes"}
    if typing.get_origin(kind) is Literal:
        return f"one of {', '.join(typing.get_args(kind))}"
    return names.get(kind, "whole numbers in brackets, as in (32, 64)" if "tuple" in str(kind) else "a path or None")


def check_slices(config: Config, slices: dict[str, dataset.Slices]) -> None:
    """Refuse, or warn of, what does not go with the slices that were found.

    Raises:
        ConfigError: a slice position to draw that no training slice has, or slices that devices cannot share.
    """
    known, count, sharing = np.unique(slices["train"].positions), len(slices["train"]), devices.count(config.devices)
    unknown = sorted(set(config.sample_positions) - set(known.tolist()))
    if unknown:
        raise ConfigError(f"sample_positions has {unknown[0]}: the training slices have {known.min()} to {known.max()}")
    shared = {"validation": len(slices["validate"])} | ({"training": count} if count < config.batch_size else {})
    for split, held in shared.items():
        if held % sharing:
            raise ConfigError(
                f"devices is {config.devices}: {sharing} in all cannot share {held} {split} slices evenly; choose "
                "another"
            )
    if count < config.batch_size:
        print(
            f"warning: {count} training slices are fewer than batch_size {config.batch_size}: each step takes all of "
            "them",
            file=sys.stderr,
        )


# ---------------------------------------------------------------------------------------------- the steps


def main(config: Config) -> dict:
    """Run all steps that are not done yet, in order; returns what stands in metrics.json, in the first process.

    Raises:
        ConfigError: a constant cannot work.
        devices.ProcessError: several processes cannot work together.
        dataset.DataError: the data cannot be used.
        checkpoint.RunError: the run folder cannot be used, or the run cannot go on.
        checkpoint.Stopped: Ctrl-C or SIGTERM, where `checkpoint.stop_on_signals` was called.
    """
    check(config)
    with devices.joined(config.coordinator, config.num_processes, config.process_index):
        check_devices(config)
        run = open_run(config) if devices.is_first() else None
        if devices.from_first(run is not None and run.has(all_files(config))):
            print(f"{run_folder(config)} is complete; nothing to do. Another run_dir or seed makes another run.")
            return finish(config, run) if run else {}

        print(f"data: {config.data_dir}" if config.data_dir else "data: SYNTHETIC slices, since data_dir is not set")
        slices = dataset.load(config.data_dir, config.image_size, config.seed, config.skip_broken_slices)
        for split, held in slices.items():
            print(f"  {split}: {len(held)} slices of {len(set(held.cases))} people")
        print(devices.described(config.devices))
        check_slices(config, slices)
        fingerprint = dataset.fingerprint(slices)
        check_alike(config, fingerprint)
        with run.start(fingerprint) if run else contextlib.nullcontext():
            vqvae = train_vqvae(config, run, slices)
            codes = {split: encode(vqvae, held.images, config.batch_size) for split, held in slices.items()}
            priors = train_priors(config, run, codes, slices)
            devices.leave()
            return use(config, run, vqvae, priors, codes, slices) if run else {}


def use(
    config: Config, run: checkpoint.Run, vqvae: model.VQVAE, priors: list, codes: dict[str, list], slices: dict
) -> dict:
    """All steps that need trained networks only: new brains, numbers, pictures, report; returns the numbers."""
    draw_samples(config, run, vqvae, priors, slices)
    made = Made(
        validate=decode(vqvae, codes["validate"], config.batch_size),
        test=decode(vqvae, codes["test"], config.batch_size),
        drawn=decode(vqvae, read_codes(config, run, "measured_codes", len(slices["test"])), config.batch_size),
    )
    measure(config, run, priors, codes["test"], slices, made)
    draw_pictures(config, run, vqvae, priors, codes["test"], slices, made)
    write_report(config, run)
    return finish(config, run)


@dataclass(frozen=True)
class Made:
    """Images (N, H, W, 1) float32 in [0, 1] that the decoder makes, for the numbers and the pictures."""

    validate: np.ndarray  # reconstructions of the validation split
    test: np.ndarray  # reconstructions of the test split
    drawn: np.ndarray  # new brains, as many as test slices and at their positions


def make_vqvae(config: Config, train: dataset.Slices) -> model.VQVAE:
    """The untrained VQ-VAE."""
    keras.utils.set_random_seed(config.seed)
    return model.VQVAE(
        image_size=config.image_size,
        grids=config.grids,
        channels=config.channels,
        residual_blocks=config.residual_blocks,
        num_embeddings=config.num_embeddings,
        embedding_dim=config.embedding_dim,
        commitment_weight=config.commitment_weight,
        codebook=config.codebook,
        ema_decay=config.ema_decay,
        restart_below=config.restart_below,
        mse_weight=config.mse_weight,
        l1_weight=config.l1_weight,
        ssim_weight=config.ssim_weight,
        data_variance=data_variance(train),
        bottom_dropout=config.bottom_dropout,
        seed=config.seed,
    )


def data_variance(train: dataset.Slices) -> float:
    """Variance of all pixels of the training slices, on the [0, 1] scale."""
    counts = sum(np.bincount(image.ravel(), minlength=256) for image in train.images)  # no float copy of them all
    grey = np.arange(256) / 255
    mean = np.average(grey, weights=counts)
    return max(float(np.average((grey - mean) ** 2, weights=counts)), 1e-6)


def make_prior(config: Config, level: int = 0) -> model.PixelCNN:
    """The untrained prior of a level, 0 the coarsest."""
    keras.utils.set_random_seed(config.seed + level)
    return model.PixelCNN(
        num_embeddings=config.num_embeddings,
        grid_size=(config.grids[level],) * 2,
        filters=config.bottom_prior_filters if level else config.prior_filters,
        num_blocks=config.prior_blocks,
        kernel_size=config.prior_kernel_size,
        dropout=config.prior_dropout,
        gated=config.prior == "gated",
        use_position=config.prior_uses_position,
        coarse_grid_size=(config.grids[level - 1],) * 2 if level else None,
    )


@contextlib.contextmanager
def precision(policy: str):
    """Networks made inside compute in this policy; what is loaded outside, to be used, in float32."""
    keras.config.set_dtype_policy(policy)
    try:
        yield
    finally:
        keras.config.set_dtype_policy("float32")


def make_optimizer(learning_rate: float, epochs: int, steps: int) -> keras.optimizers.Optimizer:
    """Adam whose rate rises over the first steps and falls to 0 by a cosine until the last epoch."""
    warm_up = min(steps, 20)
    schedule = keras.optimizers.schedules.CosineDecay(
        0.0, max(epochs * steps - warm_up, 1), warmup_target=learning_rate, warmup_steps=warm_up
    )
    return keras.optimizers.Adam(schedule, global_clipnorm=1.0)


def train_vqvae(config: Config, run: checkpoint.Run | None, slices: dict[str, dataset.Slices]) -> model.VQVAE:
    """The trained VQ-VAE."""
    train, validate = slices["train"], slices["validate"]
    return train_stage(
        config,
        run,
        "vqvae",
        make=lambda: make_vqvae(config, train),
        training=lambda epoch: dataset.image_batches(
            train, config.batch_size, config.seed, epoch, config.augment, devices.processes()
        ),
        validation=dataset.image_batches(validate, config.batch_size, share=devices.processes()),
        steps=dataset.steps_per_epoch(len(train), config.batch_size),
        monitor="val_reconstruction",
    )


def train_priors(
    config: Config, run: checkpoint.Run | None, codes: dict[str, list], slices: dict[str, dataset.Slices]
) -> list[model.PixelCNN]:
    """The trained prior of each level, the coarsest first."""
    return [train_prior(config, run, codes, slices, level) for level in range(len(config.grids))]


def train_prior(
    config: Config, run: checkpoint.Run | None, codes: dict[str, list], slices: dict[str, dataset.Slices], level: int
) -> model.PixelCNN:
    """The trained prior of one level's code indices, (N, h, w) of each split and level."""
    train, validate = slices["train"], slices["validate"]
    share = devices.processes()
    return train_stage(
        config,
        run,
        prior_names(config)[level],
        make=lambda: make_prior(config, level),
        training=lambda epoch: prior_batches(config, codes["train"], train, level, config.seed, epoch, share),
        validation=prior_batches(config, codes["validate"], validate, level, share=share),
        steps=dataset.steps_per_epoch(len(train), config.batch_size),
        monitor="val_loss",
    )


def train_stage(
    config: Config,
    run: checkpoint.Run | None,
    stage: str,
    make: Callable[[], keras.Model],
    training: Callable[[int], tf.data.Dataset],
    validation: tf.data.Dataset,
    steps: int,
    monitor: str,
) -> keras.Model:
    """Train either network, or go on with it, and save the best one on validation; or load it if that is done.

    Args:
        run: where to; None in a process that writes nothing.
        make: makes the untrained network, which is trained in the chosen precision and used in float32.
        training: endless batches, this process' share of each, from an epoch on; `steps` of them are an epoch.
        validation: this process' share of the batches to judge by.
        monitor: what to judge by; the less, the better.
    """
    network, path = make(), run.folder / f"{stage}.keras" if run else None
    if devices.from_first(run is not None and path.exists()):
        if run:
            checkpoint.load_weights(network, path)
            run.require_history(stage)
        network.set_weights(devices.from_first(network.get_weights()))
        return network
    kind = "vqvae" if stage == "vqvae" else "prior"
    epochs, patience, rate = (getattr(config, f"{kind}_{name}") for name in ("epochs", "patience", "learning_rate"))
    with devices.spread(config.devices):
        with precision(config.precision):
            trained = make()
        trained.compile(make_optimizer(rate, epochs, steps))
        saved = checkpoint.Checkpoint(run, stage, monitor, patience)
        done = saved.restore(trained)
        print(
            f"\ntraining {stage}: {network.count_params():,} weights, {steps} steps an epoch, at most {epochs} epochs"
        )
        if done:
            print(f"going on after epoch {done}")
        if done < epochs and not saved.counters["stopped"]:
            callbacks = [
                checkpoint.SeedEpoch(config.seed),
                checkpoint.StopWhenLost(saved, f"{kind}_learning_rate", network),
            ]
            if run:
                callbacks += [
                    checkpoint.History(run, stage, prefixes(config)),
                    keras.callbacks.TensorBoard(run.folder / "logs" / stage),
                ]
            trained.fit(
                training(done),
                initial_epoch=done,
                epochs=epochs,
                steps_per_epoch=steps,
                shuffle=False,  # the pipeline has done it
                validation_data=validation,
                verbose=1 if sys.stdout.isatty() else 2,
                callbacks=[*callbacks, saved],
            )
    network.set_weights(saved.best_weights)
    if run:
        checkpoint.save_model(network, path)
    return network


def prior_batches(
    config: Config,
    codes: list[np.ndarray],
    held: dataset.Slices,
    level: int,
    seed: int | None = None,
    first_epoch: int = 0,
    share: tuple[int, int] = (0, 1),
) -> tf.data.Dataset:
    """Batches for a level's prior of one split's codes, all levels' of them; see `dataset.code_batches`."""
    coarse = codes[level - 1] if level else None
    return dataset.code_batches(codes[level], held.positions, config.batch_size, seed, first_epoch, coarse, share)


def encode(vqvae: model.VQVAE, images: np.ndarray, batch_size: int) -> list[np.ndarray]:
    """Code indices of images (N, H, W, 1) uint8: (N, h, w) int32 of each level, the coarsest first."""
    return in_batches(lambda batch: vqvae.encode(dataset.to_float(batch)), [images], batch_size, "slices encoded")


def decode(vqvae: model.VQVAE, codes: list[np.ndarray], batch_size: int) -> np.ndarray:
    """Images (N, H, W, 1) float32 in [0, 1] of code indices (N, h, w) of each level."""
    return in_batches(lambda *batch: [vqvae.decode_code(batch)], codes, batch_size, "slices decoded")[0]


def in_batches(function: Callable, arrays: list[np.ndarray], batch_size: int, unit: str) -> list[np.ndarray]:
    """What a function makes of some rows of the arrays at a time, as whole arrays; shows progress."""
    bar, results = dataset.progress_bar(len(arrays[0]), unit), []
    for start in range(0, len(arrays[0]), batch_size):
        made = function(*[array[start : start + batch_size] for array in arrays])
        results.append([keras.ops.convert_to_numpy(tensor) for tensor in made])
        bar.add(len(results[-1][0]))
    return [np.concatenate(parts) for parts in zip(*results, strict=True)]


def draw_codes(config: Config, priors: list[model.PixelCNN], positions: np.ndarray, name: str) -> list[np.ndarray]:
    """Draw code indices (N, h, w) of each level, the finer given the coarser, with the configuration's seed and
    temperature, showing progress."""
    codes = []
    for level, prior in enumerate(priors):
        unit = f"{name} {model.level_names(len(priors))[level]}".strip()
        bar = dataset.progress_bar(len(positions), unit)
        codes.append(
            sampling.draw(
                prior,
                positions,
                [config.seed, level] if level else config.seed,
                codes[-1] if level else None,
                config.temperature,
                config.top_k,
                config.top_p,
                progress=bar.add,
            )
        )
    return codes


def draw_samples(config: Config, run: checkpoint.Run, vqvae, priors, slices: dict[str, dataset.Slices]) -> None:
    """New brains: their codes and one PNG each; and the codes of those that are measured."""
    folder = run.folder / "samples"
    if folder.exists():
        return
    print()
    positions = sample_positions(config, slices["train"].positions)
    codes = draw_codes(config, priors, positions, "samples")
    images = decode(vqvae, codes, config.batch_size)
    measured = draw_codes(config, priors, slices["test"].positions, "samples to be measured")
    with checkpoint.whole(folder) as unfinished:
        unfinished.mkdir()
        for level, prefix in enumerate(prefixes(config)):
            np.save(unfinished / f"{prefix}codes.npy", codes[level])
            np.save(unfinished / f"{prefix}measured_codes.npy", measured[level])
        for i, (image, position) in enumerate(zip(images, positions, strict=True)):
            grey = (image[..., 0] * 255).round().astype(np.uint8)
            Image.fromarray(grey).save(unfinished / f"sample_{i:03d}_slice_{position}.png")


def sample_positions(config: Config, train_positions: np.ndarray) -> np.ndarray:
    """(num_samples,) slice positions: the chosen ones in turn, or drawn as they occur in the training data."""
    if config.sample_positions:
        return np.resize(np.array(config.sample_positions, np.int32), config.num_samples)
    return np.random.default_rng([config.seed, 1]).choice(train_positions, config.num_samples).astype(np.int32)


def measure(config: Config, run: checkpoint.Run, priors, codes: list[np.ndarray], slices: dict, made: Made) -> None:
    """metrics.json: numbers over the whole test split, and of as many new brains."""
    path = run.folder / "metrics.json"
    if path.exists():
        return
    print("measuring reconstructions, codes and likelihood on the test split")
    train, validate, test = (slices[split] for split in dataset.SPLITS)
    numbers = {
        "test_slices": len(test),
        "test_people": len(set(test.cases)),
        **metrics.reconstruction_metrics(test.images, made.test, test.positions, test.cases, config.seed),
        **measure_codes(config, priors, codes, test),
    }
    numbers |= metrics.likelihood_metrics(
        (validate.images, made.validate), (test.images, made.test), numbers["prior_bits_per_image"]
    )
    print(f"measuring {len(made.drawn)} new brains against the test split (some minutes)")
    numbers["samples"] = metrics.sample_metrics(made.drawn, made.test, test, train, config.seed)
    checkpoint.write_text(path, json.dumps(without_nan(numbers), indent=2, allow_nan=False) + "\n")


def measure_codes(config: Config, priors, codes: list[np.ndarray], test: dataset.Slices) -> dict:
    """How the test split's codes use the codebooks and what the priors need for them, by level if there are two."""
    levels = []
    for level, prior in enumerate(priors):
        prior.compile()
        loss = prior.evaluate(prior_batches(config, codes, test, level), return_dict=True, verbose=0)["loss"]
        levels.append(
            {
                **metrics.code_metrics(codes[level], config.num_embeddings),
                **metrics.prior_metrics(loss, codes[level][0].size),
            }
        )
    return metrics.by_level(levels, model.level_names(len(priors)))


def without_nan(numbers):
    """Nested numbers with None in place of NaN, which JSON does not know."""
    if isinstance(numbers, dict):
        return {key: without_nan(value) for key, value in numbers.items()}
    if isinstance(numbers, list):
        return [without_nan(value) for value in numbers]
    return None if isinstance(numbers, float) and np.isnan(numbers) else numbers


def draw_pictures(
    config: Config, run: checkpoint.Run, vqvae, priors, codes: list[np.ndarray], slices: dict, made: Made
) -> None:
    """images/: all pictures that are missing."""
    print("drawing pictures")
    folder, note, train, test = run.folder / "images", data_note(config), slices["train"], slices["test"]
    numbers, levels = run.read_metrics(), vqvae.level_names
    shown = np.unique(np.linspace(0, len(test) - 1, min(10, len(test))).astype(int))
    shown = np.argsort(test.positions, kind="stable")[shown]  # spread over the positions
    originals, positions = dataset.to_float(test.images[shown]), test.positions[shown]
    shown_codes = [indices[shown] for indices in codes]
    labels = [f"slice {position}" for position in positions]

    def worst(path: Path) -> None:
        rows = numbers["worst_slices"]
        index = [row["index"] for row in rows]
        names = [f"{row['case']} slice {row['position']}\nbrain SSIM {row['ssim_brain'] or 0:.2f}" for row in rows]
        title = f"The {len(rows)} test slices with the lowest brain SSIM"
        plots.reconstructions(path, dataset.to_float(test.images[index]), made.test[index], names, note, title)

    def power_spectrum(path: Path) -> None:
        sets = {
            "test slices": dataset.to_float(test.images),
            "their reconstructions": made.test,
            "new brains": made.drawn,
        }
        spectra = {name: metrics.power_spectrum(images) for name, images in sets.items()}
        plots.power_spectrum(path, spectra, numbers["half_power_frequency"], note)

    def new_brains(path: Path) -> None:
        drawn = decode(vqvae, read_codes(config, run, "codes", config.num_samples), config.batch_size)
        plots.samples(path, drawn, sample_positions(config, train.positions), note)

    def by_position(path: Path) -> None:
        train_positions, rows = np.unique(train.positions), 4
        chosen = train_positions[np.unique(np.linspace(0, len(train_positions) - 1, 8).astype(int))]
        nearest = [int(np.argmin(np.abs(test.positions - position))) for position in chosen]
        drawn = decode(vqvae, draw_codes(config, priors, np.repeat(chosen, rows), "more samples"), config.batch_size)
        drawn = drawn.reshape(len(chosen), rows, *drawn.shape[1:])
        plots.samples_by_position(path, dataset.to_float(test.images[nearest]), drawn, chosen, note)

    def copies(path: Path) -> None:
        rows = numbers["samples"]["nearest_to_training"]
        names = [f"slice {test.positions[row['index']]}, r.m.s. {row['distance']:.3f}" for row in rows]
        nearest = dataset.to_float(train.images[[row["train_index"] for row in rows]])
        plots.copies(path, made.drawn[[row["index"] for row in rows]], nearest, names, note)

    def code_maps(path: Path) -> None:
        embeddings = [keras.ops.convert_to_numpy(quantizer.embeddings) for quantizer in vqvae.quantizers]
        plots.codes(path, originals, shown_codes, embeddings, levels, labels, note)

    def what_each_level_holds(path: Path) -> None:
        alone = [alone_at(vqvae, codes, level, shown) for level in range(len(levels))]
        plots.levels(path, originals, made.test[shown], alone, levels, labels, note)

    pictures = {
        "vqvae_loss": lambda path: plots.vqvae_loss(path, run.rows("vqvae"), levels, note),
        "prior_loss": lambda path: plots.prior_loss(
            path, {name: run.rows(name) for name in prior_names(config)}, config.num_embeddings, note
        ),
        "ssim": lambda path: plots.ssim(path, run.rows("vqvae"), note),
        "code_usage": lambda path: plots.code_usage(path, run.rows("vqvae"), levels, config.num_embeddings, note),
        "reconstructions": lambda path: plots.reconstructions(path, originals, made.test[shown], labels, note),
        "worst": worst,
        "by_position": lambda path: plots.by_position(path, numbers["by_position"], note),
        "power_spectrum": power_spectrum,
        "codes": code_maps,
        "codebook": lambda path: plots.codebook(path, codes, made.test, config.num_embeddings, levels, note),
        "samples": new_brains,
        "samples_by_position": by_position,
        "copies": copies,
        "levels": what_each_level_holds,
    }
    for name in picture_names(config):
        if not (folder / name).exists():
            with checkpoint.whole(folder / name) as unfinished:
                pictures[name.removesuffix(".png")](unfinished)


def alone_at(vqvae: model.VQVAE, codes: list[np.ndarray], level: int, shown: np.ndarray) -> np.ndarray:
    """Images (S, H, W, 1) of one level's codes, the other levels' replaced by the mean of their vectors."""
    quantized = []
    for i, (quantizer, indices) in enumerate(zip(vqvae.quantizers, codes, strict=True)):
        if i == level:
            quantized.append(quantizer.lookup(indices[shown]))
            continue
        embeddings = keras.ops.convert_to_numpy(quantizer.embeddings)
        share = np.bincount(indices.ravel(), minlength=len(embeddings)) / indices.size
        mean = (share @ embeddings).astype(np.float32)
        quantized.append(np.broadcast_to(mean, (len(shown), *indices.shape[1:], len(mean))))
    return keras.ops.convert_to_numpy(vqvae.decode(quantized))


def write_report(config: Config, run: checkpoint.Run) -> None:
    """report.html, from what stands in the run folder."""
    name, numbers = run.folder.name, run.read_metrics()
    with checkpoint.whole(run.folder / "report.html") as unfinished:
        report.write(unfinished, name, json_constants(config), numbers, run.history, data_note(config))


# ------------------------------------------------------------------------------------------ the run folder


def run_folder(config: Config) -> Path:
    """`run_dir`, or one with the run's name."""
    return config.run_dir or Path("runs") / f"{config.name}{'' if config.data_dir else '-synthetic'}"


def open_run(config: Config) -> checkpoint.Run:
    """The run folder. Raises checkpoint.RunError if it cannot be this configuration's."""
    return checkpoint.Run(
        run_folder(config), json_constants(config), versions(config), SAMPLING_CONSTANTS, FILES_OF_SAMPLES
    )


def all_files(config: Config) -> list[str]:
    """What a complete run has."""
    models = [f"{stage}.keras" for stage in ("vqvae", *prior_names(config))]
    pictures = [f"images/{name}" for name in picture_names(config)]
    return ["config.json", "history.csv", "metrics.json", "samples", "report.html", *models, *pictures]


def json_constants(config: Config) -> dict:
    """The constants as they stand in config.json: those that what comes out depends on, but for rounding."""
    constants = {name: value for name, value in dataclasses.asdict(config).items() if name not in PLACE_CONSTANTS}
    constants["data_dir"] = str(config.data_dir.resolve()) if config.data_dir else None
    return constants | {"grids": list(config.grids), "sample_positions": list(config.sample_positions)}


def versions(config: Config) -> dict[str, str]:
    """Of the project, and all else that has an effect on the last digits of numbers."""
    packages = ("tensorflow", "tensorflow-probability", "keras", "numpy", "scikit-image", "matplotlib")
    own = {"project": PROJECT_VERSION, "python": platform.python_version(), "backend": keras.backend.backend()}
    own["devices"] = str(devices.count(config.devices))
    return own | {name: version(name) for name in packages}


def data_note(config: Config) -> str:
    """What every picture says about the data, if they are not real."""
    return "" if config.data_dir else "SYNTHETIC slices, not real brains"


def read_codes(config: Config, run: checkpoint.Run, name: str, count: int) -> list[np.ndarray]:
    """Code indices (count, h, w) of each level that stand in samples/."""
    return [
        run.read_codes(f"{prefix}{name}", (count, grid, grid), config.num_embeddings)
        for prefix, grid in zip(prefixes(config), config.grids, strict=True)
    ]


def finish(config: Config, run: checkpoint.Run) -> dict:
    """Print where things are and the main numbers; returns them."""
    checkpoint.remove(run.folder / "checkpoint")
    numbers, history = run.read_metrics(), run.read_history()
    people = f"{numbers['test_slices']} slices of {numbers['test_people']} people"
    print(f"\n{data_note(config) or 'real slices'}; test split: {people}")
    for finding in report.findings(json_constants(config), numbers, history):
        print(f"  {finding.title}: {finding.says}")
    stages = dict.fromkeys(row["stage"] for row in history)
    seconds = [sum(row["seconds"] for row in history if row["stage"] == stage) for stage in stages]
    print(f"  Training took {' + '.join(f'{spent / 60:.1f}' for spent in seconds)} minutes.")
    print(f"read {run.folder / 'report.html'}; pictures are in images/, new brains in samples/ beside it")
    return numbers


def parse(arguments: list[str]) -> Config:
    """The configuration that a command line asks for. Raises ConfigError for options that there are not."""
    presets = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    presets.add_argument("--preset", choices=PRESETS, default="oasis96")
    chosen, rest = presets.parse_known_args(arguments)
    table = "\n".join(f"  --preset {name}: {preset.about}" for name, preset in PRESETS.items())
    about = f"{__doc__}\nPresets, which all other options change:\n{table}"
    default = PRESETS[chosen.preset].config
    config, unknown = tyro.cli(Config, default=default, args=rest, description=about, return_unknown_args=True)
    if unknown:
        options = ["--preset", *(f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(Config))]
        near = difflib.get_close_matches(unknown[0], options, 1)
        raise ConfigError(
            f"{unknown[0]}: no such constant; {f'did you mean {near[0]}?' if near else 'see python driver.py --help'}"
        )
    return config


def command_line() -> int:
    """Parse the constants and run; the exit status is 0, 2 for bad input, 130 after Ctrl-C and 143 after SIGTERM."""
    config = None
    try:
        checkpoint.stop_on_signals()
        config = parse(sys.argv[1:])
        main(config)
    except (ConfigError, dataset.DataError, checkpoint.RunError, devices.ProcessError) as error:
        print(f"error: {dataset.one_line(error)}", file=sys.stderr)
        return 2
    except checkpoint.Stopped as stopped:
        where = f" of {dataset.one_line(run_folder(config))}" if config else ""
        print(f"\nstopped; the same command goes on after the last finished epoch or step{where}", file=sys.stderr)
        return stopped.status
    return 0


if __name__ == "__main__":
    devices.end(command_line())
