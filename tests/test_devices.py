"""Training on two devices, or in two processes, equals training on one. Each case runs on CPUs in processes of its
own."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import console
import devices
import phantom
from benchmarks import kill

ROOT = Path(devices.__file__).parent

TWO_CPUS = """
import sys
import tensorflow as tf
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
"""

TRAIN_ON_ONE_AND_TWO = """
import json
import keras, numpy as np
import tensorflow as tf
import dataset, devices, model, sharp

def train(count, codebook, grids):
    keras.utils.set_random_seed(0)
    with devices.distribution_scope(count):
        settings = {"channels": 4, "residual_blocks": 1, "num_embeddings": 32, "embedding_dim": 4}
        vqvae = model.VQVAE(32, grids, codebook=codebook, dead_code_threshold=0.5, data_variance=0.1, **settings)
        vqvae.compile(keras.optimizers.SGD(0.05))
    images = (np.random.default_rng(0).random((40, 32, 32, 1)) * 255).astype(np.uint8)
    positions, subjects = np.zeros(40, np.int32), np.array(["case"] * 40)
    train_slices = dataset.Slices(images, positions, subjects)
    validation_slices = dataset.Slices(images[:10], positions[:10], subjects[:10])
    history = vqvae.fit(
        dataset.image_batches(train_slices, 8, seed=0), steps_per_epoch=1, epochs=5, shuffle=False, verbose=0,
        validation_data=dataset.image_batches(validation_slices, 8),
    ).history
    embeddings = [keras.ops.convert_to_numpy(quantizer.embeddings).tolist() for quantizer in vqvae.quantizers]
    return {**history, "embeddings": embeddings}

def velocity_errors(count):
    keras.utils.set_random_seed(0)
    random = np.random.default_rng(0)
    inputs = {"images": random.integers(0, 256, (4, 32, 32, 1)), "codes_0": random.integers(0, 8, (4, 4, 4))}
    with devices.distribution_scope(count):
        vqvae = model.VQVAE(32, [4], channels=4, residual_blocks=0, num_embeddings=8, embedding_dim=4)
        scales = np.full(sharp.patch_side(32) ** 2, 0.1)
        tuning = sharp.DecoderTuning(sharp.SharpDecoder.untrained(vqvae, detail_channels=8, detail_scales=scales))
        strategy = tf.distribute.get_strategy()
        batches = tf.data.Dataset.from_tensors({name: array.astype(np.int32) for name, array in inputs.items()})
        batch = next(iter(strategy.experimental_distribute_dataset(batches.unbatch().batch(4))))
        errors = strategy.run(lambda inputs: tuning(inputs, training=True), args=(batch,))
    return np.concatenate(strategy.experimental_local_results(errors), axis=1).tolist()

cases = json.loads(sys.argv[1])
trained = {codebook: [train(count, codebook, grids) for count in (1, 2)] for codebook, grids in cases.items()}
print(json.dumps({**trained, "decoder": [velocity_errors(count) for count in (1, 2)]}))
"""

# Defines a function that runs the driver, by default without what follows training, and returns the logs of each epoch.
# What it copies after the first epoch is what a kill would leave: the checkpoint is written last.
DRIVE = """
import json, shutil, sys
import callbacks, driver, options, plots, two_sample

evaluate = driver.evaluate
two_sample.CLASSIFIER_MAX_EPOCHS = 1  # There are too few slices to learn from in more.
plots.DPI = 40

def drive(arguments, after_first_epoch=None, with_evaluation=False):
    rows = []

    def record(self, epoch, logs=None):
        on_epoch_end(self, epoch, logs)
        rows.append(logs)
        if len(rows) == 1 and after_first_epoch:
            after_first_epoch()

    callback = callbacks.ResumableCheckpoint
    on_epoch_end, callback.on_epoch_end = callback.on_epoch_end, record
    try:
        driver.evaluate = evaluate if with_evaluation else lambda *arguments: {}
        driver.main(options.parse(driver.Config, arguments, ""))
    finally:
        callback.on_epoch_end = on_epoch_end
    return rows
"""

UNINTERRUPTED_AND_KILLED = """
uninterrupted, killed, *arguments = sys.argv[1:]
drive([*arguments, "--run-dir", uninterrupted], lambda: shutil.copytree(uninterrupted, killed))
print(len(drive([*arguments, "--run-dir", killed])))
"""

ONE_DEVICE_AND_TWO = """
one, two, stopped, *arguments = sys.argv[1:]
rows = drive([*arguments, "--run-dir", one], lambda: shutil.copytree(one, stopped), with_evaluation=True)
print(json.dumps([rows, drive([*arguments, "--run-dir", two, "--devices", "2"])]))
"""

ONE_OF_TWO_PROCESSES = """
print(json.dumps(drive(sys.argv[1:])))
driver.devices.exit_process(0)
"""


# JAX compiles faster with less optimisation.
XLA_FLAGS = "--xla_backend_optimization_level=0 --xla_force_host_platform_device_count=2"
ON_JAX = {"KERAS_BACKEND": "jax", "JAX_PLATFORMS": "cpu", "XLA_FLAGS": XLA_FLAGS}


def shared_compilations(folder: Path) -> dict[str, str]:
    """Environment of processes that use each other's compiled functions on JAX."""
    thresholds = {"MIN_COMPILE_TIME_SECS": "0", "MIN_ENTRY_SIZE_BYTES": "-1"}
    return {"JAX_COMPILATION_CACHE_DIR": str(folder / "compiled")} | {
        f"JAX_PERSISTENT_CACHE_{name}": value for name, value in thresholds.items()
    }


