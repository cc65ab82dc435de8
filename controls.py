"""Controls: sets of images with a known fault, which a measure must find.

A measure that does not find it says nothing about samples either: `failed_controls` lists what each measure fails, and
the report concludes nothing from it. `comparison.Comparison.control` makes the sets.
"""

import math
from typing import Any

import numpy as np
from scipy import ndimage

BLUR_SIGMA = 1.0  # Standard deviation of the Gaussian in pixels.
NOISE_SIGMA = 0.05  # Standard deviation of the noise, on the [0, 1] scale.
BLOCKS = 4  # Blocks per side of a grid in the control "blocks": 3 × 3 codes each on a 12 × 12 grid.
DESCRIPTIONS = {
    "real": "real slices of validation subjects: no fault",
    "halves": "left half of the codes from one test subject, right half from another, decoded",
    "blocks": f"each of {BLOCKS} × {BLOCKS} blocks of the codes from another test subject, decoded",
    "blur": f"real slices, blurred by a Gaussian with a standard deviation of {BLUR_SIGMA:g} pixel",
    "noise": f"real slices with noise of standard deviation {NOISE_SIGMA:g} in the brain",
    "decoded_training_codes": "codes of training slices, decoded: copies",
}


def patch_codes(
    codes: list[np.ndarray],
    positions: np.ndarray,
    subjects: np.ndarray,
    blocks: tuple[int, int],
    random: np.random.Generator,
) -> list[np.ndarray]:
    """Patch each code grid together from the grids of different subjects at the same, or the nearest, slice position.

    Args:
        codes: Code indices of N slices, (N, h, w) int32 per level. All levels are patched alike.
        positions: (N,) slice positions.
        subjects: (N,) subjects.
        blocks: Number of blocks, (rows, columns). The first block keeps the slice's own codes. Each other block has
            those of another subject, a different one as long as there are any.
        random: Chooses the subjects.

    Returns:
        (N, h, w) int32 per level.
    """
    count = math.prod(blocks)
    slices_of = {name: np.flatnonzero(subjects == name) for name in np.unique(subjects)}
    sources = np.empty((len(positions), count), np.int64)  # index of the slice that each block comes from
    for i, (position, subject) in enumerate(zip(positions, subjects, strict=True)):
        others = random.permutation([name for name in slices_of if name != subject])
        owners = [subject, *np.resize(others, count - 1)] if len(others) else [subject] * count
        for block, owner in enumerate(owners):
            own = slices_of[owner]
            sources[i, block] = own[np.abs(positions[own] - position).argmin()]
    patched = []
    for grids in codes:
        rows, columns = (np.arange(side) * number // side for side, number in zip(grids.shape[1:], blocks, strict=True))
        block_of = rows[:, None] * blocks[1] + columns  # (h, w)
        source = sources[:, block_of]  # (N, h, w)
        patched.append(grids[source, np.arange(grids.shape[1])[:, None], np.arange(grids.shape[2])])
    return patched


def blur(images: np.ndarray) -> np.ndarray:
    """Blur images (N, H, W, 1) in [0, 1] with a Gaussian of standard deviation `BLUR_SIGMA`."""
    return ndimage.gaussian_filter(images, (0, BLUR_SIGMA, BLUR_SIGMA, 0))


def add_noise(images: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Add Gaussian noise of standard deviation `NOISE_SIGMA` to the brain in images (N, H, W, 1) in [0, 1].

    The background stays black: noise there would be too easy to find.
    """
    noise = NOISE_SIGMA * random.standard_normal(images.shape, np.float32)
    return np.clip(images + noise * (images > 0), 0, 1)


def failed_controls(controls: dict[str, dict[str, Any]], reconstructions: dict[str, Any]) -> dict[str, list[str]]:
    """Compare what the measures say about the controls with what they must say.

    Args:
        controls: The numbers of each control, as in metrics.json.
        reconstructions: Those of the reconstructions of the test slices.

    Returns:
        For each measure, the controls that it fails, as in "noise (0.50 instead of at least 0.8)". A measure with an
        empty list can be trusted.
    """
    failures: dict[str, list[str]] = {}
    real = controls["real"]

    def require(measure: str, control: str, value: float, holds: bool, wanted: str) -> None:
        shown = "undefined" if math.isnan(value) else f"{value:.2f}"
        failed = [] if holds else [f"{control} ({shown} instead of {wanted})"]
        failures[measure] = [*failures.get(measure, []), *failed]

    def within(interval: list[float | None]) -> bool:
        lower, upper = interval
        return lower is not None and upper is not None and lower <= 0.5 <= upper

    for measure, value, interval in (
        ("c2st", real["c2st"]["accuracy"], real["c2st"]["accuracy_interval"]),
        ("c2st_codes", real["c2st_codes"]["accuracy"], real["c2st_codes"]["accuracy_interval"]),
        ("critic_auc", real["critic_auc"], real["critic_auc_interval"]),
    ):
        require(measure, "real", value, within(interval), "0.50 within its interval")
    for measure, name, least in (
        ("c2st", "blur", 0.8),
        ("c2st", "noise", 0.8),
        ("c2st_codes", "blocks", 0.8),
        ("c2st_codes", "halves", 0.7),
    ):
        accuracy = controls[name][measure]["accuracy"]
        require(measure, name, accuracy, accuracy >= least, f"at least {least}")
    for name, least in (("blocks", 0.95), ("halves", 0.65)):
        auc = controls[name]["critic_auc"]
        require("critic_auc", name, auc, auc >= least, f"at least {least}")
    for space in ("codes", "pixels", "features", "images"):
        measure = f"near_duplicate_rate_{space}"
        copies, unseen = controls["decoded_training_codes"][measure], controls["real"][measure]
        require(measure, "decoded_training_codes", copies, copies >= 0.9, "at least 0.9")
        require(measure, "real", unseen, unseen <= 0.1, "at most 0.1")
    for measure in ("precision", "density", "recall", "coverage"):
        value, limit = controls["blocks"][measure], 0.8 * reconstructions[measure]
        require(measure, "blocks", value, value <= limit, "at most 0.8 times that of reconstructions")
    return failures
