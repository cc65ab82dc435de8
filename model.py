"""The two networks: a VQ-VAE that turns slices into code indices and back, and a PixelCNN prior over the codes.

    van den Oord et al. 2017, "Neural Discrete Representation Learning"              (VQ-VAE)
    Razavi et al. 2019, "Generating Diverse High-Fidelity Images with VQ-VAE-2"      (moving-average codebook)
    van den Oord et al. 2016, "Conditional Image Generation with PixelCNN Decoders"  (gated PixelCNN)

Both are ordinary Keras models written in `keras.ops`: they train on any backend with the stock `fit`, and
`import model; keras.saving.load_model("vqvae.keras")` is all that loading takes. Every layer has a name of its own,
since names stand in saved files and Keras' counters would have them depend on what else was made before.
"""

import math
import threading

import keras
import numpy as np
from keras import layers, ops

PACKAGE = "oasis_vqvae"  # the name under which the classes stand in saved models


# ------------------------------------------------------------------------------------------------- SSIM


def gaussian_matrix(size: int, sigma: float = 1.5, radius: int = 5) -> np.ndarray:
    """The (size, size) float32 matrix that filters a vector with a gaussian window, edges mirrored.

    `matrix @ image @ matrix.T` is then the separable filter of a square image: two matrix products, which
    every backend does faster than a convolution with one channel.
    """
    offsets = np.arange(-radius, radius + 1)
    window = np.exp(-0.5 * (offsets / sigma) ** 2)
    window /= window.sum()
    source = np.arange(size)[:, None] + offsets  # (size, window)
    while (outside := (source < 0) | (source >= size)).any():
        source = np.where(source < 0, -1 - source, source)
        source = np.where(source >= size, 2 * size - 1 - source, source)
        del outside
    matrix = np.zeros((size, size))
    np.add.at(matrix, (np.arange(size)[:, None], source), window)
    return matrix.astype(np.float32)


def ssim_map(x, y):
    """Structural similarity of two batches of images at each pixel (Wang et al. 2004, equation 13).

    Gaussian window with sigma 1.5, 11 pixels wide, data range 1, population covariance: the numbers of
    scikit-image's `structural_similarity(…, gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
    data_range=1.0, full=True)`.

    Args:
        x, y: (B, H, W, 1) float32 in [0, 1].

    Returns:
        (B, H, W) float32, at most 1.
    """
    c1, c2 = 0.01**2, 0.03**2
    x, y = x[..., 0], y[..., 0]
    rows, columns = (ops.convert_to_tensor(gaussian_matrix(size)) for size in x.shape[1:3])
    moments = ops.concatenate([x, y, x * x, y * y, x * y])  # (5 · B, H, W): TensorFlow 2.21 crashes on (5, 1, H, W)
    mean_x, mean_y, xx, yy, xy = ops.split(rows @ moments @ ops.transpose(columns), 5)
    mean_xy, mean_xx, mean_yy = mean_x * mean_y, mean_x * mean_x, mean_y * mean_y
    luminance = (2 * mean_xy + c1) / (mean_xx + mean_yy + c1)
    structure = (2 * (xy - mean_xy) + c2) / (xx - mean_xx + yy - mean_yy + c2)
    return luminance * structure


def ssim(x, y):
    """Mean structural similarity of each image, (B,): `ssim_map` without the 5 pixels at the edges.

    This is scikit-image's number, which leaves out the pixels whose window reaches over the edge.
    """
    return ops.mean(ssim_map(x, y)[:, 5:-5, 5:-5], axis=(1, 2))


# --------------------------------------------------------------------------------------------- replicas
#
# Under tf.distribute every device runs a replica of the model on its share of the batch, in a Python thread of its own.
# Keras adds the gradients up; what a batch does to a codebook has to be added up here. The shares are equal, which the
# driver sees to. On JAX a batch is one array, whatever it is spread over.


def replica() -> tuple[int, int]:
    """Which of how many replicas this one is: (0, 1) but for tf.distribute, where the first is a tensor."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        context = tf.distribute.get_replica_context()
        if context is not None and context.num_replicas_in_sync > 1:
            return context.replica_id_in_sync_group, context.num_replicas_in_sync
    return 0, 1


def sum_over_replicas(tensor):
    """The sum of every replica's tensor, in each of them; no gradient passes it."""
    if replica()[1] == 1:
        return tensor
    import tensorflow as tf

    return ops.stop_gradient(tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, tensor))


# --------------------------------------------------------------------------------------------- codebook


@keras.saving.register_keras_serializable(PACKAGE)
class CodeUsage(keras.metrics.Metric):
    """Counts codes over an epoch: the share of them used, and their perplexity exp(−Σ p log p)."""

    def __init__(self, num_embeddings: int, prefix: str = "", **kwargs):
        super().__init__(name=f"{prefix}code_usage", dtype="float32", **kwargs)
        self.num_embeddings, self.prefix = num_embeddings, prefix
        self.counts = self.add_variable((num_embeddings,), initializer="zeros", name="counts")

    def update_state(self, counts, sample_weight=None):
        """Add counts (K,), the number of times each code was used in a batch."""
        self.counts.assign_add(counts)

    def result(self):
        share = self.counts / ops.maximum(ops.sum(self.counts), 1)
        entropy = -ops.sum(share * ops.log(ops.maximum(share, 1e-20)))
        return {
            f"{self.prefix}codes_used": ops.mean(ops.cast(self.counts > 0, "float32")),
            f"{self.prefix}perplexity": ops.exp(entropy),
        }


