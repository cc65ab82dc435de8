"""Metrics of inputs for which the answer is known."""

import math
from dataclasses import replace

import numpy as np
import pytest
import tensorflow_probability as tfp
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

import metrics
import phantom
import two_sample
from dataset import Slices
from generator import Results
from pngs import BRAIN_THRESHOLD
from tests.randomness import RNG

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
    slices = Slices(originals, POSITIONS[:count], SUBJECTS[:count])
    return metrics.reconstruction_metrics(slices, reconstructions, metrics.metrics_by_slice(originals, reconstructions))


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
    inside = original > BRAIN_THRESHOLD
    speckled = np.where(inside, original, 0.04).astype(np.float32)
    numbers = measured(np.where(inside, brains, 0).astype(np.uint8), speckled)
    assert numbers["ssim_brain"] > numbers["ssim"]


def test_perfect_reconstructions_get_the_best_values(brains):
    numbers = measured(brains, brains / np.float32(255))
    for name, best in {"ssim": 1, "ssim_brain": 1, "ms_ssim": 1, "psnr_db": 100, "mae": 0}.items():
        assert numbers[name] == pytest.approx(best, abs=1e-6), name
        assert numbers[f"{name}_interval"] == pytest.approx([best, best], abs=1e-6), name
    assert numbers["half_power_frequency"] == 0.5
    assert [numbers[f"power_{band}"] for band in ("low", "middle", "high")] == pytest.approx([1, 1, 1])


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


def test_half_power_frequency_is_the_first_crossing():
    original, frequencies = np.ones(50), np.arange(1, 51) / 100
    with_gap = np.where((frequencies > 0.1) & (frequencies < 0.48), 0.01, 1)  # Noise returns at the highest ones.
    assert metrics.half_power_frequency(original, with_gap) == pytest.approx(0.1)
    assert metrics.half_power_frequency(original, np.full(50, 0.5)) == 0.5
    assert metrics.half_power_frequency(original, np.full(50, 0.49)) == 0


def test_power_ratios_compare_three_bands():
    original, frequencies = RNG.uniform(1, 2, 48), np.arange(1, 49) / 96
    assert metrics.power_ratios(original, original) == {f"power_{band}": 1.0 for band in ("low", "middle", "high")}
    images = RNG.normal(size=(2, 96, 96, 1)).astype(np.float32)
    half = metrics.power_ratios(metrics.power_spectrum(images), metrics.power_spectrum(images / 2))
    assert list(half.values()) == pytest.approx([0.25] * 3)
    bands = {"low": frequencies < 0.125, "middle": (frequencies >= 0.125) & (frequencies < 0.25)}
    bands["high"] = frequencies >= 0.25
    for name, band in bands.items():
        expected = {f"power_{other}": pytest.approx(3.0 if other == name else 1.0) for other in bands}
        assert metrics.power_ratios(original, np.where(band, 3 * original, original)) == expected


def test_power_ratios_weight_frequencies_by_the_size_of_their_ring():
    white = np.ones(48)
    images = RNG.normal(size=(40, 96, 96, 1))
    spectrum = metrics.power_spectrum(images.astype(np.float32))
    assert list(metrics.power_ratios(white, spectrum).values()) == pytest.approx([96**2] * 3, rel=0.02)
    doubled = np.where(np.arange(48) == 47, 2.0, 1.0)  # One ring of circumference 0.5 among those from 0.25 to 0.5.
    frequencies = np.arange(1, 49) / 96
    expected = 1 + 0.5 / frequencies[frequencies >= 0.25].sum()
    assert metrics.power_ratios(white, doubled)["power_high"] == pytest.approx(expected)


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
    """Priors that need a number of nats per code that depends on the level and the slice, for codebooks of 8 codes."""

    num_embeddings, background_code, candidates = 8, False, 1
    positions = np.arange(4)

    def __init__(self, *nats):
        self.nats = nats
        self.level_names = ("",) if len(nats) == 1 else ("top", "bottom")

    def nats_per_code(self, codes, positions):
        """The number of the level plus the first code of each slice."""
        return [
            np.float32(nats) + indices[:, 0, 0].astype(np.float32)
            for nats, indices in zip(self.nats, codes, strict=True)
        ]


