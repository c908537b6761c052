"""HarmonicRNN (arXiv 2510.02401): a U of residual CG-LRU blocks with causal pooling between its levels.

    model = HarmonicRNN(ModelConfig())
    weights = model.prepare(model.init(jax.random.key(0)))
    logits, state = model.apply(weights, {"tokens": tokens}, model.init_state(batch))   # a segment, in parallel
    logits, state = model.step(weights, {}, state)                                      # one sample

A segment is a whole number of pooling products long and starts from any state at such a boundary, so that everything
long is `apply` scanned over segments. `apply` sees the tokens that it predicts, shifted by one: its logits at t depend
on tokens before t alone. Training is generation: both calls give the same logits.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from harmonic import kernels
from harmonic.errors import check
from harmonic.kernels import Pair, kept
from harmonic.kernels.context_parallel import left_halo
from harmonic.kernels.dense import dense, normalise
from harmonic.kernels.plain_step import Dense, step_dense, step_normalise
from harmonic.models import base, logistic
from harmonic.models.base import Inputs, Params
from harmonic.models.costs import Costs
from harmonic.models.dropout import Dropout, dropout
from harmonic.models.harmonic_rnn import fused, layers
from harmonic.models.harmonic_rnn.config import ModelConfig
from harmonic.models.harmonic_rnn.costs import costs

_OPEN = 40.0  # its sigmoid is 1


class State(NamedTuple):
    """All that is kept of the past; the same for segments and for single samples.

    Attributes:
      position: int32, samples since the last pooling boundary: 0 before and after a segment.
      last: [batch, channels] int32, the newest token.
      hidden: complex [blocks, batch, state_width / 2]; in the sampler's loop, by stack, as the kernel takes it.
      pending: for each pooling, [batch, f - 1, width]: outputs of the up-pool that are due at positions 0 .. f - 2.
      collected: for each pooling, [batch, f - 1, width]: inputs of the down-pool seen so far; zeros at a boundary.
    """

    position: jax.Array
    last: jax.Array
    hidden: Any
    pending: tuple[jax.Array, ...]
    collected: tuple[jax.Array, ...]


class Weights(NamedTuple):
    """Parameters as they are multiplied; `HarmonicRNN.prepare` makes them.

    Attributes:
      embedding: its parameters; for the sampler, the table [num_levels, width] of what it gives for each token.
      head: the last layer, behind `normalise`.
      pools: by name, `down_pool_0`, ...
      blocks: along a leading axis; for the sampler, by stack, as the kernel takes them.
    """

    embedding: Any
    head: Dense
    pools: dict[str, Dense]
    blocks: Any


class _Inside(NamedTuple):
    """What a level and those within it keep of the past: `State`'s arrays, `hidden` of their stacks alone."""

    hidden: dict[str, Any]
    pending: tuple[jax.Array, ...]
    collected: tuple[jax.Array, ...]


class _Part:
    """A Flax module as two functions: `init` gives its parameters as a plain dict, `bind` the module with them."""

    def __init__(self, make: Callable[..., nnx.Module]):
        self._make = make
        self._graph, _ = nnx.split(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0))))

    def init(self, key: jax.Array, **initial: Any) -> Params:
        return nnx.to_pure_dict(nnx.state(self._make(rngs=nnx.Rngs(key), **initial), nnx.Param))

    def bind(self, params: Params) -> Any:
        return nnx.merge(self._graph, params)


class Stack(NamedTuple):
    """Blocks that run one after the other at one rate.

    Attributes:
      first, blocks: the number of the first, and how many.
      scale: residual scale of their initial values.
      ranges: of their initial recurrences.
      stride: samples to a step.
      gated: whether their recurrences have gates.
    """

    first: int
    blocks: int
    scale: float
    ranges: layers.Ranges
    stride: int
    gated: bool


