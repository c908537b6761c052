"""Every scan against the obvious one: forward and gradient, alone and sharded, in both precisions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from harmonic.errors import UserError
from harmonic.kernels import chunked, gated_gelu, linear_scan
from harmonic.kernels.cpu import ffi

pytestmark = pytest.mark.laws
TOLERANCE = {np.float32: 2e-5, np.float64: 1e-12}


def make_inputs(rng, batch, time, channels, dtype):
    def pair(*shape):
        return tuple(jnp.asarray(rng.standard_normal(shape), dtype) for _ in range(2))

    x, h0 = pair(batch, time, channels), pair(batch, channels)
    radius, angle = rng.uniform(0.3, 1, (batch, time, channels)), rng.uniform(0, 6, (batch, time, channels))
    a = (jnp.asarray(radius * np.cos(angle), dtype), jnp.asarray(radius * np.sin(angle), dtype))
    return x, a, h0


def weigh(outputs):
    """A scalar that every output matters to, each in its own way."""
    leaves = jax.tree.leaves(outputs)
    return sum(
        (v * jnp.sin(1 + i + jnp.arange(v.size, dtype=v.dtype)).reshape(v.shape)).sum() for i, v in enumerate(leaves)
    )


def assert_close(actual, expected, tolerance):
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * max(1.0, float(np.abs(b).max())))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("time", [1, 7, 97, 160])
@pytest.mark.parametrize("implementation", ["auto", "native", "chunked", "associative"])
def test_scan_equals_reference(rng, x64, implementation, time, dtype):
    inputs = make_inputs(rng, 2, time, 3, dtype)
    run = functools.partial(linear_scan, implementation=implementation)
    expected = functools.partial(linear_scan, implementation="reference")

    def outputs_and_gradient(scan):
        return jax.jit(lambda args: (scan(*args), jax.grad(lambda a: weigh(scan(*a)))(args)))(inputs)

    assert_close(outputs_and_gradient(run), outputs_and_gradient(expected), TOLERANCE[dtype])


def test_reference_equals_a_python_loop(rng):
    x, a, h0 = (v[0] + 1j * np.asarray(v[1]) for v in jax.tree.map(np.asarray, make_inputs(rng, 2, 9, 3, np.float32)))
    h, rows = h0, []
    for t in range(9):
        h = a[:, t] * h + x[:, t]
        rows.append(h)
    pairs = ((jnp.asarray(v.real), jnp.asarray(v.imag)) for v in (x, a, h0))
    (re, im), last = jax.tree.map(np.asarray, linear_scan(*pairs, implementation="reference"))
    np.testing.assert_allclose(re + 1j * im, np.stack(rows, 1), rtol=1e-5)
    np.testing.assert_allclose(last[0] + 1j * last[1], h, rtol=1e-5)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shards", [1, 2, 8])
def test_sharded_scan_equals_reference(rng, x64, shards, dtype):
    inputs = make_inputs(rng, 2, 8 * 24, 3, dtype)
    mesh = jax.make_mesh((shards,), ("seq",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:shards])
    whole, piece = P(), P(None, "seq")

    def run(x, a, h0):
        @functools.partial(
            jax.shard_map, mesh=mesh, in_specs=(piece, piece, whole), out_specs=(piece, whole), check_vma=False
        )
        def scan(x, a, h0):
            return linear_scan(x, a, h0, axis="seq")

        return scan(x, a, h0)

    expected = linear_scan(*inputs, implementation="reference")
    assert_close(jax.jit(run)(*inputs), expected, TOLERANCE[dtype])

    # As training does it: each shard's own loss, its gradient inside, and the sums over shards outside.
    def local_grad(x, a, h0):
        def loss(args):
            h, h_last = linear_scan(*args, axis="seq")
            first = jax.lax.axis_index("seq") == 0
            place = jax.lax.axis_index("seq") * x[0].shape[1] + jnp.arange(x[0].shape[1], dtype=jnp.int32)
            weights = jnp.cos(place.astype(dtype))[None, :, None]
            # The state is the same on every shard: only one of them may count it.
            return sum((v * weights).sum() for v in h) + sum(jnp.where(first, v, 0).sum() for v in h_last)

        dx, da, dh0 = jax.grad(loss)((x, a, h0))
        return dx, da, jax.lax.psum(dh0, "seq")

    sharded = jax.shard_map(
        local_grad, mesh=mesh, in_specs=(piece, piece, whole), out_specs=(piece, piece, whole), check_vma=False
    )
    grads = jax.jit(sharded)(*inputs)

    def plain(args):
        h, h_last = linear_scan(*args, implementation="reference")
        weights = jnp.cos(jnp.arange(8 * 24).astype(dtype))[None, :, None]
        return sum((v * weights).sum() for v in h) + sum(v.sum() for v in h_last)

    assert_close(grads, jax.jit(jax.grad(plain))(inputs), TOLERANCE[dtype])


@pytest.mark.parametrize("time", [1, 97, 160, 16_000, 960_640])
def test_chunks_divide_the_time(time):
    assert time % chunked.chunk_length(time, 2) == 0


def test_shapes_that_do_not_fit_are_refused(rng):
    x, a, h0 = make_inputs(rng, 2, 8, 3, np.float32)
    with pytest.raises(ValueError, match="do not fit"):
        linear_scan(x, tuple(v[:, :4] for v in a), h0)
    with pytest.raises(UserError, match="implementation"):
        linear_scan(x, a, h0, implementation="fast")


def outputs_and_gradients(f, args):
    return jax.jit(lambda args: (f(*args), jax.grad(lambda a: weigh(f(*a)).astype("float32"))(args)))(args)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-5), ("float64", 1e-12), ("bfloat16", 3e-2)])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 7, 16), (3, 50, 37)], ids=str)
@pytest.mark.parametrize("implementation", ["auto", "chunked"])
def test_gated_gelu_is_what_it_says(rng, x64, implementation, shape, dtype, tolerance):
    x, gate = (jnp.asarray(4 * rng.standard_normal(shape), dtype) for _ in range(2))
    wide = "float32" if dtype == "bfloat16" else dtype
    x_bias, gate_bias = (jnp.asarray(rng.standard_normal(shape[-1:]), wide) for _ in range(2))

    def obvious(x, x_bias, gate, gate_bias):
        x, gate = x.astype(wide) + x_bias[None, None], gate.astype(wide) + gate_bias[None, None]
        return (x * jax.nn.gelu(gate)).astype(dtype)

    args = x, x_bias, gate, gate_bias
    run = functools.partial(gated_gelu, implementation=implementation)
    actual, expected = outputs_and_gradients(run, args), outputs_and_gradients(obvious, args)
    to_float = functools.partial(jax.tree.map, lambda v: np.asarray(v, np.float64))
    assert_close(to_float(actual), to_float(expected), tolerance)


@pytest.mark.parametrize("implementation", ["auto", "chunked"])
def test_small_gates_keep_their_digits(x64, implementation):
    """exp(-|v|) and not expm1(-|v|) + 1, whose error is that of 1: the gates multiply what is small, over and over."""
    gate = np.linspace(-5.0, -0.5, 97, dtype=np.float32).reshape(1, 1, -1)
    none = jnp.zeros(97, jnp.float32)
    y = gated_gelu(jnp.ones_like(gate), none, jnp.asarray(gate), none, implementation=implementation)
    np.testing.assert_allclose(y, jax.nn.gelu(jnp.asarray(gate, jnp.float64)), rtol=1e-5)


@pytest.mark.skipif(not ffi.available(), reason="this machine's XLA does not take this machine code")
@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("threads", [2, 3, 7])
def test_threads_change_no_bit(rng, monkeypatch, threads, batch):
    """Enough to be shared out, by channels that no vector divides or by recordings."""
    inputs = make_inputs(rng, batch, 1_100 // batch, 130, np.float32)

    def run():
        return outputs_and_gradients(functools.partial(linear_scan, implementation="native"), inputs)

    monkeypatch.setattr(ffi, "threads", lambda: 1)
    alone = run()
    monkeypatch.setattr(ffi, "threads", lambda: threads)
    jax.tree.map(np.testing.assert_array_equal, run(), alone)


@pytest.mark.skipif(not ffi.available(), reason="this machine's XLA does not take this machine code")
def test_what_is_not_a_number_comes_out_as_such(rng):
    x, a, h0 = make_inputs(rng, 1, 40, 20, np.float32)
    bad = (x[0].at[0, 20, 7].set(np.nan), x[1])
    (re, _), _ = linear_scan(bad, a, h0, implementation="native")
    assert np.isfinite(re[0, :20]).all() and np.isnan(re[0, 20:, 7]).all()
    assert np.isfinite(np.delete(np.asarray(re[0]), 7, axis=1)).all()
    x_bias = jnp.zeros(20)
    assert np.isnan(gated_gelu(x[0], x_bias, bad[0], x_bias)[0, 20, 7])
