import numpy as np
import pytest
import tensorflow as tf

import augmentation
import dataset
import phantom

SINGLE = {"angle": (0, np.deg2rad(5)), "scale_x": (1, 0.05), "scale_y": (1, 0.05), "gain": (1, 0.1)}
BENDS = ("bend_x", "bend_y")  # one number per wave


def drawn(count: int, seed: int = 3, step: int = 5) -> dict[str, np.ndarray]:
    return {name: values.numpy() for name, values in augmentation.draw(count, seed, step).items()}


def by_number(parameters: dict[str, np.ndarray]) -> np.ndarray:
    """All numbers that were drawn for each image, (numbers, count)."""
    return np.concatenate([values.reshape(len(values), -1) for values in parameters.values()], axis=1).T


def test_drawn_augmentations_have_the_stated_ranges():
    parameters = drawn(2000)
    assert set(parameters) == {"flip", *SINGLE, *BENDS}
    assert set(parameters["flip"]) == {-1, 1}
    assert 0.45 < np.mean(parameters["flip"] == 1) < 0.55
    warped = parameters["angle"] != 0
    assert 0.45 < warped.mean() < 0.55  # The others keep their sharpness.
    assert np.all(parameters["scale_x"][~warped] == 1)
    assert np.all(parameters["scale_y"][~warped] == 1)
    ranges = [(parameters[name][warped | (name == "gain")], *SINGLE[name]) for name in SINGLE]
    for name in BENDS:
        assert np.all(parameters[name][~warped] == 0)
        ranges += [(wave, 0, 0.01) for wave in parameters[name][warped].T]
    for values, centre, reach in ranges:
        assert np.abs(values - centre).max() <= reach * 1.0001
        assert np.std(values) == pytest.approx(reach / np.sqrt(3), rel=0.1)  # uniform
        assert abs(np.mean(values) - centre) < reach / 10
    assert np.abs(parameters["scale_x"] - parameters["scale_y"]).max() > 0.05  # The axes are scaled independently.
    numbers = by_number(parameters)[:, warped]
    assert len(numbers) == augmentation.NUM_PARAMETERS
    assert np.abs(np.corrcoef(numbers) - np.eye(len(numbers))).max() < 0.15


def test_drawn_augmentations_are_determined_by_seed_and_step():
    assert np.array_equal(by_number(drawn(100, 3, 5)), by_number(drawn(100, 3, 5)))
    for seed, step in ((3, 6), (4, 5)):
        other = drawn(100, seed, step)
        assert abs(np.corrcoef(drawn(100, 3, 5)["gain"], other["gain"])[0, 1]) < 0.4
        assert not np.array_equal(drawn(100, 3, 5)["bend_y"], other["bend_y"])


NO_BEND = np.zeros(augmentation.NUM_WAVES**2, np.float32)
NOTHING = {"flip": 1.0, "angle": 0.0, "scale_x": 1.0, "scale_y": 1.0, "bend_x": NO_BEND, "bend_y": NO_BEND, "gain": 1.0}


def stacked(*parameters: dict[str, float | np.ndarray]) -> dict[str, tf.Tensor]:
    """Parameters of several images; each dictionary says how those of one image differ from no augmentation."""
    return {
        name: tf.constant(np.stack([{**NOTHING, **one}[name] for one in parameters]), tf.float32) for name in NOTHING
    }


def augmented(image: np.ndarray, **parameters: float | np.ndarray) -> np.ndarray:
    """Augment one (H, W) image with these parameters, by default none."""
    image = tf.constant(image[None, :, :, None], tf.float32)
    return augmentation.apply(image, stacked(parameters)).numpy()[0, :, :, 0]


def test_an_augmentation_without_effect_changes_nothing():
    image = np.random.default_rng(0).random((33, 33), np.float32)
    np.testing.assert_allclose(augmented(image), image, atol=1e-4)


