"""Find, check, split and decode PNG slices of brains, and feed them to training.

    slices = load(data_dir, image_size=96, seed=0)          # {"train": Slices, "validate": Slices, "test": Slices}
    batches = image_batches(slices["train"], 32, seed=0)    # tf.data, shuffled by (seed, epoch)

Images are kept as uint8 in a memory-mapped file (see cache.py); only one batch at a time is in memory, as float32.
"""

import functools
import hashlib
import itertools
import math
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL
import tensorflow as tf

import augmentation
import cache
import console
import naming
import phantom
import pngs
import seeds
from pngs import DataError
from run import checksum

PART_BYTES = 1 << 22  # Of images that are read at a time when all of them are read.
_SET_DATA_DIR = "set data_dir to the folder with the PNG slices"


@dataclass(frozen=True, slots=True)  # Slots save memory if there are a million.
class SliceFile:
    """The PNG file of one slice.

    Attributes:
        path: The file.
        subject: Name of the subject (person) that it shows. All sessions of a person have the same subject.
        position: Slice position, counted from below.
    """

    path: Path
    subject: str
    position: int


@dataclass(frozen=True)
class Slices:
    """Decoded slices of one split.

    Attributes:
        images: (N, H, W, 1) uint8, mapped from a file for reading, or in memory.
        positions: (N,) int32, slice positions counted from below.
        subjects: (N,) str, names of the subjects.
        crop: Side of the central square of the PNGs that the images show, in pixels of the PNGs; 0 if they show all.
        frame_size: Height and width of whole slices at the resolution of the images; 0 if the images are whole.
    """

    images: np.ndarray
    positions: np.ndarray
    subjects: np.ndarray
    crop: int = 0
    frame_size: int = 0

    def __len__(self) -> int:
        return len(self.images)

    @functools.cached_property
    def histogram(self) -> np.ndarray:
        """(256,) int64, the number of pixels of each grey level."""
        counts = np.zeros(256, np.int64)
        for part in _parts(self.images):
            counts += np.bincount(part.ravel(), minlength=256)
        return counts


class CachedSlices(dict[str, Slices]):
    """Slices by split whose fingerprint is known already, so no split of it may be replaced.

    Attributes:
        fingerprint: See the function of this name.
    """

    def __init__(self, slices: Mapping[str, Slices], fingerprint: str) -> None:
        super().__init__(slices)
        self.fingerprint = fingerprint


def load(
    data_dir: Path | None,
    image_size: int,
    seed: int,
    skip_broken: bool = False,
    synthetic_subjects: int = phantom.NUM_SUBJECTS,
    crop: int | None = 0,
    cache_dir: Path | None = None,
) -> dict[str, Slices]:
    """Load the three splits. No subject and no image is in two of them.

    Unusual files are used if possible; warnings on standard error say how many there are. The decoded slices are
    written to a file, which is used again until a PNG is changed, added or removed. Synthetic slices are in memory.

    Args:
        data_dir: Folder of PNG slices in one of the layouts of `find`. None generates synthetic slices.
        image_size: Height and width of the images in pixels.
        seed: Determines the synthetic slices, and the split of a folder that is not split yet.
        skip_broken: Leave out files that cannot be read and name each on standard error.
        synthetic_subjects: Number of subjects of the synthetic slices, at least 3.
        crop: Side of the central square of each PNG that is used, in pixels of the PNG, which is then resized to
            `image_size`. None chooses it; see `pngs.choose_crop`. 0 uses the whole PNG. Synthetic slices are whole.
        cache_dir: Folder for decoded slices; None for `cache.default_folder`.

    Returns:
        `{"train": ..., "validate": ..., "test": ...}`: `Slices` with images (N, image_size, image_size, 1).

    Raises:
        DataError: There are no usable slices, a subject or image is in two splits, a file is not a readable PNG,
            `crop` cuts off a part of a brain, or the decoded slices cannot be written.
    """
    if data_dir is None:
        return _synthetic_slices(image_size, seed, synthetic_subjects)
    files_of = find(data_dir, seed)
    name, state = _checksums(files_of, data_dir, (image_size, crop, skip_broken))
    warned: list[str] = []

    def warn(warning: str) -> None:
        console.warn(warning)
        warned.append(warning)

    def write(path: Path) -> cache.About:
        about = {**_decode(files_of, data_dir, path, image_size, skip_broken, crop, warn), "warnings": warned}
        if _checksums(files_of, data_dir, (image_size, crop, skip_broken)) != (name, state):
            raise DataError(f"{data_dir}: slices were changed while they were read; run the same command again")
        return about

    images, about = cache.open_or_make(
        Path(cache_dir or cache.default_folder()),
        name,
        str(Path(data_dir).resolve()),
        state,
        sum(map(len, files_of.values())) * image_size**2,
        write,
    )
    for warning in about["warnings"][len(warned) :]:  # Unless the slices have just been decoded.
        console.warn(warning)
    slices = _split_images(files_of, images, about)
    for split, split_slices in slices.items():
        vars(split_slices)["histogram"] = np.array(about["histograms"][split])
    return CachedSlices(slices, about["fingerprint"])


