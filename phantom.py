"""Synthetic brain slices, by arithmetic: what the driver runs on when there is no data, and what tests use.

Each slice looks, at a glance, like a skull-stripped axial T1 brain MRI: an outline that varies between
people and with the position, folded cortex, white and grey matter, ventricles that grow and close with
the position, a bias field and noise. They are drawings, not anatomy: good for trying the code, not for
any statement about brains.

    python phantom.py DESTINATION          write them as PNGs in the OASIS layout
"""

from pathlib import Path

import numpy as np
import tyro
from PIL import Image

NUM_CASES = 64
NUM_POSITIONS = 16

CSF, GREY, WHITE = 0.10, 0.52, 0.86  # intensities of the three tissues
NUM_WAVES = 64  # plane waves in the noise that folds the cortex


def slice_image(
    seed: int, case: int, position: int, image_size: int = 96, num_positions: int = NUM_POSITIONS
) -> np.ndarray:
    """Draw one slice.

    Args:
        seed, case: choose the person; the same person keeps its shape over all positions.
        position: 0 (lowest) to `num_positions` - 1 (highest).
        image_size: height and width in pixels.

    Returns:
        uint8 array (image_size, image_size); the background is exactly 0. A function of the arguments alone.

    Raises:
        ValueError: `position` is outside 0 … `num_positions` - 1.
    """
    if not 0 <= position < num_positions:
        raise ValueError(f"position {position} is outside 0 … {num_positions - 1}")
    person = np.random.default_rng([seed, case])
    z = position / max(num_positions - 1, 1)
    axis = ((np.arange(image_size) + 0.5) / image_size * 2 - 1).astype(np.float32)
    x, y = np.meshgrid(axis, axis)
    edge = 1.2 / image_size  # half the width of a tissue border: the partial volume effect

    radius, depth = _outline(person, x, y, z)
    folds = _folds(person, axis, z)
    brain = _step(depth, 0.06 * edge)

    # The cortex is a ribbon below the outline and on both banks of the sulci, dark lines that end in the depth.
    reach, sulcus_width = person.uniform(0.42, 0.50), person.uniform(0.05, 0.25)
    shallow = np.clip(1 - depth / reach, 0, 1)
    white = _step(np.minimum(depth - 0.07, 0.12 * (folds - 0.8 * np.sqrt(shallow))), edge)
    sulcus = _step(0.12 * (sulcus_width * shallow - folds), edge) * np.minimum(0.8, 3 * shallow)
    image = GREY + (WHITE - GREY) * white
    image += (CSF - image) * sulcus

    for inside, intensity in _deep_structures(person, x, y, z, edge):
        image += (intensity - image) * inside
    image += (CSF - image) * _fissure(person, x, y, z, edge)
    image *= _bias_field(person, x, y)

    noise = np.random.default_rng([seed, case, position])
    image += 0.018 * noise.standard_normal(image.shape, dtype=np.float32)
    image *= brain * person.uniform(0.85, 1.0)
    return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)


def _step(distance: np.ndarray, width: float) -> np.ndarray:
    """Soft step: 0 where `distance` is well below 0, 1 where well above."""
    return np.clip(distance / (2 * width) + 0.5, 0, 1)


def _ellipse(x, y, centre, radii, angle, edge):
    """Soft inside of an ellipse turned by `angle` radians."""
    cos, sin = np.cos(angle), np.sin(angle)
    u = ((x - centre[0]) * cos + (y - centre[1]) * sin) / radii[0]
    v = ((y - centre[1]) * cos - (x - centre[0]) * sin) / radii[1]
    return _step(1 - np.hypot(u, v), edge / min(radii))


def _outline(person, x, y, z):
    """Distance from the centre and depth below the outline, both as shares of the outline's radius."""
    size = np.sqrt(max(1 - ((z - 0.38) / 0.82) ** 2, 0.05))
    width = 0.60 * size * person.uniform(0.93, 1.05)
    length = 0.74 * size * person.uniform(0.93, 1.05)
    turn = person.normal(0, 0.03)
    u = (x * np.cos(turn) + y * np.sin(turn)) / width
    v = (y * np.cos(turn) - x * np.sin(turn)) / length
    angle = np.arctan2(v, u)
    border = 1 - 0.03 * np.sin(angle)  # the back of the head is wider than the front
    for order in range(2, 6):
        border += person.normal(0, 0.012) * np.cos(order * angle + person.uniform(0, 6.28) + order * z)
    border -= 0.035 * np.exp(-((u / 0.10) ** 2))  # the notch where the hemispheres meet
    radius = np.hypot(u, v) / border
    return radius, 1 - radius


