"""The stages of a configuration: its untrained networks, and how each of them is trained."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
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
from selector import Selector
from training import Stage, dtype_policy

Slices = dict[str, dataset.Slices]  # By split.
Codes = dict[str, list[np.ndarray]]  # Code indices by split, (N, h, w) int32 per level.
NUM_PREVIEWED = 8  # Validation slices in a preview.
NUM_SCALED = 500  # Training slices that determine the scales of the detail.
NUM_PROPOSED = 9  # Epochs for which the selector gets new proposals.

# --------------------------------------------------------------------------------------------- networks


def makers(config: Any) -> dict[str, Callable[[], keras.Model]]:
    """Functions that make the untrained networks of a run, by name, except for the sharp decoder.

    The sharp decoder always begins as a copy of the VQ-VAE's.
    """
    num_levels = len(config.grids)
    found: dict[str, Callable[[], keras.Model]] = {"vqvae": lambda: make_vqvae(config, data_variance=1.0)}
    for make, names in ((make_prior, model.prior_names(num_levels)), (make_critic, model.critic_names(num_levels))):
        found |= {name: functools.partial(make, config, level) for level, name in enumerate(names)}
    if config.selector_epochs:
        found["selector"] = lambda: make_selector(config, make_vqvae(config, data_variance=1.0))
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
        coding_size=config.coding_size,
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


def make_selector(config: Any, vqvae: model.VQVAE) -> Selector:
    """The untrained selector for the codes of a VQ-VAE."""
    keras.utils.set_random_seed(seeds.number(config.seed, "weights of the selector"))
    return Selector.untrained(vqvae, use_position=config.prior_uses_position)


def make_decoder_tuning(config: Any, vqvae: model.VQVAE, detail_scales: Sequence[float]) -> sharp.DecoderTuning:
    """What trains the sharp decoder of a VQ-VAE: the untrained decoder and its loss."""
    keras.utils.set_random_seed(seeds.number(config.seed, "weights of the sharp decoder"))
    decoder = sharp.SharpDecoder.untrained(vqvae, detail_channels=config.decoder_channels, detail_scales=detail_scales)
    return sharp.DecoderTuning(decoder, config.seed)


def with_precision(decoder: sharp.SharpDecoder, precision: str) -> sharp.SharpDecoder:
    """Return a copy of a sharp decoder whose velocity network computes with this Keras dtype policy.

    Drawing spends most of its time in this network. Everything else computes in float32.
    """
    with dtype_policy(precision):
        velocity = sharp.VelocityNetwork.from_config(decoder.velocity.get_config())
    copy = sharp.SharpDecoder(**decoder.settings, velocity=velocity)
    copy.set_weights(decoder.get_weights())
    return copy


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
        validation=lambda: dataset.image_batches(slices["validate"], config.batch_size, shard=shard),
        steps=dataset.steps_per_epoch(len(train), config.batch_size),
        monitor="val_reconstruction",
        epochs=config.vqvae_epochs,
        learning_rate=config.vqvae_learning_rate,
        preview=lambda network: preview_of_vqvae(config, slices, network),
        shown=("reconstruction", "ssim"),
        learning_rate_option="vqvae_learning_rate",
    )


def prior_stage(config: Any, slices: Slices, codes: Codes, generator: Generator, critic: bool = False) -> Stage:
    """How the next prior, or critic, of a generator is trained on code indices.

    The generator has the priors of all coarser levels. With `prior_augment` the slices are augmented and encoded anew
    for each epoch.
    """
    shard, num_levels, positions = devices.process_index_and_count(), len(config.grids), slices["train"].positions
    level = len(generator.priors)
    names = model.critic_names(num_levels) if critic else model.prior_names(num_levels)
    draws = None
    if config.prior_augment:  # Alike for all levels.
        draws = seeds.number(config.seed, f"augmentation for the {'critic' if critic else 'prior'}")

    def inputs(codes: list[np.ndarray], positions: np.ndarray) -> dict[str, np.ndarray]:
        return {"codes": codes[level], "positions": positions} | ({"coarse": codes[level - 1]} if level else {})

    def batches(epoch: int) -> Any:
        own, condition = training_codes(slices, codes, generator, draws, epoch)
        order = seeds.number(config.seed, names[level])
        drawn = inputs(own, positions) | {"augmentation": condition}
        return dataset.input_batches(drawn, "codes", config.batch_size, order, epoch, shard)

    def preview(network: keras.Model) -> np.ndarray:
        return preview_of_prior(config, slices, generator.replace(priors=[*generator.priors, network]))

    validation = inputs(codes["validate"], slices["validate"].positions)
    return Stage(
        name=names[level],
        make=lambda: make_critic(config, level) if critic else make_prior(config, level),
        batches=batches,
        validation=lambda: dataset.input_batches(validation, "codes", config.batch_size, shard=shard),
        steps=dataset.steps_per_epoch(len(positions), config.batch_size),
        monitor="val_loss",
        epochs=critic_epochs(config) if critic else config.prior_epochs,
        learning_rate=config.prior_learning_rate,
        made_from=("slices", "vqvae.keras"),
        preview=None if critic or level < num_levels - 1 else preview,
        shown=("bits_per_code",),
        learning_rate_option="prior_learning_rate",
    )


def training_codes(
    slices: Slices, codes: Codes, generator: Generator, draws: int | None, epoch: int
) -> tuple[list[np.ndarray], np.ndarray]:
    """Augment and encode the training slices.

    Args:
        draws: Seed of the augmentations; None: the slices are not augmented.
        epoch: Number of the epoch, from 0.

    Returns:
        Code indices, (N, h, w) int32 per level; and the augmentations, (N, P) float32, see `augmentation.as_condition`.
    """
    images = slices["train"].images
    if draws is None:
        return codes["train"], np.zeros((len(images), augmentation.NUM_PARAMETERS), np.float32)
    parameters = {name: values.numpy() for name, values in augmentation.draw(len(images), draws, epoch).items()}
    return generator.encode(images, parameters), augmentation.as_condition(parameters).numpy()


def selector_stage(config: Any, slices: Slices, codes: Codes, generator: Generator) -> Stage:
    """How the selector is trained: on code grids of real slices, and on as many that the priors propose.

    For each real slice, a grid is proposed for the same position and the same augmentation. Both are new for each of
    `NUM_PROPOSED` epochs, which are then repeated, because sampling takes longer than training. The slices of the first
    one are not augmented: the selector must know such slices, too, as it is used for them.
    """
    shard = devices.process_index_and_count()
    draws = seeds.number(config.seed, "augmentation for the selector") if config.prior_augment else None
    train, validate = (slices[split].positions for split in ("train", "validate"))

    def inputs(
        real: list[np.ndarray], positions: np.ndarray, condition: np.ndarray | None, purpose: str
    ) -> dict[str, np.ndarray]:
        proposed = generator.propose_codes(positions, config.seed, purpose=purpose, augmentation=condition)
        levels = {f"codes_{i}": np.concatenate(both) for i, both in enumerate(zip(real, proposed, strict=True))}
        shared = {"positions": positions} | ({} if condition is None else {"augmentation": condition})
        shared = {name: np.concatenate([array, array]) for name, array in shared.items()}
        return levels | shared | {"is_real": np.repeat(np.array([1, 0], np.float32), len(positions))}

    @functools.cache
    def drawn(number: int) -> dict[str, np.ndarray]:
        real, condition = training_codes(slices, codes, generator, draws if number else None, number)
        return inputs(real, train, condition, f"set {number} of the selector")

    def batches(epoch: int) -> Any:
        order = seeds.number(config.seed, "selector")
        return dataset.input_batches(drawn(epoch % NUM_PROPOSED), "is_real", 2 * config.batch_size, order, epoch, shard)

    @functools.cache
    def judged() -> dict[str, np.ndarray]:
        return inputs(codes["validate"], validate, None, "validation of the selector")

    return Stage(
        name="selector",
        make=lambda: make_selector(config, generator.vqvae),
        batches=batches,
        validation=lambda: dataset.input_batches(judged(), "is_real", 2 * config.batch_size, shard=shard),
        steps=dataset.steps_per_epoch(2 * len(train), 2 * config.batch_size),
        monitor="val_loss",
        epochs=config.selector_epochs,
        learning_rate=config.prior_learning_rate,
        made_from=("slices", *(f"{name}.keras" for name in ("vqvae", *model.prior_names(len(config.grids))))),
        shown=("loss", "accuracy"),
        learning_rate_option="prior_learning_rate",
    )


def decoder_stage(config: Any, slices: Slices, codes: Codes, generator: Generator) -> Stage:
    """How the sharp decoder is trained: on slices and their codes."""
    shard, train = devices.process_index_and_count(), slices["train"]
    # Some slices, spread evenly, suffice for the scales.
    some = np.unique(np.linspace(0, len(train) - 1, NUM_SCALED).astype(int))
    scales = sharp.detail_scales(train.images[some], generator.decode([level[some] for level in codes["train"]]))

    def inputs(split: str) -> dict[str, np.ndarray]:
        levels = {f"codes_{level}": indices for level, indices in enumerate(codes[split])}
        return {"positions": slices[split].positions, "images": slices[split].images, **levels}

    def batches(epoch: int) -> Any:
        order = seeds.number(config.seed, "decoder")
        return dataset.input_batches(inputs("train"), "positions", config.decoder_batch_size, order, epoch, shard)

    return Stage(
        name="decoder",
        make=lambda: make_decoder_tuning(config, generator.vqvae, scales),
        batches=batches,
        validation=lambda: dataset.input_batches(
            inputs("validate"), "positions", config.decoder_batch_size, shard=shard
        ),
        steps=dataset.steps_per_epoch(len(train), config.decoder_batch_size),
        monitor="val_loss",
        epochs=config.decoder_epochs,
        learning_rate=config.decoder_learning_rate,
        part=lambda network: network.decoder,
        preview=lambda network: preview_of_decoder(config, slices, codes, generator.replace(decoder=network.decoder)),
        made_from=("slices", "vqvae.keras"),
        learning_rate_option="decoder_learning_rate",
    )


# ----------------------------------------------------------------------------------------------- previews


def preview_of_vqvae(config: Any, slices: Slices, vqvae: model.VQVAE) -> np.ndarray:
    """Draw validation slices above their reconstructions; see `Stage.preview`."""
    images = slices["validate"].images[_previewed(slices)]
    encoder = Generator(vqvae, [], np.unique(slices["train"].positions), config.batch_size)
    return _sheet(dataset.to_float(images), encoder.reconstruct(images))


def preview_of_prior(config: Any, slices: Slices, generator: Generator) -> np.ndarray:
    """Draw validation slices above two samples at the position of each."""
    images, positions = (getattr(slices["validate"], name)[_previewed(slices)] for name in ("images", "positions"))
    samples = generator.sample(np.tile(positions, 2), config.seed, purpose="previews")
    return _sheet(dataset.to_float(images), *np.split(samples, 2))


def preview_of_decoder(config: Any, slices: Slices, codes: Codes, generator: Generator) -> np.ndarray:
    """Draw validation slices, their reconstructions by both decoders, and samples of the sharp decoder."""
    index = _previewed(slices)
    images, positions = (getattr(slices["validate"], name)[index] for name in ("images", "positions"))
    own = [indices[index] for indices in codes["validate"]]
    samples = generator.sample(positions, config.seed, purpose="previews")
    return _sheet(
        dataset.to_float(images), generator.decode(own), generator.draw(own, config.seed, "previews"), samples
    )


def _previewed(slices: Slices) -> np.ndarray:
    """Indices of the validation slices that previews show."""
    return dataset.spread_over_positions(slices["validate"].positions, NUM_PREVIEWED)


def _sheet(*rows: np.ndarray) -> np.ndarray:
    """Place rows of images, (N, H, W, 1) each, below one another: one image, (R · H, N · W)."""
    return np.concatenate([np.concatenate(list(row[..., 0]), axis=1) for row in rows])
