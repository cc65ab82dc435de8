"""How the networks of a configuration are trained: on which batches, and for how long."""

import dataclasses
import unittest.mock

import numpy as np
import pytest

import augmentation
import dataset
import driver
import phantom
import sharp
import stages
import training
from generator import Generator
from tests import test_generator


@pytest.fixture(scope="module", params=[(4,), (4, 8)], ids=["one level", "two levels"])
def encoded(request) -> tuple[driver.Config, driver.Slices, Generator, driver.Codes]:
    """Slices at a position each, and their codes by an untrained VQ-VAE."""
    config = driver.Config(
        image_size=32,
        grids=request.param,
        channels=8,
        num_embeddings=16,
        embedding_dim=4,
        batch_size=4,
        background_code=False,
        prior_filters=8,
        prior_blocks=3,
        prior_attention=1,
        prior_epochs=2,
    )
    images = np.stack([phantom.slice_image(0, subject, 6, 32)[..., None] for subject in range(12)])
    train = dataset.Slices(images, np.arange(12, dtype=np.int32), np.array(["case"] * 12))
    slices = {"train": train, "validate": dataset.Slices(images[:4], train.positions[:4], train.subjects[:4])}
    vqvae, random = stages.make_vqvae(config, 0.1), np.random.default_rng(0)
    for quantizer in vqvae.quantizers:
        quantizer.embeddings.assign(random.normal(0, 0.5, quantizer.embeddings.shape))
    encoder = Generator(vqvae, [], train.positions)
    return config, slices, encoder, {split: encoder.encode(some.images) for split, some in slices.items()}


def prior_stages(config, slices, codes, encoder, critic=False) -> list[training.Stage]:
    """The stages of the priors, or critics, of all levels."""
    priors = [stages.make_prior(config, level) for level in range(len(config.grids))]
    generators = [encoder.replace(priors=priors[:level]) for level in range(len(config.grids))]
    return [stages.prior_stage(config, slices, codes, generator, critic) for generator in generators]


def epoch_of(encoded, epoch: int, critic: bool = False, **constants) -> list[dict[str, np.ndarray]]:
    """The inputs of each level's prior in an epoch, sorted by position."""
    config, slices, encoder, codes = encoded
    epochs = []
    for stage in prior_stages(dataclasses.replace(config, **constants), slices, codes, encoder, critic):
        batches = list(stage.batches(epoch).take(stage.steps))
        assert all(np.array_equal(inputs["codes"], targets) for inputs, targets in batches)
        epochs.append({name: np.concatenate([inputs[name] for inputs, _ in batches]) for name in batches[0][0]})
    return [{name: values[np.argsort(inputs["positions"])] for name, values in inputs.items()} for inputs in epochs]


def parameters_of(condition: np.ndarray) -> dict[str, np.ndarray]:
    """The parameters that `augmentation.as_condition` has made a condition of."""
    flip, angle, scale_x, scale_y, gain = condition[:, :5].T
    bend_x, bend_y = np.split(condition[:, 5:] * np.float32(augmentation.MAX_BEND), 2, axis=1)
    parameters = {"flip": 1 - 2 * flip, "angle": angle * np.float32(augmentation.MAX_ANGLE)}
    parameters |= {"scale_x": 1 + scale_x * np.float32(augmentation.MAX_SCALE)}
    parameters |= {"scale_y": 1 + scale_y * np.float32(augmentation.MAX_SCALE), "bend_x": bend_x, "bend_y": bend_y}
    return parameters | {"gain": 1 + gain * np.float32(augmentation.MAX_GAIN)}


def test_priors_are_trained_on_the_codes_of_augmented_slices(encoded):
    _, slices, encoder, clean = encoded
    for level, inputs in enumerate(epoch_of(encoded, 1)):
        assert np.array_equal(inputs["positions"], slices["train"].positions)
        parameters = parameters_of(inputs["augmentation"])
        np.testing.assert_allclose(augmentation.as_condition(parameters), inputs["augmentation"], atol=1e-4)
        expected = encoder.encode(slices["train"].images, parameters)[level]
        assert np.mean(inputs["codes"] == expected) > 0.98  # Rounding may change a few.
        assert np.mean(inputs["codes"] == clean["train"][level]) < 0.9
        assert np.mean(inputs["codes"] == np.roll(expected, 1, axis=0)) < 0.9


