"""Controls: how their faults are made, and which numbers pass."""

import math
from collections.abc import Sequence

import numpy as np
import pytest

import controls
import metrics
import phantom

SPACES = ("codes", "pixels", "features", "images")
PRDC = ("precision", "recall", "density", "coverage")


def labelled_slices(
    positions_of: dict[str, Sequence[int]], levels: Sequence[int] = (4,)
) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """Codes, positions and subjects of slices whose codes are all equal to their index, which shows their source."""
    subjects = np.array([name for name, positions in positions_of.items() for _ in positions])
    positions = np.array([position for positions in positions_of.values() for position in positions])
    index = np.arange(len(positions))
    return [np.tile(index[:, None, None], (1, grid, grid)) for grid in levels], positions, subjects


def patch(slices: tuple, blocks: tuple[int, int], seed: int = 0) -> list[np.ndarray]:
    return controls.patch_codes(*slices, blocks, np.random.default_rng(seed))


def test_each_block_is_of_another_subject_at_the_same_position():
    slices = labelled_slices({name: [1, 2, 3] for name in "abcde"})
    _, positions, subjects = slices
    (codes,) = patch(slices, (2, 2))
    blocks = codes.reshape(15, 2, 2, 2, 2).transpose(0, 1, 3, 2, 4).reshape(15, 4, 4)
    assert (blocks == blocks[..., :1]).all()  # One slice per block.
    sources = blocks[..., 0]  # (15, 4)
    assert np.array_equal(sources[:, 0], np.arange(15))  # The first block keeps the slice's own codes.
    assert (positions[sources] == positions[:, None]).all()
    assert all(len(set(subjects[row])) == 4 for row in sources)
    assert len({tuple(subjects[row]) for row in sources}) > 5
    assert np.array_equal(codes, patch(slices, (2, 2))[0])
    assert not np.array_equal(codes, patch(slices, (2, 2), seed=1)[0])


def test_halves_are_left_and_right_and_come_from_the_nearest_position():
    slices = labelled_slices({"a": [1, 5], "b": [2, 9]})
    (codes,) = patch(slices, (1, 2))
    assert (codes[:, :, :2] == np.arange(4)[:, None, None]).all()
    assert (codes[:, :, 2:] == np.array([2, 2, 0, 1])[:, None, None]).all()  # 5 is nearer to 2 than to 9.


def test_both_levels_are_patched_alike():
    codes, positions, subjects = labelled_slices({name: [1, 2] for name in "abcdef"}, levels=(4, 8))
    top, bottom = patch((codes, positions, subjects), (4, 4))
    assert np.array_equal(bottom, top.repeat(2, 1).repeat(2, 2))
    assert all(set(subjects[row.ravel()]) == set("abcdef") for row in top)  # Six subjects for 16 blocks.


def test_grids_that_blocks_do_not_divide_are_patched_as_evenly_as_possible():
    slices = labelled_slices({name: [1] for name in "abcdefghijklmnopq"}, levels=(6,))
    (codes,) = patch(slices, (4, 4))
    assert all(len(np.unique(grid)) == 16 for grid in codes)


def test_a_single_subject_keeps_its_codes():
    slices = labelled_slices({"a": [1, 2]})
    assert np.array_equal(patch(slices, (4, 4))[0], slices[0][0])


def test_blur_and_noise_change_the_high_frequencies():
    brains = np.stack([phantom.slice_image(0, subject, 7, image_size=32)[..., None] for subject in range(3)])
    images = np.where(brains > 12, brains, 0) / np.float32(255)
    spectrum = metrics.power_spectrum(images)
    blurred, noisy = controls.blur(images), controls.add_noise(images, np.random.default_rng(0))
    assert metrics.power_ratios(spectrum, metrics.power_spectrum(blurred))["power_high"] < 0.2
    assert metrics.power_ratios(spectrum, metrics.power_spectrum(blurred))["power_low"] > 0.7
    assert metrics.power_ratios(spectrum, metrics.power_spectrum(noisy))["power_high"] > 1.05
    assert not noisy[images == 0].any()  # Noise in the background would be too easy to find.
    inside = (images > 0.3) & (images < 0.7)
    assert (noisy - images)[inside].std() == pytest.approx(controls.NOISE_SIGMA, rel=0.1)
    assert 0 <= noisy.min() <= noisy.max() <= 1


