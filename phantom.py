"""Synthetic brain slices: what the driver runs on without data, and what tests use.

Each slice resembles, at a glance, a skull-stripped axial T1 brain MRI: an outline that varies between subjects and with
the slice position, folded cortex, white and grey matter, ventricles that open and close with the position, a bias
field and noise. The slices are drawings without anatomical meaning: good for trying out the code, but not for any
statement about brains.

    python phantom.py DESTINATION          write them as PNGs in the layout of the OASIS slices
"""

import console

if __name__ == "__main__":
    console.start()

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tyro
from PIL import Image

import naming
import pngs
import seeds

NUM_SUBJECTS = 64
NUM_POSITIONS = 16

CSF, GREY, WHITE = 0.10, 0.52, 0.86  # Intensities of cerebrospinal fluid, grey matter and white matter.
NUM_WAVES = 64  # Plane waves in the noise that folds the cortex.


def slice_image(
    seed: int, subject: int, position: int, image_size: int = 96, num_positions: int = NUM_POSITIONS
) -> np.ndarray:
    """Draw one slice. The result is a function of the arguments alone.

    Args:
        seed, subject: Choose the subject, whose anatomy is the same at all positions.
        position: Slice position, from 0 (lowest) to `num_positions` - 1 (highest).
        image_size: Height and width in pixels.
        num_positions: Number of slices from the bottom to the top of the head.

    Returns:
        (image_size, image_size) uint8. The background is exactly 0.

    Raises:
        ValueError: `position` is outside 0 to `num_positions` - 1.
    """
    if not 0 <= position < num_positions:
        raise ValueError(f"position {position} is outside 0 to {num_positions - 1}")
    anatomy = seeds.generator(seed, "anatomy", subject)
    z = position / max(num_positions - 1, 1)
    axis = ((np.arange(image_size) + 0.5) / image_size * 2 - 1).astype(np.float32)
    x, y = np.meshgrid(axis, axis)
    edge = 1.2 / image_size  # Half the width of the border between two tissues (the partial volume effect).

    depth = _depth(anatomy, x, y, z)
    folds = _folds(anatomy, axis, z)
    brain = _step(depth, 0.06 * edge)

    # The cortex is a ribbon below the outline and on both banks of the sulci, which are dark lines of limited depth.
    reach, sulcus_width = anatomy.uniform(0.42, 0.50), anatomy.uniform(0.05, 0.25)
    shallow = np.clip(1 - depth / reach, 0, 1)
    white = _step(np.minimum(depth - 0.07, 0.12 * (folds - 0.8 * np.sqrt(shallow))), edge)
    sulcus = _step(0.12 * (sulcus_width * shallow - folds), edge) * np.minimum(0.8, 3 * shallow)
    image = GREY + (WHITE - GREY) * white
    image += (CSF - image) * sulcus

    for inside, intensity in _deep_structures(anatomy, x, y, z, edge):
        image += (intensity - image) * inside
    image += (CSF - image) * _fissure(anatomy, x, y, z, edge)
    image *= _bias_field(anatomy, x, y)

    noise = seeds.generator(seed, "noise", subject, position)
    image += 0.018 * noise.standard_normal(image.shape, dtype=np.float32)
    image *= brain * anatomy.uniform(0.85, 1.0)
    return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)


def _step(distance: np.ndarray, width: float) -> np.ndarray:
    """Soft step: 0 if `distance` is well below 0, 1 if it is well above. `width` is half the width of the step."""
    return np.clip(distance / (2 * width) + 0.5, 0, 1)


def _ellipse(
    x: np.ndarray,
    y: np.ndarray,
    centre: tuple[float, float],
    radii: tuple[float, float],
    angle: float,
    edge: float,
) -> np.ndarray:
    """Soft mask of an ellipse that is rotated by `angle` radians."""
    cos, sin = np.cos(angle), np.sin(angle)
    u = ((x - centre[0]) * cos + (y - centre[1]) * sin) / radii[0]
    v = ((y - centre[1]) * cos - (x - centre[0]) * sin) / radii[1]
    return _step(1 - np.hypot(u, v), edge / min(radii))


def _depth(anatomy: np.random.Generator, x: np.ndarray, y: np.ndarray, z: float) -> np.ndarray:
    """Depth below the outline of the brain as a fraction of its radius: 1 in the centre, negative outside."""
    size = np.sqrt(max(1 - ((z - 0.38) / 0.82) ** 2, 0.05))
    width = 0.60 * size * anatomy.uniform(0.93, 1.05)
    length = 0.74 * size * anatomy.uniform(0.93, 1.05)
    rotation = anatomy.normal(0, 0.03)
    u = (x * np.cos(rotation) + y * np.sin(rotation)) / width
    v = (y * np.cos(rotation) - x * np.sin(rotation)) / length
    angle = np.arctan2(v, u)
    border = 1 - 0.03 * np.sin(angle)  # The back of the head is wider than the front.
    for order in range(2, 6):
        border += anatomy.normal(0, 0.012) * np.cos(order * angle + anatomy.uniform(0, 6.28) + order * z)
    border -= 0.035 * np.exp(-((u / 0.10) ** 2))  # The notch between the hemispheres.
    return 1 - np.hypot(u, v) / border


