import dataclasses
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

import augmentation
import console
import dataset
import naming
import phantom
import pngs
from tests.test_pngs import brain


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


# ------------------------------------------------------------------------------------------- bad input


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


def test_broken_files_are_left_out_together_with_their_subjects_and_positions(data_dir, capsys):
    whole = dataset.load(data_dir, 8, seed=0)["train"]
    broken = [data_dir / "keras_png_slices_train" / f"case_00{i}.nii.png" for i in ("0_slice_1", "2_slice_0")]
    for path in broken:
        path.write_bytes(b"")
    assert_refused(data_dir, capsys, broken[0], "is empty", "--skip-broken-slices")
    assert load(data_dir, capsys, skip_broken=True).count("left out") == 2
    readable, kept = dataset.load(data_dir, 8, seed=0, skip_broken=True)["train"], [0, 2, 3, 5, 6, 7]
    assert np.array_equal(readable.images, whole.images[kept])
    assert np.array_equal(readable.positions, whole.positions[kept])
    assert np.array_equal(readable.subjects, whole.subjects[kept])


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


def test_two_folders_for_one_split(data_dir, capsys):
    save_blank(data_dir / "train" / "case_100_slice_0.png")
    assert_refused(data_dir, capsys, data_dir, "keras_png_slices_train and train, all for the train split", "into one")


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


# -------------------------------------------------------------------------------------------- cropping


def write_framed(folder: Path, side: int = 64, width: int = 28) -> Path:
    """Slices of five subjects, two each: noise in the central square of this width, black around it."""
    random, begin = np.random.default_rng(0), (side - width) // 2
    for subject in range(5):
        for position in range(2):
            grey = np.zeros((side, side), np.uint8)
            grey[begin : begin + width, begin : begin + width] = random.integers(20, 256, (width, width))
            Image.fromarray(grey).save(folder / f"case_{subject:03d}_slice_{position}.png")
    return folder


@pytest.mark.parametrize(("crop", "side"), [(None, 48), (28, 28), (40, 40), (64, 64)])
def test_slices_are_cropped_without_losing_brain(tmp_path, crop, side):
    write_framed(tmp_path)
    whole, cropped = dataset.load(tmp_path, 64, seed=0), dataset.load(tmp_path, side, seed=0, crop=crop)
    begin = (64 - side) // 2
    for split in naming.SPLITS:
        assert (whole[split].crop, whole[split].frame_size) == (0, 0)
        assert (cropped[split].crop, cropped[split].frame_size) == (side, 64)
        expected = whole[split].images[:, begin : begin + side, begin : begin + side]
        assert np.array_equal(cropped[split].images, expected)
        assert cropped[split].images.sum() == whole[split].images.sum()
        assert np.array_equal(cropped[split].subjects, whole[split].subjects)


def test_the_frame_has_the_resolution_of_the_images(tmp_path):
    write_framed(tmp_path)
    for image_size, frame_size in ((24, 32), (96, 128), (48, 64), (30, 40)):
        test = dataset.load(tmp_path, image_size, seed=0, crop=48)["test"]
        assert test.images.shape[1:] == (image_size, image_size, 1)
        assert test.frame_size == frame_size


def test_a_crop_that_cuts_brain_off_is_refused(tmp_path, capsys):
    write_framed(tmp_path)
    with pytest.raises(dataset.DataError) as error:
        dataset.load(tmp_path, 32, seed=0, crop=26)
    assert str(error.value).startswith(f"{tmp_path}{os.sep}case_00")
    assert "set crop to 28 or more, or to 0" in str(error.value)


def test_slices_of_several_sizes_are_used_whole_unless_a_crop_is_given(tmp_path, capsys):
    write_framed(tmp_path)
    first = tmp_path / "case_000_slice_0.png"
    with Image.open(first) as picture:
        picture.crop((8, 8, 56, 56)).save(first)
    for crop, recorded in ((None, 0), (0, 0), (32, 32)):
        slices = dataset.load(tmp_path, 32, seed=0, crop=crop)
        assert {one.crop for one in slices.values()} == {recorded}
    assert capsys.readouterr().err.count("1 slices such as case_000_slice_0.png are not 64 × 64") == 3


