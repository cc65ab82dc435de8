"""The untrained networks of a configuration."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import keras

import model
import seeds


def makers(config: Any) -> dict[str, Callable[[], keras.Model]]:
    """Functions that make the untrained networks of a run, by name, in the order of training."""
    num_levels = len(config.grids)
    found: dict[str, Callable[[], keras.Model]] = {"vqvae": lambda: make_vqvae(config, data_variance=1.0)}
    for make, names in ((make_prior, model.prior_names(num_levels)), (make_critic, model.critic_names(num_levels))):
        found |= {name: functools.partial(make, config, level) for level, name in enumerate(names)}
    return found


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
        seed=config.seed,
    )


def make_critic(config: Any, level: int = 0) -> model.PixelCNN:
    """The untrained critic of a level: a gated prior with half of the prior's channels, and weights of its own."""
    filters = {name: max(getattr(config, name) // 2, 8) for name in ("prior_filters", "bottom_prior_filters")}
    return make_prior(dataclasses.replace(config, prior="gated", **filters), level, "weights of the critic")


def make_prior(config: Any, level: int = 0, purpose: str = "weights of the prior") -> model.PixelCNN:
    """The untrained prior of a level; level 0 is the coarsest. `purpose` names the stream of its initial weights."""
    keras.utils.set_random_seed(seeds.number(config.seed, purpose, level))
    return model.PixelCNN(
        num_embeddings=config.num_embeddings,
        grid_size=(config.grids[level],) * 2,
        filters=config.bottom_prior_filters if level else config.prior_filters,
        num_blocks=config.prior_blocks,
        kernel_size=config.prior_kernel_size,
        dropout=config.prior_dropout,
        gated=config.prior == "gated",
        use_position=config.prior_uses_position,
        coarse_grid_size=(config.grids[level - 1],) * 2 if level else None,
    )
