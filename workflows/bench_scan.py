"""The scan suite of workflows.benchmark: the kernel beside the memory traffic that it cannot avoid."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from harmonic import kernels
from workflows.timing import best_seconds

SHAPES = ((1, 131_072, 128), (8, 16_000, 128))


def suite(shapes: Sequence[tuple[int, int, int]] = SHAPES) -> Iterator[dict[str, Any]]:
    """The scan that this platform gets, forward and backward, over the time of its least possible traffic, and beside
    `associative_scan` with autodiff. `shapes` are (batch, time, channels)."""
    for shape in shapes:
        batch, length, channels = shape
        keys = jax.random.split(jax.random.key(0), 6)
        x, dh = (tuple(jax.random.normal(k, shape) for k in pair) for pair in (keys[:2], keys[2:4]))
        radius, angle = (jax.random.uniform(k, shape) for k in keys[4:])
        a = (radius * jnp.cos(angle), radius * jnp.sin(angle))
        h0 = tuple(jnp.zeros((batch, channels)) for _ in range(2))

        def forward_backward(x: Any, a: Any, dh: Any, implementation: str, h0: Any = h0) -> Any:
            h, pullback = jax.vjp(lambda x, a: kernels.linear_scan(x, a, h0, implementation=implementation)[0], x, a)
            return h, pullback(dh)

        seconds = {
            name: best_seconds(jax.jit(functools.partial(forward_backward, implementation=name)), x, a, dh)
            for name in ("auto", "associative")
        }
        yield {
            "implementation": kernels.pick("auto", length, None),
            "shape": list(shape),
            "dtype": x[0].dtype.name,
            "samples_per_second": batch * length / seconds["auto"],
            "over_streaming_bound": seconds["auto"] / _streaming_seconds(x, a, dh),
            "faster_than_associative": seconds["associative"] / seconds["auto"],
        }


def _streaming_seconds(x: Any, a: Any, dh: Any) -> float:
    """The time to read every input once and to write every output once, to memory as fresh as the scan's own outputs.

    Forward reads x, a and writes h; backward reads a, h, dh and writes dx, da.
    """

    @jax.jit
    def stream(read: Any) -> Any:
        return [v + w for v, w in zip(read[:4], read[6:], strict=True)] + [v + 1 for v in read[4:6]]

    return best_seconds(stream, [*x, *a, *(v + 1 for v in a), *(v + 1 for v in x), *dh])