@keras.saving.register_keras_serializable(PACKAGE)
class VectorQuantizer(layers.Layer):
    """Replaces each vector by the nearest of K codebook vectors (van den Oord et al. 2017, section 3).

    The forward pass is z_q = e_k, k = argmin_j ‖z − e_j‖² (equations 1 and 2); gradients pass straight
    through from z_q to z. Two of the terms of equation 3 are the layer's own, as means over all elements:

        codebook    ‖sg[z] − e‖²       moves the codes to the encoder; a loss where codebook="gradient"
        commitment  β ‖z − sg[e]‖²     keeps the encoder near its codes

    With codebook="ema" the codes follow by exponential moving averages instead (appendix A.1): with n_k the
    number and Σz the sum of the vectors that chose code k in a batch,

        N_k ← γ N_k + (1 − γ) n_k,    m_k ← γ m_k + (1 − γ) Σz,    e_k = m_k / N_k.

    A code whose count N_k falls below `restart_below` times the mean count is dead: it restarts at a random
    vector of the batch, with its count and sum to match. The counts begin at zero, so the first batch in
    training sets the whole codebook. Codes change in training only.

    Everything runs in float32, whatever the dtype policy. Alone in a model, its `losses` are what Keras adds to the
    model's loss; `VQVAE` takes them from `loss_and_metrics` instead.

    Args:
        num_embeddings: number of codes, K.
        embedding_dim: length of a code, D.
        commitment_weight: β.
        codebook: "ema" or "gradient".
        decay: γ of the moving averages.
        restart_below: share of the mean count below which a code is dead; 0 never restarts.
        seed: of the random choice of vectors for restarts.
        prefix: of its metrics' names, where a model has several codebooks.

    Example: for features (8, 12, 12, 32) and K = 512 the layer returns quantized features (8, 12, 12, 32)
    and code indices (8, 12, 12) int32 in 0 … 511.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        commitment_weight: float = 0.25,
        codebook: str = "ema",
        decay: float = 0.99,
        restart_below: float = 0.1,
        seed: int = 0,
        prefix: str = "",
        **kwargs,
    ):
        super().__init__(**{**kwargs, "dtype": "float32"})
        if codebook not in ("ema", "gradient"):
            raise ValueError(f'codebook is {codebook!r}: choose "ema" or "gradient"')
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.commitment_weight = commitment_weight
        self.codebook = codebook
        self.decay = decay
        self.restart_below = restart_below
        self.seed = seed
        self.prefix = prefix
        self.seed_generator = keras.random.SeedGenerator(seed)
        self.codebook_loss = keras.metrics.Mean(name=f"{prefix}codebook")
        self.commitment_loss = keras.metrics.Mean(name=f"{prefix}commitment")
        self.usage = CodeUsage(num_embeddings, prefix)
        self.newest = threading.local()  # what the newest call found, for `loss_and_metrics`; replicas are threads

    def build(self, input_shape):
        shape = (self.num_embeddings, self.embedding_dim)
        # aggregation="mean" keeps the copies on several devices alike
        state = {"trainable": False, "aggregation": "mean"}
        self.embeddings = self.add_weight(
            shape=shape,
            initializer="random_normal",
            name="embeddings",
            **({} if self.codebook == "gradient" else state),
        )
        self.counts = self.add_weight(shape=shape[:1], initializer="zeros", name="counts", **state)
        if self.codebook == "ema":
            self.sums = self.add_weight(shape=shape, initializer="zeros", name="sums", **state)

    def call(self, inputs, training=False):
        """Features (B, h, w, D) to (quantized (B, h, w, D) float32, code indices (B, h, w) int32)."""
        inputs = ops.cast(inputs, "float32")
        indices = self.nearest(inputs)  # (B, h, w)
        quantized = self.lookup(indices)  # (B, h, w, D)

        codebook = ops.mean(ops.square(ops.stop_gradient(inputs) - quantized))
        commitment = self.commitment_weight * ops.mean(ops.square(inputs - ops.stop_gradient(quantized)))
        self.add_loss(commitment)
        if self.codebook == "gradient":
            self.add_loss(codebook)
        one_hot = ops.one_hot(ops.reshape(indices, (-1,)), self.num_embeddings, dtype="float32")  # (B·h·w, K)
        self.newest.found = codebook, commitment, ops.sum(one_hot, axis=0), ops.shape(inputs)[0]
        if training:
            self._update_codebook(ops.reshape(ops.stop_gradient(inputs), (-1, self.embedding_dim)), one_hot)
        return inputs + ops.stop_gradient(quantized - inputs), indices

    def loss_and_metrics(self):
        """The layer's part of the loss in the newest call, which is also taken into its metrics.

        For `compute_loss` of the model that the layer is in: while a layer is called JAX keeps metrics out of reach,
        and replicas share one list of `losses`.
        """
        codebook, commitment, counts, batch_size = self.newest.found
        self.codebook_loss.update_state(codebook, sample_weight=batch_size)
        self.commitment_loss.update_state(commitment, sample_weight=batch_size)
        self.usage.update_state(counts)
        return commitment + codebook if self.codebook == "gradient" else commitment

    def nearest(self, inputs):
        """Index of the code nearest to each vector: (…, D) to (…) int32."""
        # ‖z‖² is the same for every code and left out
        products = ops.matmul(ops.cast(inputs, "float32"), ops.transpose(self.embeddings))  # (…, K)
        return ops.cast(ops.argmin(ops.sum(ops.square(self.embeddings), axis=1) - 2 * products, axis=-1), "int32")

    def lookup(self, indices):
        """Codebook vectors of code indices: (B, h, w) to (B, h, w, D) float32."""
        return ops.take(self.embeddings, indices, axis=0)

    def _update_codebook(self, vectors, one_hot):
        """Moving averages (appendix A.1) and restarts of dead codes, over the vectors of all replicas."""
        (index, replicas), own = replica(), ops.shape(vectors)[0]
        added = sum_over_replicas(ops.sum(one_hot, axis=0))
        counts = self.decay * self.counts + (1 - self.decay) * added
        floor = self.restart_below * ops.cast(replicas * own, "float32") / self.num_embeddings
        dead = counts < floor
        chosen = keras.random.randint((self.num_embeddings,), 0, replicas * own, seed=self.seed_generator)
        chosen = chosen - index * own
        here = (chosen >= 0) & (chosen < own)  # the others are vectors of other replicas
        fresh = ops.take(vectors, ops.clip(chosen, 0, own - 1), axis=0)  # (K, D)
        fresh = sum_over_replicas(ops.where(here[:, None], fresh, 0.0))

        self.counts.assign(ops.where(dead, floor, counts))
        if self.codebook == "gradient":
            self.embeddings.assign(ops.where(dead[:, None], fresh, ops.convert_to_tensor(self.embeddings)))
            return
        added = sum_over_replicas(ops.matmul(ops.transpose(one_hot), vectors))
        sums = self.decay * self.sums + (1 - self.decay) * added
        self.sums.assign(ops.where(dead[:, None], floor * fresh, sums))
        # where restarts are off, a code that was never used keeps its place
        counts = self.counts[:, None]
        moved = self.sums / ops.maximum(counts, 1e-8)
        self.embeddings.assign(ops.where(counts > 1e-8, moved, ops.convert_to_tensor(self.embeddings)))

    def get_config(self):
        return {
            **super().get_config(),
            "num_embeddings": self.num_embeddings,
            "embedding_dim": self.embedding_dim,
            "commitment_weight": self.commitment_weight,
            "codebook": self.codebook,
            "decay": self.decay,
            "restart_below": self.restart_below,
            "seed": self.seed,
            "prefix": self.prefix,
        }


# --------------------------------------------------------------------------------------------- VQ-VAE


@keras.saving.register_keras_serializable(PACKAGE)
class ResidualBlock(layers.Layer):
    """x + conv(relu(norm(conv(relu(norm(x)))))), 3 × 3 convolutions, group norm (Wu & He 2018).

    The last convolution starts at zero, so that each block starts as the identity. The norms see the whole
    slice: a code can tell of all of it, also where the slice itself is black.
    """

    def __init__(self, filters: int, **kwargs):
        super().__init__(**kwargs)
        self.filters = filters
        groups = math.gcd(8, filters)
        self.inner_norm = layers.GroupNormalization(groups, name="inner_norm")
        self.inner = layers.Conv2D(filters, 3, padding="same", kernel_initializer="he_normal", name="inner")
        self.outer_norm = layers.GroupNormalization(groups, name="outer_norm")
        self.outer = layers.Conv2D(filters, 3, padding="same", kernel_initializer="zeros", name="outer")

    def build(self, input_shape):
        inner_shape = (*input_shape[:-1], self.filters)
        self.inner_norm.build(input_shape)
        self.inner.build(input_shape)
        self.outer_norm.build(inner_shape)
        self.outer.build(inner_shape)

    def call(self, inputs):
        inner = self.inner(ops.relu(self.inner_norm(inputs)))
        return inputs + self.outer(ops.relu(self.outer_norm(inner)))

    def get_config(self):
        return {**super().get_config(), "filters": self.filters}


def level_names(num_levels: int) -> tuple[str, ...]:
    """What the levels are called, the coarsest first: nothing for a single one, else top and bottom."""
    return ("",) if num_levels == 1 else ("top", "bottom")


@keras.saving.register_keras_serializable(PACKAGE)
class VQVAE(keras.Model):
    """Vector-quantized autoencoder of images with one level of codes (van den Oord et al. 2017) or two (VQ-VAE-2,
    Razavi et al. 2019, algorithm 1).

    `grids` lists the levels, the coarsest first. Going down, each encoder makes a level's features of those of the
    level below it, the finest of the image. Coming up again, each level is quantized given all that the coarser ones
    have decoded, and its decoder reads its own codes and theirs:

        e = encoder_i(e of the next finer level, or the image)
        z = projection_i(e, d);   q = quantizer_i(z);   d = decoder_i(q, d)

    where d, what has been decoded so far, is nothing at first and the image in the end. With one level that is the
    plain VQ-VAE.

    Nothing in that makes the top hold anything: the bottom alone can carry an image, and left to itself it does, while
    the top dies out. So in training a share `bottom_dropout` of the images is decoded with the bottom's vectors
    replaced by their mean: the top learns to carry the image as well as it can, the bottom what it leaves.

    An encoder halves its input by 4 × 4 convolutions of stride 2; the image's first convolution has `channels`
    channels, all others twice as many. Residual blocks follow at a level's grid and, half as many, at twice its
    resolution. Decoders mirror that with transposed convolutions. The loss is equation 3, summed over the levels,
    with, as its reconstruction term,

        w_mse · MSE / var(data) + w_l1 · L1 + w_ssim · (1 − SSIM).

    Args:
        image_size: height and width in pixels.
        grids: side of each level's code grid, one or two, the coarsest first; each a power of two times smaller
            than the next, the last than the image.
        channels: of the first convolution; all others have twice as many.
        residual_blocks: number at a level's grid, in encoder and decoder; half as many at twice that.
        num_embeddings, embedding_dim, commitment_weight, codebook, ema_decay, restart_below, seed: see
            `VectorQuantizer`; alike for all levels.
        mse_weight, l1_weight, ssim_weight: w of the reconstruction loss.
        data_variance: variance of all pixels of the training data, [0, 1] scale.
        bottom_dropout: share of the images in a training batch that are decoded from the top alone, where there is one.

    Raises:
        ValueError: grids that do not fit.

    Example: 256 × 256 images and grids (32, 64):

        model(images)              (B, 256, 256, 1) -> reconstructions, float32 in [0, 1] but for training
        model.encode(images)       -> [(B, 32, 32), (B, 64, 64)] int32 code indices, a list also for one level
        model.decode_code(codes)   that list -> images (B, 256, 256, 1)
    """

    def __init__(
        self,
        image_size: int = 96,
        grids: tuple[int, ...] = (12,),
        channels: int = 64,
        residual_blocks: int = 2,
        num_embeddings: int = 512,
        embedding_dim: int = 32,
        commitment_weight: float = 0.25,
        codebook: str = "ema",
        ema_decay: float = 0.99,
        restart_below: float = 0.1,
        mse_weight: float = 1.0,
        l1_weight: float = 1.0,
        ssim_weight: float = 1.0,
        data_variance: float = 1.0,
        bottom_dropout: float = 0.25,
        seed: int = 0,
        name: str = "vqvae",
        **kwargs,
    ):
        super().__init__(name=name, **kwargs)
        self.settings = {
            "image_size": image_size,
            "grids": list(grids),
            "channels": channels,
            "residual_blocks": residual_blocks,
            "num_embeddings": num_embeddings,
            "embedding_dim": embedding_dim,
            "commitment_weight": commitment_weight,
            "codebook": codebook,
            "ema_decay": ema_decay,
            "restart_below": restart_below,
            "mse_weight": mse_weight,
            "l1_weight": l1_weight,
            "ssim_weight": ssim_weight,
            "data_variance": data_variance,
            "bottom_dropout": bottom_dropout,
            "seed": seed,
        }
        check_grids(image_size, grids)
        self.image_size, self.grids = image_size, tuple(grids)
        self.level_names = level_names(len(grids))
        self.mse_weight, self.l1_weight, self.ssim_weight = mse_weight, l1_weight, ssim_weight
        self.data_variance, self.bottom_dropout = data_variance, bottom_dropout
        if len(grids) > 1:
            self.seed_generator = keras.random.SeedGenerator(seed)

        self.encoders, self.projections, self.quantizers, self.decoders = [], [], [], []  # the coarsest level first
        for level, (grid, finer) in enumerate(zip(grids, [*grids[1:], image_size], strict=True)):
            halvings, of_image = int(math.log2(finer // grid)), finer == image_size
            widths = [channels if of_image and i == 0 else 2 * channels for i in range(halvings)]
            blocks = [0] * (halvings - 2) + [-(-residual_blocks // 2), residual_blocks][-halvings:]
            prefix = f"{self.level_names[level]}_".lstrip("_")
            self.encoders.append(_encoder(widths, blocks, f"{prefix}encoder"))
            self.projections.append(layers.Conv2D(embedding_dim, 1, name=f"{prefix}projection"))
            self.quantizers.append(
                VectorQuantizer(
                    num_embeddings,
                    embedding_dim,
                    commitment_weight,
                    codebook,
                    ema_decay,
                    restart_below,
                    seed + level,
                    prefix,
                    name=f"{prefix}quantizer",
                )
            )
            self.decoders.append(_decoder(widths, blocks, 1 if of_image else 2 * channels, f"{prefix}decoder"))
        self.reconstruction_loss = keras.metrics.Mean(name="reconstruction")
        self.ssim_metric = keras.metrics.Mean(name="ssim")
        self(keras.Input((image_size, image_size, 1)))  # creates the weights

    def call(self, images, training=False):
        """Reconstructions (B, H, W, 1) of images (B, H, W, 1); clipped to [0, 1] but for training."""
        decoded = None
        for level, features in enumerate(self.features(images)):
            vectors = self.projections[level](_join(features, decoded))
            quantized, _ = self.quantizers[level](vectors, training=training)
            if training and level:
                quantized = self._drop(quantized)
            decoded = self.decoders[level](_join(quantized, decoded))
        reconstructions = ops.cast(decoded, "float32")
        return reconstructions if training else ops.clip(reconstructions, 0, 1)

    def _drop(self, quantized):
        """Some images' vectors (B, h, w, D) replaced by the mean of all."""
        (index, replicas), own = replica(), ops.shape(quantized)[0]
        mean = ops.stop_gradient(ops.mean(quantized, axis=(0, 1, 2), keepdims=True))
        drawn = keras.random.uniform((replicas * own, 1, 1, 1), seed=self.seed_generator)
        if replicas > 1:
            mean, drawn = sum_over_replicas(mean) / replicas, drawn[index * own : (index + 1) * own]
        return ops.where(drawn < self.bottom_dropout, mean, quantized)

    def features(self, images):
        """What the encoders make of images (B, H, W, 1): a list (B, h, w, 2 · channels), the coarsest level first."""
        found = []
        for encoder in reversed(self.encoders):
            found.append(encoder(found[-1] if found else images))
        return found[::-1]

    def encode(self, images):
        """Images (B, H, W, 1) in [0, 1] to a list of code indices (B, h, w) int32, the coarsest level first."""
        decoded, codes = None, []
        for level, features in enumerate(self.features(images)):
            codes.append(self.quantizers[level].nearest(self.projections[level](_join(features, decoded))))
            if level + 1 < len(self.grids):  # the image itself is not needed
                decoded = self.decoders[level](_join(self.quantizers[level].lookup(codes[-1]), decoded))
        return codes

    def decode(self, quantized):
        """A list of quantized features (B, h, w, D), the coarsest level first, to images (B, H, W, 1) in [0, 1]."""
        decoded = None
        for decoder, vectors in zip(self.decoders, quantized, strict=True):
            decoded = decoder(_join(vectors, decoded))
        return ops.clip(ops.cast(decoded, "float32"), 0, 1)

    def decode_code(self, codes):
        """A list of code indices (B, h, w) int32, the coarsest level first, to images (B, H, W, 1) in [0, 1]."""
        return self.decode([layer.lookup(indices) for layer, indices in zip(self.quantizers, codes, strict=True)])

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        """Equation 3; `y` (the slice position, in the pipelines here) is not used."""
        error = y_pred - x
        reconstruction = (
            self.mse_weight / self.data_variance * ops.mean(ops.square(error))
            + self.l1_weight * ops.mean(ops.abs(error))
            + self.ssim_weight * (1 - ops.mean(ssim_map(x, y_pred)))
        )
        self.reconstruction_loss.update_state(reconstruction, sample_weight=ops.shape(x)[0])
        self.ssim_metric.update_state(ssim(x, ops.clip(y_pred, 0, 1)))
        quantization = sum(quantizer.loss_and_metrics() for quantizer in self.quantizers)
        return (reconstruction + quantization) / replica()[1]

    def get_config(self):
        return {**self.settings, "name": self.name}


