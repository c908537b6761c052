"""The scan on TPU, through Mosaic: a tile of batch x channels a step, the state kept on chip from block to block.

Time stands first, so that one step's rows and channels fill the (8, 128) registers and t indexes whole tiles. What
comes in as [batch, time, channels] is transposed for that, which XLA may do where the arrays are made.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from harmonic.kernels.pallas import scan
from harmonic.kernels.pallas.scan import Tiling
from harmonic.kernels.reference import Pair
from harmonic.kernels.target import platform

_STEPS = 64  # of the backward's twelve arrays, twice for copies under way: 6 MB of at least 16 on chip


class _TpuTiling(Tiling):
    in_order = True
    chunks = 1

    def __init__(self, batch: int, time: int, channels: int, interpret: bool):
        super().__init__(batch, time, channels)
        self.length = min(_STEPS, time)
        self.blocks = pl.cdiv(time, self.length)
        self.row = (min(batch, 8), min(channels, 128))
        self.grid = (pl.cdiv(batch, self.row[0]), pl.cdiv(channels, self.row[1]), self.blocks)
        parameters = pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary"))
        self.options = {"interpret": interpret, "compiler_params": parameters}

    def arrange(self, v):
        return jnp.moveaxis(v, 1, 0)

    def restore(self, v):
        return jnp.moveaxis(v, 0, 1)

    def specs(self, reverse):
        def block(k):
            return self.blocks - 1 - k if reverse else k

        step = pl.BlockSpec((self.length, *self.row), lambda b, c, k: (block(k), b, c))
        border = pl.BlockSpec((None, *self.row), lambda b, c, k: (block(k), b, c))
        chunk = pl.BlockSpec((None, *self.row), lambda b, c, k: (0, b, c))
        return step, border, chunk

    def parameter(self, v):
        return v[None], pl.BlockSpec((1, self.row[1]), lambda b, c, k: (0, c))


def linear_scan(x: Pair, a: Pair, h0: Pair, axis: str | None = None) -> tuple[Pair, Pair]:
    """As `kernels.linear_scan`."""
    return scan.linear_scan(_tile(), x, a, h0, axis)


def cg_lru(
    u: jax.Array, bias: jax.Array, decay: jax.Array, theta: jax.Array, h0: Pair, axis: str | None = None
) -> tuple[jax.Array, Pair]:
    """As `kernels.cg_lru`."""
    return scan.cg_lru(_tile(), u, bias, decay, theta, h0, axis)


def _tile() -> scan.Tile:
    return tile_interpreted if platform() == "cpu" else tile


def tile(batch: int, time: int, channels: int, chunks: int | None = None) -> Tiling:
    """The tiling of [batch, time, channels] on TPU, where one chunk is always enough."""
    return _TpuTiling(batch, time, channels, interpret=False)


def tile_interpreted(batch: int, time: int, channels: int, chunks: int | None = None) -> Tiling:
    """`tile`, for Pallas' interpreter: runs anywhere, slowly."""
    return _TpuTiling(batch, time, channels, interpret=True)
