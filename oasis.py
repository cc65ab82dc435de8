"""Convert OASIS-1 volumes to the PNG slices that driver.py reads.

    python oasis.py --download DOWNLOADS      download OASIS-1, after showing its terms
    python oasis.py DOWNLOADS SLICES          convert it to slices of 256 × 256 pixels
    python driver.py --data-dir SLICES        train on them

SOURCE can be the OASIS-1 discs, extracted or as .tar.gz files (Marcus et al. 2007), the Neurite-OASIS collection
(Hoopes et al. 2021), or any folder of skull-stripped NIfTI, Analyze or MGH volumes. Archives are read member by member
and never unpacked. If the command is interrupted, the same command continues where it stopped.
"""

import console

if __name__ == "__main__":
    console.start()

import contextlib
import csv
import hashlib
import io
import itertools
import json
import os
import re
import shutil
import sys
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import tyro
from PIL import Image

import download
import naming
import run
import seeds
from download import OasisError

SIZE, MM_PER_PIXEL = 256, 1.0  # Height and width of a slice in pixels, and the size of a pixel in millimetres.
ATLAS_RANGE = (-16.0, 46.0)  # World coordinates in mm of the lowest and highest slice of volumes in an atlas space.
EXTENT_RANGE = (0.37, 0.75)  # The same for other volumes, as fractions of the brain's height.
PERCENTILE = 99.5  # The percentile of the brain's intensities that becomes white.
MAX_VOXELS, MAX_MEMBER_BYTES = 512**3, 2**30  # Larger volumes and archive members are refused before they are read.
ATLAS_CODES = (3, 4)  # Values of sform_code in NIfTI headers: Talairach and MNI space.
# Options that the slices depend on. They must not change before a destination is complete.
SETTINGS = ("slices", "lowest", "highest", "validate_fraction", "test_fraction", "seed", "orientation")


@dataclass(frozen=True)
class Options:
    """Options of the command. SOURCE and DESTINATION are required, with --download only DESTINATION."""

    paths: tyro.conf.Positional[tuple[Path, ...]]  # SOURCE DESTINATION, or only DESTINATION with --download
    download: bool = False  # download a collection that is offered without a login
    accept_terms: bool = False  # accept the terms of OASIS without being asked
    collection: str = "oasis1"  # what to download: oasis1 (16 GB, 12 discs) or neurite (7 GB)
    table: Path | None = None  # JSON file of {collection: [{"url", "size", "checksum"}]}, replaces the built-in one
    slices: int = 32  # number of slices per volume
    lowest: float | None = None  # lowest slice: mm in an atlas space (None: -16), else fraction of the height (0.37)
    highest: float | None = None  # highest slice: mm in an atlas space (None: 46), else fraction of the height (0.75)
    validate_fraction: float = 0.10  # fraction of the subjects in the validation split
    test_fraction: float = 0.05  # fraction of the subjects in the test split
    seed: int = 0  # determines the split
    orientation: str | None = None  # where the axes point, such as LIA, for volumes with a wrong or missing affine


# ------------------------------------------------------------------------------------------------ finding


@dataclass(frozen=True)
class VolumeFile:
    """A volume in SOURCE. Its name is the path below SOURCE, followed by "!" and the member's path in an archive."""

    name: str
    subject: str
    session: str

    @property
    def key(self) -> str:
        """A unique name for a folder or file."""
        return hashlib.sha256(self.name.encode("utf-8", "surrogateescape")).hexdigest()[:20]


