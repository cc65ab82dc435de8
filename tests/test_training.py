"""Training that was killed and continues, and the weights that it begins with."""

import dataclasses
import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import console
import saving
import training
from run import Run, checksum, remove
from tests.test_saving import flipped, refused, weights_equal
from training import Stage

EPOCHS, STEPS = 6, 3


class StopAfter(keras.callbacks.Callback):
    """Stops in the middle of the epoch after `epochs`, as a kill would."""

    def __init__(self, epochs: int | None):
        super().__init__()
        self.epochs = epochs

    def on_train_batch_begin(self, batch, logs=None):
        if self.epoch == self.epochs and batch == 1:
            raise console.Stopped(signal.SIGKILL)

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch


def batch(seed: int) -> tuple[np.ndarray, np.ndarray]:
    x = np.random.default_rng(seed).normal(size=(8, 4)).astype(np.float32)
    return x, x[:, :3] + 1


def batches(epoch: int) -> tf.data.Dataset:
    pairs = [batch(step) for step in range(epoch * STEPS, (epoch + 1) * STEPS)]
    return tf.data.Dataset.from_tensor_slices(tuple(np.stack(arrays) for arrays in zip(*pairs, strict=True)))


class SimpleNet(keras.Sequential):
    """A network that `training.train` can compile: it has a loss of its own, as the product's networks have."""

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        return keras.ops.mean(keras.ops.square(y - y_pred))


def make() -> keras.Model:
    keras.utils.set_random_seed(1)
    dropout, dense = keras.layers.Dropout(0.5, seed=2, name="dropout"), keras.layers.Dense(3, name="dense")
    return SimpleNet([keras.Input((4,), name="input"), dropout, dense], name="net")


def run_of(folder: Path, start_from: Path | None = None, data_dir: str | None = None) -> Run:
    constants = {"data_dir": data_dir, "start_from": start_from and str(start_from)}
    return Run(folder, constants, {"project": "1.0.0"}, path_fields=("data_dir", "start_from"))


def train(
    folder: Path,
    monkeypatch,
    stop_after: int | None = None,
    rate: float = 0.1,
    start_from: Path | None = None,
    data_dir: str | None = None,
    batches: Callable[[int], tf.data.Dataset] = batches,
    previews: int = 0,
    keep: tuple[str, ...] = (),
    **changes: Any,
) -> keras.Model:
    """Train a small network, or continue to; returns it. `changes` are those of the stage."""
    stage = Stage(
        name="net",
        make=make,
        batches=batches,
        validation=lambda: tf.data.Dataset.from_tensors(batch(100)),
        steps=STEPS,
        monitor="val_loss",
        epochs=EPOCHS,
        learning_rate=rate,
        made_from=("configuration",) if data_dir else ("slices",),
        learning_rate_option="net_learning_rate",
    )
    stage = dataclasses.replace(stage, **changes)
    ours = training._callbacks
    opened = run_of(folder, start_from, data_dir)
    initial = {}
    if start_from and (start_from / "net.keras").exists():
        initial = {"net.keras": checksum(start_from / "net.keras")}
    with monkeypatch.context() as patched, opened.start("data", initial):
        patched.setattr(training, "_callbacks", lambda *given: [*ours(*given), StopAfter(stop_after)])
        return training.train(stage, opened, seed=5, start_from=start_from, keep=keep, previews=previews)


def history(folder: Path) -> list[dict]:
    return [{n: v for n, v in row.items() if n != "seconds"} for row in run_of(folder).read_history()]


def newest(folder: Path) -> Path:
    return sorted((folder / "checkpoint").iterdir())[-1]


def counters(folder: Path) -> dict:
    with np.load(newest(folder)) as file:
        return json.loads(str(file["state"]))[0]


def assert_same_end(one: Path, two: Path) -> None:
    networks = [make(), make()]
    for network, folder in zip(networks, (one, two), strict=True):
        saving.load_weights(network, folder / "net.keras")
    assert weights_equal(*networks)
    assert history(one) == history(two)
    assert newest(one).read_bytes() == newest(two).read_bytes()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    with pytest.MonkeyPatch.context() as monkeypatch:
        train(folder, monkeypatch)
    return folder


