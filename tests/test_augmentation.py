import numpy as np
import pytest
import tensorflow as tf

import augmentation
import dataset
import phantom


def test_drawn_augmentations_have_the_stated_ranges():
    drawn = {name: values.numpy() for name, values in augmentation.draw(2000, seed=3, step=5).items()}
    assert set(drawn) == {"flip", "angle", "scale_x", "scale_y", "gain"}
    assert set(drawn["flip"]) == {-1, 1}
    assert 0.45 < np.mean(drawn["flip"] == 1) < 0.55
    warped = drawn["angle"] != 0
    assert 0.45 < warped.mean() < 0.55  # The others keep their sharpness.
    assert np.all(drawn["scale_x"][~warped] == 1)
    assert np.all(drawn["scale_y"][~warped] == 1)
    degrees, unscaled = np.rad2deg(drawn["angle"][warped]), np.abs(drawn["scale_x"] - drawn["scale_y"])[warped]
    for values, centre, reach in (
        (degrees, 0, 5),
        (drawn["scale_x"][warped], 1, 0.05),
        (drawn["scale_y"][warped], 1, 0.05),
        (drawn["gain"], 1, 0.1),
    ):
        assert np.abs(values - centre).max() <= reach * 1.0001
        assert np.std(values) == pytest.approx(reach / np.sqrt(3), rel=0.1)  # uniform
        assert abs(np.mean(values) - centre) < reach / 10
    assert unscaled.max() > 0.05  # The axes are scaled independently.
    assert np.abs(np.corrcoef(np.stack([*drawn.values()])[:, warped]) - np.eye(5)).max() < 0.15


def test_drawn_augmentations_are_determined_by_seed_and_step():
    def draw(seed: int, step: int) -> np.ndarray:
        return np.stack([values.numpy() for values in augmentation.draw(100, seed, step).values()])

    assert np.array_equal(draw(3, 5), draw(3, 5))
    for other in (draw(3, 6), draw(4, 5)):
        assert abs(np.corrcoef(draw(3, 5)[-1], other[-1])[0, 1]) < 0.4


def augmented(image: np.ndarray, **parameters: float) -> np.ndarray:
    """Augment one (H, W) image with these parameters, by default none."""
    chosen = {"flip": 1.0, "angle": 0.0, "scale_x": 1.0, "scale_y": 1.0, "gain": 1.0} | parameters
    tensors = {name: tf.constant([value], tf.float32) for name, value in chosen.items()}
    return augmentation.apply(tf.constant(image[None, :, :, None], tf.float32), tensors).numpy()[0, :, :, 0]


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
