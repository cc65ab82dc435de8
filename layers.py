"""Building blocks of the VQ-VAE: SSIM, vector quantizer and residual block.

References:
    Wang et al. 2004, "Image Quality Assessment: From Error Visibility to Structural Similarity"
    van den Oord et al. 2017, "Neural Discrete Representation Learning" (VQ-VAE)

Every sublayer has an explicit name, because saved files contain the names and those that Keras generates depend on
which layers were created before. No layer needs `get_config`: Keras generates it from the arguments.
"""

import math
import threading
from collections.abc import Callable
from typing import Any, TypeAlias

import keras
import numpy as np
from keras import ops

PACKAGE = "oasis_vqvae"  # package name under which the classes are registered in saved models

Tensor: TypeAlias = Any  # a tensor of the backend, or anything that the backend converts to one
Shape: TypeAlias = tuple[int | None, ...]

WINDOW_SIGMA, WINDOW_RADIUS = 1.5, 5  # of the Gaussian window of SSIM, in pixels; it spans 11 x 11 of them


# ------------------------------------------------------------------------------------------------- SSIM


def gaussian_matrix(size: int) -> np.ndarray:
    """Return the matrix that filters a vector of this length with the Gaussian window of SSIM, mirrored at its ends.

    `matrix @ image @ matrix.T` applies the separable filter to a square image. Two matrix products are faster than a
    convolution with a single channel on every backend.

    Returns:
        (size, size) float32.
    """
    offsets = np.arange(-WINDOW_RADIUS, WINDOW_RADIUS + 1)
    window = np.exp(-0.5 * (offsets / WINDOW_SIGMA) ** 2)
    window /= window.sum()
    mirrored = np.pad(np.arange(size), WINDOW_RADIUS, mode="symmetric")
    source = mirrored[np.arange(size)[:, None] + WINDOW_RADIUS + offsets]  # (size, window)
    matrix = np.zeros((size, size))
    np.add.at(matrix, (np.arange(size)[:, None], source), window)
    return matrix.astype(np.float32)


def resizing_matrix(size: int, new_size: int) -> np.ndarray:
    """Return the matrix that resizes a vector by bicubic interpolation (Keys 1981), with antialiasing, as Pillow does.

    `matrix @ image @ matrix.T` resizes a square image.

    Args:
        size: Length of the vector.
        new_size: Length of the resized vector.

    Returns:
        (new_size, size) float32. Each row adds up to 1.
    """
    step = size / new_size
    centres = (np.arange(new_size)[:, None] + 0.5) * step
    x = np.abs(np.arange(size) + 0.5 - centres) / max(step, 1.0)
    inner, outer = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    weights = np.where(x < 1, inner, np.where(x < 2, outer, 0.0))
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


def resize(images: Tensor, new_size: int) -> Tensor:
    """Resize square images (B, S, S, 1) bicubically: (B, new_size, new_size, 1) float32; see `resizing_matrix`."""
    images = ops.cast(images, "float32")
    if images.shape[1] == new_size:
        return images
    matrix = ops.convert_to_tensor(resizing_matrix(images.shape[1], new_size))
    return (matrix @ images[..., 0] @ ops.transpose(matrix))[..., None]


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
    return ops.mean(ssim_map(x, y)[:, WINDOW_RADIUS:-WINDOW_RADIUS, WINDOW_RADIUS:-WINDOW_RADIUS], axis=(1, 2))


# --------------------------------------------------------------------------------------------- slice positions


def position_features(positions: Tensor) -> Tensor:
    """Encode slice positions (B,) as sines and cosines (Vaswani et al. 2017, section 3.5): (B, 12) float32.

    Neighbouring slices have similar features, and positions that are rare in the training data need no embedding of
    their own.
    """
    frequencies = 0.5 ** np.arange(1, 7, dtype=np.float32)  # Wavelengths of 12 to 402 slices.
    angles = ops.cast(positions, "float32")[:, None] * frequencies
    return ops.concatenate([ops.sin(angles), ops.cos(angles)], axis=-1)


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


