"""Volumes of every layout, orientation and byte order to slices; archives that are hostile; downloads that fail."""

import csv
import errno
import hashlib
import http.server
import io
import itertools
import json
import shutil
import tarfile
import threading
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

import checkpoint
import dataset
import oasis

# ------------------------------------------------------------------------------------------------ volumes


def brain(shape=(20, 24, 18), seed: int = 0) -> np.ndarray:
    """A lump that no turn or flip maps to itself, axes to the right, the front and the top; int16, 0 around it."""
    x, y, z = np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij")
    inside = x**2 + y**2 + z**2 < 0.75
    shade = 300 + 100 * x + 50 * y + 25 * z + np.random.default_rng(seed).normal(0, 5, shape)
    return np.where(inside, shade, 0).astype(np.int16)


def save(path: Path, data: np.ndarray, zooms=(1.0, 1.0, 1.0), codes: str = "RAS", kind=nib.Nifti1Image) -> Path:
    """Write a volume, given with its axes to the right, front and top, with its axes towards `codes`."""
    affine = np.diag([*zooms, 1.0])
    affine[:3, 3] = -(np.array(data.shape[:3]) - 1) / 2 * zooms
    there = nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(codes))
    path.parent.mkdir(parents=True, exist_ok=True)
    turned = nib.apply_orientation(data, there)
    kind(turned, affine @ nib.orientations.inv_ornt_aff(there, data.shape[:3])).to_filename(path)
    return path


def options(*paths, **constants) -> oasis.Options:
    return oasis.Options(paths, **{"slices": 4, **constants})


def slices_of(path: Path, **constants) -> np.ndarray:
    volume = oasis.read_volume(path, path.name, constants.pop("orientation", None))
    places = oasis.slice_places(volume, options(**constants))
    return np.stack([oasis.cut(volume, place) for place in places])


ALL_48 = [
    "".join(ends[axis] for axis, ends in zip(order, signs, strict=True))
    for order in itertools.permutations(range(3))
    for signs in itertools.product(("RAS", "LPI"), repeat=3)
]


def test_all_axis_orders_and_flips_give_the_same_slices(tmp_path):
    assert len(set(ALL_48)) == 48
    expected = slices_of(save(tmp_path / "RAS.nii", brain(), (1.5, 1.0, 2.0)))
    for codes in ALL_48:
        assert np.array_equal(slices_of(save(tmp_path / f"{codes}.nii", brain(), (1.5, 1.0, 2.0), codes)), expected), (
            codes
        )


def test_the_front_is_up_and_the_left_is_left(tmp_path):
    data = brain()
    data[4:6, 17:19, :] = 2000  # at the front left
    row, column = np.argwhere(slices_of(save(tmp_path / "v.nii", data))[1] == 255).mean(axis=0)
    assert row < 128
    assert column < 128


@pytest.mark.parametrize("codes", ["LIA", "RAS", "PSR"])
def test_an_orientation_can_be_told(tmp_path, codes):
    expected = slices_of(save(tmp_path / "right.nii", brain()))
    there = nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(codes))
    lying = nib.Nifti1Image(nib.apply_orientation(brain(), there), np.eye(4))
    lying.to_filename(tmp_path / "lying.nii")
    assert np.array_equal(slices_of(tmp_path / "lying.nii", orientation=codes), expected)


@pytest.mark.parametrize("endianness", ["<", ">"])
def test_analyze_of_both_byte_orders(tmp_path, endianness):
    header = nib.AnalyzeHeader(endianness=endianness)
    header.set_data_dtype(np.int16)
    data = brain()[::-1]  # Analyze counts from the right
    header.set_data_shape(data.shape)
    header.set_zooms((1, 1, 1))
    nib.AnalyzeImage(data, None, header).to_filename(tmp_path / "v.img")
    assert (tmp_path / "v.hdr").read_bytes()[:4] == (348).to_bytes(4, "little" if endianness == "<" else "big")
    assert np.array_equal(slices_of(tmp_path / "v.img"), slices_of(save(tmp_path / "v.nii", brain())))


