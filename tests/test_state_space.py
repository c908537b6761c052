"""State spaces in chunks, time-invariant and selective, against recurrences, dense powers and the published form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from harmonic.kernels import selective, state_space
from harmonic.models.sashimi.layers import hippo

WIDTH, MODES = 3, 4
LENGTHS = (1, 64, 65, 150)


def draw(*shape, dtype=np.float64, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def complex_draw(*shape, dtype=np.float64, seed=0):
    return jax.lax.complex(draw(*shape, dtype=dtype, seed=seed), draw(*shape, dtype=dtype, seed=seed + 100))


def layers(dtype=jnp.float64):
    """(a layer's tables, its step) by name."""
    lam, p, b = (np.tile(v[None], (WIDTH, 1)) for v in hippo(MODES))
    kind = np.complex64 if dtype == jnp.float32 else np.complex128
    lam, p, b = (jnp.asarray(v, kind) for v in (lam, p, b))
    dt = jnp.asarray([0.001, 0.01, 0.1], dtype)
    c = complex_draw(WIDTH, MODES, dtype=dtype, seed=7)
    low_rank = state_space.LowRank.of(lam, p, b, c, dt)
    log_a = lam * dt.astype(kind)[:, None]
    return {
        "low_rank": (low_rank.tables(), low_rank),
        "diagonal": (state_space.diagonal(log_a, c), state_space.Diagonal(jnp.exp(log_a), c)),
    }


def recurrence(step, u, h):
    def body(h, u):
        y, h = step(u, h)
        return h, y

    h, y = jax.lax.scan(body, h, u.swapaxes(0, 1))
    return y.swapaxes(0, 1), h


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float64, 1e-12), (jnp.float32, 1e-3)])
@pytest.mark.parametrize("name", ["low_rank", "diagonal"])
def test_chunks_are_the_recurrence(x64, name, dtype, tolerance):
    """At lengths below, at and beyond chunks, from a state; and cut anywhere into segments."""
    tables, step = layers(dtype)[name]
    u, h0 = draw(2, max(LENGTHS), WIDTH, dtype=dtype, seed=1), draw(2, WIDTH, 2 * MODES, dtype=dtype, seed=2)
    expected, _ = jax.jit(lambda u, h: recurrence(step, u, h))(u, h0)
    for length in LENGTHS:
        y, last = state_space.convolve(tables, u[:, :length], h0)
        np.testing.assert_allclose(y, expected[:, :length], rtol=tolerance, atol=tolerance * np.abs(expected).max())
        rest, _ = state_space.convolve(tables, u[:, length:], last) if length < max(LENGTHS) else (y[:, :0], None)
        np.testing.assert_allclose(rest, expected[:, length:], rtol=tolerance, atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize("name", ["low_rank", "diagonal"])
def test_gradients_are_those_of_the_recurrence(x64, name):
    u, h0, weight = draw(1, 70, WIDTH, seed=1), draw(1, WIDTH, 2 * MODES, seed=2), draw(1, 70, WIDTH, seed=3)

    def loss(run):
        def value(u, h0):
            y, last = run(u, h0)
            return (y * weight).sum() + (last**2).sum()

        return jax.jit(jax.grad(value, argnums=(0, 1)))(u, h0)

    tables, step = layers()[name]
    found, expected = loss(lambda u, h: state_space.convolve(tables, u, h)), loss(lambda u, h: recurrence(step, u, h))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11)


def test_hippo_is_the_normal_plus_low_rank_matrix(x64):
    """lambda and p give LegS's eigenvalues, -1 ... -n, all of them stable."""
    lam, p, _ = hippo(MODES)
    whole, ones = np.diag(np.concatenate([lam, lam.conj()])), np.concatenate([p, p.conj()])
    values = np.linalg.eigvals(whole - np.outer(ones, ones.conj()))
    np.testing.assert_allclose(np.sort(values.real), -np.arange(2 * MODES, 0, -1), rtol=1e-9)


