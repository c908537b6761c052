"""The processes of a run, each with devices of its own: how they join, what they tell one another, and how they end.

Anything that is not an array goes through the store of JAX's coordinator, which runs in process 0. A process that has
died is noticed by its silence: the collectives of the others would wait for it forever.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import json
import os
import signal
import socket
import sys
import threading
import time
from typing import Any

import jax
from jax._src import cloud_tpu_init, distributed  # the store of the coordinator has no public door

from harmonic.errors import UserError

_SCHEDULERS = {  # JAX's name: what is there in a started task; the number of tasks, the first that is there; the index
    "slurm": ("SLURM_STEP_NODELIST", ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"), "SLURM_PROCID"),
    "ompi": ("OMPI_COMM_WORLD_SIZE", ("OMPI_COMM_WORLD_SIZE",), "OMPI_COMM_WORLD_RANK"),
}
_ALIVE, _GONE = "harmonic/alive/", "harmonic/gone"
_SILENCE = 20.0  # seconds without a sign of life after which a process counts as gone
_GRACE = 2.0  # seconds for a process to say itself what is wrong, once another one has left with an error

_CONTINUES = "so this one ends too; the same command goes on from the last checkpoint"
_ending = threading.Event()  # set when this process is about to end
_watchdog: threading.Thread | None = None
_last_words = threading.Lock()
_gathers = itertools.count()  # the same in every process


def initialise(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_index: int | None = None,
    *,
    timeout: int = 60,
) -> None:
    """Joins the processes of a run, before anything else is done with JAX. For mains.

    By what is given; else as the scheduler's environment has it (SLURM, Open MPI), or a TPU's. Where there is none of
    these, or a single task, nothing happens.

    Args:
      coordinator_address: host:port that process 0 serves and the others reach.
      num_processes: of the run.
      process_index: of this one, from 0; like num_processes, the scheduler's where it is not given.
      timeout: seconds within which all must have come; after that the process ends with an error.

    Raises:
      UserError: a part is missing, or impossible, or the coordinator cannot be served.
    """
    global _watchdog
    scheduler, count, index = _scheduled()
    options: dict[str, Any]
    if (coordinator_address, num_processes, process_index) != (None, None, None):
        num_processes = count if num_processes is None else num_processes
        process_index = index if process_index is None else process_index
        if coordinator_address is None or num_processes is None or process_index is None:
            raise UserError("--coordinator_address, --num_processes and --process_index go together: give all three")
        host, _, port = coordinator_address.rpartition(":")
        if not (host and port.isdigit() and 0 < int(port) < 65_536):
            raise UserError(f"--coordinator_address={coordinator_address} must be host:port")
        if not 0 <= process_index < num_processes:
            raise UserError(f"--process_index={process_index} is impossible with --num_processes={num_processes}")
        if num_processes == 1:
            return
        options = {
            "coordinator_address": coordinator_address,
            "num_processes": num_processes,
            "process_id": process_index,
            "cluster_detection_method": "deactivate",
        }
    elif scheduler:
        options = {"cluster_detection_method": scheduler}
    elif cloud_tpu_init.running_in_cloud_tpu_vm and "tpu" in os.environ.get("JAX_PLATFORMS", "tpu"):
        options = {}
    else:
        return
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM for itself
    # JAX would abort with a stack trace, some seconds after a timeout of its own.
    late = threading.Timer(
        timeout,
        _end,
        [
            f"no coordinator at {coordinator_address or 'the address of the environment'}, or not all processes came "
            f"to it, within {timeout} s; start all of them with the same --coordinator_address and --num_processes"
        ],
    )
    late.daemon = True
    late.start()
    try:
        jax.distributed.initialize(**options, initialization_timeout=timeout + 60)
    except (RuntimeError, ValueError, OSError) as error:
        if not options:
            return  # a TPU that is no part of a group
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"the processes cannot be joined ({reason}); give --coordinator_address, --num_processes and "
            "--process_index"
        ) from error
    finally:
        late.cancel()
    index, count = current()
    if count > 1:
        _silence_gloo()
        # Not by signal.signal: Python's own handlers run too late for this.
        ctypes.CDLL(None).signal(signal.SIGABRT, _aborting)
        _watchdog = threading.Thread(target=_watch, args=(_client(), index, count), daemon=True)
        _watchdog.start()


def _scheduled() -> tuple[str | None, int | None, int | None]:
    """(JAX's name of the scheduler, number of processes, index of this one) where it has started several."""
    for name, (sign, counts, index) in _SCHEDULERS.items():
        count = next((os.environ[c] for c in counts if os.environ.get(c)), "1")
        if sign in os.environ and count.isdigit() and int(count) > 1 and os.environ.get(index, "").isdigit():
            return name, int(count), int(os.environ[index])
    return None, None, None


def _silence_gloo() -> None:
    """Gloo tells of its connections on standard output, where results go: on CPU only Python writes there from now."""
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            kept = os.dup(sys.stdout.fileno())
            with open(os.devnull, "w") as nothing:
                os.dup2(nothing.fileno(), 1)
            sys.stdout = open(kept, "w", encoding=sys.stdout.encoding, buffering=1)


def current() -> tuple[int, int]:
    """(index of this process, number of processes); (0, 1) before `initialise` and after `finish`."""
    state = distributed.global_state
    return (0, 1) if state.client is None else (state.process_id, state.num_processes)


def _client() -> Any:
    return distributed.global_state.client


def gather(text: str) -> list[str]:
    """What each process gives, in their order. All of them call it, and wait for the last, however long that takes."""
    index, count = current()
    if count == 1:
        return [text]
    client, name = _client(), f"harmonic/gather/{next(_gathers)}"
    client.key_value_set(f"{name}/{index}", text)
    return [_get(client, f"{name}/{i}") for i in range(count)]


def check_same(values: dict[str, Any]) -> None:
    """Refuses processes that were not all started with the same values, in JSON's types.

    Raises:
      UserError: names the first process that differs from process 0, and the values.
    """
    first, *others = map(json.loads, gather(json.dumps(values)))
    for number, other in enumerate(others, 1):
        differing = [
            f"{name} is {other.get(name)!r} there and {value!r} in process 0"
            for name, value in first.items()
            if other.get(name) != value
        ]
        if differing:
            raise UserError(f"process {number} was started with something else than process 0: {'; '.join(differing)}")


def _get(client: Any, key: str) -> str:
    while True:  # in short turns, so that signals are seen meanwhile
        try:
            return client.blocking_key_value_get(key, 1_000)
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise


def finish() -> None:
    """Ends what the processes do together, when all have come to it. Process 0 may go on alone."""
    if current()[1] > 1:
        gather("")
        _ending.set()
        if _watchdog is not None:
            _watchdog.join()
        jax.distributed.shutdown()


def leave(status: int) -> None:
    """Ends this process; where there are others they are told, and not waited for."""
    index, count = current()
    if count == 1:
        sys.exit(status)
    _ending.set()
    sys.stdout.flush()
    client = _client()
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # another one was first
        client.key_value_set(_GONE, str(index))
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # they all leave together, or one leaves alone
        client.wait_at_barrier("harmonic/leave", round((_GRACE + 1) * 1_000))
    if index == 0:
        time.sleep(0.5)  # the coordinator goes with it, and those who still need it would abort
    os._exit(status)


def await_watchdog() -> None:
    """After an error in a collective: ends this process if that is because another one is gone, else returns."""
    if _watchdog is not None:
        _watchdog.join(_SILENCE + 10)


def _watch(client: Any, index: int, count: int) -> None:
    """Gives signs of life, and ends this process when another one is gone; process 0 looks out for those."""
    last = {f"{_ALIVE}{i}": ("", time.monotonic()) for i in range(count)}
    for beat in itertools.count():
        try:
            client.key_value_set(f"{_ALIVE}{index}", str(beat), allow_overwrite=True)
            if index == 0:
                now = time.monotonic()
                last |= {key: (value, now) for key, value in client.key_value_dir_get(_ALIVE) if last[key][0] != value}
                for key, (_, when) in last.items():
                    if now - when > _SILENCE:
                        client.key_value_set(_GONE, key.removeprefix(_ALIVE), allow_overwrite=True)
            gone = client.blocking_key_value_get(_GONE, 1_000)
            _ending.wait(_GRACE)
        except jax.errors.JaxRuntimeError as error:
            gone = "" if "DEADLINE_EXCEEDED" in str(error) else "0"  # with which the coordinator is gone
        if _ending.is_set():
            return
        if gone:
            _end(f"process {gone} is gone, {_CONTINUES}")


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _aborting(_: int) -> None:
    """JAX aborts when the coordinator is gone, often before Python hears of it: then the reason is said at least."""
    host, port = str(distributed.global_state.coordinator_address).rsplit(":", 1)
    try:
        socket.create_connection((host.strip("[]"), int(port)), 1).close()
    except OSError:
        _end(f"process 0 is gone, {_CONTINUES}")


def _end(message: str) -> None:
    _last_words.acquire()  # for ever, in all threads but the first
    os.write(2, f"error: {message}\n".encode())
    os._exit(2)
