"""Training on two devices, and in two processes, is training on one: on CPUs, in processes of their own."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import devices
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

# The driver, or what of it trains; returns what each epoch ends with.
DRIVE = """
import json, shutil, sys
import checkpoint, driver

use = driver.use

def drive(arguments, after_first_epoch=None, to_the_end=False):
    rows = []

    def keep(self, epoch, logs=None):
        saved(self, epoch, logs)
        rows.append(logs)
        if len(rows) == 1 and after_first_epoch:
            after_first_epoch()

    saved, checkpoint.Checkpoint.on_epoch_end = checkpoint.Checkpoint.on_epoch_end, keep
    try:
        driver.use = use if to_the_end else lambda *made: {}
        driver.main(driver.parse(arguments))
    finally:
        checkpoint.Checkpoint.on_epoch_end = saved
    return rows
"""

ALONE_AND_STOPPED = """
def stop():
    raise checkpoint.Stopped(15)

alone, stopped, *arguments = sys.argv[1:]
drive([*arguments, "--run-dir", alone])
try:
    drive([*arguments, "--run-dir", stopped], stop)
except checkpoint.Stopped:
    print(len(drive([*arguments, "--run-dir", stopped])))
"""

ONE_DEVICE_AND_TWO = """
one, two, stopped, *arguments = sys.argv[1:]
rows = drive([*arguments, "--run-dir", one], lambda: shutil.copytree(one, stopped), to_the_end=True)
print(json.dumps([rows, drive([*arguments, "--run-dir", two, "--devices", "2"])]))
"""

ONE_OF_TWO_PROCESSES = """
print(json.dumps(drive(sys.argv[1:])))
driver.devices.end(0)
"""


# JAX compiles faster with less optimisation.
XLA_FLAGS = "--xla_backend_optimization_level=0 --xla_force_host_platform_device_count=2"
ON_JAX = {"KERAS_BACKEND": "jax", "JAX_PLATFORMS": "cpu", "XLA_FLAGS": XLA_FLAGS}


def start(code: str, *arguments, **environment) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONPATH": str(ROOT), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def printed(process: subprocess.Popen, status: int = 0) -> str:
    """The last line that a process prints."""
    output, error = process.communicate(timeout=200)
    assert process.returncode == status, error
    return output.splitlines()[-1] if output else ""


@pytest.mark.parametrize(("codebook", "grids"), [("ema", [4, 8]), ("gradient", [4])])
def test_two_devices_train_as_one_does_restarts_and_all(codebook, grids):
    one, two = json.loads(printed(start(TWO_CPUS + TRAIN, codebook, grids)))
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


def test_one_process_is_the_first_and_agrees_with_itself():
    assert devices.processes() == (0, 1)
    assert devices.is_first()
    assert devices.from_first({"seed": 1}) == {"seed": 1}
    assert devices.described(1) == "TensorFlow, 1 CPU"
    with devices.joined(None):
        devices.leave()


def test_a_coordinator_that_does_not_answer_is_named(monkeypatch):
    monkeypatch.setattr(devices, "WAIT", 0)
    with socket.create_server(("localhost", 0)) as server:
        address = f"localhost:{server.getsockname()[1]}"
        devices._reach(address)
    with pytest.raises(devices.ProcessError) as error:
        devices._reach(address)
    assert str(error.value).startswith(f"coordinator is {address}: nobody answers there (")
    assert str(error.value).endswith("); start the first process on that machine, with process_index 0")


@pytest.fixture(scope="module")
def constants(tmp_path_factory) -> list:
    folder = tmp_path_factory.mktemp("slices")
    phantom.write_pngs(folder, num_cases=6, num_positions=4, image_size=32)
    return ["--data-dir", folder, *kill.CONSTANTS, "--vqvae-epochs", "2", "--prior-epochs", "1"]


def test_a_run_on_two_devices_that_was_stopped_ends_with_the_same_bytes(tmp_path, constants):
    alone, stopped = tmp_path / "alone" / "run", tmp_path / "stopped" / "run"
    assert printed(start(TWO_CPUS + DRIVE + ALONE_AND_STOPPED, alone, stopped, *constants, "--devices", "2")) == "2"
    assert kill.differences(alone, stopped) == []
    assert (stopped / "prior.keras").exists()


def test_on_jax_two_devices_and_two_processes_train_as_one_does_and_go_on(tmp_path, constants):
    pytest.importorskip("jax", reason="JAX is not installed: see requirements-jax.txt")
    folders = [tmp_path / name for name in ("one", "two", "stopped")]
    one, two = json.loads(printed(start(DRIVE + ONE_DEVICE_AND_TWO, *folders, *constants, **ON_JAX)))
    assert len(one) == 3
    assert np.isfinite(json.loads((folders[0] / "metrics.json").read_text())["ssim"])
    assert json.loads((folders[0] / "config.json").read_text())["versions"]["backend"] == "jax"
    assert (folders[0] / "report.html").exists()
    assert two == [pytest.approx(row, rel=1e-4, abs=1e-5) for row in one]

    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    together = ["--run-dir", folders[-1], "--coordinator", f"localhost:{port}", "--num-processes", 2]
    processes = [
        start(DRIVE + ONE_OF_TWO_PROCESSES, *constants, *together, "--process-index", i, **ON_JAX) for i in range(2)
    ]
    first, second = (json.loads(printed(process)) for process in processes)
    assert first == second
    assert first == [pytest.approx(row, rel=1e-4, abs=1e-5) for row in one[1:]]
    assert len((folders[-1] / "history.csv").read_text().splitlines()) == 1 + len(one)
