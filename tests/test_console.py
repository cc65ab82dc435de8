"""Messages, exit statuses, signals and encodings that every command shares."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import console
import run

ROOT = Path(console.__file__).parent


def test_messages_are_one_line(capsys):
    console.warn("first\nsecond\x1b[31m")
    assert capsys.readouterr().err == "warning: first\\nsecond\\x1b[31m\n"


def test_exit_statuses(capsys):
    def fail():
        raise run.RunError("file: is damaged\nremove it")

    def stop():
        raise console.Stopped(signal.SIGTERM)

    assert console.run_command(lambda: None, "") == 0
    assert console.run_command(fail, "") == 2
    assert capsys.readouterr().err == "error: file: is damaged\\nremove it\n"
    assert console.run_command(stop, "start it again") == 143
    assert capsys.readouterr().err == "\nstopped; start it again\n"


@pytest.fixture
def _keep_signal_handlers():
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("_keep_signal_handlers")
def test_a_signal_that_was_swallowed_is_raised_again(tmp_path):
    console.stop_on_signals()
    console.raise_if_stopped()
    with pytest.raises(console.Stopped):
        signal.raise_signal(signal.SIGTERM)
    with pytest.raises(console.Stopped) as stopped:
        run.write_text(tmp_path / "file", "text")
    assert stopped.value.status == 143
    assert not (tmp_path / "file").exists()
    console.stop_on_signals()
    console.raise_if_stopped()


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_every_console_can_print_every_character(encoding):
    text = "β × 12 × 12 − … → ± ² 95\u00a0% ╭─╮ 脳 \udcff"
    code = f"import console; console.make_streams_encodable(); print({text!r})"
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    printed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True)
    assert printed.returncode == 0, printed.stderr
    shown = printed.stdout.decode(encoding)
    assert "12" in shown
    assert ("x" in shown) == (encoding == "ascii")


def test_importing_tensorflow_prints_nothing():
    code = "import console; console.import_tensorflow(); import tensorflow as tf; tf.constant(1.0) + 1.0"
    printed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (printed.returncode, printed.stdout, printed.stderr) == (0, "", "")
