"""The step that generation is compared with: plain, and kept as it is.

Nothing is fused, and every level runs at every sample; where it is not its turn, what it found is thrown away.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from harmonic.config import ModelConfig
from harmonic.models.harmonic_rnn.model import State


def plain_step(config: ModelConfig, params: dict[str, Any], state: State) -> tuple[jax.Array, State]:
    """Logits [batch, num_levels] of the next sample, and the state; of the model with the sinusoidal embedding.

    Args:
      config: of the model.
      params: as `HarmonicRNN.init` gives them.
      state: at any position.
    """
    factors, blocks = config.pool_factors, config.level_blocks
    half = config.width // 2
    angles = state.last.astype(jnp.float32) * jnp.exp(jnp.arange(half) * (-math.log(10_000) / half))
    number = 0

    def run(x: jax.Array, state: State, count: int, active: Any) -> tuple[jax.Array, State]:
        nonlocal number
        for i in range(number, number + count):
            weights = jax.tree.map(lambda v, i=i: v[i], params["blocks"])
            h = jax.tree.map(lambda v, i=i: v[i], state.hidden)
            x, new = _block(weights, x, h)
            hidden = jax.tree.map(
                lambda all_, n, old, i=i: all_.at[i].set(jnp.where(active, n, old)), state.hidden, new, h
            )
            state = state._replace(hidden=hidden)
        number += count
        return x, state

    def level(i: int, x: jax.Array, state: State, active: Any) -> tuple[jax.Array, State]:
        if i == len(factors):
            return run(x, state, blocks[i], active)
        x, state = run(x, state, blocks[i], active)
        factor = factors[i]
        place = (state.position // math.prod(factors[:i])) % factor
        complete = active & (place == factor - 1)
        down, up = params[f"down_pool_{i}"], params[f"up_pool_{i}"]
        window = jnp.concatenate([state.collected[i], x[:, None]], axis=1)
        inner, state = level(i + 1, _pool(config, down["kernel"], window).sum(1) + down["bias"], state, complete)
        spread = jnp.broadcast_to(inner[:, None], window.shape)
        raw = _pool(config, up["kernel"][::-1], spread) + up["bias"]
        due = jnp.where(complete, raw[:, 0], jnp.take(state.pending[i], jnp.minimum(place, factor - 2), axis=1))
        collected = state.collected[i].at[:, jnp.minimum(place, factor - 2)].set(x)
        collected = jnp.where(active, jnp.where(complete, 0, collected), state.collected[i])
        pending = jnp.where(complete, raw[:, 1:], state.pending[i])
        state = state._replace(
            collected=(*state.collected[:i], collected, *state.collected[i + 1 :]),
            pending=(*state.pending[:i], pending, *state.pending[i + 1 :]),
        )
        return run(x + due, state, blocks[i], active)

    x, state = level(0, jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1), state, jnp.bool_(True))
    head = params["head"]
    logits = _dense(head["dense"], _norm(head["norm"], x))
    return logits, state._replace(position=(state.position + 1) % config.pooling_product)


def _dense(params: dict[str, Any], x: jax.Array) -> jax.Array:
    return x @ params["kernel"] + params["bias"]


def _norm(params: dict[str, Any], x: jax.Array) -> jax.Array:
    centred = x - x.mean(-1, keepdims=True)
    inverse = jax.lax.rsqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
    return centred * inverse * params["scale"] + params["bias"]


def _gate(params: dict[str, Any], u: jax.Array) -> jax.Array:
    blocks = u.reshape(len(u), *params["kernel"].shape[:2])
    return jax.nn.sigmoid((jnp.einsum("bki,kio->bko", blocks, params["kernel"]) + params["bias"]).reshape(len(u), -1))


def _block(params: dict[str, Any], x: jax.Array, h: tuple[jax.Array, jax.Array]):
    temporal, mlp = params["temporal"], params["mlp"]
    unit = temporal["recurrence"]
    normal = _norm(temporal["norm"], x)
    u = _dense(unit["input"], normal)
    z = jnp.split(u, 2, axis=-1)
    i, r = _gate(unit["input_gate"], u), _gate(unit["recurrence_gate"], u)
    log_a, angle = -8 * r * jax.nn.softplus(unit["log_decay"]), unit["angle"] * r
    a_re, a_im = jnp.exp(log_a) * jnp.cos(angle), jnp.exp(log_a) * jnp.sin(angle)
    scale = jnp.sqrt(-jnp.expm1(2 * log_a)) * i
    h = a_re * h[0] - a_im * h[1] + scale * z[0], a_re * h[1] + a_im * h[0] + scale * z[1]
    y = _dense(unit["output"], jnp.concatenate(h, axis=-1))
    x = x + _dense(temporal["last"], y * jax.nn.gelu(_dense(temporal["gate"], normal)))
    normal = _norm(mlp["norm"], x)
    return x + _dense(mlp["last"], _dense(mlp["up"], normal) * jax.nn.gelu(_dense(mlp["gate"], normal))), h


def _pool(config: ModelConfig, kernel: jax.Array, x: jax.Array) -> jax.Array:
    """[batch, f, width] through a kernel [f, width / groups, width], place by place."""
    groups = config.pool_groups
    x = x.reshape(*x.shape[:2], groups, -1)
    kernel = kernel.reshape(*kernel.shape[:2], groups, -1)
    return jnp.einsum("bfgi,figo->bfgo", x, kernel).reshape(*x.shape[:2], -1)
