"""From OASIS-1 volumes to the PNG slices that driver.py reads.

    python oasis.py --download DOWNLOADS      fetch OASIS-1, after showing its terms
    python oasis.py DOWNLOADS SLICES          make 256 × 256 slices of it
    python driver.py --data-dir SLICES        learn them

SOURCE may be the OASIS-1 discs, extracted or as the .tar.gz files they come in (Marcus et al. 2007), the
Neurite-OASIS collection (Hoopes et al. 2021), or any folder of skull-stripped NIfTI or Analyze volumes. Archives are
read member by member and never unpacked. Cut off and started again, it goes on where it stopped.
"""

import contextlib
import csv
import hashlib
import io
import json
import os
import re
import shutil
import sys
import tarfile
import tempfile
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import pooch
import requests
import tyro
from PIL import Image

import checkpoint
import dataset

SIZE, MM_PER_PIXEL = 256, 1.0  # of a slice: height and width in pixels, and what a pixel measures
ATLAS_RANGE = (-16.0, 46.0)  # mm: world coordinates of the lowest and highest slice, where volumes are in an atlas
EXTENT_RANGE = (0.37, 0.75)  # the same as shares of the brain's height, where they are not
PERCENTILE = 99.5  # of the brain's intensities: what becomes white
MAX_VOXELS, MAX_MEMBER_BYTES = 512**3, 2**30  # larger volumes and members are refused before they are read
IN_ATLAS = ("t88", "aligned")  # words in file names that say so; NIfTI files can say so themselves
ATLAS_CODES = (3, 4)  # of a NIfTI file's sform: Talairach, MNI
# Options that slices depend on: other ones in the same destination are refused.
SETTINGS = ("slices", "lowest", "highest", "validate_share", "test_share", "seed", "orientation")
OF_OASIS = (r"_t88_masked_gfc\.", r"/aligned_norm\.", r"/norm\.", r"/slice_norm\.")  # volumes, the best first

ACKNOWLEDGEMENT = """\
Data were provided by OASIS-1: Cross-Sectional: Principal Investigators: D. Marcus, R. Buckner, J. Csernansky,
J. Morris; P50 AG05681, P01 AG03991, P01 AG026276, R01 AG021910, P20 MH071616, U24 RR021382.

Marcus, Wang, Parker, Csernansky, Morris, Buckner: Open Access Series of Imaging Studies (OASIS): Cross-Sectional MRI
Data in Young, Middle Aged, Nondemented, and Demented Older Adults. Journal of Cognitive Neuroscience 19:1498-1507,
2007.

Slices of the Neurite-OASIS collection also ask for: Hoopes, Hoffmann, Greve, Fischl, Guttag, Dalca: Learning the Effect
of Registration Hyperparameters with HyperMorph. Machine Learning for Biomedical Imaging, 2022.
"""
TERMS = """\
OASIS is free for all who keep its data use agreement (https://sites.wustl.edu/oasisbrains/). In short: do not try to
identify or contact a participant; pass the data on only with these terms; acknowledge OASIS and its grants wherever
you publish anything made of it, generated slices included.
"""


class OasisError(Exception):
    """A source that cannot be used. The message is one line that names the file or option and says what to do."""


@dataclass(frozen=True)
class Options:
    """What to do; without --download, SOURCE and DESTINATION."""

    paths: tyro.conf.Positional[tuple[Path, ...]]  # SOURCE DESTINATION, or DESTINATION alone with --download
    download: bool = False  # fetch what its owners offer without a login
    accept_terms: bool = False  # of OASIS, without being asked
    collection: str = "oasis1"  # what to fetch: oasis1 (16 GB, 12 discs), or neurite (7 GB)
    table: Path | None = None  # JSON file of {collection: [{"url", "size", "checksum"}]} in place of the built-in one
    slices: int = 32  # of a volume
    lowest: float | None = None  # slice's place: mm in an atlas (None: -16), elsewhere share of the height (0.37)
    highest: float | None = None  # slice's place: mm in an atlas (None: 46), elsewhere share of the height (0.75)
    validate_share: float = 0.10  # of the people
    test_share: float = 0.05  # of the people
    seed: int = 0  # of the split
    orientation: str | None = None  # where the axes point, such as LIA, for files that do not say it right


