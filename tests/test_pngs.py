"""Decoding and cropping PNGs, and PNGs that are broken, odd or hostile."""

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import phantom
import pngs


def brain(value: int = 0) -> Image.Image:
    """A small image of several grey levels, which depend on `value`."""
    grey = np.zeros((8, 8), np.uint8)
    grey[2:6, 2:6] = np.arange(16).reshape(4, 4) + value
    return Image.fromarray(grey)


@pytest.fixture
def paths(tmp_path) -> list[Path]:
    """Four good slices."""
    paths = [tmp_path / f"slice_{i}.png" for i in range(4)]
    for i, path in enumerate(paths):
        brain(20 * i).save(path)
    return paths


def assert_refused(paths: list[Path], name: Path, problem: str) -> None:
    """Check that decoding ends in one line that begins with the name of a file and says how to leave it out."""
    with pytest.raises(pngs.DataError) as error:
        pngs.decode_all(paths, 8)
    message = str(error.value)
    assert message.startswith(f"{name}: ")
    assert "\n" not in message
    assert problem in message
    assert "--skip-broken-slices" in message


# ------------------------------------------------------------------------------------------------ decoding


KINDS = {
    "8-bit grey": lambda: Image.new("L", (8, 8), 100),
    "16-bit grey": lambda: Image.fromarray(np.full((8, 8), 100 * 257, np.uint16)),
    "RGB": lambda: Image.new("RGB", (8, 8), (100, 100, 100)),
    "palette": lambda: Image.new("RGB", (8, 8), (100, 100, 100)).quantize(4),
    "grey with alpha": lambda: Image.new("LA", (8, 8), (100, 255)),
    "RGB with alpha": lambda: Image.new("RGBA", (8, 8), (100, 100, 100, 255)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_png_is_converted_to_grey(tmp_path, kind):
    KINDS[kind]().save(tmp_path / "slice.png")
    image = pngs.decode(tmp_path / "slice.png", 8).grey
    assert image.dtype == np.uint8
    assert image.shape == (8, 8)
    assert np.all(image == 100)


def test_transparent_pixels_are_black(tmp_path):
    Image.new("LA", (8, 8), (100, 0)).save(tmp_path / "slice.png")
    assert not pngs.decode(tmp_path / "slice.png", 8).grey.any()


def test_slices_are_padded_not_distorted(tmp_path):
    image = np.zeros((40, 20), np.uint8)
    image[10:30, 5:15] = 200  # twice as high as it is wide
    Image.fromarray(image).save(tmp_path / "slice.png")
    read = pngs.decode(tmp_path / "slice.png", 40).grey
    assert np.array_equal(read[:, 10:30], image)
    assert not read[:, :10].any()
    assert not read[:, 30:].any()


def test_resizing_is_antialiased(tmp_path):
    stripes = np.zeros((64, 64), np.uint8)
    stripes[:, ::2] = 200
    Image.fromarray(stripes).save(tmp_path / "slice.png")
    read = pngs.decode(tmp_path / "slice.png", 16).grey[:, 2:-2]
    assert read.min() > 80  # near the mean of 100; without a filter it would be 0 or 200
    assert read.max() < 120


# ------------------------------------------------------------------------------------------------ cropping


def save(path: Path, grey: np.ndarray) -> Path:
    Image.fromarray(grey).save(path)
    return path


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width), np.uint8)


@pytest.mark.parametrize(("side", "crop"), [(40, 32), (41, 32), (40, 31), (64, 16), (32, 32)])
def test_a_crop_keeps_the_pixels_of_the_centre(tmp_path, side, crop):
    grey = noise(side, side)
    read = pngs.decode(save(tmp_path / "slice.png", grey), crop, crop)
    begin = (side - crop) // 2
    assert np.array_equal(read.grey, grey[begin : begin + crop, begin : begin + crop])
    assert read.size == (side, side)


def test_slices_are_padded_to_a_square_then_cropped_then_resized(tmp_path):
    grey = noise(40, 24)
    read = pngs.decode(save(tmp_path / "slice.png", grey), 32, 32).grey
    assert np.array_equal(read[:, 4:28], grey[4:36])
    assert not read[:, :4].any()
    assert not read[:, 28:].any()
    resized = pngs.decode(tmp_path / "slice.png", 16, 32).grey
    assert np.array_equal(resized, pngs.decode(save(tmp_path / "cropped.png", read), 16).grey)


