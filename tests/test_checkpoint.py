"""Files that are whole, run folders that are refused, checkpoints, and a run that is killed again and again."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import filelock
import keras
import numpy as np
import pytest

import checkpoint
import driver
import phantom
from benchmarks import kill

# ------------------------------------------------------------------------------------- whole or not at all


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "numbers.json"
    checkpoint.write_text(path, "old")

    def write_half():
        with checkpoint.whole(path) as unfinished:
            unfinished.write_text("half of the ne")
            assert path.read_text() == "old"
            raise checkpoint.Stopped(signal.SIGTERM)

    with pytest.raises(checkpoint.Stopped):
        write_half()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["numbers.json"]


def test_a_folder_appears_whole(tmp_path):
    with checkpoint.whole(tmp_path / "samples") as unfinished:
        unfinished.mkdir()
        (unfinished / "one.png").write_bytes(b"1")
        assert not (tmp_path / "samples").exists()
    assert (tmp_path / "samples" / "one.png").read_bytes() == b"1"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EIO])
def test_a_disk_that_takes_no_more_is_one_line_and_loses_nothing(tmp_path, monkeypatch, number):
    path = tmp_path / "numbers.json"
    checkpoint.write_text(path, "old")

    def refuse(descriptor):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(checkpoint.RunError) as error:
        checkpoint.write_text(path, "new")
    assert str(error.value) == (
        f"{path}: cannot be written ({os.strerror(number)}); what was saved before is kept: make room or give leave to "
        "write there, then the same command goes on"
    )
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["numbers.json"]


# -------------------------------------------------------------------------------------------------- models


def network(units: int = 3) -> keras.Model:
    keras.utils.set_random_seed(1)
    return keras.Sequential(
        [keras.Input((4,)), keras.layers.Dropout(0.5, seed=2), keras.layers.Dense(units, name="dense")], name="net"
    )


def weights_equal(one: keras.Model, two: keras.Model) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(one.get_weights(), two.get_weights(), strict=True))


def test_saved_models_hold_no_time_and_load_as_keras_has_it(tmp_path):
    checkpoint.save_model(network(), tmp_path / "net.keras")
    with zipfile.ZipFile(tmp_path / "net.keras") as archive:
        assert {entry.date_time for entry in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
        assert json.loads(archive.read("metadata.json")).keys() == {"keras_version"}
    assert weights_equal(keras.saving.load_model(tmp_path / "net.keras"), network())
    other = network()
    other.set_weights([weights + 1 for weights in other.get_weights()])
    checkpoint.load_weights(other, tmp_path / "net.keras")
    assert weights_equal(other, network())


def flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :]


@pytest.mark.parametrize("damage", [lambda content: content[:-100], lambda content: b"", flipped])
def test_a_damaged_model_is_named(tmp_path, damage):
    path = tmp_path / "net.keras"
    checkpoint.save_model(network(), path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(checkpoint.RunError) as error:
        checkpoint.load_weights(network(), path)
    assert str(error.value) == f"{path}: is damaged; remove it to train it again, or choose another run_dir"


def test_a_model_of_another_shape_is_named(tmp_path):
    path = tmp_path / "net.keras"
    checkpoint.save_model(network(units=5), path)
    with pytest.raises(checkpoint.RunError) as error:
        checkpoint.load_weights(network(), path)
    assert str(error.value) == (
        f"{path}: holds another network than this run's; remove it to train it again, or choose another run_dir"
    )


def test_code_in_a_model_does_not_run(tmp_path):
    path, ran = tmp_path / "net.keras", tmp_path / "ran"
    trap = f"__import__('pathlib').Path({str(ran)!r}).touch()"
    hostile = keras.Sequential([keras.Input((4,)), keras.layers.Lambda(lambda x, code=trap: (eval(code), x)[1])])
    ran.unlink(missing_ok=True)
    hostile.save(path)
    with pytest.raises(checkpoint.RunError) as error:
        checkpoint.load_weights(network(), path)
    assert str(error.value) == (
        f"{path}: holds another network than this run's; remove it to train it again, or choose another run_dir"
    )
    assert not ran.exists()


# -------------------------------------------------------------------------------------------- the run folder


def run_of(folder: Path, version: str = "1.2.0", **constants) -> checkpoint.Run:
    return checkpoint.Run(
        folder, {"data_dir": None, "seed": 0, "top_k": 0, **constants}, {"project": version}, ("top_k",), ("samples",)
    )


def refused(make) -> str:
    with pytest.raises(checkpoint.RunError) as error:
        make()
    return str(error.value)


def start(run: checkpoint.Run, data: str = "data") -> None:
    with run.start(data):
        pass


def test_other_constants_are_refused_with_the_difference(tmp_path):
    start(run_of(tmp_path))
    assert refused(lambda: run_of(tmp_path, seed=1, grids=[4])) == (
        f"run_dir is {tmp_path}: holds a run with other constants (seed was 0, is 1; grids was None, is [4]); choose "
        "another"
    )


def test_constants_that_only_draw_may_differ(tmp_path):
    start(run_of(tmp_path))
    for name in ("samples", "report.html"):
        (tmp_path / name).touch()
    assert run_of(tmp_path).has(["samples", "report.html"])
    other = run_of(tmp_path, top_k=5)
    assert not other.has(["samples", "report.html"])
    start(other)
    assert not (tmp_path / "samples").exists()
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize("version", ["1.2.1", "1.10.0", "2.0"])
def test_a_run_of_a_later_version_is_refused(tmp_path, version):
    start(run_of(tmp_path, version))
    assert refused(lambda: run_of(tmp_path)) == (
        f"run_dir is {tmp_path}: holds a run of version {version}, later than this one (1.2.0); update, or choose "
        "another"
    )


def test_a_run_of_an_earlier_version_goes_on_with_a_warning(tmp_path, capsys):
    start(run_of(tmp_path, "1.1.9"))
    start(run_of(tmp_path))
    assert capsys.readouterr().err == (
        f"warning: {tmp_path} was begun with project 1.1.9, now 1.2.0: it goes on, but not to the same bytes\n"
    )


@pytest.mark.parametrize("content", ["", "{", "[]", '{"constants": {}}', '{"constants": [], "versions": {}}'])
def test_a_config_that_is_none_is_refused(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    assert refused(lambda: run_of(tmp_path)) == f"run_dir is {tmp_path}: cannot read its config.json; choose another"


def test_a_folder_of_other_things_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    assert refused(lambda: run_of(tmp_path)) == (
        f"run_dir is {tmp_path}: holds other things than a run; choose another folder"
    )


def test_a_folder_that_cannot_be_read_is_refused(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "listdir", refuse)
    assert refused(lambda: run_of(tmp_path)) == (
        f"run_dir is {tmp_path}: cannot be read (Permission denied); choose another"
    )


def test_other_slices_are_refused(tmp_path):
    start(run_of(tmp_path, data_dir="/slices"), "some")
    assert refused(lambda: start(run_of(tmp_path, data_dir="/slices"), "others")) == (
        f"data_dir is /slices: holds other slices than when {tmp_path} was begun; choose another run_dir"
    )


def test_a_second_driver_is_refused(tmp_path):
    first, second = run_of(tmp_path), run_of(tmp_path)
    with first.start("data"):
        assert refused(lambda: start(second)) == (
            f"run_dir is {tmp_path}: another driver is at work there; wait for it, or choose another"
        )
    start(second)


def test_a_folder_that_cannot_be_written_to(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.touch()
    assert refused(lambda: start(run_of(file / "run"))) == (
        f"run_dir is {file}/run: cannot be written to (Not a directory); choose another"
    )

    def refuse(self, *arguments, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(filelock.FileLock, "acquire", refuse)
    assert refused(lambda: start(run_of(tmp_path / "run"))) == (
        f"run_dir is {tmp_path}/run: cannot be written to (Permission denied); choose another"
    )


def test_leftovers_of_a_killed_driver_are_removed(tmp_path):
    (tmp_path / "unfinished-config.json").touch()  # killed at its first file
    (tmp_path / ".lock").touch()
    start(run_of(tmp_path))
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "unfinished-ssim.png").touch()
    (tmp_path / "unfinished-samples").mkdir()
    start(run_of(tmp_path))
    assert {path.name for path in tmp_path.rglob("*")} == {"config.json", "images", ".lock"}


def test_a_history_that_is_none_or_has_gaps_is_refused(tmp_path):
    run = run_of(tmp_path)
    with run.start("data"):
        for epoch in (1, 2):
            run.add_epoch({"stage": "prior", "epoch": epoch, "loss": 0.1 + 0.2})
    assert run.read_history()[0] == {"stage": "prior", "epoch": 1, "loss": 0.1 + 0.2}
    run.require_history("prior")
    run.require_history("prior", 2)
    for stage, epochs in (("prior", 3), ("vqvae", None)):
        assert refused(lambda stage=stage, epochs=epochs: run.require_history(stage, epochs)) == (
            f"{tmp_path}/history.csv: rows of {stage} are missing; put it back as it was, or choose another run_dir"
        )
    (tmp_path / "history.csv").write_text("stage,epoch,loss\nprior,one,0.5\n")
    assert refused(run.read_history) == (
        f"{tmp_path}/history.csv: cannot be read; put it back as it was, or choose another run_dir"
    )


def test_damaged_numbers_and_codes_are_named(tmp_path):
    (tmp_path / "metrics.json").write_text('{"ssim": 0.')
    assert refused(run_of(tmp_path / "run").read_metrics) == (
        f"{tmp_path}/run/metrics.json: is damaged; remove it to measure again"
    )
    samples = tmp_path / "samples"
    samples.mkdir()
    run = run_of(tmp_path / "run")
    run.folder = tmp_path
    good = np.zeros((2, 4, 4), np.int32)
    bad = [good[:1], good + 16, good - 1, good.astype(float), np.array([object()])]
    for codes in bad:
        np.save(samples / "codes.npy", codes, allow_pickle=True)
        assert refused(lambda: run.read_codes("codes", (2, 4, 4), 16)) == (
            f"{samples}/codes.npy: is damaged; remove the folder samples to draw again"
        )
    np.save(samples / "codes.npy", good)
    assert np.array_equal(run.read_codes("codes", (2, 4, 4), 16), good)


# ----------------------------------------------------------------------------------------------- checkpoints

EPOCHS, STEPS = 6, 3


class StopAfter(keras.callbacks.Callback):
    """A kill, as far as training can tell, in the middle of the epoch after `epochs`."""

    def __init__(self, epochs: int):
        super().__init__()
        self.epochs = epochs

    def on_train_batch_begin(self, batch, logs=None):
        if self.epoch == self.epochs and batch == 1:
            raise checkpoint.Stopped(signal.SIGKILL)

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch


def train(folder: Path, stop_after: int | None = None, patience: int = 100, rate: float = 0.1):
    """A small network's training, from where it was on; returns network and checkpoint."""
    run = run_of(folder)
    with run.start("data"):
        trained = network()
        schedule = keras.optimizers.schedules.CosineDecay(rate, EPOCHS * STEPS)
        trained.compile(keras.optimizers.Adam(schedule), loss="mse")
        saved = checkpoint.Checkpoint(run, "net", "val_loss", patience)
        done = saved.restore(trained)

        def batches():
            for step in range(done * STEPS, EPOCHS * STEPS):
                random = np.random.default_rng(step)
                x = random.normal(size=(8, 4)).astype(np.float32)
                yield x, x[:, :3] + 1

        x = np.random.default_rng(100).normal(size=(8, 4)).astype(np.float32)
        callbacks = [checkpoint.SeedEpoch(5), checkpoint.StopWhenLost(saved, "learning_rate", network())]
        callbacks += [checkpoint.History(run, "net", ("",)), saved, StopAfter(stop_after)]
        if done < EPOCHS and not saved.counters["stopped"]:
            settings = {"epochs": EPOCHS, "initial_epoch": done, "steps_per_epoch": STEPS, "verbose": 0}
            trained.fit(batches(), shuffle=False, validation_data=(x, x[:, :3] + 1), callbacks=callbacks, **settings)
        return trained, saved


