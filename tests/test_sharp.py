"""The sharp decoder, the upsampler, and the loss that trains them."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import ops

import model
import saving
import sharp
from layers import resize
from tests import test_generator
from tests.randomness import RNG


@pytest.fixture(
    scope="module",
    params=[{"grids": (4,)}, {"grids": (4, 8)}, {"grids": (4,), "coding_size": 16}],
    ids=["one level", "two levels and a code for background", "coded at half the size"],
)
def vqvae(request) -> model.VQVAE:
    return test_generator.make(**request.param).vqvae


def some_codes(vqvae: model.VQVAE, count: int = 3) -> list[np.ndarray]:
    return [RNG.integers(0, 16, (count, grid, grid)).astype(np.int32) for grid in vqvae.grids]


def inputs_of(codes: list[np.ndarray], seed: int = 0, size: int = 32) -> dict[str, np.ndarray]:
    noise = np.random.default_rng(seed).standard_normal((len(codes[0]), size, size, 1), np.float32)
    return {"noise": noise, **{f"codes_{level}": indices for level, indices in enumerate(codes)}}


def batch_of(vqvae: model.VQVAE, count: int = 4) -> dict[str, np.ndarray]:
    codes = {f"codes_{level}": indices for level, indices in enumerate(some_codes(vqvae, count))}
    return {"images": RNG.integers(0, 256, (count, 32, 32, 1)).astype(np.uint8), **codes}


def untrained(vqvae: model.VQVAE) -> sharp.SharpDecoder:
    return sharp.SharpDecoder.untrained(vqvae, detail_channels=8)


def make_upsampler() -> sharp.Upsampler:
    return sharp.Upsampler(32, 16, detail_channels=8)


@pytest.fixture(scope="module", params=["decoder", "upsampler"])
def detail_model(request, vqvae) -> sharp.DetailModel:
    return untrained(vqvae) if request.param == "decoder" else make_upsampler()


def with_random_velocity(network: sharp.DetailModel) -> sharp.DetailModel:
    test_generator.with_random_weights(network.velocity)
    return network


def test_the_faithful_image_is_that_of_the_vqvae(vqvae):
    codes, decoder = some_codes(vqvae), untrained(vqvae)
    faithful = decoder.decode_faithfully(decoder.lookup(inputs_of(codes)))
    if vqvae.coding_size < vqvae.image_size:  # It is not enlarged.
        expected = ops.clip(vqvae.decoders[0](vqvae.quantizers[0].lookup(codes[0])), 0, 1)
    else:
        expected = vqvae.decode_code(codes)
    np.testing.assert_allclose(faithful, expected, atol=1e-6)


def test_noise_changes_the_detail_and_nothing_else_does(vqvae):
    decoder, codes = with_random_velocity(untrained(vqvae)), some_codes(vqvae)
    inputs = (inputs_of(codes, seed, vqvae.coding_size) for seed in (0, 0, 1))
    first, again, other = (ops.convert_to_numpy(decoder(some)) for some in inputs)
    assert np.array_equal(first, again)
    assert np.abs(first - other).mean() > 1e-4
    assert first.min() >= 0
    assert first.max() <= 1


def test_background_stays_black_whatever_the_noise():
    decoder = with_random_velocity(untrained(test_generator.make((4, 8)).vqvae))
    codes = [RNG.integers(1, 16, (3, grid, grid)).astype(np.int32) for grid in (4, 8)]
    codes[-1][:, :, :2] = 0
    decoded = ops.convert_to_numpy(decoder(inputs_of(codes)))
    assert not decoded[:, :, : 8 - sharp.BRAIN_MARGIN // 2].any()
    assert decoded[:, :, 8:].any()


def test_no_faint_noise_surrounds_the_brain():
    upsampler, blurred = make_upsampler(), np.full((1, 32, 32, 1), 0.01, np.float32)
    blurred[:, :, :10] = 0.5
    images = ops.convert_to_numpy(upsampler.add_detail(blurred, np.zeros_like(blurred)))
    edge = 10 + sharp.BRAIN_MARGIN // 2
    np.testing.assert_allclose(images[:, :, :edge], blurred[:, :, :edge])
    assert not images[:, :, edge:].any()


def test_the_velocity_is_followed_to_its_end():
    """Heun's method is exact for a velocity that is a linear function of the time."""
    upsampler = make_upsampler()
    upsampler.detail_scale.assign(0.1)
    blurred, noise = np.full((2, 32, 32, 1), 0.5, np.float32), RNG.standard_normal((2, 32, 32, 1), np.float32)
    wanted = RNG.uniform(-1, 1, noise.shape).astype(np.float32)
    upsampler.velocity = lambda inputs: (wanted - noise) * 2 * ops.reshape(inputs["time"], (-1, 1, 1, 1))
    np.testing.assert_allclose(upsampler.add_detail(blurred, noise), blurred + 0.1 * wanted, atol=1e-5)


