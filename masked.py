"""Building blocks of the PixelCNN: masked convolutions, causal attention, and the layers that are made of them.

References:
    van den Oord et al. 2016a, "Pixel Recurrent Neural Networks" (PixelCNN)
    van den Oord et al. 2016b, "Conditional Image Generation with PixelCNN Decoders" (gated PixelCNN)
    Ramachandran et al. 2017, "Fast Generation for Convolutional Autoregressive Models" (cached sampling)
    Chen et al. 2018, "PixelSNAIL: An Improved Autoregressive Generative Model" (causal attention)
"""

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import keras
import numpy as np
from keras import ops

from layers import PACKAGE, Shape, Tensor

NUM_HEADS = 4  # Of each attention layer, at most. The weights of finished runs fit this number only.

State: TypeAlias = dict[str, Tensor]  # what a layer keeps during cached sampling, see sampling.CachedLayer


@keras.saving.register_keras_serializable(PACKAGE)
class MaskedConv2D(keras.layers.Layer):
    """Convolution whose output at a cell depends only on cells that come earlier in raster order.

    `mask` determines which taps of the k × k kernel remain (van den Oord et al. 2016b, section 2.2 and figure 1):

        "A", "B"                          the rows above, and the cells to the left; B also the centre
        "vertical A", "vertical B"        the rows above; B also the whole current row
        "horizontal A", "horizontal B"    the cells to the left; B also the centre

    Only the rows and columns of the kernel that contain a tap are stored. The remaining masked taps are zeroed by
    multiplying the kernel with the mask in `call`.

    `call` convolves a whole grid, for training. Cached sampling computes the same output piece by piece: `next_row`
    applies the part of the kernel that covers complete rows, once per row, and `next_cell` the part that covers the
    current row, once per cell. If a mask has both parts, the output is their sum. Each part has a cache of recent
    inputs (Ramachandran et al. 2017), at first zeros like the padding.

    Args:
        filters: Number of output channels.
        kernel_size: k, odd.
        mask: See above.
        dilation: Distance between taps.

    Raises:
        ValueError: If `kernel_size` is even, or `mask` is unknown.
    """

    def __init__(self, filters: int, kernel_size: int, mask: str, dilation: int = 1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size is {kernel_size}: must be odd, because an even kernel has no centre")
        self.filters, self.kernel_size, self.mask, self.dilation = filters, kernel_size, mask, dilation
        taps = self._taps()
        rows, columns = (np.flatnonzero(taps.any(axis)) for axis in (1, 0))
        self.taps = taps[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        # Number of zeros to add before and after each axis so that the centre of the kernel lies on the output cell.
        # Negative if the last tap lies before the centre: that many cells are removed from the end instead.
        centre = kernel_size // 2
        self.margins = [((centre - t[0]) * dilation, (t[-1] - centre) * dilation) for t in (rows, columns)]
        # For cached sampling: the number of kernel rows that cover complete rows, the number of taps in the current
        # row, how many zeros pad a row on each side, and how many recent rows and cells the taps span.
        self.row_taps = {"v": len(rows), "h": 0}.get(mask[0], centre)
        self.cell_taps = 0 if mask[0] == "v" else centre + mask.endswith("B")
        self.side = centre * dilation
        self.row_span = self.row_taps * dilation - (dilation - 1) * (mask == "vertical B")
        self.cell_span = self.cell_taps * dilation - (dilation - 1) * mask.endswith("B")

    def _taps(self) -> np.ndarray:
        """Return the mask of the whole kernel, (k, k) float32 of 0 and 1."""
        size, centre = self.kernel_size, self.kernel_size // 2
        row, column = np.indices((size, size)) - centre
        taps = {
            "A": (row < 0) | (row == 0) & (column < 0),
            "B": (row < 0) | (row == 0) & (column <= 0),
            "vertical A": row < 0,
            "vertical B": row <= 0,
            "horizontal A": (row == 0) & (column < 0),
            "horizontal B": (row == 0) & (column <= 0),
        }
        if self.mask not in taps:
            raise ValueError(f"mask is {self.mask!r}: choose one of {', '.join(taps)}")
        return taps[self.mask].astype(np.float32)

    def build(self, input_shape: Shape) -> None:
        shape = (*self.taps.shape, input_shape[-1], self.filters)
        self.kernel = self.add_weight(shape=shape, initializer="he_normal", name="kernel")
        self.bias = self.add_weight(shape=(self.filters,), initializer="zeros", name="bias")

    def call(self, inputs: Tensor) -> Tensor:
        """(B, h, w, C) -> (B, h, w, filters)."""
        (top, bottom), (left, right) = self.margins
        height, width = inputs.shape[1:3]
        inputs = inputs[:, : height + min(bottom, 0), : width + min(right, 0)]
        inputs = ops.pad(inputs, ((0, 0), (top, max(bottom, 0)), (left, max(right, 0)), (0, 0)))
        kernel = self.kernel
        if not self.taps.all():
            kernel = kernel * ops.cast(self.taps[:, :, None, None], kernel.dtype)
        return ops.conv(inputs, kernel, padding="valid", dilation_rate=self.dilation) + self.bias

    def empty_rows(self, batch_size: Any, width: int) -> Tensor:
        """Return the cache of `next_row` before the first row, with the padding: (row_span, w + 2 · side, B, C)."""
        return ops.zeros((self.row_span, width + 2 * self.side, batch_size, self.kernel.shape[2]))

    def empty_cells(self, batch_size: Any) -> Tensor:
        """Return the cache of `next_cell` at the start of a row: (cell_span, B, C)."""
        return ops.zeros((self.cell_span, batch_size, self.kernel.shape[2]))

    def next_row(self, rows: Tensor, newest: Tensor) -> tuple[Tensor, Tensor]:
        """Return the new cache, and what complete rows contribute to an output row, with the bias: (w, B, filters).

        `newest` (w, B, C) is the input row above the output row or, for "vertical B", the one at the output row.
        """
        padded = ops.pad(newest, ((self.side, self.side), (0, 0), (0, 0)))
        rows = ops.concatenate([rows[1:], padded[None]])
        lines = [rows[i] for i in range(0, self.row_span, self.dilation)]
        columns = range(0, 2 * self.side + 1, self.dilation)
        taps = [line[column : column + newest.shape[0]] for line in lines for column in columns]
        return rows, self._product(taps, 0) + self.bias

    def next_cell(self, cells: Tensor, newest: Tensor) -> tuple[Tensor, Tensor]:
        """Return the new cache, and what the current row contributes to an output cell: (B, filters).

        `newest` (B, C) is the input to the left of the output cell or, for a mask B, the one at the output cell. The
        bias is included unless `next_row` adds it.
        """
        cells = ops.concatenate([cells[1:], newest[None]])
        taps = [cells[i] for i in range(0, self.cell_span, self.dilation)]
        output = self._product(taps, self.row_taps * self.kernel_size)
        return cells, output if self.row_taps else output + self.bias

    def _product(self, taps: Sequence[Tensor], first: int) -> Tensor:
        """Return the sum of products of inputs (..., C) with consecutive taps of the kernel from `first` on.

        One matrix product is faster than a convolution of so few rows, and the slice of the kernel is not a copy.
        """
        size = self.kernel.shape[2]
        kernel = ops.reshape(self.kernel, (-1, self.filters))[first * size : (first + len(taps)) * size]
        return ops.matmul(ops.concatenate(taps, axis=-1), kernel)


# --------------------------------------------------------------------------------------------- PixelCNN layers
#
# A layer maps stacks of features to new ones: (vertical, horizontal) in the gated PixelCNN, (horizontal,) in the plain
# one. `call` computes whole grids, for training. `start`, `row` and `cell` compute the same cell by cell, for sampling;
# `sampling.CachedLayer` describes them.


@keras.saving.register_keras_serializable(PACKAGE)
class Stem(keras.layers.Layer):
    """First layer of the PixelCNN: masked convolutions of type A, plus a learned position embedding.

    Args:
        filters: Number of channels of each stack.
        kernel_size: Kernel size, odd.
        grid_size: (h, w) of the grid.
        gated: Whether there are two stacks, each with a convolution of its own, or one.
    """

    def __init__(self, filters: int, kernel_size: int, grid_size: Sequence[int], gated: bool, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.gated = gated
        shape = (*grid_size, filters)
        self.position_embedding = self.add_weight(shape=shape, initializer="zeros", name="position_embedding")
        if gated:
            self.vertical = MaskedConv2D(filters, kernel_size, "vertical A", name="vertical")
            self.horizontal = MaskedConv2D(filters, kernel_size, "horizontal A", name="horizontal")
        else:
            self.vertical = self.horizontal = MaskedConv2D(filters, kernel_size, "A", name="masked")

    def call(self, embedded: Tensor) -> tuple[Tensor, ...]:
        """Return the stacks, (B, h, w, filters) each, of embedded codes (B, h, w, C)."""
        vertical = self.vertical(embedded) + self.position_embedding
        return (vertical, self.horizontal(embedded) + vertical) if self.gated else (vertical,)

    def start(self, batch_size: Any, grid_size: Sequence[int]) -> State:
        return {"rows": self.vertical.empty_rows(batch_size, grid_size[1])}

    def row(self, state: State, vertical: Tensor, condition: Tensor, row: Tensor) -> tuple[State, Tensor]:
        rows, above = self.vertical.next_row(state["rows"], vertical)
        above = above + ops.take(self.position_embedding, row, axis=0)[:, None]
        cells = self.horizontal.empty_cells(ops.shape(vertical)[1])
        return {"rows": rows, "cells": cells, "above": above}, above

    def cell(self, state: State, horizontal: Tensor, column: Tensor) -> tuple[State, Tensor]:
        cells, left = self.horizontal.next_cell(state["cells"], horizontal)
        return {**state, "cells": cells}, left + ops.take(state["above"], column, axis=0)


@keras.saving.register_keras_serializable(PACKAGE)
class GatedBlock(keras.layers.Layer):
    """Layer of the gated PixelCNN (van den Oord et al. 2016b, figure 2), with residual connections in both stacks.

    The vertical stack at (r, c) sees the rows above r. The horizontal stack adds the cells to the left of c in row r.
    Only the vertical stack feeds the other one, so neither depends on a later cell.

    Args:
        filters: Number of channels of each stack.
        kernel_size, dilation: Those of the masked convolutions.
        dropout: Dropout rate of the horizontal stack.
        last: Whether this is the last block, after which nothing reads the vertical stack.
    """

    def __init__(
        self, filters: int, kernel_size: int, dilation: int = 1, dropout: float = 0.0, last: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.vertical = MaskedConv2D(2 * filters, kernel_size, "vertical B", dilation, name="vertical")
        self.horizontal = MaskedConv2D(2 * filters, kernel_size, "horizontal B", dilation, name="horizontal")
        self.across = keras.layers.Dense(2 * filters, use_bias=False, name="across")  # vertical to horizontal stack
        self.condition = keras.layers.Dense(2 * filters, use_bias=False, name="condition")
        self.vertical_out = None if last else keras.layers.Dense(filters, name="vertical_out")
        self.horizontal_out = keras.layers.Dense(filters, name="horizontal_out")
        self.dropout = keras.layers.Dropout(dropout, name="dropout")

    def call(self, stacks: tuple[Tensor, ...], condition: Tensor, training: bool = False) -> tuple[Tensor, ...]:
        """Return the new stacks, (B, h, w, filters) each, given `condition` (B, h or 1, w or 1, filters)."""
        vertical, horizontal = stacks
        above, condition = self.vertical(vertical), self.condition(condition)
        gate = self.horizontal(horizontal) + self.across(above) + condition
        return self._update_vertical(vertical, above + condition), self._update_horizontal(horizontal, gate, training)

    def _update_vertical(self, vertical: Tensor, gate: Tensor) -> Tensor:
        return vertical if self.vertical_out is None else vertical + self.vertical_out(gated_activation(gate))

    def _update_horizontal(self, horizontal: Tensor, gate: Tensor, training: bool = False) -> Tensor:
        return horizontal + self.horizontal_out(self.dropout(gated_activation(gate), training=training))

    def start(self, batch_size: Any, grid_size: Sequence[int]) -> State:
        return {"rows": self.vertical.empty_rows(batch_size, grid_size[1])}

    def row(self, state: State, vertical: Tensor, condition: Tensor, row: Tensor) -> tuple[State, Tensor]:
        rows, above = self.vertical.next_row(state["rows"], vertical)
        condition, cells = self.condition(condition), self.horizontal.empty_cells(ops.shape(vertical)[1])
        state = {"rows": rows, "cells": cells, "above": self.across(above) + condition}
        return state, self._update_vertical(vertical, above + condition)

    def cell(self, state: State, horizontal: Tensor, column: Tensor) -> tuple[State, Tensor]:
        cells, left = self.horizontal.next_cell(state["cells"], horizontal)
        gate = left + ops.take(state["above"], column, axis=0)
        return {**state, "cells": cells}, self._update_horizontal(horizontal, gate)


def gated_activation(features: Tensor) -> Tensor:
    """Return tanh(a) · σ(b) of channels (..., 2 · C) split into a and b (van den Oord et al. 2016b, equation 2)."""
    a, b = ops.split(features, 2, axis=-1)
    return ops.tanh(a) * ops.sigmoid(b)


@keras.saving.register_keras_serializable(PACKAGE)
class PlainBlock(keras.layers.Layer):
    """Residual block of the plain PixelCNN (van den Oord et al. 2016a, figure 5).

    A 1 × 1 convolution, a masked convolution of type B and another 1 × 1 convolution, each after a ReLU.

    Args:
        filters: Number of channels of input and output.
        kernel_size, dilation: Those of the masked convolution.
        dropout: Dropout rate before the last convolution.
    """

    def __init__(self, filters: int, kernel_size: int, dilation: int = 1, dropout: float = 0.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.reduce = keras.layers.Dense(filters // 2, name="reduce")
        self.masked = MaskedConv2D(filters // 2, kernel_size, "B", dilation, name="masked")
        self.expand = keras.layers.Dense(filters, name="expand")
        self.condition = keras.layers.Dense(filters // 2, use_bias=False, name="condition")
        self.dropout = keras.layers.Dropout(dropout, name="dropout")

    def call(self, stacks: tuple[Tensor, ...], condition: Tensor, training: bool = False) -> tuple[Tensor, ...]:
        """Return the new stack, (B, h, w, filters), given `condition` (B, h or 1, w or 1, filters)."""
        inner = self.masked(self._reduce(stacks[0])) + self.condition(condition)
        return (self._update(stacks[0], inner, training),)

    def _reduce(self, features: Tensor) -> Tensor:
        return ops.relu(self.reduce(ops.relu(features)))

    def _update(self, features: Tensor, inner: Tensor, training: bool = False) -> Tensor:
        return features + self.expand(self.dropout(ops.relu(inner), training=training))

    def start(self, batch_size: Any, grid_size: Sequence[int]) -> State:
        row = ops.zeros((grid_size[1], batch_size, self.masked.filters))
        return {"rows": self.masked.empty_rows(batch_size, grid_size[1]), "newest": row}  # written cell by cell

    def row(self, state: State, vertical: Tensor, condition: Tensor, row: Tensor) -> tuple[State, Tensor]:
        rows, above = self.masked.next_row(state["rows"], state["newest"])
        cells = self.masked.empty_cells(ops.shape(vertical)[1])
        above = above + self.condition(condition)
        return {"rows": rows, "newest": state["newest"], "cells": cells, "above": above}, vertical

    def cell(self, state: State, horizontal: Tensor, column: Tensor) -> tuple[State, Tensor]:
        reduced = self._reduce(horizontal)
        cells, left = self.masked.next_cell(state["cells"], reduced)
        newest = write(state["newest"], column, reduced)
        inner = left + ops.take(state["above"], column, axis=0)
        return {**state, "cells": cells, "newest": newest}, self._update(horizontal, inner)


@keras.saving.register_keras_serializable(PACKAGE)
class CausalAttention(keras.layers.Layer):
    """Multi-head attention of the gated PixelCNN to all cells of the rows above (PixelSNAIL, Chen et al. 2018).

    Convolutions compare neighbouring cells. Attention finds related cells anywhere above. Queries are made of the
    vertical stack, keys and values of the horizontal one, so sampling computes a whole row at once before its first
    cell. What is found is added to both stacks. The output layer starts at zero, so a new layer is the identity.

    Args:
        filters: Number of channels of each stack.
        num_heads: Largest number of heads; it is reduced to a divisor of `filters`.
        dropout: Dropout rate of the output.
    """

    def __init__(self, filters: int, num_heads: int = NUM_HEADS, dropout: float = 0.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.num_heads = math.gcd(num_heads, filters)
        self.head_size = filters // self.num_heads
        self.query_norm = keras.layers.LayerNormalization(name="query_norm")
        self.query = keras.layers.Dense(filters, use_bias=False, name="query")
        self.key_norm = keras.layers.LayerNormalization(name="key_norm")
        self.key = keras.layers.Dense(filters, use_bias=False, name="key")
        self.value = keras.layers.Dense(filters, use_bias=False, name="value")
        self.out = keras.layers.Dense(filters, kernel_initializer="zeros", name="out")
        self.dropout = keras.layers.Dropout(dropout, name="dropout")

    def call(self, stacks: tuple[Tensor, ...], condition: Tensor, training: bool = False) -> tuple[Tensor, ...]:
        """Return the new stacks, (B, h, w, filters) each. `condition` is ignored."""
        vertical, horizontal = stacks
        _, height, width, filters = vertical.shape
        rows = np.arange(height * width) // width
        cells = [ops.reshape(stack, (-1, height * width, filters)) for stack in stacks]
        queries, keys, values = (ops.transpose(part, (0, 2, 1, 3)) for part in self._project(*cells))
        found = ops.transpose(self._attend(queries, keys, values, rows[:, None] > rows), (0, 2, 1, 3))
        attended = self.out(ops.reshape(found, (-1, height, width, filters)))
        attended = self.dropout(attended, training=training)
        return vertical + attended, horizontal + attended

    def _project(self, vertical: Tensor, horizontal: Tensor) -> list[Tensor]:
        """Return queries, keys and values, (..., heads, head size) each, of stacks (..., filters)."""
        features = self.key_norm(horizontal)
        parts = self.query(self.query_norm(vertical)), self.key(features), self.value(features)
        return [ops.reshape(part, (*ops.shape(part)[:-1], self.num_heads, self.head_size)) for part in parts]

    def _attend(self, queries: Tensor, keys: Tensor, values: Tensor, allowed: Tensor) -> Tensor:
        """Return what each query finds, (B, heads, queries, head size).

        Args:
            queries: (B, heads, queries, head size).
            keys, values: (B, heads, cells, head size).
            allowed: Which cells each query may attend to, (queries or 1, cells) bool. A query without any finds zeros.
        """
        scores = ops.matmul(queries / self.head_size**0.5, ops.swapaxes(keys, 2, 3))
        weights = ops.softmax(ops.where(allowed, ops.cast(scores, "float32"), -1e9))
        found = ops.matmul(ops.cast(weights, values.dtype), values)
        return found * ops.cast(ops.any(allowed, axis=-1, keepdims=True), found.dtype)

    def start(self, batch_size: Any, grid_size: Sequence[int]) -> State:
        height, width = grid_size
        row = ops.zeros((width, batch_size, self.num_heads * self.head_size))
        rows = ops.zeros((batch_size, self.num_heads, height, width, self.head_size))
        return {"keys": rows, "values": rows, "newest": row}  # the row above is written cell by cell

    def row(self, state: State, vertical: Tensor, condition: Tensor, row: Tensor) -> tuple[State, Tensor]:
        parts = self._project(vertical, state["newest"])
        queries, *newest = (ops.transpose(part, (1, 2, 0, 3)) for part in parts)  # (B, heads, w, head size)
        height, width = state["keys"].shape[2:4]

        def write_row(rows: Tensor, newest: Tensor) -> Tensor:
            flat = ops.reshape(rows, (-1, width, self.head_size))
            index = ops.arange(ops.shape(flat)[0] // height) * height + ops.maximum(ops.cast(row, "int32") - 1, 0)
            newest = ops.reshape(newest, (-1, width, self.head_size))
            return ops.reshape(ops.scatter_update(flat, index[:, None], newest), ops.shape(rows))

        keys, values = write_row(state["keys"], newest[0]), write_row(state["values"], newest[1])
        cells = [ops.reshape(rows, (-1, self.num_heads, height * width, self.head_size)) for rows in (keys, values)]
        allowed = ops.arange(height * width) < ops.cast(row * width, "int32")
        found = ops.transpose(self._attend(queries, cells[0], cells[1], allowed[None]), (2, 0, 1, 3))
        attended = self.out(ops.reshape(found, ops.shape(vertical)))
        return {"keys": keys, "values": values, "newest": state["newest"], "attended": attended}, vertical + attended

    def cell(self, state: State, horizontal: Tensor, column: Tensor) -> tuple[State, Tensor]:
        newest = write(state["newest"], column, horizontal)
        return {**state, "newest": newest}, horizontal + ops.take(state["attended"], column, axis=0)


def write(array: Tensor, index: Tensor, entry: Tensor) -> Tensor:
    """Return an array (n, ...) in which the item at an index, a scalar, is replaced by an entry (...)."""
    return ops.scatter_update(array, ops.reshape(ops.cast(index, "int32"), (1, 1)), entry[None])
