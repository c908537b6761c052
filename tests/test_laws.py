"""The laws of a model, for every kind: a new folder in harmonic/models is tested here without a word.

A kind's config.py may hold `SMALL`, a config for these tests (without it they take `ModelConfig()`), and `VARIANTS`,
others by name. Every kind passes laws 1, 2, 3 and 7 in their first cases here, the default kind all laws in four. The
other cases, and the variants, are slow: `python -m pytest -m laws tests/test_laws.py -k sashimi` runs all of a kind.
Laws 5 and 8 are those of a run's folder and of a data set, which know nothing of models: test_train, test_kills,
test_export.
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
from harmonic.config import Config, MeshConfig, override
from harmonic.errors import UserError
from harmonic.generate import prefill
from harmonic.mesh import make_mesh
from harmonic.step import make_loss_and_grad

pytestmark = pytest.mark.laws


def small(kind):
    """The configs of a kind for these tests, by name."""
    module = importlib.import_module(f"harmonic.models.{kind}.config")
    return {kind: getattr(module, "SMALL", None) or module.ModelConfig()} | {
        f"{kind}-{name}": config for name, config in getattr(module, "VARIANTS", {}).items()
    }


def cases(*others, peers=True):
    """Parameters of a test: each model alone, or with each of `others`; see above for which are slow.

    Without `peers`, all cases are slow but for the default kind: of a law that most models have from the code around
    them.
    """
    found = []
    for kind in models.kinds():
        for name, config in small(kind).items():
            for number, other in enumerate(others or [()]):
                slow = name != kind or number > (3 if kind == models.DEFAULT_KIND else 0 if peers else -1)
                marks = [pytest.mark.slow] if slow else []
                identity = "-".join([name, *map(str, (getattr(value, "__name__", value) for value in other))])
                found.append(pytest.param(models.make(config), *other, marks=marks, id=identity))
    return found


each_model = pytest.mark.parametrize("model", cases())


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


@each_model
def test_law_1_causality(model):
    """Another token at t changes no output up to t, and the one after it."""
    weights, start = jax.jit(model.prepare)(parameters(model, jnp.float32)), model.init_state(1)
    tokens = random_tokens(model, 1, length_of(model))
    apply = jax.jit(lambda tokens: model.apply(weights, inputs(model, tokens), start)[0])
    outputs, product = apply(tokens), model.multiple
    for t in sorted({0, 1, product - 1, product, product + 1, tokens.shape[1] - 2}):
        changed = apply(tokens.at[0, t].add(97) % model.num_levels)
        np.testing.assert_array_equal(changed[:, : t + 1], outputs[:, : t + 1], err_msg=f"t={t}")
        assert not np.array_equal(changed[:, t + 1], outputs[:, t + 1]), f"the next sample ignores t={t}"


@each_model
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
    near = {1, model.multiple - 1, model.multiple, model.multiple + 1} - {0}
    for t in sorted(near) if model.config.kind == models.DEFAULT_KIND else [model.multiple + 1]:
        state = prefill(model, params, tokens[:, :t], start, conditions)
        assert_close(steps(state, tokens[:, t:])[0], expected[:, t:], 1e-10)


def random_batch(model, length=None):
    """Eight rows of unequal lengths, one of them empty, in one segment."""
    numbers, length = np.random.default_rng(0), length or 8 * length_of(model, 2)
    tokens = numbers.integers(0, model.num_levels, (1, 8, length, model.channels)).astype(np.uint8)
    lengths = np.array([length, length - 7, 5, 0] * 2, np.int32)
    labels = {"label": np.zeros(8, np.int32)} if model.labels else {}
    return batch_of(tokens, lengths, np.arange(8, dtype=np.int32), **labels)


def cut(batch, segments):
    tokens = batch["tokens"]
    rows, channels = tokens.shape[1], tokens.shape[3]
    return {**batch, "tokens": tokens.swapaxes(0, 1).reshape(rows, segments, -1, channels).swapaxes(0, 1)}


def loss_and_grad(model, data=1, seq=1, accumulate=1):
    return jax.jit(make_loss_and_grad(model, make_mesh(MeshConfig(data, seq)), accumulate))


WORDS = np.array([3, 4], np.uint32)


SINGLE, DOUBLE = (jnp.float32, 2e-5), (jnp.float64, 1e-10)


@pytest.mark.parametrize(
    ("model", "mesh", "dtype", "tolerance"),
    cases(
        ((2, 4), *DOUBLE), ((2, 4), *SINGLE), ((1, 8), *SINGLE), ((1, 8), *DOUBLE), ((8, 1), *SINGLE), ((8, 1),
        *DOUBLE), ((4, 2), *SINGLE), ((4, 2), *DOUBLE),
    ),
)  # fmt: skip
def test_law_3_sharding_is_invisible(x64, model, mesh, dtype, tolerance):
    if mesh[1] > 1 and not model.config.shardable:
        pytest.skip(f"a {model.config.kind} model cannot be cut over time")
    params, batch = parameters(model, dtype), random_batch(model)
    expected = loss_and_grad(model)(params, batch, WORDS)
    assert_close(loss_and_grad(model, *mesh)(params, batch, WORDS), expected, tolerance)


def test_law_3_cannot_be_broken_by_a_mesh():
    """A kind whose sequences cannot be cut is refused a mesh that would, and is the same on one that cuts the batch."""
    for kind in models.kinds():
        if not models.config_class(kind).shardable:
            with pytest.raises(UserError, match=r"mesh\.seq=2"):
                override(Config(), [f"model.kind={kind}", "mesh.seq=2"])


@pytest.mark.parametrize("model", cases(peers=False))
def test_law_4_what_is_sent_does_not_depend_on_the_length(model):
    """Read from the compiled program. A model that looks at a window of the past may send in proportion to it."""
    if not model.config.shardable:
        pytest.skip(f"a {model.config.kind} model cannot be cut over time")
    params, function = parameters(model, jnp.float32), loss_and_grad(model, 1, 8)

    def sent(length):
        compiled = function.lower(params, random_batch(model, length), WORDS).compile()
        return collections.Counter((c.kind, c.operand_bytes, c.group) for c in hlo.collectives(compiled))

    short = 8 * length_of(model, 2)
    if model.context is None:
        assert sent(short) == sent(4 * short)
    else:  # in proportion to its latents
        fixed, growing = sent(short), sent(4 * short)
        more = sum((growing - fixed).keys() and [n * size for (_, size, _), n in growing.items()])
        assert more <= 4 * sum(n * size for (_, size, _), n in fixed.items())


@pytest.mark.parametrize(("model", "accumulate"), cases((2,), (4,), peers=False))
def test_law_6_parts_of_a_batch_add_up(x64, model, accumulate):
    """Rows of unequal lengths, one of them empty."""
    params, batch = parameters(model, jnp.float64), random_batch(model)
    expected = loss_and_grad(model)(params, batch, WORDS)
    assert_close(loss_and_grad(model, accumulate=accumulate)(params, batch, WORDS), expected, 1e-10)


@pytest.mark.parametrize(
    ("model", "segments", "dtype", "tolerance"), cases((8, *DOUBLE), (2, *SINGLE), (2, *DOUBLE), (8, *SINGLE))
)
def test_law_7_segments_are_invisible(x64, model, segments, dtype, tolerance):
    """Loss and gradient, dropout included."""
    params, batch = parameters(model, dtype), random_batch(model)
    expected = loss_and_grad(model)(params, batch, WORDS)
    assert_close(loss_and_grad(model)(params, cut(batch, segments), WORDS), expected, tolerance)


@each_model
def test_law_7_work_is_linear_in_the_length(model):
    params, unit = jax.eval_shape(model.init, jax.random.key(0)), 8 * length_of(model)
    unit *= 1 if model.context is None else -(-200 * model.multiple // unit)  # attention takes latents by the hundred

    def work(length):
        batch = jax.eval_shape(lambda: random_batch(model, length))
        return operations(loss_and_grad(model), params, batch, jax.ShapeDtypeStruct((2,), jnp.uint32))

    # Differences, since what is made once a step does not depend on the length.
    more = work(2 * unit) - work(unit)
    assert work(34 * unit) - work(2 * unit) == pytest.approx(32 * more, rel=0.05)
