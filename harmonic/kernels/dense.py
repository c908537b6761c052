"""Dense layers, normalisation and channel-wise products whose derivatives have no slow sums.

Parameters may be wider than the arrays that they are applied to (float32 beside bfloat16): results have the type of x;
sums and the parameters' derivatives have that of the parameters.

On CPU, XLA's sums over rows or columns take up to ten times as long as a matrix product with ones. The derivatives are
written out here so that every such sum is one product.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from harmonic.kernels.target import platform

EPSILON = 1e-6  # of the variance, as in Flax's LayerNorm


def beside(v: jax.Array, x: jax.Array) -> jax.Array:
    """v with leading axes of one, so that it has as many axes as x."""
    return v.reshape((1,) * (x.ndim - v.ndim) + v.shape)


def widen(x: jax.Array) -> jax.Array:
    """x in float32 at least."""
    return x if x.dtype.itemsize >= 4 else x.astype(jnp.float32)


def column_sum(x: jax.Array, dtype: jnp.dtype | None = None) -> jax.Array:
    """Sum over all axes but the last, in `dtype` if given: [..., width] -> [width]."""
    rows = x.reshape(-1, x.shape[-1])
    if platform() != "cpu":
        return rows.sum(0, dtype=dtype)
    # The barrier hides the ones from XLA, which would turn the product into the slow sum again.
    ones = jax.lax.optimization_barrier(jnp.ones((1, rows.shape[0]), x.dtype))
    return jnp.matmul(ones, rows, preferred_element_type=dtype)[0]


def row_mean(x: jax.Array) -> jax.Array:
    """Mean over the last axis, which is kept: [..., width] -> [..., 1]."""
    if platform() != "cpu":
        return x.mean(-1, keepdims=True)
    width = x.shape[-1]
    return x @ jax.lax.optimization_barrier(jnp.full((width, 1), 1 / width, x.dtype))


@jax.custom_vjp
def normalise(x: jax.Array) -> jax.Array:
    """(x - mean) / sqrt(variance + 1e-6) over the last axis: LayerNorm without its scale and bias."""
    return _normalise_forward(x)[0]


def _normalise_forward(x: jax.Array):
    wide = widen(x)
    centred = wide - row_mean(wide)
    inverse = jax.lax.rsqrt(row_mean(centred * centred) + EPSILON)
    y = (centred * inverse).astype(x.dtype)
    return y, (y, inverse)


def _normalise_backward(residuals, dy: jax.Array):
    y, inverse = residuals
    dtype, y, dy = dy.dtype, widen(y), widen(dy)
    return ((inverse * (dy - row_mean(dy) - y * row_mean(dy * y))).astype(dtype),)


normalise.defvjp(_normalise_forward, _normalise_backward)


@jax.custom_vjp
def product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x @ kernel: x [batch, time, inputs], kernel [inputs, outputs]."""
    return x @ kernel.astype(x.dtype)


def _product_backward(residuals, dy: jax.Array):
    x, kernel = residuals
    rows, drows = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    # In this order: the other one transposes `drows`, often the wider of the two, in memory.
    dkernel = jnp.matmul(rows.T, drows, preferred_element_type=kernel.dtype)
    return (drows @ kernel.T.astype(x.dtype)).reshape(x.shape), dkernel


product.defvjp(lambda x, kernel: (product(x, kernel), (x, kernel)), _product_backward)


@jax.custom_vjp
def add_bias(x: jax.Array, bias: jax.Array) -> jax.Array:
    """x + bias: x [batch, time, width], bias [width]."""
    return x + beside(bias.astype(x.dtype), x)


# The bias is saved only for its dtype.
add_bias.defvjp(lambda x, bias: (add_bias(x, bias), bias), lambda bias, dy: (dy, column_sum(dy, bias.dtype)))


def dense(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    """x @ kernel + bias: x [batch, time, inputs], kernel [inputs, outputs], bias [outputs]."""
    return add_bias(product(x, kernel), bias)


@jax.custom_vjp
def channelwise(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    """x * kernel + bias: x [batch, time, *shape], kernel and bias of that shape."""
    return _channelwise_forward(x, kernel, bias)[0]


def _channelwise_forward(x: jax.Array, kernel: jax.Array, bias: jax.Array):
    return x * beside(kernel.astype(x.dtype), x) + beside(bias.astype(x.dtype), x), (x, kernel)


def _channelwise_backward(residuals, dy: jax.Array):
    x, kernel = residuals

    def summed(v: jax.Array) -> jax.Array:
        return column_sum(v.reshape(*v.shape[: v.ndim - kernel.ndim], -1), kernel.dtype).reshape(kernel.shape)

    return dy * beside(kernel.astype(x.dtype), x), summed(dy * x), summed(dy)


channelwise.defvjp(_channelwise_forward, _channelwise_backward)
