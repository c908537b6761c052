"""Linear scans: two public doors.

    h, h_last = linear_scan(x, a, h0)                    # h_t = a_t h_{t-1} + x_t, complex, over time
    h, h_last = cg_lru(z, gates, decay, theta, h0)       # the same, with a_t and x_t made from the gates

Complex arrays are pairs of real ones (`Pair`).
"""

from __future__ import annotations

import jax

from harmonic.kernels import chunked, reference
from harmonic.kernels.dense import platform
from harmonic.kernels.gates import recurrence
from harmonic.kernels.reference import Pair, add, multiply

IMPLEMENTATIONS = ("auto", "reference", "associative", "chunked", "pallas_gpu", "pallas_tpu")

__all__ = ["IMPLEMENTATIONS", "Pair", "cg_lru", "linear_scan"]


def linear_scan(
    x: Pair, a: Pair, h0: Pair, *, axis: str | None = None, implementation: str = "auto"
) -> tuple[Pair, Pair]:
    """The first-order linear recurrence h_t = a_t h_{t-1} + x_t (De et al. 2402.19427, section 2.4).

    Args:
      x, a: [batch, time, channels] of bfloat16, float32 or float64.
      h0: [batch, channels], the state before the first step, in the precision that the state is kept in.
      axis: inside `jax.shard_map`, the mesh axis over which time is cut; h0 must be the same on all its shards.
      implementation: `auto` picks by platform and length; the Pallas ones are interpreted (slowly) on CPU.

    Returns:
      (h [batch, time, channels] of x's type, h_last [batch, channels] of h0's type, the state after the last step of
      the whole sequence).

    Raises:
      ValueError: shapes that do not fit, or an unknown implementation.
    """
    shape = x[0].shape
    _check({v.shape for v in (*x, *a)} == {shape}, h0, shape, f"x, a {shape}, {a[0].shape}")
    implementation = _pick(implementation, shape[1], axis)
    if implementation.startswith("pallas"):
        from harmonic.kernels import pallas_scan  # not for those who run on CPU: Pallas is slow to load

        return pallas_scan.scan(pallas_scan.identity, _tile(implementation), axis, (*x, *a), (), h0)
    wide, dtype = h0[0].dtype, x[0].dtype
    h, h_last = _plain(_cast(x, wide), _cast(a, wide), h0, axis, implementation)
    return _cast(h, dtype), h_last


def cg_lru(
    z: Pair,
    gates: Pair,
    decay: jax.Array,
    theta: jax.Array,
    h0: Pair,
    *,
    axis: str | None = None,
    implementation: str = "auto",
) -> tuple[Pair, Pair]:
    """The recurrence of the complex-gated linear recurrent unit (De et al. 2402.19427; Botev et al. 2404.07839).

    i = sigmoid(p_i), r = sigmoid(p_r); log|a| = -decay r, arg a = theta r
    h_t = a_t h_{t-1} + sqrt(1 - |a_t|^2) i_t z_t

    On GPU and TPU one kernel computes the gates and the scan, and one their gradients (`pallas_scan` counts the passes
    over memory); elsewhere the gates are computed beside `linear_scan`.

    Args:
      z: [batch, time, channels], complex.
      gates: (p_i, p_r), [batch, time, channels] each, before their sigmoids.
      decay, theta: [channels]; decay >= 0, theta in radians.
      h0: [batch, channels], the state before the first step, in the precision that the state is kept in.
      axis, implementation: as for `linear_scan`.

    Returns:
      (h [batch, time, channels] of z's type, h_last [batch, channels] of h0's type). The derivative of the square root
      is held to at most 200: at |a| = 1 the true one is infinite.

    Raises:
      ValueError: shapes that do not fit, or an unknown implementation.
    """
    inputs, parameters, shape = (*z, *gates), (decay, theta), z[0].shape
    fit = {v.shape for v in inputs} == {shape} and {v.shape for v in parameters} == {shape[-1:]}
    _check(fit, h0, shape, f"z, gates, decay {shape}, {gates[0].shape}, {decay.shape}")
    implementation = _pick(implementation, shape[1], axis)
    if implementation.startswith("pallas"):
        from harmonic.kernels import pallas_cg_lru, pallas_scan

        return pallas_scan.scan(pallas_cg_lru.coefficients, _tile(implementation), axis, inputs, parameters, h0)
    wide, dtype = h0[0].dtype, z[0].dtype
    a, x = recurrence(_cast(z, wide), _cast(gates, wide), *_cast(parameters, wide))
    h, h_last = _plain(x, a, h0, axis, implementation)
    return _cast(h, dtype), h_last


def _check(fit: bool, h0: Pair, shape: tuple[int, ...], what: str) -> None:
    if not fit or {v.shape for v in h0} != {(shape[0], shape[2])}:
        raise ValueError(f"{what} and h0 {h0[0].shape} do not fit")


def _pick(implementation: str, time: int, axis: str | None) -> str:
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation must be one of {IMPLEMENTATIONS}, got {implementation!r}")
    if implementation in ("reference", "associative") and axis is not None:
        raise ValueError(f"the {implementation} scan does not take a sharded sequence; use auto")
    if implementation != "auto":
        return implementation
    if time == 1 and axis is None:
        return "step"
    return {"gpu": "pallas_gpu", "tpu": "pallas_tpu"}.get(platform(), "chunked")


def _tile(implementation: str):
    from harmonic.kernels import pallas_gpu, pallas_tpu

    kernels = pallas_gpu if implementation == "pallas_gpu" else pallas_tpu
    return kernels.tile_interpreted if platform() == "cpu" else kernels.tile


def _plain(x: Pair, a: Pair, h0: Pair, axis: str | None, implementation: str) -> tuple[Pair, Pair]:
    if implementation == "chunked":
        return chunked.linear_scan(x, a, h0, axis)
    if implementation == "reference":
        return reference.linear_scan(x, a, h0)
    if implementation == "associative":
        return _associative(x, a, h0)
    h_last = add(multiply(jax.tree.map(lambda v: v[:, 0], a), h0), jax.tree.map(lambda v: v[:, 0], x))
    return jax.tree.map(lambda v: v[:, None], h_last), h_last


def _associative(x: Pair, a: Pair, h0: Pair) -> tuple[Pair, Pair]:
    def combine(left, right):
        return multiply(right[0], left[0]), add(multiply(right[0], left[1]), right[1])

    product, h = jax.lax.associative_scan(combine, (a, x), axis=1)
    h = add(multiply(product, jax.tree.map(lambda v: v[:, None], h0)), h)
    return h, jax.tree.map(lambda v: v[:, -1], h)


def _cast(tree, dtype):
    return jax.tree.map(lambda v: v.astype(dtype), tree)
