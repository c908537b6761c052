"""The gates of the CG-LRU as the Pallas kernels compute them, row by row: `gates.recurrence` in operations that Triton
and Mosaic both lower, for `jax.vjp` to differentiate inside the kernel.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from harmonic.kernels.reference import Pair

_SQRT_GRADIENT = 200.0


def coefficients(inputs: tuple[jax.Array, ...], parameters: tuple[jax.Array, ...]) -> tuple[Pair, Pair]:
    """a_t and x_t of h_t = a_t h_{t-1} + x_t (De et al. 2402.19427; Botev et al. 2404.07839, appendix A).

    i = sigmoid(p_i), r = sigmoid(p_r); log|a| = -decay r, arg a = theta r; x = sqrt(1 - |a|^2) i z

    Args:
      inputs: (Re z, Im z, p_i, p_r), of one shape.
      parameters: (decay, theta), of that shape or the last axis of it; decay >= 0, theta in radians.

    Returns:
      (a, x), complex, of the inputs' shape.
    """
    z_re, z_im, p_i, p_r = inputs
    decay, theta = parameters
    gate = jax.nn.sigmoid(p_r)
    log_magnitude, angle = -decay * gate, theta * gate
    magnitude = jnp.exp(log_magnitude)
    scale = input_scale(log_magnitude) * jax.nn.sigmoid(p_i)
    return (magnitude * jnp.cos(angle), magnitude * jnp.sin(angle)), (scale * z_re, scale * z_im)


@jax.custom_jvp
def input_scale(log_magnitude: jax.Array) -> jax.Array:
    """sqrt(1 - |a|^2) from log|a| <= 0, with the square root's derivative held to at most 200.

    At |a| = 1 the true one is infinite, and training meets NaNs.
    """
    return jnp.sqrt(_one_minus_square(log_magnitude))


@input_scale.defjvp
def _input_scale_jvp(primals, tangents):
    (log_magnitude,), (tangent,) = primals, tangents
    rest = _one_minus_square(log_magnitude)
    bounded = jax.lax.rsqrt(jnp.maximum(4 * rest, 1 / _SQRT_GRADIENT**2))
    return jnp.sqrt(rest), tangent * (-2 * jnp.exp(2 * log_magnitude)) * bounded


def _one_minus_square(log_magnitude: jax.Array) -> jax.Array:
    # This is -expm1(2 log|a|), without cancellation near |a| = 1; Mosaic has a tanh, but no expm1.
    return jnp.tanh(-log_magnitude) * (1 + jnp.exp(2 * log_magnitude))
