"""What more devices gain, and what more images, larger images, more codes and a larger codebook cost.

    python -m benchmarks.scaling                       on TensorFlow
    KERAS_BACKEND=jax python -m benchmarks.scaling     on JAX

The first table shows the images per second of training on one device and on two, and the fraction of a step that the
devices spend on exchanging gradients: the time of such an exchange alone, divided by that of a step. If there are no
two GPUs, two logical devices share the CPU; that tests the code but gains no time. The second table changes one
constant at a time: seconds of training per 1,000 images, milliseconds of sampling per grid of codes, and the peak
memory of the process. The third shows the time of comparing samples with more test and training slices.

Each row is measured in a process of its own, on random images and codes, with the input pipelines of dataset.py and
`fit`.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import comparison
import dataset
import devices
import driver
import sampling
import stages
from benchmarks import common
from generator import Generator, Results, Samples
from options import check, check_devices
from training import make_optimizer

SAMPLES = 20  # number of grids of codes that are sampled together
VARIANTS: dict[str, dict[str, Any]] = {  # changes of the default constants, and "images", the number of slices
    "default: 96 × 96, grid 12, 512 codes": {},
    "four times the images": {"images": 11_520},
    "image 192 × 192, grid 24": {"image_size": 192, "grids": [24]},
    "image 192 × 192, grid 12": {"image_size": 192},
    "grid 24": {"grids": [24]},
    "grid 48, no attention": {"grids": [48], "prior_attention": 0},
    "128 codes": {"num_embeddings": 128},
    "2,048 codes": {"num_embeddings": 2048},
    "8,192 codes": {"num_embeddings": 8192},
}
COMPARISONS = ((360, 2880), (360, 11_520), (1440, 2880))  # number of test and training slices, 24 per subject


@dataclass(frozen=True)
class Options:
    """How much to measure."""

    steps: int = 12  # timed for each number
    measure: str | None = None  # changes of one row, as JSON; the benchmark starts its child processes with it


def main(options: Options) -> dict[str, Any]:
    """Measure all rows in child processes, or the one of `options.measure` in this process; returns the numbers."""
    if options.measure:
        changes = json.loads(options.measure)
        return measure_comparison(**changes) if "test" in changes else measure_training(changes, options.steps)
    numbers: dict[str, Any] = common.report_machine(in_child=True)
    numbers |= {"devices": {}, "growth": {}, "measuring": {}}
    print(f"{'devices':>8s}  {'VQ-VAE images/s':>16s} {'exchange':>9s}  {'prior images/s':>15s} {'exchange':>9s}")
    for count in (1, 2):
        row = numbers["devices"][str(count)] = measure_in_child({"devices": count}, options.steps)
        speeds = [
            f"{row[f'{stage}_images_per_s']:15.1f} {row[f'{stage}_exchange']:9.1%}" for stage in ("vqvae", "prior")
        ]
        print(f"{count:8d}   {'   '.join(speeds)}   ({row['where']})", flush=True)
    print(f"\n{'1,000 images or one grid':38s} {'VQ-VAE':>9s} {'prior':>9s} {'sampling':>9s} {'memory':>9s}")
    for name, changes in VARIANTS.items():
        row = numbers["growth"][name] = measure_in_child(changes, options.steps)
        vqvae, prior = (1000 / row[f"{stage}_images_per_s"] for stage in ("vqvae", "prior"))
        print(
            f"{name:38s} {vqvae:7.1f} s {prior:7.1f} s {row['ms_per_grid']:6.0f} ms {row['peak_mb']:6.0f} MB",
            flush=True,
        )
    print(f"\n{'test slices':>12s} {'training slices':>16s} {'comparison':>11s} {'memory':>9s}")
    for test, train in COMPARISONS:
        row = measure_in_child({"test": test, "train": train}, options.steps)
        numbers["measuring"][f"{test}, {train}"] = row
        print(f"{test:12d} {train:16d} {row['seconds']:9.0f} s {row['peak_mb']:6.0f} MB", flush=True)
    return numbers


def measure_in_child(changes: dict[str, Any], steps: int) -> dict[str, Any]:
    """Measure one row in a child process, which has two devices if they are needed."""
    environment = {}
    if changes.get("devices") == 2 and devices.on_jax():
        environment["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"  # Has no effect on GPUs.
    return common.run_child("benchmarks.scaling", ["--steps", steps, "--measure", json.dumps(changes)], **environment)


def random_slices(count: int, size: int, num_positions: int, name: str) -> dataset.Slices:
    """Return slices (count, size, size, 1) of noise, with `num_positions` per subject."""
    indices = np.arange(count)
    return dataset.Slices(
        np.random.default_rng(0).integers(0, 256, (count, size, size, 1), np.uint8),
        (indices % num_positions).astype(np.int32),
        np.array([f"{name} {subject}" for subject in indices // num_positions]),
    )


def measure_training(changes: dict[str, Any], steps: int) -> dict[str, Any]:
    """Measure both stages with some constants changed: speeds, fractions of exchange, and peak memory."""
    images = changes.pop("images", 2880)
    config = driver.Config(**changes)
    if config.devices > 1 and not devices.on_jax() and not tf.config.list_physical_devices("GPU"):
        logical_devices = [tf.config.LogicalDeviceConfiguration()] * config.devices
        tf.config.set_logical_device_configuration(tf.config.list_physical_devices("CPU")[0], logical_devices)
    check(config)
    check_devices(config)
    slices = random_slices(images, config.image_size, num_positions=32, name="subject")
    grid = config.grids[0]
    codes = np.random.default_rng(1).integers(0, config.num_embeddings, (images, grid, grid), np.int32)
    variance = dataset.pixel_variance(slices)
    networks: dict[str, tuple[Callable[[], keras.Model], tf.data.Dataset]] = {
        "vqvae": (
            lambda: stages.make_vqvae(config, variance),
            dataset.image_batches(slices, config.batch_size, config.seed, augmented=config.augment),
        ),
        "prior": (
            lambda: stages.make_prior(config),
            dataset.input_batches(
                {"codes": codes, "positions": slices.positions}, "codes", config.batch_size, config.seed
            ),
        ),
    }
    row: dict[str, Any] = {"where": devices.describe(config.devices)}
    for stage, (make, batches) in networks.items():
        with devices.distribution_scope(config.devices):
            network = make()
            network.compile(make_optimizer(1e-4, 1, 1000))
            timer = EpochTimer()
            network.fit(batches, steps_per_epoch=steps, epochs=4, shuffle=False, verbose=0, callbacks=[timer])
            step = min(timer.seconds[1:]) / steps  # The first epoch includes compilation.
            exchange = exchange_seconds(network, config.devices) if config.devices > 1 else 0.0
        row[f"{stage}_images_per_s"] = config.batch_size / step
        row[f"{stage}_exchange"] = exchange / step
    prior, positions = stages.make_prior(config), np.zeros(SAMPLES, np.int32)
    uniforms = np.random.default_rng(2).random((SAMPLES, grid**2), np.float32)
    seconds = common.time_runs(
        lambda: sampling.sample_codes(prior, {"positions": positions}, uniforms, batch_size=SAMPLES), 1
    )[0]
    return row | {"ms_per_grid": 1000 * seconds / SAMPLES, "peak_mb": common.peak_memory() / 1e6}


def measure_comparison(test: int, train: int) -> dict[str, float]:
    """Measure the seconds of `comparison.compare`, and the peak memory, for these numbers of slices."""
    config = driver.Config()
    counts = {"train": train, "validate": test, "test": test}
    slices = {split: random_slices(count, 96, num_positions=24, name=split) for split, count in counts.items()}
    vqvae, prior, random = stages.make_vqvae(config, 1.0), stages.make_prior(config), np.random.default_rng(0)
    generator = Generator(vqvae, [prior], np.arange(24))
    shape = (config.grids[0],) * 2
    codes = {
        split: [random.integers(0, config.num_embeddings, (count, *shape), np.int32)] for split, count in counts.items()
    }
    compared = comparison.choose_slices(slices, config.measured_slices, seed=0)
    samples = {
        split: Samples(
            random.integers(0, 256, (len(index), 96, 96, 1), np.uint8),
            [codes[split][0][index]],
            slices[split].positions[index],
        )
        for split, index in compared.items()
    }
    results = Results(
        generator=generator,
        critic=generator,
        slices=slices,
        codes=codes,
        reconstructions={},
        samples=samples["test"],
        compared=compared,
        compared_samples=samples,
        sampling={},
        history=[],
        numbers={},
    )
    start = time.perf_counter()
    comparison.compare(results, seed=0)
    return {"seconds": time.perf_counter() - start, "peak_mb": common.peak_memory() / 1e6}


class EpochTimer(keras.callbacks.Callback):
    """Measures the seconds of each epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: list[float] = []

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        self.start = time.perf_counter()

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        self.seconds.append(time.perf_counter() - self.start)


