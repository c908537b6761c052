"""The scan suite of workflows.benchmark: the kernel beside the memory traffic that it cannot avoid."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from harmonic.kernels import linear_scan
from workflows.timing import best_seconds

SHAPES = ((1, 131_072, 128), (8, 16_000, 128))


def suite(shapes: Sequence[tuple[int, int, int]] = SHAPES) -> Iterator[dict[str, Any]]:
    """The scan, forward and backward, over the time of its least possible traffic: each input read once, each output
    written once, by a copy measured in the same run. `shapes` are (batch, time, channels)."""
    for batch, length, channels in shapes:
        keys = jax.random.split(jax.random.key(0), 4)
        x = tuple(jax.random.normal(k, (batch, length, channels)) for k in keys[:2])
        radius, angle = (jax.random.uniform(k, (batch, length, channels)) for k in keys[2:])
        a = (radius * jnp.cos(angle), radius * jnp.sin(angle))
        h0 = tuple(jnp.zeros((batch, channels)) for _ in range(2))

        def forward_backward(x: Any, a: Any, dh: Any, implementation: str, h0: Any = h0) -> Any:
            h, pullback = jax.vjp(lambda x, a: linear_scan(x, a, h0, implementation=implementation)[0], x, a)
            return h, pullback(dh)

        # Forward reads x, a and writes h; backward reads dh, a, h and writes dx, da: eight complex arrays.
        array = jnp.zeros((8, batch, length, channels))
        bound = best_seconds(jax.jit(lambda v: v + 1), array)
        seconds = {
            name: best_seconds(jax.jit(functools.partial(forward_backward, implementation=name)), x, a, x)
            for name in ("chunked", "associative")
        }
        yield {
            "shape": [batch, length, channels],
            "dtype": "float32",
            "steps_per_second": batch * length / seconds["chunked"],
            "over_streaming_bound": seconds["chunked"] / bound,
            "faster_than_associative": seconds["associative"] / seconds["chunked"],
        }
