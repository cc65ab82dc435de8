"""Slices in a memory-mapped file: how soon training starts, how fast it is, and how much memory a large set needs.

    python -m benchmarks.large [--data-dir FOLDER] [--num-slices 1400000]

The first table shows how long it takes to find and check the slices, and then to make the first batch: when the slices
are decoded for the first time, and when the file is there already. The second compares batches from slices in memory
and from the file, in turn; the median of the pairs counts. Both read the file from the cache of the operating system.
The third trains a VQ-VAE on a set that is larger than memory. Its file is sparse, so all of its slices are black; it
takes hardly any space, and each row that is read takes as much memory as any other. Each table is measured in processes
of their own; memory is the peak of the whole process.
"""

import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import cache
import dataset
import driver
import phantom
import stages
from benchmarks import common
from training import make_optimizer

BATCH_SIZE = 16
COMPARED_SLICES = 8000  # in memory and in a file
POSITIONS = 32  # slices of each subject of the sets that are made up


@dataclass(frozen=True)
class Options:
    """What to measure."""

    data_dir: Path | None = None  # folder of PNG slices for the first table; None writes synthetic ones
    image_size: int = 256  # height and width in pixels
    num_slices: int = 1_400_000  # of the large set
    steps: int = 200  # of training on the large set
    channels: int = 64  # of the VQ-VAE that is trained on it, as in driver.py
    repeats: int = 12  # of each half of a pair
    measure: str | None = None  # measure this row, as JSON, in this process; how the benchmark starts its children


def main(options: Options) -> dict[str, Any]:
    """Measure all tables in child processes, or the row of `options.measure` in this process; returns the numbers."""
    if options.measure:
        row = json.loads(options.measure)
        return MEASURES[row.pop("kind")](**row)
    numbers: dict[str, Any] = common.report_machine(in_child=True)
    with tempfile.TemporaryDirectory() as folder:
        data_dir = options.data_dir or Path(folder) / "slices"
        if not options.data_dir:
            phantom.write_pngs(data_dir, num_subjects=50)
        size = {"image_size": options.image_size}
        starts = {"data_dir": str(data_dir.resolve()), "cache_dir": f"{folder}/cache", **size}
        print(f"\n{'start':8} {'slices':>9} {'finding them':>13} {'first batch':>12}")
        for name in ("first", "second"):
            row = numbers[f"{name}_start"] = measure(kind="start", **starts)
            print(f"{name:8} {row['slices']:9,} {row['load']:11.2f} s {row['first_batch']:10.2f} s", flush=True)
        row = numbers["file_against_memory"] = measure(kind="compare", repeats=options.repeats, **size)
        print(f"\n{'batches from':12} {'memory':>15} {'file':>15} {'ratio':>6}")
        for name, speeds in row.items():
            print(f"{name:12} {speeds['memory']:9.0f} img/s {speeds['file']:9.0f} img/s {speeds['ratio']:6.2f}")
        settings = {"num_slices": options.num_slices, "steps": options.steps, "channels": options.channels}
        row = numbers["large"] = measure(kind="train", **settings, **size)
    print(f"\n{options.num_slices:,} slices, {row['file_gb']:.1f} GB: {options.steps} steps of {BATCH_SIZE} slices")
    print(f"{row['images_per_second']:.1f} images per second, at most {row['peak_gb']:.2f} GB of memory in all")
    return numbers


def measure(**row: Any) -> dict[str, Any]:
    """Measure a row in a child process."""
    return common.run_child("benchmarks.large", ["--measure", json.dumps(row)])


def start(data_dir: str, cache_dir: str, image_size: int) -> dict[str, float]:
    """Measure the seconds until slices are loaded, with all that a run asks of them, and until the first batch."""
    begin = time.perf_counter()
    slices = dataset.load(Path(data_dir), image_size, seed=0, cache_dir=Path(cache_dir))
    dataset.fingerprint(slices)
    dataset.pixel_variance(slices["train"])
    loaded = time.perf_counter()
    next(iter(dataset.image_batches(slices["train"], BATCH_SIZE, seed=0, augmented=True)))
    batched = time.perf_counter()
    return {"slices": sum(map(len, slices.values())), "load": loaded - begin, "first_batch": batched - loaded}


def compare(image_size: int, repeats: int) -> dict[str, dict[str, float]]:
    """Measure images per second from memory and from a file, in turn: of batches alone, and of augmented ones."""
    content = np.random.default_rng(0).integers(0, 256, (COMPARED_SLICES, image_size, image_size, 1), np.uint8)
    speeds = {}
    with tempfile.NamedTemporaryFile() as file:
        content.tofile(file)
        file.flush()
        places = {"memory": content, "file": cache.map_images(Path(file.name), content.shape)}
        for name, augmented, num_batches in (("plain", False, 200), ("augmented", True, 20)):
            feeds = {
                place: iter(dataset.image_batches(made_up_slices(images), BATCH_SIZE, 0, augmented=augmented))
                for place, images in places.items()
            }
            seconds: dict[str, list[float]] = {place: [] for place in feeds}
            for _ in range(repeats):
                for place, feed in feeds.items():
                    begin = time.perf_counter()
                    for _ in itertools.islice(feed, num_batches):
                        pass
                    seconds[place].append(time.perf_counter() - begin)
            count = BATCH_SIZE * num_batches
            speeds[name] = {place: count / statistics.median(found) for place, found in seconds.items()}
            pairs = zip(seconds["memory"], seconds["file"], strict=True)
            speeds[name]["ratio"] = statistics.median(memory / file for memory, file in pairs)
    return speeds


def made_up_slices(images: np.ndarray) -> dataset.Slices:
    """Return images with made-up subjects and positions."""
    index = np.arange(len(images))
    return dataset.Slices(images, (index % POSITIONS).astype(np.int32), (index // POSITIONS).astype("U6"))


def train(num_slices: int, steps: int, channels: int, image_size: int) -> dict[str, float]:
    """Train a VQ-VAE on slices of a sparse file; returns its speed and the peak memory of the process."""
    shape = (num_slices, image_size, image_size, 1)
    config = driver.Config(image_size=image_size, channels=channels, grids=(image_size // 16,), background_code=False)
    with tempfile.NamedTemporaryFile() as file:
        file.truncate(num_slices * image_size**2)
        slices = made_up_slices(cache.map_images(Path(file.name), shape))
        network = stages.make_vqvae(config, data_variance=0.1)
        network.compile(make_optimizer(config.vqvae_learning_rate, 1, steps))
        batches = dataset.image_batches(slices, BATCH_SIZE, config.seed, augmented=True)
        network.fit(batches, steps_per_epoch=2, shuffle=False, verbose=0)  # Compiles.
        begin = time.perf_counter()
        network.fit(batches, steps_per_epoch=steps, epochs=1, shuffle=False, verbose=0)
        seconds = time.perf_counter() - begin
    return {
        "file_gb": num_slices * image_size**2 / 1e9,
        "images_per_second": steps * BATCH_SIZE / seconds,
        "peak_gb": common.peak_memory() / 1e9,
    }


MEASURES: dict[str, Callable[..., dict[str, Any]]] = {"start": start, "compare": compare, "train": train}

if __name__ == "__main__":
    common.run_benchmark(main, Options, __doc__)
