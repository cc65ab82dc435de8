"""What several benchmarks share: timing, the machine's peak, comparison with an earlier run, child processes, JSON.

`python -m benchmarks.common` prints the convolution peak of this machine.
"""

import dataclasses
import functools
import json
import math
import os
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
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
from run import RunError, read_config, versions, without_nan

ROOT = Path(__file__).parents[1]

Options = TypeVar("Options")

# The figures that are compared with an earlier run, as regular expressions that match their whole names. All other
# numbers, such as counts, are not. Times and speeds depend on the state of the machine, the rest does not.
TIMES = r"(training_|uninterrupted_)?seconds|seconds_to_ssim|ms_per_grid|microseconds_a_position_.+|minutes_for_.+"
SPEEDS = r"(images|slices)_per_second|(vqvae|prior)_images_per_s"
OTHERS_LOWER = r"peak_mb|memory_ratio|bits_per_code|prior_bits_per_image"
OTHERS_HIGHER = r"share_of_peak|speedup_.+|ours_is_faster_by|sooner_by|ssim|ssim_brain|psnr_db"
LOWER_IS_BETTER, HIGHER_IS_BETTER = f"{TIMES}|{OTHERS_LOWER}", f"{SPEEDS}|{OTHERS_HIGHER}"


# ------------------------------------------------------------------------------------ command line and output


@dataclass(frozen=True)
class Comparison:
    """What a benchmark is compared with."""

    compare: Path | None = None  # file with the output of an earlier run of the same command on this machine
    tolerance: float = 0.1  # fraction by which a figure may be worse than in that run; otherwise the exit status is 1


def run_benchmark(
    main: Callable[[Options], dict[str, Any]],
    options: type[Options],
    description: str | None,
    on_stop: str = "the numbers of this benchmark are lost",
) -> dict[str, Any]:
    """Parse the command line, run a benchmark, and print its numbers as the last line.

    Ends the process on errors, and with status 1 if a figure is worse than `Comparison` allows.

    Args:
        main: The benchmark. Returns its numbers, with those of `report_machine` among them.
        options: The dataclass of its options. Those of `Comparison` are added on the command line.
        description: Text for `--help`.
        on_stop: What to tell the user after Ctrl-C or SIGTERM.
    """
    console.prepare_streams()
    numbers: dict[str, Any] = {}
    worse: str | None = None
    both: Any = dataclasses.make_dataclass("Command", [("options", options), ("comparison", Comparison)])

    def command() -> None:
        nonlocal worse
        chosen = tyro.cli(both, description=description, config=(tyro.conf.OmitArgPrefixes,))
        texts = _as_text(chosen.options)
        earlier = read_earlier(chosen.comparison, texts)
        numbers.update(main(chosen.options), options=texts)
        if earlier:
            worse = compare(earlier, numbers, chosen.comparison)
        print_json(numbers)

    status = console.run_command(command, on_stop)
    if status:
        sys.exit(status)
    if worse:
        print(f"error: {console.one_line(worse)}", file=sys.stderr)
        sys.exit(1)
    return numbers


def _as_text(options: Any) -> dict[str, str]:
    """Return options as text. Folders may be moved, so of a path only counts that it was given."""
    values = dataclasses.asdict(options)
    return {name: "a path" if isinstance(value, Path) else str(value) for name, value in values.items()}


def load_config(run_dir: Path) -> tuple[Any, dict[str, Any]]:
    """Read the configuration of a run. Returns it, and the content of config.json. Raises RunError."""
    import driver  # Not needed by processes whose memory is measured.

    saved = read_config(run_dir)
    if saved is None:
        raise RunError(f"run_dir is {run_dir}: contains no run; choose the folder of a finished one")
    try:
        return driver.Config(**saved["constants"]), saved
    except TypeError as error:
        raise RunError(f"run_dir is {run_dir}: was made by another version ({error}); choose another run") from error


def print_json(numbers: dict[str, Any]) -> None:
    """Print numbers as one line of JSON, with null in place of NaN."""
    print(json.dumps(without_nan(numbers), allow_nan=False), flush=True)


