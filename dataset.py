"""Find, check, split and decode OASIS brain slices, and feed them to training.

    slices = load(data_dir, image_size=96, seed=0)          # {"train": Slices, "validate": …, "test": …}
    batches = image_batches(slices["train"], 32, seed=0)    # tf.data, shuffled by (seed, epoch)

Images stay uint8 in memory; only a batch at a time becomes float32.
"""

import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf
from PIL import Image, UnidentifiedImageError

import phantom

SPLITS = ("train", "validate", "test")
SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "validate": "validate",
    "validation": "validate",
    "val": "validate",
    "valid": "validate",
    "test": "test",
    "testing": "test",
}
MASK_WORDS = {"seg", "segmentation", "mask", "masks", "label", "labels"}
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


class DataError(Exception):
    """Data that cannot be used. The message is one line that names the file and says what to do."""


@dataclass(frozen=True)
class SliceFile:
    """Where a slice lies, and which person (case) and position it shows."""

    path: Path
    case: str
    position: int


@dataclass(frozen=True)
class Slices:
    """Decoded slices of one split.

    images: (N, H, W, 1) uint8. positions: (N,) int32, the slice's number from below. cases: (N,) str.
    """

    images: np.ndarray
    positions: np.ndarray
    cases: np.ndarray

    def __len__(self) -> int:
        return len(self.images)


def load(data_dir: Path | None, image_size: int, seed: int) -> dict[str, Slices]:
    """Load all three splits; no person is in two of them.

    Args:
        data_dir: a folder of PNG slices in one of the layouts of `find`; None makes synthetic slices.
        image_size: height and width of the images in pixels.
        seed: fixes the synthetic people and, where the folder is not split already, the split.

    Returns:
        {"train", "validate", "test"}: `Slices` with images (N, image_size, image_size, 1).

    Raises:
        DataError: nothing usable there, or a file that is not a readable PNG.
    """
    if data_dir is None:
        return synthesise(image_size, seed)
    return {split: decode(files, image_size, split) for split, files in find(data_dir, seed).items()}


# ---------------------------------------------------------------------------------------------- finding


def find(data_dir: Path, seed: int = 0) -> dict[str, list[SliceFile]]:
    """Find the slices of each split, without reading a file.

    These layouts are understood, masks (any name with the word `seg`, `mask` or `label`) left out of each:
    - split folders `keras_png_slices_{train,validate,test}`, or `train`, `validate` or `val` or `valid`,
      and `test`, with the PNGs in them or one level below; `data_dir` is the folder that holds them, the
      folder above that, or one of them;
    - a folder of PNGs, there or one level below, which is split 80/10/10 by case, fixed by `seed`.

    Raises:
        DataError: no such folder, no slices, a split that is missing or empty, a case in two splits.
    """
    data_dir = Path(data_dir)
    if not data_dir.exists():
        raise DataError(f"{data_dir}: no such folder; set data_dir to the folder with the PNG slices")
    if not data_dir.is_dir():
        raise DataError(f"{data_dir}: is a file; set data_dir to the folder with the PNG slices")
    folders = _split_folders(data_dir)
    if folders:
        splits = {split: _slices_below(folders[split], data_dir) for split in SPLITS}
        for split in SPLITS:
            if not splits[split]:
                raise DataError(f"{folders[split]}: no PNG slices in it; put the {split} slices there")
        _refuse_shared_cases(splits)
    else:
        files = _slices_below(data_dir, data_dir)
        if not files:
            raise DataError(f"{data_dir}: {_what_is_there(data_dir)}; set data_dir to the folder with the PNG slices")
        if len({file.case for file in files}) < len(SPLITS):
            raise DataError(f"{data_dir}: too few people for three splits; add slices of at least 3 cases")
        splits = split_by_case(files, seed)
    _warn_of_unnamed_cases(splits)
    return splits


def _split_folders(data_dir: Path) -> dict[str, Path]:
    """The folder of each split, or {} where there are none. Raises DataError if only some are there."""
    children = _subfolders(data_dir)
    candidates = [data_dir, *children]
    if _split_of(data_dir.resolve()):
        candidates.append(data_dir.resolve().parent)
    best, where = {}, data_dir
    for candidate in candidates:
        folders = {split: child for child in _subfolders(candidate) if (split := _split_of(child))}
        if len(folders) > len(best):
            best, where = folders, candidate
    if len(best) == len(SPLITS):
        return best
    if best and where != data_dir.resolve().parent:
        missing = " and no ".join(split for split in SPLITS if split not in best)
        found = ", ".join(folder.name for folder in best.values())
        raise DataError(f"{where}: has {found} but no {missing} folder; add it, or put all PNGs in one folder")
    return {}


