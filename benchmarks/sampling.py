"""Speed of sampling code indices, compared with sampling by full forward passes.

    python -m benchmarks.sampling [--batch-size 20]

Compares three methods, with the default prior of driver.py (untrained, since weights do not affect the time):

    one call per position   a Python loop that calls `predict` and samples one code, as in earlier student projects
    compiled full passes    the same, compiled to one loop of the backend
    cached sampling         `sampling.sample_codes`

The two slow methods do the same at every position. They are timed on the first positions only, and the time is scaled
to the whole grid. The time for building graphs does not count. All methods sample the same codes.
"""

import functools
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from keras import ops

import driver
import sampling
import stages
from benchmarks import common
from layers import Tensor
from model import PixelCNN


@dataclass(frozen=True)
class Options:
    """What to sample, and how often."""

    batch_size: int = 20  # number of grids that are sampled together
    grids: tuple[int, ...] = (12, 24, 32)  # heights and widths of grids
    slow_positions: int = 24  # number of positions that the slow methods are timed on
    repeats: int = 3  # the median counts


def one_call_per_position(prior: PixelCNN, uniforms: np.ndarray, positions: np.ndarray, count: int) -> np.ndarray:
    """Sample code indices with one call of `predict` per position.

    Args:
        prior: The prior.
        uniforms: (B, h · w) float32 in [0, 1), one number per code.
        positions: (B,) int32 slice positions.
        count: Number of codes to sample in each grid. The others remain 0.

    Returns:
        (B, h · w) int32.
    """
    codes = np.zeros(uniforms.shape, np.int32)
    for i in range(count):
        inputs = {"codes": codes.reshape(-1, *prior.grid_size), "positions": positions}
        logits = prior.predict(inputs, verbose=0, batch_size=len(codes))
        logits = logits.reshape(len(codes), -1, prior.num_embeddings)[:, i]
        codes[:, i] = ops.convert_to_numpy(sampling.sample_categorical(logits, uniforms[:, i]))
    return codes


def full_passes(prior: PixelCNN, uniforms: Tensor, positions: Tensor, count: int) -> Tensor:
    """Sample like `one_call_per_position`, in one loop of the backend."""
    height, width = prior.grid_size
    cells = ops.arange(height * width)

    def sample_cell(i: Tensor, codes: Tensor) -> Tensor:
        logits = prior({"codes": ops.reshape(codes, (-1, height, width)), "positions": positions})
        logits = ops.take(ops.reshape(logits, (-1, height * width, prior.num_embeddings)), i, axis=1)
        sampled = sampling.sample_categorical(logits, ops.take(uniforms, i, axis=1))
        return ops.where(cells == i, sampled[:, None], codes)

    return ops.fori_loop(0, count, sample_cell, ops.zeros(ops.shape(uniforms), dtype="int32"))


