"""A fast linear scan for CPU in XLA's own operations, blocked over time: a few passes over memory and no more.

Time is cut into chunks that are scanned side by side. A first pass computes each chunk's map (the product of its a and
its last h from zero), a short scan composes the maps into the states that enter the chunks, and a second pass writes h.
The backward pass is the same scan in reverse, over conj(a); products of a are never stored. Real and imaginary parts
are separate arrays, cut by a reshape without a transpose, and indexed dynamically, which suits XLA best on CPU.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp

from harmonic.kernels.arithmetic import Pair, add, multiply, multiply_conjugate
from harmonic.kernels.context_parallel import exchange_carries

_CHUNKS = 128  # over the whole batch: enough rows for vector units and cores, few enough for the caches


def chunk_length(time: int, batch: int) -> int:
    """The length of a chunk: a divisor of `time` that makes about `_CHUNKS` chunks over the batch."""
    target = max(1.0, time * batch / _CHUNKS)
    divisors = [d for i in range(1, math.isqrt(time) + 1) if time % i == 0 for d in (i, time // i)]
    return min(divisors, key=lambda d: (abs(math.log(d / target)), d))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def linear_scan(x: Pair, a: Pair, h0: Pair, axis: str | None = None) -> tuple[Pair, Pair]:
    """h_t = a_t h_{t-1} + x_t; as `reference.linear_scan`, and also over a sequence cut over the mesh axis `axis`.

    Args:
      x, a: [batch, time, channels]; this shard's piece.
      h0: [batch, channels]; the state before the whole sequence, the same on every shard.

    Returns:
      (h [batch, time, channels]; h_last [batch, channels], the state after the whole sequence, on every shard).
    """
    outputs, _ = _forward(x, a, h0, axis)
    return outputs


def _forward(x: Pair, a: Pair, h0: Pair, axis: str | None):
    batch, time, _ = x[0].shape
    length = chunk_length(time, batch)
    xs, as_ = _split((x, a), length)

    def summarise(t, carry):
        product, h = carry
        a_t, x_t = _at(as_, t), _at(xs, t)
        return multiply(a_t, product), add(multiply(a_t, h), x_t)

    start = _identity(as_)
    product, last = jax.lax.fori_loop(0, length, summarise, start)
    starts, shard_product, shard_last = _compose(product, last, reverse=False)
    entering, h_last = exchange_carries(shard_product, shard_last, h0, axis, reverse=False)
    h_in = add(multiply(starts[0], jax.tree.map(lambda v: v[:, None], entering)), starts[1])

    def write(t, carry):
        h, out = carry
        h = add(multiply(_at(as_, t), h), _at(xs, t))
        return h, _set(out, h, t)

    _, h = jax.lax.fori_loop(0, length, write, (h_in, jax.tree.map(jnp.zeros_like, xs)))
    h = jax.tree.map(lambda v: v.reshape(batch, time, -1), h)
    return (h, h_last), (a, h, h_in)


def _backward(axis: str | None, residuals, cotangents):
    a, h, h_in = residuals
    dh, dh_last = cotangents
    batch, time, channels = a[0].shape
    chunks = h_in[0].shape[1]
    length = time // chunks
    as_, hs, dhs = _split((a, h, dh), length)
    # Every shard has a copy of h_last, which is the last shard's: their cotangents add up.
    if axis is not None and jax.lax.axis_size(axis) > 1:
        dh_last = jax.lax.psum(dh_last, axis)

    # With s_t = dh_t + q_t and q_{t-1} = conj(a_t) s_t, q needs no shifted copy of a.
    def summarise(i, carry):
        product, q = carry
        a_t, dh_t = _at(as_, length - 1 - i), _at(dhs, length - 1 - i)
        return multiply_conjugate(a_t, product), multiply_conjugate(a_t, add(dh_t, q))

    product, last = jax.lax.fori_loop(0, length, summarise, _identity(as_))
    starts, shard_product, shard_last = _compose(product, last, reverse=True)
    entering, dh0 = exchange_carries(shard_product, shard_last, dh_last, axis, reverse=True)
    q_in = add(multiply(starts[0], jax.tree.map(lambda v: v[:, None], entering)), starts[1])

    def write(i, carry):
        q, dx, da = carry
        t = length - 1 - i
        s = add(_at(dhs, t), q)
        before = jax.tree.map(lambda start, v: jnp.where(t == 0, start, v), h_in, _at(hs, jnp.maximum(t - 1, 0)))
        dx = _set(dx, s, t)
        da = _set(da, multiply_conjugate(before, s), t)
        return multiply_conjugate(_at(as_, t), s), dx, da

    empty = jax.tree.map(jnp.zeros_like, as_)
    _, dx, da = jax.lax.fori_loop(0, length, write, (q_in, empty, empty))
    dx, da = jax.tree.map(lambda v: v.reshape(batch, time, channels), (dx, da))
    if axis is not None:  # every shard was given the same h0, but only the first one's is used
        first = jax.lax.axis_index(axis) == 0
        dh0 = jax.tree.map(lambda v: jnp.where(first, v, jnp.zeros_like(v)), dh0)
    return dx, da, dh0


linear_scan.defvjp(_forward, _backward)


def _split(tree, length: int):
    """[batch, time, channels] -> [batch, chunks, length, channels]."""
    return jax.tree.map(lambda v: v.reshape(v.shape[0], -1, length, v.shape[-1]), tree)


def _at(pair: Pair, t) -> Pair:
    return jax.tree.map(lambda v: jax.lax.dynamic_index_in_dim(v, t, 2, keepdims=False), pair)


def _set(pair: Pair, value: Pair, t) -> Pair:
    return jax.tree.map(lambda v, new: jax.lax.dynamic_update_index_in_dim(v, new, t, 2), pair, value)


def _identity(like: Pair) -> tuple[Pair, Pair]:
    """The map h -> 1 h + 0 for each chunk: (product, last), each [batch, chunks, channels]."""
    zeros = jnp.zeros_like(like[0][:, :, 0])
    return (zeros + 1, zeros), (zeros, zeros)


def _compose(product: Pair, last: Pair, *, reverse: bool):
    """Composes the maps of the chunks in order.

    Returns:
      ((products, lasts) [batch, chunks, channels] of the map from the shard's entry to each chunk's entry, and the
      product and last [batch, channels] of the whole shard's map).
    """

    def step(carry, chunk):
        (p, h), (p_chunk, h_chunk) = carry, chunk
        return (multiply(p_chunk, p), add(multiply(p_chunk, h), h_chunk)), carry

    zeros = jnp.zeros_like(product[0][:, 0])
    chunks_first = jax.tree.map(lambda v: jnp.moveaxis(v, 1, 0), (product, last))
    (p, h), starts = jax.lax.scan(step, ((zeros + 1, zeros), (zeros, zeros)), chunks_first, reverse=reverse)
    return jax.tree.map(lambda v: jnp.moveaxis(v, 0, 1), starts), p, h
