import io
import os
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import augmentation
import console
import dataset
import naming
import phantom


def save_blank(path: Path, value: int = 100) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (8, 8), value).save(path)
    return path


def save_subject(folder: Path, subject: int) -> None:
    for position in range(2):
        save_blank(folder / f"case_{subject:03d}_slice_{position}.nii.png", subject)


def make_layout(root: Path, layout: str) -> Path:
    """Ten subjects in one of the layouts; returns the data_dir."""
    split_names = {
        "course": [f"keras_png_slices_{s}" for s in ("train", "validate", "test")],
        "course, from above": [f"keras_png_slices_data/keras_png_slices_{s}" for s in ("train", "validate", "test")],
        "course, from within": [f"keras_png_slices_{s}" for s in ("train", "validate", "test")],
        "val": ["train", "val", "test"],
        "valid, one level below": ["train/files", "valid/files", "test/files"],
        "flat": [""] * 3,
        "flat, one level below": ["files"] * 3,
    }[layout]
    for subject in range(10):
        save_subject(root / split_names[0 if subject < 6 else 1 if subject < 8 else 2], subject)
    return root / split_names[0] if layout == "course, from within" else root


LAYOUTS = [
    "course",
    "course, from above",
    "course, from within",
    "val",
    "valid, one level below",
    "flat",
    "flat, one level below",
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_found_and_no_subject_is_in_two_splits(tmp_path, layout):
    splits = dataset.find(make_layout(tmp_path, layout))
    subjects = {split: {file.subject for file in files} for split, files in splits.items()}
    assert list(splits) == ["train", "validate", "test"]
    assert sum(len(files) for files in splits.values()) == 20
    assert not subjects["train"] & subjects["validate"]
    assert not subjects["train"] & subjects["test"]
    assert not subjects["validate"] & subjects["test"]
    assert [len(names) for names in subjects.values()] == ([8, 1, 1] if "flat" in layout else [6, 2, 2])
    assert {file.position for file in splits["train"]} == {0, 1}


def test_masks_are_ignored(tmp_path):
    data_dir = make_layout(tmp_path, "course")
    for split in ("train", "validate", "test"):
        save_blank(data_dir / f"keras_png_slices_seg_{split}" / "seg_001_slice_0.nii.png")
        save_blank(data_dir / f"keras_png_slices_{split}" / "seg_001_slice_0.nii.png")
        save_blank(data_dir / f"keras_png_slices_{split}" / "masks" / "case_001_slice_0.nii.png")
    assert sum(len(files) for files in dataset.find(data_dir).values()) == 20


def test_the_split_of_a_flat_folder_depends_on_the_seed_only(tmp_path):
    data_dir = make_layout(tmp_path, "flat")
    assert dataset.find(data_dir, seed=1) == dataset.find(data_dir, seed=1)
    assert any(dataset.find(data_dir, seed=1) != dataset.find(data_dir, seed=seed) for seed in (2, 3, 4))


SESSIONS = {  # Names of a person's slices in two sessions.
    "OASIS": ("OAS1_{:04d}_MR1_slice_12.png", "OAS1_{:04d}_MR2_slice_12.png"),
    "OASIS, one folder per session": ("OAS1_{:04d}_MR1/slice_12.png", "OAS1_{:04d}_MR2/slice_12.png"),
    "BIDS": ("sub-{:02d}_ses-01_slice_12.png", "sub-{:02d}_ses-02_slice_12.png"),
    "oasis.py": ("case_{:03d}_slice_12.nii.png", "case_{:03d}_slice_12_session_2.nii.png"),
}


@pytest.mark.parametrize("scheme", SESSIONS)
def test_all_sessions_of_a_person_are_in_the_same_split(tmp_path, capsys, scheme):
    for person in range(20):
        for session, name in enumerate(SESSIONS[scheme]):
            save_blank(tmp_path / name.format(person), 2 * person + session)
    splits = dataset.find(tmp_path)
    subjects = {split: [file.subject for file in files] for split, files in splits.items()}
    assert {split: len(set(names)) for split, names in subjects.items()} == {"train": 16, "validate": 2, "test": 2}
    assert all(names.count(name) == 2 for names in subjects.values() for name in names)
    assert {file.position for files in splits.values() for file in files} == {12}
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("scheme", SESSIONS)
def test_a_person_with_a_session_in_each_of_two_splits_is_refused(data_dir, capsys, scheme):
    first, second = (name.format(9).replace("/", "_") for name in SESSIONS[scheme])
    brain(230).save(data_dir / "keras_png_slices_train" / first)
    assert load(data_dir, capsys) == ""
    path = data_dir / "keras_png_slices_test" / second
    brain(231).save(path)
    assert_refused(data_dir, capsys, path, first, "train split", "test split", "keep all slices of a subject")


def test_a_person_can_have_several_slices_at_the_same_position(data_dir, capsys):
    brain(230).save(data_dir / "keras_png_slices_train" / "case_003_slice_1_session_2.nii.png")
    assert load(data_dir, capsys) == ""
    train = dataset.load(data_dir, 8, seed=0)["train"]
    of_person = train.positions[train.subjects == "case_003"]
    assert sorted(of_person) == [0, 1, 1]


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
    image = dataset.decode_png(tmp_path / "slice.png", 8).grey
    assert image.dtype == np.uint8
    assert image.shape == (8, 8)
    assert np.all(image == 100)


def test_transparent_pixels_are_black(tmp_path):
    Image.new("LA", (8, 8), (100, 0)).save(tmp_path / "slice.png")
    assert not dataset.decode_png(tmp_path / "slice.png", 8).grey.any()


def test_slices_are_padded_not_distorted(tmp_path):
    image = np.zeros((40, 20), np.uint8)
    image[10:30, 5:15] = 200  # twice as high as it is wide
    Image.fromarray(image).save(tmp_path / "slice.png")
    read = dataset.decode_png(tmp_path / "slice.png", 40).grey
    assert np.array_equal(read[:, 10:30], image)
    assert not read[:, :10].any()
    assert not read[:, 30:].any()


def test_resizing_is_antialiased(tmp_path):
    stripes = np.zeros((64, 64), np.uint8)
    stripes[:, ::2] = 200
    Image.fromarray(stripes).save(tmp_path / "slice.png")
    read = dataset.decode_png(tmp_path / "slice.png", 16).grey[:, 2:-2]
    assert read.min() > 80  # near the mean of 100; without a filter it would be 0 or 200
    assert read.max() < 120


# ------------------------------------------------------------------------------------------- bad input


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, rows: bytes, depth: int = 8, colour: int = 0, interlaced: int = 0) -> bytes:
    """The content of a PNG file. `rows` are its pixels, each row after a 0 byte."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced)
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    return dataset.PNG_SIGNATURE + b"".join(parts)


def brain(value: int = 0) -> Image.Image:
    """A small image of several grey levels, which depend on `value`."""
    grey = np.zeros((8, 8), np.uint8)
    grey[2:6, 2:6] = np.arange(16).reshape(4, 4) + value
    return Image.fromarray(grey)


@pytest.fixture
def data_dir(tmp_path) -> Path:
    """A folder in the course's layout: six subjects with two good slices each."""
    for subject, split in enumerate(("train", "train", "train", "train", "validate", "test")):
        folder = tmp_path / f"keras_png_slices_{split}"
        folder.mkdir(exist_ok=True)
        for position in range(2):
            brain(20 * subject + position).save(folder / f"case_{subject:03d}_slice_{position}.nii.png")
    return tmp_path