def make_inputs(prior: PixelCNN, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return random numbers (B, h · w) float32 in [0, 1) and slice positions (B,) int32."""
    uniforms = np.random.default_rng(0).random((batch_size, math.prod(prior.grid_size)), np.float32)
    return uniforms, np.arange(batch_size, dtype=np.int32)


def cached_sampling(prior: PixelCNN, batch_size: int) -> Callable[[], np.ndarray]:
    """Return a function that samples a batch of grids, (B, h · w). Only its first call builds the graph."""
    uniforms, positions = make_inputs(prior, batch_size)

    def sample() -> np.ndarray:
        codes = sampling.sample_codes(prior, {"positions": positions}, uniforms, batch_size=batch_size)
        return codes.reshape(batch_size, -1)

    return sample


def compare_methods(grid: int, options: Options) -> dict[str, float]:
    """Return the seconds per batch of each method, for a grid of this size.

    Raises:
        RuntimeError: If the methods sample different codes.
    """
    prior = stages.make_prior(driver.Config(grids=(grid,)))
    inputs = make_inputs(prior, options.batch_size)
    count = min(options.slow_positions, grid * grid)
    compiled = sampling.compile_function(lambda u, p: full_passes(prior, u, p, count))
    slow = functools.partial(one_call_per_position, prior, *inputs, count)
    cached = cached_sampling(prior, options.batch_size)

    expected = slow()
    for codes in (ops.convert_to_numpy(compiled(*inputs)), cached()):
        agreement = np.mean(codes[:, :count] == expected[:, :count])
        if agreement < 0.99:  # Rounding may change a few.
            raise RuntimeError(f"the methods sample different codes: only {agreement:.1%} are the same")
    scale = grid * grid / count
    return {
        "one call per position": scale * median_seconds(slow, 1),
        "compiled full passes": scale * median_seconds(lambda: ops.convert_to_numpy(compiled(*inputs)), 1),
        "cached sampling": median_seconds(cached, options.repeats),
    }


def median_seconds(run: Callable[[], object], repeats: int) -> float:
    """Return the median time of several runs, after one that does not count."""
    return statistics.median(common.time_runs(run, repeats))


def operations_per_grid(prior: PixelCNN) -> float:
    """Return the floating-point operations that one grid needs: each weight matrix once per position.

    The products of attention with its keys and values are left out.
    """
    weights = sum(math.prod(weight.shape) for weight in prior.trainable_variables if len(weight.shape) in (2, 4))
    weights -= math.prod(prior.embedding.embeddings.shape)  # Looked up.
    conditioned = [block for block in prior.blocks if hasattr(block, "condition")]
    weights -= sum(math.prod(block.condition.kernel.shape) for block in conditioned)  # Used once per grid.
    return 2.0 * weights * math.prod(prior.grid_size)


def main(options: Options) -> dict[str, Any]:
    """Compare the methods, measure how the time grows, and return the numbers."""
    numbers: dict[str, Any] = common.report_machine()
    print(f"batches of {options.batch_size} grids, gated prior of 6 blocks with 128 filters and 3 attention layers")
    print(f"the slow methods are timed on {options.slow_positions} positions and scaled to the grid")
    print(f"{'grid':>8} {'method':22} {'seconds':>9} {'images/s':>9} {'cached is faster by':>20}")
    for grid in options.grids:
        seconds = compare_methods(grid, options)
        fastest = seconds["cached sampling"]
        for method, spent in seconds.items():
            print(
                f"{grid:>3} × {grid:<3}  {method:22} {spent:8.2f} {options.batch_size / spent:9.2f}"
                f" {spent / fastest:19.1f}×",
                flush=True,
            )
        numbers[f"speedup_{grid}x{grid}"] = seconds["one call per position"] / fastest
        numbers[f"speedup_over_compiled_{grid}x{grid}"] = seconds["compiled full passes"] / fastest

    print(f"\n{'grid':>8} {'batch':>6} {'seconds':>9} {'µs per position':>15} {'µs per code':>11} {'GFLOP/s':>8}")
    sizes = [(grid, options.batch_size) for grid in (8, *options.grids, 48)] + [(12, size) for size in (1, 5, 80, 360)]
    for grid, batch_size in sizes:
        prior = stages.make_prior(driver.Config(grids=(grid,)))
        spent = median_seconds(cached_sampling(prior, batch_size), options.repeats)
        microseconds = spent / grid**2 * 1e6
        rate = operations_per_grid(prior) * batch_size / spent / 1e9
        print(
            f"{grid:>3} × {grid:<3} {batch_size:6} {spent:9.3f} {microseconds:15.0f}"
            f" {microseconds / batch_size:11.1f} {rate:8.1f}",
            flush=True,
        )
        numbers[f"microseconds_a_position_{grid}x{grid}_batch_{batch_size}"] = microseconds
    return numbers


if __name__ == "__main__":
    common.run_benchmark(main, Options, __doc__)
