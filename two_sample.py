"""Statistics of slices by subject, and comparisons of two sets of images, features or codes.

Slices of one subject are not independent. Every interval, split, jackknife and neighbour search here treats the
subject, not the slice, as the unit.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import keras
import numpy as np
from scipy import stats
from scipy.spatial import distance

import naming
import seeds

NEIGHBOURS = 5  # Precision, recall, density and coverage use balls that reach to the fifth nearest neighbour.
CLASSIFIER_BATCH_SIZE = 32
CLASSIFIER_STEPS, CLASSIFIER_MAX_EPOCHS = 1500, 12  # Training of a classifier; whatever is reached first.
# Limits of what a classifier of codes reads: the side of the finest grid whose resolution its first convolution keeps,
# and the channels of each code. With them, a step on 64 x 64 codes takes half as long as without, and a quarter if the
# codes have 256 dimensions.
MAX_FULL_RESOLUTION, MAX_CODE_CHANNELS = 32, 64
CLASSIFIER_GOAL = 0.99  # Accuracy on the validation subjects beyond which training longer would tell nothing more.


# ---------------------------------------------------------------------------------------------- intervals


def interval_over_subjects(values: np.ndarray, subjects: np.ndarray) -> list[float | None]:
    """Compute a 95 % t interval of the mean over slices, with the subject as the unit.

    With the same number of slices for each subject it is the t interval of the subjects' means. Otherwise the mean over
    slices is a ratio of two sums over subjects, whose error is linearised (Cochran 1977, section 2.11). A bootstrap of
    so few subjects would give intervals that are too narrow.

    Args:
        values: (N,) one number per slice; NaN is ignored.
        subjects: (N,) subject of each slice.

    Returns:
        [lower, upper], or [None, None] with fewer than two subjects.
    """
    known = ~np.isnan(values)
    return _interval_of_sum([(values[known], subjects[known])])


def _interval_of_sum(groups: Sequence[tuple[np.ndarray, np.ndarray]]) -> list[float | None]:
    """Compute a 95 % interval of the sum of the means of independent groups, each (values (N,), subjects (N,)).

    The degrees of freedom are those of the group with the fewest subjects, so the interval is rather too wide.
    """
    total, variance, degrees = 0.0, 0.0, math.inf
    for values, subjects in groups:
        names, index = np.unique(subjects, return_inverse=True)
        if len(names) < 2:
            return [None, None]
        sums, counts = np.bincount(index, values), np.bincount(index)
        mean = sums.sum() / counts.sum()
        total += mean
        variance += len(names) / (len(names) - 1) * np.sum((sums - mean * counts) ** 2) / counts.sum() ** 2
        degrees = min(degrees, len(names) - 1)
    reach = stats.t.ppf(0.975, degrees) * math.sqrt(variance)
    return [float(total - reach), float(total + reach)]


def _clip(interval: list[float | None]) -> list[float | None]:
    """Clip the interval of a fraction to [0, 1]."""
    return [None if bound is None else min(max(bound, 0.0), 1.0) for bound in interval]


def paired_difference(first: np.ndarray, second: np.ndarray, subjects: np.ndarray) -> tuple[float, list[float | None]]:
    """Compare two numbers per slice, such as the nats of two priors.

    Args:
        first, second: (N,) numbers of the same slices.
        subjects: (N,) subject of each slice.

    Returns:
        The mean of second − first, and its 95 % interval over subjects.
    """
    difference = np.asarray(second, np.float64) - first
    return float(difference.mean()), interval_over_subjects(difference, subjects)


def area_under_curve(
    negatives: np.ndarray, positives: np.ndarray, negative_subjects: np.ndarray, positive_subjects: np.ndarray
) -> tuple[float, list[float | None]]:
    """Compute how well a score separates two sets: the area under the receiver operating characteristic.

    Args:
        negatives: (N,) scores.
        positives: (M,) scores.
        negative_subjects, positive_subjects: Their subjects.

    Returns:
        The probability that a positive has a higher score than a negative (ties count half), and its 95 % interval
        (DeLong et al. 1988, with subjects as clusters). Both are undefined, NaN and [None, None], for empty sets.
    """
    if not len(negatives) or not len(positives):
        return math.nan, [None, None]
    ordered_positives, ordered_negatives = np.sort(positives), np.sort(negatives)

    def fraction_below(values: np.ndarray, ordered: np.ndarray) -> np.ndarray:
        counts = np.searchsorted(ordered, values, "left") + np.searchsorted(ordered, values, "right")
        return counts / (2 * len(ordered))

    above = 1 - fraction_below(negatives, ordered_positives)  # for each negative, the fraction of positives above it
    below = fraction_below(positives, ordered_negatives)  # for each positive, the fraction of negatives below it
    auc = float(above.mean())
    # The first mean is the area and the second is 0: its deviations only enter the error.
    interval = _interval_of_sum([(above, negative_subjects), (below - auc, positive_subjects)])
    return auc, _clip(interval)


# ----------------------------------------------------------------------------------------------- features


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
    # A few at a time: with 64 images of 256 x 256 pixels, the first layers would need more than a gigabyte.
    batches = (images[i : i + 16].astype(np.float32) / 255 for i in range(0, len(images), 16))
    return np.concatenate([keras.ops.convert_to_numpy(network(batch)) for batch in batches])


def whitening(reference: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Return a function that maps features (N, D) such that `reference` (M, D) gets mean 0 and covariance 1.

    The features of a random network are correlated. Without whitening, brain size alone would decide all distances.
    """
    centre = reference.mean(axis=0)
    variances, directions = np.linalg.eigh(np.cov(reference - centre, rowvar=False, bias=True))
    scaled = directions / np.sqrt(np.maximum(variances, 1e-6 * variances.max() + 1e-12))
    return lambda features: ((features - centre) @ scaled).astype(np.float32)