@pytest.mark.parametrize("length", [7, 64])
def test_kernel_against_dense_powers_and_the_published_transform(x64, length):
    """The bilinear rule with dense matrices; and S4's generating function at the roots of unity (2111.00396, C.3).

    At -1, a root of even lengths, it is zero over zero: there its limit stands.
    """
    lam, p, b = hippo(MODES)
    dt = 0.01
    unit = jnp.zeros((1, length, WIDTH)).at[:, 0].set(1)
    found = state_space.convolve(layers()["low_rank"][0], unit, jnp.zeros((1, WIDTH, 2 * MODES)))[0][0, :, 1]
    assert np.isfinite(found).all()

    both = [np.concatenate([v, v.conj()]) for v in (lam, p, b, np.asarray(complex_draw(WIDTH, MODES, seed=7))[1])]
    a = np.diag(both[0]) - np.outer(both[1], both[1].conj())
    left = np.linalg.inv(np.eye(2 * MODES) - dt / 2 * a)
    bar, b_bar = left @ (np.eye(2 * MODES) + dt / 2 * a), left @ (dt * both[2])
    powers = np.stack([np.linalg.matrix_power(bar, n) @ b_bar for n in range(length)])
    expected = (powers @ both[3]).real
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12 * np.abs(expected).max())

    truncated = both[3] @ (np.eye(2 * MODES) - np.linalg.matrix_power(bar, length))
    omega = np.exp(-2j * np.pi * np.arange(length // 2 + 1) / length)
    at_minus_one = np.abs(1 + omega) < 1e-12
    z = 2 * (1 - omega) / np.where(at_minus_one, 1, 1 + omega)

    def cauchy(left, right):
        return (left * right / (z[:, None] / dt - both[0][None])).sum(1)

    fraction = cauchy(truncated, both[1]) * cauchy(both[1].conj(), both[2]) / (1 + cauchy(both[1].conj(), both[1]))
    transform = 2 / np.where(at_minus_one, 1, 1 + omega) * (cauchy(truncated, both[2]) - fraction)
    limit = dt / 2 * (truncated @ both[2]) * np.ones_like(transform)
    kernel = np.fft.irfft(np.where(at_minus_one, limit, transform), length)
    np.testing.assert_allclose(found, kernel, rtol=1e-9, atol=1e-9 * np.abs(kernel).max())


def selective_inputs(length, numbers, seed=0):
    delta = jnp.abs(draw(2, length, WIDTH, seed=seed)) * 0.3
    return selective.Inputs(
        draw(2, length, WIDTH, seed=seed + 1), delta, *(draw(2, length, numbers, seed=seed + i) for i in (2, 3))
    )


@pytest.mark.parametrize("length", [127, 200])
@pytest.mark.parametrize("kind", ["real", "complex"])
def test_selective_scan_is_its_recurrence(x64, kind, length):
    a = -jnp.abs(draw(WIDTH, MODES, seed=5)) if kind == "real" else complex_draw(WIDTH, MODES, seed=5) - 3
    numbers = MODES * (1 if kind == "real" else 2)
    inputs, h0 = selective_inputs(length, numbers), draw(2, WIDTH, numbers, seed=9)

    def steps(inputs, h):
        def body(h, given):
            y, h = selective.step(selective.Inputs(*given), a, h)
            return h, y

        h, y = jax.lax.scan(body, h, tuple(v.swapaxes(0, 1) for v in inputs))
        return y.swapaxes(0, 1), h

    def both(run):
        def value(inputs, h):
            return sum((v**2).sum() for v in run(inputs, h))

        return run(inputs, h0), jax.jit(jax.grad(value, argnums=(0, 1)))(inputs, h0)

    found, expected = both(lambda inputs, h: selective.selective_scan(inputs, a, h)), both(steps)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-10, atol=1e-10 * np.abs(y).max())


def test_frozen_gates_are_a_time_invariant_state_space(x64):
    """Constant delta, b and c: the selective scan is the chunked convolution of the same diagonal matrix."""
    a, c = complex_draw(WIDTH, MODES, seed=5) - 3, complex_draw(1, MODES, seed=6)
    delta, u = jnp.asarray([0.01, 0.05, 0.2]), draw(2, 150, WIDTH, seed=1)
    shape = (2, 150)
    parts = jnp.concatenate([c.real, c.imag], -1)[0]
    ones = jnp.concatenate([jnp.ones(MODES), jnp.zeros(MODES)])
    inputs = selective.Inputs(
        u,
        jnp.broadcast_to(delta, (*shape, WIDTH)),
        jnp.broadcast_to(ones, (*shape, 2 * MODES)),
        jnp.broadcast_to(parts, (*shape, 2 * MODES)),
    )
    found, _ = selective.selective_scan(inputs, a, jnp.zeros((2, WIDTH, 2 * MODES)))
    scaled = delta.astype(a.dtype)[:, None]
    tables = state_space.diagonal(a * scaled, c * scaled)
    expected, _ = state_space.convolve(tables, u, jnp.zeros((2, WIDTH, 2 * MODES)))
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-10)


def test_a_random_dense_system(x64):
    a = jnp.stack([0.9 * jnp.eye(5) + 0.1 * draw(5, 5, seed=i) for i in range(WIDTH)])
    b, c = draw(WIDTH, 5, seed=1), draw(WIDTH, 5, seed=2)
    u, h0 = draw(1, 150, WIDTH, seed=3), draw(1, WIDTH, 5, seed=4)

    def step(u, h):
        h = state_space.apply_matrix(a, h) + b[None] * u[..., None]
        return (c[None] * h).sum(-1), h

    expected, last = recurrence(step, u, h0)
    found, found_last = state_space.convolve(state_space.dense(a, b, c), u, h0)
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-10 * np.abs(expected).max())
    np.testing.assert_allclose(found_last, last, rtol=1e-10, atol=1e-10 * np.abs(last).max())
