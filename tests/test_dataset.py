import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

import dataset


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


def test_names_without_a_case_count_as_people_of_their_own_with_one_warning(tmp_path, capsys):
    for i in range(10):
        put(tmp_path / f"brain{i}.png")
    splits = dataset.find(tmp_path)
    assert [len(files) for files in splits.values()] == [8, 1, 1]
    error = capsys.readouterr().err
    assert error.count("warning") == 1
    assert "10 files such as brain" in error


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


def broken_png(path: Path) -> None:
    put(path, size=(64, 64))
    path.write_bytes(path.read_bytes()[:60])


def jpeg_named_png(path: Path) -> None:
    Image.new("L", (8, 8)).save(path, format="JPEG")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (broken_png, "is a broken PNG"),
        (jpeg_named_png, "is not a PNG image"),
        (lambda path: path.write_bytes(b""), "is not a PNG image"),
        (lambda path: path.write_bytes(dataset.PNG_SIGNATURE + b"x" * 40), "is a broken PNG"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, damage, message):
    data_dir = make_layout(tmp_path, "course")
    bad = data_dir / "keras_png_slices_validate" / "case_006_slice_1.nii.png"
    damage(bad)
    with pytest.raises(dataset.DataError, match=message) as error:
        dataset.load(data_dir, 8, seed=0)
    assert str(bad) in str(error.value)
    assert "\n" not in str(error.value)


def test_no_such_folder(tmp_path):
    with pytest.raises(dataset.DataError, match="nowhere: no such folder"):
        dataset.find(tmp_path / "nowhere")


def test_a_file_for_a_folder(tmp_path):
    with pytest.raises(dataset.DataError, match="is a file"):
        dataset.find(put(tmp_path / "case_001_slice_0.png"))


def test_an_empty_folder(tmp_path):
    with pytest.raises(dataset.DataError, match="is empty; set data_dir"):
        dataset.find(tmp_path)


def test_a_folder_of_masks_only(tmp_path):
    put(tmp_path / "seg_001_slice_0.nii.png")
    with pytest.raises(dataset.DataError, match="masks only"):
        dataset.find(tmp_path)


def test_a_split_that_is_missing(tmp_path):
    data_dir = make_layout(tmp_path, "course")
    shutil.rmtree(data_dir / "keras_png_slices_test")
    with pytest.raises(dataset.DataError, match="no test folder"):
        dataset.find(data_dir)
    shutil.rmtree(data_dir / "keras_png_slices_validate")
    with pytest.raises(dataset.DataError, match="no validate and no test folder"):
        dataset.find(data_dir)


def test_a_split_that_is_empty(tmp_path):
    data_dir = make_layout(tmp_path, "val")
    shutil.rmtree(data_dir / "val")
    (data_dir / "val").mkdir()
    with pytest.raises(dataset.DataError, match="val: no PNG slices"):
        dataset.find(data_dir)


def test_a_person_in_two_splits(tmp_path):
    data_dir = make_layout(tmp_path, "course")
    put_case(data_dir / "keras_png_slices_test", case=1)
    with pytest.raises(dataset.DataError, match="case_001 is in train as well as in test"):
        dataset.find(data_dir)


def test_two_people_are_too_few_for_three_splits(tmp_path):
    put_case(tmp_path, 1)
    put_case(tmp_path, 2)
    with pytest.raises(dataset.DataError, match="at least 3 cases"):
        dataset.find(tmp_path)


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
