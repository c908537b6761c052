"""The linear scan as Pallas kernels for GPU and TPU, fused with the elementwise work before it.

A scan here is h_t = a_t h_{t-1} + x_t, where (a_t, x_t) = coefficients(inputs at t, parameters) is elementwise: nothing
at all for `linear_scan`, the gates for `cg_lru`. The kernels compute a and x in registers, twice if they must, and
never write them; the backward kernel computes them again, with their derivative, row by row.

There is one kernel, `_walk`: a loop over the rows of a block. A platform adds its `Tiling`:

- GPU: a program cannot pass its state to another one, so time is cut into chunks that are scanned side by side. A
  first pass writes each chunk's map (the product of its a, its last h from zero), one tiny walk over the chunks
  composes these, a second pass writes h. With enough rows and channels to fill the device there is one chunk, and no
  first pass.
- TPU: the grid runs in order, so the state is passed on in a block that is visited again, and one pass is enough.

Passes over memory of the fused CG-LRU, in arrays of [batch, time, channels] (the inputs are 4, h is 2):

                      forward                   backward
    one chunk, TPU    4 + 2 = 6                 4 inputs + 2 h + 2 dh + 4 gradients = 12
    chunks            4 + 6 = 10                1 gate + 2 dh + 12 = 15

On GPU the gates, h and their gradients have their parts side by side, [batch, time, parts * channels], as the products
before and after make and take them; biases are added, and their gradients summed, in the kernels. A checkpointed block
keeps the states that enter its chunks, so that its backward pass does not make the first pass again (unsharded).

If they were not fused, the gates alone would read 4 and write 4 forward before any scan reads them. A single pass with
decoupled look-back would have the first line's counts at any number of chunks; but its programs wait for one another's
flags, with acquire and release ordering, which Pallas does not promise on Triton. A sharded sequence takes the first
pass on either platform: each shard's map must be known before a state can enter it.
"""

from __future__ import annotations

import abc
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl

from harmonic.kernels.arithmetic import Pair, add, multiply, multiply_conjugate
from harmonic.kernels.context_parallel import exchange_carries
from harmonic.kernels.kept import CHUNK_STARTS

Rows = tuple[jax.Array, ...]
Pull = Callable[[Pair, Pair], tuple[Rows, Rows]]
"""(gradients of a and x) -> (gradients of the inputs' rows, of the parameters)."""
Coefficients = Callable[[Rows, Rows], tuple[Pair, Pair, Pull]]
"""(the inputs' rows, the parameters, each as a row) -> (a, x, the derivative): elementwise, of one shape."""

_UNROLL = 4  # rows whose loads are in flight together


class Tiling(abc.ABC):
    """How a platform divides [batch, time, channels] among the programs of a kernel; the grid's last axis is time.

    Arrays over time have several parts of such channels side by side: [batch, time, parts * channels].

    Attributes:
      joined: whether a kernel reads and writes all parts of an array where they are; else each is an array of its own.
      chunks: pieces of time that are scanned side by side, each from a state of its own.
      length, blocks: rows of a block, and how many blocks there are.
      row: the shape of one time step inside a program.
      in_order: whether the blocks of a chunk run one after the other, so that each can pass its state to the next.
      options: further arguments of `pl.pallas_call`.
    """

    joined: bool
    grid: tuple[int, int, int]
    chunks: int
    length: int
    blocks: int
    row: tuple[int, ...]
    in_order: bool
    options: dict[str, Any]

    def __init__(self, batch: int, time: int, channels: int):
        self.batch, self.time, self.channels = batch, time, channels

    @abc.abstractmethod
    def arrange(self, v: jax.Array) -> jax.Array:
        """[batch, time, channels] (or blocks, or chunks, for time) in the order that the kernels read."""

    @abc.abstractmethod
    def restore(self, v: jax.Array) -> jax.Array:
        """The inverse of `arrange`."""

    @abc.abstractmethod
    def specs(self, reverse: bool) -> tuple[pl.BlockSpec, pl.BlockSpec]:
        """The windows on arranged arrays of a row a block, and a row a chunk."""

    @abc.abstractmethod
    def rows(self, parts: int, reverse: bool) -> pl.BlockSpec:
        """The window on arrays over time: on [batch, time, parts, channels] where they are joined, else on an arranged
        part."""

    @abc.abstractmethod
    def parameter(self, v: jax.Array) -> tuple[jax.Array, pl.BlockSpec]:
        """[channels], and the window on it."""

    def mask(self) -> jax.Array | None:
        """The elements of a row that are inside the array, or None where the platform masks the others itself."""
        return None

    def load(self, ref, mask, *at) -> jax.Array:
        """Reads a row."""
        return ref[at or ...]

    def store(self, ref, mask, value: jax.Array, *at) -> None:
        """Writes a row."""
        ref[at or ...] = value

    def block(self, reverse: bool) -> jax.Array:
        """The number of this program's block."""
        block = pl.program_id(2)
        return self.blocks - 1 - block if reverse and self.in_order else block


