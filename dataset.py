"""Find, check, split and decode OASIS brain slices, and feed them to training.

    slices = load(data_dir, image_size=96, seed=0)          # {"train": Slices, "validate": …, "test": …}
    batches = image_batches(slices["train"], 32, seed=0)    # tf.data, shuffled by (seed, epoch)

Images stay uint8 in memory; only a batch at a time becomes float32.
"""

import dataclasses
import hashlib
import itertools
import os
import re
import stat
import struct
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
VOLUMES = (".nii.gz", ".nii", ".img.gz", ".img", ".hdr.gz", ".hdr", ".mgz", ".mgh")  # what oasis.py makes slices of
ARCHIVES = (".tar.gz", ".tgz", ".tar")
_SET_DATA_DIR = "set data_dir to the folder with the PNG slices"
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
MAX_SIDE = 4096  # pixels of a PNG: sixteen times a slice's; larger ones are refused before they are decoded


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


def load(data_dir: Path | None, image_size: int, seed: int, skip_broken: bool = False) -> dict[str, Slices]:
    """Load all three splits; no person, and no picture, is in two of them.

    What can be used is used; what is odd about it is counted in a warning on stderr.

    Args:
        data_dir: a folder of PNG slices in one of the layouts of `find`; None makes synthetic slices.
        image_size: height and width of the images in pixels.
        seed: fixes the synthetic people and, where the folder is not split already, the split.
        skip_broken: leave files that cannot be read out, listing each on stderr.

    Returns:
        {"train", "validate", "test"}: `Slices` with images (N, image_size, image_size, 1).

    Raises:
        DataError: nothing usable there, the same picture in two splits, or a file that is not a readable PNG.
    """
    if data_dir is None:
        return synthesise(image_size, seed)
    splits = find(data_dir, seed)
    files = [file for split in SPLITS for file in splits[split]]
    images, pictures = decode(files, image_size, skip_broken)
    readable = np.array([picture is not None for picture in pictures])
    slices, begin = {}, 0
    for split in SPLITS:
        rows = np.arange(begin, begin + len(splits[split]))
        begin += len(rows)
        used = rows[readable[rows]]
        if not len(used):
            raise DataError(f"{data_dir}: no slice of the {split} split can be read; replace the broken files")
        whole = slice(used[0], used[-1] + 1) if len(used) == len(rows) else used  # no copy where all are used
        positions = np.array([files[i].position for i in used], np.int32)
        slices[split] = Slices(images[whole], positions, np.array([files[i].case for i in used]))
    _refuse_shared_pictures(files, pictures, [split for split in SPLITS for _ in splits[split]])
    return slices


def fingerprint(slices: dict[str, Slices]) -> str:
    """A checksum (SHA-256) of all slices, with their splits, people and positions."""
    digest = hashlib.sha256()
    for split, held in slices.items():
        digest.update(f"{split} {held.images.shape} {held.cases.tolist()}".encode("utf-8", "surrogateescape"))
        digest.update(held.positions.tobytes())
        digest.update(np.ascontiguousarray(held.images))
    return digest.hexdigest()