def history(folder: Path) -> list[dict]:
    return [{n: v for n, v in row.items() if n != "seconds"} for row in run_of(folder).read_history()]


def assert_same_end(one, two, folder_of_one: Path, folder_of_two: Path) -> None:
    assert all(np.array_equal(a, b) for a, b in zip(one.best_weights, two.best_weights, strict=True))
    assert one.counters == two.counters
    assert history(folder_of_one) == history(folder_of_two)
    last = [sorted((folder / "checkpoint").iterdir())[-1].read_bytes() for folder in (folder_of_one, folder_of_two)]
    assert last[0] == last[1]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    return folder, train(folder)[1]


def test_training_that_was_killed_ends_with_the_same_bytes(tmp_path, uninterrupted):
    for stop_after in (0, 1, 3):
        with pytest.raises(checkpoint.Stopped):
            train(tmp_path, stop_after)
    assert_same_end(train(tmp_path)[1], uninterrupted[1], tmp_path, uninterrupted[0])
    assert_same_end(train(tmp_path)[1], uninterrupted[1], tmp_path, uninterrupted[0])  # nothing is left to do


def test_early_stopping_does_not_forget(tmp_path):
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    stopped = train(alone, patience=2, rate=0.0)[1]  # never better than at first
    assert stopped.counters["stopped"]
    assert stopped.counters["epoch"] == 3
    for stop_after in range(1, stopped.counters["epoch"]):
        with pytest.raises(checkpoint.Stopped):
            train(killed, stop_after, patience=2, rate=0.0)
    assert_same_end(train(killed, patience=2, rate=0.0)[1], stopped, killed, alone)
    assert_same_end(train(killed, patience=2, rate=0.0)[1], stopped, killed, alone)