# ------------------------------------------------------------------------------------------------ finding


@dataclass(frozen=True)
class Source:
    """A volume that was found. `name` is its path below SOURCE, after a ! the member's where it is in an archive."""

    name: str
    person: str
    session: str

    @property
    def key(self) -> str:
        """A folder name of its own."""
        return hashlib.sha256(self.name.encode("utf-8", "surrogateescape")).hexdigest()[:20]


def source_of(name: str) -> Source:
    """Person and session from a volume's path: OAS1_0001_MR1, or sub-01/ses-02, or else the file's own name."""
    if match := re.search(r"(OAS\d_\d{4})_(MR\d+)", name):
        return Source(name, match[1], match[2])
    if match := re.search(r"(sub-[A-Za-z0-9]+)(?:[/_](ses-[A-Za-z0-9]+))?", name):
        return Source(name, match[1], match[2] or "ses-1")
    return Source(name, _stem(name), "1")


def _stem(name: str) -> str:
    return next((name.removesuffix(suffix) for suffix in dataset.VOLUMES if name.lower().endswith(suffix)), name)


def choose(names: list[str]) -> list[str]:
    """Of all paths the volumes to make slices of.

    OASIS-1 and Neurite-OASIS, one for each session: the skull-stripped, gain-corrected one in the atlas, else in the
    person's own space, else its single slice. Elsewhere every volume that is not a mask by its name.
    """
    volumes = [n for n in names if n.lower().endswith(dataset.VOLUMES) and not n.rsplit("/", 1)[-1].startswith(".")]
    by_stem = {_stem(name): name for name in sorted(volumes, reverse=True)}  # of a pair the .hdr
    volumes = sorted(by_stem.values())
    best: dict[tuple[str, str], tuple[int, str]] = {}
    for name in volumes:
        source = source_of(name)
        rank = next((i for i, pattern in enumerate(OF_OASIS) if re.search(pattern, name)), None)
        if rank is not None:
            at = (source.person, source.session)
            best[at] = min(best.get(at, (rank, name)), (rank, name))
    if best:
        return sorted(name for _, name in best.values())
    return [name for name in volumes if not dataset.is_mask(name.rsplit("/", 1)[-1])]


def find(source: Path) -> dict[Path, list[Source]]:
    """The volumes of each place in SOURCE: an archive, or the folder itself.

    Raises:
        OasisError: nothing there, no volume in it, or an archive that is broken.
    """
    if not source.exists():
        raise OasisError(f"{source}: no such file or folder; give the folder with the volumes or archives")
    root = source.parent if source.is_file() else source
    files = [source] if source.is_file() else sorted(path for path in source.rglob("*") if path.is_file())
    archives = [path for path in files if path.name.lower().endswith(dataset.ARCHIVES)]
    place_of = {path.relative_to(root).as_posix(): root for path in files if path not in archives}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for archive, members in zip(archives, pool.map(list_members, archives), strict=True):
            place_of |= {f"{archive.relative_to(root).as_posix()}!{member}": archive for member in members}
    found: dict[Path, list[Source]] = {}
    for name in choose(list(place_of)):
        found.setdefault(place_of[name], []).append(source_of(name))
    if not found:
        raise OasisError(
            f"{source}: no volumes in it; give a folder with {', '.join(dataset.VOLUMES)} files or archives"
        )
    return found


def list_members(archive: Path) -> list[str]:
    """Names of the plain files in a tar archive. Raises OasisError if it is broken."""
    print(f"reading {archive.name}", file=sys.stderr)
    with _opened(archive) as tar:
        return [member.name for member in tar if member.isreg()]


@contextlib.contextmanager
def _opened(archive: Path) -> Iterator[tarfile.TarFile]:
    """A tar archive, read from its begin to its end. Raises OasisError if it is broken."""
    try:
        with tarfile.open(archive, "r|*") as tar:
            yield tar
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise OasisError(f"{archive}: is a broken archive ({error}); fetch it again") from error


# ------------------------------------------------------------------------------------------------ volumes


@dataclass(frozen=True)
class Volume:
    """A brain, axes to the right, the front and the top.

    data: (X, Y, Z) float32, scaled so that the brain reaches 1 and the background is exactly 0. zooms: mm of a voxel
    along each axis. world: (Z,) mm, the world coordinate of each slice. in_atlas: whether that means the same in all.
    """

    data: np.ndarray
    zooms: np.ndarray
    world: np.ndarray
    in_atlas: bool


