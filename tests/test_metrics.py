"""Every measure on cases whose answer is known."""

import math

import numpy as np
import pytest
import tensorflow_probability as tfp
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

import dataset
import metrics
import phantom

RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def brains() -> np.ndarray:
    """(8, 96, 96, 1) uint8: four people at two positions."""
    return np.stack([phantom.slice_image(0, case, at)[..., None] for case in range(4) for at in (6, 9)])


@pytest.fixture(scope="module")
def noisy(brains) -> np.ndarray:
    return np.clip(brains / 255 + RNG.normal(0, 0.05, brains.shape), 0, 1).astype(np.float32)


CASES = np.repeat(["a", "b", "c", "d"], 2)
POSITIONS = np.tile([6, 9], 4)


def measured(originals, reconstructions, **changes) -> dict:
    count = len(originals)
    settings = {"positions": POSITIONS[:count], "cases": CASES[:count], "seed": 0}
    return metrics.reconstruction_metrics(originals, reconstructions, **{**settings, **changes})


# ------------------------------------------------------------------------------------ reconstructions


def test_numbers_are_scikit_images(brains, noisy):
    found = measured(brains, noisy)
    wang = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1.0}
    pairs = [(x[..., 0] / np.float32(255), y[..., 0]) for x, y in zip(brains, noisy, strict=True)]
    assert found["ssim"] == pytest.approx(np.mean([structural_similarity(x, y, **wang) for x, y in pairs]), abs=1e-5)
    psnr = np.mean([peak_signal_noise_ratio(x, y, data_range=1.0) for x, y in pairs])
    assert found["psnr_db"] == pytest.approx(psnr, abs=1e-3)
    assert found["mae"] == pytest.approx(np.mean([np.abs(x - y).mean() for x, y in pairs]), abs=1e-6)


def test_brain_ssim_looks_at_the_brain_only(brains):
    original = brains / np.float32(255)
    found = measured(brains, original * np.float32(0.9))  # the black background stays perfect
    assert found["ssim_brain"] < found["ssim"]
    inside = original > metrics.BRAIN
    speckled = np.where(inside, original, 0.04).astype(np.float32)
    found = measured(np.where(inside, brains, 0).astype(np.uint8), speckled)
    assert found["ssim_brain"] > found["ssim"]


def test_perfect_reconstructions(brains):
    found = measured(brains, brains / np.float32(255))
    for name, best in {"ssim": 1, "ssim_brain": 1, "ms_ssim": 1, "psnr_db": 100, "mae": 0}.items():
        assert found[name] == pytest.approx(best, abs=1e-6), name
        assert found[f"{name}_interval"] == pytest.approx([best, best], abs=1e-6), name
    assert found["half_power_frequency"] == 0.5


def test_images_are_clipped_first(brains):
    found = measured(brains, np.where(brains == 0, -5, brains / 255).astype(np.float32))
    assert found["ssim"] == found["ms_ssim"] == pytest.approx(1)


def test_slices_without_brain_are_left_out_of_brain_ssim(brains, noisy):
    black = np.zeros_like(brains[:1])
    originals, decoded = np.concatenate([black, brains[1:]]), np.concatenate([black / np.float32(255), noisy[1:]])
    values = metrics.measures_by_slice(originals, decoded)
    assert math.isnan(values["ssim_brain"][0])
    found = measured(originals, decoded)
    assert found["ssim_brain"] == pytest.approx(values["ssim_brain"][1:].mean())
    assert found["worst_slices"][-1]["index"] == 0
    assert math.isnan(measured(black, black / np.float32(255))["ssim_brain"])


def test_numbers_by_position_and_the_worst_slices(brains, noisy):
    decoded = noisy.copy()
    decoded[5] = 1 - decoded[5]
    found = measured(brains, decoded)
    values = metrics.measures_by_slice(brains, decoded)
    assert [(row["position"], row["slices"]) for row in found["by_position"]] == [(6, 4), (9, 4)]
    assert found["by_position"][1]["ssim"] == pytest.approx(values["ssim"][1::2].mean())
    worst = found["worst_slices"]
    assert (worst[0]["index"], worst[0]["case"], worst[0]["position"]) == (5, "c", 9)
    assert [row["ssim_brain"] for row in worst] == sorted(values["ssim_brain"])


