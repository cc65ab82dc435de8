"""Decoded slices on disk: made once, complete or absent, and read in little memory."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import filelock
import numpy as np
import pytest

import cache
from pngs import DataError
from run import RunError

ROOT = Path(cache.__file__).parent
SHAPE = (6, 4, 4, 1)
IMAGES = np.arange(96, dtype=np.uint8).reshape(SHAPE)


def write(path: Path) -> cache.About:
    path.write_bytes(IMAGES.tobytes())
    return {"shape": SHAPE, "crop": 3}


def refuse(path: Path) -> cache.About:
    raise AssertionError("is made again")


def open_or_make(folder: Path, write=write, name: str = "name", source: str = "slices", state: str = "now"):
    return cache.open_or_make(folder, name, source, state, IMAGES.nbytes, write)


def names(folder: Path) -> set[str]:
    """What is in the folder, except for locks."""
    return {path.name for path in folder.iterdir() if path.suffix != ".lock"}


def test_a_set_is_made_once_and_mapped(tmp_path, capsys):
    made, about = open_or_make(tmp_path / "new")
    capsys.readouterr()
    again, about_again = open_or_make(tmp_path / "new", refuse)
    assert capsys.readouterr().out == ""
    assert about == about_again == {"source": "slices", "state": "now", "shape": list(SHAPE), "crop": 3}
    for images in (made, again):
        assert isinstance(images, np.memmap)
        assert not images.flags.writeable
        assert np.array_equal(images, IMAGES)


def test_the_size_and_the_place_are_said_before_anything_is_written(tmp_path, capsys):
    def write_later(path: Path) -> cache.About:
        assert f"96 bytes, to {tmp_path / 'name'}\n" in capsys.readouterr().out
        return write(path)

    open_or_make(tmp_path, write_later)


@pytest.mark.parametrize("file", [cache.IMAGES, cache.ABOUT])
def test_a_damaged_set_is_made_again(tmp_path, file):
    open_or_make(tmp_path)
    path = tmp_path / "name" / file
    path.write_bytes(path.read_bytes()[:-1])
    assert np.array_equal(open_or_make(tmp_path)[0], IMAGES)
    open_or_make(tmp_path, refuse)


def test_sets_of_an_earlier_state_are_removed_and_others_stay(tmp_path):
    old, _ = open_or_make(tmp_path, name="old", state="before")
    open_or_make(tmp_path, name="of another folder", source="others", state="before")
    open_or_make(tmp_path, name="small")
    open_or_make(tmp_path)
    assert names(tmp_path) == {"of another folder", "small", "name"}
    assert np.array_equal(old, IMAGES)  # Whoever has opened it can go on.


def run_script(folder: Path, body: str) -> subprocess.Popen:
    """Start a process that makes the set; `body` is the body of a function that writes the images to `path`."""
    script = f"""
import os, signal, sys, time
from pathlib import Path
import cache
def write(path):
    {body}
    return {{"shape": {SHAPE}}}
images, _ = cache.open_or_make(Path({str(folder)!r}), "name", "slices", "now", 96, write)
print(images.sum())
"""
    return subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True)


def test_of_two_processes_one_makes_the_set(tmp_path):
    log = tmp_path / "log"
    body = f"open({str(log)!r}, 'a').write('x'); time.sleep(1); path.write_bytes(bytes(range(96)))"
    processes = [run_script(tmp_path / "sets", body) for _ in range(2)]
    for process in processes:
        output, _ = process.communicate(timeout=60)
        assert output.splitlines()[-1] == str(sum(range(96)))
        assert process.returncode == 0
    assert log.read_text() == "x"
    assert names(tmp_path / "sets") == {"name"}


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_what_a_killed_process_has_left_is_never_used(tmp_path):
    process = run_script(tmp_path, "path.write_bytes(bytes(96)); os.kill(os.getpid(), signal.SIGKILL)")
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert names(tmp_path) == {"unfinished-name"}
    (tmp_path / "unfinished-other").mkdir()
    (tmp_path / "unfinished-in use").mkdir()
    with filelock.FileLock(tmp_path / "in use.lock"):
        assert np.array_equal(open_or_make(tmp_path)[0], IMAGES)
    assert names(tmp_path) == {"name", "unfinished-in use"}


def refused(error_class: type[Exception], folder: Path, write=write) -> str:
    with pytest.raises(error_class) as error:
        open_or_make(folder, write)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_disk_without_space_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 95}))
    message = refused(DataError, tmp_path, refuse)
    assert message.startswith(f"cache_dir is {tmp_path}: ")
    assert "need 96 bytes and only 95 bytes are free" in message
    assert "set cache_dir" in message
    assert names(tmp_path) == set()


def test_a_disk_that_is_full_in_spite_of_that_leaves_nothing(tmp_path):
    def fill(path: Path) -> cache.About:
        path.write_bytes(bytes(50))
        raise OSError(28, "No space left on device")

    message = refused(RunError, tmp_path, fill)
    assert message.startswith(f"{tmp_path / 'name'}: cannot be written (No space left on device)")
    assert names(tmp_path) == set()
    assert np.array_equal(open_or_make(tmp_path)[0], IMAGES)


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").touch()
    message = refused(DataError, tmp_path / "file")
    assert message.startswith(f"cache_dir is {tmp_path / 'file'}: cannot be written to")
    assert "set cache_dir to another folder" in message


def test_the_default_folder_is_in_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.default_folder() == tmp_path / "oasis-vqvae"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    assert cache.default_folder() == tmp_path / "home" / ".cache" / "oasis-vqvae"

    def fail() -> Path:
        raise RuntimeError("no home")

    monkeypatch.setattr(Path, "home", fail)
    with pytest.raises(DataError, match="set cache_dir"):
        cache.default_folder()


# ------------------------------------------------------------------------------------------------- reading


def resident_bytes(path: Path) -> int:
    """Memory of this process that maps a file."""
    mappings = Path("/proc/self/smaps").read_text()
    found = re.search(rf"{re.escape(str(path))}\n(?:.*\n)*?Rss: +(\d+) kB", mappings)
    return 1024 * int(found[1])


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps"), reason="needs Linux")
def test_memory_is_released_once_enough_was_read(tmp_path, monkeypatch):
    path, content = tmp_path / "images", np.random.default_rng(0).integers(0, 256, (64, 256, 256, 1), np.uint8)
    path.write_bytes(content.tobytes())
    images = cache.map_images(path, content.shape)
    assert images.sum() == content.sum()
    assert resident_bytes(path) == content.nbytes
    cache.release(images)
    assert resident_bytes(path) == 0
    monkeypatch.setattr(cache, "UNRELEASED_BYTES", 3 << 16)
    assert np.array_equal(cache.read(images[:], np.array([60, 3, 3])), content[[60, 3, 3]])
    assert resident_bytes(path) > 0
    assert np.array_equal(cache.read(images, np.array([40])), content[[40]])
    assert resident_bytes(path) == 0
    assert np.array_equal(images, content)


def test_only_mappings_for_reading_are_released(tmp_path):
    path = tmp_path / "images"
    path.write_bytes(IMAGES.tobytes())
    own = np.memmap(path, np.uint8, "c", shape=SHAPE)
    own[0] = 7
    assert np.all(cache.read(own, slice(0, 1)) == 7)
    assert np.all(own[0] == 7)
    assert np.array_equal(cache.read(IMAGES, slice(2, 4)), IMAGES[2:4])
