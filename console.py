"""What every command shares: messages, progress, signals, and quiet imports.

This module needs the standard library and tqdm only, so that importing it takes no time.
"""

import codecs
import contextlib
import io
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType

from tqdm import tqdm

# TensorFlow reads this when it is imported. 3 leaves only fatal errors of its C++ code.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

SIGPIPE = 13  # Windows lacks signal.SIGPIPE.


class UserError(Exception):
    """Something that the user can put right.

    The message is one line that names the file or option, says what is wrong, and what to do.
    """


class Stopped(BaseException):
    """The process was asked to end: by Ctrl-C, by SIGTERM, or because nobody reads its output any more (SIGPIPE).

    Attributes:
        status: Exit status to end with, 128 plus the signal's number.
    """

    def __init__(self, number: int) -> None:
        super().__init__()
        self.status = 128 + number


# ------------------------------------------------------------------------------------------------- messages


def one_line(text: object) -> str:
    """Text as one line: line breaks and characters that cannot be printed are escaped as in Python."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in as_unicode(text))


def as_unicode(text: object) -> str:
    """Text that UTF-8 can encode, from text that may contain names of files.

    Python represents the bytes of a name that it cannot decode as lone surrogates: in an ASCII locale all bytes of
    `größe`, in others only what is not UTF-8. They are decoded as UTF-8 here, and escaped if they are something else.
    """

    def decode(match: re.Match[str]) -> str:
        return match[0].encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")

    decoded = re.sub("[\udc80-\udcff]+", decode, str(text))
    return decoded.encode("utf-8", "backslashreplace").decode("utf-8")


def warn(text: str) -> None:
    """Print a warning of one line to standard error."""
    print(f"warning: {one_line(text)}", file=sys.stderr)


def progress(total: int, unit: str) -> tqdm:
    """Return a progress bar that is shown on terminals only and disappears when it is closed.

    Args:
        total: Number of units.
        unit: Plural name of what is counted, such as "slices".
    """
    return tqdm(total=total, unit=f" {unit}", disable=None, leave=False)


# ------------------------------------------------------------------------------------------------- streams

_ASCII = str.maketrans(
    {"×": "x", "–": "-", "−": "-", "→": "->", "…": "...", "±": "+/-", "²": "^2", "·": "*", "\u00a0": " "}
    | {"β": "beta", "γ": "gamma", "’": "'", "─": "-", "│": "|", **dict.fromkeys("╭╮╰╯┌┐└┘├┤", "+")}
)


def _to_ascii(error: UnicodeError) -> tuple[str, int]:
    """Codec error handler: replace characters that a console's encoding lacks by similar ASCII ones."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = as_unicode(error.object[error.start : error.end]).translate(_ASCII)
    return text.encode("ascii", "backslashreplace").decode("ascii"), error.end


class _Stream(io.TextIOWrapper):
    """Standard output or error that accepts any text, whatever its encoding.

    If it cannot be written, what follows is discarded, so that nothing fails a second time while the process ends.

    Raises:
        Stopped: Nobody reads it any more. An OSError might be mistaken for that of a file.
        UserError: It cannot be written for another reason, such as a full disk.
    """

    def __init__(self, stream: io.TextIOWrapper, description: str) -> None:
        super().__init__(
            stream.buffer,
            stream.encoding,
            errors="similar_ascii",
            line_buffering=stream.line_buffering,
            write_through=stream.write_through,
        )
        self._stream = stream  # It would close the file if it were deleted.
        self._description = description

    def write(self, text: str, /) -> int:
        with self._end_command_on_failure():
            return super().write(text)

    def flush(self) -> None:
        with self._end_command_on_failure():
            super().flush()

    @contextlib.contextmanager
    def _end_command_on_failure(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            with open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), self.fileno())
            if isinstance(error, BrokenPipeError):
                raise Stopped(SIGPIPE) from error
            raise UserError(
                f"{self._description}: cannot be written ({error.strerror}); free some space or redirect it to another "
                "place, then run the same command again"
            ) from error


def prepare_streams() -> None:
    """Let standard output and error print any text, and end the command in order if they cannot be written."""
    codecs.register_error("similar_ascii", _to_ascii)
    for name, description in (("stdout", "standard output"), ("stderr", "standard error")):
        stream = getattr(sys, name)
        if stream is None:  # It was closed before the start.
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8", errors="replace"))  # noqa: SIM115
        elif type(stream) is io.TextIOWrapper:  # Notebooks and pytest have streams of their own.
            setattr(sys, name, _Stream(stream, description))


# --------------------------------------------------------------------------------------------------- start


def start() -> None:
    """Prepare a script: call this before the slow imports, only if the script is run as `__main__`."""
    prepare_streams()
    # Ctrl-C during the imports ends the process without a traceback. `stop_on_signals` replaces this.
    signal.signal(signal.SIGINT, lambda number, frame: os._exit(128 + number))


def import_tensorflow() -> None:
    """Import TensorFlow without the messages that it prints at start-up, which no setting silences."""
    if "tensorflow" in sys.modules:
        return
    saved_stderr, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        import tensorflow
    finally:
        os.dup2(saved_stderr, 2)
        os.close(saved_stderr)
        os.close(nowhere)
    tensorflow.get_logger().setLevel("ERROR")  # Small runs would print warnings about retracing.


def run_command(command: Callable[[], object], on_stop: str) -> int:
    """Run a command and return its exit status.

    Args:
        command: Does all the work. What it returns is ignored.
        on_stop: What to tell the user after Ctrl-C or SIGTERM.

    Returns:
        0 on success, 2 after a `UserError` (printed as one line), 130 after Ctrl-C, 143 after SIGTERM, and 141, without
        a message, if nobody reads the output any more, as in `command | head -1`.
    """
    try:
        stop_on_signals()
        try:
            command()
        except SystemExit:  # The help was printed.
            sys.stdout.flush()
            raise
        sys.stdout.flush()
    except UserError as error:
        _print_last(f"error: {one_line(error)}")
        return 2
    except Stopped as stopped:
        status = stopped.status
    except Exception:  # Code that was interrupted may turn `Stopped` into an error of its own.
        if _received is None:
            raise
        status = 128 + _received
    else:
        return 0
    if status != 128 + SIGPIPE:
        _print_last(f"\nstopped; {one_line(on_stop)}")
    return status


def _print_last(message: str) -> None:
    """Print why a command ends, after its output. If the output is lost as well, that matters less."""
    for stream, text in ((sys.stdout, ""), (sys.stderr, f"{message}\n")):
        with contextlib.suppress(UserError, Stopped):
            stream.write(text)
            stream.flush()


# ------------------------------------------------------------------------------------------------- signals

_received: int | None = None


def stop_on_signals() -> None:
    """Let Ctrl-C and SIGTERM raise `Stopped` in the main thread."""
    global _received
    _received = None

    def stop(number: int, frame: FrameType | None) -> None:
        global _received
        _received = number
        raise Stopped(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    sys.unraisablehook = _report_unraisable


def _report_unraisable(unraisable: "sys.UnraisableHookArgs") -> None:
    """Report an exception that Python cannot raise, as in a callback of the garbage collector.

    `Stopped` is not reported, because `raise_if_stopped` raises it later.
    """
    if not isinstance(unraisable.exc_value, Stopped):
        sys.__unraisablehook__(unraisable)


def raise_if_stopped() -> None:
    """Raise `Stopped` again if it was lost: NumPy swallows exceptions while it waits for a JAX array."""
    if _received is not None:
        raise Stopped(_received)
