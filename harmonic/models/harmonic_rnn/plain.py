"""HarmonicRNN written plainly: what tests and benchmarks compare the model with.

The layers run as `layers.py` has them: nothing is fused, every derivative is JAX's own, and nothing is made again in
the backward pass. Parameters, states and dropout masks are the model's: so are, to rounding, logits, loss and
gradients. In `step` every level runs at every sample, and where it is not its turn its result is thrown away.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from harmonic.errors import UserError
from harmonic.models import base
from harmonic.models.base import Inputs, Params
from harmonic.models.dropout import Dropout, dropout
from harmonic.models.harmonic_rnn.config import ModelConfig
from harmonic.models.harmonic_rnn.layers import Scan
from harmonic.models.harmonic_rnn.model import HarmonicRNN, State

VARIANTS = ("associative", "scan")


class PlainModel(HarmonicRNN):
    """Stands for a HarmonicRNN in `harmonic.step`, on one device.

    Args:
      config, num_levels, channels: as for HarmonicRNN.
      variant: of the recurrence: `associative` for `jax.lax.associative_scan`, `scan` for `jax.lax.scan`.
    """

    def __init__(self, config: ModelConfig, num_levels: int = 256, channels: int = 1, variant: str = "scan"):
        super().__init__(config, num_levels, channels)
        self.variant = variant
        self._scan: Scan = {"associative": associative_scan, "scan": scan}[variant]

    def _key(self) -> tuple[Any, ...]:
        return *super()._key(), self.variant

    def prepare(self, params: Params) -> Any:
        """The parameters as they are, but for gates that are held open."""
        return {**params, "blocks": self.open_gates(params["blocks"])}

    def apply(
        self, weights: Any, inputs: Inputs, state: State, *, rng: Dropout | None = None, axis: str | None = None
    ) -> tuple[jax.Array, State]:
        """The outputs of a segment, [batch, time, 1, ...], and the state after it."""
        if axis is not None:
            raise UserError("the plain model cannot cut a sequence over devices: set mesh.seq=1, or --nobaseline")
        config, tokens = self.config, inputs["tokens"].astype(jnp.int32)
        before = jnp.concatenate([state.last[:, None], tokens[:, :-1]], axis=1)
        hidden: dict[str, Any] = {}
        pending: list[jax.Array] = []

        def run(name: str, x: jax.Array) -> jax.Array:
            stack = self.stacks[name]
            per_chunk = self.multiple // stack.stride

            def body(x: jax.Array, scanned: Any) -> tuple[jax.Array, Any]:
                params, h0, number = scanned

                def drop(branch: jax.Array, place: int) -> jax.Array:
                    return dropout(branch, config.dropout, rng, 2 * number + place, per_chunk)

                return self.block.bind(params)(x, h0, self._scan, drop)

            numbers = stack.first + jnp.arange(stack.blocks)
            blocks, h0 = self.cut((weights["blocks"], state.hidden))[name]
            x, hidden[name] = jax.lax.scan(body, x, (blocks, h0, numbers))
            return x

        def level(i: int, x: jax.Array) -> jax.Array:
            if i == len(config.pool_factors):
                return run("inner", x)
            skip = run(f"down_{i}", x)
            inner = level(i + 1, self._bound(weights, f"down_pool_{i}").down(skip))
            raw, late = self._bound(weights, f"up_pool_{i}").up(inner), config.pool_factors[i] - 1
            pending.append(raw[:, -late:])
            return run(f"up_{i}", jnp.concatenate([state.pending[i], raw[:, :-late]], axis=1) + skip)

        x = level(
            0,
            dropout(self._embedded(weights, before), config.embedding_dropout, rng, 2 * self.num_blocks, self.multiple),
        )
        outputs = self._outputs(self.head.bind(weights["head"])(x), before[..., 0])
        return outputs, State(state.position, tokens[:, -1], self.join(hidden), tuple(pending[::-1]), state.collected)

    def step(self, weights: Any, inputs: Inputs, state: State) -> tuple[jax.Array, State]:
        """The outputs of the next sample, [batch, 1, 1, ...], and the state."""
        factors = self.config.pool_factors
        hidden = dict(self.cut(state.hidden))
        pending, collected = list(state.pending), list(state.collected)
        stacks = self.cut(weights["blocks"])

        def run(name: str, x: jax.Array, active: jax.Array) -> jax.Array:
            old, made = hidden[name], []
            for i in range(self.stacks[name].blocks):
                params, h0 = jax.tree.map(lambda v, i=i: v[i], (stacks[name], old))
                x, h = self.block.bind(params)(x, h0, one_step, lambda branch, _: branch)
                made.append(h)
            new = jax.tree.map(lambda *blocks: jnp.stack(blocks), *made)
            hidden[name] = jax.tree.map(lambda n, o: jnp.where(active, n, o), new, old)
            return x

        def level(i: int, x: jax.Array, active: jax.Array) -> jax.Array:
            if i == len(factors):
                return run("inner", x, active)
            x = run(f"down_{i}", x, active)
            place = (state.position // math.prod(factors[:i])) % factors[i]
            complete = active & (place == factors[i] - 1)
            at = jnp.minimum(place, factors[i] - 2)
            inner = level(i + 1, self._bound(weights, f"down_pool_{i}").down(
                jnp.concatenate([collected[i], x], axis=1)), complete)  # fmt: skip
            raw = self._bound(weights, f"up_pool_{i}").up(inner)
            due = jnp.where(complete, raw[:, 0], jnp.take(pending[i], at, axis=1))
            seen = collected[i].at[:, at].set(x[:, 0])
            collected[i] = jnp.where(active, jnp.where(complete, jnp.zeros_like(seen), seen), collected[i])
            pending[i] = jnp.where(complete, raw[:, 1:], pending[i])
            return run(f"up_{i}", x + due[:, None], active)

        x = level(0, self._embedded(weights, state.last[:, None]), jnp.bool_(True))
        outputs = self._outputs(self.head.bind(weights["head"])(x), state.last)
        position = (state.position + 1) % self.multiple
        return outputs, State(position, state.last, self.join(hidden), tuple(pending), tuple(collected))

    def sampler(self) -> base.Sampler:  # type: ignore[override]
        """The default: weights and states as they are."""
        return base.Sampler(self)

    def _bound(self, weights: Params, name: str) -> Any:
        return self.pools[name].bind(weights[name])

    def _embedded(self, weights: Params, tokens: jax.Array) -> jax.Array:
        dtype = weights["head"]["dense"]["kernel"].dtype
        return self.embedding.bind(weights["embedding"])(tokens[..., 0], dtype)


def associative_scan(a: jax.Array, x: jax.Array, h0: jax.Array) -> jax.Array:
    """h_t = a_t h_{t-1} + x_t by `jax.lax.associative_scan`."""

    def combine(left: Any, right: Any) -> Any:
        return right[0] * left[0], right[0] * left[1] + right[1]

    return jax.lax.associative_scan(combine, (a, x.at[:, 0].add(a[:, 0] * h0)), axis=1)[1]


def scan(a: jax.Array, x: jax.Array, h0: jax.Array) -> jax.Array:
    """h_t = a_t h_{t-1} + x_t by `jax.lax.scan`."""

    def step(h: jax.Array, inputs: Any) -> Any:
        h = inputs[0] * h + inputs[1]
        return h, h

    return jax.lax.scan(step, h0, (a.swapaxes(0, 1), x.swapaxes(0, 1)))[1].swapaxes(0, 1)


def one_step(a: jax.Array, x: jax.Array, h0: jax.Array) -> jax.Array:
    """h_1 = a_1 h_0 + x_1."""
    return a * h0[:, None] + x


make = PlainModel
