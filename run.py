"""The run folder: files that are written completely or not at all, what each was made from, and the history."""

import contextlib
import csv
import hashlib
import io
import json
import math
import os
import platform
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import filelock
import numpy as np

import console

UNFINISHED = "unfinished-"  # Names of files that are being written begin with this.
LAST_RESULT = "report.html"  # It is made from everything else, so a run that has it is complete.
PACKAGES = ("tensorflow", "tensorflow-probability", "keras", "numpy", "scipy", "scikit-image", "matplotlib", "pillow")
JAX_PACKAGES = ("jax", "jaxlib")


class RunError(console.UserError):
    """A run that cannot be started or continued."""


def project_version() -> str:
    """The version of this project, which is stated in pyproject.toml only."""
    text = Path(__file__).with_name("pyproject.toml").read_text(encoding="utf-8")
    match = re.search(r'^version = "([^"]+)"', text, re.MULTILINE)
    if match is None:
        raise RuntimeError("pyproject.toml states no version")
    return match[1]


def versions(**facts: str) -> dict[str, str]:
    """Everything besides the configuration and the slices that affects the last digits of a run's results.

    Args:
        facts: Further entries, such as the backend. JAX is listed only if it is the backend.

    Returns:
        Versions of the project, of Python and of the packages that are installed; the processor and the number of
        threads, on which the order of sums depends; and `facts`.
    """
    own = {"project": project_version(), "python": platform.python_version(), **facts}
    own |= {"processor": _processor(), "threads": os.environ.get("TF_NUM_INTRAOP_THREADS") or str(_cpu_count())}
    names = PACKAGES + (JAX_PACKAGES if facts.get("backend") == "jax" else ())
    return own | {name: version for name in names if (version := _package_version(name))}


def _package_version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    """Name of the processor, or at least of its architecture."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        if names:
            return names[0]
    return platform.processor() or platform.machine()


def _cpu_count() -> int:
    """Number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# -------------------------------------------------------------------------------------------- atomic files


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Context manager that yields a temporary path next to `path`; what is written there is renamed at the end.

    Readers see the old file (or folder) or the complete new one, also after a power failure.

    Raises:
        RunError: The path cannot be written. What was at `path` before is still there.
    """
    console.raise_if_stopped()
    path = Path(os.path.abspath(path))  # "." has no name.
    unfinished = path.with_name(UNFINISHED + path.name)
    remove(unfinished)  # What a killed process has left.
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield unfinished
        for written in (*unfinished.rglob("*"), unfinished):
            _flush(written)
        unfinished.replace(path)
        _flush(path.parent)
    except OSError as error:
        raise RunError(
            f"{path}: cannot be written ({error.strerror or error}); nothing saved before is lost: free some space or "
            "make the folder writable, then run the same command again"
        ) from error
    finally:
        remove(unfinished)


def _flush(path: Path) -> None:
    """Make the disk store a file's content, or a folder's list of names."""
    if os.name == "nt" and path.is_dir():
        return  # Windows cannot flush folders.
    descriptor = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a file, or a folder with its content, if it exists and can be removed."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically. Raises `RunError` if it cannot be written."""
    with atomic_path(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8", newline="")


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file (not atomically). Raises ValueError if a number is NaN or infinite."""
    path.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8", newline="")


def without_nan(value: Any) -> Any:
    """Replace NaN and infinity by None in nested dictionaries, lists and tuples, because JSON has neither."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a CSV file (not atomically). Its columns are the keys of the rows, in the order in which they occur."""
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, list(dict.fromkeys(name for row in rows for name in row)))
    writer.writeheader()
    writer.writerows(rows)
    path.write_text(console.as_unicode(table.getvalue()), encoding="utf-8", newline="")


def checksum(path: Path) -> str:
    """SHA-256 of a file, hexadecimal. Raises OSError."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _checksum_of_value(value: Any) -> str:
    """SHA-256 of a value that JSON can represent, hexadecimal."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


# -------------------------------------------------------------------------------------------- the run folder