def test_ms_ssim_has_the_scales_that_fit():
    flat = np.full((2, 16, 16, 1), 0.5, np.float32)  # one scale: plain SSIM
    shifted = flat + np.float32(0.1)
    luminance = (2 * 0.5 * 0.6 + 1e-4) / (0.5**2 + 0.6**2 + 1e-4)
    assert metrics.ms_ssim(flat, shifted) == pytest.approx([luminance] * 2, abs=1e-3)
    for size in (22, 43, 44, 96, 176, 256):
        image = RNG.random((1, size, size, 1), np.float32)
        assert metrics.ms_ssim(image, image) == pytest.approx(1)
        assert metrics.ms_ssim(image, RNG.random((1, size, size, 1), np.float32)) < 0.5


def test_the_interval_draws_people_not_slices():
    people, slices = 40, 25
    level = RNG.normal(0, 1, people)
    values = np.repeat(level, slices)  # all slices of a person alike: 1,000 slices tell no more than 40 people
    lower, upper = metrics.interval_over_people(values, np.repeat(np.arange(people), slices), seed=0)
    error = level.std() / math.sqrt(people)
    assert (upper - lower) / (2 * 1.96 * error) == pytest.approx(1, abs=0.1)
    assert lower < level.mean() < upper
    by_slice = metrics.interval_over_people(values, np.arange(people * slices), seed=0)
    assert by_slice[1] - by_slice[0] < (upper - lower) / 3
    assert metrics.interval_over_people(values[:slices], np.zeros(slices), seed=0) == [None, None]


def test_the_power_spectrum_of_a_wave_stands_at_its_frequency():
    wave = np.cos(2 * np.pi * 12 * np.arange(96) / 96)
    spectrum = metrics.power_spectrum(np.broadcast_to(wave, (1, 96, 96))[..., None].astype(np.float32))
    assert len(spectrum) == 48
    assert np.argmax(spectrum) == 11  # index 0 is one wave an image
    noise = metrics.power_spectrum(RNG.normal(size=(20, 96, 96, 1)).astype(np.float32))
    assert noise == pytest.approx(96**2, rel=0.3)


def test_the_half_power_frequency_of_a_known_blur():
    noise = RNG.normal(size=(20, 96, 96, 1))
    frequencies = np.hypot(np.fft.fftfreq(96)[:, None], np.fft.fftfreq(96))
    low_passed = np.fft.ifft2(np.fft.fft2(noise[..., 0]) * (frequencies < 0.25)).real[..., None]
    spectra = (metrics.power_spectrum(images) for images in (noise, low_passed))
    assert metrics.half_power_frequency(*spectra) == pytest.approx(0.25, abs=0.011)


# --------------------------------------------------------------------------------- codes and likelihood


def test_codes_used_and_perplexity():
    codes = np.array([[[0, 0], [1, 1]], [[2, 2], [3, 3]]])
    assert metrics.code_metrics(codes, 8) == {
        "codes_used": 0.5,
        "perplexity": pytest.approx(4),
        "independent_bits_per_image": pytest.approx(8),
    }
    assert metrics.code_metrics(np.zeros((1, 2, 2), int), 8) == {
        "codes_used": 0.125,
        "perplexity": pytest.approx(1),
        "independent_bits_per_image": pytest.approx(0),
    }


def test_nats_and_bits():
    assert metrics.prior_metrics(math.log(512), 144) == {
        "prior_nats_per_code": pytest.approx(6.238, abs=1e-3),
        "prior_bits_per_code": pytest.approx(9),
        "prior_bits_per_image": pytest.approx(9 * 144),
    }


def decoder_bits(originals, predictions) -> float:
    return metrics.likelihood_metrics((originals, predictions), (originals, predictions), 0)["bits_per_dimension"]


def test_a_constant_prediction_costs_what_the_histogram_says():
    logistic = tfp.distributions.Logistic(np.float64(100), 8.0).sample(2 * 96 * 96, seed=0).numpy()
    pixels = np.clip(np.rint(logistic), 0, 255).astype(np.uint8).reshape(2, 96, 96, 1)
    constant = np.full(pixels.shape, 100 / 255, np.float32)
    found = metrics.likelihood_metrics((pixels, constant), (pixels, constant), 0)
    # pixels that are logistic around the constant: the bits are the entropy of their histogram
    assert found["decoder_bits_per_dimension"] == pytest.approx(found["histogram_bits_per_dimension"], rel=0.01)
    # any pixels: the bits are the cross-entropy of their histogram with the logistic's
    uniform = RNG.integers(0, 256, pixels.shape).astype(np.uint8)
    counts = metrics.joint_histogram(uniform, constant)
    scales = np.full(256, 8.0)
    edges = 1 / (1 + np.exp(-(np.arange(256) + 0.5 - 100) / 8))
    edges[-1] = 1
    expected = -np.sum(np.bincount(uniform.ravel(), minlength=256) / uniform.size * np.log2(np.diff(edges, prepend=0)))
    assert metrics.logistic_bits(counts, scales) == pytest.approx(expected, rel=1e-6)
    assert decoder_bits(uniform, constant) >= 7.99


