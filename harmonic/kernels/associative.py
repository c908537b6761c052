"""The linear scan by `jax.lax.associative_scan`, differentiated by JAX: logarithmic depth, many passes over memory."""

from __future__ import annotations

import jax

from harmonic.kernels.arithmetic import Pair, add, multiply


def linear_scan(x: Pair, a: Pair, h0: Pair, axis: None = None) -> tuple[Pair, Pair]:
    """As `reference.linear_scan`; `axis` must be None. For a single step it is that step's formula and no more."""

    def combine(left: tuple[Pair, Pair], right: tuple[Pair, Pair]) -> tuple[Pair, Pair]:
        return multiply(right[0], left[0]), add(multiply(right[0], left[1]), right[1])

    product, h = jax.lax.associative_scan(combine, (a, x), axis=1)
    h = add(multiply(product, jax.tree.map(lambda v: v[:, None], h0)), h)
    return h, jax.tree.map(lambda v: v[:, -1], h)