def run_child(module: str, arguments: Sequence[object] = (), **environment: str) -> dict[str, Any]:
    """Run a module of this package in a process of its own and return the JSON of its last line, without its options.

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
    numbers = json.loads(output.splitlines()[-1])
    return {name: value for name, value in numbers.items() if name != "options"}


# ------------------------------------------------------------------------------------------- an earlier run


def read_earlier(comparison: Comparison, options: dict[str, str]) -> dict[str, Any]:
    """Read the numbers of an earlier run, before anything is measured.

    Args:
        comparison: Where they are.
        options: The options of this run as text.

    Returns:
        The numbers; an empty dictionary if there is nothing to compare with.

    Raises:
        UserError: The tolerance cannot work, or the file is not the output of the same command on the same machine.
    """
    path = comparison.compare
    if not 0 <= comparison.tolerance < math.inf:
        raise console.UserError(f"--tolerance is {comparison.tolerance}: must be 0 or a positive number")
    if path is None:
        return {}
    try:
        earlier = json.loads(path.read_text(encoding="utf-8").splitlines()[-1])
        recorded = {name: earlier[name] for name in (*machine(), "options", "convolution_peak_gflops")}
    except OSError as error:
        raise console.UserError(
            f"{path}: cannot be read ({error.strerror}); give --compare the output of an earlier run"
        ) from error
    except (ValueError, IndexError, KeyError, TypeError) as error:
        raise console.UserError(
            f"{path}: its last line is not the JSON of a benchmark; store the whole output of an earlier run, as in "
            "python -m benchmarks.sampling > FILE"
        ) from error
    for name, value in machine().items():
        if recorded[name] != value:
            raise console.UserError(
                f"{path}: was measured with the {name} {recorded[name]}, not {value}; compare on one machine only"
            )
    for name in options | recorded["options"]:
        before, now = recorded["options"].get(name), options.get(name)
        if before != now:
            raise console.UserError(f"{path}: was measured with {name} = {before}, not {now}; use the same options")
    return earlier


def compare(earlier: dict[str, Any], numbers: dict[str, Any], comparison: Comparison) -> str | None:
    """Print all figures beside those of an earlier run.

    A time or a speed is worse only if it is so both as measured and after both have been scaled to the same convolution
    peak. A machine that is slower for another reason therefore does not look like slower code.

    Args:
        earlier: The numbers of the earlier run.
        numbers: Those of this run.
        comparison: The tolerance.

    Returns:
        One line about the worst figure if it is worse than the tolerance allows, otherwise None.
    """
    peaks = [run["convolution_peak_gflops"] for run in (earlier, numbers)]
    faster = peaks[1] / peaks[0]
    print(f"\ncompared with {comparison.compare}, when the convolution peak was {peaks[0]:.0f} GFLOP/s:")
    if abs(faster - 1) > comparison.tolerance:
        console.warn(f"the convolution peak is {faster:.2f} times the earlier one: the machine is in another state")
    before, after = dict(figures(earlier)), dict(figures(numbers))
    width = max(map(len, before), default=0)
    print(f"{'figure':{width}} {'better':>7} {'earlier':>10} {'now':>10} {'ratio':>7} {'at equal peaks':>15}")
    losses: dict[str, float] = {}
    for name, old in before.items():
        new, kind = after.get(name, math.nan), name.rpartition(": ")[2]
        is_lower_better = re.fullmatch(LOWER_IS_BETTER, kind) is not None
        ratio = scaled = new / old
        if re.fullmatch(f"{TIMES}|{SPEEDS}", kind):
            scaled = ratio * faster if is_lower_better else ratio / faster
        better = "lower" if is_lower_better else "higher"
        print(f"{name:{width}} {better:>7} {old:10.4g} {new:10.4g} {ratio:7.2f} {scaled:15.2f}", flush=True)
        loss = min(ratio, scaled) - 1 if is_lower_better else 1 - max(ratio, scaled)
        losses[name] = math.inf if math.isnan(loss) else loss  # A figure that cannot be measured any more.
    worst = max(losses, key=lambda name: losses[name], default=None)
    if worst is None or losses[worst] <= comparison.tolerance:
        return None
    values = f"{after.get(worst, math.nan):.4g} instead of {before[worst]:.4g}"
    return (
        f'{comparison.compare}: "{worst}" is worse by {losses[worst]:.0%}, {values}; the tolerance is '
        f"{comparison.tolerance:.0%}"
    )


def figures(numbers: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """Yield the names and values of all figures in nested dictionaries and lists, except those that are 0 or None."""
    if isinstance(numbers, dict):
        for key, value in numbers.items():
            yield from figures(value, f"{name}: {key}" if name else key)
    elif isinstance(numbers, list):
        for index, row in enumerate(numbers):
            yield from figures(row, f"{name} {row.get('name', index) if isinstance(row, dict) else index}")
    elif re.fullmatch(f"{LOWER_IS_BETTER}|{HIGHER_IS_BETTER}", name.rpartition(": ")[2]) and numbers:
        yield name, numbers


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


def machine() -> dict[str, str]:
    """Return what must be the same for times to be comparable: processor, number of threads, and backend."""
    facts = versions(backend=keras.backend.backend())
    return {name: facts[name] for name in ("processor", "threads", "backend")}


def measure_machine() -> dict[str, Any]:
    """Return what `machine` returns, and `convolution_peak_gflops`, see `convolution_peak`."""
    return {**machine(), "convolution_peak_gflops": convolution_peak() / 1e9}


def report_machine(in_child: bool = False) -> dict[str, Any]:
    """Measure and print what the machine can do: the line that stands above each table of times.

    Args:
        in_child: Measure in a process of its own, so that this one takes no memory for it, on a GPU either.

    Returns:
        See `measure_machine`.
    """
    numbers = run_child("benchmarks.common") if in_child else measure_machine()
    print(
        f"{numbers['processor']}, {numbers['threads']} threads, {numbers['backend']}; "
        f"convolution peak {numbers['convolution_peak_gflops']:.0f} GFLOP/s",
        flush=True,
    )
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
    print_json(measure_machine())
