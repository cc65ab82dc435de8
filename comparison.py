"""Compare samples, reconstructions and controls (see controls.py) with the real slices of the test subjects."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import keras
import numpy as np

import controls
import metrics
import seeds
import two_sample
from dataset import Slices, to_float, to_uint8
from generator import Results
from pngs import BRAIN_THRESHOLD

TRAINING_SLICES = 3000  # Training slices that samples are compared with at most, unless more are asked for.
PAIRS_PER_SLICE = 3  # Pairs of test slices that are compared, for each slice.
NUM_DRAWS = 10  # Draws of other subjects, whose measures are averaged.
CLASSIFIER_TRAININGS = 3  # How often the classifiers are trained that compare images with real slices.


@dataclass(frozen=True)
class Part:
    """Images of one split, with the codes that they were encoded as or decoded from.

    Attributes:
        images: (N, S, S, 1) uint8.
        codes: Code indices, (N, h, w) int32 per level; empty if they are not needed.
        positions: (N,) int32 slice positions.
        subjects: (N,) subjects; every sample counts as a subject of its own.
        decoded: What the VQ-VAE decodes from the codes, (N, S, S, 1) uint8; empty without codes.
    """

    images: np.ndarray
    codes: list[np.ndarray]
    positions: np.ndarray
    subjects: np.ndarray
    decoded: np.ndarray

    def take(self, index: np.ndarray) -> "Part":
        """Return the images of these indices."""
        codes = [indices[index] for indices in self.codes]
        decoded = self.decoded[index] if len(self.decoded) else self.decoded
        return Part(self.images[index], codes, self.positions[index], self.subjects[index], decoded)


# The "test" part is compared with the test slices, one by one. Classifiers are trained on the "train" part and chosen
# by the "validate" part; a set without them is not classified.
ImageSet: TypeAlias = dict[str, Part]
Remember: TypeAlias = Callable[[str, Callable[[], Any]], Any]  # See `compare`.


def compute_always(name: str, compute: Callable[[], Any]) -> Any:
    """Remember nothing."""
    return compute()


# ------------------------------------------------------------------------------------------- comparisons


def compare(results: Results, seed: int, remember: Remember = compute_always) -> dict[str, Any]:
    """Compare samples with real slices of the test subjects, which no network has seen.

    Args:
        results: Everything that a run has produced. `results.numbers` is not used.
        seed: Seed of the pairs, the classifiers, the controls and the draws of other subjects.
        remember: Called with the name of each part of the work and a function that does it. It may return what an
            earlier call has done instead, as `Run.remember` does after a run was stopped.

    Returns:
        Five dictionaries:

        - compared_slices: for each split, the number of real slices that are compared with samples.
        - samples: the numbers of `Comparison.measure`, `Comparison.measure_copies` and
          `Comparison.classify_against_real`; accuracies of a classifier of codes against codes of real slices
          (c2st_codes), and of one of what the VQ-VAE decodes from them against reconstructions (c2st_reconstructions);
          `count`, the number of samples; and `nearest_to_training`, the ten samples nearest to a training slice.
        - references: the numbers of `reconstructions` of the test slices; those of `other_subjects` (see
          `Comparison.measure_other_subjects`), the best that any model can reach; and real_ms_ssim_of_pairs, that of
          the real slices. With a sharp decoder also those of `sharp_reconstructions`, the best that it allows, and of
          `faithful_samples`, the same samples decoded by the VQ-VAE.
        - controls: the numbers of each control, with c2st and c2st_codes.
        - failed_controls: for each measure, the controls that it fails; see `controls.failed_controls`.
    """
    comparison = Comparison(results, seed, remember)
    real, decoded, samples = comparison.real, comparison.reconstructions, comparison.samples()
    faithful, drawn = comparison.redecode(samples), comparison.draw_reconstructions()
    sampled = {
        "count": len(real["test"].images),
        **remember("samples against real slices", lambda: comparison.classify_against_real(samples)),
        **remember(
            "samples against reconstructions",
            lambda: {
                "c2st_reconstructions": comparison.classify_images(decoded, faithful),
                "c2st_codes": comparison.classify_codes(decoded, samples),
            },
        ),
        **comparison.measure(samples["test"]),
        **comparison.measure_copies(samples["test"], drawn["test"]),
        "nearest_to_training": comparison.nearest_to_training(samples["test"]),
    }
    references = {"reconstructions": decoded}
    if results.generator.decoder:
        references["faithful_samples"] = faithful
    measured = {
        name: remember(name, functools.partial(comparison.measure_set, images)) for name, images in references.items()
    }
    if results.generator.decoder:
        measured["sharp_reconstructions"] = remember(
            "sharp_reconstructions",
            lambda: {**comparison.classify_against_real(drawn), **comparison.measure(drawn["test"])},
        )
    control_numbers = {
        name: remember(f"control {name}", functools.partial(comparison.measure_control, name))
        for name in controls.DESCRIPTIONS
    }
    return {
        "compared_slices": {split: len(index) for split, index in results.compared.items()},
        "samples": sampled,
        "references": {
            **measured,
            "other_subjects": comparison.measure_other_subjects(),
            "real_ms_ssim_of_pairs": ms_ssim_of_pairs(real["test"].images, comparison.pairs),
        },
        "controls": control_numbers,
        "failed_controls": controls.failed_controls(control_numbers, measured["reconstructions"]),
    }


class Comparison:
    """What all sets of images are compared with, computed once.

    Args:
        results, seed, remember: See `compare`.

    Attributes:
        real: The real slices, by split.
        reconstructions: The same with their reconstructions by the VQ-VAE as images.
        train: `real["train"]`.
        pairs: (P, 2) indices of test slices at the same position that show different subjects.
    """

    def __init__(self, results: Results, seed: int, remember: Remember = compute_always) -> None:
        self.results, self.seed, self.remember = results, seed, remember
        self.real, self.reconstructions = {}, {}
        for split, slices in results.slices.items():
            index = results.compared[split]
            codes = [indices[index] for indices in results.codes[split]]
            images, decoded = to_display_uint8(slices.images[index]), self._decode(codes)
            self.real[split] = Part(images, codes, slices.positions[index], slices.subjects[index], decoded)
            self.reconstructions[split] = replace(self.real[split], images=decoded)
        self.train, test = self.real["train"], self.real["test"]
        self.pairs = random_pairs(test.positions, test.subjects, seed)
        self.whiten = two_sample.whitening(two_sample.random_features(self.train.images))
        self.features = self._features(test.images)
        self.train_features = self._features(self.train.decoded)
        self.power = metrics.power_spectrum(to_float(test.images))
        self._image_classifiers: dict[int, keras.Model] = {}  # by the size of the images
        self._measured_codes: dict[tuple[bytes, ...], tuple[np.ndarray, dict[str, np.ndarray]]] = {}
        self.surprise, self.distances = self._measure_codes(test)

    def _decode(self, codes: list[np.ndarray]) -> np.ndarray:
        return to_display_uint8(self.results.generator.decode(codes))

    def _features(self, images: np.ndarray) -> np.ndarray:
        return self.whiten(two_sample.random_features(images))

    # ------------------------------------------------------------------------------------------- sets

    def samples(self) -> ImageSet:
        """The generated slices, one at the position of each compared slice."""
        return {
            split: self._fakes(
                to_display_uint8(samples.images), samples.codes, samples.positions, self._decode(samples.codes)
            )
            for split, samples in self.results.compared_samples.items()
        }

    def redecode(self, images: ImageSet) -> ImageSet:
        """The same codes, decoded by the VQ-VAE."""
        return {split: replace(part, images=part.decoded) for split, part in images.items()}

    def draw_reconstructions(self) -> ImageSet:
        """The codes of the real slices, decoded as samples are. Those of the test split were drawn before."""
        test = self.results.sharp_reconstructions
        if test is None:
            return self.reconstructions

        def draw(split: str) -> np.ndarray:
            codes = self.reconstructions[split].codes
            return to_display_uint8(self.results.generator.draw(codes, self.seed, f"reconstructions of {split}"))

        images = {
            split: self.remember(f"drawn {split} slices", functools.partial(draw, split))
            for split in ("train", "validate")
        }
        images["test"] = to_display_uint8(test[self.results.compared["test"]])
        return {split: replace(part, images=images[split]) for split, part in self.reconstructions.items()}

    def _fakes(self, images: np.ndarray, codes: list[np.ndarray], positions: np.ndarray, decoded: np.ndarray) -> Part:
        return Part(images, codes, positions, np.array([f"fake {i}" for i in range(len(images))]), decoded)

    def control(self, name: str) -> tuple[ImageSet, ImageSet]:
        """Return a set without a fault, and the control of this name in `controls.DESCRIPTIONS`."""
        if name == "real":
            return self._real_control()
        if name in ("halves", "blocks"):
            blocks = (1, 2) if name == "halves" else (controls.BLOCKS, controls.BLOCKS)
            patched = {
                split: controls.patch_codes(
                    part.codes, part.positions, part.subjects, blocks, seeds.generator(self.seed, f"{name} of {split}")
                )
                for split, part in self.real.items()
            }
            decoded = {split: self._decode(codes) for split, codes in patched.items()}
            fakes = {
                split: self._fakes(decoded[split], codes, self.real[split].positions, decoded[split])
                for split, codes in patched.items()
            }
            return self.reconstructions, fakes
        if name == "decoded_training_codes":
            copies = self.train.take(self._matched(self.train, "decoded training codes"))
            fake = self._fakes(copies.decoded, copies.codes, copies.positions, copies.decoded)
            return self.reconstructions, {"test": fake}
        spoiled = {split: self._spoil(part, name, split) for split, part in self.real.items()}
        codes = self.results.generator.encode(spoiled["test"].images)
        return self.real, spoiled | {"test": replace(spoiled["test"], codes=codes, decoded=self._decode(codes))}

    def _spoil(self, part: Part, name: str, split: str) -> Part:
        """Blur images or add noise, depending on the name of the control. The codes are left out."""
        clean = to_float(part.images)
        random = seeds.generator(self.seed, f"{name} of {split}")
        images = to_display_uint8(controls.blur(clean) if name == "blur" else controls.add_noise(clean, random))
        return replace(part, images=images, codes=[], decoded=part.decoded[:0])

    def _real_control(self) -> tuple[ImageSet, ImageSet]:
        """Two sets of real slices: of test and of validation subjects, with half of the training subjects each.

        A quarter of these is what the classifier is chosen by.
        """
        train = self.real["train"]
        names = seeds.generator(self.seed, "halves of the training subjects").permutation(np.unique(train.subjects))
        bounds = [0, *(round(len(names) * eighths / 8) for eighths in (3, 6, 7)), len(names)]
        parts = [
            train.take(np.isin(train.subjects, names[begin:end]))
            for begin, end in zip(bounds[:-1], bounds[1:], strict=True)
        ]
        first = {"train": parts[0], "validate": parts[2], "test": self.real["test"]}
        second = {
            "train": parts[1],
            "validate": parts[3],
            "test": self.real["validate"].take(self._matched(self.real["validate"], "real control")),
        }
        return first, second

    def _matched(self, part: Part, purpose: str, draw: int = 0) -> np.ndarray:
        """Choose a slice of a part for each test slice; see `matched_slices`."""
        return matched_slices(part, self.real["test"], seeds.generator(self.seed, purpose, draw))

    # --------------------------------------------------------------------------------------- measures

    def _image_classifier(self, size: int) -> keras.Model:
        if size not in self._image_classifiers:
            seed = seeds.number(self.seed, "classifier of images")
            self._image_classifiers[size] = two_sample.image_classifier(size, seed)
        return self._image_classifiers[size]

    @functools.cached_property
    def _code_classifier(self) -> keras.Model:
        vqvae, seed = self.results.generator.vqvae, seeds.number(self.seed, "classifier of codes")
        codebooks = [keras.ops.convert_to_numpy(quantizer.embeddings) for quantizer in vqvae.quantizers]
        return two_sample.code_classifier(codebooks, vqvae.grids, seed)

    def classify_images(self, first: ImageSet, second: ImageSet, trainings: int = 1) -> dict[str, Any]:
        """Measure how well a classifier of images distinguishes two sets; it may be trained several times."""
        classifier = self._image_classifier(first["test"].images.shape[1])
        return self._classify(first, second, classifier, lambda part: [part.images], trainings)

    def classify_against_real(self, images: ImageSet) -> dict[str, Any]:
        """Measure how well a set can be distinguished from the real slices.

        Returns:
            - c2st_real: What a classifier finds that is trained `CLASSIFIER_TRAININGS` times.
            - c2st_half_size: The same of images that are shrunk to half their height and width. If it finds less, then
              the finest details differ more than the rest.
        """
        real, drawn = (
            {split: replace(part, images=half_size(part.images)) for split, part in compared.items()}
            for compared in (self.real, images)
        )
        return {
            "c2st_real": self.classify_images(self.real, images, CLASSIFIER_TRAININGS),
            "c2st_half_size": self.classify_images(real, drawn, CLASSIFIER_TRAININGS),
        }

    def classify_codes(self, first: ImageSet, second: ImageSet) -> dict[str, Any]:
        """Measure how well a classifier of code grids distinguishes two sets."""
        return self._classify(first, second, self._code_classifier, lambda part: part.codes)

    def _classify(
        self,
        first: ImageSet,
        second: ImageSet,
        classifier: keras.Model,
        inputs: Callable[[Part], list[np.ndarray]],
        trainings: int = 1,
    ) -> dict[str, Any]:
        """Run a two-sample test on what a classifier reads of each part."""
        first_inputs = {split: inputs(part) for split, part in first.items()}
        second_inputs = {split: inputs(part) for split, part in second.items()}
        subjects = _subjects(first["test"], second["test"])
        return two_sample.classifier_two_sample_test(
            first_inputs, second_inputs, subjects, classifier, self.seed, trainings
        )

    def measure(self, fakes: Part) -> dict[str, Any]:
        """Compare a set with the test slices.

        Returns:
            - critic_auc, critic_auc_interval: How well the surprise of the critic (see `Generator.surprise`) separates
              the set from the code grids of the test subjects, as the area under the curve. At 0.5 it does not. Above,
              the set fits together less well than real grids; below, it is nearer to the training subjects than unseen
              subjects are.
            - The numbers of `two_sample.prdc` and `two_sample.mmd2`, on whitened random features.
            - ms_ssim_of_pairs: Mean MS-SSIM of pairs at the same position.
            - The numbers of `metrics.power_ratios`, relative to the real slices.
            - code_hamming: Mean fraction of the codes that differ from the nearest training grid.
            - The numbers of `two_sample.nearest_neighbour_metrics` for "codes", and for "pixels" and "features" of the
              decoded codes, compared with decoded codes of training slices.
        """
        test, features = self.real["test"], self._features(fakes.images)
        subjects, (surprise, distances) = _subjects(test, fakes), self._measure_codes(fakes)
        auc, interval = two_sample.area_under_curve(self.surprise, surprise, *subjects)
        return {
            "critic_auc": auc,
            "critic_auc_interval": interval,
            **two_sample.prdc(self.features, features, *subjects),
            **two_sample.mmd2(self.features, features, *subjects),
            "ms_ssim_of_pairs": ms_ssim_of_pairs(fakes.images, self.pairs),
            **metrics.power_ratios(self.power, metrics.power_spectrum(to_float(fakes.images))),
            "code_hamming": float(distances["codes"].mean()),
            **two_sample.nearest_neighbour_metrics(distances, self.distances),
        }

    def measure_set(self, images: ImageSet) -> dict[str, Any]:
        """Measure a set: the numbers of `measure`, and c2st_real, what a classifier finds that is trained once."""
        return {"c2st_real": self.classify_images(self.real, images), **self.measure(images["test"])}

    def measure_control(self, name: str) -> dict[str, Any]:
        """Measure a control in `controls.DESCRIPTIONS`: `measure`, `measure_copies`, c2st and c2st_codes."""
        faultless, control = self.control(name)
        return {
            "c2st": self.classify_images(faultless, control),
            "c2st_codes": self.classify_codes(faultless, control),
            **self.measure(control["test"]),
            **self.measure_copies(control["test"], faultless["test"]),
        }

    def measure_other_subjects(self) -> dict[str, Any]:
        """Compare real slices of training subjects with the test slices, as means over `NUM_DRAWS` draws of subjects.

        Returns:
            The numbers of `two_sample.prdc` and `two_sample.mmd2`, ms_ssim_of_pairs, and `*_spread`, the standard
            deviation of each over the draws.
        """
        test, train, draws = self.real["test"], self.train, []
        features = self._features(train.images)
        for draw in range(NUM_DRAWS):
            index = self._matched(train, "other subjects", draw)
            subjects = (test.subjects, train.subjects[index])
            pairs = self.pairs[draw % max(len(self.pairs), 1) :: NUM_DRAWS]  # Every tenth pair takes less time.
            draws.append(
                {
                    **two_sample.prdc(self.features, features[index], *subjects),
                    **two_sample.mmd2(self.features, features[index], *subjects),
                    "ms_ssim_of_pairs": ms_ssim_of_pairs(train.images[index], pairs),
                }
            )
        means = {name: float(np.mean([draw[name] for draw in draws])) for name in draws[0]}
        return means | {f"{name}_spread": float(np.std([draw[name] for draw in draws], ddof=1)) for name in draws[0]}

    def measure_copies(self, samples: Part, unseen: Part) -> dict[str, float]:
        """Compare the images themselves, including what a sharp decoder has added, with the real training slices.

        Args:
            samples: The samples, or a control.
            unseen: Slices of test subjects, encoded and decoded in the same way; the set without a fault of a control.

        Returns:
            The numbers of `two_sample.nearest_neighbour_metrics` for "images".
        """
        distances, reference = ({"images": self._nearest_training(part)[1]} for part in (samples, unseen))
        return two_sample.nearest_neighbour_metrics(distances, reference)

    def _nearest_training(self, part: Part) -> tuple[np.ndarray, np.ndarray]:
        """Index of the nearest real training slice of each image, and the distance in pixels, (N,) each."""
        images, others = _flat(part.images), _flat(self.train.images)
        return two_sample.nearest_neighbours(images, others, *_subjects(part, self.train))

    def nearest_to_training(self, samples: Part) -> list[dict[str, Any]]:
        """The ten samples nearest to a training slice in pixels, as {index, train_index, distance}."""
        index, distances = self._nearest_training(samples)
        train_index = self.results.compared["train"][index]
        return [
            {"index": int(i), "train_index": int(train_index[i]), "distance": float(distances[i])}
            for i in np.argsort(distances, kind="stable")[:10]
        ]

    def _measure_codes(self, part: Part) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Measure everything that depends on the codes of a part alone. Sets that share their codes are measured once.

        Returns:
            The critic's surprise, (N,), and the distance of each grid of codes, and of what it decodes to, to the
            nearest of the training slices, (N,) for each space.
        """
        key = tuple(array.tobytes() for array in (*part.codes, part.positions, part.subjects))
        if key not in self._measured_codes:
            surprise = self.results.critic.surprise(part.codes, part.positions)
            self._measured_codes[key] = surprise, self._distances(part)
        return self._measured_codes[key]

    def _distances(self, part: Part) -> dict[str, np.ndarray]:
        train, images, subjects = self.train, part.decoded, _subjects(part, self.train)
        return {
            "codes": two_sample.nearest_grids(_grids(part.codes), _grids(train.codes), *subjects),
            "pixels": two_sample.nearest_neighbours(_flat(images), _flat(train.decoded), *subjects)[1],
            "features": two_sample.nearest_neighbours(self._features(images), self.train_features, *subjects)[1],
        }


