"""Presets, the command line, and checks of the configuration.

Like stages.py, it is handed the class `Config` or an instance of it, and never imports driver.py.
"""

import argparse
import dataclasses
import difflib
import math
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import tyro

import console
import dataset
import devices
import masked
import model
import pngs

Config = TypeVar("Config", bound=Any)

# Not saved with a run.
RUNTIME_FIELDS = ("run_dir", "cache_dir", "devices", "coordinator", "num_processes", "process_index", "previews")
# Constants that only samples and what is made from them depend on: they may change in a finished run.
SAMPLING_FIELDS = (
    "num_candidates",
    "num_samples",
    "measured_slices",
    "sharp_samples",
    "sample_positions",
    "temperature",
    "top_k",
    "top_p",
)
MAX_ATTENTION_BYTES = 4e9  # Of all attention layers of a prior, in training.
PATH_FIELDS = ("data_dir", "start_from")  # May change; what is there is compared by its checksum.


class ConfigError(console.UserError):
    """A constant or option that cannot work."""


# ------------------------------------------------------------------------------------------------- presets

# Shared by the presets that follow earlier systems.
_EARLIER_WORK = {
    "codebook": "gradient",
    "dead_code_threshold": 0.0,
    "bottom_dropout": 0.0,
    "augment": False,
    "crop": 0,
    "background_code": False,
    "prior_attention": 0,
    "bottom_prior_attention": 0,
    "prior_augment": False,
    "selector_epochs": 0,
    "decoder_epochs": 0,
    "l1_weight": 0.0,
    "ssim_weight": 0.0,
}
# With gradients, the codes of these presets cannot follow the encoder, whose outputs grow without bound.
_MOVING_AVERAGES = {"codebook": "ema", "dead_code_threshold": 0.1}

# Name, description, and the constants that differ from driver.py's. Estimated from the time per step, the training of
# student256, residual256 and ssim256 takes an hour and a half at most on one core, in mixed precision, with a
# convolution peak of 450 GFLOP/s. That of hierarchical256 took 108 minutes on a core of another machine. Sampling and
# the evaluation took at least as long again.
PRESETS: dict[str, tuple[str, dict[str, Any]]] = {
    "oasis96": ("96 x 96, one level of 12 x 12 codes: the constants of driver.py, the default with data_dir", {}),
    "oasis192": (
        "192 x 192, the pixels of OASIS slices as they are, drawn from the codes of oasis96",
        {"image_size": 192, "coding_size": 96, "decoder_epochs": 14},
    ),
    "synthetic": (
        "64 x 64, 8 x 8 codes: a small model for synthetic slices, the default without data_dir",
        {
            "synthetic_subjects": 40,
            "image_size": 64,
            "grids": (8,),
            "channels": 24,
            "num_embeddings": 128,
            "embedding_dim": 16,
            "batch_size": 8,
            "vqvae_epochs": 20,
            "prior_filters": 64,
            "prior_blocks": 4,
            "prior_epochs": 8,
            "selector_epochs": 12,
            "decoder_epochs": 8,
            "decoder_batch_size": 4,
            "decoder_channels": 16,
        },
    ),
    "student96": (
        "earlier work: 96 x 96, 12 x 12 of 128 codes of 16 dimensions, no residual blocks, MSE, plain prior",
        {
            "channels": 32,
            "residual_blocks": 0,
            "num_embeddings": 128,
            "embedding_dim": 16,
            "prior": "plain",
            **_EARLIER_WORK,
        },
    ),
    "student256": (
        "earlier work: 256 x 256, 64 x 64 of 128 codes of 32 dimensions, plain prior",
        {
            "image_size": 256,
            "grids": (64,),
            "channels": 32,
            "residual_blocks": 0,
            "num_embeddings": 128,
            "embedding_dim": 32,
            "vqvae_epochs": 15,
            "prior": "plain",
            "prior_epochs": 4,
            **_EARLIER_WORK,
        },
    ),
    "residual256": (
        "earlier work: 256 x 256, residual blocks, 64 x 64 of 512 codes of 256 dimensions",
        {
            "image_size": 256,
            "grids": (64,),
            "embedding_dim": 256,
            "vqvae_epochs": 3,
            "prior_filters": 64,
            "prior_epochs": 2,
            **_EARLIER_WORK,
            **_MOVING_AVERAGES,
        },
    ),
    "hierarchical256": (
        "earlier work: 256 x 256, two levels of 32 x 32 and 64 x 64 of 128 codes",
        {
            "image_size": 256,
            "grids": (32, 64),
            "channels": 32,
            "num_embeddings": 128,
            "vqvae_epochs": 8,
            "prior_epochs": 2,
            **_EARLIER_WORK,
            **_MOVING_AVERAGES,
            "bottom_dropout": 0.25,  # Without it, the top level soon uses a single code.
        },
    ),
    "ssim256": (
        "earlier work: 256 x 256, 32 x 32 of 512 codes, residual blocks, MSE and SSIM, gated prior",
        {
            "image_size": 256,
            "grids": (32,),
            "vqvae_epochs": 4,
            "prior_epochs": 3,
            **_EARLIER_WORK,
            "ssim_weight": 1.0,  # Without MSE, the decoder only learns to draw black slices.
        },
    ),
}