def some_codes(first: dict[str, list[int]], grid: int = 2) -> dict[str, np.ndarray]:
    """Code grids by split; the first code of each slice is given, all others are 0."""
    codes = {split: np.zeros((len(values), grid, grid), np.int32) for split, values in first.items()}
    for split, values in first.items():
        codes[split][:, 0, 0] = values
    return codes


def make_results(
    images: dict, reconstructions: dict, codes: list[dict], generator: StubGenerator, **changes
) -> Results:
    """Results of which only what metrics.py reads is there."""
    slices = {split: Slices(of, POSITIONS[: len(of)], SUBJECTS[: len(of)]) for split, of in images.items()}
    fields = {
        "generator": generator,
        "slices": slices,
        "codes": {split: [level[split] for level in codes] for split in images},
        "reconstructions": reconstructions,
        "compared": {split: np.arange(len(some)) for split, some in slices.items()},
    }
    rest = ("critic", "samples", "compared_samples", "sampling", "history", "numbers")
    return Results(**dict.fromkeys(rest), **(fields | changes))


@pytest.fixture(scope="module")
def results(brains, noisy) -> Results:
    """Different slices, noise and codes in each split: eight of four subjects in the test split."""
    images = {"train": brains[::-1][:4], "validate": brains[2:6], "test": brains}
    decoded = {"validate": np.clip(images["validate"] / 255 + RNG.normal(0, 0.1, (4, 96, 96, 1)), 0, 1), "test": noisy}
    codes = some_codes({"train": [1, 2, 3, 4], "validate": [5, 6, 7, 4], "test": [0, 1, 0, 1, 2, 1, 2, 1]})
    return make_results(images, decoded, [codes], StubGenerator(math.log(2)))


def code_and_prior_metrics(results: Results) -> dict:
    return metrics.code_and_prior_metrics(results, metrics.nats_by_split(results))


def test_code_and_prior_metrics_of_one_level(results):
    numbers = code_and_prior_metrics(results)
    assert numbers["prior_nats_per_code"] == pytest.approx(math.log(2) + 1)  # The mean over the slices of each split.
    assert numbers["prior_nats_per_code_train"] == pytest.approx(math.log(2) + 2.5)
    assert numbers["prior_nats_per_code_validate"] == pytest.approx(math.log(2) + 5.5)
    assert numbers["prior_bits_per_image"] == pytest.approx(4 * (1 + 1 / math.log(2)))
    assert numbers["perplexity"] == metrics.code_metrics(results.codes["test"][0], 8)["perplexity"]
    chosen = {**results.compared, "train": np.array([0, 1]), "test": np.array([0])}
    numbers = code_and_prior_metrics(replace(results, compared=chosen))
    assert numbers["prior_nats_per_code_train"] == pytest.approx(math.log(2) + 1.5)
    assert numbers["prior_nats_per_code"] == pytest.approx(math.log(2) + 1)  # The whole test split.


def test_code_and_prior_metrics_of_two_levels(results):
    zeros = {split: [0] * len(slices) for split, slices in results.slices.items()}
    generator = StubGenerator(math.log(2), math.log(4))
    codes = {split: [some_codes(zeros)[split], some_codes(zeros, grid=4)[split]] for split in results.slices}
    numbers = code_and_prior_metrics(replace(results, generator=generator, codes=codes))
    assert numbers["prior_bits_per_code"] == {"top": pytest.approx(1), "bottom": pytest.approx(2)}
    assert numbers["prior_nats_per_code_train"] == pytest.approx({"top": math.log(2), "bottom": math.log(4)})
    assert numbers["prior_bits_per_image_by_level"] == {"top": pytest.approx(4), "bottom": pytest.approx(32)}
    assert numbers["prior_bits_per_image"] == pytest.approx(36)
    parts = numbers["marginal_entropy_bits_per_image_by_level"]
    assert numbers["marginal_entropy_bits_per_image"] == pytest.approx(parts["top"] + parts["bottom"])
    assert set(numbers["codes_used"]) == set(numbers["perplexity"]) == {"top", "bottom"}


