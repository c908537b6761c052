"""Dropout whose masks depend neither on the mesh, nor on segments, the order of a batch, or where a run was resumed."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Dropout(NamedTuple):
    """The key of a piece's masks.

    Attributes:
      words: [2] uint32, random bits of the run's seed and step.
      examples: [batch] int32, the number of each row in the global batch.
      chunk: int32, the number of this piece's first chunk in the sequence; a chunk has the model's `multiple` samples.
    """

    words: jax.Array
    examples: jax.Array
    chunk: jax.Array


def dropout(x: jax.Array, rate: float, rng: Dropout | None, block: jax.Array | int, per_chunk: int) -> jax.Array:
    """Drops features of x [batch, time, width] with probability `rate`; none without `rng`.

    Args:
      block: a number of its own for each place in the model.
      per_chunk: steps of x in a chunk.
    """
    if rng is None or rate == 0:
        return x
    batch, time, width = x.shape
    # A hash of (words, block, example, chunk, place) rather than threefry: the masks are made twice a step, and took
    # 10 % of the paper model's step and a third of its compile time where they now take 4 %.
    place = jnp.arange(per_chunk * width, dtype=jnp.uint32)
    chunks = (rng.chunk + jnp.arange(time // per_chunk, dtype=jnp.int32)).astype(jnp.uint32)
    key = _mix(rng.words[0] ^ _mix(rng.words[1] + jnp.asarray(block).astype(jnp.uint32)))
    key = _mix(key + _mix(rng.examples.astype(jnp.uint32))[:, None])
    key = _mix(key + _mix(chunks ^ jnp.uint32(0x9E3779B9))[None])
    bits = _mix(key[..., None] + _mix(place ^ rng.words[1])[None, None]).reshape(batch, time, width)
    keep = bits >= jnp.uint32(min(round(rate * 2**32), 2**32 - 1))
    return jnp.where(keep, x / (1 - rate), jnp.zeros_like(x))


def _mix(x: jax.Array) -> jax.Array:
    """A bijection of uint32 that scatters its input's bits (Wellons' lowbias32)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)
