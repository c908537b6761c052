"""The layers of HarmonicRNN, as Flax modules that read like the papers: embeddings, CG-LRU, residual blocks, pooling.

Shapes: [batch, time, width]. Every initial value follows the paper (arXiv 2510.02401) and De et al. (2402.19427).
`plain.py` runs these layers as they are written here; `fused.py` makes from them what training and generation run.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from harmonic.kernels import Pair
from harmonic.kernels.dense import EPSILON
from harmonic.models.harmonic_rnn.config import ModelConfig

GATE_EXPONENT = 8.0
Scan = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""(a, x [batch, time, channels], h0 [batch, channels]), complex -> h of h_t = a_t h_{t-1} + x_t, shaped as x."""
Ranges = tuple[Any, Any, Any]
"""Of initial recurrences: the least and the greatest squared radius, and the greatest angle."""
Drop = Callable[[jax.Array, int], jax.Array]
"""(a branch, 0 for the temporal block's and 1 for the MLP block's) -> the branch after dropout."""


def residual_initializer(scale: float):
    """Normal, fan-in, with variance `scale` / fan-in: the smaller, the more residual branches add up on a level."""
    return nnx.initializers.variance_scaling(scale, "fan_in", "normal")


class LayerNorm(nnx.LayerNorm):
    """Flax's parameters, and the equation in the type of x: Flax's own call promotes types implicitly."""

    def __call__(self, x: jax.Array) -> jax.Array:  # type: ignore[override]
        assert self.scale is not None and self.bias is not None
        centred = x - x.mean(-1, keepdims=True)
        y = centred * jax.lax.rsqrt((centred * centred).mean(-1, keepdims=True) + EPSILON)
        shape = (1,) * (x.ndim - 1) + (-1,)
        return y * self.scale.get_value().reshape(shape) + self.bias.get_value().reshape(shape)


