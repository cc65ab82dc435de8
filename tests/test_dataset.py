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

import dataset
import phantom


def put(path: Path, value: int = 100, size=(8, 8), mode: str = "L") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value).save(path)
    return path


def put_case(folder: Path, case: int, slices: int = 2) -> None:
    for position in range(slices):
        put(folder / f"case_{case:03d}_slice_{position}.nii.png", case)


def make_layout(root: Path, layout: str) -> Path:
    """Ten cases in one of the layouts; returns the data_dir."""
    split_names = {
        "course": [f"keras_png_slices_{s}" for s in ("train", "validate", "test")],
        "course, from above": [f"keras_png_slices_data/keras_png_slices_{s}" for s in ("train", "validate", "test")],
        "course, from within": [f"keras_png_slices_{s}" for s in ("train", "validate", "test")],
        "val": ["train", "val", "test"],
        "valid, one level below": ["train/files", "valid/files", "test/files"],
        "flat": [""] * 3,
        "flat, one level below": ["files"] * 3,
    }[layout]
    for case in range(10):
        put_case(root / split_names[0 if case < 6 else 1 if case < 8 else 2], case)
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
def test_every_layout_is_found_and_no_person_is_in_two_splits(tmp_path, layout):
    splits = dataset.find(make_layout(tmp_path, layout))
    cases = {split: {file.case for file in files} for split, files in splits.items()}
    assert list(splits) == ["train", "validate", "test"]
    assert sum(len(files) for files in splits.values()) == 20
    assert not cases["train"] & cases["validate"]
    assert not cases["train"] & cases["test"]
    assert not cases["validate"] & cases["test"]
    assert [len(c) for c in cases.values()] == ([8, 1, 1] if "flat" in layout else [6, 2, 2])
    assert {file.position for file in splits["train"]} == {0, 1}


def test_masks_are_never_taken_for_slices(tmp_path):
    data_dir = make_layout(tmp_path, "course")
    for split in ("train", "validate", "test"):
        put(data_dir / f"keras_png_slices_seg_{split}" / "seg_001_slice_0.nii.png")
        put(data_dir / f"keras_png_slices_{split}" / "seg_001_slice_0.nii.png")
        put(data_dir / f"keras_png_slices_{split}" / "masks" / "case_001_slice_0.nii.png")
    assert sum(len(files) for files in dataset.find(data_dir).values()) == 20


def test_a_flat_folder_is_split_by_the_seed_alone(tmp_path):
    data_dir = make_layout(tmp_path, "flat")
    assert dataset.find(data_dir, seed=1) == dataset.find(data_dir, seed=1)
    assert any(dataset.find(data_dir, seed=1) != dataset.find(data_dir, seed=seed) for seed in (2, 3, 4))


def test_other_names_of_people_are_read():
    file = dataset._slice_file(Path("x/OAS1_0001_MR1_slice_12.png"), Path("x"))
    assert (file.case, file.position) == ("OAS1_0001_MR1", 12)


