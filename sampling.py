"""Cached sampling: generate grids of code indices from a prior, computing only what each new cell adds.

A whole grid is one compiled loop of the backend, so Python is not called for every cell.
"""

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from layers import MaskedConv2D, Tensor
from model import PixelCNN


def sample_codes(
    prior: PixelCNN,
    positions: np.ndarray,
    seed: int | list[int],
    coarse: np.ndarray | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    batch_size: int = 64,
    progress: Callable[[int], object] | None = None,
) -> np.ndarray:
    """Sample one grid of code indices for each slice position.

    Args:
        prior: Trained prior, which is left unchanged.
        positions: Slice positions (N,) int32.
        seed: Seed of the samples. The same seed gives the same codes for every batch size.
        coarse: Codes of the coarser level (N, h', w') int32, for a prior that is conditioned on them.
        temperature, top_k, top_p: See `filter_logits`.
        batch_size: Number of grids that are sampled together.
        progress: Function that is called after each batch with the number of grids in it.

    Returns:
        (N, h, w) int32.
    """
    height, width = prior.grid_size
    conditioning = [np.asarray(array, np.int32) for array in (positions, coarse) if array is not None]
    # One number in [0, 1) for each code. They are generated first, so that they do not depend on the batch size.
    uniforms = np.random.default_rng(seed).random((len(positions), height * width), np.float32)

    def sample(uniforms: Tensor, *conditioning: Tensor) -> Tensor:
        return sample_batch(prior, uniforms, conditioning, temperature, top_k, top_p)

    compiled = compile_function(sample)
    codes: list[np.ndarray] = []
    for start in range(0, len(positions), batch_size):
        batch = slice(start, start + batch_size)
        codes.append(ops.convert_to_numpy(compiled(uniforms[batch], *[array[batch] for array in conditioning])))
        if progress:
            progress(len(codes[-1]))
    return np.concatenate(codes).reshape(-1, height, width)


