"""Time oasis.py on an archive like an OASIS-1 disc, made for it.

    python benchmarks/slices.py

A dozen sessions with the members of a real one: four raw scans, the averaged one, the atlas ones and the segmentation,
in the sizes that OASIS-1 has them, filled with noise in a head. Prints the time and what it means for all 436 sessions
of OASIS-1 in their 12 archives, then the same as JSON.
"""

import io
import json
import resource
import sys
import tarfile
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))

import oasis

SESSIONS_OF_OASIS = 436
RAW, ATLAS = (256, 256, 128), (176, 208, 176)


@dataclass(frozen=True)
class Options:
    """What to make."""

    sessions: int = 12
    archives: int = 2  # to share them between


def main(options: Options) -> None:
    with tempfile.TemporaryDirectory() as folder:
        packed = Path(folder) / "discs"
        packed.mkdir()
        for i in range(options.archives):
            with tarfile.open(packed / f"disc{i + 1}.tar.gz", "w:gz", compresslevel=1) as archive:
                for person in range(i, options.sessions, options.archives):
                    add_session(archive, person + 1)
        megabytes = sum(path.stat().st_size for path in packed.iterdir()) / 1e6
        begun = time.monotonic()
        oasis.main(oasis.Options((packed, Path(folder) / "slices")))
        seconds = time.monotonic() - begun
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    scaled = seconds / options.sessions * SESSIONS_OF_OASIS
    print(f"{options.sessions} sessions, {megabytes:.0f} MB packed: {seconds:.1f} s, at most {peak:.0f} MB of memory")
    print(f"so {SESSIONS_OF_OASIS} sessions: {scaled / 60:.1f} minutes")
    print(
        json.dumps({"sessions": options.sessions, "seconds": seconds, "minutes_for_436": scaled / 60, "peak_mb": peak})
    )


def add_session(archive: tarfile.TarFile, person: int) -> None:
    name = f"OAS1_{person:04d}_MR1"
    processed = f"disc/{name}/PROCESSED/MPRAGE"
    members = {f"disc/{name}/RAW/{name}_mpr-{i}_anon": RAW for i in range(1, 5)}
    members |= {f"{processed}/SUBJ_111/{name}_mpr_n4_anon_sbj_111": (256, 256, 160)}
    members |= {f"{processed}/T88_111/{name}_mpr_n4_anon_111_t88_{kind}": ATLAS for kind in ("gfc", "masked_gfc")}
    members |= {f"disc/{name}/FSL_SEG/{name}_mpr_n4_anon_111_t88_masked_gfc_fseg": ATLAS}
    for path, shape in members.items():
        header = nib.AnalyzeHeader(endianness=">")
        header.set_data_dtype(np.int16)
        header.set_data_shape(shape)
        header.set_zooms((1, 1, 1))
        image = nib.AnalyzeImage(head(shape, person), None, header)
        for suffix, content in zip((".hdr", ".img"), pair(image), strict=True):
            member = tarfile.TarInfo(path + suffix)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def head(shape: tuple[int, int, int], seed: int) -> np.ndarray:
    x, y, z = np.ogrid[tuple(slice(-1, 1, n * 1j) for n in shape)]
    inside = x**2 + y**2 + z**2 < 0.6
    noise = np.random.default_rng(seed).integers(200, 800, shape, np.int16)
    return np.where(inside, noise, np.int16(0))


def pair(image: nib.AnalyzeImage) -> tuple[bytes, bytes]:
    """The bytes of the .hdr and of the .img file."""
    files = image.make_file_map({"header": io.BytesIO(), "image": io.BytesIO()})
    image.to_file_map(files)
    return files["header"].fileobj.getvalue(), files["image"].fileobj.getvalue()


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