def _folds(anatomy: np.random.Generator, axis: np.ndarray, z: float) -> np.ndarray:
    """Absolute value of band-passed noise, 0 to about 2. Its zeros are lines that wind like sulci and move with z."""
    direction = anatomy.uniform(0, 2 * np.pi, NUM_WAVES)
    frequency = 2 * np.pi / anatomy.uniform(0.26, 0.38, NUM_WAVES)
    phase = anatomy.uniform(0, 2 * np.pi, NUM_WAVES) + z * anatomy.normal(0, 6, NUM_WAVES)
    # cos(a + b) is the real part of exp(ia) exp(ib), so the sum of all waves is a single matrix product.
    across = np.exp(1j * np.outer(axis, frequency * np.cos(direction)) + 1j * phase)
    down = np.exp(1j * np.outer(axis, frequency * np.sin(direction)))
    return np.abs((down @ across.T).real / np.sqrt(NUM_WAVES / 2)).astype(np.float32)


def _deep_structures(
    anatomy: np.random.Generator, x: np.ndarray, y: np.ndarray, z: float, edge: float
) -> Iterator[tuple[np.ndarray, float]]:
    """Soft masks and their intensities, outermost first: deep white matter, deep grey matter, ventricles."""
    height = np.exp(-(((z - 0.50) / 0.30) ** 2))  # 1 in the middle of the head, 0 at its ends.
    yield _ellipse(x, y, (0, 0.0), (0.26, 0.36), 0, 8 * edge) * height, WHITE

    basal = np.clip(np.exp(-(((z - 0.38) / 0.17) ** 2)) * 1.4, 0, 1)
    for side in (-1, 1):
        yield _ellipse(x, y, (side * 0.13, 0.10), (0.095, 0.13), side * -0.35, 3 * edge) * basal, 0.62
        yield _ellipse(x, y, (side * 0.25, -0.03), (0.065, 0.17), side * -0.22, 3 * edge) * basal, 0.60

    swelling = anatomy.uniform(0.6, 1.5)  # Ventricles differ more between people than anything else.
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


def _fissure(anatomy: np.random.Generator, x: np.ndarray, y: np.ndarray, z: float, edge: float) -> np.ndarray:
    """Soft mask of the gap between the hemispheres: at the front and the back, and all along near the top."""
    bend = anatomy.normal(0, 0.015)
    gap = _step(0.012 - np.abs(x - bend * np.sin(3 * y)), edge)
    bridge = 0.42 * np.sqrt(max(1 - ((z - 0.42) / 0.42) ** 2, 0))  # Half the length of what joins the hemispheres.
    return gap * _step(np.abs(y) - bridge, 6 * edge) * 0.85


def _bias_field(anatomy: np.random.Generator, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Smooth gain around 1, like that of a receive coil."""
    a, b, c = anatomy.normal(0, 0.05, 3)
    return 1 + a * x + b * y + c * (x * x + y * y)


def write_pngs(
    destination: Path,
    /,
    num_subjects: int = NUM_SUBJECTS,
    num_positions: int = NUM_POSITIONS,
    image_size: int = 256,
    seed: int = 0,
) -> None:
    """Write synthetic slices as 8-bit grey PNGs in the layout of the OASIS slices, split 80/10/10 by subject.

    The files are DESTINATION/keras_png_slices_{train,validate,test}/case_NNN_slice_K.nii.png.

    Args:
        destination: Folder to write to. It is created, and existing slices of the same names are replaced.
        num_subjects: Number of subjects, at least 3.
        num_positions: Number of slices per subject, at least 1.
        image_size: Height and width in pixels, 1 to 4096.
        seed: Determines all slices, at least 0.

    Raises:
        UserError: An argument is out of range, or the slices cannot be written.
    """
    _check_range("num_subjects", num_subjects, 3)  # One for each split.
    _check_range("num_positions", num_positions, 1)
    _check_range("image_size", image_size, 1, pngs.MAX_SIDE)
    _check_range("seed", seed, 0)
    count = max(1, round(0.1 * num_subjects))  # Of the test split, and of the validation split.
    splits = ["train"] * (num_subjects - 2 * count) + ["validate"] * count + ["test"] * count
    try:
        with console.progress(num_subjects * num_positions, "slices") as progress:
            for subject, split in enumerate(splits, start=1):
                folder = Path(destination) / naming.split_folder(split)
                folder.mkdir(parents=True, exist_ok=True)
                for position in range(num_positions):
                    image = slice_image(seed, subject, position, image_size, num_positions)
                    Image.fromarray(image).save(folder / naming.slice_file(f"case_{subject:03d}", position))
                    progress.update(1)
    except OSError as error:
        raise console.UserError(
            f"{destination}: cannot be written ({error.strerror or error}); free some space or choose another folder"
        ) from error


def _check_range(name: str, value: int, lowest: int, highest: int | None = None) -> None:
    """Raise `UserError` if an argument is out of range."""
    if value < lowest:
        raise console.UserError(f"{name} is {value}: must be at least {lowest}")
    if highest is not None and value > highest:
        raise console.UserError(f"{name} is {value}: must be at most {highest}")


def command_line() -> int:
    """Run the command and return its exit status (see `console.run_command`)."""
    return console.run_command(
        lambda: tyro.cli(write_pngs, description=__doc__), "run the same command again to write all slices"
    )


if __name__ == "__main__":
    sys.exit(command_line())
