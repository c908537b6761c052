"""The CG-LRU in the Pallas scan: its gates are computed row by row, in operations that Triton and Mosaic both lower."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from harmonic.kernels.arithmetic import Gates, Pair
from harmonic.kernels.gates import JaxMath
from harmonic.kernels.pallas import scan


class RowMath(JaxMath):
    """`arithmetic.Math` for rows inside a kernel."""

    def expm1(self, y: jax.Array) -> jax.Array:
        return jnp.tanh(0.5 * y) * (1 + jnp.exp(y))  # without cancellation; Mosaic has no expm1

    def sincos(self, angle: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jnp.sin(angle), jnp.cos(angle)


_MATH = RowMath()


def coefficients(inputs: scan.Rows, parameters: scan.Rows) -> tuple[Pair, Pair, scan.Pull]:
    """The gates for the scan (`arithmetic.Gates`).

    Args:
      inputs: rows of (Re z, Im z, p_i, p_r), less their biases.
      parameters: rows of these four biases, and of (decay, theta).
    """
    z_re, z_im, p_i, p_r = (v + bias for v, bias in zip(inputs, parameters[:4], strict=True))
    gates = Gates.compute(_MATH, (z_re, z_im), p_i, p_r, *parameters[4:])

    def pull(da: Pair, dx: Pair) -> tuple[scan.Rows, scan.Rows]:
        gradients = gates.gradients(_MATH, da, dx)
        return gradients[:4], gradients  # a bias's gradient is the sum of its input's

    return gates.a, gates.x, pull


def cg_lru(
    tile: scan.Tile,
    u: jax.Array,
    bias: jax.Array,
    decay: jax.Array,
    theta: jax.Array,
    h0: Pair,
    axis: str | None = None,
) -> tuple[jax.Array, Pair]:
    """`kernels.cg_lru` on the platform of `tile`."""
    parameters = (*jnp.split(bias, 4), decay, theta)
    (h,), h_last = scan.scan(coefficients, tile, axis, (2,), (u,), parameters, h0)
    return h, h_last