@pytest.mark.parametrize("size", [32, 33])
def test_a_flip_exchanges_left_and_right(size):
    image = np.random.default_rng(0).random((size, size), np.float32)
    np.testing.assert_allclose(augmented(image, flip=-1.0), image[:, ::-1], atol=1e-4)


@pytest.mark.parametrize("degrees", [5, -5, 30])
def test_an_angle_rotates_about_the_centre(degrees):
    x, y = np.meshgrid(np.arange(65) - 32, np.arange(65) - 32)
    bar = ((np.abs(x) < 28) & (np.abs(y) < 2)).astype(np.float32)  # horizontal
    rotated = augmented(bar, angle=np.deg2rad(degrees))
    moments = [(rotated * a * b).sum() for a, b in ((x, x), (x, y), (y, y))]
    axis = np.rad2deg(np.arctan2(2 * moments[1], moments[0] - moments[2]) / 2)
    assert abs(axis) == pytest.approx(abs(degrees), abs=0.3)
    assert rotated.sum() == pytest.approx(bar.sum(), rel=0.03)
    np.testing.assert_allclose([(rotated * x).sum(), (rotated * y).sum()], 0, atol=0.1)
    opposite = augmented(bar, angle=np.deg2rad(-degrees))
    np.testing.assert_allclose(opposite, rotated[::-1], atol=1e-4)


@pytest.mark.parametrize("scale", [0.95, 1.05])
@pytest.mark.parametrize("name", ["scale_x", "scale_y"])
def test_a_scale_shrinks_one_axis(name, scale):
    distance = np.abs(np.arange(101) - 50)
    box = ((distance[:, None] <= 30) & (distance <= 30)).astype(np.float32)
    scaled = augmented(box, **{name: scale})
    width, height = scaled[50].sum(), scaled[:, 50].sum()
    expected = (61 / scale, 61) if name == "scale_x" else (61, 61 / scale)
    assert (width, height) == pytest.approx(expected, abs=0.6)


def test_a_gain_multiplies_intensities_and_clips_them():
    image = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
    np.testing.assert_allclose(augmented(image, gain=0.9), 0.9 * image, atol=1e-5)
    np.testing.assert_allclose(augmented(image, gain=1.1), np.minimum(1.1 * image, 1), atol=1e-5)


def displacements(size: int, **bends: np.ndarray) -> np.ndarray:
    """How far each pixel of the input lies from that of the output, (2, size, size) pixels in x and y.

    An image whose intensity is a coordinate shows them. It is flat near its edges, where they cannot be seen.
    """
    ramp = np.clip(np.arange(size), 4, size - 5) / np.float32(size)
    images = np.broadcast_to(ramp, (size, size)), np.broadcast_to(ramp[:, None], (size, size))
    return np.stack([(augmented(image, **bends) - image) * size for image in images])


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("wave", range(augmentation.NUM_WAVES**2))
def test_a_bend_displaces_by_products_of_half_waves(axis, wave):
    size, amplitude = 65, 0.01
    bend = amplitude * np.eye(augmentation.NUM_WAVES**2, dtype=np.float32)[wave]
    measured = displacements(size, **{BENDS[axis]: bend})
    m, n = 1 + wave // augmentation.NUM_WAVES, 1 + wave % augmentation.NUM_WAVES
    at = (np.arange(size) + 0.5) / size
    expected = size * amplitude * np.sin(m * np.pi * at)[:, None] * np.sin(n * np.pi * at)
    inside = np.s_[6:-6, 6:-6]
    np.testing.assert_allclose(measured[axis][inside], expected[inside], atol=1e-3)
    np.testing.assert_allclose(measured[1 - axis][inside], 0, atol=1e-3)


