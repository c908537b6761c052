"""The scan on TPU, through Mosaic: a tile of batch x channels a step, the state kept on chip from block to block.

Arrays are transposed to [time, batch, channels], so that one step's rows and channels fill the (8, 128) registers and t
indexes whole tiles. XLA may fuse that transpose with the operation that makes the array.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from harmonic.kernels.pallas import cg_lru as gates
from harmonic.kernels.pallas import scan
from harmonic.kernels.pallas.scan import Tiling
from harmonic.kernels.target import platform

_STEPS = 64  # twelve arrays in the backward pass, in two copies (one in flight): 6 MB of at least 16 MB on chip


class _TpuTiling(Tiling):
    joined = False
    in_order = True
    chunks = 1

    def __init__(self, batch: int, time: int, channels: int):
        super().__init__(batch, time, channels)
        self.length = min(_STEPS, time)
        self.blocks = pl.cdiv(time, self.length)
        self.row = (min(batch, 8), min(channels, 128))
        self.grid = (pl.cdiv(batch, self.row[0]), pl.cdiv(channels, self.row[1]), self.blocks)
        parameters = pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary"))
        self.options = {"interpret": platform() == "cpu", "compiler_params": parameters}

    def arrange(self, v):
        return jnp.moveaxis(v, 1, 0)

    def restore(self, v):
        return jnp.moveaxis(v, 0, 1)

    def specs(self, reverse):
        border = pl.BlockSpec((None, *self.row), lambda b, c, k: (self._block(k, reverse), b, c))
        chunk = pl.BlockSpec((None, *self.row), lambda b, c, k: (0, b, c))
        return border, chunk

    def rows(self, parts, reverse):
        return pl.BlockSpec((self.length, *self.row), lambda b, c, k: (self._block(k, reverse), b, c))

    def _block(self, k, reverse):
        return self.blocks - 1 - k if reverse else k

    def parameter(self, v):
        return v[None], pl.BlockSpec((1, self.row[1]), lambda b, c, k: (0, c))


def tile(batch: int, time: int, channels: int, chunks: int | None = None) -> Tiling:
    """The tiling of [batch, time, channels] on TPU, where one chunk is always enough."""
    return _TpuTiling(batch, time, channels)


linear_scan = functools.partial(scan.linear_scan, tile)
cg_lru = functools.partial(gates.cg_lru, tile)
