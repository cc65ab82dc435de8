"""The VQ-VAE, which encodes slices as grids of code indices, and the PixelCNN, the prior over these grids.

References:
    van den Oord et al. 2017, "Neural Discrete Representation Learning" (VQ-VAE)
    Razavi et al. 2019, "Generating Diverse High-Fidelity Images with VQ-VAE-2"
    van den Oord et al. 2016, "Conditional Image Generation with PixelCNN Decoders" (gated PixelCNN)

Both are Keras models that train with the stock `fit` on any backend. After `import model`,
`keras.saving.load_model("vqvae.keras")` loads a saved one.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import keras
from keras import ops

import seeds
from augmentation import NUM_PARAMETERS
from layers import (
    PACKAGE,
    ResidualBlock,
    Tensor,
    VectorQuantizer,
    own_rows,
    position_features,
    replica_index_and_count,
    resize,
    ssim,
    ssim_map,
    sum_over_replicas,
)
from masked import CausalAttention, GatedBlock, PlainBlock, Stem

# --------------------------------------------------------------------------------------------- levels


def level_names(num_levels: int) -> tuple[str, ...]:
    """Return the names of the levels, coarsest first: ("",) or ("top", "bottom")."""
    return ("",) if num_levels == 1 else ("top", "bottom")


def level_prefixes(num_levels: int) -> tuple[str, ...]:
    """Return the prefixes of the names of each level's parts, coarsest first: ("",) or ("top_", "bottom_")."""
    return tuple(f"{name}_".lstrip("_") for name in level_names(num_levels))


def prior_names(num_levels: int) -> tuple[str, ...]:
    """Return the names of the priors, coarsest level first: ("prior",) or ("top_prior", "bottom_prior")."""
    return tuple(f"{prefix}prior" for prefix in level_prefixes(num_levels))


def critic_names(num_levels: int) -> tuple[str, ...]:
    """Return the names of the critics, coarsest level first: ("critic",) or ("top_critic", "bottom_critic")."""
    return tuple(f"{prefix}critic" for prefix in level_prefixes(num_levels))


def check_grids(coding_size: int, grids: Sequence[int]) -> None:
    """Check that a VQ-VAE can have these grids.

    Args:
        coding_size: Height and width in pixels of the images that are encoded.
        grids: Height and width of the code grid of each level, coarsest first.

    Raises:
        ValueError: If there are not one or two grids, or one is not smaller than the next, or the last one than the
            image, by a power of two.
    """
    finer = [*grids[1:], coding_size][: len(grids)]
    ratios = [side / grid if grid > 0 else 0 for grid, side in zip(grids, finer, strict=True)]
    if len(grids) not in (1, 2) or any(ratio < 2 or not math.log2(ratio).is_integer() for ratio in ratios):
        shown = ", ".join(map(str, grids))
        raise ValueError(
            f"({shown}) is not allowed: give one or two grids, coarsest first, each 2, 4, 8, … times smaller than the "
            f"next, and the last than the images of {coding_size} × {coding_size} pixels that are encoded"
        )


# --------------------------------------------------------------------------------------------- VQ-VAE