def test_the_strongest_bend_vanishes_at_the_border_is_smooth_and_folds_nothing():
    size, strongest = 96, np.full(augmentation.NUM_WAVES**2, augmentation.MAX_BEND)
    measured = displacements(size, bend_x=strongest, bend_y=-strongest)
    assert 2 < np.abs(measured).max() < 0.04 * size
    for axis in (1, 2):
        steps = np.diff(measured[:, 6:-6, 6:-6], axis=axis)  # between neighbouring pixels
        assert np.abs(steps).max() < 0.25  # A fold would need a step of −1.
        assert np.abs(np.diff(steps, axis=axis)).max() < 0.02
    white = np.ones((size, size), np.float32)
    bent = augmented(white, bend_x=strongest, bend_y=-strongest)
    np.testing.assert_allclose(bent[1:-1, 1:-1], 1, atol=1e-5)
    assert bent.min() > 0.9  # Less than a tenth of a pixel of the black around it comes in.


def test_pixels_from_outside_the_image_are_black():
    rotated = augmented(np.ones((64, 64), np.float32), angle=np.deg2rad(45))
    np.testing.assert_allclose(rotated[:8, :8], 0, atol=0.002)
    np.testing.assert_allclose(rotated[24:40, 24:40], 1, atol=1e-5)


def test_images_of_a_batch_are_augmented_each_with_its_own_parameters():
    images = np.random.default_rng(0).random((6, 16, 16, 1), np.float32)
    parameters = augmentation.draw(6, seed=1, step=0)
    together = augmentation.apply(tf.constant(images), parameters).numpy()
    for i in range(6):
        own = {name: values[i : i + 1].numpy() for name, values in parameters.items()}  # Arrays are accepted, too.
        np.testing.assert_allclose(augmentation.apply(images[i : i + 1], own).numpy()[0], together[i], atol=1e-5)


# --------------------------------------------------------------------------------------------- condition


def test_the_condition_of_an_image_that_is_not_augmented_is_zero():
    condition = augmentation.as_condition(stacked({}, {})).numpy()
    assert condition.shape == (2, augmentation.NUM_PARAMETERS)
    assert condition.dtype == np.float32
    assert not condition.any()


def test_the_condition_is_a_function_of_the_parameters_that_loses_nothing():
    parameters = drawn(200)
    condition = augmentation.as_condition(parameters).numpy()
    assert condition.shape == (200, augmentation.NUM_PARAMETERS)
    assert np.abs(condition).max() <= 1.0001
    assert np.abs(condition).max(axis=0).min() > 0.9  # Every number uses the whole range.
    numbers = by_number(parameters)
    correlations = np.abs(np.corrcoef(numbers, condition.T)[: len(numbers), len(numbers) :])
    assert sorted(correlations.argmax(axis=1)) == list(range(augmentation.NUM_PARAMETERS))
    np.testing.assert_allclose(correlations.max(axis=1), 1, atol=1e-4)  # Each number is a scaled parameter.


@pytest.mark.parametrize("name", NOTHING)
def test_different_augmentations_have_different_conditions(name):
    changes = {"flip": -1.0, "angle": 0.01, "scale_x": 1.01, "scale_y": 0.99, "gain": 1.02}
    bends = [{name: 0.001 * one} for one in np.eye(4, dtype=np.float32)] if name in BENDS else [{name: changes[name]}]
    conditions = augmentation.as_condition(stacked({}, *bends)).numpy()
    assert len(np.unique(conditions.round(4), axis=0)) == 1 + len(bends)
    assert np.all(np.count_nonzero(np.abs(conditions) > 1e-4, axis=1)[1:] == 1)


# ------------------------------------------------------------------------------------------------ brains


def test_augmented_brains_remain_brains():
    brains = np.stack([phantom.slice_image(0, 1, position)[..., None] for position in range(0, 16, 2)])
    images = tf.constant(dataset.to_float(brains))
    changed = augmentation.apply(images, augmentation.draw(8, seed=3, step=5)).numpy()
    assert changed.shape == images.shape
    assert changed.min() >= 0
    assert changed.max() <= 1
    brightness = changed.sum(axis=(1, 2, 3)) / images.numpy().sum(axis=(1, 2, 3))
    assert np.all(np.abs(brightness - 1) < 0.25)  # at most 10 % brighter and 11 % larger
    assert len({round(float(b), 3) for b in brightness}) > 4  # each image in its own way
