"""How benchmarks measure time and memory on a machine that does other things too."""

from __future__ import annotations

import multiprocessing
import re
import resource
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from harmonic.errors import UserError

REPEATS = 5


def best_seconds(function: Callable[..., Any], *args: Any) -> float:
    """The least of a few runs, after one that warms up: what the machine can do when nothing disturbs it."""
    jax.block_until_ready(function(*args))
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        jax.block_until_ready(function(*args))
        times.append(time.perf_counter() - start)
    return min(times)


def matrix_rate(dtype: Any) -> float:
    """Operations a second in a product of large matrices."""
    side = 2_048 if jax.default_backend() == "cpu" else 8_192
    matrix = jnp.ones((side, side), dtype)
    return 2 * side**3 / best_seconds(jax.jit(lambda m: m @ m), matrix)


def in_child(function: Callable[..., Any], *args: Any) -> Any:
    """What `function(*args)` returns in a process of its own: with its own peak of memory, and its own death.

    Where an accelerator belongs to one process, this one must not have used it yet.

    Raises:
      UserError: as the function did, or for a process that gave no answer.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_answer, args=(sender, function, args), daemon=True)
    child.start()
    sender.close()  # the child's end alone is left, so that its death is seen
    try:
        value, error = receiver.recv()
    except EOFError:
        child.join()
        status = child.exitcode or 0
        how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
        cause = "; most likely the memory did not suffice" if status == -9 else ""
        raise UserError(f"the process that measures {how}{cause}") from None
    finally:
        child.terminate()
        child.join()
    if error:
        raise UserError(error)
    return value


def _answer(sender: Connection, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    try:
        sender.send((function(*args), None))
    except UserError as error:
        sender.send((None, str(error)))


def peak_resident_bytes() -> int:
    """The most memory that this process has held. Other than `ru_maxrss`, Linux's own figure starts with the program
    and not with what the parent held."""
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s*(\d+) kB", status.read_text()) if status.exists() else None
    return 1_024 * (int(found[1]) if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def free_bytes() -> int | None:
    """Memory that a program may still take: the device's, or the machine's for a CPU; None where nobody tells."""
    stats = jax.devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    info = Path("/proc/meminfo")
    found = re.search(r"MemAvailable:\s*(\d+) kB", info.read_text()) if info.exists() else None
    return 1_024 * int(found[1]) if found else None