def test_the_upsampler_draws_what_the_small_image_shows_and_more():
    upsampler = make_upsampler()
    small = RNG.random((2, 16, 16, 1), np.float32)
    inputs = {"images": small, "noise": RNG.standard_normal((2, 32, 32, 1), np.float32)}
    upsampler.detail_scale.assign(0)
    np.testing.assert_allclose(upsampler(inputs), np.clip(resize(small, 32), 0, 1), atol=1e-6)
    upsampler.detail_scale.assign(0.1)
    assert np.abs(ops.convert_to_numpy(upsampler(inputs)) - np.clip(resize(small, 32), 0, 1)).max() > 0.01


def test_an_untrained_network_predicts_no_velocity_and_knows_the_time_afterwards():
    network, images = sharp.VelocityNetwork(32, 8), RNG.random((2, 32, 32, 1), np.float32)
    early, late = ({"detail": images, "blurred": images, "time": np.full(2, time)} for time in (0.1, 0.9))
    assert not np.any(ops.convert_to_numpy(network(early)))
    test_generator.with_random_weights(network)
    assert np.abs(ops.convert_to_numpy(network(early)) - ops.convert_to_numpy(network(late))).max() > 1e-3


@pytest.mark.parametrize(("size", "channels"), [(18, 2), (50, 50), (150, 8)])
def test_any_image_size_and_number_of_channels_works(size, channels):
    images = np.zeros((1, size, size, 1), np.float32)
    velocity = sharp.VelocityNetwork(size, channels)({"detail": images, "blurred": images, "time": np.ones(1)})
    assert velocity.shape == images.shape


def test_all_parts_of_an_image_influence_each_other():
    network, images = sharp.VelocityNetwork(32, 8), RNG.random((1, 32, 32, 1), np.float32)
    changed = images.copy()
    changed[0, :8, :8] *= -10
    first, second = ({"detail": x, "blurred": images, "time": np.ones(1)} for x in (images, changed))
    test_generator.with_random_weights(network)
    assert np.abs(ops.convert_to_numpy(network(first)) - ops.convert_to_numpy(network(second)))[0, 24:, 24:].max() > 0


def test_training_changes_the_velocity_only(vqvae, detail_model):
    tuning = sharp.DetailTuning(detail_model)
    tuning.compile(keras.optimizers.Adam(0.01))
    before = {variable.path: ops.convert_to_numpy(variable) for variable in tuning.variables}
    batch = {name: tf.constant(values) for name, values in batch_of(vqvae).items()}
    data = tf.data.Dataset.from_tensors((batch, batch["codes_0"])).repeat(30)
    history = tuning.fit(data, epochs=3, verbose=0).history["loss"]
    changed = {path for path, old in before.items() if not np.array_equal(old, tuning_variable(tuning, path))}
    assert {path for path in before if "velocity" in path} <= changed
    assert all("velocity" in path or "seed" in path for path in changed)
    assert history[-1] < history[0]


def tuning_variable(tuning: sharp.DetailTuning, path: str) -> np.ndarray:
    return next(ops.convert_to_numpy(variable) for variable in tuning.variables if variable.path == path)


