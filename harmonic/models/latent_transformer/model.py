"""A causal Transformer over continuous latents that a strided CNN learns from raw audio (after Verma, arXiv
2206.08297).

    model = make(ModelConfig())                      # 4.05 M parameters, a context of 524,288 samples
    model = make(ModelConfig(context=16_384))        # the same weights, less past

Known of that paper are its abstract and summaries: a CNN front-end learns latents end to end, a Transformer models
their context over more than 500,000 samples, and each next sample is predicted; no code was published, and stride,
depth and tables could not be read. What is built here is this project's reading of it, in a form whose likelihood is
exact:

    e_t = table(x_{t-1})
    front-end: convolutions whose strides are their lengths; patch k is complete when e_{kP} ... e_{kP+P-1} are seen
    latents: D pre-norm layers of attention (rotary positions, 2104.09864) and SwiGLU (2002.05202), each latent
      attending to the `window` newest ones
    way up: transposed convolutions, P vectors a latent, used from its last sample on: sample t sees the latents of the
      patches that are complete, and what it knows of the newest, incomplete one through the local layers
    local: gated dilated convolutions (WaveNet's) over e_t + up_t, with a receptive field beyond a patch
    head: relu, dense, relu, dense

One pass predicts every sample from all that is before it; the paper predicts one sample from one window.
`next_sample` is that, for comparison. Attention runs once over all latents of a sequence, which are few; the
convolutions before and behind it run over segments. Over sequence shards keys and values are gathered: a shard sends
in proportion to its latents.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from harmonic.errors import check
from harmonic.kernels.context_parallel import left_halo
from harmonic.kernels.dense import product
from harmonic.models import base
from harmonic.models.base import Inputs, Params
from harmonic.models.costs import Costs, Gathered, Halo, count, operations
from harmonic.models.dilated import Dilated, RingSampler
from harmonic.models.dropout import Dropout
from harmonic.models.latent_transformer.config import ModelConfig
from harmonic.models.linear import init_linear, init_norm, layer_norm, linear, stacked

_QUERIES = 128  # latents whose scores are held at once
_BASE = 10_000.0  # of the rotary frequencies


class Past(NamedTuple):
    """Of the Transformer: what the newest latents were.

    Attributes:
      keys, values: [depth, batch, window, latent_width], the newest last; keys before their rotation.
      filled: int32, how many of them there are.
    """

    keys: jax.Array
    values: jax.Array
    filled: jax.Array


class State(NamedTuple):
    """All that is kept of the past.

    Attributes:
      position: int32, samples of the patch that is under way: 0 before and after a segment.
      last: [batch, channels] int32, the newest token.
      collected: [batch, patch - 1] int32, the front-end's inputs in this patch; zeros at a boundary.
      past: of the Transformer.
      pending: [batch, patch - 1, width], what the way up has for the samples to come.
      queues: of the local layers.
    """

    position: jax.Array
    last: jax.Array
    collected: jax.Array
    past: Past
    pending: jax.Array
    queues: Any


class LatentTransformer(base.Model):
    """The methods are those of `base.Model`."""

    config: ModelConfig

    def __init__(self, config: ModelConfig, num_levels: int = 256, channels: int = 1):
        check(channels == 1, "channels", channels, "1: a latent_transformer model has one channel")
        super().__init__(config, num_levels, channels)
        self.context = config.context
        self.dilated = Dilated(config.width, config.local_cycles, config.local_layers, config.skip_width)

    def init(self, key: jax.Array) -> Params:
        """Fresh float32 parameters; those of the Transformer's layers along a leading axis."""
        c, keys = self.config, iter(jax.random.split(key, 64))
        stages = list(zip(c.strides, c.widths[:-1], c.widths[1:], strict=True))
        inner = _inner(c.latent_width)

        def layer(key: jax.Array) -> Params:
            keys, width = jax.random.split(key, 4), c.latent_width
            params = {
                "attention_norm": init_norm(width, bias=False),
                "qkv": init_linear(keys[0], width, 3 * width, bias=False),
                "attention": init_linear(keys[1], width, width, bias=False),
                "mlp_norm": init_norm(width, bias=False),
                "mlp": init_linear(keys[2], width, 2 * inner, bias=False),
                "mlp_last": init_linear(keys[3], inner, width, bias=False),
            }
            # The more branches are added up, the smaller each begins.
            for name in ("attention", "mlp_last"):
                params[name]["kernel"] = params[name]["kernel"] / math.sqrt(2 * c.depth)
            return params

        return {
            "embedding": jax.random.normal(next(keys), (self.num_levels, c.width)),
            "front": {str(i): init_linear(next(keys), s * a, b) for i, (s, a, b) in enumerate(stages)},
            "layers": stacked(layer, next(keys), c.depth),
            "norm": init_norm(c.latent_width, bias=False),
            "up": {str(i): init_linear(next(keys), b, s * a) for i, (s, a, b) in enumerate(stages)},
            "local": self.dilated.init(next(keys)),
            "end": init_linear(next(keys), c.skip_width, c.skip_width),
            "head": init_linear(next(keys), c.skip_width, self.num_levels),
        }

    def init_state(self, batch: int, dtype: jnp.dtype = jnp.float32) -> State:
        """As `base.Model.init_state`."""
        c = self.config
        return State(
            position=jnp.zeros((), jnp.int32),
            last=jnp.full((batch, self.channels), self.num_levels // 2, jnp.int32),
            collected=jnp.zeros((batch, self.multiple - 1), jnp.int32),
            past=self._no_past(batch, dtype),
            pending=jnp.zeros((batch, self.multiple - 1, c.width), dtype),
            queues=self.dilated.init_state(batch, dtype),
        )

    def _no_past(self, batch: int, dtype: Any) -> Past:
        c = self.config
        empty = jnp.zeros((c.depth, batch, c.window, c.latent_width), dtype)
        return Past(empty, empty, jnp.zeros((), jnp.int32))

    def apply(
        self, weights: Any, inputs: Inputs, state: State, *, rng: Dropout | None = None, axis: str | None = None
    ) -> tuple[jax.Array, State]:
        """The logits of a segment, [batch, time, 1, num_levels], and the state after it; as `base.Model.apply`."""
        tokens = inputs["tokens"].astype(jnp.int32)
        time = tokens.shape[1]
        check(time > 0 and time % self.multiple == 0, "a segment", time, f"a multiple of {self.multiple} samples")
        e, last = self._embedded(weights, tokens, state.last, axis)
        latents, past = self._transform(weights, self._front(weights, e)[None], state.past, axis)
        logits, pending, queues = self._local(weights, e, latents[0], state.pending, state.queues, axis)
        return logits, State(state.position, last, state.collected, past, pending, queues)

    def _embedded(self, weights: Any, tokens: jax.Array, last: jax.Array, axis: str | None) -> Any:
        before, last = left_halo(tokens[:, -1], last, axis)
        before = jnp.concatenate([before[:, None], tokens[:, :-1]], axis=1)
        return jnp.take(weights["embedding"], before[..., 0], axis=0), last

    def _front(self, weights: Any, e: jax.Array) -> jax.Array:
        """e [batch, time, width] -> latents [batch, time / patch, latent_width]."""
        for i, stride in enumerate(self.config.strides):
            e = e if i == 0 else jax.nn.gelu(e)
            e = linear(weights["front"][str(i)], e.reshape(len(e), -1, stride * e.shape[-1]))
        return e

    def _up(self, weights: Any, latents: jax.Array) -> jax.Array:
        """latents [batch, n, latent_width] -> [batch, n patch, width]."""
        x = layer_norm(weights["norm"], latents)
        widths = self.config.widths
        for i in reversed(range(len(self.config.strides))):
            x = linear(weights["up"][str(i)], x).reshape(len(x), -1, widths[i])
            x = jax.nn.gelu(x) if i else x
        return x

    def _local(
        self, weights: Any, e: jax.Array, latents: jax.Array, pending: jax.Array, queues: Any, axis: str | None
    ) -> Any:
        """From what a segment's samples are, and its latents -> (logits, pending, queues)."""
        late = self.multiple - 1
        raw = self._up(weights, latents)
        due, pending = left_halo(raw[:, -late:], pending, axis)
        x = e + jnp.concatenate([due, raw[:, :-late]], axis=1)
        skips, queues = self.dilated.apply(weights["local"], x, queues, axis)
        return self._logits(weights, skips)[:, :, None], pending, queues

    def _logits(self, weights: Any, skips: jax.Array) -> jax.Array:
        return linear(weights["head"], jax.nn.relu(linear(weights["end"], jax.nn.relu(skips))))

    def _transform(self, weights: Any, x: jax.Array, past: Past, axis: str | None) -> tuple[jax.Array, Past]:
        """The Transformer over x [segments, batch, n, latent_width], n latents of this shard in each segment."""
        segments, batch, n, width = x.shape
        shards, shard = (jax.lax.axis_size(axis), jax.lax.axis_index(axis)) if axis else (1, 0)
        window, total = self.config.window, segments * shards * n
        first_valid = window - past.filled
        starts = (jnp.arange(segments, dtype=jnp.int32) * shards + shard) * n

        def everywhere(v: jax.Array) -> jax.Array:
            """[segments, batch, n, width] of each shard -> [batch, all latents in order, width]."""
            v = jax.lax.all_gather(v, axis) if shards > 1 else v[None]
            return v.transpose(2, 1, 0, 3, 4).reshape(batch, total, width)

        @jax.checkpoint
        def layer(x: jax.Array, scanned: Any) -> tuple[jax.Array, Any]:
            own, keys, values = scanned
            q, k, v = jnp.split(product(layer_norm(own["attention_norm"], x), own["qkv"]["kernel"]), 3, axis=-1)
            k, v = (jnp.concatenate([old, everywhere(new)], axis=1) for old, new in ((keys, k), (values, v)))
            y = self._attend(q, self._rotate(k, jnp.arange(window + total, dtype=jnp.int32)), v, starts, first_valid)
            x = x + product(y, own["attention"]["kernel"])
            up, gate = jnp.split(product(layer_norm(own["mlp_norm"], x), own["mlp"]["kernel"]), 2, axis=-1)
            x = x + product(up * jax.nn.silu(gate), own["mlp_last"]["kernel"])
            return x, (k[:, -window:], v[:, -window:])

        x, (keys, values) = jax.lax.scan(layer, x, (weights["layers"], past.keys, past.values))
        return x, Past(keys, values, jnp.minimum(past.filled + total, window))

    def _attend(
        self, q: jax.Array, keys: jax.Array, values: jax.Array, starts: jax.Array, first_valid: jax.Array
    ) -> jax.Array:
        """Attention of each segment's queries to the `window` newest latents.

        Args:
          q: [segments, batch, n, width], before its rotation.
          keys, values: [batch, window + all, width]: the past, then all latents; keys are rotated.
          starts: [segments], the number of each segment's first latent among all.
          first_valid: the first of the keys that there is.
        """
        segments, batch, n, width = q.shape
        window, heads = self.config.window, self.config.heads
        size = min(n, _QUERIES)
        blocks = -(-n // size)
        q = jnp.pad(q, ((0, 0), (0, 0), (0, blocks * size - n), (0, 0)))
        q = q.reshape(segments, batch, blocks, size, width).swapaxes(1, 2).reshape(-1, batch, size, width)
        firsts = (starts[:, None] + jnp.arange(blocks, dtype=jnp.int32)[None] * size).reshape(-1)
        # Queries that fill up the last block read beyond the keys.
        keys, values = (jnp.pad(v, ((0, 0), (0, blocks * size - n), (0, 0))) for v in (keys, values))
        scale = 1 / math.sqrt(width // heads)

        def by_head(v: jax.Array) -> jax.Array:
            return v.reshape(batch, -1, heads, width // heads)

        @jax.checkpoint
        def block(given: Any) -> jax.Array:
            q, first = given
            q = by_head(self._rotate(q, window + first + jnp.arange(size, dtype=jnp.int32)))
            near = [by_head(jax.lax.dynamic_slice_in_dim(v, first, window + size, 1)) for v in (keys, values)]
            scores = jnp.einsum("bqhd,bkhd->bhqk", q, near[0]) * scale
            key = jnp.arange(window + size, dtype=jnp.int32)[None]
            query = window + jnp.arange(size, dtype=jnp.int32)[:, None]
            seen = (key <= query) & (key > query - window) & (first + key >= first_valid)
            weights = jax.nn.softmax(jnp.where(seen[None, None], scores, -jnp.inf), axis=-1)
            return jnp.einsum("bhqk,bkhd->bqhd", weights, near[1]).reshape(batch, size, width)

        y = jax.lax.map(block, (q, firsts))
        y = y.reshape(segments, blocks, batch, size, width).swapaxes(1, 2).reshape(segments, batch, -1, width)
        return y[:, :, :n]

    def _rotate(self, v: jax.Array, positions: jax.Array) -> jax.Array:
        """Rotary positions: v [batch, n, width] at positions [n]; only differences of positions matter."""
        batch, n, width = v.shape
        half = width // self.config.heads // 2
        frequency = jnp.exp(jnp.arange(half).astype(v.dtype) * (-math.log(_BASE) / half))
        angle = (positions.astype(v.dtype)[:, None] * frequency[None])[None, :, None]
        a, b = jnp.split(v.reshape(batch, n, self.config.heads, -1), 2, axis=-1)
        cos, sin = jnp.cos(angle), jnp.sin(angle)
        return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1).reshape(v.shape)

    def nats(
        self,
        weights: Any,
        inputs: Inputs,
        lengths: jax.Array,
        *,
        rng: Dropout | None = None,
        axis: str | None = None,
    ) -> jax.Array:
        """As `base.Model.nats`: segments of samples become latents, attention runs over all, then segments again."""
        tokens = inputs["tokens"]
        segments, batch, local, _ = tokens.shape
        shards, shard = (jax.lax.axis_size(axis), jax.lax.axis_index(axis)) if axis else (1, 0)
        start = self.init_state(batch, weights["embedding"].dtype)

        @jax.checkpoint
        def encode(last: jax.Array, piece: jax.Array) -> tuple[jax.Array, jax.Array]:
            e, last = self._embedded(weights, piece.astype(jnp.int32), last, axis)
            return last, self._front(weights, e)

        @jax.checkpoint
        def decode(carry: Any, scanned: Any) -> tuple[Any, jax.Array]:
            last, pending, queues = carry
            piece, latents, number = scanned
            e, last = self._embedded(weights, piece.astype(jnp.int32), last, axis)
            logits, pending, queues = self._local(weights, e, latents, pending, queues, axis)
            position = (number * shards + shard) * local + jnp.arange(local, dtype=jnp.int32)
            mask = position[None] < lengths[:, None]
            return (last, pending, queues), -jnp.where(mask, self.log_prob(logits, piece), 0).sum()

        _, latents = jax.lax.scan(encode, start.last, tokens)
        latents, _ = self._transform(weights, latents, start.past, axis)
        numbers = jnp.arange(segments, dtype=jnp.int32)
        carry = start.last, start.pending, start.queues
        return jax.lax.scan(decode, carry, (tokens, latents, numbers))[1].sum()

    def step(self, weights: Any, inputs: Inputs, state: State) -> tuple[jax.Array, State]:
        """The logits of the next sample, [batch, 1, 1, num_levels], and the state; as `base.Model.step`."""
        if not isinstance(state.queues[0], tuple):
            sampler = self.sampler()
            logits, state = self.step(weights, inputs, sampler.enter(state))
            return logits, sampler.leave(state)
        patch, position = self.multiple, state.position
        late = patch - 1
        due = jax.lax.dynamic_index_in_dim(state.pending, jnp.minimum(position, late - 1), 1, keepdims=False)

        def turn(_: Any, carry: Any) -> Any:
            _, _, past = carry
            tokens = jnp.concatenate([state.collected, state.last], axis=1)
            latent = self._front(weights, jnp.take(weights["embedding"], tokens, axis=0))
            latent, past = self._transform(weights, latent[None], past, None)
            raw = self._up(weights, latent[0])
            return raw[:, 0], raw[:, 1:], past

        complete = position == late
        carry = due, state.pending, state.past
        due, pending, past = jax.lax.fori_loop(0, complete.astype(jnp.int32), turn, carry)
        newest = jnp.where(complete, jnp.zeros_like(state.last[:, 0]), state.last[:, 0])
        collected = jax.lax.dynamic_update_index_in_dim(state.collected, newest, jnp.minimum(position, late - 1), 1)
        collected = jnp.where(complete, jnp.zeros_like(collected), collected)
        x = weights["embedding"][state.last[:, 0]] + due
        skips, queues = self.dilated.step(weights["local"], x, state.queues, position)
        after = State((position + 1) % patch, state.last, collected, past, pending, queues)
        return self._logits(weights, skips)[:, None, None], after

    def observe(self, state: State, tokens: jax.Array) -> State:
        """As `base.Model.observe`."""
        return state._replace(last=tokens.astype(jnp.int32))

    def next_sample(self, weights: Any, window: jax.Array) -> jax.Array:
        """Logits [batch, num_levels] of the one sample that follows a window of tokens [batch, time, 1].

        One window, one sample: what the paper describes. The likelihood of N samples takes N windows so; `apply` gives
        the same logits for all of them at once, as long as no sample has more past than `context`.
        """
        filled = -(-(window.shape[1] + 1) // self.multiple) * self.multiple
        tokens = jnp.pad(window, ((0, 0), (0, filled - window.shape[1]), (0, 0)))
        logits, _ = self.apply(weights, {"tokens": tokens}, self.init_state(len(window), weights["embedding"].dtype))
        return logits[:, window.shape[1], 0]

    def sampler(self) -> RingSampler:
        """With the local layers' queues one by one."""
        return RingSampler(self)

    def matrix_axes(self, name: str, shape: tuple[int, ...]) -> tuple[int, int] | None:
        """The kernels of the Transformer, the local layers and the hidden layer behind them."""
        hidden = name.split(".")[0] in ("layers", "local", "end") and name.endswith("kernel")
        return (len(shape) - 2, len(shape) - 1) if hidden else None

    def costs(self, segments: int = 1) -> Costs:
        """As `base.Model.costs`; operations are counted in the traced program, those of attention for a full window."""
        c, params = self.config, jax.eval_shape(self.init, jax.random.key(0))
        sizes = {name: count(tree) for name, tree in params.items()}
        latent = sum(sizes[name] for name in ("front", "layers", "norm", "up"))
        kept_latents = (c.depth + 8) * c.latent_width / self.multiple
        # Scores of one block of queries are held at a time, however long a sequence is: here, of 16,384 samples.
        scores = 3 * c.heads * (c.window + _QUERIES) * _QUERIES / 16_384
        kept = c.local_cycles * (c.width + c.skip_width) + c.local_layers * 8 * c.width + kept_latents + scores
        kept *= 1 if segments > 1 else 1.65  # XLA makes no loop of one segment, and holds both passes at once
        return Costs(
            by_part={
                "embedding": sizes["embedding"],
                "front-end": sizes["front"] + sizes["up"],
                "Transformer": sizes["layers"] + sizes["norm"],
                "local layers": sizes["local"],
                "head": sizes["end"] + sizes["head"],
            },
            blocks=c.depth + c.local_cycles * c.local_layers,
            operations=operations(self, segments),
            weights_read=latent / self.multiple + sizes["local"] + sizes["end"] + sizes["head"] + c.width,
            kept=kept,
            exchanges=(
                Gathered("latents", 2 * c.latent_width, times=c.depth, every=self.multiple),
                Halo("pending", (self.multiple - 1) * c.width),
                *self.dilated.exchanges(),
                Halo("token_edge", 1, differentiated=False),
            ),
        )


def _inner(width: int) -> int:
    """Of SwiGLU: as many parameters as an MLP of four times the width."""
    return 8 * -(-width // 3)


make = LatentTransformer