def _split_of(folder: Path) -> str | None:
    """The split that a folder is named for, None for any other name."""
    return SPLIT_NAMES.get(folder.name.lower().removeprefix("keras_png_slices_"))


def _is_mask(name: str) -> bool:
    return not MASK_WORDS.isdisjoint(re.split(r"[^a-z]+", name.lower()))


def _entries(folder: Path) -> list[os.DirEntry]:
    """What lies in a folder, in the order of the names, without hidden entries and masks."""
    try:
        with os.scandir(folder) as entries:
            found = [entry for entry in entries if not entry.name.startswith(".") and not _is_mask(entry.name)]
    except OSError as error:
        raise DataError(f"{folder}: cannot be read ({error.strerror}); check its permissions") from error
    return sorted(found, key=lambda entry: entry.name)


def _subfolders(folder: Path) -> list[Path]:
    return [Path(entry.path) for entry in _entries(folder) if entry.is_dir()]


def _slices_below(folder: Path, data_dir: Path) -> list[SliceFile]:
    """The slices in a folder and one level below, masks left out."""
    if _is_mask(folder.name):
        return []
    return [
        _slice_file(Path(entry.path), data_dir)
        for place in [folder, *_subfolders(folder)]
        for entry in _entries(place)
        if entry.name.lower().endswith(".png") and entry.is_file()
    ]


def _slice_file(path: Path, data_dir: Path) -> SliceFile:
    """Read case and position from a name such as `case_001_slice_0.nii.png`."""
    match = re.match(r"(.+?)[_-]slice[_-]?(\d+)", path.name, re.IGNORECASE)
    if match:
        return SliceFile(path, match[1], int(match[2]))
    return SliceFile(path, os.path.relpath(path, data_dir), 0)


def _what_is_there(folder: Path) -> str:
    names = [path.name for place in [folder, *folder.iterdir()] if place.is_dir() for path in place.iterdir()]
    pngs = [name for name in names if name.lower().endswith(".png")]
    if pngs:
        return "holds masks only, no slices"
    return "is empty" if not names else "holds no PNG files"


def _warn_of_unnamed_cases(splits: dict[str, list[SliceFile]]) -> None:
    unnamed = [f.path for files in splits.values() for f in files if os.sep in f.case or f.case == f.path.name]
    if unnamed:
        print(
            f"warning: {len(unnamed)} files such as {unnamed[0].name} name no case and slice "
            "(case_001_slice_0.nii.png); each counts as a person of its own, at slice position 0",
            file=sys.stderr,
        )


def _refuse_shared_cases(splits: dict[str, list[SliceFile]]) -> None:
    split_of = {}
    for split, files in splits.items():
        for file in files:
            if split_of.setdefault(file.case, split) != split:
                raise DataError(
                    f"{file.path}: {file.case} is in {split_of[file.case]} as well as in {split}; "
                    "keep all slices of a person in one split"
                )


