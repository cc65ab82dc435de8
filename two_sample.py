"""Statistics of slices by subject, and comparisons of two sets of images or features.

Slices of one subject are not independent. Every interval, fold, jackknife and neighbour search here treats the
subject, not the slice, as the unit.
"""

import math
from collections.abc import Callable
from typing import Any

import keras
import numpy as np

NUM_FOLDS = 5  # Folds of the cross-validation in `classifier_two_sample_test`.


def interval_over_subjects(
    values: np.ndarray, subjects: np.ndarray, seed: int, resamples: int = 2000
) -> list[float | None]:
    """Compute a 95 % bootstrap interval of the mean over slices by resampling subjects.

    Slices of one subject are correlated, so resampling slices would give an interval that is far too narrow. Each
    resample draws as many subjects as there are, with replacement, and uses all of their slices.

    Args:
        values: (N,) one number per slice; NaN is ignored.
        subjects: (N,) subject of each slice.

    Returns:
        [lower, upper], or [None, None] with fewer than two subjects.
    """
    known = ~np.isnan(values)
    names, index = np.unique(subjects[known], return_inverse=True)
    if len(names) < 2:
        return [None, None]
    sums, counts = np.bincount(index, values[known]), np.bincount(index)
    resampled = np.random.default_rng(seed).integers(len(names), size=(resamples, len(names)))
    means = sums[resampled].sum(axis=1) / counts[resampled].sum(axis=1)
    return [float(bound) for bound in np.percentile(means, [2.5, 97.5])]


