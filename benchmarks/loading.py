"""Time and memory from PNG files to batches, compared with the loop of earlier student projects.

    python -m benchmarks.loading [--data-dir FOLDER] [--image-size 256] [--num-slices 2000]

Each method runs in a process of its own, three times in turn; the median counts. All read the same files from the
cache of the operating system and end with one pass over all batches. "ours" decodes into memory with pngs.py and makes
batches with dataset.py; `benchmarks.large` is about slices in a file. "student" is a Python loop that calls
`keras.utils.load_img` and makes one float array per file, which are stacked at the end: as it was written (RGB, the
default of Keras), and in grey. Memory is the peak of the process, less what it held after the imports.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import dataset
import phantom
import pngs
from benchmarks import common


def load_ours(files: list[dataset.SliceFile], image_size: int) -> tf.data.Dataset:
    """Return batches of 32 images as dataset.py makes them."""
    images, _ = pngs.decode_all([file.path for file in files], image_size)
    positions = np.array([file.position for file in files], np.int32)
    subjects = np.array([file.subject for file in files])
    return dataset.image_batches(dataset.Slices(images, positions, subjects), 32)


def load_rgb(files: list[dataset.SliceFile], image_size: int, color_mode: str = "rgb") -> tf.data.Dataset:
    """Return batches of 32 images, from one float array per file."""
    images = []
    for file in files:
        image = keras.utils.load_img(file.path, color_mode=color_mode, target_size=(image_size, image_size))
        images.append(keras.utils.img_to_array(image) / 255.0)
    return tf.data.Dataset.from_tensor_slices(np.array(images)).batch(32)


def load_grey(files: list[dataset.SliceFile], image_size: int) -> tf.data.Dataset:
    """Return what `load_rgb` does, with a single channel."""
    return load_rgb(files, image_size, "grayscale")


METHODS: dict[str, Callable[[list[dataset.SliceFile], int], tf.data.Dataset]] = {
    "ours": load_ours,
    "student (RGB)": load_rgb,
    "student (grey)": load_grey,
}


@dataclass(frozen=True)
class Options:
    """What to load, and how often."""

    data_dir: Path | None = None  # folder of PNG slices; None writes synthetic ones
    image_size: int = 256  # height and width in pixels that the files are resized to
    num_slices: int = 2000  # at most
    repeats: int = 3  # of each method
    measure: str | None = None  # run this method once, in this process; the benchmark starts its child processes so


def main(options: Options) -> dict[str, Any]:
    """Compare the methods and return their numbers by name, or run the one method of `options.measure`."""
    if options.measure:
        assert options.data_dir, "measure needs data_dir"
        return measure(options.measure, options.data_dir, options.image_size, options.num_slices)
    runs: dict[str, list[dict[str, Any]]] = {method: [] for method in METHODS}
    with tempfile.TemporaryDirectory() as folder:
        data_dir = options.data_dir
        if data_dir is None:
            data_dir = Path(folder)
            phantom.write_pngs(data_dir, num_subjects=-(-options.num_slices // phantom.NUM_POSITIONS))
        sizes = ["--image-size", options.image_size, "--num-slices", options.num_slices]
        for _ in range(options.repeats):
            for method, results in runs.items():
                arguments = ["--measure", method, "--data-dir", data_dir.resolve(), *sizes]
                results.append(common.run_child("benchmarks.loading", arguments))

    num_slices = runs["ours"][0]["slices"]
    array_bytes = num_slices * options.image_size**2
    seconds = {method: statistics.median(run["seconds"] for run in results) for method, results in runs.items()}
    numbers: dict[str, Any] = common.report_machine()
    print(f"{num_slices} slices at {options.image_size} × {options.image_size}")
    print(f"{'method':16} {'slices/s':>9} {'ratio':>7} {'peak MB':>9} {'of the uint8 array':>19}")
    for method, results in runs.items():
        speed, slower_by = num_slices / seconds[method], seconds[method] / seconds["ours"]
        peak = statistics.median(run["bytes"] for run in results)
        print(f"{method:16} {speed:9.0f} {1 / slower_by:7.2f} {peak / 1e6:9.0f} {peak / array_bytes:18.2f}×")
        numbers[method] = {
            "slices_per_second": speed,
            "ours_is_faster_by": slower_by,
            "memory_ratio": peak / array_bytes,
        }
    return numbers


def measure(method: str, data_dir: Path, image_size: int, num_slices: int) -> dict[str, Any]:
    """Run one method in this process; returns seconds, bytes of memory, and the number of slices."""
    files = [file for split in dataset.find(data_dir).values() for file in split][:num_slices]
    load = METHODS[method]
    for _ in load(files[:2], image_size):  # What is set up at the first use does not count.
        pass
    before, start = common.peak_memory(), time.perf_counter()
    for _ in load(files, image_size):
        pass
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "bytes": common.peak_memory() - before, "slices": len(files)}


if __name__ == "__main__":
    common.run_benchmark(main, Options, __doc__)
