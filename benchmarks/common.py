"""What several benchmarks share: timing, the machine's peak, arithmetic of training steps, child processes, JSON.

`python -m benchmarks.common` prints the convolution peak of this machine.
"""

import functools
import json
import math
import os
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import keras
import numpy as np
import tensorflow as tf
import tyro
from keras import ops

import console
import dataset
import devices
import layers

ROOT = Path(__file__).parents[1]

Options = TypeVar("Options")


# ------------------------------------------------------------------------------------ command line and output


def run_benchmark(
    main: Callable[[Options], dict[str, Any]],
    options: type[Options],
    description: str | None,
    on_stop: str = "the numbers of this benchmark are lost",
) -> dict[str, Any]:
    """Parse the command line, run a benchmark, and print its numbers as the last line. Ends the process on errors.

    Args:
        main: The benchmark. Returns its numbers.
        options: The dataclass of its options.
        description: Text for `--help`.
        on_stop: What to tell the user after Ctrl-C or SIGTERM.
    """
    console.prepare_streams()
    numbers: dict[str, Any] = {}

    def command() -> None:
        numbers.update(main(tyro.cli(options, description=description)))
        print_json(numbers)

    status = console.run_command(command, on_stop)
    if status:
        sys.exit(status)
    return numbers


def print_json(numbers: dict[str, Any]) -> None:
    """Print numbers as one line of JSON, with null in place of NaN."""
    print(json.dumps(_without_nan(numbers), allow_nan=False), flush=True)


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def run_child(module: str, arguments: Sequence[object] = (), **environment: str) -> dict[str, Any]:
    """Run a module of this package in a process of its own and return the JSON of its last line.

    Args:
        module: Its name, as in "benchmarks.loading".
        arguments: Its command line.
        environment: Changed environment variables.

    Raises:
        subprocess.CalledProcessError: If it fails.
    """
    command = [sys.executable, "-m", module, *map(str, arguments)]
    output = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, check=True, stdout=subprocess.PIPE, text=True
    ).stdout
    return json.loads(output.splitlines()[-1])


# ------------------------------------------------------------------------------------------------ the machine


def time_runs(run: Callable[[], object], repeats: int) -> list[float]:
    """Return the seconds that each of several runs takes, after one that does not count."""
    run()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return seconds


def report_machine(in_child: bool = False) -> dict[str, float]:
    """Measure and print what the machine can do: the line that stands above each table of times.

    Args:
        in_child: Measure in a process of its own, so that this one takes no memory for it, on a GPU either.

    Returns:
        `{"convolution_peak_gflops": ...}`, see `convolution_peak`.
    """
    numbers = run_child("benchmarks.common") if in_child else {"convolution_peak_gflops": convolution_peak() / 1e9}
    print(f"{os.cpu_count()} cores; convolution peak {numbers['convolution_peak_gflops']:.0f} GFLOP/s", flush=True)
    return numbers


def convolution_peak() -> float:
    """Measure the floating-point operations per second of 3 × 3 convolutions, forward and backward, in float32.

    Returns:
        The best of three sizes: 64 channels at 48 × 48, 128 at 24 × 24 and 256 at 12 × 12, in batches of 32.
    """
    # With JAX on a GPU, TensorFlow has no access to the GPU. On a CPU, TensorFlow's convolutions are the faster ones.
    make_step = _jax_convolution if devices.on_jax() and not devices.uses_cpus() else _tensorflow_convolution
    best = 0.0
    for size, channels in ((48, 64), (24, 128), (12, 256)):
        random = np.random.default_rng(0)
        images = random.normal(size=(32, size, size, channels)).astype(np.float32)
        kernel = random.normal(size=(3, 3, channels, channels)).astype(np.float32)
        operations = 3 * 2 * 32 * size**2 * 9 * channels**2
        best = max(best, operations / min(time_runs(make_step(images, kernel), 6)))
    return best


def _tensorflow_convolution(images: np.ndarray, kernel: np.ndarray) -> Callable[[], object]:
    @tf.function(autograph=False)
    def step(images: tf.Tensor, kernel: tf.Tensor) -> list[tf.Tensor]:
        with tf.GradientTape() as tape:
            tape.watch((images, kernel))
            output = tf.nn.conv2d(images, kernel, 1, "SAME")
        gradients = tape.gradient(output, (images, kernel), output)
        return [tf.reduce_max(gradient) for gradient in gradients]

    inputs = tf.constant(images), tf.constant(kernel)
    return lambda: [maximum.numpy() for maximum in step(*inputs)]