def test_the_loss_is_that_of_the_velocity_near_the_brain():
    """Without a prediction, the error is noise − detail, whose variance is known."""
    upsampler = make_upsampler()
    upsampler.detail_scale.assign(0.5)
    images = np.full((64, 32, 32, 1), 100, np.uint8)  # Of an even image, nothing is lacking.
    tuning = sharp.DetailTuning(upsampler)
    loss = float(tuning.compute_loss(None, None, tuning({"images": images})))
    assert loss == pytest.approx(1, abs=0.02)
    error, counts = (ops.convert_to_numpy(part) for part in tuning({"images": images}))
    error = np.where(counts > 0, error, 1e6)
    assert float(tuning.compute_loss(None, None, np.stack([error, counts]))) == pytest.approx(1, abs=0.02)


def test_slices_are_flipped_together_with_their_blurred_images(vqvae):
    """If a slice equals its faithful image, there is no detail, flipped or not."""
    decoder = untrained(vqvae)
    decoder.detail_scale.assign(1e-3)
    tuning, batch = sharp.DetailTuning(decoder), batch_of(vqvae, 16)
    if decoder.background_code:
        batch["codes_1"][:, :, :2] = 0  # Half of the image is black, so that flips can be seen.
    faithful = ops.convert_to_numpy(decoder.blur(batch))
    batch["images"] = (faithful * 255).round().astype(np.uint8)  # Rounding is a detail of two scales, at most.
    error, counts = (ops.convert_to_numpy(part) for part in tuning(batch, training=True))
    assert np.abs(error).max() < 10
    if decoder.background_code:
        plain = ops.convert_to_numpy(tuning(batch)[1])
        assert {bool(np.array_equal(*pair)) for pair in zip(plain, counts, strict=True)} == {True, False}


def test_the_scale_is_the_standard_deviation_of_what_is_lacking_near_the_brain(monkeypatch):
    upsampler, blurred = make_upsampler(), np.zeros((4, 32, 32, 1), np.float32)
    blurred[:, 8:24] = 0.5
    lacking = 0.1 * np.where(np.indices(blurred.shape)[2] % 2, 1, -1)
    images = (np.where(blurred > 0, blurred + lacking, 1.0) * 255).round().astype(np.uint8)
    monkeypatch.setattr(upsampler, "blur", lambda inputs: blurred[: len(inputs["images"])])
    monkeypatch.setattr(sharp, "SCALE_BATCH", 3)
    upsampler.fit_scale({"images": images})
    assert float(upsampler.detail_scale) == pytest.approx(0.1, abs=2e-3)
    blurred[:] = 0
    upsampler.fit_scale({"images": images})
    assert float(upsampler.detail_scale) == pytest.approx(1e-3)


def test_a_saved_decoder_decodes_the_same(vqvae, tmp_path):
    decoder = with_random_velocity(untrained(vqvae))
    decoder.detail_scale.assign(0.3)
    decoder.save(tmp_path / "decoder.keras")
    inputs = inputs_of(some_codes(vqvae), size=vqvae.coding_size)
    np.testing.assert_array_equal(keras.saving.load_model(tmp_path / "decoder.keras")(inputs), decoder(inputs))


def test_a_saved_upsampler_draws_the_same(tmp_path):
    upsampler = with_random_velocity(make_upsampler())
    upsampler.detail_scale.assign(0.3)
    upsampler.save(tmp_path / "upsampler.keras")
    inputs = {"images": RNG.random((1, 16, 16, 1)), "noise": RNG.standard_normal((1, 32, 32, 1))}
    np.testing.assert_array_equal(keras.saving.load_model(tmp_path / "upsampler.keras")(inputs), upsampler(inputs))


def test_a_saved_decoder_does_not_depend_on_what_was_made_before(vqvae, tmp_path):
    for name in ("one", "two"):
        keras.utils.set_random_seed(0)
        saving.save_model(untrained(vqvae), tmp_path / f"{name}.keras")
    assert (tmp_path / "one.keras").read_bytes() == (tmp_path / "two.keras").read_bytes()
