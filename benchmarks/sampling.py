"""How fast code indices are drawn, against drawing them by full forward passes.

    python benchmarks/sampling.py [--batch-size 20]

Three ways, with the driver's default prior (untrained: the weights do not matter for the time):

    one call a position   a Python loop that calls `predict` for each position and draws there, the student work's way
    compiled full passes  the same as one compiled loop
    incremental           `sampling.draw`

The two slow ways do the same for every position, so they are timed on the positions of the first rows only and
scaled to the grid, as the table says. Building graphs does not count. Every way draws the same codes.
"""

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import tyro
from keras import ops

import driver
import model
import sampling


@dataclass(frozen=True)
class Options:
    batch_size: int = 20  # grids drawn together
    grids: tuple[int, ...] = (12, 24, 32)  # heights and widths
    slow_positions: int = 24  # that the slow ways are timed on
    repeats: int = 3  # the median counts


def one_call_a_position(prior: model.PixelCNN, uniforms: np.ndarray, positions: np.ndarray, count: int) -> np.ndarray:
    """Codes (B, h·w) of which the first `count` are drawn."""
    codes = np.zeros(uniforms.shape, np.int32)
    for i in range(count):
        logits = prior.predict((codes.reshape(-1, *prior.grid_size), positions), verbose=0, batch_size=len(codes))
        logits = logits.reshape(len(codes), -1, prior.num_embeddings)[:, i]
        codes[:, i] = ops.convert_to_numpy(sampling.choose(logits, uniforms[:, i]))
    return codes


def full_passes(prior: model.PixelCNN, uniforms, positions, count: int):
    """The same as one loop of the backend."""
    height, width = prior.grid_size
    cells = ops.arange(height * width)

    def draw_cell(i, codes):
        logits = prior((ops.reshape(codes, (-1, height, width)), positions))
        logits = ops.take(ops.reshape(logits, (-1, height * width, prior.num_embeddings)), i, axis=1)
        drawn = sampling.choose(logits, ops.take(uniforms, i, axis=1))
        return ops.where(cells == i, drawn[:, None], codes)

    return ops.fori_loop(0, count, draw_cell, ops.zeros(ops.shape(uniforms), dtype="int32"))


def seconds(run: Callable, repeats: int) -> float:
    """Median time of some runs, after one that does not count."""
    run()
    times = []
    for _ in range(repeats):
        begun = time.perf_counter()
        run()
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


def incremental(prior: model.PixelCNN, batch_size: int) -> Callable:
    """A function that draws a batch of grids by the product's way, already built."""
    positions = np.arange(batch_size, dtype=np.int32)
    uniforms = np.random.default_rng(0).random((batch_size, np.prod(prior.grid_size)), np.float32)
    draw = sampling.compiled(lambda u, p: sampling.draw_batch(prior, u, [p]))
    return lambda: ops.convert_to_numpy(draw(uniforms, positions))


def compare(grid: int, options: Options) -> dict[str, float]:
    """Seconds a batch of each way at one grid."""
    prior = driver.make_prior(driver.Config(grids=(grid,)))
    positions = np.arange(options.batch_size, dtype=np.int32)
    uniforms = np.random.default_rng(0).random((options.batch_size, grid * grid), np.float32)
    count = min(options.slow_positions, grid * grid)
    compiled = sampling.compiled(lambda u, p: full_passes(prior, u, p, count))
    fast = incremental(prior, options.batch_size)

    slow = one_call_a_position(prior, uniforms, positions, count)
    for codes in (ops.convert_to_numpy(compiled(uniforms, positions)), fast()):
        agreement = np.mean(codes[:, :count] == slow[:, :count])
        assert agreement > 0.99, f"the ways draw different codes ({agreement:.1%} alike)"  # rounding may flip a few
    scale = grid * grid / count
    return {
        "one call a position": scale * seconds(lambda: one_call_a_position(prior, uniforms, positions, count), 1),
        "compiled full passes": scale * seconds(lambda: ops.convert_to_numpy(compiled(uniforms, positions)), 1),
        "incremental": seconds(fast, options.repeats),
    }


def arithmetic(prior: model.PixelCNN) -> float:
    """Floating-point operations that drawing one grid needs: each weight matrix once for each position."""
    weights = sum(np.prod(w.shape) for w in prior.trainable_variables if len(w.shape) in (2, 4))
    weights -= np.prod(prior.embedding.embeddings.shape)  # looked up
    weights -= sum(np.prod(block.condition.kernel.shape) for block in prior.blocks)  # once a grid
    return 2 * float(weights) * np.prod(prior.grid_size)


def main(options: Options) -> None:
    summary = {}
    print(f"{os.cpu_count()} cores, batch {options.batch_size}, gated prior of 6 blocks of 128 filters")
    print(f"the slow ways: {options.slow_positions} positions timed, scaled to the grid")
    print(f"{'grid':>8} {'way':22} {'seconds':>9} {'images/s':>9} {'incremental is faster by':>25}")
    for grid in options.grids:
        times = compare(grid, options)
        for way, time_ in times.items():
            ratio = time_ / times["incremental"]
            print(f"{grid:>3} × {grid:<3}  {way:22} {time_:8.2f} {options.batch_size / time_:9.2f} {ratio:24.1f}×")
        summary[f"speedup_{grid}x{grid}"] = times["one call a position"] / times["incremental"]
        summary[f"speedup_over_compiled_{grid}x{grid}"] = times["compiled full passes"] / times["incremental"]

    print(f"\n{'grid':>8} {'batch':>6} {'seconds':>9} {'µs a position':>14} {'µs a code':>10} {'GFLOP/s':>8}")
    growth = [(grid, options.batch_size) for grid in (8, *options.grids, 48)] + [(12, b) for b in (1, 5, 80)]
    for grid, batch_size in growth:
        prior = driver.make_prior(driver.Config(grids=(grid,)))
        time_ = seconds(incremental(prior, batch_size), options.repeats)
        position = time_ / grid**2
        rate = arithmetic(prior) * batch_size / time_ / 1e9
        print(
            f"{grid:>3} × {grid:<3} {batch_size:6} {time_:9.3f} {position * 1e6:14.0f}"
            f" {position / batch_size * 1e6:10.1f} {rate:8.1f}"
        )
        summary[f"microseconds_a_position_{grid}x{grid}_batch_{batch_size}"] = position * 1e6
    print(json.dumps(summary))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
