"""Volumes of every layout, orientation and byte order; hostile archives; the whole command."""

import contextlib
import csv
import functools
import hashlib
import http.server
import io
import itertools
import json
import os
import shutil
import subprocess
import sys
import tarfile
import threading
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

import console
import dataset
import naming
import oasis
import run

# ------------------------------------------------------------------------------------------------ volumes


def brain(shape=(20, 24, 18), seed: int = 0) -> np.ndarray:
    """An int16 ball without symmetries on a background of 0. Its axes point right, to the front and to the top."""
    x, y, z = np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij")
    inside = x**2 + y**2 + z**2 < 0.75
    shade = 300 + 100 * x + 50 * y + 25 * z + np.random.default_rng(seed).normal(0, 5, shape)
    return np.where(inside, shade, 0).astype(np.int16)


def save(path: Path, data: np.ndarray, zooms=(1.0, 1.0, 1.0), codes: str = "RAS", kind=nib.Nifti1Image) -> Path:
    """Write a volume, whose axes point right, front and top, in an orientation such as "LIA"."""
    affine = np.diag([*zooms, 1.0])
    affine[:3, 3] = -(np.array(data.shape[:3]) - 1) / 2 * zooms
    there = nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(codes))
    path.parent.mkdir(parents=True, exist_ok=True)
    reoriented = nib.apply_orientation(data, there)
    kind(reoriented, affine @ nib.orientations.inv_ornt_aff(there, data.shape[:3])).to_filename(path)
    return path


def make_options(*paths, **options) -> oasis.Options:
    return oasis.Options(paths, **{"slices": 4, **options})


def slices_of(path: Path, **options) -> np.ndarray:
    """(slices, 256, 256) uint8 of one volume."""
    volume = oasis.read_volume(path, path.name, options.pop("orientation", None))
    indices = oasis.slice_indices(volume, make_options(**options))
    return np.stack([oasis.cut_slice(volume, index) for index in indices])


ALL_48 = [
    "".join(ends[axis] for axis, ends in zip(order, signs, strict=True))
    for order in itertools.permutations(range(3))
    for signs in itertools.product(("RAS", "LPI"), repeat=3)
]


def test_all_48_orientations_give_the_same_slices(tmp_path):
    assert len(set(ALL_48)) == 48
    expected = slices_of(save(tmp_path / "RAS.nii", brain(), (1.5, 1.0, 2.0)))
    for codes in ALL_48:
        assert np.array_equal(slices_of(save(tmp_path / f"{codes}.nii", brain(), (1.5, 1.0, 2.0), codes)), expected), (
            codes
        )


def test_the_front_is_at_the_top_and_the_left_on_the_left(tmp_path):
    data = brain()
    data[4:6, 17:19, :] = 2000  # front left
    row, column = np.argwhere(slices_of(save(tmp_path / "v.nii", data))[1] == 255).mean(axis=0)
    assert row < 128
    assert column < 128


@pytest.mark.parametrize("codes", ["LIA", "RAS", "PSR"])
def test_the_orientation_option_replaces_the_affine(tmp_path, codes):
    expected = slices_of(save(tmp_path / "right.nii", brain()))
    there = nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(codes))
    wrong = nib.Nifti1Image(nib.apply_orientation(brain(), there), np.eye(4))
    wrong.to_filename(tmp_path / "wrong.nii")
    assert np.array_equal(slices_of(tmp_path / "wrong.nii", orientation=codes), expected)


@pytest.mark.parametrize("endianness", ["<", ">"])
def test_analyze_of_both_byte_orders(tmp_path, endianness):
    header = nib.AnalyzeHeader(endianness=endianness)
    header.set_data_dtype(np.int16)
    data = brain()[::-1]  # The first axis of Analyze points to the left.
    header.set_data_shape(data.shape)
    header.set_zooms((1, 1, 1))
    nib.AnalyzeImage(data, None, header).to_filename(tmp_path / "v.img")
    assert (tmp_path / "v.hdr").read_bytes()[:4] == (348).to_bytes(4, "little" if endianness == "<" else "big")
    assert np.array_equal(slices_of(tmp_path / "v.img"), slices_of(save(tmp_path / "v.nii", brain())))


