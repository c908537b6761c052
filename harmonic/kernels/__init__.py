"""The linear scan: one public door.

    h, h_last = linear_scan(x, a, h0)        # h_t = a_t h_{t-1} + x_t, complex, over time

Complex arrays are pairs of real ones (`Pair`).
"""

from __future__ import annotations

import jax

from harmonic.kernels import chunked, reference
from harmonic.kernels.reference import Pair, add, multiply

IMPLEMENTATIONS = ("auto", "reference", "associative", "chunked")

__all__ = ["IMPLEMENTATIONS", "Pair", "linear_scan"]


def linear_scan(
    x: Pair, a: Pair, h0: Pair, *, axis: str | None = None, implementation: str = "auto"
) -> tuple[Pair, Pair]:
    """The first-order linear recurrence h_t = a_t h_{t-1} + x_t (De et al. 2402.19427, section 2.4).

    Args:
      x, a: [batch, time, channels] of float32 or float64.
      h0: [batch, channels], the state before the first step.
      axis: inside `jax.shard_map`, the mesh axis over which time is cut; h0 must be the same on all its shards.
      implementation: `auto` picks by platform and length.

    Returns:
      (h [batch, time, channels], h_last [batch, channels], the state after the last step of the whole sequence).

    Raises:
      ValueError: shapes that do not fit, or an unknown implementation.
    """
    batch, time, channels = x[0].shape
    if {v.shape for v in (*x, *a)} != {(batch, time, channels)} or {v.shape for v in h0} != {(batch, channels)}:
        raise ValueError(f"x, a {x[0].shape}, {a[0].shape} and h0 {h0[0].shape} do not fit")
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation must be one of {IMPLEMENTATIONS}, got {implementation!r}")
    if implementation == "auto" and time == 1 and axis is None:
        h_last = add(multiply(jax.tree.map(lambda v: v[:, 0], a), h0), jax.tree.map(lambda v: v[:, 0], x))
        return jax.tree.map(lambda v: v[:, None], h_last), h_last
    if implementation in ("auto", "chunked"):
        return chunked.linear_scan(x, a, h0, axis)
    if axis is not None:
        raise ValueError(f"the {implementation} scan does not take a sharded sequence; use auto")
    if implementation == "reference":
        return reference.linear_scan(x, a, h0)
    return _associative(x, a, h0)


def _associative(x: Pair, a: Pair, h0: Pair) -> tuple[Pair, Pair]:
    def combine(left, right):
        return multiply(right[0], left[0]), add(multiply(right[0], left[1]), right[1])

    product, h = jax.lax.associative_scan(combine, (a, x), axis=1)
    h = add(multiply(product, jax.tree.map(lambda v: v[:, None], h0)), h)
    return h, jax.tree.map(lambda v: v[:, -1], h)
