"""Building blocks of the networks: SSIM, vector quantizer, residual block, and masked convolutions.

References:
    Wang et al. 2004, "Image Quality Assessment: From Error Visibility to Structural Similarity"
    van den Oord et al. 2017, "Neural Discrete Representation Learning" (VQ-VAE)
    van den Oord et al. 2016a, "Pixel Recurrent Neural Networks" (PixelCNN)
    van den Oord et al. 2016b, "Conditional Image Generation with PixelCNN Decoders" (gated PixelCNN)
    Ramachandran et al. 2017, "Fast Generation for Convolutional Autoregressive Models" (cached sampling)

Every sublayer has an explicit name, because saved files contain the names and those that Keras generates depend on
which layers were created before. No layer needs `get_config`: Keras generates it from the arguments.
"""

import math
import threading
from collections.abc import Sequence
from typing import Any, TypeAlias

import keras
import numpy as np
from keras import ops

PACKAGE = "oasis_vqvae"  # package name under which the classes are registered in saved models

Tensor: TypeAlias = Any  # a tensor of the backend, or anything that the backend converts to one
Shape: TypeAlias = tuple[int | None, ...]
State: TypeAlias = dict[str, Tensor]  # what a layer keeps during cached sampling, see sampling.CachedLayer


# ------------------------------------------------------------------------------------------------- SSIM


def gaussian_matrix(size: int, sigma: float = 1.5, radius: int = 5) -> np.ndarray:
    """Return the matrix that filters a vector with a Gaussian window.

    `matrix @ image @ matrix.T` applies the separable filter to a square image. Two matrix products are faster than a
    convolution with a single channel on every backend.

    Args:
        size: Length of the vector.
        sigma: Standard deviation of the window in pixels.
        radius: Half width of the window, which spans 2 · radius + 1 pixels. The signal is mirrored at its ends.

    Returns:
        (size, size) float32.
    """
    offsets = np.arange(-radius, radius + 1)
    window = np.exp(-0.5 * (offsets / sigma) ** 2)
    window /= window.sum()
    mirrored = np.pad(np.arange(size), radius, mode="symmetric")
    source = mirrored[np.arange(size)[:, None] + radius + offsets]  # (size, window)
    matrix = np.zeros((size, size))
    np.add.at(matrix, (np.arange(size)[:, None], source), window)
    return matrix.astype(np.float32)


def ssim_map(x: Tensor, y: Tensor) -> Tensor:
    """Return the structural similarity of two batches of images at every pixel (Wang et al. 2004, equation 13).

    The window is Gaussian with sigma 1.5 and 11 pixels wide, the data range is 1, and covariances are those of the
    population. The values equal those of scikit-image's `structural_similarity(..., gaussian_weights=True, sigma=1.5,
    use_sample_covariance=False, data_range=1.0, full=True)`.

    Args:
        x, y: (B, H, W, 1) float32 in [0, 1].

    Returns:
        (B, H, W) float32, at most 1.
    """
    c1, c2 = 0.01**2, 0.03**2
    x, y = x[..., 0], y[..., 0]
    rows, columns = (ops.convert_to_tensor(gaussian_matrix(size)) for size in x.shape[1:3])
    # (5 · B, H, W), concatenated along the batch because TensorFlow 2.21 crashes on a shape of (5, 1, H, W)
    moments = ops.concatenate([x, y, x * x, y * y, x * y])
    mean_x, mean_y, xx, yy, xy = ops.split(rows @ moments @ ops.transpose(columns), 5)
    mean_xy, mean_xx, mean_yy = mean_x * mean_y, mean_x * mean_x, mean_y * mean_y
    luminance = (2 * mean_xy + c1) / (mean_xx + mean_yy + c1)
    structure = (2 * (xy - mean_xy) + c2) / (xx - mean_xx + yy - mean_yy + c2)
    return luminance * structure


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """Return the mean structural similarity of images x and y, (B, H, W, 1) float32 in [0, 1]: (B,), at most 1.

    Like scikit-image, this leaves out the 5 pixels at each edge, whose windows extend beyond the image.
    """
    return ops.mean(ssim_map(x, y)[:, 5:-5, 5:-5], axis=(1, 2))


