"""Every number in metrics.json: reconstructions, codes, likelihood, and how new brains compare with real ones.

The same images and seed give the same numbers, whatever ran before.
"""

import math
from collections.abc import Callable

import keras
import numpy as np
import tensorflow as tf
import tensorflow_probability as tfp
from skimage.metrics import structural_similarity

BRAIN = 0.05  # a pixel brighter than this in the original belongs to the brain
MEASURES = ("ssim", "ssim_brain", "ms_ssim", "psnr_db", "mae")  # of a reconstruction, a number a slice
FOLDS = 5  # of the two-sample test


# -------------------------------------------------------------------------------------- reconstructions


def reconstruction_metrics(
    originals: np.ndarray, reconstructions: np.ndarray, positions: np.ndarray, cases: np.ndarray, seed: int
) -> dict:
    """How near reconstructions are to their originals.

    Args:
        originals: (N, H, W, 1) uint8.
        reconstructions: (N, H, W, 1) float32, clipped to [0, 1].
        positions, cases: (N,) slice position and person of each.
        seed: of the bootstrap.

    Returns:
        The mean of each of `measures_by_slice` over the slices, `…_interval` with its 95 % interval over people,
        `by_position` with the means at each slice position, `worst_slices` with the ten slices of lowest
        `ssim_brain`, the worst first, and `half_power_frequency`, see there.
    """
    values = measures_by_slice(originals, reconstructions)
    numbers = {}
    for name in MEASURES:
        numbers[name] = _mean(values[name])
        numbers[f"{name}_interval"] = interval_over_people(values[name], cases, seed)

    def row(chosen: np.ndarray) -> dict[str, float]:
        return {name: _mean(values[name][chosen]) for name in MEASURES}

    numbers["by_position"] = [
        {"position": int(at), "slices": int(np.sum(positions == at)), **row(positions == at)}
        for at in np.unique(positions)
    ]
    worst = np.argsort(values["ssim_brain"], kind="stable")[: min(10, len(cases))]  # slices without brain come last
    numbers["worst_slices"] = [
        {"index": int(i), "case": str(cases[i]), "position": int(positions[i]), **row(np.array([i]))} for i in worst
    ]
    numbers["half_power_frequency"] = half_power_frequency(
        power_spectrum(originals / np.float32(255)), power_spectrum(reconstructions)
    )
    return numbers


def measures_by_slice(originals: np.ndarray, reconstructions: np.ndarray) -> dict[str, np.ndarray]:
    """Each of `MEASURES` for each slice, (N,) float64; arguments as in `reconstruction_metrics`.

    ssim: structural similarity over the whole slice, without the 5 pixels at the edges (scikit-image's mean).
    ssim_brain: mean of the SSIM map over the brain, where the original is above 0.05; NaN where there is none.
        Seven tenths of a slice are black and flatter `ssim`.
    ms_ssim: see `ms_ssim`.
    psnr_db: peak signal-to-noise ratio with peak 1, in dB; the mean squared error is taken as at least 1e-10,
        so that identical images count 100 dB.
    mae: mean absolute error of a pixel on the [0, 1] scale.
    """
    values = {name: [] for name in MEASURES}
    for original, reconstruction in zip(originals, reconstructions, strict=True):
        original, reconstruction = original[..., 0] / np.float32(255), np.clip(reconstruction[..., 0], 0, 1)
        similarity, brain = ssim_map(original, reconstruction), original > BRAIN
        error = original.astype(np.float64) - reconstruction
        values["ssim"].append(similarity[5:-5, 5:-5].mean())
        values["ssim_brain"].append(similarity[brain].mean() if brain.any() else math.nan)
        values["psnr_db"].append(-10 * math.log10(max(np.mean(error**2), 1e-10)))
        values["mae"].append(np.abs(error).mean())
    values["ms_ssim"] = ms_ssim(originals / np.float32(255), np.clip(reconstructions, 0, 1))
    return {name: np.array(value, np.float64) for name, value in values.items()}


def ssim_map(original: np.ndarray, reconstruction: np.ndarray) -> np.ndarray:
    """Structural similarity at each pixel of two (H, W) images in [0, 1] (Wang et al. 2004): (H, W).

    Gaussian window of sigma 1.5, data range 1, population covariance, by scikit-image.
    """
    wang = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1.0}
    return structural_similarity(original, reconstruction, full=True, **wang)[1]