def check_grids(image_size: int, grids: tuple[int, ...]) -> None:
    """Refuse grids that a VQ-VAE cannot have. Raises ValueError, whose message says what they must be."""
    finer = [*grids[1:], image_size][: len(grids)]
    ratios = [side / grid if grid > 0 else 0 for grid, side in zip(grids, finer, strict=True)]
    if len(grids) not in (1, 2) or any(ratio < 2 or not math.log2(ratio).is_integer() for ratio in ratios):
        shown = ", ".join(map(str, grids))
        raise ValueError(
            f"({shown}) is not one or two grids, the coarsest first, each 2, 4, 8, … times smaller than the next "
            f"and the last than the image of {image_size}"
        )


def _join(features, decoded):
    """Features and what the coarser levels have decoded, if any, side by side."""
    return features if decoded is None else ops.concatenate([features, ops.cast(decoded, features.dtype)], axis=-1)


def _encoder(widths: list[int], blocks: list[int], name: str) -> keras.Sequential:
    """Images, or features of the next finer level, to features (B, h, w, widths[-1])."""
    stack = []
    for i, (width, num_blocks) in enumerate(zip(widths, blocks, strict=True)):
        options = {"padding": "same", "kernel_initializer": "he_normal", "name": f"halve_{i}"}
        stack.append(layers.Conv2D(width, 4, strides=2, **options))
        stack += [ResidualBlock(width, name=f"block_{i}_{j}") for j in range(num_blocks)]
        stack.append(layers.ReLU(name=f"relu_{i}"))
    return keras.Sequential(stack, name=name)