def preset(config_class: type[Config], name: str) -> Config:
    """The configuration of a preset."""
    return config_class(name=name, **PRESETS[name][1])


# -------------------------------------------------------------------------------------------- command line


def parse(config_class: type[Config], arguments: Sequence[str], description: str) -> Config:
    """The configuration that a command line asks for.

    Without `--preset`, it is that of driver.py if there is a `data_dir`, otherwise the preset "synthetic".

    Args:
        config_class: The dataclass of the configuration.
        arguments: The command line without the program's name.
        description: First part of the help.

    Raises:
        ConfigError: An option or a preset does not exist.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--preset")
    chosen, rest = parser.parse_known_args(arguments)
    if chosen.preset not in (None, *PRESETS):
        raise ConfigError(f"--preset {chosen.preset}: no such preset; choose one of {', '.join(PRESETS)}")
    table = "\n".join(f"  --preset {name}: {about}" for name, (about, _) in PRESETS.items())
    about = f"{description}\nPresets; all other options change what they set:\n{table}"

    def configured(name: str) -> Config:
        config, unknown = tyro.cli(
            config_class,
            default=preset(config_class, name),
            args=rest,
            description=about,
            return_unknown_args=True,
        )
        if unknown:
            raise ConfigError(_unknown_option(config_class, unknown[0]))
        return config

    if chosen.preset:
        return configured(chosen.preset)
    config = configured("oasis96")
    if config.data_dir:
        return config
    print(
        'no data_dir: using the preset "synthetic", which overrides constants in driver.py; --preset oasis96 does not'
    )
    return configured("synthetic")


def _unknown_option(config_class: type, option: str) -> str:
    options = ["--preset", *(f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(config_class))]
    similar = difflib.get_close_matches(option, options, 1)
    return f"{option}: no such option; {f'did you mean {similar[0]}?' if similar else 'see python driver.py --help'}"


def coerce(config: Any) -> None:
    """Accept text for paths, and lists for tuples, in a configuration that is being created."""
    for name, given, wanted in (
        ("data_dir", str, Path),
        ("run_dir", str, Path),
        ("cache_dir", str, Path),
        ("start_from", str, Path),
        ("keep", list, tuple),
        ("grids", list, tuple),
        ("sample_positions", list, tuple),
    ):
        if isinstance(getattr(config, name), given):
            object.__setattr__(config, name, wanted(getattr(config, name)))


def run_folder(config: Any) -> Path:
    """`run_dir`, or runs/ and the run's name, followed by "-synthetic" if the slices are."""
    if config.run_dir:
        return config.run_dir
    suffix = "" if config.data_dir or "synthetic" in config.name else "-synthetic"
    return Path("runs") / f"{config.name}{suffix}"


def training_settings(config: Any) -> dict[str, Any]:
    """Keyword arguments of `training.train` that all stages share."""
    names = ("seed", "precision", "start_from", "keep", "previews")
    return {"num_devices": config.devices, **{name: getattr(config, name) for name in names}}


def sampling_arguments(config: Any) -> dict[str, Any]:
    """Keyword arguments of `Generator.sample` other than the positions."""
    return {name: getattr(config, name) for name in ("seed", "temperature", "top_k", "top_p")}


def data_note(config: Any) -> str:
    """What every picture says about the slices if they are not real."""
    return "" if config.data_dir else "SYNTHETIC slices, not real brains"


def to_json(config: Any) -> dict[str, Any]:
    """The configuration as it is saved in config.json: everything that determines the results of a run."""
    constants = {name: value for name, value in dataclasses.asdict(config).items() if name not in RUNTIME_FIELDS}
    constants |= {name: str(constants[name].resolve()) for name in PATH_FIELDS if constants[name]}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in constants.items()}


# -------------------------------------------------------------------------------------------------- checks


