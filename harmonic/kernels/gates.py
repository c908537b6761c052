"""What stands before the scan of a CG-LRU: from pre-activations to the recurrence's a and x.

    i = sigmoid(p_i), r = sigmoid(p_r)
    log|a| = -decay r, arg a = theta r
    x = sqrt(1 - |a|^2) i z

(Botev et al. 2404.07839, appendix A; decay = 8 softplus(Lambda).) The derivative is written out: it needs no second
look at any exponential or angle.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from harmonic.kernels.dense import column_sum
from harmonic.kernels.reference import Pair

_SQRT_GRADIENT = 200.0


@jax.custom_vjp
def recurrence(z: Pair, gates: Pair, decay: jax.Array, theta: jax.Array) -> tuple[Pair, Pair]:
    """The recurrence's coefficients.

    Args:
      z: [batch, time, channels], the complex input.
      gates: (p_i, p_r), each [batch, time, channels]: the input and recurrence gates before their sigmoids.
      decay, theta: [channels], at least 0, and radians.

    Returns:
      (a, x): |a| <= 1 and the driven input, complex [batch, time, channels].

    The derivative of the square root is bounded by 200: at |a| = 1 the true one is infinite, and training meets NaNs.
    """
    return _forward(z, gates, decay, theta)[0]


def _forward(z: Pair, gates: Pair, decay: jax.Array, theta: jax.Array):
    i, r = jax.nn.sigmoid(gates[0]), jax.nn.sigmoid(gates[1])
    # exp(y) and 1 - exp(2 y) from one expm1, without cancellation near |a| = 1.
    m = jnp.expm1(-decay * r)
    magnitude, root = 1 + m, jnp.sqrt(-m * (2 + m))
    sine, cosine = sincos(theta * r)
    a = magnitude * cosine, magnitude * sine
    scale = root * i
    return (a, (scale * z[0], scale * z[1])), (z, i, r, root, a, decay, theta)


def _backward(residuals, cotangents):
    z, i, r, root, a, decay, theta = residuals
    da, dx = cotangents
    scale = root * i
    dz = scale * dx[0], scale * dx[1]
    dscale = dx[0] * z[0] + dx[1] * z[1]
    dp_i = dscale * root * i * (1 - i)
    # d root / d log|a| = -|a|^2 / root
    slope = jnp.minimum(1 / root, 2 * _SQRT_GRADIENT) * (1 - root * root)
    dlog = da[0] * a[0] + da[1] * a[1] - dscale * i * slope
    dangle = da[1] * a[0] - da[0] * a[1]
    dp_r = (theta * dangle - decay * dlog) * r * (1 - r)
    return dz, (dp_i, dp_r), -column_sum(r * dlog), column_sum(r * dangle)


recurrence.defvjp(_forward, _backward)


@jax.custom_jvp
def sincos(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(sin x, cos x) to a few units in the last place for |x| up to 10,000.

    float32 takes polynomials on [-pi/4, pi/4] after a reduction by pi/2 in three parts (Cody and Waite): XLA's own
    sine and cosine take five and ten times as long as an exponential on CPU.
    """
    if x.dtype != jnp.float32:
        return jnp.sin(x), jnp.cos(x)
    quadrant = jnp.round(x * 0.6366197723675814)
    y = x - quadrant * 1.5703125 - quadrant * 4.837512969970703125e-4 - quadrant * 7.549789948768648e-8
    y2 = y * y
    sine = y + y * y2 * (-1.6666654611e-1 + y2 * (8.3321608736e-3 + y2 * -1.9515295891e-4))
    cosine = 1 - 0.5 * y2 + y2 * y2 * (4.166664568298827e-2 + y2 * (-1.388731625493765e-3 + y2 * 2.443315711809948e-5))
    number = quadrant.astype(jnp.int32)
    swapped = (number & 1) == 1
    sine, cosine = jnp.where(swapped, cosine, sine), jnp.where(swapped, sine, cosine)
    return jnp.where((number & 2) == 2, -sine, sine), jnp.where(((number + 1) & 2) == 2, -cosine, cosine)


@sincos.defjvp
def _sincos_jvp(primals, tangents):
    sine, cosine = sincos(*primals)
    return (sine, cosine), (cosine * tangents[0], -sine * tangents[0])
