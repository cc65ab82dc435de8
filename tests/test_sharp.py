"""The sharp decoder, its discriminator, and the loss that trains both."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import ops

import model
import sharp
from tests import test_generator
from tests.randomness import RNG


@pytest.fixture(scope="module", params=[(4,), (4, 8)], ids=["one level", "two levels and a code for background"])
def vqvae(request) -> model.VQVAE:
    return test_generator.make(request.param).vqvae


def some_codes(vqvae: model.VQVAE, count: int = 3) -> list[np.ndarray]:
    return [RNG.integers(0, 16, (count, grid, grid)).astype(np.int32) for grid in vqvae.grids]


def inputs_of(codes: list[np.ndarray], seed: int = 0) -> dict[str, np.ndarray]:
    noise = np.random.default_rng(seed).standard_normal((len(codes[0]), 32, 32, 1), np.float32)
    return {"noise": noise, **{f"codes_{level}": indices for level, indices in enumerate(codes)}}


def batch_of(vqvae: model.VQVAE, drawn: float = 0.0, count: int = 4) -> dict[str, np.ndarray]:
    images, targets = RNG.integers(0, 256, (2, count, 32, 32, 1)).astype(np.uint8)
    named = {"positions": np.arange(count, dtype=np.int32), "images": images, "targets": targets}
    codes = {f"codes_{level}": indices for level, indices in enumerate(some_codes(vqvae, count))}
    return {**named, "drawn": np.full(count, drawn, np.float32), **codes}


def make_tuning(vqvae: model.VQVAE, total_steps: int = 10, **weights: float) -> sharp.DecoderTuning:
    decoder = test_generator.with_random_weights(sharp.SharpDecoder.untrained(vqvae))
    tuning = sharp.DecoderTuning(decoder, sharp.Discriminator(32, channels=16), total_steps, **weights)
    tuning.compile(keras.optimizers.SGD(0.1))
    return tuning


def test_an_untrained_sharp_decoder_decodes_as_the_vqvae_does(vqvae):
    codes = some_codes(vqvae)
    decoded = sharp.SharpDecoder.untrained(vqvae)(inputs_of(codes))
    np.testing.assert_allclose(decoded, vqvae.decode_code(codes), atol=1e-6)


def test_noise_changes_the_detail_and_nothing_else_does(vqvae):
    decoder = test_generator.with_random_weights(sharp.SharpDecoder.untrained(vqvae))
    codes = some_codes(vqvae)
    first, again, other = (ops.convert_to_numpy(decoder(inputs_of(codes, seed))) for seed in (0, 0, 1))
    assert np.array_equal(first, again)
    assert np.abs(first - other).mean() > 1e-4
    assert first.min() >= 0
    assert first.max() <= 1


def test_background_stays_black_whatever_the_noise():
    vqvae = test_generator.make((4, 8)).vqvae
    decoder = test_generator.with_random_weights(sharp.SharpDecoder.untrained(vqvae))
    for codebook, quantizer in zip(decoder.codebooks, vqvae.quantizers, strict=True):
        codebook.set_weights([ops.convert_to_numpy(quantizer.embeddings)])  # code 0 is the background's zero vector
    codes = some_codes(vqvae)
    codes[-1][:, :, :2] = 0
    decoded = ops.convert_to_numpy(decoder(inputs_of(codes)))
    assert not decoded[:, :, :8].any()
    assert decoded[:, :, 8:].any()


def test_training_changes_the_detail_and_the_discriminator_only(vqvae):
    tuning = make_tuning(vqvae)
    before = {variable.path: ops.convert_to_numpy(variable) for variable in tuning.variables}
    batch = {name: tf.constant(values) for name, values in batch_of(vqvae).items()}
    tuning.fit(tf.data.Dataset.from_tensors((batch, batch["positions"])).repeat(5), epochs=1, verbose=0)
    changed = {path for path, old in before.items() if not np.array_equal(old, tuning_variable(tuning, path))}
    assert changed
    trained = ("detail", "noise", "discriminator", "seed", "step")
    assert all(any(part in path for part in trained) for path in changed)
    assert {path for path in before if "detail" in path or "logit" in path} <= changed
    saved = tuning.decoder.get_config()
    assert saved["grids"] == list(vqvae.grids)


def tuning_variable(tuning: sharp.DecoderTuning, path: str) -> np.ndarray:
    return next(ops.convert_to_numpy(variable) for variable in tuning.variables if variable.path == path)


def gradients(tuning: sharp.DecoderTuning, batch: dict[str, np.ndarray]) -> tuple[list, list]:
    """Gradients of the loss to the weights of the discriminator and of the decoder."""
    tuning.seed_generator.state.assign([1, 2])
    networks = tuning.discriminator.trainable_variables, tuning.decoder.trainable_variables
    with tf.GradientTape() as tape:
        loss = tuning.compute_loss(batch, None, tuning(batch, training=True), training=True)
    return tape.gradient(loss, [[variable.value for variable in variables] for variables in networks])


def test_neither_network_is_trained_by_the_loss_of_the_other(vqvae):
    """The discriminator's gradients do not depend on the decoder's loss, nor the other way round."""
    batch, alone = batch_of(vqvae), {"agreement_weight": 0.0, "pixel_weight": 0.0, "feature_weight": 0.0}
    both, only = make_tuning(vqvae, adversarial_weight=1.0), make_tuning(vqvae, adversarial_weight=0.0, **alone)
    for tuning in (both, only):
        tuning.step.assign(tuning.total_steps)
        tuning.set_weights(both.get_weights())
    (first, decoder), (second, nothing) = gradients(both, batch), gradients(only, batch)
    for one, other in zip(first, second, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)
    assert all(not np.any(gradient) for gradient in nothing if gradient is not None)
    assert any(np.any(gradient) for gradient in decoder)


def test_the_discriminator_trains_alone_at_first(vqvae):
    tuning = make_tuning(vqvae, total_steps=100, adversarial_weight=2.0)
    weights = []
    for step in (0, 10, 20, 30, 100):
        tuning.step.assign(step)
        weights.append(float(tuning._weights()["adversarial"]))
    assert weights == pytest.approx([0, 0, 1, 2, 2])


@pytest.mark.parametrize(("size", "patches"), [(32, 4), (96, 12), (128, 16), (192, 12)])
def test_the_discriminator_judges_patches_of_similar_extent_at_all_sizes(size, patches):
    discriminator = sharp.Discriminator(size)
    *features, logits = discriminator((np.zeros((1, size, size, 1), np.float32), np.zeros(1, np.int32)))
    assert logits.shape == (1, patches, patches, 1)
    assert [values.shape[-1] for values in features[-2:]] == [128, 128]
    assert features[0].shape[-1] == (8 if size == 192 else 16)


def test_drawn_codes_have_no_original_to_be_compared_with(vqvae):
    tuning = make_tuning(vqvae)
    for drawn in (0.0, 1.0):
        tuning.reset_metrics()
        batch = batch_of(vqvae, drawn)
        tuning.compute_loss(batch, None, tuning(batch))
        means = {name: float(metric.result()) for name, metric in tuning.means.items()}
        assert means["agreement"] > 0
        assert (means["pixel"] > 0) == (means["feature"] > 0) == (drawn == 0)


def test_the_discriminator_sees_the_same_square_of_all_images(vqvae):
    tuning = make_tuning(vqvae)
    columns = np.broadcast_to(np.arange(32.0)[None, None, :, None], (2, 32, 32, 1))
    rows = np.swapaxes(columns, 1, 2)
    corners = set()
    for _ in range(20):
        across, down = (ops.convert_to_numpy(part) for part in tuning._augment(columns, rows))
        assert across.shape == down.shape == (2, 16, 16, 1)
        assert set(np.diff(across, axis=2).ravel()) in ({1.0}, {-1.0})
        assert set(np.diff(down, axis=1).ravel()) == {1.0}
        corners.add((down.min(), across.min(), across[0, 0, 0, 0] > across[0, 0, -1, 0]))
    assert len(corners) > 15


def test_a_discriminator_that_has_memorised_subjects_is_found():
    assert sharp.has_not_memorised({"real_logit": 0.8, "val_real_logit": 0.7})
    assert not sharp.has_not_memorised({"real_logit": 0.8, "val_real_logit": -0.2})


def test_a_saved_decoder_decodes_the_same(vqvae, tmp_path):
    decoder = test_generator.with_random_weights(sharp.SharpDecoder.untrained(vqvae))
    decoder.save(tmp_path / "decoder.keras")
    inputs = inputs_of(some_codes(vqvae))
    np.testing.assert_array_equal(keras.saving.load_model(tmp_path / "decoder.keras")(inputs), decoder(inputs))
