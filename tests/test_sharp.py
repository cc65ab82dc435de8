"""The sharp decoder and the loss that trains it."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import ops

import model
import saving
import sharp
from pngs import BRAIN_THRESHOLD
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


def inputs_of(codes: list[np.ndarray], seed: int = 0) -> dict[str, np.ndarray]:
    noise = np.random.default_rng(seed).standard_normal((len(codes[0]), 32, 32, 1), np.float32)
    return {"noise": noise, **{f"codes_{level}": indices for level, indices in enumerate(codes)}}


def batch_of(vqvae: model.VQVAE, count: int = 4) -> dict[str, np.ndarray]:
    codes = {f"codes_{level}": indices for level, indices in enumerate(some_codes(vqvae, count))}
    return {"images": RNG.integers(0, 256, (count, 32, 32, 1)).astype(np.uint8), **codes}


def untrained(vqvae: model.VQVAE, scale: float = 0.1) -> sharp.SharpDecoder:
    scales = [scale] * sharp.patch_side(vqvae.image_size) ** 2
    return sharp.SharpDecoder.untrained(vqvae, detail_channels=8, detail_scales=scales)


def velocity_network(size: int, channels: int = 8) -> sharp.VelocityNetwork:
    return sharp.VelocityNetwork(size, channels, [1.0] * sharp.patch_side(size) ** 2)


def with_random_velocity(decoder: sharp.SharpDecoder) -> sharp.SharpDecoder:
    test_generator.with_random_weights(decoder.velocity)
    return decoder


def test_the_faithful_image_is_that_of_the_vqvae(vqvae):
    codes, decoder = some_codes(vqvae), untrained(vqvae)
    faithful = decoder.decode_faithfully(decoder.lookup(inputs_of(codes)))
    np.testing.assert_allclose(faithful, vqvae.decode_code(codes), atol=1e-6)


def test_noise_changes_the_detail_and_nothing_else_does(vqvae):
    decoder, codes = with_random_velocity(untrained(vqvae)), some_codes(vqvae)
    first, again, other = (ops.convert_to_numpy(decoder(inputs_of(codes, seed))) for seed in (0, 0, 1))
    assert np.array_equal(first, again)
    assert np.abs(first - other).mean() > 1e-4
    assert first.min() >= 0
    assert first.max() <= 1


def test_background_stays_black_whatever_the_noise():
    decoder = with_random_velocity(untrained(test_generator.make((4, 8)).vqvae))
    codes = [RNG.integers(1, 16, (3, grid, grid)).astype(np.int32) for grid in (4, 8)]
    codes[-1][:, :, :2] = 0
    decoded = ops.convert_to_numpy(decoder(inputs_of(codes)))
    assert not decoded[:, :, :6].any()
    assert decoded[:, :, 8:].any()


def test_specks_far_from_the_brain_are_black():
    decoder = with_random_velocity(untrained(test_generator.make((4,)).vqvae))
    faithful = np.zeros((1, 32, 32, 1), np.float32)
    faithful[:, :, 12:20], faithful[:, :, :2] = 0.5, 0.02
    drawn = ops.convert_to_numpy(decoder.add_detail(faithful, RNG.standard_normal(faithful.shape, np.float32)))
    assert not drawn[:, :, :4].any()
    assert drawn[:, :, 12:20].mean() > 0.1


def test_the_velocity_is_followed_to_its_end():
    """The midpoint method is exact for a velocity that is a linear function of the time."""
    decoder = untrained(test_generator.make((4,)).vqvae, scale=0.1)
    faithful, noise = np.full((2, 32, 32, 1), 0.5, np.float32), RNG.standard_normal((2, 32, 32, 1), np.float32)
    wanted = RNG.uniform(-1, 1, noise.shape).astype(np.float32)
    decoder.velocity = lambda inputs: (wanted - noise) * 2 * ops.reshape(inputs["time"], (-1, 1, 1, 1))
    np.testing.assert_allclose(decoder.add_detail(faithful, noise), faithful + 0.1 * wanted, atol=1e-5)


def test_detail_is_drawn_in_a_square_window_around_the_brain():
    faithful = RNG.random((2, 64, 64, 1)).astype(np.float32) * BRAIN_THRESHOLD * 1.003
    square = ops.max_pool((faithful > BRAIN_THRESHOLD).astype(np.float32), 5, strides=1, padding="same")
    assert 0 < np.mean(square) < 1
    np.testing.assert_array_equal(sharp.near_brain(faithful), square)


@pytest.mark.parametrize(("size", "side"), [(32, 1), (96, 1), (128, 1), (192, 2), (256, 2), (384, 4)])
def test_cells_are_squares_of_pixels(size, side):
    network = velocity_network(size)
    assert network.side == side
    images = RNG.random((2, size, size, 1), np.float32)
    cells = sharp.to_cells(images, side)
    assert cells.shape == (2, size // side, size // side, side**2)
    np.testing.assert_array_equal(cells[1, 3, 2], images[1, 3 * side : 4 * side, 2 * side : 3 * side].ravel())
    np.testing.assert_array_equal(sharp.from_cells(cells, side), images)


def test_an_untrained_network_predicts_no_velocity_and_knows_the_time_afterwards():
    network, images = velocity_network(32), RNG.random((2, 32, 32, 1), np.float32)
    early, late = ({"detail": images, "faithful": images, "time": np.full(2, time)} for time in (0.1, 0.9))
    assert not np.any(ops.convert_to_numpy(network(early)))
    test_generator.with_random_weights(network)
    assert np.abs(ops.convert_to_numpy(network(early)) - ops.convert_to_numpy(network(late))).max() > 1e-3


@pytest.mark.parametrize(("size", "channels"), [(18, 2), (50, 50), (150, 8)])
def test_any_image_size_and_number_of_channels_works(size, channels):
    images = np.zeros((1, size, size, 1), np.float32)
    velocity = velocity_network(size, channels)({"detail": images, "faithful": images, "time": np.ones(1)})
    assert velocity.shape == images.shape


def test_all_parts_of_an_image_influence_each_other():
    network, images = velocity_network(32), RNG.random((1, 32, 32, 1), np.float32)
    changed = images.copy()
    changed[0, :8, :8] *= -10
    first, second = ({"detail": x, "faithful": images, "time": np.ones(1)} for x in (images, changed))
    test_generator.with_random_weights(network)
    assert np.abs(ops.convert_to_numpy(network(first)) - ops.convert_to_numpy(network(second)))[0, 24:, 24:].max() > 0


def test_training_changes_the_velocity_only(vqvae):
    tuning = sharp.DecoderTuning(untrained(vqvae))
    tuning.compile(keras.optimizers.Adam(0.01))
    before = {variable.path: ops.convert_to_numpy(variable) for variable in tuning.variables}
    batch = {name: tf.constant(values) for name, values in batch_of(vqvae).items()}
    data = tf.data.Dataset.from_tensors((batch, batch["codes_0"])).repeat(30)
    history = tuning.fit(data, epochs=3, verbose=0).history["loss"]
    changed = {path for path, old in before.items() if not np.array_equal(old, tuning_variable(tuning, path))}
    assert {path for path in before if "velocity" in path} <= changed
    assert all("velocity" in path or "seed" in path for path in changed)
    assert history[-1] < history[0]


def tuning_variable(tuning: sharp.DecoderTuning, path: str) -> np.ndarray:
    return next(ops.convert_to_numpy(variable) for variable in tuning.variables if variable.path == path)


def test_the_loss_is_that_of_the_velocity_near_the_brain(vqvae):
    """Without a prediction, the error is noise − detail, whose variance is known."""
    decoder = untrained(vqvae, scale=0.5)
    tuning, batch = sharp.DecoderTuning(decoder), batch_of(vqvae, 64)
    faithful = ops.convert_to_numpy(decoder.decode_faithfully(decoder.lookup(batch)))
    batch["images"] = (faithful * 255).round().astype(np.uint8)
    loss = float(tuning.compute_loss(batch, None, tuning(batch)))
    assert loss == pytest.approx(1, abs=0.02)
    error, counts = (ops.convert_to_numpy(part) for part in tuning(batch))
    error = np.where(counts > 0, error, 1e6)
    assert float(tuning.compute_loss(batch, None, np.stack([error, counts]))) == pytest.approx(1, abs=0.02)


def test_slices_are_flipped_together_with_their_faithful_images(vqvae):
    """If a slice equals its faithful image, there is no detail, flipped or not."""
    decoder = untrained(vqvae, scale=1e-3)
    tuning, batch = sharp.DecoderTuning(decoder), batch_of(vqvae, 16)
    faithful = ops.convert_to_numpy(decoder.decode_faithfully(decoder.lookup(batch)))
    batch["images"] = (faithful * 255).round().astype(np.uint8)  # Rounding is a detail of two scales, at most.
    assert np.abs(ops.convert_to_numpy(tuning(batch, training=True)[0])).max() < 10
    assert len({bool(np.array_equal(*pair)) for pair in _flips(tuning, batch)}) == 2


def _flips(tuning: sharp.DecoderTuning, batch: dict[str, np.ndarray]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Pairs of where detail counts in training, and where it would without flips."""
    batch = {**batch, **{name: values.copy() for name, values in batch.items() if name.startswith("codes")}}
    if tuning.decoder.background_code:
        batch["codes_1"][:, :, :2] = 0
    plain, flipped = (ops.convert_to_numpy(tuning(batch, training=training)[1]) for training in (False, True))
    if not tuning.decoder.background_code:  # Without background, detail counts everywhere.
        return [(plain[0], plain[0]), (plain[0], plain[0] + 1)]
    return list(zip(plain, flipped, strict=True))