def test_synthetic_slices_are_whole(monkeypatch):
    monkeypatch.setattr(phantom, "NUM_POSITIONS", 1)
    whole, cropped = (dataset.load(None, 32, seed=1, synthetic_subjects=3, crop=crop) for crop in (0, None))
    assert dataset.fingerprint(whole) == dataset.fingerprint(cropped)
    assert cropped["train"].crop == cropped["train"].frame_size == 0


# ------------------------------------------------------------------------------- decoded slices on disk


def in_memory(slices: dict[str, dataset.Slices]) -> dict[str, dataset.Slices]:
    """The same slices as arrays in memory, of which nothing is known already."""
    return {split: dataclasses.replace(some, images=np.array(some.images)) for split, some in slices.items()}


@pytest.fixture
def decoded(monkeypatch) -> list[int]:
    """How many PNGs are decoded, each time that some are."""
    counts, decode_each = [], pngs.decode_each

    def count(paths, *arguments):
        counts.append(len(paths))
        return decode_each(paths, *arguments)

    monkeypatch.setattr(pngs, "decode_each", count)
    return counts


def test_cached_slices_are_what_decoding_gives(data_dir, tmp_path, decoded):
    Image.new("L", (8, 8)).save(data_dir / "keras_png_slices_train" / "case_000_slice_5.nii.png")
    first, again = (dataset.load(data_dir, 8, seed=0, cache_dir=tmp_path / "cache") for _ in range(2))
    assert decoded == [13]
    for split, files in dataset.find(data_dir).items():
        expected, _ = pngs.decode_all([file.path for file in files], 8)
        for slices in (first[split], again[split]):
            assert isinstance(slices.images, np.memmap)
            assert np.array_equal(slices.images, expected)
            assert slices.positions.tolist() == [file.position for file in files]
            assert slices.subjects.tolist() == [file.subject for file in files]
    copies = in_memory(again)
    for slices in (first, again):
        assert dataset.fingerprint(slices) == dataset.fingerprint(copies)
        assert dataset.pixel_variance(slices["train"]) == dataset.pixel_variance(copies["train"])
        assert dataset.pixel_variance(copies["train"]) == pytest.approx((copies["train"].images / 255).var())


def test_what_is_known_of_cached_slices_is_not_said_of_others(data_dir):
    slices = dataset.load(data_dir, 8, seed=0)
    changed = {split: dataclasses.replace(some, images=255 - some.images) for split, some in slices.items()}
    assert dataset.fingerprint(changed) != dataset.fingerprint(slices)
    assert changed["test"].histogram.tolist() == slices["test"].histogram.tolist()[::-1]


@pytest.mark.parametrize("change", ["pixels", "time", "added", "removed", "renamed"])
def test_slices_are_decoded_again_if_a_file_has_changed(data_dir, tmp_path, decoded, change):
    folder, cache_dir = data_dir / "keras_png_slices_train", tmp_path / "cache"
    before = dataset.load(data_dir, 8, seed=0, cache_dir=cache_dir)
    path = folder / "case_001_slice_1.nii.png"
    if change == "pixels":
        brain(99).save(path)
    elif change == "time":
        os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    elif change == "added":
        brain(99).save(folder / "case_001_slice_2.nii.png")
    elif change == "removed":
        path.unlink()
    else:
        path.rename(folder / "case_001_slice_3.nii.png")
    after = dataset.load(data_dir, 8, seed=0, cache_dir=cache_dir)
    expected, _ = pngs.decode_all([file.path for file in dataset.find(data_dir)["train"]], 8)
    assert np.array_equal(after["train"].images, expected)
    assert (dataset.fingerprint(before) == dataset.fingerprint(after)) == (change == "time")
    assert len(decoded) == 3
    assert len([path for path in cache_dir.iterdir() if path.is_dir()]) == 1


def test_other_settings_and_splits_have_files_of_their_own(tmp_path, decoded):
    data_dir, cache_dir = make_layout(tmp_path, "flat"), tmp_path / "cache"
    settings = [{"image_size": 8, "seed": 0}, {"image_size": 16, "seed": 0}, {"image_size": 8, "seed": 1}]
    for options in [*settings, *settings]:
        slices = dataset.load(data_dir, cache_dir=cache_dir, **options)
        assert slices["train"].images.shape[1] == options["image_size"]
        expected = {file.subject for file in dataset.find(data_dir, options["seed"])["test"]}
        assert set(slices["test"].subjects) == expected
    assert decoded == [20] * 3