def read_volume(path: Path, name: str, orientation: str | None = None) -> Volume:
    """Read a volume of any format that nibabel knows.

    Args:
        path: the file; of a pair either. name: what to call it.
        orientation: where its axes point, such as "LIA" (left, inferior, anterior), in place of what it says itself.

    Raises:
        OasisError: it cannot be read, is too large, or holds no brain.
    """
    try:
        image = nib.load(path)
        shape = image.shape[:3]
        if np.prod(shape, dtype=float) > MAX_VOXELS:
            raise OasisError(f"{name}: has {' × '.join(map(str, shape))} voxels, too many for a brain")
        data = np.asarray(image.dataobj[(..., *[0] * (len(image.shape) - 3))], np.float32)  # of 4-D ones the first
        affine = np.asarray(image.affine, float)
        zooms = np.asarray(image.header.get_zooms()[: data.ndim], float)
        says_atlas = isinstance(image.header, nib.Nifti1Header) and int(image.header["sform_code"]) in ATLAS_CODES
    except OasisError:
        raise
    except Exception as error:  # nibabel meets broken files with exceptions of any kind
        raise OasisError(f"{name}: is not a volume that can be read ({error}); replace or remove it") from error
    data, zooms = np.atleast_3d(data), np.append(zooms, [1.0] * (3 - len(zooms)))
    if not (np.isfinite(zooms).all() and (zooms > 0).all() and np.isfinite(affine).all()):
        raise OasisError(f"{name}: does not say how large its voxels are; replace or remove it")
    data, zooms, world = to_axes(data, zooms, affine, orientation)
    in_atlas = says_atlas or any(word in name.rsplit("/", 1)[-1].lower() for word in IN_ATLAS)
    return Volume(scaled(data, name), zooms, world, in_atlas and orientation is None)