def test_killed_training_ends_bitwise_identical(tmp_path, monkeypatch, uninterrupted):
    for stop_after in (0, 1, 3):
        with pytest.raises(console.Stopped):
            train(tmp_path, monkeypatch, stop_after)
    train(tmp_path, monkeypatch)
    assert_same_end(tmp_path, uninterrupted)
    (tmp_path / "net.keras").unlink()
    train(tmp_path, monkeypatch)  # Nothing is left to train; the best weights are in the checkpoint.
    assert_same_end(tmp_path, uninterrupted)


def test_the_best_epoch_survives_kills(tmp_path, monkeypatch):
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    train(alone, monkeypatch, rate=1e-30)  # Never better than in the first epoch.
    assert counters(alone)["best_epoch"] == 1
    for stop_after in (1, 2):
        with pytest.raises(console.Stopped):
            train(killed, monkeypatch, stop_after, rate=1e-30)
    train(killed, monkeypatch, rate=1e-30)
    assert_same_end(killed, alone)


def test_the_learning_rate_ends_where_training_ends(uninterrupted):
    rates = [row["learning_rate"] for row in history(uninterrupted)]
    assert rates[-1] == pytest.approx(0, abs=1e-9)
    assert rates[-2] > 1e-3


def scalars(folder: Path) -> dict[tuple[str, int], float]:
    """What TensorBoard shows for a folder, by name and step."""
    found = {}
    for path in sorted(folder.glob("events*")):
        for event in tf.compat.v1.train.summary_iterator(str(path)):
            for value in event.summary.value:
                assert (value.tag, event.step) not in found
                found[value.tag, event.step] = float(tf.make_ndarray(value.tensor))
    return found


def assert_logged(folder: Path) -> None:
    """Check that the logs of training and validation have the numbers of the history."""
    for kind, prefix in (("train", ""), ("validation", "val_")):
        expected = {("loss", row["epoch"]): pytest.approx(row[f"{prefix}loss"], rel=1e-5) for row in history(folder)}
        assert scalars(folder / "logs" / "net" / kind) == expected


def test_metrics_are_logged_for_tensorboard(uninterrupted, tmp_path, monkeypatch):
    assert len(history(uninterrupted)) == EPOCHS
    assert_logged(uninterrupted)
    with pytest.raises(console.Stopped):
        train(tmp_path, monkeypatch, 3)
    assert_logged(tmp_path)
    train(tmp_path, monkeypatch)
    assert_logged(tmp_path)


def test_each_epoch_has_batches_of_its_own(tmp_path, monkeypatch):
    asked = []

    def recorded(epoch: int) -> tf.data.Dataset:
        asked.append(epoch)
        return batches(epoch)

    with pytest.raises(console.Stopped):
        train(tmp_path, monkeypatch, 2, batches=recorded)
    train(tmp_path, monkeypatch, batches=recorded)
    assert asked == [0, 1, 2, 2, 3, 4, 5]  # The third epoch is trained again.


def test_a_trained_network_is_loaded_and_not_trained_again(tmp_path, monkeypatch):
    first = train(tmp_path, monkeypatch)
    remove(tmp_path / "checkpoint")
    monkeypatch.setattr(keras.Model, "fit", lambda *given, **options: pytest.fail("it is trained already"))
    assert weights_equal(train(tmp_path, monkeypatch), first)


def test_a_network_that_is_removed_is_trained_again(tmp_path, monkeypatch, uninterrupted):
    train(tmp_path, monkeypatch)
    remove(tmp_path / "checkpoint")
    (tmp_path / "net.keras").unlink()
    train(tmp_path, monkeypatch)
    assert_same_end(tmp_path, uninterrupted)


