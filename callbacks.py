"""What happens while a network is trained: checkpoints that survive a kill, history, logs, previews, messages."""

import functools
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from PIL import Image

import console
import dataset
import devices
import saving
import seeds
from run import Run, RunError, atomic_path, remove

MAX_CHECKPOINTS = 2  # Kept per stage. The older one is used if the newer one is damaged.
Logs = Mapping[str, Any]


class ResumableCheckpoint(keras.callbacks.Callback):
    """Keeps the weights of the best epoch, and lets training continue after a kill.

    After each epoch it saves weights, optimizer, the best weights on validation, its counters, and the checksums of
    what the network is made from in one .npz file in checkpoint/ of the run folder.

    Args:
        run: The run; None in a process that does not write files and gets the state from the main process.
        stage: Name of the stage.
        monitor: Name of the metric to judge by; lower is better.
        made_from: Names of the results and facts that the network is made from. Checkpoints of a network that was
            made from others are not used.

    Attributes:
        counters: The number of epochs done, `epoch`, the lowest value of the metric, `best`, and the number of epochs
            that led to it, `best_epoch`.
        best_weights: Weights of the best epoch, None before the first one.
    """

    def __init__(
        self,
        run: Run | None,
        stage: str,
        monitor: str,
        made_from: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.run, self.stage, self.monitor = run, stage, monitor
        self.inputs = run.checksums(made_from) if run else {}
        self.counters: dict[str, Any] = {"epoch": 0, "best": float("inf"), "best_epoch": 0}
        self.best_weights: list[np.ndarray] | None = None

    def restore(self, network: keras.Model) -> int:
        """Set a compiled network to its newest intact checkpoint and return the number of epochs that it has done.

        A damaged checkpoint is reported and removed, and the one before it is used.
        """
        network.optimizer.build(network.trainable_variables)
        found = devices.broadcast_from_main(self._read(network) if self.run else None)
        if found:
            self.counters, arrays = found
            for name, variable in self._state(network).items():
                variable.assign(arrays[name])
            self.best_weights = [arrays[f"best_{i:03d}"] for i in range(len(network.weights))]
        return self.counters["epoch"]

    def _read(self, network: keras.Model) -> tuple[dict[str, Any], dict[str, np.ndarray]] | None:
        """Counters and arrays of the newest intact checkpoint, None if there is none."""
        assert self.run
        for path in reversed(self._paths()):
            try:
                with np.load(path, allow_pickle=False) as file:
                    arrays = {name: file[name] for name in file.files}  # Compares the zip file's checksums.
                counters, inputs, history = json.loads(str(arrays.pop("state")))
                self._check(network, arrays)
            except Exception as error:  # A damaged file can raise anything.
                console.warn(f"{path}: is damaged ({error}); continuing from the checkpoint before it")
                remove(path)
                continue
            if inputs != self.inputs:
                print(f"{path}: was made from other networks or slices, so it is not used")
                remove(path)
                continue
            self.run.check_history({self.stage: history}, counters["epoch"])
            return counters, arrays
        return None

    def _paths(self) -> list[Path]:
        """Checkpoints of this stage, the newest last."""
        return sorted(self.run.checkpoint_folder.glob(f"{self.stage}_epoch_*.npz")) if self.run else []

    def _check(self, network: keras.Model, arrays: dict[str, np.ndarray]) -> None:
        """Raise KeyError or ValueError if the arrays are not this network's."""
        expected = self._state(network) | {f"best_{i:03d}": weights for i, weights in enumerate(network.weights)}
        for name, variable in expected.items():
            if arrays[name].shape != tuple(variable.shape):
                raise ValueError(f"{name} has the shape {arrays[name].shape}, not {tuple(variable.shape)}")

    @staticmethod
    def _state(network: keras.Model) -> dict[str, keras.Variable]:
        weights = {f"weights_{i:03d}": variable for i, variable in enumerate(network.weights)}
        return weights | {f"optimizer_{i:03d}": variable for i, variable in enumerate(network.optimizer.variables)}

    def on_epoch_end(self, epoch: int, logs: Logs | None = None) -> None:
        logs = logs or {}
        value = float(logs[self.monitor])
        self.counters["epoch"] = epoch + 1
        if value < self.counters["best"]:
            self.counters |= {"best": value, "best_epoch": epoch + 1}
            self.best_weights = self.model.get_weights()
        if not self.run:
            return
        arrays = {name: keras.ops.convert_to_numpy(variable) for name, variable in self._state(self.model).items()}
        arrays |= {f"best_{i:03d}": weights for i, weights in enumerate(self.best_weights or [])}
        state = [self.counters, self.inputs, self.run.history_checksum(self.stage)]
        path = self.run.checkpoint_folder / f"{self.stage}_epoch_{epoch + 1:04d}.npz"
        with atomic_path(path) as unfinished, open(unfinished, "wb") as file:
            np.savez(file, state=np.array(json.dumps(state)), **arrays)
        for old in self._paths()[:-MAX_CHECKPOINTS]:
            remove(old)


class CSVHistory(keras.callbacks.Callback):
    """Writes a row of history.csv per epoch: stage, epoch, seconds, metrics of training and validation, learning rate.

    Args:
        run: The run.
        stage: Name of the stage.
    """

    # Columns in this order; with two levels, a level's name precedes some of them, as in top_codebook.
    ORDER = (
        "loss",
        "reconstruction",
        "codebook",
        "commitment",
        "ssim",
        "codes_used",
        "perplexity",
        "bits_per_code",
        "accuracy",
    )

    def __init__(self, run: Run, stage: str) -> None:
        super().__init__()
        self.run, self.stage, self.started = run, stage, time.monotonic()

    def on_epoch_end(self, epoch: int, logs: Logs | None = None) -> None:
        logs = logs or {}
        trained = sorted((name for name in logs if not name.startswith("val_")), reverse=True)  # top before bottom
        names = [name for last in self.ORDER for name in trained if name == last or name.endswith(f"_{last}")]
        now = time.monotonic()
        row = {"stage": self.stage, "epoch": epoch + 1, "seconds": round(now - self.started, 2)}
        self.started = now  # The next epoch includes the time to make its batches, which comes before it begins.
        row |= {name: logs[name] for name in names} | {f"val_{name}": logs[f"val_{name}"] for name in names}
        row["learning_rate"] = current_learning_rate(self.model)
        self.run.add_epoch(row)


class TensorBoardScalars(keras.callbacks.Callback):
    """Writes the metrics of each epoch for TensorBoard, those of training and of validation in a folder each.

    Keras' own callback would begin new files with each call of `fit`, of which there is one per epoch.

    Args:
        folder: The folder that contains the two.
    """

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.folder = folder

    @functools.cached_property
    def writers(self) -> dict[str, Any]:
        return {kind: tf.summary.create_file_writer(f"{self.folder}/{kind}") for kind in ("train", "validation")}

    def on_epoch_end(self, epoch: int, logs: Logs | None = None) -> None:
        for name, value in (logs or {}).items():
            with self.writers["validation" if name.startswith("val_") else "train"].as_default():
                tf.summary.scalar(name.removeprefix("val_"), value, step=epoch + 1)
        for writer in self.writers.values():
            writer.flush()


class Previews(keras.callbacks.Callback):
    """Draws sheets of images while a network is trained, as PNGs and for TensorBoard.

    Args:
        draw: Draws a sheet with a network; see `Stage`.
        network: A network of the same architecture in float32, which gets the weights of the trained one.
        epochs: Number of epochs.
        count: Number of sheets, evenly over the epochs. The last one comes after the last epoch.
        folder: Where the PNGs are written.
        logs: Folder of the stage's logs.
    """

    def __init__(
        self,
        draw: Callable[[keras.Model], np.ndarray],
        network: keras.Model,
        epochs: int,
        count: int,
        folder: Path,
        logs: str,
    ) -> None:
        super().__init__()
        self.draw, self.network, self.epochs, self.count = draw, network, epochs, count
        self.folder, self.logs = folder, logs

    @functools.cached_property
    def writer(self) -> Any:
        return tf.summary.create_file_writer(f"{self.logs}/previews")

    def on_epoch_end(self, epoch: int, logs: Logs | None = None) -> None:
        if (epoch + 1) * self.count // self.epochs == epoch * self.count // self.epochs:
            return
        self.network.set_weights(self.model.get_weights())
        sheet = dataset.to_uint8(self.draw(self.network))
        with atomic_path(self.folder / f"epoch_{epoch + 1:03d}.png") as unfinished:
            Image.fromarray(sheet).save(unfinished, "PNG")
        with self.writer.as_default():
            tf.summary.image("preview", sheet[None, ..., None], step=epoch + 1)
        self.writer.flush()


class EpochSummary(keras.callbacks.Callback):
    """Prints one line per epoch, and a progress bar within the epoch on terminals.

    Args:
        epochs: Number of epochs.
        shown: Names of the metrics to print, of training and validation.
    """

    def __init__(self, epochs: int, shown: Sequence[str]) -> None:
        super().__init__()
        self.epochs, self.shown, self.started = epochs, shown, time.monotonic()

    def on_epoch_begin(self, epoch: int, logs: Logs | None = None) -> None:
        self.progress = console.progress(self.params["steps"], "steps")

    def on_train_batch_end(self, batch: int, logs: Logs | None = None) -> None:
        self.progress.update(1)

    def on_epoch_end(self, epoch: int, logs: Logs | None = None) -> None:
        self.progress.close()
        logs = logs or {}
        parts = [
            f"{name.replace('_', ' ')} {logs[name]:.4f} (validation {logs[f'val_{name}']:.4f})" for name in self.shown
        ]
        now = time.monotonic()
        head = f"epoch {epoch + 1:>{len(str(self.epochs))}}/{self.epochs}  {now - self.started:4.0f} s"
        self.started = now
        print("  ".join([head, *parts]))
        sys.stdout.flush()


class ReseedEachEpoch(keras.callbacks.Callback):
    """Makes dropout, restarts of codes and random losses a function of (seed, epoch), whatever ran before.

    Validation draws the same random numbers after every epoch, so that epochs can be compared.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = seed

    def on_epoch_begin(self, epoch: int, logs: Logs | None = None) -> None:
        self._reseed("layers", epoch)

    def on_test_begin(self, logs: Logs | None = None) -> None:
        self._reseed("validation")

    def _reseed(self, purpose: str, *numbers: int) -> None:
        states = [v for v in self.model.non_trainable_variables if v.path.endswith("seed_generator_state")]
        for i, state in enumerate(states):
            state.assign(seeds.sequence(self.seed, purpose, *numbers, i).generate_state(2))


class TerminateOnNonFinite(keras.callbacks.Callback):
    """Stop training if the loss is NaN or infinite (raises RunError) or a stop signal is pending (raises Stopped).

    Args:
        checkpoint: Its best weights are saved in checkpoint/ of the run folder, if there are any.
        learning_rate_option: Name of the constant that sets the learning rate.
        network: A network to put the best weights into.
        part: The part of it that is saved, or all of it.
    """

    def __init__(
        self, checkpoint: ResumableCheckpoint, learning_rate_option: str, network: keras.Model, part: keras.Model
    ) -> None:
        super().__init__()
        self.checkpoint, self.learning_rate_option = checkpoint, learning_rate_option
        self.network, self.part = network, part

    def on_epoch_begin(self, epoch: int, logs: Logs | None = None) -> None:
        self.epoch = epoch

    def on_train_batch_end(self, batch: int, logs: Logs | None = None) -> None:
        console.raise_if_stopped()
        self._check((logs or {})["loss"], f"in epoch {self.epoch + 1}")

    def on_epoch_end(self, epoch: int, logs: Logs | None = None) -> None:
        self._check((logs or {})[self.checkpoint.monitor], f"on the validation split after epoch {epoch + 1}")

    def _check(self, loss: float, when: str) -> None:
        if np.isfinite(loss):
            return
        kept = ""
        run = self.checkpoint.run
        if run and self.checkpoint.best_weights is not None:
            path = run.checkpoint_folder / f"{self.checkpoint.stage}.keras"
            self.network.set_weights(self.checkpoint.best_weights)
            saving.save_model(self.part, path)
            kept = f"; the best model so far, of epoch {self.checkpoint.counters['best_epoch']}, is {path}"
        option, rate = self.learning_rate_option, current_learning_rate(self.model)
        raise RunError(
            f"{option}: the loss is {float(loss)} {when}, at a learning rate of {rate:.2g}; choose a lower {option} "
            f"and another run_dir{kept}"
        )


def current_learning_rate(network: keras.Model) -> float:
    """The learning rate that a compiled network uses now."""
    return float(keras.ops.convert_to_numpy(network.optimizer.learning_rate))