def decoder_bits(originals, predictions) -> float:
    counts = metrics.joint_histogram(originals, predictions)
    return metrics.logistic_bits(counts, metrics.fit_logistic_scales(counts))


def test_bits_of_a_constant_prediction_are_a_cross_entropy_with_the_histogram():
    logistic = tfp.distributions.Logistic(np.float64(100), 8.0).sample(2 * 96 * 96, seed=0).numpy()
    pixels = np.clip(np.rint(logistic), 0, 255).astype(np.uint8).reshape(2, 96, 96, 1)
    constant = np.full(pixels.shape, 100 / 255, np.float32)
    # For pixels that follow a logistic around the constant, this is the entropy of their histogram.
    frequencies = np.bincount(pixels.ravel(), minlength=256) / pixels.size
    entropy = -np.sum(frequencies[frequencies > 0] * np.log2(frequencies[frequencies > 0]))
    assert decoder_bits(pixels, constant) == pytest.approx(entropy, rel=0.01)
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


def test_bits_per_dimension_are_the_sum_of_their_parts(results):
    numbers = metrics.likelihood_metrics(results, prior_bits_per_image=921.6)
    assert numbers["prior_bits_per_dimension"] == pytest.approx(0.1)
    assert numbers["position_bits_per_dimension"] == pytest.approx(2 / 96**2)  # One of four positions.
    parts = [numbers[f"{part}_bits_per_dimension"] for part in ("position", "prior", "decoder")]
    assert numbers["bits_per_dimension"] == pytest.approx(sum(parts))
    assert min(parts) > 0


def test_scales_are_fitted_on_the_validation_split(results):
    """The noise of the splits differs, so that scales fitted on the test split would give fewer bits."""
    counts = {
        split: metrics.joint_histogram(results.slices[split].images, results.reconstructions[split])
        for split in ("validate", "test")
    }
    measured = metrics.likelihood_metrics(results, 0)["decoder_bits_per_dimension"]
    assert measured == metrics.logistic_bits(counts["test"], metrics.fit_logistic_scales(counts["validate"]))
    assert measured > metrics.logistic_bits(counts["test"], metrics.fit_logistic_scales(counts["test"])) + 0.1


def test_rare_grey_levels_use_the_scale_of_all_pixels():
    counts = np.zeros((256, 256), np.int64)
    counts[100, 90:111] = 1000
    counts[50, 50] = 99  # Too few pixels for a scale of their own, which would be tiny.
    scales = metrics.fit_logistic_scales(counts)
    assert scales[50] == scales[200] > 1
    counts[50, 50] = 100
    assert metrics.fit_logistic_scales(counts)[50] < 0.1


def test_file_bits_are_those_of_the_files(brains, tmp_path):
    for i, image in enumerate(brains):
        Image.fromarray(image[..., 0]).save(tmp_path / f"{i}.png", optimize=True)
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert metrics.file_bits(brains, "PNG", optimize=True) == pytest.approx(8 * size / brains.size)
    black, noise = np.zeros_like(brains), RNG.integers(0, 256, brains.shape).astype(np.uint8)
    for file_format in ("PNG", "WEBP"):
        order = [metrics.file_bits(images, file_format, lossless=True) for images in (black, brains, noise)]
        assert order == sorted(order)
        assert 8 < order[2] < 12  # Noise cannot be compressed.
    assert math.isnan(metrics.file_bits(brains, "no such format"))


# --------------------------------------------------------------------------------------- cropped slices


def cropped(results: Results, side: int, frame_size: int) -> Results:
    """Results of which only the central square is there, but the frame is known."""
    begin = (frame_size - side) // 2
    centre = np.s_[:, begin : begin + side, begin : begin + side]
    return replace(
        results,
        slices={
            split: replace(slices, images=slices.images[centre], crop=side, frame_size=frame_size)
            for split, slices in results.slices.items()
        },
        reconstructions={split: images[centre] for split, images in results.reconstructions.items()},
    )


