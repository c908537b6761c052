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
import optax.contrib
from jax.sharding import Mesh

from harmonic import mesh as meshes
from harmonic.config import Config
from harmonic.errors import check
from harmonic.models.base import Model, ParamGroup, in_precision
from harmonic.models.dropout import Dropout


class TrainState(NamedTuple):
    """Everything that a step changes.

    Attributes:
      params, ema: the weights and their average.
      optimizer: {"adam": optax's state, whichever optimiser it is of, "updates": updates made, "skipped": updates
        skipped, "streak": skipped in a row}.
    """

    params: Any
    ema: Any
    optimizer: Any


def make_optimizer(model: Model, config: Config) -> optax.GradientTransformationExtraArgs:
    """`train.optimizer` behind a clipped gradient, its rates as `schedule` gives them.

    Where the model puts its parameters into several groups, each group has a rate and a weight decay of its own.

    Raises:
      UserError: Muon, for a model that names no matrices.
    """
    train = config.train
    params = jax.eval_shape(model.init, jax.random.key(0))
    if train.optimizer == "muon":
        named = jax.tree.leaves(_matrices(model, params))
        check(bool(named), "train.optimizer", "muon", f"adamw: a {config.model.kind} model names no matrices for Muon")

    def optimizer(group: ParamGroup) -> optax.GradientTransformation:
        rate = train.learning_rate if group.learning_rate is None else group.learning_rate
        decay = train.weight_decay if group.weight_decay is None else group.weight_decay
        if train.optimizer == "adamw":
            return optax.adamw(schedule(config, rate), b1=train.beta1, b2=train.beta2, weight_decay=decay)
        return optax.contrib.muon(
            schedule(config, rate * train.muon_scale),
            weight_decay=decay,
            adam_learning_rate=schedule(config, rate),
            adam_weight_decay=decay,
            adam_b1=train.beta1,
            adam_b2=train.beta2,
            muon_weight_dimension_numbers=functools.partial(_matrices, model),
        )

    labels, groups = model.param_groups(params)
    if len(groups) == 1:
        (group,) = groups.values()
        moves = optimizer(group)
    else:
        moves = optax.multi_transform({name: optimizer(group) for name, group in groups.items()}, labels)
    parts = [optax.clip_by_global_norm(train.clip_norm), moves]
    if train.clip_value:
        parts.insert(1, optax.clip(train.clip_value))
    if train.schedule == "plateau":
        factor, patience, size = train.plateau_factor, train.plateau_patience, train.plateau_every
        parts.append(optax.contrib.reduce_on_plateau(factor=factor, patience=patience, accumulation_size=size))
    return optax.with_extra_args_support(optax.chain(*parts))


def _matrices(model: Model, params: Any) -> Any:
    """The tree of Muon's axes of the parameters that are matrices, None for the others."""

    def axes(path: Any, leaf: Any) -> optax.contrib.MuonDimensionNumbers | None:
        found = model.matrix_axes(jax.tree_util.keystr(path, simple=True, separator="."), leaf.shape)
        return None if found is None else optax.contrib.MuonDimensionNumbers(*found)

    return jax.tree_util.tree_map_with_path(axes, params)


def schedule(config: Config, rate: float) -> optax.Schedule:
    """Step (from 0) -> learning rate: warmed up in equal steps, the first of them above zero, then as
    `train.schedule` says: a fall reaches zero where the step after the last would be."""
    train = config.train
    start = int(train.decay_start * train.steps)

    def at(step: Any) -> Any:
        warm = rate * jnp.minimum(1.0, (step + 1) / max(train.warmup_steps, 1))
        if train.schedule in ("constant", "plateau"):  # a plateau is seen in the loss, by a transformation of its own
            return warm
        done = jnp.clip((step - start) / (train.steps - start), 0.0, 1.0)
        return warm * (1 - done if train.schedule == "linear" else (1 + jnp.cos(math.pi * done)) / 2)

    return at


def init_state(config: Config, model: Model, params: Any = None) -> TrainState:
    """The state before the first step; from fresh parameters of `config.seed` unless some are given."""
    params = model.init(jax.random.key(config.seed)) if params is None else params
    counters = {name: jnp.zeros((), jnp.int32) for name in ("updates", "skipped", "streak")}
    adam = make_optimizer(model, config).init(params)
    return TrainState(params, jax.tree.map(jnp.array, params), {"adam": adam, **counters})