# --------------------------------------------------------------------------------------------- replicas
#
# Under tf.distribute every device runs a replica of the model on its shard of the batch, in its own Python thread.
# Keras sums the gradients, but the codebook statistics of the quantizer must be summed here. The driver ensures that
# all shards have the same size. On JAX a batch is one array, even if it spans several devices.


def replica_index_and_count() -> tuple[Tensor, int]:
    """Return the index of this replica, a tensor under tf.distribute, and the number of replicas; (0, 1) elsewhere."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        context = tf.distribute.get_replica_context()
        if context is not None and context.num_replicas_in_sync > 1:
            return context.replica_id_in_sync_group, context.num_replicas_in_sync
    return 0, 1


def sum_over_replicas(tensor: Tensor) -> Tensor:
    """Return the sum of a tensor over all replicas, in each of them. With several, no gradient passes through it."""
    if replica_index_and_count()[1] == 1:
        return tensor
    import tensorflow as tf

    return ops.stop_gradient(tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, tensor))


# --------------------------------------------------------------------------------------------- codebook


@keras.saving.register_keras_serializable(PACKAGE)
class CodeUsage(keras.metrics.Metric):
    """Metric that counts how often each code is used in an epoch.

    `result()` is a dictionary of `{prefix}codes_used`, the fraction of the codes that occurred, and
    `{prefix}perplexity`, exp(−Σ p log p) with p the relative frequencies of the codes, from 1 to the number of codes.

    Args:
        num_embeddings: Number of codes, K.
        prefix: Prefix of the names of the metric and of its results.
    """

    def __init__(self, num_embeddings: int, prefix: str = "", **kwargs: Any) -> None:
        super().__init__(name=f"{prefix}code_usage", dtype="float32", **kwargs)
        self.num_embeddings, self.prefix = num_embeddings, prefix
        self.counts = self.add_variable((num_embeddings,), initializer="zeros", name="counts")

    def update_state(self, counts: Tensor, sample_weight: Tensor | None = None) -> None:
        """Add the number of times each code was used in a batch, (K,). `sample_weight` is ignored."""
        self.counts.assign_add(counts)

    def result(self) -> dict[str, Tensor]:
        frequencies = self.counts / ops.maximum(ops.sum(self.counts), 1)
        entropy = -ops.sum(frequencies * ops.log(ops.maximum(frequencies, 1e-20)))
        return {
            f"{self.prefix}codes_used": ops.mean(ops.cast(self.counts > 0, "float32")),
            f"{self.prefix}perplexity": ops.exp(entropy),
        }


@keras.saving.register_keras_serializable(PACKAGE)
class VectorQuantizer(keras.layers.Layer):
    """Replaces each vector by the nearest of K codebook vectors (van den Oord et al. 2017, section 3).

    The output is z_q = e_k with k = argmin_j ‖z − e_j‖² (equations 1 and 2). Gradients are copied from z_q to z. The
    layer adds two terms of equation 3 to the loss, each as the mean over all elements:

        codebook    ‖sg[z] − e‖²       moves the codes towards the vectors; a loss only if codebook="gradient"
        commitment  β ‖z − sg[e]‖²     keeps the vectors close to their codes

    With codebook="ema" the codes are updated by exponential moving averages instead (appendix A.1). With n_k the number
    and Σz the sum of the vectors assigned to code k in a batch,

        N_k ← γ N_k + (1 − γ) n_k,    m_k ← γ m_k + (1 − γ) Σz,    e_k = m_k / N_k.

    A code is dead if its count N_k falls below `dead_code_threshold` times the mean count. It is replaced by a random
    vector of the batch, and its count and sum are reset to match. Counts start at zero, so the first training batch
    initialises the whole codebook. The codebook changes in training only, and never while `trainable` is False.

    The layer computes in float32 under every dtype policy. Used alone in a model, it adds its losses through `losses`.
    `VQVAE` calls `loss_and_metrics` instead.

    Args:
        num_embeddings: Number of codes, K.
        embedding_dim: Dimension of a code, D.
        commitment_weight: β.
        codebook: "ema" or "gradient".
        decay: γ of the moving averages.
        dead_code_threshold: Fraction of the mean count below which a code is dead. 0 disables replacement.
        seed: Seed for choosing the vectors that replace dead codes.
        prefix: Prefix of the names of the metrics, for models with several codebooks.

    Attributes:
        last_call: Losses, code counts and batch size of the last call in the current thread.

    Raises:
        ValueError: If `codebook` is neither "ema" nor "gradient".

    Example: For inputs (8, 12, 12, 32) and K = 512, the layer returns quantized vectors (8, 12, 12, 32) float32 and
    code indices (8, 12, 12) int32 in 0 … 511.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        commitment_weight: float = 0.25,
        codebook: str = "ema",
        decay: float = 0.99,
        dead_code_threshold: float = 0.1,
        seed: int = 0,
        prefix: str = "",
        **kwargs: Any,
    ) -> None:
        super().__init__(**{**kwargs, "dtype": "float32"})
        if codebook not in ("ema", "gradient"):
            raise ValueError(f'codebook is {codebook!r}: choose "ema" or "gradient"')
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.commitment_weight, self.codebook, self.decay = commitment_weight, codebook, decay
        self.dead_code_threshold, self.seed, self.prefix = dead_code_threshold, seed, prefix
        self.seed_generator = keras.random.SeedGenerator(seed)
        self.codebook_loss = keras.metrics.Mean(name=f"{prefix}codebook")
        self.commitment_loss = keras.metrics.Mean(name=f"{prefix}commitment")
        self.usage = CodeUsage(num_embeddings, prefix)
        self.last_call = threading.local()  # each replica runs in its own thread

    def build(self, input_shape: Shape) -> None:
        shape = (self.num_embeddings, self.embedding_dim)
        # aggregation="mean" keeps the copies on several devices identical
        state = {"trainable": False, "aggregation": "mean"}
        trained = self.codebook == "gradient"
        self.embeddings = self.add_weight(
            shape=shape, initializer="random_normal", name="embeddings", **({} if trained else state)
        )
        self.counts = self.add_weight(shape=shape[:1], initializer="zeros", name="counts", **state)
        if self.codebook == "ema":
            self.sums = self.add_weight(shape=shape, initializer="zeros", name="sums", **state)

    def call(self, inputs: Tensor, training: bool = False) -> tuple[Tensor, Tensor]:
        """Quantize vectors (B, h, w, D), and update the codebook if `training`, unless `trainable` is False.

        Returns:
            Quantized vectors (B, h, w, D) float32 and code indices (B, h, w) int32.
        """
        inputs = ops.cast(inputs, "float32")
        indices = self.nearest(inputs)  # (B, h, w)
        quantized = self.lookup(indices)  # (B, h, w, D)

        codebook_loss = ops.mean(ops.square(ops.stop_gradient(inputs) - quantized))
        commitment_loss = self.commitment_weight * ops.mean(ops.square(inputs - ops.stop_gradient(quantized)))
        self.add_loss(commitment_loss)
        if self.codebook == "gradient":
            self.add_loss(codebook_loss)
        one_hot = ops.one_hot(ops.reshape(indices, (-1,)), self.num_embeddings, dtype="float32")  # (B·h·w, K)
        self.last_call.codebook_loss = codebook_loss
        self.last_call.commitment_loss = commitment_loss
        self.last_call.counts = ops.sum(one_hot, axis=0)
        self.last_call.batch_size = ops.shape(inputs)[0]
        if training and self.trainable:
            self._update_codebook(ops.reshape(ops.stop_gradient(inputs), (-1, self.embedding_dim)), one_hot)
        return inputs + ops.stop_gradient(quantized - inputs), indices

    def loss_and_metrics(self) -> Tensor:
        """Return the layer's loss in its last call, a scalar, and update the layer's metrics with that call.

        `compute_loss` of a model calls this method. `call` cannot update metrics on JAX, and under tf.distribute all
        replicas share one list of `losses`.
        """
        last = self.last_call
        self.codebook_loss.update_state(last.codebook_loss, sample_weight=last.batch_size)
        self.commitment_loss.update_state(last.commitment_loss, sample_weight=last.batch_size)
        self.usage.update_state(last.counts)
        return last.commitment_loss + last.codebook_loss if self.codebook == "gradient" else last.commitment_loss

    def nearest(self, inputs: Tensor) -> Tensor:
        """Return the index of the code nearest to each vector: (..., D) -> (...) int32."""
        # ‖z‖² is the same for every code and left out
        products = ops.matmul(ops.cast(inputs, "float32"), ops.transpose(self.embeddings))  # (..., K)
        return ops.cast(ops.argmin(ops.sum(ops.square(self.embeddings), axis=1) - 2 * products, axis=-1), "int32")

    def lookup(self, indices: Tensor) -> Tensor:
        """Return the codebook vectors of code indices: (B, h, w) int32 -> (B, h, w, D) float32."""
        return ops.take(self.embeddings, indices, axis=0)

    def _update_codebook(self, vectors: Tensor, one_hot: Tensor) -> None:
        """Update the moving averages (appendix A.1) and replace dead codes, using the vectors of all replicas.

        `vectors` (B·h·w, D) are those of this replica, and `one_hot` (B·h·w, K) are their codes.
        """
        (index, replicas), num_vectors = replica_index_and_count(), ops.shape(vectors)[0]
        batch_counts = sum_over_replicas(ops.sum(one_hot, axis=0))
        counts = self.decay * self.counts + (1 - self.decay) * batch_counts
        threshold = self.dead_code_threshold * ops.cast(replicas * num_vectors, "float32") / self.num_embeddings
        dead = counts < threshold
        # All replicas choose the same vectors. Each contributes those that it has.
        chosen = keras.random.randint((self.num_embeddings,), 0, replicas * num_vectors, seed=self.seed_generator)
        chosen = chosen - index * num_vectors
        is_local = (chosen >= 0) & (chosen < num_vectors)
        replacements = ops.take(vectors, ops.clip(chosen, 0, num_vectors - 1), axis=0)  # (K, D)
        replacements = sum_over_replicas(ops.where(is_local[:, None], replacements, 0.0))

        self.counts.assign(ops.where(dead, threshold, counts))
        if self.codebook == "gradient":
            self.embeddings.assign(ops.where(dead[:, None], replacements, ops.convert_to_tensor(self.embeddings)))
            return
        batch_sums = sum_over_replicas(ops.matmul(ops.transpose(one_hot), vectors))
        sums = self.decay * self.sums + (1 - self.decay) * batch_sums
        self.sums.assign(ops.where(dead[:, None], threshold * replacements, sums))
        # a code that was never used has no mean, and keeps its vector if replacement is disabled
        counts = self.counts[:, None]
        means = self.sums / ops.maximum(counts, 1e-8)
        self.embeddings.assign(ops.where(counts > 1e-8, means, ops.convert_to_tensor(self.embeddings)))