Tile = Callable[..., Tiling]
"""(batch, time, channels, chunks or None) -> a tiling, with the platform's own choice of chunks for None."""


def _walk(
    step: Callable,
    *,
    tiling: Tiling,
    rows: Sequence[jax.Array],
    carry: Sequence[jax.Array | float],
    dtype: Any,
    parameters: Sequence[jax.Array] = (),
    previous: Sequence[jax.Array] = (),
    borders: Sequence[jax.Array] = (),
    outputs: Sequence[tuple[int, Any]] = (),
    reverse: bool = False,
    name: str,
) -> tuple[list[jax.Array], list[jax.Array]]:
    """Scans `step(row, previous row, parameters, carry) -> (carry, output row)` over the time of each chunk.

    Args:
      rows: [batch, time, parts * channels]; a step is given the rows of all their parts at t.
      carry: [batch, chunks, channels] with which each chunk starts, or a number.
      parameters: [channels].
      previous: [batch, time, parts * channels]; a step is given the rows of all their parts at t - 1.
      borders: of each of these parts the row before each block, [batch, blocks, channels]: a program sees no rows but
        its own.
      dtype: what the rows are computed in.
      outputs: (parts, type) of each array that a step writes rows of.

    Returns:
      (outputs [batch, time, parts * channels], carry after each chunk [batch, chunks, channels]).
    """
    block_spec, chunk_spec = tiling.specs(reverse)
    starts = [v for v in carry if not isinstance(v, float)]

    def cut(v: jax.Array) -> list[tuple[Any, pl.BlockSpec]]:
        """An array over time as the kernel takes it."""
        parts = v.shape[2] // tiling.channels
        if tiling.joined:
            return [(v.reshape(*v.shape[:2], parts, -1), tiling.rows(parts, reverse))]
        return [(tiling.arrange(part), tiling.rows(1, reverse)) for part in jnp.split(v, parts, axis=-1)]

    operands: list[list[tuple[Any, pl.BlockSpec]]] = [
        [pair for v in rows for pair in cut(v)],
        [pair for v in previous for pair in cut(v)],
        [(tiling.arrange(v), block_spec) for v in borders],
        [tiling.parameter(v) for v in parameters],
        [(tiling.arrange(v), chunk_spec) for v in starts],
    ]

    def shaped(time: int, dtype) -> jax.ShapeDtypeStruct:
        return jax.eval_shape(tiling.arrange, jax.ShapeDtypeStruct((tiling.batch, time, tiling.channels), dtype))

    def made(parts: int, dtype) -> list[tuple[Any, pl.BlockSpec]]:
        if tiling.joined:
            shape = tiling.batch, tiling.time, parts, tiling.channels
            return [(jax.ShapeDtypeStruct(shape, dtype), tiling.rows(parts, reverse))]
        return [(shaped(tiling.time, dtype), tiling.rows(1, reverse))] * parts

    results: list[list[tuple[Any, pl.BlockSpec]]] = [
        [pair for parts, d in outputs for pair in made(parts, d)],
        [(shaped(tiling.chunks, dtype), chunk_spec) for _ in carry],
    ]

    def kernel(*refs):
        remaining = iter(refs)
        groups = [[next(remaining) for _ in group] for group in (*operands, *results)]
        row_refs, previous_refs, border_refs, parameter_refs, start_refs, output_refs, carry_refs = groups

        mask = tiling.mask()

        def load(ref, *at):
            return tiling.load(ref, mask, *at).astype(dtype)

        starts = iter(start_refs)
        state = [jnp.full(tiling.row, v, dtype) if isinstance(v, float) else load(next(starts)) for v in carry]
        if tiling.in_order:
            first = pl.program_id(2) == 0
            state = [jnp.where(first, start, load(ref)) for start, ref in zip(state, carry_refs, strict=True)]
        shared = tuple(jnp.broadcast_to(load(ref), tiling.row) for ref in parameter_refs)
        before_block = [load(ref) for ref in border_refs]

        def places(refs, t) -> list[tuple]:
            """(ref, *index) of each part's row at t."""
            if not tiling.joined:
                return [(ref, t) for ref in refs]
            return [(ref, t, jnp.full((), part, t.dtype)) for ref in refs for part in range(ref.shape[1])]

        length: Any = tiling.length
        if tiling.time % length:
            length = jnp.minimum(length, tiling.time - tiling.block(reverse) * length).astype(jnp.int32)

        def advance(count: int, i, state):
            times = [length - 1 - (i + j) if reverse else i + j for j in range(count)]
            # All loads come before any arithmetic: the compiler cannot move a load across a store.
            loaded = [
                (
                    tuple(load(*place) for place in places(row_refs, t)),
                    tuple(
                        jnp.where(t == 0, border, load(*place))
                        for place, border in zip(
                            places(previous_refs, jnp.maximum(t - 1, 0)), before_block, strict=True
                        )
                    ),
                )
                for t in times
            ]
            for t, (row, before) in zip(times, loaded, strict=True):
                state, written = step(row, before, shared, state)
                for (ref, *at), v in zip(places(output_refs, t), written, strict=True):
                    tiling.store(ref, mask, v.astype(ref.dtype), *at)
            return tuple(state)

        whole = length // _UNROLL if isinstance(length, int) else jax.lax.div(length, jnp.int32(_UNROLL))
        state = jax.lax.fori_loop(0, whole, lambda i, s: advance(_UNROLL, i * _UNROLL, s), tuple(state))
        state = jax.lax.fori_loop(whole * _UNROLL, length, functools.partial(advance, 1), state)
        for ref, v in zip(carry_refs, state, strict=True):
            tiling.store(ref, mask, v)

    values, in_specs = zip(*(pair for group in operands for pair in group), strict=True)
    shapes, out_specs = zip(*(pair for group in results for pair in group), strict=True)
    written = pl.pallas_call(
        kernel, grid=tiling.grid, in_specs=in_specs, out_specs=out_specs, out_shape=shapes, name=name, **tiling.options
    )(*values)
    number = len(results[0])
    over_time = iter(written[:number])
    joined = []
    for parts, _ in outputs:
        if tiling.joined:
            joined.append(next(over_time).reshape(tiling.batch, tiling.time, -1))
        else:
            joined.append(jnp.concatenate([tiling.restore(next(over_time)) for _ in range(parts)], axis=-1))
    return joined, [tiling.restore(v) for v in written[number:]]


