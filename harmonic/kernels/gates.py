"""The gates and gelu on JAX arrays: `arithmetic`'s formulas, with the derivative as written there."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from harmonic.kernels.arithmetic import Gates, Pair, gelu_share, sincos_polynomial
from harmonic.kernels.dense import beside, column_sum


class JaxMath:
    """`arithmetic.Math` for JAX arrays."""

    def expm1(self, y: jax.Array) -> jax.Array:
        return jnp.expm1(y)

    def sigmoid(self, v: jax.Array) -> jax.Array:
        return jax.nn.sigmoid(v)

    def sqrt(self, v: jax.Array) -> jax.Array:
        return jnp.sqrt(v)

    def floor(self, v: jax.Array) -> jax.Array:
        return jnp.floor(v)

    def where(self, condition: jax.Array, yes: jax.Array, no: jax.Array | float) -> jax.Array:
        return jnp.where(condition, yes, no)

    def sincos(self, angle: jax.Array) -> tuple[jax.Array, jax.Array]:
        # XLA's own sine and cosine take five and ten times as long as an exponential on CPU.
        return sincos_polynomial(self, angle) if angle.dtype == jnp.float32 else (jnp.sin(angle), jnp.cos(angle))

    def integers(self, v: jax.Array) -> jax.Array:
        return v.astype(jnp.int32)

    def has_bit(self, integers: jax.Array, bit: int) -> jax.Array:
        return (integers & bit) != 0


_MATH = JaxMath()


@jax.custom_vjp
def recurrence(z: Pair, gates: Pair, decay: jax.Array, theta: jax.Array) -> tuple[Pair, Pair]:
    """The coefficients of the CG-LRU's recurrence (`arithmetic.Gates`).

    Args:
      z: [..., channels], the complex input.
      gates: (p_i, p_r), each [..., channels]: the input and recurrence gates before their sigmoids.
      decay, theta: [channels], at least 0, and radians.

    Returns:
      (a, x): |a| <= 1 and the driven input, complex [..., channels].

    The derivative of the square root is bounded by 200: at |a| = 1 the true one is infinite, and training meets NaNs.
    """
    return _forward(z, gates, decay, theta)[0]


def _forward(z: Pair, gates: Pair, decay: jax.Array, theta: jax.Array) -> tuple[Any, Gates]:
    computed = Gates.compute(_MATH, z, *gates, beside(decay, z[0]), beside(theta, z[0]))
    return (computed.a, computed.x), computed


def _backward(computed: Gates, cotangents: tuple[Pair, Pair]):
    dz_re, dz_im, dp_i, dp_r, ddecay, dtheta = computed.gradients(_MATH, *cotangents)
    return (dz_re, dz_im), (dp_i, dp_r), column_sum(ddecay), column_sum(dtheta)


recurrence.defvjp(_forward, _backward)


def gelu(x: jax.Array) -> jax.Array:
    """x sigmoid(2 s), s = sqrt(2 / pi) (x + 0.044715 x^3): gelu's tanh form, to the last digits also where it is
    small."""
    return x * gelu_share(_MATH, x)[0]