def test_the_scales_are_those_of_what_is_lacking_in_the_brain():
    """Stripes of two pixels, in the brain only, have the same few frequencies in every patch."""
    faithful = np.zeros((4, 32, 32, 1), np.float32)
    faithful[:, 8:24] = 0.5
    images = np.where(faithful > 0, faithful + 0.1 * np.where(np.indices(faithful.shape)[2] // 2 % 2, 1, -1), 1.0)
    scales = np.reshape(sharp.detail_scales((images * 255).round().astype(np.uint8), faithful), (4, 4))
    assert np.sqrt(np.mean(scales**2)) == pytest.approx(0.1, abs=2e-3)
    assert scales[0, 1] > 0.2
    assert (scales[1:] == sharp.MIN_SCALE).all()
    black = np.zeros((1, 32, 32, 1))
    assert set(sharp.detail_scales(black.astype(np.uint8), black.astype(np.float32))) == {sharp.MIN_SCALE}


def test_frequencies_keep_lengths_and_the_first_one_is_the_mean():
    images = RNG.standard_normal((2, 16, 16, 1)).astype(np.float32)
    found = ops.convert_to_numpy(sharp.frequencies(images, 4))
    assert found.shape == (2, 4, 4, 16)
    np.testing.assert_allclose(found[1, 2, 3, 0], 4 * images[1, 8:12, 12:16].mean(), atol=1e-5)
    np.testing.assert_allclose((found**2).sum((1, 2, 3)), (images**2).sum((1, 2, 3)), rtol=1e-5)


@pytest.mark.parametrize("image_size", [50, 192])
def test_the_velocity_depends_on_the_frequencies_of_patches(image_size):
    network = velocity_network(image_size)
    images = RNG.standard_normal((1, image_size, image_size, 1)).astype(np.float32)
    inputs = {"detail": images, "faithful": images, "time": np.full(1, 0.5)}
    assert not np.any(ops.convert_to_numpy(network(inputs)))
    test_generator.with_random_weights(network.frequency_branch)
    assert np.abs(ops.convert_to_numpy(network(inputs))).mean() > 1e-3
    copy = sharp.VelocityNetwork.from_config(network.get_config())
    copy.set_weights(network.get_weights())
    np.testing.assert_array_equal(copy(inputs), network(inputs))


def test_patches_at_the_border_are_padded_with_zeros():
    patches = ops.convert_to_numpy(sharp.to_patches(np.ones((1, 6, 9, 1), np.float32), 4))
    assert patches.shape == (1, 2, 3, 16)
    assert patches[0, 0, 0].all()
    assert patches[0, 1, 2].sum() == 2


def test_frequencies_of_a_patch_tell_the_velocity_of_this_patch_only():
    branch, images = sharp.FrequencyBranch(4, [1.0] * 16), RNG.random((1, 16, 16, 1), np.float32)
    changed = images.copy()
    changed[0, 5, 6] += 1
    features, time = np.zeros((1, 4, 4, 8), np.float32), np.full(1, 0.5, np.float32)
    branch(images, images, time, time[:, None], features)
    test_generator.with_random_weights(branch)
    first, second = (ops.convert_to_numpy(branch(x, images, time, time[:, None], features)) for x in (images, changed))
    differs = np.zeros(images.shape, bool)
    differs[0, 4:8, 4:8] = True
    np.testing.assert_array_equal(np.abs(first - second) > 1e-6, differs)


def test_a_saved_decoder_decodes_the_same(vqvae, tmp_path):
    decoder = with_random_velocity(untrained(vqvae))
    decoder.save(tmp_path / "decoder.keras")
    inputs = inputs_of(some_codes(vqvae))
    np.testing.assert_array_equal(keras.saving.load_model(tmp_path / "decoder.keras")(inputs), decoder(inputs))


def test_a_saved_decoder_does_not_depend_on_what_was_made_before(vqvae, tmp_path):
    for name in ("one", "two"):
        keras.utils.set_random_seed(0)
        saving.save_model(untrained(vqvae), tmp_path / f"{name}.keras")
    assert (tmp_path / "one.keras").read_bytes() == (tmp_path / "two.keras").read_bytes()