def identity(inputs: Rows, parameters: Rows) -> tuple[Pair, Pair, Pull]:
    """The coefficients of a plain linear scan, whose inputs are (Re x, Im x, Re a, Im a)."""
    x_re, x_im, a_re, a_im = inputs
    return (a_re, a_im), (x_re, x_im), lambda da, dx: ((*dx, *da), ())


def _summarise(coefficients: Coefficients, row, previous, parameters, carry):
    a, x, _ = coefficients(row, parameters)
    return (*multiply(a, carry[:2]), *add(multiply(a, carry[2:]), x)), ()


def _write(coefficients: Coefficients, row, previous, parameters, h):
    a, x, _ = coefficients(row, parameters)
    h = add(multiply(a, h), x)
    return h, h


def _write_before(row, previous, parameters, h):
    """The plain scan, but each row is the state before it."""
    (a, x, _) = identity(row, parameters)
    return add(multiply(a, h), x), h


# Backward, with s_t = dh_t + q_t and q_{t-1} = conj(a_t) s_t, where q_t is the gradient of h_t from the steps after t.


def _summarise_backward(coefficients: Coefficients, row, previous, parameters, carry):
    (a, _, _), dh = coefficients(row[:-2], parameters), row[-2:]
    return (*multiply_conjugate(a, carry[:2]), *multiply_conjugate(a, add(dh, carry[2:]))), ()