def test_voxel_sizes_are_honoured(tmp_path):
    ball = np.zeros((30, 60, 20), np.int16)
    x, y, z = np.meshgrid(*[(np.arange(n) - (n - 1) / 2) * mm for n, mm in zip(ball.shape, (2, 1, 3), strict=True)])
    ball[np.transpose(x**2 + y**2 + z**2 < 25**2, (1, 0, 2))] = 100
    middle = slices_of(save(tmp_path / "v.nii", ball, (2.0, 1.0, 3.0)), lowest=0.5, highest=0.5, slices=1)[0]
    high, wide = (np.flatnonzero((middle > 127).any(axis=axis)) for axis in (1, 0))
    assert abs(len(high) - 50) <= 2
    assert abs(len(wide) - 50) <= 2
    assert abs(high.mean() - 127.5) <= 1
    assert abs(wide.mean() - 127.5) <= 1


def test_a_volume_larger_than_a_slice_keeps_its_brain(tmp_path):
    data = np.zeros((300, 280, 3), np.int16)
    data[5:105, 170:270] = np.arange(100)[:, None, None] + 100
    picture = slices_of(save(tmp_path / "v.nii", data))[0]
    assert np.count_nonzero(picture) == 100 * 100


def test_intensities_are_scaled_by_robust_percentiles_and_the_background_is_0(tmp_path):
    data = brain().astype(np.float32)
    expected = slices_of(save(tmp_path / "v.nii", data))
    assert expected.max() == 255
    assert 0.3 < (expected[1] > 0)[120:136, 120:136].mean() <= 1
    data[10, 12, 9] = 1e6  # one wild voxel
    assert np.mean(np.abs(slices_of(save(tmp_path / "w.nii", data)).astype(int) - expected)) < 0.5
    shifted = np.where(data == 0, -1000.0, data).astype(np.float32)
    assert (slices_of(save(tmp_path / "s.nii", shifted))[:, 0, 0] == 0).all()


def test_a_background_that_is_not_quite_even_is_0(tmp_path):
    data = brain().astype(np.float32)
    noise = np.where(data == 0, np.random.default_rng(0).normal(0, 1e-3, data.shape), 0).astype(np.float32)
    expected = slices_of(save(tmp_path / "v.nii", data))
    assert np.array_equal(slices_of(save(tmp_path / "n.nii", data + noise)) == 0, expected == 0)


def test_nans_and_infinities_are_background(tmp_path):
    data = brain().astype(np.float32)
    data[data == 0] = np.nan
    data[10, 12, 9] = np.inf
    filled = slices_of(save(tmp_path / "v.nii", data))
    assert (filled[:, 0, 0] == 0).all()
    assert filled.max() == 255


def test_of_4_d_the_first_volume_and_of_2_d_the_only_slice(tmp_path):
    expected = slices_of(save(tmp_path / "v.nii", brain()))
    four = np.stack([brain(), brain()[::-1]], axis=3)
    nib.Nifti1Image(four, nib.load(tmp_path / "v.nii").affine).to_filename(tmp_path / "four.nii.gz")
    assert np.array_equal(slices_of(tmp_path / "four.nii.gz"), expected)
    nib.Nifti1Image(brain()[:, :, 9], np.eye(4)).to_filename(tmp_path / "two.nii.gz")
    assert slices_of(tmp_path / "two.nii.gz").shape == (1, 256, 256)


def test_between_thick_slices_it_is_interpolated(tmp_path):
    data = np.zeros((20, 20, 3), np.int16)
    data[5:15, 5:15] = [100, 200, 300]
    made = slices_of(save(tmp_path / "v.nii", data, (1, 1, 5.0)), lowest=0.0, highest=1.0, slices=5)
    middle = made[:, 128, 128].astype(int)
    assert np.all(np.diff(middle) > 0)
    assert abs(middle[1] - (middle[0] + middle[2]) / 2) <= 1


def test_positions_are_world_coordinates_in_an_atlas_and_shares_of_the_brain_elsewhere(tmp_path):
    whole, cut_off = brain((20, 24, 96)), brain((20, 24, 96))
    cut_off[:, :, :40] = 0  # the lower half is missing
    for name, same in (("a_t88_masked_gfc.nii", True), ("aligned_norm.nii", True), ("other.nii", False)):
        places = [
            oasis.slice_places(oasis.read_volume(save(tmp_path / str(i) / name, data), name), options())
            for i, data in enumerate((whole, cut_off))
        ]
        assert np.array_equal(*places) == same, name
    said = nib.load(tmp_path / "0" / "other.nii")
    assert not oasis.read_volume(tmp_path / "0" / "other.nii", "other.nii").in_atlas
    said.set_sform(said.affine, code="mni")
    said.to_filename(tmp_path / "mni.nii")
    assert oasis.read_volume(tmp_path / "mni.nii", "mni.nii").in_atlas
    volume = oasis.read_volume(tmp_path / "0" / "aligned_norm.nii", "aligned_norm.nii")
    world = np.interp(oasis.slice_places(volume, options()), np.arange(96), volume.world)
    assert [world[0], world[-1]] == pytest.approx(list(oasis.ATLAS_RANGE))