def test_halving_the_noise_costs_fewer_bits_and_none_are_negative(brains):
    original = brains / np.float32(255)
    bits = [
        decoder_bits(brains, np.clip(original + RNG.normal(0, noise, brains.shape), 0, 1))
        for noise in (0.08, 0.04, 0.02, 0.01)
    ]
    assert bits == sorted(bits, reverse=True)
    assert bits[0] - bits[3] > 1  # up to a bit a halving, but for the half of the background that is cut off at black
    assert 0 <= decoder_bits(brains, original) < 0.01
    assert (metrics._logistic_log_prob(np.geomspace(0.02, 64, 256)) <= 0).all()


def test_the_likelihood_sums_to_one():
    total = np.exp(metrics._logistic_log_prob(np.geomspace(0.02, 64, 256))).sum(axis=1)
    assert total == pytest.approx(1, abs=1e-6)


def test_both_parts_of_the_likelihood_add_up(brains, noisy):
    found = metrics.likelihood_metrics((brains[:4], noisy[:4]), (brains[4:], noisy[4:]), prior_bits_per_image=921.6)
    assert found["prior_bits_per_dimension"] == pytest.approx(0.1)
    parts = found["prior_bits_per_dimension"] + found["decoder_bits_per_dimension"]
    assert found["bits_per_dimension"] == pytest.approx(parts)


# ------------------------------------------------------------------------------------------- new brains