@keras.saving.register_keras_serializable(PACKAGE)
class VQVAE(keras.Model):
    """Vector-quantized autoencoder with one level of codes (van den Oord et al. 2017) or two (VQ-VAE-2, Razavi et al.
    2019, algorithm 1).

    `grids` lists the levels, coarsest first. The encoders run from fine to coarse: the finest one reads the image, and
    every other one the features of the next finer level. Quantizers and decoders then run from coarse to fine. Each
    level i is quantized conditioned on what the coarser levels have decoded:

        e_i = encoder_i(e of the next finer level, or the image)
        z_i = projection_i(e_i, d);   q_i = quantizer_i(z_i);   d = decoder_i(q_i, d)

    where d is empty at first and becomes the image in the end. With one level, this is the plain VQ-VAE.

    Nothing forces the model to use the top level: the bottom codes alone can encode an image, and in practice the top
    codebook collapses. In training, therefore, a fraction `bottom_dropout` of the images is decoded with all bottom
    vectors replaced by their mean. The top level then learns to encode as much of the image as it can.

    With a `background_threshold`, the cells of a grid that show nothing but background are encoded as code 0, whose
    vector is zero, and the cells of the finest grid with this code are decoded to black. No other cell gets it. No code
    is then spent on details of the brain outside of the brain, and no sample has anything in the background.

    With a `coding_size` below `image_size`, images are shrunk to it before they are encoded, and the decoded images are
    enlarged. This saves computing detail that so few codes cannot encode. A `SharpDecoder` can still draw at the full
    size.

    An encoder halves its input with 4 × 4 convolutions of stride 2. With c = `channels`, those on an image have c
    channels if it is halved once; c and 2c if twice; c, 2c and 2c if three times; c/2, c, 2c and 2c if four times; and
    so on. Those of a coarser level all have 2c. At the resolution of the level's grid they are followed by
    `residual_blocks` residual blocks, and at twice that resolution by half as many. Decoders mirror the encoders with
    transposed convolutions. The loss is equation 3 of van den Oord et al. 2017, summed over the levels, with the
    reconstruction term

        mse_weight · MSE / data_variance + l1_weight · L1 + ssim_weight · (1 − SSIM).

    Args:
        image_size: Height and width of an image in pixels.
        grids: Height and width of the code grid of each level, one or two, coarsest first. Each is smaller than the
            next by a power of two, and the last than the coding size.
        coding_size: Height and width of the images that are encoded and decoded. None: `image_size`.
        channels: c, half of the number of channels at the resolution of a grid; see above.
        residual_blocks: Number of residual blocks at the resolution of a grid, in encoder and decoder each.
        num_embeddings, embedding_dim, commitment_weight, codebook, ema_decay, dead_code_threshold, seed: See
            `VectorQuantizer`. They are the same for all levels, but each level has its own random stream.
        mse_weight, l1_weight, ssim_weight: Weights of the reconstruction loss.
        data_variance: Variance of all pixels of the training images, in [0, 1].
        bottom_dropout: Fraction of the training images that are decoded from the top level alone. Ignored with one
            level.
        background_threshold: Grey level, on the [0, 1] scale, up to which a pixel counts as background. None treats
            background like everything else.

    Raises:
        ValueError: If the grids are not possible (see `check_grids`).

    Example: For images of 256 × 256 pixels and grids (32, 64):

        model(images)             (B, 256, 256, 1) -> (B, 256, 256, 1) float32, in [0, 1] except in training
        model.encode(images)      -> [(B, 32, 32), (B, 64, 64)] int32; a list also with one level
        model.decode_code(codes)  such a list -> (B, 256, 256, 1) float32 in [0, 1]
    """

    def __init__(
        self,
        image_size: int = 96,
        grids: Sequence[int] = (12,),
        coding_size: int | None = None,
        channels: int = 64,
        residual_blocks: int = 2,
        num_embeddings: int = 512,
        embedding_dim: int = 32,
        commitment_weight: float = 0.25,
        codebook: str = "ema",
        ema_decay: float = 0.98,
        dead_code_threshold: float = 0.1,
        mse_weight: float = 1.0,
        l1_weight: float = 1.0,
        ssim_weight: float = 1.0,
        data_variance: float = 1.0,
        bottom_dropout: float = 0.25,
        background_threshold: float | None = None,
        seed: int = 0,
        name: str = "vqvae",
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
            "commitment_weight": commitment_weight,
            "codebook": codebook,
            "ema_decay": ema_decay,
            "dead_code_threshold": dead_code_threshold,
            "mse_weight": mse_weight,
            "l1_weight": l1_weight,
            "ssim_weight": ssim_weight,
            "data_variance": data_variance,
            "bottom_dropout": bottom_dropout,
            "background_threshold": background_threshold,
            "seed": seed,
        }
        self.image_size, self.grids, self.coding_size = image_size, tuple(grids), coding_size or image_size
        check_grids(self.coding_size, grids)
        self.level_names = level_names(len(grids))
        self.mse_weight, self.l1_weight, self.ssim_weight = mse_weight, l1_weight, ssim_weight
        self.data_variance, self.bottom_dropout = data_variance, bottom_dropout
        self.background_threshold = background_threshold
        if len(grids) > 1:
            self.seed_generator = keras.random.SeedGenerator(seeds.number(seed, "bottom dropout"))

        # One of each per level, coarsest first
        self.encoders: list[keras.Sequential] = []
        self.projections: list[keras.layers.Conv2D] = []
        self.quantizers: list[VectorQuantizer] = []
        self.decoders: list[keras.Sequential] = []
        for level in range(len(grids)):
            prefix = level_prefixes(len(grids))[level]
            widths, blocks = _widths_and_blocks(self.coding_size, grids, channels, residual_blocks, level)
            self.encoders.append(_encoder(widths, blocks, f"{prefix}encoder"))
            self.projections.append(keras.layers.Conv2D(embedding_dim, 1, name=f"{prefix}projection"))
            self.quantizers.append(
                VectorQuantizer(
                    num_embeddings,
                    embedding_dim,
                    commitment_weight=commitment_weight,
                    codebook=codebook,
                    decay=ema_decay,
                    dead_code_threshold=dead_code_threshold,
                    seed=seeds.number(seed, "dead codes", level),
                    prefix=prefix,
                    background_code=background_threshold is not None,
                    name=f"{prefix}quantizer",
                )
            )
            self.decoders.append(make_decoder(self.coding_size, grids, channels, residual_blocks, level))
        self.reconstruction_loss = keras.metrics.Mean(name="reconstruction")
        self.ssim_metric = keras.metrics.Mean(name="ssim")
        self(keras.Input((image_size, image_size, 1)))  # creates the weights

    def call(self, images: Tensor, training: bool = False) -> Tensor:
        """Reconstruct images.

        Args:
            images: (B, H, W, 1) in [0, 1].
            training: Whether to update the codebooks, apply bottom dropout, and leave the output unclipped.

        Returns:
            (B, H, W, 1) float32, clipped to [0, 1] except in training.
        """
        images, decoded = self._shrink(images), None
        for level, features in enumerate(self.features(images)):
            vectors = self.projections[level](concatenate(features, decoded))
            quantized, _ = self.quantizers[level](vectors, self.background(images, level), training=training)
            if training and level:
                quantized = self._drop_bottom(quantized)
            decoded = self.decoders[level](concatenate(quantized, decoded))
        reconstructions = resize(decoded, self.image_size)
        if self.background_threshold is not None:
            reconstructions = blacken(reconstructions, self.background(images, len(self.grids) - 1))
        return reconstructions if training else ops.clip(reconstructions, 0, 1)

    def _shrink(self, images: Tensor) -> Tensor:
        """Resize images (B, H, W, 1) to the coding size."""
        return images if images.shape[1] == self.coding_size else ops.clip(resize(images, self.coding_size), 0, 1)

    def background(self, images: Tensor, level: int) -> Tensor:
        """Return which cells of a level's grid show nothing but background.

        Args:
            images: (B, S, S, 1) with S the coding size.
            level: Index of the level.

        Returns:
            (B, h, w) bool.
        """
        grid, side = self.grids[level], self.coding_size // self.grids[level]
        brightest = ops.max(ops.reshape(images, (-1, grid, side, grid, side)), axis=(2, 4))
        return brightest <= (self.background_threshold or 0)

    def _drop_bottom(self, quantized: Tensor) -> Tensor:
        """Replace the vectors (B, h, w, D) of random images by the mean of all vectors of the batch."""
        mean = ops.stop_gradient(ops.mean(quantized, axis=(0, 1, 2), keepdims=True))
        mean = sum_over_replicas(mean) / replica_index_and_count()[1]
        uniforms = own_rows(
            lambda n: keras.random.uniform((n, 1, 1, 1), seed=self.seed_generator), ops.shape(quantized)[0]
        )
        return ops.where(uniforms < self.bottom_dropout, mean, quantized)

    def features(self, images: Tensor) -> list[Tensor]:
        """Return the output of every encoder, (B, h, w, C) for each level, coarsest first.

        `images` have the coding size S: (B, S, S, 1).
        """
        outputs: list[Tensor] = []
        for encoder in reversed(self.encoders):
            outputs.append(encoder(outputs[-1] if outputs else images))
        return outputs[::-1]

    def encode(self, images: Tensor) -> list[Tensor]:
        """Encode images as code indices.

        Args:
            images: (B, H, W, 1) in [0, 1].

        Returns:
            (B, h, w) int32 for each level, coarsest first.
        """
        images, decoded, codes = self._shrink(images), None, []
        for level, features in enumerate(self.features(images)):
            vectors = self.projections[level](concatenate(features, decoded))
            codes.append(self.quantizers[level].nearest(vectors, self.background(images, level)))
            if level + 1 < len(self.grids):  # only the finer levels need what this one decodes
                decoded = self.decoders[level](concatenate(self.quantizers[level].lookup(codes[-1]), decoded))
        return codes

    def decode(self, quantized: Sequence[Tensor]) -> Tensor:
        """Decode quantized vectors.

        Args:
            quantized: (B, h, w, D) for each level, coarsest first.

        Returns:
            Images (B, H, W, 1) float32 in [0, 1].
        """
        return decode_vectors(self.decoders, quantized, self.image_size, self.background_threshold is not None)

    def decode_code(self, codes: Sequence[Tensor]) -> Tensor:
        """Decode code indices.

        Args:
            codes: (B, h, w) int32 for each level, coarsest first.

        Returns:
            Images (B, H, W, 1) float32 in [0, 1].
        """
        return self.decode([layer.lookup(indices) for layer, indices in zip(self.quantizers, codes, strict=True)])

    def compute_loss(
        self,
        x: Tensor = None,
        y: Tensor = None,
        y_pred: Tensor = None,
        sample_weight: Tensor = None,
        training: bool = True,
    ) -> Tensor:
        """Return the loss (equation 3 of van den Oord et al. 2017), a scalar, and update the metrics.

        Args:
            x: Images (B, H, W, 1) in [0, 1].
            y: Ignored. The input pipeline yields slice positions here.
            y_pred: Reconstructions (B, H, W, 1).
            sample_weight, training: Ignored.
        """
        error = y_pred - x
        reconstruction = (
            self.mse_weight / self.data_variance * ops.mean(ops.square(error))
            + self.l1_weight * ops.mean(ops.abs(error))
            + self.ssim_weight * (1 - ops.mean(ssim_map(x, y_pred)))
        )
        self.reconstruction_loss.update_state(reconstruction, sample_weight=ops.shape(x)[0])
        self.ssim_metric.update_state(ssim(x, ops.clip(y_pred, 0, 1)))
        quantization = sum(quantizer.loss_and_metrics() for quantizer in self.quantizers)
        # Keras sums the gradients of all replicas
        return (reconstruction + quantization) / replica_index_and_count()[1]

    def get_config(self) -> dict[str, Any]:
        return {**self.settings, "name": self.name}


