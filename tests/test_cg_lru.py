"""The Pallas kernels: interpreted against the obvious scan, alone and sharded; lowered for GPU and TPU."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from harmonic import kernels
from harmonic.errors import UserError
from harmonic.kernels import gates, linear_scan
from harmonic.kernels.arithmetic import Gates
from harmonic.kernels.pallas import cg_lru as pallas_cg_lru
from harmonic.kernels.pallas import gpu, scan, tpu
from harmonic.kernels.target import compiling_for

pytestmark = pytest.mark.laws
# Relative to each array's largest value. Inputs of bfloat16 also round h, from which the gradients are computed.
TOLERANCE = {"float32": 2e-5, "float64": 1e-12, "bfloat16": 2e-2}
PLATFORMS = ["pallas_gpu", "pallas_tpu"]
# (batch, time, channels): every kind of length, of width and of batch; on GPU 331 is five chunks, the last one shorter.
SHAPES = [(1, 1, 8), (2, 7, 128), (9, 97, 8), (1, 331, 128), (2, 331, 130), (3, 128, 130)]


def cg_lru(z, p, decay, theta, h0, **options):
    """The public one, on pairs; a part of u is its bias, but in bfloat16, which would round it."""
    u = jnp.concatenate([*z, *p], axis=-1)
    bias = (u[0, 0] / 2 if u.dtype != jnp.bfloat16 else jnp.zeros_like(u[0, 0])).astype(decay.dtype)
    h, h_last = kernels.cg_lru(u - bias.astype(u.dtype)[None, None], bias, decay, theta, h0, **options)
    return tuple(jnp.split(h, 2, axis=-1)), h_last


def make_inputs(rng, batch, time, channels, dtype="float32"):
    """z, gates, decay, theta, h0; the state in float32 at least."""
    wide = "float32" if dtype == "bfloat16" else dtype

    def normal(*shape, dtype=dtype):
        return tuple(jnp.asarray(rng.standard_normal(shape), dtype) for _ in range(2))

    z, p = normal(batch, time, channels), normal(batch, time, channels)
    decay, theta = (jnp.asarray(rng.uniform(0.01, high, channels), wide) for high in (0.3, 1.0))
    return z, p, decay, theta, normal(batch, channels, dtype=wide)


def coefficients(z, p, decay, theta):
    """a and x, written as the papers do."""
    i, r = jax.nn.sigmoid(p[0]), jax.nn.sigmoid(p[1])
    log_a, angle = -decay[None, None] * r, theta[None, None] * r
    magnitude, scale = jnp.exp(log_a), jnp.sqrt(-jnp.expm1(2 * log_a)) * i
    return (magnitude * jnp.cos(angle), magnitude * jnp.sin(angle)), (scale * z[0], scale * z[1])


def obvious(z, p, decay, theta, h0):
    """The CG-LRU that the others are compared with: in the state's precision, step by step, differentiated by JAX."""
    dtype = z[0].dtype
    z, p = jax.tree.map(lambda v: v.astype(h0[0].dtype), (z, p))
    a, x = coefficients(z, p, decay, theta)
    h, h_last = linear_scan(x, a, h0, implementation="reference")
    return jax.tree.map(lambda v: v.astype(dtype), h), h_last


def outputs_and_gradients(f, args):
    """f's outputs, and the gradients of a scalar that every output matters to, each in its own way."""

    @jax.jit
    def run(args):
        outputs, pull = jax.vjp(lambda args: f(*args), args)
        weights = [
            jnp.sin(1 + i + jnp.arange(v.size, dtype="float32")).reshape(v.shape).astype(v.dtype)
            for i, v in enumerate(jax.tree.leaves(outputs))
        ]
        return outputs, pull(jax.tree.unflatten(jax.tree.structure(outputs), weights))

    return run(args)


