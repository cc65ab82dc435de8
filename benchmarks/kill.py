"""Kill the driver again and again, and compare the finished runs with one that was not interrupted.

    python -m benchmarks.kill --kills 20

The runs are small and use synthetic slices. Each driver is a process that gets SIGKILL after a random time, whatever it
is doing: starting, training a network, sampling, measuring, drawing or writing. A complete run is compared byte by
byte with the uninterrupted one, and the next run begins. Prints how many kills hit which step, then its numbers as
JSON. The exit status is 1 if any byte differs.
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
from typing import Any

import numpy as np

import phantom
from benchmarks import common

CONSTANTS = ["--image-size", "32", "--grids", "4", "--channels", "8", "--num-embeddings", "16", "--embedding-dim", "4"]
CONSTANTS += ["--residual-blocks", "0", "--batch-size", "8", "--prior-filters", "8", "--prior-blocks", "1"]
CONSTANTS += ["--prior-attention", "1", "--decoder-channels", "8", "--num-samples", "3"]

STEPS = {  # the file that each step ends with, in order, and the step
    "config.json": "before anything was written",
    "vqvae.keras": "while training the VQ-VAE",
    "prior.keras": "while training the prior",
    "selector.keras": "while training the selector",
    "decoder.keras": "while training the sharp decoder",
    "critic.keras": "while training the critic",
    "samples/codes.npy": "while sampling",
    "metrics.json": "while measuring",
    "report.html": "while drawing pictures and writing the report",
}


@dataclass(frozen=True)
class Options:
    """How often to kill."""

    kills: int = 20  # number of kills
    epochs: int = 6  # epochs of each stage
    seed: int = 0  # of the random times


def main(options: Options) -> dict[str, Any]:
    """Run the benchmark in a temporary folder and return its numbers; see `kill_and_compare`."""
    with tempfile.TemporaryDirectory() as folder:
        return kill_and_compare(options, Path(folder))


def kill_and_compare(options: Options, folder: Path) -> dict[str, Any]:
    """Run the benchmark in a folder.

    Returns:
        kills; identical (whether no file differs); runs (completed despite the kills); different (names of files);
        uninterrupted_seconds; and the numbers of `common.report_machine`.
    """
    numbers: dict[str, Any] = common.report_machine()
    phantom.write_pngs(folder / "slices", num_subjects=6, num_positions=4, image_size=32)
    # All runs have the same name, which the report shows, so each one needs a folder of its own around it.
    uninterrupted, killed = folder / "uninterrupted", folder / "killed"

    start = time.monotonic()
    subprocess.run(
        driver_command(options, folder / "slices", uninterrupted / "run"),
        cwd=common.ROOT,
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    seconds = time.monotonic() - start
    print(f"one uninterrupted run: {seconds:.0f} s", flush=True)

    random = np.random.default_rng(options.seed)
    hits: Counter[str] = Counter()
    runs, different = 0, []
    # The last run is finished without further kills.
    while (more := hits.total() < options.kills) or (killed / "run").exists():
        command = driver_command(options, folder / "slices", killed / "run")
        if not finishes(command, random.uniform(0, seconds) if more else None):
            hits[current_step(killed / "run")] += 1
            continue
        runs += 1
        different += [f"run {runs}: {name}" for name in differences(uninterrupted / "run", killed / "run")]
        killed = folder / f"killed-{runs}"
    for step, count in hits.most_common():
        print(f"{count:4d} {'kill' if count == 1 else 'kills'} {step}")
    counts = {"kills": hits.total(), "identical": not different, "runs": runs, "different": different}
    return {**numbers, **counts, "uninterrupted_seconds": seconds}


def driver_command(options: Options, data_dir: Path, run_dir: Path) -> list[str]:
    """Return the command of one small run."""
    epochs = [f"--{stage}-epochs={options.epochs}" for stage in ("vqvae", "prior", "selector", "decoder")]
    folders = ["--data-dir", str(data_dir), "--run-dir", str(run_dir)]
    return [sys.executable, "driver.py", *folders, *CONSTANTS, *epochs]


def finishes(command: list[str], seconds: float | None) -> bool:
    """Start a process, kill it after some seconds, and return whether it has finished before.

    Raises:
        RuntimeError: If the process fails.
    """
    try:  # Kills the process after the timeout.
        finished = subprocess.run(
            command,
            cwd=common.ROOT,
            timeout=seconds,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            encoding="utf-8",
        )
    except subprocess.TimeoutExpired:
        return False
    if finished.returncode:
        raise RuntimeError(f"{command} ended with status {finished.returncode}: {finished.stderr}")
    return True


def current_step(run_dir: Path) -> str:
    """Return what the driver was doing when it was killed, judging by the files of the run folder."""
    missing = (step for name, step in STEPS.items() if not (run_dir / name).exists())
    return next(missing, "after the report was written")


def differences(one: Path, other: Path) -> list[str]:
    """Return the names of the files that differ between two run folders, apart from logs and the column of seconds."""
    first, second = _contents(one), _contents(other)
    return sorted(name for name in first.keys() | second.keys() if first.get(name) != second.get(name))


def _contents(run_dir: Path) -> dict[str, bytes]:
    """Return the content of each file by its name."""
    return {
        str(path.relative_to(run_dir)): _without_seconds(path) if path.name == "history.csv" else path.read_bytes()
        for path in run_dir.rglob("*")
        if path.is_file() and path.relative_to(run_dir).parts[0] != "logs"
    }


def _without_seconds(history: Path) -> bytes:
    rows = list(csv.DictReader(io.StringIO(history.read_text(encoding="utf-8"))))
    return json.dumps([{name: value for name, value in row.items() if name != "seconds"} for row in rows]).encode()


if __name__ == "__main__":
    sys.exit(0 if common.run_benchmark(main, Options, __doc__)["identical"] else 1)
