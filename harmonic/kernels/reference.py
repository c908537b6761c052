"""The obvious scan, which every other implementation is tested against."""

from __future__ import annotations

from typing import Any, Protocol, Self, TypeVar

import jax
import jax.numpy as jnp

Pair = tuple[jax.Array, jax.Array]
"""A complex array as (real part, imaginary part): on CPU faster than complex64, and what Pallas takes."""


class Number(Protocol):
    """An array, or what stands for one while machine code is written (`machine.Value`)."""

    def __add__(self, other: Any, /) -> Self: ...
    def __sub__(self, other: Any, /) -> Self: ...
    def __mul__(self, other: Any, /) -> Self: ...


N = TypeVar("N", bound=Number)


def multiply(a: tuple[N, N], b: tuple[N, N]) -> tuple[N, N]:
    """a * b."""
    return a[0] * b[0] - a[1] * b[1], a[0] * b[1] + a[1] * b[0]


def multiply_conjugate(a: tuple[N, N], b: tuple[N, N]) -> tuple[N, N]:
    """conj(a) * b."""
    return a[0] * b[0] + a[1] * b[1], a[0] * b[1] - a[1] * b[0]


def add(a: tuple[N, N], b: tuple[N, N]) -> tuple[N, N]:
    """a + b."""
    return a[0] + b[0], a[1] + b[1]


def linear_scan(x: Pair, a: Pair, h0: Pair, axis: None = None) -> tuple[Pair, Pair]:
    """h_t = a_t h_{t-1} + x_t by `jax.lax.scan`, differentiated by JAX.

    Args:
      x, a: [batch, time, channels].
      h0: [batch, channels].
      axis: must be None; kernels that take a sharded sequence take a mesh axis here.

    Returns:
      (h [batch, time, channels], h_last [batch, channels]).
    """

    def step(h: Pair, inputs: tuple[Pair, Pair]) -> tuple[Pair, Pair]:
        x_t, a_t = inputs
        h = add(multiply(a_t, h), x_t)
        return h, h

    time_first = jax.tree.map(lambda v: jnp.moveaxis(v, 1, 0), (x, a))
    h_last, h = jax.lax.scan(step, h0, time_first)
    return jax.tree.map(lambda v: jnp.moveaxis(v, 0, 1), h), h_last
