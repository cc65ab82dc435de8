"""Geometries compared: what each reconstructs, how many bits its codes need, and how good its samples are.

    python -m benchmarks.rate --data-dir /path/to/slices [--crops 0 192] [--image-sizes 96] [--grids 12 16]

Makes a run for each combination of crop, image size, grid and codebook size, briefly trained, with the constants of
driver.py otherwise, but without a sharp decoder: it is the codes that are compared. The same command continues where it
was stopped. Prints a table, writes rate_distortion.png, and prints the rows as JSON. All runs train for the same number
of epochs, so that they can be compared with each other. Longer training improves each of them. The minutes are those of
training; a run that was made before is not timed again.
"""

import csv
import itertools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import driver
import plots
from benchmarks import common

SAMPLES = ("critic_auc", "precision", "recall", "coverage", "ms_ssim_of_pairs")


@dataclass(frozen=True)
class Options:
    """What to train, and for how long."""

    data_dir: Path | None = None  # folder of OASIS PNG slices; None generates synthetic ones
    folder: Path = Path("runs/rate")  # folder of the runs and the picture
    crops: tuple[int, ...] = ()  # sides of the central square that is used, 0 for whole slices; none: automatic
    image_sizes: tuple[int, ...] = (96,)  # heights and widths in pixels
    grids: tuple[int, ...] = (6, 12, 24)  # sides of the code grid, each one level
    num_embeddings: tuple[int, ...] = (64, 512)  # codebook sizes
    vqvae_epochs: int = 4
    prior_epochs: int = 2
    precision: Literal["float32", "mixed_float16", "mixed_bfloat16"] = "float32"  # of training


def main(options: Options) -> dict[str, Any]:
    """Train and measure every combination and return the rows, one per combination."""
    machine = common.report_machine()
    combinations = itertools.product(
        options.crops or (None,), options.image_sizes, options.grids, options.num_embeddings
    )
    rows = [make_run(options, *combination) for combination in combinations]
    columns = (
        "crop",
        "size",
        "grid",
        "codes",
        "bits",
        "SSIM",
        "brain",
        "c2st",
        "AUC",
        "prec.",
        "recall",
        "cover.",
        "min",
    )
    print("\n" + " ".join(f"{column:>6}" for column in columns))
    for row in rows:
        numbers = [row[name] for name in ("crop", "image_size", "grid", "num_embeddings", "prior_bits_per_image")]
        fractions = [row[name] for name in ("ssim", "ssim_brain", "c2st_reconstructions", *SAMPLES[:-1])]
        cells = [*(f"{value:>6.0f}" for value in numbers), *(f"{_shown(value):>6}" for value in fractions)]
        print(" ".join([*cells, f"{row['training_seconds'] / 60:>6.1f}"]))
    epochs = f"{options.vqvae_epochs} + {options.prior_epochs} epochs"
    note = epochs if options.data_dir else f"{epochs}; SYNTHETIC slices, not real brains"
    plots.rate_distortion(options.folder / "rate_distortion.png", rows, note)
    return {**machine, "rows": rows}


def _shown(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def make_run(options: Options, crop: int | None, image_size: int, grid: int, num_embeddings: int) -> dict[str, Any]:
    """Make one run and return its main numbers."""
    chosen: dict[str, Any] = {
        "crop": crop,
        "image_size": image_size,
        "grids": (grid,),
        "num_embeddings": num_embeddings,
    }
    name = "_".join(re.sub(r"\W", "", f"{key}{value}") for key, value in chosen.items())
    print(f"\n{name}")
    config = driver.Config(
        data_dir=options.data_dir,
        run_dir=options.folder / name,
        vqvae_epochs=options.vqvae_epochs,
        prior_epochs=options.prior_epochs,
        precision=options.precision,
        selector_epochs=0,
        decoder_epochs=0,
        previews=0,
        **chosen,
    )
    numbers = driver.main(config)
    samples, reconstructions = numbers["samples"], numbers["references"]["reconstructions"]
    with open(options.folder / name / "history.csv", encoding="utf-8", newline="") as history:
        seconds = sum(float(row["seconds"]) for row in csv.DictReader(history))
    return {
        "name": name,
        "training_seconds": seconds,
        **chosen,
        "crop": numbers["crop"],
        "grid": grid,
        **{name: numbers[name] for name in ("ssim", "ssim_brain", "psnr_db", "codes_used", "prior_bits_per_image")},
        **{name: samples[name] for name in SAMPLES},
        **{name: samples[name]["accuracy"] for name in ("c2st_real", "c2st_reconstructions")},
        "ms_ssim_of_reconstructed_pairs": reconstructions["ms_ssim_of_pairs"],
    }


if __name__ == "__main__":
    common.run_benchmark(main, Options, __doc__, "the same command continues after the last finished epoch")