def own_rows(draw: Callable[[int], Tensor], count: int) -> Tensor:
    """Return the `count` rows of this replica of random numbers that `draw(n)` draws for all n rows of the batch."""
    index, replicas = replica_index_and_count()
    drawn = draw(replicas * count)
    return drawn if replicas == 1 else drawn[index * count : (index + 1) * count]


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

    A code is dead if N_k falls below `dead_code_threshold` times the mean of n_k over all codes. It is replaced by a
    random vector of the batch, and N_k and m_k are set to match. Counts start at zero, so the first training batch sets
    the whole codebook: most codes are dead, and those that are not become the mean of their vectors. The codebook
    changes in training only, and never while `trainable` is False.

    With `background_code`, code 0 is reserved for cells that show nothing but background: its vector is zero, `call`
    and `nearest` take a mask of these cells, and no other cell gets it. The counts and the metrics leave it out.

    The layer computes in float32 under every dtype policy. A model adds its loss in `compute_loss`, with
    `loss_and_metrics`.

    Args:
        num_embeddings: Number of codes, K.
        embedding_dim: Dimension of a code, D.
        commitment_weight: β.
        codebook: "ema" or "gradient".
        decay: γ of the moving averages.
        dead_code_threshold: Fraction of the mean count below which a code is dead. 0 disables replacement.
        seed: Seed for choosing the vectors that replace dead codes.
        prefix: Prefix of the names of the metrics, for models with several codebooks.
        background_code: Whether code 0 is reserved for background.

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
        decay: float = 0.98,
        dead_code_threshold: float = 0.1,
        seed: int = 0,
        prefix: str = "",
        background_code: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**{**kwargs, "dtype": "float32"})
        if codebook not in ("ema", "gradient"):
            raise ValueError(f'codebook is {codebook!r}: choose "ema" or "gradient"')
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.commitment_weight, self.codebook, self.decay = commitment_weight, codebook, decay
        self.dead_code_threshold, self.seed, self.prefix = dead_code_threshold, seed, prefix
        self.background_code = background_code
        self.seed_generator = keras.random.SeedGenerator(seed)
        self.codebook_loss = keras.metrics.Mean(name=f"{prefix}codebook")
        self.commitment_loss = keras.metrics.Mean(name=f"{prefix}commitment")
        self.usage = CodeUsage(num_embeddings - background_code, prefix)
        self.last_call = threading.local()  # each replica runs in its own thread

    def build(self, input_shape: Shape) -> None:
        shape = (self.num_embeddings, self.embedding_dim)
        # aggregation="mean" keeps the copies on several devices identical
        state = {"trainable": False, "aggregation": "mean"}
        trained = self.codebook == "gradient"
        self.embeddings = self.add_weight(
            shape=shape, initializer=self._initial_codes, name="embeddings", **({} if trained else state)
        )
        self.counts = self.add_weight(shape=shape[:1], initializer="zeros", name="counts", **state)
        if self.codebook == "ema":
            self.sums = self.add_weight(shape=shape, initializer="zeros", name="sums", **state)

    def _initial_codes(self, shape: Shape, dtype: str | None = None) -> Tensor:
        codes = keras.initializers.RandomNormal()(shape, dtype)
        return ops.concatenate([ops.zeros_like(codes[:1]), codes[1:]]) if self.background_code else codes

    def call(self, inputs: Tensor, background: Tensor | None = None, training: bool = False) -> tuple[Tensor, Tensor]:
        """Quantize vectors, and update the codebook if `training`, unless `trainable` is False.

        Args:
            inputs: Vectors (B, h, w, D).
            background: Which cells get code 0, (B, h, w) bool. Needed with `background_code`, and ignored without.
            training: See above.

        Returns:
            Quantized vectors (B, h, w, D) float32 and code indices (B, h, w) int32.
        """
        inputs = ops.cast(inputs, "float32")
        if self.background_code:
            inputs = ops.where(ops.expand_dims(background, -1), 0.0, inputs)
        indices = self.nearest(inputs, background)  # (B, h, w)
        quantized = self.lookup(indices)  # (B, h, w, D)

        codebook_loss = ops.mean(ops.square(ops.stop_gradient(inputs) - quantized))
        commitment_loss = self.commitment_weight * ops.mean(ops.square(inputs - ops.stop_gradient(quantized)))
        one_hot = ops.one_hot(ops.reshape(indices, (-1,)), self.num_embeddings, dtype="float32")  # (B·h·w, K)
        if self.background_code:
            one_hot = one_hot * ops.cast(ops.arange(self.num_embeddings) > 0, "float32")
        self.last_call.codebook_loss = codebook_loss
        self.last_call.commitment_loss = commitment_loss
        self.last_call.counts = ops.sum(one_hot, axis=0)
        self.last_call.batch_size = ops.shape(inputs)[0]
        if training and self.trainable:
            self._update_codebook(ops.reshape(ops.stop_gradient(inputs), (-1, self.embedding_dim)), one_hot)
        return inputs + ops.stop_gradient(quantized - inputs), indices

    def loss_and_metrics(self) -> Tensor:
        """Return the layer's loss in its last call, a scalar, and update the layer's metrics with that call.

        `compute_loss` of a model calls this method. The layer does not call `add_loss`, because under tf.distribute all
        replicas would share one list of `losses`, and `call` cannot update metrics on JAX.
        """
        last = self.last_call
        self.codebook_loss.update_state(last.codebook_loss, sample_weight=last.batch_size)
        self.commitment_loss.update_state(last.commitment_loss, sample_weight=last.batch_size)
        self.usage.update_state(last.counts[int(self.background_code) :])
        return last.commitment_loss + last.codebook_loss if self.codebook == "gradient" else last.commitment_loss

    def nearest(self, inputs: Tensor, background: Tensor | None = None) -> Tensor:
        """Return the index of the code nearest to each vector: (..., D) -> (...) int32; see `call` for `background`."""
        first = int(self.background_code)
        codes = self.embeddings[first:]
        # ‖z‖² is the same for every code and left out
        products = ops.matmul(ops.cast(inputs, "float32"), ops.transpose(codes))  # (..., K)
        nearness = 2 * products - ops.sum(ops.square(codes), axis=1)
        # Faster than Keras' argmax on TensorFlow, which also cannot be exported to ONNX.
        indices = ops.cast(ops.top_k(nearness, 1)[1][..., 0], "int32") + first
        return ops.where(background, 0, indices) if self.background_code else indices

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
        threshold = self.dead_code_threshold * ops.mean(batch_counts)
        dead = counts < threshold
        # All replicas choose the same vectors. Each contributes those that it has.
        chosen = keras.random.randint((self.num_embeddings,), 0, replicas * num_vectors, seed=self.seed_generator)
        chosen = chosen - index * num_vectors
        is_local = (chosen >= 0) & (chosen < num_vectors)
        replacements = ops.take(vectors, ops.clip(chosen, 0, num_vectors - 1), axis=0)  # (K, D)
        replacements = sum_over_replicas(ops.where(is_local[:, None], replacements, 0.0))
        if self.background_code:  # code 0 stays, and a code is not replaced by the vector of the background
            dead = dead & ops.any(replacements != 0, axis=1) & (ops.arange(self.num_embeddings) > 0)

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
    identity. Group norm pools over the whole slice, so a code in the black background can carry information about
    distant regions, unless a code is reserved for background.
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
