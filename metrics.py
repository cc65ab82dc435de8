"""Measure reconstructions, codes and likelihood. comparison.py compares samples with real slices."""

import io
import math
from dataclasses import replace
from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_probability as tfp
from PIL import Image
from skimage.metrics import structural_similarity

import model
import two_sample
from dataset import Slices, to_float, to_uint8
from generator import Results
from layers import WINDOW_RADIUS
from pngs import BRAIN_THRESHOLD

RECONSTRUCTION_METRICS = ("ssim", "ssim_brain", "ms_ssim", "psnr_db", "mae")  # One number per slice each.


def measure(results: Results) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Measure reconstructions, codes and likelihood.

    Args:
        results: Everything that a run has produced. `results.numbers` is not used.

    Returns:
        The numbers: the sizes of the test split (`test_slices`, `test_subjects`); `crop`, see `dataset.Slices`;
        `frame_size`, the height and width of the whole slices that the reconstructions are measured on; and the numbers
        of `reconstruction_metrics`, `code_and_prior_metrics` and `likelihood_metrics`. All of them are those of the
        VQ-VAE's decoder; with a sharp decoder, `sharp` has the numbers of `reconstruction_metrics` for its
        reconstructions. With a selector, `selector_bits_saved` is the mean of `Generator.selector_bits`.

        The `slice_rows` of the test split.
    """
    results = whole_slices(results)
    test, reconstructions = results.slices["test"], results.reconstructions["test"]
    by_slice, nats = metrics_by_slice(test.images, reconstructions), nats_by_split(results)
    numbers: dict[str, Any] = {
        "test_slices": len(test),
        "test_subjects": len(set(test.subjects)),
        "crop": test.crop,
        "frame_size": test.images.shape[1],
        **reconstruction_metrics(test, reconstructions, by_slice),
        **code_and_prior_metrics(results, nats),
    }
    if (drawn := results.sharp_reconstructions) is not None:
        numbers["sharp"] = reconstruction_metrics(test, drawn, metrics_by_slice(test.images, drawn))
    if results.generator.candidates > 1:
        bits = results.generator.selector_bits(results.codes["test"], test.positions, results.sampling["seed"])
        numbers["selector_bits_saved"] = float(bits.mean())
    numbers |= likelihood_metrics(results, numbers["prior_bits_per_image"])
    return numbers, slice_rows(results, by_slice, nats["test"])


def slice_rows(results: Results, by_slice: dict[str, np.ndarray], nats: list[np.ndarray]) -> list[dict[str, Any]]:
    """List what was measured for each test slice, so that two runs on the same slices can be compared in pairs.

    Args:
        results: Everything that a run has produced.
        by_slice: See `metrics_by_slice`.
        nats: Nats per code of the test slices, (N,) per level.

    Returns:
        One dictionary per slice: subject, position, each of `RECONSTRUCTION_METRICS`, and the nats of its codes under
        the prior of each level.
    """
    test, codes = results.slices["test"], results.codes["test"]
    columns: dict[str, Any] = {"subject": test.subjects, "position": test.positions, **by_slice}
    for prefix, indices, values in zip(model.level_prefixes(len(codes)), codes, nats, strict=True):
        columns[f"{prefix}nats"] = values * indices[0].size
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


# -------------------------------------------------------------------------------------- reconstructions


def whole_slices(results: Results) -> Results:
    """Put cropped slices and their reconstructions back into a black frame, for numbers that others can compare with.

    Args:
        results: Everything that a run has produced.

    Returns:
        The same, with reconstructions, and the slices of those splits that have any, of the size `Slices.frame_size`.
    """

    def framed(images: np.ndarray, frame_size: int) -> np.ndarray:
        margin = frame_size - images.shape[1]
        return np.pad(images, ((0, 0), *2 * [(margin // 2, margin - margin // 2)], (0, 0)))

    slices, reconstructions, drawn = dict(results.slices), dict(results.reconstructions), results.sharp_reconstructions
    if not any(part.frame_size for part in slices.values()):
        return results
    if drawn is not None:
        drawn = framed(drawn, slices["test"].frame_size)
    for split, images in reconstructions.items():
        size = slices[split].frame_size
        reconstructions[split] = framed(images, size)
        slices[split] = replace(slices[split], images=framed(slices[split].images, size))
    return replace(results, slices=slices, reconstructions=reconstructions, sharp_reconstructions=drawn)


def reconstruction_metrics(
    slices: Slices, reconstructions: np.ndarray, values: dict[str, np.ndarray]
) -> dict[str, Any]:
    """Measure how close reconstructions are to their originals.

    Args:
        slices: The originals, N slices.
        reconstructions: (N, H, W, 1) float32, clipped to [0, 1].
        values: What `metrics_by_slice` returns for them.

    Returns:
        The mean over slices of each of `RECONSTRUCTION_METRICS`; `*_interval`, its 95 % interval over subjects;
        `by_position`, the means at each slice position; `worst_slices`, the ten slices with the lowest `ssim_brain`,
        worst first; `half_power_frequency`; and the numbers of `power_ratios`.
    """
    positions, subjects = slices.positions, slices.subjects
    numbers: dict[str, Any] = {}
    for name in RECONSTRUCTION_METRICS:
        numbers[name] = _mean(values[name])
        numbers[f"{name}_interval"] = two_sample.interval_over_subjects(values[name], subjects)

    def means(chosen: np.ndarray) -> dict[str, float]:
        return {name: _mean(values[name][chosen]) for name in RECONSTRUCTION_METRICS}

    numbers["by_position"] = [
        {"position": int(position), "slices": int(np.sum(positions == position)), **means(positions == position)}
        for position in np.unique(positions)
    ]
    # Slices without brain have NaN, which sorts last.
    worst = np.argsort(values["ssim_brain"], kind="stable")[: min(10, len(subjects))]
    numbers["worst_slices"] = [
        {"index": int(i), "subject": str(subjects[i]), "position": int(positions[i]), **means(np.array([i]))}
        for i in worst
    ]
    spectra = power_spectrum(to_float(slices.images)), power_spectrum(reconstructions)
    return {**numbers, "half_power_frequency": half_power_frequency(*spectra), **power_ratios(*spectra)}


def metrics_by_slice(originals: np.ndarray, reconstructions: np.ndarray) -> dict[str, np.ndarray]:
    """Compute each of `RECONSTRUCTION_METRICS` for each slice.

    Args:
        originals: (N, H, W, 1) uint8.
        reconstructions: (N, H, W, 1) float32, clipped to [0, 1].

    Returns:
        (N,) float64 for each name.

        - ssim: SSIM over the whole slice except the 5 pixels at the edges (scikit-image's mean).
        - ssim_brain: Mean of the SSIM map over the brain, where the original is above 0.05; NaN without brain. About
          70 % of a slice are black background, which raises `ssim`.
        - ms_ssim: See `ms_ssim`.
        - psnr_db: Peak signal-to-noise ratio in dB with peak 1. The mean squared error is at least 1e-10, so that
          identical images have 100 dB.
        - mae: Mean absolute error per pixel, on the [0, 1] scale.
    """
    values: dict[str, Any] = {name: [] for name in RECONSTRUCTION_METRICS}
    for original, reconstruction in zip(originals, reconstructions, strict=True):
        original, reconstruction = to_float(original[..., 0]), np.clip(reconstruction[..., 0], 0, 1)
        similarity, brain = ssim_map(original, reconstruction), original > BRAIN_THRESHOLD
        error = original.astype(np.float64) - reconstruction
        values["ssim"].append(similarity[WINDOW_RADIUS:-WINDOW_RADIUS, WINDOW_RADIUS:-WINDOW_RADIUS].mean())
        values["ssim_brain"].append(similarity[brain].mean() if brain.any() else math.nan)
        values["psnr_db"].append(-10 * math.log10(max(np.mean(error**2), 1e-10)))
        values["mae"].append(np.abs(error).mean())
    values["ms_ssim"] = ms_ssim(to_float(originals), np.clip(reconstructions, 0, 1))
    return {name: np.array(value, np.float64) for name, value in values.items()}


def ssim_map(original: np.ndarray, reconstruction: np.ndarray) -> np.ndarray:
    """Compute structural similarity at each pixel of two (H, W) images in [0, 1] (Wang et al. 2004).

    Uses scikit-image with a Gaussian window of sigma 1.5, data range 1 and population covariance.

    Returns:
        (H, W) in [-1, 1].
    """
    settings = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1.0}
    return structural_similarity(original, reconstruction, full=True, **settings)[1]


def ms_ssim(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Compute multi-scale structural similarity of image pairs (Wang, Simoncelli & Bovik 2003, equation 7).

    Uses TensorFlow with the five scales and weights of the paper. Images smaller than 176 pixels use only the scales
    that leave at least 11 pixels for the window (four at 96 × 96), and the weights are rescaled to sum to 1.

    Args:
        x: (N, H, W, 1) float32 in [0, 1].
        y: The same shape and range.

    Returns:
        (N,) float32 in [0, 1].
    """
    weights = np.array([0.0448, 0.2856, 0.3001, 0.2363, 0.1333])
    scales = min(len(weights), 1 + int(math.log2(min(x.shape[1:3]) / 11)))
    weights = weights[:scales] / weights[:scales].sum()
    batches = [slice(i, i + 64) for i in range(0, len(x), 64)]
    return np.concatenate(
        [tf.image.ssim_multiscale(x[b], y[b], max_val=1.0, power_factors=weights).numpy() for b in batches]
    )


def power_spectrum(images: np.ndarray) -> np.ndarray:
    """Compute the power at each spatial frequency, averaged over images and directions.

    Args:
        images: (N, S, S, 1) float32.

    Returns:
        (S // 2,) float64 at 1 / S, 2 / S, … cycles per pixel up to the Nyquist frequency 0.5, without frequency 0.
    """
    size = images.shape[1]
    power = np.mean([np.abs(np.fft.fft2(image[..., 0])) ** 2 for image in images], axis=0)
    frequencies = np.fft.fftfreq(size) * size
    radius = np.rint(np.hypot(frequencies[:, None], frequencies)).astype(int)
    return (np.bincount(radius.ravel(), power.ravel()) / np.bincount(radius.ravel()))[1 : size // 2 + 1]


def half_power_frequency(original: np.ndarray, reconstruction: np.ndarray) -> float:
    """Return the frequency, in cycles per pixel, up to which reconstructions have half of the original power or more.

    The lower it is, the blurrier the reconstructions. At most 0.5, the Nyquist frequency.

    Args:
        original: (S // 2,) power spectrum, see `power_spectrum`.
        reconstruction: The same of the reconstructions.
    """
    too_low = np.flatnonzero(reconstruction < original / 2)
    return float((too_low[0] if len(too_low) else len(original)) / (2 * len(original)))


def power_ratios(original: np.ndarray, other: np.ndarray) -> dict[str, float]:
    """Compare two power spectra in three bands.

    Args:
        original: (S // 2,) power spectrum of real slices, see `power_spectrum`.
        other: The same of other images.

    Returns:
        power_low, power_middle, power_high: Power of the other images relative to the real slices below an eighth, from
        an eighth to a quarter, and above a quarter of a cycle per pixel. 1 is best; less means blur, more noise.
    """
    frequencies = np.arange(1, len(original) + 1) / (2 * len(original))
    bands = np.digitize(frequencies, [0.125, 0.25])
    # Each frequency stands for a ring of the two-dimensional spectrum, whose size grows with the frequency.
    power = [np.bincount(bands, frequencies * spectrum, 3) for spectrum in (original, other)]
    ratios = power[1] / np.maximum(power[0], 1e-12)
    return {f"power_{name}": float(ratio) for name, ratio in zip(("low", "middle", "high"), ratios, strict=True)}


# ------------------------------------------------------------------------------------ codes and likelihood


def nats_by_split(results: Results) -> dict[str, list[np.ndarray]]:
    """Nats per code of all test slices and of the compared slices of the other splits, (N,) per level."""
    nats = {}
    for split, slices in results.slices.items():
        chosen = np.arange(len(slices)) if split == "test" else results.compared[split]
        codes = [indices[chosen] for indices in results.codes[split]]
        nats[split] = results.generator.nats_per_code(codes, slices.positions[chosen])
    return nats


def code_and_prior_metrics(results: Results, nats_by_slice: dict[str, list[np.ndarray]]) -> dict[str, Any]:
    """Measure codebook use and the cross-entropy of the priors.

    Args:
        results: Everything that a run has produced.
        nats_by_slice: See `nats_by_split`.

    Returns:
        The numbers of `code_metrics` and `prior_metrics` on the test split, and the same cross-entropy on the other
        splits (prior_nats_per_code_train, prior_nats_per_code_validate), combined by `combine_levels`. All are
        evaluated alike, with the final weights and without dropout, so that the splits can be compared.
    """
    generator = results.generator
    nats = {
        split: [float(np.mean(values, dtype=np.float64)) for values in by_level]
        for split, by_level in nats_by_slice.items()
    }
    levels = [
        {
            **code_metrics(indices, generator.num_embeddings, generator.background_code),
            **prior_metrics(nats["test"][level], indices[0].size),
            "prior_nats_per_code_train": nats["train"][level],
            "prior_nats_per_code_validate": nats["validate"][level],
        }
        for level, indices in enumerate(results.codes["test"])
    ]
    return combine_levels(levels, generator.level_names)


def code_metrics(codes: np.ndarray, num_embeddings: int, background_code: bool = False) -> dict[str, float]:
    """Measure how code indices (N, h, w) use a codebook of `num_embeddings` codes.

    Args:
        codes: The code indices.
        num_embeddings: Number of codes.
        background_code: Whether code 0 is reserved for background. `codes_used` and `perplexity` then leave it out.

    Returns:
        codes_used: Fraction of the codes that occur.
        perplexity: exp of the entropy of a single code, between 1 and the number of codes.
        marginal_entropy_bits_per_image: Bits per image if each code is coded independently by its frequency. The
            difference to the bits of the prior is what the prior has learnt about dependence between codes.
    """
    counts = np.bincount(codes.ravel(), minlength=num_embeddings)
    drawing = counts[int(background_code) :]
    return {
        "codes_used": float(np.mean(drawing > 0)),
        "perplexity": float(np.exp(entropy(drawing))),
        "marginal_entropy_bits_per_image": float(entropy(counts) / math.log(2) * codes[0].size),
    }


def entropy(counts: np.ndarray) -> float:
    """Return the entropy of relative frequencies in nats, given how often each value occurs."""
    frequencies = counts[counts > 0] / max(counts.sum(), 1)
    return float(-np.sum(frequencies * np.log(frequencies)))


def prior_metrics(nats_per_code: float, codes_per_image: int) -> dict[str, float]:
    """Convert the cross-entropy of a prior to nats per code, bits per code and bits per image."""
    bits = nats_per_code / math.log(2)
    return {
        "prior_nats_per_code": nats_per_code,
        "prior_bits_per_code": bits,
        "prior_bits_per_image": bits * codes_per_image,
    }


def combine_levels(levels: list[dict[str, float]], names: tuple[str, ...]) -> dict[str, Any]:
    """Combine the numbers of all levels.

    The numbers of a single level are returned as they are. Of several levels, each number becomes {level: number},
    except bits per image, which are summed; their summands are in `*_by_level`.
    """
    if len(levels) == 1:
        return levels[0]
    combined: dict[str, Any] = {
        key: {name: level[key] for name, level in zip(names, levels, strict=True)} for key in levels[0]
    }
    for key in ("marginal_entropy_bits_per_image", "prior_bits_per_image"):
        combined[f"{key}_by_level"] = combined[key]
        combined[key] = sum(combined[key].values())
    return combined


def likelihood_metrics(results: Results, prior_bits_per_image: float) -> dict[str, float]:
    """Compute an upper bound on −log₂ p(x) / (H · W) of 8-bit test images x, in bits per pixel.

    An image is coded as its slice position, each position with the same probability; its code indices, using the prior;
    and its pixels given the codes, using a logistic distribution around the decoder's output that is discretised to 8
    bits (Salimans et al. 2017, equation 2). This is an upper bound because other codes may yield the same image. The
    scale of the logistic is fitted on the validation split, separately for each grey level that the decoder predicts:
    black is more certain than edges.

    Args:
        results: Everything that a run has produced.
        prior_bits_per_image: Bits per image by the priors, all levels together.

    Returns:
        bits_per_dimension: Sum of position_bits_per_dimension, prior_bits_per_dimension and decoder_bits_per_dimension.
        png_bits_per_dimension, webp_bits_per_dimension: For comparison, those of lossless files, headers included.
    """
    validate, test = results.slices["validate"], results.slices["test"]
    scales = fit_logistic_scales(joint_histogram(validate.images, results.reconstructions["validate"]))
    pixels = test.images[0].size
    parts = {
        "position_bits_per_dimension": math.log2(len(results.generator.positions)) / pixels,
        "prior_bits_per_dimension": prior_bits_per_image / pixels,
        "decoder_bits_per_dimension": logistic_bits(
            joint_histogram(test.images, results.reconstructions["test"]), scales
        ),
    }
    return {
        "bits_per_dimension": sum(parts.values()),
        **parts,
        "png_bits_per_dimension": file_bits(test.images, "PNG", optimize=True),
        "webp_bits_per_dimension": file_bits(test.images, "WEBP", lossless=True, quality=100, method=6),
    }


def file_bits(images: np.ndarray, file_format: str, **options: Any) -> float:
    """Return the bits per pixel of images (N, H, W, 1) uint8 in files of a format; NaN if Pillow cannot write it."""
    size = 0
    for image in images:
        with io.BytesIO() as file:
            try:
                Image.fromarray(image[..., 0]).save(file, file_format, **options)
            except (KeyError, OSError):  # Pillow was built without the format.
                return math.nan
            size += len(file.getvalue())
    return 8 * size / images.size


def joint_histogram(originals: np.ndarray, predictions: np.ndarray) -> np.ndarray:
    """Count pixels by predicted and true grey level.

    The likelihood needs nothing else, because predictions are rounded to 8 bits.

    Args:
        originals: (N, H, W, 1) uint8.
        predictions: (N, H, W, 1) float, clipped to [0, 1].

    Returns:
        (256, 256) counts, indexed by [predicted level, true level].
    """
    predicted = to_uint8(predictions).astype(np.int64)
    return np.bincount((predicted * 256 + originals).ravel(), minlength=256**2).reshape(256, 256)


def fit_logistic_scales(counts: np.ndarray) -> np.ndarray:
    """Fit the scale of the logistic, in grey levels, at each predicted grey level by maximum likelihood.

    Args:
        counts: (256, 256), see `joint_histogram`.

    Returns:
        (256,) float64, on a grid from 0.02 to 64. Predicted levels with fewer than 100 pixels use the scale that fits
        all pixels best.
    """
    candidates = np.geomspace(0.02, 64, 60)
    nats = np.stack([-np.sum(counts * _logistic_log_prob(np.full(256, s)), axis=1) for s in candidates])  # (60, 256)
    best = candidates[np.argmin(nats, axis=0)]
    return np.where(counts.sum(axis=1) >= 100, best, candidates[np.argmin(nats.sum(axis=1))])


def logistic_bits(counts: np.ndarray, scales: np.ndarray) -> float:
    """Return the mean bits per pixel of a `joint_histogram` under logistics with scales (256,), in grey levels."""
    return float(-np.sum(counts * _logistic_log_prob(scales)) / counts.sum() / math.log(2))


def _logistic_log_prob(scales: np.ndarray) -> np.ndarray:
    """Return (256, 256) log probabilities, indexed by [predicted level, true level], given scales (256,)."""
    tfd, levels = tfp.distributions, np.arange(256.0)
    logistic = tfd.Logistic(levels[:, None], scales[:, None])
    # QuantizedDistribution rounds up. Subtracting half a level makes it round to the nearest level.
    shifted = tfd.TransformedDistribution(logistic, tfp.bijectors.Shift(np.float64(-0.5)))
    return tfd.QuantizedDistribution(shifted, low=0.0, high=255.0).log_prob(levels).numpy()


def _mean(values: np.ndarray) -> float:
    """Return the mean of all values that are not NaN; NaN if there are none."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else math.nan
