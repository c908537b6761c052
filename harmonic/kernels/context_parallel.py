"""The exchange between the shards of a sequence.

All functions run inside `jax.shard_map`, where `axis` names the mesh axis that the sequence is cut over; with `axis`
None, or of size one, they move nothing. They are differentiated as parts of the *sum over devices* of each device's own
loss, in which the transpose of a sum over devices is that sum again: use them under `check_vma=False`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from harmonic.kernels.arithmetic import Pair, add, multiply, multiply_conjugate


def broadcast_last(x: jax.Array, axis: str | None) -> jax.Array:
    """The last shard's `x`, on every shard."""
    if axis is None or jax.lax.axis_size(axis) == 1:
        return x
    last = jax.lax.axis_index(axis) == jax.lax.axis_size(axis) - 1
    return jax.lax.psum(jnp.where(last, x, jnp.zeros_like(x)), axis)


def left_halo(tail: jax.Array, carry: jax.Array, axis: str | None) -> tuple[jax.Array, jax.Array]:
    """Hands each shard's `tail` to its right neighbour.

    Args:
      tail: the end of this shard's piece.
      carry: the rows before the first shard's piece, the same on every shard.

    Returns:
      (the rows before this shard's piece; the last shard's tail, which is the next segment's `carry`).
    """
    if axis is None or jax.lax.axis_size(axis) == 1:
        return carry, tail
    size = jax.lax.axis_size(axis)
    arrived = jax.lax.ppermute(tail, axis, [(i, i + 1) for i in range(size - 1)])
    return jnp.where(jax.lax.axis_index(axis) == 0, carry, arrived), broadcast_last(tail, axis)


def exchange_carries(
    product: Pair, last: Pair, carry: Pair, axis: str | None, *, reverse: bool, conjugate: bool = False
) -> tuple[Pair, Pair]:
    """The state that enters this shard, and the one that leaves the whole sequence.

    A shard maps the state h that enters it to `product * h + last`. One all-gather of these two small arrays lets every
    shard compose the maps before it.

    Args:
      product, last: [batch, channels], this shard's map.
      carry: [batch, channels], the state that enters the first shard (the last one if `reverse`).
      conjugate: the map is conj(product) * h + last. Products that were gathered already need not be sent again: XLA
        merges the two gathers.

    Returns:
      (state entering this shard, state leaving the other end), each [batch, channels].
    """
    times = multiply_conjugate if conjugate else multiply
    if axis is None or jax.lax.axis_size(axis) == 1:
        return carry, add(times(product, carry), last)
    gathered = jax.lax.all_gather((product, last), axis)
    index = jax.lax.axis_index(axis)
    entering = carry
    order = range(jax.lax.axis_size(axis))
    for shard in reversed(order) if reverse else order:
        entering = jax.tree.map(lambda now, old, here=shard: jnp.where(index == here, now, old), carry, entering)
        shard_product, shard_last = jax.tree.map(lambda v, i=shard: v[i], gathered)
        carry = add(times(shard_product, carry), shard_last)
    return entering, carry
