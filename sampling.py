"""Cached sampling: generate grids of code indices from a prior, computing only what each new cell adds.

A whole grid is one compiled loop of the backend, so Python is not called for every cell.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import keras
import numpy as np
from keras import ops

from layers import Tensor
from masked import State, write
from model import PixelCNN


def sample_codes(
    prior: PixelCNN,
    conditioning: Mapping[str, np.ndarray],
    uniforms: np.ndarray,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    batch_size: int = 64,
    progress: Callable[[int], object] | None = None,
    known: np.ndarray | None = None,
) -> np.ndarray:
    """Sample one grid of code indices for each slice position.

    Some codes may be known. Each other code is sampled given those before it in raster order, so the result follows the
    prior's distribution given the known codes only if they come before all others.

    Args:
        prior: Trained prior, which is left unchanged.
        conditioning: Inputs of the prior other than the codes, (N, ...) each.
        uniforms: (N, h · w) float32, random numbers in [0, 1), one for each code.
        temperature, top_k, top_p: See `filter_logits`.
        batch_size: Number of grids that are sampled together. The first batch of each size takes some seconds longer,
            because XLA compiles the loop for it.
        progress: Function that is called after each batch with the number of grids in it.
        known: (N, h, w) int32, codes that are known, and −1 for those that are sampled. By default all are sampled.

    Returns:
        (N, h, w) int32.
    """
    height, width = prior.grid_size
    count = len(conditioning["positions"])
    known = np.full((count, height, width), -1) if known is None else known
    sample = _compiled_sampler(prior, top_k, top_p < 1)
    size = min(batch_size, count)
    codes: list[np.ndarray] = []
    for start in range(0, count, size):
        batch = np.minimum(np.arange(start, start + size), count - 1)  # The last one is filled up to the same size.
        inputs = {name: values[batch] for name, values in conditioning.items()}
        limits = np.float32(temperature), np.float32(top_p)
        sampled = sample(uniforms[batch], inputs, *limits, np.asarray(known[batch], np.int32))
        codes.append(ops.convert_to_numpy(sampled)[: count - start])
        if progress:
            progress(len(codes[-1]))
    return np.concatenate(codes).reshape(-1, height, width)


@functools.lru_cache(maxsize=8)
def _compiled_sampler(prior: PixelCNN, top_k: int, has_top_p: bool) -> Callable[..., Tensor]:
    """Return a function that samples one batch of grids, compiled once for all temperatures and all top_p below 1.

    Its arguments are random numbers (B, h · w), the inputs of the prior other than the codes, temperature, top_p, and
    known codes (B, h, w) int32. It returns code indices (B, h · w) int32 in raster order.
    """
    height, width = prior.grid_size

    def sample(
        uniforms: Tensor, conditioning: Mapping[str, Tensor], temperature: Tensor, top_p: Tensor, known: Tensor
    ) -> Tensor:
        def sample_cell(logits: Tensor, inputs: Tensor) -> Tensor:
            logits = filter_logits(logits, temperature, top_k, top_p if has_top_p else 1.0)
            sampled = sample_categorical(logits, inputs[0])
            return ops.where(inputs[1] >= 0, ops.cast(inputs[1], "int32"), sampled)

        inputs = ops.stack([ops.reshape(uniforms, (-1, height, width)), ops.cast(known, "float32")])
        inputs = ops.transpose(inputs, (2, 3, 0, 1))  # (h, w, 2, B)
        codes = cached_sampling(prior, conditioning, inputs, sample_cell)  # (h, w, B)
        return ops.reshape(ops.transpose(codes, (2, 0, 1)), (-1, height * width))

    return compile_function(sample, prior.variables, use_xla=True)


def compile_function(
    function: Callable[..., Tensor], variables: Sequence[keras.Variable] = (), use_xla: bool = False
) -> Callable[..., Tensor]:
    """Return the function compiled to one graph of the backend.

    Args:
        function: A function of scalars and of tensors (B, …), for any batch size B.
        variables: Variables that the function reads and that may change between its calls.
        use_xla: Whether TensorFlow, like JAX always, compiles each batch size anew with XLA. This pays off for loops of
            many small operations, as in sampling. Convolutions of images are slower with it on CPUs.
    """
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        graphs = tf.function(function, autograph=False, jit_compile=use_xla)

        def signature(tensor: Tensor) -> tf.TensorSpec:
            batch_size = tensor.shape[:1] if use_xla else [None]
            return tf.TensorSpec([*batch_size, *tensor.shape[1:]] if tensor.shape.rank else [], tensor.dtype)

        # Graphs for one and for any batch size round differently. If TensorFlow chose among them, results would depend
        # on the batch sizes of earlier calls, and a run that was stopped and continued could end differently.
        def call(*arguments: Any) -> Tensor:
            tensors = tf.nest.map_structure(tf.convert_to_tensor, arguments)
            return graphs.get_concrete_function(*tf.nest.map_structure(signature, tensors))(*tensors)

        return call
    if keras.backend.backend() == "jax":
        import jax

        def stateless(values: Sequence[Tensor], *arguments: Any) -> Tensor:
            with keras.StatelessScope(list(zip(variables, values, strict=True))):
                return function(*arguments)

        compiled = jax.jit(stateless)  # It would treat the values of variables as constants.
        return lambda *arguments: compiled([variable.value for variable in variables], *arguments)
    return function


# --------------------------------------------------------------------------------------------- one code


def filter_logits(
    logits: Tensor, temperature: float | Tensor = 1.0, top_k: int = 0, top_p: float | Tensor = 1.0
) -> Tensor:
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
    if not isinstance(top_p, float | int) or top_p < 1:
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


class CachedLayer(Protocol):
    """What `cached_sampling` needs of each layer of a prior; the layers are in masked.py.

    The vertical stack of a PixelCNN depends on the rows above only, so a whole row of it is computed before the first
    cell of the row. The horizontal stack is computed cell by cell.

    A layer keeps what it will read again in its state, a dictionary of tensors. Entries that `start` makes live through
    the whole grid, and entries that `row` adds live for one row. `cell` may replace both, with tensors of the same
    shape.
    """

    def start(self, batch_size: Any, grid_size: Sequence[int]) -> State:
        """Return the state before the first row of grids of size (h, w)."""

    def row(self, state: State, vertical: Tensor, condition: Tensor, row: Tensor) -> tuple[State, Tensor]:
        """Begin a row.

        Args:
            state: The state.
            vertical: This row of the layer's vertical stack, (w, B, C). The first layer gets the embedded codes of the
                row above instead. The plain PixelCNN has no vertical stack, and its layers ignore this.
            condition: Features of this row that the layer is conditioned on, (w or 1, B, filters).
            row: Index of the row, a scalar int32.

        Returns:
            The new state, and this row of the next layer's vertical stack, (w, B, filters).
        """

    def cell(self, state: State, horizontal: Tensor, column: Tensor) -> tuple[State, Tensor]:
        """Compute the next cell of the row.

        Args:
            state: The state.
            horizontal: The layer's horizontal stack at this cell, (B, C). The first layer gets the embedded code of the
                cell to the left instead.
            column: Index of the cell in its row, a scalar int32.

        Returns:
            The new state, and the next layer's horizontal stack at this cell, (B, filters).
        """


def cached_sampling(
    prior: PixelCNN,
    conditioning: Mapping[str, Tensor],
    inputs: Tensor,
    sample_cell: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """Visit the cells of a grid in raster order, computing at each cell only what it adds.

    Each layer caches what later cells will read of it (Ramachandran et al. 2017, "Fast Generation for Convolutional
    Autoregressive Models"). The layers are those of the prior, so the logits equal those of
    `prior({"codes": codes, **conditioning})`.

    Args:
        prior: Trained prior.
        conditioning: Inputs of the prior other than the codes, (B, ...) each.
        inputs: (h, w, ..., B), values for `sample_cell`.
        sample_cell: Function of the logits (B, K) and the inputs (..., B) of a cell that returns its code indices (B,)
            int32.

    Returns:
        (h, w, B) int32 code indices.
    """
    (height, width), batch_size = prior.grid_size, ops.shape(inputs)[-1]
    layers: list[CachedLayer] = [prior.stem, *prior.blocks]
    condition = prior.condition(conditioning)  # (B, h or 1, w or 1, filters)
    condition = ops.repeat(ops.transpose(condition, (1, 2, 0, 3)), height // condition.shape[1], axis=0)
    nothing = ops.zeros((width, batch_size, prior.embedding.output_dim))  # above and to the left of the grid

    def next_row(row: Tensor, carried: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        codes, above, states = carried
        row_inputs, row_condition = ops.take(inputs, row, axis=0), ops.take(condition, row, axis=0)
        row_states, vertical = [], above
        for layer, state in zip(layers, states, strict=True):
            state, vertical = layer.row(state, vertical, row_condition, row)
            row_states.append(state)

        def next_cell(column: Tensor, carried: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            codes, left, states = carried
            cell_states, horizontal = [], left
            for layer, state in zip(layers, states, strict=True):
                state, horizontal = layer.cell(state, horizontal, column)
                cell_states.append(state)
            sampled = sample_cell(prior.head(horizontal), ops.take(row_inputs, column, axis=0))
            return write(codes, column, sampled), prior.embedding(sampled), cell_states

        row_codes = ops.zeros((width, batch_size), dtype="int32")
        row_codes, _, row_states = ops.fori_loop(0, width, next_cell, (row_codes, nothing[0], row_states))
        kept = [{name: after[name] for name in before} for before, after in zip(states, row_states, strict=True)]
        return write(codes, row, row_codes), prior.embedding(row_codes), kept

    codes = ops.zeros((height, width, batch_size), dtype="int32")
    states = [layer.start(batch_size, prior.grid_size) for layer in layers]
    return ops.fori_loop(0, height, next_row, (codes, nothing, states))[0]
