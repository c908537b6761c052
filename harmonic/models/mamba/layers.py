"""Mamba's residual block (Gu and Dao, arXiv 2312.00752, figure 3), selective or with a fixed state space."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from harmonic.kernels import selective, state_space
from harmonic.kernels.context_parallel import left_halo
from harmonic.kernels.dense import beside
from harmonic.models.base import Params
from harmonic.models.costs import Carry, Exchange, Halo
from harmonic.models.linear import init_linear, init_norm, layer_norm, linear
from harmonic.models.mamba.config import ModelConfig
from harmonic.models.u_net import Layer


class State(NamedTuple):
    """Of a block.

    Attributes:
      recent: [batch, conv - 1, inner width], inputs of the convolution, the newest last.
      hidden: [batch, inner width, numbers], of the state space.
    """

    recent: jax.Array
    hidden: jax.Array


class Mamba(Layer):
    """norm, a wider dense layer, a causal convolution, silu, the state space, a gate, a dense layer; added to x.

    Initial values are those of github state-spaces/mamba: A is -1 ... -n, complex -1/2 + i pi n.
    """

    def __init__(self, config: ModelConfig, width: int, *, is_selective: bool):
        self.config, self.width, self.selective = config, width, is_selective
        self.inner = config.inner * width
        self.rank = -(-width // 16)
        self.numbers = config.state_width if is_selective else config.fixed_state_width
        self.complex = config.complex or not is_selective
        self.modes = self.numbers // 2 if self.complex else self.numbers

    def init(self, key: jax.Array) -> Params:
        """As `Layer.init`."""
        config, width, inner, keys = self.config, self.width, self.inner, jax.random.split(key, 8)
        low, high = math.log(config.min_dt), math.log(config.max_dt)
        step = jnp.exp(jax.random.uniform(keys[0], (inner,), minval=low, maxval=high))
        step = jnp.log(jnp.expm1(step))
        number = jnp.arange(self.modes, dtype=jnp.float32)
        decay = jnp.full(self.modes, math.log(0.5)) if self.complex else jnp.log(number + 1)
        params = {
            "norm": init_norm(width, bias=False),
            "entry": init_linear(keys[1], width, 2 * inner, bias=False),
            "conv": init_linear(keys[2], config.conv, inner),
            "A_log": jnp.tile(decay[None], (inner, 1)),
            "D": jnp.ones(inner),
            "output": init_linear(keys[3], inner, width, bias=False),
        }
        if self.complex:
            params["A_im"] = jnp.tile(math.pi * number[None], (inner, 1))
        if self.selective:
            bound = self.rank**-0.5
            kernel = jax.random.uniform(keys[5], (self.rank, inner), minval=-bound, maxval=bound)
            params["select"] = init_linear(keys[4], inner, self.rank + 2 * self.numbers, bias=False)
            params["dt"] = {"kernel": kernel, "bias": step}
        else:
            c = jax.random.normal(keys[6], (2, inner, self.modes)) * math.sqrt(0.5)
            params |= {"C_re": c[0], "C_im": c[1], "dt": {"bias": step}}
        return params

    def prepare(self, params: Params) -> Any:
        """Parameters with A, and with the tables of a fixed state space."""
        decay = -jnp.exp(params["A_log"])
        a = jax.lax.complex(decay, params["A_im"]) if self.complex else decay
        weights = {name: params[name] for name in ("norm", "entry", "conv", "D", "output")}
        if self.selective:
            return weights | {"a": a, "select": params["select"], "dt": params["dt"]}
        log_a = a * jax.nn.softplus(params["dt"]["bias"]).astype(a.dtype)[:, None]
        held = jax.lax.complex(params["C_re"], params["C_im"]) * ((jnp.exp(log_a) - 1) / a)
        step = state_space.Diagonal(jnp.exp(log_a), held)
        return weights | {"tables": state_space.diagonal(log_a, held), "step": step}

    def init_state(self, batch: int, dtype: Any) -> State:
        """Zeros."""
        recent = jnp.zeros((batch, self.config.conv - 1, self.inner), dtype)
        return State(recent, jnp.zeros((batch, self.inner, self.numbers), dtype))

    def apply(self, weights: Any, x: jax.Array, state: State, axis: str | None) -> tuple[jax.Array, State]:
        """As `Layer.apply`."""
        u, gate = jnp.split(linear(weights["entry"], layer_norm(weights["norm"], x)), 2, axis=-1)
        taps, time = self.config.conv, u.shape[1]
        before, recent = left_halo(u[:, 1 - taps :], state.recent, axis)
        past = jnp.concatenate([before, u], axis=1)
        kernel = weights["conv"]["kernel"]
        v = beside(weights["conv"]["bias"], u)
        for tap in range(taps):
            v = v + past[:, tap : tap + time] * beside(kernel[tap], u)
        u = jax.nn.silu(v)
        if self.selective:
            y, hidden = selective.selective_scan(self._select(weights, u), weights["a"], state.hidden, axis=axis)
        else:
            y, hidden = state_space.convolve(weights["tables"], u, state.hidden, axis=axis)
        return x + self._leave(weights, y, u, gate), State(recent, hidden)

    def step(self, weights: Any, x: jax.Array, state: State) -> tuple[jax.Array, State]:
        """As `Layer.step`."""
        u, gate = jnp.split(linear(weights["entry"], layer_norm(weights["norm"], x)), 2, axis=-1)
        window = jnp.concatenate([state.recent, u[:, None]], axis=1)
        v = (window * weights["conv"]["kernel"][None]).sum(1)
        u = jax.nn.silu(v + beside(weights["conv"]["bias"], v))
        if self.selective:
            y, hidden = selective.step(self._select(weights, u), weights["a"], state.hidden)
        else:
            y, hidden = weights["step"](u, state.hidden)
        return x + self._leave(weights, y, u, gate), State(window[:, 1:], hidden)

    def _select(self, weights: Any, u: jax.Array) -> selective.Inputs:
        dt, b, c = jnp.split(linear(weights["select"], u), [self.rank, self.rank + self.numbers], axis=-1)
        return selective.Inputs(u, jax.nn.softplus(linear(weights["dt"], dt)), b, c)

    def _leave(self, weights: Any, y: jax.Array, u: jax.Array, gate: jax.Array) -> jax.Array:
        return linear(weights["output"], (y + u * beside(weights["D"], u)) * jax.nn.silu(gate))

    def exchanges(self) -> tuple[Exchange, ...]:
        """The states between shards, and the ends of their convolutions."""
        numbers = self.inner * self.numbers
        return Carry("state", numbers), Halo("conv", (self.config.conv - 1) * self.inner)