def test_a_crop_larger_than_the_slice_pads_it(tmp_path):
    read = pngs.decode(save(tmp_path / "slice.png", noise(8, 8)), 12, 12).grey
    assert np.array_equal(read[2:10, 2:10], noise(8, 8))
    assert not read[:2].any()


def spots(tmp_path: Path, *places: tuple[int, int], side: int = 64, level: int = 13) -> list[Path]:
    """One black slice with a grey pixel for each place."""
    paths = []
    for row, column in places:
        grey = np.zeros((side, side), np.uint8)
        grey[row, column] = level
        paths.append(save(tmp_path / f"spot_{row}_{column}.png", grey))
    return paths


@pytest.mark.parametrize("side", [64, 66])
@pytest.mark.parametrize(
    "place", [(32, 32), (28, 30), (27, 30), (26, 30), (30, 16), (30, 48), (47, 30), (60, 40), (0, 0)]
)
def test_the_automatic_crop_is_the_smallest_multiple_of_16_that_holds_the_brain_and_a_margin(tmp_path, side, place):
    paths = spots(tmp_path, place, side=side)

    def holds(crop: int) -> bool:
        inner = crop - 2 * pngs.CROP_MARGIN
        return bool(pngs.decode(paths[0], inner, inner).grey.any())

    smallest = next(crop for crop in range(16, 97, 16) if holds(crop))
    assert pngs.choose_crop(paths, None) == ((smallest, side) if smallest < side else (0, 0))


def test_the_automatic_crop_holds_every_brain(tmp_path):
    paths = spots(tmp_path, (32, 32), (22, 30), (30, 41))
    assert [pngs.choose_crop([path], None)[0] for path in paths] == [16, 32, 32]
    paths += spots(tmp_path, (14, 30))
    assert pngs.choose_crop(paths, None) == (48, 64)


def test_dark_pixels_do_not_count_as_brain(tmp_path):
    dark = spots(tmp_path, (2, 2), level=12)  # 12 / 255 is below the threshold of 0.05
    assert pngs.choose_crop(dark, None) == (0, 0)
    assert pngs.choose_crop(dark, 16) == (16, 64)
    assert pngs.choose_crop(dark + spots(tmp_path, (30, 30)), None) == (16, 64)


def test_whole_slices_are_used_without_a_crop_or_with_mixed_sizes(tmp_path):
    assert pngs.choose_crop([tmp_path / "not read.png"], 0) == (0, 0)
    mixed = spots(tmp_path, (30, 30)) + spots(tmp_path, (24, 24), side=48)
    assert pngs.choose_crop(mixed, None) == (0, 0)
    assert pngs.choose_crop(mixed, 32) == (32, 64)


def test_a_crop_that_would_cut_a_brain_off_is_refused_with_the_side_that_would_do(tmp_path):
    paths = spots(tmp_path, (32, 32), (8, 30), (30, 14))
    with pytest.raises(pngs.DataError) as error:
        pngs.choose_crop(paths, 32)
    assert str(error.value).startswith(f"{paths[1]}: its brain does not fit into the central square of 32 pixels")
    assert "set crop to 48 or more, or to 0" in str(error.value)
    assert pngs.choose_crop(paths, 48) == (48, 64)
    assert pngs.decode(paths[1], 48, 48).grey.any()
    assert not pngs.decode(paths[1], 46, 46).grey.any()


def test_broken_files_do_not_affect_the_crop(tmp_path):
    paths = spots(tmp_path, (30, 30))
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"")
    for crop in (None, 16):
        assert pngs.choose_crop([*paths, broken], crop) == (16, 64)
    assert pngs.choose_crop([broken], None) == (0, 0)


def test_all_slices_are_cropped_alike(tmp_path):
    paths = spots(tmp_path, (32, 32), (25, 38))
    images, _ = pngs.decode_all(paths, 16, crop=16)
    assert images.shape == (2, 16, 16, 1)
    for path, image in zip(paths, images, strict=True):
        assert np.array_equal(image[..., 0], pngs.decode(path, 16, 16).grey)
        assert image.any()