def test_blur_does_not_mix_slices():
    images = np.zeros((3, 8, 8, 1), np.float32)
    images[1] = 1
    blurred = controls.blur(images)
    assert not blurred[[0, 2]].any()
    assert blurred[1] == pytest.approx(1)


GOOD_CONTROL = {
    "c2st": {"accuracy": 0.9, "accuracy_interval": [0.8, 1.0]},
    "c2st_codes": {"accuracy": 0.9, "accuracy_interval": [0.8, 1.0]},
    "critic_auc": 0.99,
    "critic_auc_interval": [0.98, 1.0],
    **{f"near_duplicate_rate_{space}": 0.01 for space in SPACES},
    **dict.fromkeys(PRDC, 0.3),
}
AT_CHANCE = {"accuracy": 0.52, "accuracy_interval": [0.45, 0.6]}
GOOD_CONTROLS = dict.fromkeys(controls.DESCRIPTIONS, GOOD_CONTROL) | {
    "real": {
        **GOOD_CONTROL,
        "c2st": AT_CHANCE,
        "c2st_codes": AT_CHANCE,
        "critic_auc": 0.52,
        "critic_auc_interval": [0.45, 0.6],
    },
    "decoded_training_codes": {**GOOD_CONTROL, **{f"near_duplicate_rate_{space}": 1.0 for space in SPACES}},
}
RECONSTRUCTIONS = dict.fromkeys(PRDC, 0.5)


def accuracy(value: float, lower: float | None = 0.0, upper: float | None = 1.0) -> dict:
    return {"accuracy": value, "accuracy_interval": [lower, upper]}


def test_good_measures_pass_their_controls():
    failures = controls.failed_controls(GOOD_CONTROLS, RECONSTRUCTIONS)
    rates = {f"near_duplicate_rate_{space}" for space in SPACES}
    assert failures == {measure: [] for measure in {"c2st", "c2st_codes", "critic_auc", *rates, *PRDC}}


@pytest.mark.parametrize(
    ("control", "measure", "passing", "failing"),
    [
        ("real", "c2st", accuracy(0.6, 0.5, 0.7), accuracy(0.6, 0.51, 0.7)),
        ("real", "c2st", accuracy(0.4, 0.3, 0.5), accuracy(0.4, 0.3, 0.49)),
        ("real", "c2st_codes", accuracy(0.6, 0.5, 0.7), accuracy(0.6, 0.51, 0.7)),
        ("real", "c2st", accuracy(0.5), accuracy(0.5, None, None)),
        ("blur", "c2st", accuracy(0.8), accuracy(0.79)),
        ("noise", "c2st", accuracy(0.8), accuracy(0.79)),
        ("noise", "c2st", accuracy(0.8), accuracy(math.nan, None, None)),
        ("blocks", "c2st_codes", accuracy(0.8), accuracy(0.79)),
        ("halves", "c2st_codes", accuracy(0.7), accuracy(0.69)),
        ("real", "critic_auc_interval", [0.5, 0.6], [0.51, 0.6]),
        ("real", "critic_auc_interval", [0.4, 0.5], [None, None]),
        ("blocks", "critic_auc", 0.95, 0.94),
        ("halves", "critic_auc", 0.65, 0.64),
        ("halves", "critic_auc", 0.65, math.nan),
        *(
            (control, f"near_duplicate_rate_{space}", passing, failing)
            for space in SPACES
            for control, passing, failing in (("decoded_training_codes", 0.9, 0.89), ("real", 0.1, 0.11))
        ),
        *(("blocks", measure, 0.4, failing) for measure in sorted(PRDC) for failing in (0.41, math.nan)),
    ],
)
def test_each_threshold_decides_about_its_measure_alone(control, measure, passing, failing):
    def failures(value) -> dict[str, list[str]]:
        changed = {**GOOD_CONTROLS, control: {**GOOD_CONTROLS[control], measure: value}}
        return {name: failed for name, failed in controls.failed_controls(changed, RECONSTRUCTIONS).items() if failed}

    assert failures(passing) == {}
    ((name, (phrase,)),) = failures(failing).items()
    assert name == measure.removesuffix("_interval")
    assert phrase.startswith(f"{control} (")


def test_precision_is_relative_to_reconstructions():
    failures = controls.failed_controls(GOOD_CONTROLS, {**RECONSTRUCTIONS, "precision": 0.35, "recall": math.nan})
    assert {name for name, failed in failures.items() if failed} == {"precision", "recall"}
