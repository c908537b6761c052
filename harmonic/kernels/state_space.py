"""Linear state-space layers that do not change with time (S4, arXiv 2111.00396; S4D, 2206.11893), cut into chunks.

    h_t = A h_{t-1} + b u_t,  y_t = c h_t        for each of `width` channels, with a state of its own

Within a chunk of Q samples this is a product with the kernel's Toeplitz matrix; a chunk adds one product of its inputs
to the state, and the state before it one product to its outputs. The tables of these products depend on the parameters
alone: they are made once a step, and are as large for a minute as for a chunk. The published code convolves by FFT,
with tables (or, in the DPLR form, a sum over the Cauchy kernel) as long as the sequence, and cannot start from a
state.

A state is [batch, width, numbers], real: where A is diagonal its complex modes' real parts, then the imaginary ones.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from harmonic.kernels import linear_scan
from harmonic.kernels.context_parallel import left_halo
from harmonic.kernels.dense import beside

CHUNK = 64  # samples; a power of two


class Tables(NamedTuple):
    """What a segment is multiplied by, for chunks of Q samples; M numbers are a channel's state.

    Attributes:
      kernel: [width, Q], the impulse response.
      into: [width, M, Q], what each sample of a chunk adds to the state after it.
      out: [width, M, Q], what the state before a chunk adds to each of its samples.
      once, whole: A and A^Q: [width, M, M]; where A is diagonal, log A, complex [width, M / 2], and nothing.
    """

    kernel: jax.Array
    into: jax.Array
    out: jax.Array
    once: jax.Array
    whole: jax.Array | None


def diagonal(log_a: jax.Array, c: jax.Array, chunk: int = CHUNK) -> Tables:
    """Tables for a diagonal A: y_t = 2 Re sum_n c_n h_tn, with b = 1 (fold b into c).

    Args:
      log_a, c: complex [width, modes]: log of the diagonal, and what reads the state.
      chunk: Q.
    """
    lags = jnp.arange(chunk + 1).astype(log_a.dtype)[None, None]
    powers = jnp.exp(log_a[..., None] * lags)
    read = 2 * c[..., None] * powers
    return Tables(
        kernel=read[..., :-1].real.sum(1),
        into=_parts(powers[..., :-1])[..., ::-1],
        out=_parts(read[..., 1:].conj()),  # Re(c h) = Re c Re h - Im c Im h
        once=log_a,
        whole=None,
    )


def dense(a: jax.Array, b: jax.Array, c: jax.Array, chunk: int = CHUNK) -> Tables:
    """Tables for any real A: a [width, M, M], b and c [width, M]; chunk is a power of two."""
    power, columns, rows = a, b[..., None], (c[:, None] @ a).swapaxes(1, 2)
    while columns.shape[-1] < chunk:
        columns = jnp.concatenate([columns, power @ columns], axis=-1)
        rows = jnp.concatenate([rows, power.swapaxes(1, 2) @ rows], axis=-1)
        power = power @ power
    return Tables((c[..., None] * columns).sum(1), columns[..., ::-1], rows, a, power)


def convolve(tables: Tables, u: jax.Array, h0: jax.Array, *, axis: str | None = None) -> tuple[jax.Array, jax.Array]:
    """The layer over a segment of any length.

    Args:
      tables: of `diagonal` or `dense`.
      u: [batch, time, width].
      h0: [batch, width, M], the state before it, the same on all shards.
      axis: the mesh axis that time is cut over.

    Returns:
      (y [batch, time, width], the state after the whole sequence).
    """
    batch, time, width = u.shape
    size = tables.kernel.shape[-1]
    whole, rest = divmod(time, size)
    pieces = [u[:, : whole * size].reshape(batch, whole, size, width)] if whole else []
    pieces += [u[:, None, whole * size :]] if rest else []
    added = [jnp.einsum("bcqh,hmq->bchm", piece, tables.into[..., size - piece.shape[2] :]) for piece in pieces]
    chunks = jnp.concatenate(added, axis=1)
    if tables.whole is None:
        before, last = _scan_diagonal(tables.once, chunks, size, rest, h0, axis)
    else:
        before, last = _scan_dense(tables, tables.whole, chunks[:, :whole], u[:, whole * size :], time, h0, axis)
    outputs, first = [], 0
    for piece in pieces:
        count, length = piece.shape[1:3]
        y = jnp.einsum("bckh,hkq->bcqh", piece, _toeplitz(tables.kernel[:, :length]))
        y += jnp.einsum("bchm,hmq->bcqh", before[:, first : first + count], tables.out[..., :length])
        outputs.append(y.reshape(batch, -1, width))
        first += count
    return jnp.concatenate(outputs, axis=1), last


def _parts(z: jax.Array) -> jax.Array:
    """Complex [width, modes, ...] as real [width, 2 modes, ...]."""
    return jnp.concatenate([z.real, z.imag], axis=1)


def _toeplitz(kernel: jax.Array) -> jax.Array:
    """[width, Q] -> [width, Q, Q], whose entry (k, q) is the kernel at q - k, and 0 for q < k.

    By repetition and a shift, since the derivative of a gather is slow.
    """
    width, size = kernel.shape
    padded = jnp.concatenate([kernel, jnp.zeros_like(kernel)], axis=1)
    repeated = jnp.broadcast_to(padded[:, None], (width, size, 2 * size)).reshape(width, -1)
    return repeated[:, : size * (2 * size - 1)].reshape(width, size, 2 * size - 1)[..., :size]


def _scan_dense(
    tables: Tables, power: jax.Array, added: jax.Array, rest: jax.Array, time: int, h0: jax.Array, axis: str | None
) -> tuple[jax.Array, jax.Array]:
    """(the states before each chunk [batch, chunks, width, M], the state after the last).

    Args:
      tables, power: the tables, and their `whole`.
      added: [batch, whole chunks, width, M], what each adds to the state.
      rest: [batch, samples, width], what no whole chunk holds: its samples are taken one by one.
      time: of both.
      h0, axis: as for `convolve`.
    """
    b = tables.into[..., -1]

    def chunk(h: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return apply_matrix(power, h) + x, h

    def sample(h: jax.Array, u: jax.Array) -> tuple[jax.Array, None]:
        return apply_matrix(tables.once, h) + b[None] * u[..., None], None

    def run(h: jax.Array) -> tuple[jax.Array, jax.Array]:
        h, before = jax.lax.scan(chunk, h, added.swapaxes(0, 1))
        if rest.shape[1]:
            before = jnp.concatenate([before, h[None]])
            h, _ = jax.lax.scan(sample, h, rest.swapaxes(0, 1))
        return before.swapaxes(0, 1), h

    if axis is None or jax.lax.axis_size(axis) == 1:
        return run(h0)
    # A shard maps the state that enters it to P h + (its last state from zero), with the same matrix P everywhere: one
    # all-gather of the last states tells every shard what enters it.
    total, shard = _power(tables.once, time), jax.lax.axis_index(axis)
    lasts = jax.lax.all_gather(run(jnp.zeros_like(h0))[1], axis)
    entering, carry = h0, h0
    for i in range(jax.lax.axis_size(axis)):
        entering = jnp.where(shard == i, carry, entering)
        carry = apply_matrix(total, carry) + lasts[i]
    return run(entering)[0], carry


def _scan_diagonal(
    log_a: jax.Array, added: jax.Array, size: int, rest: int, h0: jax.Array, axis: str | None
) -> tuple[jax.Array, jax.Array]:
    """As `_scan_dense`, for chunks of `size` samples, the last one of `rest` where that is not 0."""
    _, chunks, width, numbers = added.shape
    lengths = jnp.full(chunks, size).at[-1].set(rest or size).astype(log_a.dtype)
    a = jnp.exp(log_a[None] * lengths[:, None, None]).reshape(1, chunks, -1)

    def pair(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        re, im = (part.reshape(*x.shape[:-2], -1) for part in jnp.split(x, 2, axis=-1))
        return re, im

    def join(re: jax.Array, im: jax.Array) -> jax.Array:
        return jnp.concatenate([part.reshape(*part.shape[:-1], width, numbers // 2) for part in (re, im)], axis=-1)

    x = pair(added)
    a_re, a_im = (jnp.broadcast_to(part, x[0].shape) for part in (a.real, a.imag))
    h, last = linear_scan(x, (a_re, a_im), pair(h0), axis=axis)
    after = join(*h)
    entering, _ = left_halo(after[:, -1], h0, axis)
    return jnp.concatenate([entering[:, None], after[:, :-1]], axis=1), join(*last)


def apply_matrix(a: jax.Array, h: jax.Array) -> jax.Array:
    """a [width, M, M] times h [batch, width, M]."""
    return jnp.einsum("hnm,bhm->bhn", a, h)


def _power(a: jax.Array, exponent: int) -> jax.Array:
    """a [width, M, M] to a power from 1 on, by squaring."""
    result = None
    while exponent:
        if exponent & 1:
            result = a if result is None else result @ a
        exponent >>= 1
        if exponent:
            a = a @ a
    assert result is not None
    return result


class Diagonal(NamedTuple):
    """One step of `diagonal`'s layer: a = exp(log_a) and c, complex [width, modes]."""

    a: jax.Array
    c: jax.Array

    def __call__(self, u: jax.Array, h: jax.Array) -> tuple[jax.Array, jax.Array]:
        """u [batch, width], h [batch, width, M] -> (y, h)."""
        re, im = jnp.split(h, 2, axis=-1)
        a_re, a_im, c_re, c_im = (beside(v, re) for v in (self.a.real, self.a.imag, self.c.real, self.c.imag))
        re, im = a_re * re - a_im * im + u[..., None], a_re * im + a_im * re
        return 2 * (c_re * re - c_im * im).sum(-1), jnp.concatenate([re, im], axis=-1)


