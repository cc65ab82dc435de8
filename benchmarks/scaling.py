"""What more devices give, and what more images, pixels, codes and a larger codebook cost.

    python benchmarks/scaling.py                       on TensorFlow
    KERAS_BACKEND=jax python benchmarks/scaling.py     on JAX

First images a second of training on one device and on two, and the share of a step that the devices spend exchanging
gradients: the time of one such exchange by itself, over the step's. Where there are no two GPUs, two logical devices
share the CPU, which shows that it works and nothing more. Then one constant at a time is changed: seconds for 1,000
images of training, milliseconds for drawing a grid of codes, and the peak memory of the process. Last, what measuring
new brains takes with more slices to compare.

Each row is measured in a process of its own, on random images and codes, by the driver's own pipelines and `fit`.
Prints tables, then its numbers as JSON.
"""

import json
import os
import resource
import subprocess
import sys
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
import devices
import driver
import metrics
import sampling

DRAWN = 20  # grids of codes at once
VARIANTS = {  # of the default constants, but for "images", how many are held
    "default: 96 × 96, grid 12, 512 codes": {},
    "four times the images": {"images": 11_520},
    "image 192 × 192, grid 24": {"image_size": 192, "grids": [24]},
    "image 192 × 192, grid 12": {"image_size": 192},
    "grid 24": {"grids": [24]},
    "grid 48": {"grids": [48]},
    "128 codes": {"num_embeddings": 128},
    "2,048 codes": {"num_embeddings": 2048},
    "8,192 codes": {"num_embeddings": 8192},
}
COMPARED = ((360, 2880), (360, 11_520), (1440, 2880))  # test and training slices, 24 of a person


@dataclass(frozen=True)
class Options:
    """How much to measure."""

    steps: int = 12  # timed for each number
    measure: str | None = None  # constants of one row, as JSON: what the processes are started with


def main(options: Options) -> dict:
    if options.measure:
        changed = json.loads(options.measure)
        row = compare(**changed) if "test" in changed else measure(changed, options.steps)
        print(json.dumps(row))
        return row
    result = {"backend": keras.backend.backend(), "devices": {}, "growth": {}, "measuring": {}}
    print(f"{'devices':>8s}  {'VQ-VAE images/s':>16s} {'exchange':>9s}  {'prior images/s':>15s} {'exchange':>9s}")
    for count in (1, 2):
        row = result["devices"][str(count)] = measured({"devices": count}, options.steps)
        speeds = [
            f"{row[f'{stage}_images_per_s']:15.1f} {row[f'{stage}_exchange']:9.1%}" for stage in ("vqvae", "prior")
        ]
        print(f"{count:8d}   {'   '.join(speeds)}   ({row['where']})", flush=True)
    print(f"\n{'':38s} {'VQ-VAE':>9s} {'prior':>9s} {'a grid':>9s} {'memory':>9s}")
    for name, changed in VARIANTS.items():
        row = result["growth"][name] = measured(changed, options.steps)
        times = [1000 / row[f"{stage}_images_per_s"] for stage in ("vqvae", "prior")]
        print(
            f"{name:38s} {times[0]:7.1f} s {times[1]:7.1f} s {row['ms_per_grid']:6.0f} ms {row['peak_mb']:6.0f} MB",
            flush=True,
        )
    print(f"\n{'test slices':>12s} {'training slices':>16s} {'measuring':>10s} {'memory':>9s}")
    for test, train in COMPARED:
        row = result["measuring"][f"{test}, {train}"] = measured({"test": test, "train": train}, options.steps)
        print(f"{test:12d} {train:16d} {row['seconds']:8.0f} s {row['peak_mb']:6.0f} MB", flush=True)
    print(json.dumps(result))
    return result