# ------------------------------------------------------------------------------------------------ helpers


def half_size(images: np.ndarray) -> np.ndarray:
    """Shrink images to the means of squares of 2 × 2 pixels.

    Args:
        images: (N, H, W, 1) uint8; the last row and column are dropped if there is an odd number.

    Returns:
        (N, H // 2, W // 2, 1) uint8.
    """
    height, width = (size // 2 for size in images.shape[1:3])
    squares = images[:, : 2 * height, : 2 * width].reshape(-1, height, 2, width, 2, 1)
    return np.rint(squares.mean(axis=(2, 4), dtype=np.float32)).astype(np.uint8)


def to_display_uint8(images: np.ndarray) -> np.ndarray:
    """Convert images to what an 8-bit PNG with a clean background shows: values up to 0.05 become black.

    Decoders leave faint noise where real slices are exactly black. No comparison should depend on it.

    Args:
        images: (N, H, W, 1) uint8, or float, clipped to [0, 1].

    Returns:
        (N, H, W, 1) uint8.
    """
    images = images if images.dtype == np.uint8 else to_uint8(images)
    return np.where(images > BRAIN_THRESHOLD * 255, images, np.uint8(0))


def choose_slices(slices: dict[str, Slices], max_slices: int, seed: int) -> dict[str, np.ndarray]:
    """Choose the slices of each split that are compared with samples.

    Comparing all pairs of slices costs the square of their number, so validation and test slices are limited. Of the
    training slices there may be more, up to `TRAINING_SLICES`: classifiers need many to learn from, and copies are
    searched for among them.

    Args:
        slices: All slices, by split.
        max_slices: Largest number of slices of a split; see `choose_subjects`.
        seed: Determines the subjects.

    Returns:
        Indices of the slices, by split.
    """
    limits = {"train": max(max_slices, TRAINING_SLICES)}
    return {split: choose_subjects(some, limits.get(split, max_slices), seed) for split, some in slices.items()}


def choose_subjects(slices: Slices, max_slices: int, seed: int) -> np.ndarray:
    """Choose all slices of random subjects, as many as possible without exceeding a number of slices.

    Args:
        slices: N slices.
        max_slices: The number. If even the first subject has more slices, it is chosen nevertheless.
        seed: Determines the subjects. Those for fewer slices are among those for more.

    Returns:
        Indices of the chosen slices in increasing order.
    """
    names, counts = np.unique(slices.subjects, return_counts=True)
    order = seeds.generator(seed, "subjects to compare").permutation(len(names))
    fitting = max(1, int(np.searchsorted(np.cumsum(counts[order]), max_slices, "right")))
    return np.flatnonzero(np.isin(slices.subjects, names[order[:fitting]]))


def matched_slices(part: Part, targets: Part, random: np.random.Generator) -> np.ndarray:
    """Choose a slice for each target, such that both sets have the same composition.

    Each subject of the targets is matched with a random subject, a different one each time as long as there are any,
    and each of its slices with that subject's slice at the nearest position.

    Returns:
        (N,) indices of `part`, one for each of the N targets.
    """
    names, chosen = np.unique(targets.subjects), np.empty(len(targets.subjects), np.int64)
    partners = np.resize(random.permutation(np.unique(part.subjects)), len(names))
    for name, partner in zip(names, partners, strict=True):
        own, others = np.flatnonzero(targets.subjects == name), np.flatnonzero(part.subjects == partner)
        distances = np.abs(targets.positions[own][:, None] - part.positions[others])
        chosen[own] = others[distances.argmin(axis=1)]
    return chosen


def random_pairs(positions: np.ndarray, subjects: np.ndarray, seed: int) -> np.ndarray:
    """Draw pairs of slices at the same position that show different subjects, up to `PAIRS_PER_SLICE` per slice.

    Returns:
        (P, 2) indices, P at most N · `PAIRS_PER_SLICE`.
    """
    random, pairs = seeds.generator(seed, "pairs of slices"), []
    for i in range(len(positions)):
        partners = np.flatnonzero((positions == positions[i]) & (subjects != subjects[i]))
        pairs += [(i, j) for j in random.permutation(partners)[:PAIRS_PER_SLICE]]
    return np.array(pairs, np.int64).reshape(-1, 2)


def ms_ssim_of_pairs(images: np.ndarray, pairs: np.ndarray) -> float:
    """Return the mean MS-SSIM of pairs (P, 2) of uint8 images; higher is less varied. NaN if there are no pairs."""
    x, y = (to_float(images[pairs[:, side]]) for side in (0, 1))
    return float(metrics.ms_ssim(x, y).mean()) if len(pairs) else math.nan


def _subjects(first: Part, second: Part) -> tuple[np.ndarray, np.ndarray]:
    return first.subjects, second.subjects


def _flat(images: np.ndarray) -> np.ndarray:
    return images.reshape(len(images), -1)


def _grids(codes: list[np.ndarray]) -> np.ndarray:
    """The codes of all levels in one row per slice, (N, D)."""
    return np.concatenate([_flat(indices) for indices in codes], axis=1)