class LowRank(NamedTuple):
    """One step of a layer whose A is diagonal less a product p p*, by the bilinear rule (S4, 2111.00396, section 3).

    (2 / dt - A) h_t = (2 / dt + A) h_{t-1} + 2 b u_t, y_t = 2 Re sum_n c_n h_tn, where A h = lambda h - p 2 Re(p* h): a
    mode stands for itself and its conjugate. The left side is solved by Woodbury's identity, so that a step takes as
    many operations as of a diagonal A, up to a factor. `LowRank.of` makes it.

    Attributes:
      forward: 2 / dt + lambda.
      inverse: 1 / (2 / dt - lambda).
      p, b, c: complex [width, modes], as all of these; b is twice its argument.
      correction: inverse p / (1 + 2 Re p* inverse p).
    """

    forward: jax.Array
    inverse: jax.Array
    p: jax.Array
    b: jax.Array
    c: jax.Array
    correction: jax.Array

    @classmethod
    def of(cls, lam: jax.Array, p: jax.Array, b: jax.Array, c: jax.Array, dt: jax.Array) -> LowRank:
        """lam, p, b, c: complex [width, modes]; dt [width]."""
        rate = (2 / dt).astype(lam.dtype)[:, None]
        inverse = 1 / (rate - lam)
        solved = inverse * p
        total = 1 + 2 * (p.conj() * solved).real.sum(-1, keepdims=True)
        return cls(rate + lam, inverse, p, 2 * b, c, solved / total.astype(lam.dtype))

    def __call__(self, u: jax.Array, h: jax.Array) -> tuple[jax.Array, jax.Array]:
        """u [batch, width], h [batch, width, M] -> (y, h)."""
        z = jax.lax.complex(*jnp.split(h, 2, axis=-1))
        forward, inverse, p, b, c, correction = (beside(v, z) for v in self)
        v = inverse * (forward * z - p * self._along(p, z) + b * u.astype(z.dtype)[..., None])
        z = v - correction * self._along(p, v)
        return 2 * (c * z).real.sum(-1), jnp.concatenate([z.real, z.imag], axis=-1)

    @staticmethod
    def _along(p: jax.Array, z: jax.Array) -> jax.Array:
        return (2 * (p.conj() * z).real.sum(-1, keepdims=True)).astype(z.dtype)

    def tables(self, chunk: int = CHUNK) -> Tables:
        """The same layer for `convolve`: its matrices are what a step makes of unit vectors."""
        width, modes = self.p.shape
        unit = jnp.broadcast_to(jnp.eye(2 * modes, dtype=self.p.real.dtype)[:, None], (2 * modes, width, 2 * modes))
        nothing = jnp.zeros((2 * modes, width), unit.dtype)
        a = self(nothing, unit)[1].transpose(1, 2, 0)
        b = self(nothing[:1] + 1, jnp.zeros_like(unit[:1]))[1][0]
        return dense(a, b, jnp.concatenate([2 * self.c.real, -2 * self.c.imag], axis=-1), chunk)
