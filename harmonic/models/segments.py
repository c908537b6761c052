"""The likelihood of sequences that are too long to be held at once: a model's `apply`, scanned over segments."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from harmonic.models.dropout import Dropout

if TYPE_CHECKING:
    from harmonic.models.base import Model


def nats(
    model: Model,
    weights: Any,
    inputs: dict[str, jax.Array],
    lengths: jax.Array,
    *,
    rng: Dropout | None = None,
    axis: str | None = None,
) -> jax.Array:
    """Negative log-likelihood in nats, summed over this shard's unmasked samples.

    Only the state between segments is kept for the backward pass, which makes the segments' activations again: the
    gradient is exact through any length, in the memory of one segment.

    Args:
      model, weights: as `model.prepare` gives them.
      inputs: "tokens" [segments, batch, segment_length, channels]; other entries [batch, ...] condition the model.
      lengths: [batch], of the whole sequences, in samples.
      rng: of dropout, its `chunk` 0.
      axis: the mesh axis that `segment_length` is cut over, inside `jax.shard_map`.
    """
    conditions = {name: value for name, value in inputs.items() if name != "tokens"}
    tokens = inputs["tokens"]
    segments, batch, local, _ = tokens.shape
    shards, shard = (jax.lax.axis_size(axis), jax.lax.axis_index(axis)) if axis else (1, 0)
    per_segment = local * shards

    def body(state, scanned):
        piece, number = scanned
        chunk = number * (per_segment // model.multiple)
        segment_rng = None if rng is None else rng._replace(chunk=rng.chunk + chunk)
        outputs, state = model.apply(weights, {"tokens": piece, **conditions}, state, rng=segment_rng, axis=axis)
        position = number * per_segment + shard * local + jnp.arange(local)
        mask = position < lengths[:, None]
        return state, -jnp.where(mask, model.log_prob(outputs, piece), 0).sum()

    state = model.init_state(batch, jax.tree.leaves(weights)[0].dtype)
    if segments == 1:
        return body(state, (tokens[0], jnp.int32(0)))[1]
    _, found = jax.lax.scan(jax.checkpoint(body), state, (tokens, jnp.arange(segments)))
    return found.sum()
