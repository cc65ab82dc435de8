"""Training on two devices is training on one: on two logical CPU devices, in a process that has them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import model
import phantom
from benchmarks import kill

ROOT = Path(model.__file__).parent

TWO_CPUS = """
import sys
import tensorflow as tf
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
"""

TRAIN = """
import json
import keras, numpy as np
import dataset, devices, model

def train(count, codebook, grids):
    keras.utils.set_random_seed(0)
    with devices.spread(count):
        settings = {"channels": 4, "residual_blocks": 1, "num_embeddings": 32, "embedding_dim": 4}
        vqvae = model.VQVAE(32, grids, codebook=codebook, restart_below=0.5, data_variance=0.1, **settings)
        vqvae.compile(keras.optimizers.SGD(0.05))
    random = np.random.default_rng(0)
    images = (random.random((40, 32, 32, 1)) * 255).astype(np.uint8)
    held = dataset.Slices(images, np.zeros(40, np.int32), np.array(["case"] * 40))
    ten = dataset.Slices(images[:10], np.zeros(10, np.int32), np.array(["case"] * 10))
    history = vqvae.fit(
        dataset.image_batches(held, 8, seed=0), steps_per_epoch=1, epochs=5, shuffle=False, verbose=0,
        validation_data=dataset.image_batches(ten, 8),
    ).history
    embeddings = [keras.ops.convert_to_numpy(quantizer.embeddings).tolist() for quantizer in vqvae.quantizers]
    return {**history, "embeddings": embeddings}

codebook, grids = sys.argv[1], json.loads(sys.argv[2])
print(json.dumps([train(count, codebook, grids) for count in (1, 2)]))
"""

DRIVE = """
import driver
driver.main(driver.parse(sys.argv[1:]))
"""


DRIVE_UNTIL_EPOCH_2 = """
import checkpoint, driver

def stop(self, epoch, logs=None):
    if epoch == 1:
        raise checkpoint.Stopped(15)

checkpoint.SeedEpoch.on_epoch_begin = stop
try:
    driver.main(driver.parse(sys.argv[1:]))
except checkpoint.Stopped:
    print("stopped")
"""


def run(code: str, *arguments) -> str:
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        [sys.executable, "-c", TWO_CPUS + code, *map(str, arguments)], env=environment, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.mark.parametrize(("codebook", "grids"), [("ema", [4, 8]), ("gradient", [4])])
def test_two_devices_train_as_one_does_restarts_and_all(codebook, grids):
    one, two = json.loads(run(TRAIN, codebook, grids).splitlines()[-1])
    assert one.keys() == two.keys()
    assert len(one["loss"]) == 5
    for name, expected in one.items():
        if name == "embeddings":
            for a, b in zip(expected, two[name], strict=True):
                assert [row for codes in b for row in codes] == pytest.approx(
                    [row for codes in a for row in codes], rel=1e-3, abs=1e-4
                )
        else:
            assert two[name] == pytest.approx(expected, rel=1e-4, abs=1e-5), name


def test_the_driver_runs_on_two_devices_and_goes_on(tmp_path):
    phantom.write_pngs(tmp_path / "slices", num_cases=6, num_positions=4, image_size=32)
    arguments = ["--data-dir", tmp_path / "slices", "--run-dir", tmp_path / "run", "--devices", "2", *kill.CONSTANTS]
    arguments += ["--vqvae-epochs", "2", "--prior-epochs", "1"]
    stopped = run(DRIVE_UNTIL_EPOCH_2, *arguments)
    assert stopped.splitlines()[-1] == "stopped"
    assert "going on after epoch 1" in run(DRIVE, *arguments)
    assert (tmp_path / "run" / "report.html").exists()
