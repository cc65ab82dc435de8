"""Samples, references and controls: what is compared with what, on tiny networks that were never trained."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace

import keras
import numpy as np
import pytest

import comparison
import controls
import metrics
import phantom
import two_sample
from comparison import Comparison, Part
from dataset import Slices, to_uint8
from generator import Generator, Results, Samples
from run import without_nan
from tests import test_generator

SPLITS = ("train", "validate", "test")
COPIES = {"nn_distance_ratio_images", "near_duplicate_rate_images"}
SETS = {"c2st_real", "c2st_half_size", "c2st_reconstructions", "c2st_codes"}
PRDC = {"precision", "recall", "density", "coverage"}
SPACES = ("codes", "pixels", "features")
MEASURED = {"critic_auc", "critic_auc_interval", *PRDC, "mmd2", "mmd2_error", "ms_ssim_of_pairs"}
MEASURED |= {"power_low", "power_middle", "power_high", "code_hamming"}
MEASURED |= {f"{name}_{space}" for name in ("nn_distance_ratio", "near_duplicate_rate") for space in SPACES}


def some_slices(subjects: Sequence[int], positions: Sequence[int]) -> Slices:
    """Slices (N, 32, 32, 1) of some phantom subjects."""
    keys = [(subject, position) for subject in subjects for position in positions]
    return Slices(
        np.stack([phantom.slice_image(0, *key, image_size=32)[..., None] for key in keys]),
        np.array([position for _, position in keys], np.int32),
        np.array([f"case_{subject:02d}" for subject, _ in keys]),
    )


def make_results(
    subjects: Sequence[int] = (8, 4, 6), positions: Sequence[int] = (5, 7, 9), grids: tuple[int, ...] = (4,)
) -> Results:
    """The results of untrained networks for this number of subjects in each split."""
    ends = np.cumsum(subjects)
    slices = {
        split: some_slices(range(end - count, end), positions)
        for split, end, count in zip(SPLITS, ends, subjects, strict=True)
    }
    keras.utils.set_random_seed(0)
    first, second = test_generator.make(grids), test_generator.make(grids)
    first.vqvae(slices["train"].images / np.float32(255), training=True)  # The first batch sets the codebook.
    generator, critic = (Generator(first.vqvae, made.priors, positions) for made in (first, second))
    for prior in critic.priors:
        prior.set_weights([-weight for weight in prior.get_weights()])
    codes = {split: generator.encode(some.images) for split, some in slices.items()}

    random, compared_samples = np.random.default_rng(0), {}
    for split, some in slices.items():
        sampled = [random.integers(0, 16, (len(some), grid, grid)).astype(np.int32) for grid in grids]
        compared_samples[split] = Samples(to_uint8(generator.decode(sampled)), sampled, some.positions)
    return Results(
        generator=generator,
        slices=slices,
        codes=codes,
        reconstructions={split: generator.decode(codes[split]) for split in ("validate", "test")},
        critic=critic,
        samples=compared_samples["test"],
        compared={split: np.arange(len(some)) for split, some in slices.items()},
        compared_samples=compared_samples,
        sampling={"seed": 1},
        history=[],
        numbers={},
    )


@pytest.fixture(scope="module")
def results() -> Results:
    return make_results()


@pytest.fixture(scope="module")
def made(results) -> Comparison:
    return Comparison(results, seed=0)


def compare(results: Results, **options) -> tuple[dict, list]:
    """The numbers, and the arguments of each classifier two-sample test, none of which is carried out."""
    calls = []

    def record(first, second, subjects, classifier, seed, trainings):
        calls.append(SimpleNamespace(first=first, second=second, subjects=subjects, classifier=classifier))
        return {"accuracy": len(calls) / 100, "accuracy_interval": [0.0, 1.0]}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(two_sample, "classifier_two_sample_test", record)
        return comparison.compare(results, seed=0, **options), calls


@pytest.fixture(scope="module")
def compared(results) -> tuple[dict, list]:
    return compare(results)


def shown(images: np.ndarray) -> np.ndarray:
    return comparison.to_display_uint8(images)


# ------------------------------------------------------------------------------------------- comparisons


def test_compare_returns_the_documented_numbers(compared):
    numbers, _ = compared
    assert set(numbers) == {"compared_slices", "samples", "references", "controls", "failed_controls"}
    assert numbers["compared_slices"] == {"train": 24, "validate": 12, "test": 18}
    assert set(numbers["samples"]) == MEASURED | SETS | COPIES | {"count", "nearest_to_training"}
    assert numbers["samples"]["count"] == 18
    assert set(numbers["references"]) == {"reconstructions", "other_subjects", "real_ms_ssim_of_pairs"}
    assert set(numbers["references"]["reconstructions"]) == MEASURED | {"c2st_real"}
    others = PRDC | {"mmd2", "mmd2_error", "ms_ssim_of_pairs"}
    assert set(numbers["references"]["other_subjects"]) == others | {f"{name}_spread" for name in others}
    assert set(numbers["controls"]) == set(controls.DESCRIPTIONS)
    for name in controls.DESCRIPTIONS:
        assert set(numbers["controls"][name]) == MEASURED | COPIES | {"c2st", "c2st_codes"}
    assert numbers["failed_controls"].keys() <= MEASURED | COPIES | {"c2st", "c2st_codes"}
    assert json.loads(json.dumps(without_nan(numbers), allow_nan=False))


def test_images_are_shrunk_to_means_of_squares():
    images = np.random.default_rng(0).integers(0, 256, (2, 7, 6, 1)).astype(np.uint8)
    shrunk = comparison.half_size(images)
    assert shrunk.shape == (2, 3, 3, 1)
    assert shrunk.dtype == np.uint8
    assert shrunk[1, 2, 0, 0] == round(images[1, 4:6, :2].mean())


def test_classifiers_compare_the_right_sets_split_by_split(results, compared):
    _, tests = compared
    against_real, at_half_size, against_decoded, of_codes, of_decoded = tests[:5]
    decoded = {split: results.generator.decode(codes) for split, codes in results.codes.items()}
    for split in SPLITS:
        real, sampled = results.slices[split].images, results.compared_samples[split]
        assert np.array_equal(against_real.first[split][0], shown(real))
        assert np.array_equal(against_real.second[split][0], shown(sampled.images))
        assert np.array_equal(at_half_size.first[split][0], comparison.half_size(shown(real)))
        assert np.array_equal(at_half_size.second[split][0], comparison.half_size(shown(sampled.images)))
        assert np.array_equal(against_decoded.first[split][0], shown(decoded[split]))
        assert np.array_equal(against_decoded.second[split][0], shown(sampled.images))
        assert np.array_equal(of_codes.first[split][0], results.codes[split][0])
        assert np.array_equal(of_codes.second[split][0], sampled.codes[0])
        assert np.array_equal(of_decoded.first[split][0], shown(real))
        assert np.array_equal(of_decoded.second[split][0], shown(decoded[split]))
    assert np.array_equal(against_real.subjects[0], results.slices["test"].subjects)
    assert len(set(against_real.subjects[1])) == 18  # Each sample counts as a subject of its own.


def test_no_classifier_is_trained_on_test_subjects(results, compared):
    _, tests = compared
    test_images = {image.tobytes() for image in shown(results.slices["test"].images)}
    classified = [call for call in tests if "train" in call.second]
    assert len(classified) == 15  # All but those of the decoded training codes, which have a test part only.
    for call in classified:
        for split in ("train", "validate"):
            for inputs in (call.first[split], call.second[split]):
                assert not test_images & {image.tobytes() for array in inputs for image in array}


def test_with_a_sharp_decoder_both_decoders_are_measured(results, monkeypatch):
    vqvae = results.generator.vqvae
    decoder = test_generator.sharp_decoder(vqvae)
    sharpened = Generator(vqvae, results.generator.priors, results.generator.positions, decoder=decoder)
    drawn = {
        split: replace(samples, images=to_uint8(sharpened.draw(samples.codes)))
        for split, samples in results.compared_samples.items()
    }
    made = replace(results, generator=sharpened, compared_samples=drawn)
    numbers, classified = compare(replace(made, sharp_reconstructions=sharpened.draw(results.codes["test"])))
    references = numbers["references"]
    assert set(references["faithful_samples"]) == MEASURED | {"c2st_real"}
    assert set(references["sharp_reconstructions"]) == MEASURED | {"c2st_real", "c2st_half_size"}
    assert references["faithful_samples"]["power_high"] != numbers["samples"]["power_high"]
    against_reconstructions = classified[2].second["test"][0]
    assert np.array_equal(against_reconstructions, shown(sharpened.decode(drawn["test"].codes)))


def test_what_was_computed_before_is_not_computed_again(results, compared):
    computed = {}

    def remember(name, compute):
        if name not in computed:
            computed[name] = compute()
        return computed[name]

    assert compare(results, remember=remember)[0] == compared[0]
    numbers, classified = compare(results, remember=remember)
    assert numbers == compared[0]
    assert not classified


def test_only_the_chosen_slices_are_compared(results):
    chosen = {split: np.flatnonzero(some.subjects != some.subjects[0]) for split, some in results.slices.items()}
    made = Comparison(replace(results, compared=chosen), seed=0)
    for split, some in results.slices.items():
        assert np.array_equal(made.real[split].images, shown(some.images[chosen[split]]))
        assert np.array_equal(made.real[split].subjects, some.subjects[chosen[split]])
        assert np.array_equal(made.real[split].codes[0], results.codes[split][0][chosen[split]])
    samples = made.samples()["test"]
    for row in made.nearest_to_training(samples):
        distances = np.sqrt(
            np.mean((samples.images[row["index"]] / 255.0 - made.real["train"].images / 255.0) ** 2, axis=(1, 2, 3))
        )
        assert row["train_index"] == chosen["train"][np.argmin(distances)]
        assert row["distance"] == pytest.approx(distances.min(), abs=1e-4)


def test_samples_are_measured_against_the_test_split(results, made):
    numbers = made.measure(made.samples()["test"])
    test, samples, train = results.slices["test"], results.compared_samples["test"], results.slices["train"]
    surprise = [results.critic.surprise(codes, test.positions) for codes in (results.codes["test"], samples.codes)]
    pairs = surprise[1][None] - surprise[0][:, None]
    assert numbers["critic_auc"] == pytest.approx(np.mean(pairs > 0) + np.mean(pairs == 0) / 2)
    spectra = [metrics.power_spectrum(shown(images) / np.float32(255)) for images in (test.images, samples.images)]
    for name, ratio in metrics.power_ratios(*spectra).items():
        assert numbers[name] == pytest.approx(ratio)
    codes = [indices.reshape(len(indices), -1) for indices in (samples.codes[0], results.codes["train"][0])]
    hamming = np.min([(codes[0] != other).mean(axis=1) for other in codes[1]], axis=0)
    assert numbers["code_hamming"] == pytest.approx(hamming.mean())
    whiten = two_sample.whitening(two_sample.random_features(shown(train.images)))
    features = [whiten(two_sample.random_features(shown(images))) for images in (test.images, samples.images)]
    subjects = test.subjects, np.arange(18)
    for name, value in (two_sample.prdc(*features, *subjects) | two_sample.mmd2(*features, *subjects)).items():
        assert numbers[name] == pytest.approx(value, rel=1e-3), name
    images = shown(samples.images) / np.float32(255)
    same = (test.positions[made.pairs[:, 0]] == test.positions[made.pairs[:, 1]]).all()
    assert same
    expected = metrics.ms_ssim(images[made.pairs[:, 0]], images[made.pairs[:, 1]]).mean()
    assert numbers["ms_ssim_of_pairs"] == pytest.approx(expected)


def test_the_test_slices_themselves_are_indistinguishable_and_unseen(made):
    numbers = made.measure(made.real["test"])
    assert numbers["critic_auc"] == pytest.approx(0.5)
    assert [numbers[f"power_{band}"] for band in ("low", "middle", "high")] == pytest.approx([1, 1, 1])
    assert numbers["code_hamming"] > 0
    for space in SPACES:
        assert numbers[f"nn_distance_ratio_{space}"] == pytest.approx(1)
        nearest = made.distances[space] == made.distances[space].min()  # Distances between codes have ties.
        assert numbers[f"near_duplicate_rate_{space}"] == pytest.approx(nearest.mean())


def test_other_subjects_are_means_over_draws(made, monkeypatch):
    numbers = made.measure_other_subjects()
    assert numbers["mmd2_spread"] > 0
    values, draws = iter([1.0, 2.0, 6.0]), []
    monkeypatch.setattr(comparison, "NUM_DRAWS", 3)
    monkeypatch.setattr(two_sample, "prdc", lambda *given: {"precision": next(values)})
    monkeypatch.setattr(two_sample, "mmd2", lambda real, fake, *subjects: draws.append(subjects) or {})
    numbers = made.measure_other_subjects()
    assert (numbers["precision"], numbers["precision_spread"]) == (3.0, pytest.approx(math.sqrt(7)))
    assert len({tuple(fake) for _, fake in draws}) == 3  # Other subjects each time, all from the training split.
    for real, fake in draws:
        assert set(real) == set(made.real["test"].subjects)
        assert set(fake) <= set(made.real["train"].subjects)


def test_two_levels_are_compared():
    made = Comparison(make_results((2, 2, 2), (5, 8), grids=(4, 8)), seed=0)
    assert 0 < made.measure(made.samples()["test"])["code_hamming"] <= 1
    copies = replace(made.reconstructions["train"].take(np.arange(4)), subjects=np.arange(4))
    assert made.measure(copies)["code_hamming"] == 0
    assert [indices.shape for indices in made.real["test"].codes] == [(4, 4, 4), (4, 8, 8)]
    assert [tuple(tensor.shape) for tensor in made._code_classifier.inputs] == [(None, 4, 4), (None, 8, 8)]


def test_nothing_but_classifiers_pairs_more_slices_than_are_compared(results, monkeypatch):
    few = np.flatnonzero(np.isin(results.slices["train"].subjects, ["case_01", "case_06"]))
    sizes = []
    for name in ("nearest_neighbours", "nearest_grids", "prdc", "mmd2"):
        original = getattr(two_sample, name)

        def record(first, second, *subjects, original=original):
            sizes.append((len(first), len(second)))
            return original(first, second, *subjects)

        monkeypatch.setattr(two_sample, name, record)
    compare(replace(results, compared={**results.compared, "train": few}))
    assert len(sizes) > 50
    assert set(sizes) == {(18, len(few)), (18, 18)}


def test_sets_that_share_their_codes_are_measured_once(results, monkeypatch):
    made, measured = Comparison(results, seed=0), []
    surprise = results.critic.surprise
    monkeypatch.setattr(results.critic, "surprise", lambda *part: measured.append(1) or surprise(*part))
    first = made.measure(made.reconstructions["test"])
    assert not measured  # The real slices have the same codes.
    other = replace(made.samples()["test"], codes=[codes[::-1] for codes in made.samples()["test"].codes])
    assert made.measure(other)["critic_auc"] != first["critic_auc"]
    assert measured


def test_the_compared_slices_are_limited_to_whole_subjects():
    slices = some_slices(range(5), (5, 7, 9))
    chosen = {limit: comparison.choose_subjects(slices, limit, seed=1) for limit in (1, 7, 11, 100)}
    assert [len(index) for index in chosen.values()] == [3, 6, 9, 15]
    for index in chosen.values():
        assert all(np.sum(slices.subjects[index] == name) == 3 for name in set(slices.subjects[index]))
        assert set(index) <= set(chosen[100])
    assert set(chosen[7]) < set(chosen[11])
    assert not np.array_equal(chosen[7], comparison.choose_subjects(slices, 7, seed=3))


def test_training_slices_have_a_limit_of_their_own(monkeypatch):
    monkeypatch.setattr(comparison, "TRAINING_SLICES", 9)
    slices = {split: some_slices(range(5), (5, 7, 9)) for split in SPLITS}
    for limit, (few, many) in {7: (6, 9), 12: (12, 12)}.items():
        chosen = comparison.choose_slices(slices, limit, seed=1)
        assert {split: len(index) for split, index in chosen.items()} == {**dict.fromkeys(SPLITS, few), "train": many}


# ----------------------------------------------------------------------------------------------- controls


@pytest.mark.parametrize("name", controls.DESCRIPTIONS)
def test_controls_differ_from_the_faultless_set_only_by_their_fault(made, name):
    faultless, control = made.control(name)
    assert faultless["test"].positions.tolist() == control["test"].positions.tolist()
    is_decoded = name in ("halves", "blocks", "decoded_training_codes")
    assert np.array_equal(faultless["test"].images, (made.reconstructions if is_decoded else made.real)["test"].images)
    for part in control.values():
        if is_decoded:
            assert np.array_equal(part.images, made._decode(part.codes))
    assert not np.array_equal(control["test"].images, faultless["test"].images)
    if name in ("blur", "noise"):
        assert np.array_equal(control["test"].codes[0], made.results.generator.encode(control["test"].images)[0])


def test_the_real_control_separates_subjects(made):
    first, second = made.control("real")
    names = [[set(sets[split].subjects) for split in ("train", "validate")] for sets in (first, second)]
    every = [name for sets in names for name in sets]
    assert set.union(*every) == set(made.real["train"].subjects)
    assert sum(len(subjects) for subjects in every) == len(set.union(*every))  # No subject is in two of the four.
    assert min(len(subjects) for subjects in every) >= 1
    assert set(first["test"].subjects) == set(made.real["test"].subjects)
    assert set(second["test"].subjects) <= set(made.real["validate"].subjects)


def test_decoded_training_codes_are_found_to_be_copies(made):
    numbers = made.measure(made.control("decoded_training_codes")[1]["test"])
    assert numbers["code_hamming"] == 0
    for space in SPACES:
        assert numbers[f"near_duplicate_rate_{space}"] == 1, space
        assert numbers[f"nn_distance_ratio_{space}"] == pytest.approx(0, abs=0.01), space


# ------------------------------------------------------------------------------------------------ helpers


def test_display_images_equal_a_png_with_a_clean_background():
    brains = np.stack([phantom.slice_image(0, subject, 6)[..., None] for subject in range(2)])
    faint = np.full((1, 16, 16, 1), 0.03, np.float32)
    assert not shown(faint).any()
    images = shown(brains)
    assert images.dtype == np.uint8
    assert np.array_equal(images, shown(brains / np.float32(255)))
    assert np.array_equal(images[brains > 12], brains[brains > 12])
    assert not images[brains <= 12].any()
    assert shown(np.array([[[[-1.0], [2.0]]]])).ravel().tolist() == [0, 255]


def part_at(positions_of: dict[str, Sequence[int]]) -> Part:
    """Black slices of these subjects at these positions."""
    subjects = np.array([name for name, positions in positions_of.items() for _ in positions])
    positions = np.array([position for positions in positions_of.values() for position in positions])
    images = np.zeros((len(positions), 8, 8, 1), np.uint8)
    return Part(images, [], positions, subjects, images[:0])


def test_matched_slices_are_of_different_subjects_at_the_nearest_positions():
    targets = part_at({"x": [1, 2, 3], "y": [1, 2, 3]})
    part = part_at({name: [3, 2, 1] for name in "abcd"})
    chosen = comparison.matched_slices(part, targets, np.random.default_rng(0))
    assert np.array_equal(part.positions[chosen], targets.positions)
    assert len(set(part.subjects[chosen][:3])) == len(set(part.subjects[chosen][3:])) == 1
    assert part.subjects[chosen][0] != part.subjects[chosen][3]
    draws = {tuple(comparison.matched_slices(part, targets, np.random.default_rng(seed))) for seed in range(9)}
    assert len(draws) > 3
    single = part_at({"a": [0, 9]})  # The only subject is matched with both.
    assert comparison.matched_slices(single, targets, np.random.default_rng(0)).tolist() == [0] * 6


def test_random_pairs_share_a_position_and_show_two_subjects():
    positions, subjects = np.tile([1, 2], 5), np.repeat(list("abcde"), 2)
    pairs = comparison.random_pairs(positions, subjects, seed=0)
    assert len(pairs) == 30
    assert (positions[pairs[:, 0]] == positions[pairs[:, 1]]).all()
    assert (subjects[pairs[:, 0]] != subjects[pairs[:, 1]]).all()
    assert comparison.random_pairs(np.array([1, 2]), np.array(["a", "b"]), seed=0).shape == (0, 2)


def test_ms_ssim_of_pairs_measures_variety():
    slices = some_slices(range(4), (6, 9))
    pairs = comparison.random_pairs(slices.positions, slices.subjects, seed=0)
    assert comparison.ms_ssim_of_pairs(np.repeat(slices.images[:1], 8, axis=0), pairs) == pytest.approx(1)
    varied = comparison.ms_ssim_of_pairs(slices.images, pairs)
    assert 0.2 < varied < 0.99
    noise = np.random.default_rng(0).integers(0, 256, slices.images.shape).astype(np.uint8)
    assert comparison.ms_ssim_of_pairs(noise, pairs) < varied
    assert math.isnan(comparison.ms_ssim_of_pairs(slices.images, np.zeros((0, 2), int)))