def split_by_case(files: list[SliceFile], seed: int) -> dict[str, list[SliceFile]]:
    """Split 80/10/10 by case (person), at random but fixed by the seed; the order of the files is kept."""
    cases = sorted({file.case for file in files})
    np.random.default_rng([seed, 0]).shuffle(cases)
    held_out = max(1, round(0.1 * len(cases)))
    split_of = {case: ("test", "validate")[i // held_out] for i, case in enumerate(cases[: 2 * held_out])}
    return {split: [file for file in files if split_of.get(file.case, "train") == split] for split in SPLITS}


# --------------------------------------------------------------------------------------------- decoding


def decode(files: list[SliceFile], image_size: int, name: str = "") -> Slices:
    """Decode PNGs in parallel into one uint8 array, showing progress.

    Raises:
        DataError: a file is not a PNG or is broken; the message names it.
    """
    images = np.empty((len(files), image_size, image_size, 1), np.uint8)

    def read_into(i: int) -> None:
        images[i, :, :, 0] = read_png(files[i].path, image_size)

    progress = progress_bar(len(files), f"{name} slices")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        try:
            for _ in pool.map(read_into, range(len(files))):
                progress.add(1)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return Slices(
        images, np.array([file.position for file in files], np.int32), np.array([file.case for file in files])
    )


def read_png(path: Path, image_size: int) -> np.ndarray:
    """Read one PNG as grey.

    8- and 16-bit grey, RGB and palette images become 8-bit grey; transparent pixels become black. An image
    that is not square is padded with black to a square first, then resized with an antialiasing filter.

    Returns:
        uint8 array (image_size, image_size).

    Raises:
        DataError: the file is not a PNG, or is broken.
    """
    try:
        with Image.open(path, formats=("PNG",)) as picture:
            grey = _to_grey(picture)
    except UnidentifiedImageError as error:
        with open(path, "rb") as file:
            is_png = file.read(8) == PNG_SIGNATURE
        problem = "is a broken PNG" if is_png else "is not a PNG image, whatever its name says"
        raise DataError(f"{path}: {problem}; replace or remove it") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = getattr(error, "strerror", None) or f"is a broken PNG ({error})"
        raise DataError(f"{path}: {reason}; replace or remove it") from error
    if grey.width != grey.height:
        side = max(grey.size)
        square = Image.new("L", (side, side))
        square.paste(grey, ((side - grey.width) // 2, (side - grey.height) // 2))
        grey = square
    if grey.size != (image_size, image_size):
        grey = grey.resize((image_size, image_size), Image.Resampling.BICUBIC)
    return np.asarray(grey)


def _to_grey(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I"):  # 16 bit
        return Image.fromarray((np.asarray(picture).astype(np.uint32) // 257).astype(np.uint8))
    if "A" in picture.mode or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "black"), picture)
    return picture.convert("L")


def synthesise(image_size: int, seed: int) -> dict[str, Slices]:
    """Synthetic slices of `phantom.NUM_CASES` people at `phantom.NUM_POSITIONS` positions, split by case."""
    files = [
        SliceFile(Path(f"case_{case:03d}_slice_{position}"), f"case_{case:03d}", position)
        for case in range(1, phantom.NUM_CASES + 1)
        for position in range(phantom.NUM_POSITIONS)
    ]
    progress = progress_bar(len(files), "synthetic slices")
    slices = {}
    for split, chosen in split_by_case(files, seed).items():
        images = np.empty((len(chosen), image_size, image_size, 1), np.uint8)
        for i, file in enumerate(chosen):
            images[i, :, :, 0] = phantom.slice_image(seed, int(file.case[5:]), file.position, image_size)
            progress.add(1)
        slices[split] = Slices(
            images, np.array([file.position for file in chosen], np.int32), np.array([file.case for file in chosen])
        )
    return slices


def progress_bar(total: int, unit: str) -> keras.utils.Progbar:
    """A progress bar on a terminal; one line at the end elsewhere."""
    return keras.utils.Progbar(total, verbose=1 if sys.stdout.isatty() else 2, interval=0.2, unit_name=unit)


# ---------------------------------------------------------------------------------------------- feeding


def to_float(images: np.ndarray) -> np.ndarray:
    """uint8 0 … 255 to float32 [0, 1]."""
    return images.astype(np.float32) / 255


def image_batches(
    slices: Slices, batch_size: int, seed: int | None = None, first_epoch: int = 0, augmented: bool = False
) -> tf.data.Dataset:
    """Batches of images with their slice positions.

    Args:
        seed: None gives one pass in order; a number gives endless epochs, each shuffled by (seed, epoch).
        first_epoch: the epoch to begin with, where shuffled.
        augmented: change every image by `augment`; a function of (seed, epoch, step), where shuffled.

    Returns:
        A dataset of (images (B, H, W, 1) float32 in [0, 1], positions (B,) int32), prefetched.
    """
    batches = _batches((slices.images, slices.positions), batch_size, seed, first_epoch)
    first_step = first_epoch * steps_per_epoch(len(slices), batch_size)

    def to_model(step: tf.Tensor, batch: tuple[tf.Tensor, tf.Tensor]) -> tuple[tf.Tensor, tf.Tensor]:
        images, positions = batch
        images = tf.cast(images, tf.float32) / 255
        return augment(images, (seed, step)) if augmented else images, positions

    return batches.enumerate(first_step).map(to_model).prefetch(2)


def augment(images: tf.Tensor, seed: tuple[int, int]) -> tf.Tensor:
    """Mirror, brighten and, one in two, turn and stretch images at random.

    A hundred people are few: without this the VQ-VAE learns them by heart. Turning (by up to 5°) and stretching (by
    up to 5 % in each direction) interpolate, so every other image is left sharp. Slices are not shifted: those of
    OASIS are registered, and codes would be spent on where a brain lies.

    Args:
        images: (B, H, W, 1) float32 in [0, 1], square.
        seed: two numbers that fix all that is random.

    Returns:
        (B, H, W, 1) float32 in [0, 1]; what comes in from outside the image is black.
    """
    size, count = images.shape[1], tf.shape(images)[0]
    draws = tf.random.stateless_uniform((6, count), tf.cast(tf.stack(seed), tf.int32), -1, 1)
    side, bent, turn, stretch_x, stretch_y, gain = tf.unstack(draws)
    mirror, bent = tf.sign(side), tf.where(bent < 0, 0.0, 1.0)
    angle = bent * turn * (5 * np.pi / 180)
    scale_x, scale_y = 1 + bent * stretch_x * 0.05, 1 + bent * stretch_y * 0.05
    # Each output pixel (x, y) reads the input at (a0 x + a1 y + a2, b0 x + b1 y + b2); the centre stays.
    a0, a1 = mirror * tf.cos(angle) * scale_x, -tf.sin(angle) * scale_y
    b0, b1 = mirror * tf.sin(angle) * scale_x, tf.cos(angle) * scale_y
    centre = (size - 1) / 2
    a2, b2 = centre * (1 - a0 - a1), centre * (1 - b0 - b1)
    nothing = tf.zeros_like(a0)
    moved = tf.raw_ops.ImageProjectiveTransformV3(
        images=images,
        transforms=tf.stack([a0, a1, a2, b0, b1, b2, nothing, nothing], axis=1),
        output_shape=[size, size],
        interpolation="BILINEAR",
        fill_mode="CONSTANT",
        fill_value=0.0,
    )
    brighter = moved * (1 + 0.1 * gain)[:, None, None, None]
    return tf.ensure_shape(tf.clip_by_value(brighter, 0, 1), images.shape)


def code_batches(
    codes: np.ndarray,
    positions: np.ndarray,
    batch_size: int,
    seed: int | None = None,
    first_epoch: int = 0,
    coarse: np.ndarray | None = None,
) -> tf.data.Dataset:
    """Batches for training a prior: ((codes, positions[, coarse]), codes), otherwise as `image_batches`.

    Args:
        codes: (N, h, w) int32 code indices. positions: (N,) int32 slice positions.
        coarse: (N, h', w') int32 codes of the coarser level, for a prior that is told them.
    """
    arrays = (codes, positions) if coarse is None else (codes, positions, coarse)
    return _batches(arrays, batch_size, seed, first_epoch).map(lambda *batch: (batch, batch[0])).prefetch(2)


def steps_per_epoch(num_slices: int, batch_size: int) -> int:
    """Batches in a shuffled epoch: full ones only, so that each step weighs the same, but at least one."""
    return max(1, num_slices // batch_size)


def _batches(arrays: tuple[np.ndarray, ...], batch_size: int, seed: int | None, first_epoch: int) -> tf.data.Dataset:
    """Batches of rows of `arrays`, taken out of NumPy a batch at a time so that the arrays are never copied."""
    num_rows = len(arrays[0])
    if seed is None:
        indices = tf.data.Dataset.range(num_rows).batch(batch_size)
    else:
        steps = steps_per_epoch(num_rows, batch_size)

        def epoch_indices(epoch: tf.Tensor) -> tf.data.Dataset:
            order = tf.random.experimental.stateless_shuffle(tf.range(num_rows, dtype=tf.int64), seed=[seed, epoch])
            return tf.data.Dataset.from_tensor_slices(order).batch(batch_size).take(steps)

        indices = tf.data.Dataset.counter(start=first_epoch).flat_map(epoch_indices)

    def rows(index: tf.Tensor) -> tuple[tf.Tensor, ...]:
        taken = tf.numpy_function(lambda i: [a[i] for a in arrays], [index], [a.dtype for a in arrays], stateful=False)
        return tuple(tf.ensure_shape(t, (None, *a.shape[1:])) for t, a in zip(taken, arrays, strict=True))

    return indices.map(rows)