def sample_batch(
    prior: PixelCNN,
    uniforms: Tensor,
    conditioning: Sequence[Tensor],
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> Tensor:
    """Sample one batch of grids.

    Args:
        prior: Trained prior.
        uniforms: (B, h · w) float32 in [0, 1), one number for each code.
        conditioning: See `cached_sampling`.
        temperature, top_k, top_p: See `filter_logits`.

    Returns:
        (B, h · w) int32 code indices in raster order.
    """
    height, width = prior.grid_size

    def sample_cell(logits: Tensor, uniforms: Tensor) -> Tensor:
        return sample_categorical(filter_logits(logits, temperature, top_k, top_p), uniforms)

    uniforms = ops.transpose(ops.reshape(uniforms, (-1, height, width)), (1, 2, 0))  # (h, w, B)
    codes = cached_sampling(prior, conditioning, uniforms, sample_cell)  # (h, w, B)
    return ops.reshape(ops.transpose(codes, (2, 0, 1)), (-1, height * width))


def compile_function(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return the function compiled to one graph of the backend."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return tf.function(function, reduce_retracing=True, autograph=False)
    if keras.backend.backend() == "jax":
        import jax

        return jax.jit(function)
    return function


# --------------------------------------------------------------------------------------------- one code


def filter_logits(logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Apply temperature, top-k and top-p filtering, in this order.

    Args:
        logits: (..., K).
        temperature: Positive divisor of the logits. Values below 1 sharpen the distribution, above 1 flatten it.
        top_k: Number of most likely codes to keep, with ties. 0 keeps all.
        top_p: Keep the smallest set of most likely codes whose total probability reaches this fraction (nucleus
            sampling, Holtzman et al. 2020). 1 keeps all.

    Returns:
        (..., K), with −1e9 for codes that are excluded.
    """
    logits = logits / temperature
    excluded = -1e9
    if 0 < top_k < logits.shape[-1]:
        kth_largest = ops.top_k(logits, top_k)[0][..., -1:]
        logits = ops.where(logits < kth_largest, excluded, logits)
    if top_p < 1:
        probabilities = ops.softmax(logits)
        descending = -ops.sort(-probabilities, axis=-1)
        needed = ops.cumsum(descending, axis=-1) - descending < top_p
        smallest = ops.min(ops.where(needed, descending, 1.0), axis=-1, keepdims=True)
        logits = ops.where(probabilities < smallest, excluded, logits)
    return logits


def sample_categorical(logits: Tensor, uniforms: Tensor) -> Tensor:
    """Sample from softmax(logits) by inverting the cumulative distribution.

    Args:
        logits: (B, K).
        uniforms: (B,) in [0, 1).

    Returns:
        (B,) int32.
    """
    cumulative = ops.cumsum(ops.softmax(logits), axis=-1)
    total = cumulative[:, -1:]
    # The second condition keeps a number that rounds to 1 from selecting a code of probability 0
    below = (cumulative <= uniforms[:, None] * total) & (cumulative < total)
    return ops.sum(ops.cast(below, "int32"), axis=-1)


# --------------------------------------------------------------------------------------------- one grid


def cached_sampling(
    prior: PixelCNN,
    conditioning: Sequence[Tensor],
    inputs: Tensor,
    sample_cell: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """Visit the cells of a grid in raster order, computing at each cell only what it adds.

    Each masked convolution caches the inputs that later cells will read (Ramachandran et al. 2017, "Fast Generation for
    Convolutional Autoregressive Models"): a few recent rows for the part of its kernel that covers complete rows, and
    a few recent cells for the part that covers the current row. The first cache advances once per row, the second at
    every cell. The layers are those of the prior, so the logits equal those of `prior((codes, *conditioning))`.

    Args:
        prior: Trained prior.
        conditioning: Slice positions (B,) int32 and, for a bottom prior, coarse codes (B, h', w') int32.
        inputs: (h, w, B), values for `sample_cell`.
        sample_cell: Function of the logits (B, K) and the inputs (B,) of a cell that returns its code indices (B,)
            int32.

    Returns:
        (h, w, B) int32 code indices.
    """
    sample = _cached_gated if prior.gated else _cached_plain
    return sample(prior, conditioning, inputs, sample_cell)


def _cached_gated(
    prior: PixelCNN,
    conditioning: Sequence[Tensor],
    inputs: Tensor,
    sample_cell: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """`cached_sampling` for the gated prior: the vertical stack row by row, the horizontal stack cell by cell."""
    (height, width), blocks, batch_size = prior.grid_size, prior.blocks, ops.shape(conditioning[0])[0]
    row_layers = [prior.first_vertical, *[block.vertical for block in blocks]]
    cell_layers = [prior.first_horizontal, *[block.horizontal for block in blocks]]

    def next_row(row_caches: list[Tensor], row: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        row_inputs, position_embedding, condition = row
        vertical = prior.first_vertical.convolve_rows(row_caches[0]) + position_embedding  # (B, w, filters)
        from_above = [vertical]  # what the cells of the row receive from the vertical stack, for each layer
        new_row_caches = []
        for block, cache in zip(blocks, row_caches[1:], strict=True):
            new_row_caches.append(_append(cache, vertical))
            above, projected = block.vertical.convolve_rows(new_row_caches[-1]), block.condition(condition)
            from_above.append(block.across(above) + projected)
            vertical = block.update_vertical(vertical, above + projected)

        def next_cell(cell_caches: list[Tensor], cell: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
            cell_inputs, first_above, *blocks_above = cell
            horizontal = prior.first_horizontal.convolve_cells(cell_caches[0]) + first_above
            new_cell_caches = []
            for block, cache, above in zip(blocks, cell_caches[1:], blocks_above, strict=True):
                new_cell_caches.append(_append(cache, horizontal))
                left = block.horizontal.convolve_cells(new_cell_caches[-1])
                horizontal = block.update_horizontal(horizontal, left + above)
            codes = sample_cell(prior.head(horizontal), cell_inputs)
            return [_append(cell_caches[0], prior.embedding(codes)), *new_cell_caches], [codes]

        cells = [row_inputs, *[_swap_batch(features) for features in from_above]]
        _, (codes,) = _scan(next_cell, _empty_cells(cell_layers, batch_size), cells, [_zero_codes(width, batch_size)])
        first_cache = _append(row_caches[0], _swap_batch(prior.embedding(codes)))
        return [first_cache, *new_row_caches], [codes]

    rows = [inputs, prior.position_embedding, _condition_by_row(prior, conditioning)]
    row_caches = _empty_rows(row_layers, batch_size, width)
    _, (codes,) = _scan(next_row, row_caches, rows, [_zero_codes(height, width, batch_size)])
    return codes


def _cached_plain(
    prior: PixelCNN,
    conditioning: Sequence[Tensor],
    inputs: Tensor,
    sample_cell: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """`cached_sampling` for the plain prior: the contribution of the rows above row by row, the rest cell by cell."""
    (height, width), blocks, batch_size = prior.grid_size, prior.blocks, ops.shape(conditioning[0])[0]
    masked_layers = [prior.first, *[block.masked for block in blocks]]

    def next_row(row_caches: list[Tensor], row: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        row_inputs, position_embedding, condition = row
        above = [layer.convolve_rows(cache) for layer, cache in zip(masked_layers, row_caches, strict=True)]
        projected = [position_embedding, *[block.condition(condition) for block in blocks]]
        from_above = [a + p for a, p in zip(above, projected, strict=True)]  # (B, w, C) for each layer

        def next_cell(cell_caches: list[Tensor], cell: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
            cell_inputs, first_above, *blocks_above = cell
            features = prior.first.convolve_cells(cell_caches[0]) + first_above
            new_cell_caches, reduced = [], []
            for block, cache, above in zip(blocks, cell_caches[1:], blocks_above, strict=True):
                reduced.append(block.reduce_features(features))
                new_cell_caches.append(_append(cache, reduced[-1]))
                features = block.update_features(features, block.masked.convolve_cells(new_cell_caches[-1]) + above)
            codes = sample_cell(prior.head(features), cell_inputs)
            return [_append(cell_caches[0], prior.embedding(codes)), *new_cell_caches], [codes, *reduced]

        cells = [row_inputs, *[_swap_batch(features) for features in from_above]]
        zeros = [ops.zeros((width, batch_size, layer.kernel.shape[2])) for layer in masked_layers[1:]]
        outputs = [_zero_codes(width, batch_size), *zeros]
        _, (codes, *reduced) = _scan(next_cell, _empty_cells(masked_layers, batch_size), cells, outputs)
        layer_inputs = [prior.embedding(codes), *reduced]  # inputs of each layer along the row, (w, B, C)
        new_row_caches = [_append(cache, _swap_batch(x)) for cache, x in zip(row_caches, layer_inputs, strict=True)]
        return new_row_caches, [codes]

    rows = [inputs, prior.position_embedding, _condition_by_row(prior, conditioning)]
    row_caches = _empty_rows(masked_layers, batch_size, width)
    _, (codes,) = _scan(next_row, row_caches, rows, [_zero_codes(height, width, batch_size)])
    return codes


def _scan(
    step: Callable[[list[Tensor], list[Tensor]], tuple[list[Tensor], list[Tensor]]],
    state: list[Tensor],
    inputs: list[Tensor],
    outputs: list[Tensor],
) -> tuple[list[Tensor], list[Tensor]]:
    """Run a step for every index of the first axis of the inputs.

    `keras.ops.scan` does not fit, because it requires outputs of the same structure as the state.

    Args:
        step: Function of the state and the inputs at one index that returns the new state and the outputs at this
            index.
        state: Initial state.
        inputs: Tensors (n, ...).
        outputs: Tensors (n, ...) to write the outputs into.

    Returns:
        The final state and the outputs.
    """

    def body(i: Tensor, carried: tuple[list[Tensor], list[Tensor]]) -> tuple[list[Tensor], list[Tensor]]:
        state, outputs = carried
        state, new = step(state, [ops.take(x, i, axis=0) for x in inputs])
        index = ops.reshape(ops.cast(i, "int32"), (1, 1))
        return state, [ops.scatter_update(whole, index, x[None]) for whole, x in zip(outputs, new, strict=True)]

    return ops.fori_loop(0, inputs[0].shape[0], body, (state, outputs))


def _condition_by_row(prior: PixelCNN, conditioning: Sequence[Tensor]) -> Tensor:
    """Return the conditioning features of each row, (h, B, w or 1, filters)."""
    condition = prior.condition(*conditioning)  # (B, h or 1, w or 1, filters)
    return ops.swapaxes(ops.repeat(condition, prior.grid_size[0] // condition.shape[1], axis=1), 0, 1)


def _append(cache: Tensor, newest: Tensor) -> Tensor:
    """Drop the oldest entry of a cache (B, span, ...) and append the newest (B, ...)."""
    return ops.concatenate([cache[:, 1:], newest[:, None]], axis=1)


def _swap_batch(row: Tensor) -> Tensor:
    """(B, w, ...) -> (w, B, ...) and back."""
    return ops.swapaxes(row, 0, 1)


def _empty_rows(layers: list[MaskedConv2D], batch_size: Any, width: int) -> list[Tensor]:
    """Return the row cache of each layer above the grid: zeros, like the padding of its convolution."""
    return [ops.zeros((batch_size, layer.row_span, width, layer.kernel.shape[2])) for layer in layers]


def _empty_cells(layers: list[MaskedConv2D], batch_size: Any) -> list[Tensor]:
    """Return the cell cache of each layer to the left of the grid: zeros, like the padding of its convolution."""
    return [ops.zeros((batch_size, layer.cell_span, layer.kernel.shape[2])) for layer in layers]


def _zero_codes(*shape: Any) -> Tensor:
    return ops.zeros(shape, dtype="int32")