def test_a_network_without_a_record_is_not_replaced(tmp_path, monkeypatch, uninterrupted):
    train(tmp_path, monkeypatch)
    (tmp_path / "manifest.json").unlink()
    train(tmp_path, monkeypatch)  # As after a kill between the two files: the last checkpoint is complete.
    assert_same_end(tmp_path, uninterrupted)
    (tmp_path / "manifest.json").unlink()
    remove(tmp_path / "checkpoint")
    before = (tmp_path / "net.keras").read_bytes()
    message = refused(lambda: train(tmp_path, monkeypatch))
    assert f"{tmp_path / 'net.keras'}: is not in manifest.json" in message
    assert "remove the network" in message
    assert (tmp_path / "net.keras").read_bytes() == before


def test_checkpoints_of_a_network_made_from_something_else_are_not_used(tmp_path, monkeypatch, capsys):
    with pytest.raises(console.Stopped):
        train(tmp_path / "net", monkeypatch, 3, data_dir="one")
    train(tmp_path / "net", monkeypatch, data_dir="two", rate=0.05)
    train(tmp_path / "alone" / "net", monkeypatch, data_dir="two", rate=0.05)
    assert_same_end(tmp_path / "net", tmp_path / "alone" / "net")
    assert "net_epoch_0003.npz: was made from other networks or slices" in capsys.readouterr().out


def test_a_checkpoint_whose_history_is_lost_is_refused(tmp_path, monkeypatch):
    with pytest.raises(console.Stopped):
        train(tmp_path, monkeypatch, 3)
    path = tmp_path / "history.csv"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    message = refused(lambda: train(tmp_path, monkeypatch))
    assert f"{path}: rows of net are missing" in message
    assert "restore the file" in message


def validation_loss(network: keras.Model) -> float:
    x, y = batch(100)
    return float(np.mean((y - keras.ops.convert_to_numpy(network(x))) ** 2))


def test_training_begins_with_the_weights_of_another_run(tmp_path, monkeypatch, uninterrupted):
    best = min(row["val_loss"] for row in history(uninterrupted))
    trained = train(tmp_path / "longer", monkeypatch, rate=1e-9, start_from=uninterrupted)
    assert validation_loss(trained) == pytest.approx(best, rel=1e-5)
    assert history(tmp_path / "longer")[0]["val_loss"] == pytest.approx(best, rel=1e-5)
    assert validation_loss(train(tmp_path / "scratch", monkeypatch, rate=1e-9)) > 2 * best


def test_a_network_that_is_kept_is_not_trained(tmp_path, monkeypatch, uninterrupted):
    kept = train(tmp_path / "kept", monkeypatch, start_from=uninterrupted, keep=("net",))
    assert history(tmp_path / "kept") == []
    again = train(tmp_path / "kept", monkeypatch, start_from=tmp_path / "lost", keep=("net",))
    for network in (kept, again):
        best = min(row["val_loss"] for row in history(uninterrupted))
        assert validation_loss(network) == pytest.approx(best, rel=1e-5)


def test_training_from_other_weights_survives_kills_and_the_loss_of_the_folder(tmp_path, monkeypatch, uninterrupted):
    alone, killed, folder = tmp_path / "alone", tmp_path / "killed", tmp_path / "weights"
    train(alone, monkeypatch, start_from=uninterrupted)
    shutil.copytree(uninterrupted, folder)
    with pytest.raises(console.Stopped):
        train(killed, monkeypatch, 0, start_from=folder)
    folder.rename(tmp_path / "moved")
    message = refused(lambda: train(killed, monkeypatch, start_from=folder))  # There is no checkpoint yet.
    assert f"start_from is {folder}: net.keras is missing" in message
    with pytest.raises(console.Stopped):
        train(killed, monkeypatch, 2, start_from=tmp_path / "moved")
    train(killed, monkeypatch, start_from=folder)
    assert_same_end(killed, alone)