class BlockDiagonal(nnx.Module):
    """A dense layer whose matrix is block-diagonal: [..., blocks * in] -> [..., blocks * out]."""

    def __init__(self, blocks: int, inputs: int, outputs: int, *, rngs: nnx.Rngs):
        initializer = nnx.initializers.lecun_normal(in_axis=-2, out_axis=-1, batch_axis=0)
        self.kernel = nnx.Param(initializer(rngs.params(), (blocks, inputs // blocks, outputs // blocks)))
        self.bias = nnx.Param(jnp.zeros((blocks, outputs // blocks)))

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.product(x)
        return y + self.bias.get_value().reshape((1,) * (y.ndim - 1) + (-1,))

    def product(self, x: jax.Array) -> jax.Array:
        """The layer without its bias."""
        kernel = self.kernel.get_value()
        blocks = x.reshape(*x.shape[:-1], *kernel.shape[:2])
        return jnp.einsum("...ki,kio->...ko", blocks, kernel).reshape(*x.shape[:-1], -1)


class CGLRU(nnx.Module):
    """Complex-gated linear recurrent unit (De et al. 2402.19427; Botev et al. 2404.07839).

    u = W_in x + b, z = u's first half + i its second
    i = sigmoid(BD_i u), r = sigmoid(BD_r u)
    log|a| = -8 r softplus(Lambda), arg a = theta r
    h_t = a_t h_{t-1} + sqrt(1 - |a_t|^2) i_t z_t
    y = W_out [Re h | Im h] + b
    """

    def __init__(self, config: ModelConfig, ranges: Ranges, *, rngs: nnx.Rngs):
        width, state, channels = config.width, config.state_width, config.state_width // 2
        low, high, angle = ranges
        self.input = nnx.Linear(width, state, rngs=rngs)
        self.input_gate = BlockDiagonal(config.gate_blocks, state, channels, rngs=rngs)
        self.recurrence_gate = BlockDiagonal(config.gate_blocks, state, channels, rngs=rngs)
        radius_squared = jax.random.uniform(rngs.params(), (channels,), minval=low, maxval=high)
        self.log_decay = nnx.Param(jnp.log(jnp.expm1(-0.5 * jnp.log(radius_squared))))  # softplus = -log radius
        self.angle = nnx.Param(jax.random.uniform(rngs.params(), (channels,), maxval=angle))
        self.output = nnx.Linear(state, width, rngs=rngs)

    def __call__(self, x: jax.Array, h0: Pair, scan: Scan) -> tuple[jax.Array, Pair]:
        """x [batch, time, width], h0 [batch, channels] -> (y, h_last)."""
        u = self.input(x)
        z = jnp.split(u, 2, axis=-1)
        i, r = nnx.sigmoid(self.input_gate(u)), nnx.sigmoid(self.recurrence_gate(u))
        log_a = -GATE_EXPONENT * r * nnx.softplus(self.log_decay.get_value())[None, None]
        a = jnp.exp(jax.lax.complex(log_a, r * self.angle.get_value()[None, None]))
        scale = jnp.sqrt(-jnp.expm1(2 * log_a)) * i
        h = scan(a, jax.lax.complex(scale * z[0], scale * z[1]), jax.lax.complex(*h0))
        y = self.output(jnp.concatenate([h.real, h.imag], axis=-1))
        return y, (h[:, -1].real, h[:, -1].imag)


class TemporalBlock(nnx.Module):
    """W_last(CG-LRU(LN(x)) * gelu(W_gate LN(x))): the branch, without dropout and the residual sum."""

    def __init__(self, config: ModelConfig, residual_scale: float, ranges: Ranges, *, rngs: nnx.Rngs):
        width = config.width
        self.norm = LayerNorm(width, rngs=rngs)
        self.recurrence = CGLRU(config, ranges, rngs=rngs)
        self.gate = nnx.Linear(width, width, rngs=rngs)
        self.last = nnx.Linear(width, width, kernel_init=residual_initializer(residual_scale), rngs=rngs)

    def __call__(self, x: jax.Array, h0: Pair, scan: Scan) -> tuple[jax.Array, Pair]:
        """(the branch of x [batch, time, width], h_last)."""
        n = self.norm(x)
        y, h_last = self.recurrence(n, h0, scan)
        return self.last(y * nnx.gelu(self.gate(n))), h_last


class MLPBlock(nnx.Module):
    """W_last(W_up LN(x) * gelu(W_gate LN(x))), twice as wide inside: the branch alone."""

    def __init__(self, config: ModelConfig, residual_scale: float, *, rngs: nnx.Rngs):
        width, inner = config.width, 2 * config.width
        self.norm = LayerNorm(width, rngs=rngs)
        self.up = nnx.Linear(width, inner, rngs=rngs)
        self.gate = nnx.Linear(width, inner, rngs=rngs)
        self.last = nnx.Linear(inner, width, kernel_init=residual_initializer(residual_scale), rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        n = self.norm(x)
        return self.last(self.up(n) * nnx.gelu(self.gate(n)))


class Block(nnx.Module):
    """A temporal block and the MLP block behind it, each added to the residual stream after dropout."""

    def __init__(self, config: ModelConfig, residual_scale: float, ranges: Ranges, *, rngs: nnx.Rngs):
        self.temporal = TemporalBlock(config, residual_scale, ranges, rngs=rngs)
        self.mlp = MLPBlock(config, residual_scale, rngs=rngs)

    def __call__(self, x: jax.Array, h0: Pair, scan: Scan, drop: Drop) -> tuple[jax.Array, Pair]:
        """x [batch, time, width], h0 [batch, channels] -> (x, h_last)."""
        y, h_last = self.temporal(x, h0, scan)
        x = x + drop(y, 0)
        return x + drop(self.mlp(x), 1), h_last


class Pool(nnx.Module):
    """Pooling in feature groups by a factor f: kernel [f, width / groups, width], its last axis ordered by groups."""

    def __init__(self, config: ModelConfig, factor: int, initializer, *, rngs: nnx.Rngs):
        group = config.width // config.pool_groups
        shape = (factor, group, config.width)
        self.kernel = nnx.Param(initializer(rngs.params(), shape))
        self.bias = nnx.Param(jnp.zeros(config.width))

    def down(self, x: jax.Array) -> jax.Array:
        """[batch, time * f, width] -> [batch, time, width]: a convolution with kernel and stride f."""
        kernel = self._in_groups()
        factor, group, groups, _ = kernel.shape
        x = x.reshape(x.shape[0], -1, factor, groups, group)
        y = jnp.einsum("btfgi,figo->btgo", x, kernel)
        return y.reshape(*y.shape[:2], -1) + self.bias.get_value()[None, None]

    def up(self, v: jax.Array) -> jax.Array:
        """[batch, time, width] -> [batch, time * f, width]: each pooled step spread over f.

        The input-dilated convolution, whose output s is v[s // f] w[f - 1 - s mod f]; the caller delays it by f - 1,
        which makes it causal.
        """
        kernel = self._in_groups()[::-1]
        _, group, groups, _ = kernel.shape
        y = jnp.einsum("btgi,figo->btfgo", v.reshape(*v.shape[:2], groups, group), kernel)
        return y.reshape(y.shape[0], -1, v.shape[-1]) + self.bias.get_value()[None, None]

    def _in_groups(self) -> jax.Array:
        """The kernel as [f, width / groups, groups, width / groups]."""
        kernel = self.kernel.get_value()
        factor, group, width = kernel.shape
        return kernel.reshape(factor, group, width // group, group)


class SinusoidalEmbedding(nnx.Module):
    """cos and sin of the token times `width` / 2 frequencies from 1 down to 1 / 10,000. Nothing is learned."""

    def __init__(self, config: ModelConfig, num_levels: int, *, rngs: nnx.Rngs):
        self.width = config.width

    def __call__(self, tokens: jax.Array, dtype: jnp.dtype) -> jax.Array:
        half = self.width // 2
        frequencies = jnp.exp(jnp.arange(half, dtype=dtype) * (-math.log(10_000) / half))
        angles = tokens.astype(dtype)[..., None] * frequencies.reshape((1,) * tokens.ndim + (half,))
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
    """LayerNorm and a dense layer to logits, or to the mixture of logistics."""

    def __init__(self, config: ModelConfig, num_levels: int, *, rngs: nnx.Rngs):
        self.norm = LayerNorm(config.width, rngs=rngs)
        self.dense = nnx.Linear(config.width, config.outputs(num_levels), rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.dense(self.norm(x))
