"""One training step: the loss over segments, its gradient on a mesh, and the update.

The loss that is differentiated is in bits per sample over unmasked samples. The whole step runs under one
`jax.shard_map` over the mesh ("data", "seq"); one device is the 1 x 1 mesh.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from harmonic import mesh as meshes
from harmonic.config import Config
from harmonic.models import Dropout, HarmonicRNN


class TrainState(NamedTuple):
    """Everything that a step changes.

    Attributes:
      params, ema: the weights and their average.
      optimizer: {"adam": optax's state, "updates": updates made, "skipped": updates skipped, "streak": of them on end}.
    """

    params: Any
    ema: Any
    optimizer: Any


def make_optimizer(config: Config) -> optax.GradientTransformation:
    """AdamW behind a clipped gradient, its learning rate constant after a linear warm-up."""
    train = config.train
    return optax.chain(
        optax.clip_by_global_norm(train.clip_norm),
        optax.adamw(learning_rate(config), b1=train.beta1, b2=train.beta2, weight_decay=train.weight_decay),
    )


def learning_rate(config: Config) -> optax.Schedule:
    """Step (from 0) -> learning rate: reached in `warmup_steps` equal steps, the first of them above zero."""
    rate, warmup = config.train.learning_rate, config.train.warmup_steps
    return lambda step: rate * jnp.minimum(1.0, (step + 1) / max(warmup, 1))


def init_state(config: Config, model: HarmonicRNN, params: Any = None) -> TrainState:
    """The state before the first step; from fresh parameters of `config.seed` unless some are given."""
    params = model.init(jax.random.key(config.seed)) if params is None else params
    counters = {name: jnp.zeros((), jnp.int32) for name in ("updates", "skipped", "streak")}
    adam = make_optimizer(config).init(params)
    return TrainState(params, jax.tree.map(jnp.array, params), {"adam": adam, **counters})


def nats_over_segments(
    model: HarmonicRNN, params: Any, tokens: jax.Array, lengths: jax.Array, rng: Dropout | None, axis: str | None
) -> jax.Array:
    """Negative log-likelihood in nats, summed over this shard's unmasked samples.

    The segments are scanned, the state carried. Only the state between segments is kept for the backward pass, which
    makes the segments' activations again: the gradient is exact through any length, in the memory of one segment.

    Args:
      tokens: [segments, batch, segment_length, channels].
      lengths: [batch], of the whole sequences.
      rng: of dropout, its `chunk` 0.
      axis: the mesh axis that `segment_length` is cut over, inside `jax.shard_map`.
    """
    weights = model.fuse(params)  # once for all segments
    segments, batch, local, _ = tokens.shape
    shards, shard = (jax.lax.axis_size(axis), jax.lax.axis_index(axis)) if axis else (1, 0)
    per_segment = local * shards

    def body(state, scanned):
        piece, number = scanned
        chunk = number * (per_segment // model.multiple)
        segment_rng = None if rng is None else rng._replace(chunk=rng.chunk + chunk)
        outputs, state = model.apply(weights, {"tokens": piece}, state, rng=segment_rng, axis=axis)
        position = number * per_segment + shard * local + jnp.arange(local)
        mask = position < lengths[:, None]
        return state, -jnp.where(mask, model.log_prob(outputs, piece), 0).sum()

    dtype = jax.tree.leaves(params)[0].dtype
    state = model.init_state(batch, dtype)
    if segments == 1:
        return body(state, (tokens[0], jnp.int32(0)))[1]
    _, nats = jax.lax.scan(jax.checkpoint(body), state, (tokens, jnp.arange(segments)))
    return nats.sum()


def make_loss_and_grad(model: HarmonicRNN, mesh: Mesh, accumulate: int = 1) -> Callable[..., tuple[jax.Array, Any]]:
    """(params, tokens, lengths, rows, words) -> (bits per sample, its gradient), on any mesh.

    tokens is [segments, batch, segment_length, channels], lengths and rows [batch]; words are dropout's, or None. The
    rows of a device are taken in `accumulate` equal parts, one behind the other: nats and gradients are sums over
    samples, so that the result is the same.
    """
    axis = meshes.sequence_axis(mesh)

    def part(params, tokens, lengths, rows, words):
        rng = None if words is None else Dropout(words, rows, jnp.int32(0))
        return jax.value_and_grad(lambda p: nats_over_segments(model, p, tokens, lengths, rng, axis))(params)

    def local(params, tokens, lengths, rows, words):
        if accumulate == 1:
            nats, grads = part(params, tokens, lengths, rows, words)
        else:
            segments, batch, *rest = tokens.shape
            parts = tokens.reshape(segments, accumulate, batch // accumulate, *rest).swapaxes(0, 1)

            def add(total, scanned):
                piece, its_lengths, its_rows = scanned
                return jax.tree.map(jnp.add, total, part(params, piece, its_lengths, its_rows, words)), None

            zero = jnp.zeros((), jax.tree.leaves(params)[0].dtype), jax.tree.map(jnp.zeros_like, params)
            scanned = (parts, *(v.reshape(accumulate, -1) for v in (lengths, rows)))
            (nats, grads), _ = jax.lax.scan(add, zero, scanned)
        # What is differentiated is each shard's own sum: sums over shards stand outside, once each.
        nats, grads = jax.lax.psum((nats, grads), (meshes.DATA, meshes.SEQ))
        count = jax.lax.psum(lengths.sum(), meshes.DATA)
        to_bits = 1 / (math.log(2) * count)
        return nats * to_bits, jax.tree.map(lambda g: (g * to_bits).astype(g.dtype), grads)

    specs = (meshes.REPLICATED, meshes.TOKENS, meshes.ROWS, meshes.ROWS, meshes.REPLICATED)
    return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=meshes.REPLICATED, check_vma=False)


def make_train_step(model: HarmonicRNN, config: Config, mesh: Mesh) -> jax.stages.Wrapped:
    """(state, batch, key, step) -> (state, {"loss" in bits per sample, "grad_norm", "skipped", "streak"}), compiled.

    An update whose loss is not finite, or whose gradient's norm is not below `skip_norm`, is skipped: weights, average
    and optimiser stay as they are. The state that is given is donated.
    """
    optimizer, train = make_optimizer(config), config.train
    loss_and_grad = make_loss_and_grad(model, mesh, train.accumulate)

    @functools.partial(jax.jit, donate_argnums=0)
    def step_function(state: TrainState, batch: dict[str, jax.Array], key: jax.Array, step: jax.Array):
        use_dropout = config.model.dropout > 0 or config.model.embedding_dropout > 0
        words = jax.random.bits(jax.random.fold_in(key, step), (2,), jnp.uint32) if use_dropout else None
        loss, grads = loss_and_grad(state.params, batch["tokens"], batch["length"], batch["row"], words)
        norm = optax.tree.norm(grads)
        good = jnp.isfinite(loss) & (norm < train.skip_norm)
        updates, adam = optimizer.update(grads, state.optimizer["adam"], state.params)
        params = optax.apply_updates(state.params, updates)
        count = state.optimizer["updates"] + 1
        weight = 1 - train.ema_decay
        if train.ema_debias:
            weight = weight / (1 - jnp.float32(train.ema_decay) ** count)
        ema = jax.tree.map(lambda old, new: old + (weight * (new - old)).astype(old.dtype), state.ema, params)
        kept = {**state.optimizer, "skipped": state.optimizer["skipped"] + 1, "streak": state.optimizer["streak"] + 1}
        moved = {**state.optimizer, "adam": adam, "updates": count, "streak": jnp.zeros((), jnp.int32)}
        new = TrainState(params, ema, moved)
        new = jax.tree.map(lambda a, b: jnp.where(good, a, b), new, state._replace(optimizer=kept))
        metrics = {"loss": loss, "grad_norm": norm, "skipped": new.optimizer["skipped"]}
        return new, {**metrics, "streak": new.optimizer["streak"]}

    return step_function
