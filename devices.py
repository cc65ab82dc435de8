"""Devices and processes: where training runs.

A network is trained on one device, on several devices of one machine, or in several processes on one or more
machines. Keras does the work: `tf.distribute.MirroredStrategy` on TensorFlow splits each batch over the devices of a
machine, and `keras.distribution.DataParallel` on JAX splits it over the devices of all processes that
`keras.distribution.initialize` has connected. Every process holds all weights, reads all data and trains on its shard
of each batch. Only the main process, the one with index 0, writes files, samples and evaluates.
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
from typing import Any, NoReturn, TypeVar

import keras
import numpy as np
import tensorflow as tf

import console

CLUSTER = "cluster"  # as the coordinator: take its address from the environment
WAIT_SECONDS = 300  # how long the processes of a run wait for each other at the start

T = TypeVar("T")

_connected = False  # whether this process is connected to others


class ProcessError(console.UserError):
    """The processes of a run cannot work together."""


def on_jax() -> bool:
    """Return whether the backend of Keras is JAX. Otherwise it is TensorFlow."""
    return keras.backend.backend() == "jax"


if on_jax():
    # TensorFlow only runs the input pipeline and the metrics there and must not take the GPU's memory from JAX.
    tf.config.set_visible_devices([], "GPU")
elif not tf.config.list_physical_devices("GPU"):
    # TensorFlow sums three or more gradients of one tensor in an order that depends on the timing of its threads, so
    # the last digits change from run to run. With a single inter-op thread the order is fixed. Each operation still
    # uses all cores.
    with contextlib.suppress(RuntimeError):  # In a notebook, TensorFlow may already be in use.
        tf.config.threading.set_inter_op_parallelism_threads(1)


def device_names() -> list[str]:
    """Return the names of this process's GPUs or TPUs, or of its CPUs if it has neither, such as "gpu:0"."""
    if on_jax():
        import jax

        return [_jax_name(device) for device in jax.local_devices()]
    return [device.name for device in tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("CPU")]


def _jax_name(device: Any) -> str:
    return f"{device.platform}:{device.id}"


def uses_cpus() -> bool:
    """Return whether `device_names` are CPUs."""
    return all("CPU" in name.upper() for name in device_names())


def total_devices(devices: int) -> int:
    """Return the number of devices that share a batch.

    Args:
        devices: Number of devices used in each process.
    """
    return devices * process_index_and_count()[1]


def describe(devices: int) -> str:
    """Return one line that says where training runs, and whether resuming it is exact there.

    Args:
        devices: Number of devices used in each process.
    """
    backend, kind = "JAX" if on_jax() else "TensorFlow", "CPU" if uses_cpus() else "GPU or TPU"
    count = process_index_and_count()[1]
    line = f"training on {devices} {kind}{f' in each of {count} processes' if count > 1 else ''} with {backend}"
    return line if uses_cpus() else f"{line}: a stopped run can be resumed, but the result is not bitwise identical"


# ---------------------------------------------------------------------------------------------- processes


