"""Time and memory of oasis.py on archives like the discs of OASIS-1, which are made for this benchmark.

    python -m benchmarks.slices

A dozen sessions contain the files of a real one: four raw scans, their average, the atlas images and the segmentation,
in the sizes of OASIS-1, filled with noise within an ellipsoid. Prints the time, and what it means for all 436 sessions
of OASIS-1 in their 12 archives. Memory is the peak of a process of its own, less what it held after the imports.
"""

import io
import tarfile
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

import oasis
from benchmarks import common

OASIS_SESSIONS = 436
RAW, ATLAS = (256, 256, 128), (176, 208, 176)  # shapes of volumes


@dataclass(frozen=True)
class Options:
    """What to make."""

    sessions: int = 12  # number of sessions, each of another subject
    archives: int = 2  # number of archives that they are split into
    measure: Path | None = None  # convert the archives of this folder only; how the benchmark starts its child process


def main(options: Options) -> dict[str, Any]:
    """Make archives, convert them in a child process, and return the numbers."""
    if options.measure:
        return measure(options.measure)
    with tempfile.TemporaryDirectory() as folder:
        discs = Path(folder) / "discs"
        discs.mkdir()
        for i in range(options.archives):
            with tarfile.open(discs / f"disc{i + 1}.tar.gz", "w:gz", compresslevel=1) as archive:
                for session in range(i, options.sessions, options.archives):
                    add_session(archive, session + 1)
        megabytes = sum(path.stat().st_size for path in discs.iterdir()) / 1e6
        measured = common.run_child("benchmarks.slices", ["--measure", discs])
    seconds = measured["seconds"]
    minutes = seconds / options.sessions * OASIS_SESSIONS / 60
    numbers = common.report_machine()
    print(
        f"{options.sessions} sessions in {options.archives} archives of {megabytes:.0f} MB: {seconds:.1f} s and "
        f"{measured['peak_mb']:.0f} MB of memory"
    )
    print(f"{OASIS_SESSIONS} sessions at this speed: {minutes:.1f} minutes")
    return {**numbers, "sessions": options.sessions, **measured, f"minutes_for_{OASIS_SESSIONS}": minutes}


def measure(discs: Path) -> dict[str, float]:
    """Convert archives in this process; returns the seconds and the memory in MB."""
    before, start = common.peak_memory(), time.monotonic()
    oasis.main(oasis.Options((discs, discs.with_name("slices"))))
    return {"seconds": time.monotonic() - start, "peak_mb": (common.peak_memory() - before) / 1e6}


def add_session(archive: tarfile.TarFile, number: int) -> None:
    """Add the files of one session to an archive."""
    name = f"OAS1_{number:04d}_MR1"
    processed = f"disc/{name}/PROCESSED/MPRAGE"
    volumes = {f"disc/{name}/RAW/{name}_mpr-{i}_anon": RAW for i in range(1, 5)}
    volumes |= {f"{processed}/SUBJ_111/{name}_mpr_n4_anon_sbj_111": (256, 256, 160)}
    volumes |= {f"{processed}/T88_111/{name}_mpr_n4_anon_111_t88_{kind}": ATLAS for kind in ("gfc", "masked_gfc")}
    volumes |= {f"disc/{name}/FSL_SEG/{name}_mpr_n4_anon_111_t88_masked_gfc_fseg": ATLAS}
    for path, shape in volumes.items():
        header = nib.AnalyzeHeader(endianness=">")
        header.set_data_dtype(np.int16)
        header.set_data_shape(shape)
        header.set_zooms((1, 1, 1))
        image = nib.AnalyzeImage(noisy_ellipsoid(shape, number), None, header)
        for suffix, content in zip((".hdr", ".img"), analyze_files(image), strict=True):
            member = tarfile.TarInfo(path + suffix)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def noisy_ellipsoid(shape: tuple[int, int, int], seed: int) -> np.ndarray:
    """Return a volume of a shape, int16: noise from 200 to 799 within an ellipsoid, 0 outside."""
    x, y, z = np.ogrid[tuple(slice(-1, 1, n * 1j) for n in shape)]
    inside = x**2 + y**2 + z**2 < 0.6
    noise = np.random.default_rng(seed).integers(200, 800, shape, np.int16)
    return np.where(inside, noise, np.int16(0))


def analyze_files(image: nib.AnalyzeImage) -> tuple[bytes, bytes]:
    """Return the content of the .hdr file and of the .img file of an Analyze image."""
    header, content = io.BytesIO(), io.BytesIO()
    image.to_file_map(image.make_file_map({"header": header, "image": content}))
    return header.getvalue(), content.getvalue()


if __name__ == "__main__":
    common.run_benchmark(main, Options, __doc__)