class Run:
    """The folder of one run: its configuration, its history, and what each of its results was made from.

    manifest.json records for each result, a file of the run folder, its checksum, its size and the checksums of what
    it was made from: other results, or `facts`. A result is up to date if its file is as recorded and the checksums of
    what it was made from are still the same. Everything else is made again, and nothing else is.

    Args:
        folder: Folder of the run. `start` creates it.
        constants: The configuration, as values that JSON can represent.
        versions: Versions of the project and of its packages, as in `{"project": "1.0.0", "keras": ...}`.
        sampling_fields: Names of constants that may differ from the folder's: those of the fact "sampling".
        path_fields: Names of constants that may differ, since the checksum of what is there is compared instead.

    Attributes:
        facts: Checksums of what results are made from besides other results: "slices"; "sampling" for the constants
            in `sampling_fields`; "configuration" for all constants and the name of the folder; and
            "start_from/NAME.keras" for a network that training begins with. `start` sets them.
        history: Rows of history.csv. `start` reads them.

    Raises:
        RunError: The folder contains something else, a run with a different configuration, or a run of a version that
            this one cannot continue.
    """

    def __init__(
        self,
        folder: Path,
        constants: dict[str, Any],
        versions: dict[str, str],
        sampling_fields: Sequence[str] = (),
        path_fields: Sequence[str] = ("data_dir",),
    ) -> None:
        self.folder, self.constants, self.versions = folder, constants, versions
        self.sampling_fields, self.path_fields = sampling_fields, path_fields
        self.facts: dict[str, str] = {}
        self.history: list[dict[str, Any]] = []
        self._records: dict[str, dict[str, Any]] = {}  # The content of manifest.json.
        self._lost: set[str] = set()  # Names in _records whose files are missing or damaged.
        self._compare()

    def _compare(self) -> None:
        """Compare the folder's configuration with this one. Raises RunError if it differs where it must not."""
        self._saved = read_config(self.folder, self.versions["project"])
        saved = self._saved["constants"] if self._saved else self.constants
        names = [name for name in {**saved, **self.constants} if saved.get(name, ...) != self.constants.get(name, ...)]
        refused = [name for name in names if name not in (*self.sampling_fields, *self.path_fields)]
        if refused:
            shown = "; ".join(f"{name} was {saved.get(name)}, is {self.constants.get(name)}" for name in refused)
            raise RunError(
                f"run_dir is {self.folder}: contains a run with a different configuration ({shown}); choose another "
                "run_dir"
            )

    @property
    def checkpoint_folder(self) -> Path:
        """The folder of the states of networks that are not trained to the end yet."""
        return self.folder / "checkpoint"

    @property
    def is_new(self) -> bool:
        """Whether the folder contains no run yet."""
        return self._saved is None

    @contextlib.contextmanager
    def start(self, fingerprint: str, start_from: Mapping[str, str] | None = None, **entries: Any) -> Iterator[None]:
        """Context manager that locks the folder, creates it if necessary, and verifies all results.

        Results that are missing or damaged, and those made from something else than what is there now, are named.

        Args:
            fingerprint: Checksum of the slices.
            start_from: Checksums of the networks that training begins with, by file name. For a run that exists, those
                that cannot be found any more may be left out.
            entries: Further entries of config.json that follow from the slices.

        Raises:
            RunError: Another driver uses the folder, the slices or the networks to start from differ from the run's,
                a network is damaged, rows of the history are missing, or the folder cannot be written.
        """
        with self._lock():
            self._compare()  # Another driver may have finished here in the meantime.
            self._set_facts(fingerprint, dict(start_from or {}))
            self.history, self._records = self.read_history(), self._read_manifest()
            self._verify()
            for leftover in self.folder.rglob(f"{UNFINISHED}*"):
                remove(leftover)
            self._remove_stale()
            if not self.is_complete():
                self._write_config(fingerprint, entries)
            yield

    def is_complete(self) -> bool:
        """Whether all results are up to date. Holds within `start` only."""
        return LAST_RESULT in self._records and not self._lost

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        """Lock the folder. The operating system releases the lock when the process ends, however it ends."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = filelock.FileLock(self.folder / ".lock", timeout=0)
            lock.acquire()
        except filelock.Timeout as error:
            raise RunError(
                f"run_dir is {self.folder}: another driver is using it; wait for it, or choose another run_dir"
            ) from error
        except OSError as error:
            raise RunError(
                f"run_dir is {self.folder}: cannot be written to ({error.strerror}); choose another run_dir"
            ) from error
        with lock:
            yield

    def _set_facts(self, fingerprint: str, start_from: dict[str, str]) -> None:
        """Set `facts`. Raises RunError if the slices, or the networks to start from, are not those of the folder."""
        saved = self._saved or {"data": fingerprint, "start_from": start_from, "constants": self.constants}
        if saved["data"] != fingerprint:
            raise RunError(
                f"data_dir is {self.constants.get('data_dir')}: contains other slices than those that run_dir, "
                f"{self.folder}, was started with (data_dir was {saved['constants'].get('data_dir')}); give the same "
                "slices, or choose another run_dir"
            )
        given, own = self.constants.get("start_from"), saved["start_from"]
        if bool(given) != bool(own) or any(start_from.get(name, own[name]) != own[name] for name in own):
            raise RunError(
                f"start_from is {given}: run_dir, {self.folder}, was started with other networks (start_from was "
                f"{saved['constants'].get('start_from')}); give the same folder, or choose another run_dir"
            )
        self._start_from = own
        self.facts = {
            "slices": fingerprint,
            "sampling": _checksum_of_value({name: self.constants[name] for name in self.sampling_fields}),
            "configuration": _checksum_of_value([self.folder.name, self.constants]),
            **{f"start_from/{name}": checksum for name, checksum in own.items()},
        }

    def _write_config(self, fingerprint: str, entries: dict[str, Any]) -> None:
        before = (self._saved or {}).get("versions", {})
        changed = [f"{n} {before[n]}, now {v}" for n, v in self.versions.items() if before.get(n, v) != v]
        if changed:
            console.warn(
                f"{self.folder} was started with {'; '.join(changed)}: the run continues, but its results will not "
                "be bitwise identical to those of an uninterrupted run"
            )
        config = {"constants": self.constants, "versions": self.versions, "data": fingerprint}
        config |= {"start_from": self._start_from, **entries}
        with atomic_path(self.folder / "config.json") as unfinished:
            write_json(unfinished, config)

    # ---------------------------------------------------------------------------------------------- results

    def make(self, names: str | Sequence[str], made_from: Sequence[str], write: Callable[..., object]) -> None:
        """Write results unless they are up to date.

        The files are replaced first and recorded afterwards. A kill between the two makes them again.

        Args:
            names: Name of a file relative to the run folder, as in "samples/codes.npy", or several names.
            made_from: Names of all results and facts that `write` uses.
            write: Writes the files, given a temporary path for each name.

        Raises:
            RunError: A file cannot be written.
        """
        names = [names] if isinstance(names, str) else names
        if all(self.is_up_to_date(name, made_from) for name in names):
            return
        with contextlib.ExitStack() as stack:
            write(*[stack.enter_context(atomic_path(self.folder / name)) for name in names])
        self.record(names, made_from)

    def remember(self, name: str, made_from: Sequence[str], compute: Callable[[], Any]) -> Any:
        """Compute a value, or read it if it was computed before the run was stopped.

        It is kept in the checkpoint folder until the run is complete, and computed again if its file is damaged.

        Args:
            name: Says what the value is; no two values have the same name.
            made_from: Names of all results and facts that `compute` uses.
            compute: Computes the value: an array, or what JSON can represent.

        Raises:
            RunError: The value cannot be written.
        """
        key = _checksum_of_value([name, self.checksums(made_from)])
        array, number = (self.checkpoint_folder / f"{key}{suffix}" for suffix in (".npy", ".json"))
        with contextlib.suppress(OSError, ValueError, EOFError):  # Not there, or damaged.
            return np.load(array)
        with contextlib.suppress(OSError, ValueError):
            return json.loads(number.read_text(encoding="utf-8"))
        value = compute()
        if isinstance(value, np.ndarray):
            with atomic_path(array) as unfinished, open(unfinished, "wb") as file:
                np.save(file, value)
        else:
            write_text(number, json.dumps(value))
        return value

    def is_up_to_date(self, name: str, made_from: Sequence[str]) -> bool:
        """Whether a result is as recorded and was made from what `made_from` names now."""
        if name not in self._records or name in self._lost:
            return False
        return bool(self._records[name]["made_from"] == self.checksums(made_from))

    def checksums(self, names: Sequence[str]) -> dict[str, str]:
        """Checksums of results and facts, by name."""
        return {name: self.facts.get(name) or self._records[name]["sha256"] for name in names}

    def record(self, names: Sequence[str], made_from: Sequence[str], **entries: Any) -> None:
        """Record results that have just been written, and remove what was made from others of the same name.

        Args:
            names: Names of the files.
            made_from: See `make`.
            entries: Further entries of the records. A result with the entry "history", the checksum of the rows of its
                stage, is a trained network: it is never made again as long as its file exists.
        """
        inputs = self.checksums(made_from)
        for name in names:
            path = self.folder / name
            facts = {"sha256": checksum(path), "size": path.stat().st_size}
            self._records[name] = {**facts, "made_from": inputs, **entries}
            self._lost.discard(name)
        self._remove_stale()
        self._write_manifest()

    def _remove_stale(self) -> None:
        """Remove all results that were made from something else than what is there now."""
        stale: list[str] = []
        while found := [name for name, record in self._records.items() if self._is_stale(record)]:
            stale += found
            for name in found:
                del self._records[name]
        if stale:
            print(f"made from networks or options that have changed, so made again: {_enumerate(stale)}")
            for name in stale:
                remove(self.folder / name)
            self._lost -= set(stale)
            self._write_manifest()

    def _is_stale(self, record: dict[str, Any]) -> bool:
        now = self.facts | {name: other["sha256"] for name, other in self._records.items()}
        return any(now.get(name) != checksum for name, checksum in record["made_from"].items())

    def _verify(self) -> None:
        """Compare all results with their records, and name those that are lost.

        Raises:
            RunError: A network, or its part of the history, is damaged: only training could make them again.
        """
        missing = {name for name in self._records if not (self.folder / name).exists()}
        damaged = {name for name in self._records if name not in missing and not self._is_intact(name)}
        trained = {name: record["history"] for name, record in self._records.items() if "history" in record}
        for name in sorted(damaged & trained.keys()):
            if any(self.checkpoint_folder.glob(f"{Path(name).stem}_epoch_*")):
                continue  # It can be made again from its last checkpoint. A kill while it was replaced leads here.
            raise RunError(
                f"{self.folder / name}: is damaged (manifest.json has another checksum); restore it, or remove it to "
                "train it again"
            )
        self.check_history({Path(name).stem: trained[name] for name in trained.keys() - missing - damaged})
        self._lost = missing | damaged
        if self._lost:
            print(f"missing or damaged, to be made again: {_enumerate(sorted(self._lost))}")

    def _is_intact(self, name: str) -> bool:
        path, record = self.folder / name, self._records[name]
        try:
            return path.stat().st_size == record["size"] and checksum(path) == record["sha256"]
        except OSError:
            return False

    def _read_manifest(self) -> dict[str, dict[str, Any]]:
        """The records of all results. Raises RunError if manifest.json is damaged."""
        path = self.folder / "manifest.json"
        try:
            records = json.loads(path.read_text(encoding="utf-8"))
            for name, record in records.items():
                inside = (self.folder / name).resolve().is_relative_to(self.folder.resolve())
                if not inside or not {"sha256", "size"} <= record.keys() or not isinstance(record["made_from"], dict):
                    raise ValueError(name)
        except FileNotFoundError:
            return {}
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            raise RunError(f"{path}: is damaged; restore it, or choose another run_dir") from error
        return records

    def _write_manifest(self) -> None:
        with atomic_path(self.folder / "manifest.json") as unfinished:
            write_json(unfinished, dict(sorted(self._records.items())))

    # ---------------------------------------------------------------------------------------------- history

    def read_history(self) -> list[dict[str, Any]]:
        """Rows of history.csv as numbers, without the empty columns of other stages. Raises RunError."""
        path = self.folder / "history.csv"
        if not path.exists():
            return []
        try:
            with open(path, newline="", encoding="utf-8") as file:
                rows = [{name: value for name, value in row.items() if value != ""} for row in csv.DictReader(file)]
            if not all({"stage", "epoch", "seconds"} <= row.keys() for row in rows):
                raise ValueError("columns are missing")
            return [_parse_row(row) for row in rows]
        except (ValueError, TypeError, csv.Error, OSError) as error:
            raise RunError(f"{path}: cannot be read; restore it, or choose another run_dir") from error

    def rows(self, stage: str) -> list[dict[str, Any]]:
        """The history of one stage, a dictionary per epoch."""
        return [row for row in self.history if row["stage"] == stage]

    def history_checksum(self, stage: str, epochs: int | None = None) -> str:
        """Checksum of the first rows of a stage, or of all, without their seconds, which differ from run to run."""
        rows = self.rows(stage)[:epochs]
        return _checksum_of_value([{name: row[name] for name in row if name != "seconds"} for row in rows])

    def check_history(self, checksums: Mapping[str, str], epochs: int | None = None) -> None:
        """Raise RunError unless the rows of each stage have the checksum that is given; see `history_checksum`."""
        wrong = sorted(stage for stage in checksums if self.history_checksum(stage, epochs) != checksums[stage])
        if wrong:
            networks = ", ".join(f"{stage}.keras" for stage in wrong)
            raise RunError(
                f"{self.folder / 'history.csv'}: rows of {', '.join(wrong)} are missing or have been changed; restore "
                f"the file, or remove {networks} and checkpoint/ to train again"
            )

    def add_epoch(self, row: dict[str, Any]) -> None:
        """Append a row to those of its stage. It replaces the stage's rows of the same epoch and of later ones."""
        row = _parse_row(row)
        rows = {old["stage"]: self.rows(old["stage"]) for old in self.history}  # Stages stay in their order.
        earlier = [old for old in self.rows(row["stage"]) if old["epoch"] < row["epoch"]]
        rows[row["stage"]] = [*earlier, row]
        self.history = [row for stage_rows in rows.values() for row in stage_rows]
        with atomic_path(self.folder / "history.csv") as unfinished:
            write_table(unfinished, self.history)

    def read_metrics(self) -> dict[str, Any]:
        """The content of metrics.json."""
        return json.loads((self.folder / "metrics.json").read_text(encoding="utf-8"))