def check(config: Any) -> None:
    """Refuse a configuration that cannot work, before anything is loaded or written.

    Raises:
        ConfigError: Names the first such constant, its value, and what it must be.
    """

    def require(name: str, holds: Callable[[Any], bool], requirement: str) -> None:
        value = getattr(config, name)
        if not holds(value):
            raise ConfigError(f"{name} is {value}: must be {requirement}")

    for name, kind in typing.get_type_hints(type(config)).items():
        if not _has_type(getattr(config, name), kind):
            raise ConfigError(f"{name} is {getattr(config, name)}: must be {_describe_type(kind)}")
    for name in (
        "channels",
        "embedding_dim",
        "batch_size",
        "decoder_batch_size",
        "vqvae_epochs",
        "prior_blocks",
        "prior_epochs",
        "num_candidates",
        "num_samples",
        "measured_slices",
        "devices",
        "num_processes",
    ):
        require(name, lambda v: v >= 1, "at least 1")
    for name in ("num_embeddings", "prior_filters", "bottom_prior_filters", "decoder_channels"):
        require(name, lambda v: v >= 2, "at least 2")
    for name in ("vqvae_learning_rate", "prior_learning_rate", "decoder_learning_rate", "temperature"):
        require(name, lambda v: 0 < v < float("inf"), "a positive number")
    for name in ("commitment_weight", "mse_weight", "l1_weight", "ssim_weight"):
        require(name, lambda v: 0 <= v < float("inf"), "0 or a positive number")
    for name in ("residual_blocks", "selector_epochs", "decoder_epochs", "top_k", "process_index", "previews"):
        require(name, lambda v: v >= 0, "0 or more")
    require("seed", lambda v: 0 <= v < 2**32, "0 to 4294967295")
    require("crop", lambda v: v in (None, 0) or 16 <= v <= pngs.MAX_SIDE, f"None, 0, or 16 to {pngs.MAX_SIDE} pixels")
    for name in ("prior_attention", "bottom_prior_attention"):
        require(name, lambda v: 0 <= v <= config.prior_blocks, f"0 to prior_blocks, {config.prior_blocks}")
    for name in ("ema_decay", "dead_code_threshold", "bottom_dropout", "prior_dropout"):
        require(name, lambda v: 0 <= v < 1, "from 0 to below 1")
    require("synthetic_subjects", lambda v: v >= 3, "at least 3, one for each split")
    require("top_p", lambda v: 0 < v <= 1, "above 0 and at most 1")
    require("image_size", lambda v: v >= 16, "at least 16 (the SSIM window is 11 pixels wide)")
    require("image_size", lambda v: v <= pngs.MAX_SIDE, f"at most {pngs.MAX_SIDE}")
    require("prior_kernel_size", lambda v: v >= 3 and v % 2 == 1, "odd and at least 3")
    if config.mse_weight + config.l1_weight + config.ssim_weight == 0:
        raise ConfigError("mse_weight, l1_weight and ssim_weight are 0: at least one of them must be positive")
    if config.crop and not config.data_dir:
        raise ConfigError(
            f"crop is {config.crop}: synthetic slices are drawn at image_size; set data_dir, or set crop to 0"
        )
    if config.sample_positions and not config.prior_uses_position:
        raise ConfigError("sample_positions is set: also set prior_uses_position, or the prior ignores it")
    _check_kept(config)
    _check_processes(config, require)
    _check_grids(config)
    _check_attention(config)


def _check_kept(config: Any) -> None:
    """Refuse networks in `keep` that do not exist, or were made from other networks than those of the run."""
    num_levels = len(config.grids)
    allowed = ["vqvae", *model.prior_names(num_levels), *model.critic_names(num_levels)]
    allowed += ["selector"] if config.selector_epochs else []
    for name in config.keep:
        if name not in allowed:
            raise ConfigError(f"keep has {name}: choose from {', '.join(allowed)}")
    if config.keep and not config.start_from:
        raise ConfigError(f"keep is {' '.join(config.keep)}: also set start_from, the folder of these networks")
    if config.keep and "vqvae" not in config.keep:
        raise ConfigError(f"keep is {' '.join(config.keep)}: also keep vqvae, because priors belong to its codes")
    if "selector" in config.keep and not {*model.prior_names(num_levels)} <= {*config.keep}:
        raise ConfigError(f"keep is {' '.join(config.keep)}: also keep the priors, whose proposals the selector judges")


def _check_processes(config: Any, require: Callable[[str, Callable[[Any], bool], str], None]) -> None:
    require("coordinator", _is_coordinator, f'HOST:PORT of the first process, "{devices.CLUSTER}" or None')
    if config.coordinator and not devices.on_jax():
        raise ConfigError(f"coordinator is {config.coordinator}: several processes need JAX; set KERAS_BACKEND=jax")
    if config.num_processes > 1 and not config.coordinator:
        raise ConfigError(
            f"num_processes is {config.num_processes}: also set coordinator, HOST:PORT of the first process"
        )
    require("process_index", lambda v: v < config.num_processes, f"below num_processes, {config.num_processes}")