def refused(function, *arguments) -> str:
    with pytest.raises((oasis.OasisError, checkpoint.RunError)) as error:
        function(*arguments)
    assert "\n" not in dataset.one_line(error.value)
    return dataset.one_line(error.value)


def test_volumes_that_cannot_be_used_are_named(tmp_path):
    (tmp_path / "text.nii").write_text("not a volume")
    assert refused(oasis.read_volume, tmp_path / "text.nii", "text.nii").startswith(
        "text.nii: is not a volume that can be read ("
    )
    cut_off = save(tmp_path / "cut.nii", brain())
    cut_off.write_bytes(cut_off.read_bytes()[:5000])
    assert refused(oasis.read_volume, cut_off, "cut.nii").startswith("cut.nii: is not a volume that can be read (")
    save(tmp_path / "flat.nii", np.full((8, 8, 8), 7, np.int16))
    assert refused(oasis.read_volume, tmp_path / "flat.nii", "flat.nii") == (
        "flat.nii: holds no brain, one value only; replace or remove it"
    )
    header = bytearray(save(tmp_path / "bomb.nii", brain()).read_bytes())
    header[42:48] = np.array([32000, 32000, 32000], "<i2").tobytes()
    (tmp_path / "bomb.nii").write_bytes(header)
    assert refused(oasis.read_volume, tmp_path / "bomb.nii", "bomb.nii") == (
        "bomb.nii: has 32000 × 32000 × 32000 voxels, too many for a brain"
    )


# ------------------------------------------------------------------------------------------------ layouts


def discs(folder: Path, people: int = 6, again: tuple[int, ...] = (2,)) -> Path:
    """The layout of the OASIS-1 discs; some people have a second session."""
    for person in range(1, people + 1):
        for session in (1, 2) if person in again else (1,):
            place = folder / f"disc{person % 2 + 1}" / f"OAS1_{person:04d}_MR{session}"
            name = f"OAS1_{person:04d}_MR{session}_mpr_n4_anon"
            atlas = place / "PROCESSED" / "MPRAGE" / "T88_111"
            data = brain((20, 24, 96), seed=10 * person + session)
            save(atlas / f"{name}_111_t88_masked_gfc.img", data, kind=nib.AnalyzeImage)
            save(atlas / f"{name}_111_t88_gfc.img", data, kind=nib.AnalyzeImage)
            save(place / "FSL_SEG" / f"{name}_111_t88_masked_gfc_fseg.img", data, kind=nib.AnalyzeImage)
    return folder


def packed(folder: Path, into: Path) -> Path:
    into.mkdir()
    for disc in sorted(folder.iterdir()):
        with tarfile.open(into / f"oasis_cross-sectional_{disc.name}.tar.gz", "w:gz") as archive:
            archive.add(disc, disc.name)
    return into


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, Path]:
    """Discs, and slices of them."""
    root = tmp_path_factory.mktemp("oasis")
    oasis.main(options(discs(root / "discs"), root / "slices"))
    return root / "discs", root / "slices"


def test_discs_become_slices_that_the_driver_reads(made):
    files = dataset.find(made[1])
    cases = {split: {file.case for file in found} for split, found in files.items()}
    assert sorted(len(found) for found in cases.values()) == [1, 1, 4]
    assert set.union(*cases.values()) == {f"case_{i:03d}" for i in range(1, 7)}
    assert sum(len(found) for found in files.values()) == 7 * 4
    assert {file.position for found in files.values() for file in found} == {0, 1, 2, 3}
    with Image.open(files["train"][0].path) as picture:
        assert (picture.mode, picture.size) == ("L", (256, 256))
    second = [path.name for path in made[1].rglob("*_session_2.nii.png")]
    assert sorted(second) == [f"case_002_slice_{k}_session_2.nii.png" for k in range(4)]
    assert len(list(dataset.load(made[1], 32, 0)["train"].images)) in (16, 20)


