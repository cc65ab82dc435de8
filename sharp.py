"""The sharp decoder: it draws the detail that codes do not determine, taught by a discriminator.

A grid of codes cannot say where each fold lies. A decoder that is trained to be right on average therefore blurs them.
The sharp decoder is a copy of the VQ-VAE's that also reads noise, and draws one plausible image among those that the
codes allow. Encoder, codebook and prior stay as they are, so codes and their likelihoods remain valid.

References:
    Goodfellow et al. 2014, "Generative Adversarial Nets"
    Isola et al. 2017, "Image-to-Image Translation with Conditional Adversarial Networks" (patch discriminator)
    Miyato & Koyama 2018, "cGANs with Projection Discriminator"
    Mescheder et al. 2018, "Which Training Methods for GANs do actually Converge?" (R1 regularisation)
    Karras et al. 2019, "A Style-Based Generator Architecture for Generative Adversarial Networks" (noise inputs)
    Esser et al. 2021, "Taming Transformers for High-Resolution Image Synthesis" (VQ-GAN)
    Lin et al. 2025, "Diffusion Adversarial Post-Training for One-Step Video Generation" (R1 by finite differences)
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import keras
from keras import ops

import model
import seeds
from layers import PACKAGE, ResidualBlock, Tensor, gaussian_matrix, position_features, replica_index_and_count, resize

NEGATIVE_SLOPE = 0.2  # Of the discriminator's leaky ReLUs.
NUM_GROUPS = 8  # Of the group normalisations of the discriminator.
PATCHES = 12  # Patches per side of an image that the discriminator judges, in images of 96 × 96 pixels or more.
BLUR_SIGMA = 1 / 96  # Of the Gaussian below which images must agree with their targets, relative to their side.
VISIBLE = 2 / 3  # Side of the square that the discriminator sees of an image in training, relative to the image.
MAX_CHANNELS = 128  # Of the sharp decoder's detail at coarse resolutions.
NOISE_SCALE = 0.02  # Standard deviation of the noise that should hardly change the logits of real slices.
MAX_LOGIT_GAP = 0.5  # Between training and validation slices, beyond which the discriminator has memorised subjects.
METRICS = ["discriminator", "smoothness", "agreement", "pixel", "feature", "adversarial", "real_logit", "fake_logit"]
ALONE, RAMP = 0.1, 0.2  # Fractions of the training in which the discriminator trains alone, and gains its full weight.


@keras.saving.register_keras_serializable(PACKAGE)
class SharpDecoder(keras.Model):
    """Decodes code indices and noise to images.

    It is a copy of the VQ-VAE's decoders, which stays as it is, and a network that adds detail to the image that they
    decode. This network reads the features of the image's decoder at every resolution, from the code grid upwards, and
    noise. At each of these resolutions there is a residual block; two convolutions follow at the resolution of the
    image. Before each of them, noise is added to every channel with a weight of its own (Karras et al. 2019). The last
    convolution begins at zero, so an untrained sharp decoder equals the VQ-VAE's.

    Args:
        image_size, grids, coding_size, channels, residual_blocks, num_embeddings, embedding_dim: Those of the `VQVAE`.
        background_code: Whether cells of the finest grid with code 0 are decoded to black.
        detail_channels: Number of channels at the resolution of the image; each coarser resolution has twice as many,
            up to `MAX_CHANNELS`.

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
        detail_channels: int = 16,
        name: str = "decoder",
        **kwargs: Any,
    ) -> None:
        super().__init__(name=name, **kwargs)
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
        }
        self.image_size, self.grids, self.background_code = image_size, tuple(grids), background_code
        coding_size = coding_size or image_size
        self.codebooks, self.decoders = [], []
        for level, prefix in enumerate(model.level_prefixes(len(grids))):
            options = {"trainable": False, "name": f"{prefix}codebook"}
            self.codebooks.append(keras.layers.Embedding(num_embeddings, embedding_dim, **options))
            self.decoders.append(model.make_decoder(coding_size, grids, channels, residual_blocks, level))
            self.decoders[-1].trainable = False
            self.decoders[-1].build((None, grids[level], grids[level], embedding_dim + (2 * channels if level else 0)))
        halvings = int(math.log2(image_size // grids[-1]))  # from the image to the finest grid
        widths = [min(detail_channels << i, MAX_CHANNELS) for i in range(halvings, -1, -1)]  # the coarsest first
        halvings_read = int(math.log2(coding_size // grids[-1]))
        self.detail = [
            DetailBlock(width, above, i < halvings_read, name=f"detail_{i}")
            for i, (width, above) in enumerate(zip(widths[:-1], widths[1:], strict=True))
        ]
        convolution = {"kernel_size": 3, "padding": "same"}
        self.finish = [
            NoiseWeight(name="noise_0"),
            keras.layers.Conv2D(detail_channels, **convolution, activation="relu", name="detail_convolution_0"),
            NoiseWeight(name="noise_1"),
            keras.layers.Conv2D(detail_channels, **convolution, activation="relu", name="detail_convolution_1"),
            keras.layers.Conv2D(1, **convolution, kernel_initializer="zeros", name="detail_convolution_2"),
        ]
        inputs = {f"codes_{level}": keras.Input((grid, grid), dtype="int32") for level, grid in enumerate(grids)}
        self({**inputs, "noise": keras.Input((image_size, image_size, 1))})  # creates the weights

    @classmethod
    def untrained(cls, vqvae: model.VQVAE) -> "SharpDecoder":
        """Return a sharp decoder that decodes as a VQ-VAE does. Uses the global random seed."""
        names = ("image_size", "grids", "coding_size", "channels", "residual_blocks", "num_embeddings", "embedding_dim")
        settings: dict[str, Any] = {name: vqvae.settings[name] for name in names}
        decoder = cls(**settings, background_code=vqvae.background_threshold is not None)
        for own, quantizer in zip(decoder.codebooks, vqvae.quantizers, strict=True):
            own.set_weights([ops.convert_to_numpy(quantizer.embeddings)])
        for own, other in zip(decoder.decoders, vqvae.decoders, strict=True):
            own.set_weights(other.get_weights())
        return decoder

    def call(self, inputs: Mapping[str, Tensor], training: bool = False) -> Tensor:
        """Decode code indices and noise.

        Args:
            inputs: "codes_0", "codes_1", …: code indices (B, h, w) int32 per level, the coarsest first; "noise": (B, H,
                W, 1), normally distributed with mean 0 and variance 1.
            training: Whether to leave the output unclipped.

        Returns:
            Images (B, H, W, 1) float32, clipped to [0, 1] except in training.
        """
        vectors = [codebook(inputs[f"codes_{level}"]) for level, codebook in enumerate(self.codebooks)]
        return self.decode(vectors, inputs["noise"], training)

    def decode(self, quantized: Sequence[Tensor], noise: Tensor, training: bool = False) -> Tensor:
        """Decode quantized vectors, (B, h, w, D) for each level, the coarsest first, and noise; see `call`."""
        decoded = None
        for level, (vectors, decoder) in enumerate(zip(quantized, self.decoders, strict=True)):
            features = model.concatenate(vectors, decoded)
            decoded = self._draw(features, noise) if level == len(self.grids) - 1 else decoder(features)
        images = ops.cast(decoded, "float32")
        if self.background_code:
            images = model.blacken(images, ops.all(quantized[-1] == 0, axis=-1))
        return images if training else ops.clip(images, 0, 1)

    def _draw(self, features: Tensor, noise: Tensor) -> Tensor:
        """Decode features (B, h, w, C) to an image, and add detail: (B, H, W, 1) float32."""
        read = []  # what each upsampling of the image's decoder reads
        for layer in self.decoders[-1].layers:
            if isinstance(layer, keras.layers.Conv2DTranspose):
                read.append(features)
            features = layer(features)
        detail = None
        for block, found in itertools.zip_longest(self.detail, read):
            detail = block(found, detail, noise)
        for layer in self.finish:
            detail = layer(detail, noise) if isinstance(layer, NoiseWeight) else layer(detail)
        return resize(features, self.image_size) + ops.cast(detail, "float32")

    def get_config(self) -> dict[str, Any]:
        return {**self.settings, "name": self.name}


@keras.saving.register_keras_serializable(PACKAGE)
class DetailBlock(keras.layers.Layer):
    """A step of the sharp decoder's detail: a residual block with noise, and upsampling to twice the resolution.

    Args:
        filters: Number of channels.
        above: Number of channels of the output.
        reads: Whether it reads features of the VQ-VAE's decoder.
    """

    def __init__(self, filters: int, above: int, reads: bool, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.read = keras.layers.Conv2D(filters, 1, name="read") if reads else None
        self.noise = NoiseWeight(name="noise")
        self.block = ResidualBlock(filters, name="block")
        self.out = keras.layers.Conv2D(above, 3, padding="same", name="out")
        self.up = keras.layers.UpSampling2D(interpolation="bilinear", name="up")

    def call(self, features: Tensor | None, detail: Tensor | None, noise: Tensor) -> Tensor:
        """Return detail of twice the resolution, (B, 2 · h, 2 · w, above).

        Args:
            features: Those of the VQ-VAE's decoder at this resolution, (B, h, w, C). None if they are not read.
            detail: Output of the step before, (B, h, w, filters). None in the first one.
            noise: (B, H, W, 1) at the resolution of the image.
        """
        if self.read is not None:
            detail = self.read(features) if detail is None else detail + self.read(features)
        return self.up(ops.relu(self.out(self.block(self.noise(detail, noise)))))


@keras.saving.register_keras_serializable(PACKAGE)
class NoiseWeight(keras.layers.Layer):
    """Adds noise to every channel, with a weight per channel (Karras et al. 2019, section 3.2)."""

    def build(self, features_shape: Sequence[int | None], noise_shape: Sequence[int | None]) -> None:
        initializer = keras.initializers.Constant(0.1)
        self.weight = self.add_weight(shape=(features_shape[-1],), initializer=initializer, name="weight")

    def call(self, features: Tensor, noise: Tensor) -> Tensor:
        """Features (B, h, w, C) and noise (B, H, W, 1), of which every (H / h)th pixel is used -> (B, h, w, C)."""
        step = noise.shape[1] // features.shape[1]
        return features + ops.cast(noise[:, ::step, ::step], features.dtype) * self.weight


# ------------------------------------------------------------------------------------------- discriminator


@keras.saving.register_keras_serializable(PACKAGE)
class Discriminator(keras.Model):
    """Judges how real the patches of images are, given the slice position.

    Convolutions with group normalisation alternate with average pooling. Unlike strided convolutions, it treats all
    pixels alike, so that no checkerboards are learned. The logit of each patch is a linear function of its features
    plus their product with features of the slice position (Miyato & Koyama 2018, equation 3).

    Args:
        image_size: Height and width of an image in pixels. The larger it is, the more often images are pooled: at least
            three times, and until there are about `PATCHES` patches per side.
        channels: Number of channels of the last two convolutions; each convolution before has half as many as the next.
    """

    def __init__(self, image_size: int, channels: int = 128, name: str = "discriminator", **kwargs: Any) -> None:
        super().__init__(name=name, **kwargs)
        self.num_poolings = max(3, round(math.log2(image_size / PATCHES)))
        depths = range(self.num_poolings, -2, -1)
        widths = [max(NUM_GROUPS, channels >> max(depth, 0)) for depth in depths]
        self.convolutions = [
            keras.layers.Conv2D(width, 3, padding="same", name=f"convolution_{i}") for i, width in enumerate(widths)
        ]
        self.norms = [
            keras.layers.GroupNormalization(NUM_GROUPS, name=f"norm_{i}") for i in range(1, len(self.convolutions))
        ]
        self.logit = keras.layers.Dense(1, dtype="float32", name="logit")
        self.position = keras.layers.Dense(widths[-1], kernel_initializer="zeros", dtype="float32", name="position")
        self((keras.Input((image_size, image_size, 1)), keras.Input((), dtype="int32")))  # creates the weights

    def call(self, inputs: tuple[Tensor, Tensor]) -> list[Tensor]:
        """Judge images.

        Args:
            inputs: Images (B, H, W, 1) in [0, 1] and slice positions (B,).

        Returns:
            The features of each convolution, (B, h, w, C), and last the logits (B, h, w, 1) float32.
        """
        images, positions = inputs
        features = [ops.cast(images, self.compute_dtype) * 2 - 1]
        for i, convolution in enumerate(self.convolutions):
            values = convolution(features[-1])
            values = ops.leaky_relu(self.norms[i - 1](values) if i else values, NEGATIVE_SLOPE)
            if 0 < i <= self.num_poolings:
                values = ops.average_pool(values, 2, strides=2, padding="same")
            features.append(values)
        last = ops.cast(features[-1], "float32")
        condition = self.position(position_features(positions))[:, None, None]
        return [*features[1:], self.logit(last) + ops.sum(last * condition, axis=-1, keepdims=True)]


# ------------------------------------------------------------------------------------------------ training


@keras.saving.register_keras_serializable(PACKAGE)
class DecoderTuning(keras.Model):
    """Trains a sharp decoder against a discriminator, with the stock `fit` and one optimizer.

    The discriminator minimises the hinge loss E[max(0, 1 − D(x))] + E[max(0, 1 + D(G(c, n)))] of real slices x and
    images G decoded from codes c and noise n, plus smoothness_weight · E[(D(x + σε) − D(x))²] / σ² with normally
    distributed ε. This approximates the squared gradient of D at real slices (Mescheder et al. 2018, section 4.1; Lin
    et al. 2025). Without it, the decoder draws hatching, and changes its direction whenever the discriminator has found
    it. The decoder minimises

        agreement_weight · (B(G(c, n)) − B(t))² + pixel_weight · |G(c, n) − t| + adversarial_weight · E[−D(G(c, n))]
        + feature_weight · Σ_l |D_l(G(c, n)) − D_l(t)|

    with B a Gaussian blur and D_l the features of the discriminator's layers. The target t of codes that an encoded
    slice has is this slice. Agreement is squared, because an absolute difference would hold on to the VQ-VAE's image,
    where its gradient jumps. Codes drawn from the prior have no original: their target is the image that the VQ-VAE
    decodes, which is right about large structures only, so that only the first and third terms count.

    Both losses are one sum: the discriminator's does not reach the decoder, because it reads the images without their
    gradient, and the decoder's does not reach the discriminator, whose weights it reads without theirs. At first the
    discriminator trains alone, then the weight of what it teaches rises.

    Args:
        decoder: The sharp decoder.
        discriminator: The discriminator.
        total_steps: Number of training steps.
        adversarial_weight, agreement_weight, pixel_weight, feature_weight, smoothness_weight: See above.
        seed: Seed of noise and augmentation.
    """

    def __init__(
        self,
        decoder: SharpDecoder,
        discriminator: Discriminator,
        total_steps: int,
        adversarial_weight: float = 0.006,
        seed: int = 0,
        agreement_weight: float = 30.0,
        pixel_weight: float = 1.0,
        feature_weight: float = 0.02,
        smoothness_weight: float = 0.01,
        name: str = "decoder_tuning",
        **kwargs: Any,
    ) -> None:
        super().__init__(name=name, **kwargs)
        self.decoder, self.discriminator, self.total_steps = decoder, discriminator, total_steps
        self.agreement_weight, self.pixel_weight = agreement_weight, pixel_weight
        self.feature_weight, self.adversarial_weight = feature_weight, adversarial_weight
        self.smoothness_weight = smoothness_weight
        self.seed_generator = keras.random.SeedGenerator(seeds.number(seed, "noise of the decoder"))
        sigma = max(1.0, BLUR_SIGMA * decoder.image_size)
        self.blur = gaussian_matrix(decoder.image_size, sigma, int(3 * sigma))
        # Not the optimizer's counter, which cannot be read within a step on JAX.
        self.step = self.add_weight(
            shape=(), dtype="int32", initializer="zeros", trainable=False, aggregation="only_first_replica", name="step"
        )
        self.means = {name: keras.metrics.Mean(name=name) for name in METRICS}
        self.built = True

    def call(self, inputs: Mapping[str, Tensor], training: bool = False) -> Tensor:
        """Decode codes with new noise; see `SharpDecoder.call`."""
        shape = (ops.shape(inputs["positions"])[0], *2 * [self.decoder.image_size], 1)
        noise = keras.random.normal(shape, seed=self.seed_generator)
        codes = {name: indices for name, indices in inputs.items() if name.startswith("codes_")}
        return self.decoder({**codes, "noise": noise}, training=training)

    def compute_loss(
        self,
        x: Any = None,
        y: Any = None,
        y_pred: Tensor = None,
        sample_weight: Tensor = None,
        training: bool = True,
    ) -> Tensor:
        """Return the sum of both losses, a scalar, and update the metrics.

        Args:
            x: "positions", slice positions (B,); "images", real slices (B, H, W, 1) uint8; "targets", (B, H, W, 1)
                uint8; "drawn", (B,), 1 if the codes are drawn from the prior, 0 if they are those of the target; and
                the codes that `call` reads.
            y: Ignored.
            y_pred: Decoded images (B, H, W, 1).
            sample_weight: Ignored.
            training: Whether this is a training step, which is counted.
        """
        positions, encoded = x["positions"], 1 - ops.cast(x["drawn"], "float32")[:, None, None, None]
        real, target = (ops.cast(x[name], "float32") / 255 for name in ("images", "targets"))
        fake = y_pred + ops.stop_gradient(ops.clip(y_pred, 0, 1) - y_pred)  # what is shown, with a gradient everywhere
        real, seen = self._augment(real, fake)
        near = real + NOISE_SCALE * keras.random.normal(ops.shape(real), seed=self.seed_generator)

        *wanted, real_logits = self.discriminator((real, positions))
        near_logits = self.discriminator((near, positions))[-1]
        fake_logits = self.discriminator((ops.stop_gradient(seen), positions))[-1]
        *features, seen_logits = self._judge(seen, positions)
        terms = {
            "discriminator": ops.mean(ops.relu(1 - real_logits)) + ops.mean(ops.relu(1 + fake_logits)),
            "smoothness": ops.mean(ops.square((near_logits - real_logits) / NOISE_SCALE)),
            "agreement": ops.mean(ops.square(self._blur(y_pred - target))),
            "pixel": ops.mean(encoded * ops.abs(y_pred - target)),
            "feature": sum(
                ops.mean(encoded * ops.cast(ops.abs(own - ops.stop_gradient(other)), "float32"))
                for own, other in zip(features, wanted, strict=True)
            ),
            "adversarial": -ops.mean(seen_logits),
        }
        logits = {"real_logit": ops.mean(real_logits), "fake_logit": ops.mean(fake_logits)}
        for name, value in {**terms, **logits}.items():
            self.means[name].update_state(value, sample_weight=ops.shape(real)[0])
        loss = sum(weight * terms[name] for name, weight in self._weights().items())
        if training:
            self.step.assign_add(1)
        return loss / replica_index_and_count()[1]  # Keras sums the gradients of all replicas.

    def _weights(self) -> dict[str, Tensor | float]:
        """Return the weights of the terms of the loss at this step."""
        progress = ops.cast(self.step, "float32") / self.total_steps
        taught = ops.clip((progress - ALONE) / RAMP, 0, 1)
        return {
            "discriminator": 1.0,
            "smoothness": self.smoothness_weight,
            "agreement": self.agreement_weight,
            "pixel": self.pixel_weight,
            "feature": taught * self.feature_weight,
            "adversarial": taught * self.adversarial_weight,
        }

    def _judge(self, images: Tensor, positions: Tensor) -> list[Tensor]:
        """Call the discriminator without gradients to its weights; see `Discriminator.call`."""
        weights = [ops.stop_gradient(ops.convert_to_tensor(v)) for v in self.discriminator.trainable_variables]
        others = [ops.convert_to_tensor(v) for v in self.discriminator.non_trainable_variables]
        return self.discriminator.stateless_call(weights, others, (images, positions))[0]

    def _blur(self, images: Tensor) -> Tensor:
        """Blur images (B, H, W, 1): (B, H, W)."""
        matrix = ops.convert_to_tensor(self.blur)
        return matrix @ images[..., 0] @ ops.transpose(matrix)

    def _augment(self, *batches: Tensor) -> list[Tensor]:
        """Crop batches (B, H, W, 1) for the discriminator to a random square, and flip them, all in the same way."""
        size = self.decoder.image_size
        cell = 2**self.discriminator.num_poolings
        side = max(1, int(size * VISIBLE) // cell) * cell
        highest = (size - side, size - side, 1)
        top, left, flip = (keras.random.randint((), 0, n + 1, seed=self.seed_generator) for n in highest)
        across = ops.arange(side)
        across = left + ops.where(flip > 0, side - 1 - across, across)
        return [ops.take(ops.take(batch, top + ops.arange(side), axis=1), across, axis=2) for batch in batches]


def has_not_memorised(metrics: Mapping[str, float]) -> bool:
    """Whether the discriminator judges validation slices as it does training slices, given the metrics of an epoch."""
    return metrics["real_logit"] - metrics["val_real_logit"] < MAX_LOGIT_GAP
