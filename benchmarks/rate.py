"""Rate and distortion: what a few grids and codebook sizes reconstruct, and what their codes cost.

    python benchmarks/rate.py --data-dir /path/to/slices

Trains both stages briefly for each pair, from the driver's constants otherwise, in a run folder of its own: started
again, it goes on with what is missing. Prints a table, then its rows as JSON, and draws rate_distortion.png. All train
for equally many epochs, so that the pairs can be compared with each other; longer training improves each of them.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))

import dataset
import driver
import metrics
import plots


@dataclass(frozen=True)
class Options:
    """What to train, and for how long."""

    data_dir: Path | None = None  # folder of OASIS PNG slices; None makes synthetic ones
    folder: Path = Path("runs/rate")  # where the runs and the picture go
    grids: tuple[int, ...] = (6, 12, 24)  # sides of the code grid, each one level
    num_embeddings: tuple[int, ...] = (64, 512)  # codebook sizes
    image_size: int = 96
    vqvae_epochs: int = 4
    prior_epochs: int = 2


def main(options: Options) -> list[dict]:
    """Train and measure every pair; returns a row for each."""
    slices = dataset.load(options.data_dir, options.image_size, driver.Config.seed)
    rows = []
    for grid in options.grids:
        for num_embeddings in options.num_embeddings:
            rows.append(measure(options, slices, grid, num_embeddings))
    print(f"\n{'grid':>8} {'codes':>6} {'bits an image':>14} {'SSIM':>6} {'brain':>6} {'PSNR, dB':>9} {'used':>5}")
    for row in rows:
        print(
            f"{row['grid']:>3} × {row['grid']:<2} {row['num_embeddings']:>6} {row['prior_bits_per_image']:>14.0f} "
            f"{row['ssim']:>6.3f} {row['ssim_brain']:>6.3f} {row['psnr_db']:>9.1f} {row['codes_used']:>5.0%}"
        )
    epochs = f"{options.vqvae_epochs} + {options.prior_epochs} epochs"
    note = epochs if options.data_dir else f"{epochs}; SYNTHETIC slices, not real brains"
    plots.rate_distortion(options.folder / "rate_distortion.png", rows, note)
    print(json.dumps({"rows": rows}))
    return rows


def measure(options: Options, slices: dict, grid: int, num_embeddings: int) -> dict:
    """Train one pair, and its numbers on the test split."""
    constants = driver.Config(
        data_dir=options.data_dir,
        run_dir=options.folder / f"grid{grid}_codes{num_embeddings}",
        image_size=options.image_size,
        grids=(grid,),
        num_embeddings=num_embeddings,
        vqvae_epochs=options.vqvae_epochs,
        prior_epochs=options.prior_epochs,
    )
    driver.check(constants)
    run = driver.open_run(constants)
    with run.start(dataset.fingerprint(slices)):
        vqvae = driver.train_vqvae(constants, run, slices)
        codes = {split: driver.encode(vqvae, held.images, constants.batch_size) for split, held in slices.items()}
        priors = driver.train_priors(constants, run, codes, slices)
    test = slices["test"]
    reconstructions = driver.decode(vqvae, codes["test"], constants.batch_size)
    values = metrics.measures_by_slice(test.images, reconstructions)
    return {
        "grid": grid,
        "num_embeddings": num_embeddings,
        **driver.measure_codes(constants, priors, codes["test"], test),
        **{name: float(np.nanmean(values[name])) for name in metrics.MEASURES},
    }


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
