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
from harmonic.kernels import Pair, cg_lru, gated_gelu
from harmonic.kernels.dense import channelwise, dense, normalise, product
from harmonic.kernels.plain_step import BlockWeights, Dense

_GATE_EXPONENT = 8.0


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


class BlockDiagonal(nnx.Module):
    """A dense layer whose matrix is block-diagonal: [..., blocks * in] -> [..., blocks * out]."""

    def __init__(self, blocks: int, inputs: int, outputs: int, *, rngs: nnx.Rngs):
        initializer = nnx.initializers.lecun_normal(in_axis=-2, out_axis=-1, batch_axis=0)
        self.kernel = nnx.Param(initializer(rngs.params(), (blocks, inputs // blocks, outputs // blocks)))
        self.bias = nnx.Param(jnp.zeros((blocks, outputs // blocks)))

    def after(self, kernel: jax.Array, bias: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The one dense layer (kernel, bias) that this one makes behind another."""
        own, own_bias = self.kernel.get_value(), self.bias.get_value().ravel()

        def product(x: jax.Array) -> jax.Array:
            blocks = x.reshape(*x.shape[:-1], own.shape[0], own.shape[1])
            return jnp.einsum("...ki,kio->...ko", blocks, own).reshape(*x.shape[:-1], -1)

        return product(kernel), product(bias) + own_bias


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


class TemporalBlock(nnx.Module):
    """W_last(CG-LRU(LN(x)) * gelu(W_gate LN(x))): the branch, without dropout and the residual sum."""

    def __init__(self, config: ModelConfig, residual_scale: float, *, rngs: nnx.Rngs):
        width = config.width
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.recurrence = CGLRU(config, rngs=rngs)
        self.gate = nnx.Linear(width, width, rngs=rngs)
        self.last = nnx.Linear(width, width, kernel_init=residual_initializer(residual_scale), rngs=rngs)


class MLPBlock(nnx.Module):
    """W_last(W_up LN(x) * gelu(W_gate LN(x))), twice as wide inside: the branch alone."""

    def __init__(self, config: ModelConfig, residual_scale: float, *, rngs: nnx.Rngs):
        width, inner = config.width, 2 * config.width
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.up = nnx.Linear(width, inner, rngs=rngs)
        self.gate = nnx.Linear(width, inner, rngs=rngs)
        self.last = nnx.Linear(inner, width, kernel_init=residual_initializer(residual_scale), rngs=rngs)


def _linear(layer: nnx.Linear) -> Dense:
    assert layer.bias is not None
    return Dense(layer.kernel.get_value(), layer.bias.get_value())


def _behind_norm(norm: nnx.LayerNorm, *layers: Dense) -> Dense:
    """Layers side by side behind one LayerNorm, whose scale and bias go into them: a layer behind `normalise`."""
    assert norm.scale is not None and norm.bias is not None
    kernel = jnp.concatenate([layer.kernel for layer in layers], axis=1)
    bias = jnp.concatenate([layer.bias for layer in layers])
    return Dense(norm.scale.get_value()[:, None] * kernel, norm.bias.get_value() @ kernel + bias)


class Block(nnx.Module):
    """A temporal block and the MLP block behind it, each added to the residual stream after dropout."""

    def __init__(self, config: ModelConfig, residual_scale: float, *, rngs: nnx.Rngs):
        self.temporal = TemporalBlock(config, residual_scale, rngs=rngs)
        self.mlp = MLPBlock(config, residual_scale, rngs=rngs)

    def fuse(self) -> BlockWeights:
        """The block's parameters as `run_block` takes them."""
        temporal, mlp = self.temporal, self.mlp
        unit = temporal.recurrence
        entry, output = _linear(unit.input), _linear(unit.output)
        gates = [Dense(*gate.after(*entry)) for gate in (unit.input_gate, unit.recurrence_gate)]
        channels = unit.angle.get_value().shape[0]
        return BlockWeights(
            entry=_behind_norm(temporal.norm, entry, *gates, _linear(temporal.gate)),
            decay=_GATE_EXPONENT * nnx.softplus(unit.log_decay.get_value()),
            theta=unit.angle.get_value(),
            read_re=Dense(output.kernel[:channels], output.bias),
            read_im=output.kernel[channels:],
            last=_linear(temporal.last),
            mlp=_behind_norm(mlp.norm, _linear(mlp.up), _linear(mlp.gate)),
            mlp_last=_linear(mlp.last),
        )


def run_block(
    weights: BlockWeights,
    x: jax.Array,
    h0: Pair,
    *,
    rate: float = 0.0,
    rng: Dropout | None = None,
    number: jax.Array | int = 0,
    per_chunk: int = 1,
    axis: str | None = None,
) -> tuple[jax.Array, Pair]:
    """x [batch, time, width], h0 [batch, channels] -> (x, h_last); `rate`, `rng`, `number`, `per_chunk` of dropout."""
    width, inner = x.shape[-1], 4 * weights.theta.shape[0]
    # Two products instead of one that is cut in two: what a kernel of ours reads must lie by itself.
    n, (kernel, bias) = normalise(x), weights.entry
    h, h_last = cg_lru(product(n, kernel[:, :inner]), bias[:inner], weights.decay, weights.theta, h0, axis=axis)
    read = jnp.concatenate([weights.read_re.kernel, weights.read_im])
    y, gate = product(h, read), product(n, kernel[:, inner:])
    branch = dense(gated_gelu(y, weights.read_re.bias, gate, bias[inner:]), *weights.last)
    x = x + dropout(branch, rate, rng, 2 * number, per_chunk)
    n, (kernel, bias) = normalise(x), weights.mlp
    up, gate = product(n, kernel[:, : 2 * width]), product(n, kernel[:, 2 * width :])
    branch = dense(gated_gelu(up, bias[: 2 * width], gate, bias[2 * width :]), *weights.mlp_last)
    return x + dropout(branch, rate, rng, 2 * number + 1, per_chunk), h_last


class Pool(nnx.Module):
    """Grouped pooling by a factor f: kernel [f, width / groups, width], its last axis ordered by groups."""

    def __init__(self, config: ModelConfig, factor: int, initializer, *, rngs: nnx.Rngs):
        group = config.width // config.pool_groups
        shape = (factor, group, config.width)
        self.kernel = nnx.Param(initializer(rngs.params(), shape))
        self.bias = nnx.Param(jnp.zeros(config.width))

    def fuse(self, up: bool) -> Dense:
        """The kernel and bias as `pool_down`, or with `up` `pool_up`, multiplies by them.

        Where each feature is pooled alone, the kernel is [f, width]; else it is dense, with zeros between groups:
        [f * width, width] down, and [width, f * width] up, with a bias for each of its columns.
        """
        kernel, bias = self.kernel.get_value(), self.bias.get_value()
        factor, group, width = kernel.shape
        kernel = kernel[::-1] if up else kernel
        if group == 1:
            return Dense(kernel[:, 0], bias)
        groups = width // group
        blocks = kernel.reshape(factor, 1, group, groups, group) * jnp.eye(groups)[:, None, :, None]
        blocks = blocks.reshape(factor, width, width).astype(kernel.dtype)
        if up:
            return Dense(blocks.swapaxes(0, 1).reshape(width, -1), jnp.tile(bias, factor))
        return Dense(blocks.reshape(-1, width), bias)


def pool_down(weights: Dense, x: jax.Array, factor: int) -> jax.Array:
    """[batch, time * factor, width] -> [batch, time, width]: a convolution with kernel and stride `factor`."""
    kernel, bias = weights
    batch, width = x.shape[0], x.shape[-1]
    if kernel.shape == (factor, width):
        first = jnp.zeros_like(kernel).at[0].set(bias)
        return channelwise(x.reshape(batch, -1, factor, width), kernel, first).sum(2)
    return dense(x.reshape(batch, -1, factor * width), kernel, bias)


def pool_up(weights: Dense, v: jax.Array, factor: int) -> jax.Array:
    """[batch, time, width] -> [batch, time * factor, width]: each pooled step spread over `factor`.

    The input-dilated convolution, whose output s is v[s // f] w[f - 1 - s mod f]; the caller delays it by f - 1, which
    makes it causal.
    """
    kernel, bias = weights
    width = v.shape[-1]
    if kernel.shape == (factor, width):
        spread = jnp.broadcast_to(v[:, :, None], (*v.shape[:2], factor, width))
        y = channelwise(spread, kernel, jnp.broadcast_to(bias, kernel.shape))
    else:
        y = dense(v, kernel, bias)
    return y.reshape(v.shape[0], -1, width)


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

    def fuse(self) -> Dense:
        """The layer behind `normalise`."""
        return _behind_norm(self.norm, _linear(self.dense))
