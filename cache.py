"""Decoded slices on disk: one memory-mapped file per set of slices, made once and shared by all runs.

Only rows that were read lately take memory, at most some hundred MB, so a set may be larger than memory.
"""

import contextlib
import json
import math
import mmap
import os
import shutil
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import filelock
import numpy as np

from pngs import DataError
from run import UNFINISHED, atomic_path, remove, write_json

IMAGES = "images"  # Name of the file in the folder of a set: the pixels, (N, H, W, 1) uint8, and nothing else.
ABOUT = "about.json"  # Its shape, and what else is known about the set.
_SET_CACHE_DIR = "set cache_dir to a folder on a larger disk"
# Bytes that are read from a file before its memory is released. Linux may map 2 MB for a row, so it is little.
UNRELEASED_BYTES = 1 << 24

About = dict[str, Any]
_unreleased: weakref.WeakKeyDictionary[mmap.mmap, int] = weakref.WeakKeyDictionary()  # Bytes since the last release.


def default_folder() -> Path:
    """The folder for decoded slices in the user's cache folder. Raises `DataError` if the user has no home."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "oasis-vqvae"
    except RuntimeError as error:
        raise DataError(
            "cache_dir is None: there is no home folder to keep decoded slices in; set cache_dir"
        ) from error


def open_or_make(
    folder: Path, name: str, source: str, state: str, num_bytes: int, write: Callable[[Path], About]
) -> tuple[np.ndarray, About]:
    """Open a set of decoded slices. It is made first if it does not exist, by one process at a time.

    A set is written under a temporary name, flushed and renamed, so that it is complete or absent. Before that, sets
    that were made from an earlier state of the same source are removed, and so is what killed processes have left.

    Args:
        folder: Folder of all sets; created if necessary.
        name: Name of the set, which determines its content.
        source: The folder that the slices come from.
        state: Checksum of the state of the source.
        num_bytes: Size of the images; an upper limit.
        write: Writes the images to the path that it is given, and returns what is to be known about the set: "shape",
            that of the images, and anything else that JSON can represent.

    Returns:
        The images, mapped for reading, and what `write` has returned.

    Raises:
        DataError: The folder cannot be written, or its disk lacks the space.
        RunError: The disk is full nevertheless.
    """
    place = folder / name
    if found := _open(place):
        return found
    with _lock(folder, name):
        if found := _open(place):  # Another process made it in the meantime.
            return found
        _remove_leftovers(folder, name)
        _remove_outdated(folder, source, state)
        remove(place)
        _require_space(folder, num_bytes)
        print(f"writing decoded slices, {_size(num_bytes)}, to {place}")
        with atomic_path(place) as unfinished:
            unfinished.mkdir()
            about = write(unfinished / IMAGES)
            write_json(unfinished / ABOUT, {"source": source, "state": state, **about})
        found = _open(place)
    if not found:
        raise DataError(f"{place}: was removed or changed while it was opened; run the same command again")
    return found


def _open(place: Path) -> tuple[np.ndarray, About] | None:
    """Map the images of a set. Returns None if it is not there or not as it was written."""
    try:
        about = json.loads((place / ABOUT).read_text(encoding="utf-8"))
        shape = tuple(about["shape"])
        if (place / IMAGES).stat().st_size != math.prod(shape):
            return None
        return map_images(place / IMAGES, shape), about
    except (OSError, ValueError, KeyError, TypeError):
        return None


def map_images(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """Map a file of pixels for reading, as an array of this shape, uint8."""
    return np.memmap(path, np.uint8, "r", shape=shape)


@contextlib.contextmanager
def _lock(folder: Path, name: str) -> Iterator[None]:
    """Lock a set, and wait for the lock. The operating system releases it when the process ends, however it ends."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(folder / f"{name}.lock")
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            print("waiting for another process that decodes the same slices")
            lock.acquire()
    except OSError as error:
        raise DataError(
            f"cache_dir is {folder}: cannot be written to ({error.strerror or error}); set cache_dir to another folder"
        ) from error
    try:
        yield
    finally:
        lock.release()


def _remove_leftovers(folder: Path, name: str) -> None:
    """Remove what killed processes have left of sets; the lock of the set with this name is held.

    Processes that are still writing hold the locks of the others.
    """
    for leftover in folder.glob(f"{UNFINISHED}*"):
        lock = filelock.FileLock(folder / f"{leftover.name.removeprefix(UNFINISHED)}.lock")
        with contextlib.suppress(filelock.Timeout, OSError), lock.acquire(timeout=0):
            remove(leftover)


def _remove_outdated(folder: Path, source: str, state: str) -> None:
    """Remove sets of the same source in another state. Processes that have opened them can go on reading them."""
    for path in folder.glob(f"*/{ABOUT}"):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            about = json.loads(path.read_text(encoding="utf-8"))
            if about.get("source") == source and about.get("state") != state:
                remove(path.parent)


def _require_space(folder: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise DataError(
            f"cache_dir is {folder}: decoded slices need {_size(num_bytes)} and only {_size(free)} are "
            f"free; free some space, or {_SET_CACHE_DIR}"
        )


def _size(num_bytes: int) -> str:
    """A number of bytes in the largest unit that leaves at least 1, as in "33.2 MB"."""
    power = min((len(str(num_bytes)) - 1) // 3, 4)
    return f"{num_bytes / 1000**power:.3g} {('bytes', 'kB', 'MB', 'GB', 'TB')[power]}"


# ------------------------------------------------------------------------------------------------- reading


def read(array: Any, rows: Any) -> np.ndarray:
    """Return some rows of an array. If it is mapped from a file, its memory is released from time to time."""
    taken = array[rows]
    if mapping := _mapping(array):
        read_bytes = max(taken.nbytes, len(taken) * 65536)  # Pages around small rows are mapped as well.
        _unreleased[mapping] = _unreleased.get(mapping, 0) + read_bytes
        if _unreleased[mapping] > UNRELEASED_BYTES:
            release(array)
    return taken


def release(array: Any) -> None:
    """Give the memory of an array that is mapped from a file for reading back to the operating system.

    The content stays in the system's cache of files as long as there is room, and is mapped again when it is read.
    """
    mapping = _mapping(array)
    if mapping and hasattr(mapping, "madvise"):  # Windows has no madvise.
        mapping.madvise(mmap.MADV_DONTNEED)
        _unreleased.pop(mapping, None)


def _mapping(array: Any) -> mmap.mmap | None:
    """The mapping that an array was opened with; None if it may be written, as what was written would be lost."""
    mapping = getattr(array, "_mmap", None)  # NumPy has no public name for it.
    return mapping if mapping is not None and not array.flags.writeable else None
