"""A U of residual layers over a sequence that is pooled by dense layers (SaShiMi, arXiv 2202.09729, section 4.2).

A kind gives the layers of a block; this module runs them, in parallel over a segment and sample by sample. Between two
levels a pool takes `factor` steps to one; on the way up one step is spread over `factor` steps, all of them after it:
sample t sees the pooled step floor(t / factor) - 1.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from harmonic.errors import check
from harmonic.kernels.context_parallel import left_halo
from harmonic.models import base
from harmonic.models.base import Inputs, Params
from harmonic.models.costs import Costs, Exchange, Halo, count, operations
from harmonic.models.dropout import Dropout
from harmonic.models.linear import init_linear, init_norm, layer_norm, linear, prepare_linear, stacked
from harmonic.models.u_net_config import UNetConfig


class Layer(Protocol):
    """A residual layer: functions over its own parameters, a plain dict, and its own state, a pytree."""

    def init(self, key: jax.Array) -> Params:
        """Fresh parameters."""
        ...

    def prepare(self, params: Params) -> Any:
        """Parameters as `apply` and `step` multiply by them."""
        ...

    def init_state(self, batch: int, dtype: Any) -> Any:
        """The state before a recording."""
        ...

    def apply(self, weights: Any, x: jax.Array, state: Any, axis: str | None) -> tuple[jax.Array, Any]:
        """x [batch, time, width] -> (x with the layer's branch added, the state after it)."""
        ...

    def step(self, weights: Any, x: jax.Array, state: Any) -> tuple[jax.Array, Any]:
        """The same for one step: x [batch, width]."""
        ...

    def exchanges(self) -> tuple[Exchange, ...]:
        """What its shards of a sequence send one another."""
        ...


class State(NamedTuple):
    """All that is kept of the past.

    Attributes:
      position: int32, samples since the last pooling boundary: 0 before and after a segment.
      last: [batch, channels] int32, the newest token.
      hidden: by stack, for each layer of a block its states along a leading axis over blocks; in the sampler's loop a
        tuple over blocks.
      pending: for each pool, [batch, factor, width]: what the way up takes in the pooled step that is under way.
      collected: for each pool, [batch, factor - 1, width]: its inputs so far; zeros at a boundary.
    """

    position: jax.Array
    last: jax.Array
    hidden: dict[str, Any]
    pending: tuple[jax.Array, ...]
    collected: tuple[jax.Array, ...]


class _Inside(NamedTuple):
    """What a level and those within it keep of the past."""

    hidden: dict[str, Any]
    pending: tuple[jax.Array, ...]
    collected: tuple[jax.Array, ...]


class UNet(base.Model):
    """The model's functions over a plain dict of parameters; a kind derives from it and says `layers`.

    Attributes:
      stacks: by name, in order: (level, its layers, number of blocks).
    """

    config: UNetConfig
    pool_weight_norm = False

    def __init__(self, config: UNetConfig, num_levels: int = 256, channels: int = 1):
        check(channels == 1, "channels", channels, f"1: a {config.kind} model has one channel")
        super().__init__(config, num_levels, channels)
        inner = len(config.pool_factors)
        order = [(f"down_{level}", level) for level in range(inner)] if config.unet else []
        order += [("inner", inner), *((f"up_{level}", level) for level in reversed(range(inner)))]
        self.stacks = {
            name: (level, self.layers(config.level_widths[level], level), config.level_blocks[level])
            for name, level in order
        }

    @abc.abstractmethod
    def layers(self, width: int, level: int) -> dict[str, Layer]:
        """The layers of a block, by name, in order."""

    def init(self, key: jax.Array) -> Params:
        """Fresh float32 parameters; those of a stack's blocks along a leading axis."""
        config, keys = self.config, iter(jax.random.split(key, 64))
        params: Params = {"embedding": jax.random.normal(next(keys), (self.num_levels, config.width))}
        widths = config.level_widths
        for level, factor in enumerate(config.pool_factors):
            outer, inner, normed = widths[level], widths[level + 1], self.pool_weight_norm
            params[f"down_pool_{level}"] = init_linear(next(keys), factor * outer, inner, weight_norm=normed)
            params[f"up_pool_{level}"] = init_linear(next(keys), inner, factor * outer, weight_norm=normed)
        for name, (_, layers, blocks) in self.stacks.items():
            params[name] = {n: stacked(layer.init, next(keys), blocks) for n, layer in layers.items()}
        head = init_linear(next(keys), config.width, self.num_levels)
        return params | {"norm": init_norm(config.width), "head": head}

    def init_state(self, batch: int, dtype: jnp.dtype = jnp.float32) -> State:
        """As `base.Model.init_state`."""
        factors, widths = self.config.pool_factors, self.config.level_widths

        def states(layers: dict[str, Layer], blocks: int) -> dict[str, Any]:
            one = {n: layer.init_state(batch, dtype) for n, layer in layers.items()}
            return jax.tree.map(lambda v: jnp.broadcast_to(v, (blocks, *v.shape)), one)

        return State(
            position=jnp.zeros((), jnp.int32),
            last=jnp.full((batch, self.channels), self.num_levels // 2, jnp.int32),
            hidden={name: states(layers, blocks) for name, (_, layers, blocks) in self.stacks.items()},
            pending=tuple(jnp.zeros((batch, f, w), dtype) for f, w in zip(factors, widths, strict=False)),
            collected=tuple(jnp.zeros((batch, f - 1, w), dtype) for f, w in zip(factors, widths, strict=False)),
        )

    def prepare(self, params: Params) -> Any:
        """Tables of the layers, and pools with their weight norm multiplied out."""
        weights = {name: prepare_linear(value) if "pool" in name else value for name, value in params.items()}
        for name, (_, layers, _) in self.stacks.items():
            weights[name] = {n: jax.vmap(layer.prepare)(params[name][n]) for n, layer in layers.items()}
        return weights

    def apply(
        self, weights: Any, inputs: Inputs, state: State, *, rng: Dropout | None = None, axis: str | None = None
    ) -> tuple[jax.Array, State]:
        """The logits of a segment, [batch, time, 1, num_levels], and the state after it; as `base.Model.apply`."""
        tokens, factors = inputs["tokens"].astype(jnp.int32), self.config.pool_factors
        batch, time, _ = tokens.shape
        check(time > 0 and time % self.multiple == 0, "a segment", time, f"a multiple of {self.multiple} samples")
        before, last = left_halo(tokens[:, -1], state.last, axis)
        tokens = jnp.concatenate([before[:, None], tokens[:, :-1]], axis=1)
        x = jnp.take(weights["embedding"], tokens[..., 0], axis=0)
        hidden: dict[str, Any] = {}
        pending: list[jax.Array] = []
        skips = []

        def run(name: str, x: jax.Array, mirror: Any = None) -> tuple[jax.Array, Any]:
            x, hidden[name], seen = self._run(name, weights[name], x, state.hidden[name], mirror, axis)
            return x, seen

        for level, factor in enumerate(factors):
            x, seen = run(f"down_{level}", x) if self.config.unet else (x, None)
            skips.append((x, seen))
            x = linear(weights[f"down_pool_{level}"], x.reshape(batch, -1, factor * x.shape[-1]))
        x = run("inner", x)[0] + x
        for level, factor in reversed(list(enumerate(factors))):
            raw = linear(weights[f"up_pool_{level}"], x)
            entry, seen = skips[level]
            due, carry = left_halo(raw[:, -1], state.pending[level].reshape(batch, -1), axis)
            pending.insert(0, carry.reshape(batch, factor, -1))
            x = jnp.concatenate([due[:, None], raw[:, :-1]], axis=1).reshape(entry.shape) + entry
            y, _ = run(f"up_{level}", x, seen)
            x = y if self.config.unet else y + x
        return self._logits(weights, x)[:, :, None], State(
            state.position, last, hidden, tuple(pending), state.collected
        )

    def _run(self, name: str, weights: Any, x: jax.Array, hidden: Any, mirror: Any, axis: str | None) -> Any:
        """A stack over x -> (x, its states, the inputs of its layers by block); `mirror` are those of the way down."""
        layers, kept = self.stacks[name][1], name.startswith("down")

        # Only the input of each block is kept for the backward pass, and what skip connections need.
        @jax.checkpoint
        def body(x: jax.Array, scanned: Any) -> tuple[jax.Array, Any]:
            weights, hidden, mirror = scanned
            states, seen = {}, []
            for i, (n, layer) in enumerate(layers.items()):
                if kept:
                    seen.append(x)
                x, states[n] = layer.apply(weights[n], x, hidden[n], axis)
                if mirror is not None:
                    x = x + mirror[-1 - i]
            return x, (states, tuple(seen))

        if mirror is not None:
            mirror = jax.tree.map(lambda v: v[::-1], mirror)
        x, (states, seen) = jax.lax.scan(body, x, (weights, hidden, mirror))
        return x, states, seen if kept else None

    def _logits(self, weights: Any, x: jax.Array) -> jax.Array:
        return linear(weights["head"], layer_norm(weights["norm"], x))

    def step(self, weights: Any, inputs: Inputs, state: State) -> tuple[jax.Array, State]:
        """The logits of the next sample, [batch, 1, 1, num_levels], and the state; as `base.Model.step`.

        Levels run at their own rates: an inner one only when its pool's inputs are complete.
        """
        sampler = self.sampler()
        if not isinstance(weights["inner"], tuple):
            weights = sampler.arrange(weights)
        if not isinstance(state.hidden["inner"], tuple):
            logits, state = self.step(weights, inputs, sampler.enter(state))
            return logits, sampler.leave(state)
        factors = self.config.pool_factors

        def run(name: str, x: jax.Array, hidden: Any, mirror: Any = None) -> tuple[jax.Array, Any, list[jax.Array]]:
            layers, after, seen = self.stacks[name][1], [], []
            for block, states in zip(weights[name], hidden[name], strict=True):
                new = {}
                for n, layer in layers.items():
                    seen.append(x)
                    x, new[n] = layer.step(block[n], x, states[n])
                    if mirror is not None:
                        x = x + mirror.pop()
                after.append(new)
            return x, tuple(after), seen

        def descend(level: int, x: jax.Array, inside: _Inside) -> tuple[jax.Array, _Inside]:
            """The levels from `level` inwards, which see nothing of the ones around them."""
            if level == len(factors):
                y, after, _ = run("inner", x, inside.hidden)
                return y + x, inside._replace(hidden={"inner": after})
            down, up, factor, found, seen = f"down_{level}", f"up_{level}", factors[level], {}, None
            if self.config.unet:
                x, found[down], seen = run(down, x, inside.hidden)
            place = (state.position // math.prod(factors[:level])) % factor
            complete = place == factor - 1
            pending, collected = inside.pending[0], inside.collected[0]
            deeper = _Inside(
                {n: h for n, h in inside.hidden.items() if n not in (down, up)},
                inside.pending[1:],
                inside.collected[1:],
            )
            z = x + jax.lax.dynamic_index_in_dim(pending, place, 1, keepdims=False)
            y, found[up], _ = run(up, z, inside.hidden, seen)

            def turn(_: Any, carry: Any) -> Any:
                _, collected, deeper = carry
                window = jnp.concatenate([collected, x[:, None]], axis=1).reshape(len(x), -1)
                inner, deeper = descend(level + 1, linear(weights[f"down_pool_{level}"], window), deeper)
                raw = linear(weights[f"up_pool_{level}"], inner).reshape(pending.shape)
                return raw, jnp.zeros_like(collected), deeper

            # As in HarmonicRNN: XLA copies what a conditional passes through, but updates a loop's carry in place.
            pending, collected, deeper = jax.lax.fori_loop(
                0, complete.astype(jnp.int32), turn, (pending, collected, deeper)
            )
            newest = jnp.where(complete, jnp.zeros_like(x), x)
            collected = jax.lax.dynamic_update_index_in_dim(collected, newest, jnp.minimum(place, factor - 2), 1)
            found |= deeper.hidden
            return y if self.config.unet else y + z, _Inside(
                found, (pending, *deeper.pending), (collected, *deeper.collected)
            )

        x = weights["embedding"][state.last[:, 0]]
        x, inside = descend(0, x, _Inside(state.hidden, state.pending, state.collected))
        position = (state.position + 1) % self.config.product
        hidden = {name: inside.hidden[name] for name in self.stacks}
        return self._logits(weights, x)[:, None, None], State(
            position, state.last, hidden, inside.pending, inside.collected
        )

    def observe(self, state: State, tokens: jax.Array) -> State:
        """As `base.Model.observe`."""
        return state._replace(last=tokens.astype(jnp.int32))

    def sampler(self) -> Sampler:
        """With weights and states block by block, so that the loop cuts no arrays."""
        return Sampler(self)

    def matrix_axes(self, name: str, shape: tuple[int, ...]) -> tuple[int, int] | None:
        """The kernels of the blocks' dense layers."""
        in_blocks = name.split(".")[0] in self.stacks and name.endswith("kernel")
        return (len(shape) - 2, len(shape) - 1) if in_blocks else None

    def costs(self, segments: int = 1) -> Costs:
        """As `base.Model.costs`; operations are counted in the traced program."""
        config, params = self.config, jax.eval_shape(self.init, jax.random.key(0))
        weights = jax.eval_shape(self.prepare, params)
        rates = [1 / math.prod(config.pool_factors[:level]) for level in range(len(config.level_widths))]
        read, kept, in_a_block = float(count(params["head"]) + config.width), float(config.width), 0.0
        exchanges: list[Exchange] = []
        for name, (level, layers, blocks) in self.stacks.items():
            rate, width = rates[level], config.level_widths[level]
            read += rate * count(params[name])
            # Of a way down every layer's input is kept for its mirror.
            kept += rate * width * blocks * (1 + len(layers) * name.startswith("down"))
            in_a_block = max(in_a_block, rate * self.kept_in_a_block(width))
            exchanges += [
                dataclasses.replace(exchange, name=f"{name}.{exchange.name}", times=blocks)
                for layer in layers.values()
                for exchange in layer.exchanges()
            ]
        for level, factor in enumerate(config.pool_factors):
            read += rates[level + 1] * (count(params[f"down_pool_{level}"]) + count(params[f"up_pool_{level}"]))
            exchanges.append(Halo(f"pool_edge_{level}", factor * config.level_widths[level]))
        by_part = {"embedding": count(params["embedding"]), "head": count(params["head"]) + count(params["norm"])}
        by_part["pooling"] = sum(count(tree) for name, tree in params.items() if "pool" in name)
        for name in self.stacks["inner"][1]:
            by_part[name] = sum(count(params[stack][name]) for stack in self.stacks)
        return Costs(
            by_part=by_part,
            blocks=sum(blocks for _, _, blocks in self.stacks.values()),
            operations=operations(self, segments),
            weights_read=read,
            kept=kept + max(in_a_block, 5.5 * self.num_levels + 4 * config.width),
            exchanges=(*exchanges, Halo("token_edge", 1, differentiated=False)),
            tables=sum(count(layer.get("tables", ())) for name in self.stacks for layer in weights[name].values()),
        )

    @abc.abstractmethod
    def kept_in_a_block(self, width: int) -> float:
        """Numbers a step that a block's forward and backward pass hold at once."""


class Sampler(base.Sampler):
    """Weights and states block by block."""

    model: UNet

    def prepare(self, params: Params) -> Any:
        """Weights as the loop reads them."""
        return self.arrange(self.model.prepare(params))

    def arrange(self, weights: Any) -> Any:
        """What `UNet.prepare` gives, block by block."""
        return weights | {name: self._cut(weights[name], name) for name in self.model.stacks}

    def enter(self, state: State) -> State:
        """The state with `hidden` block by block."""
        return state._replace(hidden={name: self._cut(h, name) for name, h in state.hidden.items()})

    def leave(self, carry: State) -> State:
        """Undoes `enter`."""
        joined = {
            name: jax.tree.map(lambda *blocks: jnp.stack(blocks), *h) if jax.tree.leaves(h) else h[0]
            for name, h in carry.hidden.items()
        }
        return carry._replace(hidden=joined)

    def _cut(self, tree: Any, name: str) -> tuple[Any, ...]:
        return tuple(jax.tree.map(lambda v, i=i: v[i], tree) for i in range(self.model.stacks[name][2]))