def test_two_checkpoints_are_kept_and_a_damaged_one_is_named_and_not_used(tmp_path, uninterrupted, capsys):
    with pytest.raises(checkpoint.Stopped):
        train(tmp_path, 4)
    third, fourth = sorted((tmp_path / "checkpoint").iterdir())
    assert [third.name, fourth.name] == ["net_epoch_0003.npz", "net_epoch_0004.npz"]
    fourth.write_bytes(flipped(fourth.read_bytes()))
    assert_same_end(train(tmp_path)[1], uninterrupted[1], tmp_path, uninterrupted[0])
    warning = capsys.readouterr().err
    assert warning.startswith(f"warning: {fourth}: is damaged (")
    assert warning.endswith("); going on from the one before it\n")


@pytest.mark.parametrize("damage", [lambda content: content[:-50], lambda content: b""])
def test_where_all_checkpoints_are_damaged_the_stage_starts_over(tmp_path, uninterrupted, capsys, damage):
    with pytest.raises(checkpoint.Stopped):
        train(tmp_path, 3)
    for path in (tmp_path / "checkpoint").iterdir():
        path.write_bytes(damage(path.read_bytes()))
    assert_same_end(train(tmp_path)[1], uninterrupted[1], tmp_path, uninterrupted[0])
    assert capsys.readouterr().err.count("is damaged") == 2