def _parse_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of the history with text as numbers. Raises ValueError or TypeError."""
    types: dict[str, type] = {"stage": str, "epoch": int}
    return {name: types.get(name, float)(value) for name, value in row.items()}


def _enumerate(names: Sequence[str], shown: int = 3) -> str:
    """The first of some names, and the number of the others."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return f"{', '.join(names[:shown])}{more}"


def read_config(folder: Path, version: str | None = None) -> dict[str, Any] | None:
    """Read the config.json of a run folder.

    Args:
        folder: The run folder.
        version: Version of the project that wants to use the folder; None for this one.

    Returns:
        A dictionary with the keys "constants", "versions", "data" (the checksum of the slices), "start_from" (the
        checksums of the networks that training began with) and what `Run.start` was given; None if there is no run yet.

    Raises:
        RunError: The folder cannot be read, contains something else, or was written by a version that this one
            cannot continue.
    """
    path, version = folder / "config.json", version or project_version()
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise RunError(f"run_dir is {folder}: cannot be read ({error.strerror}); choose another run_dir") from error
    if path.name not in names:
        if not all(name == ".lock" or name.startswith(UNFINISHED) for name in names):
            raise RunError(f"run_dir is {folder}: contains files that are not a run's; choose another run_dir")
        return None
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        saved_version = saved["versions"]["project"]
        later = _numbers(saved_version) > _numbers(version)
        too_old = _numbers(saved_version)[0] < _numbers(version)[0]
        if not isinstance(saved["data"], str) or not saved["constants"].keys() or not saved["versions"].keys():
            raise ValueError("entries are missing")
        saved["start_from"].items()
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise RunError(f"run_dir is {folder}: its config.json cannot be read; choose another run_dir") from error
    if later or too_old:
        remedy = "update the project" if later else f"use version {saved_version}"
        raise RunError(
            f"run_dir is {folder}: contains a run of version {saved_version}, which version {version} cannot read; "
            f"{remedy}, or choose another run_dir"
        )
    return saved


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in version.split("."))