def test_the_manifest_names_every_slice_and_its_source(made):
    with open(made[1] / "manifest.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {(row["split"], row["file"]) for row in rows} == {
        (path.parent.name.removeprefix("keras_png_slices_"), path.name) for path in made[1].rglob("*.png")
    }
    assert list(rows[0]) == ["case", "source", "session", "slice", "world_mm", "split", "file"]
    assert rows[0]["source"].endswith("OAS1_0001_MR1_mpr_n4_anon_111_t88_masked_gfc.hdr")
    assert [float(row["world_mm"]) for row in rows[:4]] == pytest.approx(np.linspace(*oasis.ATLAS_RANGE, 4), abs=0.01)
    assert {row["session"] for row in rows} == {"MR1", "MR2"}
    assert "P50 AG05681" in (made[1] / "ACKNOWLEDGEMENT.txt").read_text()


def test_archives_give_the_same_slices(made, tmp_path):
    oasis.main(options(packed(made[0], tmp_path / "packed"), tmp_path / "slices"))
    pngs = [
        {n: c for n, c in contents(folder).items() if n.endswith("png")} for folder in (made[1], tmp_path / "slices")
    ]
    assert pngs[0] == pngs[1]


def test_halves_of_pairs_may_come_in_any_order_and_one_may_lack(made, tmp_path, capsys):
    headers, images = (sorted(made[0].rglob(f"*_masked_gfc{suffix}")) for suffix in (".hdr", ".img"))
    images = [path for path in images if "OAS1_0001" not in path.name]
    archive = tmp_path / "packed" / "disc.tar"
    archive.parent.mkdir()
    with tarfile.open(archive, "w") as tar:
        for path in [*headers, *images]:  # the first person has a header only
            tar.add(path, path.relative_to(made[0]))
    oasis.main(options(archive.parent, tmp_path / "slices"))
    assert capsys.readouterr().err.count("was not found whole in") == 1
    assert not list((tmp_path / "slices").rglob("case_001_*"))
    (one,) = (tmp_path / "slices").rglob("case_003_slice_1.nii.png")
    (expected,) = made[1].rglob("case_003_slice_1.nii.png")
    assert one.read_bytes() == expected.read_bytes()


def test_the_same_seed_gives_the_same_split_and_another_another(tmp_path):
    people = [f"OAS1_{i:04d}" for i in range(1, 355)]
    splits = [oasis.split_people(people, options(seed=seed)) for seed in (0, 0, 1)]
    assert splits[0] == splits[1]
    assert splits[0] != splits[2]
    counts = [sum(split == name for split in splits[0].values()) for name in dataset.SPLITS]
    assert counts == [301, 35, 18]


def test_neurite_oasis_in_the_atlas_or_as_its_slice(tmp_path):
    for person in range(1, 4):
        folder = tmp_path / "neurite" / f"OASIS_OAS1_{person:04d}_MR1"
        for name in ("norm.nii.gz", "orig.nii.gz", "seg4.nii.gz"):
            save(folder / name, brain((20, 24, 96), seed=person))
        if person != 3:
            save(folder / "aligned_norm.nii.gz", brain((20, 24, 96), seed=person))
    found = oasis.find(tmp_path / "neurite")
    names = [one.name.split("/")[1] for one in next(iter(found.values()))]
    assert names == ["aligned_norm.nii.gz", "aligned_norm.nii.gz", "norm.nii.gz"]
    flat = tmp_path / "2d" / "OASIS_OAS1_0007_MR1"
    nib.Nifti1Image(brain()[:, :, 9], np.eye(4)).to_filename(save(flat / "slice_norm.nii.gz", brain()))
    oasis.main(options(tmp_path / "2d", tmp_path / "slices"))
    assert [path.name for path in (tmp_path / "slices").rglob("*.png")] == ["case_007_slice_0.nii.png"]