def test_voxel_sizes_are_respected(tmp_path):
    ball = np.zeros((30, 60, 20), np.int16)
    x, y, z = np.meshgrid(*[(np.arange(n) - (n - 1) / 2) * mm for n, mm in zip(ball.shape, (2, 1, 3), strict=True)])
    ball[np.transpose(x**2 + y**2 + z**2 < 25**2, (1, 0, 2))] = 100
    middle = slices_of(save(tmp_path / "v.nii", ball, (2.0, 1.0, 3.0)), lowest=0.5, highest=0.5, slices=1)[0]
    high, wide = (np.flatnonzero((middle > 127).any(axis=axis)) for axis in (1, 0))
    assert abs(len(high) - 50) <= 2
    assert abs(len(wide) - 50) <= 2
    assert abs(high.mean() - 127.5) <= 1
    assert abs(wide.mean() - 127.5) <= 1


def test_a_volume_larger_than_a_slice_is_centred_on_its_brain(tmp_path):
    data = np.zeros((300, 280, 3), np.int16)
    data[5:105, 170:270] = np.arange(100)[:, None, None] + 100
    image = slices_of(save(tmp_path / "v.nii", data))[0]
    assert np.count_nonzero(image) == 100 * 100


def test_intensities_are_scaled_by_robust_percentiles_and_the_background_is_0(tmp_path):
    data = brain().astype(np.float32)
    expected = slices_of(save(tmp_path / "v.nii", data))
    assert expected.max() == 255
    assert 0.3 < (expected[1] > 0)[120:136, 120:136].mean() <= 1
    data[10, 12, 9] = 1e6  # one outlier
    assert np.mean(np.abs(slices_of(save(tmp_path / "w.nii", data)).astype(int) - expected)) < 0.5
    shifted = np.where(data == 0, -1000.0, data).astype(np.float32)
    assert (slices_of(save(tmp_path / "s.nii", shifted))[:, 0, 0] == 0).all()


def test_a_noisy_background_becomes_0(tmp_path):
    data = brain().astype(np.float32)
    noise = np.where(data == 0, np.random.default_rng(0).normal(0, 1e-3, data.shape), 0).astype(np.float32)
    expected = slices_of(save(tmp_path / "v.nii", data))
    assert np.array_equal(slices_of(save(tmp_path / "n.nii", data + noise)) == 0, expected == 0)


def test_nan_and_infinity_are_background(tmp_path):
    data = brain().astype(np.float32)
    data[data == 0] = np.nan
    data[10, 12, 9] = np.inf
    filled = slices_of(save(tmp_path / "v.nii", data))
    assert (filled[:, 0, 0] == 0).all()
    assert filled.max() == 255


def test_4_d_files_give_their_first_volume_and_2_d_files_one_slice(tmp_path):
    expected = slices_of(save(tmp_path / "v.nii", brain()))
    four = np.stack([brain(), brain()[::-1]], axis=3)
    nib.Nifti1Image(four, nib.load(tmp_path / "v.nii").affine).to_filename(tmp_path / "four.nii.gz")
    assert np.array_equal(slices_of(tmp_path / "four.nii.gz"), expected)
    nib.Nifti1Image(brain()[:, :, 9], np.eye(4)).to_filename(tmp_path / "two.nii.gz")
    assert slices_of(tmp_path / "two.nii.gz").shape == (1, 256, 256)


