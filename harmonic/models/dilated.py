"""Gated causal convolutions of two taps with growing dilations (WaveNet, arXiv 1609.03499, section 2.3).

    f, g = the halves of W_now x_t + W_past x_{t - d}
    z = tanh(f) sigmoid(g);  x += W_residual z;  the skips add up: W_skip z

Dilations double from 1 in each of several cycles. What a layer keeps of the past are the inputs of its dilation; `rest`
is what they are of an endless constant past, and is left out of the states, so that a state of zeros is that past.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from harmonic.kernels.context_parallel import left_halo
from harmonic.kernels.dense import beside, product
from harmonic.models import base
from harmonic.models.base import Params
from harmonic.models.costs import Exchange, Halo
from harmonic.models.linear import init_linear, stacked


class Dilated:
    """Functions over a plain dict of parameters, each [cycles, layers, ...].

    Args:
      width: of x.
      cycles, layers: dilations 1, 2, ... 2^(layers - 1), so many times over.
      skip: width of the sum of the skips; 0 for none, then x is what comes out.
    """

    def __init__(self, width: int, cycles: int, layers: int, skip: int = 0):
        self.width, self.cycles, self.layers, self.skip = width, cycles, layers, skip

    @property
    def longest(self) -> int:
        """The largest dilation."""
        return 2 ** (self.layers - 1)

    def init(self, key: jax.Array) -> Params:
        """Fresh parameters."""
        width = self.width

        def layer(key: jax.Array) -> Params:
            keys = jax.random.split(key, 3)
            params = {
                "entry": init_linear(keys[0], 2 * width, 2 * width, bias=False),
                "residual": init_linear(keys[1], width, width, bias=False),
            }
            return params | ({"skip": init_linear(keys[2], width, self.skip, bias=False)} if self.skip else {})

        flat = stacked(layer, key, self.cycles * self.layers)
        return jax.tree.map(lambda v: v.reshape(self.cycles, self.layers, *v.shape[1:]), flat)

    def rest(self, params: Params, x: jax.Array) -> jax.Array:
        """[cycles, layers, width]: each layer's input where x [width] has been the same for ever."""

        def layer(x: jax.Array, params: Params) -> tuple[jax.Array, jax.Array]:
            y, _ = self._layer(params, x[None], x[None])
            return y[0], x

        flat = jax.tree.map(lambda v: v.reshape(-1, *v.shape[2:]), params)
        return jax.lax.scan(layer, x, flat)[1].reshape(self.cycles, self.layers, -1)

    def init_state(self, batch: int, dtype: Any) -> tuple[jax.Array, ...]:
        """For each layer of a cycle, [cycles, batch, dilation, width]: the inputs of the last `dilation` samples."""
        return tuple(jnp.zeros((self.cycles, batch, 2**i, self.width), dtype) for i in range(self.layers))

    def apply(
        self,
        params: Params,
        x: jax.Array,
        state: tuple[jax.Array, ...],
        axis: str | None,
        rest: jax.Array | None = None,
    ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """x [batch, time, width], of at least `longest` samples -> (the sum of the skips, or x; the state)."""

        @jax.checkpoint
        def cycle(carry: Any, scanned: Any) -> tuple[Any, Any]:
            (x, total), (params, queues, rests) = carry, scanned
            after, made = [], []
            for i, queue in enumerate(queues):
                layer = jax.tree.map(lambda v, i=i: v[i], params)
                y = x if rests is None else x - beside(rests[i], x)
                before, tail = left_halo(y[:, -(2**i) :], queue, axis)
                past = jnp.concatenate([before, y[:, : -(2**i)]], axis=1)
                past = past if rests is None else past + beside(rests[i], x)
                x, z = self._layer(layer, past, x)
                made.append(z)
                after.append(tail)
            if self.skip:
                kernels = params["skip"]["kernel"].reshape(-1, self.skip)  # of all the cycle's layers at once
                total = total + product(jnp.concatenate(made, axis=-1), kernels)
            return (x, total), tuple(after)

        total = jnp.zeros((*x.shape[:2], self.skip), x.dtype) if self.skip else None
        (x, total), state = jax.lax.scan(cycle, (x, total), (params, state, rest))
        return (x if total is None else total), state

    def step(
        self, params: Params, x: jax.Array, state: Any, position: jax.Array, rest: jax.Array | None = None
    ) -> tuple[jax.Array, Any]:
        """The same for one sample: x [batch, width]; `position` counts samples since a segment's start.

        `state` and what it returns are by cycle: a tuple of tuples [batch, dilation, width], each a ring in which
        sample t is at t modulo the dilation.
        """
        total, after = None, []
        for cycle, queues in enumerate(state):
            made, rings = [], []
            for i, queue in enumerate(queues):
                layer = jax.tree.map(lambda v, c=cycle, i=i: v[c, i], params)
                resting = 0 if rest is None else rest[cycle, i][None]
                place = position % 2**i
                past = jax.lax.dynamic_index_in_dim(queue, place, 1, keepdims=False) + resting
                rings.append(jax.lax.dynamic_update_index_in_dim(queue, x - resting, place, 1))
                x, z = self._layer(layer, past, x)
                made.append(z)
            after.append(tuple(rings))
            if self.skip:
                kernels = params["skip"]["kernel"][cycle].reshape(-1, self.skip)
                skipped = jnp.concatenate(made, axis=-1) @ kernels
                total = skipped if total is None else total + skipped
        return (total if total is not None else x), tuple(after)

    def _layer(self, params: Params, past: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        value, gate = jnp.split(product(jnp.concatenate([past, x], axis=-1), params["entry"]["kernel"]), 2, axis=-1)
        z = jnp.tanh(value) * jax.nn.sigmoid(gate)
        return x + product(z, params["residual"]["kernel"]), z

    def by_cycle(self, state: tuple[jax.Array, ...]) -> Any:
        """The state as `step` takes it."""
        return tuple(tuple(queue[cycle] for queue in state) for cycle in range(self.cycles))

    def stack(self, state: Any) -> tuple[jax.Array, ...]:
        """Undoes `by_cycle`."""
        return tuple(jnp.stack([cycle[i] for cycle in state]) for i in range(self.layers))

    def exchanges(self) -> tuple[Exchange, ...]:
        """Each layer's halo."""
        return tuple(Halo(f"dilation_{2**i}", 2**i * self.width, times=self.cycles) for i in range(self.layers))


class RingSampler(base.Sampler):
    """For a model with `dilated`, whose state has its queues: each is an array of its own, which the loop changes in
    place."""

    def enter(self, state: Any) -> Any:
        """The state with its queues by cycle."""
        return state._replace(queues=self.model.dilated.by_cycle(state.queues))  # type: ignore[attr-defined]

    def leave(self, carry: Any) -> Any:
        """Undoes `enter`."""
        return carry._replace(queues=self.model.dilated.stack(carry.queues))  # type: ignore[attr-defined]