def gaussians(count: int, dimension: int, shift: float = 0.0, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(shift, 1, (count, dimension)).astype(np.float32)


def test_prdc_has_the_values_that_its_authors_publish():
    # github.com/clovaai/generative-evaluation-prdc: 10,000 against 10,000 of N(0, 1) in 1,000 dimensions, k = 5
    found = metrics.prdc(gaussians(10_000, 1000), gaussians(10_000, 1000, seed=1))
    published = {"precision": 0.4772, "recall": 0.4705, "density": 1.0555, "coverage": 0.9735}
    for name, value in published.items():  # density is 0.91, 0.98, 1.00 and 1.14 for four seeds
        assert found[name] == pytest.approx(value, abs=0.2 if name == "density" else 0.04), name


def test_prdc_of_identical_disjoint_and_shifted_sets():
    real = gaussians(500, 16)
    same = metrics.prdc(real, real.copy())
    assert same["precision"] == same["recall"] == same["coverage"] == 1
    assert same["density"] >= 1
    assert metrics.prdc(real, real + 100) == {"precision": 0, "recall": 0, "density": 0, "coverage": 0}
    equal = metrics.prdc(real, gaussians(500, 16, seed=1))
    shifted = metrics.prdc(real, gaussians(500, 16, 0.5, seed=1))
    # without clusters, coverage of equal distributions is 1 - 2^-k
    assert equal["coverage"] == pytest.approx(1 - 2**-5, abs=0.03)
    assert equal["density"] == pytest.approx(1, abs=0.15)
    assert shifted["density"] < 0.8 * equal["density"]
    assert shifted["coverage"] < equal["coverage"] - 0.05


def test_few_modes_are_precise_but_not_varied():
    real = gaussians(500, 16)
    collapsed = real[:5][RNG.integers(0, 5, 500)] + RNG.normal(0, 1e-3, (500, 16))
    found = metrics.prdc(real, collapsed)
    assert found["precision"] == 1
    assert found["recall"] < 0.05
    assert found["coverage"] < 0.3


def test_slices_of_one_person_are_no_neighbours():
    people = np.repeat(np.arange(60), 10)
    real, fake = (np.repeat(gaussians(60, 8, seed=s), 10, axis=0) + gaussians(600, 8, seed=9 + s) / 50 for s in (0, 1))
    assert metrics.prdc(real, fake)["precision"] < 0.05  # every ball holds its own person and nobody else
    assert metrics.prdc(real, fake, people, people + 60)["precision"] > 0.6


def test_prdc_of_too_few_is_not_a_number():
    assert all(math.isnan(value) for value in metrics.prdc(gaussians(4, 8), gaussians(4, 8)).values())


def test_the_kernel_distance_is_zero_for_equal_and_not_for_shifted_distributions():
    people = np.repeat(np.arange(20), 10)

    def distance(shift: float, seed: int) -> tuple[float, float]:
        real, fake = gaussians(200, 16, seed=2 * seed), gaussians(200, 16, shift, 2 * seed + 1)
        found = metrics.kernel_distance(real, fake, people, people + 20)
        return found["kernel_distance"], found["kernel_distance_error"]

    values, errors = np.transpose([distance(0, seed) for seed in range(20)])
    assert abs(values.mean()) < 3 * values.std() / math.sqrt(20)
    assert (np.abs(values) < 3 * errors).mean() >= 0.9
    assert values.min() < 0  # unbiased: below zero at times
    value, error = distance(1, 1)
    assert value > 10 * error


def test_the_kernel_distance_does_not_take_people_for_a_difference():
    people = np.repeat(np.arange(15), 20)
    values = []
    for seed in range(10):
        real, fake = (np.repeat(gaussians(15, 8, seed=2 * seed + s), 20, axis=0) for s in (0, 1))
        values.append(metrics.kernel_distance(real, fake, people, people + 15)["kernel_distance"])
    spread = np.std(values) / math.sqrt(10)
    assert abs(np.mean(values)) < 3 * spread
    assert math.isnan(metrics.kernel_distance(real, fake, people // 10, people)["kernel_distance"])


def test_whitening():
    skewed = gaussians(500, 6) @ RNG.normal(size=(6, 6)) + 5
    white = metrics.whitening(skewed)(skewed)
    assert white.mean(axis=0) == pytest.approx(0, abs=1e-3)
    assert np.cov(white, rowvar=False) == pytest.approx(np.eye(6), abs=1e-2)


def test_features_are_fixed_and_tell_images_apart(brains):
    found = metrics.features(brains)
    assert found.shape == (8, 64)
    assert np.array_equal(found, metrics.features(brains.copy()))
    distances = np.linalg.norm(found[:, None] - found, axis=-1)
    assert distances[~np.eye(8, dtype=bool)].min() > 0
    for size in (16, 32, 100):
        assert metrics.features(np.zeros((2, size, size, 1), np.uint8)).shape == (2, 64)


def test_as_shown_is_what_a_png_with_a_clean_background_holds(brains):
    faint = np.full((1, 16, 16, 1), 0.03, np.float32)
    assert not metrics.as_shown(faint).any()
    shown = metrics.as_shown(brains)
    assert shown.dtype == np.uint8
    assert np.array_equal(shown, metrics.as_shown(brains / np.float32(255)))
    assert np.array_equal(shown[brains > 12], brains[brains > 12])


def test_stand_ins_are_other_people_at_the_same_positions():
    positions, cases = np.tile([1, 2, 3], 2), np.repeat(["x", "y"], 3)
    train_positions, train_cases = np.tile([3, 2, 1], 4), np.repeat(["a", "b", "c", "d"], 3)
    chosen = metrics.stand_ins(train_positions, train_cases, positions, cases, seed=0)
    assert np.array_equal(train_positions[chosen], positions)
    assert len(set(train_cases[chosen][:3])) == len(set(train_cases[chosen][3:])) == 1
    assert train_cases[chosen][0] != train_cases[chosen][3]
    more = metrics.stand_ins(train_positions[:3], train_cases[:3], positions, cases, seed=0)
    assert len(more) == 6  # one training person stands in for both


def test_pairs_are_at_one_position_and_of_two_people():
    positions, cases = np.tile([1, 2], 5), np.repeat(list("abcde"), 2)
    pairs = metrics.random_pairs(positions, cases, seed=0)
    assert len(pairs) == 30
    assert (positions[pairs[:, 0]] == positions[pairs[:, 1]]).all()
    assert (cases[pairs[:, 0]] != cases[pairs[:, 1]]).all()
    assert metrics.random_pairs(np.array([1, 2]), np.array(["a", "b"]), seed=0).shape == (0, 2)


def test_pairs_of_one_image_are_alike_and_of_noise_are_not(brains):
    pairs = metrics.random_pairs(POSITIONS, CASES, seed=0)
    assert metrics.ms_ssim_of_pairs(np.repeat(brains[:1], 8, axis=0), pairs) == pytest.approx(1)
    varied = metrics.ms_ssim_of_pairs(brains, pairs)
    assert 0.2 < varied < 0.99
    noise = RNG.integers(0, 256, brains.shape).astype(np.uint8)
    assert metrics.ms_ssim_of_pairs(noise, pairs) < varied
    assert math.isnan(metrics.ms_ssim_of_pairs(brains, np.zeros((0, 2), int)))


def test_the_two_sample_test_tells_different_sets_apart_and_equal_ones_not():
    people = np.repeat(np.arange(20), 6)
    first, second = RNG.integers(0, 256, (2, 120, 16, 16, 1)).astype(np.uint8)
    equal = metrics.two_sample_test(first, second, people, seed=0, epochs=5)
    lower, upper = equal["accuracy_interval"]
    assert lower < 0.55
    assert upper > 0.45
    smooth = (second.reshape(120, 8, 2, 8, 2).mean(axis=(2, 4)).repeat(2, 1).repeat(2, 2)[..., None]).astype(np.uint8)
    different = metrics.two_sample_test(first, smooth, people, seed=0, epochs=5)
    assert different["accuracy"] > 0.95
    assert different == metrics.two_sample_test(first, smooth, people, seed=0, epochs=5)
    assert math.isnan(metrics.two_sample_test(first, second, np.zeros(120), seed=0)["accuracy"])


def test_the_nearest_slice_is_found_and_own_slices_do_not_count():
    others = gaussians(1500, 12)  # more than one block
    points = others[[3, 700, 1499]] + np.float32(1e-2)
    train_people = np.arange(1500)
    index, distance = metrics.nearest(points, others, np.array([-1, -1, -1]), train_people)
    assert index.tolist() == [3, 700, 1499]
    assert distance == pytest.approx(1e-2, rel=0.05)
    index, distance = metrics.nearest(points, others, np.array([3, -1, -1]), train_people)
    assert index[0] != 3
    assert distance[0] > 0.1
    white, black = np.full((1, 4), 255, np.uint8), np.zeros((1, 4), np.uint8)
    assert metrics.nearest(white, black, np.array(["a"]), np.array(["b"]))[1] == pytest.approx(1)


def test_copies_are_found():
    real, fresh, train = gaussians(200, 12), gaussians(200, 12, seed=1), gaussians(2000, 12, seed=2)
    new, old = np.arange(200), np.arange(200, 2200)

    def copied(points: np.ndarray) -> dict:
        distances = {"pixels": metrics.nearest(points, train, new, old)[1]}
        return metrics.copy_metrics(distances, {"pixels": metrics.nearest(real, train, new, old)[1]}, "pixels")

    assert copied(fresh)["nearest_train_pixels"] == pytest.approx(1, abs=0.05)
    assert copied(fresh)["copies_pixels"] < 0.06
    some = np.where(new[:, None] < 50, train[:200] + np.float32(1e-3), fresh)
    assert copied(some)["copies_pixels"] == pytest.approx(0.25, abs=0.05)
    assert copied(train[:200].copy())["copies_pixels"] == 1
    assert copied(train[:200].copy())["nearest_train_pixels"] < 0.01


@pytest.fixture(scope="module")
def people_and_copies() -> tuple[dataset.Slices, dataset.Slices]:
    """Test and training slices: 8 and 10 drawn people at 3 positions."""

    def slices(cases: range) -> dataset.Slices:
        keys = [(case, at) for case in cases for at in (5, 7, 9)]
        images = np.stack([phantom.slice_image(0, case, at, 32)[..., None] for case, at in keys])
        return dataset.Slices(images, np.array([at for _, at in keys]), np.array([f"case_{case}" for case, _ in keys]))

    return slices(range(8)), slices(range(20, 30))


def test_sample_metrics_of_copies_of_training_slices(people_and_copies, monkeypatch):
    test, training = people_and_copies
    monkeypatch.setattr(metrics, "FOLDS", 2)
    copied = training.images[metrics.stand_ins(training.positions, training.cases, test.positions, test.cases, 5)]
    found = metrics.sample_metrics(copied / np.float32(255), test.images / np.float32(255), test, training, seed=0)
    assert found["count"] == 24
    assert set(found) == {
        "count",
        "real_ms_ssim_of_pairs",
        "nearest_to_training",
        "drawn",
        "reconstructions",
        "train",
    }
    assert found["drawn"]["copies_pixels"] == found["drawn"]["copies_features"] == 1
    assert found["train"]["copies_pixels"] < 0.5
    assert found["drawn"]["nearest_train_pixels"] == pytest.approx(0, abs=1e-3)
    assert found["reconstructions"]["nearest_train_pixels"] == pytest.approx(1)  # perfect ones: the test slices
    assert len(found["nearest_to_training"]) == 10
    assert found["drawn"].keys() - found["train"].keys() == {"told_from_reconstructions"}