def _checksums(
    files_of: Mapping[str, list[SliceFile]], data_dir: Path, settings: tuple[object, ...]
) -> tuple[str, str]:
    """Checksums of all that decoded slices are made from, without reading the files.

    Returns:
        One of everything: the files with their sizes, modification times, splits, subjects and positions, how they are
        decoded, and the settings; and one of the files only, whatever the settings and the splits.
    """
    decoder = f"{PIL.__version__} {checksum(Path(pngs.__file__))}"
    everything, total = hashlib.sha256(f"{decoder} {settings}".encode()), 0
    relative = functools.cache(lambda folder: os.path.relpath(folder, data_dir))
    for split, files in files_of.items():
        for file in files:
            folder, name = os.path.split(file.path)
            described = ascii((relative(folder), name, *_size_and_time(file.path))).encode()
            everything.update(described + ascii((split, file.subject, file.position)).encode())
            total += int.from_bytes(hashlib.sha256(described).digest(), "big")  # A sum does not depend on the order.
    return everything.hexdigest()[:32], f"{decoder} {total % 2**256:x}"


def _size_and_time(path: Path) -> tuple[int, int]:
    """Size in bytes and modification time in nanoseconds of a file; −1 if there is none."""
    try:
        status = os.stat(path)
    except OSError:
        return -1, -1
    return status.st_size, status.st_mtime_ns


def _decode(
    files_of: Mapping[str, list[SliceFile]],
    data_dir: Path,
    path: Path,
    image_size: int,
    skip_broken: bool,
    crop: int | None,
    warn: Callable[[str], None],
) -> cache.About:
    """Decode all slices, split by split, into a file of pixels; see `load`.

    Returns:
        What is known about them: "shape", "crop" and "frame_size", see `Slices`; "left_out", indices of the files that
        cannot be read; "histograms" of the splits; and "fingerprint".
    """
    files = [file for split in naming.SPLITS for file in files_of[split]]
    paths = [file.path for file in files]
    chosen, side = pngs.choose_crop(paths, crop)
    digests: list[bytes | None] = []
    left_out = []
    with open(path, "wb") as pixels:
        for i, png in enumerate(pngs.decode_each(paths, image_size, skip_broken, chosen, warn)):
            if png:
                pixels.write(png.grey.tobytes())
            else:
                left_out.append(i)
            digests.append(png.digest if png and pngs.BLANK not in png.oddities else None)
    about: cache.About = {
        "shape": (len(files) - len(left_out), image_size, image_size, 1),
        "crop": chosen,
        "frame_size": round(image_size * side / chosen) if chosen else 0,
        "left_out": left_out,
    }
    for split, split_files in _readable(files_of, left_out).items():
        if not split_files:
            raise DataError(f"{data_dir}: no slice of the {split} split can be read; replace the broken files")
    _refuse_shared_images(files, digests, [split for split in naming.SPLITS for _ in files_of[split]])
    slices = _split_images(files_of, cache.map_images(path, about["shape"]), about)
    about["histograms"] = {split: split_slices.histogram.tolist() for split, split_slices in slices.items()}
    return {**about, "fingerprint": fingerprint(slices)}


def _readable(files_of: Mapping[str, list[SliceFile]], left_out: list[int]) -> dict[str, list[SliceFile]]:
    """The files of each split without those with these indices."""
    unreadable, index = set(left_out), itertools.count()
    return {split: [file for file in files_of[split] if next(index) not in unreadable] for split in naming.SPLITS}


