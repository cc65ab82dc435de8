"""What every command shares: messages, progress, signals, and quiet imports.

This module needs the standard library and tqdm only, so that importing it takes no time.
"""

import codecs
import os
import signal
import sys
from collections.abc import Callable
from types import FrameType

from tqdm import tqdm

# TensorFlow reads this when it is imported. 3 leaves only fatal errors of its C++ code.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


class UserError(Exception):
    """Something that the user can put right.

    The message is one line that names the file or option, says what is wrong, and what to do.
    """


class Stopped(BaseException):
    """The process was asked to end, by Ctrl-C or SIGTERM.

    Attributes:
        status: Exit status to end with, 128 plus the signal's number.
    """

    def __init__(self, number: int) -> None:
        super().__init__()
        self.status = 128 + number


# ------------------------------------------------------------------------------------------------- messages


def one_line(text: object) -> str:
    """Text as one line: line breaks and characters that cannot be printed are escaped as in Python."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text))


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


_ASCII = str.maketrans(
    {"×": "x", "–": "-", "−": "-", "→": "->", "…": "...", "±": "+/-", "²": "^2", "·": "*", "\u00a0": " "}
    | {"β": "beta", "γ": "gamma", "’": "'", "─": "-", "│": "|", **dict.fromkeys("╭╮╰╯┌┐└┘├┤", "+")}
)


def _to_ascii(error: UnicodeError) -> tuple[str, int]:
    """Codec error handler: replace characters that a console's encoding lacks by similar ASCII ones."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end].translate(_ASCII)
    return text.encode("ascii", "backslashreplace").decode("ascii"), error.end


def make_streams_encodable() -> None:
    """Let standard output and error print any text, whatever the console's encoding."""
    codecs.register_error("similar_ascii", _to_ascii)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="similar_ascii")


# --------------------------------------------------------------------------------------------------- start


def start() -> None:
    """Prepare a script: call this before the slow imports, only if the script is run as `__main__`."""
    make_streams_encodable()
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
        0 on success, 2 after a `UserError` (printed as one line), 130 after Ctrl-C, 143 after SIGTERM.
    """
    try:
        stop_on_signals()
        command()
    except UserError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    except Stopped as stopped:
        print(f"\nstopped; {one_line(on_stop)}", file=sys.stderr)
        return stopped.status
    return 0


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


def raise_if_stopped() -> None:
    """Raise `Stopped` again if it was lost: NumPy swallows exceptions while it waits for a JAX array."""
    if _received is not None:
        raise Stopped(_received)