def test_any_folder_of_volumes_but_not_its_masks(tmp_path):
    for name in (
        "a/sub-01_T1w.nii.gz",
        "a/sub-01_mask.nii.gz",
        "b/sub-02/ses-1/x.nii",
        "b/sub-02/ses-2/x.nii",
        "c.mgz",
    ):
        save(tmp_path / "v" / name, brain().astype(np.float32), kind=nib.MGHImage if "mgz" in name else nib.Nifti1Image)
    (found,) = oasis.find(tmp_path / "v").values()
    assert [(one.person, one.session) for one in found] == [
        ("sub-01", "ses-1"),
        ("sub-02", "ses-1"),
        ("sub-02", "ses-2"),
        ("c", "1"),
    ]


def test_what_was_killed_goes_on_and_ends_the_same(made, tmp_path, monkeypatch):
    cut, count = oasis.cut, itertools.count()

    def cut_until_killed(volume, place):
        if next(count) >= 10:
            raise checkpoint.Stopped(9)
        return cut(volume, place)

    source, again = made[0], tmp_path / "slices"
    monkeypatch.setattr(oasis, "cut", cut_until_killed)
    with pytest.raises(checkpoint.Stopped):
        oasis.main(options(source, again))
    ready = {path for path in (again / ".unfinished").rglob("*.png") if "unfinished-" not in str(path)}
    assert len(ready) in range(4, 12)
    monkeypatch.setattr(oasis, "cut", cut)
    write = checkpoint.write_text

    def write_until_killed(path, text):
        if path.name == "manifest.csv":
            raise checkpoint.Stopped(9)
        write(path, text)

    monkeypatch.setattr(checkpoint, "write_text", write_until_killed)
    with pytest.raises(checkpoint.Stopped):
        oasis.main(options(source, again))
    monkeypatch.setattr(checkpoint, "write_text", write)
    oasis.main(options(source, again))
    assert contents(again) == contents(made[1])
    before = contents(again)
    oasis.main(options(source, again))
    assert contents(again) == before


def test_a_broken_volume_is_left_out_by_name(made, tmp_path, capsys):
    source = tmp_path / "discs"
    shutil.copytree(made[0], source)
    broken = sorted(source.rglob("*_masked_gfc.img"))[0]
    broken.write_bytes(broken.read_bytes()[:100])
    oasis.main(options(source, tmp_path / "slices"))
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert len(warnings) == 1
    assert warnings[0].startswith(
        f"warning: left out: {broken.relative_to(source).with_suffix('.hdr')}: is not a volume"
    )
    assert len(list((tmp_path / "slices").rglob("*.png"))) == 6 * 4


def test_sources_and_destinations_that_cannot_be_used(made, tmp_path):
    assert refused(oasis.main, options(tmp_path / "nowhere", tmp_path / "out")) == (
        f"{tmp_path}/nowhere: no such file or folder; give the folder with the volumes or archives"
    )
    (tmp_path / "empty").mkdir()
    assert refused(oasis.main, options(tmp_path / "empty", tmp_path / "out")).startswith(
        f"{tmp_path}/empty: no volumes in it; give a folder with .nii.gz, "
    )
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.txt").write_text("precious")
    assert refused(oasis.main, options(made[0], tmp_path / "thesis")) == (
        f"{tmp_path}/thesis: holds other things; choose a new folder"
    )
    assert refused(oasis.main, options(made[0], made[1], seed=1)) == (
        f"{made[1]}: holds slices made otherwise (seed was 0, is 1); choose a new folder"
    )
    assert refused(oasis.main, options(made[0])) == (
        "1 paths are given: must be SOURCE DESTINATION; see oasis.py --help"
    )
    assert refused(oasis.main, options(made[0], tmp_path / "out", orientation="LLA")) == (
        "orientation is LLA: must be three of L or R, A or P, I or S, such as LIA"
    )
    assert refused(oasis.main, options(made[0], tmp_path / "out", lowest=5.0, highest=5.0)) == (
        "lowest is 5.0: must be below highest, 5.0"
    )
    assert refused(oasis.main, options(made[0], tmp_path / "out", test_share=0.95)) == (
        "validate_share and test_share are 0.1 and 0.95: must be below 1 together"
    )
    archive = packed(made[0], tmp_path / "packed") / "oasis_cross-sectional_disc1.tar.gz"
    archive.write_bytes(archive.read_bytes()[:20_000])
    assert refused(oasis.main, options(archive, tmp_path / "out")).startswith(f"{archive}: is a broken archive (")


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
    oasis.main(options(archive.parent, tmp_path / "slices"))
    after = {path for path in tmp_path.parent.rglob("*") if "slices" not in path.parts}
    assert after == before
    assert len(list((tmp_path / "slices").rglob("*.png"))) == 3 * 4  # the plain files, under names of our own