def load(folder: Path, capsys, **options) -> str:
    """Load slices; returns the warnings, followed by the error message if loading is refused."""
    capsys.readouterr()
    refused = ""
    try:
        for slices in dataset.load(folder, 8, seed=0, **options).values():
            assert slices.images.dtype == np.uint8
            assert slices.images.shape[1:] == (8, 8, 1)
    except dataset.DataError as error:
        refused = console.one_line(error)
    return capsys.readouterr().err + refused


def assert_refused(folder: Path, capsys, name: object, *contents: str) -> None:
    """Check that loading ends in one line that begins with the name of a file or folder and has these contents."""
    message = load(folder, capsys)
    assert message.startswith(f"{name}: ")
    assert "\n" not in message
    for content in contents:
        assert content in message


SKIP_BROKEN = "--skip-broken-slices"
BROKEN_FILES = {
    "zero bytes": (b"", "is empty"),
    "a JPEG": ("JPEG", "not a PNG"),
    "a JPEG in CMYK": ("CMYK", "not a PNG"),
    "a GIF": ("GIF", "not a PNG"),
    "text": (b"case_001", "not a PNG"),
    "only the signature": (dataset.PNG_SIGNATURE, "no header"),
    "no header": (dataset.PNG_SIGNATURE + b"x" * 40, "no header"),
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
def test_a_broken_file_is_refused_or_left_out_by_name(data_dir, capsys, kind):
    content, problem = BROKEN_FILES[kind]
    bad = data_dir / "keras_png_slices_validate" / "case_004_slice_1.nii.png"
    write_broken(bad, content)
    assert_refused(data_dir, capsys, bad, problem, SKIP_BROKEN)
    warnings = load(data_dir, capsys, skip_broken=True)
    assert warnings.startswith("warning: ")
    assert warnings.count("\n") == 1
    assert f"{bad}: " in warnings
    assert problem in warnings


def test_links_and_pipes_are_refused_by_name(data_dir, capsys):
    bad = data_dir / "keras_png_slices_train" / "case_000_slice_2.png"
    bad.symlink_to(bad)
    assert_refused(data_dir, capsys, bad, "Too many levels of symbolic links", SKIP_BROKEN)
    bad.unlink()
    bad.symlink_to(data_dir / "gone.png")
    assert_refused(data_dir, capsys, bad, "No such file", SKIP_BROKEN)
    bad.unlink()
    os.mkfifo(bad)  # Reading it would never end.
    assert_refused(data_dir, capsys, bad, "not a regular file", SKIP_BROKEN)


def test_a_file_without_read_permission(data_dir, capsys, monkeypatch):
    def refuse(path, mode):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(dataset, "open", refuse, raising=False)
    bad = data_dir / "keras_png_slices_train" / "case_000_slice_0.nii.png"
    assert_refused(data_dir, capsys, bad, "Permission denied", SKIP_BROKEN)


def test_a_folder_without_read_permission(data_dir, capsys, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert_refused(data_dir, capsys, data_dir, "Permission denied", "check its permissions")


def test_a_split_without_readable_slices(data_dir, capsys):
    for path in (data_dir / "keras_png_slices_test").iterdir():
        path.write_bytes(b"")
    with pytest.raises(dataset.DataError) as error:
        dataset.load(data_dir, 8, seed=0, skip_broken=True)
    assert str(error.value).startswith(f"{data_dir}: ")
    assert "test split" in str(error.value)
    assert capsys.readouterr().err.count("left out") == 2


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
def test_unusual_pngs_are_read_without_a_warning(data_dir, capsys, kind):
    (data_dir / "keras_png_slices_train" / "case_000_slice_2.png").write_bytes(GOOD_FILES[kind])
    assert load(data_dir, capsys) == ""


ODD_FILES = {
    "animated": (lambda path: brain(200).save(path, save_all=True, append_images=[brain(201)]), "first frame"),
    "colour": (
        lambda path: Image.merge("RGB", [brain(200), brain(210), brain(220)]).save(path),
        "in colour: they are converted to grey",
    ),
    "black": (lambda path: save_blank(path, 0), "a single grey level"),
    "constant": (lambda path: save_blank(path, 100), "a single grey level"),
    "transparent": (lambda path: Image.new("LA", (8, 8), (100, 0)).save(path), "a single grey level"),
}


@pytest.mark.parametrize("kind", ODD_FILES)
def test_odd_slices_are_used_and_counted_in_one_warning(data_dir, capsys, kind):
    save, oddity = ODD_FILES[kind]
    for position in (2, 3):
        save(data_dir / "keras_png_slices_train" / f"case_000_slice_{position}.png")
    warnings = load(data_dir, capsys)
    assert warnings.count("\n") == 1
    assert warnings.startswith("warning: 2 slices such as case_000_slice_2.png")
    assert oddity in warnings


def test_mixed_sizes_are_used_and_counted(data_dir, capsys):
    brain().resize((16, 16)).save(data_dir / "keras_png_slices_train" / "case_000_slice_2.png")
    warnings = load(data_dir, capsys)
    assert warnings.count("\n") == 1
    assert warnings.startswith("warning: 1 slices such as case_000_slice_2.png are not 8 × 8")
    assert "the other 12" in warnings


def test_files_that_name_no_subject_count_as_subjects_of_their_own(tmp_path, capsys):
    for i in range(10):
        brain(i).save(tmp_path / f"brain{i}.png")
    warnings = load(tmp_path, capsys)
    assert warnings.count("\n") == 1
    assert warnings.startswith("warning: 10 files such as brain")
    assert "case_001_slice_0.nii.png" in warnings
    assert [len(files) for files in dataset.find(tmp_path).values()] == [8, 1, 1]


@pytest.mark.parametrize(
    "name", ["Gehirn größer_slice_7.png", "脑 01_slice_7.png", "a b  c_slice_7.PNG", "a\nb_slice_7.png"]
)
def test_any_name_is_accepted_and_stays_on_one_line(data_dir, capsys, name):
    path = data_dir / "keras_png_slices_train" / name
    brain(200).save(path, "PNG")
    assert load(data_dir, capsys) == ""
    found = [file for file in dataset.find(data_dir)["train"] if file.path == path]
    assert (found[0].subject, found[0].position) == (name[: name.index("_slice")], 7)
    path.write_bytes(b"")
    assert_refused(data_dir, capsys, console.one_line(path), "is empty")


def test_a_name_that_is_not_valid_text_is_escaped(data_dir, capsys):
    path = os.fsencode(data_dir / "keras_png_slices_train") + b"/case_\xff_slice_1.png"
    Path(os.fsdecode(path)).write_bytes(b"")
    assert_refused(data_dir, capsys, f"{data_dir}/keras_png_slices_train/case_\\xff_slice_1.png", "is empty")


def test_folders_that_link_to_each_other_are_read_once(data_dir, capsys):
    (data_dir / "keras_png_slices_train" / "again").symlink_to(data_dir / "keras_png_slices_train")
    (data_dir / "keras_png_slices_train" / "loop").symlink_to(data_dir / "keras_png_slices_train" / "loop")
    assert len(dataset.find(data_dir)["train"]) == 8
    assert load(data_dir, capsys) == ""


def test_a_data_dir_that_links_to_itself(tmp_path, capsys):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert_refused(tmp_path / "loop", capsys, tmp_path / "loop", "symbolic links", "set data_dir")


def test_a_data_dir_that_does_not_exist(tmp_path, capsys):
    assert_refused(tmp_path / "nowhere", capsys, tmp_path / "nowhere", "no such folder", "set data_dir")


def test_a_data_dir_that_is_a_file(tmp_path, capsys):
    path = save_blank(tmp_path / "case_001_slice_0.png")
    assert_refused(path, capsys, path, "is a file", "set data_dir")


@pytest.mark.parametrize("name", ["volume.nii.gz", "disc1.tar.gz"])
def test_volumes_are_to_be_converted_first(tmp_path, capsys, name):
    (tmp_path / name).write_bytes(b"")
    for source in (tmp_path, tmp_path / name):
        assert_refused(source, capsys, source, "volumes", f"python oasis.py {source}")


def test_an_empty_folder(tmp_path, capsys):
    assert_refused(tmp_path, capsys, tmp_path, "is empty", "set data_dir")


def test_a_folder_without_pngs(tmp_path, capsys):
    (tmp_path / "case_001_slice_0.jpg").write_bytes(b"")
    assert_refused(tmp_path, capsys, tmp_path, "no PNG files", "set data_dir")


def test_a_folder_of_masks_only(tmp_path, capsys):
    save_blank(tmp_path / "seg_001_slice_0.nii.png")
    assert_refused(tmp_path, capsys, tmp_path, "only masks", "set data_dir")


def test_slices_too_many_levels_below(tmp_path, capsys):
    save_blank(tmp_path / "a" / "b" / "case_001_slice_0.png")
    assert_refused(tmp_path, capsys, tmp_path, "more than one level below", "set data_dir")


def test_a_missing_split(data_dir, capsys):
    shutil.rmtree(data_dir / "keras_png_slices_test")
    assert_refused(data_dir, capsys, data_dir, "no test folder", "add it")
    shutil.rmtree(data_dir / "keras_png_slices_validate")
    assert_refused(data_dir, capsys, data_dir, "no validate and no test folder", "add it")


def test_an_empty_split(data_dir, capsys):
    folder = data_dir / "keras_png_slices_validate"
    for path in folder.iterdir():
        path.unlink()
    assert_refused(data_dir, capsys, folder, "no PNG slices", "validate split")


def test_a_subject_in_two_splits(data_dir, capsys):
    path = data_dir / "keras_png_slices_test" / "case_001_slice_9.png"
    brain(250).save(path)
    assert_refused(data_dir, capsys, path, "case_001", "train split", "test split", "keep all slices of a subject")


def test_an_image_in_two_splits_under_two_names(data_dir, capsys):
    first = data_dir / "keras_png_slices_train" / "case_001_slice_1.nii.png"
    second = data_dir / "keras_png_slices_test" / "case_077_slice_1.nii.png"
    shutil.copy(first, second)
    assert_refused(data_dir, capsys, second, str(first), "train split", "keep all slices of a subject")


def test_two_subjects_are_too_few_for_three_splits(tmp_path, capsys):
    save_subject(tmp_path, 1)
    save_subject(tmp_path, 2)
    assert_refused(tmp_path, capsys, tmp_path, "2 subjects", "at least 3")


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
    content = bytearray(dataset.PNG_SIGNATURE + b"".join(chunk(*parts) for parts in chunks))
    for _ in range(draw(st.integers(0, 3))):
        content[draw(st.integers(0, len(content) - 1))] = draw(st.integers(0, 255))
    return bytes(content[: draw(st.integers(0, len(content))) if draw(st.booleans()) else None])


@given(content=damaged_pngs())
def test_damaged_pngs_are_read_or_refused_by_name(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "fuzz.png"
    path.write_bytes(content)
    image, refused = None, ""
    try:
        image = dataset.decode_png(path, 16).grey
    except dataset.DataError as error:
        refused = str(error)
    if image is None:
        assert refused.startswith(f"{path}: ")
    else:
        assert image.dtype == np.uint8
        assert image.shape == (16, 16)


# --------------------------------------------------------------------------------------------- feeding


def make_slices(count: int) -> dataset.Slices:
    """Slices of 4 × 4 pixels, whose intensity is their index and their position."""
    images = np.arange(count, dtype=np.uint8).repeat(16).reshape(count, 4, 4, 1)
    return dataset.Slices(images, np.arange(count, dtype=np.int32), np.array(["case"] * count))


def test_batches_contain_float_images_with_their_positions():
    batches = list(dataset.image_batches(make_slices(10), 4))
    assert [len(positions) for _, positions in batches] == [4, 4, 2]
    for images, positions in batches:
        assert images.dtype == tf.float32
        assert images.shape[1:] == (4, 4, 1)
        np.testing.assert_allclose(images[:, 0, 0, 0], positions.numpy() / 255, rtol=1e-6)


def epoch_order(epoch: int, seed: int = 0) -> list[int]:
    batches = dataset.image_batches(make_slices(12), 4, seed=seed, first_epoch=epoch).take(3)
    return np.concatenate([positions.numpy() for _, positions in batches]).tolist()


def test_the_order_of_slices_is_a_function_of_seed_and_epoch():
    from_the_start = dataset.image_batches(make_slices(12), 4, seed=0).take(9)
    orders = np.concatenate([positions.numpy() for _, positions in from_the_start]).reshape(3, 12).tolist()
    assert orders == [epoch_order(0), epoch_order(1), epoch_order(2)]
    assert all(sorted(order) == list(range(12)) for order in orders)
    assert orders[0] != orders[1]
    assert epoch_order(0, seed=1) != orders[0]


def test_shuffled_epochs_have_full_batches_only():
    assert [dataset.steps_per_epoch(count, 4) for count in (12, 15, 3)] == [3, 3, 1]
    sizes = [len(positions) for _, positions in dataset.image_batches(make_slices(15), 4, seed=0).take(6)]
    assert sizes == [4] * 6


def test_training_batches_are_augmented_as_drawn():
    brains = np.stack([phantom.slice_image(0, 1, position, 32)[..., None] for position in range(8)])
    slices = dataset.Slices(brains, np.arange(8, dtype=np.int32), np.array(["case"] * 8))
    images, positions = next(iter(dataset.image_batches(slices, 8, seed=1, first_epoch=2, augmented=True)))
    expected = augmentation.apply(
        tf.constant(dataset.to_float(brains[positions.numpy()])), augmentation.draw(8, seed=1, step=2)
    )
    np.testing.assert_allclose(images, expected, atol=1e-5)


def test_augmentation_is_a_function_of_seed_and_epoch():
    def third_epoch(first_epoch):
        batches = dataset.image_batches(make_slices(12), 4, seed=1, first_epoch=first_epoch, augmented=True)
        return [images.numpy() for images, _ in batches.skip(3 * (2 - first_epoch)).take(3)]

    for from_the_start, resumed in zip(third_epoch(0), third_epoch(2), strict=True):
        assert np.array_equal(from_the_start, resumed)


def test_the_shards_of_a_batch_make_up_the_whole():
    def batches(shard):
        of_training = dataset.image_batches(make_slices(13), 4, seed=1, augmented=True, shard=shard).take(3)
        return [*of_training, *dataset.image_batches(make_slices(10), 4, shard=shard)]

    for whole, *parts in zip(*(batches(shard) for shard in ((0, 1), (0, 2), (1, 2))), strict=True):
        for tensor, halves in zip(whole, zip(*parts, strict=True), strict=True):
            np.testing.assert_array_equal(tensor, np.concatenate(halves))


def test_code_batches_pair_codes_with_positions_and_targets():
    codes = np.arange(24, dtype=np.int32).reshape(6, 2, 2)
    positions = np.arange(6, dtype=np.int32)
    conditioning = {"positions": positions, "coarse": codes[:, :1, :1]}
    inputs, targets = next(iter(dataset.code_batches({**conditioning, "codes": codes}, 4, seed=0)))
    assert inputs.keys() == {"codes", "positions", "coarse"}
    np.testing.assert_array_equal(inputs["codes"], targets)
    np.testing.assert_array_equal(targets[:, 0, 0], inputs["positions"].numpy() * 4)
    np.testing.assert_array_equal(inputs["coarse"][:, 0, 0], inputs["positions"].numpy() * 4)


def test_synthetic_slices_are_split_by_subject(monkeypatch):
    monkeypatch.setattr(phantom, "NUM_POSITIONS", 2)
    slices = dataset.load(None, 32, seed=1, synthetic_subjects=10)
    assert [len(slices[split]) for split in naming.SPLITS] == [16, 2, 2]
    assert not set(slices["train"].subjects) & set(slices["test"].subjects)
    train = slices["train"]
    subject = int(train.subjects[-1].removeprefix("case_"))
    assert np.array_equal(train.images[-1, ..., 0], phantom.slice_image(1, subject, train.positions[-1], 32))


def test_the_fingerprint_depends_on_everything():
    slices = make_slices(4)
    variants = [
        {"train": slices},
        {"test": slices},
        {"train": dataset.Slices(slices.images[::-1], slices.positions, slices.subjects)},
        {"train": dataset.Slices(slices.images, slices.positions[::-1].copy(), slices.subjects)},
        {"train": dataset.Slices(slices.images, slices.positions, np.array(["other"] * 4))},
    ]
    assert len({dataset.fingerprint(variant) for variant in variants}) == len(variants)
    assert dataset.fingerprint({"train": make_slices(4)}) == dataset.fingerprint(variants[0])


def test_pixel_variance():
    images = np.random.default_rng(0).integers(0, 256, (5, 6, 6, 1), np.uint8)
    slices = dataset.Slices(images, np.zeros(5, np.int32), np.array(["case"] * 5))
    assert dataset.pixel_variance(slices) == pytest.approx((images / 255).var())
    blank = dataset.Slices(np.zeros_like(images), slices.positions, slices.subjects)
    assert dataset.pixel_variance(blank) == 1e-6


def test_real_slices():
    if "OASIS_DIR" not in os.environ:
        pytest.skip("no real slices: set OASIS_DIR to the folder that holds them")
    for slices in dataset.load(Path(os.environ["OASIS_DIR"]), 96, seed=0).values():
        assert 0.1 < (slices.images > 12).mean() < 0.5