@contextlib.contextmanager
def join_processes(coordinator: str | None, num_processes: int = 1, process_index: int = 0) -> Iterator[None]:
    """Context manager that joins this process to a multi-process run (JAX only) and silences every process but the
    first.

    Args:
        coordinator: HOST:PORT at which the first process listens and the others reach it; CLUSTER to take the
            coordinator and both numbers from the environment (Slurm, Open MPI, Kubernetes, TPU pods); None for a
            run of one process, for which nothing is done.
        num_processes: Number of processes of the run.
        process_index: Index of this process, from 0.

    Raises:
        ProcessError: If the environment describes no cluster, if the other processes do not connect, or if one of
            them ends during the run.
    """
    if coordinator is None:
        yield
        return
    import jax

    global _connected
    in_cluster = coordinator == CLUSTER
    if not in_cluster:
        print(
            f"process {process_index} of {num_processes}: waiting up to {WAIT_SECONDS // 60} minutes for the others",
            flush=True,
        )
        if process_index:
            _wait_for_coordinator(coordinator)
    saved_sigterm_handler = signal.getsignal(signal.SIGTERM)
    try:
        keras.distribution.initialize(
            *((None, None, None) if in_cluster else (coordinator, num_processes, process_index))
        )
        signal.signal(signal.SIGTERM, saved_sigterm_handler)  # JAX has installed its own
    except (ValueError, RuntimeError) as error:
        problem = "the environment describes no cluster" if in_cluster else "the processes could not connect"
        raise ProcessError(
            f"coordinator is {coordinator}: {problem} ({_first_line(error)}); start every process with srun, or give "
            "each one the HOST:PORT of the first process and its own process_index"
        ) from error
    _connected = True
    try:
        with contextlib.nullcontext() if is_main_process() else _silence():
            yield
    except BaseException as error:
        if not _connected:
            raise
        # A normal exit would wait for the other processes, which may be waiting for this one.
        atexit.register(os._exit, 1)
        if isinstance(error, jax.errors.JaxRuntimeError) or isinstance(error, ValueError) and "Gloo" in str(error):
            raise ProcessError(
                f"another process of this run seems to have ended ({_first_line(error)}); see its output. Start all "
                "processes again with the same commands to continue after the last finished epoch"
            ) from error
        raise


def _wait_for_coordinator(coordinator: str) -> None:
    """Wait until the first process listens, since JAX itself would end the process without a usable message.

    Raises:
        ProcessError: If the host name is unknown, or if nothing listens within WAIT_SECONDS.
    """
    host, _, port = coordinator.rpartition(":")
    deadline = time.monotonic() + WAIT_SECONDS
    while True:
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > deadline or isinstance(error, socket.gaierror):
                raise ProcessError(
                    f"coordinator is {coordinator}: nothing listens there ({error}); start the first process on that "
                    "machine, with process_index 0"
                ) from error
        time.sleep(0.2)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        yield


def exit_process(status: int) -> NoReturn:
    """End this process with an exit status; immediately if it failed while connected to other processes."""
    if status and _connected:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def shutdown() -> None:
    """Disconnect from the other processes, after which each one computes alone. All processes must call this."""
    global _connected
    if _connected:
        import jax

        jax.distributed.shutdown()
        _connected = False


def process_index_and_count() -> tuple[int, int]:
    """Return the index of this process, from 0, and the number of processes."""
    if on_jax():
        import jax

        return jax.process_index(), jax.process_count()
    return 0, 1


def is_main_process() -> bool:
    """Return whether this is the process that writes files. A single process is."""
    return process_index_and_count()[0] == 0


def broadcast_from_main(value: T) -> T:
    """Return the main process's value in every process. All processes must call this.

    Args:
        value: Any value that can be pickled. Values of other processes than the main one are ignored.
    """
    if process_index_and_count()[1] == 1:
        return value
    from jax.experimental import multihost_utils

    content = pickle.dumps(value) if is_main_process() else b""
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(content))))
    padded = np.frombuffer(content.ljust(size, b"\0")[:size], np.uint8)
    return pickle.loads(multihost_utils.broadcast_one_to_all(padded).tobytes())


# ----------------------------------------------------------------------------------------------- training


@contextlib.contextmanager
def distribution_scope(devices: int) -> Iterator[None]:
    """Context manager in which networks are made that are trained on several devices of each process.

    Each batch is split over all devices. The input pipeline of a process must yield only its own shard of each
    batch, see `process_index_and_count`. With one device in one process this does nothing.

    Args:
        devices: Number of devices used in each process.
    """
    if total_devices(devices) == 1:
        yield
        return
    if on_jax():
        import jax

        by_process = [jax.local_devices(process_index)[:devices] for process_index in range(jax.process_count())]
        names = [_jax_name(device) for local_devices in by_process for device in local_devices]
        distribution = keras.distribution.DataParallel(devices=names, auto_shard_dataset=False)
    else:
        # TensorFlow's default, collective operations, mixes up the sparse gradients of embeddings with dense ones.
        reduction = tf.distribute.ReductionToOneDevice() if uses_cpus() else tf.distribute.NcclAllReduce()
        distribution = tf.distribute.MirroredStrategy(device_names()[:devices], reduction)
    with distribution.scope():
        yield