def test_augmentation_for_the_prior_is_a_function_of_seed_and_epoch(encoded):
    first, again = epoch_of(encoded, 1)[0], epoch_of(encoded, 1)[0]
    assert all(np.array_equal(first[name], again[name]) for name in first)
    for other in (epoch_of(encoded, 2)[0], epoch_of(encoded, 1, seed=1)[0], epoch_of(encoded, 1, critic=True)[0]):
        assert not np.array_equal(first["codes"], other["codes"])
        gains = first["augmentation"][:, 4], other["augmentation"][:, 4]
        assert abs(np.corrcoef(*gains)[0, 1]) < 0.8


def test_both_levels_of_a_slice_are_augmented_alike(encoded):
    top, *bottom = epoch_of(encoded, 1)
    assert top.keys() == {"codes", "positions", "augmentation"}
    for inputs in bottom:
        assert np.array_equal(inputs["coarse"], top["codes"])
        assert np.array_equal(inputs["augmentation"], top["augmentation"])


def test_validation_and_priors_without_augmentation_use_the_codes_of_the_slices(encoded):
    config, slices, encoder, codes = encoded
    for level, inputs in enumerate(epoch_of(encoded, 1, prior_augment=False)):
        assert not inputs["augmentation"].any()
        assert np.array_equal(inputs["codes"], codes["train"][level])
    for level, stage in enumerate(prior_stages(config, slices, codes, encoder)):
        ((inputs, targets),) = stage.validation()
        assert inputs.keys() == {"codes", "positions"} | ({"coarse"} if level else set())
        assert np.array_equal(targets, codes["validate"][level])


@pytest.mark.parametrize(("epochs", "expected"), [(1, 1), (2, 1), (5, 2), (8, 4)])
def test_critics_are_trained_for_half_of_the_epochs(encoded, epochs, expected):
    config = dataclasses.replace(encoded[0], prior_epochs=epochs)
    for critic, count in ((False, epochs), (True, expected)):
        made = prior_stages(config, encoded[1], encoded[3], encoded[2], critic)
        assert [stage.epochs for stage in made] == [count] * len(config.grids)


@pytest.fixture(scope="module")
def with_priors(encoded) -> Generator:
    """Shared by several tests, because compiling its sampling takes longer than sampling."""
    config, _, encoder, _ = encoded
    return encoder.replace(priors=[stages.make_prior(config, level) for level in range(len(config.grids))])


def selector_epoch(encoded, generator: Generator, epoch: int, **constants) -> dict[str, np.ndarray]:
    """The inputs of the selector in an epoch, those of real slices first, sorted by position."""
    config, slices, _, codes = encoded
    stage = stages.selector_stage(dataclasses.replace(config, **constants), slices, codes, generator)
    batches = list(stage.batches(epoch).take(stage.steps))
    assert all(np.array_equal(inputs["is_real"], targets) for inputs, targets in batches)
    inputs = {name: np.concatenate([batch[name] for batch, _ in batches]) for name in batches[0][0]}
    order = np.lexsort([inputs["positions"], -inputs["is_real"]])
    return {name: values[order] for name, values in inputs.items()}


def test_the_selector_sees_a_proposal_for_each_augmented_slice(encoded, with_priors):
    _, slices, encoder, _ = encoded
    inputs, count = selector_epoch(encoded, with_priors, 1), len(slices["train"])
    assert np.array_equal(inputs["is_real"], np.repeat([1, 0], count))
    for name in ("positions", "augmentation"):
        assert np.array_equal(inputs[name][:count], inputs[name][count:])
    expected = encoder.encode(slices["train"].images, parameters_of(inputs["augmentation"][:count]))
    for level, own in enumerate(expected):
        assert np.mean(inputs[f"codes_{level}"][:count] == own) > 0.98  # Rounding may change a few.
        assert np.mean(inputs[f"codes_{level}"][count:] == own) < 0.7


def test_batches_of_the_selector_are_a_function_of_seed_and_epoch(encoded, with_priors):
    first, again, later, of_other_seed = (
        selector_epoch(encoded, with_priors, epoch, seed=seed) for epoch, seed in ((1, 0), (1, 0), (2, 0), (1, 1))
    )
    assert all(np.array_equal(first[name], again[name]) for name in first)
    for other in (later, of_other_seed):
        for part in np.split(np.arange(len(first["is_real"])), 2):
            assert not np.array_equal(first["codes_0"][part], other["codes_0"][part])
    assert not selector_epoch(encoded, with_priors, 1, prior_augment=False)["augmentation"].any()


def test_one_set_of_the_selector_is_not_augmented_and_all_sets_come_again(encoded, with_priors):
    _, slices, _, codes = encoded
    first, again = (selector_epoch(encoded, with_priors, epoch) for epoch in (0, stages.NUM_PROPOSED))
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert not first["augmentation"].any()
    for level, own in enumerate(codes["train"]):
        assert np.array_equal(first[f"codes_{level}"][: len(slices["train"])], own)