def assert_close(actual, expected, tolerance):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(1.0, np.abs(b).max()))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("implementation", ["native", "chunked", *PLATFORMS])
def test_cg_lru_equals_reference(rng, implementation, shape):
    args = make_inputs(rng, *shape)
    actual = outputs_and_gradients(functools.partial(cg_lru, implementation=implementation), args)
    expected = outputs_and_gradients(obvious, args)
    assert_close(actual, expected, TOLERANCE["float32"])


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
@pytest.mark.parametrize("implementation", ["native", "chunked", *PLATFORMS])
def test_cg_lru_in_other_precisions(rng, x64, implementation, dtype):
    args = make_inputs(rng, 2, 197, 8, dtype)
    actual = outputs_and_gradients(functools.partial(cg_lru, implementation=implementation), args)
    expected = outputs_and_gradients(obvious, args)
    assert actual[0][0][0].dtype == dtype and actual[0][1][0].dtype == ("float32" if dtype == "bfloat16" else dtype)
    assert_close(actual, expected, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("implementation", ["native", "chunked", *PLATFORMS])
def test_gates_that_are_shut_or_wide_open(rng, x64, implementation, dtype):
    """Where r is a denormal or 0, |a| is 1, whose square root has no derivative: training has met NaNs there."""
    z, p, decay, theta, h0 = make_inputs(rng, 2, 60, 20)
    p = tuple(
        jnp.asarray(rng.choice([-200.0, -95.0, -88.0, -30.0, 0.0, 30.0, 95.0, 200.0], v.shape), v.dtype) for v in p
    )
    args = z, p, decay, theta, h0
    with jax.enable_x64(False) if dtype == "float32" else contextlib.nullcontext():
        args = jax.tree.map(lambda v: v.astype(dtype), args)
        actual = outputs_and_gradients(functools.partial(cg_lru, implementation=implementation), args)
    expected = outputs_and_gradients(obvious, jax.tree.map(lambda v: v.astype("float64"), args))
    actual = jax.tree.map(lambda v: np.asarray(v, "float64"), actual)
    # The scalar's weights are float32 in both; the gates' sigmoids are what they are in that precision.
    assert_close(actual, jax.tree.map(np.asarray, expected), 5e-5)


@pytest.mark.parametrize(("shape", "dtype"), [((2, 331, 8), "float32"), ((3, 67, 130), "bfloat16")], ids=str)
@pytest.mark.parametrize("platform", PLATFORMS)
def test_linear_scan_equals_reference(rng, platform, shape, dtype):
    *inputs, h0 = make_inputs(rng, *shape)
    a, x = coefficients(*inputs)
    args = (*jax.tree.map(lambda v: v.astype(dtype), (x, a)), h0)
    actual = outputs_and_gradients(functools.partial(linear_scan, implementation=platform), args)
    expected = outputs_and_gradients(functools.partial(linear_scan, implementation="reference"), args)
    assert_close(actual, expected, TOLERANCE[dtype])


@pytest.mark.parametrize("implementation", ["native", "chunked", *PLATFORMS])
def test_sharded_cg_lru_equals_reference(rng, implementation):
    """As training does it: each shard's own loss, its gradient inside, and the sums over shards outside."""
    args = make_inputs(rng, 2, 8 * 160, 8)  # on GPU two chunks a shard
    mesh = jax.make_mesh((8,), ("seq",), axis_types=(jax.sharding.AxisType.Auto,))
    piece, whole = P(None, "seq"), P()

    def weigh(h, h_last, start, counts):
        place = start + jnp.arange(h[0].shape[1])
        weights = jnp.cos(place.astype("float32"))[None, :, None]
        # The state is the same on every shard: only one of them may count it.
        return sum((v * weights).sum() for v in h) + sum(jnp.where(counts, v, 0).sum() for v in h_last)

    def local(*args):
        def loss(args):
            h, h_last = cg_lru(*args, axis="seq", implementation=implementation)
            index = jax.lax.axis_index("seq")
            return weigh(h, h_last, index * h[0].shape[1], index == 3), (h, h_last)

        (dz, dp, *shared), outputs = jax.grad(loss, has_aux=True)(args)
        return (dz, dp, *jax.lax.psum(shared, "seq")), outputs

    sharded = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(piece, piece, whole, whole, whole),
        out_specs=((piece, piece, whole, whole, whole), (piece, whole)),
        check_vma=False,
    )

    def plain(args):
        h, h_last = obvious(*args)
        return weigh(h, h_last, 0, True), (h, h_last)

    assert_close(jax.jit(sharded)(*args), jax.jit(jax.grad(plain, has_aux=True))(args), TOLERANCE["float32"])


