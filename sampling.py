"""Draw code indices from a prior, computing at each position only what that position adds.

A draw is one compiled loop over the grid; Python is not called for a position.
"""

import keras
import numpy as np
from keras import ops

import model


def draw(
    prior: model.PixelCNN,
    positions: np.ndarray,
    seed: int | list[int],
    coarse: np.ndarray | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    batch_size: int = 64,
    progress=None,
) -> np.ndarray:
    """Draw one grid of code indices for each slice position, in raster order.

    Args:
        prior: the trained prior; its weights are read, not changed.
        positions: (N,) int32 slice positions.
        seed: the same seed draws the same codes, whatever the batch size.
        coarse: (N, h', w') codes of the coarser level, where the prior is told them.
        temperature, top_k, top_p: see `restrict`.
        batch_size: grids drawn at a time.
        progress: called with the number of grids just drawn, after each batch.

    Returns:
        (N, h, w) int32 code indices.
    """
    height, width = prior.grid_size
    told = [np.asarray(array, np.int32) for array in (positions, coarse) if array is not None]
    # One number in [0, 1) for each code to draw. Drawn ahead, they do not depend on how the grids are batched.
    uniforms = np.random.default_rng(seed).random((len(positions), height * width), np.float32)
    draw_next = compiled(lambda u, *told: draw_batch(prior, u, told, temperature, top_k, top_p))
    codes = []
    for start in range(0, len(positions), batch_size):
        batch = slice(start, start + batch_size)
        codes.append(ops.convert_to_numpy(draw_next(uniforms[batch], *[array[batch] for array in told])))
        if progress:
            progress(len(codes[-1]))
    return np.concatenate(codes).reshape(-1, height, width)


def restrict(logits, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0):
    """Sharpen logits (…, K) and cut off unlikely codes; the same shape comes back.

    Args:
        temperature: divides the logits; below 1 sharpens, above 1 flattens. Positive.
        top_k: keep the k most likely codes (ties are kept); 0 keeps all.
        top_p: then keep the fewest most likely codes that together hold this share of the probability
            (Holtzman et al. 2020); 1 keeps all.
    """
    logits = logits / temperature
    lowest = -1e9
    if 0 < top_k < logits.shape[-1]:
        kth = ops.top_k(logits, top_k)[0][..., -1:]
        logits = ops.where(logits < kth, lowest, logits)
    if top_p < 1:
        probabilities = ops.softmax(logits)
        descending = -ops.sort(-probabilities, axis=-1)
        needed = ops.cumsum(descending, axis=-1) - descending < top_p
        least = ops.min(ops.where(needed, descending, 1.0), axis=-1, keepdims=True)
        logits = ops.where(probabilities < least, lowest, logits)
    return logits


def choose(logits, uniforms):
    """Draw from softmax(logits) by inverting the cumulative distribution: (B, K), (B,) in [0, 1) to (B,) int32."""
    cumulative = ops.cumsum(ops.softmax(logits), axis=-1)
    total = cumulative[:, -1:]
    # the second condition keeps a number that rounds to 1 from going past the last possible code
    below = (cumulative <= uniforms[:, None] * total) & (cumulative < total)
    return ops.sum(ops.cast(below, "int32"), axis=-1)


def incremental(prior: model.PixelCNN, told, inputs, pick):
    """Go over the grid in raster order, computing at each position only what that position adds.

    Each masked convolution keeps the inputs that later positions will read (Ramachandran et al. 2017, "Fast
    generation for convolutional autoregressive models"): a few rows for the part of its kernel that reads whole
    rows, which advances once a row; a few positions for the part that reads the row itself, which advances at
    every position. The layers are the prior's own, so the logits are those of `prior((codes, *told))`.

    Args:
        told: what the prior is told: slice positions (B,) and, for a bottom prior, the coarser codes (B, h', w').
        inputs: (h, w, B), one element for each position of each grid, handed to `pick`.
        pick: function of the logits (B, K) and the inputs (B,) of a position; returns the code indices (B,) int32
            to go on with.

    Returns:
        Code indices (h, w, B) int32.
    """
    return (_gated_walk if prior.gated else _plain_walk)(prior, told, inputs, pick)


def _gated_walk(prior, told, inputs, pick):
    """`incremental` for the gated prior: vertical stack a row at a time, horizontal stack a position at a time."""
    (height, width), blocks, batch_size = prior.grid_size, prior.blocks, ops.shape(told[0])[0]
    row_layers = [prior.first_vertical, *[block.vertical for block in blocks]]
    cell_layers = [prior.first_horizontal, *[block.horizontal for block in blocks]]

    def next_row(windows, row_inputs):
        row_inputs, place, condition = row_inputs
        vertical = prior.first_vertical.row(windows[0]) + place  # (B, w, filters)
        entering = [vertical]  # what the positions of the row take from above, layer by layer
        moved = []
        for block, window in zip(blocks, windows[1:], strict=True):
            moved.append(_push(window, vertical))
            above, given = block.vertical.row(moved[-1]), block.condition(condition)
            entering.append(block.across(above) + given)
            vertical = block.next_vertical(vertical, above + given)

        def next_cell(cells, cell_inputs):
            cell_inputs, first, *above = cell_inputs
            horizontal = prior.first_horizontal.cell(cells[0]) + first
            moved = []
            for block, window, given in zip(blocks, cells[1:], above, strict=True):
                moved.append(_push(window, horizontal))
                horizontal = block.next_horizontal(horizontal, block.horizontal.cell(moved[-1]) + given)
            codes = pick(prior.head(horizontal), cell_inputs)
            return [_push(cells[0], prior.embedding(codes)), *moved], [codes]

        xs = [row_inputs, *[_columns_first(e) for e in entering]]
        _, (codes,) = _scan(next_cell, _no_cells(cell_layers, batch_size), xs, [_no_codes(width, batch_size)])
        return [_push(windows[0], _columns_first(prior.embedding(codes))), *moved], [codes]

    windows = _no_rows(row_layers, batch_size, width)
    return _scan(next_row, windows, [inputs, prior.place, _rows(prior, told)], [_no_codes(height, width, batch_size)])[
        1
    ][0]