def _jax_convolution(images: np.ndarray, kernel: np.ndarray) -> Callable[[], object]:
    import jax

    def convolve(images: jax.Array, kernel: jax.Array) -> jax.Array:
        axes = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(images, kernel, (1, 1), "SAME", dimension_numbers=axes)

    @jax.jit
    def step(images: jax.Array, kernel: jax.Array) -> list[jax.Array]:
        output, backward = jax.vjp(convolve, images, kernel)
        return [gradient.max() for gradient in backward(output)]

    inputs = jax.device_put(images), jax.device_put(kernel)
    return lambda: jax.block_until_ready(step(*inputs))


def peak_memory() -> int:
    """Return the most memory that this process has held so far, in bytes."""
    # On Linux the other way, getrusage, also counts the memory of the process that has started this one.
    status = Path("/proc/self/status")
    if status.exists() and (match := re.search(r"^VmHWM:\s+(\d+) kB", status.read_text(), re.MULTILINE)):
        return 1024 * int(match[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# -------------------------------------------------------------------------------------------- training steps


def step_operations(network: keras.Model, x: Any, y: Any) -> int:
    """Count the floating-point operations of all convolutions and matrix products in the graph of a training step.

    Args:
        network: A built network whose loss is `compute_loss`. TensorFlow only.
        x, y: One batch of inputs and targets.
    """

    @tf.function(autograph=False)
    def step() -> list[tf.Tensor]:
        with tf.GradientTape() as tape:
            outputs = network(x, training=True)
            loss = network.compute_loss(x=x, y=y, y_pred=outputs)
        return tape.gradient(loss, [variable.value for variable in network.trainable_variables])

    return sum(_operations(operation) for operation in step.get_concrete_function().graph.get_operations())


def _operations(operation: tf.Operation) -> int:
    """Count the floating-point operations of one operation of a graph; 0 for all but convolutions and products."""
    inputs = [tensor.shape.as_list() for tensor in operation.inputs]
    output = operation.outputs[0].shape.as_list() if operation.outputs else []
    if operation.type == "Conv2D":
        return 2 * math.prod(output) * math.prod(inputs[1][:-1])
    if operation.type == "Conv2DBackpropInput":  # Its inputs: sizes, kernel, gradient.
        return 2 * math.prod(inputs[2]) * math.prod(inputs[1][:-1])
    if operation.type == "Conv2DBackpropFilter":  # Its inputs: images, sizes, gradient. The output is the kernel's.
        return 2 * math.prod(inputs[2]) * math.prod(output[:-1])
    if operation.type in ("MatMul", "BatchMatMulV2"):
        transposed = operation.get_attr("transpose_a" if operation.type == "MatMul" else "adj_x")
        return 2 * math.prod(output) * inputs[0][-2 if transposed else -1]
    return 0


def training_speed(network: keras.Model, x: Any, y: Any, repeats: int) -> tuple[float, float]:
    """Measure a training step: forward pass, backward pass and optimizer.

    Args:
        network: A compiled network.
        x, y: One batch of inputs and targets, arrays or tuples of arrays.
        repeats: Number of steps that are timed. The median counts.

    Returns:
        Images per second, and floating-point operations per second (see `step_operations`).
    """
    x, y = (tf.nest.map_structure(tf.constant, value) for value in (x, y))
    seconds = float(np.median(time_runs(functools.partial(network.train_on_batch, x, y), repeats)))
    batch_size = len(tf.nest.flatten(x)[0])
    return batch_size / seconds, step_operations(network, x, y) / seconds


def validation_ssim(network: keras.Model, images: np.ndarray) -> float:
    """Return the mean SSIM of a network's reconstructions of images (N, H, W, 1) uint8."""
    values = []
    for start in range(0, len(images), 90):
        batch = dataset.to_float(images[start : start + 90])
        reconstructions = ops.clip(network(batch, training=False), 0, 1)
        values.append(ops.convert_to_numpy(layers.ssim(batch, reconstructions)))
    return float(np.concatenate(values).mean())


if __name__ == "__main__":
    print_json({"convolution_peak_gflops": convolution_peak() / 1e9})