def test_the_selector_is_judged_on_unseen_slices_and_they_are_sampled_only_if_it_is_trained(encoded, with_priors):
    config, slices, _, codes = encoded
    generator = with_priors.replace(propose_codes=unittest.mock.Mock(wraps=with_priors.propose_codes))
    stage = stages.selector_stage(config, slices, codes, generator)
    generator.propose_codes.assert_not_called()
    ((inputs, is_real),), ((again, _),) = stage.validation(), stage.validation()
    generator.propose_codes.assert_called_once()
    assert all(np.array_equal(inputs[name], again[name]) for name in inputs)
    for level, own in enumerate(codes["validate"]):
        assert np.array_equal(inputs[f"codes_{level}"][is_real == 1], own)


@pytest.fixture(scope="module")
def decoder_stage(encoded, with_priors) -> training.Stage:
    config, slices, _, codes = encoded
    return stages.decoder_stage(
        dataclasses.replace(config, decoder_epochs=2, decoder_channels=8, decoder_batch_size=4),
        slices,
        codes,
        with_priors,
    )


def decoder_epoch(stage: training.Stage, epoch: int) -> dict[str, np.ndarray]:
    """The inputs of the sharp decoder in an epoch, sorted by position."""
    batches = [inputs for inputs, _ in stage.batches(epoch).take(stage.steps)]
    inputs = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
    return {name: values[np.argsort(inputs["positions"])] for name, values in inputs.items()}


def test_the_decoder_is_trained_on_slices_and_their_codes_in_a_new_order_in_each_epoch(encoded, decoder_stage):
    _, slices, _, codes = encoded
    orders = set()
    for epoch in (0, 1, 1):
        inputs = decoder_epoch(decoder_stage, epoch)
        assert np.array_equal(inputs["images"], slices["train"].images)
        for level, own in enumerate(codes["train"]):
            assert np.array_equal(inputs[f"codes_{level}"], own)
        batches = decoder_stage.batches(epoch).take(decoder_stage.steps)
        orders.add(tuple(np.concatenate([positions for _, positions in batches])))
    assert len(orders) == 2


def test_previews_are_sheets_of_slices(encoded, decoder_stage):
    config, slices, encoder, codes = encoded
    size, count = config.image_size, len(slices["validate"])
    priors = prior_stages(config, slices, codes, encoder)
    sheets = {
        2: stages.vqvae_stage(config, slices).preview(encoder.vqvae),
        3: priors[-1].preview(stages.make_prior(config, len(config.grids) - 1)),
        4: decoder_stage.preview(decoder_stage.make()),
    }
    for rows, sheet in sheets.items():
        assert sheet.shape == (rows * size, count * size)
        originals = np.concatenate(list(slices["validate"].images[..., 0]), axis=1) / np.float32(255)
        assert np.array_equal(sheet[:size], originals)
    assert not any(stage.preview for stage in priors[:-1])
    assert not any(stage.preview for stage in prior_stages(config, slices, codes, encoder, critic=True))


def test_the_decoder_is_judged_on_unseen_slices(encoded, decoder_stage):
    (inputs, _), *_ = decoder_stage.validation()
    assert np.array_equal(inputs["images"], encoded[1]["validate"].images)
    assert np.array_equal(inputs["codes_0"], encoded[3]["validate"][0])


def test_the_scale_of_the_detail_is_that_of_training_slices(encoded, decoder_stage):
    _, slices, encoder, codes = encoded
    expected = sharp.detail_scales(slices["train"].images, encoder.decode(codes["train"]))
    assert decoder_stage.make().decoder.settings["detail_scales"] == pytest.approx(expected, rel=1e-5)


def test_a_decoder_of_another_precision_is_a_copy_that_draws_nearly_the_same(encoded):
    _, _, encoder, codes = encoded
    decoder = test_generator.sharp_decoder(encoder.vqvae)
    copy = stages.with_precision(decoder, "mixed_bfloat16")
    assert copy.velocity.first.compute_dtype == "bfloat16"
    assert len(copy.variables) == len(decoder.variables)
    assert decoder.velocity.first.compute_dtype == copy.decoders[0].compute_dtype == "float32"
    draws = [encoder.replace(decoder=network).draw(codes["validate"]) for network in (decoder, copy)]
    assert not np.array_equal(*draws)
    assert np.abs(draws[0] - draws[1]).mean() < 0.01
