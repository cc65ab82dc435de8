"""How fast slices get from PNG files to batches, and in how much memory, against the student work's way.

    python benchmarks/loading.py [--data-dir FOLDER] [--image-size 256] [--num-slices 2000]

Each way runs in a process of its own, three times in turn; the median counts. Both read the same files, from
the system's cache, and end with one pass over all batches. The student work's way is a Python loop that calls
`keras.utils.load_img` and makes a float array for each file, stacked at the end; once as it was (RGB, the
default), once in grey. Memory is the process's peak less what it held once everything was imported.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path.insert(0, str(Path(__file__).parents[1]))

import keras
import numpy as np
import tensorflow as tf
import tyro

import dataset
import phantom


@dataclass(frozen=True)
class Options:
    data_dir: Path | None = None  # folder of PNG slices; None writes synthetic ones
    image_size: int = 256  # pixels; the files are resized to it
    num_slices: int = 2000  # at most
    repeats: int = 3  # of each way


def ours(files: list[dataset.SliceFile], image_size: int) -> tf.data.Dataset:
    images, _ = dataset.decode(files, image_size)
    cases, positions = [file.case for file in files], [file.position for file in files]
    return dataset.image_batches(dataset.Slices(images, np.array(positions, np.int32), np.array(cases)), 32)


def student(files: list[dataset.SliceFile], image_size: int, color_mode: str = "rgb") -> tf.data.Dataset:
    images = []
    for file in files:
        image = keras.utils.load_img(file.path, color_mode=color_mode, target_size=(image_size, image_size))
        images.append(keras.utils.img_to_array(image) / 255.0)
    return tf.data.Dataset.from_tensor_slices(np.array(images)).batch(32)


def student_grey(files: list[dataset.SliceFile], image_size: int) -> tf.data.Dataset:
    return student(files, image_size, "grayscale")


WAYS = {"ours": ours, "student (RGB)": student, "student (grey)": student_grey}


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure_here(way: str, data_dir: Path, image_size: int, num_slices: int) -> None:
    """In a child process: print seconds, peak memory and slices."""
    files = [file for split in dataset.find(data_dir).values() for file in split][:num_slices]
    for _ in WAYS[way](files[:2], image_size):  # once, for whatever is made at first use
        pass
    before, begun = peak_bytes(), time.perf_counter()
    for _ in WAYS[way](files, image_size):
        pass
    seconds = time.perf_counter() - begun
    print(json.dumps({"seconds": seconds, "bytes": peak_bytes() - before, "slices": len(files)}))


def main(options: Options) -> None:
    with tempfile.TemporaryDirectory() as folder:
        data_dir = options.data_dir
        if data_dir is None:
            data_dir = Path(folder)
            phantom.write_pngs(data_dir, num_cases=-(-options.num_slices // phantom.NUM_POSITIONS))
        results = {way: [] for way in WAYS}
        for _ in range(options.repeats):
            for way in WAYS:
                child = [sys.executable, __file__, "measure", way, data_dir, options.image_size, options.num_slices]
                output = subprocess.run(list(map(str, child)), stdout=subprocess.PIPE, text=True, check=True).stdout
                results[way].append(json.loads(output.splitlines()[-1]))

    slices = results["ours"][0]["slices"]
    array = slices * options.image_size**2
    print(f"{slices} slices at {options.image_size} × {options.image_size}, {os.cpu_count()} cores")
    print(f"{'way':16} {'slices/s':>9} {'ratio':>7} {'peak MB':>9} {'of the uint8 array':>19}")
    summary = {}
    for way, runs in results.items():
        seconds = statistics.median(run["seconds"] for run in runs)
        peak = statistics.median(run["bytes"] for run in runs)
        speedup = statistics.median(run["seconds"] for run in results[way]) / statistics.median(
            run["seconds"] for run in results["ours"]
        )
        print(f"{way:16} {slices / seconds:9.0f} {1 / speedup:7.2f} {peak / 1e6:9.0f} {peak / array:18.2f}×")
        summary[way] = {
            "slices_per_second": slices / seconds,
            "ours_is_faster_by": speedup,
            "memory_ratio": peak / array,
        }
    print(json.dumps(summary))


if __name__ == "__main__":
    if sys.argv[1:2] == ["measure"]:
        measure_here(sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5]))
    else:
        main(tyro.cli(Options, description=__doc__))