def test_a_member_that_is_too_large_is_left_out(made, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(oasis, "MAX_MEMBER_BYTES", 1000)
    source = packed(made[0], tmp_path / "packed")
    assert refused(oasis.main, options(source, tmp_path / "slices")) == f"{source}: none of its volumes can be read"
    assert capsys.readouterr().err.count("was not found whole in") == 7


def test_the_driver_says_how_to_make_slices(made, tmp_path):
    archives = packed(made[0], tmp_path / "packed")
    for source in (made[0], archives, archives / "oasis_cross-sectional_disc1.tar.gz"):
        with pytest.raises(dataset.DataError) as error:
            dataset.find(source)
        assert str(error.value) == (
            f"{source}: holds volumes, not slices; make slices of them: python oasis.py {source} SLICES"
        )


# ---------------------------------------------------------------------------------------------- downloading


class Server(http.server.BaseHTTPRequestHandler):
    """Serves files with ranges; cuts the connection after `cut_after` bytes as often as `cuts` says."""

    files: dict[str, bytes] = {}
    cuts, cut_after = 0, 1000
    asked: list[str] = []

    def do_GET(self):
        name, server = self.path.lstrip("/"), type(self)
        if name not in self.files:
            self.send_error(404)
            return
        content, asked = self.files[name], self.headers.get("Range", "bytes=0-")
        server.asked.append(asked)
        begin = int(asked.removeprefix("bytes=").rstrip("-"))
        if begin >= len(content):
            self.send_error(416)
            return
        self.send_response(206)
        self.send_header("Content-Length", str(len(content) - begin))
        self.end_headers()
        if server.cuts:
            server.cuts -= 1
            self.wfile.write(content[begin : begin + self.cut_after])
            self.wfile.flush()
            self.connection.close()
            return
        self.wfile.write(content[begin:])

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(oasis, "WAIT_SECONDS", 0.01)
    monkeypatch.setattr(oasis, "CHUNK_BYTES", 100)
    content = np.random.default_rng(0).bytes(5000)
    Server.files, Server.cuts, Server.asked = {"disc1.tar.gz": content, "disc2.tar.gz": content[::-1]}, 0, []
    served = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=served.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{served.server_port}"
    served.shutdown()
    served.server_close()


def table_of(tmp_path: Path, url: str, names=("disc1.tar.gz", "disc2.tar.gz"), **changes) -> Path:
    path = tmp_path / "table.json"
    files = [
        {
            "url": f"{url}/{name}",
            "size": 5000,
            "checksum": "sha256:" + hashlib.sha256(Server.files.get(name, b"")).hexdigest(),
            **changes,
        }
        for name in names
    ]
    path.write_text(json.dumps({"oasis1": files}))
    return path


def fetching(tmp_path: Path, table: Path, **constants) -> oasis.Options:
    return oasis.Options((tmp_path / "got",), download=True, table=table, **{"accept_terms": True, **constants})


def test_a_collection_is_fetched_once(tmp_path, server, capsys):
    table = table_of(tmp_path, server)
    oasis.main(fetching(tmp_path, table))
    assert contents(tmp_path / "got") == Server.files
    assert "do not try to\nidentify" in capsys.readouterr().out
    asked = len(Server.asked)
    oasis.main(fetching(tmp_path, table))
    assert len(Server.asked) == asked


def test_discs_that_were_fetched_become_slices(made, tmp_path, server):
    Server.files = contents(packed(made[0], tmp_path / "served"))
    Server.cuts = 2
    oasis.main(fetching(tmp_path, table_of(tmp_path, server, sorted(Server.files), size=0)))
    oasis.main(options(tmp_path / "got", tmp_path / "slices"))
    assert len(list((tmp_path / "slices").rglob("*.png"))) == 7 * 4


def test_a_connection_that_is_cut_is_taken_up_again(tmp_path, server):
    Server.cuts = 3
    oasis.main(fetching(tmp_path, table_of(tmp_path, server)))
    assert contents(tmp_path / "got") == Server.files
    assert Server.asked[:4] == ["bytes=0-", "bytes=1000-", "bytes=2000-", "bytes=3000-"]


def test_a_connection_that_is_always_cut_ends_in_one_line_and_goes_on_later(tmp_path, server):
    Server.cuts, Server.cut_after = 5, 100
    table = table_of(tmp_path, server)
    line = refused(oasis.main, fetching(tmp_path, table))
    assert line.startswith(f"{server}/disc1.tar.gz: the connection was cut 5 times (")
    assert line.endswith("); the same command goes on")
    Server.cut_after = 1000
    oasis.main(fetching(tmp_path, table))
    assert Server.asked[5] == "bytes=500-"
    assert contents(tmp_path / "got") == Server.files


def test_a_wrong_checksum_is_refused_and_the_file_removed(tmp_path, server):
    table = table_of(tmp_path, server, checksum="md5:" + "0" * 32)
    assert refused(oasis.main, fetching(tmp_path, table)) == (
        f"{tmp_path}/got/disc1.tar.gz: came with another checksum than md5:{'0' * 32}; try again, or see "
        f"{server}/disc1.tar.gz"
    )
    assert contents(tmp_path / "got") == {}


def test_a_wrong_size_is_refused_where_no_checksum_is_known(tmp_path, server):
    table = table_of(tmp_path, server, checksum="", size=4999)
    assert refused(oasis.main, fetching(tmp_path, table)) == (
        f"{tmp_path}/got/disc1.tar.gz: came with 5000 bytes, not 4999; try again, or see {server}/disc1.tar.gz"
    )
    assert contents(tmp_path / "got") == {}


def test_a_file_that_is_not_there(tmp_path, server):
    table = table_of(tmp_path, server, names=("disc3.tar.gz",))
    assert refused(oasis.main, fetching(tmp_path, table)) == f"{server}/disc3.tar.gz: answers 404 Not Found"


def test_a_full_disk_keeps_what_has_come(tmp_path, server, monkeypatch):
    table, append = table_of(tmp_path, server), oasis._append

    def until_full(answer, part, begin):
        part.write_bytes(answer.raw.read(2000))
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(oasis, "_append", until_full)
    assert refused(oasis.main, fetching(tmp_path, table)) == (
        f"{tmp_path}/got: cannot be written (No space left on device); make room, then the same command goes on"
    )
    monkeypatch.setattr(oasis, "_append", append)
    oasis.main(fetching(tmp_path, table))
    assert Server.asked[1] == "bytes=2000-"
    assert contents(tmp_path / "got") == Server.files


def test_terms_must_be_accepted(tmp_path, server, monkeypatch):
    settings = fetching(tmp_path, table_of(tmp_path, server), accept_terms=False)
    line = "the terms were not accepted; give --accept-terms once you have read them"
    monkeypatch.setattr("sys.stdin", io.StringIO("yes\n"))  # not a person at a terminal
    assert refused(oasis.main, settings) == line
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda prompt: "no")
    assert refused(oasis.main, settings) == line
    assert Server.asked == []
    monkeypatch.setattr("builtins.input", lambda prompt: "yes")
    oasis.main(settings)
    assert contents(tmp_path / "got") == Server.files


@pytest.mark.parametrize("content", ["", "[]", '{"oasis1": [{}]}', '{"oasis1": 3}'])
def test_a_table_that_is_none_is_refused(tmp_path, content):
    (tmp_path / "table.json").write_text(content)
    assert refused(oasis.main, fetching(tmp_path, tmp_path / "table.json")).startswith(
        f'{tmp_path}/table.json: is no table of {{"name": [{{"url": …, "size": …, "checksum": "md5:…"}}]}} ('
    )


def test_the_built_in_table_is_whole():
    assert [len(oasis.TABLE[name]) for name in ("oasis1", "neurite")] == [12, 1]
    assert len({file["url"] for file in oasis.TABLE["oasis1"]}) == 12
    assert all(1.2e9 < file["size"] < 1.5e9 for file in oasis.TABLE["oasis1"])


def test_a_command_line_ends_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["oasis.py", str(tmp_path / "nowhere"), str(tmp_path / "out")])
    monkeypatch.setattr(checkpoint, "stop_on_signals", lambda: None)
    assert oasis.command_line() == 2
    assert capsys.readouterr().err == (
        f"error: {tmp_path}/nowhere: no such file or folder; give the folder with the volumes or archives\n"
    )
