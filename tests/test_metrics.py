"""Metrics of inputs for which the answer is known."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import tensorflow_probability as tfp
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

import metrics
import phantom
import two_sample
from dataset import Slices
from generator import Results, Samples

RNG = np.random.default_rng(0)
SUBJECTS = np.repeat(["a", "b", "c", "d"], 2)
POSITIONS = np.tile([6, 9], 4)


@pytest.fixture(scope="module")
def brains() -> np.ndarray:
    """(8, 96, 96, 1) uint8: four subjects at two positions."""
    return np.stack([phantom.slice_image(0, subject, at)[..., None] for subject in range(4) for at in (6, 9)])


@pytest.fixture(scope="module")
def noisy(brains) -> np.ndarray:
    return np.clip(brains / 255 + RNG.normal(0, 0.05, brains.shape), 0, 1).astype(np.float32)


def measured(originals, reconstructions) -> dict:
    count = len(originals)
    return metrics.reconstruction_metrics(originals, reconstructions, POSITIONS[:count], SUBJECTS[:count], seed=0)


# ------------------------------------------------------------------------------------ reconstructions


def test_ssim_psnr_and_mae_agree_with_scikit_image(brains, noisy):
    numbers = measured(brains, noisy)
    settings = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1.0}
    pairs = [(x[..., 0] / np.float32(255), y[..., 0]) for x, y in zip(brains, noisy, strict=True)]
    expected = np.mean([structural_similarity(x, y, **settings) for x, y in pairs])
    assert numbers["ssim"] == pytest.approx(expected, abs=1e-5)
    psnr = np.mean([peak_signal_noise_ratio(x, y, data_range=1.0) for x, y in pairs])
    assert numbers["psnr_db"] == pytest.approx(psnr, abs=1e-3)
    assert numbers["mae"] == pytest.approx(np.mean([np.abs(x - y).mean() for x, y in pairs]), abs=1e-6)


def test_brain_ssim_ignores_the_background(brains):
    original = brains / np.float32(255)
    numbers = measured(brains, original * np.float32(0.9))  # The black background stays perfect.
    assert numbers["ssim_brain"] < numbers["ssim"]
    inside = original > metrics.BRAIN_THRESHOLD
    speckled = np.where(inside, original, 0.04).astype(np.float32)
    numbers = measured(np.where(inside, brains, 0).astype(np.uint8), speckled)
    assert numbers["ssim_brain"] > numbers["ssim"]


def test_perfect_reconstructions_get_the_best_values(brains):
    numbers = measured(brains, brains / np.float32(255))
    for name, best in {"ssim": 1, "ssim_brain": 1, "ms_ssim": 1, "psnr_db": 100, "mae": 0}.items():
        assert numbers[name] == pytest.approx(best, abs=1e-6), name
        assert numbers[f"{name}_interval"] == pytest.approx([best, best], abs=1e-6), name
    assert numbers["half_power_frequency"] == 0.5


def test_reconstructions_are_clipped_first(brains):
    numbers = measured(brains, np.where(brains == 0, -5, brains / 255).astype(np.float32))
    assert numbers["ssim"] == numbers["ms_ssim"] == pytest.approx(1)


def test_slices_without_brain_do_not_count_for_brain_ssim(brains, noisy):
    black = np.zeros_like(brains[:1])
    originals, decoded = np.concatenate([black, brains[1:]]), np.concatenate([black / np.float32(255), noisy[1:]])
    values = metrics.metrics_by_slice(originals, decoded)
    assert math.isnan(values["ssim_brain"][0])
    numbers = measured(originals, decoded)
    assert numbers["ssim_brain"] == pytest.approx(values["ssim_brain"][1:].mean())
    assert numbers["worst_slices"][-1]["index"] == 0
    assert math.isnan(measured(black, black / np.float32(255))["ssim_brain"])


def test_means_by_position_and_worst_slices(brains, noisy):
    decoded = noisy.copy()
    decoded[5] = 1 - decoded[5]
    numbers = measured(brains, decoded)
    values = metrics.metrics_by_slice(brains, decoded)
    assert [(row["position"], row["slices"]) for row in numbers["by_position"]] == [(6, 4), (9, 4)]
    assert numbers["by_position"][1]["ssim"] == pytest.approx(values["ssim"][1::2].mean())
    worst = numbers["worst_slices"]
    assert (worst[0]["index"], worst[0]["subject"], worst[0]["position"]) == (5, "c", 9)
    assert [row["ssim_brain"] for row in worst] == sorted(values["ssim_brain"])


def test_ms_ssim_uses_the_scales_that_fit():
    flat = np.full((2, 16, 16, 1), 0.5, np.float32)  # One scale: plain SSIM.
    shifted = flat + np.float32(0.1)
    luminance = (2 * 0.5 * 0.6 + 1e-4) / (0.5**2 + 0.6**2 + 1e-4)
    assert metrics.ms_ssim(flat, shifted) == pytest.approx([luminance] * 2, abs=1e-3)
    for size in (22, 43, 44, 96, 176, 256):
        image = RNG.random((1, size, size, 1), np.float32)
        assert metrics.ms_ssim(image, image) == pytest.approx(1)
        assert metrics.ms_ssim(image, RNG.random((1, size, size, 1), np.float32)) < 0.5


def test_power_spectrum_of_a_wave_peaks_at_its_frequency():
    wave = np.cos(2 * np.pi * 12 * np.arange(96) / 96)
    spectrum = metrics.power_spectrum(np.broadcast_to(wave, (1, 96, 96))[..., None].astype(np.float32))
    assert len(spectrum) == 48
    assert np.argmax(spectrum) == 11  # Index 0 is one wave per image.
    noise = metrics.power_spectrum(RNG.normal(size=(20, 96, 96, 1)).astype(np.float32))
    assert noise == pytest.approx(96**2, rel=0.3)


def test_half_power_frequency_of_a_known_blur():
    noise = RNG.normal(size=(20, 96, 96, 1))
    frequencies = np.hypot(np.fft.fftfreq(96)[:, None], np.fft.fftfreq(96))
    low_passed = np.fft.ifft2(np.fft.fft2(noise[..., 0]) * (frequencies < 0.25)).real[..., None]
    spectra = (metrics.power_spectrum(images) for images in (noise, low_passed))
    assert metrics.half_power_frequency(*spectra) == pytest.approx(0.25, abs=0.011)


# --------------------------------------------------------------------------------- codes and likelihood


def test_codes_used_perplexity_and_marginal_entropy():
    codes = np.array([[[0, 0], [1, 1]], [[2, 2], [3, 3]]])
    assert metrics.code_metrics(codes, 8) == {
        "codes_used": 0.5,
        "perplexity": pytest.approx(4),
        "marginal_entropy_bits_per_image": pytest.approx(8),
    }
    assert metrics.code_metrics(np.zeros((1, 2, 2), int), 8) == {
        "codes_used": 0.125,
        "perplexity": pytest.approx(1),
        "marginal_entropy_bits_per_image": pytest.approx(0),
    }


def test_nats_are_converted_to_bits():
    assert metrics.prior_metrics(math.log(512), 144) == {
        "prior_nats_per_code": pytest.approx(6.238, abs=1e-3),
        "prior_bits_per_code": pytest.approx(9),
        "prior_bits_per_image": pytest.approx(9 * 144),
    }


class StubGenerator:
    """Priors that need a fixed number of nats per code at each level, for codebooks of 8 codes."""

    num_embeddings = 8

    def __init__(self, *nats):
        self.nats = nats
        self.level_names = ("",) if len(nats) == 1 else ("top", "bottom")
        self.vqvae = SimpleNamespace(quantizers=[SimpleNamespace(num_embeddings=8)] * len(nats))

    def nats_per_code(self, codes, positions):
        spread = np.linspace(-0.5, 0.5, len(positions), dtype=np.float32)
        return [np.float32(nats) + spread for nats in self.nats]


def test_code_and_prior_metrics_of_one_level():
    codes = RNG.integers(0, 8, (3, 2, 2))
    numbers = metrics.code_and_prior_metrics(StubGenerator(math.log(2)), [codes], np.arange(3))
    assert numbers["prior_nats_per_code"] == pytest.approx(math.log(2))  # The mean over slices.
    assert numbers["prior_bits_per_image"] == pytest.approx(4)
    assert numbers["perplexity"] == metrics.code_metrics(codes, 8)["perplexity"]


def test_code_and_prior_metrics_of_two_levels():
    codes = [RNG.integers(0, 8, (3, 2, 2)), RNG.integers(0, 8, (3, 4, 4))]
    numbers = metrics.code_and_prior_metrics(StubGenerator(math.log(2), math.log(4)), codes, np.arange(3))
    assert numbers["prior_bits_per_code"] == {"top": pytest.approx(1), "bottom": pytest.approx(2)}
    assert numbers["prior_bits_per_image_by_level"] == {"top": pytest.approx(4), "bottom": pytest.approx(32)}
    assert numbers["prior_bits_per_image"] == pytest.approx(36)
    parts = numbers["marginal_entropy_bits_per_image_by_level"]
    assert numbers["marginal_entropy_bits_per_image"] == pytest.approx(parts["top"] + parts["bottom"])
    assert set(numbers["codes_used"]) == set(numbers["perplexity"]) == {"top", "bottom"}


def decoder_bits(originals, predictions) -> float:
    return metrics.likelihood_metrics((originals, predictions), (originals, predictions), 0)["bits_per_dimension"]


def test_bits_of_a_constant_prediction_are_a_cross_entropy_with_the_histogram():
    logistic = tfp.distributions.Logistic(np.float64(100), 8.0).sample(2 * 96 * 96, seed=0).numpy()
    pixels = np.clip(np.rint(logistic), 0, 255).astype(np.uint8).reshape(2, 96, 96, 1)
    constant = np.full(pixels.shape, 100 / 255, np.float32)
    numbers = metrics.likelihood_metrics((pixels, constant), (pixels, constant), 0)
    # For pixels that follow a logistic around the constant, this is the entropy of their histogram.
    assert numbers["decoder_bits_per_dimension"] == pytest.approx(numbers["histogram_bits_per_dimension"], rel=0.01)
    # For any pixels, it is the cross-entropy of their histogram and the logistic.
    uniform = RNG.integers(0, 256, pixels.shape).astype(np.uint8)
    counts = metrics.joint_histogram(uniform, constant)
    scales = np.full(256, 8.0)
    edges = 1 / (1 + np.exp(-(np.arange(256) + 0.5 - 100) / 8))
    edges[-1] = 1
    expected = -np.sum(np.bincount(uniform.ravel(), minlength=256) / uniform.size * np.log2(np.diff(edges, prepend=0)))
    assert metrics.logistic_bits(counts, scales) == pytest.approx(expected, rel=1e-6)
    assert decoder_bits(uniform, constant) >= 7.99


def test_less_noise_needs_fewer_bits_and_bits_are_never_negative(brains):
    original = brains / np.float32(255)
    bits = [
        decoder_bits(brains, np.clip(original + RNG.normal(0, noise, brains.shape), 0, 1))
        for noise in (0.08, 0.04, 0.02, 0.01)
    ]
    assert bits == sorted(bits, reverse=True)
    # Halving the noise saves up to one bit, less here because negative noise in the black background is clipped.
    assert bits[0] - bits[3] > 1
    assert 0 <= decoder_bits(brains, original) < 0.01
    assert (metrics._logistic_log_prob(np.geomspace(0.02, 64, 256)) <= 0).all()


def test_likelihood_sums_to_one():
    total = np.exp(metrics._logistic_log_prob(np.geomspace(0.02, 64, 256))).sum(axis=1)
    assert total == pytest.approx(1, abs=1e-6)


def test_bits_per_dimension_are_the_sum_of_prior_and_decoder(brains, noisy):
    numbers = metrics.likelihood_metrics((brains[:4], noisy[:4]), (brains[4:], noisy[4:]), prior_bits_per_image=921.6)
    assert numbers["prior_bits_per_dimension"] == pytest.approx(0.1)
    parts = numbers["prior_bits_per_dimension"] + numbers["decoder_bits_per_dimension"]
    assert numbers["bits_per_dimension"] == pytest.approx(parts)


# ---------------------------------------------------------------------------------------------- samples


def test_display_images_equal_a_png_with_a_clean_background(brains):
    faint = np.full((1, 16, 16, 1), 0.03, np.float32)
    assert not metrics.to_display_uint8(faint).any()
    shown = metrics.to_display_uint8(brains)
    assert shown.dtype == np.uint8
    assert np.array_equal(shown, metrics.to_display_uint8(brains / np.float32(255)))
    assert np.array_equal(shown[brains > 12], brains[brains > 12])


def test_matched_training_slices_are_of_other_subjects_at_the_same_positions():
    positions, subjects = np.tile([1, 2, 3], 2), np.repeat(["x", "y"], 3)
    train_positions, train_subjects = np.tile([3, 2, 1], 4), np.repeat(["a", "b", "c", "d"], 3)
    chosen = metrics.matched_training_slices(train_positions, train_subjects, positions, subjects, seed=0)
    assert np.array_equal(train_positions[chosen], positions)
    assert len(set(train_subjects[chosen][:3])) == len(set(train_subjects[chosen][3:])) == 1
    assert train_subjects[chosen][0] != train_subjects[chosen][3]
    repeated = metrics.matched_training_slices(train_positions[:3], train_subjects[:3], positions, subjects, seed=0)
    assert len(repeated) == 6  # The only training subject is matched with both test subjects.


def test_random_pairs_share_a_position_and_show_two_subjects():
    positions, subjects = np.tile([1, 2], 5), np.repeat(list("abcde"), 2)
    pairs = metrics.random_pairs(positions, subjects, seed=0)
    assert len(pairs) == 30
    assert (positions[pairs[:, 0]] == positions[pairs[:, 1]]).all()
    assert (subjects[pairs[:, 0]] != subjects[pairs[:, 1]]).all()
    assert metrics.random_pairs(np.array([1, 2]), np.array(["a", "b"]), seed=0).shape == (0, 2)


def test_ms_ssim_of_pairs_measures_variety(brains):
    pairs = metrics.random_pairs(POSITIONS, SUBJECTS, seed=0)
    assert metrics.ms_ssim_of_pairs(np.repeat(brains[:1], 8, axis=0), pairs) == pytest.approx(1)
    varied = metrics.ms_ssim_of_pairs(brains, pairs)
    assert 0.2 < varied < 0.99
    noise = RNG.integers(0, 256, brains.shape).astype(np.uint8)
    assert metrics.ms_ssim_of_pairs(noise, pairs) < varied
    assert math.isnan(metrics.ms_ssim_of_pairs(brains, np.zeros((0, 2), int)))


def synthetic_slices(subjects: range) -> Slices:
    """Slices of some phantom subjects at three positions."""
    keys = [(subject, at) for subject in subjects for at in (5, 7, 9)]
    images = np.stack([phantom.slice_image(0, subject, at, 32)[..., None] for subject, at in keys])
    return Slices(images, np.array([at for _, at in keys]), np.array([f"case_{subject}" for subject, _ in keys]))


@pytest.fixture(scope="module")
def test_split() -> Slices:
    return synthetic_slices(range(8))


@pytest.fixture(scope="module")
def training() -> Slices:
    return synthetic_slices(range(20, 30))


def test_sample_metrics_detect_copies_of_training_slices(test_split, training, monkeypatch):
    monkeypatch.setattr(two_sample, "NUM_FOLDS", 2)
    matched = metrics.matched_training_slices(
        training.positions, training.subjects, test_split.positions, test_split.subjects, seed=5
    )
    copies, perfect = training.images[matched] / np.float32(255), test_split.images / np.float32(255)
    numbers = metrics.sample_metrics(copies, perfect, test_split, training, seed=0)
    assert set(numbers) == {"samples", "references"}
    samples, references = numbers["samples"], numbers["references"]
    assert set(references) == {"reconstructions", "other_subjects", "real_ms_ssim_of_pairs"}
    assert samples["count"] == 24
    assert samples["near_duplicate_rate_pixels"] == samples["near_duplicate_rate_features"] == 1
    assert references["other_subjects"]["near_duplicate_rate_pixels"] < 0.5
    assert samples["nn_distance_ratio_pixels"] == pytest.approx(0, abs=1e-3)
    assert references["reconstructions"]["nn_distance_ratio_pixels"] == pytest.approx(1)
    assert len(samples["nearest_to_training"]) == 10
    assert references["reconstructions"].keys() == references["other_subjects"].keys()
    only_samples = {"count", "c2st_reconstructions", "nearest_to_training"}
    assert samples.keys() - references["reconstructions"].keys() == only_samples


def test_measure_returns_all_numbers_as_json_without_nan(test_split, training, capsys):
    def some(slices: Slices, count: int) -> Slices:
        return Slices(slices.images[:count], slices.positions[:count], slices.subjects[:count])

    test = some(test_split, 3)  # A single subject: many numbers are undefined.
    slices = {"train": training, "validate": some(training, 6), "test": test}
    images = {split: some.images / np.float32(255) for split, some in slices.items()}
    codes = {split: [RNG.integers(0, 8, (len(some), 2, 2))] for split, some in slices.items()}
    samples = Samples(RNG.random((3, 32, 32, 1), np.float32), codes["test"], test.positions)
    results = Results(
        generator=StubGenerator(math.log(2)),
        slices=slices,
        codes=codes,
        reconstructions={"validate": images["validate"], "test": images["test"]},
        samples=samples,
        test_samples=samples,
        sampling={"seed": 0},
        history=[],
        numbers={},
    )
    numbers = metrics.measure(results, seed=0)
    assert json.loads(json.dumps(numbers, allow_nan=False)) == numbers
    assert (numbers["test_slices"], numbers["test_subjects"]) == (3, 1)
    assert numbers["ssim"] == pytest.approx(1)
    assert numbers["ssim_interval"] == [None, None]
    assert numbers["prior_bits_per_image"] == pytest.approx(4)
    assert numbers["bits_per_dimension"] > numbers["prior_bits_per_dimension"] > 0
    assert numbers["samples"]["count"] == 3
    assert numbers["samples"]["c2st_real"] == {"accuracy": None, "accuracy_interval": [None, None]}
    assert numbers["samples"]["mmd2"] is None
    assert "3 samples" in capsys.readouterr().out