def random_features(images: np.ndarray) -> np.ndarray:
    """Compute features with a fixed convolutional network that was never trained.

    Naeem et al. 2020 find that a network with random weights judges generated images better than one trained on
    ImageNet if the images are unlike ImageNet's. There is no Fréchet Inception Distance here for the same reason, and
    because it is biased upwards for few images (Bińkowski et al. 2018): the covariances of 2,048 features cannot even
    be estimated from a few hundred slices.

    Each stage is a 3 × 3 convolution with He initialisation, ReLU and 2 × 2 average pooling, with 32 to 128 channels,
    until at most 8 × 8 positions remain. A random projection then yields 64 numbers. The seed of the weights is fixed.

    Args:
        images: (N, S, S, 1) uint8.

    Returns:
        (N, 64) float32.
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
    """Return a function that maps features (N, D) such that `reference` (M, D) gets mean 0 and covariance 1.

    The features of a random network are correlated. Without whitening, brain size alone would decide all distances.
    """
    centre = reference.mean(axis=0)
    variances, directions = np.linalg.eigh(np.cov(reference - centre, rowvar=False))
    scaled = directions / np.sqrt(np.maximum(variances, 1e-6 * variances.max() + 1e-12))
    return lambda features: ((features - centre) @ scaled).astype(np.float32)


def prdc(
    real: np.ndarray,
    fake: np.ndarray,
    real_subjects: np.ndarray | None = None,
    fake_subjects: np.ndarray | None = None,
    k: int = 5,
) -> dict[str, float]:
    """Compute precision and recall (Kynkäänniemi et al. 2019), density and coverage (Naeem et al. 2020).

    The manifold of a set is the union of balls around its features, each reaching to the k-th nearest neighbour in
    the set. Slices of one subject do not count as neighbours: they are so similar that balls would contain no others.

    Args:
        real: (N, D) features.
        fake: (M, D) features.
        real_subjects: (N,) subjects; by default, every slice is of a different subject.
        fake_subjects: (M,) subjects; the same default.
        k: Number of the neighbour that a ball reaches to.

    Returns:
        All are NaN if any slice has fewer than k neighbours. Expected values for equal distributions hold for large
        sets of different subjects.

        - precision: Fraction of fakes in the manifold of the real set.
        - recall: Fraction of real features in the manifold of the fakes.
        - density: Mean number of real balls that contain a fake, divided by k; 1 for equal distributions, unbounded.
        - coverage: Fraction of real balls that contain a fake; 1 − 2^−k for equal distributions.
    """
    if real_subjects is None:
        real_subjects = np.arange(len(real))
    if fake_subjects is None:
        fake_subjects = np.arange(len(fake)) + len(real)

    def distances(x: np.ndarray, y: np.ndarray, x_subjects: np.ndarray, y_subjects: np.ndarray) -> np.ndarray:
        return np.where(x_subjects[:, None] == y_subjects, np.inf, _squared_distances(x, y))

    def radii(points: np.ndarray, subjects: np.ndarray) -> np.ndarray:
        return np.partition(distances(points, points, subjects, subjects), k - 1, axis=1)[:, k - 1]

    if min(len(real), len(fake)) < k:
        return dict.fromkeys(("precision", "recall", "density", "coverage"), math.nan)
    between = distances(real, fake, real_subjects, fake_subjects)
    real_radii, fake_radii = radii(real, real_subjects), radii(fake, fake_subjects)
    if not (np.isfinite(real_radii).all() and np.isfinite(fake_radii).all()):
        return dict.fromkeys(("precision", "recall", "density", "coverage"), math.nan)
    inside = between < real_radii[:, None]
    return {
        "precision": float(inside.any(axis=0).mean()),
        "recall": float((between < fake_radii).any(axis=1).mean()),
        "density": float(inside.sum(axis=0).mean() / k),
        "coverage": float(inside.any(axis=1).mean()),
    }


def mmd2(real: np.ndarray, fake: np.ndarray, real_subjects: np.ndarray, fake_subjects: np.ndarray) -> dict[str, float]:
    """Compute the unbiased squared maximum mean discrepancy with the kernel (x·y / D + 1)³ (Bińkowski et al. 2018).

    Pairs of slices of one subject are excluded from all three means, like pairs of an image with itself: they are
    similar for a reason that has nothing to do with the two distributions.

    Args:
        real: (N, D) features.
        fake: (N, D) features; fake i is matched with real i.
        real_subjects: (N,) subjects.
        fake_subjects: (N,) subjects.

    Returns:
        mmd2: 0 on average for equal distributions; may be negative.
        mmd2_error: Its standard error, by a jackknife that leaves out one subject and the matched fakes at a time.
        Both are NaN with fewer than three subjects.
    """
    names = np.unique(real_subjects)
    if len(names) < 3:
        return {"mmd2": math.nan, "mmd2_error": math.nan}

    def kernel(x: np.ndarray, y: np.ndarray, x_subjects: np.ndarray, y_subjects: np.ndarray) -> np.ma.MaskedArray:
        values = (x.astype(np.float64) @ y.T / x.shape[1] + 1) ** 3
        return np.ma.masked_array(values, x_subjects[:, None] == y_subjects)

    within_real = kernel(real, real, real_subjects, real_subjects)
    within_fake = kernel(fake, fake, fake_subjects, fake_subjects)
    between = kernel(real, fake, real_subjects, fake_subjects)

    def estimate(kept: np.ndarray) -> float:
        block = np.ix_(kept, kept)
        return float(within_real[block].mean() + within_fake[block].mean() - 2 * between[block].mean())

    without = np.array([estimate(real_subjects != name) for name in names])
    return {
        "mmd2": estimate(np.ones(len(real), bool)),
        "mmd2_error": float(np.sqrt((len(names) - 1) * np.mean((without - without.mean()) ** 2))),
    }


def classifier_two_sample_test(
    first: np.ndarray, second: np.ndarray, subjects: np.ndarray, seed: int, epochs: int = 12
) -> dict[str, Any]:
    """Measure how well a small classifier distinguishes two sets of images (Lopez-Paz & Oquab 2017).

    Cross-validated by subject: the classifier is never trained on the subjects that it is tested on, nor on the
    images that are matched with them. An accuracy of 0.5, chance, means that the sets cannot be distinguished. An
    accuracy well below 0.5 means that the classifier has memorised subjects.

    Args:
        first: (N, S, S, 1) uint8.
        second: (N, S, S, 1) uint8; second i is matched with first i.
        subjects: (N,) subject of first i.
        seed: Seed of the folds, the classifier and the bootstrap.
        epochs: Epochs for each fold.

    Returns:
        accuracy: Fraction of the images that are classified correctly; NaN with fewer than two subjects.
        accuracy_interval: Its 95 % interval over subjects, see `interval_over_subjects`.
    """
    names = np.unique(subjects)
    if len(names) < 2:
        return {"accuracy": math.nan, "accuracy_interval": [None, None]}
    images = np.concatenate([first, second]).astype(np.float32) / 255
    labels = np.repeat(np.array([0, 1], np.float32), len(first))
    fold_numbers = np.arange(len(names)) % NUM_FOLDS
    fold_of = dict(zip(np.random.default_rng(seed).permutation(names), fold_numbers, strict=True))
    folds = np.tile([fold_of[subject] for subject in subjects], 2)
    classifier = _classifier(images.shape[1], seed)
    untrained = [keras.ops.convert_to_numpy(variable) for variable in _state(classifier)]
    correct = np.empty(len(images))
    for fold in np.unique(folds):
        for variable, value in zip(_state(classifier), untrained, strict=True):
            variable.assign(value)
        held_out = folds == fold
        classifier.fit(images[~held_out], labels[~held_out], batch_size=32, epochs=epochs, verbose=0)
        logits = classifier.predict(images[held_out], batch_size=128, verbose=0)[:, 0]
        correct[held_out] = (logits > 0) == (labels[held_out] > 0.5)
    return {
        "accuracy": float(correct.mean()),
        "accuracy_interval": interval_over_subjects(correct, np.tile(subjects, 2), seed),
    }


def _classifier(size: int, seed: int) -> keras.Model:
    """Make a compiled convolutional classifier, (B, size, size, 1) to logits (B, 1); sets the global random seed."""
    keras.utils.set_random_seed(seed)
    network = keras.Sequential([keras.Input((size, size, 1)), keras.layers.RandomFlip("horizontal", seed=seed)])
    for width in (16, 32, 64, 64):
        network.add(keras.layers.Conv2D(width, 4, 2, padding="same", activation="relu", dtype="float32"))
    network.add(keras.layers.GlobalAveragePooling2D())
    network.add(keras.layers.Dense(1, dtype="float32"))
    network.compile(keras.optimizers.Adam(1e-3), keras.losses.BinaryCrossentropy(from_logits=True))
    network.optimizer.build(network.trainable_variables)
    return network


def _state(network: keras.Model) -> list[keras.Variable]:
    """Return every variable of a compiled model and of its optimizer."""
    return [*network.variables, *network.optimizer.variables]


def nearest_neighbours(
    points: np.ndarray, others: np.ndarray, subjects: np.ndarray, other_subjects: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Find the nearest of `others` to each point, excluding those of the same subject.

    Args:
        points: (N, D) float, or uint8 grey levels, which are divided by 255.
        others: (M, D) of the same type.
        subjects: (N,) subjects of the points.
        other_subjects: (M,) subjects of the others.

    Returns:
        (N,) indices into `others`, and (N,) root mean square distances over the D dimensions.
    """
    best, index = np.full(len(points), np.inf), np.zeros(len(points), np.int64)
    points, rows = _to_float(points), np.arange(len(points))
    for start in range(0, len(others), 512):  # In blocks: all training slices as floats may not fit into memory.
        distances = _squared_distances(points, _to_float(others[start : start + 512]))
        distances[subjects[:, None] == other_subjects[start : start + 512]] = np.inf
        near = distances.argmin(axis=1)
        closer = distances[rows, near] < best
        best, index = np.where(closer, distances[rows, near], best), np.where(closer, start + near, index)
    return index, np.sqrt(best / points.shape[1])


