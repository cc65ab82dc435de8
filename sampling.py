"""Draw code indices from a prior: one compiled loop over the grid, no call from Python for each position."""

import keras
import numpy as np
from keras import ops

import model


def draw(
    prior: model.PixelCNN,
    positions: np.ndarray,
    seed: int,
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
        temperature, top_k, top_p: see `restrict`.
        batch_size: grids drawn at a time.
        progress: called with the number of grids just drawn, after each batch.

    Returns:
        (N, h, w) int32 code indices.
    """
    height, width = prior.grid_size
    positions = np.asarray(positions, np.int32)
    # One number in [0, 1) for each code to draw. Drawn ahead, they do not depend on how the grids are batched.
    uniforms = np.random.default_rng(seed).random((len(positions), height * width), np.float32)
    draw_batch = _compiled(lambda u, p: _draw_batch(prior, u, p, temperature, top_k, top_p))
    codes = []
    for start in range(0, len(positions), batch_size):
        batch = slice(start, start + batch_size)
        codes.append(ops.convert_to_numpy(draw_batch(uniforms[batch], positions[batch])))
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
    below = cumulative <= uniforms[:, None] * cumulative[:, -1:]
    chosen = ops.sum(ops.cast(below, "int32"), axis=-1)
    return ops.minimum(chosen, logits.shape[-1] - 1)


def _draw_batch(prior, uniforms, positions, temperature, top_k, top_p):
    """(B, h·w) numbers in [0, 1) and (B,) slice positions to (B, h·w) code indices."""
    height, width = prior.grid_size
    cells = ops.arange(height * width)

    def draw_cell(i, codes):
        logits = prior((ops.reshape(codes, (-1, height, width)), positions))
        logits = ops.take(ops.reshape(logits, (-1, height * width, prior.num_embeddings)), i, axis=1)
        drawn = choose(restrict(logits, temperature, top_k, top_p), ops.take(uniforms, i, axis=1))
        return ops.where(cells == i, drawn[:, None], codes)

    start = ops.zeros(ops.shape(uniforms), dtype="int32")
    return ops.fori_loop(0, height * width, draw_cell, start)


def _compiled(function):
    """The function as one graph of the backend."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return tf.function(function, reduce_retracing=True)
    if keras.backend.backend() == "jax":
        import jax

        return jax.jit(function)
    return function
