"""Saved models, and training that was killed and continues."""

import dataclasses
import json
import shutil
import signal
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

import console
import model
import training
from run import Run, RunError, checksum, remove
from training import Stage


def network(units: int = 3) -> keras.Model:
    keras.utils.set_random_seed(1)
    return keras.Sequential(
        [keras.Input((4,)), keras.layers.Dropout(0.5, seed=2), keras.layers.Dense(units, name="dense")], name="net"
    )


def weights_equal(one: keras.Model, two: keras.Model) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(one.get_weights(), two.get_weights(), strict=True))


def refused(make) -> str:
    with pytest.raises(RunError) as error:
        make()
    assert "\n" not in str(error.value)
    return str(error.value)


# -------------------------------------------------------------------------------------------------- models


def test_saved_models_contain_no_date_and_can_be_loaded_by_keras(tmp_path):
    training.save_model(network(), tmp_path / "net.keras")
    with zipfile.ZipFile(tmp_path / "net.keras") as archive:
        assert {entry.date_time for entry in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
        assert json.loads(archive.read("metadata.json")).keys() == {"keras_version"}
    assert weights_equal(keras.saving.load_model(tmp_path / "net.keras"), network())
    other = network()
    other.set_weights([weights + 1 for weights in other.get_weights()])
    training.load_weights(other, tmp_path / "net.keras")
    assert weights_equal(other, network())


def flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :]


@pytest.mark.parametrize("damage", [lambda content: content[:-100], lambda content: b"", flipped])
def test_a_damaged_model_is_named(tmp_path, damage):
    path = tmp_path / "net.keras"
    training.save_model(network(), path)
    path.write_bytes(damage(path.read_bytes()))
    message = refused(lambda: training.load_weights(network(), path))
    assert f"{path}: is damaged; remove it to train it again" in message


def test_a_model_of_another_shape_is_named(tmp_path):
    path = tmp_path / "net.keras"
    training.save_model(network(units=5), path)
    message = refused(lambda: training.load_weights(network(), path))
    assert f"{path}: contains a different network" in message
    assert "remove it" in message


def test_code_in_a_model_does_not_run(tmp_path):
    path, ran = tmp_path / "net.keras", tmp_path / "ran"
    trap = f"__import__('pathlib').Path({str(ran)!r}).touch()"
    hostile = keras.Sequential([keras.Input((4,)), keras.layers.Lambda(lambda x, code=trap: (eval(code), x)[1])])
    ran.unlink(missing_ok=True)
    hostile.save(path)
    assert "contains a different network" in refused(lambda: training.load_weights(network(), path))
    assert "contains a Sequential, not a PixelCNN" in refused(lambda: training.load_model(path, model.PixelCNN))
    assert not ran.exists()


def test_a_model_is_rebuilt_from_its_file(tmp_path):
    prior, path = model.PixelCNN(8, (3, 5), filters=8, num_blocks=2, gated=False), tmp_path / "prior.keras"
    training.save_model(prior, path)
    loaded = training.load_model(path, model.PixelCNN)
    assert weights_equal(loaded, prior)
    assert loaded.get_config() == prior.get_config()
    path.write_bytes(path.read_bytes()[:-100])
    assert f"{path}: is damaged" in refused(lambda: training.load_model(path, model.PixelCNN))
    path.unlink()
    assert f"{path}: no such file" in refused(lambda: training.load_model(path, model.PixelCNN))


# ------------------------------------------------------------------------------------------------ training

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
        validation=tf.data.Dataset.from_tensors(batch(100)),
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
        training.load_weights(network, folder / "net.keras")
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


@pytest.mark.parametrize(("count", "epochs"), [(2, [3, 6]), (4, [2, 3, 5, 6]), (10, [1, 2, 3, 4, 5, 6]), (0, [])])
def test_previews_are_drawn_evenly_over_the_epochs(tmp_path, monkeypatch, count, epochs):
    drawn = []

    def preview(network: keras.Model) -> np.ndarray:
        drawn.append(network.get_weights())
        return np.full((6, 4), 0.5)

    with pytest.raises(console.Stopped):
        train(tmp_path, monkeypatch, 4, preview=preview, previews=count)
    trained = train(tmp_path, monkeypatch, preview=preview, previews=count)
    folder = tmp_path / "previews" / "net"
    assert [path.name for path in sorted(folder.glob("*"))] == [f"epoch_{epoch:03d}.png" for epoch in epochs]
    assert len(drawn) == len(epochs)
    if count:
        assert not np.array_equal(drawn[0][0], drawn[-1][0])
        assert trained.get_weights()[0].shape == drawn[-1][0].shape
        with Image.open(folder / "epoch_006.png") as picture:
            assert np.asarray(picture).tolist() == np.full((6, 4), 128).tolist()
        assert list((tmp_path / "logs" / "net" / "previews").iterdir())


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
    training.save_model(Layers(), folder / "vqvae.keras")
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
    training.load_weights(loaded, tmp_path / "net.keras")
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


def test_a_loss_that_is_not_finite_stops_training_and_keeps_the_best_model(tmp_path, monkeypatch):
    with pytest.raises(console.Stopped):
        train(tmp_path, monkeypatch, 2)
    with np.load(newest(tmp_path)) as file:
        arrays = {name: file[name] for name in file.files}
    arrays["weights_000"][:] = np.inf
    np.savez(newest(tmp_path), **arrays)
    message = refused(lambda: train(tmp_path, monkeypatch))
    assert message.startswith("net_learning_rate: the loss is ")
    assert " in epoch 3, at a learning rate of 0.0" in message
    assert "choose a lower net_learning_rate and another run_dir" in message
    best_epoch = counters(tmp_path)["best_epoch"]
    assert message.endswith(f"the best model so far, of epoch {best_epoch}, is {tmp_path}/checkpoint/net.keras")
    kept = make()
    training.load_weights(kept, tmp_path / "checkpoint" / "net.keras")
    assert np.array_equal(kept.get_weights()[0], arrays["best_000"])
    assert len(history(tmp_path)) == 2


def test_one_short_line_is_printed_per_epoch(tmp_path, monkeypatch, capsys):
    train(tmp_path, monkeypatch)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch ")]
    assert len(lines) == EPOCHS
    assert lines[0].startswith("epoch 1/6 ")
    assert "loss " in lines[0]
    assert "(validation " in lines[0]
    assert max(map(len, lines)) < 100