def _split_images(files_of: Mapping[str, list[SliceFile]], images: np.ndarray, about: cache.About) -> dict[str, Slices]:
    """The slices of each split, whose images are consecutive rows of `images`."""
    slices, begin = {}, 0
    for split, files in _readable(files_of, about["left_out"]).items():
        end = begin + len(files)
        positions = np.array([file.position for file in files], np.int32)
        subjects = np.array([file.subject for file in files])
        slices[split] = Slices(images[begin:end], positions, subjects, about["crop"], about["frame_size"])
        begin = end
    return slices


def fingerprint(slices: dict[str, Slices]) -> str:
    """Return a checksum (SHA-256, hexadecimal) of all slices with their splits, frames, subjects and positions."""
    if isinstance(slices, CachedSlices):
        return slices.fingerprint
    digest = hashlib.sha256()
    for split, split_slices in slices.items():
        shape, frame = split_slices.images.shape, (split_slices.crop, split_slices.frame_size)
        digest.update(f"{split} {shape} {frame} {ascii(split_slices.subjects.tolist())}".encode())
        digest.update(split_slices.positions.tobytes())
        for part in _parts(split_slices.images):
            digest.update(part.data)
    return digest.hexdigest()


def pixel_variance(slices: Slices) -> float:
    """Return the variance of all pixels on the [0, 1] scale, at least 1e-6."""
    counts, intensities = slices.histogram, np.arange(256) / 255
    mean = np.average(intensities, weights=counts)
    return max(float(np.average((intensities - mean) ** 2, weights=counts)), 1e-6)