def test_slices_are_interpolated_between_thick_ones(tmp_path):
    data = np.zeros((20, 20, 3), np.int16)
    data[5:15, 5:15] = [100, 200, 300]
    made = slices_of(save(tmp_path / "v.nii", data, (1, 1, 5.0)), lowest=0.0, highest=1.0, slices=5)
    middle = made[:, 128, 128].astype(int)
    assert np.all(np.diff(middle) > 0)
    assert abs(middle[1] - (middle[0] + middle[2]) / 2) <= 1


def test_slices_are_at_world_coordinates_in_an_atlas_and_at_fractions_of_the_height_elsewhere(tmp_path):
    whole, half = brain((20, 24, 96)), brain((20, 24, 96))
    half[:, :, :40] = 0  # the lower half is missing
    for name, same in (("a_t88_masked_gfc.nii", True), ("aligned_norm.nii", True), ("other.nii", False)):
        indices = [
            oasis.slice_indices(oasis.read_volume(save(tmp_path / str(i) / name, data), name), make_options())
            for i, data in enumerate((whole, half))
        ]
        assert np.array_equal(*indices) == same, name
    image = nib.load(tmp_path / "0" / "other.nii")
    assert not oasis.read_volume(tmp_path / "0" / "other.nii", "other.nii").in_atlas
    image.set_sform(image.affine, code="mni")
    image.to_filename(tmp_path / "mni.nii")
    assert oasis.read_volume(tmp_path / "mni.nii", "mni.nii").in_atlas
    volume = oasis.read_volume(tmp_path / "0" / "aligned_norm.nii", "aligned_norm.nii")
    world = np.interp(oasis.slice_indices(volume, make_options()), np.arange(96), volume.world)
    assert [world[0], world[-1]] == pytest.approx(list(oasis.ATLAS_RANGE))


def assert_refused(*contents: object, by) -> None:
    """Check that a call ends in an error of one line that begins with the first content and has the others."""
    with pytest.raises(console.UserError) as error:
        by()
    message = str(error.value)
    assert message.startswith(str(contents[0]))
    assert "\n" not in console.one_line(message)
    for content in contents[1:]:
        assert str(content) in message


def test_unusable_volumes_are_refused_by_name(tmp_path):
    def assert_unreadable(name, *contents):
        assert_refused(f"{name}: ", *contents, by=lambda: oasis.read_volume(tmp_path / name, name))

    (tmp_path / "text.nii").write_text("not a volume")
    assert_unreadable("text.nii", "not a readable volume", "replace or remove it")
    truncated = save(tmp_path / "truncated.nii", brain())
    truncated.write_bytes(truncated.read_bytes()[:5000])
    assert_unreadable("truncated.nii", "not a readable volume", "replace or remove it")
    save(tmp_path / "flat.nii", np.full((8, 8, 8), 7, np.int16))
    assert_unreadable("flat.nii", "no brain", "replace or remove it")
    header = bytearray(save(tmp_path / "bomb.nii", brain()).read_bytes())
    header[42:48] = np.array([32000, 32000, 32000], "<i2").tobytes()
    (tmp_path / "bomb.nii").write_bytes(header)
    assert_unreadable("bomb.nii", "32000 × 32000 × 32000 voxels", "too many", "remove it")


# ------------------------------------------------------------------------------------------------ layouts


def make_discs(folder: Path) -> Path:
    """The layout of the OASIS-1 discs: six subjects, the second of whom has two sessions."""
    for subject, session in ((1, 1), (2, 1), (2, 2), (3, 1), (4, 1), (5, 1), (6, 1)):
        place = folder / f"disc{subject % 2 + 1}" / f"OAS1_{subject:04d}_MR{session}"
        name = f"OAS1_{subject:04d}_MR{session}_mpr_n4_anon"
        atlas = place / "PROCESSED" / "MPRAGE" / "T88_111"
        data = brain((20, 24, 96), seed=10 * subject + session)
        save(atlas / f"{name}_111_t88_masked_gfc.img", data, kind=nib.AnalyzeImage)
        save(atlas / f"{name}_111_t88_gfc.img", data, kind=nib.AnalyzeImage)
        save(place / "FSL_SEG" / f"{name}_111_t88_masked_gfc_fseg.img", data, kind=nib.AnalyzeImage)
    return folder