def _write_backward(coefficients: Coefficients, row, before, parameters, carry):
    a, _, pull = coefficients(row[:-2], parameters)
    s = add(row[-2:], carry[:2])
    inputs, shared = pull(multiply_conjugate(before, s), s)
    total = tuple(d + new for d, new in zip(carry[2:], shared, strict=True))
    return (*multiply_conjugate(a, s), *total), inputs


def _starts(tile: Tile, maps: Sequence[jax.Array] | None, entering: Pair, axis: str | None, *, reverse: bool):
    """Composes the maps of the chunks, and of the shards.

    Args:
      maps: product and last of each chunk, [batch, chunks, channels] (real, imaginary, real, imaginary); None for a
        single chunk of a sequence that is not sharded.
      entering: [batch, channels], the state that enters the whole sequence.

    Returns:
      (the states that enter each chunk [batch, chunks, channels]; the state that leaves the whole sequence
      [batch, channels], or None where the walk itself gives it, after its last chunk).
    """
    if maps is None:
        return tuple(v[:, None] for v in entering), None
    chunks, dtype = maps[0].shape[1], maps[0].dtype
    tiling = tile(*maps[0].shape, 1)
    walk = functools.partial(_walk, tiling=tiling, rows=(*maps[2:], *maps[:2]), dtype=dtype, reverse=reverse)
    leaving = None
    if axis is not None:
        whole = maps
        if chunks > 1:
            step = functools.partial(_summarise, identity)
            _, whole = walk(step, carry=(1.0, 0.0, 0.0, 0.0), name="compose_shard")
        p_re, p_im, h_re, h_im = (v[:, 0] for v in whole)
        entering, leaving = exchange_carries((p_re, p_im), (h_re, h_im), entering, axis, reverse=reverse)
    starts = tuple(v[:, None] for v in entering)
    if chunks > 1:
        before, _ = walk(_write_before, carry=starts, outputs=[(1, dtype)] * 2, name="compose_chunks")
        starts = tuple(before)
    return starts, leaving


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def scan(
    coefficients: Coefficients,
    tile: Tile,
    axis: str | None,
    parts: tuple[int, ...],
    inputs: Rows,
    parameters: Rows,
    h0: Pair,
) -> tuple[Rows, Pair]:
    """h_t = a_t h_{t-1} + x_t with (a_t, x_t) = coefficients(inputs at t, parameters), in h0's precision.

    Args:
      coefficients: elementwise, hashable; takes and returns rows of h0's type.
      tile: the platform, `gpu.tile` or `tpu.tile`.
      axis: inside `jax.shard_map`, the mesh axis that time is cut over; h0 must be the same on all its shards.
      parts: (2,) for h as one array, its real and imaginary parts side by side, or (1, 1) for two arrays.
      inputs: [batch, time, a number of parts * channels]; this shard's piece.
      parameters: [channels]. Their gradients are this shard's share.
      h0: [batch, channels].

    Returns:
      (h, arrays [batch, time, parts * channels] of the first input's type; h_last [batch, channels], the state after
      the whole sequence, of h0's type).
    """
    outputs, _ = _forward(coefficients, tile, axis, parts, inputs, parameters, h0)
    return outputs


def _sharded(axis: str | None) -> str | None:
    return None if axis is None or jax.lax.axis_size(axis) == 1 else axis


