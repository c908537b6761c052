"""The model's elementwise work as machine code for CPUs: every input is read once, every output is written once.

Time is the outer loop and channels, sixteen in a vector, are the inner one; the state stays in the nearest cache. Each
function that takes a `Code` writes one kernel; its docstring gives (arguments) -> (results), the buffers in order.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from llvmlite import ir

from harmonic.kernels.arithmetic import Gates, Pair, add, gelu_share, multiply, multiply_conjugate
from harmonic.kernels.context_parallel import exchange_carries
from harmonic.kernels.cpu import ffi
from harmonic.kernels.cpu.llvm import Code, Value, int64
from harmonic.kernels.dense import column_sum

_PARTIAL = 256  # steps whose parameter gradients the kernel adds up one by one; a matrix product adds these sums
_Pair = tuple[Value, Value]


def _load(code: Code, buffers: Sequence[int], row: ir.Value, c: ir.Value) -> _Pair:
    return code.load(buffers[0], row, c), code.load(buffers[1], row, c)


def _load_parts(code: Code, buffer: int, row: ir.Value, c: ir.Value) -> _Pair:
    return code.load(buffer, row, c, parts=2, part=0), code.load(buffer, row, c, parts=2, part=1)


def _store(code: Code, pair: _Pair, buffers: Sequence[int], row: ir.Value, c: ir.Value) -> None:
    for value, buffer in zip(pair, buffers, strict=True):
        code.store(value, buffer, row, c)


def _copy(code: Code, sources: Sequence[int], targets: Sequence[int], row: ir.Value) -> None:
    code.each_channel(lambda c: _store(code, _load(code, sources, row, c), targets, row, c))


def scan_forward(code: Code) -> None:
    """(x re, x im, a re, a im, h0 re, h0 im) -> (h re, h im, last re, last im)."""
    x, a, h0, h, last = (0, 1), (2, 3), (4, 5), (6, 7), (8, 9)
    with code.each_recording() as b:
        _copy(code, h0, last, b)
        with code.loop(0, code.time) as t:
            row = code.row(b, t)

            def step(c: ir.Value) -> None:
                now = add(multiply(_load(code, a, row, c), _load(code, last, b, c)), _load(code, x, row, c))
                _store(code, now, h, row, c)
                _store(code, now, last, b, c)

            code.each_channel(step)


def scan_summary(code: Code) -> None:
    """(x re, x im, a re, a im, h0 re, h0 im) -> (product of a re, im, last state from zero re, im); h0 is not read."""

    def read(row: ir.Value, c: ir.Value) -> tuple[_Pair, _Pair]:
        return _load(code, (2, 3), row, c), _load(code, (0, 1), row, c)

    _summarise(code, read, (6, 7), (8, 9))


def scan_summary_back(code: Code) -> None:
    """(a re, a im, dh re, dh im, h0 re, h0 im) -> the gradient of h0 where h_last has none, re and im."""

    def read(row: ir.Value, c: ir.Value) -> tuple[_Pair, _Pair]:
        return _load(code, (0, 1), row, c), _load(code, (2, 3), row, c)

    _summarise_back(code, read, (6, 7))


def _summarise(
    code: Code,
    read: Callable[[ir.Value, ir.Value], tuple[_Pair, _Pair]],
    product: Sequence[int],
    last: Sequence[int],
) -> None:
    with code.each_recording() as b:
        _fill(code, 1.0, product, b)
        _fill(code, 0.0, last, b)
        with code.loop(0, code.time) as t:
            row = code.row(b, t)

            def step(c: ir.Value) -> None:
                a, x = read(row, c)
                _store(code, multiply(a, _load(code, product, b, c)), product, b, c)
                _store(code, add(multiply(a, _load(code, last, b, c)), x), last, b, c)

            code.each_channel(step)


def _summarise_back(code: Code, read: Callable[[ir.Value, ir.Value], tuple[_Pair, _Pair]], q: Sequence[int]) -> None:
    with code.each_recording() as b:
        _fill(code, 0.0, q, b)
        with code.loop(1, code.builder.add(code.time, int64(1))) as i:
            row = code.row(b, code.builder.sub(code.time, i))

            def step(c: ir.Value) -> None:
                a, dh = read(row, c)
                _store(code, multiply_conjugate(a, add(dh, _load(code, q, b, c))), q, b, c)

            code.each_channel(step)


def _fill(code: Code, real: float, targets: Sequence[int], row: ir.Value) -> None:
    code.each_channel(lambda c: _store(code, (code.constant(real), code.constant(0.0)), targets, row, c))


def scan_backward(code: Code) -> None:
    """(a re, a im, h re, h im, dh re, dh im, dlast re, dlast im, h0 re, h0 im) -> (dx re, dx im, da re, da im, dh0 re,
    dh0 im)."""
    a, h, dh, dlast, h0, dx, da, q = (0, 1), (2, 3), (4, 5), (6, 7), (8, 9), (10, 11), (12, 13), (14, 15)
    with code.each_recording() as b:
        _copy(code, dlast, q, b)

        def step(row: ir.Value, before: Sequence[int], before_row: ir.Value) -> None:
            def channel(c: ir.Value) -> None:
                s = add(_load(code, dh, row, c), _load(code, q, b, c))
                _store(code, s, dx, row, c)
                _store(code, multiply_conjugate(_load(code, before, before_row, c), s), da, row, c)
                _store(code, multiply_conjugate(_load(code, a, row, c), s), q, b, c)

            code.each_channel(channel)

        with code.loop(1, code.time) as i:
            t = code.builder.sub(code.time, i)
            step(code.row(b, t), h, code.row(b, code.builder.sub(t, int64(1))))
        step(code.row(b, int64(0)), h0, b)


def lru_forward(code: Code) -> None:
    """(u, bias, decay, theta, h0 re, h0 im) -> (h, last re, last im)."""
    u, parameters, h0, h, last = 0, (1, 2, 3), (4, 5), 6, (7, 8)
    with code.each_recording() as b:
        _copy(code, h0, last, b)
        with code.loop(0, code.time) as t:
            row = code.row(b, t)

            def step(c: ir.Value) -> None:
                gates = _read_gates(code, u, parameters, row, c)
                now = add(multiply(gates.a, _load(code, last, b, c)), gates.x)
                for part in (0, 1):
                    code.store(now[part], h, row, c, parts=2, part=part)
                _store(code, now, last, b, c)

            code.each_channel(step)


def lru_summary(code: Code) -> None:
    """(u, bias, decay, theta, h0 re, h0 im) -> as `scan_summary`."""

    def read(row: ir.Value, c: ir.Value) -> tuple[_Pair, _Pair]:
        gates = _read_gates(code, 0, (1, 2, 3), row, c)
        return gates.a, gates.x

    _summarise(code, read, (6, 7), (8, 9))


def lru_summary_back(code: Code) -> None:
    """(u, dh, bias, decay, theta, h0 re, h0 im) -> as `scan_summary_back`."""

    def read(row: ir.Value, c: ir.Value) -> tuple[_Pair, _Pair]:
        return _read_gates(code, 0, (2, 3, 4), row, c).a, _load_parts(code, 1, row, c)

    _summarise_back(code, read, (7, 8))


def lru_backward(code: Code) -> None:
    """(u, h, dh, bias, decay, theta, dlast re, dlast im, h0 re, h0 im) -> (du, sums of the gradients of decay and theta
    over `_PARTIAL` steps each, dh0 re, dh0 im)."""
    u, h, dh, parameters, dlast, h0, du, sums, q = 0, 1, 2, (3, 4, 5), (6, 7), (8, 9), 10, (11, 12), (13, 14)
    builder = code.builder
    pieces = builder.sdiv(builder.add(code.time, int64(_PARTIAL - 1)), int64(_PARTIAL))
    with code.each_recording() as b:
        _copy(code, dlast, q, b)

        def step(row: ir.Value, sum_row: ir.Value, before: Callable[[ir.Value], _Pair]) -> None:
            def channel(c: ir.Value) -> None:
                gates = _read_gates(code, u, parameters, row, c)
                s = add(_load_parts(code, dh, row, c), _load(code, q, b, c))
                *gradients, ddecay, dtheta = gates.gradients(code, multiply_conjugate(before(c), s), s)
                for part, gradient in enumerate(gradients):
                    code.store(gradient, du, row, c, parts=4, part=part)
                _store(code, add(_load(code, sums, sum_row, c), (ddecay, dtheta)), sums, sum_row, c)
                _store(code, multiply_conjugate(gates.a, s), q, b, c)

            code.each_channel(channel)

        with code.loop(0, pieces) as k:
            piece = builder.sub(pieces, builder.add(k, int64(1)))
            sum_row = builder.add(builder.mul(b, pieces), piece)
            _fill(code, 0.0, sums, sum_row)
            start = builder.mul(piece, int64(_PARTIAL))
            end = builder.add(start, int64(_PARTIAL))
            end = builder.select(builder.icmp_signed("<", end, code.time), end, code.time)
            # The recording's first step comes after the loop.
            first = builder.select(builder.icmp_signed("==", piece, int64(0)), int64(1), start)
            with code.loop(first, end) as i:
                t = builder.sub(builder.add(first, end), builder.add(i, int64(1)))
                row = code.row(b, t)
                earlier = builder.sub(row, int64(1))
                step(row, sum_row, lambda c: _load_parts(code, h, earlier, c))
        step(code.row(b, int64(0)), builder.mul(b, pieces), lambda c: _load(code, h0, b, c))


def _read_gates(code: Code, u: int, parameters: tuple[int, int, int], row: ir.Value, c: ir.Value) -> Gates[Value]:
    bias, decay, theta = parameters
    z_re, z_im, p_i, p_r = (code.load(u, row, c, parts=4, part=part) + code.load(bias, part, c) for part in range(4))
    return Gates.compute(code, (z_re, z_im), p_i, p_r, code.load(decay, 0, c), code.load(theta, 0, c))


def gated_forward(code: Code) -> None:
    """(x, gate, biases of both) -> x gelu(gate)."""

    def channel(row: ir.Value, c: ir.Value) -> None:
        x, gate = (code.load(i, row, c) + code.load(2, i, c) for i in (0, 1))
        code.store(x * gate * gelu_share(code, gate)[0], 3, row, c)

    _each_row(code, channel)


def gated_backward(code: Code) -> None:
    """(x, gate, gradient, biases of both) -> (dx, dgate)."""

    def channel(row: ir.Value, c: ir.Value) -> None:
        x, gate = (code.load(i, row, c) + code.load(3, i, c) for i in (0, 1))
        dy = code.load(2, row, c)
        share, dshare = gelu_share(code, gate)
        code.store(dy * gate * share, 4, row, c)
        code.store(dy * x * (share + gate * dshare), 5, row, c)

    _each_row(code, channel)


def _each_row(code: Code, channel: Callable[[ir.Value, ir.Value], None]) -> None:
    with code.each_recording() as b, code.loop(0, code.time) as t:
        row = code.row(b, t)
        code.each_channel(lambda c: channel(row, c))


def _call(write: Callable[[Code], None], results: Sequence[tuple[int, ...]], *arguments: jax.Array) -> list[jax.Array]:
    """Runs a kernel, which gives arrays of these shapes; the last argument is [rows, channels]."""
    dtype = arguments[-1].dtype
    if any(v.dtype != dtype for v in arguments):  # machine code would take other bits for numbers of this type
        raise TypeError(f"{write.__name__} takes arrays of one type, got {[v.dtype.name for v in arguments]}")
    shapes = [jax.ShapeDtypeStruct(shape, dtype) for shape in results]
    return list(jax.ffi.ffi_call(ffi.register(write, dtype.name, ffi.threads()), shapes)(*arguments))


def _alone(axis: str | None) -> bool:
    return axis is None or jax.lax.axis_size(axis) == 1


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def linear_scan(x: Pair, a: Pair, h0: Pair, axis: str | None = None) -> tuple[Pair, Pair]:
    """As `chunked.linear_scan`; all of one type, float32 or float64."""
    return _scan_forward(x, a, h0, axis)[0]


def _scan_forward(x: Pair, a: Pair, h0: Pair, axis: str | None):
    shape, state = x[0].shape, h0[0].shape
    product, h0, h_last = _enter(scan_summary, (*x, *a), h0, axis)
    out = _call(scan_forward, (shape, shape, state, state), *x, *a, *h0)
    h = tuple(out[:2])
    return (h, tuple(out[2:]) if h_last is None else h_last), (a, h, h0, product)


def _scan_backward(axis: str | None, residuals, cotangents):
    (a, h, h0, product), (dh, dlast) = residuals, cotangents
    dlast, dh0 = _enter_back(scan_summary_back, (*a, *dh), product, dlast, axis)
    out = _call(scan_backward, (a[0].shape,) * 4 + (h0[0].shape,) * 2, *a, *h, *dh, *dlast, *h0)
    return tuple(out[:2]), tuple(out[2:4]), tuple(out[4:]) if dh0 is None else dh0


linear_scan.defvjp(_scan_forward, _scan_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def cg_lru(
    u: jax.Array, bias: jax.Array, decay: jax.Array, theta: jax.Array, h0: Pair, axis: str | None = None
) -> tuple[jax.Array, Pair]:
    """As `kernels.cg_lru`; all of one type, float32 or float64."""
    return _lru_forward(u, bias, decay, theta, h0, axis)[0]


def _lru_forward(u: jax.Array, bias: jax.Array, decay: jax.Array, theta: jax.Array, h0: Pair, axis: str | None):
    state = h0[0].shape
    product, h0, h_last = _enter(lru_summary, (u, bias, decay, theta), h0, axis)
    h, *last = _call(lru_forward, ((*u.shape[:2], 2 * state[1]), state, state), u, bias, decay, theta, *h0)
    return (h, tuple(last) if h_last is None else h_last), (u, h, bias, decay, theta, h0, product)


def _lru_backward(axis: str | None, residuals, cotangents):
    (u, h, bias, decay, theta, h0, product), (dh, dlast) = residuals, cotangents
    dlast, dh0 = _enter_back(lru_summary_back, (u, dh, bias, decay, theta), product, dlast, axis)
    state = h0[0].shape
    sums = (state[0], -(-u.shape[1] // _PARTIAL), state[1])
    du, *partial, dh0_re, dh0_im = _call(
        lru_backward, (u.shape, sums, sums, state, state), u, h, dh, bias, decay, theta, *dlast, *h0
    )
    ddecay, dtheta = (column_sum(v) for v in partial)
    return du, column_sum(du), ddecay, dtheta, (dh0_re, dh0_im) if dh0 is None else dh0


cg_lru.defvjp(_lru_forward, _lru_backward)


def _enter(summary: Callable[[Code], None], arguments: Sequence[jax.Array], h0: Pair, axis: str | None):
    """(product of this shard's a, state that enters it, state that leaves the whole sequence).

    With one shard there is nothing to exchange: returns (None, h0, None).
    """
    if _alone(axis):
        return None, h0, None
    out = _call(summary, (h0[0].shape,) * 4, *arguments, *h0)
    product = (out[0], out[1])
    return product, *exchange_carries(product, (out[2], out[3]), h0, axis, reverse=False)


def _enter_back(summary: Callable[[Code], None], arguments: Sequence[jax.Array], product, dlast: Pair, axis):
    """(gradient that enters this shard at its end, gradient of h0, which only the first shard is given).

    With one shard there is nothing to exchange: returns (dlast, None).
    """
    if _alone(axis):
        return dlast, None
    # Every shard has a copy of h_last, which is the last shard's: their cotangents add up.
    dlast = jax.lax.psum(dlast, axis)
    q = _call(summary, (dlast[0].shape,) * 2, *arguments, *dlast)
    entering, dh0 = exchange_carries(product, (q[0], q[1]), dlast, axis, reverse=True, conjugate=True)
    first = jax.lax.axis_index(axis) == 0
    return entering, jax.tree.map(lambda v: jnp.where(first, v, jnp.zeros_like(v)), dh0)


@jax.custom_vjp
def gated_gelu(x: jax.Array, x_bias: jax.Array, gate: jax.Array, gate_bias: jax.Array) -> jax.Array:
    """As `kernels.gated_gelu`; all of one type, float32 or float64."""
    return _gated_forward(x, x_bias, gate, gate_bias)[0]


def _gated_forward(x: jax.Array, x_bias: jax.Array, gate: jax.Array, gate_bias: jax.Array):
    biases = jnp.stack([x_bias, gate_bias])
    (y,) = _call(gated_forward, (_by_row(x).shape,), _by_row(x), _by_row(gate), biases)
    return y.reshape(x.shape), (x, gate, biases)


def _gated_backward(residuals, dy: jax.Array):
    x, gate, biases = residuals
    rows = _by_row(x), _by_row(gate), _by_row(dy)
    dx, dgate = (v.reshape(x.shape) for v in _call(gated_backward, (rows[0].shape,) * 2, *rows, biases))
    return dx, column_sum(dx), dgate, column_sum(dgate)


def _by_row(x: jax.Array) -> jax.Array:
    """Makes every step a recording of its own, so that threads share the steps out."""
    return x.reshape(-1, 1, x.shape[-1])


gated_gelu.defvjp(_gated_forward, _gated_backward)