def _parts(images: np.ndarray) -> Iterator[np.ndarray]:
    """Yield images (N, H, W, 1) in contiguous parts of about `PART_BYTES`."""
    count = max(1, PART_BYTES // math.prod(images.shape[1:]))
    for start in range(0, len(images), count):
        yield np.ascontiguousarray(cache.read(images, slice(start, start + count)))
    cache.release(images)


# ---------------------------------------------------------------------------------------------- finding


def find(data_dir: Path, seed: int = 0) -> dict[str, list[SliceFile]]:
    """Find the slices of each split, without reading any file.

    Files and folders named as masks (`naming.is_mask`) are ignored. Two layouts are supported:

    - One folder per split, named `keras_png_slices_train`, `train` or similar (`naming.split_of_folder`), with the
      PNGs in it or one level below. `data_dir` is the folder that contains the three, the folder above that, or one of
      the three.
    - One folder of PNGs, in it or one level below. It is split 80/10/10 by subject, determined by `seed`.

    Returns:
        The files of `"train"`, `"validate"` and `"test"`.

    Raises:
        DataError: There is no such folder, it contains no slices, a split is missing or empty, or a subject is in two
            splits.
    """
    data_dir = Path(data_dir)
    try:
        mode = os.stat(data_dir).st_mode
    except FileNotFoundError as error:
        raise DataError(f"{data_dir}: no such folder; {_SET_DATA_DIR}") from error
    except OSError as error:
        raise DataError(f"{data_dir}: cannot be read ({error.strerror}); {_SET_DATA_DIR}") from error
    if not stat.S_ISDIR(mode):
        is_source = naming.is_volume(data_dir.name) or naming.is_archive(data_dir.name)
        raise DataError(f"{data_dir}: {_convert_volumes(data_dir) if is_source else f'is a file; {_SET_DATA_DIR}'}")
    folders = _find_split_folders(data_dir)
    if folders:
        splits = {split: _find_slices(folders[split], data_dir) for split in naming.SPLITS}
        for split in naming.SPLITS:
            if not splits[split]:
                raise DataError(f"{folders[split]}: contains no PNG slices; put those of the {split} split there")
        _refuse_shared_subjects(splits)
    else:
        files = _find_slices(data_dir, data_dir)
        if not files:
            raise DataError(f"{data_dir}: {_describe_content(data_dir)}")
        num_subjects = len({file.subject for file in files})
        if num_subjects < len(naming.SPLITS):
            problem = f"contains {num_subjects} subjects, too few for three splits"
            raise DataError(f"{data_dir}: {problem}; add slices of others, at least 3 subjects in all")
        splits = split_by_subject(files, seed)
    _warn_of_unnamed_subjects(splits)
    return splits


def _find_split_folders(data_dir: Path) -> dict[str, Path]:
    """Return the folder of each split, or {} if there are none.

    Raises:
        DataError: Only some splits have a folder, or one split has several.
    """
    parent = data_dir.resolve().parent
    candidates = [data_dir, *_subfolders(data_dir)]
    if naming.split_of_folder(data_dir.resolve().name):
        candidates.append(parent)
    best: dict[str, list[Path]] = {}
    best_parent = data_dir
    for candidate in candidates:
        folders: dict[str, list[Path]] = {}
        for child in _subfolders(candidate):
            if split := naming.split_of_folder(child.name):
                folders.setdefault(split, []).append(child)
        if len(folders) > len(best):
            best, best_parent = folders, candidate
    if len(best) == len(naming.SPLITS):
        for split, several in best.items():
            if len(several) > 1:
                found = " and ".join(folder.name for folder in several)
                raise DataError(f"{best_parent}: contains {found}, all for the {split} split; move their PNGs into one")
        return {split: folder for split, (folder,) in best.items()}
    if best and best_parent != parent:
        missing = " and no ".join(split for split in naming.SPLITS if split not in best)
        found = ", ".join(folder.name for several in best.values() for folder in several)
        problem = f"contains {found} but no {missing} folder"
        raise DataError(f"{best_parent}: {problem}; add it, or put all PNGs into one folder")
    return {}


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """Return what is in a folder, sorted by name, without hidden entries and masks."""
    try:
        with os.scandir(folder) as entries:
            found = [e for e in entries if not e.name.startswith(".") and not naming.is_mask(e.name)]
    except OSError as error:
        raise DataError(f"{folder}: cannot be read ({error.strerror}); check its permissions") from error
    return sorted(found, key=lambda entry: entry.name)


def _subfolders(folder: Path) -> list[Path]:
    return [Path(entry.path) for entry in _entries(folder) if os.path.isdir(entry)]


def _find_slices(folder: Path, data_dir: Path) -> list[SliceFile]:
    """Return the slices in a folder and one level below, without masks."""
    if naming.is_mask(folder.name):
        return []
    # Symbolic links can lead back to a folder that was seen already.
    folders = {os.path.realpath(place): place for place in [*_subfolders(folder), folder]}
    return [
        _slice_file(Path(entry.path), data_dir)
        for place in reversed(folders.values())
        for entry in _entries(place)
        if entry.name.lower().endswith(".png") and not os.path.isdir(entry)
    ]


def _slice_file(path: Path, data_dir: Path) -> SliceFile:
    """Read subject and position from a file's name. Without a subject it counts as one of its own."""
    subject, _ = naming.subject_and_session(Path(os.path.relpath(path, data_dir)).as_posix())
    return SliceFile(path, subject, naming.slice_position(path.name) or 0)


def _describe_content(folder: Path) -> str:
    """Say what is wrong with a folder without slices and what to do. Looks into 10,000 folders at most."""
    walk = itertools.islice(os.walk(folder), 10_000)
    files = [Path(place, name).relative_to(folder) for place, _, names in walk for name in names]
    if any(naming.is_volume(file.name) or naming.is_archive(file.name) for file in files):
        return _convert_volumes(folder)
    slices = [file for file in files if file.name.lower().endswith(".png")]
    if any(not any(map(naming.is_mask, file.parts)) for file in slices):
        return f"contains PNGs only more than one level below; {_SET_DATA_DIR}"
    found = "contains only masks, no slices" if slices else "contains no PNG files" if files else "is empty"
    return f"{found}; {_SET_DATA_DIR}"


def _convert_volumes(source: Path) -> str:
    return f"contains volumes, not slices; convert them first: python oasis.py {source} SLICES"


def _warn_of_unnamed_subjects(splits: dict[str, list[SliceFile]]) -> None:
    names = [(file.path.name, file.subject) for split_files in splits.values() for file in split_files]
    unnamed = [name for name, subject in names if subject.endswith(name) or naming.slice_position(name) is None]
    if unnamed:
        console.warn(
            f"{len(unnamed)} files such as {unnamed[0]} do not name subject and slice position, as in "
            f"{naming.slice_file('case_001', 0)}; a missing subject counts as one of its own, a missing position as 0"
        )


def _refuse_shared_subjects(splits: dict[str, list[SliceFile]]) -> None:
    """Raise `DataError` if a subject is in two splits, in the same session or in two."""
    first: dict[str, tuple[str, SliceFile]] = {}
    for split, files in splits.items():
        for file in files:
            other_split, other = first.setdefault(file.subject, (split, file))
            if other_split != split:
                raise DataError(
                    f"{file.path}: subject {file.subject} is in the {split} split and, with {other.path.name}, in the "
                    f"{other_split} split; keep all slices of a subject in one split"
                )


def split_by_subject(files: list[SliceFile], seed: int) -> dict[str, list[SliceFile]]:
    """Split files 80/10/10 by subject, at random but determined by the seed. The order of the files is kept."""
    subjects = sorted({file.subject for file in files})
    seeds.generator(seed, "split").shuffle(subjects)
    count = max(1, round(0.1 * len(subjects)))  # Of the test split, and of the validation split.
    split_of = {subject: ("test", "validate")[i // count] for i, subject in enumerate(subjects[: 2 * count])}
    return {split: [file for file in files if split_of.get(file.subject, "train") == split] for split in naming.SPLITS}


def _refuse_shared_images(files: list[SliceFile], digests: list[bytes | None], splits: list[str]) -> None:
    """Raise `DataError` if the same image is in two splits under any names. Those without a checksum are ignored."""
    first: dict[bytes, int] = {}
    for i, digest in enumerate(digests):
        if digest is None:
            continue
        j = first.setdefault(digest, i)
        if splits[j] != splits[i]:
            same = f"is the same image as {files[j].path} of the {splits[j]} split"
            raise DataError(f"{files[i].path}: {same}; keep all slices of a subject in one split")


def _synthetic_slices(image_size: int, seed: int, num_subjects: int) -> dict[str, Slices]:
    """Generate slices of some subjects at `phantom.NUM_POSITIONS` positions, split by subject."""
    files = [
        SliceFile(Path(naming.slice_file(f"case_{subject:03d}", position)), f"case_{subject:03d}", position)
        for subject in range(1, num_subjects + 1)
        for position in range(phantom.NUM_POSITIONS)
    ]
    slices = {}
    with console.progress(len(files), "synthetic slices") as progress:
        for split, split_files in split_by_subject(files, seed).items():
            images = np.empty((len(split_files), image_size, image_size, 1), np.uint8)
            for image, file in zip(images, split_files, strict=True):
                number = int(file.subject.removeprefix("case_"))
                image[:, :, 0] = phantom.slice_image(seed, number, file.position, image_size)
                progress.update(1)
            positions = np.array([file.position for file in split_files], np.int32)
            slices[split] = Slices(images, positions, np.array([file.subject for file in split_files]))
    return slices


# ---------------------------------------------------------------------------------------------- feeding


def to_float(images: np.ndarray) -> np.ndarray:
    """Convert uint8 images, 0 to 255, to float32 in [0, 1]."""
    return images.astype(np.float32) / 255


def to_uint8(images: np.ndarray) -> np.ndarray:
    """Convert float images, clipped to [0, 1], to uint8, 0 to 255."""
    levels = np.empty(images.shape, np.uint8)
    for start in range(0, len(images), 64):  # All at once would need memory for several copies of the floats.
        levels[start : start + 64] = np.rint(np.clip(images[start : start + 64], 0, 1) * 255)
    return levels


def spread_over_positions(positions: np.ndarray, count: int) -> np.ndarray:
    """Choose slices from the lowest to the highest position.

    Args:
        positions: (N,) slice positions.
        count: Number of slices; fewer are chosen if there are fewer.

    Returns:
        Indices of the chosen slices, ordered by position.
    """
    ranks = np.unique(np.linspace(0, len(positions) - 1, min(count, len(positions))).astype(int))
    return np.argsort(positions, kind="stable")[ranks]


def image_batches(
    slices: Slices,
    batch_size: int,
    seed: int | None = None,
    first_epoch: int = 0,
    augmented: bool = False,
    shard: tuple[int, int] = (0, 1),
) -> tf.data.Dataset:
    """Batches of images with their slice positions.

    Args:
        slices: N slices.
        batch_size: Images per batch.
        seed: None for one pass in order. A number for an endless sequence of epochs, each shuffled by (seed, epoch)
            and with full batches only (`steps_per_epoch`).
        first_epoch: Epoch to begin with, if shuffled.
        augmented: Augment every image, as a function of (seed, epoch, step); see `augmentation.draw`. Needs a seed.
        shard: (i, n) yields the i-th of n equal parts of each batch, with the same images as in the whole batch; n
            must divide the size of every batch.

    Returns:
        A dataset of (images (B, H, W, 1) float32 in [0, 1], positions (B,) int32) that prefetches batches.
    """
    order_seed = None if seed is None else seeds.number(seed, "order of images")
    batches = _batches((slices.images, slices.positions), batch_size, order_seed, first_epoch, shard)
    first_step = first_epoch * steps_per_epoch(len(slices), batch_size)
    index, count = shard

    def to_inputs(step: tf.Tensor, batch: tuple[tf.Tensor, tf.Tensor]) -> tuple[tf.Tensor, tf.Tensor]:
        images, positions = batch
        images = tf.cast(images, tf.float32) / 255
        if augmented:
            assert seed is not None
            number = tf.shape(images)[0]
            parameters = augmentation.draw(count * number, seed, step)
            own = slice(index * number, (index + 1) * number)
            images = augmentation.apply(images, {name: values[own] for name, values in parameters.items()})
        return images, positions

    return batches.enumerate(first_step).map(to_inputs).prefetch(2)


def input_batches(
    inputs: Mapping[str, np.ndarray],
    target: str,
    batch_size: int,
    seed: int | None = None,
    first_epoch: int = 0,
    shard: tuple[int, int] = (0, 1),
) -> tf.data.Dataset:
    """Batches to train a network on that has several inputs.

    Args:
        inputs: Inputs of the network by name, (N, ...) each.
        target: Name of the input that is also the target.
        batch_size, seed, first_epoch, shard: As in `image_batches`.

    Returns:
        A dataset of (inputs, target) that prefetches batches.
    """
    order_seed = None if seed is None else seeds.number(seed, "order of codes")
    batches = _batches(tuple(inputs.values()), batch_size, order_seed, first_epoch, shard)

    def with_targets(*batch: tf.Tensor) -> tuple[dict[str, tf.Tensor], tf.Tensor]:
        named = dict(zip(inputs, batch, strict=True))
        return named, named[target]

    return batches.map(with_targets).prefetch(2)


def steps_per_epoch(num_slices: int, batch_size: int) -> int:
    """Number of batches in a shuffled epoch: full batches only, so that all steps weigh the same, but at least one."""
    return max(1, num_slices // batch_size)


def _batches(
    arrays: tuple[np.ndarray, ...], batch_size: int, seed: int | None, first_epoch: int, shard: tuple[int, int]
) -> tf.data.Dataset:
    """Batches of rows of `arrays`. NumPy selects the rows of one batch at a time, so the arrays are never copied."""
    num_rows = len(arrays[0])
    if seed is None:
        indices = tf.data.Dataset.range(num_rows).batch(batch_size)
    else:
        steps = steps_per_epoch(num_rows, batch_size)

        def epoch_indices(epoch: tf.Tensor) -> tf.data.Dataset:
            order = tf.random.experimental.stateless_shuffle(tf.range(num_rows, dtype=tf.int64), seed=[seed, epoch])
            return tf.data.Dataset.from_tensor_slices(order).batch(batch_size).take(steps)

        indices = tf.data.Dataset.counter(start=first_epoch).flat_map(epoch_indices)

    shard_index, num_shards = shard

    def select_rows(batch: tf.Tensor) -> tuple[tf.Tensor, ...]:
        rows = tf.split(batch, num_shards)[shard_index]
        types = [a.dtype for a in arrays]
        taken = tf.numpy_function(lambda i: [cache.read(a, i) for a in arrays], [rows], types, stateful=False)
        return tuple(tf.ensure_shape(t, (None, *a.shape[1:])) for t, a in zip(taken, arrays, strict=True))

    return indices.map(select_rows)
