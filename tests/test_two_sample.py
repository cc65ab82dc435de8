"""Statistics by subject and comparisons of two sets, on inputs for which the answer is known."""

import math

import numpy as np
import pytest

import phantom
import two_sample

RNG = np.random.default_rng(0)


def gaussians(count: int, dimension: int, shift: float = 0.0, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(shift, 1, (count, dimension)).astype(np.float32)


def test_interval_resamples_subjects_not_slices():
    subjects, slices = 40, 25
    level = RNG.normal(0, 1, subjects)
    values = np.repeat(level, slices)  # All slices of a subject are equal: 1,000 slices, but 40 observations.
    lower, upper = two_sample.interval_over_subjects(values, np.repeat(np.arange(subjects), slices), seed=0)
    error = level.std() / math.sqrt(subjects)
    assert (upper - lower) / (2 * 1.96 * error) == pytest.approx(1, abs=0.1)
    assert lower < level.mean() < upper
    by_slice = two_sample.interval_over_subjects(values, np.arange(subjects * slices), seed=0)
    assert by_slice[1] - by_slice[0] < (upper - lower) / 3
    assert two_sample.interval_over_subjects(values[:slices], np.zeros(slices), seed=0) == [None, None]


def test_random_features_are_fixed_and_differ_between_images():
    images = np.stack([phantom.slice_image(0, subject, at)[..., None] for subject in range(4) for at in (6, 9)])
    features = two_sample.random_features(images)
    assert features.shape == (8, 64)
    assert np.array_equal(features, two_sample.random_features(images.copy()))
    distances = np.linalg.norm(features[:, None] - features, axis=-1)
    assert distances[~np.eye(8, dtype=bool)].min() > 0
    for size in (16, 32, 100):
        assert two_sample.random_features(np.zeros((2, size, size, 1), np.uint8)).shape == (2, 64)


def test_whitened_features_have_mean_0_and_covariance_1():
    skewed = gaussians(500, 6) @ RNG.normal(size=(6, 6)) + 5
    white = two_sample.whitening(skewed)(skewed)
    assert white.mean(axis=0) == pytest.approx(0, abs=1e-3)
    assert np.cov(white, rowvar=False) == pytest.approx(np.eye(6), abs=1e-2)


def test_prdc_has_the_values_that_its_authors_publish():
    # github.com/clovaai/generative-evaluation-prdc: 10,000 against 10,000 of N(0, 1) in 1,000 dimensions, k = 5
    numbers = two_sample.prdc(gaussians(10_000, 1000), gaussians(10_000, 1000, seed=1))
    published = {"precision": 0.4772, "recall": 0.4705, "density": 1.0555, "coverage": 0.9735}
    for name, value in published.items():  # Density is 0.91, 0.98, 1.00 and 1.14 for four seeds.
        assert numbers[name] == pytest.approx(value, abs=0.2 if name == "density" else 0.04), name


def test_prdc_of_identical_disjoint_and_shifted_sets():
    real = gaussians(500, 16)
    same = two_sample.prdc(real, real.copy())
    assert same["precision"] == same["recall"] == same["coverage"] == 1
    assert same["density"] >= 1
    assert two_sample.prdc(real, real + 100) == {"precision": 0, "recall": 0, "density": 0, "coverage": 0}
    equal = two_sample.prdc(real, gaussians(500, 16, seed=1))
    shifted = two_sample.prdc(real, gaussians(500, 16, 0.5, seed=1))
    assert equal["coverage"] == pytest.approx(1 - 2**-5, abs=0.03)
    assert equal["density"] == pytest.approx(1, abs=0.15)
    assert shifted["density"] < 0.8 * equal["density"]
    assert shifted["coverage"] < equal["coverage"] - 0.05


def test_collapsed_modes_are_precise_but_not_varied():
    real = gaussians(500, 16)
    collapsed = real[:5][RNG.integers(0, 5, 500)] + RNG.normal(0, 1e-3, (500, 16))
    numbers = two_sample.prdc(real, collapsed)
    assert numbers["precision"] == 1
    assert numbers["recall"] < 0.05
    assert numbers["coverage"] < 0.3


def test_prdc_does_not_count_slices_of_one_subject_as_neighbours():
    subjects = np.repeat(np.arange(60), 10)
    real, fake = (np.repeat(gaussians(60, 8, seed=s), 10, axis=0) + gaussians(600, 8, seed=9 + s) / 50 for s in (0, 1))
    assert two_sample.prdc(real, fake)["precision"] < 0.05  # Each ball contains slices of its own subject only.
    assert two_sample.prdc(real, fake, subjects, subjects + 60)["precision"] > 0.6


def test_prdc_of_too_few_slices_is_nan():
    assert all(math.isnan(value) for value in two_sample.prdc(gaussians(4, 8), gaussians(4, 8)).values())


def test_mmd2_is_zero_for_equal_and_positive_for_shifted_distributions():
    subjects = np.repeat(np.arange(20), 10)

    def mmd2(shift: float, seed: int) -> tuple[float, float]:
        real, fake = gaussians(200, 16, seed=2 * seed), gaussians(200, 16, shift, 2 * seed + 1)
        numbers = two_sample.mmd2(real, fake, subjects, subjects + 20)
        return numbers["mmd2"], numbers["mmd2_error"]

    values, errors = np.transpose([mmd2(0, seed) for seed in range(20)])
    assert abs(values.mean()) < 3 * values.std() / math.sqrt(20)
    assert (np.abs(values) < 3 * errors).mean() >= 0.9
    assert values.min() < 0  # An unbiased estimate is sometimes negative.
    value, error = mmd2(1, 1)
    assert value > 10 * error


def test_mmd2_does_not_mistake_subjects_for_a_difference():
    subjects = np.repeat(np.arange(15), 20)
    values = []
    for seed in range(10):
        real, fake = (np.repeat(gaussians(15, 8, seed=2 * seed + s), 20, axis=0) for s in (0, 1))
        values.append(two_sample.mmd2(real, fake, subjects, subjects + 15)["mmd2"])
    error = np.std(values) / math.sqrt(10)
    assert abs(np.mean(values)) < 3 * error
    assert math.isnan(two_sample.mmd2(real, fake, subjects // 10, subjects)["mmd2"])


def test_classifier_distinguishes_different_sets_but_not_equal_ones():
    subjects = np.repeat(np.arange(20), 6)
    first, second = RNG.integers(0, 256, (2, 120, 16, 16, 1)).astype(np.uint8)
    equal = two_sample.classifier_two_sample_test(first, second, subjects, seed=0, epochs=5)
    lower, upper = equal["accuracy_interval"]
    assert lower < 0.55
    assert upper > 0.45
    smooth = (second.reshape(120, 8, 2, 8, 2).mean(axis=(2, 4)).repeat(2, 1).repeat(2, 2)[..., None]).astype(np.uint8)
    different = two_sample.classifier_two_sample_test(first, smooth, subjects, seed=0, epochs=5)
    assert different["accuracy"] > 0.95
    assert different == two_sample.classifier_two_sample_test(first, smooth, subjects, seed=0, epochs=5)
    undefined = two_sample.classifier_two_sample_test(first, second, np.zeros(120), seed=0)
    assert math.isnan(undefined["accuracy"])


def test_nearest_neighbours_exclude_slices_of_the_same_subject():
    others = gaussians(1500, 12)  # More than one block.
    points = others[[3, 700, 1499]] + np.float32(1e-2)
    subjects = np.arange(1500)
    index, distance = two_sample.nearest_neighbours(points, others, np.array([-1, -1, -1]), subjects)
    assert index.tolist() == [3, 700, 1499]
    assert distance == pytest.approx(1e-2, rel=0.05)
    index, distance = two_sample.nearest_neighbours(points, others, np.array([3, -1, -1]), subjects)
    assert index[0] != 3
    assert distance[0] > 0.1


def test_grey_levels_are_scaled_to_the_unit_interval():
    white, black = np.full((1, 4), 255, np.uint8), np.zeros((1, 4), np.uint8)
    assert two_sample.nearest_neighbours(white, black, np.array(["a"]), np.array(["b"]))[1] == pytest.approx(1)


def test_near_duplicates_of_training_points_are_counted():
    real, fresh, train = gaussians(200, 12), gaussians(200, 12, seed=1), gaussians(2000, 12, seed=2)
    unseen, seen = np.arange(200), np.arange(200, 2200)

    def numbers(points: np.ndarray) -> dict:
        distances = {"pixels": two_sample.nearest_neighbours(points, train, unseen, seen)[1]}
        real_distances = {"pixels": two_sample.nearest_neighbours(real, train, unseen, seen)[1]}
        return two_sample.nearest_neighbour_metrics(distances, real_distances)

    assert numbers(fresh)["nn_distance_ratio_pixels"] == pytest.approx(1, abs=0.05)
    assert numbers(fresh)["near_duplicate_rate_pixels"] < 0.06
    some = np.where(unseen[:, None] < 50, train[:200] + np.float32(1e-3), fresh)
    assert numbers(some)["near_duplicate_rate_pixels"] == pytest.approx(0.25, abs=0.05)
    assert numbers(train[:200].copy())["near_duplicate_rate_pixels"] == 1
    assert numbers(train[:200].copy())["nn_distance_ratio_pixels"] < 0.01