def measured(changed: dict, steps: int) -> dict:
    """`measure` in a process of its own, with two devices if they are wanted."""
    environment = dict(os.environ)
    if changed.get("devices") == 2 and devices.on_jax():
        environment["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"  # has no effect on GPUs
    command = [sys.executable, __file__, "--steps", str(steps), "--measure", json.dumps(changed)]
    printed = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(printed.splitlines()[-1])


def measure(changed: dict, steps: int) -> dict:
    """Speeds, the share of a step spent exchanging, and peak memory, with some constants changed."""
    images = changed.pop("images", 2880)
    config = driver.Config(**changed)
    if config.devices > 1 and not devices.on_jax() and not tf.config.list_physical_devices("GPU"):
        halves = [tf.config.LogicalDeviceConfiguration()] * config.devices
        tf.config.set_logical_device_configuration(tf.config.list_physical_devices("CPU")[0], halves)
    driver.check(config)
    driver.check_devices(config)
    random, size, grid = np.random.default_rng(0), config.image_size, config.grids[0]
    held = dataset.Slices(
        random.integers(0, 256, (images, size, size, 1), np.uint8),
        np.arange(images, dtype=np.int32) % 32,
        np.array(["case"] * images),
    )
    codes = random.integers(0, config.num_embeddings, (images, grid, grid), np.int32)
    batches = {
        "vqvae": dataset.image_batches(held, config.batch_size, config.seed, augmented=config.augment),
        "prior": driver.prior_batches(config, [codes], held, 0, config.seed),
    }
    makers = {"vqvae": lambda: driver.make_vqvae(config, held), "prior": lambda: driver.make_prior(config)}
    row = {"where": devices.described(config.devices)}
    for stage, make in makers.items():
        with devices.spread(config.devices):
            network = make()
            network.compile(driver.make_optimizer(1e-4, 1, 1000))
            clock = Clock()
            network.fit(batches[stage], steps_per_epoch=steps, epochs=4, shuffle=False, verbose=0, callbacks=[clock])
            step = min(clock.seconds[1:]) / steps  # the first epoch compiles
            exchange = exchange_seconds(network, config.devices) if config.devices > 1 else 0.0
        row[f"{stage}_images_per_s"] = config.batch_size / step
        row[f"{stage}_exchange"] = exchange / step
    prior, told = makers["prior"](), [np.zeros(DRAWN, np.int32)]
    draw = sampling.compiled(lambda uniforms, *told: sampling.draw_batch(prior, uniforms, told))
    uniforms = random.random((DRAWN, grid**2), np.float32)
    for _ in range(2):  # the first time compiles
        begun = time.perf_counter()
        keras.ops.convert_to_numpy(draw(uniforms, *told))
    row["ms_per_grid"] = 1000 * (time.perf_counter() - begun) / DRAWN
    return row | {"peak_mb": peak_mb()}


def compare(test: int, train: int) -> dict:
    """Seconds of `metrics.sample_metrics`, and peak memory."""
    random = np.random.default_rng(0)
    splits = [
        dataset.Slices(
            random.integers(0, 256, (count, 96, 96, 1), np.uint8),
            np.arange(count, dtype=np.int32) % 24,
            np.array([f"{name} {i // 24}" for i in range(count)]),
        )
        for name, count in (("test", test), ("train", train))
    ]
    drawn, decoded = (random.random((test, 96, 96, 1), np.float32) for _ in range(2))
    begun = time.perf_counter()
    metrics.sample_metrics(drawn, decoded, *splits, seed=0)
    return {"seconds": time.perf_counter() - begun, "peak_mb": peak_mb()}


def peak_mb() -> float:
    """The most memory that this process has had, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class Clock(keras.callbacks.Callback):
    """Seconds of each epoch."""

    def __init__(self):
        super().__init__()
        self.seconds = []

    def on_epoch_begin(self, epoch, logs=None):
        self.begun = time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        self.seconds.append(time.perf_counter() - self.begun)


def exchange_seconds(network: keras.Model, count: int) -> float:
    """Time of adding up, over the devices, arrays of the shapes of the network's gradients."""
    shapes = [tuple(variable.shape) for variable in network.trainable_variables]
    exchange = _jax_exchange(shapes, count) if devices.on_jax() else _tensorflow_exchange(shapes)
    seconds = []
    for _ in range(6):
        begun = time.perf_counter()
        exchange()
        seconds.append(time.perf_counter() - begun)
    return min(seconds)


def _tensorflow_exchange(shapes: list[tuple[int, ...]]):
    strategy = tf.distribute.get_strategy()

    def add_up():
        gradients = [tf.ones(shape) for shape in shapes]
        summed = tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, gradients)
        return tf.add_n([tf.reduce_sum(gradient) for gradient in summed])

    run = tf.function(lambda: strategy.run(add_up))
    return lambda: [part.numpy() for part in strategy.experimental_local_results(run())]


def _jax_exchange(shapes: list[tuple[int, ...]], count: int):
    import jax

    mesh = jax.sharding.Mesh(np.array(jax.local_devices()[:count]), ("batch",))
    split, whole = (jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes)) for axes in (["batch"], []))
    gradients = [jax.device_put(np.ones((count, *shape), np.float32), split) for shape in shapes]
    run = jax.jit(lambda arrays: [array.sum(0) for array in arrays], out_shardings=whole)
    return lambda: jax.block_until_ready(run(gradients))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
