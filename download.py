"""Download OASIS-1: where it is offered, what its owners ask for, and resuming interrupted downloads.

`python oasis.py --download DESTINATION` is the command.
"""

import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pooch
import requests

import console

TERMS = """\
OASIS is free for everyone who accepts its data use agreement (https://sites.wustl.edu/oasisbrains/). In short: do not
try to identify or contact a participant; pass the data on under the same terms only; acknowledge OASIS and its grants
in everything that you publish, including generated slices.
"""
ACKNOWLEDGEMENT = """\
Data were provided by OASIS-1: Cross-Sectional: Principal Investigators: D. Marcus, R. Buckner, J. Csernansky,
J. Morris; P50 AG05681, P01 AG03991, P01 AG026276, R01 AG021910, P20 MH071616, U24 RR021382.

Marcus, Wang, Parker, Csernansky, Morris, Buckner: Open Access Series of Imaging Studies (OASIS): Cross-Sectional MRI
Data in Young, Middle Aged, Nondemented, and Demented Older Adults. Journal of Cognitive Neuroscience 19:1498-1507,
2007.

Slices of the Neurite-OASIS collection also ask for: Hoopes, Hoffmann, Greve, Fischl, Guttag, Dalca: Learning the Effect
of Registration Hyperparameters with HyperMorph. Machine Learning for Biomedical Imaging, 2022.
"""
MAX_ATTEMPTS, WAIT_SECONDS = 5, 2.0  # For a download whose connection is interrupted.
CHUNK_BYTES = 1 << 18  # An interruption loses at most this many bytes.


class OasisError(console.UserError):
    """Volumes or downloads that cannot be used."""


@dataclass(frozen=True)
class RemoteFile:
    """A file that can be downloaded without a login.

    Attributes:
        url: Its address.
        size: Its size in bytes, 0 if it is not known.
        checksum: Its checksum with the algorithm in front, such as `md5:...`, empty if none has been published.
    """

    url: str
    size: int = 0
    checksum: str = ""


_DISC_URL = "https://download.nrg.wustl.edu/data/oasis_cross-sectional_disc{}.tar.gz"
_DISC_SIZES = [1380527970, 1403357161, 1343992875, 1333582060, 1362916370, 1364560560]
_DISC_SIZES += [1390914852, 1332341152, 1292937504, 1294865012, 1247923584, 1473055117]
_DISC_CHECKSUMS = {1: "md5:c83e216ef8654a7cc9e2a30a4cdbe0cc"}

# A disc without a published checksum is checked by its size, and by the checksums within gzip when it is read.
COLLECTIONS = {
    "oasis1": [
        RemoteFile(_DISC_URL.format(disc), size, _DISC_CHECKSUMS.get(disc, ""))
        for disc, size in enumerate(_DISC_SIZES, start=1)
    ],
    "neurite": [
        RemoteFile(
            "https://surfer.nmr.mgh.harvard.edu/ftp/data/neurite/data/neurite-oasis.v1.0.tar",
            checksum="md5:081392a8150ff99ab7a64a9ded377835",
        )
    ],
}


def download_collection(
    destination: Path, collection: str = "oasis1", table: Path | None = None, accept_terms: bool = False
) -> None:
    """Download a collection after showing its terms. Files that are complete already are kept, others resumed.

    Args:
        destination: Folder to download to. It is created.
        collection: Name of the collection.
        table: JSON file to use in place of `COLLECTIONS` (see `read_table`).
        accept_terms: Accept the terms without being asked.

    Raises:
        OasisError: The collection is unknown, the terms are not accepted, or a file cannot be downloaded or written.
    """
    collections = read_table(table)
    if collection not in collections:
        raise OasisError(f"collection is {collection}: must be one of {', '.join(collections)}")
    files = collections[collection]
    print(TERMS)
    total = sum(file.size for file in files)
    print(f"{len(files)} files{f' ({total / 1e9:.1f} GB)' if total else ''} are downloaded to {destination}")
    if not accept_terms and not _asks_for_consent():
        raise OasisError("the terms were not accepted; read them and add --accept-terms")
    try:
        destination.mkdir(parents=True, exist_ok=True)
        for file in files:
            fetch(file, destination)
    except OSError as error:
        raise OasisError(
            f"{destination}: cannot be written ({error.strerror or error}); free some space, then run the same command "
            "again to resume"
        ) from error


