"""Geometries compared: what each reconstructs, how many bits its codes need, and how good its samples are.

    python -m benchmarks.rate --data-dir /path/to/slices [--variants grid6 grid12]

Makes one run for each variant in `VARIANTS`, with the constants of driver.py otherwise, but with fewer epochs, and
without a selector and a sharp decoder: it is the codes that are compared. The same command continues where it was
stopped. Prints a table, writes rate_distortion.png, and prints the rows as JSON. All runs train for the same number of
epochs, so that they can be compared with each other. Longer training improves each of them. The minutes are those of
training; a run that was made before is not timed again.
"""

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import driver
import plots
from benchmarks import common
from console import UserError

VARIANTS: dict[str, dict[str, Any]] = {  # name of the run, changes of the default constants
    "grid12": {},
    "grid6": {"grids": (6,)},
    "grid24": {"grids": (24,)},
    "codes64": {"num_embeddings": 64},
    "codes2048": {"num_embeddings": 2048},
    "whole_frame": {"crop": 0},
    "image128": {"image_size": 128, "grids": (16,)},
}
COLUMNS = {  # heading of each column of the table, name of the number
    "bits": "prior_bits_per_image",
    "SSIM": "ssim",
    "brain": "ssim_brain",
    "c2st": "c2st_reconstructions",
    "codes": "c2st_codes",
    "AUC": "critic_auc",
    "prec.": "precision",
    "recall": "recall",
    "cover.": "coverage",
    "pairs": "ms_ssim_of_pairs",
    "(rec.)": "ms_ssim_of_reconstructed_pairs",
}


@dataclass(frozen=True)
class Options:
    """What to train, and for how long."""

    data_dir: Path | None = None  # folder of OASIS PNG slices; None generates synthetic ones
    folder: Path = Path("runs/rate")  # folder of the runs and the picture
    variants: tuple[str, ...] = tuple(VARIANTS)  # names of those that are compared
    vqvae_epochs: int = 10
    prior_epochs: int = 10
    precision: Literal["float32", "mixed_float16", "mixed_bfloat16"] = "float32"  # of training


def main(options: Options) -> dict[str, Any]:
    """Train and measure every variant and return the rows, one per variant."""
    unknown = [name for name in options.variants if name not in VARIANTS]
    if unknown:
        raise UserError(f"--variants {unknown[0]}: unknown; choose among {', '.join(VARIANTS)}")
    machine = common.report_machine()
    rows = [make_run(options, name) for name in options.variants]
    print("\n" + " ".join([f"{'variant':12}", *(f"{heading:>6}" for heading in COLUMNS), f"{'min':>6}"]))
    for row in rows:
        bits, *fractions = (row[name] for name in COLUMNS.values())
        cells = [f"{row['name']:12}", f"{bits:6.0f}", *(f"{_shown(value):>6}" for value in fractions)]
        print(" ".join([*cells, f"{row['training_seconds'] / 60:6.1f}"]))
    epochs = f"{options.vqvae_epochs} + {options.prior_epochs} epochs"
    note = epochs if options.data_dir else f"{epochs}; SYNTHETIC slices, not real brains"
    plots.rate_distortion(options.folder / "rate_distortion.png", rows, note)
    return {**machine, "rows": rows}


def _shown(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def make_run(options: Options, name: str) -> dict[str, Any]:
    """Make the run of one variant and return its main numbers."""
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
        **VARIANTS[name],
    )
    numbers = driver.main(config)
    samples, reconstructions = numbers["samples"], numbers["references"]["reconstructions"]
    with open(options.folder / name / "history.csv", encoding="utf-8", newline="") as history:
        seconds = sum(float(row["seconds"]) for row in csv.DictReader(history))
    found = {
        **numbers,
        **samples,
        **{measure: samples[measure]["accuracy"] for measure in ("c2st_reconstructions", "c2st_codes")},
        "ms_ssim_of_reconstructed_pairs": reconstructions["ms_ssim_of_pairs"],
    }
    return {
        "name": name,
        "training_seconds": seconds,
        **{measure: found[measure] for measure in ("crop", "codes_used", "psnr_db", *COLUMNS.values())},
    }


if __name__ == "__main__":
    common.run_benchmark(main, Options, __doc__, "the same command continues after the last finished epoch")