def ms_ssim(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Multi-scale structural similarity of pairs of images (Wang, Simoncelli & Bovik 2003, equation 7).

    By TensorFlow, with the paper's five scales and weights, or as many of them as keep 11 pixels for the window
    (four at 96 × 96), the weights then scaled to sum to 1.

    Args:
        x, y: (N, H, W, 1) float32 in [0, 1].

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


def interval_over_people(values: np.ndarray, cases: np.ndarray, seed: int, resamples: int = 2000) -> list[float]:
    """95 % interval of the mean of a number a slice, by a bootstrap that draws people, not slices.

    Slices of a person are not independent: drawing slices would give far too narrow an interval. Each resample
    draws as many people as there are, with replacement, and takes all their slices.

    Args:
        values: (N,); NaN is left out. cases: (N,) person of each.

    Returns:
        [lower, upper]; [None, None] where nothing can be said: fewer than two people.
    """
    known = ~np.isnan(values)
    people, person = np.unique(cases[known], return_inverse=True)
    if len(people) < 2:
        return [None, None]
    sums, counts = np.bincount(person, values[known]), np.bincount(person)
    drawn = np.random.default_rng(seed).integers(len(people), size=(resamples, len(people)))
    means = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    return [float(bound) for bound in np.percentile(means, [2.5, 97.5])]


def power_spectrum(images: np.ndarray) -> np.ndarray:
    """Power by spatial frequency: mean over images and over all directions.

    Args:
        images: (N, S, S, 1) float32.

    Returns:
        (S // 2,) float64, at 1 / S, 2 / S, … cycles a pixel up to Nyquist's 0.5 (frequency 0 is left out).
    """
    size = images.shape[1]
    power = np.mean([np.abs(np.fft.fft2(image[..., 0])) ** 2 for image in images], axis=0)
    frequencies = np.fft.fftfreq(size) * size
    radius = np.rint(np.hypot(frequencies[:, None], frequencies)).astype(int)
    return (np.bincount(radius.ravel(), power.ravel()) / np.bincount(radius.ravel()))[1 : size // 2 + 1]


def half_power_frequency(original: np.ndarray, reconstruction: np.ndarray) -> float:
    """Frequency above which reconstructions hold less than half the power of the originals, in cycles a pixel.

    The lower, the blurrier; 0.5, Nyquist's frequency, means that they hold half of it everywhere. Above it, at
    all frequencies, the ratio of the two `power_spectrum`s stays below a half.
    """
    enough = np.flatnonzero(reconstruction >= original / 2)
    return float((enough[-1] + 1) / (2 * len(original))) if len(enough) else 0.0


# ------------------------------------------------------------------------------------ codes and likelihood


def code_metrics(codes: np.ndarray, num_embeddings: int) -> dict[str, float]:
    """How a set of code indices (N, h, w) uses the codebook.

    Returns:
        codes_used: share of the codes that occur at all.
        perplexity: exp of the entropy of a code on its own; at most `num_embeddings`.
        independent_bits_per_image: bits for an image's codes, each coded by its own frequency. What the prior
            needs less than that is what it has learned of how codes go together.
    """
    counts = np.bincount(codes.ravel(), minlength=num_embeddings)
    share = counts[counts > 0] / counts.sum()
    nats = -np.sum(share * np.log(share))
    return {
        "codes_used": float(np.mean(counts > 0)),
        "perplexity": float(np.exp(nats)),
        "independent_bits_per_image": float(nats / math.log(2) * codes[0].size),
    }


def prior_metrics(nats_per_code: float, codes_per_image: int) -> dict[str, float]:
    """The prior's cross-entropy, in nats and bits a code and in bits an image."""
    bits = nats_per_code / math.log(2)
    return {
        "prior_nats_per_code": nats_per_code,
        "prior_bits_per_code": bits,
        "prior_bits_per_image": bits * codes_per_image,
    }


def by_level(levels: list[dict[str, float]], names: tuple[str, ...]) -> dict:
    """The numbers of one level as they are; of several as {name of the level: number}, and the bits an image summed.

    The sums keep the plain names; what each level adds to them has `_by_level` after it.
    """
    if len(levels) == 1:
        return levels[0]
    nested = {key: {name: level[key] for name, level in zip(names, levels, strict=True)} for key in levels[0]}
    for key in ("independent_bits_per_image", "prior_bits_per_image"):
        nested[f"{key}_by_level"] = nested[key]
        nested[key] = sum(nested[key].values())
    return nested


def likelihood_metrics(
    validate: tuple[np.ndarray, np.ndarray], test: tuple[np.ndarray, np.ndarray], prior_bits_per_image: float
) -> dict[str, float]:
    """Bits a pixel that the whole model needs for 8-bit test images: an upper bound on −log₂ p(x) / (H · W).

    An image is sent as its codes, by the prior, then as its pixels given the codes: each has a logistic
    distribution around the decoder's output, rounded to 8 bits (Salimans et al. 2017, equation 2). Other codes
    could give the same image, so −log₂ p(x) is at most that. The logistic's scale is fitted on the
    validation split, one for each grey level that the decoder puts out: black is surer than the edge of a gyrus.

    Args:
        validate, test: (originals uint8, reconstructions float32 in [0, 1]), both (N, H, W, 1).

    Returns:
        bits_per_dimension: the sum of prior_bits_per_dimension and decoder_bits_per_dimension.
        histogram_bits_per_dimension: the entropy of the test pixels' histogram, for comparison: what each pixel
            costs by its grey level's frequency alone.
    """
    scales = fit_scales(joint_histogram(*validate))
    seen = joint_histogram(*test)
    prior = prior_bits_per_image / test[0][0].size
    decoder = logistic_bits(seen, scales)
    share = seen.sum(axis=0) / seen.sum()
    return {
        "bits_per_dimension": prior + decoder,
        "prior_bits_per_dimension": prior,
        "decoder_bits_per_dimension": decoder,
        "histogram_bits_per_dimension": float(-np.sum(share * np.log2(np.maximum(share, 1e-300)))),
    }


def joint_histogram(originals: np.ndarray, predictions: np.ndarray) -> np.ndarray:
    """(256, 256) counts of pixels, [predicted grey level, true grey level], of uint8 images and floats in [0, 1].

    All that the likelihood needs, since predictions are rounded to 8 bits: its cost does not grow with the images.
    """
    predicted = np.rint(np.clip(predictions, 0, 1) * 255).astype(np.int64)
    return np.bincount((predicted * 256 + originals).ravel(), minlength=256**2).reshape(256, 256)


def fit_scales(counts: np.ndarray, enough: int = 100) -> np.ndarray:
    """The logistic's scale, in grey levels, that fits a `joint_histogram` best at each predicted grey level: (256,).

    Levels with fewer pixels than `enough` take the scale that fits all pixels together.
    """
    candidates = np.geomspace(0.02, 64, 60)
    nats = np.stack([-np.sum(counts * _logistic_log_prob(np.full(256, s)), axis=1) for s in candidates])  # (60, 256)
    best = candidates[np.argmin(nats, axis=0)]
    return np.where(counts.sum(axis=1) >= enough, best, candidates[np.argmin(nats.sum(axis=1))])


def logistic_bits(counts: np.ndarray, scales: np.ndarray) -> float:
    """Mean bits a pixel of a `joint_histogram` (256, 256) under logistics with scales (256,), in grey levels."""
    return float(-np.sum(counts * _logistic_log_prob(scales)) / counts.sum() / math.log(2))


def _logistic_log_prob(scales: np.ndarray) -> np.ndarray:
    """(256, 256) log probability of each grey level around each predicted one, given its scale (256,)."""
    tfd, levels = tfp.distributions, np.arange(256.0)
    logistic = tfd.Logistic(levels[:, None], scales[:, None])
    # QuantizedDistribution rounds up; half a level down makes that rounding to the nearest
    shifted = tfd.TransformedDistribution(logistic, tfp.bijectors.Shift(np.float64(-0.5)))
    return tfd.QuantizedDistribution(shifted, low=0.0, high=255.0).log_prob(levels).numpy()


# -------------------------------------------------------------------------------------------- new brains


def sample_metrics(drawn: np.ndarray, reconstructions: np.ndarray, test, training, seed: int) -> dict:
    """New brains against real slices of people the model has never seen.

    Three sets are measured against the test slices, all as many and at the same slice positions:
    `drawn`, the new brains; `reconstructions` of the real slices, the best that the decoder allows; and `train`,
    real slices of other people (`stand_ins`), the best that one can hope for. All pass through `as_shown` first.

    Args:
        drawn, reconstructions: (N, H, W, 1) float32 in [0, 1], in the order of the test slices.
        test, training: `dataset.Slices` of the test split, N of them, and of the training split.
        seed: of all that is random here.

    Returns:
        count; real_ms_ssim_of_pairs; for each of drawn, reconstructions and train a dictionary with the numbers of
        `prdc`, `kernel_distance` and `copy_metrics`, ms_ssim_of_pairs, and the `two_sample_test` told_from_real and,
        for the new brains, told_from_reconstructions; and nearest_to_training, the ten new brains nearest to a
        training slice in pixels: their index, that slice's and the distance.
    """
    positions, cases = test.positions, test.cases
    others = stand_ins(training.positions, training.cases, positions, cases, seed)
    real, train = as_shown(test.images), as_shown(training.images)
    sets = {  # the images, and whom they show: no two new brains are of one person
        "drawn": (as_shown(drawn), np.array([f"new {i}" for i in range(len(drawn))])),
        "reconstructions": (as_shown(reconstructions), cases),
        "train": (train[others], training.cases[others]),
    }
    train_features = features(train)
    whiten = whitening(train_features)
    real_features, train_features = whiten(features(real)), whiten(train_features)
    real_distances = {
        "pixels": nearest(_flat(real), _flat(train), cases, training.cases)[1],
        "features": nearest(real_features, train_features, cases, training.cases)[1],
    }
    pairs = random_pairs(positions, cases, seed)
    numbers = {"count": len(drawn), "real_ms_ssim_of_pairs": ms_ssim_of_pairs(real, pairs)}
    for name, (images, people) in sets.items():
        found = whiten(features(images))
        index, pixels = nearest(_flat(images), _flat(train), people, training.cases)
        distances = {"pixels": pixels, "features": nearest(found, train_features, people, training.cases)[1]}
        numbers[name] = {
            **prdc(real_features, found, cases, people),
            **kernel_distance(real_features, found, cases, people),
            "ms_ssim_of_pairs": ms_ssim_of_pairs(images, pairs),
            "told_from_real": two_sample_test(real, images, cases, seed),
            **{key: number for on in distances for key, number in copy_metrics(distances, real_distances, on).items()},
        }
        if name == "drawn":
            decoded = sets["reconstructions"][0]
            numbers[name]["told_from_reconstructions"] = two_sample_test(decoded, images, cases, seed)
            numbers["nearest_to_training"] = [
                {"index": int(i), "train_index": int(index[i]), "distance": float(pixels[i])}
                for i in np.argsort(pixels, kind="stable")[:10]
            ]
    return numbers


def as_shown(images: np.ndarray) -> np.ndarray:
    """Images as an 8-bit PNG with a clean background: uint8, what is not above 0.05 black.

    A decoder leaves faint noise where a real slice is exactly black; no comparison should rest on that.
    """
    if images.dtype != np.uint8:
        images = np.rint(np.clip(images, 0, 1) * 255).astype(np.uint8)
    return np.where(images > BRAIN * 255, images, np.uint8(0))


def stand_ins(
    train_positions: np.ndarray, train_cases: np.ndarray, positions: np.ndarray, cases: np.ndarray, seed: int
) -> np.ndarray:
    """For each test slice the index of a training slice that takes its place: (N,).

    Each test person is replaced by a training person drawn at random, another one each time while there are any,
    and each slice by that person's at the nearest position: so the two sets have the same make-up.
    """
    people, train_people = np.unique(cases), np.unique(train_cases)
    drawn = np.resize(np.random.default_rng(seed).permutation(train_people), len(people))
    chosen = np.empty(len(cases), np.int64)
    for person, replacement in zip(people, drawn, strict=True):
        slots, own = np.flatnonzero(cases == person), np.flatnonzero(train_cases == replacement)
        chosen[slots] = own[np.abs(positions[slots][:, None] - train_positions[own]).argmin(axis=1)]
    return chosen


def features(images: np.ndarray) -> np.ndarray:
    """Features of images by a fixed convolutional network that was never trained: (N, S, S, 1) uint8 to (N, 64).

    Naeem et al. 2020 find that where images are unlike ImageNet's, a network with random weights
    judges generated images better than one trained on ImageNet, whose features have no place for them. For the same
    reason, and because it is biased upwards for few images (Bińkowski et al. 2018), there is no Fréchet Inception
    Distance here: with some hundred slices and 2,048 features its covariances could not even be estimated.

    Stages of a 3 × 3 convolution with He initialisation, a ReLU and a halving of the resolution, from 32 to at
    most 128 channels, until at most 8 × 8 positions remain; these are projected at random onto 64 numbers. The
    weights come from a generator of their own with a fixed seed and never change.
    """
    size, channels, rng = images.shape[1], 1, np.random.default_rng(20200226)
    network = keras.Sequential([keras.Input((size, size, 1))])
    weights = []
    while size > 8:
        width = min(2 * channels, 128) if channels > 1 else 32
        network.add(keras.layers.Conv2D(width, 3, padding="same", activation="relu", use_bias=False, dtype="float32"))
        network.add(keras.layers.AveragePooling2D(2, padding="same", dtype="float32"))
        weights.append(rng.normal(0, math.sqrt(2 / (9 * channels)), (3, 3, channels, width)))
        size, channels = -(-size // 2), width
    network.add(keras.layers.Flatten(dtype="float32"))
    network.add(keras.layers.Dense(64, use_bias=False, dtype="float32"))
    flat = size * size * channels
    network.set_weights([*weights, rng.normal(0, 1 / math.sqrt(flat), (flat, 64))])
    batches = (images[i : i + 64].astype(np.float32) / 255 for i in range(0, len(images), 64))
    return np.concatenate([keras.ops.convert_to_numpy(network(batch)) for batch in batches])


def whitening(reference: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """The function that turns features (N, D) so that those of `reference` (M, D) have mean 0 and covariance 1.

    The features of a random network go together: without this, brain size alone would decide all distances.
    """
    centre = reference.mean(axis=0)
    variances, directions = np.linalg.eigh(np.cov(reference - centre, rowvar=False))
    scaled = directions / np.sqrt(np.maximum(variances, 1e-6 * variances.max() + 1e-12))
    return lambda found: ((found - centre) @ scaled).astype(np.float32)


def prdc(real: np.ndarray, fake: np.ndarray, real_people=None, fake_people=None, k: int = 5) -> dict[str, float]:
    """Precision and recall (Kynkäänniemi et al. 2019), density and coverage (Naeem et al. 2020).

    A set's manifold is the union of balls around its features that reach to their k-th neighbour in the set.
    Slices of one person are no neighbours: they lie so near to each other that the balls would hold nobody else.

    Args:
        real, fake: (N, D) and (M, D) features.
        real_people, fake_people: (N,) and (M,) whom they show; without, all are of different people.

    Returns:
        precision: share of fakes in the manifold of the real.
        recall: share of the real in the manifold of the fakes.
        density: how many balls of the real a fake lies in, over k; where all are of different people, 1 for equal
            distributions. Not bounded.
        coverage: share of real balls with a fake in them; where all are of different people, 1 − 2^−k on average
            for large sets of equal distributions.
        All NaN where no ball has k neighbours.
    """
    real_people = np.arange(len(real)) if real_people is None else real_people
    fake_people = np.arange(len(fake)) + len(real) if fake_people is None else fake_people

    def distances(x: np.ndarray, y: np.ndarray, x_people: np.ndarray, y_people: np.ndarray) -> np.ndarray:
        return np.where(x_people[:, None] == y_people, np.inf, _squared_distances(x, y))

    def reach(points: np.ndarray, people: np.ndarray) -> np.ndarray:
        return np.partition(distances(points, points, people, people), k - 1, axis=1)[:, k - 1]

    if min(len(real), len(fake)) < k:
        return dict.fromkeys(("precision", "recall", "density", "coverage"), math.nan)
    between = distances(real, fake, real_people, fake_people)
    real_reach, fake_reach = reach(real, real_people), reach(fake, fake_people)
    if not (np.isfinite(real_reach).all() and np.isfinite(fake_reach).all()):
        return dict.fromkeys(("precision", "recall", "density", "coverage"), math.nan)
    inside = between < real_reach[:, None]
    return {
        "precision": float(inside.any(axis=0).mean()),
        "recall": float((between < fake_reach).any(axis=1).mean()),
        "density": float(inside.sum(axis=0).mean() / k),
        "coverage": float(inside.any(axis=1).mean()),
    }


def kernel_distance(
    real: np.ndarray, fake: np.ndarray, real_people: np.ndarray, fake_people: np.ndarray
) -> dict[str, float]:
    """Unbiased squared maximum mean discrepancy with KID's kernel (x·y / D + 1)³ (Bińkowski et al. 2018).

    Pairs of slices of one person are left out of all three means, as pairs of an image with itself are: they are
    alike for a reason that has nothing to do with the two distributions.

    Args:
        real, fake: (N, D) features, fake i in the place of real i.
        real_people, fake_people: (N,) whom they show.

    Returns:
        kernel_distance: 0 on average for equal distributions, at times below.
        kernel_distance_error: its standard error, by a jackknife that leaves out one person, and what stands in
            their place, at a time. Both are NaN where there are fewer than three people.
    """
    people = np.unique(real_people)
    if len(people) < 3:
        return {"kernel_distance": math.nan, "kernel_distance_error": math.nan}

    def kernel(x: np.ndarray, y: np.ndarray, x_people: np.ndarray, y_people: np.ndarray) -> np.ma.MaskedArray:
        values = (x.astype(np.float64) @ y.T / x.shape[1] + 1) ** 3
        return np.ma.masked_array(values, x_people[:, None] == y_people)

    within_real = kernel(real, real, real_people, real_people)
    within_fake = kernel(fake, fake, fake_people, fake_people)
    between = kernel(real, fake, real_people, fake_people)

    def estimate(kept: np.ndarray) -> float:
        block = np.ix_(kept, kept)
        return float(within_real[block].mean() + within_fake[block].mean() - 2 * between[block].mean())

    without = np.array([estimate(real_people != person) for person in people])
    return {
        "kernel_distance": estimate(np.ones(len(real), bool)),
        "kernel_distance_error": float(np.sqrt((len(people) - 1) * np.mean((without - without.mean()) ** 2))),
    }


def random_pairs(positions: np.ndarray, cases: np.ndarray, seed: int, rounds: int = 3) -> np.ndarray:
    """(P, 2) indices of two slices at the same position, of different people, drawn at random: up to N · `rounds`."""
    rng, pairs = np.random.default_rng(seed), []
    for i in range(len(positions)):
        partners = np.flatnonzero((positions == positions[i]) & (cases != cases[i]))
        pairs += [(i, j) for j in rng.permutation(partners)[:rounds]]
    return np.array(pairs, np.int64).reshape(-1, 2)


def ms_ssim_of_pairs(images: np.ndarray, pairs: np.ndarray) -> float:
    """Mean MS-SSIM of pairs (P, 2) of uint8 images: the higher, the more alike they are; NaN without pairs."""
    x, y = (images[pairs[:, side]] / np.float32(255) for side in (0, 1))
    return float(ms_ssim(x, y).mean()) if len(pairs) else math.nan


def two_sample_test(first: np.ndarray, second: np.ndarray, cases: np.ndarray, seed: int, epochs: int = 12) -> dict:
    """How often a small classifier tells two sets of images apart (Lopez-Paz & Oquab 2017).

    Cross-validated by person: the classifier never sees the people it is asked about, nor the images that stand in
    their place. An even chance, 0.5, is perfect; well below 0.5 it has learned people by heart instead.

    Args:
        first, second: (N, S, S, 1) uint8, image i of both in the place of the same slice.
        cases: (N,) the person of that slice.

    Returns:
        accuracy: share of the images told right. accuracy_interval: 95 % over people. NaN and [None, None] with a
        single person, when nothing is left to learn from.
    """
    people = np.unique(cases)
    if len(people) < 2:
        return {"accuracy": math.nan, "accuracy_interval": [None, None]}
    images = np.concatenate([first, second]).astype(np.float32) / 255
    labels = np.repeat(np.array([0, 1], np.float32), len(first))
    fold_of = dict(zip(np.random.default_rng(seed).permutation(people), np.arange(len(people)) % FOLDS, strict=True))
    folds = np.tile([fold_of[case] for case in cases], 2)
    classifier = _classifier(images.shape[1], seed)
    untrained = [keras.ops.convert_to_numpy(variable) for variable in _state(classifier)]
    right = np.empty(len(images))
    for fold in np.unique(folds):
        for variable, value in zip(_state(classifier), untrained, strict=True):
            variable.assign(value)
        held_out = folds == fold
        classifier.fit(images[~held_out], labels[~held_out], batch_size=32, epochs=epochs, verbose=0)
        logits = classifier.predict(images[held_out], batch_size=128, verbose=0)[:, 0]
        right[held_out] = (logits > 0) == (labels[held_out] > 0.5)
    return {
        "accuracy": float(right.mean()),
        "accuracy_interval": interval_over_people(right, np.tile(cases, 2), seed),
    }


def _classifier(size: int, seed: int) -> keras.Model:
    """A small convolutional network, (B, size, size, 1) to logits (B, 1), compiled; `seed` fixes it and its fit."""
    keras.utils.set_random_seed(seed)
    network = keras.Sequential([keras.Input((size, size, 1)), keras.layers.RandomFlip("horizontal", seed=seed)])
    for width in (16, 32, 64, 64):
        network.add(keras.layers.Conv2D(width, 4, 2, padding="same", activation="relu", dtype="float32"))
    network.add(keras.layers.GlobalAveragePooling2D())
    network.add(keras.layers.Dense(1, dtype="float32"))
    network.compile(keras.optimizers.Adam(1e-3), keras.losses.BinaryCrossentropy(from_logits=True))
    network.optimizer.build(network.trainable_variables)
    return network


def _state(network: keras.Model) -> list:
    """Every variable of a compiled model and its optimiser."""
    return [*network.variables, *network.optimizer.variables]


def nearest(
    points: np.ndarray, others: np.ndarray, people: np.ndarray, other_people: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The nearest of `others` (M, D) to each of `points` (N, D), both numbers or uint8 grey levels.

    Args:
        people, other_people: (N,) and (M,) whom they show; one's own slices do not count as near.

    Returns:
        (N,) its index, and (N,) its distance, root mean square over D; uint8 counts on the [0, 1] scale.
    """
    best, index = np.full(len(points), np.inf), np.zeros(len(points), np.int64)
    points, rows = _floats(points), np.arange(len(points))
    for start in range(0, len(others), 512):  # a block at a time: all training slices as floats may not fit
        distances = _squared_distances(points, _floats(others[start : start + 512]))
        distances[people[:, None] == other_people[start : start + 512]] = np.inf
        near = distances.argmin(axis=1)
        closer = distances[rows, near] < best
        best, index = np.where(closer, distances[rows, near], best), np.where(closer, start + near, index)
    return index, np.sqrt(best / points.shape[1])


def copy_metrics(distances: dict, real_distances: dict, space: str) -> dict[str, float]:
    """Whether images lie nearer to the training slices than unseen real slices do.

    Args:
        distances, real_distances: of images and of test slices to their nearest training slice, (N,) in each
            `space`, "pixels" or "features".

    Returns:
        nearest_train_{space}: the mean distance, over that of test slices; below 1 nearer. Blur alone lowers it:
            see the reconstructions' value.
        copies_{space}: share of the images nearer than the nearest 1 % of the test slices; 0.01 is par.
    """
    own, real = distances[space], real_distances[space]
    return {
        f"nearest_train_{space}": float(own.mean() / max(real.mean(), 1e-12)),
        f"copies_{space}": float(np.mean(own < np.percentile(real, 1))),
    }


def _floats(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float32) / 255 if values.dtype == np.uint8 else values


def _flat(images: np.ndarray) -> np.ndarray:
    return images.reshape(len(images), -1)


def _squared_distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(N, D) and (M, D) to (N, M)."""
    norms = np.sum(x * x, axis=1)[:, None] + np.sum(y * y, axis=1)
    return np.maximum(norms - 2 * x @ y.T, 0)


def _mean(values: np.ndarray) -> float:
    """Mean without NaN; NaN if there is nothing else."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else math.nan
