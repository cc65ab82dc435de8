"""What makes a run safe to kill: files that appear whole or not at all, one driver a folder, and checkpoints.

After each epoch `Checkpoint` saves all that training needs to go on: weights, codebook and optimizer, the best weights
so far, and the counters of early stopping. The rest is a function of (seed, epoch) and needs no saving. A run that was
killed and went on therefore ends with the same bytes as one that was not.
"""

import contextlib
import csv
import json
import os
import shutil
import signal
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import filelock
import keras
import numpy as np

import devices

UNFINISHED = "unfinished-"  # begins the names of files that are being written
KEPT = 2  # checkpoints of a stage


class RunError(Exception):
    """A run that cannot go on. The message is one line that names the file or constant and says what to do."""


# ------------------------------------------------------------------------------------- whole or not at all


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Gives a place to write a file or folder, which appears at `path` when it is complete and on the disk.

    Raises:
        RunError: it cannot be written; what stood at `path` still does.
    """
    stop_if_asked()
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
            f"{path}: cannot be written ({error.strerror or error}); what was saved before is kept: "
            "make room or give leave to write there, then the same command goes on"
        ) from error
    finally:
        remove(unfinished)


def _flush(path: Path) -> None:
    """Have the disk keep a file's content, or a folder's list of names."""
    if os.name == "nt" and path.is_dir():
        return  # Windows flushes no folders
    descriptor = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a file, or a folder and all in it, if it is there and can be removed."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all. Raises RunError if it cannot be written."""
    with whole(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8", newline="")


def save_model(network: keras.Model, path: Path) -> None:
    """Save a model as a .keras file that depends on the model alone: Keras notes the time in it, which is taken out.

    Raises:
        RunError: it cannot be written.
    """
    with whole(path) as unfinished:
        network.save(unfinished)
        with zipfile.ZipFile(unfinished) as archive:
            parts = {name: archive.read(name) for name in archive.namelist()}
        metadata = json.loads(parts["metadata.json"])
        del metadata["date_saved"]
        parts["metadata.json"] = json.dumps(metadata).encode()
        with zipfile.ZipFile(unfinished, "w") as archive:
            for name, content in parts.items():
                archive.writestr(zipfile.ZipInfo(name), content)


def load_weights(network: keras.Model, path: Path) -> None:
    """Set a network's weights to those of a .keras file. Nothing else of the file is used: no code in it can run.

    Raises:
        RunError: the file is damaged, or is of another network.
    """
    try:
        network.load_weights(path)
    except Exception as error:  # damage can come up as anything
        damaged = not zipfile.is_zipfile(path) or isinstance(error, zipfile.BadZipFile | OSError | EOFError)
        problem = "is damaged" if damaged else "holds another network than this run's"
        raise RunError(f"{path}: {problem}; remove it to train it again, or choose another run_dir") from error


# -------------------------------------------------------------------------------------------- the run folder


class Run:
    """The folder of a run: the constants it is made with, its history, and the files that are done.

    Args:
        folder: where everything of the run goes; made by `start`.
        constants: every constant, as JSON knows them.
        versions: of the project and the packages, as in {"project": "0.2.0", "keras": …}.
        drawing: names of constants that may differ from the folder's, since only `drawn` depends on them.
        drawn: files and folders that `start` removes where they do.

    Raises:
        RunError: the folder holds something else, a run with other constants or of a later version.
    """

    def __init__(
        self,
        folder: Path,
        constants: dict,
        versions: dict[str, str],
        drawing: tuple[str, ...] = (),
        drawn: tuple[str, ...] = (),
    ):
        self.folder, self.constants, self.versions = folder, constants, versions
        self.drawing, self.drawn = drawing, drawn
        self.history: list[dict] = []
        self._compare()

    def _compare(self) -> None:
        """Find out how the folder's constants differ from these. Raises RunError if not in `drawing` alone."""
        self._saved = self._read_config()
        saved = self._saved["constants"] if self._saved else self.constants
        differences = [n for n in {**saved, **self.constants} if saved.get(n, ...) != self.constants.get(n, ...)]
        self.draws_anew = bool(differences)
        hard = [name for name in differences if name not in self.drawing]
        if hard:
            shown = "; ".join(f"{name} was {saved.get(name)}, is {self.constants.get(name)}" for name in hard)
            raise RunError(f"run_dir is {self.folder}: holds a run with other constants ({shown}); choose another")

    def _read_config(self) -> dict | None:
        path = self.folder / "config.json"
        try:
            names = os.listdir(self.folder)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise RunError(f"run_dir is {self.folder}: cannot be read ({error.strerror}); choose another") from error
        if path.name not in names:
            if not all(map(_is_ours, names)):
                raise RunError(f"run_dir is {self.folder}: holds other things than a run; choose another folder")
            return None
        try:
            saved = json.loads(path.read_text(encoding="utf-8"))
            version = saved["versions"]["project"]
            later = _numbers(version) > _numbers(self.versions["project"])
            saved["constants"].items()
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            raise RunError(f"run_dir is {self.folder}: cannot read its config.json; choose another") from error
        if later:
            raise RunError(
                f"run_dir is {self.folder}: holds a run of version {version}, later than this one "
                f"({self.versions['project']}); update, or choose another"
            )
        return saved

    def has(self, names: list[str]) -> bool:
        """Whether all these files are there, made with these constants."""
        return not self.draws_anew and all((self.folder / name).exists() for name in names)

    @contextlib.contextmanager
    def start(self, data: str) -> Iterator[None]:
        """Take hold of the folder, made if need be; nobody else writes there meanwhile.

        Args:
            data: a fingerprint of the slices.

        Raises:
            RunError: another driver has hold of it, the data are others than the run's, or it cannot be written.
        """
        with self._lock():
            self._compare()  # once more: another driver may have been here
            if self._saved and self._saved.get("data", data) != data:
                raise RunError(
                    f"data_dir is {self.constants['data_dir']}: holds other slices than when {self.folder} was begun; "
                    "choose another run_dir"
                )
            for leftover in self.folder.rglob(f"{UNFINISHED}*"):
                remove(leftover)
            self.history = self.read_history()
            # The report is made last, from all the rest: while it is there the run counts as complete.
            for name in ("report.html", *(self.drawn if self.draws_anew else ())):
                remove(self.folder / name)
            self._write_config(data)
            yield

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        """Hold the run folder. The system lets go of it when the process ends, however it does."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = filelock.FileLock(self.folder / ".lock", timeout=0)
            lock.acquire()
        except filelock.Timeout as error:
            raise RunError(
                f"run_dir is {self.folder}: another driver is at work there; wait for it, or choose another"
            ) from error
        except OSError as error:
            raise RunError(
                f"run_dir is {self.folder}: cannot be written to ({error.strerror}); choose another"
            ) from error
        with lock:
            yield

    def _write_config(self, data: str) -> None:
        before = (self._saved or {}).get("versions", {})
        changed = [f"{n} {before[n]}, now {v}" for n, v in self.versions.items() if before.get(n, v) != v]
        if changed:
            print(
                f"warning: {self.folder} was begun with {'; '.join(changed)}: it goes on, but not to the same bytes",
                file=sys.stderr,
            )
        config = {"constants": self.constants, "versions": self.versions, "data": data}
        write_text(self.folder / "config.json", json.dumps(config, indent=2) + "\n")

    def read_history(self) -> list[dict]:
        """Rows of history.csv: numbers as numbers, columns of the other stages left out. Raises RunError."""
        path = self.folder / "history.csv"
        if not path.exists():
            return []
        try:
            with open(path, newline="", encoding="utf-8") as file:
                rows = [{name: value for name, value in row.items() if value != ""} for row in csv.DictReader(file)]
            kinds = {"stage": str, "epoch": int}
            return [{name: kinds.get(name, float)(value) for name, value in row.items()} for row in rows]
        except (ValueError, TypeError, OSError) as error:
            raise RunError(f"{path}: cannot be read; put it back as it was, or choose another run_dir") from error

    def rows(self, stage: str) -> list[dict]:
        """The history of a stage."""
        return [row for row in self.history if row["stage"] == stage]

    def require_history(self, stage: str, epochs: int | None = None) -> None:
        """Refuse to go on where rows of the history are gone. Raises RunError.

        Args:
            epochs: how many there must be; None: at least one.
        """
        found = [row["epoch"] for row in self.rows(stage)]
        if found[:epochs] != list(range(1, (epochs or max(len(found), 1)) + 1)):
            raise RunError(
                f"{self.folder / 'history.csv'}: rows of {stage} are missing; put it back as it was, or choose another "
                "run_dir"
            )

    def add_epoch(self, row: dict) -> None:
        """Append a row to history.csv, in place of an earlier try at the same epoch and what followed it."""
        at = [(old["stage"], old["epoch"]) for old in self.history]
        here = (row["stage"], row["epoch"])
        self.history = [*self.history[: at.index(here) if here in at else None], row]
        names = list(dict.fromkeys(name for row in self.history for name in row))
        with whole(self.folder / "history.csv") as unfinished, open(unfinished, "w", newline="") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(self.history)

    def read_metrics(self) -> dict:
        """What stands in metrics.json. Raises RunError if it is damaged."""
        path = self.folder / "metrics.json"
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, OSError) as error:
            raise RunError(f"{path}: is damaged; remove it to measure again") from error

    def read_codes(self, name: str, shape: tuple[int, ...], num_embeddings: int) -> np.ndarray:
        """Code indices of this shape that stand in samples/. Raises RunError if they are damaged."""
        path = self.folder / "samples" / f"{name}.npy"
        try:
            codes = np.load(path, allow_pickle=False)
            if codes.shape != shape or codes.dtype != np.int32 or codes.min() < 0 or codes.max() >= num_embeddings:
                raise ValueError("not such codes")
        except (ValueError, OSError, EOFError) as error:
            raise RunError(f"{path}: is damaged; remove the folder samples to draw again") from error
        return codes


def _is_ours(name: str) -> bool:
    """Whether a file can lie in a run folder before config.json does."""
    return name == ".lock" or name.startswith(UNFINISHED)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in version.split("."))


# ------------------------------------------------------------------------------------------------ training


class Checkpoint(keras.callbacks.EarlyStopping):
    """Early stopping that a killed process does not forget.

    Saves after each epoch, in checkpoint/ of the run folder and under the stage's name: weights, optimizer, the best
    weights on validation and the counters of early stopping, as one .npz file of arrays. The last two are kept.

    Args:
        run: whose folder; None in a process that writes nothing, and is told what the first one has read.
        stage: the network's name.
        monitor, patience: what to judge by, the less the better, and for how many epochs to wait for less.
    """

    def __init__(self, run: Run | None, stage: str, monitor: str, patience: int):
        super().__init__(monitor, patience=patience, mode="min", restore_best_weights=True)
        self.run, self.stage = run, stage
        self.folder = run.folder / "checkpoint" if run else None
        self.counters = {"epoch": 0, "wait": 0, "best": None, "best_epoch": 0, "stopped": False}

    def restore(self, network: keras.Model) -> int:
        """Bring a compiled network to where its last whole checkpoint was; returns how many epochs that is.

        A damaged checkpoint is named and removed, and the one before it used.
        """
        network.optimizer.build(network.trainable_variables)
        found = devices.from_first(self._read(network) if self.run else None)
        if found:
            self.counters, arrays = found
            for name, variable in self._state(network).items():
                variable.assign(arrays[name])
            self.best_weights = [arrays[f"best_{i:03d}"] for i in range(len(network.weights))]
        return self.counters["epoch"]

    def _read(self, network: keras.Model) -> tuple[dict, dict[str, np.ndarray]] | None:
        """Counters and arrays of the last whole checkpoint, if there is one."""
        for path in reversed(self._paths()):
            try:
                with np.load(path, allow_pickle=False) as file:
                    arrays = {name: file[name] for name in file.files}  # zip files hold checksums, compared here
                counters = json.loads(str(arrays.pop("counters")))
                self._check(network, arrays)
            except Exception as error:  # damage can come up as anything
                print(f"warning: {path}: is damaged ({error}); going on from the one before it", file=sys.stderr)
                remove(path)
                continue
            self.run.require_history(self.stage, counters["epoch"])
            return counters, arrays
        return None

    def _paths(self) -> list[Path]:
        """This stage's checkpoints, the latest last."""
        return sorted(self.folder.glob(f"{self.stage}_epoch_*.npz"))

    def _check(self, network: keras.Model, arrays: dict[str, np.ndarray]) -> None:
        """Raises KeyError or ValueError if the arrays are not this network's."""
        expected = self._state(network) | {f"best_{i:03d}": weights for i, weights in enumerate(network.weights)}
        for name, variable in expected.items():
            if arrays[name].shape != tuple(variable.shape):
                raise ValueError(f"{name} has the shape {arrays[name].shape}, not {tuple(variable.shape)}")

    @staticmethod
    def _state(network: keras.Model) -> dict[str, keras.Variable]:
        weights = {f"weights_{i:03d}": variable for i, variable in enumerate(network.weights)}
        return weights | {f"optimizer_{i:03d}": variable for i, variable in enumerate(network.optimizer.variables)}

    def on_train_begin(self, logs=None):
        best_weights = self.best_weights
        super().on_train_begin(logs)  # forgets everything
        self.best_weights = best_weights
        self.wait, self.best, self.best_epoch = (self.counters[name] for name in ("wait", "best", "best_epoch"))

    def on_epoch_end(self, epoch, logs=None):
        super().on_epoch_end(epoch, logs)
        self.counters = {
            "epoch": epoch + 1,
            "wait": self.wait,
            "best": self.best,
            "best_epoch": self.best_epoch,
            "stopped": self.model.stop_training,
        }
        if not self.run:
            return
        arrays = {name: keras.ops.convert_to_numpy(variable) for name, variable in self._state(self.model).items()}
        arrays |= {f"best_{i:03d}": weights for i, weights in enumerate(self.best_weights)}
        path = self.folder / f"{self.stage}_epoch_{epoch + 1:04d}.npz"
        with whole(path) as unfinished, open(unfinished, "wb") as file:
            np.savez(file, counters=np.array(json.dumps(self.counters)), **arrays)
        for old in self._paths()[:-KEPT]:
            remove(old)


class History(keras.callbacks.Callback):
    """A row of history.csv for each epoch: stage, epoch, seconds, losses and metrics, the parts in order.

    Args:
        prefixes: of the metrics that each level has, as in ("top_", "bottom_").
    """

    PARTS = ("loss", "reconstruction", "codebook", "commitment", "ssim", "codes_used", "perplexity", "bits_per_code")

    def __init__(self, run: Run, stage: str, prefixes: tuple[str, ...]):
        super().__init__()
        self.run, self.stage, self.prefixes = run, stage, prefixes

    def on_epoch_begin(self, epoch, logs=None):
        self.began = time.monotonic()

    def on_epoch_end(self, epoch, logs=None):
        names = [f"{prefix}{part}" for part in self.PARTS for prefix in dict.fromkeys(["", *self.prefixes])]
        names = [name for name in names if name in logs]
        row = {"stage": self.stage, "epoch": epoch + 1, "seconds": round(time.monotonic() - self.began, 2)}
        row |= {name: logs[name] for name in names} | {f"val_{name}": logs[f"val_{name}"] for name in names}
        row["learning_rate"] = learning_rate(self.model)
        self.run.add_epoch(row)


class SeedEpoch(keras.callbacks.Callback):
    """Makes dropout and restarts a function of (seed, epoch), not of what ran before."""

    def __init__(self, seed: int):
        super().__init__()
        self.seed = seed

    def on_epoch_begin(self, epoch, logs=None):
        states = [v for v in self.model.non_trainable_variables if v.path.endswith("seed_generator_state")]
        for i, state in enumerate(states):
            state.assign(np.random.SeedSequence([self.seed, epoch, i]).generate_state(2))


class StopWhenLost(keras.callbacks.Callback):
    """Ends training at once where a loss is no longer a number, by RunError, or where it is asked for, by Stopped.

    Args:
        checkpoint: whose best weights are saved, in checkpoint/ of the run folder, for whoever can use them.
        constant: the name of the learning rate's constant.
        best: a network to put the best weights into.
    """

    def __init__(self, checkpoint: Checkpoint, constant: str, best: keras.Model):
        super().__init__()
        self.checkpoint, self.constant, self.best = checkpoint, constant, best

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        stop_if_asked()
        self._check(logs["loss"], f"in epoch {self.epoch + 1}")

    def on_epoch_end(self, epoch, logs=None):
        self._check(logs[self.checkpoint.monitor], f"on the validation split after epoch {epoch + 1}")

    def _check(self, loss, when: str) -> None:
        if np.isfinite(loss):
            return
        kept = ""
        if self.checkpoint.run and self.checkpoint.best_weights is not None:
            path = self.checkpoint.folder / f"{self.checkpoint.stage}.keras"
            self.best.set_weights(self.checkpoint.best_weights)
            save_model(self.best, path)
            kept = f"; the best model so far, of epoch {self.checkpoint.best_epoch + 1}, is {path}"
        raise RunError(
            f"{self.constant}: the loss is {float(loss)} {when}, at a learning rate of "
            f"{learning_rate(self.model):.2g}; choose a lower {self.constant} and another run_dir{kept}"
        )


def learning_rate(network: keras.Model) -> float:
    """The rate that a compiled network trains with now."""
    return float(keras.ops.convert_to_numpy(network.optimizer.learning_rate))


# ------------------------------------------------------------------------------------------------- signals


class Stopped(BaseException):
    """Somebody wants the process to end: Ctrl-C or SIGTERM. `status` is the exit status to end with."""

    def __init__(self, number: int):
        super().__init__()
        self.status = 128 + number


_asked: int | None = None  # the signal that was received


def stop_on_signals() -> None:
    """Have Ctrl-C and SIGTERM raise `Stopped` where the program is."""
    global _asked
    _asked = None

    def stop(number, frame):
        global _asked
        _asked = number
        raise Stopped(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)


def stop_if_asked() -> None:
    """Raise `Stopped` once more if it was lost: NumPy swallows what is raised while it waits for an array of JAX's."""
    if _asked is not None:
        raise Stopped(_asked)