def start(code: str, *arguments, **environment) -> subprocess.Popen:
    """Run Python code in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONPATH": str(ROOT), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )


def printed(process: subprocess.Popen, status: int = 0) -> str:
    """Return the last line that a process prints, and require its exit status."""
    try:
        output, errors = process.communicate(timeout=600)
    finally:
        process.kill()  # It would go on after a failure.
    assert process.returncode == status, errors
    return output.splitlines()[-1] if output else ""


@pytest.fixture(scope="module")
def trained_on_one_and_two() -> dict:
    """By codebook, what training on one device and on two leads to; one process, because imports take long."""
    cases = json.dumps({"ema": [4, 8], "gradient": [4]})
    return json.loads(printed(start(TWO_CPUS + TRAIN_ON_ONE_AND_TWO, cases)))


@pytest.mark.parametrize("codebook", ["ema", "gradient"])
def test_two_devices_train_like_one_and_restart_the_same_dead_codes(trained_on_one_and_two, codebook):
    one, two = trained_on_one_and_two[codebook]
    assert one.keys() == two.keys()
    assert len(one["loss"]) == 5
    for name, expected in one.items():
        if name == "embeddings":
            for a, b in zip(expected, two[name], strict=True):
                np.testing.assert_allclose(b, a, rtol=1e-3, atol=1e-4)
        else:
            assert two[name] == pytest.approx(expected, rel=1e-4, abs=1e-5), name


def test_two_devices_draw_the_noise_that_one_would(trained_on_one_and_two):
    one, two = trained_on_one_and_two["decoder"]
    np.testing.assert_allclose(two, one, atol=1e-5)
    assert not np.allclose(two[0][:2], two[0][2:])


def test_a_single_process_is_the_main_process():
    assert devices.process_index_and_count() == (0, 1)
    assert devices.is_main_process()
    assert devices.broadcast_from_main({"seed": 1}) == {"seed": 1}
    assert devices.describe(1) == "training on 1 CPU with TensorFlow"
    with devices.join_processes(None):
        devices.shutdown()


def test_a_coordinator_that_does_not_answer_is_named(monkeypatch):
    monkeypatch.setattr(devices, "WAIT_SECONDS", 0)
    with socket.create_server(("localhost", 0)) as server:
        address = f"localhost:{server.getsockname()[1]}"
        devices._wait_for_coordinator(address)
    with pytest.raises(devices.ProcessError, match=f"coordinator is {re.escape(address)}: .*process_index 0") as error:
        devices._wait_for_coordinator(address)
    assert isinstance(error.value, console.UserError)
    assert console.one_line(error.value) == str(error.value)


@pytest.fixture(scope="module")
def arguments(tmp_path_factory) -> list:
    """Command line of a small run."""
    folder = tmp_path_factory.mktemp("slices")
    phantom.write_pngs(folder, num_subjects=6, num_positions=4, image_size=16)
    epochs = ["--vqvae-epochs", "2", "--prior-epochs", "1", "--selector-epochs", "1", "--decoder-epochs", "1"]
    return ["--data-dir", folder, *kill.CONSTANTS, "--image-size", "16", *epochs]


def test_a_killed_run_on_two_devices_ends_bitwise_identical(tmp_path, arguments):
    uninterrupted, killed = tmp_path / "uninterrupted" / "run", tmp_path / "killed" / "run"
    process = start(TWO_CPUS + DRIVE + UNINTERRUPTED_AND_KILLED, uninterrupted, killed, *arguments, "--devices", "2")
    assert printed(process) == "5"  # the second epoch of the VQ-VAE, prior, selector, sharp decoder and critic
    assert kill.differences(uninterrupted, killed) == []
    assert (killed / "prior.keras").exists()


def test_on_jax_two_devices_and_two_processes_train_like_one_device_and_resume(tmp_path, arguments):
    pytest.importorskip("jax", reason="JAX is not installed: see requirements-jax.txt")
    folders = [tmp_path / name for name in ("one", "two", "stopped")]
    environment = ON_JAX | shared_compilations(tmp_path)
    one, two = json.loads(printed(start(DRIVE + ONE_DEVICE_AND_TWO, *folders, *arguments, **environment)))
    assert len(one) == 6
    assert np.isfinite(json.loads((folders[0] / "metrics.json").read_text())["ssim"])
    assert json.loads((folders[0] / "config.json").read_text())["versions"]["backend"] == "jax"
    assert (folders[0] / "report.html").exists()
    assert two == [pytest.approx(row, rel=1e-4, abs=1e-5) for row in one]

    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    together = ["--run-dir", folders[-1], "--coordinator", f"localhost:{port}", "--num-processes", 2]
    processes = [
        start(DRIVE + ONE_OF_TWO_PROCESSES, *arguments, *together, "--process-index", i, **environment)
        for i in range(2)
    ]
    main_rows, other_rows = (json.loads(printed(process)) for process in processes)
    assert main_rows == other_rows
    assert main_rows == [pytest.approx(row, rel=1e-4, abs=1e-5) for row in one[1:]]
    assert len((folders[-1] / "history.csv").read_text().splitlines()) == 1 + len(one)
