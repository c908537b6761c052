"""The selective scan of Mamba (Gu and Dao, arXiv 2312.00752, algorithm 2), real or complex.

    h_t = exp(delta_t a) h_{t-1} + delta_t b_t u_t,  y_t = c_t h_t       for each of `width` channels

The states of all samples are `modes` times as large as the inputs. They are never held: the scan runs over chunks, each
of which is made again for the backward pass, and only the states between chunks are kept.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from harmonic.kernels import linear_scan
from harmonic.kernels.context_parallel import exchange_carries
from harmonic.kernels.dense import beside

_CHUNK = 128  # samples


class Inputs(NamedTuple):
    """What the scan reads.

    Attributes:
      u, delta: [batch, time, width].
      b, c: [batch, time, numbers], as many numbers as a channel's state has: complex modes as their real parts, then
        the imaginary ones.
    """

    u: jax.Array
    delta: jax.Array
    b: jax.Array
    c: jax.Array


def selective_scan(
    inputs: Inputs, a: jax.Array, h0: jax.Array, *, axis: str | None = None
) -> tuple[jax.Array, jax.Array]:
    """The scan over a segment.

    Args:
      inputs: of this shard.
      a: [width, modes], real and negative, or complex with a negative real part: then y_t = 2 Re(c_t h_t).
      h0: [batch, width, numbers], the state before the segment, the same on all shards.
      axis: inside `jax.shard_map`, the mesh axis that time is cut over.

    Returns:
      (y [batch, time, width], the state after the whole sequence).
    """
    if axis is not None and jax.lax.axis_size(axis) > 1:
        # What enters a shard is known once every shard has run from zero: the scan runs twice.
        total = _a_power(a, inputs.delta.sum(1))
        product, last, carry = (_pair(v, a) for v in (total, _run(inputs, a, jnp.zeros_like(h0))[1], h0))
        entering, leaving = exchange_carries(product, last, carry, axis, reverse=False)
        return _run(inputs, a, _joined(entering, a, h0))[0], _joined(leaving, a, h0)
    return _run(inputs, a, h0)


def step(inputs: Inputs, a: jax.Array, h: jax.Array) -> tuple[jax.Array, jax.Array]:
    """One sample: the fields of `inputs` without their axis of time -> (y [batch, width], the state)."""
    u, delta, b, c = inputs
    driven = (delta * u)[..., None]
    if not _complex(a):
        h = _a_power(a, delta) * h + driven * b[:, None]
        return (h * c[:, None]).sum(-1), h
    decay_re, decay_im = jnp.split(_a_power(a, delta), 2, axis=-1)
    (re, im), (b_re, b_im), (c_re, c_im) = (jnp.split(v, 2, axis=-1) for v in (h, b, c))
    re, im = (
        decay_re * re - decay_im * im + driven * b_re[:, None],
        decay_re * im + decay_im * re + driven * b_im[:, None],
    )
    return 2 * (c_re[:, None] * re - c_im[:, None] * im).sum(-1), jnp.concatenate([re, im], axis=-1)


def _complex(a: jax.Array) -> bool:
    return jnp.issubdtype(a.dtype, jnp.complexfloating)


def _a_power(a: jax.Array, delta: jax.Array) -> jax.Array:
    """exp(delta a): [..., width] -> [..., width, numbers]."""
    size = jnp.exp(delta[..., None] * beside(a.real, delta[..., None]))
    if not _complex(a):
        return size
    angle = delta[..., None] * beside(a.imag, delta[..., None])
    return jnp.concatenate([size * jnp.cos(angle), size * jnp.sin(angle)], axis=-1)


def _pair(v: jax.Array, a: jax.Array) -> tuple[jax.Array, jax.Array]:
    """[..., width, numbers] as pairs [..., width modes]."""
    parts = jnp.split(v, 2, axis=-1) if _complex(a) else (v, jnp.zeros_like(v))
    re, im = (part.reshape(*part.shape[:-2], -1) for part in parts)
    return re, im


def _joined(pair: tuple[jax.Array, jax.Array], a: jax.Array, like: jax.Array) -> jax.Array:
    """Undoes `_pair`."""
    parts = [part.reshape(*part.shape[:-1], *a.shape) for part in pair]
    return (jnp.concatenate(parts, axis=-1) if _complex(a) else parts[0]).astype(like.dtype)


def _run(inputs: Inputs, a: jax.Array, h0: jax.Array) -> tuple[jax.Array, jax.Array]:
    batch, time, width = inputs.u.shape
    size = min(_CHUNK, time)
    chunks = -(-time // size)
    # Samples that are filled up have a delta of 0: they leave the state as it is.
    filled = (jnp.pad(v, ((0, 0), (0, chunks * size - time), (0, 0))) for v in inputs)
    cut = Inputs(*(v.reshape(batch, chunks, size, -1).swapaxes(0, 1) for v in filled))

    @jax.checkpoint
    def body(h: jax.Array, piece: Inputs) -> tuple[jax.Array, jax.Array]:
        u, delta, b, c = piece
        added = (delta * u)[..., None] * b[:, :, None]
        states, last = linear_scan(_pair(added, a), _pair(_a_power(a, delta), a), _pair(h, a))
        re, im = (part.reshape(batch, size, *a.shape) for part in states)
        if _complex(a):
            c_re, c_im = jnp.split(c[:, :, None], 2, axis=-1)
            y = 2 * (c_re * re - c_im * im).sum(-1)
        else:
            y = (c[:, :, None] * re).sum(-1)
        return _joined(last, a, h), y

    h, y = jax.lax.scan(body, h0, cut)
    return y.swapaxes(0, 1).reshape(batch, chunks * size, width)[:, :time], h