def _asks_for_consent() -> bool:
    """Ask whether the terms are accepted. Without a terminal they are not."""
    if not sys.stdin.isatty():
        return False
    try:
        return input("Type yes if you accept the terms: ").strip().lower() == "yes"
    except EOFError:
        return False


def read_table(path: Path | None) -> dict[str, list[RemoteFile]]:
    """Read the files of each collection.

    Args:
        path: JSON file of `{collection: [{"url": ..., "size": ..., "checksum": ...}]}`, in which size and checksum may
            be missing. None returns the built-in `COLLECTIONS`.

    Raises:
        OasisError: The file cannot be read or is not such a table.
    """
    if path is None:
        return COLLECTIONS
    try:
        collections = json.loads(path.read_text(encoding="utf-8"))
        return {
            name: [RemoteFile(str(f["url"]), int(f.get("size", 0)), f.get("checksum", "")) for f in files]
            for name, files in collections.items()
        }
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise OasisError(
            f'{path}: is not a table of the form {{"name": [{{"url": …, "size": …, "checksum": "md5:…"}}]}} ({error}); '
            "correct it or leave out --table"
        ) from error


def fetch(file: RemoteFile, folder: Path) -> Path:
    """Download one file to `folder`, unless it is there already.

    Raises:
        OasisError: It cannot be downloaded, or its checksum or size is wrong; it is removed in this case.
        OSError: It cannot be written.
    """
    path = folder / file.url.rsplit("/", 1)[-1]

    def downloader(url: str, output: str, _: pooch.Pooch | None) -> None:
        part = path.with_name(f"{path.name}.part")
        resume(url, part)
        os.replace(part, output)

    try:
        pooch.get_logger().setLevel("WARNING")
        pooch.retrieve(file.url, file.checksum or None, path.name, folder, downloader=downloader)
    except ValueError as error:  # Pooch has compared the checksum and removed the file.
        raise OasisError(
            f"{path}: the checksum of the download is not {file.checksum}; try again, or see {file.url}"
        ) from error
    size = path.stat().st_size
    if file.size and size != file.size:
        path.unlink()
        raise OasisError(f"{path}: the download has {size} bytes, not {file.size}; try again, or see {file.url}")
    return path


def resume(url: str, part: Path) -> None:
    """Append what is missing of a file to `part`. Interrupted connections are tried again `MAX_ATTEMPTS` times.

    Raises:
        OasisError: The server refuses, or the connection is interrupted too often.
        OSError: `part` cannot be written.
    """
    for attempt in range(MAX_ATTEMPTS):
        begin = part.stat().st_size if part.exists() else 0
        try:
            with requests.get(url, headers={"Range": f"bytes={begin}-"}, stream=True, timeout=30) as response:
                if response.status_code == requests.codes.range_not_satisfiable:
                    return  # The file is complete.
                response.raise_for_status()
                is_partial = response.status_code == requests.codes.partial_content
                _append(response, part, begin if is_partial else 0)
            return
        except requests.HTTPError as error:
            raise OasisError(
                f"{url}: the server answers {response.status_code} {response.reason}; check the address, or give "
                "another one with --table"
            ) from error
        except requests.RequestException as error:
            if attempt + 1 == MAX_ATTEMPTS:
                raise OasisError(
                    f"{url}: the connection was interrupted {MAX_ATTEMPTS} times ({type(error).__name__}); run the "
                    "same command again to resume"
                ) from error
            time.sleep(WAIT_SECONDS)


def _append(response: requests.Response, part: Path, begin: int) -> None:
    """Write the content of a response to `part` from byte `begin` on, with a progress bar in megabytes."""
    total = begin + int(response.headers.get("Content-Length", 0))
    with (
        console.progress(max(total >> 20, 1), f"MB of {part.stem}") as progress,
        open(part, "r+b" if begin else "wb") as file,
    ):
        file.seek(begin)
        for chunk in response.iter_content(CHUNK_BYTES):
            file.write(chunk)
            progress.update((file.tell() >> 20) - progress.n)