def find(source: Path) -> dict[Path, list[VolumeFile]]:
    """Find the volumes in `source`, grouped by container: an archive, or the folder itself.

    Raises:
        OasisError: `source` does not exist, contains no volumes, or an archive in it is damaged.
    """
    if not source.exists():
        raise OasisError(f"{source}: no such file or folder; give the folder with the volumes or archives")
    root = source.parent if source.is_file() else source
    paths = [source] if source.is_file() else sorted(path for path in source.rglob("*") if path.is_file())
    archives = [path for path in paths if naming.is_archive(path.name)]
    container_of = {path.relative_to(root).as_posix(): root for path in paths if path not in archives}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for archive, members in zip(archives, pool.map(list_members, archives), strict=True):
            container_of |= {f"{archive.relative_to(root).as_posix()}!{member}": archive for member in members}
    found: dict[Path, list[VolumeFile]] = {}
    for name in naming.select_volumes(list(container_of)):
        found.setdefault(container_of[name], []).append(VolumeFile(name, *naming.subject_and_session(name)))
    if not found:
        suffixes = ", ".join(naming.VOLUME_SUFFIXES)
        raise OasisError(f"{source}: contains no volumes; give a folder with {suffixes} files or tar archives of them")
    return found


def list_members(archive: Path) -> list[str]:
    """Return the names of the regular files in a tar archive. Raises `OasisError` if it is damaged."""
    print(f"reading {archive.name}", file=sys.stderr)
    with _open_archive(archive) as tar:
        return [member.name for member in tar if member.isreg()]


@contextlib.contextmanager
def _open_archive(archive: Path) -> Iterator[tarfile.TarFile]:
    """Open a tar archive to read it once, sequentially. Raises `OasisError` if it is damaged."""
    try:
        with tarfile.open(archive, "r|*") as tar:
            yield tar
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        if isinstance(error, OSError) and error.errno:
            raise  # Not damaged: it cannot be opened, or the disk is full.
        raise OasisError(f"{archive}: is a damaged archive ({error}); download it again") from error


# ------------------------------------------------------------------------------------------------ volumes


@dataclass(frozen=True)
class Volume:
    """A brain whose axes point to the right, to the front and to the top.

    Attributes:
        data: (X, Y, Z) float32 in [0, 1]. The background is exactly 0.
        zooms: (3,) size of a voxel in mm along each axis.
        world: (Z,) world coordinate of each axial slice in mm.
        in_atlas: Whether equal world coordinates mean the same anatomy in all volumes.
    """

    data: np.ndarray
    zooms: np.ndarray
    world: np.ndarray
    in_atlas: bool


def read_volume(path: Path, name: str, orientation: str | None = None) -> Volume:
    """Read a volume in any format that nibabel supports.

    Args:
        path: The file, or either file of a pair.
        name: What error messages call it.
        orientation: Where its axes point, such as "LIA" (left, inferior, anterior), if its affine is not to be used.

    Raises:
        OasisError: It cannot be read, is too large, or contains no brain.
    """
    try:
        image: Any = nib.load(path)
        shape = image.shape[:3]
        if np.prod(shape, dtype=float) > MAX_VOXELS:
            raise OasisError(f"{name}: has {' × '.join(map(str, shape))} voxels, too many for a brain; remove it")
        data = np.asarray(image.dataobj[(..., *[0] * (len(image.shape) - 3))], np.float32)  # The first of a 4-D file.
        affine = np.asarray(image.affine, float)
        zooms = np.asarray(image.header.get_zooms()[: data.ndim], float)
        says_atlas = isinstance(image.header, nib.Nifti1Header) and int(image.header["sform_code"]) in ATLAS_CODES
    except OasisError:
        raise
    except Exception as error:  # nibabel raises exceptions of any kind for damaged files.
        raise OasisError(f"{name}: is not a readable volume ({error}); replace or remove it") from error
    data, zooms = np.atleast_3d(data), np.append(zooms, [1.0] * (3 - len(zooms)))
    if not (np.isfinite(zooms).all() and (zooms > 0).all() and np.isfinite(affine).all()):
        raise OasisError(f"{name}: does not state the size of its voxels; replace or remove it")
    data, zooms, world = reorient(data, zooms, affine, orientation)
    in_atlas = says_atlas or naming.is_in_atlas(name)
    return Volume(normalise(data, name), zooms, world, in_atlas and orientation is None)


