"""The layers of HarmonicRNN, as Flax modules: embeddings, CG-LRU, residual blocks, pooling.

Shapes: [batch, time, width]. Every initial value follows the paper (arXiv 2510.02401) and De et al. (2402.19427).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from harmonic.config import ModelConfig
from harmonic.kernels import Pair, linear_scan

_GATE_EXPONENT = 8.0
_SQRT_GRADIENT = 200.0


class Dropout(NamedTuple):
    """What dropout masks are keyed by, so that they do not depend on mesh, segments, batch layout or resumption.

    Attributes:
      words: [2] uint32, random bits of the run's seed and step.
      examples: [batch] int32, the number of each row in the global batch.
      chunk: int32, how many pooling products stand before this piece of the sequence.
    """

    words: jax.Array
    examples: jax.Array
    chunk: jax.Array


def _mix(x: jax.Array) -> jax.Array:
    """A bijection of uint32 that scatters its input's bits (Wellons' lowbias32)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def dropout(x: jax.Array, rate: float, rng: Dropout | None, block: jax.Array | int, per_chunk: int) -> jax.Array:
    """Drops features of x [batch, time, width], where `per_chunk` steps make a pooling product; none without `rng`."""
    if rng is None or rate == 0:
        return x
    batch, time, width = x.shape
    # A hash of (words, block, example, chunk, place) rather than threefry: the masks are made twice a step, and took
    # 10 % of the paper model's step and a third of its compile time where they now take 4 %.
    place = jnp.arange(per_chunk * width, dtype=jnp.uint32)
    chunks = (rng.chunk + jnp.arange(time // per_chunk)).astype(jnp.uint32)
    key = _mix(rng.words[0] ^ _mix(rng.words[1] + jnp.asarray(block).astype(jnp.uint32)))
    key = _mix(key + _mix(rng.examples.astype(jnp.uint32))[:, None])
    key = _mix(key + _mix(chunks ^ jnp.uint32(0x9E3779B9)))
    bits = _mix(key[..., None] + _mix(place ^ rng.words[1])).reshape(batch, time, width)
    keep = bits >= jnp.uint32(round(rate * 2**32))
    return jnp.where(keep, x / (1 - rate), jnp.zeros_like(x))


def residual_initializer(scale: float):
    """Normal, fan-in, with variance `scale` / fan-in: the smaller, the more residual branches add up on a level."""
    return nnx.initializers.variance_scaling(scale, "fan_in", "normal")


@jax.custom_jvp
def bounded_sqrt(x: jax.Array) -> jax.Array:
    """sqrt(x) whose derivative is at most 200: at |a| = 1 the true one is infinite, and training meets NaNs."""
    return jnp.sqrt(x)


@bounded_sqrt.defjvp
def _bounded_sqrt_jvp(primals, tangents):
    (x,), (dx,) = primals, tangents
    return jnp.sqrt(x), dx * jax.lax.rsqrt(jnp.maximum(4 * x, 1 / _SQRT_GRADIENT**2))


class BlockDiagonal(nnx.Module):
    """A dense layer whose matrix is block-diagonal: [..., blocks * in] -> [..., blocks * out]."""

    def __init__(self, blocks: int, inputs: int, outputs: int, *, rngs: nnx.Rngs):
        initializer = nnx.initializers.lecun_normal(in_axis=-2, out_axis=-1, batch_axis=0)
        self.kernel = nnx.Param(initializer(rngs.params(), (blocks, inputs // blocks, outputs // blocks)))
        self.bias = nnx.Param(jnp.zeros((blocks, outputs // blocks)))

    def __call__(self, x: jax.Array) -> jax.Array:
        kernel, bias = self.kernel.get_value(), self.bias.get_value()
        blocks = x.reshape(*x.shape[:-1], kernel.shape[0], kernel.shape[1])
        y = jnp.einsum("...ki,kio->...ko", blocks, kernel) + bias
        return y.reshape(*x.shape[:-1], -1)


class CGLRU(nnx.Module):
    """Complex-gated linear recurrent unit (De et al. 2402.19427; Botev et al. 2404.07839).

    u = W_in x + b, z = u's first half + i its second
    i = sigmoid(BD_i u), r = sigmoid(BD_r u)
    log|a| = -8 r softplus(Lambda), arg a = theta r
    h_t = a_t h_{t-1} + sqrt(1 - |a_t|^2) i_t z_t
    y = W_out [Re h | Im h] + b
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        width, state, channels = config.width, config.state_width, config.state_width // 2
        self.input = nnx.Linear(width, state, rngs=rngs)
        self.input_gate = BlockDiagonal(config.gate_blocks, state, channels, rngs=rngs)
        self.recurrence_gate = BlockDiagonal(config.gate_blocks, state, channels, rngs=rngs)
        radius_squared = jax.random.uniform(rngs.params(), (channels,), minval=0.9**2, maxval=0.99**2)
        self.log_decay = nnx.Param(jnp.log(jnp.expm1(-0.5 * jnp.log(radius_squared))))  # softplus = -log radius
        self.angle = nnx.Param(jax.random.uniform(rngs.params(), (channels,), maxval=0.1 * math.pi))
        self.output = nnx.Linear(state, width, rngs=rngs)

    def __call__(self, x: jax.Array, h0: Pair, axis: str | None) -> tuple[jax.Array, Pair]:
        """x [batch, time, width], h0 [batch, channels] -> (y [batch, time, width], h_last)."""
        u = self.input(x)
        gate_in, gate_r = nnx.sigmoid(self.input_gate(u)), nnx.sigmoid(self.recurrence_gate(u))
        log_a = -_GATE_EXPONENT * gate_r * nnx.softplus(self.log_decay.get_value())
        angle = self.angle.get_value() * gate_r
        magnitude = jnp.exp(log_a)
        a = magnitude * jnp.cos(angle), magnitude * jnp.sin(angle)
        # |a|^2 from its logarithm, never as the square of a complex number, and without cancellation near 1.
        scale = bounded_sqrt(-jnp.expm1(2 * log_a)) * gate_in
        channels = scale.shape[-1]
        driven = scale * u[..., :channels], scale * u[..., channels:]
        h, h_last = linear_scan(driven, a, h0, axis=axis)
        return self.output(jnp.concatenate(h, axis=-1)), h_last


class TemporalBlock(nnx.Module):
    """W_last(CG-LRU(LN(x)) * gelu(W_gate LN(x))): the branch, without dropout and the residual sum."""

    def __init__(self, config: ModelConfig, residual_scale: float, *, rngs: nnx.Rngs):
        width = config.width
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.recurrence = CGLRU(config, rngs=rngs)
        self.gate = nnx.Linear(width, width, rngs=rngs)
        self.last = nnx.Linear(width, width, kernel_init=residual_initializer(residual_scale), rngs=rngs)

    def __call__(self, x: jax.Array, h0: Pair, axis: str | None) -> tuple[jax.Array, Pair]:
        x = self.norm(x)
        y, h_last = self.recurrence(x, h0, axis)
        return self.last(y * nnx.gelu(self.gate(x))), h_last


class MLPBlock(nnx.Module):
    """W_last(W_up LN(x) * gelu(W_gate LN(x))), twice as wide inside: the branch alone."""

    def __init__(self, config: ModelConfig, residual_scale: float, *, rngs: nnx.Rngs):
        width, inner = config.width, 2 * config.width
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.up = nnx.Linear(width, inner, rngs=rngs)
        self.gate = nnx.Linear(width, inner, rngs=rngs)
        self.last = nnx.Linear(inner, width, kernel_init=residual_initializer(residual_scale), rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.norm(x)
        return self.last(self.up(x) * nnx.gelu(self.gate(x)))


class Block(nnx.Module):
    """A temporal block and the MLP block behind it, each added to the residual stream after dropout."""

    def __init__(self, config: ModelConfig, residual_scale: float, *, rngs: nnx.Rngs):
        self.rate = config.dropout
        self.temporal = TemporalBlock(config, residual_scale, rngs=rngs)
        self.mlp = MLPBlock(config, residual_scale, rngs=rngs)

    def __call__(
        self, x: jax.Array, h0: Pair, rng: Dropout | None, number: jax.Array | int, per_chunk: int, axis: str | None
    ) -> tuple[jax.Array, Pair]:
        """x [batch, time, width], h0 [batch, channels]; `number` keys its dropout. Returns (x, h_last)."""
        branch, h_last = self.temporal(x, h0, axis)
        x = x + dropout(branch, self.rate, rng, 2 * number, per_chunk)
        x = x + dropout(self.mlp(x), self.rate, rng, 2 * number + 1, per_chunk)
        return x, h_last


class Pool(nnx.Module):
    """Grouped pooling by a factor f: kernel [f, width / groups, width], its last axis ordered by groups.

    `down` is a convolution with kernel and stride f. `up` spreads each pooled step over f: the input-dilated
    convolution, whose output s is v[s // f] w[f - 1 - s mod f]; the caller delays it by f - 1, which makes it causal.
    """

    def __init__(self, config: ModelConfig, factor: int, initializer, *, rngs: nnx.Rngs):
        group = config.width // config.pool_groups
        shape = (factor, group, config.width)
        self.kernel = nnx.Param(initializer(rngs.params(), shape))
        self.bias = nnx.Param(jnp.zeros(config.width))

    def down(self, x: jax.Array) -> jax.Array:
        """[batch, time * f, width] -> [batch, time, width]."""
        kernel, bias = self.kernel.get_value(), self.bias.get_value()
        factor, group, width = kernel.shape
        x = x.reshape(x.shape[0], -1, factor, width)
        if group == 1:
            return (x * kernel[:, 0]).sum(2) + bias
        x = x.reshape(*x.shape[:3], width // group, group)
        y = jnp.einsum("btfgi,figo->btgo", x, kernel.reshape(factor, group, width // group, group))
        return y.reshape(*y.shape[:2], width) + bias

    def up(self, v: jax.Array) -> jax.Array:
        """[batch, time, width] -> [batch, time * f, width], not yet delayed."""
        kernel, bias = self.kernel.get_value()[::-1], self.bias.get_value()
        factor, group, width = kernel.shape
        if group == 1:
            y = v[:, :, None] * kernel[:, 0]
        else:
            v = v.reshape(*v.shape[:2], width // group, group)
            y = jnp.einsum("btgi,figo->btfgo", v, kernel.reshape(factor, group, width // group, group))
        return y.reshape(y.shape[0], -1, width) + bias


class SinusoidalEmbedding(nnx.Module):
    """cos and sin of the token times `width` / 2 frequencies from 1 down to 1 / 10,000. Nothing is learned."""

    def __init__(self, config: ModelConfig, num_levels: int, *, rngs: nnx.Rngs):
        self.width = config.width

    def __call__(self, tokens: jax.Array, dtype: jnp.dtype) -> jax.Array:
        half = self.width // 2
        frequencies = jnp.exp(jnp.arange(half, dtype=dtype) * (-math.log(10_000) / half))
        angles = tokens.astype(dtype)[..., None] * frequencies
        return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class LinearEmbedding(nnx.Module):
    """The token scaled to [-1, 1), and a dense layer."""

    def __init__(self, config: ModelConfig, num_levels: int, *, rngs: nnx.Rngs):
        self.num_levels = num_levels
        self.dense = nnx.Linear(1, config.width, rngs=rngs)

    def __call__(self, tokens: jax.Array, dtype: jnp.dtype) -> jax.Array:
        return self.dense(2 * tokens.astype(dtype)[..., None] / self.num_levels - 1)


class LearnedEmbedding(nnx.Module):
    """A table of one vector a token."""

    def __init__(self, config: ModelConfig, num_levels: int, *, rngs: nnx.Rngs):
        self.table = nnx.Embed(num_levels, config.width, rngs=rngs)

    def __call__(self, tokens: jax.Array, dtype: jnp.dtype) -> jax.Array:
        return jnp.take(self.table.embedding.get_value(), tokens, axis=0)


EMBEDDINGS = {"sinusoidal": SinusoidalEmbedding, "linear": LinearEmbedding, "learned": LearnedEmbedding}


class Head(nnx.Module):
    """LayerNorm and a dense layer to logits."""

    def __init__(self, config: ModelConfig, num_levels: int, *, rngs: nnx.Rngs):
        self.norm = nnx.LayerNorm(config.width, rngs=rngs)
        self.dense = nnx.Linear(config.width, num_levels, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.dense(self.norm(x))
