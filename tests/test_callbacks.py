"""What callbacks do while a network is trained. Checkpoints are tested with training."""

from types import SimpleNamespace

import keras
import numpy as np
import pytest
from PIL import Image

import callbacks
import console
import saving
from tests.test_saving import refused
from tests.test_training import EPOCHS, counters, history, make, newest, train


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
    saving.load_weights(kept, tmp_path / "checkpoint" / "net.keras")
    assert np.array_equal(kept.get_weights()[0], arrays["best_000"])
    assert len(history(tmp_path)) == 2


def test_the_best_model_is_the_part_that_is_used_if_the_loss_is_not_finite(tmp_path, monkeypatch):
    parts = {}

    def part(network: keras.Model) -> keras.Model:
        """The network's dense layer in a network of its own, the same one each time."""
        if id(network) not in parts:
            parts[id(network)] = network, keras.Sequential([keras.Input((4,)), network.get_layer("dense")])
        return parts[id(network)][1]

    with pytest.raises(console.Stopped):
        train(tmp_path, monkeypatch, 2, part=part)
    with np.load(newest(tmp_path)) as file:
        arrays = {name: file[name] for name in file.files}
    arrays["weights_000"][:] = np.inf
    np.savez(newest(tmp_path), **arrays)
    assert "the best model so far" in refused(lambda: train(tmp_path, monkeypatch, part=part))
    kept = part(make())
    saving.load_weights(kept, tmp_path / "checkpoint" / "net.keras")
    assert np.array_equal(kept.get_weights()[0], arrays["best_000"])


def test_the_accuracy_of_the_selector_is_in_the_history():
    rows = []
    callback = callbacks.CSVHistory(SimpleNamespace(add_epoch=rows.append), "selector")
    network = make()
    network.compile("sgd")
    callback.set_model(network)
    callback.on_epoch_end(0, {"loss": 0.4, "accuracy": 0.8, "val_loss": 0.5, "val_accuracy": 0.7})
    assert rows[0]["accuracy"] == 0.8
    assert rows[0]["val_accuracy"] == 0.7


def test_one_short_line_is_printed_per_epoch(tmp_path, monkeypatch, capsys):
    train(tmp_path, monkeypatch)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch ")]
    assert len(lines) == EPOCHS
    assert lines[0].startswith("epoch 1/6 ")
    assert "loss " in lines[0]
    assert "(validation " in lines[0]
    assert max(map(len, lines)) < 100


class Noisy(keras.Model):
    """Predicts random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.seed_generator = keras.random.SeedGenerator(1)
        self.dense = keras.layers.Dense(4)

    def call(self, x):
        return self.dense(x) + keras.random.normal(keras.ops.shape(x), seed=self.seed_generator)


def test_validation_draws_the_same_numbers_in_every_epoch():
    network, x = Noisy(), np.zeros((8, 4), np.float32)
    network.compile(keras.optimizers.SGD(0.0), "mse")
    reseed = callbacks.ReseedEachEpoch(0)
    losses = network.fit(x, x, epochs=3, validation_data=(x, x), verbose=0, callbacks=[reseed]).history
    assert len(set(losses["val_loss"])) == 1
    assert len(set(losses["loss"])) == 3