def _forward(
    coefficients: Coefficients,
    tile: Tile,
    axis: str | None,
    parts: tuple[int, ...],
    inputs: Rows,
    parameters: Rows,
    h0: Pair,
):
    axis = _sharded(axis)
    tiling = _tiling(tile, inputs, h0)
    walk = functools.partial(_walk, tiling=tiling, rows=inputs, parameters=parameters, dtype=h0[0].dtype)
    maps = None
    if axis is not None or tiling.chunks > 1:
        step = functools.partial(_summarise, coefficients)
        _, maps = walk(step, carry=(1.0, 0.0, 0.0, 0.0), name="scan_summarise")
    starts, h_last = _starts(tile, maps, h0, axis, reverse=False)
    if axis is None:  # on shards, what is sent for them is sent again, as `describe.communication` counts it
        starts = tuple(checkpoint_name(v, CHUNK_STARTS) for v in starts)
    step = functools.partial(_write, coefficients)
    outputs = [(n, inputs[0].dtype) for n in parts]
    h, last = walk(step, carry=starts, outputs=outputs, name="scan_forward")
    if h_last is None:
        h_last = tuple(v[:, -1] for v in last)
    return (tuple(h), h_last), (inputs, parameters, tuple(h), starts)


def _tiling(tile: Tile, inputs: Rows, state: Pair) -> Tiling:
    batch, channels = state[0].shape
    return tile(batch, inputs[0].shape[1], channels, None)


def _backward(coefficients: Coefficients, tile: Tile, axis: str | None, parts: tuple[int, ...], residuals, cotangents):
    inputs, parameters, h, entered = residuals
    dh, dh_last = cotangents
    axis = _sharded(axis)
    if axis is not None:  # every shard has a copy of h_last, which is the last shard's: their cotangents add up
        dh_last = jax.lax.psum(dh_last, axis)
    tiling = _tiling(tile, inputs, dh_last)
    dtype = entered[0].dtype
    rows = (*inputs, *dh)
    walk = functools.partial(_walk, tiling=tiling, rows=rows, parameters=parameters, dtype=dtype, reverse=True)
    maps = None
    if axis is not None or tiling.chunks > 1:
        step = functools.partial(_summarise_backward, coefficients)
        _, maps = walk(step, carry=(1.0, 0.0, 0.0, 0.0), name="scan_summarise_backward")
    starts, dh0 = _starts(tile, maps, dh_last, axis, reverse=True)
    borders = entered
    if tiling.blocks > tiling.chunks:
        ends = slice(tiling.length - 1, tiling.time - 1, tiling.length)
        last_rows = [part for v in h for part in jnp.split(v[:, ends], v.shape[2] // tiling.channels, axis=-1)]
        borders = [jnp.concatenate([a.astype(b.dtype), b], axis=1) for a, b in zip(entered, last_rows, strict=True)]
    gradients, last = walk(
        functools.partial(_write_backward, coefficients),
        carry=(*starts, *(0.0 for _ in parameters)),
        previous=h,
        borders=borders,
        outputs=[(v.shape[2] // tiling.channels, v.dtype) for v in inputs],
        name="scan_backward",
    )
    if dh0 is None:
        dh0 = tuple(v[:, 0] for v in last[:2])
    else:  # every shard was given the same h0, but only the first one's is used
        dh0 = jax.tree.map(lambda v: jnp.where(jax.lax.axis_index(axis) == 0, v, jnp.zeros_like(v)), dh0)
    shares = tuple(d.sum((0, 1)).astype(v.dtype) for d, v in zip(last[2:], parameters, strict=True))
    return tuple(gradients), shares, dh0


scan.defvjp(_forward, _backward)


def linear_scan(tile: Tile, x: Pair, a: Pair, h0: Pair, axis: str | None = None) -> tuple[Pair, Pair]:
    """`kernels.linear_scan` on the platform of `tile`."""
    (h_re, h_im), h_last = scan(identity, tile, axis, (1, 1), (*x, *a), (), h0)
    return (h_re, h_im), h_last
