"""Messages, exit statuses, signals and encodings that every command shares."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import console
import run

ROOT = Path(console.__file__).parent


def test_messages_are_one_line(capsys):
    console.warn("first\nsecond\x1b[31m")
    assert capsys.readouterr().err == "warning: first\\nsecond\\x1b[31m\n"


@pytest.mark.usefixtures("_keep_signal_handlers")
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
def _keep_signal_handlers(monkeypatch):
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)  # It is restored afterwards.
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


def test_a_signal_during_garbage_collection_prints_no_traceback():
    code = """
        import console, gc, signal

        def collect():
            gc.callbacks.append(lambda *given: signal.raise_signal(signal.SIGINT))
            gc.collect()
            gc.callbacks.clear()
            console.raise_if_stopped()

        console.run_command(collect, "start it again")
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr == "\nstopped; start it again\n"


@pytest.mark.usefixtures("_keep_signal_handlers")
def test_a_signal_that_became_another_error_ends_a_command_without_a_traceback(capsys):
    def interrupted():
        try:
            signal.raise_signal(signal.SIGINT)
        except console.Stopped:
            raise SystemError("a library was interrupted") from None

    assert console.run_command(interrupted, "start it again") == 130
    assert capsys.readouterr().err == "\nstopped; start it again\n"
    with pytest.raises(ZeroDivisionError):
        console.run_command(lambda: 1 / 0, "")


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_every_console_can_print_every_character(encoding):
    text = "β × 12 × 12 − … → ± ² 95\u00a0% ╭─╮ 脳 \udcff"
    code = f"import console; console.prepare_streams(); print({text!r})"
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    printed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True)
    assert printed.returncode == 0, printed.stderr
    shown = printed.stdout.decode(encoding)
    assert "12" in shown
    assert ("x 12" in shown) == (encoding == "ascii")
    assert "\\xff" in shown  # a byte that is not text in any encoding


def test_names_of_files_become_text():
    decoded_in_an_ascii_locale = "größe.png".encode().decode("ascii", "surrogateescape")
    assert console.as_unicode(f"× {decoded_in_an_ascii_locale}") == "× größe.png"
    assert console.as_unicode("\udcff \ud800") == r"\xff \ud800"
    assert console.one_line(decoded_in_an_ascii_locale) == "größe.png"


LOST_OUTPUT = {
    "after much output": "for i in range(100_000): print(i)",
    "at the end": "print('result')",
    "before an error of a file": "print('result', flush=True)",
    "in the help": "print('help'); sys.exit(0)",
}


def run_with_output(to: str, command: str, *options: str) -> tuple[int, str]:
    """Run a command whose standard output is a full device, a pipe without a reader, or closed.

    Returns:
        Its exit status and what it writes to standard error.
    """
    code = f"""
import console; console.start()
import sys
def command():
    try:
        {command}
    except OSError:
        raise console.UserError("file: is broken")
sys.exit(console.run_command(command, "start it again"))
"""
    arguments = [sys.executable, *options, "-c", code]
    if to == "a closed stream":
        arguments = ["sh", "-c", 'exec "$@" >&-', "sh", *arguments]
    reader, pipe = os.pipe()
    os.close(reader)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with open("/dev/full", "wb") as full, os.fdopen(pipe, "wb") as broken:
        output = {"a full device": full, "a broken pipe": broken}.get(to)
        done = subprocess.run(
            arguments, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.PIPE, text=True, timeout=60
        )
    return done.returncode, done.stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("options", [(), ("-u",)], ids=["buffered", "unbuffered"])
@pytest.mark.parametrize("when", LOST_OUTPUT)
def test_output_that_cannot_be_written_ends_a_command_without_a_traceback(when, options):
    assert run_with_output("a broken pipe", LOST_OUTPUT[when], *options) == (141, "")
    status, message = run_with_output("a full device", LOST_OUTPUT[when], *options)
    assert status == 2
    assert message.startswith("error: standard output: ")
    assert "No space left" in message
    assert message.count("\n") == 1
    assert run_with_output("a closed stream", LOST_OUTPUT[when], *options) == (0, "")


def test_an_error_is_reported_even_if_the_output_before_it_is_lost():
    command = "print('begin'); raise console.UserError('file: is damaged')"
    assert run_with_output("a broken pipe", command) == (2, "error: file: is damaged\n")
    assert run_with_output("a full device", command) == (2, "error: file: is damaged\n")


def test_a_full_standard_error_ends_a_command():
    code = "import console, sys; console.start(); sys.exit(console.run_command(lambda: console.warn('w'), ''))"
    with open("/dev/full", "wb") as full:
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=full)
    assert (done.returncode, done.stdout) == (2, b"")


def test_importing_tensorflow_prints_nothing():
    code = "import console; console.import_tensorflow(); import tensorflow as tf; tf.constant(1.0) + 1.0"
    printed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (printed.returncode, printed.stdout, printed.stderr) == (0, "", "")
