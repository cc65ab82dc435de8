"""Files that are written completely or not at all, results that are made again, and run folders that are refused."""

import errno
import json
import math
import os
import re
import signal
from importlib import metadata
from pathlib import Path
from typing import Any

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
    (tmp_path / "unfinished-samples" / "left by a killed process").mkdir(parents=True)
    with run.atomic_path(tmp_path / "samples") as unfinished:
        unfinished.mkdir()
        (unfinished / "one.png").write_bytes(b"1")
        assert not (tmp_path / "samples").exists()
    assert os.listdir(tmp_path / "samples") == ["one.png"]


def test_the_current_folder_can_be_written_to(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with run.atomic_path(Path()) as unfinished:
        unfinished.mkdir()
        (unfinished / "one.png").write_bytes(b"1")
    assert (tmp_path / "empty" / "one.png").read_bytes() == b"1"


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
    settings = {"data_dir": None, "start_from": None, "seed": 0, "top_k": 0, **constants}
    return Run(folder, settings, {"project": version}, ("top_k",), ("data_dir", "start_from"))


def refused(make) -> str:
    with pytest.raises(RunError) as error:
        make()
    assert "\n" not in str(error.value)
    return str(error.value)


def start(opened: Run, fingerprint: str = "data", *given, **entries) -> None:
    with opened.start(fingerprint, *given, **entries):
        pass


def test_the_version_is_that_of_pyproject():
    assert re.fullmatch(r"\d+\.\d+\.\d+", run.project_version())
    assert run.versions(backend="jax")["project"] == run.project_version()


def test_everything_that_affects_the_last_digits_is_recorded(monkeypatch):
    found = run.versions(backend="tensorflow")
    assert {"python", "tensorflow", "keras", "numpy", "scipy", "scikit-image", "matplotlib", "pillow"} <= found.keys()
    assert found["pillow"] == metadata.version("pillow")
    assert found["threads"]
    assert found["processor"]
    assert "jax" not in found
    monkeypatch.setattr(metadata, "version", lambda name: f"version of {name}")
    assert run.versions(backend="jax")["jaxlib"] == "version of jaxlib"


def test_packages_that_are_not_installed_are_left_out(monkeypatch):
    def version(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", version)
    assert "scipy" not in run.versions()
    assert run.versions()["project"]


def test_a_different_configuration_is_refused_with_the_differences(tmp_path):
    start(run_of(tmp_path))
    message = refused(lambda: run_of(tmp_path, seed=1, grids=[4]))
    assert "seed was 0, is 1" in message
    assert "grids was None, is [4]" in message
    assert "choose another run_dir" in message


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


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", '{"constants": {}}', '{"constants": [], "versions": {}}']
    + ['{"constants": {}, "versions": {"project": "1.2.0"}}'],
)
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


def test_the_slices_are_compared_and_not_their_folder(tmp_path):
    start(run_of(tmp_path, data_dir="/slices"), "some")
    message = refused(lambda: start(run_of(tmp_path, data_dir="/others"), "others"))
    assert "data_dir is /others: contains other slices" in message
    assert str(tmp_path) in message
    assert "/slices" in message
    assert "choose another run_dir" in message
    start(run_of(tmp_path, data_dir="/moved"), "some")
    assert run.read_config(tmp_path, "1.2.0")["constants"]["data_dir"] == "/moved"


def test_the_networks_to_start_from_are_compared_and_not_their_folder(tmp_path):
    start(run_of(tmp_path, start_from="/one"), "data", {"vqvae.keras": "1", "prior.keras": "2"})
    opened = run_of(tmp_path, start_from="/moved")
    start(opened, "data", {"vqvae.keras": "1", "prior.keras": "2"})
    assert opened.facts["start_from/vqvae.keras"] == "1"
    start(opened, "data", {})  # The folder may be gone.
    assert opened.facts["start_from/prior.keras"] == "2"
    for given, found in (("/other", {"vqvae.keras": "3"}), (None, {})):
        message = refused(lambda given=given, found=found: start(run_of(tmp_path, start_from=given), "data", found))
        assert f"start_from is {given}" in message
        assert "/moved" in message
        assert "choose another run_dir" in message


def test_facts_about_the_slices_are_recorded(tmp_path):
    start(run_of(tmp_path), slice_positions=[0, 1])
    assert run.read_config(tmp_path, "1.2.0")["slice_positions"] == [0, 1]
    assert run.read_config(tmp_path / "nothing") is None


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


# -------------------------------------------------------------------------------------------------- results

STEPS = {  # What each result is made from, in order.
    "vqvae.keras": ("slices",),
    "prior.keras": ("slices", "vqvae.keras"),
    "samples/codes.npy": ("prior.keras", "sampling"),
    "metrics.json": ("vqvae.keras", "samples/codes.npy"),
    "report.html": ("metrics.json", "configuration"),
}


def finish(opened: Run, contents: dict[str, str] | None = None, stop_after: str = "") -> list[str]:
    """Do all steps of a small run and return the names of the results that were made.

    Args:
        opened: The run.
        contents: Contents of results that differ from the usual.
        stop_after: A result after whose file, and before whose record, the run is killed.
    """
    made = []
    with opened.start("data"):
        if opened.is_complete():
            return made
        for name, made_from in STEPS.items():
            if opened.is_up_to_date(name, made_from):
                continue
            made.append(name)
            inputs = "".join(opened.checksums(made_from).values())
            text = {"vqvae.keras": "vqvae", "prior.keras": "prior", **(contents or {})}.get(name, inputs)
            if name.endswith(".keras"):
                stage = name.removesuffix(".keras")
                for epoch in (1, 2):
                    opened.add_epoch({"stage": stage, "epoch": epoch, "seconds": 0.5, "loss": len(text)})
                run.write_text(opened.folder / name, text)
                if stop_after != name:
                    opened.record([name], made_from, history=opened.history_checksum(stage))
            elif stop_after == name:
                run.write_text(opened.folder / name, text)
            else:
                opened.make(name, made_from, lambda path, text=text: path.write_text(text))
            if stop_after == name:
                return made
    return made


def contents(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def finished(tmp_path):
    assert finish(run_of(tmp_path / "run")) == list(STEPS)
    return tmp_path / "run"


def test_a_complete_run_is_not_changed(finished):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.name != ".lock"}
    assert finish(run_of(finished)) == []
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.name != ".lock"} == before