def _decoder(widths: list[int], blocks: list[int], output: int, name: str) -> keras.Sequential:
    """Quantized features and what is decoded so far to features of the next finer level, or to the image, not
    clipped: (B, H, W, output)."""
    stack = [layers.Conv2D(widths[-1], 3, padding="same", kernel_initializer="he_normal", name="first")]
    outputs = [output, *widths[:-1]]
    for i, (width, num_blocks, output) in enumerate(zip(widths[::-1], blocks[::-1], outputs[::-1], strict=True)):
        options = {"padding": "same", "kernel_initializer": "he_normal", "name": f"double_{i}"}
        stack += [ResidualBlock(width, name=f"block_{i}_{j}") for j in range(num_blocks)]
        stack.append(layers.ReLU(name=f"relu_{i}"))
        stack.append(layers.Conv2DTranspose(output, 4, strides=2, **options))
    return keras.Sequential(stack, name=name)


# ---------------------------------------------------------------------------------------------- prior


@keras.saving.register_keras_serializable(PACKAGE)
class MaskedConv2D(layers.Layer):
    """A convolution that sees only positions that come earlier in raster order.

    `mask` says which taps of the k × k kernel remain (van den Oord et al. 2016, section 2.2 and figure 1):

        "A", "B"                          all rows above, and the row itself to the left; B with the centre
        "vertical A", "vertical B"        all rows above; B with the row itself, whole
        "horizontal A", "horizontal B"    the row itself to the left; B with the centre

    Only the rows and columns of the kernel that hold a tap are made. The mask is multiplied with the kernel in
    `call`, where taps within them must be zero.

    `call` convolves a whole grid, for training. For sampling, `row` and `cell` make one position of the same
    output out of the inputs that lie before it: the part of the rows that are known whole, a row at a time, and
    the part of the row's own positions, one at a time. Where a mask has both, the two add up.

    Args:
        filters: channels of the output.
        kernel_size: k, odd: an even kernel has no centre to mask.
        mask: as above.
        dilation: distance between taps.

    Raises:
        ValueError: `kernel_size` is even, or `mask` is none of the above.
    """

    def __init__(self, filters: int, kernel_size: int, mask: str, dilation: int = 1, **kwargs):
        super().__init__(**kwargs)
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size is {kernel_size}: must be odd, an even kernel has no centre to mask")
        self.filters, self.kernel_size, self.mask, self.dilation = filters, kernel_size, mask, dilation
        taps = self._taps()
        rows, columns = (np.flatnonzero(taps.any(axis)) for axis in (1, 0))
        self.taps = taps[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        # Zeros before and after each axis that keep tap (centre) over its own position; where the last tap lies
        # before the centre, the input loses that many positions at its end instead.
        centre = kernel_size // 2
        self.margins = [((centre - t[0]) * dilation, (t[-1] - centre) * dilation) for t in (rows, columns)]
        # For sampling: how many kernel rows read whole rows, how many taps read the row's own positions, and how
        # many of the newest rows and positions have to be kept for them.
        self.whole_rows = {"v": len(rows), "h": 0}.get(mask[0], centre)
        self.own_taps = 0 if mask[0] == "v" else centre + mask.endswith("B")
        self.row_span = self.whole_rows * dilation - (dilation - 1) * (mask == "vertical B")
        self.cell_span = self.own_taps * dilation - (dilation - 1) * mask.endswith("B")

    def _taps(self) -> np.ndarray:
        """(k, k) of 0 and 1."""
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

    def build(self, input_shape):
        self.kernel = self.add_weight(
            shape=(*self.taps.shape, input_shape[-1], self.filters), initializer="he_normal", name="kernel"
        )
        self.bias = self.add_weight(shape=(self.filters,), initializer="zeros", name="bias")

    def call(self, inputs):
        """(B, h, w, C) to (B, h, w, filters)."""
        (top, bottom), (left, right) = self.margins
        height, width = inputs.shape[1:3]
        inputs = inputs[:, : height + min(bottom, 0), : width + min(right, 0)]
        inputs = ops.pad(inputs, ((0, 0), (top, max(bottom, 0)), (left, max(right, 0)), (0, 0)))
        kernel = self.kernel
        if not self.taps.all():
            kernel = kernel * ops.cast(self.taps[:, :, None, None], kernel.dtype)
        return ops.conv(inputs, kernel, padding="valid", dilation_rate=self.dilation) + self.bias

    def row(self, rows):
        """What the newest rows (B, row_span, w, C), the last being the one above or, for a vertical mask B, the
        output's own, give to an output row: (B, w, filters)."""
        side = self.kernel_size // 2 * self.dilation
        rows = ops.pad(rows[:, :: self.dilation], ((0, 0), (0, 0), (side, side), (0, 0)))
        kernel = self.kernel[: self.whole_rows]
        return ops.conv(rows, kernel, padding="valid", dilation_rate=(1, self.dilation))[:, 0] + self.bias

    def cell(self, cells):
        """What the newest positions (B, cell_span, C) of the row, the last being the one to the left or, for a
        mask B, the output's own, give to an output position: (B, filters)."""
        cells = cells[:, :: self.dilation]  # (B, own_taps, C)
        kernel = ops.reshape(self.kernel[-1, : self.own_taps], (-1, self.filters))
        output = ops.reshape(cells, (-1, kernel.shape[0])) @ kernel
        return output if self.whole_rows else output + self.bias  # the rows have brought the bias

    def get_config(self):
        return {
            **super().get_config(),
            "filters": self.filters,
            "kernel_size": self.kernel_size,
            "mask": self.mask,
            "dilation": self.dilation,
        }


def _gate(features):
    """tanh(a) · σ(b) of features split in two along the channels (van den Oord et al. 2016, equation 2)."""
    a, b = ops.split(features, 2, axis=-1)
    return ops.tanh(a) * ops.sigmoid(b)


@keras.saving.register_keras_serializable(PACKAGE)
class GatedBlock(layers.Layer):
    """One layer of the gated PixelCNN (van den Oord et al. 2016, figure 2), residual in both stacks.

    The vertical stack at (r, c) holds what is known of the rows above r, the horizontal stack adds the row's
    own positions left of c; only the first passes on to the second, so nothing later is ever seen.
    """

    def __init__(
        self, filters: int, kernel_size: int, dilation: int = 1, dropout: float = 0.0, last: bool = False, **kwargs
    ):
        super().__init__(**kwargs)
        self.filters, self.kernel_size, self.dilation, self.dropout_rate = filters, kernel_size, dilation, dropout
        self.last = last  # nothing reads the vertical stack after the last block
        self.vertical = MaskedConv2D(2 * filters, kernel_size, "vertical B", dilation, name="vertical")
        self.horizontal = MaskedConv2D(2 * filters, kernel_size, "horizontal B", dilation, name="horizontal")
        self.across = layers.Dense(2 * filters, use_bias=False, name="across")
        self.condition = layers.Dense(2 * filters, use_bias=False, name="condition")
        self.vertical_out = None if last else layers.Dense(filters, name="vertical_out")
        self.horizontal_out = layers.Dense(filters, name="horizontal_out")
        self.dropout = layers.Dropout(dropout, name="dropout")

    def call(self, vertical, horizontal, condition, training=False):
        """Stacks (B, h, w, filters) and condition (B, h or 1, w or 1, filters) to the two new stacks."""
        condition = self.condition(condition)
        above = self.vertical(vertical)
        left = self.horizontal(horizontal) + self.across(above) + condition
        return self.next_vertical(vertical, above + condition), self.next_horizontal(horizontal, left, training)

    def next_vertical(self, vertical, above):
        """The vertical stack (…, filters), given the sum of all that enters its gate (…, 2 · filters)."""
        return vertical if self.last else vertical + self.vertical_out(_gate(above))

    def next_horizontal(self, horizontal, left, training=False):
        """The horizontal stack (…, filters), given the sum of all that enters its gate (…, 2 · filters)."""
        return horizontal + self.horizontal_out(self.dropout(_gate(left), training=training))

    def get_config(self):
        return {
            **super().get_config(),
            "filters": self.filters,
            "kernel_size": self.kernel_size,
            "dilation": self.dilation,
            "dropout": self.dropout_rate,
            "last": self.last,
        }


@keras.saving.register_keras_serializable(PACKAGE)
class PlainBlock(layers.Layer):
    """Residual block of the plain PixelCNN: 1 × 1, masked 3 × 3 of type B, 1 × 1, each after a ReLU
    (van den Oord et al. 2016, "Pixel Recurrent Neural Networks", figure 5)."""

    def __init__(self, filters: int, kernel_size: int, dilation: int = 1, dropout: float = 0.0, **kwargs):
        super().__init__(**kwargs)
        self.filters, self.kernel_size, self.dilation, self.dropout_rate = filters, kernel_size, dilation, dropout
        self.reduce = layers.Dense(filters // 2, name="reduce")
        self.masked = MaskedConv2D(filters // 2, kernel_size, "B", dilation, name="masked")
        self.expand = layers.Dense(filters, name="expand")
        self.condition = layers.Dense(filters // 2, use_bias=False, name="condition")
        self.dropout = layers.Dropout(dropout, name="dropout")

    def call(self, features, condition, training=False):
        """Features (B, h, w, filters) and condition (B, h or 1, w or 1, filters) to new features."""
        inner = self.masked(self.reduced(features)) + self.condition(condition)
        return self.next_features(features, inner, training)

    def reduced(self, features):
        """What the masked convolution reads: (…, filters) to (…, filters / 2)."""
        return ops.relu(self.reduce(ops.relu(features)))

    def next_features(self, features, inner, training=False):
        """The new features (…, filters), given the masked convolution and the condition (…, filters / 2)."""
        return features + self.expand(self.dropout(ops.relu(inner), training=training))

    def get_config(self):
        return {
            **super().get_config(),
            "filters": self.filters,
            "kernel_size": self.kernel_size,
            "dilation": self.dilation,
            "dropout": self.dropout_rate,
        }


@keras.saving.register_keras_serializable(PACKAGE)
class PixelCNN(keras.Model):
    """Autoregressive prior over one level's code indices: log p(codes) = Σ_i log p(code_i | earlier codes, slice
    position, codes of the coarser level).

    `gated=True` is the gated PixelCNN with a vertical and a horizontal stack and no blind spot; `gated=False`
    the plain one with masked convolutions. Both begin with a 7 × 7 mask A and go on in residual blocks of mask B.
    Dilations are chosen so that the receptive field reaches over the whole grid: each block doubles the one
    before, starting over at 1 as early as the grid allows.

    Of two levels, the top has a prior of its own and the bottom one that is told the top's codes: up-sampled by a
    small convolutional network, they enter every block (Razavi et al. 2019, section 3.2).

    Trained by cross-entropy: `loss` in nats a code, `bits_per_code` the same in bits.

    Args:
        num_embeddings: K, number of codes.
        grid_size: (h, w) of the code grid.
        filters: channels.
        num_blocks: residual blocks.
        kernel_size: of the blocks' masked convolutions, odd.
        dropout: share of a block's activations dropped in training.
        gated: gated or plain.
        use_position: whether the prior is told the slice position; otherwise it ignores it.
        coarse_grid_size: (h', w') of the coarser level that the prior is told, h / h' a power of two; None for none.

    Raises:
        ValueError: `num_blocks` are too few for the receptive field to reach over the grid at any dilation.

    Example: codes (B, 12, 12) int32 and slice positions (B,) int32, K = 512:

        model((codes, positions))           -> logits (B, 12, 12, 512) float32
        model((codes, positions, coarse))   the same, told the coarser level's codes (B, 6, 6) int32
    """

    FIRST_KERNEL = 7

    def __init__(
        self,
        num_embeddings: int,
        grid_size: tuple[int, int],
        filters: int = 128,
        num_blocks: int = 6,
        kernel_size: int = 3,
        dropout: float = 0.2,
        gated: bool = True,
        use_position: bool = True,
        coarse_grid_size: tuple[int, int] | None = None,
        name: str = "prior",
        **kwargs,
    ):
        super().__init__(name=name, **kwargs)
        self.settings = {
            "num_embeddings": num_embeddings,
            "grid_size": list(grid_size),
            "coarse_grid_size": list(coarse_grid_size) if coarse_grid_size else None,
            "filters": filters,
            "num_blocks": num_blocks,
            "kernel_size": kernel_size,
            "dropout": dropout,
            "gated": gated,
            "use_position": use_position,
        }
        self.num_embeddings, self.grid_size = num_embeddings, tuple(grid_size)
        self.coarse_grid_size = tuple(coarse_grid_size) if coarse_grid_size else None
        self.gated, self.use_position = gated, use_position

        dilations = block_dilations(max(grid_size), self.FIRST_KERNEL, kernel_size, num_blocks)
        self.embedding = layers.Embedding(num_embeddings, filters, name="embedding")
        self.place = self.add_weight(shape=(*grid_size, filters), initializer="zeros", name="place")
        self.position = layers.Dense(filters, activation="relu", name="position")
        self.coarse = None
        if coarse_grid_size:
            ratio = grid_size[0] // coarse_grid_size[0]
            self.coarse = keras.Sequential(
                [
                    layers.Embedding(num_embeddings, filters, name="embedding"),
                    ResidualBlock(filters, name="block_0"),
                    ResidualBlock(filters, name="block_1"),
                    layers.ReLU(name="relu"),
                    layers.Conv2DTranspose(filters, 2 * ratio, strides=ratio, padding="same", name="up"),
                ],
                name="coarse",
            )
        if gated:
            self.first_vertical = MaskedConv2D(filters, self.FIRST_KERNEL, "vertical A", name="first_vertical")
            self.first_horizontal = MaskedConv2D(filters, self.FIRST_KERNEL, "horizontal A", name="first_horizontal")
            self.blocks = [
                GatedBlock(filters, kernel_size, dilation, dropout, last=i == num_blocks - 1, name=f"block_{i}")
                for i, dilation in enumerate(dilations)
            ]
        else:
            self.first = MaskedConv2D(filters, self.FIRST_KERNEL, "A", name="first")
            self.blocks = [
                PlainBlock(filters, kernel_size, dilation, dropout, name=f"block_{i}")
                for i, dilation in enumerate(dilations)
            ]
        self.hidden = layers.Dense(filters, activation="relu", name="hidden")
        self.logits = layers.Dense(num_embeddings, dtype="float32", name="logits")
        self.bits = keras.metrics.Mean(name="bits_per_code")
        shapes = [grid_size, (), *([coarse_grid_size] if coarse_grid_size else [])]
        self(tuple(keras.Input(shape, dtype="int32") for shape in shapes))  # creates the weights

    def call(self, inputs, training=False):
        """(codes (B, h, w), positions (B,)[, coarser codes (B, h', w')]), int32, to logits (B, h, w, K) float32."""
        codes, *told = inputs
        condition = self.condition(*told)
        embedded = self.embedding(codes)  # (B, h, w, filters)
        place = ops.cast(self.place, self.compute_dtype)
        if self.gated:
            vertical = self.first_vertical(embedded) + place
            features = self.first_horizontal(embedded) + vertical
            for block in self.blocks:
                vertical, features = block(vertical, features, condition, training=training)
        else:
            features = self.first(embedded) + place
            for block in self.blocks:
                features = block(features, condition, training=training)
        return self.head(features)

    def head(self, features):
        """Features (…, filters) to logits (…, K) float32."""
        return self.logits(self.hidden(ops.relu(features)))

    def condition(self, positions, coarse=None):
        """What the prior is told, (B, 1, 1, filters), or (B, h, w, filters) with coarser codes (B, h', w').

        positions (B,) are ignored if `use_position` is off.

        Positions enter as sines and cosines (Vaswani et al. 2017, section 3.5), so that neighbouring slices
        share what is learned and positions that were rare in training need no entry of their own.
        """
        wavelengths = 2 * np.pi * 2.0 ** np.arange(1, 7)  # 12 … 402 slices
        angles = ops.cast(positions, "float32")[:, None] * (2 * np.pi / wavelengths).astype(np.float32)
        waves = ops.concatenate([ops.sin(angles), ops.cos(angles)], axis=-1)  # (B, 12)
        condition = self.position(waves if self.use_position else ops.zeros_like(waves))[:, None, None, :]
        return condition if coarse is None else condition + self.coarse(coarse)

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        """Mean cross-entropy in nats a code of `y` (B, h, w) under the logits `y_pred`."""
        nats = ops.mean(keras.losses.sparse_categorical_crossentropy(y, y_pred, from_logits=True))
        self.bits.update_state(nats / math.log(2), sample_weight=ops.shape(y)[0])
        return nats / replica()[1]

    def get_config(self):
        return {**self.settings, "name": self.name}


def block_dilations(grid_size: int, first_kernel: int, kernel_size: int, num_blocks: int) -> list[int]:
    """Dilations 1, 2, 4, … of the blocks, in the shortest cycle whose receptive field spans the grid.

    Raises:
        ValueError: no cycle does; the message says what to raise.
    """
    for cycle in range(1, num_blocks + 1):
        dilations = [2 ** (i % cycle) for i in range(num_blocks)]
        if first_kernel // 2 + kernel_size // 2 * sum(dilations) >= grid_size - 1:
            return dilations
    raise ValueError(f"{num_blocks} blocks are too few to see over a grid of {grid_size}: use more")
