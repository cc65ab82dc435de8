"""The run folder: files that are written completely or not at all, the history, and a lock against a second driver."""

import contextlib
import csv
import json
import os
import platform
import re
import shutil
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import filelock
import numpy as np

import console

UNFINISHED = "unfinished-"  # Names of files that are being written begin with this.


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
    """Versions of the project, of Python and of the packages that affect the last digits of a run's results.

    Args:
        facts: Further entries, such as the backend.
    """
    packages = ("tensorflow", "tensorflow-probability", "keras", "numpy", "scikit-image", "matplotlib")
    own = {"project": project_version(), "python": platform.python_version(), **facts}
    return own | {name: metadata.version(name) for name in packages}


# -------------------------------------------------------------------------------------------- atomic files


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Context manager that yields a temporary path next to `path`; what is written there is renamed at the end.

    Readers see the old file (or folder) or the complete new one, also after a power failure.

    Raises:
        RunError: The path cannot be written. What was at `path` before is still there.
    """
    console.raise_if_stopped()
    unfinished = path.with_name(UNFINISHED + path.name)
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


# -------------------------------------------------------------------------------------------- the run folder


class Run:
    """The folder of one run: its configuration, its history, and which of its files are complete.

    Args:
        folder: Folder of the run. `start` creates it.
        constants: The configuration, as values that JSON can represent.
        versions: Versions of the project and of its packages, as in `{"project": "1.0.0", "keras": ...}`.
        sampling_fields: Names of constants that may differ from the folder's, since only `sample_files` depend on
            them.
        sample_files: Files and folders that `start` removes if one of those constants differs.

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
        sample_files: Sequence[str] = (),
    ) -> None:
        self.folder, self.constants, self.versions = folder, constants, versions
        self.sampling_fields, self.sample_files = sampling_fields, sample_files
        self.history: list[dict[str, Any]] = []
        self._compare()

    def _compare(self) -> None:
        """Compare the folder's configuration with this one. Raises RunError if more than `sampling_fields` differ."""
        self._saved = read_config(self.folder, self.versions["project"])
        saved = self._saved["constants"] if self._saved else self.constants
        names = [name for name in {**saved, **self.constants} if saved.get(name, ...) != self.constants.get(name, ...)]
        self.sampling_changed = bool(names)
        refused = [name for name in names if name not in self.sampling_fields]
        if refused:
            shown = "; ".join(f"{name} was {saved.get(name)}, is {self.constants.get(name)}" for name in refused)
            raise RunError(
                f"run_dir is {self.folder}: contains a run with a different configuration ({shown}); choose another "
                "run_dir"
            )

    def is_complete(self, names: Sequence[str]) -> bool:
        """Whether these files and the network of each stage in the history exist and were made with these constants."""
        if self.sampling_changed or not all((self.folder / name).exists() for name in names):
            return False
        return all((self.folder / f"{row['stage']}.keras").exists() for row in self.read_history())

    @contextlib.contextmanager
    def start(self, fingerprint: str, **facts: Any) -> Iterator[None]:
        """Context manager that locks the folder, creates it if necessary, and records the configuration.

        Args:
            fingerprint: A checksum of the slices.
            facts: Further entries of config.json that follow from the slices.

        Raises:
            RunError: Another driver uses the folder, the slices differ from the run's, or it cannot be written.
        """
        with self._lock():
            self._compare()  # Another driver may have finished here in the meantime.
            if self._saved and self._saved.get("data", fingerprint) != fingerprint:
                raise RunError(
                    f"data_dir is {self.constants['data_dir']}: contains other slices than those that "
                    f"{self.folder} was started with; choose another run_dir"
                )
            for leftover in self.folder.rglob(f"{UNFINISHED}*"):
                remove(leftover)
            self.history = self.read_history()
            # The report is written last, from everything else. While it exists the run counts as complete.
            for name in ("report.html", *(self.sample_files if self.sampling_changed else ())):
                remove(self.folder / name)
            self._write_config(fingerprint, facts)
            yield

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

    def _write_config(self, fingerprint: str, facts: dict[str, Any]) -> None:
        before = (self._saved or {}).get("versions", {})
        changed = [f"{n} {before[n]}, now {v}" for n, v in self.versions.items() if before.get(n, v) != v]
        if changed:
            console.warn(
                f"{self.folder} was started with {'; '.join(changed)}: the run continues, but its results will not "
                "be bitwise identical to those of an uninterrupted run"
            )
        config = {"constants": self.constants, "versions": self.versions, "data": fingerprint, **facts}
        write_text(self.folder / "config.json", json.dumps(config, indent=2) + "\n")

    def read_history(self) -> list[dict[str, Any]]:
        """Rows of history.csv as numbers, without the empty columns of other stages. Raises RunError."""
        path = self.folder / "history.csv"
        if not path.exists():
            return []
        try:
            with open(path, newline="", encoding="utf-8") as file:
                rows = [{name: value for name, value in row.items() if value != ""} for row in csv.DictReader(file)]
            types: dict[str, type] = {"stage": str, "epoch": int}
            return [{name: types.get(name, float)(value) for name, value in row.items()} for row in rows]
        except (ValueError, TypeError, OSError) as error:
            raise RunError(f"{path}: cannot be read; restore it, or choose another run_dir") from error

    def rows(self, stage: str) -> list[dict[str, Any]]:
        """The history of one stage, a dictionary per epoch."""
        return [row for row in self.history if row["stage"] == stage]

    def require_history(self, stage: str, epochs: int | None = None) -> None:
        """Raise RunError if rows of a stage are missing from the history.

        Args:
            stage: Name of the stage.
            epochs: Number of rows that must be there. None requires at least one.
        """
        found = [row["epoch"] for row in self.rows(stage)]
        if found[:epochs] != list(range(1, (epochs or max(len(found), 1)) + 1)):
            raise RunError(
                f"{self.folder / 'history.csv'}: rows of stage {stage} are missing; restore the file, or choose "
                "another run_dir"
            )

    def add_epoch(self, row: dict[str, Any]) -> None:
        """Append a row to history.csv. It replaces an earlier attempt at the same epoch and all rows after that."""
        keys = [(old["stage"], old["epoch"]) for old in self.history]
        key = (row["stage"], row["epoch"])
        self.history = [*self.history[: keys.index(key) if key in keys else None], row]
        names = list(dict.fromkeys(name for row in self.history for name in row))
        with (
            atomic_path(self.folder / "history.csv") as unfinished,
            open(unfinished, "w", newline="", encoding="utf-8") as file,
        ):
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(self.history)

    def read_metrics(self) -> dict[str, Any]:
        """The content of metrics.json. Raises RunError if the file is damaged."""
        path = self.folder / "metrics.json"
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, OSError) as error:
            raise RunError(f"{path}: is damaged; remove it to measure again") from error

    def read_codes(self, name: str, shape: tuple[int, ...], num_embeddings: int) -> np.ndarray:
        """Read code indices from samples/.

        Args:
            name: Name of the file without its suffix.
            shape: Expected shape, (N, h, w).
            num_embeddings: Size of the codebook, K.

        Returns:
            (N, h, w) int32 in [0, K - 1].

        Raises:
            RunError: The file is damaged.
        """
        path = self.folder / "samples" / f"{name}.npy"
        try:
            codes = np.load(path, allow_pickle=False)
            if codes.shape != shape or codes.dtype != np.int32 or codes.min() < 0 or codes.max() >= num_embeddings:
                raise ValueError("not such codes")
        except (ValueError, OSError, EOFError) as error:
            raise RunError(f"{path}: is damaged; remove the folder samples to sample again") from error
        return codes


def read_config(folder: Path, version: str | None = None) -> dict[str, Any] | None:
    """Read the config.json of a run folder.

    Args:
        folder: The run folder.
        version: Version of the project that wants to use the folder; None for this one.

    Returns:
        A dictionary with the keys "constants", "versions" and "data"; None if there is no run yet.

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
        saved["constants"].items()
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
