"""The layers as training and generation run them: layers that read the same input side by side, norms and gates folded
into the matrices around them, and the kernels in the place of the equations.

`fuse_block` and its like turn the layers of `layers.py` into plain arrays, once a step; `run_block` and its like
multiply by these. To rounding, both give what the layers' own `__call__` gives.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from harmonic.kernels import Pair, cg_lru, gated_gelu
from harmonic.kernels.dense import channelwise, dense, normalise, product
from harmonic.kernels.plain_step import BlockWeights, Dense
from harmonic.models.dropout import Dropout, dropout
from harmonic.models.harmonic_rnn import layers


def fuse_block(block: layers.Block) -> BlockWeights:
    """The block's parameters as `run_block` takes them."""
    temporal, mlp = block.temporal, block.mlp
    unit = temporal.recurrence
    entry, output = _dense(unit.input), _dense(unit.output)
    # The gates read what `entry` makes: one matrix behind another is one matrix.
    gates = [Dense(gate.product(entry.kernel), gate(entry.bias)) for gate in (unit.input_gate, unit.recurrence_gate)]
    channels = unit.angle.get_value().shape[0]
    return BlockWeights(
        entry=_behind_norm(temporal.norm, entry, *gates, _dense(temporal.gate)),
        decay=layers.GATE_EXPONENT * nnx.softplus(unit.log_decay.get_value()),
        theta=unit.angle.get_value(),
        read_re=Dense(output.kernel[:channels], output.bias),
        read_im=output.kernel[channels:],
        last=_dense(temporal.last),
        mlp=_behind_norm(mlp.norm, _dense(mlp.up), _dense(mlp.gate)),
        mlp_last=_dense(mlp.last),
    )


def fuse_head(head: layers.Head) -> Dense:
    """The head as one layer behind `normalise`."""
    return _behind_norm(head.norm, _dense(head.dense))


def fuse_pool(pool: layers.Pool, *, up: bool) -> Dense:
    """The kernel and bias as `pool_down`, or with `up` `pool_up`, multiplies by them.

    Where each feature is pooled alone, the kernel is [f, width]; else it is dense, with zeros between groups:
    [f * width, width] down, and [width, f * width] up, with a bias for each of its columns.
    """
    kernel, bias = pool.kernel.get_value(), pool.bias.get_value()
    factor, group, width = kernel.shape
    kernel = kernel[::-1] if up else kernel
    if group == 1:
        return Dense(kernel[:, 0], bias)
    groups = width // group
    between = jnp.eye(groups, dtype=kernel.dtype)[None, :, None, :, None]
    blocks = (kernel.reshape(factor, 1, group, groups, group) * between).reshape(factor, width, width)
    if up:
        return Dense(blocks.swapaxes(0, 1).reshape(width, -1), jnp.tile(bias, factor))
    return Dense(blocks.reshape(-1, width), bias)


def _dense(layer: nnx.Linear) -> Dense:
    assert layer.bias is not None
    return Dense(layer.kernel.get_value(), layer.bias.get_value())


def _behind_norm(norm: nnx.LayerNorm, *columns: Dense) -> Dense:
    """Layers side by side behind one LayerNorm, with its scale and bias folded in: a layer behind `normalise`."""
    assert norm.scale is not None and norm.bias is not None
    kernel = jnp.concatenate([layer.kernel for layer in columns], axis=1)
    bias = jnp.concatenate([layer.bias for layer in columns])
    return Dense(norm.scale.get_value()[:, None] * kernel, norm.bias.get_value() @ kernel + bias)


def run_block(
    weights: BlockWeights,
    x: jax.Array,
    h0: Pair,
    *,
    kernel: str = "auto",
    rate: float = 0.0,
    rng: Dropout | None = None,
    number: jax.Array | int = 0,
    per_chunk: int = 1,
    axis: str | None = None,
) -> tuple[jax.Array, Pair]:
    """A block over a segment.

    Args:
      weights: of the block.
      x: [batch, time, width].
      h0: [batch, channels], before the segment.
      kernel: implementation of the recurrence.
      rate, rng, number, per_chunk: of dropout; the block's number sets its masks apart.
      axis: the mesh axis that time is cut over.

    Returns:
      (x, h_last).
    """
    width, inner = x.shape[-1], 4 * weights.theta.shape[0]
    # Two matmuls, not one and a split: the kernels need contiguous inputs, and a split copies.
    n, (matrix, bias) = normalise(x), weights.entry
    u, gate = product(n, matrix[:, :inner]), product(n, matrix[:, inner:])
    h, h_last = cg_lru(u, bias[:inner], weights.decay, weights.theta, h0, axis=axis, implementation=kernel)
    y = product(h, jnp.concatenate([weights.read_re.kernel, weights.read_im]))
    branch = dense(gated_gelu(y, weights.read_re.bias, gate, bias[inner:], implementation=kernel), *weights.last)
    x = x + dropout(branch, rate, rng, 2 * number, per_chunk)
    n, (matrix, bias) = normalise(x), weights.mlp
    up, gate = product(n, matrix[:, : 2 * width]), product(n, matrix[:, 2 * width :])
    branch = dense(gated_gelu(up, bias[: 2 * width], gate, bias[2 * width :], implementation=kernel), *weights.mlp_last)
    return x + dropout(branch, rate, rng, 2 * number + 1, per_chunk), h_last


def pool_down(weights: Dense, x: jax.Array, factor: int) -> jax.Array:
    """As `layers.Pool.down`."""
    kernel, bias = weights
    batch, width = x.shape[0], x.shape[-1]
    if kernel.shape == (factor, width):
        first = jnp.zeros_like(kernel).at[0].set(bias)
        return channelwise(x.reshape(batch, -1, factor, width), kernel, first).sum(2)
    return dense(x.reshape(batch, -1, factor * width), kernel, bias)


def pool_up(weights: Dense, v: jax.Array, factor: int) -> jax.Array:
    """As `layers.Pool.up`."""
    kernel, bias = weights
    width = v.shape[-1]
    if kernel.shape == (factor, width):
        spread = jnp.broadcast_to(v[:, :, None], (*v.shape[:2], factor, width))
        y = channelwise(spread, kernel, jnp.broadcast_to(bias[None], kernel.shape))
    else:
        y = dense(v, kernel, bias)
    return y.reshape(v.shape[0], -1, width)