def nearest_neighbour_metrics(
    distances: dict[str, np.ndarray], real_distances: dict[str, np.ndarray]
) -> dict[str, float]:
    """Measure whether images are nearer to the training slices than unseen real slices are.

    Args:
        distances: (N,) distances to the nearest training slice in each space ("pixels", "features").
        real_distances: The same of the test slices.

    Returns:
        nn_distance_ratio_{space}: Mean distance divided by that of the test slices. Blur alone lowers it; compare
            with the ratio of reconstructions.
        near_duplicate_rate_{space}: Fraction of the images that are nearer than the nearest 1 % of the test slices;
            about 0.01 for equal distributions.
    """
    numbers = {}
    for space, own in distances.items():
        real = real_distances[space]
        numbers[f"nn_distance_ratio_{space}"] = float(own.mean() / max(real.mean(), 1e-12))
        numbers[f"near_duplicate_rate_{space}"] = float(np.mean(own < np.percentile(real, 1)))
    return numbers


def _to_float(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float32) / 255 if values.dtype == np.uint8 else values


def _squared_distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return (N, M) squared distances between (N, D) and (M, D) points."""
    norms = np.sum(x * x, axis=1)[:, None] + np.sum(y * y, axis=1)
    return np.maximum(norms - 2 * x @ y.T, 0)
