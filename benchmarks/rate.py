"""Rate and distortion: how well a few grids and codebook sizes reconstruct, and how many bits their codes need.

    python -m benchmarks.rate --data-dir /path/to/slices

Trains both stages briefly for each pair of a grid and a codebook size, with the constants of driver.py otherwise, in a
run folder of its own: the same command continues where it was stopped. Prints a table, writes rate_distortion.png, and
prints the rows as JSON. All pairs train for the same number of epochs, so that they can be compared with each other.
Longer training improves each of them.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import dataset
import driver
import metrics
import plots
from benchmarks import common
from options import check


@dataclass(frozen=True)
class Options:
    """What to train, and for how long."""

    data_dir: Path | None = None  # folder of OASIS PNG slices; None generates synthetic ones
    folder: Path = Path("runs/rate")  # folder of the runs and the picture
    grids: tuple[int, ...] = (6, 12, 24)  # sides of the code grid, each one level
    num_embeddings: tuple[int, ...] = (64, 512)  # codebook sizes
    image_size: int = 96  # height and width in pixels
    vqvae_epochs: int = 4
    prior_epochs: int = 2


def main(options: Options) -> dict[str, Any]:
    """Train and measure every pair; returns one row per pair."""
    slices = dataset.load(options.data_dir, options.image_size, driver.Config.seed)
    rows = [
        train_and_measure(options, slices, grid, num_embeddings)
        for grid in options.grids
        for num_embeddings in options.num_embeddings
    ]
    print(f"\n{'grid':>8} {'codes':>6} {'bits per image':>14} {'SSIM':>6} {'brain':>6} {'PSNR, dB':>9} {'used':>5}")
    for row in rows:
        print(
            f"{row['grid']:>3} × {row['grid']:<2} {row['num_embeddings']:>6} {row['prior_bits_per_image']:>14.0f} "
            f"{row['ssim']:>6.3f} {row['ssim_brain']:>6.3f} {row['psnr_db']:>9.1f} {row['codes_used']:>5.0%}"
        )
    epochs = f"{options.vqvae_epochs} + {options.prior_epochs} epochs"
    note = epochs if options.data_dir else f"{epochs}; SYNTHETIC slices, not real brains"
    plots.rate_distortion(options.folder / "rate_distortion.png", rows, note)
    return {"rows": rows}


def train_and_measure(
    options: Options, slices: dict[str, dataset.Slices], grid: int, num_embeddings: int
) -> dict[str, Any]:
    """Train one pair and measure it on the test split."""
    config = driver.Config(
        data_dir=options.data_dir,
        run_dir=options.folder / f"grid{grid}_codes{num_embeddings}",
        image_size=options.image_size,
        grids=(grid,),
        num_embeddings=num_embeddings,
        vqvae_epochs=options.vqvae_epochs,
        prior_epochs=options.prior_epochs,
    )
    check(config)
    run = driver.open_run(config)
    positions = np.unique(slices["train"].positions).tolist()
    with run.start(dataset.fingerprint(slices), slice_positions=positions):
        encoder, codes = driver.train_vqvae(config, run, slices)
        generator = driver.train_priors(config, run, driver.prior_stages(config, slices, codes), encoder)
    test, (grids,) = slices["test"], codes["test"]
    by_slice = metrics.metrics_by_slice(test.images, generator.decode(codes["test"]))
    (nats,) = generator.nats_per_code(codes["test"], test.positions)
    return {
        "grid": grid,
        "num_embeddings": num_embeddings,
        **metrics.code_metrics(grids, num_embeddings),
        **metrics.prior_metrics(float(nats.mean()), grids[0].size),
        **{name: float(np.nanmean(by_slice[name])) for name in metrics.RECONSTRUCTION_METRICS},
    }


if __name__ == "__main__":
    common.run_benchmark(main, Options, __doc__, "the same command continues after the last finished epoch")
