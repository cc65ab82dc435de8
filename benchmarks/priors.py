"""Priors compared on the codes of subjects they have not seen: how they are built, and how they are trained.

    python -m benchmarks.priors --run-dir runs/oasis96 [--epochs 3]

Trains variants of the prior of one level on the codes of a finished run, from the same seeds and for the same number of
epochs, and keeps the best epoch on the validation split. Prints the number of weights, the seconds per epoch, the bits
per code of unseen and of training subjects, and by how much the former differ from those of the first variant: the mean
over slices and seeds, paired by slice, with its 95 % interval over subjects, and its standard deviation over seeds. A
difference between two single trainings says little. The run folder is only read.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import keras
import numpy as np
import tensorflow as tf
from keras import ops

import callbacks
import dataset
import driver
import model
import seeds
import stages
import training
import two_sample
from benchmarks import common
from generator import Generator
from options import ConfigError
from run import RunError

NEIGHBOURS = 4  # Codes among which soft targets distribute their probability.


@dataclass(frozen=True)
class Options:
    """What to train, and for how long."""

    run_dir: Path  # a finished run
    level: int = 0  # whose codes to train on; 0 is the coarsest
    epochs: int = 3
    seeds: int = 1  # number of trainings of each variant
    variants: tuple[str, ...] = ()  # names of the variants to train; all by default. The first is the reference.
    split: Literal["validate", "test"] = "validate"  # to measure on; choose variants by the validation split
    precision: Literal["float32", "mixed_float16", "mixed_bfloat16"] = "float32"  # of training


@dataclass(frozen=True)
class Variant:
    """A prior, and how it is trained if that differs from what the driver does.

    Attributes:
        config: Its constants.
        make: Makes it untrained.
        weight_decay: That of AdamW (Loshchilov and Hutter 2019).
        momentum: That of a moving average of the weights, which is validated and kept instead of the weights.
        input_noise: Fraction of the input codes that are replaced by random ones in training.
        soft_targets: Probability that the targets give to the `NEIGHBOURS` codes nearest to the right one.
    """

    config: driver.Config
    make: Callable[[], model.PixelCNN]
    weight_decay: float = 0.0
    momentum: float = 0.0
    input_noise: float = 0.0
    soft_targets: float = 0.0


def variants(config: driver.Config, level: int) -> dict[str, Variant]:
    """Return the priors to compare, by name."""
    filters, attention = (f"{'bottom_' if level else ''}{name}" for name in ("prior_filters", "prior_attention"))

    def variant(**constants: Any) -> Variant:
        changed = dataclasses.replace(config, **constants)
        return Variant(changed, lambda: stages.make_prior(changed, level))

    def without_dilation() -> model.PixelCNN:
        with mock.patch.object(model, "block_dilations", lambda grid, first, kernel, blocks: [1] * blocks):
            return stages.make_prior(config, level)

    def without_top_level() -> model.PixelCNN:
        settings: dict[str, Any] = {**stages.make_prior(config, level).settings, "coarse_grid_size": None}
        keras.utils.set_random_seed(config.seed)
        return model.PixelCNN(**settings)

    usual = variant()
    priors = {
        "as configured": usual,
        "as in version 1": variant(prior_augment=False, prior_dropout=0.2, **{attention: 0}),
        "without augmentation": variant(prior_augment=False),
        "without attention": variant(**{attention: 0}),
        "plain": variant(prior="plain", **{attention: 0}),
        "weight average 0.99": dataclasses.replace(usual, momentum=0.99),
        "weight decay 0.05": dataclasses.replace(usual, weight_decay=0.05),
        "10 % random input codes": dataclasses.replace(usual, input_noise=0.1),
        "10 % soft targets": dataclasses.replace(usual, soft_targets=0.1),
        "dropout 0": variant(prior_dropout=0.0),
        "dropout 0.25": variant(prior_dropout=0.25),
        "half the filters": variant(**{filters: getattr(config, filters) // 2}),
        "1.5 times the filters": variant(**{filters: getattr(config, filters) * 3 // 2}),
        "1.5 times the blocks": variant(prior_blocks=config.prior_blocks * 3 // 2),
        "5 x 5 kernels": variant(prior_kernel_size=5),
        "without slice position": variant(prior_uses_position=False),
        "without dilation": dataclasses.replace(usual, make=without_dilation),
    }
    return priors | ({"without top level": dataclasses.replace(usual, make=without_top_level)} if level else {})


def main(options: Options) -> dict[str, Any]:
    """Train all variants and return their numbers by name."""
    config, saved = common.load_config(options.run_dir)
    check(options, config)
    slices = driver.load_slices(config)
    if dataset.fingerprint(slices) != saved["data"]:
        raise RunError(f"data_dir is {config.data_dir}: other slices than {options.run_dir} was trained on")
    generator = RememberingGenerator.load(options.run_dir)
    codes = {split: generator.encode(split_slices.images) for split, split_slices in slices.items()}
    known = tuple(variants(config, options.level))
    names = options.variants or known
    if unknown := set(names) - set(known):
        raise ConfigError(f"--variants {unknown.pop()}: no such variant; choose from {', '.join(known)}")
    numbers: dict[str, Any] = common.report_machine()
    print(
        f"{'prior':23} {'weights':>10} {'s per epoch':>11} {'bits per code':>13} {'training':>8}  "
        "difference from the first"
    )
    nats: dict[str, np.ndarray] = {}
    for name in names:
        seconds, measured, on_training = [], [], []
        for seed in range(config.seed, config.seed + options.seeds):
            start = time.monotonic()
            variant = variants(dataclasses.replace(config, seed=seed), options.level)[name]
            prior = train_prior(variant, slices, codes, generator, options)
            seconds.append((time.monotonic() - start) / options.epochs)
            measured.append(measure(prior, generator, codes, slices, options.split, options.level))
            on_training.append(measure(prior, generator, codes, slices, "train", options.level).mean())
        nats[name] = np.stack(measured)
        row = {
            "weights": prior.count_params(),
            "seconds": float(np.mean(seconds)),
            "training_bits_per_code": float(np.mean(on_training)) / math.log(2),
            **compare(nats[names[0]], nats[name], slices, options),
        }
        lower, upper = row["interval"]
        spread = f"± {row['spread']:.1%} over seeds" if options.seeds > 1 else "one seed"
        print(
            f"{name:23} {row['weights']:>10,} {row['seconds']:>11.0f} {row['bits_per_code']:>13.3f} "
            f"{row['training_bits_per_code']:>8.3f}  {row['difference']:+.1%} ({lower:+.1%} to {upper:+.1%}), {spread}",
            flush=True,
        )
        numbers[name] = row
    return numbers


def check(options: Options, config: driver.Config) -> None:
    """Raise ConfigError for options that cannot work with a run of this configuration."""
    if not 0 <= options.level < len(config.grids):
        raise ConfigError(f"level is {options.level}: must be 0 to {len(config.grids) - 1}, a level of the run")
    for name in ("epochs", "seeds"):
        if getattr(options, name) < 1:
            raise ConfigError(f"{name} is {getattr(options, name)}: must be at least 1")


class RememberingGenerator(Generator):
    """A generator that encodes the same slices with the same augmentation only once: variants share their draws."""

    def encode(self, images: np.ndarray, parameters: Mapping[str, np.ndarray] | None = None) -> list[np.ndarray]:
        """See `Generator.encode`."""
        self.remembered: dict[bytes, list[np.ndarray]] = getattr(self, "remembered", {})  # Copies of this one share it.
        if not parameters:
            return super().encode(images)
        key = parameters["angle"].tobytes()
        if key not in self.remembered:
            self.remembered[key] = super().encode(images, parameters)
        return self.remembered[key]


# -------------------------------------------------------------------------------------------------- training


def train_prior(
    variant: Variant, slices: driver.Slices, codes: driver.Codes, encoder: Generator, options: Options
) -> model.PixelCNN:
    """Train a prior and return it, in float32, with the weights of its best epoch."""
    config = dataclasses.replace(variant.config, prior_epochs=options.epochs)
    coarser = encoder.replace(priors=encoder.priors[: options.level])
    stage = stages.prior_stage(config, slices, codes, coarser)
    prior = variant.make()
    with training.dtype_policy(options.precision):
        trained = variant.make()
    if variant.soft_targets:
        codebook = ops.convert_to_numpy(encoder.vqvae.quantizers[options.level].embeddings)
        targets = soften(codebook, variant.soft_targets)
        trained.compute_loss = functools.partial(soft_loss, trained, targets)  # type: ignore[method-assign]
    optimizer = training.make_optimizer(stage.learning_rate, stage.epochs, stage.steps)
    if variant.weight_decay:
        rate = optimizer._learning_rate  # The schedule; `learning_rate` is its value now.
        optimizer = keras.optimizers.AdamW(rate, weight_decay=variant.weight_decay, global_clipnorm=1.0)
    trained.compile(optimizer)
    if variant.input_noise:
        stage = dataclasses.replace(stage, batches=functools.partial(add_noise, variant, stage.batches))
    checkpoint = callbacks.ResumableCheckpoint(None, stage.name, stage.monitor)
    average = [WeightAverage(variant.momentum)] if variant.momentum else []
    training.fit(trained, stage, 0, [callbacks.ReseedEachEpoch(config.seed), *average, checkpoint])
    prior.set_weights(checkpoint.best_weights)
    return prior


def add_noise(variant: Variant, batches: Callable[[int], tf.data.Dataset], epoch: int) -> tf.data.Dataset:
    """Return the batches of an epoch with some of the input codes replaced by random ones."""
    seed = seeds.number(variant.config.seed, "input noise", epoch)

    def replace(step: tf.Tensor, batch: tuple[dict[str, tf.Tensor], tf.Tensor]) -> tuple[Any, tf.Tensor]:
        inputs, targets = batch
        key, shape = tf.stack([tf.cast(seed, tf.int64), step]), tf.shape(targets)
        random = tf.random.stateless_uniform(shape, key + [0, 1 << 32], 0, variant.config.num_embeddings, tf.int32)
        replaced = tf.random.stateless_uniform(shape, key) < variant.input_noise
        return {**inputs, "codes": tf.where(replaced, random, targets)}, targets

    return batches(epoch).enumerate().map(replace)


def soften(codebook: np.ndarray, probability: float) -> np.ndarray:
    """Return the targets (K, K) for each right code that give some of the probability to the nearest codes.

    Args:
        codebook: (K, D).
        probability: What the `NEIGHBOURS` nearest codes share equally.
    """
    distances = np.square(codebook[:, None] - codebook).sum(axis=-1)
    np.fill_diagonal(distances, np.inf)
    targets = np.eye(len(codebook), dtype=np.float32) * (1 - probability)
    np.put_along_axis(targets, distances.argsort(axis=1)[:, :NEIGHBOURS], probability / NEIGHBOURS, axis=1)
    return targets


def soft_loss(
    prior: model.PixelCNN,
    targets: np.ndarray,
    x: Any = None,
    y: Any = None,
    y_pred: Any = None,
    sample_weight: Any = None,
    training: bool = True,
) -> Any:
    """Return the cross-entropy with soft targets (K, K) in training, the usual one in validation."""
    nats = model.PixelCNN.compute_loss(prior, x, y, y_pred, sample_weight, training)
    if not training:
        return nats
    return ops.mean(keras.losses.categorical_crossentropy(ops.take(targets, y, axis=0), y_pred, from_logits=True))


class WeightAverage(keras.callbacks.Callback):
    """Validates and keeps a moving average of the weights; training continues with the weights themselves.

    `keras.callbacks.SwapEMAWeights` starts anew in each call of `fit`, and the driver calls it once per epoch.

    Args:
        momentum: Weight of the old average in the new one.
    """

    def __init__(self, momentum: float) -> None:
        super().__init__()
        self.momentum = momentum
        self.average: list[np.ndarray] = []
        self.weights: list[np.ndarray] = []

    def on_epoch_begin(self, epoch: int, logs: callbacks.Logs | None = None) -> None:
        if self.weights:
            self.model.set_weights(self.weights)

    def on_train_batch_end(self, batch: int, logs: callbacks.Logs | None = None) -> None:
        weights = self.model.get_weights()
        pairs = zip(self.average or weights, weights, strict=True)
        self.average = [self.momentum * old + (1 - self.momentum) * new for old, new in pairs]

    def on_test_begin(self, logs: callbacks.Logs | None = None) -> None:
        self.weights = self.model.get_weights()
        self.model.set_weights(self.average)


# ------------------------------------------------------------------------------------------------- measuring


def measure(
    prior: model.PixelCNN, generator: Generator, codes: driver.Codes, slices: driver.Slices, split: str, level: int
) -> np.ndarray:
    """Return the nats per code of each slice of a split under the prior of a level, (N,)."""
    priors = [prior if index == level else other for index, other in enumerate(generator.priors)]
    return generator.replace(priors=priors).nats_per_code(codes[split], slices[split].positions)[level]


def compare(reference: np.ndarray, nats: np.ndarray, slices: driver.Slices, options: Options) -> dict[str, Any]:
    """Compare the nats per code of two variants, (seeds, N) each: relative to the reference, paired by slice."""
    mean = float(reference.mean())
    difference, interval = two_sample.paired_difference(
        reference.mean(axis=0) / mean, nats.mean(axis=0) / mean, slices[options.split].subjects
    )
    by_seed = (nats - reference).mean(axis=1) / mean
    return {
        "bits_per_code": float(nats.mean() / math.log(2)),
        "difference": difference,
        "interval": interval,
        "spread": float(by_seed.std(ddof=1)) if len(by_seed) > 1 else None,
    }


if __name__ == "__main__":
    common.run_benchmark(main, Options, __doc__)