CALLS = {"cuda": "__gpu$xla.gpu.triton", "tpu": "tpu_custom_call"}
# The paper's model; a stream longer than any chunk divides, of a width that no block divides; a device full of rows.
LOWERED = [(32, 16_000, 128), (1, 16_001, 130), (2_048, 333, 128)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", LOWERED, ids=str)
@pytest.mark.parametrize("platform", CALLS)
def test_kernels_lower_without_a_device(platform, shape, dtype):
    """Triton's and Mosaic's lowering run here, and say which kernels they do not take."""
    batch, time, channels = shape
    v, u = (jax.ShapeDtypeStruct((batch, time, n * channels), dtype) for n in (1, 4))
    h, p, bias = (jax.ShapeDtypeStruct(s, "float32") for s in ((batch, channels), (channels,), (4 * channels,)))
    tile, target = (gpu.tile, "gpu") if platform == "cuda" else (tpu.tile, "tpu")
    calls = {scan.linear_scan: ((v, v), (v, v), (h, h)), pallas_cg_lru.cg_lru: (u, bias, p, p, (h, h))}
    for function, shapes in calls.items():

        def run(*args, function=function):
            outputs, pull = jax.vjp(functools.partial(function, tile), *args)
            return outputs, pull(outputs)

        with compiling_for(target):
            lowered = jax.jit(run).trace(*shapes).lower(lowering_platforms=(platform,))
        chunked = platform == "cuda" and tile(*shape).chunks > 1
        # One kernel forward and one backward; each in three where chunks are scanned side by side.
        assert lowered.as_text().count(f"@{CALLS[platform]}(") == (6 if chunked else 2)


def test_one_chunk_where_rows_fill_the_device():
    assert [gpu.tile(*shape).chunks for shape in LOWERED] == [16, 247, 1]


@pytest.mark.parametrize("platform", CALLS)
def test_auto_is_the_fused_kernel_also_within_training(platform):
    """Under shard_map, a scan over segments and checkpointing, as the model calls it."""
    mesh = jax.make_mesh((8,), ("seq",), axis_types=(jax.sharding.AxisType.Auto,))

    def loss(z, p, decay, theta, h0):
        @jax.checkpoint
        def segment(h0, inputs):
            h, h_last = cg_lru(*inputs, decay, theta, h0, axis="seq")
            return h_last, sum(v.sum() for v in h)

        return jax.lax.scan(segment, h0, (z, p))[1].sum()

    def gradients(*args):
        return jax.lax.psum(jax.grad(loss, argnums=(2, 3))(*args), "seq")

    piece, whole = P(None, None, "seq"), P()
    sharded = jax.shard_map(
        gradients, mesh=mesh, in_specs=(piece, piece, whole, whole, whole), out_specs=whole, check_vma=False
    )
    z, p, decay, theta, h0 = jax.eval_shape(lambda: make_inputs(np.random.default_rng(0), 2, 8 * 160, 8))
    segments = jax.tree.map(lambda v: jax.ShapeDtypeStruct((3, *v.shape), v.dtype), (z, p))
    with compiling_for("gpu" if platform == "cuda" else platform):
        traced = jax.jit(sharded).trace(*segments, decay, theta, h0)
    lowered = traced.lower(lowering_platforms=(platform,))
    assert f"@{CALLS[platform]}(" in lowered.as_text()


@pytest.mark.parametrize("math", [gates.JaxMath(), pallas_cg_lru.RowMath()], ids=["JaxMath", "RowMath"])
def test_scale_is_exact_near_one_and_its_gradient_bounded(x64, math):
    """With z = 1, i = 1 / 2, r = 1 / 2 and theta = 0, Re x is half of sqrt(1 - |a|^2), and log|a| is -decay / 2."""
    exponents = np.concatenate([-np.logspace(-12, 1, 200), [0.0]])
    expected = np.sqrt(-np.expm1(2 * exponents))

    def compute(exponents):
        zero = jnp.zeros_like(exponents)
        return Gates.compute(math, (zero + 1, zero), zero, zero, -2 * exponents, zero)

    for dtype, tolerance in (("float32", 1e-6), ("float64", 1e-14)):
        actual = jax.jit(lambda v: 2 * compute(v).x[0])(jnp.asarray(exponents, dtype))
        np.testing.assert_allclose(actual, np.asarray(expected, dtype), rtol=tolerance)

    @jax.jit
    def slope(exponents):
        none = jnp.zeros_like(exponents)
        *_, ddecay, _ = compute(exponents).gradients(math, (none, none), (none + 2, none))
        return -2 * ddecay

    slope = np.asarray(slope(jnp.asarray(exponents)))
    np.testing.assert_allclose(slope[-1], -400)  # of the square root at most 200, of its argument 2
    free = exponents < -1e-3
    np.testing.assert_allclose(slope[free], (-np.exp(2 * exponents) / np.maximum(expected, 1e-300))[free], rtol=1e-10)


def test_shapes_that_do_not_fit_are_refused(rng):
    z, p, decay, theta, h0 = make_inputs(rng, 2, 8, 3)
    with pytest.raises(ValueError, match="do not fit"):
        cg_lru(z, p, decay[:2], theta, h0)
    with pytest.raises(UserError, match="implementation"):
        cg_lru(z, p, decay, theta, h0, implementation="fast")
    with pytest.raises(UserError, match="sharded"):
        cg_lru(z, p, decay, theta, h0, axis="seq", implementation="reference")