def one_line(text) -> str:
    """Text for a message of one line: line ends, and all else that cannot be printed, written as in Python."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text))


def _warn(text: str) -> None:
    print(f"warning: {one_line(text)}", file=sys.stderr)


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
    try:
        kind = os.stat(data_dir).st_mode
    except FileNotFoundError as error:
        raise DataError(f"{data_dir}: no such folder; {_SET_DATA_DIR}") from error
    except OSError as error:
        raise DataError(f"{data_dir}: cannot be read ({error.strerror}); {_SET_DATA_DIR}") from error
    if not stat.S_ISDIR(kind):
        volumes = data_dir.name.lower().endswith(VOLUMES + ARCHIVES)
        raise DataError(f"{data_dir}: {_make_slices(data_dir) if volumes else f'is a file; {_SET_DATA_DIR}'}")
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
            raise DataError(f"{data_dir}: {_what_is_there(data_dir)}")
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


def is_mask(name: str) -> bool:
    """Whether a file or folder is named for a mask, by the words in its name."""
    return not MASK_WORDS.isdisjoint(re.split(r"[^a-z]+", name.lower()))


def _entries(folder: Path) -> list[os.DirEntry]:
    """What lies in a folder, in the order of the names, without hidden entries and masks."""
    try:
        with os.scandir(folder) as entries:
            found = [entry for entry in entries if not entry.name.startswith(".") and not is_mask(entry.name)]
    except OSError as error:
        raise DataError(f"{folder}: cannot be read ({error.strerror}); check its permissions") from error
    return sorted(found, key=lambda entry: entry.name)


def _subfolders(folder: Path) -> list[Path]:
    return [Path(entry.path) for entry in _entries(folder) if os.path.isdir(entry)]


def _slices_below(folder: Path, data_dir: Path) -> list[SliceFile]:
    """The slices in a folder and one level below, masks left out."""
    if is_mask(folder.name):
        return []
    places = {os.path.realpath(place): place for place in [*_subfolders(folder), folder]}  # links may lead in circles
    return [
        _slice_file(Path(entry.path), data_dir)
        for place in reversed(places.values())
        for entry in _entries(place)
        if entry.name.lower().endswith(".png") and not os.path.isdir(entry)
    ]


def _slice_file(path: Path, data_dir: Path) -> SliceFile:
    """Read case and position from a name such as `case_001_slice_0.nii.png`."""
    match = re.match(r"(.+?)[_-]slice[_-]?(\d{1,6})(?!\d)", path.name, re.IGNORECASE | re.DOTALL)
    if match:
        return SliceFile(path, match[1], int(match[2]))
    return SliceFile(path, os.path.relpath(path, data_dir), 0)


def _what_is_there(folder: Path) -> str:
    """What is wrong with a folder without slices, and what to do; looks through 10,000 folders at most."""
    below = itertools.islice(os.walk(folder), 10_000)
    files = [Path(place, name).relative_to(folder) for place, _, names in below for name in names]
    if any(file.name.lower().endswith(VOLUMES + ARCHIVES) for file in files):
        return _make_slices(folder)
    pngs = [file for file in files if file.name.lower().endswith(".png")]
    if any(not any(map(is_mask, file.parts)) for file in pngs):
        return f"holds PNGs only more than one folder down; {_SET_DATA_DIR}"
    found = "holds masks only, no slices" if pngs else "holds no PNG files" if files else "is empty"
    return f"{found}; {_SET_DATA_DIR}"


def _make_slices(source: Path) -> str:
    return f"holds volumes, not slices; make slices of them: python oasis.py {source} SLICES"


def _warn_of_unnamed_cases(splits: dict[str, list[SliceFile]]) -> None:
    unnamed = [f.path for files in splits.values() for f in files if os.sep in f.case or f.case == f.path.name]
    if unnamed:
        _warn(
            f"{len(unnamed)} files such as {unnamed[0].name} name no case and slice (case_001_slice_0.nii.png); "
            "each counts as a person of its own, at slice position 0"
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


@dataclass(frozen=True)
class Picture:
    """A decoded PNG.

    grey: (image_size, image_size) uint8. size: width and height before it was resized. digest: a checksum of what it
    was then. oddities: what a user should know about it.
    """

    grey: np.ndarray
    size: tuple[int, int]
    digest: bytes
    oddities: tuple[str, ...]


ANIMATED = "animated: only the first picture of each is used"
COLOURED = "in colour: converted to grey"
BLANK = "of one grey level all over: used, but no brains"


def decode(
    files: list[SliceFile], image_size: int, skip_broken: bool = False
) -> tuple[np.ndarray, list[Picture | None]]:
    """Decode PNGs in parallel into one uint8 array, showing progress; warns of odd ones, counting them.

    Args:
        skip_broken: leave files that cannot be read black, listing each on stderr.

    Returns:
        images (N, image_size, image_size, 1) uint8, and what else is known of each, None of those left out.

    Raises:
        DataError: a file is not a PNG or is broken; the message names it.
    """
    images = np.zeros((len(files), image_size, image_size, 1), np.uint8)
    pictures: list[Picture | None] = []

    def read(i: int) -> Picture | DataError:
        try:
            picture = _read(files[i].path, image_size)
        except DataError as error:
            return error
        images[i, :, :, 0] = picture.grey
        return dataclasses.replace(picture, grey=images[i, :, :, 0])

    progress, odd, sizes = progress_bar(len(files), "slices"), {}, {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        try:
            for file, result in zip(files, pool.map(read, range(len(files))), strict=True):
                progress.add(1)
                pictures.append(result if isinstance(result, Picture) else None)
                if isinstance(result, Picture):
                    sizes.setdefault(result.size, []).append(file.path)
                    for oddity in result.oddities:
                        odd.setdefault(oddity, []).append(file.path)
                elif skip_broken:
                    _warn(f"left out: {result}")
                else:
                    raise DataError(f"{result}; replace or remove it, or leave such files out: --skip-broken-slices")
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    for oddity, paths in odd.items():
        _warn(f"{len(paths)} slices such as {paths[0].name} are {oddity}")
    _warn_of_mixed_sizes(sizes, image_size)
    return images, pictures


def _warn_of_mixed_sizes(sizes: dict[tuple[int, int], list[Path]], image_size: int) -> None:
    if len(sizes) < 2:
        return
    (width, height), most = max(sizes.items(), key=lambda item: len(item[1]))
    others = [path for size, paths in sizes.items() if size != (width, height) for path in paths]
    _warn(
        f"{len(others)} slices such as {others[0].name} are not {width} × {height} as the other {len(most)} are; all "
        f"become {image_size} × {image_size}, whatever a pixel was in millimetres"
    )


def read_png(path: Path, image_size: int) -> np.ndarray:
    """Read one PNG as grey.

    Grey of 1 to 16 bits, RGB and palette images become 8-bit grey; transparent pixels become black. An image
    that is not square is padded with black to a square first, then resized with an antialiasing filter.

    Returns:
        uint8 array (image_size, image_size).

    Raises:
        DataError: the file is not a PNG, is broken or larger than `MAX_SIDE`; the message names it and says why.
    """
    return _read(path, image_size).grey


def _read(path: Path, image_size: int) -> Picture:
    try:
        size = _read_size(path)
        with Image.open(path, formats=("PNG",)) as picture:
            if picture.size != size:
                raise ValueError("its size changes within the file")
            oddities = [ANIMATED] if getattr(picture, "is_animated", False) else []
            grey, coloured = _to_grey(picture)
    except DataError:
        raise
    except UnidentifiedImageError as error:
        raise DataError(f"{path}: is a broken PNG (its header makes no sense)") from error
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or f'is a broken PNG ({error})'}") from error
    except Exception as error:  # Pillow meets broken files with exceptions of any kind
        raise DataError(f"{path}: is a broken PNG ({error})") from error
    digest = hashlib.sha256(f"{size}".encode() + grey.tobytes()).digest()
    if grey.width != grey.height:
        side = max(grey.size)
        square = Image.new("L", (side, side))
        square.paste(grey, ((side - grey.width) // 2, (side - grey.height) // 2))
        grey = square
    if grey.size != (image_size, image_size):
        grey = grey.resize((image_size, image_size), Image.Resampling.BICUBIC)
    oddities += [COLOURED] if coloured else []
    oddities += [BLANK] if len(set(grey.getextrema())) == 1 else []
    return Picture(np.asarray(grey), size, digest, tuple(oddities))


def _read_size(path: Path) -> tuple[int, int]:
    """Width and height of a PNG from its header. Raises DataError for what is no PNG, or too large to be a slice."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise DataError(f"{path}: is not a file")
    with open(path, "rb") as file:
        header = file.read(24)
    if not header:
        raise DataError(f"{path}: is empty")
    if not header.startswith(PNG_SIGNATURE):
        raise DataError(f"{path}: is not a PNG image, whatever its name says")
    if header[12:16] != b"IHDR" or len(header) < 24:
        raise DataError(f"{path}: is a broken PNG (it has no header)")
    width, height = struct.unpack(">II", header[16:])
    if max(width, height) > MAX_SIDE:
        raise DataError(f"{path}: is {width} × {height} pixels, too large for a slice (at most {MAX_SIDE} a side)")
    return width, height


