"""The sharp decoder: it draws the detail that codes do not determine, by flow matching.

A grid of codes cannot say where each fold lies. A decoder that is trained to be right on average therefore blurs them.
The sharp decoder adds what is missing to the image that the VQ-VAE decodes: it turns noise into one plausible image
among those that the codes allow. Encoder, codebook and prior stay as they are, so codes and their likelihoods remain
valid.

References:
    Lipman et al. 2023, "Flow Matching for Generative Modeling"
    Liu et al. 2023, "Flow Straight and Fast: Learning to Generate and Transfer Data with Rectified Flow"
    Ho et al. 2022, "Cascaded Diffusion Models for High Fidelity Image Generation" (detail for a blurred image)
    Esser et al. 2024, "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis" (logit-normal times)
    Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative Models" (inputs of unit variance)
    Ahmed et al. 1974, "Discrete Cosine Transform"
    Ronneberger et al. 2015, "U-Net: Convolutional Networks for Biomedical Image Segmentation"
    Vaswani et al. 2017, "Attention Is All You Need" (attention, sines and cosines of the time)
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops
from scipy import fft

import model
import seeds
from layers import PACKAGE, Shape, Tensor, own_rows, replica_index_and_count
from pngs import BRAIN_THRESHOLD

# The weights of finished runs fit these numbers only, and NUM_STEPS changes what they draw.
WORKING_SIZE = 96  # Resolution at which the network works, about; each of its cells is a square of pixels.
TIME_FEATURES = 128  # Number of features that describe the time.
HEAD_SIZE = 32  # Channels of each attention head.
PATCH_LEVEL = 2  # Level of the U-Net, from 0, the finest, at which each cell covers a patch.
NUM_STEPS = 4  # Steps from noise to detail, each with two evaluations of the network.
FREQUENCY_FEATURES = 512  # Features that describe the frequencies of a patch.
MIN_SCALE = 1e-3  # Smallest standard deviation of a frequency on the [0, 1] scale: that of rounded pixels.


@keras.saving.register_keras_serializable(PACKAGE)
class SharpDecoder(keras.Model):
    """Decodes code indices and noise to images.

    It is a copy of the VQ-VAE's decoders, which stays as it is, and a `VelocityNetwork`. The copy decodes the faithful
    image y. The detail d of an image x is what it lacks, d = (x − y) / detail_scale. Along the straight path from noise
    ε to detail, z_t = (1 − t) ε + t d with t from 0 to 1, the network predicts the velocity d − ε from z_t, t and y
    (Lipman et al. 2023, equation 23). To draw, the midpoint method follows the predicted velocity from noise to detail
    in `NUM_STEPS` steps: each uses the velocity halfway. Methods that also need the velocity at t = 1, such as Heun's,
    leave grain: close to it, the network knows little of the noise that is left.

    Args:
        image_size, grids, coding_size, channels, residual_blocks, num_embeddings, embedding_dim: Those of the `VQVAE`.
        background_code: Whether cells of the finest grid with code 0 are decoded to black.
        detail_channels: See `VelocityNetwork`.
        detail_scales: Standard deviations of the frequencies of what the faithful images lack, on the [0, 1] scale; see
            `detail_scales`.
        velocity: The network to use; by default, a new one.

    Example: For images of 96 × 96 pixels and grids (12,):

        model({"codes_0": codes, "noise": noise})  (B, 12, 12) int32, (B, 96, 96, 1) -> (B, 96, 96, 1) float32
    """

    def __init__(
        self,
        image_size: int,
        grids: Sequence[int],
        coding_size: int | None,
        channels: int,
        residual_blocks: int,
        num_embeddings: int,
        embedding_dim: int,
        background_code: bool,
        detail_channels: int,
        detail_scales: Sequence[float],
        velocity: "VelocityNetwork | None" = None,
        name: str = "decoder",
        **kwargs: Any,
    ) -> None:
        super().__init__(name=name, **kwargs)
        scales = np.asarray(detail_scales)
        self.settings = {
            "image_size": image_size,
            "grids": list(grids),
            "coding_size": coding_size,
            "channels": channels,
            "residual_blocks": residual_blocks,
            "num_embeddings": num_embeddings,
            "embedding_dim": embedding_dim,
            "background_code": background_code,
            "detail_channels": detail_channels,
            "detail_scales": scales.tolist(),
        }
        self.image_size, self.grids, self.background_code = image_size, tuple(grids), background_code
        self.detail_scale = float(np.sqrt(np.mean(scales**2)))  # of the pixels
        self.codebooks, self.decoders = [], []
        for level, prefix in enumerate(model.level_prefixes(len(grids))):
            options = {"trainable": False, "name": f"{prefix}codebook"}
            self.codebooks.append(keras.layers.Embedding(num_embeddings, embedding_dim, **options))
            self.decoders.append(model.make_decoder(coding_size or image_size, grids, channels, residual_blocks, level))
            self.decoders[-1].trainable = False
            self.decoders[-1].build((None, grids[level], grids[level], embedding_dim + (2 * channels if level else 0)))
        relative_scales = (scales / self.detail_scale).tolist()
        self.velocity = velocity or VelocityNetwork(image_size, detail_channels, relative_scales, name="velocity")
        for codebook in self.codebooks:
            codebook.build(None)
        self.built = True

    @classmethod
    def untrained(cls, vqvae: model.VQVAE, **settings: Any) -> "SharpDecoder":
        """Return a sharp decoder with the decoders of a VQ-VAE; see the class. Uses the global random seed."""
        names = ("image_size", "grids", "coding_size", "channels", "residual_blocks", "num_embeddings", "embedding_dim")
        settings |= {name: vqvae.settings[name] for name in names}
        decoder = cls(**settings, background_code=vqvae.background_threshold is not None)
        decoder.copy_decoders(vqvae)
        return decoder

    def copy_decoders(self, vqvae: model.VQVAE) -> None:
        """Set the codebooks and decoders to those of a VQ-VAE."""
        for own, quantizer in zip(self.codebooks, vqvae.quantizers, strict=True):
            own.set_weights([ops.convert_to_numpy(quantizer.embeddings)])
        for own, other in zip(self.decoders, vqvae.decoders, strict=True):
            own.set_weights(other.get_weights())

    def call(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Decode code indices and noise.

        Args:
            inputs: "codes_0", "codes_1", …: code indices (B, h, w) int32 per level, the coarsest first; "noise": (B, H,
                W, 1), normally distributed with mean 0 and variance 1.

        Returns:
            Images (B, H, W, 1) float32 in [0, 1].
        """
        return self.decode(self.lookup(inputs), inputs["noise"])

    def lookup(self, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        """Return the quantized vectors of the codes in `inputs`; see `call`."""
        return [codebook(inputs[f"codes_{level}"]) for level, codebook in enumerate(self.codebooks)]

    def decode(self, quantized: Sequence[Tensor], noise: Tensor) -> Tensor:
        """Decode quantized vectors, (B, h, w, D) for each level, the coarsest first, and noise; see `call`."""
        return self.add_detail(self.decode_faithfully(quantized), noise)

    def decode_faithfully(self, quantized: Sequence[Tensor]) -> Tensor:
        """Decode quantized vectors as the VQ-VAE does: (B, H, W, 1) float32 in [0, 1]."""
        return model.decode_vectors(self.decoders, quantized, self.image_size, self.background_code)

    def add_detail(self, faithful: Tensor, noise: Tensor) -> Tensor:
        """Add detail to images that the VQ-VAE has decoded.

        Args:
            faithful: (B, H, W, 1) float32 in [0, 1].
            noise: The same shape, normally distributed with mean 0 and variance 1.

        Returns:
            The same shape, float32 in [0, 1]. Pixels that are far from the brain are black.
        """
        detail, step = ops.cast(noise, "float32"), 1 / NUM_STEPS

        def velocity(detail: Tensor, time: float) -> Tensor:
            times = ops.full_like(detail[:, 0, 0, 0], time)
            return self.velocity({"detail": detail, "faithful": faithful, "time": times})

        for i in range(NUM_STEPS):
            halfway = detail + step / 2 * velocity(detail, i * step)
            detail = detail + step * velocity(halfway, (i + 0.5) * step)
        return near_brain(faithful) * ops.clip(faithful + self.detail_scale * detail, 0, 1)

    def get_config(self) -> dict[str, Any]:
        return {**self.settings, "name": self.name}


def detail_scales(images: np.ndarray, faithful: np.ndarray) -> list[float]:
    """Compute the standard deviations of the frequencies of what decoded images lack, in patches inside the brain.

    Args:
        images: Slices, (N, H, W, 1) uint8.
        faithful: What the VQ-VAE makes of them, (N, H, W, 1) float32 in [0, 1].

    Returns:
        A number for each frequency of a patch, see `frequencies`, on the [0, 1] scale, at least `MIN_SCALE`.
    """
    side = patch_side(images.shape[1])
    inside = ops.convert_to_numpy(to_patches((faithful > BRAIN_THRESHOLD).astype(np.float32), side)).all(axis=-1)
    lacking = ops.convert_to_numpy(frequencies(images / np.float32(255) - faithful, side))[inside]
    variances = np.mean(np.square(lacking, dtype=np.float64), axis=0) if len(lacking) else np.zeros(side**2)
    return np.maximum(np.sqrt(variances), MIN_SCALE).tolist()


def near_brain(faithful: Tensor) -> Tensor:
    """Return where detail is drawn: 1 near the brain in decoded images, 0 elsewhere; (B, H, W, 1) float32 both.

    Near means within 1/32 of the image's width, and at least 2 pixels, in both directions, of a pixel that is brighter
    than `BRAIN_THRESHOLD`. Decoded images have faint specks far from any brain, where real slices are almost black.
    """
    side = max(5, 2 * (faithful.shape[1] // 32) + 1)
    near = ops.cast(faithful > BRAIN_THRESHOLD, "float32")
    for window in ((side, 1), (1, side)):  # Several times as fast as one square window, which is the same.
        near = ops.max_pool(near, window, strides=1, padding="same")
    return near


# ------------------------------------------------------------------------------------------------- network


@keras.saving.register_keras_serializable(PACKAGE)
class VelocityNetwork(keras.Model):
    """Predicts the velocity from noise to detail: a U-Net (Ronneberger et al. 2015) with attention.

    Squares of pixels become the channels of one cell, so that the network always works at a resolution of about
    `WORKING_SIZE`. It halves the resolution three times and doubles it again. Cells of the coarsest resolution attend
    to each other, so that the two halves of a brain can agree. A `FrequencyBranch` adds what convolutions overlook.

    Args:
        image_size: Height and width of an image in pixels.
        channels: Number of channels at the finest resolution; the next ones have twice and four times as many.
        scales: Standard deviations of the detail's frequencies, for the `FrequencyBranch`.
    """

    def __init__(
        self, image_size: int, channels: int, scales: Sequence[float], name: str = "velocity", **kwargs: Any
    ) -> None:
        # Times and noise enter as they are; each layer casts what it gets.
        super().__init__(name=name, autocast=False, **kwargs)
        self.settings = {"image_size": image_size, "channels": channels, "scales": list(scales)}
        self.side = cell_side(image_size)
        widths = [channels, 2 * channels, 4 * channels, 4 * channels]
        convolution = {"kernel_size": 3, "padding": "same"}
        self.embed_time = [
            keras.layers.Dense(TIME_FEATURES, activation="silu", name=f"time_{i}", dtype="float32") for i in range(2)
        ]
        self.first = keras.layers.Conv2D(channels, **convolution, name="first")
        self.down_blocks = [TimedBlock(width, name=f"down_block_{i}") for i, width in enumerate(widths)]
        self.downs = [
            keras.layers.Conv2D(width, **convolution, strides=2, name=f"down_{i}") for i, width in enumerate(widths[1:])
        ]
        self.attention = GridAttention(widths[-1], name="attention")
        self.middle = TimedBlock(widths[-1], name="middle")
        self.ups = [keras.layers.Conv2D(width, **convolution, name=f"up_{i}") for i, width in enumerate(widths[:-1])]
        self.enlarge = keras.layers.UpSampling2D(name="enlarge")
        self.up_blocks = [TimedBlock(width, name=f"up_block_{i}") for i, width in enumerate(widths)]
        self.last_norm = keras.layers.RMSNormalization(name="last_norm")
        last = {**convolution, "kernel_initializer": "zeros", "dtype": "float32"}
        self.last = keras.layers.Conv2D(self.side**2, **last, name="last")
        self.frequency_branch = FrequencyBranch(patch_side(image_size), scales, name="frequency_branch")
        image = keras.Input((image_size, image_size, 1))
        self({"detail": image, "faithful": image, "time": keras.Input(())})  # creates the weights

    def call(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Predict the velocity.

        Args:
            inputs: "detail": detail mixed with noise, (B, H, W, 1); "faithful": decoded images, (B, H, W, 1) in [0, 1];
                "time": (B,), from 0 for noise to 1 for detail.

        Returns:
            (B, H, W, 1) float32.
        """
        time = time_features(inputs["time"])
        for layer in self.embed_time:
            time = layer(time)
        known = [inputs["detail"], 2 * inputs["faithful"] - 1]
        features = self.first(ops.concatenate([to_cells(images, self.side) for images in known], axis=-1))
        skipped = []
        for i, block in enumerate(self.down_blocks):
            if i:
                skipped.append(features)
                features = self.downs[i - 1](features)
            features = block(features, time)
        features = self.middle(self.attention(features), time)
        for i in reversed(range(len(self.up_blocks))):
            if i < len(self.ups):
                features = self.ups[i](self.enlarge(features))
                height, width = skipped[i].shape[1:3]  # Odd sizes are rounded up when they are halved.
                features = ops.concatenate([features[:, :height, :width], skipped[i]], axis=-1)
            features = self.up_blocks[i](features, time)
            if i == PATCH_LEVEL:
                features_of_patches = features
        of_patches = {"embedded_time": time, "features": features_of_patches}
        of_frequencies = self.frequency_branch(inputs["detail"], inputs["faithful"], inputs["time"], **of_patches)
        return from_cells(self.last(ops.relu(self.last_norm(features))), self.side) + of_frequencies

    def get_config(self) -> dict[str, Any]:
        return {**self.settings, "name": self.name}


def time_features(time: Tensor) -> Tensor:
    """Return sines and cosines of times (B,) in [0, 1]: (B, 32) float32."""
    frequencies = np.exp(np.linspace(0, 5, 16)).astype(np.float32)
    angles = ops.cast(time, "float32")[:, None] * frequencies
    return ops.concatenate([ops.sin(angles), ops.cos(angles)], axis=-1)


def cell_side(image_size: int) -> int:
    """Return the side of the square of pixels that is one cell at the finest resolution of the `VelocityNetwork`."""
    return math.gcd(image_size, 2 ** max(0, round(math.log2(image_size / WORKING_SIZE))))


def to_cells(images: Tensor, side: int) -> Tensor:
    """Turn squares of pixels into channels: (B, H, W, 1) -> (B, H / side, W / side, side²)."""
    height, width = images.shape[1] // side, images.shape[2] // side
    squares = ops.transpose(ops.reshape(images, (-1, height, side, width, side)), (0, 1, 3, 2, 4))
    return ops.reshape(squares, (-1, height, width, side * side))


def from_cells(cells: Tensor, side: int) -> Tensor:
    """Undo `to_cells`."""
    height, width = cells.shape[1:3]
    squares = ops.transpose(ops.reshape(cells, (-1, height, width, side, side)), (0, 1, 3, 2, 4))
    return ops.reshape(squares, (-1, height * side, width * side, 1))


def patch_side(image_size: int) -> int:
    """Return the side of the patches of pixels whose frequencies the `FrequencyBranch` reads."""
    return cell_side(image_size) * 2**PATCH_LEVEL


def to_patches(images: Tensor, side: int) -> Tensor:
    """Turn patches of pixels into channels: (B, H, W, 1) -> (B, ⌈H / side⌉, ⌈W / side⌉, side²).

    Images are padded with zeros on the right and at the bottom.
    """
    padding = [(0, -size % side) for size in images.shape[1:3]]
    return to_cells(ops.pad(images, [(0, 0), *padding, (0, 0)]), side)


def frequencies(images: Tensor, side: int) -> Tensor:
    """Return the orthonormal two-dimensional cosine transform (DCT-II) of each patch; shapes as in `to_patches`."""
    return ops.matmul(to_patches(images, side), cosines(side).T)


def cosines(side: int) -> np.ndarray:
    """Return the matrix of the cosine transform of flat patches: (side², side²) float32, a row for each frequency."""
    row = fft.dct(np.eye(side), axis=0, norm="ortho")
    return np.kron(row, row).astype(np.float32)


@keras.saving.register_keras_serializable(PACKAGE)
class FrequencyBranch(keras.layers.Layer):
    """Predicts the velocity of each patch of pixels from the frequencies of the patch.

    Near the end of the path from noise to detail, the remaining noise is fainter than the detail. It shows only at
    frequencies that the detail lacks. Slices from JPEG files lack most frequencies of their blocks of 8 × 8 pixels.
    Convolutions hardly learn this; dense layers for each patch do.

    At time t, the frequency k of detail that is mixed with noise has the variance n_k(t)² = t² σ_k² + (1 − t)². What
    enters is divided by n_k(t), and so is what the last layer predicts: it is small early and large late, as the noise
    is (compare Karras et al. 2022, section 5).

    Args:
        side: Side of a patch in pixels.
        scales: σ_k, standard deviations of the detail's frequencies, side² numbers.
    """

    def __init__(self, side: int, scales: Sequence[float], **kwargs: Any) -> None:
        # In float32 whatever the policy, because what it looks for is faint; half precision was not tried.
        super().__init__(dtype="float32", autocast=False, **kwargs)
        self.side, self.scales = side, np.asarray(scales, np.float32)
        zeros = {"kernel_initializer": "zeros", "dtype": "float32"}
        self.hidden, self.context, self.second_hidden = (
            keras.layers.Dense(FREQUENCY_FEATURES, dtype="float32", name=name)
            for name in ("hidden", "context", "second_hidden")
        )
        self.modulation, self.second_modulation = (
            keras.layers.Dense(2 * FREQUENCY_FEATURES, **zeros, name=name)
            for name in ("modulation", "second_modulation")
        )
        self.norm = keras.layers.RMSNormalization(dtype="float32", name="norm")
        self.out = keras.layers.Dense(side**2, **zeros, name="out")

    def call(self, detail: Tensor, faithful: Tensor, time: Tensor, embedded_time: Tensor, features: Tensor) -> Tensor:
        """Predict the velocity.

        Args:
            detail, faithful, time: Inputs of the `VelocityNetwork`.
            embedded_time: Features of the time, (B, T).
            features: Features of the patches, (B, ⌈H / side⌉, ⌈W / side⌉, C).

        Returns:
            (B, H, W, 1) float32.
        """
        time = ops.cast(time, "float32")[:, None, None, None]
        deviation = ops.sqrt((time * self.scales) ** 2 + (1 - time) ** 2)
        known = [frequencies(detail, self.side) / deviation, frequencies(faithful, self.side) / self.scales]
        hidden = self.hidden(ops.concatenate(known, axis=-1)) + self.context(ops.cast(features, "float32"))
        hidden = ops.relu(modulate(hidden, self.modulation(embedded_time)))
        hidden = modulate(self.norm(self.second_hidden(hidden)), self.second_modulation(embedded_time))
        predicted = self.out(ops.relu(hidden)) / deviation
        height, width = detail.shape[1:3]
        return from_cells(ops.matmul(predicted, cosines(self.side)), self.side)[:, :height, :width]


def modulate(features: Tensor, modulation: Tensor) -> Tensor:
    """Return (1 + a) · features + b for features (B, h, w, C) and a modulation (B, 2 · C), which is split into a, b."""
    scale, shift = ops.split(modulation[:, None, None], 2, axis=-1)
    return features * (1 + scale) + shift


@keras.saving.register_keras_serializable(PACKAGE)
class TimedBlock(keras.layers.Layer):
    """x + conv(relu(a · norm(conv(relu(norm(x)))) + b)) with 3 × 3 convolutions; a and b depend on the time.

    The last convolution starts at zero. If the number of channels changes, x passes through a 1 × 1 convolution.

    Args:
        filters: Number of channels of the output.
    """

    def __init__(self, filters: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.filters = filters
        convolution = {"kernel_size": 3, "padding": "same"}
        self.inner_norm = keras.layers.RMSNormalization(name="inner_norm")
        self.inner = keras.layers.Conv2D(filters, **convolution, name="inner")
        self.outer_norm = keras.layers.RMSNormalization(name="outer_norm")
        self.modulation = keras.layers.Dense(2 * filters, kernel_initializer="zeros", name="modulation")
        self.outer = keras.layers.Conv2D(filters, **convolution, kernel_initializer="zeros", name="outer")

    def build(self, features_shape: Shape, time_shape: Shape) -> None:
        changes = features_shape[-1] != self.filters
        self.shortcut = keras.layers.Conv2D(self.filters, 1, name="shortcut") if changes else None

    def call(self, features: Tensor, time: Tensor) -> Tensor:
        """Features (B, h, w, C) and features of the time (B, T) -> (B, h, w, filters)."""
        inner = self.outer_norm(self.inner(ops.relu(self.inner_norm(features))))
        inner = modulate(inner, self.modulation(time))
        return (self.shortcut(features) if self.shortcut else features) + self.outer(ops.relu(inner))


@keras.saving.register_keras_serializable(PACKAGE)
class GridAttention(keras.layers.Layer):
    """Multi-head self-attention between all cells of a grid (Vaswani et al. 2017), with a residual connection.

    Args:
        filters: Number of channels of input and output.
    """

    def __init__(self, filters: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.num_heads = math.gcd(filters, max(1, filters // HEAD_SIZE))
        self.norm = keras.layers.RMSNormalization(name="norm")
        self.query, self.key, self.value = (
            keras.layers.Dense(filters, name=name) for name in ("query", "key", "value")
        )
        self.out = keras.layers.Dense(filters, kernel_initializer="zeros", name="out")

    def call(self, features: Tensor) -> Tensor:
        """(B, h, w, filters) -> the same shape."""
        _, height, width, filters = features.shape
        cells = ops.reshape(self.norm(features), (-1, height * width, filters))

        def by_head(cells: Tensor) -> Tensor:  # (B, cells, filters) as (B, heads, cells, head size)
            split = ops.reshape(cells, (-1, height * width, self.num_heads, filters // self.num_heads))
            return ops.transpose(split, (0, 2, 1, 3))

        query, key, value = (by_head(layer(cells)) for layer in (self.query, self.key, self.value))
        scores = ops.matmul(query, ops.transpose(key, (0, 1, 3, 2))) / (filters // self.num_heads) ** 0.5
        weights = ops.cast(ops.softmax(ops.cast(scores, "float32")), value.dtype)
        found = ops.transpose(ops.matmul(weights, value), (0, 2, 1, 3))
        return features + self.out(ops.reshape(found, (-1, height, width, filters)))


# ------------------------------------------------------------------------------------------------ training


@keras.saving.register_keras_serializable(PACKAGE)
class DecoderTuning(keras.Model):
    """Trains a sharp decoder by flow matching (Lipman et al. 2023, equation 23), with the stock `fit`.

    The loss is the mean squared error of the predicted velocity at a random time, for random noise, over the pixels
    near the brain. Times are logit-normally distributed: the logistic function of a normally distributed number (Esser
    et al. 2024, section 3.1). Slices are flipped at random, together with their faithful images.

    Args:
        decoder: The sharp decoder.
        seed: Seed of times, noise and flips.
    """

    def __init__(self, decoder: SharpDecoder, seed: int = 0, name: str = "decoder_tuning", **kwargs: Any) -> None:
        super().__init__(name=name, **kwargs)
        self.decoder = decoder
        self.seed_generator = keras.random.SeedGenerator(seeds.number(seed, "noise of the decoder"))
        self.built = True

    def call(self, inputs: Mapping[str, Tensor], training: bool = False) -> Tensor:
        """Predict a velocity.

        Args:
            inputs: "images", slices (B, H, W, 1) uint8, and their codes; see `SharpDecoder.call`.
            training: Whether images are flipped.

        Returns:
            (2, B, H, W, 1) float32: the error of the velocity, and where it counts.
        """
        images = ops.cast(inputs["images"], "float32") / 255
        faithful = ops.stop_gradient(self.decoder.decode_faithfully(self.decoder.lookup(inputs)))
        count, seed = ops.shape(images)[0], self.seed_generator
        if training:
            flips = own_rows(lambda n: keras.random.uniform((n, 1, 1, 1), seed=seed), count) < 0.5
            images, faithful = (ops.where(flips, ops.flip(batch, axis=2), batch) for batch in (images, faithful))
        time = ops.sigmoid(own_rows(lambda n: keras.random.normal((n, 1, 1, 1), seed=seed), count))
        noise = own_rows(lambda n: keras.random.normal((n, *images.shape[1:]), seed=seed), count)
        detail = (images - faithful) / self.decoder.detail_scale
        mixed = (1 - time) * noise + time * detail
        velocity = self.decoder.velocity({"detail": mixed, "faithful": faithful, "time": time[:, 0, 0, 0]})
        return ops.stack([velocity - (detail - noise), near_brain(faithful)])

    def compute_loss(
        self,
        x: Any = None,
        y: Any = None,
        y_pred: Tensor = None,
        sample_weight: Tensor = None,
        training: bool = True,
    ) -> Tensor:
        """Return the mean squared error of the velocity near the brain, a scalar.

        Args:
            x, y, sample_weight, training: Ignored.
            y_pred: See `call`.
        """
        error, counts = y_pred[0], y_pred[1]
        mean = ops.sum(counts * ops.square(error)) / ops.maximum(ops.sum(counts), 1)
        return mean / replica_index_and_count()[1]  # Keras sums the gradients of all replicas.
