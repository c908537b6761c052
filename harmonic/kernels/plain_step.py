"""One residual block of HarmonicRNN for a single sample: its weights, and the plain step.

The functions `pack`, `unstack`, `stack`, `run` and `helper` are one implementation of the door `kernels.block_step`;
`cpu.step` is the other one, and is tested against this one.
"""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from harmonic.kernels.arithmetic import Pair, add, multiply
from harmonic.kernels.dense import EPSILON, beside
from harmonic.kernels.gates import gelu, recurrence


class Dense(NamedTuple):
    """kernel [inputs, outputs] and bias [outputs]."""

    kernel: jax.Array
    bias: jax.Array


class BlockWeights(NamedTuple):
    """A block's parameters as they are multiplied: layers that read the same input are side by side.

    Attributes:
      entry: LN(x) to [Re z | Im z | p_i | p_r | gate]: the CG-LRU's input, the gates before their sigmoids, and the
        temporal block's gate before its gelu.
      decay, theta: [channels], 8 softplus(Lambda) and the angle.
      read_re, read_im: the CG-LRU's output from Re h (with the bias) and from Im h; generation is slower with one.
      last: the temporal block's W_last.
      mlp: LN(x) to [up | gate].
      mlp_last: the MLP block's W_last.
    """

    entry: Dense
    decay: jax.Array
    theta: jax.Array
    read_re: Dense
    read_im: jax.Array
    last: Dense
    mlp: Dense
    mlp_last: Dense


def pack(blocks: BlockWeights) -> list[BlockWeights]:
    """Weights along a leading axis [blocks, ...], as one entry of a list for each block."""
    return unstack(blocks)


def unstack(h: Any) -> list[Any]:
    """Arrays along a leading axis [blocks, ...], as one entry of a list for each block."""
    return [jax.tree.map(lambda v, i=i: v[i], h) for i in range(len(jax.tree.leaves(h)[0]))]


def stack(h: list[Any]) -> Any:
    """The inverse of `unstack`."""
    return jax.tree.map(lambda *blocks: jnp.stack(blocks), *h)


def run(packed: list[BlockWeights], x: jax.Array, h: list[Pair]) -> tuple[jax.Array, list[Pair]]:
    """The blocks one after the other: x [batch, width], h complex [batch, channels] for each block."""
    h = list(h)
    for i, block in enumerate(packed):
        x, h[i] = step_block(block, x, h[i])
    return x, h


helper = contextlib.nullcontext


def step_block(weights: BlockWeights, x: jax.Array, h: Pair) -> tuple[jax.Array, Pair]:
    """One block for one sample: x [batch, width], h complex [batch, channels] -> (x, h)."""
    channels = weights.theta.shape[0]
    z_re, z_im, p_i, p_r, gate = _split(step_dense(step_normalise(x), weights.entry), (channels,) * 4)
    a, driven = recurrence((z_re, z_im), (p_i, p_r), weights.decay, weights.theta)
    h = add(multiply(a, h), driven)
    y = step_dense(h[0], weights.read_re) + h[1] @ weights.read_im
    x = x + step_dense(y * gelu(gate), weights.last)
    up, gate = _split(step_dense(step_normalise(x), weights.mlp), (2 * x.shape[-1],))
    return x + step_dense(up * gelu(gate), weights.mlp_last), h


def step_dense(x: jax.Array, weights: Dense) -> jax.Array:
    """[batch, inputs] -> [batch, outputs]."""
    return x @ weights.kernel + beside(weights.bias, x)


def step_normalise(x: jax.Array) -> jax.Array:
    """`dense.normalise` of x [batch, width]: for so few rows a sum is faster than a product with ones."""
    centred = x - x.mean(-1, keepdims=True)
    return centred * jax.lax.rsqrt((centred * centred).mean(-1, keepdims=True) + EPSILON)


def _split(y: jax.Array, sizes: tuple[int, ...]) -> list[jax.Array]:
    return jnp.split(y, [sum(sizes[: i + 1]) for i in range(len(sizes))], axis=-1)