KINDS = {
    "8-bit grey": lambda: Image.new("L", (8, 8), 100),
    "16-bit grey": lambda: Image.fromarray(np.full((8, 8), 100 * 257, np.uint16)),
    "RGB": lambda: Image.new("RGB", (8, 8), (100, 100, 100)),
    "palette": lambda: Image.new("RGB", (8, 8), (100, 100, 100)).quantize(4),
    "grey with alpha": lambda: Image.new("LA", (8, 8), (100, 255)),
    "RGB with alpha": lambda: Image.new("RGBA", (8, 8), (100, 100, 100, 255)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_png_becomes_grey(tmp_path, kind):
    KINDS[kind]().save(tmp_path / "slice.png")
    image = dataset.read_png(tmp_path / "slice.png", 8)
    assert image.dtype == np.uint8
    assert image.shape == (8, 8)
    assert np.all(image == 100)


def test_transparent_pixels_are_black(tmp_path):
    Image.new("LA", (8, 8), (100, 0)).save(tmp_path / "slice.png")
    assert not dataset.read_png(tmp_path / "slice.png", 8).any()


def test_slices_are_padded_not_stretched(tmp_path):
    image = np.zeros((40, 20), np.uint8)
    image[10:30, 5:15] = 200  # twice as high as wide
    Image.fromarray(image).save(tmp_path / "slice.png")
    read = dataset.read_png(tmp_path / "slice.png", 40)
    assert np.array_equal(read[:, 10:30], image)
    assert not read[:, :10].any()
    assert not read[:, 30:].any()


def test_resizing_is_antialiased(tmp_path):
    stripes = np.zeros((64, 64), np.uint8)
    stripes[:, ::2] = 200
    Image.fromarray(stripes).save(tmp_path / "slice.png")
    read = dataset.read_png(tmp_path / "slice.png", 16)[:, 2:-2]
    assert read.min() > 80  # near the mean of 100; without a filter it would be 0 or 200
    assert read.max() < 120


# ------------------------------------------------------------------------------------------- bad input


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, rows: bytes, depth: int = 8, colour: int = 0, interlaced: int = 0) -> bytes:
    """A PNG file made by hand: `rows` are its bytes of pixels, each row after a 0."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced)
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    return dataset.PNG_SIGNATURE + b"".join(parts)


def brain(value: int = 0) -> Image.Image:
    """A small picture that is not of one grey level and differs from any other value's."""
    grey = np.zeros((8, 8), np.uint8)
    grey[2:6, 2:6] = np.arange(16).reshape(4, 4) + value
    return Image.fromarray(grey)


@pytest.fixture
def people(tmp_path) -> Path:
    """A folder in the course's layout, six people of two good slices; returns it."""
    for case in range(6):
        folder = tmp_path / f"keras_png_slices_{('train', 'train', 'train', 'train', 'validate', 'test')[case]}"
        folder.mkdir(exist_ok=True)
        for position in range(2):
            brain(20 * case + position).save(folder / f"case_{case:03d}_slice_{position}.nii.png")
    return tmp_path


def load(data_dir: Path, capsys, **options) -> str:
    """What loading prints as warnings and, at last, as the line that refuses."""
    capsys.readouterr()
    try:
        loaded = dataset.load(data_dir, 8, seed=0, **options)
        assert all(held.images.dtype == np.uint8 and held.images.shape[1:] == (8, 8, 1) for held in loaded.values())
        refused = ""
    except dataset.DataError as error:
        refused = dataset.one_line(error)
    return capsys.readouterr().err + refused


REPLACE = "; replace or remove it, or leave such files out: --skip-broken-slices"
BROKEN_FILES = {
    "zero bytes": (b"", "is empty"),
    "a JPEG": ("JPEG", "is not a PNG image, whatever its name says"),
    "a JPEG in CMYK": ("CMYK", "is not a PNG image, whatever its name says"),
    "a GIF": ("GIF", "is not a PNG image, whatever its name says"),
    "text": (b"case_001", "is not a PNG image, whatever its name says"),
    "the signature alone": (dataset.PNG_SIGNATURE, "is a broken PNG (it has no header)"),
    "no header": (dataset.PNG_SIGNATURE + b"x" * 40, "is a broken PNG (it has no header)"),
    "truncated in the pixels": (
        png(8, 8, bytes(range(72)))[:-40],
        "is a broken PNG (unrecognized data stream contents when reading image file)",
    ),
    "too few pixels": (
        png(8, 8, bytes(30)),
        "is a broken PNG (image file is truncated (0 bytes not processed))",
    ),
    "enormous": (
        png(50_000, 50_000, b""),
        "is 50000 × 50000 pixels, too large for a slice (at most 4096 a side)",
    ),
    "no pixels wide": (png(0, 8, b""), "is a broken PNG (its header makes no sense)"),
    "two headers": (
        png(8, 8, bytes(72))[:33] + png(9, 9, bytes(90))[8:],
        "is a broken PNG (its size changes within the file)",
    ),
    "CMYK, which PNG has not": (
        png(8, 8, bytes(8 * 33), colour=5),
        "is a broken PNG (its header makes no sense)",
    ),
    "9 bits a pixel": (png(8, 8, bytes(100), depth=9), "is a broken PNG (its header makes no sense)"),
}


def write_broken(path: Path, content: bytes | str) -> None:
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        Image.new("CMYK" if content == "CMYK" else "L", (8, 8)).save(path, "JPEG" if content == "CMYK" else content)


@pytest.mark.parametrize("kind", BROKEN_FILES)
def test_a_file_that_cannot_be_read_is_refused_by_name(people, capsys, kind):
    content, message = BROKEN_FILES[kind]
    bad = people / "keras_png_slices_validate" / "case_004_slice_1.nii.png"
    write_broken(bad, content)
    assert load(people, capsys) == f"{bad}: {message}{REPLACE}"
    assert load(people, capsys, skip_broken=True) == f"warning: left out: {bad}: {message}\n"


def test_what_is_no_file_is_refused_by_name(people, capsys):
    bad = people / "keras_png_slices_train" / "case_000_slice_2.png"
    bad.symlink_to(bad)
    assert load(people, capsys) == f"{bad}: Too many levels of symbolic links{REPLACE}"
    bad.unlink()
    bad.symlink_to(people / "gone.png")
    assert load(people, capsys) == f"{bad}: No such file or directory{REPLACE}"
    bad.unlink()
    os.mkfifo(bad)  # would never end if it were read
    assert load(people, capsys) == f"{bad}: is not a file{REPLACE}"


def test_a_file_that_may_not_be_read(people, capsys, monkeypatch):
    def refuse(path, mode):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(dataset, "open", refuse, raising=False)
    bad = people / "keras_png_slices_train" / "case_000_slice_0.nii.png"
    assert load(people, capsys) == f"{bad}: Permission denied{REPLACE}"


def test_a_folder_that_may_not_be_read(people, capsys, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert load(people, capsys) == f"{people}: cannot be read (Permission denied); check its permissions"


def test_a_split_of_which_nothing_can_be_read(people, capsys):
    for path in (people / "keras_png_slices_test").iterdir():
        path.write_bytes(b"")
    printed = load(people, capsys, skip_broken=True).splitlines()
    assert len(printed) == 3
    assert printed[-1] == f"{people}: no slice of the test split can be read; replace the broken files"


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
def test_unusual_pngs_are_read_without_a_word(people, capsys, kind):
    (people / "keras_png_slices_train" / "case_000_slice_2.png").write_bytes(GOOD_FILES[kind])
    assert load(people, capsys) == ""


ODD_FILES = {
    "animated": (
        lambda path: brain(200).save(path, save_all=True, append_images=[brain(201)]),
        "animated: only the first picture of each is used",
    ),
    "colour": (
        lambda path: Image.merge("RGB", [brain(200), brain(210), brain(220)]).save(path),
        "in colour: converted to grey",
    ),
    "black": (lambda path: put(path, 0), "of one grey level all over: used, but no brains"),
    "constant": (lambda path: put(path, 100), "of one grey level all over: used, but no brains"),
    "transparent": (
        lambda path: Image.new("LA", (8, 8), (100, 0)).save(path),
        "of one grey level all over: used, but no brains",
    ),
}


@pytest.mark.parametrize("kind", ODD_FILES)
def test_odd_slices_are_used_and_counted_in_one_warning(people, capsys, kind):
    save, message = ODD_FILES[kind]
    for position in (2, 3):
        save(people / "keras_png_slices_train" / f"case_000_slice_{position}.png")
    assert load(people, capsys) == f"warning: 2 slices such as case_000_slice_2.png are {message}\n"


def test_mixed_sizes_are_used_and_counted(people, capsys):
    brain().resize((16, 16)).save(people / "keras_png_slices_train" / "case_000_slice_2.png")
    assert load(people, capsys) == (
        "warning: 1 slices such as case_000_slice_2.png are not 8 × 8 as the other 12 are; all become 8 × 8, whatever "
        "a pixel was in millimetres\n"
    )


def test_names_without_a_case_count_as_people_of_their_own(tmp_path, capsys):
    for i in range(10):
        brain(i).save(tmp_path / f"brain{i}.png")
    printed = load(tmp_path, capsys)
    assert printed.count("\n") == 1
    assert printed.startswith("warning: 10 files such as brain")
    assert printed.endswith(
        ".png name no case and slice (case_001_slice_0.nii.png); each counts as a person of its own, at slice "
        "position 0\n"
    )
    assert [len(files) for files in dataset.find(tmp_path).values()] == [8, 1, 1]


@pytest.mark.parametrize(
    "name", ["Gehirn größer_slice_7.png", "脑 01_slice_7.png", "a b  c_slice_7.PNG", "a\nb_slice_7.png"]
)
def test_any_name_will_do_and_stays_on_one_line(people, capsys, name):
    path = people / "keras_png_slices_train" / name
    brain(200).save(path, "PNG")
    assert load(people, capsys) == ""
    found = [file for file in dataset.find(people)["train"] if file.path == path]
    assert (found[0].case, found[0].position) == (name[: name.index("_slice")], 7)
    path.write_bytes(b"")
    assert load(people, capsys) == f"{people}/keras_png_slices_train/{name}: is empty{REPLACE}".replace("\n", "\\n")


def test_a_name_that_is_no_text_is_escaped(people, capsys):
    path = os.fsencode(people / "keras_png_slices_train") + b"/case_\xff_slice_1.png"
    Path(os.fsdecode(path)).write_bytes(b"")
    printed = load(people, capsys)
    assert printed.encode() == f"{people}/keras_png_slices_train/case_\\udcff_slice_1.png: is empty{REPLACE}".encode()


def test_folders_that_link_in_circles_are_read_once(people, capsys):
    (people / "keras_png_slices_train" / "again").symlink_to(people / "keras_png_slices_train")
    (people / "keras_png_slices_train" / "loop").symlink_to(people / "keras_png_slices_train" / "loop")
    assert len(dataset.find(people)["train"]) == 8
    assert load(people, capsys) == ""


def test_a_data_dir_that_links_to_itself(tmp_path, capsys):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert load(tmp_path / "loop", capsys) == (
        f"{tmp_path}/loop: cannot be read (Too many levels of symbolic links); set data_dir to the folder with the PNG "
        "slices"
    )


def test_no_such_folder(tmp_path, capsys):
    assert load(tmp_path / "nowhere", capsys) == (
        f"{tmp_path}/nowhere: no such folder; set data_dir to the folder with the PNG slices"
    )


def test_a_file_for_a_folder(tmp_path, capsys):
    path = put(tmp_path / "case_001_slice_0.png")
    assert load(path, capsys) == f"{path}: is a file; set data_dir to the folder with the PNG slices"


def test_an_empty_folder(tmp_path, capsys):
    assert load(tmp_path, capsys) == f"{tmp_path}: is empty; set data_dir to the folder with the PNG slices"


def test_a_folder_without_pngs(tmp_path, capsys):
    (tmp_path / "case_001_slice_0.jpg").write_bytes(b"")
    assert load(tmp_path, capsys) == f"{tmp_path}: holds no PNG files; set data_dir to the folder with the PNG slices"


def test_a_folder_of_masks_only(tmp_path, capsys):
    put(tmp_path / "seg_001_slice_0.nii.png")
    assert load(tmp_path, capsys) == (
        f"{tmp_path}: holds masks only, no slices; set data_dir to the folder with the PNG slices"
    )


def test_slices_too_far_down(tmp_path, capsys):
    put(tmp_path / "a" / "b" / "case_001_slice_0.png")
    assert load(tmp_path, capsys) == (
        f"{tmp_path}: holds PNGs only more than one folder down; set data_dir to the folder with the PNG slices"
    )


def test_a_split_that_is_missing(people, capsys):
    shutil.rmtree(people / "keras_png_slices_test")
    assert load(people, capsys) == (
        f"{people}: has keras_png_slices_train, keras_png_slices_validate but no test folder; add it, or put all PNGs "
        "in one folder"
    )
    shutil.rmtree(people / "keras_png_slices_validate")
    assert load(people, capsys) == (
        f"{people}: has keras_png_slices_train but no validate and no test folder; add it, or put all PNGs in one "
        "folder"
    )


def test_a_split_that_is_empty(people, capsys):
    for path in (people / "keras_png_slices_validate").iterdir():
        path.unlink()
    assert load(people, capsys) == (
        f"{people}/keras_png_slices_validate: no PNG slices in it; put the validate slices there"
    )


def test_a_person_in_two_splits(people, capsys):
    brain(250).save(people / "keras_png_slices_test" / "case_001_slice_9.png")
    assert load(people, capsys) == (
        f"{people}/keras_png_slices_test/case_001_slice_9.png: case_001 is in train as well as in test; keep all "
        "slices of a person in one split"
    )


def test_a_picture_in_two_splits_under_two_names(people, capsys):
    first, again = (people / f"keras_png_slices_{name}" for name in ("train/case_001_slice_1", "test/case_077_slice_1"))
    shutil.copy(f"{first}.nii.png", f"{again}.nii.png")
    assert load(people, capsys) == (
        f"{again}.nii.png: is the same picture as {first}.nii.png of the train split; keep all slices of a person in "
        "one split"
    )


def test_two_people_are_too_few_for_three_splits(tmp_path, capsys):
    put_case(tmp_path, 1)
    put_case(tmp_path, 2)
    assert load(tmp_path, capsys) == (f"{tmp_path}: too few people for three splits; add slices of at least 3 cases")


def fuzz_seeds() -> list[bytes]:
    """PNGs of every kind, of synthetic slices."""
    grey = Image.fromarray(phantom.slice_image(0, 1, 8, 32))
    mirrored = grey.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    coloured = Image.merge("RGB", [grey, mirrored, grey])
    pictures = [grey, deep, coloured, coloured.quantize(16), grey.convert("1"), Image.merge("LA", [grey, mirrored])]
    seeds = []
    for picture in [*pictures, Image.merge("RGBA", [grey, grey, grey, mirrored])]:
        file = io.BytesIO()
        picture.save(file, "PNG", dpi=(72, 72))
        seeds.append(file.getvalue())
    file = io.BytesIO()
    grey.save(file, "PNG", save_all=True, append_images=[mirrored])
    return [*seeds, file.getvalue()]


SEEDS = fuzz_seeds()
CHUNKS = [b"IHDR", b"IDAT", b"IEND", b"PLTE", b"tRNS", b"iCCP", b"zTXt", b"iTXt", b"eXIf", b"acTL", b"fcTL", b"fdAT"]
SIDES = [0, 1, 31, 32, 33, 4096, 4097, 2**31 - 1, 2**32 - 1]


def damage(chunks: list[tuple[bytes, bytes]], draw) -> None:
    """Flip, cut, drop, double or rename one chunk of a PNG, or lie about its size."""
    i = draw(st.integers(0, len(chunks) - 1))
    kind, content = chunks[i]
    how = draw(st.sampled_from(["flip", "cut", "drop", "double", "rename", "size"]))
    if how == "flip" and content:
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
    """A PNG with damaged chunks whose checksums are right, so that the damage reaches the decoder; or bytes of it
    overwritten; or its end cut off; or all of that."""
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
        image = dataset.read_png(path, 16)
    except dataset.DataError as error:
        refused = str(error)
    if image is None:
        assert refused.startswith(f"{path}: ")
    else:
        assert image.dtype == np.uint8
        assert image.shape == (16, 16)


# --------------------------------------------------------------------------------------------- feeding


def slices(count: int) -> dataset.Slices:
    images = np.arange(count, dtype=np.uint8).repeat(16).reshape(count, 4, 4, 1)
    return dataset.Slices(images, np.arange(count, dtype=np.int32), np.array(["case"] * count))


def test_batches_hold_float_images_with_their_positions():
    batches = list(dataset.image_batches(slices(10), 4))
    assert [len(positions) for _, positions in batches] == [4, 4, 2]
    for images, positions in batches:
        assert images.dtype == tf.float32
        assert images.shape[1:] == (4, 4, 1)
        np.testing.assert_allclose(images[:, 0, 0, 0], positions.numpy() / 255, rtol=1e-6)


def epoch_order(epoch: int, seed: int = 0) -> list[int]:
    batches = dataset.image_batches(slices(12), 4, seed=seed, first_epoch=epoch).take(3)
    return np.concatenate([positions.numpy() for _, positions in batches]).tolist()


def test_shuffles_are_a_function_of_seed_and_epoch():
    from_the_start = dataset.image_batches(slices(12), 4, seed=0).take(9)
    orders = np.concatenate([positions.numpy() for _, positions in from_the_start]).reshape(3, 12).tolist()
    assert orders == [epoch_order(0), epoch_order(1), epoch_order(2)]  # begun later, an epoch is the same
    assert all(sorted(order) == list(range(12)) for order in orders)
    assert orders[0] != orders[1]
    assert epoch_order(0, seed=1) != orders[0]


def test_augmentation_keeps_brains_and_is_fixed_by_its_seed():
    brains = np.stack([dataset.phantom.slice_image(0, 1, p)[..., None] for p in range(0, 16, 2)])
    brains = tf.constant(dataset.to_float(brains))
    changed = dataset.augment(brains, (3, 5)).numpy()
    assert np.array_equal(changed, dataset.augment(brains, (3, 5)))
    assert not np.array_equal(changed, dataset.augment(brains, (3, 6)))
    assert changed.shape == brains.shape
    assert changed.min() >= 0
    assert changed.max() <= 1
    brightness = changed.sum(axis=(1, 2, 3)) / brains.numpy().sum(axis=(1, 2, 3))
    assert np.all(np.abs(brightness - 1) < 0.35)  # 10 % brighter and 21 % larger, at most
    assert len({round(float(b), 3) for b in brightness}) > 4  # each image is changed in its own way


def test_augmentation_is_a_function_of_seed_and_epoch():
    def third_epoch(first_epoch):
        batches = dataset.image_batches(slices(12), 4, seed=1, first_epoch=first_epoch, augmented=True)
        return [images.numpy() for images, _ in batches.skip(3 * (2 - first_epoch)).take(3)]

    for from_the_start, begun_later in zip(third_epoch(0), third_epoch(2), strict=True):
        assert np.array_equal(from_the_start, begun_later)


def test_the_parts_of_a_batch_that_processes_get_make_up_the_whole():
    def batches(share):
        of_training = dataset.image_batches(slices(13), 4, seed=1, augmented=True, share=share).take(3)
        return [*of_training, *dataset.image_batches(slices(10), 4, share=share)]

    for whole, *parts in zip(*(batches(share) for share in ((0, 1), (0, 2), (1, 2))), strict=True):
        for tensor, halves in zip(whole, zip(*parts, strict=True), strict=True):
            np.testing.assert_array_equal(tensor, np.concatenate(halves))


def test_code_batches_pair_codes_with_positions_and_targets():
    codes = np.arange(24, dtype=np.int32).reshape(6, 2, 2)
    (inputs, positions), targets = next(iter(dataset.code_batches(codes, np.arange(6, dtype=np.int32), 4)))
    np.testing.assert_array_equal(inputs, targets)
    np.testing.assert_array_equal(inputs[:, 0, 0], positions.numpy() * 4)


def test_synthetic_slices_are_split_by_case(monkeypatch):
    monkeypatch.setattr(dataset.phantom, "NUM_CASES", 10)
    monkeypatch.setattr(dataset.phantom, "NUM_POSITIONS", 2)
    made = dataset.load(None, 32, seed=1)
    assert {split: len(held) for split, held in made.items()} == {"train": 16, "validate": 2, "test": 2}
    assert not set(made["train"].cases) & set(made["test"].cases)
    assert made["train"].images.any()


def test_the_real_slices():
    if "OASIS_DIR" not in os.environ:
        pytest.skip("no real slices: set OASIS_DIR to the folder that holds them")
    real = dataset.load(Path(os.environ["OASIS_DIR"]), 96, seed=0)
    for held in real.values():
        assert 0.1 < (held.images > 12).mean() < 0.5