@pytest.mark.parametrize("name", STEPS)
def test_what_is_missing_is_made_again_and_nothing_else(finished, capsys, name):
    before = contents(finished)
    (finished / name).unlink()
    assert finish(run_of(finished)) == [name]
    assert contents(finished) == before
    assert name in capsys.readouterr().out


@pytest.mark.parametrize("name", ["samples/codes.npy", "metrics.json", "report.html"])
@pytest.mark.parametrize("damage", [lambda content: content[:-1], lambda content: content + b"x", lambda _: b"{}"])
def test_what_is_damaged_is_made_again(finished, capsys, name, damage):
    before = contents(finished)
    (finished / name).write_bytes(damage(before[name]))
    assert finish(run_of(finished)) == [name]
    assert contents(finished) == before
    assert name in capsys.readouterr().out


def test_a_damaged_network_is_named_and_nothing_is_lost(finished):
    (finished / "vqvae.keras").write_text("vqvae with more at its end")
    before = contents(finished)
    message = refused(lambda: start(run_of(finished)))
    assert f"{finished / 'vqvae.keras'}: is damaged" in message
    assert "remove it to train it again" in message
    assert contents(finished) == before


def test_a_kill_while_a_network_is_replaced_changes_nothing(finished):
    (finished / "vqvae.keras").unlink()
    run.write_text(finished / "checkpoint" / "vqvae_epoch_0002.npz", "")
    finish(run_of(finished), {"vqvae.keras": "another"}, stop_after="vqvae.keras")
    assert finish(run_of(finished), {"vqvae.keras": "another"}) == list(STEPS)