def _folds(person, axis, z):
    """Size of a band-passed noise, 0 … about 2: its zeros are lines that wind like sulci and drift with z."""
    direction = person.uniform(0, 2 * np.pi, NUM_WAVES)
    frequency = 2 * np.pi / person.uniform(0.26, 0.38, NUM_WAVES)
    phase = person.uniform(0, 2 * np.pi, NUM_WAVES) + z * person.normal(0, 6, NUM_WAVES)
    # cos(a + b) is the real part of exp(ia) exp(ib): all waves over the plane are one matrix product.
    across = np.exp(1j * np.outer(axis, frequency * np.cos(direction)) + 1j * phase)
    down = np.exp(1j * np.outer(axis, frequency * np.sin(direction)))
    return np.abs((down @ across.T).real / np.sqrt(NUM_WAVES / 2)).astype(np.float32)


def _deep_structures(person, x, y, z, edge):
    """Soft shapes and their intensities, outermost first: deep white matter, deep grey matter, ventricles."""
    height = np.exp(-(((z - 0.50) / 0.30) ** 2))  # 1 in the middle of the head, 0 at its ends
    yield _ellipse(x, y, (0, 0.0), (0.26, 0.36), 0, 8 * edge) * height, WHITE

    basal = np.clip(np.exp(-(((z - 0.38) / 0.17) ** 2)) * 1.4, 0, 1)
    for side in (-1, 1):
        yield _ellipse(x, y, (side * 0.13, 0.10), (0.095, 0.13), side * -0.35, 3 * edge) * basal, 0.62
        yield _ellipse(x, y, (side * 0.25, -0.03), (0.065, 0.17), side * -0.22, 3 * edge) * basal, 0.60

    swelling = person.uniform(0.6, 1.5)  # ventricles differ more between people than anything else
    opening = swelling * max(1 - ((z - 0.55) / 0.30) ** 2, 0)
    if opening > 0.05:
        for side in (-1, 1):
            front = (side * (0.075 + 0.02 * opening), -0.17)
            back = (side * (0.095 + 0.03 * opening), 0.17)
            yield _ellipse(x, y, front, (0.055 * opening, 0.17), side * 0.30, edge), CSF
            yield _ellipse(x, y, back, (0.050 * opening, 0.17), side * -0.35, edge), CSF
    third = max(1 - ((z - 0.32) / 0.16) ** 2, 0)
    if third > 0.05:
        yield _ellipse(x, y, (0, 0.06), (0.022 * swelling, 0.10 * third), 0, edge), CSF


def _fissure(person, x, y, z, edge):
    """The gap between the hemispheres: at both ends of the slice, and all along it near the top."""
    bend = person.normal(0, 0.015)
    gap = _step(0.012 - np.abs(x - bend * np.sin(3 * y)), edge)
    bridge = 0.42 * np.sqrt(max(1 - ((z - 0.42) / 0.42) ** 2, 0))  # what joins the hemispheres lies within
    return gap * _step(np.abs(y) - bridge, 6 * edge) * 0.85


def _bias_field(person, x, y):
    """A smooth gain around 1, as from a receive coil."""
    a, b, c = person.normal(0, 0.05, 3)
    return 1 + a * x + b * y + c * (x * x + y * y)


def write_pngs(
    destination: Path,
    /,
    num_cases: int = NUM_CASES,
    num_positions: int = NUM_POSITIONS,
    image_size: int = 256,
    seed: int = 0,
) -> None:
    """Write synthetic slices as 8-bit grey PNGs in the OASIS layout, 80/10/10 of the cases.

    Makes `destination/keras_png_slices_{train,validate,test}/case_NNN_slice_K.nii.png`. Slices of one case
    never stand in two of the folders. Needs at least three cases.
    """
    if num_cases < 3:
        raise ValueError(f"num_cases is {num_cases}: at least 3 are needed, one for each split")
    held_out = max(1, round(0.1 * num_cases))
    splits = ["test"] * held_out + ["validate"] * held_out + ["train"] * (num_cases - 2 * held_out)
    for case, split in enumerate(reversed(splits), start=1):
        folder = Path(destination) / f"keras_png_slices_{split}"
        folder.mkdir(parents=True, exist_ok=True)
        for position in range(num_positions):
            image = slice_image(seed, case, position, image_size, num_positions)
            Image.fromarray(image).save(folder / f"case_{case:03d}_slice_{position}.nii.png")


if __name__ == "__main__":
    tyro.cli(write_pngs)
