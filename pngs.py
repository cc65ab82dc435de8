"""Decode PNG slices to grey images of one size."""

import collections
import hashlib
import itertools
import os
import stat
import struct
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image, UnidentifiedImageError

import console

BRAIN_THRESHOLD = 0.05  # Pixels that are brighter than this, on the [0, 1] scale, belong to the brain.
MAX_SIDE = 4096  # Pixels. Sixteen times the side of an OASIS slice; larger PNGs are refused before they are decoded.
CROP_MARGIN = 4  # Pixels around the brains, for other subjects and for augmentation.
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
WAITING_PER_WORKER = 16  # PNGs that may be decoded before they are used, for each thread.

Result = TypeVar("Result")


class DataError(console.UserError):
    """Slices that cannot be used."""


@dataclass(frozen=True)
class DecodedPng:
    """A decoded PNG.

    Attributes:
        grey: (image_size, image_size) uint8.
        size: Width and height in pixels before resizing.
        digest: Checksum of the grey image before resizing.
        oddities: What is unusual about it, as descriptions that follow "slices such as ... are".
    """

    grey: np.ndarray
    size: tuple[int, int]
    digest: bytes
    oddities: tuple[str, ...]


ANIMATED = "animated: only the first frame of each is used"
COLOURED = "in colour: they are converted to grey"
BLANK = "of a single grey level: they are used, but show no brain"