def make_loss_and_grad(model: Model, mesh: Mesh, accumulate: int = 1) -> Callable[..., tuple[jax.Array, Any]]:
    """(params, batch, words) -> (bits per sample, its gradient), on any mesh.

    The batch has "tokens" [segments, batch, segment_length, channels], "length" and "row" [batch], and what else
    conditions the model, each [batch, ...]; words are dropout's, or None. The rows of a device are taken in
    `accumulate` equal parts, one after the other: nats and gradients are sums over samples, so the result is the same.
    """
    axis = meshes.sequence_axis(mesh)

    def part(params, batch, words):
        batch = dict(batch)
        lengths, rows = batch.pop("length"), batch.pop("row")
        rng = None if words is None else Dropout(words, rows, jnp.int32(0))

        def nats(params):
            return model.nats(model.prepare(params), batch, lengths, rng=rng, axis=axis)

        return jax.value_and_grad(nats)(params)

    def cut(value, batch_axis):
        """The rows in `accumulate` parts, along a new first axis."""
        shape = value.shape
        parts = value.reshape(*shape[:batch_axis], accumulate, -1, *shape[batch_axis + 1 :])
        return jnp.moveaxis(parts, batch_axis, 0)

    def local(params, batch, words):
        if accumulate == 1:
            nats, grads = part(params, batch, words)
        else:

            def add(total, piece):
                return jax.tree.map(jnp.add, total, part(params, piece, words)), None

            zero = jnp.zeros((), jax.tree.leaves(params)[0].dtype), jax.tree.map(jnp.zeros_like, params)
            parts = {name: cut(value, int(name == "tokens")) for name, value in batch.items()}
            (nats, grads), _ = jax.lax.scan(add, zero, parts)
        # grad() is taken of each shard's local sum; the psum comes after it, so its transpose never matters.
        nats, grads = jax.lax.psum((nats, grads), (meshes.DATA, meshes.SEQ))
        count = jax.lax.psum(batch["length"].astype(nats.dtype).sum(), meshes.DATA)  # beyond int32
        to_bits = 1 / (math.log(2) * count.astype(nats.dtype))
        return nats * to_bits, jax.tree.map(lambda g: (g * to_bits).astype(g.dtype), grads)

    def loss_and_grad(params, batch, words):
        specs = {name: meshes.TOKENS if name == "tokens" else meshes.ROWS for name in batch}
        in_specs = meshes.REPLICATED, specs, meshes.REPLICATED
        return jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=meshes.REPLICATED, check_vma=False)(
            params, batch, words
        )

    return in_precision(model, loss_and_grad)


def make_train_step(model: Model, config: Config, mesh: Mesh) -> jax.stages.Wrapped:
    """(state, batch, key, step) -> (state, {"loss" in bits per sample, "grad_norm", "skipped", "streak"}), compiled.

    An update whose loss is not finite, or whose gradient's norm is not below `skip_norm`, is skipped: weights, average
    and optimiser stay as they are. The state that is given is donated.
    """
    optimizer, train = make_optimizer(model, config), config.train
    loss_and_grad = make_loss_and_grad(model, mesh, train.accumulate)

    @functools.partial(jax.jit, donate_argnums=0)
    def step_function(state: TrainState, batch: dict[str, jax.Array], key: jax.Array, step: jax.Array):
        words = jax.random.bits(jax.random.fold_in(key, step), (2,), jnp.uint32) if model.random else None
        loss, grads = loss_and_grad(state.params, batch, words)
        norm = optax.tree.norm(grads)
        good = jnp.isfinite(loss) & (norm < train.skip_norm)
        with jax.numpy_dtype_promotion("standard"):  # optax raises a float to its int32 count of updates
            updates, adam = optimizer.update(grads, state.optimizer["adam"], state.params, value=loss)
        params = optax.apply_updates(state.params, updates)
        count = state.optimizer["updates"] + 1
        weight: jax.Array | float = 1 - train.ema_decay
        if train.ema_debias:
            weight = weight / (1 - jax.lax.pow(jnp.float32(train.ema_decay), count))
        ema = jax.tree.map(lambda old, new: old + (weight * (new - old)).astype(old.dtype), state.ema, params)
        kept = {**state.optimizer, "skipped": state.optimizer["skipped"] + 1, "streak": state.optimizer["streak"] + 1}
        moved = {**state.optimizer, "adam": adam, "updates": count, "streak": jnp.zeros((), jnp.int32)}
        new = TrainState(params, ema, moved)
        new = jax.tree.map(lambda a, b: jnp.where(good, a, b), new, state._replace(optimizer=kept))
        metrics = {"loss": loss, "grad_norm": norm, "skipped": new.optimizer["skipped"]}
        return new, {**metrics, "streak": new.optimizer["streak"]}

    return step_function


def step_shapes(model: Model, config: Config, mesh: Mesh) -> tuple[Any, ...]:
    """The arguments of `make_train_step`'s function, shapes with their places on the mesh: it is lowered for these."""

    def shaped(spec: jax.sharding.PartitionSpec, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=meshes.sharding(mesh, spec))

    everywhere = functools.partial(shaped, meshes.REPLICATED)
    state = jax.tree.map(lambda v: everywhere(v.shape, v.dtype), jax.eval_shape(lambda: init_state(config, model)))
    (segments, length), rows = config.segments, config.train.global_batch_size
    tokens = jnp.uint8 if model.num_levels <= 256 else jnp.uint16
    batch = {
        "tokens": shaped(meshes.TOKENS, (segments, rows, length, model.channels), tokens),
        **{name: shaped(meshes.ROWS, (rows,), jnp.int32) for name in ("length", "label", "row")},
    }
    key = jax.eval_shape(lambda: jax.random.key(0))
    return state, batch, everywhere(key.shape, key.dtype), everywhere((), jnp.int32)