def _plain_walk(prior, told, inputs, pick):
    """`incremental` for the plain prior: what all rows above give comes a row at a time, the rest by position."""
    (height, width), blocks, batch_size = prior.grid_size, prior.blocks, ops.shape(told[0])[0]
    layers = [prior.first, *[block.masked for block in blocks]]

    def next_row(windows, row_inputs):
        row_inputs, place, condition = row_inputs
        above = [layer.row(window) for layer, window in zip(layers, windows, strict=True)]  # (B, w, …)
        given = [place, *[block.condition(condition) for block in blocks]]
        entering = [a + g for a, g in zip(above, given, strict=True)]

        def next_cell(cells, cell_inputs):
            cell_inputs, first, *above = cell_inputs
            features = prior.first.cell(cells[0]) + first
            moved, read = [], []
            for block, window, given in zip(blocks, cells[1:], above, strict=True):
                read.append(block.reduced(features))
                moved.append(_push(window, read[-1]))
                features = block.next_features(features, block.masked.cell(moved[-1]) + given)
            codes = pick(prior.head(features), cell_inputs)
            return [_push(cells[0], prior.embedding(codes)), *moved], [codes, *read]

        xs = [row_inputs, *[_columns_first(e) for e in entering]]
        nothing_read = [ops.zeros((width, batch_size, layer.kernel.shape[2])) for layer in layers[1:]]
        outputs = [_no_codes(width, batch_size), *nothing_read]
        _, (codes, *read) = _scan(next_cell, _no_cells(layers, batch_size), xs, outputs)
        read = [prior.embedding(codes), *read]  # what each layer read along the row, (w, B, …)
        return [_push(window, _columns_first(r)) for window, r in zip(windows, read, strict=True)], [codes]

    windows = _no_rows(layers, batch_size, width)
    return _scan(next_row, windows, [inputs, prior.place, _rows(prior, told)], [_no_codes(height, width, batch_size)])[
        1
    ][0]


def _rows(prior, told):
    """What the prior is told for each row: (h, B, w or 1, filters)."""
    condition = prior.condition(*told)  # (B, h or 1, w or 1, filters)
    return ops.swapaxes(ops.repeat(condition, prior.grid_size[0] // condition.shape[1], axis=1), 0, 1)


def _scan(step, state, inputs, outputs):
    """Call `step(state, [x[i] for x in inputs])` for each i in turn; it returns the new state and its outputs,
    which are put in their places i of `outputs`. (`keras.ops.scan` wants outputs like the state.)"""

    def body(i, carried):
        state, outputs = carried
        state, new = step(state, [ops.take(x, i, axis=0) for x in inputs])
        place = ops.reshape(ops.cast(i, "int32"), (1, 1))
        return state, [ops.scatter_update(all_, place, one[None]) for all_, one in zip(outputs, new, strict=True)]

    return ops.fori_loop(0, inputs[0].shape[0], body, (state, outputs))


def _push(window, newest):
    """Drop the oldest of (B, span, …) and append the newest (B, …)."""
    return ops.concatenate([window[:, 1:], newest[:, None]], axis=1)


def _columns_first(row):
    """(B, w, …) to (w, B, …) and back."""
    return ops.swapaxes(row, 0, 1)


def _no_rows(layers: list[model.MaskedConv2D], batch_size, width: int) -> list:
    """The rows above the grid that each layer reads: zeros, as in its padding."""
    return [ops.zeros((batch_size, layer.row_span, width, layer.kernel.shape[2])) for layer in layers]


def _no_cells(layers: list[model.MaskedConv2D], batch_size) -> list:
    """The positions left of the grid that each layer reads: zeros."""
    return [ops.zeros((batch_size, layer.cell_span, layer.kernel.shape[2])) for layer in layers]


def _no_codes(*shape):
    return ops.zeros(shape, dtype="int32")


def draw_batch(prior, uniforms, told, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0):
    """(B, h·w) numbers in [0, 1) and what the prior is told (see `incremental`) to (B, h·w) code indices."""
    height, width = prior.grid_size

    def pick(logits, numbers):
        return choose(restrict(logits, temperature, top_k, top_p), numbers)

    numbers = ops.transpose(ops.reshape(uniforms, (-1, height, width)), (1, 2, 0))  # (h, w, B)
    codes = incremental(prior, told, numbers, pick)  # (h, w, B)
    return ops.reshape(ops.transpose(codes, (2, 0, 1)), (-1, height * width))


def compiled(function):
    """The function as one graph of the backend."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return tf.function(function, reduce_retracing=True, autograph=False)
    if keras.backend.backend() == "jax":
        import jax

        return jax.jit(function)
    return function