def test_another_network_invalidates_everything_made_from_it(finished, capsys):
    before = contents(finished)
    (finished / "vqvae.keras").unlink()
    assert finish(run_of(finished), {"vqvae.keras": "another"}) == list(STEPS)
    assert "prior.keras" in capsys.readouterr().out
    assert contents(finished)["metrics.json"] != before["metrics.json"]
    (finished / "vqvae.keras").unlink()
    assert finish(run_of(finished)) == list(STEPS)
    assert contents(finished) == before


def test_what_was_made_from_another_network_is_removed_at_once(finished):
    (finished / "vqvae.keras").unlink()
    finish(run_of(finished), {"vqvae.keras": "another"}, stop_after="prior.keras")
    assert not (finished / "metrics.json").exists()  # Nobody sees results of the earlier networks.
    assert not (finished / "report.html").exists()


def test_other_sampling_options_repeat_sampling_only(finished):
    before = contents(finished)
    changed = run_of(finished, top_k=5)
    assert finish(changed) == ["samples/codes.npy", "metrics.json", "report.html"]
    assert contents(finished)["vqvae.keras"] == before["vqvae.keras"]
    assert finish(run_of(finished)) == ["samples/codes.npy", "metrics.json", "report.html"]
    assert contents(finished) == before


def test_a_data_folder_that_was_moved_changes_the_report_only(finished):
    assert finish(run_of(finished, data_dir="/moved")) == ["report.html"]


@pytest.mark.parametrize("name", STEPS)
def test_a_kill_between_a_result_and_its_record_changes_nothing(finished, tmp_path, name):
    killed = tmp_path / "killed" / "run"
    finish(run_of(killed), stop_after=name)
    finish(run_of(killed))
    assert contents(killed) == contents(finished)


@pytest.mark.parametrize("value", [np.arange(6, dtype=np.uint8).reshape(2, 3), {"a": [0.1, None], "b": float("nan")}])
def test_a_value_is_computed_once_unless_what_it_is_made_from_changes(tmp_path, value):
    computed = []

    def compute() -> Any:
        computed.append(value)
        return value

    for checksum, count in (("abc", 1), ("abc", 1), ("def", 2)):
        opened = run_of(tmp_path / "run")
        with opened.start("data"):
            opened.facts["sampling"] = checksum
            np.testing.assert_equal(opened.remember("value", ["slices", "sampling"], compute), value)
            assert len(computed) == count
            assert opened.remember("another value", ["slices"], lambda: 1) == 1


@pytest.mark.parametrize("value", [np.arange(6, dtype=np.uint8), {"a": 0.1}])
def test_a_damaged_value_is_computed_again(tmp_path, value):
    opened = run_of(tmp_path / "run")
    with opened.start("data"):
        opened.remember("value", ["slices"], lambda: value)
        (path,) = opened.checkpoint_folder.iterdir()
        for damaged in (path.read_bytes()[:-1], b""):
            path.write_bytes(damaged)
            np.testing.assert_equal(opened.remember("value", ["slices"], lambda: value), value)


def test_results_of_several_files_are_made_together(tmp_path):
    opened, names = run_of(tmp_path), ["samples/top_codes.npy", "samples/bottom_codes.npy"]

    def write(top, bottom):
        top.write_text("top")
        bottom.write_text("bottom")

    with opened.start("data"):
        opened.make(names, ["slices"], write)
        opened.make(names, ["slices"], lambda *paths: pytest.fail("both are up to date"))
    (tmp_path / names[1]).unlink()
    with opened.start("data"):
        opened.make(names, ["slices"], write)
    assert [(tmp_path / name).read_text() for name in names] == ["top", "bottom"]


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b'{"a": {}}', b'{"a": 1}', b'{"../a": {"sha256": "", "size": 0, "made_from": {"b": ""}}}', b"\xff"],
)
def test_a_damaged_manifest_is_refused_and_nothing_is_lost(finished, content):
    (finished.parent / "a").write_text("precious")
    (finished / "manifest.json").write_bytes(content)
    before = contents(finished.parent)
    message = refused(lambda: start(run_of(finished)))
    assert f"{finished / 'manifest.json'}: is damaged" in message
    assert "choose another run_dir" in message
    assert contents(finished.parent) == before


