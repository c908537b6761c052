"""Linear scans and gates: the public doors.

    h, h_last = linear_scan(x, a, h0)               # h_t = a_t h_{t-1} + x_t, complex, over time
    h, h_last = cg_lru(u, bias, decay, theta, h0)   # the same, with a_t and x_t made from the gates in u + bias
    y = gated_gelu(x, x_bias, gate, gate_bias)      # (x + x_bias) gelu(gate + gate_bias)

Complex arrays are pairs of real ones (`Pair`), or real and imaginary parts side by side.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from harmonic.kernels import chunked, machine, reference
from harmonic.kernels.dense import add_bias, platform
from harmonic.kernels.gates import recurrence
from harmonic.kernels.reference import Pair, add, multiply

IMPLEMENTATIONS = ("auto", "reference", "associative", "chunked", "native", "pallas_gpu", "pallas_tpu")

__all__ = ["IMPLEMENTATIONS", "Pair", "cg_lru", "gated_gelu", "linear_scan", "pick"]


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
    implementation = pick(implementation, shape[1], axis)
    if implementation.startswith("pallas"):
        from harmonic.kernels import pallas_scan  # not for those who run on CPU: Pallas is slow to load

        return pallas_scan.scan(pallas_scan.identity, _tile(implementation), axis, (*x, *a), (), h0)
    wide, dtype = h0[0].dtype, x[0].dtype
    h, h_last = _plain(_cast(x, wide), _cast(a, wide), h0, axis, implementation)
    return _cast(h, dtype), h_last


def cg_lru(
    u: jax.Array,
    bias: jax.Array,
    decay: jax.Array,
    theta: jax.Array,
    h0: Pair,
    *,
    axis: str | None = None,
    implementation: str = "auto",
) -> tuple[jax.Array, Pair]:
    """The recurrence of the complex-gated linear recurrent unit (De et al. 2402.19427; Botev et al. 2404.07839).

    i = sigmoid(p_i), r = sigmoid(p_r); log|a| = -decay r, arg a = theta r
    h_t = a_t h_{t-1} + sqrt(1 - |a_t|^2) i_t z_t

    One kernel computes the gates and the scan, and one their gradients: in machine code on CPU (`native`), in Pallas on
    GPU and TPU (`pallas_scan` counts the passes over memory). Elsewhere the gates are computed beside `linear_scan`.

    Args:
      u: [batch, time, 4 channels], side by side Re z, Im z, p_i, p_r, less `bias`; the gates p before their sigmoids.
      bias: [4 channels], added to u.
      decay, theta: [channels]; decay >= 0, theta in radians.
      h0: [batch, channels], the state before the first step, in the precision that the state is kept in.
      axis, implementation: as for `linear_scan`.

    Returns:
      (h [batch, time, 2 channels] of u's type, Re and Im side by side; h_last [batch, channels] of h0's type). The
      derivative of the square root is held to at most 200: at |a| = 1 the true one is infinite.

    Raises:
      ValueError: shapes that do not fit, or an unknown implementation.
    """
    channels = decay.shape[0]
    shape = (*u.shape[:2], channels)
    fit = u.shape[2:] == bias.shape == (4 * channels,) and theta.shape == decay.shape
    _check(fit, h0, shape, f"u, bias, decay, theta {u.shape}, {bias.shape}, {decay.shape}, {theta.shape}")
    implementation = pick(implementation, shape[1], axis)
    wide, dtype = h0[0].dtype, u.dtype
    if implementation == "native":
        from harmonic.kernels import native

        h, h_last = native.cg_lru(*_cast((u, bias, decay, theta), wide), h0, axis)
        return h.astype(dtype), h_last
    pieces = jnp.split(add_bias(u, bias), 4, axis=-1)
    z, gates = (pieces[0], pieces[1]), (pieces[2], pieces[3])
    if implementation.startswith("pallas"):
        from harmonic.kernels import pallas_cg_lru, pallas_scan

        coefficients = pallas_cg_lru.coefficients
        out, h_last = pallas_scan.scan(coefficients, _tile(implementation), axis, (*z, *gates), (decay, theta), h0)
    else:
        a, x = recurrence(_cast(z, wide), _cast(gates, wide), *_cast((decay, theta), wide))
        out, h_last = _plain(x, a, h0, axis, implementation)
    return jnp.concatenate(out, axis=-1).astype(dtype), h_last


def gated_gelu(x: jax.Array, x_bias: jax.Array, gate: jax.Array, gate_bias: jax.Array) -> jax.Array:
    """(x + x_bias) gelu(gate + gate_bias), gelu by its tanh form (Hendrycks and Gimpel 1606.08415, section 2).

    Args:
      x, gate: [batch, time, width].
      x_bias, gate_bias: [width].
    """
    if platform() == "cpu" and machine.available():
        from harmonic.kernels import native

        wide = jnp.promote_types(x.dtype, jnp.float32)
        return native.gated_gelu(*_cast((x, x_bias, gate, gate_bias), wide)).astype(x.dtype)
    return add_bias(x, x_bias) * jax.nn.gelu(add_bias(gate, gate_bias))


def _check(fit: bool, h0: Pair, shape: tuple[int, ...], what: str) -> None:
    if not fit or {v.shape for v in h0} != {(shape[0], shape[2])}:
        raise ValueError(f"{what} and h0 {h0[0].shape} do not fit")


def pick(implementation: str, time: int, axis: str | None) -> str:
    """The implementation that `implementation`, perhaps `auto`, stands for."""
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation must be one of {IMPLEMENTATIONS}, got {implementation!r}")
    if implementation in ("reference", "associative") and axis is not None:
        raise ValueError(f"the {implementation} scan does not take a sharded sequence; use auto")
    if implementation != "auto":
        return implementation
    if time == 1 and axis is None:
        return "step"
    here = "native" if machine.available() else "chunked"
    return {"gpu": "pallas_gpu", "tpu": "pallas_tpu"}.get(platform(), here)


def _tile(implementation: str):
    from harmonic.kernels import pallas_gpu, pallas_tpu

    kernels = pallas_gpu if implementation == "pallas_gpu" else pallas_tpu
    return kernels.tile_interpreted if platform() == "cpu" else kernels.tile


def _plain(x: Pair, a: Pair, h0: Pair, axis: str | None, implementation: str) -> tuple[Pair, Pair]:
    if implementation == "native":
        from harmonic.kernels import native

        return native.linear_scan(x, a, h0, axis)
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
