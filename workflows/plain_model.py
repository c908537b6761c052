"""The model that training is compared with: plain, and kept as it is.

Plain layers in the papers' equations, nothing fused, every derivative JAX's own, nothing made again in the backward
pass. Parameters, states and dropout masks are the model's: so are, to rounding, loss and gradients.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from harmonic.errors import UserError
from harmonic.models import Dropout, HarmonicRNN, State
from harmonic.models.harmonic_rnn.layers import dropout

RECURRENCES = ("associative", "scan")


class PlainModel(HarmonicRNN):
    """Stands for a HarmonicRNN with the sinusoidal embedding in `harmonic.step`, on one device.

    Args:
      recurrence: `associative` for `jax.lax.associative_scan`, `scan` for `jax.lax.scan`.
      args: as for HarmonicRNN.

    Raises:
      UserError: another embedding.
    """

    def __init__(self, recurrence: str, *args: Any):
        super().__init__(*args)
        if self.config.embedding != "sinusoidal":
            raise UserError(f"there is no plain model with a {self.config.embedding} embedding; give --nobaseline")
        self._recur = {"associative": _associative, "scan": _scan}[recurrence]

    def fuse(self, params: Any) -> Any:
        """The parameters as they are."""
        return params

    def apply(
        self, params: Any, inputs: dict[str, jax.Array], state: State, *, rng: Dropout | None = None, axis: Any = None
    ) -> tuple[jax.Array, State]:
        """Logits [batch, time, 1, num_levels] of a segment, and the state behind it; as `HarmonicRNN.apply`."""
        if axis is not None:
            raise UserError("the plain model cannot cut a sequence over devices: set mesh.seq=1, or --nobaseline")
        config, tokens = self.config, inputs["tokens"].astype(jnp.int32)
        factors, counts = config.pool_factors, config.level_blocks
        before = jnp.concatenate([state.last[:, None], tokens[:, :-1]], axis=1)[..., 0]
        x = _embed(config.width, before.astype(params["head"]["dense"]["kernel"].dtype))
        x = dropout(x, config.embedding_dropout, rng, 2 * self.num_blocks, self.multiple)
        first, hidden, skips = 0, list[Any](), []
        pending = list[jax.Array]()

        def run(x: jax.Array, level: int) -> jax.Array:
            nonlocal first
            stack = slice(first, first + counts[level])
            first = stack.stop
            blocks, h0 = jax.tree.map(lambda v: v[stack], (params["blocks"], state.hidden))
            per_chunk = self.multiple // math.prod(factors[:level])

            def body(x: jax.Array, scanned: Any) -> tuple[jax.Array, Any]:
                weights, h, number = scanned
                y, h = _temporal(weights["temporal"], x, h, self._recur)
                x = x + dropout(y, config.dropout, rng, 2 * number, per_chunk)
                return x + dropout(_mlp(weights["mlp"], x), config.dropout, rng, 2 * number + 1, per_chunk), h

            x, h = jax.lax.scan(body, x, (blocks, h0, jnp.arange(stack.start, stack.stop)))
            hidden.append(h)
            return x

        for level in range(len(factors)):
            skips.append(run(x, level))
            x = _pool_down(params[f"down_pool_{level}"], config.pool_groups, skips[-1])
        x = run(x, len(factors))
        for level in reversed(range(len(factors))):
            raw, late = _pool_up(params[f"up_pool_{level}"], config.pool_groups, x), factors[level] - 1
            pending.insert(0, raw[:, -late:])
            x = run(jnp.concatenate([state.pending[level], raw[:, :-late]], axis=1) + skips[level], level)
        logits = _dense(params["head"]["dense"], _norm(params["head"]["norm"], x))[:, :, None]
        joined = jax.tree.map(lambda *parts: jnp.concatenate(parts), *hidden)
        return logits, State(state.position, tokens[:, -1], joined, tuple(pending), state.collected)

    def log_prob(self, outputs: jax.Array, tokens: jax.Array) -> jax.Array:
        """As `HarmonicRNN.log_prob`."""
        chosen = tokens.astype(jnp.int32)[..., None]
        return jnp.take_along_axis(jax.nn.log_softmax(outputs), chosen, axis=-1)[..., 0].sum(-1)


def _embed(width: int, tokens: jax.Array) -> jax.Array:
    half = width // 2
    angles = tokens[..., None] * jnp.exp(jnp.arange(half, dtype=tokens.dtype) * (-math.log(10_000) / half))
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def _dense(params: Any, x: jax.Array) -> jax.Array:
    return x @ params["kernel"] + params["bias"]


def _norm(params: Any, x: jax.Array) -> jax.Array:
    centred = x - x.mean(-1, keepdims=True)
    inverse = jax.lax.rsqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
    return centred * inverse * params["scale"] + params["bias"]


def _gate(params: Any, u: jax.Array) -> jax.Array:
    blocks = u.reshape(*u.shape[:-1], *params["kernel"].shape[:2])
    pre = jnp.einsum("...ki,kio->...ko", blocks, params["kernel"]) + params["bias"]
    return jax.nn.sigmoid(pre.reshape(*u.shape[:-1], -1))


def _temporal(params: Any, x: jax.Array, h0: Any, recur: Any) -> tuple[jax.Array, Any]:
    unit, normal = params["recurrence"], _norm(params["norm"], x)
    u = _dense(unit["input"], normal)
    z = jnp.split(u, 2, axis=-1)
    i, r = _gate(unit["input_gate"], u), _gate(unit["recurrence_gate"], u)
    log_a = -8 * r * jax.nn.softplus(unit["log_decay"])
    a = jnp.exp(jax.lax.complex(log_a, unit["angle"] * r))
    h = recur(a, jnp.sqrt(-jnp.expm1(2 * log_a)) * i * jax.lax.complex(*z), jax.lax.complex(*h0))
    y = _dense(unit["output"], jnp.concatenate([h.real, h.imag], axis=-1))
    y = _dense(params["last"], y * jax.nn.gelu(_dense(params["gate"], normal)))
    return y, (h[:, -1].real, h[:, -1].imag)


def _mlp(params: Any, x: jax.Array) -> jax.Array:
    normal = _norm(params["norm"], x)
    return _dense(params["last"], _dense(params["up"], normal) * jax.nn.gelu(_dense(params["gate"], normal)))


def _associative(a: jax.Array, x: jax.Array, h0: jax.Array) -> jax.Array:
    def combine(left: Any, right: Any) -> Any:
        return right[0] * left[0], right[0] * left[1] + right[1]

    return jax.lax.associative_scan(combine, (a, x.at[:, 0].add(a[:, 0] * h0)), axis=1)[1]


def _scan(a: jax.Array, x: jax.Array, h0: jax.Array) -> jax.Array:
    def step(h: jax.Array, inputs: Any) -> Any:
        h = inputs[0] * h + inputs[1]
        return h, h

    return jax.lax.scan(step, h0, (a.swapaxes(0, 1), x.swapaxes(0, 1)))[1].swapaxes(0, 1)


def _pool_down(params: Any, groups: int, x: jax.Array) -> jax.Array:
    kernel = _in_groups(params["kernel"], groups)
    x = x.reshape(x.shape[0], -1, kernel.shape[0], groups, kernel.shape[1])
    y = jnp.einsum("btfgi,figo->btgo", x, kernel)
    return y.reshape(*y.shape[:2], -1) + params["bias"]


def _pool_up(params: Any, groups: int, x: jax.Array) -> jax.Array:
    kernel = _in_groups(params["kernel"], groups)[::-1]
    y = jnp.einsum("btgi,figo->btfgo", x.reshape(*x.shape[:2], groups, -1), kernel)
    return y.reshape(y.shape[0], -1, x.shape[-1]) + params["bias"]


def _in_groups(kernel: jax.Array, groups: int) -> jax.Array:
    """[f, width / groups, width] -> [f, width / groups, groups, width / groups]."""
    return kernel.reshape(*kernel.shape[:2], groups, -1)