def _check_attention(config: Any) -> None:
    """Refuse attention layers that need more than `MAX_ATTENTION_BYTES` of memory. The critic has them in any case."""
    for grid, name in zip(config.grids, ("prior_attention", "bottom_prior_attention"), strict=False):
        # Scores, weights and gradients: float32 for each pair of cells.
        layer = 3 * 4 * masked.NUM_HEADS * config.batch_size * grid**4
        if getattr(config, name) * layer > MAX_ATTENTION_BYTES:
            raise ConfigError(
                f"{name} is {getattr(config, name)}: on a grid of {grid} × {grid} codes, at batch_size "
                f"{config.batch_size}, each layer needs {layer / 1e9:.1f} GB of memory; set it to 0, or choose a "
                "smaller batch_size"
            )


def _check_grids(config: Any) -> None:
    size = config.image_size if config.coding_size is None else config.coding_size
    ratio = config.image_size / size if size > 0 else 0
    if ratio < 1 or not math.log2(ratio).is_integer():
        raise ConfigError(
            f"coding_size is {size}: must be image_size, {config.image_size}, or smaller by a factor of 2, 4, 8, …"
        )
    try:
        model.check_grids(size, config.grids)
    except ValueError as error:
        raise ConfigError(f"grids: {error}") from error
    for grid in config.grids:
        try:
            model.block_dilations(grid, model.PixelCNN.FIRST_KERNEL, config.prior_kernel_size, config.prior_blocks)
        except ValueError as error:
            raise ConfigError(f"prior_blocks is {config.prior_blocks}: {error}") from error


def _is_coordinator(value: str | None) -> bool:
    host, _, port = (value or "").rpartition(":")
    return value in (None, devices.CLUSTER) or bool(host) and port.isdecimal() and 0 < int(port) < 65536


def _has_type(value: Any, kind: Any) -> bool:
    """Whether a constant has the type that its annotation states."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return value in arguments
    if origin is tuple:
        return isinstance(value, tuple) and all(_has_type(item, arguments[0]) for item in value)
    if arguments:
        return any(_has_type(value, one) for one in arguments)
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def _describe_generic(kind: Any) -> str:
    if typing.get_origin(kind) is tuple:
        return "whole numbers in brackets, as in (32, 64)" if int in typing.get_args(kind) else "texts in brackets"
    return "a whole number or None" if int in typing.get_args(kind) else "a path or None"


def _describe_type(kind: Any) -> str:
    names = {int: "a whole number", float: "a number", bool: "True or False", str: "text in quotes"}
    if typing.get_origin(kind) is Literal:
        return f"one of {', '.join(typing.get_args(kind))}"
    return names.get(kind, _describe_generic(kind))


def check_devices(config: Any) -> None:
    """Refuse devices that do not exist or cannot share a batch. Raises ConfigError."""
    available, total = len(devices.device_names()), devices.total_devices(config.devices)
    if config.devices > available:
        raise ConfigError(f"devices is {config.devices}: this process has {available}; choose at most that many")
    for name in ("batch_size", *(["decoder_batch_size"] if config.decoder_epochs else [])):
        if getattr(config, name) % total:
            raise ConfigError(
                f"{name} is {getattr(config, name)}: must be a multiple of the {total} devices that share each batch"
            )


def check_slices(config: Any, slices: dict[str, dataset.Slices]) -> None:
    """Refuse a configuration that does not fit the slices, or warn of it.

    Raises:
        ConfigError: A slice position in `sample_positions` does not occur in the training data, or the devices cannot
            share the slices evenly.
    """
    known, count, total = (
        np.unique(slices["train"].positions),
        len(slices["train"]),
        devices.total_devices(config.devices),
    )
    unknown = sorted(set(config.sample_positions) - set(known.tolist()))
    if unknown:
        raise ConfigError(f"sample_positions has {unknown[0]}: choose from {known.min()} to {known.max()}")
    shared = {"validation": len(slices["validate"])} | ({"training": count} if count < config.batch_size else {})
    for split, number in shared.items():
        if number % total:
            raise ConfigError(
                f"devices is {config.devices}: {total} in all cannot share {number} {split} slices evenly; choose "
                "another number"
            )
    if count < config.batch_size:
        console.warn(
            f"there are only {count} training slices for a batch_size of {config.batch_size}: each step uses all"
        )


def check_same_in_all_processes(config: Any, fingerprint: str) -> None:
    """Refuse constants or slices that differ from the main process's.

    Raises:
        ConfigError: A constant differs.
        dataset.DataError: The slices differ.
    """
    # Folders may have different names.
    own = to_json(config) | dict.fromkeys(PATH_FIELDS) | {"devices": config.devices}
    main, main_fingerprint = devices.broadcast_from_main((own, fingerprint))
    for name, value in own.items():
        if value != main[name]:
            raise ConfigError(f"{name} is {value}: the main process has {main[name]}; use the same in all processes")
    if fingerprint != main_fingerprint:
        raise dataset.DataError(
            f"data_dir is {config.data_dir}: contains other slices than the main process's; use the same in all "
            "processes"
        )