def exchange_seconds(network: keras.Model, count: int) -> float:
    """Return the time of summing, over the devices, arrays of the shapes of the network's gradients."""
    shapes = [tuple(variable.shape) for variable in network.trainable_variables]
    exchange = _jax_exchange(shapes, count) if devices.on_jax() else _tensorflow_exchange(shapes)
    return min(common.time_runs(exchange, 5))


def _tensorflow_exchange(shapes: list[tuple[int, ...]]) -> Callable[[], object]:
    strategy = tf.distribute.get_strategy()

    def sum_gradients() -> tf.Tensor:
        gradients = [tf.ones(shape) for shape in shapes]
        sums = tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, gradients)
        return tf.add_n([tf.reduce_sum(gradient) for gradient in sums])

    run = tf.function(lambda: strategy.run(sum_gradients))
    return lambda: [part.numpy() for part in strategy.experimental_local_results(run())]


def _jax_exchange(shapes: list[tuple[int, ...]], count: int) -> Callable[[], object]:
    import jax

    mesh = jax.sharding.Mesh(np.array(jax.local_devices()[:count]), ("batch",))
    split, replicated = (
        jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes)) for axes in (["batch"], [])
    )
    gradients = [jax.device_put(np.ones((count, *shape), np.float32), split) for shape in shapes]
    run = jax.jit(lambda arrays: [array.sum(0) for array in arrays], out_shardings=replicated)
    return lambda: jax.block_until_ready(run(gradients))


if __name__ == "__main__":
    common.run_benchmark(main, Options, __doc__)
