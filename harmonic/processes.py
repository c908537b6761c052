"""The processes of a run, each with its own devices: how they join, exchange text, and end.

Text goes through the key-value store of JAX's coordinator, a thread of process 0. A watchdog notices the silence of a
process that is gone: the collectives of the others would wait for it forever.
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

_SCHEDULERS = {  # JAX's name: a variable of a started task; of the number of tasks, the first one set; of the index
    "slurm": ("SLURM_STEP_NODELIST", ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"), "SLURM_PROCID"),
    "ompi": ("OMPI_COMM_WORLD_SIZE", ("OMPI_COMM_WORLD_SIZE",), "OMPI_COMM_WORLD_RANK"),
}
_ALIVE, _GONE = "harmonic/alive/", "harmonic/gone"
_SILENCE = 20.0  # seconds without a sign of life after which a process counts as gone
_GRACE = 2.0  # seconds in which a process may report its own error, once another process has ended with one

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
    """Joins the processes of a run. Mains call it before anything else uses JAX.

    Without arguments the environment of a scheduler (SLURM, Open MPI) or of a TPU decides. Without these, or for a
    single task, nothing happens.

    Args:
      coordinator_address: host:port that process 0 serves and the others reach.
      num_processes: of the run; by default the scheduler's number of tasks.
      process_index: of this process, from 0; by default the scheduler's.
      timeout: seconds within which all processes must have joined; after them the process ends with an error.

    Raises:
      UserError: an argument is missing or impossible, or the coordinator cannot be served.
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
    jax.config.update("jax_enable_preemption_service", False)  # that service would take over SIGTERM
    # A timer, as JAX aborts with a stack trace some seconds after its own timeout.
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
            return  # a single TPU host
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
        # Not by signal.signal: Python runs its handlers only after abort() has ended the process.
        ctypes.CDLL(None).signal(signal.SIGABRT, _aborting)
        _watchdog = threading.Thread(target=_watch, args=(_client(), index, count), daemon=True)
        _watchdog.start()


def _scheduled() -> tuple[str | None, int | None, int | None]:
    """(JAX's name of the scheduler, number of processes, index of this one) if it has started several."""
    for name, (sign, counts, index) in _SCHEDULERS.items():
        count = next((os.environ[c] for c in counts if os.environ.get(c)), "1")
        if sign in os.environ and count.isdigit() and int(count) > 1 and os.environ.get(index, "").isdigit():
            return name, int(count), int(os.environ[index])
    return None, None, None


def _silence_gloo() -> None:
    """On CPU, lets only Python write to standard output: Gloo prints its connections there, among the results."""
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
    """The texts of all processes, by index. Every process must call it; each waits for the last, without a limit."""
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
    while True:  # in short turns: Python handles signals between them
        try:
            return client.blocking_key_value_get(key, 1_000)
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise


def finish() -> None:
    """Waits for all processes, and disconnects them. Process 0 may continue alone."""
    if current()[1] > 1:
        gather("")
        _ending.set()
        if _watchdog is not None:
            _watchdog.join()
        jax.distributed.shutdown()


def leave(status: int) -> None:
    """Ends this process with an exit status. Other processes are told of it, and not waited for."""
    index, count = current()
    if count == 1:
        sys.exit(status)
    _ending.set()
    sys.stdout.flush()
    client = _client()
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # another process was first
        client.key_value_set(_GONE, str(index))
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # all end together, or this one alone
        client.wait_at_barrier("harmonic/leave", round((_GRACE + 1) * 1_000))
    if index == 0:
        time.sleep(0.5)  # the coordinator ends with process 0, and processes that still need it abort
    os._exit(status)


def await_watchdog() -> None:
    """Call after an error in a collective: ends this process if the cause is a process that is gone, else returns."""
    if _watchdog is not None:
        _watchdog.join(_SILENCE + 10)


def _watch(client: Any, index: int, count: int) -> None:
    """Sends signs of life, and ends this process when another one is gone. Process 0 notices who is silent."""
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
            gone = "" if "DEADLINE_EXCEEDED" in str(error) else "0"  # the coordinator is gone, and with it process 0
        if _ending.is_set():
            return
        if gone:
            _end(f"process {gone} is gone, {_CONTINUES}")


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _aborting(_: int) -> None:
    """Prints why, when JAX aborts: it does so when the coordinator is gone, often before the watchdog notices."""
    host, port = str(distributed.global_state.coordinator_address).rsplit(":", 1)
    try:
        socket.create_connection((host.strip("[]"), int(port)), 1).close()
    except OSError:
        _end(f"process 0 is gone, {_CONTINUES}")


def _end(message: str) -> None:
    _last_words.acquire()  # only the first thread gets past this line
    os.write(2, f"error: {message}\n".encode())
    os._exit(2)
