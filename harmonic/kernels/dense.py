"""Dense layers, normalisation and channel-wise products whose derivatives hold no slow sums.

Parameters may be wider than what they are applied to (float32 beside bfloat16): results have the type of x, and sums
and the parameters' derivatives that of the parameters.

On CPU, XLA's sums over rows or columns take up to ten times as long as a matrix product with ones. The derivatives are
written out here so that every such sum is one product, and so that pieces of one wide layer are put together by one
concatenation.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

EPSILON = 1e-6  # of the variance, as in Flax's LayerNorm


def platform() -> str:
    """The platform that what is traced now will run on: cpu, gpu or tpu.

    Asked while tracing. `jax.lax.platform_dependent` would ask while lowering, but traces and differentiates every
    platform's branch, and joins their residuals: seconds of tracing and zeros in memory for kernels that are not run.
    """
    device = jax.config.jax_default_device  # type: ignore[attr-defined]
    return jax.default_backend() if device is None else getattr(device, "platform", device)


def column_sum(x: jax.Array, dtype: jnp.dtype | None = None) -> jax.Array:
    """Sum over all axes but the last, in `dtype` if given: [..., width] -> [width]."""
    rows = x.reshape(-1, x.shape[-1])
    if platform() != "cpu":
        return rows.sum(0, dtype=dtype)
    # Behind a barrier, or XLA sees through the ones and makes the slow sum of it again.
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
    wide = _wide(x)
    centred = wide - row_mean(wide)
    inverse = jax.lax.rsqrt(row_mean(centred * centred) + EPSILON)
    y = (centred * inverse).astype(x.dtype)
    return y, (y, inverse)


def _normalise_backward(residuals, dy: jax.Array):
    y, inverse = residuals
    dtype, y, dy = dy.dtype, _wide(y), _wide(dy)
    return ((inverse * (dy - row_mean(dy) - y * row_mean(dy * y))).astype(dtype),)


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


normalise.defvjp(_normalise_forward, _normalise_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def dense(x: jax.Array, kernel: jax.Array, bias: jax.Array, sizes: tuple[int, ...] = ()) -> tuple[jax.Array, ...]:
    """x @ kernel + bias, cut along the last axis.

    Args:
      x: [batch, time, inputs].
      kernel: [inputs, outputs].
      bias: [outputs].
      sizes: of the pieces; () for one piece.

    Returns:
      A tuple of [batch, time, size].
    """
    return _dense_forward(x, kernel, bias, sizes)[0]


def _dense_forward(x: jax.Array, kernel: jax.Array, bias: jax.Array, sizes: tuple[int, ...]):
    y = x @ kernel.astype(x.dtype) + bias.astype(x.dtype)
    pieces = jnp.split(y, [sum(sizes[:i]) for i in range(1, len(sizes))], axis=-1) if len(sizes) > 1 else [y]
    return tuple(pieces), (x, kernel)


def _dense_backward(sizes: tuple[int, ...], residuals, pieces: tuple[jax.Array, ...]):
    x, kernel = residuals
    dy = pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces, axis=-1)
    rows, drows = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    dkernel = jnp.matmul(rows.T, drows, preferred_element_type=kernel.dtype)
    return (drows @ kernel.T.astype(x.dtype)).reshape(x.shape), dkernel, column_sum(drows, kernel.dtype)


dense.defvjp(_dense_forward, _dense_backward)


@jax.custom_vjp
def channelwise(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    """x * kernel + bias: x [batch, time, *shape], kernel and bias of that shape."""
    return _channelwise_forward(x, kernel, bias)[0]


def _channelwise_forward(x: jax.Array, kernel: jax.Array, bias: jax.Array):
    return x * kernel.astype(x.dtype) + bias.astype(x.dtype), (x, kernel)


def _channelwise_backward(residuals, dy: jax.Array):
    x, kernel = residuals

    def summed(v: jax.Array) -> jax.Array:
        return column_sum(v.reshape(*v.shape[: v.ndim - kernel.ndim], -1), kernel.dtype).reshape(kernel.shape)

    return dy * kernel.astype(x.dtype), summed(dy * x), summed(dy)


channelwise.defvjp(_channelwise_forward, _channelwise_backward)