def decode_all(
    paths: list[Path], image_size: int, skip_broken: bool = False, crop: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Decode PNGs into one array; see `decode_each`.

    Returns:
        images: (N, image_size, image_size, 1) uint8. Those of files that were left out are black.
        is_readable: (N,) bool, False for files that were left out.
    """
    images, is_readable = np.zeros((len(paths), image_size, image_size, 1), np.uint8), np.zeros(len(paths), bool)
    for i, png in enumerate(decode_each(paths, image_size, skip_broken, crop)):
        if png:
            images[i, ..., 0], is_readable[i] = png.grey, True
    return images, is_readable


def decode_each(
    paths: list[Path],
    image_size: int,
    skip_broken: bool = False,
    crop: int = 0,
    warn: Callable[[str], None] = console.warn,
) -> Iterator[DecodedPng | None]:
    """Decode PNGs in parallel, with a progress bar, a few at a time. Unusual ones are counted in warnings at the end.

    Args:
        paths: N files.
        image_size: Height and width of the images in pixels.
        skip_broken: Leave out files that cannot be read, with a warning that names each.
        crop: See `decode`.
        warn: Is given each warning.

    Yields:
        The PNGs in order, with None for files that are left out.

    Raises:
        DataError: A file is not a PNG or is broken.
    """
    left_out: list[DataError] = []
    odd: dict[str, list[Path]] = {}
    sizes: dict[tuple[int, int], list[Path]] = {}

    def decode_one(path: Path) -> DecodedPng | DataError:
        try:
            return decode(path, image_size, crop)
        except DataError as error:
            return error

    for path, result in zip(paths, _in_parallel(decode_one, paths, "slices"), strict=True):
        if isinstance(result, DecodedPng):
            sizes.setdefault(result.size, []).append(path)
            for oddity in result.oddities:
                odd.setdefault(oddity, []).append(path)
            yield result
        elif skip_broken:
            left_out.append(result)
            yield None
        else:
            raise DataError(f"{result}; replace or remove it, or leave out all such files with --skip-broken-slices")
    for error in left_out:
        warn(f"left out: {error}")
    for oddity, examples in odd.items():
        warn(f"{len(examples)} slices such as {examples[0].name} are {oddity}")
    if len(sizes) > 1:
        warn(_describe_mixed_sizes(sizes, image_size))


def _in_parallel(function: Callable[[Path], Result], paths: Sequence[Path], unit: str) -> Iterator[Result]:
    """Yield what a function returns for each path, in order. Only a few results at a time wait until they are used."""
    remaining, workers = iter(paths), os.cpu_count() or 1
    with console.progress(len(paths), unit) as progress, ThreadPoolExecutor(workers) as pool:

        def submit(count: int) -> Iterator[Future[Result]]:
            return (pool.submit(function, path) for path in itertools.islice(remaining, count))

        waiting = collections.deque(submit(WAITING_PER_WORKER * workers))
        while waiting:
            yield waiting.popleft().result()
            waiting.extend(submit(1))
            progress.update(1)


def _describe_mixed_sizes(sizes: dict[tuple[int, int], list[Path]], image_size: int) -> str:
    (width, height), most = max(sizes.items(), key=lambda item: len(item[1]))
    others = [path for size, paths in sizes.items() if size != (width, height) for path in paths]
    return (
        f"{len(others)} slices such as {others[0].name} are not {width} × {height} pixels like the other {len(most)}; "
        f"all are resized to {image_size} × {image_size}, whatever the size of a pixel in millimetres"
    )


def choose_crop(paths: list[Path], crop: int | None) -> tuple[int, int]:
    """Choose the central square of the PNGs that is used, or check that it holds all brains.

    Args:
        paths: The PNGs. Those that cannot be read are ignored.
        crop: Side of the square in pixels. None chooses the smallest multiple of 16 that holds everything brighter than
            `BRAIN_THRESHOLD` in all PNGs and `CROP_MARGIN` pixels around it, or whole PNGs if they differ in size. 0 is
            for whole PNGs.

    Returns:
        The side of the square, 0 for whole PNGs; and the longer side of the largest PNG.

    Raises:
        DataError: Something brighter lies outside the square.
    """
    if crop == 0:
        return 0, 0
    needed, path, sides = 0, paths[0], set()
    for measured, (extent, side) in zip(paths, _in_parallel(_extent, paths, "slices measured"), strict=True):
        if side:
            sides.add(side)
        if extent > needed:
            needed, path = extent, measured
    if crop is None:
        chosen = 16 * -(-(needed + 2 * CROP_MARGIN) // 16)
        return (chosen, max(sides)) if needed and len(sides) == 1 and chosen < max(sides) else (0, 0)
    if needed > crop:
        problem = f"its brain does not fit into the central square of {crop} pixels"
        raise DataError(f"{path}: {problem}; set crop to {needed} or more, or to 0 for whole slices")
    return crop, max([crop, *sides])


def _extent(path: Path) -> tuple[int, int]:
    """Return the sides of the smallest central square that holds the brain and of the PNG; zeros if unreadable."""
    try:
        square = np.asarray(_read_square(path)[0])
    except DataError:
        return 0, 0
    bright = square > BRAIN_THRESHOLD * 255
    lines = np.flatnonzero(bright.any(axis=0) | bright.any(axis=1))
    margin = min(lines[0], len(square) - 1 - lines[-1]) if len(lines) else len(square) / 2
    return int(len(square) - 2 * margin), len(square)


def decode(path: Path, image_size: int, crop: int = 0) -> DecodedPng:
    """Decode one PNG as a grey image.

    Grey images of 1 to 16 bits, RGB and palette images are converted to 8-bit grey; transparent pixels become black.
    An image that is not square is padded to a square with black, then cropped to the central square of `crop` pixels,
    unless that is 0, and resized with an antialiasing filter.

    Raises:
        DataError: The file is not a PNG, is broken, or has a side of more than `MAX_SIDE` pixels.
    """
    grey, size, digest, oddities = _read_square(path)
    if crop:
        left = (grey.width - crop) // 2
        grey = grey.crop((left, left, left + crop, left + crop))
    if grey.size != (image_size, image_size):
        grey = grey.resize((image_size, image_size), Image.Resampling.BICUBIC)
    oddities += [BLANK] if len(set(grey.getextrema())) == 1 else []
    return DecodedPng(np.asarray(grey), size, digest, tuple(oddities))


def _read_square(path: Path) -> tuple[Image.Image, tuple[int, int], bytes, list[str]]:
    """Read a PNG as a square grey image. Also returns its size, the checksum of its pixels, and its oddities."""
    try:
        size = _read_size(path)
        with Image.open(path, formats=("PNG",)) as png:
            if png.size != size:
                raise ValueError("its size changes within the file")
            oddities = [ANIMATED] if getattr(png, "is_animated", False) else []
            grey, coloured = _to_grey(png)
    except DataError:
        raise
    except UnidentifiedImageError as error:
        raise DataError(f"{path}: is a broken PNG (its header is invalid)") from error
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or f'is a broken PNG ({error})'}") from error
    except Exception as error:  # Pillow raises exceptions of any kind for broken files.
        raise DataError(f"{path}: is a broken PNG ({error})") from error
    oddities += [COLOURED] if coloured else []
    digest = hashlib.sha256(f"{size}".encode() + grey.tobytes()).digest()
    if grey.width != grey.height:
        side = max(grey.size)
        square = Image.new("L", (side, side))
        square.paste(grey, ((side - grey.width) // 2, (side - grey.height) // 2))
        grey = square
    return grey, size, digest, oddities


def _read_size(path: Path) -> tuple[int, int]:
    """Read width and height from a PNG's header. Raises `DataError` if it is not a PNG or too large for a slice."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise DataError(f"{path}: is not a regular file")
    with open(path, "rb") as file:
        header = file.read(24)
    if not header:
        raise DataError(f"{path}: is empty")
    if not header.startswith(PNG_SIGNATURE):
        raise DataError(f"{path}: is not a PNG image in spite of its name")
    if header[12:16] != b"IHDR" or len(header) < 24:
        raise DataError(f"{path}: is a broken PNG (it has no header)")
    width, height = struct.unpack(">II", header[16:])
    if max(width, height) > MAX_SIDE:
        raise DataError(f"{path}: has {width} × {height} pixels, too large for a slice (at most {MAX_SIDE} per side)")
    return width, height


def _to_grey(png: Image.Image) -> tuple[Image.Image, bool]:
    """Convert an image to 8-bit grey. Also returns whether it was in colour."""
    if png.mode.startswith("I"):  # 16 bits
        return Image.fromarray((np.asarray(png).astype(np.uint32) // 257).astype(np.uint8)), False
    if "A" in png.mode or "transparency" in png.info:
        png = png.convert("RGBA")
        png = Image.alpha_composite(Image.new("RGBA", png.size, "black"), png)
    if png.mode in ("1", "L"):
        return png.convert("L"), False
    red, green, blue = (np.asarray(channel) for channel in png.convert("RGB").split())
    return png.convert("L"), not (np.array_equal(red, green) and np.array_equal(green, blue))