def prdc(
    real: np.ndarray,
    fake: np.ndarray,
    real_subjects: np.ndarray | None = None,
    fake_subjects: np.ndarray | None = None,
) -> dict[str, float]:
    """Compute precision and recall (Kynkäänniemi et al. 2019), density and coverage (Naeem et al. 2020).

    The manifold of a set is the union of balls around its features, each reaching to the k-th nearest neighbour in the
    set, with k = `NEIGHBOURS`. Slices of one subject do not count as neighbours: they are so similar that balls would
    contain no others.

    Args:
        real: (N, D) features.
        fake: (M, D) features.
        real_subjects: (N,) subjects; by default, every slice is of a different subject.
        fake_subjects: (M,) subjects; the same default.

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
        return np.partition(distances(points, points, subjects, subjects), NEIGHBOURS - 1, axis=1)[:, NEIGHBOURS - 1]

    if min(len(real), len(fake)) < NEIGHBOURS:
        return dict.fromkeys(("precision", "recall", "density", "coverage"), math.nan)
    between = distances(real, fake, real_subjects, fake_subjects)
    real_radii, fake_radii = radii(real, real_subjects), radii(fake, fake_subjects)
    if not (np.isfinite(real_radii).all() and np.isfinite(fake_radii).all()):
        return dict.fromkeys(("precision", "recall", "density", "coverage"), math.nan)
    inside = between < real_radii[:, None]
    return {
        "precision": float(inside.any(axis=0).mean()),
        "recall": float((between < fake_radii).any(axis=1).mean()),
        "density": float(inside.sum(axis=0).mean() / NEIGHBOURS),
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
    if min(len(names), len(np.unique(fake_subjects))) < 3:
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


# --------------------------------------------------------------------------------------------- classifiers


HEADS = ("pooled", "global")  # Heads of a classifier: one pools its features over the image, one sees all of it.
Inputs: TypeAlias = list[np.ndarray]  # Arrays (N, …) that a classifier reads together.


def classifier_two_sample_test(
    first: dict[str, Inputs],
    second: dict[str, Inputs],
    subjects: tuple[np.ndarray, np.ndarray],
    classifier: keras.Model,
    seed: int,
    trainings: int = 1,
) -> dict[str, Any]:
    """Measure how well a classifier distinguishes two sets (Lopez-Paz & Oquab 2017).

    The classifier is trained on the training subjects. The validation subjects choose the epoch and the head, and the
    test subjects are then classified once. An accuracy of 0.5, chance, means that the sets cannot be distinguished.
    What a classifier finds differs from one training to the next, so it may be trained several times.

    Args:
        first, second: What the classifier reads, for "train", "validate" and "test".
        subjects: Subjects of the test items of both sets, (N,) each.
        classifier: An untrained classifier, see `image_classifier` and `code_classifier`. It is left untrained, so that
            it can be used again without compiling another one.
        seed: Determines the order of the training items in each epoch.
        trainings: How often the classifier is trained, each time with another order of the items.

    Returns:
        accuracy: Fraction of the test items that are classified correctly, averaged over the two sets and the
            trainings; NaN if a set is empty or missing.
        accuracy_interval: Its 95 % interval over subjects. It does not say how much trainings differ.
        accuracies: The accuracy after each training.
        accuracy_pooled, accuracy_global: Accuracy of each head in its best epoch, averaged over the trainings.
    """
    if not all(sets.get(part) and len(sets[part][0]) for sets in (first, second) for part in naming.SPLITS):
        undefined = dict.fromkeys(("accuracy", *(f"accuracy_{head}" for head in HEADS)), math.nan)
        return {**undefined, "accuracy_interval": [None, None], "accuracies": []}
    runs = [_train_classifier(first, second, classifier, seed, training) for training in range(trainings)]
    chosen = [max(HEADS, key=lambda head: run[head].validation_accuracy) for run in runs]
    correct = [run[head].correct for run, head in zip(runs, chosen, strict=True)]
    mean = [np.mean(parts, axis=0) for parts in zip(*correct, strict=True)]  # of each item of each set
    halves = [(0.5 * part, names) for part, names in zip(mean, subjects, strict=True)]
    return {
        "accuracy": _mean_accuracy(mean),
        "accuracy_interval": _clip(_interval_of_sum(halves)),
        "accuracies": [_mean_accuracy(parts) for parts in correct],
        **{f"accuracy_{head}": float(np.mean([_mean_accuracy(run[head].correct) for run in runs])) for head in HEADS},
    }


class _Judged(NamedTuple):
    """The best epoch of a head: its accuracy on validation items, and which items of each test set it gets right."""

    validation_accuracy: float
    correct: list[np.ndarray]


def _train_classifier(
    first: dict[str, Inputs], second: dict[str, Inputs], classifier: keras.Model, seed: int, training: int
) -> dict[str, _Judged]:
    """Train a classifier once, leave it untrained again, and return the best epoch of each head."""
    inputs, labels = _concatenate([first["train"], second["train"]])
    judged, group = _concatenate([sets[split] for split in ("validate", "test") for sets in (first, second)])
    best = dict.fromkeys(HEADS, _Judged(-1.0, []))
    untrained = [keras.ops.convert_to_numpy(variable) for variable in _state(classifier)]
    steps = -(-len(labels) // CLASSIFIER_BATCH_SIZE)
    for epoch in range(min(max(CLASSIFIER_STEPS // steps, 1), CLASSIFIER_MAX_EPOCHS)):
        # Keras would derive the order from the global seed, which depends on what ran before.
        number = training * CLASSIFIER_MAX_EPOCHS + epoch
        order = seeds.generator(seed, "order of classified items", number).permutation(len(labels))
        classifier.fit(
            [array[order] for array in inputs],
            dict.fromkeys(HEADS, labels[order].astype(np.float32)),
            batch_size=CLASSIFIER_BATCH_SIZE,
            shuffle=False,
            verbose=0,
        )
        for head, logits in _logits(classifier, judged).items():
            right = (logits > 0) == (group % 2 == 1)
            accuracy = _mean_accuracy([right[group == 0], right[group == 1]])
            if accuracy > best[head].validation_accuracy:
                best[head] = _Judged(accuracy, [right[group == 2], right[group == 3]])
        if max(judgement.validation_accuracy for judgement in best.values()) > CLASSIFIER_GOAL:
            break
    for variable, value in zip(_state(classifier), untrained, strict=True):
        variable.assign(value)
    return best


def _logits(classifier: keras.Model, inputs: Inputs) -> dict[str, np.ndarray]:
    """Return the logits (N,) of each head. `predict` would take longer to start than to classify a small set."""
    batches = [
        classifier.predict_on_batch([array[start : start + 128] for array in inputs])
        for start in range(0, len(inputs[0]), 128)
    ]
    return {head: np.concatenate([batch[head][:, 0] for batch in batches]) for head in HEADS}


def _concatenate(sets: Sequence[Inputs]) -> tuple[Inputs, np.ndarray]:
    """Concatenate sets. Also returns the index of the set that each item comes from, (N,)."""
    inputs = [np.concatenate(arrays) for arrays in zip(*sets, strict=True)]
    return inputs, np.repeat(np.arange(len(sets)), [len(arrays[0]) for arrays in sets])


def _mean_accuracy(correct: Sequence[np.ndarray]) -> float:
    return float((correct[0].mean() + correct[1].mean()) / 2)


def image_classifier(size: int, seed: int) -> keras.Model:
    """Make a compiled classifier of images (B, size, size, 1) uint8. Sets the global random seed."""
    keras.utils.set_random_seed(seed)
    images = keras.Input((size, size, 1), dtype="uint8")
    features = keras.layers.RandomFlip("horizontal", seed=seed)(keras.ops.cast(images, "float32"))
    features = keras.layers.Rescaling(1 / 64, -0.8)(features)  # roughly mean 0 and variance 1
    return _classifier([images], features, seed, widths=(16, 32))


def code_classifier(codebooks: Sequence[np.ndarray], grids: Sequence[int], seed: int) -> keras.Model:
    """Make a compiled classifier of code indices (B, h, w) int32 per level. Sets the global random seed.

    Grids with a side above `MAX_FULL_RESOLUTION` are read at half their resolution, and vectors with more than
    `MAX_CODE_CHANNELS` dimensions are projected to as many.

    Args:
        codebooks: Codebook vectors of each level, (K, D), the coarsest level first.
        grids: Height and width of the code grid of each level.
        seed: Seed of the initial weights and of the noise.
    """
    keras.utils.set_random_seed(seed)
    inputs, features = [], []
    for vectors, grid in zip(codebooks, grids, strict=True):
        inputs.append(keras.Input((grid, grid), dtype="int32"))
        table = keras.initializers.Constant((vectors - vectors.mean()) / vectors.std())
        embedded = keras.layers.Embedding(*vectors.shape, table, trainable=False)(inputs[-1])
        if vectors.shape[1] > MAX_CODE_CHANNELS:
            embedded = keras.layers.Dense(MAX_CODE_CHANNELS, use_bias=False)(embedded)
        features.append(keras.layers.UpSampling2D(grids[-1] // grid)(embedded))
    merged = keras.ops.concatenate(features, axis=-1)
    noisy = keras.layers.GaussianNoise(0.1, seed=seed)(merged)
    return _classifier(inputs, noisy, seed, keep_resolution=grids[-1] <= MAX_FULL_RESOLUTION)


def _classifier(
    inputs: list[Any], features: Any, seed: int, widths: Sequence[int] = (), keep_resolution: bool = False
) -> keras.Model:
    """Make a compiled classifier with two heads, "pooled" and "global", of one logit each.

    It also sees the mirror image: brains are nearly symmetric, so halves that do not belong together show where an
    image and its mirror image differ.

    Args:
        inputs: Keras inputs.
        features: What they become, (B, h, h, C).
        seed: Seed of the dropout.
        widths: Channels of the first convolutions of stride 2. The others have 64.
        keep_resolution: Whether one more convolution, before those, keeps the resolution.
    """
    options = {"padding": "same", "activation": "relu", "kernel_initializer": "he_normal"}
    features = keras.ops.concatenate([features, keras.ops.flip(features, axis=2)], axis=-1)
    if keep_resolution:
        features = keras.layers.Conv2D(64, 3, **options)(features)
    channels = itertools.chain(widths, itertools.repeat(64))
    while features.shape[1] > 8:
        features = keras.layers.Conv2D(next(channels), 4, 2, **options)(features)
    pooled = keras.layers.GlobalAveragePooling2D()(features)
    whole = keras.layers.Dropout(0.5, seed=seed)(keras.layers.Flatten()(features))
    whole = keras.layers.Dense(64, activation="relu")(whole)
    outputs = {"pooled": keras.layers.Dense(1)(pooled), "global": keras.layers.Dense(1)(whole)}
    network = keras.Model(inputs, outputs)
    losses = {head: keras.losses.BinaryCrossentropy(from_logits=True) for head in HEADS}
    network.compile(keras.optimizers.Adam(1e-3), losses)
    network.optimizer.build(network.trainable_variables)
    return network


def _state(network: keras.Model) -> list[keras.Variable]:
    """Return every variable of a compiled model and of its optimizer."""
    return [*network.variables, *network.optimizer.variables]


# -------------------------------------------------------------------------------------- nearest neighbours


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
        (N,) indices into `others`, and (N,) root mean square distances over the D dimensions, NaN without any other
        subject.
    """
    best, index = np.full(len(points), np.inf), np.zeros(len(points), np.int64)
    points, rows = _to_float(points), np.arange(len(points))
    for start in range(0, len(others), 512):  # In blocks: all training slices as floats may not fit into memory.
        distances = _squared_distances(points, _to_float(others[start : start + 512]))
        distances[subjects[:, None] == other_subjects[start : start + 512]] = np.inf
        near = distances.argmin(axis=1)
        closer = distances[rows, near] < best
        best, index = np.where(closer, distances[rows, near], best), np.where(closer, start + near, index)
    return index, np.sqrt(np.where(np.isinf(best), np.nan, best) / points.shape[1])


