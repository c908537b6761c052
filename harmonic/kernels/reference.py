"""The obvious scan, which every other implementation is tested against."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from harmonic.kernels.arithmetic import Pair, add, multiply


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