def decode_vectors(
    decoders: Sequence[keras.Model], quantized: Sequence[Tensor], image_size: int, background_code: bool
) -> Tensor:
    """Decode quantized vectors; see `VQVAE.decode`.

    Args:
        decoders: The decoder of each level, the coarsest first.
        quantized: (B, h, w, D) for each level.
        image_size: Height and width of the images.
        background_code: Whether cells of the finest grid whose vector is zero, that of code 0, are decoded to black.

    Returns:
        Images (B, H, W, 1) float32 in [0, 1].
    """
    decoded = None
    for decoder, vectors in zip(decoders, quantized, strict=True):
        decoded = decoder(concatenate(vectors, decoded))
    images = ops.clip(resize(decoded, image_size), 0, 1)
    return blacken(images, ops.all(quantized[-1] == 0, axis=-1)) if background_code else images


def concatenate(features: Tensor, decoded: Tensor | None) -> Tensor:
    """Concatenate features with the output of the coarser level's decoder, if there is one, along the channels."""
    return features if decoded is None else ops.concatenate([features, ops.cast(decoded, features.dtype)], axis=-1)


def blacken(images: Tensor, background: Tensor) -> Tensor:
    """Set the pixels of images (B, H, W, 1) to zero whose cells of a grid are background, (B, h, w) bool."""
    side = images.shape[1] // background.shape[1]
    background = ops.repeat(ops.repeat(background[..., None], side, axis=1), side, axis=2)
    return ops.where(background, 0.0, images)


