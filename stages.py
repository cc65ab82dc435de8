"""The stages of a configuration: its untrained networks, and how each of them is trained."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import keras
import numpy as np

import augmentation
import dataset
import devices
import model
import pngs
import seeds
import sharp
from generator import Generator
from training import Stage

Slices = dict[str, dataset.Slices]  # By split.
Codes = dict[str, list[np.ndarray]]  # Code indices by split, (N, h, w) int32 per level.

# --------------------------------------------------------------------------------------------- networks


def makers(config: Any) -> dict[str, Callable[[], keras.Model]]:
    """Functions that make the untrained networks of a run, by name, except for the sharp decoder.

    The sharp decoder always begins as a copy of the VQ-VAE's.
    """
    num_levels = len(config.grids)
    found: dict[str, Callable[[], keras.Model]] = {"vqvae": lambda: make_vqvae(config, data_variance=1.0)}
    for make, names in ((make_prior, model.prior_names(num_levels)), (make_critic, model.critic_names(num_levels))):
        found |= {name: functools.partial(make, config, level) for level, name in enumerate(names)}
    return found


def names(config: Any) -> list[str]:
    """Names of all networks of a run."""
    return [*makers(config), *(["decoder"] if config.decoder_epochs else [])]


def make_vqvae(config: Any, data_variance: float) -> model.VQVAE:
    """The untrained VQ-VAE for slices with this variance over all pixels."""
    keras.utils.set_random_seed(seeds.number(config.seed, "weights of the VQ-VAE"))
    return model.VQVAE(
        image_size=config.image_size,
        grids=config.grids,
        channels=config.channels,
        residual_blocks=config.residual_blocks,
        num_embeddings=config.num_embeddings,
        embedding_dim=config.embedding_dim,
        commitment_weight=config.commitment_weight,
        codebook=config.codebook,
        ema_decay=config.ema_decay,
        dead_code_threshold=config.dead_code_threshold,
        mse_weight=config.mse_weight,
        l1_weight=config.l1_weight,
        ssim_weight=config.ssim_weight,
        data_variance=data_variance,
        bottom_dropout=config.bottom_dropout,
        background_threshold=pngs.BRAIN_THRESHOLD if config.background_code else None,
        seed=config.seed,
    )


def make_critic(config: Any, level: int = 0) -> model.PixelCNN:
    """The untrained critic of a level: a gated prior with half of the prior's channels, and weights of its own."""
    filters = {name: max(getattr(config, name) // 2, 8) for name in ("prior_filters", "bottom_prior_filters")}
    return make_prior(dataclasses.replace(config, prior="gated", **filters), level, "weights of the critic")


def critic_epochs(config: Any) -> int:
    """Half of the prior's epochs. With half of its channels, the critic then takes less than a third of its time."""
    return max(1, config.prior_epochs // 2)


def make_prior(config: Any, level: int = 0, purpose: str = "weights of the prior") -> model.PixelCNN:
    """The untrained prior of a level; level 0 is the coarsest. `purpose` names the stream of its initial weights."""
    keras.utils.set_random_seed(seeds.number(config.seed, purpose, level))
    attention, gated = config.bottom_prior_attention if level else config.prior_attention, config.prior == "gated"
    return model.PixelCNN(
        num_embeddings=config.num_embeddings,
        grid_size=(config.grids[level],) * 2,
        filters=config.bottom_prior_filters if level else config.prior_filters,
        num_blocks=config.prior_blocks,
        kernel_size=config.prior_kernel_size,
        dropout=config.prior_dropout,
        gated=gated,
        use_position=config.prior_uses_position,
        attention=attention if gated else 0,
        coarse_grid_size=(config.grids[level - 1],) * 2 if level else None,
    )


def make_decoder_tuning(config: Any, vqvae: model.VQVAE, steps: int) -> sharp.DecoderTuning:
    """What trains the sharp decoder of a VQ-VAE: the untrained decoder and its discriminator."""
    keras.utils.set_random_seed(seeds.number(config.seed, "weights of the sharp decoder"))
    return sharp.DecoderTuning(
        sharp.SharpDecoder.untrained(vqvae),
        sharp.Discriminator(config.image_size),
        config.decoder_epochs * steps,
        config.adversarial_weight,
        config.seed,
    )


# ----------------------------------------------------------------------------------------------- training


def vqvae_stage(config: Any, slices: Slices) -> Stage:
    """How the VQ-VAE is trained."""
    train, shard = slices["train"], devices.process_index_and_count()
    variance = dataset.pixel_variance(train)
    return Stage(
        name="vqvae",
        make=lambda: make_vqvae(config, variance),
        batches=lambda epoch: dataset.image_batches(
            train, config.batch_size, config.seed, epoch, config.augment, shard
        ),
        validation=dataset.image_batches(slices["validate"], config.batch_size, shard=shard),
        steps=dataset.steps_per_epoch(len(train), config.batch_size),
        monitor="val_reconstruction",
        epochs=config.vqvae_epochs,
        learning_rate=config.vqvae_learning_rate,
        shown=("reconstruction", "ssim"),
        learning_rate_option="vqvae_learning_rate",
    )


def prior_stages(config: Any, slices: Slices, codes: Codes, encoder: Generator, critic: bool = False) -> list[Stage]:
    """How the priors, or the critics, are trained on code indices, the coarsest level first."""
    return [prior_stage(config, slices, codes, encoder, level, critic) for level in range(len(config.grids))]


def prior_stage(
    config: Any, slices: Slices, codes: Codes, encoder: Generator, level: int, critic: bool = False
) -> Stage:
    """How the prior, or the critic, of one level is trained on code indices; level 0 is the coarsest.

    With `prior_augment` the slices are augmented and encoded anew for each epoch.
    """
    shard, num_levels, train = devices.process_index_and_count(), len(config.grids), slices["train"]
    names = model.critic_names(num_levels) if critic else model.prior_names(num_levels)
    draws = seeds.number(config.seed, f"augmentation for the {'critic' if critic else 'prior'}")  # alike for all levels

    def inputs(codes: list[np.ndarray], positions: np.ndarray) -> dict[str, np.ndarray]:
        return {"codes": codes[level], "positions": positions} | ({"coarse": codes[level - 1]} if level else {})

    def batches(epoch: int) -> Any:
        if config.prior_augment:
            parameters = {k: v.numpy() for k, v in augmentation.draw(len(train), draws, epoch).items()}
            drawn = inputs(encoder.encode(train.images, parameters), train.positions)
            drawn["augmentation"] = augmentation.as_condition(parameters).numpy()
        else:
            drawn = inputs(codes["train"], train.positions)
        order = seeds.number(config.seed, names[level])
        return dataset.input_batches(drawn, "codes", config.batch_size, order, epoch, shard)

    validation = inputs(codes["validate"], slices["validate"].positions)
    return Stage(
        name=names[level],
        make=lambda: make_critic(config, level) if critic else make_prior(config, level),
        batches=batches,
        validation=dataset.input_batches(validation, "codes", config.batch_size, shard=shard),
        steps=dataset.steps_per_epoch(len(train), config.batch_size),
        monitor="val_loss",
        epochs=critic_epochs(config) if critic else config.prior_epochs,
        learning_rate=config.prior_learning_rate,
        made_from=("slices", "vqvae.keras"),
        shown=("bits_per_code",),
        learning_rate_option="prior_learning_rate",
    )


def decoder_stage(config: Any, slices: Slices, codes: Codes, generator: Generator) -> Stage:
    """How the sharp decoder is trained: on codes of training slices, and on as many drawn from the prior.

    In each epoch a random half of the training slices is decoded from their codes. For the other half, codes drawn at
    the same slice positions are decoded. They are drawn once, when they are first needed.
    """
    shard, train = devices.process_index_and_count(), slices["train"]
    steps = dataset.steps_per_epoch(len(train), config.batch_size)

    @functools.cache
    def drawn() -> tuple[list[np.ndarray], np.ndarray]:
        sampled = generator.sample_codes(train.positions, config.seed, purpose="training of the decoder")
        return sampled, (generator.decode(sampled) * 255).round().astype(np.uint8)

    def inputs(
        codes: list[np.ndarray], targets: np.ndarray, is_drawn: np.ndarray, split: dataset.Slices
    ) -> dict[str, np.ndarray]:
        named = {"positions": split.positions, "images": split.images, "targets": targets}
        levels = {f"codes_{level}": indices for level, indices in enumerate(codes)}
        return {**named, "drawn": is_drawn.astype(np.float32), **levels}

    def batches(epoch: int) -> Any:
        sampled, decoded = drawn()
        is_drawn = seeds.generator(config.seed, "slices with drawn codes", epoch).random(len(train)) < 0.5

        def choose(first: np.ndarray, second: np.ndarray) -> np.ndarray:
            return np.where(is_drawn.reshape(-1, *[1] * (first.ndim - 1)), first, second)

        chosen = [choose(own, other) for own, other in zip(sampled, codes["train"], strict=True)]
        named = inputs(chosen, choose(decoded, train.images), is_drawn, train)
        order = seeds.number(config.seed, "decoder")
        return dataset.input_batches(named, "positions", config.batch_size, order, epoch, shard)

    validate = slices["validate"]
    unseen = inputs(codes["validate"], validate.images, np.zeros(len(validate)), validate)
    return Stage(
        name="decoder",
        make=lambda: make_decoder_tuning(config, generator.vqvae, steps),
        batches=batches,
        validation=dataset.input_batches(unseen, "positions", config.batch_size, shard=shard),
        steps=steps,
        monitor=None,  # The decoder gets sharper to the end, and no term of its loss says so.
        accept=sharp.has_not_memorised,
        epochs=config.decoder_epochs,
        learning_rate=config.decoder_learning_rate,
        adam={
            "beta_1": 0.0,
            "global_clipnorm": None,
        },  # The discriminator's gradients are far larger than the decoder's.
        part=lambda network: network.decoder,
        made_from=("slices", "vqvae.keras", *(f"{name}.keras" for name in model.prior_names(len(config.grids)))),
        shown=("agreement", "discriminator"),
        learning_rate_option="decoder_learning_rate",
    )