class Layers(keras.Model):
    """A network that is rebuilt from its settings, as the product's networks are."""

    def __init__(self, units: int = 3, depth: int = 2, seed: int = 0):
        super().__init__()
        self.settings = {"units": units, "depth": depth, "seed": seed}
        self.stack = [keras.layers.Dense(units, name=f"dense_{i}") for i in range(depth)]
        self(np.zeros((1, 4), np.float32))

    def call(self, x):
        for layer in self.stack:
            x = layer(x)
        return x

    def get_config(self):
        return self.settings


def test_networks_to_start_from_are_checked_before_anything_is_written(tmp_path):
    opened, folder = run_of(tmp_path / "run"), tmp_path / "other"
    folder.mkdir()
    message = refused(lambda: training.initial_networks(folder, {"vqvae": Layers}, opened))
    assert f"start_from is {folder}: contains no vqvae.keras" in message
    saving.save_model(Layers(), folder / "vqvae.keras")
    found = training.initial_networks(folder, {"vqvae": Layers, "prior": Layers}, opened)
    assert found == {"vqvae.keras": checksum(folder / "vqvae.keras")}
    kept = ("vqvae", "prior")
    message = refused(lambda: training.initial_networks(folder, {"vqvae": Layers, "prior": Layers}, opened, kept))
    assert f"start_from is {folder}: contains no prior.keras" in message
    for settings, shown in (({"units": 5}, "(units is 3 there, 5 here)"), ({"depth": 1, "seed": 1}, "(depth is 2 ")):
        makers = {"vqvae": lambda settings=settings: Layers(**settings)}
        message = refused(lambda makers=makers: training.initial_networks(folder, makers, opened))
        assert f"start_from is {folder}: vqvae.keras has another architecture" in message
        assert shown in message
        assert "choose another start_from" in message
    assert training.initial_networks(None, {"vqvae": Layers}, opened) == {}
    assert not (tmp_path / "run").exists()


def test_the_best_weights_are_kept_not_the_last(tmp_path, monkeypatch):
    trained = train(tmp_path, monkeypatch)
    best = min(history(tmp_path), key=lambda row: row["val_loss"])
    x, y = batch(100)
    loss = float(np.mean((y - keras.ops.convert_to_numpy(trained(x))) ** 2))
    assert loss == pytest.approx(best["val_loss"], rel=1e-5)


def test_only_the_part_that_is_used_is_saved_and_loaded(tmp_path, monkeypatch):
    def part(network: keras.Model) -> keras.Model:
        return keras.Sequential([keras.Input((4,)), network.get_layer("dense")])

    trained = train(tmp_path, monkeypatch, part=part)
    assert weights_equal(trained, train(tmp_path, monkeypatch, part=part))
    loaded = part(make())
    saving.load_weights(loaded, tmp_path / "net.keras")
    assert weights_equal(trained, loaded)


def test_a_damaged_checkpoint_is_reported_and_the_one_before_it_used(tmp_path, monkeypatch, uninterrupted, capsys):
    with pytest.raises(console.Stopped):
        train(tmp_path, monkeypatch, 4)
    third, fourth = sorted((tmp_path / "checkpoint").iterdir())
    assert [third.name, fourth.name] == ["net_epoch_0003.npz", "net_epoch_0004.npz"]
    fourth.write_bytes(flipped(fourth.read_bytes()))
    train(tmp_path, monkeypatch)
    assert_same_end(tmp_path, uninterrupted)
    warning = capsys.readouterr().err
    assert f"{fourth}: is damaged" in warning
    assert "continuing from the checkpoint before it" in warning


@pytest.mark.parametrize("damage", [lambda content: content[:-50], lambda content: b""])
def test_a_stage_starts_again_if_all_checkpoints_are_damaged(tmp_path, monkeypatch, uninterrupted, capsys, damage):
    with pytest.raises(console.Stopped):
        train(tmp_path, monkeypatch, 3)
    for path in (tmp_path / "checkpoint").iterdir():
        path.write_bytes(damage(path.read_bytes()))
    train(tmp_path, monkeypatch)
    assert_same_end(tmp_path, uninterrupted)
    assert capsys.readouterr().err.count("is damaged") == 2