@pytest.mark.parametrize("side", [80, 81])
def test_cropped_slices_are_put_back_into_their_black_frame(results, side):
    begin = (96 - side) // 2
    frame = np.ones((96, 96, 1), bool)
    frame[begin : begin + side, begin : begin + side] = False
    whole = metrics.whole_slices(cropped(results, side, 96))
    for split in results.reconstructions:
        slices = results.slices[split]
        assert not np.any(slices.images[:, frame])
        assert np.array_equal(whole.slices[split].images, slices.images)
        assert whole.slices[split].images.dtype == np.uint8
        assert np.array_equal(whole.slices[split].positions, slices.positions)
    for split, images in results.reconstructions.items():
        assert np.array_equal(whole.reconstructions[split], np.where(frame, 0, images))


def test_slices_that_are_whole_stay_as_they_are(results):
    assert metrics.whole_slices(results) is results


def test_reconstructions_of_cropped_slices_are_measured_on_the_whole_frame(results):
    small = cropped(results, 80, 96)
    numbers, rows = metrics.measure(small)
    assert (numbers["crop"], numbers["frame_size"]) == (80, 96)
    whole = metrics.whole_slices(small)
    test, decoded = whole.slices["test"], whole.reconstructions["test"]
    expected = metrics.reconstruction_metrics(test, decoded, metrics.metrics_by_slice(test.images, decoded))
    assert {name: numbers[name] for name in expected} == expected
    assert np.mean([row["ssim"] for row in rows]) == pytest.approx(numbers["ssim"])
    assert numbers["prior_bits_per_dimension"] == pytest.approx(numbers["prior_bits_per_image"] / 96**2)


# -------------------------------------------------------------------------------------- everything together


def test_measure_measures_the_test_split(results):
    numbers, _ = metrics.measure(results)
    assert (numbers["test_slices"], numbers["test_subjects"]) == (8, 4)
    assert (numbers["crop"], numbers["frame_size"]) == (0, 96)
    values = metrics.metrics_by_slice(results.slices["test"].images, results.reconstructions["test"])
    for name in metrics.RECONSTRUCTION_METRICS:
        assert numbers[name] == pytest.approx(np.nanmean(values[name]))
        interval = two_sample.interval_over_subjects(values[name], SUBJECTS)
        assert numbers[f"{name}_interval"] == pytest.approx(interval)
    assert numbers["prior_bits_per_dimension"] == pytest.approx(numbers["prior_bits_per_image"] / 96**2)
    pngs = metrics.file_bits(results.slices["test"].images, "PNG", optimize=True)
    assert numbers["png_bits_per_dimension"] == pytest.approx(pngs)
    other_codes = {**results.codes, "test": [results.codes["test"][0] + 1]}
    other, _ = metrics.measure(replace(results, codes=other_codes))
    assert other["prior_nats_per_code"] == pytest.approx(numbers["prior_nats_per_code"] + 1)
    assert other["prior_nats_per_code_train"] == numbers["prior_nats_per_code_train"]


def test_slice_rows_average_to_the_numbers_of_the_test_split(results):
    numbers, rows = metrics.measure(results)
    assert [row["subject"] for row in rows] == SUBJECTS.tolist()
    assert [row["position"] for row in rows] == POSITIONS.tolist()
    for name in metrics.RECONSTRUCTION_METRICS:
        assert np.nanmean([row[name] for row in rows]) == pytest.approx(numbers[name])
    assert np.mean([row["nats"] for row in rows]) == pytest.approx(numbers["prior_bits_per_image"] * math.log(2))
    two_levels = {split: [codes[0], codes[0]] for split, codes in results.codes.items()}
    _, rows = metrics.measure(replace(results, codes=two_levels, generator=StubGenerator(1, 2)))
    assert rows[0]["bottom_nats"] == rows[0]["top_nats"] + 4  # One more nat for each of four codes.


def test_bits_saved_by_a_selector_are_those_of_the_test_split(results):
    assert "selector_bits_saved" not in metrics.measure(results)[0]
    generator, saved = StubGenerator(1), np.arange(len(POSITIONS))
    generator.candidates = 4

    def selector_bits(codes, positions, seed):
        assert seed == 3
        assert np.array_equal(codes[0], results.codes["test"][0])
        assert np.array_equal(positions, POSITIONS)
        return saved

    generator.selector_bits = selector_bits
    numbers, _ = metrics.measure(replace(results, generator=generator, sampling={"seed": 3}))
    assert numbers["selector_bits_saved"] == saved.mean()
