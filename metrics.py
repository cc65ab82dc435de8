"""Every number in metrics.json: reconstructions, codes, likelihood, and samples compared with real slices.

Each function depends on its arguments and `seed` only, never on what ran before.
"""

import math
from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_probability as tfp
from skimage.metrics import structural_similarity

import two_sample
from dataset import Slices
from generator import Generator, Results

BRAIN_THRESHOLD = 0.05  # Pixels of the original that are brighter than this belong to the brain.
RECONSTRUCTION_METRICS = ("ssim", "ssim_brain", "ms_ssim", "psnr_db", "mae")  # One number per slice each.


def measure(results: Results, seed: int) -> dict[str, Any]:
    """Compute the contents of metrics.json; undefined numbers are None.

    Args:
        results: Everything that a run has produced. `results.numbers` is not used.
        seed: Seed of the bootstrap, the random pairs and the classifiers.

    Returns:
        The sizes of the test split (`test_slices`, `test_subjects`) and the numbers of `reconstruction_metrics`,
        `code_and_prior_metrics`, `likelihood_metrics` and `sample_metrics`.
    """
    print("measuring reconstructions, codes and likelihood on the test split")
    validation, test = results.slices["validate"], results.slices["test"]
    reconstructions = results.reconstructions["test"]
    numbers: dict[str, Any] = {
        "test_slices": len(test),
        "test_subjects": len(set(test.subjects)),
        **reconstruction_metrics(test.images, reconstructions, test.positions, test.subjects, seed),
        **code_and_prior_metrics(results.generator, results.codes["test"], test.positions),
    }
    numbers |= likelihood_metrics(
        (validation.images, results.reconstructions["validate"]),
        (test.images, reconstructions),
        numbers["prior_bits_per_image"],
    )
    samples = results.test_samples.images
    print(f"comparing {len(samples)} samples with the test split")
    numbers |= sample_metrics(samples, reconstructions, test, results.slices["train"], seed)
    return _replace_nan(numbers)


