"""Files of networks: equal networks give equal bytes, damage is named, and no code in a file runs."""

import json
import zipfile

import keras
import numpy as np
import pytest

import model
import saving
from run import RunError


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


def test_saved_models_contain_no_date_and_can_be_loaded_by_keras(tmp_path):
    saving.save_model(network(), tmp_path / "net.keras")
    with zipfile.ZipFile(tmp_path / "net.keras") as archive:
        assert {entry.date_time for entry in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
        assert json.loads(archive.read("metadata.json")).keys() == {"keras_version"}
    assert weights_equal(keras.saving.load_model(tmp_path / "net.keras"), network())
    other = network()
    other.set_weights([weights + 1 for weights in other.get_weights()])
    saving.load_weights(other, tmp_path / "net.keras")
    assert weights_equal(other, network())


def flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :]


@pytest.mark.parametrize("damage", [lambda content: content[:-100], lambda content: b"", flipped])
def test_a_damaged_model_is_named(tmp_path, damage):
    path = tmp_path / "net.keras"
    saving.save_model(network(), path)
    path.write_bytes(damage(path.read_bytes()))
    message = refused(lambda: saving.load_weights(network(), path))
    assert f"{path}: is damaged; remove it to train it again" in message


def test_a_model_of_another_shape_is_named(tmp_path):
    path = tmp_path / "net.keras"
    saving.save_model(network(units=5), path)
    message = refused(lambda: saving.load_weights(network(), path))
    assert f"{path}: contains a different network" in message
    assert "remove it" in message


def test_code_in_a_model_does_not_run(tmp_path):
    path, ran = tmp_path / "net.keras", tmp_path / "ran"
    trap = f"__import__('pathlib').Path({str(ran)!r}).touch()"
    hostile = keras.Sequential([keras.Input((4,)), keras.layers.Lambda(lambda x, code=trap: (eval(code), x)[1])])
    ran.unlink(missing_ok=True)
    hostile.save(path)
    assert "contains a different network" in refused(lambda: saving.load_weights(network(), path))
    assert "contains a Sequential, not a PixelCNN" in refused(lambda: saving.load_model(path, model.PixelCNN))
    assert not ran.exists()


def test_a_model_is_rebuilt_from_its_file(tmp_path):
    prior, path = model.PixelCNN(8, (3, 5), filters=8, num_blocks=2, gated=False), tmp_path / "prior.keras"
    saving.save_model(prior, path)
    loaded = saving.load_model(path, model.PixelCNN)
    assert weights_equal(loaded, prior)
    assert loaded.get_config() == prior.get_config()
    path.write_bytes(path.read_bytes()[:-100])
    assert f"{path}: is damaged" in refused(lambda: saving.load_model(path, model.PixelCNN))
    path.unlink()
    assert f"{path}: no such file" in refused(lambda: saving.load_model(path, model.PixelCNN))