# -------------------------------------------------------------------------------------------------- history


def row(stage: str, epoch: int, loss: float = 0.5) -> dict:
    return {"stage": stage, "epoch": epoch, "seconds": 1.0, "loss": loss}


def test_the_history_is_read_as_it_was_written(tmp_path):
    opened = run_of(tmp_path)
    with opened.start("data"):
        opened.add_epoch(row("vqvae", 1, 0.1 + 0.2))
        opened.add_epoch(row("prior", 1) | {"bits_per_code": 1e-9})
    assert opened.read_history() == opened.history
    assert opened.history == [row("vqvae", 1, 0.1 + 0.2), row("prior", 1) | {"bits_per_code": 1e-9}]


@pytest.mark.parametrize(
    "text",
    [
        "stage,epoch,seconds,loss\nprior,one,1,0.5\n",
        "stage,epoch,seconds,loss\nprior,1,1,much\n",
        "stage,epoch,seconds,loss\nprior,1,1,0.5,0.6\n",
        "stage,epoch,seconds,loss\nprior\n",
        "epoch,seconds,loss\n1,1,0.5\n",
        "stage,loss\nprior,0.5\n",
        "nonsense\n\x00\n",
    ],
)
def test_a_history_with_nonsense_in_it_is_refused(tmp_path, text):
    start(run_of(tmp_path))
    (tmp_path / "history.csv").write_text(text)
    message = refused(lambda: start(run_of(tmp_path)))
    assert f"{tmp_path / 'history.csv'}: cannot be read" in message
    assert "restore it" in message


@pytest.mark.parametrize("change", ["", "remove a row", "change a number", "remove a column"])
def test_rows_that_are_missing_or_changed_are_refused(finished, change):
    path = finished / "history.csv"
    lines = path.read_text().splitlines()
    changed = {
        "": lines[:1],
        "remove a row": lines[:1] + lines[2:],
        "change a number": [lines[0], lines[1] + "1", *lines[2:]],
        "remove a column": [line.rpartition(",")[0] for line in lines],
    }
    path.write_text("\n".join(changed[change]) + "\n")
    message = refused(lambda: start(run_of(finished)))
    assert f"{path}: rows of " in message
    assert "restore the file" in message
    assert "vqvae.keras" in message
    assert ("prior.keras" in message) == (change in ("", "remove a column"))


def test_seconds_do_not_count(finished):
    path = finished / "history.csv"
    path.write_text(path.read_text().replace("0.5", "0.7"))
    assert finish(run_of(finished)) == []


def test_an_epoch_that_is_repeated_replaces_later_ones_of_its_stage_only(tmp_path):
    opened = run_of(tmp_path)
    with opened.start("data"):
        for stage, epoch, loss in (("vqvae", 1, 1), ("vqvae", 2, 2), ("vqvae", 3, 3), ("prior", 1, 4)):
            opened.add_epoch(row(stage, epoch, loss))
        opened.add_epoch(row("vqvae", 2, 5))
        opened.add_epoch(row("vqvae", 3, 6))
    found = [(row["stage"], row["epoch"], row["loss"]) for row in opened.read_history()]
    assert found == [("vqvae", 1, 1), ("vqvae", 2, 5), ("vqvae", 3, 6), ("prior", 1, 4)]


def test_numbers_that_json_lacks_become_none():
    numbers = {"a": math.nan, "b": [1.0, -math.inf, {"c": math.inf}], "d": {"e": None, "f": "nan", "g": 2, "h": True}}
    clean = {"a": None, "b": [1.0, None, {"c": None}], "d": {"e": None, "f": "nan", "g": 2, "h": True}}
    assert run.without_nan(numbers) == clean
    assert json.loads(json.dumps(run.without_nan(numbers), allow_nan=False)) == clean
