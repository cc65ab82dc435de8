"""Saved models, and training that was killed and continues."""

import json
import signal
import zipfile
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

import console
import model
import training
from run import Run, RunError
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
    pairs = [batch(step) for step in range(epoch * STEPS, EPOCHS * STEPS)]
    return tf.data.Dataset.from_tensor_slices(tuple(np.stack(arrays) for arrays in zip(*pairs, strict=True)))


class SimpleNet(keras.Sequential):
    """A network that `training.train` can compile: it has a loss of its own, as the product's networks have."""

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        return keras.ops.mean(keras.ops.square(y - y_pred))


def make() -> keras.Model:
    keras.utils.set_random_seed(1)
    dropout, dense = keras.layers.Dropout(0.5, seed=2, name="dropout"), keras.layers.Dense(3, name="dense")
    return SimpleNet([keras.Input((4,), name="input"), dropout, dense], name="net")


def run_of(folder: Path) -> Run:
    return Run(folder, {"data_dir": None}, {"project": "1.0.0"})


def train(folder: Path, monkeypatch, stop_after: int | None = None, patience: int = 100, rate: float = 0.1):
    """Train a small network, or continue to; returns it."""
    stage = Stage(
        name="net",
        make=make,
        batches=batches,
        validation=tf.data.Dataset.from_tensors(batch(100)),
        steps=STEPS,
        monitor="val_loss",
        epochs=EPOCHS,
        patience=patience,
        learning_rate=rate,
        learning_rate_option="net_learning_rate",
    )
    ours = training._callbacks
    with monkeypatch.context() as patched, run_of(folder).start("data"):
        patched.setattr(training, "_callbacks", lambda *given: [*ours(*given), StopAfter(stop_after)])
        opened = run_of(folder)
        opened.history = opened.read_history()
        return training.train(stage, opened, seed=5)


def history(folder: Path) -> list[dict]:
    return [{n: v for n, v in row.items() if n != "seconds"} for row in run_of(folder).read_history()]


def newest(folder: Path) -> Path:
    return sorted((folder / "checkpoint").iterdir())[-1]


def counters(folder: Path) -> dict:
    with np.load(newest(folder)) as file:
        return json.loads(str(file["counters"]))


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


def test_early_stopping_survives_kills(tmp_path, monkeypatch):
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    train(alone, monkeypatch, patience=2, rate=0.0)  # Never better than in the first epoch.
    assert counters(alone)["stopped"]
    assert counters(alone)["epoch"] == 3
    for stop_after in (1, 2):
        with pytest.raises(console.Stopped):
            train(killed, monkeypatch, stop_after, patience=2, rate=0.0)
    train(killed, monkeypatch, patience=2, rate=0.0)
    assert_same_end(killed, alone)


def test_the_best_weights_are_kept_not_the_last(tmp_path, monkeypatch):
    trained = train(tmp_path, monkeypatch)
    best = min(history(tmp_path), key=lambda row: row["val_loss"])
    x, y = batch(100)
    loss = float(np.mean((y - keras.ops.convert_to_numpy(trained(x))) ** 2))
    assert loss == pytest.approx(best["val_loss"], rel=1e-5)


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
    best_epoch = json.loads(str(arrays["counters"]))["best_epoch"] + 1
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