def _to_grey(picture: Image.Image) -> tuple[Image.Image, bool]:
    """The picture in 8-bit grey, and whether it was in colour."""
    if picture.mode.startswith("I"):  # 16 bit
        return Image.fromarray((np.asarray(picture).astype(np.uint32) // 257).astype(np.uint8)), False
    if "A" in picture.mode or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "black"), picture)
    if picture.mode in ("1", "L"):
        return picture.convert("L"), False
    red, green, blue = (np.asarray(channel) for channel in picture.convert("RGB").split())
    return picture.convert("L"), not (np.array_equal(red, green) and np.array_equal(green, blue))


def _refuse_shared_pictures(files: list[SliceFile], pictures: list[Picture | None], splits: list[str]) -> None:
    """Raises DataError where two splits hold the same picture, under whatever names; blank ones may be shared."""
    first = {}
    for i, picture in enumerate(pictures):
        if picture is None or BLANK in picture.oddities:
            continue
        j = first.setdefault(picture.digest, i)
        if splits[j] != splits[i]:
            raise DataError(
                f"{files[i].path}: is the same picture as {files[j].path} of the {splits[j]} split; keep all slices "
                "of a person in one split"
            )


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
    slices: Slices,
    batch_size: int,
    seed: int | None = None,
    first_epoch: int = 0,
    augmented: bool = False,
    share: tuple[int, int] = (0, 1),
) -> tf.data.Dataset:
    """Batches of images with their slice positions.

    Args:
        seed: None gives one pass in order; a number gives endless epochs, each shuffled by (seed, epoch).
        first_epoch: the epoch to begin with, where shuffled.
        augmented: change every image by `augment`; a function of (seed, epoch, step), where shuffled.
        share: (i, n) gives the i-th of n equal parts of each batch, the same images as in the whole one; n must
            divide all batches.

    Returns:
        A dataset of (images (B, H, W, 1) float32 in [0, 1], positions (B,) int32), prefetched.
    """
    batches = _batches((slices.images, slices.positions), batch_size, seed, first_epoch, share)
    first_step = first_epoch * steps_per_epoch(len(slices), batch_size)

    def to_model(step: tf.Tensor, batch: tuple[tf.Tensor, tf.Tensor]) -> tuple[tf.Tensor, tf.Tensor]:
        images, positions = batch
        images = tf.cast(images, tf.float32) / 255
        return augment(images, (seed, step), share) if augmented else images, positions

    return batches.enumerate(first_step).map(to_model).prefetch(2)


