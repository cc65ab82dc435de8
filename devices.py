"""Where training runs: on one device, on several of a machine, or in several processes, on as many machines.

The engines are Keras' own. On TensorFlow `tf.distribute.MirroredStrategy` shares each batch between the devices of a
machine; on JAX `keras.distribution.DataParallel` does, between those of all processes that
`keras.distribution.initialize` has brought together. Every process reads the data, trains its part of each batch and
holds all weights; the first one alone writes files, and draws and measures when training is over.
"""

import atexit
import contextlib
import os
import pickle
import signal
import socket
import sys
import time
from collections.abc import Iterator

import keras
import numpy as np
import tensorflow as tf

CLUSTER = "cluster"  # a coordinator that the environment knows
WAIT = 300  # seconds that the processes of a run wait for each other at its start

_together = False  # whether other processes may wait for this one


class ProcessError(Exception):
    """The processes of a run cannot work together. The message is one line that says what to do."""


def on_jax() -> bool:
    """Whether Keras' backend is JAX; otherwise it is TensorFlow."""
    return keras.backend.backend() == "jax"


if on_jax():
    tf.config.set_visible_devices([], "GPU")  # TensorFlow only feeds and measures there; the memory is JAX's


def names() -> list[str]:
    """The GPUs or TPUs of this process, or its CPUs where there are none, as in "gpu:0"."""
    if on_jax():
        import jax

        return [_name(device) for device in jax.local_devices()]
    return [device.name for device in tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("CPU")]


def _name(device) -> str:
    return f"{device.platform}:{device.id}"


def are_cpus() -> bool:
    """Whether `names` are CPUs."""
    return all("CPU" in name.upper() for name in names())


def count(devices: int) -> int:
    """How many devices share a batch, with so many in each process."""
    return devices * processes()[1]


def described(devices: int) -> str:
    """A line on where training takes place, and what does not hold there."""
    backend, kind, several = "JAX" if on_jax() else "TensorFlow", "CPU" if are_cpus() else "GPU or TPU", processes()[1]
    line = f"{backend}, {devices} {kind}{f' in each of {several} processes' if several > 1 else ''}"
    return line if are_cpus() else f"{line}: a run that is stopped goes on here, but not to the same bytes"


# ---------------------------------------------------------------------------------------------- processes


@contextlib.contextmanager
def joined(coordinator: str | None, num_processes: int = 1, process_index: int = 0) -> Iterator[None]:
    """Within it this process is one of several that train together; all but the first are silent. On JAX alone.

    Args:
        coordinator: HOST:PORT that the first process listens at and all others reach it by; CLUSTER to take that and
            the two numbers from the environment (SLURM, Open MPI, Kubernetes, TPU pods); None: there is one process.
        num_processes: how many there are.
        process_index: which one this is, from 0.

    Raises:
        ProcessError: there is no such cluster, the others do not come, or one of them has ended before its time.
    """
    if coordinator is None:
        yield
        return
    import jax

    global _together
    known = (None, None, None) if coordinator == CLUSTER else (coordinator, num_processes, process_index)
    if coordinator != CLUSTER:
        print(
            f"process {process_index} of {num_processes}: waiting for the others, {WAIT // 60} minutes at most",
            flush=True,
        )
        if process_index:
            _reach(coordinator)
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        keras.distribution.initialize(*known)
        signal.signal(signal.SIGTERM, on_sigterm)  # which JAX has taken for itself
    except (ValueError, RuntimeError) as error:
        what = "the environment tells of none" if coordinator == CLUSTER else "the processes did not come together"
        raise ProcessError(
            f"coordinator is {coordinator}: {what} ({_first_line(error)}); start every process by srun, or give all of "
            "them the first one's HOST:PORT, and each its process_index"
        ) from error
    _together = True
    try:
        with contextlib.nullcontext() if is_first() else _silence():
            yield
    except BaseException as error:
        if not _together:
            raise
        atexit.register(os._exit, 1)  # the usual end would wait for the others, who may wait for this one
        if isinstance(error, jax.errors.JaxRuntimeError) or isinstance(error, ValueError) and "Gloo" in str(error):
            raise ProcessError(
                f"another process of this run seems to have ended ({_first_line(error)}); see what it said. The same "
                "commands go on after the last finished epoch"
            ) from error
        raise


def _reach(coordinator: str) -> None:
    """Wait until the first process listens; JAX itself would end without a word to the user. Raises ProcessError."""
    host, _, port = coordinator.rpartition(":")
    until = time.monotonic() + WAIT
    while True:
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > until or isinstance(error, socket.gaierror):
                raise ProcessError(
                    f"coordinator is {coordinator}: nobody answers there ({error}); start the first process on that "
                    "machine, with process_index 0"
                ) from error
        time.sleep(0.2)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        yield


def end(status: int) -> None:
    """End the process; one of several that has failed does so at once, see `joined`."""
    if status and _together:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def leave() -> None:
    """Part from the other processes; to be called in all of them. The first one can go on computing by itself."""
    global _together
    if _together:
        import jax

        jax.distributed.shutdown()
        _together = False


def processes() -> tuple[int, int]:
    """Which process this is, from 0, and how many there are."""
    if on_jax():
        import jax

        return jax.process_index(), jax.process_count()
    return 0, 1


def is_first() -> bool:
    """Whether this is the process that writes files; with one process it is."""
    return processes()[0] == 0


def from_first(value):
    """What the first process has for a value (pickled), in every process; to be called in all of them."""
    if processes()[1] == 1:
        return value
    from jax.experimental import multihost_utils

    content = pickle.dumps(value) if is_first() else b""
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(content))))
    sent = np.frombuffer(content.ljust(size, b"\0")[:size], np.uint8)
    return pickle.loads(multihost_utils.broadcast_one_to_all(sent).tobytes())


# ----------------------------------------------------------------------------------------------- training


@contextlib.contextmanager
def spread(devices: int) -> Iterator[None]:
    """Networks made inside are trained on so many devices of each process, each with its share of a batch.

    A process' batches hold its own share only: see `processes`.
    """
    if count(devices) == 1:
        yield
        return
    if on_jax():
        import jax

        by_process = [jax.local_devices(process_index)[:devices] for process_index in range(jax.process_count())]
        chosen = [_name(device) for own in by_process for device in own]
        distribution = keras.distribution.DataParallel(devices=chosen, auto_shard_dataset=False)
    else:
        # TensorFlow's default, collective operations, mixes up the sparse gradients of embeddings with dense ones.
        reduction = tf.distribute.ReductionToOneDevice() if are_cpus() else tf.distribute.NcclAllReduce()
        distribution = tf.distribute.MirroredStrategy(names()[:devices], reduction)
    with distribution.scope():
        yield
