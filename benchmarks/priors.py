"""Priors compared on the codes of subjects they have not seen: context, depth, width, and what they are conditioned on.

    python -m benchmarks.priors --run-dir runs/oasis128 --level 1 [--epochs 3]

Trains variants of the prior of one level on the codes of a finished run, from the same seed and for the same number of
epochs. Prints the number of weights, the seconds per epoch, and the lowest bits per code on the validation split. The
run folder is only read.
"""

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import keras
import tensorflow as tf

import dataset
import driver
import model
from benchmarks import common
from generator import Generator
from options import from_json
from run import RunError, read_config
from training import make_optimizer


@dataclass(frozen=True)
class Options:
    """What to train, and for how long."""

    run_dir: Path  # a finished run
    level: int = 0  # whose codes to train on; 0 is the coarsest
    epochs: int = 3


def make_variants(config: driver.Config, level: int) -> dict[str, model.PixelCNN]:
    """Return the untrained priors to compare, by name."""
    filters = "bottom_prior_filters" if level else "prior_filters"

    def make(**constants: Any) -> model.PixelCNN:
        return driver.make_prior(dataclasses.replace(config, **constants), level)

    priors = {
        "as configured": make(),
        "5 x 5 kernels": make(prior_kernel_size=5),
        "1.5 times the blocks": make(prior_blocks=config.prior_blocks * 3 // 2),
        "1.5 times the filters": make(**{filters: getattr(config, filters) * 3 // 2}),
        "plain": make(prior="plain"),
        "without slice position": make(prior_uses_position=False),
    }
    with mock.patch.object(model, "block_dilations", lambda grid, first, kernel, blocks: [1] * blocks):
        priors["without dilation"] = make()
    if level:
        settings: dict[str, Any] = {**priors["as configured"].settings, "coarse_grid_size": None}
        keras.utils.set_random_seed(config.seed)
        priors["without the top level"] = model.PixelCNN(**settings)
    return priors


def main(options: Options) -> dict[str, Any]:
    """Train all variants and return their numbers by name."""
    saved = read_config(options.run_dir)
    if saved is None:
        raise RunError(f"run_dir is {options.run_dir}: contains no run; choose the folder of a finished one")
    config = from_json(driver.Config, saved["constants"])
    slices = dataset.load(config.data_dir, config.image_size, config.seed, config.skip_broken_slices)
    generator = Generator.load(options.run_dir)
    codes = {split: generator.encode(slices[split].images) for split in ("train", "validate")}
    steps = dataset.steps_per_epoch(len(slices["train"]), config.batch_size)
    numbers: dict[str, Any] = common.report_machine()
    print(f"{'prior':28} {'weights':>10} {'s per epoch':>11} {'bits per code':>13}")
    for name, prior in make_variants(config, options.level).items():

        def batches(split: str, prior: model.PixelCNN = prior, seed: int | None = None) -> tf.data.Dataset:
            inputs = {"codes": codes[split][options.level], "positions": slices[split].positions}
            if prior.coarse_grid_size:
                inputs["coarse"] = codes[split][options.level - 1]
            return dataset.code_batches(inputs, config.batch_size, seed)

        prior.compile(make_optimizer(config.prior_learning_rate, options.epochs, steps))
        start = time.monotonic()
        history = prior.fit(
            batches("train", seed=config.seed),
            epochs=options.epochs,
            steps_per_epoch=steps,
            shuffle=False,
            validation_data=batches("validate"),
            verbose=0,
        ).history
        seconds, bits = (time.monotonic() - start) / options.epochs, min(history["val_bits_per_code"])
        print(f"{name:28} {prior.count_params():>10,} {seconds:>11.0f} {bits:>13.3f}", flush=True)
        numbers[name] = {"weights": prior.count_params(), "seconds": seconds, "bits_per_code": bits}
    return numbers


if __name__ == "__main__":
    common.run_benchmark(main, Options, __doc__)