def make_archives(folder: Path, into: Path) -> Path:
    """One archive per disc."""
    into.mkdir()
    for disc in sorted(folder.iterdir()):
        with tarfile.open(into / f"oasis_cross-sectional_{disc.name}.tar.gz", "w:gz") as archive:
            archive.add(disc, disc.name)
    return into


def contents(folder: Path) -> dict[str, bytes]:
    """Content of every file, by its path below the folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> tuple[Path, Path]:
    """Discs and a folder of their slices."""
    root = tmp_path_factory.mktemp("oasis")
    oasis.main(make_options(make_discs(root / "discs"), root / "slices"))
    return root / "discs", root / "slices"


@pytest.fixture
def discs(converted) -> Path:
    return converted[0]


@pytest.fixture
def slices(converted) -> Path:
    return converted[1]


def test_discs_become_slices_that_the_driver_can_load(slices):
    files = dataset.find(slices)
    subjects = {split: {file.subject for file in found} for split, found in files.items()}
    assert sorted(len(names) for names in subjects.values()) == [1, 1, 4]
    assert set.union(*subjects.values()) == {f"case_{i:03d}" for i in range(1, 7)}
    assert sum(len(found) for found in files.values()) == 7 * 4
    assert {file.position for found in files.values() for file in found} == {0, 1, 2, 3}
    with Image.open(files["train"][0].path) as image:
        assert (image.mode, image.size) == ("L", (256, 256))
    second_session = [path.name for path in slices.rglob("*_session_2.nii.png")]
    assert sorted(second_session) == [f"case_002_slice_{k}_session_2.nii.png" for k in range(4)]
    assert len(dataset.load(slices, 32, 0)["train"]) in (16, 20)


def test_the_manifest_names_every_slice_and_its_source(slices):
    with open(slices / "manifest.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {(row["split"], row["file"]) for row in rows} == {
        (path.parent.name.removeprefix("keras_png_slices_"), path.name) for path in slices.rglob("*.png")
    }
    assert list(rows[0]) == ["subject", "source", "session", "slice", "world_mm", "split", "file"]
    assert {row["subject"] for row in rows} == {f"case_{i:03d}" for i in range(1, 7)}
    assert rows[0]["source"].endswith("OAS1_0001_MR1_mpr_n4_anon_111_t88_masked_gfc.hdr")
    assert [float(row["world_mm"]) for row in rows[:4]] == pytest.approx(np.linspace(*oasis.ATLAS_RANGE, 4), abs=0.01)
    assert {row["session"] for row in rows} == {"MR1", "MR2"}
    assert "P50 AG05681" in (slices / "ACKNOWLEDGEMENT.txt").read_text()


def test_names_in_the_manifest_need_not_be_valid_text(tmp_path):
    path = save(tmp_path / "volumes" / "brain.nii", brain())
    path.rename(os.fsdecode(os.fsencode(path.parent) + b"/gr\xf6\xdfe.nii"))
    save(tmp_path / "volumes" / "größe.nii", brain(seed=1))
    oasis.main(make_options(tmp_path / "volumes", tmp_path / "slices"))
    manifest = (tmp_path / "slices" / "manifest.csv").read_text(encoding="utf-8")
    assert "gr\\xf6\\xdfe.nii" in manifest
    assert "größe.nii" in manifest


def pngs(folder: Path) -> dict[str, bytes]:
    return {name: content for name, content in contents(folder).items() if name.endswith(".png")}


def test_archives_give_the_same_slices(discs, slices, tmp_path):
    oasis.main(make_options(make_archives(discs, tmp_path / "archives"), tmp_path / "slices"))
    assert pngs(tmp_path / "slices") == pngs(slices)


def test_the_files_of_a_pair_can_come_in_any_order_and_one_can_be_missing(discs, slices, tmp_path, capsys):
    headers, images = (sorted(discs.rglob(f"*_masked_gfc{suffix}")) for suffix in (".hdr", ".img"))
    images = [path for path in images if "OAS1_0001" not in path.name]  # The first subject only has a header.
    archive = tmp_path / "archives" / "disc.tar"
    archive.parent.mkdir()
    with tarfile.open(archive, "w") as tar:
        for path in [*headers, *images]:
            tar.add(path, path.relative_to(discs))
    oasis.main(make_options(archive.parent, tmp_path / "slices"))
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert len(warnings) == 1
    assert "OAS1_0001" in warnings[0]
    assert "incomplete" in warnings[0]
    assert not list((tmp_path / "slices").rglob("case_001_*"))
    (path,) = (tmp_path / "slices").rglob("case_003_slice_1.nii.png")
    (expected,) = slices.rglob("case_003_slice_1.nii.png")
    assert path.read_bytes() == expected.read_bytes()


def test_the_split_is_determined_by_the_seed():
    subjects = [f"OAS1_{i:04d}" for i in range(1, 355)]
    splits = [oasis.split_subjects(subjects, make_options(seed=seed)) for seed in (0, 0, 1)]
    assert splits[0] == splits[1]
    assert splits[0] != splits[2]
    counts = [sum(split == name for split in splits[0].values()) for name in naming.SPLITS]
    assert counts == [301, 35, 18]


def test_fractions_of_the_splits():
    subjects = [f"OAS1_{i:04d}" for i in range(1, 101)]
    split_of = oasis.split_subjects(subjects, make_options(validate_fraction=0.2, test_fraction=0.0))
    assert [sum(split == name for split in split_of.values()) for name in naming.SPLITS] == [80, 20, 0]


def test_neurite_oasis_in_the_atlas_or_as_a_single_slice(tmp_path):
    for subject in range(1, 4):
        folder = tmp_path / "neurite" / f"OASIS_OAS1_{subject:04d}_MR1"
        for name in ("norm.nii.gz", "orig.nii.gz", "seg4.nii.gz"):
            save(folder / name, brain((20, 24, 96), seed=subject))
        if subject != 3:
            save(folder / "aligned_norm.nii.gz", brain((20, 24, 96), seed=subject))
    (found,) = oasis.find(tmp_path / "neurite").values()
    names = [volume.name.split("/")[1] for volume in found]
    assert names == ["aligned_norm.nii.gz", "aligned_norm.nii.gz", "norm.nii.gz"]
    folder = tmp_path / "2d" / "OASIS_OAS1_0007_MR1"
    nib.Nifti1Image(brain()[:, :, 9], np.eye(4)).to_filename(save(folder / "slice_norm.nii.gz", brain()))
    oasis.main(make_options(tmp_path / "2d", tmp_path / "slices"))
    assert [path.name for path in (tmp_path / "slices").rglob("*.png")] == ["case_007_slice_0.nii.png"]


def test_any_folder_of_volumes_without_its_masks(tmp_path):
    for name in (
        "a/sub-01_T1w.nii.gz",
        "a/sub-01_mask.nii.gz",
        "b/sub-02/ses-1/x.nii",
        "b/sub-02/ses-2/x.nii",
        "c.mgz",
    ):
        save(
            tmp_path / "volumes" / name,
            brain().astype(np.float32),
            kind=nib.MGHImage if "mgz" in name else nib.Nifti1Image,
        )
    (found,) = oasis.find(tmp_path / "volumes").values()
    assert [(volume.subject, volume.session) for volume in found] == [
        ("sub-01", "ses-1"),
        ("sub-02", "ses-1"),
        ("sub-02", "ses-2"),
        ("c", "1"),
    ]


def test_suffixes_can_be_upper_case(tmp_path):
    expected = slices_of(save(tmp_path / "expected.nii", brain()))
    save(tmp_path / "volumes" / "a.nii.gz", brain()).rename(tmp_path / "volumes" / "A.NII.GZ")
    save(tmp_path / "pair" / "b.img", brain(), kind=nib.Nifti1Pair)
    for path in (tmp_path / "pair").iterdir():
        path.rename(tmp_path / "volumes" / path.name.upper())
    (tmp_path / "archives").mkdir()
    with tarfile.open(tmp_path / "archives" / "DISC.TAR.GZ", "w:gz") as archive:
        archive.add(tmp_path / "volumes", "disc")
    for source in ("volumes", "archives"):
        destination = tmp_path / f"slices of {source}"
        oasis.main(make_options(tmp_path / source, destination))
        made = {path.name: np.asarray(Image.open(path)) for path in destination.rglob("*.png")}
        assert len(made) == 2 * 4
        for subject, position in itertools.product((1, 2), range(4)):
            assert np.array_equal(made[naming.slice_file(f"case_{subject:03d}", position)], expected[position])


def test_an_interrupted_conversion_continues_and_gives_identical_files(discs, slices, tmp_path, monkeypatch):
    cut_slice, count = oasis.cut_slice, itertools.count()

    def cut_until_stopped(volume, index):
        if next(count) >= 10:
            raise console.Stopped(9)
        return cut_slice(volume, index)

    destination = tmp_path / "slices"
    options = make_options(discs, destination)
    monkeypatch.setattr(oasis, "cut_slice", cut_until_stopped)
    with pytest.raises(console.Stopped):
        oasis.main(options)
    staged = [path for path in (destination / ".unfinished").rglob("*.png") if run.UNFINISHED not in str(path)]
    assert len(staged) in range(4, 12)
    monkeypatch.setattr(oasis, "cut_slice", cut_slice)
    write_text = run.write_text

    def write_until_stopped(path, text):
        if path.name == "manifest.csv":
            raise console.Stopped(9)
        write_text(path, text)

    monkeypatch.setattr(run, "write_text", write_until_stopped)
    with pytest.raises(console.Stopped):
        oasis.main(options)
    monkeypatch.setattr(run, "write_text", write_text)
    oasis.main(options)
    assert contents(destination) == contents(slices)
    oasis.main(options)  # There is nothing to do.
    assert contents(destination) == contents(slices)


def test_a_broken_volume_is_left_out_by_name(discs, tmp_path, capsys):
    source = tmp_path / "discs"
    shutil.copytree(discs, source)
    broken = sorted(source.rglob("*_masked_gfc.img"))[0]
    broken.write_bytes(broken.read_bytes()[:100])
    oasis.main(make_options(source, tmp_path / "slices"))
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert len(warnings) == 1
    assert f"left out: {broken.relative_to(source).with_suffix('.hdr')}: " in warnings[0]
    assert len(list((tmp_path / "slices").rglob("*.png"))) == 6 * 4


def test_too_few_subjects_for_three_splits_are_warned_of(tmp_path, capsys):
    save(tmp_path / "volumes" / "sub-01.nii", brain())
    oasis.main(make_options(tmp_path / "volumes", tmp_path / "slices"))
    warnings = capsys.readouterr().err
    assert warnings.startswith("warning: ")
    assert "all three splits" in warnings


def test_unusable_sources_and_destinations_are_refused(discs, slices, tmp_path):
    def assert_main_refuses(source, destination, *contents, **options):
        assert_refused(*contents, by=lambda: oasis.main(make_options(source, destination, **options)))

    new = tmp_path / "new"
    nowhere = tmp_path / "nowhere"
    assert_main_refuses(nowhere, new, f"{nowhere}: ", "no such file or folder", "give the folder with the volumes")
    (tmp_path / "empty").mkdir()
    assert_main_refuses(tmp_path / "empty", new, f"{tmp_path}/empty: ", "no volumes", ".nii.gz")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.txt").write_text("precious")
    assert_main_refuses(discs, tmp_path / "thesis", f"{tmp_path}/thesis: ", "not empty", "choose a new folder")
    assert_main_refuses(discs, slices, f"{slices}: ", "seed was 0, is 1", "choose a new folder", seed=1)
    archive = make_archives(discs, tmp_path / "archives") / "oasis_cross-sectional_disc1.tar.gz"
    archive.write_bytes(archive.read_bytes()[:20_000])
    assert_main_refuses(archive, new, f"{archive}: ", "damaged archive", "download it again")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "oasis.json").write_text("{")
    assert_main_refuses(discs, tmp_path / "damaged", tmp_path / "damaged", "is damaged", "choose a new folder")


def test_an_archive_without_read_permission_is_not_called_damaged(discs, tmp_path, monkeypatch):
    archive = make_archives(discs, tmp_path / "archives") / "oasis_cross-sectional_disc1.tar.gz"

    def refuse(path, mode):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(tarfile, "open", refuse)
    options = make_options(archive, tmp_path / "slices")
    assert_refused(f"{archive}: Permission denied", "check the permissions", by=lambda: oasis.main(options))


@pytest.mark.parametrize(
    ("options", "contents"),
    [
        ({"slices": 0}, ("slices is 0", "at least 1")),
        ({"seed": -1}, ("seed is -1", "at least 0")),
        ({"test_fraction": 0.95}, ("validate_fraction is 0.1 and test_fraction is 0.95", "below 1 together")),
        ({"test_fraction": float("nan")}, ("validate_fraction is 0.1 and test_fraction is nan", "below 1 together")),
        ({"validate_fraction": -0.1}, ("validate_fraction is -0.1", "at least 0")),
        ({"lowest": 5.0, "highest": 5.0}, ("lowest is 5.0", "below highest")),
        ({"highest": float("inf")}, ("highest is inf", "finite")),
        ({"orientation": "LLA"}, ("orientation is LLA", "such as LIA")),
    ],
)
def test_unusable_options_are_refused(tmp_path, options, contents):
    assert_refused(*contents, by=lambda: oasis.main(make_options(tmp_path, tmp_path / "new", **options)))


def test_missing_paths_are_refused(tmp_path):
    assert_refused("1 paths", "SOURCE DESTINATION", "--help", by=lambda: oasis.main(make_options(tmp_path)))
    both = make_options(tmp_path, tmp_path, download=True)
    assert_refused("2 paths", "DESTINATION", "--help", by=lambda: oasis.main(both))


def test_a_hostile_archive_reaches_nothing(tmp_path):
    good = save(tmp_path / "good.nii.gz", brain()).read_bytes()
    outside = tmp_path / "outside.nii.gz"
    outside.write_bytes(good)
    archive = tmp_path / "hostile" / "hostile.tar.gz"
    archive.parent.mkdir()
    with tarfile.open(archive, "w:gz") as tar:
        for name in ("../../evil.nii.gz", f"{tmp_path}/absolute.nii.gz", "fine.nii.gz"):
            member = tarfile.TarInfo(name)
            member.size = len(good)
            tar.addfile(member, io.BytesIO(good))
        for name, kind in (
            ("link.nii.gz", tarfile.SYMTYPE),
            ("hard.nii.gz", tarfile.LNKTYPE),
            ("dev.nii", tarfile.CHRTYPE),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, str(outside)
            tar.addfile(member)
    before = {path for path in tmp_path.parent.rglob("*") if "slices" not in path.parts}
    oasis.main(make_options(archive.parent, tmp_path / "slices"))
    after = {path for path in tmp_path.parent.rglob("*") if "slices" not in path.parts}
    assert after == before
    assert len(list((tmp_path / "slices").rglob("*.png"))) == 3 * 4  # of the regular files


def test_a_member_that_is_too_large_is_left_out(discs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(oasis, "MAX_MEMBER_BYTES", 1000)
    source = make_archives(discs, tmp_path / "archives")
    options = make_options(source, tmp_path / "slices")
    assert_refused(f"{source}: ", "none of its volumes can be read", by=lambda: oasis.main(options))
    assert capsys.readouterr().err.count("left out") == 7


def test_the_driver_says_how_to_convert_volumes(discs, tmp_path):
    archives = make_archives(discs, tmp_path / "archives")
    for source in (discs, archives, archives / "oasis_cross-sectional_disc1.tar.gz"):
        assert_refused(f"{source}: ", "volumes", f"python oasis.py {source}", by=lambda s=source: dataset.find(s))


# ------------------------------------------------------------------------------------------------ command


@contextlib.contextmanager
def serve(folder: Path):
    """Serve a folder by HTTP without support for ranges; yields the address."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def test_downloaded_discs_become_slices(discs, slices, tmp_path, capfd):
    archives = make_archives(discs, tmp_path / "archives")
    with serve(archives) as url:
        files = [
            {"url": f"{url}/{path.name}", "checksum": f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"}
            for path in archives.iterdir()
        ]
        (tmp_path / "table.json").write_text(json.dumps({"oasis1": files}))
        downloads = tmp_path / "downloads"
        oasis.main(oasis.Options((downloads,), download=True, accept_terms=True, table=tmp_path / "table.json"))
    assert f"python oasis.py {downloads}" in capfd.readouterr().out
    assert contents(downloads) == contents(archives)
    oasis.main(make_options(downloads, tmp_path / "slices"))
    assert pngs(tmp_path / "slices") == pngs(slices)


def run_command(*arguments: object, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, oasis.__file__, *map(str, arguments)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        encoding="utf-8",
        errors="replace",
    )


def test_the_command_converts_volumes_without_other_messages(tmp_path):
    for i in range(3):
        save(tmp_path / "volumes" / f"sub-0{i}.nii.gz", brain(seed=i))
    done = run_command(tmp_path / "volumes", tmp_path / "slices", "--slices", 2)
    assert done.returncode == 0
    assert done.stderr == ""
    assert f"python driver.py --data-dir {tmp_path / 'slices'}" in done.stdout
    assert len(pngs(tmp_path / "slices")) == 6


def test_the_command_accepts_any_name_in_any_locale(tmp_path):
    ascii_locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    source, destination = tmp_path / "größe 脑", tmp_path / "süß"
    for i in range(3):
        save(source / f"ö{i}.nii.gz", brain(seed=i))
    for environment in (ascii_locale, {}):  # The second time there is nothing to do.
        done = run_command(source, destination, "--slices", 1, **environment)
        assert (done.returncode, done.stderr) == (0, "")
        assert len(pngs(destination)) == 3
    assert "ö0.nii.gz" in (destination / "manifest.csv").read_text(encoding="utf-8")
    assert os.fsencode("süß").decode() in done.stdout


def test_the_command_refuses_bad_input_in_one_line(tmp_path):
    done = run_command(tmp_path / "nowhere", tmp_path / "slices")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {tmp_path / 'nowhere'}: no such file or folder; ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "environment",
    [
        {"PYTHONIOENCODING": "cp1252"},
        {"PYTHONIOENCODING": "ascii"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    ],
    ids=["cp1252", "ascii", "C"],
)
def test_help_can_be_printed_on_any_console(environment):
    done = run_command("--help", **environment)
    assert done.returncode == 0
    assert "--validate-fraction" in done.stdout
    assert done.stderr == ""


def test_importing_it_does_not_import_tensorflow():
    code = (
        "import sys, oasis, phantom; "
        "print([m for m in sys.modules if m.split('.')[0] in ('tensorflow', 'keras', 'jax')])"
    )
    folder = Path(oasis.__file__).parent
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")