# ------------------------------------------------------------------------------------------- bad input


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, rows: bytes, depth: int = 8, colour: int = 0, interlaced: int = 0) -> bytes:
    """The content of a PNG file. `rows` are its pixels, each row after a 0 byte."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced)
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    return pngs.PNG_SIGNATURE + b"".join(parts)


BROKEN_FILES = {
    "zero bytes": (b"", "is empty"),
    "a JPEG": ("JPEG", "not a PNG"),
    "a JPEG in CMYK": ("CMYK", "not a PNG"),
    "a GIF": ("GIF", "not a PNG"),
    "text": (b"case_001", "not a PNG"),
    "only the signature": (pngs.PNG_SIGNATURE, "no header"),
    "no header": (pngs.PNG_SIGNATURE + b"x" * 40, "no header"),
    "truncated pixels": (png(8, 8, bytes(range(72)))[:-40], "broken PNG"),
    "too few pixels": (png(8, 8, bytes(30)), "truncated"),
    "enormous": (png(50_000, 50_000, b""), "50000 × 50000"),
    "no pixels wide": (png(0, 8, b""), "header is invalid"),
    "two headers": (png(8, 8, bytes(72))[:33] + png(9, 9, bytes(90))[8:], "size changes"),
    "CMYK, which PNG does not have": (png(8, 8, bytes(8 * 33), colour=5), "header is invalid"),
    "9 bits per pixel": (png(8, 8, bytes(100), depth=9), "header is invalid"),
}


def write_broken(path: Path, content: bytes | str) -> None:
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        Image.new("CMYK" if content == "CMYK" else "L", (8, 8)).save(path, "JPEG" if content == "CMYK" else content)


@pytest.mark.parametrize("kind", BROKEN_FILES)
def test_a_broken_file_is_refused_or_left_out_by_name(paths, capsys, kind):
    content, problem = BROKEN_FILES[kind]
    bad = paths[2]
    write_broken(bad, content)
    assert_refused(paths, bad, problem)
    images, is_readable = pngs.decode_all(paths, 8, skip_broken=True)
    assert is_readable.tolist() == [True, True, False, True]
    assert [bool(image.any()) for image in images] == [True, True, False, True]
    warnings = capsys.readouterr().err
    assert warnings.startswith("warning: ")
    assert warnings.count("\n") == 1
    assert f"{bad}: " in warnings
    assert problem in warnings


def test_links_and_pipes_are_refused_by_name(paths):
    bad = paths[1]
    bad.unlink()
    bad.symlink_to(bad)
    assert_refused(paths, bad, "Too many levels of symbolic links")
    bad.unlink()
    bad.symlink_to(bad.with_name("gone.png"))
    assert_refused(paths, bad, "No such file")
    bad.unlink()
    os.mkfifo(bad)  # Reading it would never end.
    assert_refused(paths, bad, "not a regular file")


def test_a_file_without_read_permission(paths, monkeypatch):
    def refuse(path, mode):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(pngs, "open", refuse, raising=False)
    assert_refused(paths, paths[0], "Permission denied")


GOOD_FILES = {
    "interlaced": png(
        8, 8, b"".join(b"\0" + bytes(range(n)) for n in [1, 1, 2, 2, 2, *[4] * 6, *[8] * 4]), interlaced=1
    ),
    "1 bit": png(8, 8, (b"\0\xf0") * 8, depth=1),
    "4 bit": png(8, 8, (b"\0" + bytes([0x0F] * 4)) * 8, depth=4),
    "16 bit": png(8, 8, (b"\0" + bytes([0, 0, 100, 100] * 4)) * 8, depth=16),
    "alpha": png(8, 8, (b"\0" + bytes([100, 255, 100, 128] * 4)) * 8, colour=4),
}


@pytest.mark.parametrize("kind", GOOD_FILES)
def test_unusual_pngs_are_read_without_a_warning(paths, capsys, kind):
    paths[0].write_bytes(GOOD_FILES[kind])
    images, _ = pngs.decode_all(paths, 8)
    assert images[0].any()
    assert capsys.readouterr().err == ""


ODD_FILES = {
    "animated": (lambda path: brain(200).save(path, save_all=True, append_images=[brain(201)]), "first frame"),
    "colour": (
        lambda path: Image.merge("RGB", [brain(200), brain(210), brain(220)]).save(path),
        "in colour: they are converted to grey",
    ),
    "black": (lambda path: Image.new("L", (8, 8)).save(path), "a single grey level"),
    "constant": (lambda path: Image.new("L", (8, 8), 100).save(path), "a single grey level"),
    "transparent": (lambda path: Image.new("LA", (8, 8), (100, 0)).save(path), "a single grey level"),
}


@pytest.mark.parametrize("kind", ODD_FILES)
def test_odd_slices_are_used_and_counted_in_one_warning(paths, capsys, kind):
    save, oddity = ODD_FILES[kind]
    for path in paths[1:3]:
        save(path)
    decoded = list(pngs.decode_each(paths, 8))
    assert [bool(png.oddities) for png in decoded] == [False, True, True, False]
    warnings = capsys.readouterr().err
    assert warnings.count("\n") == 1
    assert warnings.startswith("warning: 2 slices such as slice_1.png")
    assert oddity in warnings


def test_mixed_sizes_are_used_and_counted(paths, capsys):
    brain().resize((16, 16)).save(paths[3])
    images, _ = pngs.decode_all(paths, 8)
    assert images[3].any()
    warnings = capsys.readouterr().err
    assert warnings.count("\n") == 1
    assert warnings.startswith("warning: 1 slices such as slice_3.png are not 8 × 8")
    assert "the other 3" in warnings


def fuzz_seeds() -> list[bytes]:
    """Synthetic slices as PNGs of every kind."""
    grey = Image.fromarray(phantom.slice_image(0, 1, 8, 32))
    flipped = grey.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    coloured = Image.merge("RGB", [grey, flipped, grey])
    images = [grey, deep, coloured, coloured.quantize(16), grey.convert("1"), Image.merge("LA", [grey, flipped])]
    seeds = []
    for image in [*images, Image.merge("RGBA", [grey, grey, grey, flipped])]:
        file = io.BytesIO()
        image.save(file, "PNG", dpi=(72, 72))
        seeds.append(file.getvalue())
    file = io.BytesIO()
    grey.save(file, "PNG", save_all=True, append_images=[flipped])
    return [*seeds, file.getvalue()]


SEEDS = fuzz_seeds()
CHUNKS = [b"IHDR", b"IDAT", b"IEND", b"PLTE", b"tRNS", b"iCCP", b"zTXt", b"iTXt", b"eXIf", b"acTL", b"fcTL", b"fdAT"]
SIDES = [0, 1, 31, 32, 33, 4096, 4097, 2**31 - 1, 2**32 - 1]


def damage(chunks: list[tuple[bytes, bytes]], draw) -> None:
    """Change a byte of one chunk of a PNG, cut, drop, double or rename it, or state a wrong image size."""
    i = draw(st.integers(0, len(chunks) - 1))
    kind, content = chunks[i]
    how = draw(st.sampled_from(["change", "cut", "drop", "double", "rename", "size"]))
    if how == "change" and content:
        at = draw(st.integers(0, len(content) - 1))
        chunks[i] = kind, content[:at] + bytes([draw(st.integers(0, 255))]) + content[at + 1 :]
    elif how == "cut":
        chunks[i] = kind, content[: draw(st.integers(0, len(content)))]
    elif how == "drop" and len(chunks) > 1:
        del chunks[i]
    elif how == "double":
        chunks.insert(draw(st.integers(0, len(chunks))), (kind, content))
    elif how == "rename":
        chunks[i] = draw(st.sampled_from(CHUNKS)), content
    elif how == "size":
        width, height = draw(st.sampled_from(SIDES)), draw(st.sampled_from(SIDES))
        chunks[0] = b"IHDR", struct.pack(">II", width, height) + chunks[0][1][8:]


@st.composite
def damaged_pngs(draw) -> bytes:
    """A damaged PNG: damaged chunks with correct checksums, so that the damage reaches the decoder, overwritten bytes,
    a missing end, or all of these."""
    seed, chunks, at = draw(st.sampled_from(SEEDS)), [], 8
    while at < len(seed):
        length = int.from_bytes(seed[at : at + 4], "big")
        chunks.append((seed[at + 4 : at + 8], seed[at + 8 : at + 8 + length]))
        at += 12 + length
    for _ in range(draw(st.integers(0, 3))):
        damage(chunks, draw)
    content = bytearray(pngs.PNG_SIGNATURE + b"".join(chunk(*parts) for parts in chunks))
    for _ in range(draw(st.integers(0, 3))):
        content[draw(st.integers(0, len(content) - 1))] = draw(st.integers(0, 255))
    return bytes(content[: draw(st.integers(0, len(content))) if draw(st.booleans()) else None])


@given(content=damaged_pngs())
def test_damaged_pngs_are_read_or_refused_by_name(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "fuzz.png"
    path.write_bytes(content)
    crop, side = pngs.choose_crop([path], None)
    assert 0 <= crop <= side
    image, refused = None, ""
    try:
        image = pngs.decode(path, 16, crop).grey
    except pngs.DataError as error:
        refused = str(error)
    if image is None:
        assert refused.startswith(f"{path}: ")
    else:
        assert image.dtype == np.uint8
        assert image.shape == (16, 16)
