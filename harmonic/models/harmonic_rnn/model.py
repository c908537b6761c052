"""HarmonicRNN (arXiv 2510.02401): a U of residual CG-LRU blocks with causal pooling between its levels.

    model = HarmonicRNN(ModelConfig())
    params = model.init(jax.random.key(0))
    logits, state = model.apply(params, {"tokens": tokens}, model.init_state(batch))   # a segment, in parallel
    logits, state = model.step(params, {}, state)                                      # one sample

A segment is a whole number of pooling products long and starts from any state at such a boundary, so that everything
long is `apply` scanned over segments. `apply` sees the tokens that it predicts, shifted by one: its logits at t depend
on tokens before t alone. Training is generation: both calls give the same logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from harmonic.config import ModelConfig
from harmonic.kernels import BlockStep, Pair, block_step
from harmonic.kernels.context_parallel import left_halo
from harmonic.kernels.plain_step import step_dense, step_normalise
from harmonic.models.harmonic_rnn import layers
from harmonic.models.harmonic_rnn.layers import Dropout

Params = dict[str, Any]
Inputs = dict[str, jax.Array]

__all__ = ["Dropout", "HarmonicRNN", "Params", "State", "Weights"]


class State(NamedTuple):
    """All that the past leaves behind; the same for segments and for single samples.

    Attributes:
      position: int32, samples since the last pooling boundary: 0 before and after a segment.
      last: [batch, channels] int32, the newest token.
      hidden: complex [blocks, batch, state_width / 2]; unstacked, by stack, as `kernels.block_step` takes it.
      pending: for each pooling, [batch, f - 1, width]: outputs of the up-pool that are due at positions 0 .. f - 2.
      collected: for each pooling, [batch, f - 1, width]: inputs of the down-pool seen so far; zeros at a boundary.
    """

    position: jax.Array
    last: jax.Array
    hidden: Any
    pending: tuple[jax.Array, ...]
    collected: tuple[jax.Array, ...]


class Weights(NamedTuple):
    """Parameters as they are multiplied; `HarmonicRNN.fuse` makes them.

    Attributes:
      embedding: its parameters; unstacked, the table [num_levels, width] of what it gives for each token.
      head: the layer to logits, behind `normalise`.
      pools: by name, `down_pool_0`, ...
      blocks: along a leading axis; unstacked, by stack, as `kernels.block_step` takes them.
    """

    embedding: Any
    head: layers.Dense
    pools: dict[str, layers.Dense]
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

    def init(self, key: jax.Array) -> Params:
        return nnx.to_pure_dict(nnx.state(self._make(rngs=nnx.Rngs(key)), nnx.Param))

    def bind(self, params: Params) -> Any:
        return nnx.merge(self._graph, params)


class _Stack(NamedTuple):
    """Blocks that run one behind the other at one rate.

    Attributes:
      first, blocks: the number of the first, and how many.
      scale: residual scale of their initial values.
      stride: samples to a step.
    """

    first: int
    blocks: int
    scale: float
    stride: int


class HarmonicRNN:
    """The model's functions over a plain dict of parameters. Stateless and cheap to make.

    Attributes:
      config: its sizes.
      num_levels: levels of a token, and logits a sample.
      channels: audio channels; one.
      multiple: segments are multiples of this many samples (the pooling product).
    """

    def __init__(self, config: ModelConfig, num_levels: int = 256, channels: int = 1):
        if channels != 1:
            raise ValueError(f"HarmonicRNN models one channel, got {channels}")
        self.config, self.num_levels, self.channels = config, num_levels, channels
        self.multiple = config.pooling_product
        factors, blocks = config.pool_factors, config.level_blocks
        self._embedding = _Part(lambda rngs: layers.EMBEDDINGS[config.embedding](config, num_levels, rngs=rngs))
        self._head = _Part(lambda rngs: layers.Head(config, num_levels, rngs=rngs))
        # Each level adds its residual branches and its skip connection: the scale of what is added falls with them.
        scales = [1 / (4 * n + 1) for n in blocks[:-1]] + [1 / (2 * blocks[-1])]
        self._pools = {}
        for level, factor in enumerate(factors):
            self._pools[f"down_pool_{level}"] = self._pool(factor, nnx.initializers.lecun_normal())
            self._pools[f"up_pool_{level}"] = self._pool(factor, layers.residual_initializer(scales[level]))
        # The U as a row of stacks, from the way down to the way up; a block's number is its place in this row.
        down = [(f"down_{level}", level) for level in range(len(factors))]
        up = [(f"up_{level}", level) for level in reversed(range(len(factors)))]
        first, self._stacks = 0, dict[str, _Stack]()
        for name, level in [*down, ("inner", len(factors)), *up]:
            self._stacks[name] = _Stack(first, blocks[level], scales[level], math.prod(factors[:level]))
            first += blocks[level]
        self.num_blocks = first
        self._block = _Part(lambda rngs: layers.Block(config, 1.0, rngs=rngs))

    def _pool(self, factor: int, initializer: Callable[..., jax.Array]) -> _Part:
        return _Part(lambda rngs: layers.Pool(self.config, factor, initializer, rngs=rngs))

    def init(self, key: jax.Array) -> Params:
        """Fresh float32 parameters; all blocks lie along a leading axis, as one stack of `num_blocks`."""
        parts = {"embedding": self._embedding, "head": self._head, **self._pools}
        params = {name: part.init(jax.random.fold_in(key, i)) for i, (name, part) in enumerate(parts.items())}
        blocks = jax.vmap(self._block.init)(jax.random.split(jax.random.fold_in(key, len(parts)), self.num_blocks))
        scales = jnp.concatenate([jnp.full(stack.blocks, stack.scale) for stack in self._stacks.values()])
        for branch in ("temporal", "mlp"):
            last = blocks[branch]["last"]
            last["kernel"] = last["kernel"] * jnp.sqrt(scales)[:, None, None]
        return {**params, "blocks": blocks}

    def fuse(self, params: Params | Weights) -> Weights:
        """Layers that read the same input side by side, LayerNorms and gates within them.

        `apply` and `step` do it for whoever does not; it pays to do it once for many calls.
        """
        if isinstance(params, Weights):
            return params
        return Weights(
            embedding=params["embedding"],
            head=self._head.bind(params["head"]).fuse(),
            pools={name: part.bind(params[name]).fuse(up="up" in name) for name, part in self._pools.items()},
            blocks=jax.vmap(lambda block: self._block.bind(block).fuse())(params["blocks"]),
        )

    def block_step(self, dtype: jnp.dtype) -> BlockStep:
        """How `step` runs its blocks, whose weights and states are of this type."""
        return block_step(self.config.width, self.config.state_width // 2, dtype)

    def unstack(self, params: Params | Weights) -> Weights:
        """Weights as `step` wants them inside a loop, so that the loop need not arrange them for every sample: blocks
        by stack, packed for machine code or one by one, and the embedding as a table."""
        weights = self.fuse(params)
        if isinstance(weights.blocks, dict):
            return weights
        pack = self.block_step(weights.head.kernel.dtype).pack
        blocks = {name: pack(stack) for name, stack in self._cut(weights.blocks).items()}
        table = self._embed(weights, jnp.arange(self.num_levels)[:, None, None], None)[:, 0]
        return weights._replace(blocks=blocks, embedding=table)

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

    def state_bytes(self, batch: int = 1) -> int:
        """Bytes of a state: constant in the length of the past."""
        state = jax.eval_shape(lambda: self.init_state(batch))
        return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))

    def apply(
        self,
        params: Params | Weights,
        inputs: Inputs,
        state: State,
        *,
        rng: Dropout | None = None,
        axis: str | None = None,
    ) -> tuple[jax.Array, State]:
        """Logits of a segment.

        Args:
          params: as `init`, or `fuse`, gives them.
          inputs: `tokens` [batch, time, channels], the tokens to predict; time a multiple of `multiple`.
          state: at a pooling boundary.
          rng: of dropout; without it there is none.
          axis: inside `jax.shard_map`, the mesh axis over which time is cut.

        Returns:
          (logits [batch, time, channels, num_levels], state after the segment).

        Raises:
          ValueError: a length that pooling does not divide.
        """
        weights = self.fuse(params)
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
        stacks = self._cut((weights.blocks, state.hidden))
        hidden: dict[str, Pair] = {}
        pending: list[jax.Array] = []
        skips = []
        for level in range(len(self.config.pool_factors)):
            x, hidden[f"down_{level}"] = self._run(f"down_{level}", x, stacks, rng, axis)
            skips.append(x)
            x = layers.pool_down(weights.pools[f"down_pool_{level}"], x, self.config.pool_factors[level])
        x, hidden["inner"] = self._run("inner", x, stacks, rng, axis)
        for level in reversed(range(len(self.config.pool_factors))):
            factor = self.config.pool_factors[level]
            raw = layers.pool_up(weights.pools[f"up_pool_{level}"], x, factor)
            edge = factor - 1
            due, carry = left_halo(raw[:, -edge:].astype(state.pending[level].dtype), state.pending[level], axis)
            pending.insert(0, carry)
            x = jnp.concatenate([due.astype(raw.dtype), raw[:, :-edge]], axis=1) + skips[level]
            x, hidden[f"up_{level}"] = self._run(f"up_{level}", x, stacks, rng, axis)
        joined = jax.tree.map(lambda *parts: jnp.concatenate(parts), *(hidden[name] for name in self._stacks))
        return self._logits(weights, x), State(state.position, last, joined, tuple(pending), state.collected)

    def _cut(self, tree: Any) -> dict[str, Any]:
        """Arrays over all blocks, cut into the stacks. The transpose of a split is one concatenation."""
        leaves, treedef = jax.tree.flatten(tree)
        sizes = [stack.blocks for stack in self._stacks.values()]
        pieces = [jax.lax.split(leaf, sizes) for leaf in leaves]
        return {name: jax.tree.unflatten(treedef, [p[i] for p in pieces]) for i, name in enumerate(self._stacks)}

    def _run(self, name: str, x: jax.Array, stacks: dict[str, Any], rng: Dropout | None, axis: str | None):
        stack = self._stacks[name]

        # Only the input of each block is kept for the backward pass.
        @jax.checkpoint
        def body(x, scanned):
            (block, h0), number = scanned
            per_chunk = self.multiple // stack.stride
            return layers.run_block(
                block, x, h0, rate=self.config.dropout, rng=rng, number=number, per_chunk=per_chunk, axis=axis
            )

        return jax.lax.scan(body, x, (stacks[name], stack.first + jnp.arange(stack.blocks)))

    def _embed(self, weights: Weights, tokens: jax.Array, rng: Dropout | None) -> jax.Array:
        x = self._embedding.bind(weights.embedding)(tokens[..., 0], weights.head.kernel.dtype)
        return layers.dropout(x, self.config.embedding_dropout, rng, 2 * self.num_blocks, self.multiple)

    def _logits(self, weights: Weights, x: jax.Array) -> jax.Array:
        x = x.astype(weights.head.kernel.dtype)
        return layers.dense(layers.normalise(x), *weights.head)[:, :, None]

    def step(self, params: Params | Weights, inputs: Inputs, state: State) -> tuple[jax.Array, State]:
        """Logits of the next sample.

        Levels run at their own rates: an inner one only when its down-pool is complete.

        Args:
          params: as `init`, `fuse` or `unstack` gives them.
          inputs: whatever conditions the model; nothing here.
          state: at any position, its `last` the newest token.

        Returns:
          (logits [batch, 1, channels, num_levels], state; its `last` is for the caller to set, by `observe`).
        """
        weights = self.unstack(params)
        if not isinstance(state.hidden, dict):
            logits, state = self.step(weights, inputs, self.unstack_state(state))
            return logits, self.stack_state(state)
        factors, hidden = self.config.pool_factors, state.hidden

        def run(name: str, x: jax.Array, inside: _Inside) -> tuple[jax.Array, Any]:
            return self.block_step(x.dtype).run(weights.blocks[name], x, inside.hidden[name])

        def descend(level: int, x: jax.Array, inside: _Inside) -> tuple[jax.Array, _Inside]:
            """The levels from `level` inwards, which see nothing of the ones around them."""
            if level == len(factors):
                x, hidden = run("inner", x, inside)
                return x, inside._replace(hidden={"inner": hidden})
            ends = down, up = f"down_{level}", f"up_{level}"
            x, before = run(down, x, inside)
            factor = factors[level]
            place = (state.position // math.prod(factors[:level])) % factor
            hidden = {name: h for name, h in inside.hidden.items() if name not in ends}
            within = _Inside(hidden, inside.pending[1:], inside.collected[1:])
            kept = pending, collected, within = inside.pending[0], inside.collected[0], within
            complete = place == factor - 1
            due = jax.lax.dynamic_index_in_dim(pending, jnp.minimum(place, factor - 2), 1, keepdims=False)

            def turn(_: Any, carry: Any):
                _, (_, collected, within) = carry
                window = jnp.concatenate([collected, x[:, None]], axis=1)
                pooled = layers.pool_down(weights.pools[f"down_pool_{level}"], window, factor)[:, 0]
                inner, within = descend(level + 1, pooled, within)
                raw = layers.pool_up(weights.pools[f"up_pool_{level}"], inner[:, None], factor)
                return raw[:, 0], (raw[:, 1:], jnp.zeros_like(collected), within)

            # One round or none: what a conditional lets pass through, it copies.
            due, kept = jax.lax.fori_loop(0, complete.astype(jnp.int32), turn, (due, kept))
            pending, collected, within = kept
            newest = jnp.where(complete, jnp.zeros_like(x), x)
            collected = jax.lax.dynamic_update_index_in_dim(collected, newest, jnp.minimum(place, factor - 2), 1)
            x, after = run(up, x + due, inside)
            hidden = {down: before, **within.hidden, up: after}
            return x, _Inside(hidden, (pending, *within.pending), (collected, *within.collected))

        x = weights.embedding[state.last[:, 0]]
        x, inside = descend(0, x, _Inside(hidden, state.pending, state.collected))
        position = (state.position + 1) % self.multiple
        logits = step_dense(step_normalise(x), weights.head)
        return logits[:, None, None], State(position, state.last, *inside)

    def unstack_state(self, state: State) -> State:
        """The state with `hidden` by stack: what `step` wants inside a loop, as it does unstacked weights."""
        unstack = self.block_step(state.hidden[0].dtype).unstack
        return state._replace(hidden={name: unstack(h) for name, h in self._cut(state.hidden).items()})

    def stack_state(self, state: State) -> State:
        """Undoes `unstack_state`."""
        stack = self.block_step(jax.tree.leaves(state.hidden)[0].dtype).stack
        hidden = [stack(state.hidden[name]) for name in self._stacks]
        return state._replace(hidden=jax.tree.map(lambda *stacks: jnp.concatenate(stacks), *hidden))

    def observe(self, state: State, tokens: jax.Array) -> State:
        """The state once the sample that `step` predicted is known: tokens [batch, channels]."""
        return state._replace(last=tokens.astype(jnp.int32))

    def log_prob(self, outputs: jax.Array, tokens: jax.Array) -> jax.Array:
        """Log-likelihood in nats, [batch, time], of tokens [batch, time, channels] under logits."""
        tokens = tokens.astype(jnp.int32)[..., None]
        chosen = jnp.take_along_axis(outputs, tokens, axis=-1)[..., 0]
        return (chosen - jax.nn.logsumexp(outputs, axis=-1)).sum(-1)

    def sample(
        self, outputs: jax.Array, uniform: jax.Array, *, temperature: float = 1.0, top_p: float = 1.0
    ) -> jax.Array:
        """Draws tokens by inverting the cumulative distribution.

        Args:
          outputs: logits [batch, 1, channels, num_levels].
          uniform: [batch, channels] in [0, 1).
          temperature: logits are divided by it.
          top_p: keeps the smallest set of tokens whose probabilities reach it (Holtzman et al. 1904.09751).

        Returns:
          int32 tokens [batch, channels].
        """
        probabilities = jax.nn.softmax(outputs[:, 0] / temperature, axis=-1)
        if top_p < 1:
            # Ties and the order of tokens are settled by a stable sort; a token stays while less than top_p lies above.
            order = jnp.argsort(-probabilities, axis=-1, stable=True)
            ranked = jnp.take_along_axis(probabilities, order, axis=-1)
            ranked = jnp.where(jnp.cumsum(ranked, axis=-1) - ranked < top_p, ranked, 0)
            rank = jnp.argsort(order, axis=-1)
            probabilities = jnp.take_along_axis(ranked, rank, axis=-1)
        cumulative = jnp.cumsum(probabilities, axis=-1)
        threshold = uniform[..., None] * cumulative[..., -1:]
        token = (cumulative <= threshold).sum(-1)
        # Rounding may put the threshold at the very end: the token that reached it then stands for it.
        return jnp.minimum(token, (cumulative < cumulative[..., -1:]).sum(-1)).astype(jnp.int32)