def _replace_nan(value: Any) -> Any:
    """Replace NaN by None in nested dictionaries and lists, because JSON has no NaN."""
    if isinstance(value, dict):
        return {key: _replace_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_replace_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


# -------------------------------------------------------------------------------------- reconstructions


def reconstruction_metrics(
    originals: np.ndarray, reconstructions: np.ndarray, positions: np.ndarray, subjects: np.ndarray, seed: int
) -> dict[str, Any]:
    """Measure how close reconstructions are to their originals.

    Args:
        originals: (N, H, W, 1) uint8.
        reconstructions: (N, H, W, 1) float32, clipped to [0, 1].
        positions: (N,) slice positions.
        subjects: (N,) subject of each slice.
        seed: Seed of the bootstrap.

    Returns:
        The mean over slices of each of `RECONSTRUCTION_METRICS` (see `metrics_by_slice`); `*_interval`, its 95 %
        interval over subjects; `by_position`, the means at each slice position; `worst_slices`, the ten slices with
        the lowest `ssim_brain`, worst first; and `half_power_frequency`.
    """
    values = metrics_by_slice(originals, reconstructions)
    numbers: dict[str, Any] = {}
    for name in RECONSTRUCTION_METRICS:
        numbers[name] = _mean(values[name])
        numbers[f"{name}_interval"] = two_sample.interval_over_subjects(values[name], subjects, seed)

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
    numbers["half_power_frequency"] = half_power_frequency(
        power_spectrum(originals / np.float32(255)), power_spectrum(reconstructions)
    )
    return numbers


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
        original, reconstruction = original[..., 0] / np.float32(255), np.clip(reconstruction[..., 0], 0, 1)
        similarity, brain = ssim_map(original, reconstruction), original > BRAIN_THRESHOLD
        error = original.astype(np.float64) - reconstruction
        values["ssim"].append(similarity[5:-5, 5:-5].mean())
        values["ssim_brain"].append(similarity[brain].mean() if brain.any() else math.nan)
        values["psnr_db"].append(-10 * math.log10(max(np.mean(error**2), 1e-10)))
        values["mae"].append(np.abs(error).mean())
    values["ms_ssim"] = ms_ssim(originals / np.float32(255), np.clip(reconstructions, 0, 1))
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
    """Return the highest frequency, in cycles per pixel, at which reconstructions have half of the original power.

    The lower it is, the blurrier the reconstructions, but noise raises it. At most 0.5, the Nyquist frequency.

    Args:
        original: (S // 2,) power spectrum, see `power_spectrum`.
        reconstruction: The same of the reconstructions.
    """
    enough = np.flatnonzero(reconstruction >= original / 2)
    return float((enough[-1] + 1) / (2 * len(original))) if len(enough) else 0.0


# ------------------------------------------------------------------------------------ codes and likelihood


def code_and_prior_metrics(generator: Generator, codes: list[np.ndarray], positions: np.ndarray) -> dict[str, Any]:
    """Measure codebook use and the cross-entropy of the priors.

    Args:
        generator: The trained networks.
        codes: (N, h, w) code indices of each level, the coarsest first.
        positions: (N,) slice positions.

    Returns:
        The numbers of `code_metrics` and `prior_metrics`, combined by `combine_levels`.
    """
    nats = generator.nats_per_code(codes, positions)
    levels = [
        {
            **code_metrics(indices, generator.num_embeddings),
            **prior_metrics(float(np.mean(values, dtype=np.float64)), indices[0].size),
        }
        for indices, values in zip(codes, nats, strict=True)
    ]
    return combine_levels(levels, generator.level_names)


def code_metrics(codes: np.ndarray, num_embeddings: int) -> dict[str, float]:
    """Measure how code indices (N, h, w) use a codebook of `num_embeddings` codes.

    Returns:
        codes_used: Fraction of the codes that occur.
        perplexity: exp of the entropy of a single code, between 1 and `num_embeddings`.
        marginal_entropy_bits_per_image: Bits per image if each code is coded independently by its frequency. The
            difference to the bits of the prior is what the prior has learnt about dependence between codes.
    """
    counts = np.bincount(codes.ravel(), minlength=num_embeddings)
    frequencies = counts[counts > 0] / counts.sum()
    nats = -np.sum(frequencies * np.log(frequencies))
    return {
        "codes_used": float(np.mean(counts > 0)),
        "perplexity": float(np.exp(nats)),
        "marginal_entropy_bits_per_image": float(nats / math.log(2) * codes[0].size),
    }


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


def likelihood_metrics(
    validation: tuple[np.ndarray, np.ndarray], test: tuple[np.ndarray, np.ndarray], prior_bits_per_image: float
) -> dict[str, float]:
    """Compute an upper bound on −log₂ p(x) / (H · W) of 8-bit test images x, in bits per pixel.

    An image is coded as its code indices, using the prior, followed by its pixels given the codes, using a logistic
    distribution around the decoder's output that is discretised to 8 bits (Salimans et al. 2017, equation 2). This
    is an upper bound because other codes may yield the same image. The scale of the logistic is fitted on the
    validation split, separately for each grey level that the decoder predicts: black is more certain than edges.

    Args:
        validation: Originals (N, H, W, 1) uint8 and their reconstructions, float32 in [0, 1].
        test: The same of the test split.
        prior_bits_per_image: Bits per image by the priors, all levels together.

    Returns:
        bits_per_dimension: Sum of prior_bits_per_dimension and decoder_bits_per_dimension.
        histogram_bits_per_dimension: Entropy of the grey level histogram of the test pixels, for comparison.
    """
    scales = fit_logistic_scales(joint_histogram(*validation))
    counts = joint_histogram(*test)
    prior = prior_bits_per_image / test[0][0].size
    decoder = logistic_bits(counts, scales)
    frequencies = counts.sum(axis=0) / counts.sum()
    return {
        "bits_per_dimension": prior + decoder,
        "prior_bits_per_dimension": prior,
        "decoder_bits_per_dimension": decoder,
        "histogram_bits_per_dimension": float(-np.sum(frequencies * np.log2(np.maximum(frequencies, 1e-300)))),
    }


def joint_histogram(originals: np.ndarray, predictions: np.ndarray) -> np.ndarray:
    """Count pixels by predicted and true grey level.

    The likelihood needs nothing else, because predictions are rounded to 8 bits.

    Args:
        originals: (N, H, W, 1) uint8.
        predictions: (N, H, W, 1) float, clipped to [0, 1].

    Returns:
        (256, 256) counts, indexed by [predicted level, true level].
    """
    predicted = np.rint(np.clip(predictions, 0, 1) * 255).astype(np.int64)
    return np.bincount((predicted * 256 + originals).ravel(), minlength=256**2).reshape(256, 256)


def fit_logistic_scales(counts: np.ndarray, min_pixels: int = 100) -> np.ndarray:
    """Fit the scale of the logistic, in grey levels, at each predicted grey level by maximum likelihood.

    Args:
        counts: (256, 256), see `joint_histogram`.
        min_pixels: Predicted levels with fewer pixels use the scale that fits all pixels best.

    Returns:
        (256,) float64, on a grid from 0.02 to 64.
    """
    candidates = np.geomspace(0.02, 64, 60)
    nats = np.stack([-np.sum(counts * _logistic_log_prob(np.full(256, s)), axis=1) for s in candidates])  # (60, 256)
    best = candidates[np.argmin(nats, axis=0)]
    return np.where(counts.sum(axis=1) >= min_pixels, best, candidates[np.argmin(nats.sum(axis=1))])


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


# ---------------------------------------------------------------------------------------------- samples


def sample_metrics(
    samples: np.ndarray, reconstructions: np.ndarray, test: Slices, training: Slices, seed: int
) -> dict[str, Any]:
    """Compare samples with real slices of the test subjects, which no network has seen.

    Two reference sets are compared with the test slices in the same way: their reconstructions, the best that the
    decoder allows, and real slices of other subjects (`matched_training_slices`), the best that any model can reach.
    All sets have the same number of slices at the same positions, and all pass through `to_display_uint8` first.

    Args:
        samples: (N, H, W, 1) float32 in [0, 1], one sample at the position of each test slice.
        reconstructions: (N, H, W, 1) float32 in [0, 1], in the order of the test slices.
        test: The N slices of the test split.
        training: The slices of the training split.
        seed: Seed of the pairs, the classifiers and the bootstrap.

    Returns:
        Two dictionaries, `samples` and `references`. `samples` holds

        - count: N.
        - c2st_real, c2st_reconstructions: `two_sample.classifier_two_sample_test` against the real slices and against
          their reconstructions.
        - The numbers of `two_sample.prdc`, `two_sample.mmd2` and `two_sample.nearest_neighbour_metrics`.
        - ms_ssim_of_pairs: Mean MS-SSIM of pairs at the same position.
        - nearest_to_training: The ten samples nearest to a training slice in pixels, as {index, train_index, distance}.

        `references` holds the same numbers of `reconstructions` and of `other_subjects`, except those that only make
        sense for samples, and real_ms_ssim_of_pairs.
    """
    positions, subjects = test.positions, test.subjects
    matched = matched_training_slices(training.positions, training.subjects, positions, subjects, seed)
    real, train = to_display_uint8(test.images), to_display_uint8(training.images)
    decoded = to_display_uint8(reconstructions)
    sets = {  # Images and their subjects. Every sample counts as a subject of its own.
        "samples": (to_display_uint8(samples), np.array([f"sample {i}" for i in range(len(samples))])),
        "reconstructions": (decoded, subjects),
        "other_subjects": (train[matched], training.subjects[matched]),
    }
    train_features = two_sample.random_features(train)
    whiten = two_sample.whitening(train_features)
    real_features, train_features = whiten(two_sample.random_features(real)), whiten(train_features)
    real_distances = {
        "pixels": two_sample.nearest_neighbours(_flat(real), _flat(train), subjects, training.subjects)[1],
        "features": two_sample.nearest_neighbours(real_features, train_features, subjects, training.subjects)[1],
    }
    pairs = random_pairs(positions, subjects, seed)
    found: dict[str, dict[str, Any]] = {}
    for name, (images, owners) in sets.items():
        features = whiten(two_sample.random_features(images))
        index, pixels = two_sample.nearest_neighbours(_flat(images), _flat(train), owners, training.subjects)
        distances = {
            "pixels": pixels,
            "features": two_sample.nearest_neighbours(features, train_features, owners, training.subjects)[1],
        }
        found[name] = {
            "c2st_real": two_sample.classifier_two_sample_test(real, images, subjects, seed),
            **two_sample.prdc(real_features, features, subjects, owners),
            **two_sample.mmd2(real_features, features, subjects, owners),
            "ms_ssim_of_pairs": ms_ssim_of_pairs(images, pairs),
            **two_sample.nearest_neighbour_metrics(distances, real_distances),
        }
        if name == "samples":
            found[name] |= {
                "count": len(samples),
                "c2st_reconstructions": two_sample.classifier_two_sample_test(decoded, images, subjects, seed),
                "nearest_to_training": [
                    {"index": int(i), "train_index": int(index[i]), "distance": float(pixels[i])}
                    for i in np.argsort(pixels, kind="stable")[:10]
                ],
            }
    references = {name: found[name] for name in ("reconstructions", "other_subjects")}
    return {
        "samples": found["samples"],
        "references": {**references, "real_ms_ssim_of_pairs": ms_ssim_of_pairs(real, pairs)},
    }


def to_display_uint8(images: np.ndarray) -> np.ndarray:
    """Convert images to what an 8-bit PNG with a clean background shows: values up to 0.05 become black.

    Decoders leave faint noise where real slices are exactly black. No comparison should depend on it.

    Args:
        images: (N, H, W, 1) uint8, or float, clipped to [0, 1].

    Returns:
        (N, H, W, 1) uint8.
    """
    if images.dtype != np.uint8:
        images = np.rint(np.clip(images, 0, 1) * 255).astype(np.uint8)
    return np.where(images > BRAIN_THRESHOLD * 255, images, np.uint8(0))


def matched_training_slices(
    train_positions: np.ndarray, train_subjects: np.ndarray, positions: np.ndarray, subjects: np.ndarray, seed: int
) -> np.ndarray:
    """Choose a training slice for each test slice, such that both sets have the same composition.

    Each test subject is matched with a random training subject, a different one each time as long as there are any,
    and each of its slices with that subject's slice at the nearest position.

    Returns:
        (N,) indices of training slices.
    """
    names, train_names = np.unique(subjects), np.unique(train_subjects)
    partners = np.resize(np.random.default_rng(seed).permutation(train_names), len(names))
    chosen = np.empty(len(subjects), np.int64)
    for name, partner in zip(names, partners, strict=True):
        own, others = np.flatnonzero(subjects == name), np.flatnonzero(train_subjects == partner)
        chosen[own] = others[np.abs(positions[own][:, None] - train_positions[others]).argmin(axis=1)]
    return chosen


def random_pairs(positions: np.ndarray, subjects: np.ndarray, seed: int, rounds: int = 3) -> np.ndarray:
    """Draw pairs of slices at the same position that show different subjects, up to `rounds` per slice.

    Returns:
        (P, 2) indices, P at most N · `rounds`.
    """
    rng, pairs = np.random.default_rng(seed), []
    for i in range(len(positions)):
        partners = np.flatnonzero((positions == positions[i]) & (subjects != subjects[i]))
        pairs += [(i, j) for j in rng.permutation(partners)[:rounds]]
    return np.array(pairs, np.int64).reshape(-1, 2)


def ms_ssim_of_pairs(images: np.ndarray, pairs: np.ndarray) -> float:
    """Return the mean MS-SSIM of pairs (P, 2) of uint8 images; higher is less varied. NaN if there are no pairs."""
    x, y = (images[pairs[:, side]] / np.float32(255) for side in (0, 1))
    return float(ms_ssim(x, y).mean()) if len(pairs) else math.nan


def _flat(images: np.ndarray) -> np.ndarray:
    return images.reshape(len(images), -1)


def _mean(values: np.ndarray) -> float:
    """Return the mean of all values that are not NaN; NaN if there are none."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else math.nan