# --------------------------------------------------------------------------------------------- convolutions


@keras.saving.register_keras_serializable(PACKAGE)
class ResidualBlock(keras.layers.Layer):
    """x + conv(relu(norm(conv(relu(norm(x)))))) with 3 × 3 convolutions and group norm (Wu & He 2018).

    Input and output have `filters` channels. The kernel of the last convolution starts at zero, so a new block is the
    identity. Group norm pools over the whole slice, so even a code in the black background can carry information about
    distant regions.
    """

    def __init__(self, filters: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.filters = filters
        groups = math.gcd(8, filters)
        self.inner_norm = keras.layers.GroupNormalization(groups, name="inner_norm")
        self.inner = keras.layers.Conv2D(filters, 3, padding="same", kernel_initializer="he_normal", name="inner")
        self.outer_norm = keras.layers.GroupNormalization(groups, name="outer_norm")
        self.outer = keras.layers.Conv2D(filters, 3, padding="same", kernel_initializer="zeros", name="outer")

    def call(self, inputs: Tensor) -> Tensor:
        """(B, h, w, filters) -> the same shape."""
        inner = self.inner(ops.relu(self.inner_norm(inputs)))
        return inputs + self.outer(ops.relu(self.outer_norm(inner)))


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
        # row, and how many recent rows and cells they span.
        self.row_taps = {"v": len(rows), "h": 0}.get(mask[0], centre)
        self.cell_taps = 0 if mask[0] == "v" else centre + mask.endswith("B")
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
        """Return the cache of `next_row` before the first row: (B, row_span, w, C)."""
        return ops.zeros((batch_size, self.row_span, width, self.kernel.shape[2]))

    def empty_cells(self, batch_size: Any) -> Tensor:
        """Return the cache of `next_cell` at the start of a row: (B, cell_span, C)."""
        return ops.zeros((batch_size, self.cell_span, self.kernel.shape[2]))

    def next_row(self, rows: Tensor, newest: Tensor) -> tuple[Tensor, Tensor]:
        """Return the new cache, and what complete rows contribute to an output row, with the bias: (B, w, filters).

        `newest` (B, w, C) is the input row above the output row or, for "vertical B", the one at the output row.
        """
        rows = ops.concatenate([rows[:, 1:], newest[:, None]], axis=1)
        side = self.kernel_size // 2 * self.dilation
        padded = ops.pad(rows[:, :: self.dilation], ((0, 0), (0, 0), (side, side), (0, 0)))
        kernel = self.kernel[: self.row_taps]
        return rows, ops.conv(padded, kernel, padding="valid", dilation_rate=(1, self.dilation))[:, 0] + self.bias

    def next_cell(self, cells: Tensor, newest: Tensor) -> tuple[Tensor, Tensor]:
        """Return the new cache, and what the current row contributes to an output cell: (B, filters).

        `newest` (B, C) is the input to the left of the output cell or, for a mask B, the one at the output cell. The
        bias is included unless `next_row` adds it.
        """
        cells = ops.concatenate([cells[:, 1:], newest[:, None]], axis=1)
        kernel = ops.reshape(self.kernel[-1, : self.cell_taps], (-1, self.filters))
        output = ops.reshape(cells[:, :: self.dilation], (-1, kernel.shape[0])) @ kernel
        return cells, output if self.row_taps else output + self.bias


# --------------------------------------------------------------------------------------------- PixelCNN layers
#
# A layer maps stacks of features to new ones: (vertical, horizontal) in the gated PixelCNN, (horizontal,) in the plain
# one. `call` computes whole grids, for training. `start`, `row` and `cell` compute the same cell by cell, for sampling;
# `sampling.CachedLayer` describes them.


@keras.saving.register_keras_serializable(PACKAGE)
class Stem(keras.layers.Layer):
    """First layer of the PixelCNN: masked convolutions of type A, plus a learned vector for each place in the grid.

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
        above = above + ops.take(self.position_embedding, row, axis=0)
        cells = self.horizontal.empty_cells(ops.shape(vertical)[0])
        return {"rows": rows, "cells": cells, "above": ops.swapaxes(above, 0, 1)}, above

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
        condition, cells = self.condition(condition), self.horizontal.empty_cells(ops.shape(vertical)[0])
        state = {"rows": rows, "cells": cells, "above": ops.swapaxes(self.across(above) + condition, 0, 1)}
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
        rows = self.masked.empty_rows(batch_size, grid_size[1])
        return {"rows": rows, "newest": ops.swapaxes(rows[:, 0], 0, 1)}  # the row above is written cell by cell

    def row(self, state: State, vertical: Tensor, condition: Tensor, row: Tensor) -> tuple[State, Tensor]:
        rows, above = self.masked.next_row(state["rows"], ops.swapaxes(state["newest"], 0, 1))
        above = ops.swapaxes(above + self.condition(condition), 0, 1)
        cells = self.masked.empty_cells(ops.shape(rows)[0])
        return {"rows": rows, "newest": state["newest"], "cells": cells, "above": above}, vertical

    def cell(self, state: State, horizontal: Tensor, column: Tensor) -> tuple[State, Tensor]:
        reduced = self._reduce(horizontal)
        cells, left = self.masked.next_cell(state["cells"], reduced)
        newest = write(state["newest"], column, reduced)
        inner = left + ops.take(state["above"], column, axis=0)
        return {**state, "cells": cells, "newest": newest}, self._update(horizontal, inner)


def write(array: Tensor, index: Tensor, entry: Tensor) -> Tensor:
    """Return an array (n, ...) in which the item at an index, a scalar, is replaced by an entry (...)."""
    return ops.scatter_update(array, ops.reshape(ops.cast(index, "int32"), (1, 1)), entry[None])