def make_decoder(
    coding_size: int, grids: Sequence[int], channels: int, residual_blocks: int, level: int
) -> keras.Sequential:
    """Return the untrained decoder of a level; see `VQVAE`. Level 0 is the coarsest, and the last decodes images."""
    widths, blocks = _widths_and_blocks(coding_size, grids, channels, residual_blocks, level)
    output_channels = 1 if level == len(grids) - 1 else 2 * channels
    return _decoder(widths, blocks, output_channels, f"{level_prefixes(len(grids))[level]}decoder")


def _widths_and_blocks(
    coding_size: int, grids: Sequence[int], channels: int, residual_blocks: int, level: int
) -> tuple[list[int], list[int]]:
    """Return the number of channels and of residual blocks after each halving of a level's encoder."""
    finer = [*grids[1:], coding_size][level]
    halvings = int(math.log2(finer // grids[level]))
    widths = [2 * channels] * halvings
    if finer == coding_size:
        narrow = max(1, halvings - 2)  # convolutions at high resolution, which cost most and need few channels
        widths[:narrow] = [max(1, channels >> i) for i in reversed(range(narrow))]
    return widths, [0] * (halvings - 2) + [-(-residual_blocks // 2), residual_blocks][-halvings:]


def _encoder(widths: list[int], blocks: list[int], name: str) -> keras.Sequential:
    """Return an encoder that halves its input once per entry.

    Args:
        widths: Number of channels after each halving.
        blocks: Number of residual blocks after each halving.
        name: Name of the encoder.
    """
    stack = []
    for i, (width, num_blocks) in enumerate(zip(widths, blocks, strict=True)):
        options = {"padding": "same", "kernel_initializer": "he_normal", "name": f"down_{i}"}
        stack.append(keras.layers.Conv2D(width, 4, strides=2, **options))
        stack += [ResidualBlock(width, name=f"block_{i}_{j}") for j in range(num_blocks)]
        stack.append(keras.layers.ReLU(name=f"relu_{i}"))
    return keras.Sequential(stack, name=name)


def _decoder(widths: list[int], blocks: list[int], output_channels: int, name: str) -> keras.Sequential:
    """Return the decoder that mirrors `_encoder(widths, blocks, name)` and has this number of output channels."""
    options = {"padding": "same", "kernel_initializer": "he_normal"}
    stack = [keras.layers.Conv2D(widths[-1], 3, **options, name="first")]
    outputs = [output_channels, *widths[:-1]]
    for i, (width, num_blocks, output) in enumerate(zip(widths[::-1], blocks[::-1], outputs[::-1], strict=True)):
        stack += [ResidualBlock(width, name=f"block_{i}_{j}") for j in range(num_blocks)]
        stack.append(keras.layers.ReLU(name=f"relu_{i}"))
        stack.append(keras.layers.Conv2DTranspose(output, 4, strides=2, **options, name=f"up_{i}"))
    return keras.Sequential(stack, name=name)


# ---------------------------------------------------------------------------------------------- prior


@keras.saving.register_keras_serializable(PACKAGE)
class PixelCNN(keras.Model):
    """Autoregressive prior over the code indices of one level.

    The model factorises the probability of a grid of codes in raster order:

        log p(codes) = Σ_i log p(code_i | earlier codes, slice position, codes of the coarser level).

    With `gated=True` it is the gated PixelCNN, whose vertical and horizontal stacks leave no blind spot. With
    `gated=False` it is the plain PixelCNN. Both start with a 7 × 7 convolution of mask A, followed by residual blocks
    of mask B, whose dilations are chosen by `block_dilations` so that the receptive field covers the whole grid.

    After every `num_blocks / attention` blocks there is a layer of causal self-attention (PixelSNAIL, Chen et al.
    2018).

    The model can be trained on codes of augmented images, conditioned on the parameters of the augmentation
    (distribution augmentation, Jun et al. 2020). Without these parameters, it models images that are not augmented.

    With two levels, the top codes have a prior of their own, and the bottom prior is conditioned on the top codes: a
    small convolutional network upsamples them for every block (Razavi et al. 2019, section 3.2).

    The model is trained with cross-entropy: the loss is in nats per code, and the metric `bits_per_code` is the same in
    bits per code.

    Args:
        num_embeddings: Number of codes, K.
        grid_size: (h, w) of the code grid.
        filters: Number of channels.
        num_blocks: Number of residual blocks.
        kernel_size: Kernel size of the masked convolutions in the blocks, odd.
        dropout: Dropout rate in the blocks.
        gated: Whether the model is the gated or the plain PixelCNN.
        use_position: Whether the model is conditioned on the slice position. If not, positions are ignored.
        attention: Number of attention layers, at most `num_blocks`. Only the gated PixelCNN can have any.
        coarse_grid_size: (h', w') of the coarser level whose codes the model is conditioned on, with h / h' a power of
            two. None without a coarser level.

    Raises:
        ValueError: If there are too few blocks for the receptive field to cover the grid, or attention without gates.

    Example: For codes (B, 12, 12) int32, slice positions (B,) int32, coarse codes (B, 6, 6) int32, and K = 512:

        model({"codes": codes, "positions": positions})                    -> logits (B, 12, 12, 512) float32
        model({"codes": codes, "positions": positions, "coarse": coarse})  the same for a bottom prior
    """

    FIRST_KERNEL = 7  # kernel size of the first convolution

    def __init__(
        self,
        num_embeddings: int,
        grid_size: Sequence[int],
        filters: int = 128,
        num_blocks: int = 6,
        kernel_size: int = 3,
        dropout: float = 0.1,
        gated: bool = True,
        use_position: bool = True,
        attention: int = 0,
        coarse_grid_size: Sequence[int] | None = None,
        name: str = "prior",
        **kwargs: Any,
    ) -> None:
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
            "attention": attention,
        }
        self.num_embeddings, self.grid_size = num_embeddings, tuple(grid_size)
        self.coarse_grid_size = tuple(coarse_grid_size) if coarse_grid_size else None
        self.use_position = use_position

        if attention and not gated:
            raise ValueError("the plain PixelCNN has no attention: set gated, or attention to 0")
        dilations = block_dilations(max(grid_size), self.FIRST_KERNEL, kernel_size, num_blocks)
        self.embedding = keras.layers.Embedding(num_embeddings, filters, name="embedding")
        self.slice_embedding = keras.layers.Dense(filters, activation="relu", name="slice_embedding")
        self.coarse_network = None
        if coarse_grid_size:
            ratio = grid_size[0] // coarse_grid_size[0]
            self.coarse_network = keras.Sequential(
                [
                    # Without the type, mixed precision would round the code indices.
                    keras.Input(coarse_grid_size, dtype="int32"),
                    keras.layers.Embedding(num_embeddings, filters, name="embedding"),
                    ResidualBlock(filters, name="block_0"),
                    ResidualBlock(filters, name="block_1"),
                    keras.layers.ReLU(name="relu"),
                    keras.layers.Conv2DTranspose(filters, 2 * ratio, strides=ratio, padding="same", name="up"),
                ],
                name="coarse",
            )
        self.stem = Stem(filters, self.FIRST_KERNEL, grid_size, gated, name="stem")
        self.blocks: list[GatedBlock | PlainBlock | CausalAttention] = []
        for i, dilation in enumerate(dilations):
            if gated:
                last = i == num_blocks - 1
                block = GatedBlock(filters, kernel_size, dilation, dropout, last, name=f"block_{i}")
            else:
                block = PlainBlock(filters, kernel_size, dilation, dropout, name=f"block_{i}")
            self.blocks.append(block)
            if (i + 1) * attention // num_blocks > i * attention // num_blocks:
                self.blocks.append(CausalAttention(filters, dropout=dropout, name=f"attention_{i}"))
        self.hidden = keras.layers.Dense(filters, activation="relu", name="hidden")
        self.logits = keras.layers.Dense(num_embeddings, dtype="float32", name="logits")
        self.bits_per_code = keras.metrics.Mean(name="bits_per_code")
        shapes = {"codes": grid_size, "positions": (), **({"coarse": coarse_grid_size} if coarse_grid_size else {})}
        self({key: keras.Input(shape, dtype="int32") for key, shape in shapes.items()})  # creates the weights

    def call(self, inputs: Mapping[str, Tensor], training: bool = False) -> Tensor:
        """Compute the logits of every code given the earlier ones.

        Args:
            inputs: "codes", code indices (B, h, w) int32, and what `condition` reads.
            training: Whether dropout is active.

        Returns:
            (B, h, w, K) float32.
        """
        condition = self.condition(inputs)
        stacks = self.stem(self.embedding(inputs["codes"]))
        for block in self.blocks:
            stacks = block(stacks, condition, training=training)
        return self.head(stacks[-1])

    def head(self, features: Tensor) -> Tensor:
        """Return the logits of features: (..., filters) -> (..., K) float32."""
        return self.logits(self.hidden(ops.relu(features)))

    def condition(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return the features that every block is conditioned on.

        Args:
            inputs: What `slice_features` reads and, for a bottom prior, "coarse", codes of the coarser level (B, h',
                w') int32.

        Returns:
            (B, 1, 1, filters), or (B, h, w, filters) with coarse codes.
        """
        condition = self.slice_embedding(slice_features(inputs, self.use_position))[:, None, None, :]
        if self.coarse_network is None:
            return condition
        return condition + self.coarse_network(inputs["coarse"])

    def compute_loss(
        self,
        x: Tensor = None,
        y: Tensor = None,
        y_pred: Tensor = None,
        sample_weight: Tensor = None,
        training: bool = True,
    ) -> Tensor:
        """Return the mean cross-entropy in nats per code, a scalar, and update the metric.

        Args:
            x: Ignored.
            y: Code indices (B, h, w).
            y_pred: Logits (B, h, w, K).
            sample_weight, training: Ignored.
        """
        nats = ops.mean(keras.losses.sparse_categorical_crossentropy(y, y_pred, from_logits=True))
        self.bits_per_code.update_state(nats / math.log(2), sample_weight=ops.shape(y)[0])
        return nats / replica_index_and_count()[1]  # Keras sums the gradients of all replicas

    def get_config(self) -> dict[str, Any]:
        return {**self.settings, "name": self.name}


def slice_features(inputs: Mapping[str, Tensor], use_position: bool) -> Tensor:
    """Return features of the slice position and the augmentation.

    Args:
        inputs: "positions", slice positions (B,); and, for augmented images, "augmentation", the parameters (B, P)
            float32 of `augmentation.as_condition`, which are zero for images that are not augmented.
        use_position: Whether the position is used. If not, its features are zero.

    Returns:
        (B, F) float32.
    """
    waves = position_features(inputs["positions"])
    waves = waves if use_position else ops.zeros_like(waves)
    augmentation = inputs.get("augmentation")
    if augmentation is None:
        augmentation = ops.zeros((ops.shape(waves)[0], NUM_PARAMETERS))
    return ops.concatenate([waves, augmentation], axis=-1)


def block_dilations(grid_size: int, first_kernel: int, kernel_size: int, num_blocks: int) -> list[int]:
    """Return the dilations of the blocks: 1, 2, 4, …, in the shortest cycle whose receptive field covers the grid.

    Args:
        grid_size: The larger of height and width of the grid.
        first_kernel: Kernel size of the first convolution.
        kernel_size: Kernel size of the blocks.
        num_blocks: Number of blocks.

    Returns:
        One dilation per block.

    Raises:
        ValueError: If no cycle is long enough.

    Example: On a grid of 12, six blocks with 3 × 3 kernels after a 7 × 7 kernel have the dilations 1, 2, 1, 2, 1, 2.
    """
    for cycle in range(1, num_blocks + 1):
        dilations = [2 ** (i % cycle) for i in range(num_blocks)]
        if first_kernel // 2 + kernel_size // 2 * sum(dilations) >= grid_size - 1:
            return dilations
    raise ValueError(
        f"too few blocks ({num_blocks}) for the receptive field to cover a grid of size {grid_size}: use more blocks"
    )
