"""Which prior expects unseen people's codes best: what context, depth and the coarser level are worth.

    python benchmarks/priors.py --run-dir runs/oasis128 --level 1 [--epochs 3]

Trains variants of one level's prior on the codes of a finished run, from the same seed for equally many epochs, and
prints weights, seconds an epoch and the best bits a code on the validation split. The run itself is only read.
"""

import dataclasses
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import keras
import tyro

sys.path.insert(0, str(Path(__file__).parents[1]))

import dataset
import driver
import model


@dataclass(frozen=True)
class Options:
    run_dir: Path  # a finished run
    level: int = 0  # whose codes, 0 the coarsest
    epochs: int = 3


def read_config(run_dir: Path) -> driver.Config:
    """The configuration of a run."""
    constants = json.loads((run_dir / "config.json").read_text())["constants"]
    constants |= {name: tuple(constants[name]) for name in ("grids", "sample_positions")}
    constants["data_dir"] = constants["data_dir"] and Path(constants["data_dir"])
    return driver.Config(**constants, run_dir=run_dir)


def variants(config: driver.Config, level: int) -> dict[str, model.PixelCNN]:
    """The untrained priors to compare, by name."""
    filters = "bottom_prior_filters" if level else "prior_filters"

    def make(**constants) -> model.PixelCNN:
        return driver.make_prior(dataclasses.replace(config, **constants), level)

    priors = {
        "as configured": make(),
        "5 x 5 kernels": make(prior_kernel_size=5),
        "half as many blocks again": make(prior_blocks=config.prior_blocks * 3 // 2),
        "half as many filters again": make(**{filters: getattr(config, filters) * 3 // 2}),
        "plain": make(prior="plain"),
        "not told the position": make(prior_uses_position=False),
    }
    with mock.patch.object(model, "block_dilations", lambda grid, first, kernel, blocks: [1] * blocks):
        priors["no dilation"] = make()
    if level:
        settings = {**priors["as configured"].settings, "coarse_grid_size": None}
        keras.utils.set_random_seed(config.seed)
        priors["not told the top"] = model.PixelCNN(**settings)
    return priors


def main(options: Options) -> None:
    config = read_config(options.run_dir)
    slices = dataset.load(config.data_dir, config.image_size, config.seed)
    vqvae = keras.saving.load_model(options.run_dir / "vqvae.keras", compile=False)
    train, validate = slices["train"], slices["validate"]
    codes = {split: driver.encode(vqvae, slices[split].images, 16) for split in ("train", "validate")}
    steps = dataset.steps_per_epoch(len(train), config.batch_size)
    summary = {}
    print(f"{'prior':28} {'weights':>10} {'s an epoch':>11} {'bits a code':>12}")
    for name, prior in variants(config, options.level).items():
        prior.compile(driver.make_optimizer(config.prior_learning_rate, options.epochs, steps))
        begun = time.monotonic()
        told = prior.coarse_grid_size is not None
        history = prior.fit(
            batches(config, codes["train"], train, options.level, told, config.seed),
            epochs=options.epochs,
            steps_per_epoch=steps,
            shuffle=False,
            validation_data=batches(config, codes["validate"], validate, options.level, told),
            verbose=0,
        ).history
        seconds, bits = (time.monotonic() - begun) / options.epochs, min(history["val_bits_per_code"])
        print(f"{name:28} {prior.count_params():>10,} {seconds:>11.0f} {bits:>12.3f}", flush=True)
        summary[name] = {"weights": prior.count_params(), "seconds": seconds, "bits_per_code": bits}
    print(json.dumps(summary))


def batches(config: driver.Config, codes: list, held: dataset.Slices, level: int, told: bool, seed: int | None = None):
    """Batches of a level's codes; with the coarser level's where the prior is told them."""
    coarse = codes[level - 1] if told else None
    return dataset.code_batches(codes[level], held.positions, config.batch_size, seed, coarse=coarse)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
