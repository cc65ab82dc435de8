"""Kill the driver again and again, and compare the run that comes of it with one that was left alone.

    python benchmarks/kill.py --kills 20

Small runs on synthetic slices, each driver a process of its own that gets SIGKILL after a random time, wherever it is
then: starting, training either stage, sampling, measuring, drawing or writing. When a run is complete it is compared
byte by byte and the next one begins. Prints a table of where the kills hit, then its numbers as JSON; the exit status
is 1 if any byte differs.
"""

import csv
import io
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))

import phantom

DRIVER = Path(__file__).parent.parent / "driver.py"
CONSTANTS = ["--image-size", "32", "--grids", "4", "--channels", "8", "--num-embeddings", "16", "--embedding-dim", "4"]
CONSTANTS += ["--residual-blocks", "0", "--batch-size", "8", "--prior-filters", "8", "--prior-blocks", "1"]
CONSTANTS += ["--num-samples", "3"]


@dataclass(frozen=True)
class Options:
    """How often to kill."""

    kills: int = 20
    epochs: int = 6  # of each stage
    seed: int = 0  # of the moments


def main(options: Options) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        return kill_and_compare(options, Path(folder))


def kill_and_compare(options: Options, folder: Path) -> dict:
    phantom.write_pngs(folder / "slices", num_cases=6, num_positions=4, image_size=32)
    alone, killed = folder / "alone", folder / "killed"  # in folders of their own: the report shows the run's name
    epochs = ["--vqvae-epochs", str(options.epochs), "--prior-epochs", str(options.epochs)]

    def command(where: Path) -> list[str]:
        data = ["--data-dir", str(folder / "slices"), "--run-dir", str(where / "run")]
        return [sys.executable, str(DRIVER), *data, *CONSTANTS, *epochs]

    begun = time.monotonic()
    subprocess.run(command(alone), check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    seconds = time.monotonic() - begun
    print(f"one run alone: {seconds:.0f} s")

    moments, hits, runs, different = np.random.default_rng(options.seed), Counter(), 0, []
    while (wanted := sum(hits.values()) < options.kills) or (killed / "run").exists():  # the last run is let end
        if not ended(command(killed), moments.uniform(0, seconds) if wanted else None):
            hits[stage(killed / "run")] += 1
            continue
        runs += 1
        different += [f"run {runs}: {name}" for name in differences(alone / "run", killed / "run")]
        killed = folder / f"killed-{runs}"
    for where, count in hits.most_common():
        print(f"{count:4d} kills {where}")
    result = {"kills": sum(hits.values()), "identical": not different, "runs": runs, "different": different}
    print(json.dumps(result))
    return result


def ended(command: list[str], seconds: float | None) -> bool:
    """Start a process; False if it had to be killed after so many seconds. Raises RuntimeError if it failed."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        _, error = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return False
    if process.returncode:
        raise RuntimeError(f"the driver ended with status {process.returncode}: {error}")
    return True


def stage(run: Path) -> str:
    """What the driver was at, by what is in the run folder."""
    steps = {
        "config.json": "before anything was written",
        "vqvae.keras": "in the VQ-VAE's training",
        "prior.keras": "in the prior's training",
        "samples": "while sampling",
        "metrics.json": "while measuring",
        "report.html": "while drawing pictures and writing the report",
    }
    return next((what for name, what in steps.items() if not (run / name).exists()), "after the report was written")


def differences(one: Path, other: Path) -> list[str]:
    """Files that are not the same in two run folders; but for the logs, and the column of seconds."""

    def contents(run: Path) -> dict[str, bytes]:
        return {
            str(path.relative_to(run)): without_seconds(path) if path.name == "history.csv" else path.read_bytes()
            for path in run.rglob("*")
            if path.is_file() and path.relative_to(run).parts[0] != "logs"
        }

    first, second = contents(one), contents(other)
    return sorted(name for name in first.keys() | second.keys() if first.get(name) != second.get(name))


def without_seconds(history: Path) -> bytes:
    rows = list(csv.DictReader(io.StringIO(history.read_text())))
    return json.dumps([{name: value for name, value in row.items() if name != "seconds"} for row in rows]).encode()


if __name__ == "__main__":
    sys.exit(0 if main(tyro.cli(Options, description=__doc__))["identical"] else 1)
