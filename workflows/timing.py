"""How benchmarks measure time on a machine that does other things too."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax

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
