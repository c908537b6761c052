"""The scan on GPU, through Triton: a thread a channel, chunks of time side by side.

Triton, and not Mosaic GPU, the default of `pl.pallas_call`, which warns about it: there is no matrix product here and
nothing to stage in shared memory, and Triton also supports GPUs older than Hopper. Programs are plain loops over global
memory; blocks are windows, not copies, so that a chunk may have any length.
"""

from __future__ import annotations

import functools

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from harmonic.kernels.pallas import cg_lru as gates
from harmonic.kernels.pallas import scan
from harmonic.kernels.pallas.scan import Tiling
from harmonic.kernels.target import platform

# Computed, not measured: 500 threads on each of some 130 processors, each with the loads of four rows of four arrays in
# flight, are 30 KB a processor, about the product of bandwidth and latency. A chunk much shorter than `_SHORTEST` does
# not pay for its step in the walk over the chunks.
_THREADS = 2**16
_SHORTEST = 64


class _GpuTiling(Tiling):
    joined = True
    in_order = False

    def __init__(self, batch: int, time: int, channels: int, chunks: int | None):
        super().__init__(batch, time, channels)
        if chunks is None:
            chunks = max(1, min(_THREADS // (batch * channels), time // _SHORTEST))
        self.length = pl.cdiv(time, chunks)
        self.chunks = self.blocks = pl.cdiv(time, self.length)
        self.width = min(128, pl.next_power_of_2(channels))  # Triton's tensors are powers of two
        self.row = (self.width,)
        self.grid = (batch, pl.cdiv(channels, self.width), self.chunks)
        warps = max(1, self.width // 32)
        self.options = {"interpret": platform() == "cpu", "compiler_params": plt.CompilerParams(num_warps=warps)}

    def arrange(self, v):
        return v

    def restore(self, v):
        return v

    def specs(self, reverse):
        chunk = pl.BlockSpec((None, None, self.width), lambda b, c, k: (b, k, c))
        return chunk, chunk

    def rows(self, parts, reverse):
        return pl.BlockSpec((None, self.length, parts, self.width), lambda b, c, k: (b, k, 0, c))

    def parameter(self, v):
        return v, pl.BlockSpec((self.width,), lambda b, c, k: (c,))

    def mask(self):
        if self.channels % self.width == 0:
            return None
        return pl.program_id(1) * self.width + jax.lax.iota("int32", self.width) < self.channels

    def load(self, ref, mask, *at):
        return ref[at or ...] if mask is None else plt.load(ref.at[at or ...], mask=mask, other=0.0)

    def store(self, ref, mask, value, *at):
        if mask is None:
            ref[at or ...] = value
        else:
            plt.store(ref.at[at or ...], value, mask=mask)


def tile(batch: int, time: int, channels: int, chunks: int | None = None) -> Tiling:
    """The tiling of [batch, time, channels] on GPU, into `chunks` or as many as fill the device."""
    return _GpuTiling(batch, time, channels, chunks)


linear_scan = functools.partial(scan.linear_scan, tile)
cg_lru = functools.partial(gates.cg_lru, tile)