def nearest_grids(
    grids: np.ndarray, others: np.ndarray, subjects: np.ndarray, other_subjects: np.ndarray
) -> np.ndarray:
    """Compute the distance of each code grid to the nearest of `others`, excluding those of the same subject.

    The distance is the fraction of codes that differ (Hamming distance). It does not depend on the decoder.

    Args:
        grids: (N, D) code indices.
        others: (M, D) code indices.
        subjects: (N,) subjects of the grids.
        other_subjects: (M,) subjects of the others.

    Returns:
        (N,) from 0 to 1, NaN without any other subject.
    """
    best = np.full(len(grids), np.inf)
    for start in range(0, len(others), 512):
        distances = distance.cdist(grids, others[start : start + 512], "hamming")
        distances[subjects[:, None] == other_subjects[start : start + 512]] = np.inf
        best = np.minimum(best, distances.min(axis=1))
    return np.where(np.isinf(best), np.nan, best)


def nearest_neighbour_metrics(distances: dict[str, np.ndarray], reference: dict[str, np.ndarray]) -> dict[str, float]:
    """Measure whether a set is nearer to the training data than unseen subjects are.

    Args:
        distances: (N,) distances to the nearest training slice in each space, such as "pixels".
        reference: The same of the test subjects.

    Returns:
        nn_distance_ratio_{space}: Mean distance divided by that of the test subjects.
        near_duplicate_rate_{space}: Fraction of the set that is at least as near as the nearest 1 % of the test slices;
            about 0.01 for equal distributions.
        Both are NaN if a distance is.
    """
    numbers = {}
    for space, own in distances.items():
        unseen = reference[space]
        numbers[f"nn_distance_ratio_{space}"] = float(own.mean() / max(unseen.mean(), 1e-12))
        nearer = np.where(np.isnan(own), np.nan, own <= np.percentile(unseen, 1))
        numbers[f"near_duplicate_rate_{space}"] = float(nearer.mean()) if np.isfinite(unseen).all() else math.nan
    return numbers


def _to_float(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float32) / 255 if values.dtype == np.uint8 else values


def _squared_distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return (N, M) squared distances between (N, D) and (M, D) points."""
    norms = np.sum(x * x, axis=1)[:, None] + np.sum(y * y, axis=1)
    return np.maximum(norms - 2 * x @ y.T, 0)
