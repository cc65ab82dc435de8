"""Statistics by subject and comparisons of two sets, on inputs for which the answer is known."""

import math
from types import SimpleNamespace

import keras
import numpy as np
import pytest
from scipy import stats

import phantom
import two_sample
from tests.randomness import RNG


def gaussians(count: int, dimension: int, shift: float = 0.0, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(shift, 1, (count, dimension)).astype(np.float32)


# ---------------------------------------------------------------------------------------------- intervals


def simulated(subjects: int, slices: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A data set with a true mean of 0: half of the variance is between subjects. Returns values and subjects."""
    random = np.random.default_rng(seed)
    values = random.normal(size=(subjects, 1)) + random.normal(size=(subjects, slices))
    return values.ravel(), np.repeat(np.arange(subjects), slices)


@pytest.mark.parametrize("subjects", [6, 15])
def test_interval_contains_the_true_mean_in_95_percent_of_all_data_sets(subjects):
    intervals = np.array([two_sample.interval_over_subjects(*simulated(subjects, 8, seed)) for seed in range(2000)])
    covered = np.mean((intervals[:, 0] <= 0) & (intervals[:, 1] >= 0))
    assert 0.94 <= covered <= 0.965  # A percentile bootstrap of 6 subjects reaches about 0.85.


def test_interval_is_the_t_interval_of_the_means_of_subjects_with_equally_many_slices():
    values, subjects = simulated(6, 8, 0)
    means = values.reshape(6, 8).mean(axis=1)
    expected = stats.t.interval(0.95, 5, means.mean(), stats.sem(means))
    assert two_sample.interval_over_subjects(values, subjects) == pytest.approx(list(expected))
    order = np.random.default_rng(0).permutation(len(values))  # The order of the slices does not matter.
    assert two_sample.interval_over_subjects(values[order], subjects[order]) == pytest.approx(list(expected))


def test_interval_with_unequal_numbers_of_slices_is_around_the_mean_over_slices():
    random, covered = np.random.default_rng(0), []
    subjects = np.repeat(np.arange(15), random.integers(2, 15, 15))
    for _ in range(1000):
        values = random.normal(size=15)[subjects] + random.normal(size=len(subjects))
        lower, upper = two_sample.interval_over_subjects(values, subjects)
        assert (lower + upper) / 2 == pytest.approx(values.mean())
        covered.append(lower <= 0 <= upper)
    assert 0.91 <= np.mean(covered) <= 0.97


def test_interval_ignores_nan_and_needs_two_subjects():
    values, subjects = simulated(6, 8, 0)
    expected = two_sample.interval_over_subjects(values, subjects)
    more = np.append(values, [math.nan, math.nan]), np.append(subjects, [0, 99])
    assert two_sample.interval_over_subjects(*more) == expected
    one_known = np.where(subjects == 0, values, math.nan)
    for one in (values[:8], one_known, values[:0]):
        assert two_sample.interval_over_subjects(one, subjects[: len(one)]) == [None, None]


def test_paired_difference_is_that_of_the_same_slices():
    first, subjects = simulated(15, 8, 0)
    second = first + 0.1 + 0.01 * np.random.default_rng(1).normal(size=len(first))
    difference, (lower, upper) = two_sample.paired_difference(first, second, subjects)
    assert difference == pytest.approx(0.1, abs=0.01)
    assert 0.09 < lower < difference < upper < 0.11  # Far narrower than the interval of either number.
    assert two_sample.paired_difference(first, first, subjects) == (0, [0, 0])
    assert two_sample.paired_difference(second, first, subjects)[0] == pytest.approx(-difference)


# ---------------------------------------------------------------------------------- area under the curve


def test_area_under_curve_is_the_fraction_of_pairs_in_order():
    random = np.random.default_rng(0)
    negatives, positives = random.integers(0, 10, 30).astype(float), random.integers(3, 12, 50).astype(float)  # ties
    pairs = positives[None] - negatives[:, None]
    expected = np.mean(pairs > 0) + np.mean(pairs == 0) / 2
    auc, (lower, upper) = two_sample.area_under_curve(negatives, positives, np.arange(30), np.arange(50))
    assert auc == pytest.approx(expected)
    assert lower < auc < upper
    assert two_sample.area_under_curve(positives, negatives, np.arange(50), np.arange(30))[0] == pytest.approx(1 - auc)


def test_interval_of_the_area_contains_chance_for_equal_distributions_of_subjects():
    covered, areas = [], []
    for seed in range(600):
        negatives, subjects = simulated(15, 8, 2 * seed)
        positives = simulated(120, 1, 2 * seed + 1)[0]  # Samples are subjects of their own.
        auc, (lower, upper) = two_sample.area_under_curve(negatives, positives, subjects, np.arange(120))
        areas.append(auc)
        covered.append(lower <= 0.5 <= upper)
    assert np.mean(areas) == pytest.approx(0.5, abs=0.01)
    assert 0.92 <= np.mean(covered) <= 0.98  # About 0.7 if slices were treated as independent.


def test_area_of_separable_and_empty_sets():
    ones = np.ones(6)
    subjects = np.arange(6)
    assert two_sample.area_under_curve(0 * ones, ones, subjects, subjects) == (1, [1, 1])
    assert two_sample.area_under_curve(ones, 0 * ones, subjects, subjects)[0] == 0
    for negatives, positives in ((ones[:0], ones), (ones, ones[:0])):
        names = subjects[: len(negatives)], subjects[: len(positives)]
        auc, interval = two_sample.area_under_curve(negatives, positives, *names)
        assert math.isnan(auc)
        assert interval == [None, None]


# ----------------------------------------------------------------------------------------------- features


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


# --------------------------------------------------------------------------------------------- classifiers

COUNTS = {"train": 160, "validate": 64, "test": 80}  # Items per set.
SUBJECTS = (np.repeat(np.arange(10), 8), np.repeat(np.arange(10, 20), 8))


@pytest.fixture(scope="module")
def classifier() -> keras.Model:
    """Shared by all tests, because a test leaves it untrained; compiling it takes longer than using it."""
    return two_sample.image_classifier(16, seed=0)


@pytest.fixture
def few_epochs(monkeypatch):
    monkeypatch.setattr(two_sample, "CLASSIFIER_MAX_EPOCHS", 4)


def image_set(brightness: dict[str, float], seed: int) -> dict[str, list[np.ndarray]]:
    """Noise around a brightness that depends on the split, or around 100."""
    random = np.random.default_rng(seed)
    return {
        split: [random.normal(brightness.get(split, 100), 30, (count, 16, 16, 1)).clip(0, 255).astype(np.uint8)]
        for split, count in COUNTS.items()
    }


def test_equal_distributions_are_at_chance_and_different_ones_are_found(classifier, few_epochs):
    first, brighter = image_set({}, 0), image_set(dict.fromkeys(COUNTS, 180), 1)
    numbers = two_sample.classifier_two_sample_test(first, brighter, SUBJECTS, classifier, 0)
    assert numbers["accuracy"] > 0.95
    assert numbers["accuracy_interval"][0] > 0.9
    assert numbers["accuracy"] in (numbers["accuracy_pooled"], numbers["accuracy_global"])
    numbers = two_sample.classifier_two_sample_test(first, image_set({}, 2), SUBJECTS, classifier, 0)
    assert numbers["accuracy"] == pytest.approx(0.5, abs=0.13)
    lower, upper = numbers["accuracy_interval"]
    assert lower < numbers["accuracy"] < upper


def test_classifier_is_trained_on_the_train_part_and_judged_on_the_test_part(classifier, few_epochs):
    first, only_train = image_set({}, 0), image_set({"train": 180, "validate": 180}, 1)
    numbers = two_sample.classifier_two_sample_test(first, only_train, SUBJECTS, classifier, 0)
    assert numbers["accuracy"] == pytest.approx(0.5, abs=0.13)
    # If the test part contradicts what was learnt, the answers are wrong.
    swapped = {**only_train, "test": first["test"]}
    numbers = two_sample.classifier_two_sample_test(
        {**first, "test": image_set({"test": 180}, 2)["test"]}, swapped, SUBJECTS, classifier, 0
    )
    assert numbers["accuracy"] < 0.1


def test_classifier_never_sees_test_items_in_training(classifier, monkeypatch):
    monkeypatch.setattr(two_sample, "CLASSIFIER_MAX_EPOCHS", 2)
    first, second = image_set({}, 0), image_set({}, 1)
    seen, fit = [], classifier.fit

    def spy(inputs, targets, **options):
        seen.append((inputs, targets))
        return fit(inputs, targets, **options)

    monkeypatch.setattr(classifier, "fit", spy)
    two_sample.classifier_two_sample_test(first, second, SUBJECTS, classifier, 0)
    expected = {(images.tobytes(), label) for label, part in enumerate((first, second)) for images in part["train"][0]}
    for inputs, targets in seen:
        for head in two_sample.HEADS:
            items = [(images.tobytes(), label) for images, label in zip(inputs[0], targets[head], strict=True)]
            assert set(items) == expected
            assert len(items) == len(expected)
    assert not np.array_equal(seen[0][0][0], seen[1][0][0])  # another order in each epoch


class StubClassifier:
    """Its items are (0 in "train", 1 in "validate" and 2 in "test"; number; set), and its accuracy is prescribed."""

    ACCURACY = {  # by head, then by kind of item, then by epoch
        "pooled": {1: (0.7, 0.6, 0.6), 2: (0.75, 0.9, 0.9)},
        "global": {1: (0.6, 0.8, 0.7), 2: (0.6, 0.65, 1.0)},
    }
    variables: list = []
    optimizer = SimpleNamespace(variables=[])

    epoch = -1

    def fit(self, inputs, targets, **options):
        self.epoch += 1

    def logits(self, inputs):
        logits = {}
        for head, accuracy in self.ACCURACY.items():
            right = [number < 20 * accuracy[kind][self.epoch] for kind, number, _ in inputs[0]]
            logits[head] = np.where(np.array(right) == inputs[0][:, 2], 1.0, -1.0)
        return logits


def test_epoch_and_head_are_chosen_on_the_validate_part(monkeypatch):
    monkeypatch.setattr(two_sample, "CLASSIFIER_MAX_EPOCHS", 3)
    monkeypatch.setattr(two_sample, "_logits", StubClassifier.logits)
    first, second = (
        {split: [np.array([(kind, number, label) for number in range(20)])] for kind, split in enumerate(COUNTS)}
        for label in (0, 1)
    )
    subjects = np.repeat(np.arange(5), 4)
    numbers = two_sample.classifier_two_sample_test(first, second, (subjects, subjects), StubClassifier(), 0)
    assert numbers["accuracy"] == numbers["accuracy_global"] == pytest.approx(0.65)  # second epoch
    assert numbers["accuracy_pooled"] == pytest.approx(0.75)  # first epoch


def test_result_does_not_depend_on_what_ran_before(classifier, few_epochs):
    first, second = image_set({}, 0), image_set(dict.fromkeys(COUNTS, 105), 1)
    before = [keras.ops.convert_to_numpy(variable) for variable in two_sample._state(classifier)]
    numbers = two_sample.classifier_two_sample_test(first, second, SUBJECTS, classifier, 0)
    after = [keras.ops.convert_to_numpy(variable) for variable in two_sample._state(classifier)]
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))
    two_sample.code_classifier([np.eye(4)], (4,), seed=7)  # Sets the global random seed.
    assert numbers == two_sample.classifier_two_sample_test(first, second, SUBJECTS, classifier, 0)
    fresh = two_sample.image_classifier(16, seed=0)
    keras.utils.set_random_seed(8)
    assert numbers == two_sample.classifier_two_sample_test(first, second, SUBJECTS, fresh, 0)


def test_several_trainings_are_averaged_and_the_first_is_that_of_one(classifier, few_epochs):
    first, second = image_set({}, 0), image_set(dict.fromkeys(COUNTS, 108), 1)
    once = two_sample.classifier_two_sample_test(first, second, SUBJECTS, classifier, 0)
    numbers = two_sample.classifier_two_sample_test(first, second, SUBJECTS, classifier, 0, trainings=3)
    assert numbers["accuracies"][0] == once["accuracy"] == once["accuracies"][0]
    assert len(set(numbers["accuracies"])) > 1
    assert numbers["accuracy"] == pytest.approx(np.mean(numbers["accuracies"]))
    lower, upper = numbers["accuracy_interval"]
    assert lower < numbers["accuracy"] < upper


@pytest.mark.parametrize("missing", ["train", "validate", "test"])
def test_sets_without_a_part_are_not_classified(missing):
    whole, part = image_set({}, 0), image_set({}, 1)
    for lacking in (
        {split: inputs for split, inputs in part.items() if split != missing},
        part | {missing: []},
        part | {missing: [part[missing][0][:0]]},
    ):
        for sets in ((whole, lacking), (lacking, whole)):
            numbers = two_sample.classifier_two_sample_test(*sets, SUBJECTS, None, 0)
            assert numbers.pop("accuracy_interval") == [None, None]
            assert numbers.pop("accuracies") == []
            assert set(numbers) == {"accuracy", "accuracy_pooled", "accuracy_global"}
            assert all(math.isnan(value) for value in numbers.values())


def test_halves_of_two_symmetric_images_are_found(monkeypatch):
    """Only the comparison with the mirror image shows that the halves, each perfect on its own, do not match."""
    monkeypatch.setattr(two_sample, "CLASSIFIER_MAX_EPOCHS", 6)
    random = np.random.default_rng(0)

    def halves(count: int) -> np.ndarray:
        return random.integers(0, 256, (3 * count, 16, 4, 1)).astype(np.uint8)

    def images(left: np.ndarray, right: np.ndarray) -> list[np.ndarray]:
        gap = np.zeros((len(left), 16, 8, 1), np.uint8)  # Neighbours across the midline would give the halves away.
        return [np.concatenate([left, gap, right[:, :, ::-1]], axis=2)]

    whole = {split: images(half, half) for split, half in ((split, halves(n)) for split, n in COUNTS.items())}
    patched = {split: images(halves(count), halves(count)) for split, count in COUNTS.items()}
    subjects = np.arange(240)
    network = two_sample.image_classifier(16, seed=0)
    numbers = two_sample.classifier_two_sample_test(whole, patched, (subjects, subjects), network, 0)
    assert numbers["accuracy"] > 0.9  # About 0.6 without the mirror image.


def test_codes_of_two_levels_are_classified(few_epochs):
    random = np.random.default_rng(0)
    codebooks = [random.normal(size=(16, 4)), random.normal(size=(16, 4))]
    network = two_sample.code_classifier(codebooks, (2, 4), seed=0)

    def grids(top: int = 0, bottom: int = 0) -> dict[str, list[np.ndarray]]:
        """Codes of two levels, each among four codes from a first one."""
        return {
            split: [start + random.integers(0, 4, (count, grid, grid)) for start, grid in ((top, 2), (bottom, 4))]
            for split, count in COUNTS.items()
        }

    first = grids()
    equal = two_sample.classifier_two_sample_test(first, grids(), SUBJECTS, network, 0)
    assert equal["accuracy"] == pytest.approx(0.5, abs=0.13)
    for different in (grids(top=8), grids(bottom=8)):
        assert two_sample.classifier_two_sample_test(first, different, SUBJECTS, network, 0)["accuracy"] > 0.9


def test_codes_of_a_fine_grid_and_of_long_vectors_are_classified_from_less(few_epochs, monkeypatch):
    random = np.random.default_rng(0)
    codebooks = [random.normal(size=(16, 10))]
    full = two_sample.code_classifier(codebooks, (16,), seed=0)
    monkeypatch.setattr(two_sample, "MAX_FULL_RESOLUTION", 8)
    monkeypatch.setattr(two_sample, "MAX_CODE_CHANNELS", 4)
    network = two_sample.code_classifier(codebooks, (16,), seed=0)
    assert network.count_params() < full.count_params()

    def grids(start: int) -> dict[str, list[np.ndarray]]:
        return {split: [start + random.integers(0, 4, (count, 16, 16))] for split, count in COUNTS.items()}

    first = grids(0)
    assert two_sample.classifier_two_sample_test(first, grids(0), SUBJECTS, network, 0)["accuracy"] < 0.7
    assert two_sample.classifier_two_sample_test(first, grids(8), SUBJECTS, network, 0)["accuracy"] > 0.9


# -------------------------------------------------------------------------------------- nearest neighbours


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


def test_neighbours_and_grids_of_no_other_subject_are_nan():
    points, grids, names = gaussians(3, 4), RNG.integers(0, 9, (3, 4)), np.array(["a", "a", "b"])
    own = np.array(["a", "a", "a"])
    distances = two_sample.nearest_neighbours(points, points, names, own)[1]
    assert np.isnan(distances).tolist() == [True, True, False]
    assert np.isnan(two_sample.nearest_grids(grids, grids, names, own)).tolist() == [True, True, False]
    some = {"codes": np.array([0.5, math.nan])}
    for distances, reference in ((some, {"codes": np.ones(2)}), ({"codes": np.ones(2)}, some)):
        numbers = two_sample.nearest_neighbour_metrics(distances, reference)
        assert set(numbers) == {"nn_distance_ratio_codes", "near_duplicate_rate_codes"}
        assert all(math.isnan(value) for value in numbers.values())


def test_nearest_grids_have_the_smallest_fraction_of_different_codes():
    random = np.random.default_rng(0)
    grids, others = random.integers(0, 3, (7, 10)), random.integers(0, 3, (1100, 10))  # More than one block.
    subjects, other_subjects = np.arange(7), np.arange(1100) % 20
    expected = [
        (grid != others[other_subjects != subject]).mean(axis=1).min()
        for grid, subject in zip(grids, subjects, strict=True)
    ]
    assert two_sample.nearest_grids(grids, others, subjects, other_subjects) == pytest.approx(expected)
    assert two_sample.nearest_grids(others[[5, 1050]], others, np.array([-1, -1]), other_subjects).tolist() == [0, 0]
    assert two_sample.nearest_grids(others[[5]], others[[5]] + 1, np.array([-1]), np.array([0])).tolist() == [1]
