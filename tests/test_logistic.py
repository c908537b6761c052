"""The mixture of logistics as a distribution of tokens: against SciPy, at its edges, and as it is drawn from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import logsumexp
from scipy.stats import logistic as scipy_logistic

from harmonic.models import logistic

pytestmark = pytest.mark.laws


def random_outputs(shape, components=3, dtype=np.float64):
    numbers = np.random.default_rng(0)
    weights, centres = numbers.normal(size=(2, *shape, components))
    log_scales = numbers.uniform(-5, -1, (*shape, components))
    return jnp.asarray(np.concatenate([weights, centres / 2, log_scales], axis=-1), dtype)


@pytest.mark.parametrize("levels", [2, 16, 256, 65_536])
def test_it_is_the_probability_of_the_cell(x64, levels):
    outputs = random_outputs((5,))
    weights, centres, log_scales = np.split(np.asarray(outputs), 3, axis=-1)
    edges = np.linspace(-1, 1, levels + 1)
    edges[0], edges[-1] = -np.inf, np.inf
    inside = scipy_logistic.cdf(edges, centres[..., None], np.exp(log_scales)[..., None])
    shares = np.exp(weights - logsumexp(weights, axis=-1, keepdims=True))
    expected = (shares[..., None] * np.diff(inside)).sum(-2)
    found = np.exp(logistic.logits(outputs, levels))
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-14)
    np.testing.assert_allclose(found.sum(-1), 1, rtol=1e-12)


def test_log_prob_is_that_of_the_token_and_adds_up_over_channels(x64):
    outputs = random_outputs((2, 3, 2))
    tokens = jax.random.randint(jax.random.key(0), (2, 3, 2), 0, 256)
    chosen = np.take_along_axis(np.asarray(logistic.logits(outputs, 256)), np.asarray(tokens)[..., None], -1)[..., 0]
    np.testing.assert_allclose(logistic.log_prob(outputs, tokens, 256), chosen.sum(-1), rtol=1e-12)


@pytest.mark.parametrize("log_scale", [-12.0, -5.0, 0.0, 6.0])
@pytest.mark.parametrize("centre", [-3.0, -1.0, 0.003, 1.0, 40.0])
def test_far_from_every_cell_it_stays_finite(centre, log_scale):
    """In float32: also where a cell's probability is far below its smallest number, or a scale far above the range."""
    outputs = jnp.asarray([[[[0.0, centre, log_scale]]]], jnp.float32)

    def nats(outputs):
        return -jax.vmap(lambda token: logistic.log_prob(outputs, token[None, None, None], 256).sum())(jnp.arange(256))

    found, slopes = jax.jit(nats)(outputs), jax.jit(jax.jacrev(nats))(outputs)
    assert np.isfinite(found).all() and (found > -1e-5).all() and np.isfinite(slopes).all()
    np.testing.assert_allclose(np.exp(-np.asarray(found, np.float64)).sum(), 1, rtol=1e-4)


def test_gradients_in_float32_are_those_in_float64(x64):
    outputs = random_outputs((4, 50, 1))
    tokens = jax.random.randint(jax.random.key(0), (4, 50, 1), 0, 256)
    gradient = jax.jit(jax.grad(lambda outputs: logistic.log_prob(outputs, tokens, 256).sum()))
    np.testing.assert_allclose(gradient(outputs.astype(jnp.float32)), gradient(outputs), rtol=2e-3, atol=2e-4)


def test_draws_follow_it():
    outputs = jnp.broadcast_to(random_outputs((1, 1, 1), dtype=np.float32), (20_000, 1, 1, 9))
    uniform = jax.random.uniform(jax.random.key(0), (20_000, 1))
    tokens = np.asarray(jax.jit(lambda o, u: logistic.sample(o, u, 64))(outputs, uniform))
    counts = np.bincount(tokens.ravel(), minlength=64) / len(tokens)
    expected = np.exp(np.asarray(logistic.logits(outputs[0, 0, 0], 64)))
    assert np.abs(counts - expected).max() < 0.01
    sharp = np.asarray(jax.jit(lambda o, u: logistic.sample(o, u, 64, temperature=1e-4))(outputs, uniform))
    assert (sharp == expected.argmax()).all()
