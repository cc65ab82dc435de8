"""Files that are written completely or not at all, and run folders that are refused."""

import errno
import os
import re
import signal

import filelock
import numpy as np
import pytest

import console
import run
from run import Run, RunError

# -------------------------------------------------------------------------------------------- atomic files


def test_a_file_is_replaced_completely_or_not_at_all(tmp_path):
    path = tmp_path / "numbers.json"
    run.write_text(path, "old")

    def write_half():
        with run.atomic_path(path) as unfinished:
            unfinished.write_text("half of the ne")
            assert path.read_text() == "old"
            raise console.Stopped(signal.SIGTERM)

    with pytest.raises(console.Stopped):
        write_half()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["numbers.json"]


def test_a_folder_appears_when_it_is_complete(tmp_path):
    with run.atomic_path(tmp_path / "samples") as unfinished:
        unfinished.mkdir()
        (unfinished / "one.png").write_bytes(b"1")
        assert not (tmp_path / "samples").exists()
    assert (tmp_path / "samples" / "one.png").read_bytes() == b"1"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EIO])
def test_a_full_or_read_only_disk_is_reported_and_nothing_is_lost(tmp_path, monkeypatch, number):
    path = tmp_path / "numbers.json"
    run.write_text(path, "old")

    def refuse(descriptor):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    message = refused(lambda: run.write_text(path, "new"))
    assert str(path) in message
    assert os.strerror(number) in message
    assert "free some space" in message
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["numbers.json"]


# -------------------------------------------------------------------------------------------- the run folder


def run_of(folder, version: str = "1.2.0", **constants) -> Run:
    return Run(
        folder, {"data_dir": None, "seed": 0, "top_k": 0, **constants}, {"project": version}, ("top_k",), ("samples",)
    )


def refused(make) -> str:
    with pytest.raises(RunError) as error:
        make()
    assert "\n" not in str(error.value)
    return str(error.value)


def start(opened: Run, fingerprint: str = "data", **facts) -> None:
    with opened.start(fingerprint, **facts):
        pass


def test_the_version_is_that_of_pyproject():
    assert re.fullmatch(r"\d+\.\d+\.\d+", run.project_version())
    assert run.versions(backend="jax")["project"] == run.project_version()


def test_a_different_configuration_is_refused_with_the_differences(tmp_path):
    start(run_of(tmp_path))
    message = refused(lambda: run_of(tmp_path, seed=1, grids=[4]))
    assert "seed was 0, is 1" in message
    assert "grids was None, is [4]" in message
    assert "choose another run_dir" in message


def test_sampling_constants_may_differ(tmp_path):
    start(run_of(tmp_path))
    for name in ("samples", "report.html"):
        (tmp_path / name).touch()
    assert run_of(tmp_path).is_complete(["samples", "report.html"])
    other = run_of(tmp_path, top_k=5)
    assert not other.is_complete(["samples", "report.html"])
    start(other)
    assert not (tmp_path / "samples").exists()
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("version", "remedy"), [("1.2.1", "update"), ("1.10.0", "update"), ("0.4.0", "use version 0.4.0")]
)
def test_runs_of_later_versions_and_of_old_ones_are_refused(tmp_path, version, remedy):
    start(run_of(tmp_path, version))
    message = refused(lambda: run_of(tmp_path))
    assert f"a run of version {version}" in message
    assert remedy in message


def test_a_run_of_an_earlier_version_continues_with_a_warning(tmp_path, capsys):
    start(run_of(tmp_path, "1.1.9"))
    start(run_of(tmp_path))
    warning = capsys.readouterr().err
    assert "project 1.1.9, now 1.2.0" in warning
    assert "not be bitwise identical" in warning


