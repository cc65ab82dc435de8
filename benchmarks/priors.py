"""Priors compared on the codes of subjects they have not seen: context, depth, width, and what they are conditioned on.

    python -m benchmarks.priors --run-dir runs/oasis128 --level 1 [--epochs 3]

Trains variants of the prior of one level on the codes of a finished run, from the same seeds and for the same number of
epochs, and keeps the best epoch on the validation split. Prints the number of weights, the seconds per epoch, the bits
per code, and by how much they differ from those of the first variant: the mean over slices and seeds, paired by slice,
with its 95 % interval over subjects, and its standard deviation over seeds. A difference between two single trainings
says little. The run folder is only read.
"""

import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import keras
import numpy as np

import dataset
import driver
import model
import stages
import training
import two_sample
from benchmarks import common
from generator import Generator
from options import ConfigError, from_json
from run import RunError, read_config


@dataclass(frozen=True)
class Options:
    """What to train, and for how long."""

    run_dir: Path  # a finished run
    level: int = 0  # whose codes to train on; 0 is the coarsest
    epochs: int = 3
    seeds: int = 1  # number of trainings of each variant
    variants: tuple[str, ...] = ()  # names of the variants to train; all by default. The first is the reference.
    split: Literal["validate", "test"] = "validate"  # to measure on; choose variants by the validation split


Variant = tuple[driver.Config, Callable[[], model.PixelCNN]]  # How it is trained, and what makes it untrained.


def variants(config: driver.Config, level: int) -> dict[str, Variant]:
    """Return the priors to compare, by name."""
    filters, attention = (f"{'bottom_' if level else ''}{name}" for name in ("prior_filters", "prior_attention"))

    def variant(**constants: Any) -> Variant:
        changed = dataclasses.replace(config, **constants)
        return changed, lambda: stages.make_prior(changed, level)

    def without_dilation() -> model.PixelCNN:
        with mock.patch.object(model, "block_dilations", lambda grid, first, kernel, blocks: [1] * blocks):
            return stages.make_prior(config, level)

    def without_top_level() -> model.PixelCNN:
        settings: dict[str, Any] = {**stages.make_prior(config, level).settings, "coarse_grid_size": None}
        keras.utils.set_random_seed(config.seed)
        return model.PixelCNN(**settings)

    priors = {
        "as configured": variant(),
        "without augmentation": variant(prior_augment=False),
        "without attention": variant(**{attention: 0}),
        "plain": variant(prior="plain", **{attention: 0}),
        "5 x 5 kernels": variant(prior_kernel_size=5),
        "1.5 times the blocks": variant(prior_blocks=config.prior_blocks * 3 // 2),
        "1.5 times the filters": variant(**{filters: getattr(config, filters) * 3 // 2}),
        "half the dropout": variant(prior_dropout=config.prior_dropout / 2),
        "without slice position": variant(prior_uses_position=False),
        "without dilation": (config, without_dilation),
    }
    return priors | ({"without the top level": (config, without_top_level)} if level else {})


def main(options: Options) -> dict[str, Any]:
    """Train all variants and return their numbers by name."""
    saved = read_config(options.run_dir)
    if saved is None:
        raise RunError(f"run_dir is {options.run_dir}: contains no run; choose the folder of a finished one")
    config = from_json(driver.Config, saved["constants"])
    check(options, config)
    slices = driver.load_slices(config)
    if dataset.fingerprint(slices) != saved["data"]:
        raise RunError(f"data_dir is {config.data_dir}: other slices than {options.run_dir} was trained on")
    generator = Generator.load(options.run_dir)
    codes = {split: generator.encode(split_slices.images) for split, split_slices in slices.items()}
    known = tuple(variants(config, options.level))
    names = options.variants or known
    if unknown := set(names) - set(known):
        raise ConfigError(f"--variants {unknown.pop()}: no such variant; choose from {', '.join(known)}")
    numbers: dict[str, Any] = common.report_machine()
    print(f"{'prior':24} {'weights':>10} {'s per epoch':>11} {'bits per code':>13}  difference from the first")
    nats: dict[str, np.ndarray] = {}
    for name in names:
        start, trained = time.monotonic(), []
        for seed in range(config.seed, config.seed + options.seeds):
            seeded = dataclasses.replace(config, seed=seed)
            changed, make = variants(seeded, options.level)[name]
            prior = train_prior(changed, make(), slices, codes, generator, options)
            priors = [prior if level == options.level else other for level, other in enumerate(generator.priors)]
            measured = Generator(generator.vqvae, priors, generator.positions)
            trained.append(measured.nats_per_code(codes[options.split], slices[options.split].positions)[options.level])
        seconds, nats[name] = (time.monotonic() - start) / (options.epochs * options.seeds), np.stack(trained)
        row = {
            "weights": prior.count_params(),
            "seconds": seconds,
            **compare(nats[names[0]], nats[name], slices, options),
        }
        lower, upper = row["interval"]
        spread = f"± {row['spread']:.1%} over seeds" if options.seeds > 1 else "one seed"
        print(
            f"{name:24} {row['weights']:>10,} {seconds:>11.0f} {row['bits_per_code']:>13.3f}  {row['difference']:+.1%} "
            f"({lower:+.1%} to {upper:+.1%}), {spread}",
            flush=True,
        )
        numbers[name] = row
    return numbers


def check(options: Options, config: driver.Config) -> None:
    """Raise ConfigError for options that cannot work with a run of this configuration."""
    if not 0 <= options.level < len(config.grids):
        raise ConfigError(f"level is {options.level}: must be 0 to {len(config.grids) - 1}, a level of the run")
    for name in ("epochs", "seeds"):
        if getattr(options, name) < 1:
            raise ConfigError(f"{name} is {getattr(options, name)}: must be at least 1")


def train_prior(
    config: driver.Config,
    prior: model.PixelCNN,
    slices: driver.Slices,
    codes: driver.Codes,
    encoder: Generator,
    options: Options,
) -> model.PixelCNN:
    """Train a prior and set it to its best epoch. Returns it."""
    config = dataclasses.replace(config, prior_epochs=options.epochs)
    stage = stages.prior_stage(config, slices, codes, encoder, options.level)
    prior.compile(training.make_optimizer(stage.learning_rate, stage.epochs, stage.steps))
    checkpoint = training.ResumableCheckpoint(None, stage.name, stage.monitor)
    training.fit(prior, stage, 0, [checkpoint])
    prior.set_weights(checkpoint.best_weights)
    return prior


def compare(reference: np.ndarray, nats: np.ndarray, slices: driver.Slices, options: Options) -> dict[str, Any]:
    """Compare the nats per code of two variants, (seeds, N) each: relative to the reference, paired by slice."""
    mean = float(reference.mean())
    difference, interval = two_sample.paired_difference(
        reference.mean(axis=0) / mean, nats.mean(axis=0) / mean, slices[options.split].subjects
    )
    by_seed = (nats - reference).mean(axis=1) / mean
    return {
        "bits_per_code": float(nats.mean() / math.log(2)),
        "difference": difference,
        "interval": interval,
        "spread": float(by_seed.std(ddof=1)) if len(by_seed) > 1 else None,
    }


if __name__ == "__main__":
    common.run_benchmark(main, Options, __doc__)