def test_a_moved_folder_need_not_be_decoded_again(data_dir, tmp_path, decoded):
    before = dataset.load(data_dir, 8, seed=0, cache_dir=tmp_path / "cache")
    folder = tmp_path / "moved"
    folder.mkdir()
    for path in data_dir.glob("keras*"):
        path.rename(folder / path.name)
    after = dataset.load(folder, 8, seed=0, cache_dir=tmp_path / "cache")
    assert len(decoded) == 1
    assert dataset.fingerprint(before) == dataset.fingerprint(after)


def test_warnings_are_repeated_and_broken_files_stay_left_out(data_dir, capsys):
    broken = data_dir / "keras_png_slices_train" / "case_001_slice_1.nii.png"
    broken.write_bytes(b"")
    first, again = (load(data_dir, capsys, skip_broken=True) for _ in range(2))
    assert first == again
    assert f"left out: {broken}: is empty" in again
    assert load(data_dir, capsys).startswith(f"{broken}: is empty")


def test_slices_that_change_while_they_are_read_are_refused(data_dir, tmp_path, capsys, monkeypatch):
    fingerprint, path = dataset.fingerprint, data_dir / "keras_png_slices_train" / "case_001_slice_1.nii.png"

    def change(slices):
        brain(99).save(path)
        return fingerprint(slices)

    monkeypatch.setattr(dataset, "fingerprint", change)
    message = load(data_dir, capsys, cache_dir=tmp_path / "cache")
    assert message.startswith(f"{data_dir}: slices were changed while they were read")
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]


def test_a_disk_without_space_is_refused_in_one_line(data_dir, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 700}))
    message = load(data_dir, capsys, cache_dir=tmp_path / "cache")
    assert message.startswith(f"cache_dir is {tmp_path / 'cache'}: decoded slices need 768 bytes")
    assert "\n" not in message


@pytest.mark.parametrize("settings", [{}, {"seed": 3}, {"seed": 3, "augmented": True, "first_epoch": 1}], ids=str)
@pytest.mark.parametrize("shard", [(0, 1), (1, 2)], ids=str)
def test_batches_of_cached_slices_are_those_of_slices_in_memory(data_dir, settings, shard):
    cached = dataset.load(data_dir, 8, seed=0)["train"]
    images = np.concatenate([pngs.decode(f.path, 8).grey[None, ..., None] for f in dataset.find(data_dir)["train"]])
    reference = dataset.Slices(images, cached.positions, cached.subjects)
    batches, expected = (
        [
            tf.nest.map_structure(np.array, batch)
            for batch in dataset.image_batches(s, 4, shard=shard, **settings).take(7)
        ]
        for s in (cached, reference)
    )
    assert len(batches) == len(expected) == (7 if settings else 2)
    for own, other in zip(batches, expected, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(own, other, strict=True))


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


def test_input_batches_pair_codes_with_positions_and_targets():
    codes = np.arange(24, dtype=np.int32).reshape(6, 2, 2)
    positions = np.arange(6, dtype=np.int32)
    conditioning = {"positions": positions, "coarse": codes[:, :1, :1]}
    inputs, targets = next(iter(dataset.input_batches({**conditioning, "codes": codes}, "codes", 4, seed=0)))
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
    folder = Path(os.environ["OASIS_DIR"])
    for slices in dataset.load(folder, 96, seed=0).values():
        assert 0.1 < (slices.images > 12).mean() < 0.5
    for slices in dataset.load(folder, 96, seed=0, crop=None).values():
        assert 0 < slices.crop < 256
        assert 0.2 < (slices.images > 12).mean() < 0.7


def test_grey_levels_survive_the_way_to_floats_and_back():
    levels = np.arange(256, dtype=np.uint8)[:, None, None, None]  # More images than are converted at a time.
    assert np.array_equal(dataset.to_uint8(dataset.to_float(levels)), levels)
    assert np.array_equal(dataset.to_uint8(np.array([-0.5, 0.001, 0.003, 1.5])), [0, 0, 1, 255])