def to_axes(data, zooms, affine, orientation: str | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Turn a volume (X, Y, Z), its voxels' sizes and its affine so that the axes point right, front, top.

    Returns:
        the data, the sizes, and the world coordinate in mm of each slice from below.
    """
    towards = nib.orientations.axcodes2ornt(orientation) if orientation else nib.io_orientation(affine)
    turned = nib.apply_orientation(data, towards)
    sizes = np.empty(3)
    sizes[towards[:, 0].astype(int)] = zooms
    right, front, top = turned.shape
    if orientation:
        return turned, sizes, (np.arange(top) - (top - 1) / 2) * sizes[2]
    at = affine @ nib.orientations.inv_ornt_aff(towards, data.shape)
    world = at[2, 0] * (right - 1) / 2 + at[2, 1] * (front - 1) / 2 + at[2, 2] * np.arange(top) + at[2, 3]
    return turned, sizes, world


def scaled(data: np.ndarray, name: str) -> np.ndarray:
    """Intensities from 0, the background and nothing else, to 1, the brain's `PERCENTILE`.

    The background is what stands in the corners, and all within a hundredth of the brightest from that; NaNs and
    infinities count as background.
    """
    finite = np.isfinite(data)
    corners = data[np.ix_(*[[0, -1]] * 3)]
    corners = corners[np.isfinite(corners)]
    background = float(np.median(corners)) if corners.size else 0.0
    distance = np.where(finite, np.abs(data - background), 0)
    if not distance.any():
        raise OasisError(f"{name}: holds no brain, one value only; replace or remove it")
    brain = distance > 0.01 * np.percentile(distance[distance > 0], PERCENTILE)
    low, high = np.percentile(data[brain], [100 - PERCENTILE, PERCENTILE])
    low = min(background, low) if background <= low else low
    bright = np.clip((np.where(brain, data, low) - low) / max(high - low, 1e-12), 0, 1)
    return np.where(brain, np.maximum(bright, 1 / 255), 0).astype(np.float32)


def slice_places(volume: Volume, options: Options) -> np.ndarray:
    """Where along Z the slices are cut, in voxels, from below; (slices,) float, one if the volume is one slice."""
    depth = volume.data.shape[2]
    if depth == 1:
        return np.zeros(1)
    if volume.in_atlas:
        lowest, highest = _range(options, ATLAS_RANGE)
        places = np.interp(np.linspace(lowest, highest, options.slices), volume.world, np.arange(depth))
    else:
        area = np.count_nonzero(volume.data, axis=(0, 1))
        inside = np.flatnonzero(area > 0.01 * area.max())
        lowest, highest = _range(options, EXTENT_RANGE)
        places = inside[0] + np.linspace(lowest, highest, options.slices) * (inside[-1] - inside[0])
    return np.clip(places, 0, depth - 1)


def _range(options: Options, default: tuple[float, float]) -> tuple[float, float]:
    lowest = default[0] if options.lowest is None else options.lowest
    return lowest, default[1] if options.highest is None else options.highest


def cut(volume: Volume, place: float) -> np.ndarray:
    """One axial slice (SIZE, SIZE) uint8: the front up, the person's left on the left, `MM_PER_PIXEL`.

    Between two slices of the volume it is interpolated linearly.
    """
    below, share = int(place), place - int(place)
    plane = volume.data[:, :, below]
    if share > 1e-6:
        plane = (1 - share) * plane + share * volume.data[:, :, below + 1]
    picture = Image.fromarray(np.ascontiguousarray(plane[:, ::-1].T))  # float32: rows from the front, columns from left
    size = tuple(max(1, round(n * zoom / MM_PER_PIXEL)) for n, zoom in zip(plane.shape, volume.zooms, strict=False))
    if size != picture.size:
        picture = picture.resize(size, Image.Resampling.BICUBIC)
    canvas = Image.new("F", (SIZE, SIZE))
    canvas.paste(picture, (_offset(volume, 0, size[0]), _offset(volume, 1, size[1])))
    return (np.clip(np.asarray(canvas), 0, 1) * 255).round().astype(np.uint8)


def _offset(volume: Volume, axis: int, side: int) -> int:
    """Where a picture of `side` pixels begins within the square: in its middle, or, if too large, with the brain there.

    axis: 0 from the left, 1 from the front.
    """
    if side <= SIZE:
        return (SIZE - side) // 2
    inside = np.flatnonzero(volume.data.any(axis=(1 - axis, 2)))
    centre = (inside[0] + inside[-1] + 1) / 2 * side / volume.data.shape[axis]
    return int(np.clip(round(SIZE / 2 - (side - centre if axis else centre)), SIZE - side, 0))


# ------------------------------------------------------------------------------------------------- slices


def main(options: Options) -> None:
    """Fetch, or make slices.

    Raises:
        OasisError: the source, the destination or an option cannot be used.
        checkpoint.RunError: something cannot be written.
    """
    check(options)
    if options.download:
        download(options, options.paths[0])
    else:
        make_slices(options, *options.paths)


def check(options: Options) -> None:
    """Refuse options that cannot work, by OasisError."""
    wanted = ("DESTINATION",) if options.download else ("SOURCE", "DESTINATION")
    if len(options.paths) != len(wanted):
        raise OasisError(f"{len(options.paths)} paths are given: must be {' '.join(wanted)}; see oasis.py --help")
    if options.slices < 1:
        raise OasisError(f"slices is {options.slices}: must be at least 1")
    shares = options.validate_share, options.test_share
    if min(shares) < 0 or sum(shares) >= 1:
        raise OasisError(f"validate_share and test_share are {shares[0]} and {shares[1]}: must be below 1 together")
    if None not in (options.lowest, options.highest) and not options.lowest < options.highest:
        raise OasisError(f"lowest is {options.lowest}: must be below highest, {options.highest}")
    if options.orientation and not re.fullmatch(r"(?=.*[LR])(?=.*[AP])(?=.*[IS])[LRAPIS]{3}", options.orientation):
        raise OasisError(f"orientation is {options.orientation}: must be three of L or R, A or P, I or S, such as LIA")


def make_slices(options: Options, source: Path, destination: Path) -> None:
    """Write the slices of all volumes in `source`, a manifest and the acknowledgement; goes on where it stopped.

    Slices are made in a hidden folder first: who goes to which split is known when all people are. A volume that cannot
    be read is left out and named.
    """
    settings = {field: getattr(options, field) for field in SETTINGS} | {"source": str(source.resolve())}
    record, staging = destination / "oasis.json", destination / ".unfinished"
    _refuse_others(destination, record, staging, settings)
    if record.exists():
        print(f"{destination} is complete; nothing to do. python driver.py --data-dir {destination}")
        return
    places = find(source)
    sources = [one for found in places.values() for one in found]
    print(f"{len(sources)} volumes of {len({one.person for one in sources})} people")
    checkpoint.write_text(staging / "settings.json", json.dumps(settings))

    bar, jobs = dataset.progress_bar(len(sources), "volumes"), []
    for place, found in places.items():
        missing = [one for one in found if not (staging / one.key).exists()]
        jobs += [(place, missing)] if place.is_file() and missing else [(place, [one]) for one in missing]
        bar.add(len(found) - len(missing))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        try:
            problems = list(pool.map(lambda job: cut_volumes(*job, staging, options, bar.add), jobs))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    for problem in sum(problems, []):
        print(f"warning: left out: {dataset.one_line(problem)}", file=sys.stderr)
    readable = [one for one in sources if (staging / one.key).exists()]
    if not readable:
        raise OasisError(f"{source}: none of its volumes can be read")
    distribute(readable, staging, destination, options)
    checkpoint.write_text(destination / "ACKNOWLEDGEMENT.txt", ACKNOWLEDGEMENT)
    checkpoint.write_text(record, json.dumps(settings, indent=2) + "\n")
    checkpoint.remove(staging)
    print(f"slices of {len(readable)} volumes: python driver.py --data-dir {destination}")


def _refuse_others(destination: Path, record: Path, staging: Path, settings: dict) -> None:
    """Raises OasisError if the destination holds anything but these slices, whole or in part."""
    made_with = next((path for path in (record, staging / "settings.json") if path.exists()), None)
    if made_with is None:
        if destination.exists() and (not destination.is_dir() or any(p != staging for p in destination.iterdir())):
            raise OasisError(f"{destination}: holds other things; choose a new folder")
        return
    saved = json.loads(made_with.read_text(encoding="utf-8"))
    differences = [f"{n} was {saved.get(n)}, is {v}" for n, v in settings.items() if saved.get(n) != v]
    if differences:
        raise OasisError(f"{destination}: holds slices made otherwise ({'; '.join(differences)}); choose a new folder")


def cut_volumes(place: Path, sources: list[Source], staging: Path, options: Options, done) -> list[str]:
    """Make the slices of some volumes of a folder or an archive; returns what is wrong with those left out.

    Each volume's slices appear together, as a folder of `staging` with the world coordinates beside them.
    """
    problems, seen = [], set()
    try:
        for one, path in _files(place, sources):
            seen.add(one)
            try:
                volume = read_volume(path, one.name, options.orientation)
            except OasisError as error:
                problems.append(str(error))
                continue
            places = slice_places(volume, options)
            with checkpoint.whole(staging / one.key) as folder:
                folder.mkdir()
                for k, at in enumerate(places):
                    Image.fromarray(cut(volume, at)).save(folder / f"{k}.png")
                world = np.interp(places, np.arange(len(volume.world)), volume.world).round(3).tolist()
                (folder / "world.json").write_text(json.dumps(world))
            done(1)
    except OasisError as error:
        problems.append(str(error))
    return problems + [f"{one.name}: was not found whole in {place}" for one in sources if one not in seen]


def _files(place: Path, sources: list[Source]) -> Iterator[tuple[Source, Path]]:
    """Each volume as a file that can be read: itself, or a copy, as long as it is needed, of an archive's member.

    Members are only ever copied into a temporary folder under names of our own, so nothing in an archive (absolute
    paths, "..", links, devices) can reach another place.
    """
    if place.is_dir():
        yield from ((one, place / one.name) for one in sources)
        return
    by_stem = {_stem(one.name.split("!", 1)[1]): one for one in sources}
    with tempfile.TemporaryDirectory() as folder, _opened(place) as archive:
        for member in archive:
            stem = _stem(member.name)
            if stem not in by_stem or not member.isreg() or member.size > MAX_MEMBER_BYTES:
                continue
            suffix = member.name[len(stem) :].lower()
            path = Path(folder) / f"{by_stem[stem].key}{suffix}"  # halves of pairs may come in any order
            other = {".img": ".hdr", ".hdr": ".img", ".img.gz": ".hdr.gz", ".hdr.gz": ".img.gz"}.get(suffix)
            with open(path, "wb") as file:
                shutil.copyfileobj(archive.extractfile(member), file)
            if other is None or (half := path.with_name(f"{by_stem[stem].key}{other}")).exists():
                yield by_stem[stem], path
                path.unlink()
                if other:
                    half.unlink()


def distribute(sources: list[Source], staging: Path, destination: Path, options: Options) -> None:
    """Move the slices to the folders of their splits, by person, and write manifest.csv."""
    people = sorted({one.person for one in sources})
    numbered = all(re.fullmatch(r"OAS1_\d{4}", person) for person in people)
    number = {person: int(person[5:]) if numbered else i for i, person in enumerate(people, start=1)}
    split_of = split_people(people, options)
    rows, sessions = [], dict.fromkeys(people, 0)
    for one in sorted(sources, key=lambda one: (one.person, one.session, one.name)):
        case, split = f"case_{number[one.person]:03d}", split_of[one.person]
        sessions[one.person] += 1
        suffix = "" if sessions[one.person] == 1 else f"_session_{sessions[one.person]}"  # of the same case
        folder = destination / f"keras_png_slices_{split}"
        folder.mkdir(parents=True, exist_ok=True)
        for k, world in enumerate(json.loads((staging / one.key / "world.json").read_text())):
            name = f"{case}_slice_{k}{suffix}.nii.png"
            if (made := staging / one.key / f"{k}.png").exists():  # else moved before the last kill
                made.replace(folder / name)
            rows.append([case, one.name, one.session, k, world, split, name])
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["case", "source", "session", "slice", "world_mm", "split", "file"])
    writer.writerows(rows)
    checkpoint.write_text(destination / "manifest.csv", table.getvalue())
    counts = {split: sum(s == split for s in split_of.values()) for split in dataset.SPLITS}
    print("people: " + ", ".join(f"{count} {split}" for split, count in counts.items()))
    if not all(counts.values()):
        print("warning: the driver needs people in all three splits; give it more volumes", file=sys.stderr)


def split_people(people: list[str], options: Options) -> dict[str, str]:
    """The split of each person, at random but fixed by the seed; at least one person in each where there are three."""
    order = np.random.default_rng([options.seed, 2]).permutation(sorted(people)).tolist()
    validate, test = (
        max(round(share * len(order)), int(share > 0 and len(order) >= 3))
        for share in (options.validate_share, options.test_share)
    )
    held_out = ["validate"] * validate + ["test"] * test
    return dict(zip(order, held_out + ["train"] * (len(order) - len(held_out)), strict=True))


# ---------------------------------------------------------------------------------------------- downloading

_DISCS = "https://download.nrg.wustl.edu/data/oasis_cross-sectional_disc{}.tar.gz"
_DISC_BYTES = (1380527970, 1403357161, 1343992875, 1333582060, 1362916370, 1364560560, 1390914852, 1332341152)
_DISC_BYTES += (1292937504, 1294865012, 1247923584, 1473055117)

# What is offered without a login. A checksum stands where one has been published; size is in bytes, 0 if not known.
# Discs without a checksum are checked by their size, and by the checksums within gzip when they are read.
TABLE = {
    "oasis1": [
        {"url": _DISCS.format(i), "size": size, "checksum": "md5:c83e216ef8654a7cc9e2a30a4cdbe0cc" if i == 1 else ""}
        for i, size in enumerate(_DISC_BYTES, start=1)
    ],
    "neurite": [
        {
            "url": "https://surfer.nmr.mgh.harvard.edu/ftp/data/neurite/data/neurite-oasis.v1.0.tar",
            "size": 0,
            "checksum": "md5:081392a8150ff99ab7a64a9ded377835",
        }
    ],
}
ATTEMPTS, WAIT_SECONDS = 5, 2.0  # of a download whose connection is cut
CHUNK_BYTES = 1 << 18  # at most so many are lost then


def download(options: Options, destination: Path) -> None:
    """Fetch a collection, going on with what is there. Raises OasisError, which names the address or file."""
    table = read_table(options.table)
    if options.collection not in table:
        raise OasisError(f"collection is {options.collection}: must be one of {', '.join(table)}")
    files = table[options.collection]
    print(TERMS)
    size = sum(file["size"] for file in files)
    print(f"{len(files)} files{f' of {size / 1e9:.1f} GB together' if size else ''} to {destination}")
    if not options.accept_terms:
        agreed = input("Type yes if you accept the terms: ") if sys.stdin.isatty() else ""
        if agreed.strip().lower() != "yes":
            raise OasisError("the terms were not accepted; give --accept-terms once you have read them")
    try:
        destination.mkdir(parents=True, exist_ok=True)
        for file in files:
            fetch(file["url"], file["size"], file["checksum"], destination)
    except OSError as error:
        raise OasisError(
            f"{destination}: cannot be written ({error.strerror or error}); make room, then the same command goes on"
        ) from error
    print(f"python oasis.py {destination} SLICES")


def read_table(path: Path | None) -> dict[str, list[dict]]:
    """The table of addresses, built in or a user's. Raises OasisError."""
    if path is None:
        return TABLE
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        return {
            name: [
                {"url": str(f["url"]), "size": int(f.get("size", 0)), "checksum": f.get("checksum", "")} for f in files
            ]
            for name, files in table.items()
        }
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise OasisError(
            f'{path}: is no table of {{"name": [{{"url": …, "size": …, "checksum": "md5:…"}}]}} ({error})'
        ) from error


def fetch(url: str, size: int, checksum: str, folder: Path) -> Path:
    """Fetch one file, unless it is there whole. Raises OasisError."""
    path = folder / url.rsplit("/", 1)[-1]

    def go_on(url: str, output: str, _) -> None:
        part = path.with_name(f"{path.name}.part")
        resume(url, part)
        os.replace(part, output)

    try:
        pooch.get_logger().setLevel("WARNING")
        pooch.retrieve(url, checksum or None, path.name, folder, downloader=go_on)
    except ValueError as error:  # pooch has compared the checksum, and removed the file
        raise OasisError(f"{path}: came with another checksum than {checksum}; try again, or see {url}") from error
    if size and path.stat().st_size != size:
        found = path.stat().st_size
        path.unlink()
        raise OasisError(f"{path}: came with {found} bytes, not {size}; try again, or see {url}")
    return path


def resume(url: str, part: Path) -> None:
    """Append what is missing of a file to `part`; a connection that is cut is tried again. Raises OasisError."""
    for attempt in range(ATTEMPTS):
        begin = part.stat().st_size if part.exists() else 0
        try:
            with requests.get(url, headers={"Range": f"bytes={begin}-"}, stream=True, timeout=30) as answer:
                if answer.status_code == requests.codes.range_not_satisfiable:
                    return  # all of it is here
                answer.raise_for_status()
                partial = answer.status_code == requests.codes.partial_content
                _append(answer, part, begin if partial else 0)
            return
        except requests.HTTPError as error:
            raise OasisError(f"{url}: answers {error.response.status_code} {error.response.reason}") from error
        except requests.RequestException as error:
            if attempt + 1 == ATTEMPTS:
                raise OasisError(
                    f"{url}: the connection was cut {ATTEMPTS} times ({type(error).__name__}); the same command goes on"
                ) from error
            time.sleep(WAIT_SECONDS)


def _append(answer: requests.Response, part: Path, begin: int) -> None:
    rest = int(answer.headers.get("Content-Length", 0))
    bar = dataset.progress_bar(max((begin + rest) >> 20, 1), f"MB of {part.stem}")
    with open(part, "r+b" if begin else "wb") as file:
        file.seek(begin)
        for chunk in answer.iter_content(CHUNK_BYTES):
            file.write(chunk)
            bar.update(file.tell() >> 20)


def command_line() -> int:
    """The exit status is 0, 2 for bad input, 130 after Ctrl-C and 143 after SIGTERM."""
    try:
        checkpoint.stop_on_signals()
        main(tyro.cli(Options, description=__doc__))
    except (OasisError, dataset.DataError, checkpoint.RunError) as error:
        print(f"error: {dataset.one_line(error)}", file=sys.stderr)
        return 2
    except checkpoint.Stopped as stopped:
        print("\nstopped; the same command goes on where it was", file=sys.stderr)
        return stopped.status
    return 0


if __name__ == "__main__":
    sys.exit(command_line())