def reorient(
    data: np.ndarray, zooms: np.ndarray, affine: np.ndarray, orientation: str | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Permute and flip the axes of a volume so that they point to the right, to the front and to the top.

    Args:
        data: (X, Y, Z) volume.
        zooms: (3,) size of a voxel in mm along each axis.
        affine: (4, 4) affine from voxels to world coordinates.
        orientation: Where the axes point, such as "LIA". None takes it from the affine.

    Returns:
        The volume, the sizes of its voxels, and the world coordinate in mm of each axial slice from below.
    """
    axes = nib.orientations.axcodes2ornt(orientation) if orientation else nib.io_orientation(affine)
    reoriented = nib.apply_orientation(data, axes)
    sizes = np.empty(3)
    sizes[axes[:, 0].astype(int)] = zooms
    right, front, top = reoriented.shape
    if orientation:
        return reoriented, sizes, (np.arange(top) - (top - 1) / 2) * sizes[2]
    to_world = affine @ nib.orientations.inv_ornt_aff(axes, data.shape)
    middle = to_world[2, 0] * (right - 1) / 2 + to_world[2, 1] * (front - 1) / 2
    return reoriented, sizes, middle + to_world[2, 2] * np.arange(top) + to_world[2, 3]


def is_orientation(letters: str) -> bool:
    """Whether letters say where three axes point: one of L and R, one of A and P, one of I and S, such as LIA."""
    return re.fullmatch(r"(?=.*[LR])(?=.*[AP])(?=.*[IS])[LRAPIS]{3}", letters) is not None


def normalise(data: np.ndarray, name: str) -> np.ndarray:
    """Scale intensities so that only the background is 0 and the brain's `PERCENTILE` is 1.

    The background is the median of the volume's corners and all values that differ from it by at most a hundredth of
    the `PERCENTILE` of such differences. NaN and infinite values belong to it. Raises `OasisError` if nothing is left.
    """
    corners = data[np.ix_(*[[0, -1]] * 3)]
    corners = corners[np.isfinite(corners)]
    background = float(np.median(corners)) if corners.size else 0.0
    distance = np.where(np.isfinite(data), np.abs(data - background), 0)
    if not distance.any():
        raise OasisError(f"{name}: contains a single value, no brain; replace or remove it")
    brain = distance > 0.01 * np.percentile(distance[distance > 0], PERCENTILE)
    low, high = np.percentile(data[brain], [100 - PERCENTILE, PERCENTILE])
    low = min(background, low) if background <= low else low
    bright = np.clip((np.where(brain, data, low) - low) / max(high - low, 1e-12), 0, 1)
    return np.where(brain, np.maximum(bright, 1 / 255), 0).astype(np.float32)


def slice_indices(volume: Volume, options: Options) -> np.ndarray:
    """Return where to cut the slices: (slices,) fractional indices along Z, lowest first; one for a 2-D image."""
    depth = volume.data.shape[2]
    if depth == 1:
        return np.zeros(1)
    lowest, highest = ATLAS_RANGE if volume.in_atlas else EXTENT_RANGE
    lowest = lowest if options.lowest is None else options.lowest
    highest = highest if options.highest is None else options.highest
    heights = np.linspace(lowest, highest, options.slices)
    if volume.in_atlas:
        indices = np.interp(heights, volume.world, np.arange(depth))
    else:
        area = np.count_nonzero(volume.data, axis=(0, 1))
        inside = np.flatnonzero(area > 0.01 * area.max())
        indices = inside[0] + heights * (inside[-1] - inside[0])
    return np.clip(indices, 0, depth - 1)


def cut_slice(volume: Volume, index: float) -> np.ndarray:
    """Cut one axial slice. A fractional index interpolates linearly between two slices of the volume.

    Returns:
        (SIZE, SIZE) uint8 of `MM_PER_PIXEL`. The front is at the top, and the subject's left is on the left.
    """
    below, fraction = int(index), index - int(index)
    plane = volume.data[:, :, below]
    if fraction > 1e-6:
        plane = (1 - fraction) * plane + fraction * volume.data[:, :, below + 1]
    image = Image.fromarray(np.ascontiguousarray(plane[:, ::-1].T))  # float32. Rows begin at the front.
    width, height = (max(1, round(n * zoom / MM_PER_PIXEL)) for n, zoom in zip(plane.shape, volume.zooms, strict=False))
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    canvas = Image.new("F", (SIZE, SIZE))
    canvas.paste(image, (_offset(volume, 0, width), _offset(volume, 1, height)))
    return (np.clip(np.asarray(canvas), 0, 1) * 255).round().astype(np.uint8)


def _offset(volume: Volume, axis: int, side: int) -> int:
    """Return where an image of `side` pixels begins on the canvas: it is centred, or its brain if it is too large.

    Args:
        axis: 0 counts from the left, 1 from the front.
    """
    if side <= SIZE:
        return (SIZE - side) // 2
    inside = np.flatnonzero(volume.data.any(axis=(1 - axis, 2)))
    centre = (inside[0] + inside[-1] + 1) / 2 * side / volume.data.shape[axis]
    return int(np.clip(round(SIZE / 2 - (side - centre if axis else centre)), SIZE - side, 0))


# ------------------------------------------------------------------------------------------------- slices


def main(options: Options) -> None:
    """Download a collection or convert volumes to slices.

    Raises:
        OasisError: The source, the destination or an option cannot be used.
        run.RunError: A file cannot be written.
    """
    check(options)
    try:
        if options.download:
            destination = options.paths[0]
            download.download_collection(destination, options.collection, options.table, options.accept_terms)
            print(f"next: python oasis.py {destination} SLICES")
        else:
            convert(options, *options.paths)
    except OSError as error:
        raise OasisError(
            f"{error.filename or options.paths[-1]}: {error.strerror or error}; check the permissions, and the free "
            f"space there and in {tempfile.gettempdir()}, then run the same command again"
        ) from error


def check(options: Options) -> None:
    """Raise `OasisError` if an option cannot work."""
    wanted = ("DESTINATION",) if options.download else ("SOURCE", "DESTINATION")
    if len(options.paths) != len(wanted):
        raise OasisError(f"{len(options.paths)} paths are given: must be {' '.join(wanted)}; see oasis.py --help")
    if options.slices < 1:
        raise OasisError(f"slices is {options.slices}: must be at least 1")
    if options.seed < 0:
        raise OasisError(f"seed is {options.seed}: must be at least 0")
    validate, test = options.validate_fraction, options.test_fraction
    if not (validate >= 0 and test >= 0 and validate + test < 1):
        raise OasisError(
            f"validate_fraction is {validate} and test_fraction is {test}: must be at least 0, and below 1 together"
        )
    for name, value in (("lowest", options.lowest), ("highest", options.highest)):
        if value is not None and not np.isfinite(value):
            raise OasisError(f"{name} is {value}: must be finite")
    if options.lowest is not None and options.highest is not None and not options.lowest < options.highest:
        raise OasisError(f"lowest is {options.lowest}: must be below highest, which is {options.highest}")
    if options.orientation and not is_orientation(options.orientation):
        raise OasisError(f"orientation is {options.orientation}: must be three of L or R, A or P, I or S, such as LIA")


def convert(options: Options, source: Path, destination: Path) -> None:
    """Write the slices of all volumes in `source`, manifest.csv and the acknowledgement.

    If it was interrupted, it continues where it stopped. Slices are written to a hidden folder first, because the
    splits are known only when all subjects are. Volumes that cannot be read are left out with a warning.
    """
    settings = {field: getattr(options, field) for field in SETTINGS} | {"source": console.as_unicode(source.resolve())}
    record, staging = destination / "oasis.json", destination / ".unfinished"
    _check_destination(destination, record, staging, settings)
    if record.exists():
        print(f"{destination} is complete; next: python driver.py --data-dir {destination}")
        return
    found = find(source)
    volumes = [volume for group in found.values() for volume in group]
    print(f"{len(volumes)} volumes of {len({volume.subject for volume in volumes})} subjects")
    run.write_text(staging / "settings.json", json.dumps(settings))

    jobs: list[tuple[Path, list[VolumeFile]]] = []  # An archive is read by a single thread.
    for container, group in found.items():
        missing = [volume for volume in group if not (staging / volume.key).exists()]
        jobs += [(container, missing)] if container.is_file() else [(container, [volume]) for volume in missing]
    num_missing = sum(len(missing) for _, missing in jobs)
    with console.progress(num_missing, "volumes") as progress, ThreadPoolExecutor(os.cpu_count()) as pool:
        try:
            problems = list(pool.map(lambda j: convert_volumes(j[0], j[1], staging, options, progress.update), jobs))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    for problem in itertools.chain(*problems):
        console.warn(f"left out: {problem}")
    readable = [volume for volume in volumes if (staging / volume.key).exists()]
    if not readable:
        raise OasisError(f"{source}: none of its volumes can be read; replace them")
    move_to_splits(readable, staging, destination, options)
    run.write_text(destination / "ACKNOWLEDGEMENT.txt", download.ACKNOWLEDGEMENT)
    run.write_text(record, json.dumps(settings, indent=2) + "\n")
    run.remove(staging)
    print(f"wrote the slices of {len(readable)} volumes; next: python driver.py --data-dir {destination}")


def _check_destination(destination: Path, record: Path, staging: Path, settings: dict[str, Any]) -> None:
    """Raise `OasisError` if the destination contains anything but these slices, complete or not."""
    saved_at = next((path for path in (record, staging / "settings.json") if path.exists()), None)
    if saved_at is None:
        if destination.exists() and (not destination.is_dir() or any(p != staging for p in destination.iterdir())):
            raise OasisError(f"{destination}: is not empty; choose a new folder")
        return
    try:
        saved = dict(json.loads(saved_at.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise OasisError(f"{saved_at}: is damaged; choose a new folder") from error
    differences = [f"{name} was {saved.get(name)}, is {v}" for name, v in settings.items() if saved.get(name) != v]
    if differences:
        raise OasisError(
            f"{destination}: contains slices made with other options ({'; '.join(differences)}); choose a new folder"
        )


def convert_volumes(
    container: Path, volumes: list[VolumeFile], staging: Path, options: Options, advance: Callable[[int], object]
) -> list[str]:
    """Write the slices of some volumes of a folder or an archive.

    Each volume gets a folder in `staging`, which appears when it is complete, with its world coordinates in world.json.

    Args:
        advance: Called with 1 after each volume.

    Returns:
        What is wrong with the volumes that were left out.
    """
    problems, seen = [], set()
    try:
        for volume_file, path in _readable_files(container, volumes):
            seen.add(volume_file)
            try:
                volume = read_volume(path, volume_file.name, options.orientation)
            except OasisError as error:
                problems.append(str(error))
                continue
            indices = slice_indices(volume, options)
            with run.atomic_path(staging / volume_file.key) as folder:
                folder.mkdir()
                for k, index in enumerate(indices):
                    Image.fromarray(cut_slice(volume, index)).save(folder / f"{k}.png")
                world = np.interp(indices, np.arange(len(volume.world)), volume.world).round(3).tolist()
                (folder / "world.json").write_text(json.dumps(world))
            advance(1)
    except OasisError as error:
        problems.append(str(error))
    return problems + [f"{v.name}: is missing or incomplete in {container}" for v in volumes if v not in seen]


def _readable_files(container: Path, volumes: list[VolumeFile]) -> Iterator[tuple[VolumeFile, Path]]:
    """Yield each volume with a file to read it from: itself, or a temporary copy of an archive's member.

    Members are only copied into a temporary folder under names chosen here. Nothing in an archive (absolute paths,
    "..", links, devices) can reach another place.
    """
    if container.is_dir():
        yield from ((volume, container / volume.name) for volume in volumes)
        return
    by_stem = {naming.volume_stem(volume.name.split("!", 1)[1]): volume for volume in volumes}
    with tempfile.TemporaryDirectory() as folder, _open_archive(container) as archive:
        for member in archive:
            stem = naming.volume_stem(member.name)
            content = archive.extractfile(member) if member.isreg() else None
            if stem not in by_stem or content is None or member.size > MAX_MEMBER_BYTES:
                continue
            suffix = member.name[len(stem) :].lower()
            path = Path(folder) / f"{by_stem[stem].key}{suffix}"
            with open(path, "wb") as file:
                shutil.copyfileobj(content, file)
            # The two files of a pair can come in any order.
            other_suffix = {".img": ".hdr", ".hdr": ".img", ".img.gz": ".hdr.gz", ".hdr.gz": ".img.gz"}.get(suffix)
            other = path.with_name(f"{by_stem[stem].key}{other_suffix}") if other_suffix else None
            if other is None or other.exists():
                yield by_stem[stem], path
                path.unlink()
                if other:
                    other.unlink()


def move_to_splits(volumes: list[VolumeFile], staging: Path, destination: Path, options: Options) -> None:
    """Move the slices to the folders of their splits, by subject, and write manifest.csv."""
    subjects = sorted({volume.subject for volume in volumes})
    numbered = all(re.fullmatch(r"OAS1_\d{4}", subject) for subject in subjects)
    number = {subject: int(subject[5:]) if numbered else i for i, subject in enumerate(subjects, start=1)}
    split_of = split_subjects(subjects, options)
    rows, sessions = [], dict.fromkeys(subjects, 0)
    for volume in sorted(volumes, key=lambda volume: (volume.subject, volume.session, volume.name)):
        subject, split = f"case_{number[volume.subject]:03d}", split_of[volume.subject]
        sessions[volume.subject] += 1
        folder = destination / naming.split_folder(split)
        folder.mkdir(parents=True, exist_ok=True)
        for k, world in enumerate(json.loads((staging / volume.key / "world.json").read_text())):
            file = naming.slice_file(subject, k, sessions[volume.subject])
            if (staged := staging / volume.key / f"{k}.png").exists():  # Otherwise it was moved before an interruption.
                staged.replace(folder / file)
            rows.append([subject, console.as_unicode(volume.name), volume.session, k, world, split, file])
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["subject", "source", "session", "slice", "world_mm", "split", "file"])
    writer.writerows(rows)
    run.write_text(destination / "manifest.csv", table.getvalue())
    counts = {split: sum(s == split for s in split_of.values()) for split in naming.SPLITS}
    print("subjects: " + ", ".join(f"{count} {split}" for split, count in counts.items()))
    if not all(counts.values()):
        console.warn("the driver needs subjects in all three splits; convert more volumes into a new folder")


def split_subjects(subjects: list[str], options: Options) -> dict[str, str]:
    """Assign subjects to splits at random, determined by the seed. Of three or more subjects, each split gets one."""
    order = seeds.generator(options.seed, "split of volumes").permutation(sorted(subjects)).tolist()
    validate, test = (
        max(round(fraction * len(order)), int(fraction > 0 and len(order) >= 3))
        for fraction in (options.validate_fraction, options.test_fraction)
    )
    split_names = ["validate"] * validate + ["test"] * test
    return dict(zip(order, split_names + ["train"] * (len(order) - len(split_names)), strict=True))


def command_line() -> int:
    """Run the command and return its exit status (see `console.run_command`)."""
    return console.run_command(
        lambda: main(tyro.cli(Options, description=__doc__)), "run the same command again to continue"
    )


if __name__ == "__main__":
    sys.exit(command_line())