def test_a_loss_that_is_no_number_ends_training_and_keeps_the_best_model(tmp_path):
    with pytest.raises(checkpoint.Stopped):
        train(tmp_path, 2)
    best = sorted((tmp_path / "checkpoint").iterdir())[-1]
    with np.load(best) as file:
        arrays = {name: file[name] for name in file.files}
    arrays["weights_000"][:] = np.inf
    np.savez(best, **arrays)
    line = refused(lambda: train(tmp_path))
    at, _, kept = line.partition("; the best model so far, of epoch ")
    assert at.startswith("learning_rate: the loss is ")
    assert " in epoch 3, at a learning rate of 0.0" in at
    assert at.endswith("; choose a lower learning_rate and another run_dir")
    assert kept == f"{json.loads(str(arrays['counters']))['best_epoch'] + 1}, is {tmp_path}/checkpoint/net.keras"
    model = keras.saving.load_model(tmp_path / "checkpoint" / "net.keras")
    assert np.array_equal(model.get_weights()[0], arrays["best_000"])
    assert len(history(tmp_path)) == 2


def test_a_signal_that_was_swallowed_is_not_lost(tmp_path):
    usual = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        checkpoint.stop_on_signals()
        checkpoint.stop_if_asked()
        with pytest.raises(checkpoint.Stopped):
            signal.raise_signal(signal.SIGTERM)
        with pytest.raises(checkpoint.Stopped) as stopped:
            checkpoint.write_text(tmp_path / "file", "text")
        assert stopped.value.status == 143
        assert not (tmp_path / "file").exists()
        checkpoint.stop_on_signals()
        checkpoint.stop_if_asked()
    finally:
        for number, handler in zip((signal.SIGINT, signal.SIGTERM), usual, strict=True):
            signal.signal(number, handler)


# ------------------------------------------------------------------------------------------------- kills


def driver_process(folder: Path) -> subprocess.Popen:
    command = [sys.executable, str(kill.DRIVER), "--data-dir", str(folder / "slices"), *kill.CONSTANTS]
    command += ["--vqvae-epochs", "2", "--prior-epochs", "2", "--run-dir", str(folder / "killed" / "run")]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def test_a_run_that_was_stopped_and_killed_ends_with_the_same_bytes(tmp_path):
    phantom.write_pngs(tmp_path / "slices", num_cases=6, num_positions=4, image_size=32)
    run = tmp_path / "killed" / "run"
    moments = [
        ("checkpoint/vqvae_epoch_0001.npz", signal.SIGTERM, 143),
        ("checkpoint/prior_epoch_0001.npz", signal.SIGKILL, -signal.SIGKILL),
        ("samples", signal.SIGINT, 130),
    ]
    for name, number, status in moments:
        process = driver_process(tmp_path)
        while process.poll() is None and not (run / name).exists():
            time.sleep(0.01)
        process.send_signal(number)
        _, printed = process.communicate(timeout=60)
        assert process.returncode == status
        assert "Traceback" not in printed
        if number != signal.SIGKILL:
            assert printed.endswith(
                f"stopped; the same command goes on after the last finished epoch or step of {run}\n"
            )
    for where in ("killed", "alone"):
        constants = ["--vqvae-epochs", "2", "--prior-epochs", "2", *kill.CONSTANTS]
        constants += ["--data-dir", str(tmp_path / "slices"), "--run-dir", str(tmp_path / where / "run")]
        driver.main(driver.parse(constants))
    assert kill.differences(tmp_path / "alone" / "run", run) == []
    (run / "history.csv").write_text("stage\n")
    assert kill.differences(tmp_path / "alone" / "run", run) == ["history.csv"]