class HarmonicRNN(base.Model):
    """The model's functions over a plain dict of parameters; the methods are those of `base.Model`.

    Attributes:
      stacks: the U as a row of stacks, from the way down to the way up: `down_0`, ..., `inner`, ..., `up_0`.
      num_blocks: of all stacks; a block's number is its place in this row.
    """

    config: ModelConfig

    def __init__(self, config: ModelConfig, num_levels: int = 256, channels: int = 1):
        if channels != 1:
            raise ValueError(f"HarmonicRNN models one channel, got {channels}")
        names = kernels.IMPLEMENTATIONS
        check(config.kernel in names, "model.kernel", config.kernel, f"one of {', '.join(names)}")
        super().__init__(config, num_levels, channels)
        self.random = config.dropout > 0 or config.embedding_dropout > 0
        factors, blocks = config.pool_factors, config.level_blocks
        self.embedding = _Part(lambda rngs: layers.EMBEDDINGS[config.embedding](config, num_levels, rngs=rngs))
        self.head = _Part(lambda rngs: layers.Head(config, num_levels, rngs=rngs))
        # Each level adds its residual branches and its skip connection: the more there are, the smaller each begins.
        scales = [1 / (4 * n + 1) for n in blocks[:-1]] + [1 / (2 * blocks[-1])]
        self.pools = {}
        for level, factor in enumerate(factors):
            self.pools[f"down_pool_{level}"] = self._pool(factor, nnx.initializers.lecun_normal())
            self.pools[f"up_pool_{level}"] = self._pool(factor, layers.residual_initializer(scales[level]))
        down = [(f"down_{level}", level) for level in range(len(factors))]
        up = [(f"up_{level}", level) for level in reversed(range(len(factors)))]
        ranges = [(low**2, high**2, angle * math.pi) for low, high, angle in config.level_ranges]
        first, self.stacks = 0, dict[str, Stack]()
        for name, level in [*down, ("inner", len(factors)), *up]:
            stride, gated = math.prod(factors[:level]), config.level_gated[level]
            self.stacks[name] = Stack(first, blocks[level], scales[level], ranges[level], stride, gated)
            first += blocks[level]
        self.num_blocks = first
        self.block = _Part(lambda rngs, ranges=ranges[0]: layers.Block(config, 1.0, ranges, rngs=rngs))

    def _pool(self, factor: int, initializer: Callable[..., jax.Array]) -> _Part:
        return _Part(lambda rngs: layers.Pool(self.config, factor, initializer, rngs=rngs))

    def init(self, key: jax.Array) -> Params:
        """Fresh float32 parameters; all blocks are stacked along a leading axis, as one stack of `num_blocks`."""
        parts = {"embedding": self.embedding, "head": self.head, **self.pools}
        params = {name: part.init(jax.random.fold_in(key, i)) for i, (name, part) in enumerate(parts.items())}
        keys = jax.random.split(jax.random.fold_in(key, len(parts)), self.num_blocks)
        ranges = jnp.array([stack.ranges for stack in self.stacks.values() for _ in range(stack.blocks)])
        blocks = jax.vmap(lambda key, ranges: self.block.init(key, ranges=tuple(ranges)))(keys, ranges)
        scales = jnp.concatenate([jnp.full(stack.blocks, stack.scale) for stack in self.stacks.values()])
        for branch in ("temporal", "mlp"):
            last = blocks[branch]["last"]
            last["kernel"] = last["kernel"] * jnp.sqrt(scales)[:, None, None]
        return {**params, "blocks": blocks}

    def prepare(self, params: Params) -> Weights:
        """Layers that read the same input as one matrix, LayerNorms and gates folded into it."""
        return Weights(
            embedding=params["embedding"],
            head=fused.fuse_head(self.head.bind(params["head"])),
            pools={
                name: fused.fuse_pool(part.bind(params[name]), up="up" in name) for name, part in self.pools.items()
            },
            blocks=jax.vmap(lambda block: fused.fuse_block(self.block.bind(block)))(self.open_gates(params["blocks"])),
        )

    def open_gates(self, blocks: Params) -> Params:
        """The blocks' parameters, with constants for those of gates that are held open."""
        flags = [stack.gated for stack in self.stacks.values() for _ in range(stack.blocks)]
        if all(flags):
            return blocks

        def held(path: Any, leaf: jax.Array) -> jax.Array:
            names = [getattr(key, "key", None) for key in path]
            if not {"input_gate", "recurrence_gate"} & set(names):
                return leaf
            constant = _OPEN if names[-1] == "bias" else 0.0
            gated = jnp.array(flags).reshape(-1, *(1,) * (leaf.ndim - 1))
            return jnp.where(gated, leaf, jnp.full_like(leaf, constant))

        return jax.tree_util.tree_map_with_path(held, blocks)

    def init_state(self, batch: int, dtype: jnp.dtype = jnp.float32) -> State:
        """The state before a recording: no past, and the middle token (128 of 256) for the newest."""
        width, channels = self.config.width, self.config.state_width // 2
        zeros = jnp.zeros((self.num_blocks, batch, channels), dtype)
        edges = tuple(jnp.zeros((batch, factor - 1, width), dtype) for factor in self.config.pool_factors)
        return State(
            position=jnp.zeros((), jnp.int32),
            last=jnp.full((batch, self.channels), self.num_levels // 2, jnp.int32),
            hidden=(zeros, zeros),
            pending=edges,
            collected=edges,
        )

    def apply(
        self, weights: Weights, inputs: Inputs, state: State, *, rng: Dropout | None = None, axis: str | None = None
    ) -> tuple[jax.Array, State]:
        """The outputs of a segment, [batch, time, channels, ...], and the state after it; as `base.Model.apply`.

        Raises:
          ValueError: a length that pooling does not divide.
        """
        tokens = inputs["tokens"].astype(jnp.int32)
        time = tokens.shape[1]
        if time == 0 or time % self.multiple:
            raise ValueError(f"a segment of {time} samples is not a multiple of the pooling product {self.multiple}")
        before, last = left_halo(tokens[:, -1], state.last, axis)
        tokens = jnp.concatenate([before[:, None], tokens[:, :-1]], axis=1)
        if rng is not None and axis is not None:
            rng = rng._replace(chunk=rng.chunk + jax.lax.axis_index(axis) * (time // self.multiple))
        x = self._embed(weights, tokens, rng)
        x = x.astype(jnp.bfloat16) if self.config.activations == "bfloat16" else x
        stacks = self.cut((weights.blocks, state.hidden))
        hidden: dict[str, Pair] = {}
        pending: list[jax.Array] = []
        skips = []
        for level, factor in enumerate(self.config.pool_factors):
            x, hidden[f"down_{level}"] = self._run(f"down_{level}", x, stacks, rng, axis)
            skips.append(x)
            x = fused.pool_down(weights.pools[f"down_pool_{level}"], x, factor)
        x, hidden["inner"] = self._run("inner", x, stacks, rng, axis)
        for level, factor in reversed(list(enumerate(self.config.pool_factors))):
            raw = fused.pool_up(weights.pools[f"up_pool_{level}"], x, factor)
            edge = factor - 1
            due, carry = left_halo(raw[:, -edge:].astype(state.pending[level].dtype), state.pending[level], axis)
            pending.insert(0, carry)
            x = jnp.concatenate([due.astype(raw.dtype), raw[:, :-edge]], axis=1) + skips[level]
            x, hidden[f"up_{level}"] = self._run(f"up_{level}", x, stacks, rng, axis)
        outputs = dense(normalise(x.astype(weights.head.kernel.dtype)), *weights.head)
        return self._outputs(outputs, tokens[..., 0]), State(
            state.position, last, self.join(hidden), tuple(pending), state.collected
        )

    def _outputs(self, head: jax.Array, before: jax.Array) -> jax.Array:
        """What the head gives, [..., outputs], after tokens [...], as `log_prob` takes it: [..., 1, outputs]."""
        if self.config.head == "logistic":
            head = logistic.around(head, before, self.num_levels)
        return head[..., None, :]

    def log_prob(self, outputs: jax.Array, tokens: jax.Array) -> jax.Array:
        """As `base.Model.log_prob`, by the config's head."""
        if self.config.head == "categorical":
            return super().log_prob(outputs, tokens)
        return logistic.log_prob(outputs, tokens, self.num_levels)

    def sample(
        self,
        outputs: jax.Array,
        uniform: jax.Array,
        *,
        temperature: float | jax.Array = 1.0,
        top_p: float | jax.Array = 1.0,
    ) -> jax.Array:
        """As `base.Model.sample`, by the config's head."""
        if self.config.head == "categorical":
            return super().sample(outputs, uniform, temperature=temperature, top_p=top_p)
        return logistic.sample(outputs, uniform, self.num_levels, temperature=temperature, top_p=top_p)

    def cut(self, tree: Any) -> dict[str, Any]:
        """Arrays over all blocks, cut into the stacks. The transpose of a split is one concatenation."""
        leaves, treedef = jax.tree.flatten(tree)
        sizes = [stack.blocks for stack in self.stacks.values()]
        pieces = [jax.lax.split(leaf, sizes) for leaf in leaves]
        return {name: jax.tree.unflatten(treedef, [p[i] for p in pieces]) for i, name in enumerate(self.stacks)}

    def join(self, stacks: dict[str, Any]) -> Any:
        """Undoes `cut`."""
        return jax.tree.map(lambda *parts: jnp.concatenate(parts), *(stacks[name] for name in self.stacks))

    def _run(self, name: str, x: jax.Array, stacks: dict[str, Any], rng: Dropout | None, axis: str | None):
        stack, config = self.stacks[name], self.config

        # Only the input of each block is kept for the backward pass, and what `kept` names.
        @functools.partial(jax.checkpoint, policy=kept.POLICY)
        def body(x, scanned):
            (block, h0), number = scanned
            per_chunk = self.multiple // stack.stride
            return fused.run_block(
                block, x, h0, kernel=config.kernel, rate=config.dropout, rng=rng, number=number, per_chunk=per_chunk,
                axis=axis,
            )  # fmt: skip

        return jax.lax.scan(body, x, (stacks[name], stack.first + jnp.arange(stack.blocks)))

    def _embed(self, weights: Weights, tokens: jax.Array, rng: Dropout | None) -> jax.Array:
        x = self.embedding.bind(weights.embedding)(tokens[..., 0], weights.head.kernel.dtype)
        return dropout(x, self.config.embedding_dropout, rng, 2 * self.num_blocks, self.multiple)

    def step(self, weights: Weights, inputs: Inputs, state: State) -> tuple[jax.Array, State]:
        """The outputs of the next sample, [batch, 1, channels, ...], and the state; as `base.Model.step`.

        Levels run at their own rates: an inner one only when its down-pool is complete.
        """
        sampler = self.sampler()
        if not isinstance(weights.blocks, dict):
            weights = sampler.arrange(weights)
        if not isinstance(state.hidden, dict):
            logits, state = self.step(weights, inputs, sampler.enter(state))
            return logits, sampler.leave(state)
        factors, hidden = self.config.pool_factors, state.hidden
        blocks = sampler.blocks(weights.head.kernel.dtype)

        def run(name: str, x: jax.Array, inside: _Inside) -> tuple[jax.Array, Any]:
            return blocks.run(weights.blocks[name], x, inside.hidden[name])

        def descend(level: int, x: jax.Array, inside: _Inside) -> tuple[jax.Array, _Inside]:
            """The levels from `level` inwards, which see nothing of the ones around them."""
            if level == len(factors):
                x, inner = run("inner", x, inside)
                return x, inside._replace(hidden={"inner": inner})
            down, up = f"down_{level}", f"up_{level}"
            x, before = run(down, x, inside)
            factor = factors[level]
            place = (state.position // math.prod(factors[:level])) % factor
            complete = place == factor - 1
            pending, collected = inside.pending[0], inside.collected[0]
            deeper = _Inside(
                {name: h for name, h in inside.hidden.items() if name not in (down, up)},
                inside.pending[1:],
                inside.collected[1:],
            )
            due = jax.lax.dynamic_index_in_dim(pending, jnp.minimum(place, factor - 2), 1, keepdims=False)

            def turn(_: Any, carry: Any) -> Any:
                _, (_, collected, deeper) = carry
                window = jnp.concatenate([collected, x[:, None]], axis=1)
                pooled = fused.pool_down(weights.pools[f"down_pool_{level}"], window, factor)[:, 0]
                inner, deeper = descend(level + 1, pooled, deeper)
                raw = fused.pool_up(weights.pools[f"up_pool_{level}"], inner[:, None], factor)
                return raw[:, 0], (raw[:, 1:], jnp.zeros_like(collected), deeper)

            # A loop of 0 or 1 trips instead of lax.cond: XLA copies a cond's pass-through operands, but updates a
            # loop's carry in place.
            carry = due, (pending, collected, deeper)
            due, (pending, collected, deeper) = jax.lax.fori_loop(0, complete.astype(jnp.int32), turn, carry)
            newest = jnp.where(complete, jnp.zeros_like(x), x)
            collected = jax.lax.dynamic_update_index_in_dim(collected, newest, jnp.minimum(place, factor - 2), 1)
            x, after = run(up, x + due, inside)
            found = {down: before, **deeper.hidden, up: after}
            return x, _Inside(found, (pending, *deeper.pending), (collected, *deeper.collected))

        x = weights.embedding[state.last[:, 0]]
        x, inside = descend(0, x, _Inside(hidden, state.pending, state.collected))
        position = (state.position + 1) % self.multiple
        outputs = step_dense(step_normalise(x), weights.head)
        return self._outputs(outputs, state.last[:, 0])[:, None], State(position, state.last, *inside)

    def observe(self, state: State, tokens: jax.Array) -> State:
        """The state once the sample that `step` predicted is known: tokens [batch, channels]."""
        return state._replace(last=tokens.astype(jnp.int32))

    def sampler(self) -> Sampler:
        """With the blocks arranged for the step's kernel."""
        return Sampler(self)

    def matrix_axes(self, name: str, shape: tuple[int, ...]) -> tuple[int, int] | None:
        """The kernels of the blocks, the gates' small ones among them."""
        return (len(shape) - 2, len(shape) - 1) if name.endswith("kernel") and name.startswith("blocks.") else None

    def costs(self, segments: int = 1) -> Costs:
        """As `harmonic_rnn.costs.costs`."""
        return costs(self.config, self.num_levels, jax.eval_shape(self.init, jax.random.key(0)), segments)


class Sampler(base.Sampler):
    """Weights and states by stack, as the kernel for a single sample takes them."""

    model: HarmonicRNN

    def blocks(self, dtype: jnp.dtype) -> kernels.BlockStep:
        """The kernel that runs a stack of blocks for one sample."""
        config = self.model.config
        return kernels.block_step(config.width, config.state_width // 2, dtype, implementation=config.kernel)

    def prepare(self, params: Params) -> Weights:
        """Weights as the loop reads them; made once."""
        return self.arrange(self.model.prepare(params))

    def arrange(self, weights: Weights) -> Weights:
        """What `HarmonicRNN.prepare` gives, with blocks packed by stack and the embedding as a table."""
        model, blocks = self.model, self.blocks(weights.head.kernel.dtype)
        packed = {name: blocks.pack(stack) for name, stack in model.cut(weights.blocks).items()}
        table = model._embed(weights, jnp.arange(model.num_levels)[:, None, None], None)[:, 0]
        return weights._replace(blocks=packed, embedding=table)

    def enter(self, state: State) -> State:
        """The state with `hidden` by stack."""
        blocks = self.blocks(state.hidden[0].dtype)
        return state._replace(hidden={name: blocks.unstack(h) for name, h in self.model.cut(state.hidden).items()})

    def leave(self, carry: State) -> State:
        """Undoes `enter`."""
        blocks = self.blocks(jax.tree.leaves(carry.hidden)[0].dtype)
        return carry._replace(hidden=self.model.join({name: blocks.stack(h) for name, h in carry.hidden.items()}))

    def helper(self, weights: Weights) -> contextlib.AbstractContextManager[Any]:
        """Lets an idle core do half of another's work, where the kernel can share it."""
        return self.blocks(weights.head.kernel.dtype).helper()


make = HarmonicRNN
