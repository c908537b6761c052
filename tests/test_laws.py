"""The laws of a model, for every kind: a new folder in harmonic/models is tested here without a word.

A kind's config.py may hold `SMALL`, a config for these tests; without it they take `ModelConfig()`. Laws 5 and 8 are
those of a run's folder and of a data set, which know nothing of models: test_train, test_kills, test_export.
"""

import collections
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import batch_of
from work import operations

from harmonic import hlo, models
from harmonic.config import MeshConfig
from harmonic.generate import prefill
from harmonic.mesh import make_mesh
from harmonic.step import make_loss_and_grad

pytestmark = pytest.mark.laws


@pytest.fixture(params=models.kinds())
def model(request):
    module = importlib.import_module(f"harmonic.models.{request.param}.config")
    return models.make(getattr(module, "SMALL", None) or module.ModelConfig())


def parameters(model, dtype):
    """Away from the symmetries of fresh parameters."""
    params = jax.jit(model.init)(jax.random.key(0))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    moved = [v.astype(dtype) + 0.05 * jax.random.normal(k, v.shape, dtype) for k, v in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(tree, moved)


def random_tokens(model, batch, time):
    return jax.random.randint(jax.random.key(2), (batch, time, model.channels), 0, model.num_levels)


def inputs(model, tokens):
    rows = len(tokens)
    return {"tokens": tokens, **({"label": jnp.zeros(rows, jnp.int32)} if model.labels else {})}


def length_of(model, multiples=4):
    """Samples: so many multiples of the model, and at least 24."""
    return model.multiple * max(multiples, -(-24 // model.multiple))


def assert_close(actual, expected, tolerance):
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * max(1.0, float(np.abs(b).max(initial=0))))


def test_law_1_causality(model):
    """Another token at t changes no output up to t, and the one after it."""
    weights, start = model.prepare(parameters(model, jnp.float32)), model.init_state(1)
    tokens = random_tokens(model, 1, length_of(model))
    apply = jax.jit(lambda tokens: model.apply(weights, inputs(model, tokens), start)[0])
    outputs, product = apply(tokens), model.multiple
    for t in sorted({0, 1, product - 1, product, product + 1, tokens.shape[1] - 2}):
        changed = apply(tokens.at[0, t].add(97) % model.num_levels)
        np.testing.assert_array_equal(changed[:, : t + 1], outputs[:, : t + 1], err_msg=f"t={t}")
        assert not np.array_equal(changed[:, t + 1], outputs[:, t + 1]), f"the next sample ignores t={t}"


def test_law_2_training_is_generation(x64, model):
    """Steps, and prefill then steps from any t, give the outputs and the state of the parallel forward."""
    params, tokens = parameters(model, jnp.float64), random_tokens(model, 2, length_of(model))
    start, sampler = model.init_state(2, jnp.float64), model.sampler()
    conditions = {name: value for name, value in inputs(model, tokens).items() if name != "tokens"}
    expected, after = jax.jit(lambda p: model.apply(model.prepare(p), inputs(model, tokens), start))(params)

    @jax.jit
    def steps(state, tokens):
        def body(carry, token):
            outputs, carry = model.step(weights, conditions, carry)
            return model.observe(carry, token), outputs[:, 0]

        weights = sampler.prepare(params)
        carry, outputs = jax.lax.scan(body, sampler.enter(state), tokens.swapaxes(0, 1))
        return outputs.swapaxes(0, 1), sampler.leave(carry)

    outputs, state = steps(start, tokens)
    assert_close(outputs, expected, 1e-10)
    assert_close(state, after, 1e-10)
    for t in sorted({1, model.multiple - 1, model.multiple, model.multiple + 1} - {0}):
        state = prefill(model, params, tokens[:, :t], start, conditions)
        assert_close(steps(state, tokens[:, t:])[0], expected[:, t:], 1e-10)


def random_batch(model, segments, rows, length):
    numbers = np.random.default_rng(0)
    tokens = numbers.integers(0, model.num_levels, (segments, rows, length, model.channels)).astype(np.uint8)
    total = segments * length
    lengths = np.array([total, total - 7, 5, 0] * (rows // 4), np.int32)
    labels = {"label": np.zeros(rows, np.int32)} if model.labels else {}
    return batch_of(tokens, lengths, np.arange(rows, dtype=np.int32), **labels)


def cut(batch, segments):
    tokens = batch["tokens"]
    rows, channels = tokens.shape[1], tokens.shape[3]
    return {**batch, "tokens": tokens.swapaxes(0, 1).reshape(rows, segments, -1, channels).swapaxes(0, 1)}


def loss_and_grad(model, data=1, seq=1, accumulate=1):
    return jax.jit(make_loss_and_grad(model, make_mesh(MeshConfig(data, seq)), accumulate))


WORDS = np.array([3, 4], np.uint32)


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 2e-5), (jnp.float64, 1e-10)])
@pytest.mark.parametrize("mesh", [(8, 1), (1, 8), (2, 4), (4, 2)])
def test_law_3_sharding_is_invisible(x64, model, mesh, dtype, tolerance):
    if mesh[1] > 1 and not model.config.shardable:
        pytest.skip(f"a {model.config.kind} model cannot be cut over time")
    params, batch = parameters(model, dtype), random_batch(model, 1, 8, 8 * length_of(model, 2))
    expected = loss_and_grad(model)(params, batch, WORDS)
    assert_close(loss_and_grad(model, *mesh)(params, batch, WORDS), expected, tolerance)


def test_law_4_what_is_sent_does_not_depend_on_the_length(model):
    """Read from the compiled program. A model that looks at a window of the past may send in proportion to it."""
    if not model.config.shardable:
        pytest.skip(f"a {model.config.kind} model cannot be cut over time")
    if model.context is not None:
        pytest.skip(f"a {model.config.kind} model sends what it has of the past; `costs` says how much")
    params, function = parameters(model, jnp.float32), loss_and_grad(model, 1, 8)

    def sent(length):
        compiled = function.lower(params, random_batch(model, 1, 4, length), WORDS).compile()
        return collections.Counter((c.kind, c.operand_bytes, c.group) for c in hlo.collectives(compiled))

    short = 8 * length_of(model, 2)
    assert sent(short) == sent(4 * short)


@pytest.mark.parametrize("accumulate", [2, 4])
def test_law_6_parts_of_a_batch_add_up(x64, model, accumulate):
    """Rows of unequal lengths, one of them empty."""
    params, batch = parameters(model, jnp.float64), random_batch(model, 1, 4, length_of(model))
    expected = loss_and_grad(model)(params, batch, WORDS)
    assert_close(loss_and_grad(model, accumulate=accumulate)(params, batch, WORDS), expected, 1e-10)


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 2e-5), (jnp.float64, 1e-10)])
@pytest.mark.parametrize("segments", [2, 8])
def test_law_7_segments_are_invisible(x64, model, segments, dtype, tolerance):
    """Loss and gradient, dropout included."""
    params, batch = parameters(model, dtype), random_batch(model, 1, 4, length_of(model, 8))
    expected = loss_and_grad(model)(params, batch, WORDS)
    assert_close(loss_and_grad(model)(params, cut(batch, segments), WORDS), expected, tolerance)


def test_law_7_work_is_linear_in_the_length(model):
    params, unit = jax.eval_shape(model.init, jax.random.key(0)), 8 * length_of(model)

    def work(length):
        batch = jax.eval_shape(lambda: random_batch(model, 1, 4, length))
        return operations(loss_and_grad(model), params, batch, jax.ShapeDtypeStruct((2,), jnp.uint32))

    assert work(16 * unit) == pytest.approx(16 * work(unit), rel=0.05)
