"""SampleRNN (Mehri et al., arXiv 1612.07837), as SaShiMi's and Mamba's authors compare with it.

    model = make(ModelConfig())            # three tiers, 35,034,624 parameters

A tier reads frames of samples that are over, conditioned on the tier above, through gated recurrent units, and gives
each frame of the tier below a vector; the lowest one gives each sample a vector, which a small network over the last
samples takes. Architecture as in github state-spaces/s4 (src/models/baselines/samplernn.py). The published runs cut
the gradient every 1,024 samples; here it is exact through the window, or through its segments. A recurrence that is
not linear runs in
order: a sequence cannot be cut over devices.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from harmonic.errors import check
from harmonic.models import base
from harmonic.models.base import Inputs, Params
from harmonic.models.costs import Costs, count, operations
from harmonic.models.dropout import Dropout
from harmonic.models.linear import init_linear, linear, prepare_linear, stacked
from harmonic.models.samplernn.config import ModelConfig


class State(NamedTuple):
    """All that is kept of the past; tiers from the highest to the lowest.

    Attributes:
      position: int32, samples since the highest tier's frame began.
      recent: [batch, samples of that frame] int32, the newest token last.
      hidden: for each tier, [rnn_layers, batch, width], less the learned initial state.
      spread: for each tier, [batch, n, width]: what its last frame gave to each of the n frames, or samples, below.
    """

    position: jax.Array
    recent: jax.Array
    hidden: tuple[jax.Array, ...]
    spread: tuple[jax.Array, ...]


class SampleRNN(base.Model):
    """The methods are those of `base.Model`."""

    config: ModelConfig

    def __init__(self, config: ModelConfig, num_levels: int = 256, channels: int = 1):
        check(channels == 1, "channels", channels, "1: a samplernn model has one channel")
        super().__init__(config, num_levels, channels)
        # How many frames of the tier below a frame spreads over; below the lowest tier are samples.
        self.ratios = tuple(reversed(config.frames))

    def init(self, key: jax.Array) -> Params:
        """Fresh float32 parameters."""
        c, width, keys = self.config, self.config.width, iter(jax.random.split(key, 64))
        lowest = c.frames[0]

        def gru(key: jax.Array) -> Params:
            keys = jax.random.split(key)
            return {"input": init_linear(keys[0], width, 3 * width), "hidden": init_linear(keys[1], width, 3 * width)}

        params: Params = {"embedding": jax.random.normal(next(keys), (self.num_levels, c.embedding_width))}
        for tier, (size, ratio) in enumerate(zip(c.frame_sizes, self.ratios, strict=True)):
            spread = init_linear(next(keys), width, ratio * width)
            params[f"tier_{tier}"] = {
                "frame": init_linear(next(keys), size, width, weight_norm=True),
                "gru": stacked(gru, next(keys), c.rnn_layers),
                "initial": jnp.zeros((c.rnn_layers, width)),
                # Its weight norm is that of a transposed convolution: a length for each input.
                "spread": spread | {"gain": jnp.sqrt((spread["kernel"] ** 2).sum(1))},
            }
        recent = init_linear(next(keys), lowest * c.embedding_width, width, bias=False, weight_norm=True)
        return params | {
            "samples": recent,
            "hidden": init_linear(next(keys), width, width, weight_norm=True),
            "output": init_linear(next(keys), width, self.num_levels, weight_norm=True),
        }

    def prepare(self, params: Params) -> Any:
        """Weight norms multiplied out, and for each of the last samples a table of what its token adds."""
        weights: Params = {}
        for tier in range(len(self.ratios)):
            given = params[f"tier_{tier}"]
            spread = given["spread"]
            kernel = spread["kernel"]
            length = jnp.sqrt((kernel * kernel).sum(1))
            weights[f"tier_{tier}"] = given | {
                "frame": prepare_linear(given["frame"]),
                "spread": {"kernel": kernel * (spread["gain"] / length)[:, None], "bias": spread["bias"]},
            }
        kernel = prepare_linear(params["samples"])["kernel"]
        lags = kernel.reshape(self.config.frames[0], self.config.embedding_width, -1)
        weights["tables"] = jnp.einsum("vi,lio->lvo", params["embedding"], lags)
        return weights | {name: prepare_linear(params[name]) for name in ("hidden", "output")}

    def init_state(self, batch: int, dtype: jnp.dtype = jnp.float32) -> State:
        """As `base.Model.init_state`; the learned initial states are added where they are read."""
        c = self.config
        return State(
            position=jnp.zeros((), jnp.int32),
            recent=jnp.full((batch, self.multiple), self.num_levels // 2, jnp.int32),
            hidden=tuple(jnp.zeros((c.rnn_layers, batch, c.width), dtype) for _ in self.ratios),
            spread=tuple(jnp.zeros((batch, ratio, c.width), dtype) for ratio in self.ratios),
        )

    def apply(
        self, weights: Any, inputs: Inputs, state: State, *, rng: Dropout | None = None, axis: str | None = None
    ) -> tuple[jax.Array, State]:
        """The logits of a segment, [batch, time, 1, num_levels], and the state after it; as `base.Model.apply`."""
        tokens = inputs["tokens"][..., 0].astype(jnp.int32)
        batch, time = tokens.shape
        check(time > 0 and time % self.multiple == 0, "a segment", time, f"a multiple of {self.multiple} samples")
        past = jnp.concatenate([state.recent, tokens], axis=1)
        above: jax.Array | None = None
        hidden, spread = [], []
        for tier, (size, ratio) in enumerate(zip(self.config.frame_sizes, self.ratios, strict=True)):
            own = weights[f"tier_{tier}"]
            frames = past[:, self.multiple - size : -size].reshape(batch, -1, size)
            x = self._frames(own, frames)
            x = x if above is None else x + above
            h = state.hidden[tier] + own["initial"][:, None]
            x, h = self._gru(own["gru"], x, h)
            hidden.append(h - own["initial"][:, None])
            made = linear(own["spread"], x)
            spread.append(made[:, -1].reshape(batch, ratio, -1))
            above = made.reshape(batch, -1, self.config.width)
        lowest = self.config.frames[0]
        recent = past[:, self.multiple - lowest : -1]
        assert above is not None
        for lag in range(lowest):
            above = above + jnp.take(weights["tables"][lag], recent[:, lag : lag + time], axis=0)
        logits = self._logits(weights, above)
        after = State(state.position, past[:, -self.multiple :], tuple(hidden), tuple(spread))
        return logits[:, :, None], after

    def step(self, weights: Any, inputs: Inputs, state: State) -> tuple[jax.Array, State]:
        """The logits of the next sample, [batch, 1, 1, num_levels], and the state; as `base.Model.step`."""
        hidden, spread = list(state.hidden), list(state.spread)
        above: jax.Array | None = None
        for tier, size in enumerate(self.config.frame_sizes):
            own, recent, given = weights[f"tier_{tier}"], state.recent[:, -size:], above

            def turn(_: Any, carry: Any, own: Any = own, recent: jax.Array = recent, given: Any = given) -> Any:
                h, made = carry
                x = self._frames(own, recent)
                x = x if given is None else x + given
                x, h = self._gru(own["gru"], x[:, None], h + own["initial"][:, None])
                return h - own["initial"][:, None], linear(own["spread"], x[:, 0]).reshape(made.shape)

            begins = (state.position % size == 0).astype(jnp.int32)
            hidden[tier], spread[tier] = jax.lax.fori_loop(0, begins, turn, (hidden[tier], spread[tier]))
            ratio = self.ratios[tier]
            place = (state.position // (size // ratio)) % ratio
            above = jax.lax.dynamic_index_in_dim(spread[tier], place, 1, keepdims=False)
        lowest = self.config.frames[0]
        assert above is not None
        for lag in range(lowest):
            above = above + weights["tables"][lag][state.recent[:, lag - lowest]]
        position = (state.position + 1) % self.multiple
        logits = self._logits(weights, above)
        return logits[:, None, None], State(position, state.recent, tuple(hidden), tuple(spread))

    def observe(self, state: State, tokens: jax.Array) -> State:
        """As `base.Model.observe`."""
        return state._replace(recent=jnp.concatenate([state.recent[:, 1:], tokens.astype(jnp.int32)], axis=1))

    def _frames(self, weights: Any, tokens: jax.Array) -> jax.Array:
        """Frames of tokens [..., samples], scaled to [-2, 2), as vectors."""
        dtype = weights["frame"]["kernel"].dtype
        return linear(weights["frame"], 4 * tokens.astype(dtype) / self.num_levels - 2)

    def _gru(self, params: Params, x: jax.Array, h: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The recurrent layers over x [batch, frames, width] from h [rnn_layers, batch, width]."""
        last = []
        for layer in range(self.config.rnn_layers):
            own = jax.tree.map(lambda v, i=layer: v[i], params)

            def body(h: jax.Array, given: jax.Array, own: Any = own) -> tuple[jax.Array, jax.Array]:
                made = linear(own["hidden"], h)
                (r, z, n), (h_r, h_z, h_n) = jnp.split(given, 3, axis=-1), jnp.split(made, 3, axis=-1)
                z = jax.nn.sigmoid(z + h_z)
                n = jnp.tanh(n + jax.nn.sigmoid(r + h_r) * h_n)
                h = (1 - z) * n + z * h
                return h, h

            h_layer, x = jax.lax.scan(body, h[layer], linear(own["input"], x).swapaxes(0, 1))
            x = x.swapaxes(0, 1)
            last.append(h_layer)
        return x, jnp.stack(last)

    def _logits(self, weights: Any, x: jax.Array) -> jax.Array:
        return linear(weights["output"], jax.nn.relu(linear(weights["hidden"], jax.nn.relu(x))))

    def matrix_axes(self, name: str, shape: tuple[int, ...]) -> tuple[int, int] | None:
        """The kernels between hidden vectors."""
        hidden = ".gru." in name or ".spread." in name or name.startswith("hidden.")
        return (len(shape) - 2, len(shape) - 1) if hidden and name.endswith("kernel") else None

    def costs(self, segments: int = 1) -> Costs:
        """As `base.Model.costs`; operations are counted in the traced program."""
        c, params = self.config, jax.eval_shape(self.init, jax.random.key(0))
        sizes = {name: count(tree) for name, tree in params.items()}
        tiers = {name: size for name, size in sizes.items() if name.startswith("tier")}
        frames = sum(1 / size for size in c.frame_sizes)
        read = sum(size / frame for size, frame in zip(tiers.values(), c.frame_sizes, strict=True))
        return Costs(
            by_part={
                "embedding": sizes["embedding"] + sizes["samples"],
                **tiers,
                "head": sizes["hidden"] + sizes["output"],
            },
            blocks=len(tiers) * c.rnn_layers,
            operations=operations(self, segments),
            weights_read=read + sizes["hidden"] + sizes["output"] + c.frames[0] * c.width,
            kept=(4 + 14 * c.rnn_layers * frames) * c.width + 3 * self.num_levels,
            exchanges=(),
        )


make = SampleRNN