@pytest.mark.parametrize("content", ["", "{", "[]", '{"constants": {}}', '{"constants": [], "versions": {}}'])
def test_a_damaged_config_is_refused(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    message = refused(lambda: run_of(tmp_path))
    assert str(tmp_path) in message
    assert "config.json cannot be read; choose another run_dir" in message


def test_a_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    assert "contains files that are not a run's; choose another" in refused(lambda: run_of(tmp_path))


def test_a_folder_that_cannot_be_read_is_refused(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "listdir", refuse)
    assert "cannot be read (Permission denied); choose another" in refused(lambda: run_of(tmp_path))


def test_other_slices_are_refused(tmp_path):
    start(run_of(tmp_path, data_dir="/slices"), "some")
    message = refused(lambda: start(run_of(tmp_path, data_dir="/slices"), "others"))
    assert "data_dir is /slices: contains other slices" in message
    assert "choose another run_dir" in message


def test_facts_about_the_slices_are_recorded(tmp_path):
    start(run_of(tmp_path), slice_positions=[0, 1])
    assert run.read_config(tmp_path, "1.2.0")["slice_positions"] == [0, 1]
    assert run.read_config(tmp_path / "nothing") is None


def test_a_run_without_the_network_of_a_stage_is_not_complete(tmp_path):
    opened = run_of(tmp_path)
    with opened.start("data"):
        opened.add_epoch({"stage": "prior", "epoch": 1, "loss": 0.5})
        assert not opened.is_complete(["config.json"])
        (tmp_path / "prior.keras").touch()
        assert opened.is_complete(["config.json"])
        assert not opened.is_complete(["config.json", "report.html"])


def test_a_second_driver_is_refused(tmp_path):
    first, second = run_of(tmp_path), run_of(tmp_path)
    with first.start("data"):
        assert "another driver is using it; wait for it, or choose another" in refused(lambda: start(second))
    start(second)


def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.touch()
    assert "cannot be written to (Not a directory)" in refused(lambda: start(run_of(file / "run")))

    def refuse(self, *arguments, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(filelock.FileLock, "acquire", refuse)
    assert "cannot be written to (Permission denied)" in refused(lambda: start(run_of(tmp_path / "run")))


def test_leftovers_of_a_killed_driver_are_removed(tmp_path):
    (tmp_path / "unfinished-config.json").touch()  # Killed while writing its first file.
    (tmp_path / ".lock").touch()
    start(run_of(tmp_path))
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "unfinished-ssim.png").touch()
    (tmp_path / "unfinished-samples").mkdir()
    start(run_of(tmp_path))
    assert {path.name for path in tmp_path.rglob("*")} == {"config.json", "images", ".lock"}


def test_a_damaged_or_incomplete_history_is_refused(tmp_path):
    opened = run_of(tmp_path)
    with opened.start("data"):
        for epoch in (1, 2):
            opened.add_epoch({"stage": "prior", "epoch": epoch, "loss": 0.1 + 0.2})
    assert opened.read_history()[0] == {"stage": "prior", "epoch": 1, "loss": 0.1 + 0.2}
    opened.require_history("prior")
    opened.require_history("prior", 2)
    for stage, epochs in (("prior", 3), ("vqvae", None)):
        message = refused(lambda stage=stage, epochs=epochs: opened.require_history(stage, epochs))
        assert f"{tmp_path}/history.csv: rows of stage {stage} are missing; restore the file" in message
    (tmp_path / "history.csv").write_text("stage,epoch,loss\nprior,one,0.5\n")
    assert f"{tmp_path}/history.csv: cannot be read; restore it" in refused(opened.read_history)


def test_an_epoch_that_is_repeated_replaces_what_followed(tmp_path):
    opened = run_of(tmp_path)
    with opened.start("data"):
        for epoch, loss in ((1, 1.0), (2, 2.0), (3, 3.0), (2, 4.0)):
            opened.add_epoch({"stage": "prior", "epoch": epoch, "loss": loss})
    assert [(row["epoch"], row["loss"]) for row in opened.read_history()] == [(1, 1.0), (2, 4.0)]


def test_damaged_metrics_and_codes_are_named(tmp_path):
    (tmp_path / "metrics.json").write_text('{"ssim": 0.')
    opened = run_of(tmp_path / "run")
    opened.folder = tmp_path
    assert "metrics.json: is damaged; remove it to measure again" in refused(opened.read_metrics)
    samples = tmp_path / "samples"
    samples.mkdir()
    good = np.zeros((2, 4, 4), np.int32)
    for codes in [good[:1], good + 16, good - 1, good.astype(float), np.array([object()])]:
        np.save(samples / "codes.npy", codes, allow_pickle=True)
        message = refused(lambda: opened.read_codes("codes", (2, 4, 4), 16))
        assert f"{samples}/codes.npy: is damaged; remove the folder samples" in message
    np.save(samples / "codes.npy", good)
    assert np.array_equal(opened.read_codes("codes", (2, 4, 4), 16), good)