def augment(images: tf.Tensor, seed: tuple[int, int], share: tuple[int, int] = (0, 1)) -> tf.Tensor:
    """Mirror, brighten and, one in two, turn and stretch images at random.

    A hundred people are few: without this the VQ-VAE learns them by heart. Turning (by up to 5°) and stretching (by
    up to 5 % in each direction) interpolate, so every other image is left sharp. Slices are not shifted: those of
    OASIS are registered, and codes would be spent on where a brain lies.

    Args:
        images: (B, H, W, 1) float32 in [0, 1], square.
        seed: two numbers that fix all that is random.
        share: (i, n) if these are the i-th of n equal parts of a batch.

    Returns:
        (B, H, W, 1) float32 in [0, 1]; what comes in from outside the image is black.
    """
    size, count = images.shape[1], tf.shape(images)[0]
    part, parts = share
    draws = tf.random.stateless_uniform((6, parts * count), tf.cast(tf.stack(seed), tf.int32), -1, 1)
    draws = draws[:, part * count : (part + 1) * count]
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
    share: tuple[int, int] = (0, 1),
) -> tf.data.Dataset:
    """Batches for training a prior: ((codes, positions[, coarse]), codes), otherwise as `image_batches`.

    Args:
        codes: (N, h, w) int32 code indices. positions: (N,) int32 slice positions.
        coarse: (N, h', w') int32 codes of the coarser level, for a prior that is told them.
    """
    arrays = (codes, positions) if coarse is None else (codes, positions, coarse)
    batches = _batches(arrays, batch_size, seed, first_epoch, share)
    return batches.map(lambda *batch: (batch, batch[0])).prefetch(2)


def steps_per_epoch(num_slices: int, batch_size: int) -> int:
    """Batches in a shuffled epoch: full ones only, so that each step weighs the same, but at least one."""
    return max(1, num_slices // batch_size)


def _batches(
    arrays: tuple[np.ndarray, ...], batch_size: int, seed: int | None, first_epoch: int, share: tuple[int, int]
) -> tf.data.Dataset:
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

    part, parts = share

    def rows(index: tf.Tensor) -> tuple[tf.Tensor, ...]:
        index = tf.split(index, parts)[part]
        taken = tf.numpy_function(lambda i: [a[i] for a in arrays], [index], [a.dtype for a in arrays], stateful=False)
        return tuple(tf.ensure_shape(t, (None, *a.shape[1:])) for t, a in zip(taken, arrays, strict=True))

    return indices.map(rows)
