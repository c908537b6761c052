"""The model: parameter counts, laws 1 (causality) and 2 (training is generation), sampling."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from harmonic.errors import UserError
from harmonic.generate import Streams, generate, prefill
from harmonic.models import make, plain
from harmonic.models.dropout import Dropout, dropout
from harmonic.models.harmonic_rnn.config import ModelConfig

pytestmark = pytest.mark.laws
SMALL = {"width": 8, "state_width": 16, "gate_blocks": 4}
CONFIGS = {
    "no pooling": ModelConfig(**SMALL, pool_factors=(), blocks_per_level=3, pool_groups=8),
    "one pool": ModelConfig(**SMALL, pool_factors=(2,), blocks_per_level=2, pool_groups=2, head="logistic"),
    "uneven": ModelConfig(
        **SMALL, pool_factors=(2, 3), blocks_per_level=(1, 2, 1), pool_groups=1, embedding="learned"
    ),
    "paper's factors": ModelConfig(
        width=4, state_width=8, gate_blocks=2, pool_factors=(2, 4, 4, 5), blocks_per_level=1, pool_groups=4,
        embedding="linear",
    ),
}  # fmt: skip


def with_parameters(config, seed=0):
    model = make(config)
    params = jax.jit(model.init)(jax.random.key(seed))
    # Away from the symmetries of fresh parameters: biases and scales that are not 0 and 1.
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    dtype = jnp.float64 if jax.config.jax_enable_x64 else jnp.float32
    moved = [v.astype(dtype) + 0.05 * jax.random.normal(k, v.shape, dtype) for k, v in zip(keys, leaves, strict=True)]
    return model, jax.tree.unflatten(tree, moved)


def apply(model, params, tokens, state=None):
    state = model.init_state(len(tokens), jax.tree.leaves(params)[0].dtype) if state is None else state
    return jax.jit(lambda p, x, s: model.apply(model.prepare(p), {"tokens": x}, s))(params, tokens, state)


def random_tokens(model, batch, time, seed=2):
    return jax.random.randint(jax.random.key(seed), (batch, time, 1), 0, model.num_levels)


@pytest.mark.parametrize(("groups", "parameters"), [(128, 7_272_704), (4, 7_391_744), (1, 7_760_384)])
def test_parameter_counts_of_the_paper(groups, parameters):
    shapes = jax.eval_shape(make(ModelConfig(pool_groups=groups)).init, jax.random.key(0))
    assert sum(np.prod(v.shape, dtype=int) for v in jax.tree.leaves(shapes)) == parameters


def test_parameter_count_of_the_reduced_model():
    config = ModelConfig(width=32, state_width=64, pool_factors=(4, 4), blocks_per_level=2, pool_groups=32)
    shapes = jax.eval_shape(make(config).init, jax.random.key(0))
    assert sum(np.prod(v.shape, dtype=int) for v in jax.tree.leaves(shapes)) == 139_072


@pytest.mark.parametrize("name", CONFIGS)
def test_model_is_what_the_papers_write(x64, name):
    """Outputs and gradients against the plain model, from the start of a recording."""
    config = CONFIGS[name]
    model, params = with_parameters(config)
    tokens = random_tokens(model, 2, max(model.multiple, 12))

    def ours(params):
        return model.apply(model.prepare(params), {"tokens": tokens}, model.init_state(2, jnp.float64))[0]

    def written_plainly(params):
        return plain(config).apply(params, {"tokens": tokens}, model.init_state(2, jnp.float64))[0]

    def gradient_and_outputs(outputs):
        def nats(params):
            made = outputs(params)
            return -model.log_prob(made, tokens).sum(), made

        return jax.jit(jax.grad(nats, has_aux=True))(params)

    gradients, made = zip(*(gradient_and_outputs(outputs) for outputs in (ours, written_plainly)), strict=True)
    np.testing.assert_allclose(*made, rtol=1e-9, atol=1e-9)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-8), *gradients)
    assert bool(params["embedding"]) == (config.embedding != "sinusoidal")  # which learns nothing
    for path, gradient in jax.tree.leaves_with_path(gradients[0]):
        assert jnp.abs(gradient).max() > 1e-4, path


@pytest.mark.parametrize("name", CONFIGS)
def test_causality(name):
    """Law 1, by what changes: another token at t changes no logits up to t, and some after it."""
    model, params = with_parameters(CONFIGS[name])
    time = 3 * model.multiple if model.multiple < 100 else model.multiple
    tokens = random_tokens(model, 1, time)
    forward = jax.jit(lambda x: model.apply(model.prepare(params), {"tokens": x}, model.init_state(1))[0])
    logits = forward(tokens)
    product = model.multiple
    places = {0, 1, 2, product - 2, product - 1, product, product + 1, time - 2} & set(range(time - 1))
    for t in places:
        changed = forward(tokens.at[0, t, 0].add(97) % 256)
        np.testing.assert_array_equal(changed[:, : t + 1], logits[:, : t + 1], err_msg=f"t={t}")
        assert not np.allclose(changed[:, t + 1], logits[:, t + 1], atol=1e-6), f"the next sample ignores t={t}"


@pytest.mark.parametrize("name", CONFIGS)
def test_causality_of_prefixes(x64, name):
    """Law 1 as it is written: forward(x)[:, :t] == forward(x[:, :t]), padded to a length that the model takes."""
    model, params = with_parameters(CONFIGS[name])
    product, time = model.multiple, 2 * model.multiple + 10
    tokens = random_tokens(model, 2, time)

    def forward(x):
        short = x.shape[1]
        padded = jnp.pad(x, ((0, 0), (0, -short % product), (0, 0)))
        return apply(model, params, padded)[0][:, :short]

    logits = forward(tokens)
    for t in sorted({1, product - 1, product, product + 1, 2 * product, time} - {0}):
        np.testing.assert_allclose(forward(tokens[:, :t]), logits[:, :t], atol=1e-10, err_msg=f"t={t}")


@pytest.mark.parametrize("name", CONFIGS)
def test_training_is_generation(x64, name):
    """Law 2: steps, and prefill then steps from any t, give the logits of the parallel forward."""
    model, params = with_parameters(CONFIGS[name])
    product = model.multiple
    time = 2 * product if product > 20 else 6 * product
    tokens = random_tokens(model, 2, time)
    parallel, after = apply(model, params, tokens)

    @jax.jit
    def steps(state, tokens):
        def body(state, token):
            logits, state = model.step(weights, {}, state)
            return model.observe(state, token), logits[:, 0]

        weights = model.prepare(params)
        state, logits = jax.lax.scan(body, state, tokens.swapaxes(0, 1))
        return logits.swapaxes(0, 1), state

    start = model.init_state(2, jnp.float64)
    logits, state = steps(start, tokens)
    np.testing.assert_allclose(logits, parallel, atol=1e-10)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-10), state, after)
    for t in sorted({1, product - 1, product, product + 1, time - 1} - {0}):
        state = prefill(model, params, tokens[:, :t], start)
        assert int(state.position) == t % product
        logits, _ = steps(state, tokens[:, t:])
        np.testing.assert_allclose(logits, parallel[:, t:], atol=1e-10, err_msg=f"prefill of {t}")


def test_segments_carry_the_state():
    model, params = with_parameters(CONFIGS["uneven"])
    tokens = random_tokens(model, 2, 30)
    whole, _ = apply(model, params, tokens)
    state, pieces = model.init_state(2), []
    for start, stop in ((0, 6), (6, 18), (18, 30)):
        logits, state = apply(model, params, tokens[:, start:stop], state)
        pieces.append(logits)
    np.testing.assert_allclose(jnp.concatenate(pieces, 1), whole, atol=1e-5)


def test_a_length_that_pooling_does_not_divide_is_refused():
    model, params = with_parameters(CONFIGS["uneven"])
    with pytest.raises(ValueError, match="not a multiple of the pooling product 6"):
        model.apply(model.prepare(params), {"tokens": random_tokens(model, 1, 20)}, model.init_state(1))


def test_dropout_is_keyed_by_example_and_place():
    x = jnp.ones((3, 12, 50))
    key, rows = jnp.array([1, 2], jnp.uint32), jnp.array([4, 7, 9])
    full = dropout(x, 0.25, Dropout(key, rows, jnp.int32(0)), 3, 2)
    kept = float((full > 0).mean())
    assert 0.7 < kept < 0.8
    np.testing.assert_allclose(full[full > 0], 1 / 0.75, rtol=1e-4)
    # The same rows in another order, and the second half of the sequence alone, are masked alike.
    np.testing.assert_array_equal(dropout(x, 0.25, Dropout(key, rows[::-1], jnp.int32(0)), 3, 2), full[::-1])
    np.testing.assert_array_equal(dropout(x[:, 6:], 0.25, Dropout(key, rows, jnp.int32(3)), 3, 2), full[:, 6:])
    assert (dropout(x, 0.25, Dropout(key, rows, jnp.int32(0)), 4, 2) != full).any()
    assert dropout(x, 0.25, None, 3, 2) is x


def test_initial_decay_and_residual_scale():
    model = make(ModelConfig())
    params = model.init(jax.random.key(0))
    recurrence = params["blocks"]["temporal"]["recurrence"]
    radius = np.exp(-np.logaddexp(0, recurrence["log_decay"]))
    assert 0.9 <= radius.min() < 0.92 and 0.98 < radius.max() <= 0.99
    assert 0 <= recurrence["angle"].min() and recurrence["angle"].max() <= 0.1 * np.pi
    kernels = params["blocks"]["temporal"]["last"]["kernel"]
    for kernel, residuals in ((kernels[4:8], 17), (kernels[16:20], 8), (kernels[-4:], 17)):
        np.testing.assert_allclose(kernel.var(), 1 / residuals / 128, rtol=0.05)


def test_initial_ranges_of_each_level():
    config = ModelConfig(
        **SMALL, pool_factors=(2,), pool_groups=2, blocks_per_level=2, min_radius=0.5, max_radius=(0.6, 0.9999),
        max_angle=(0.01, 1.0),
    )  # fmt: skip
    recurrence = jax.jit(make(config).init)(jax.random.key(0))["blocks"]["temporal"]["recurrence"]
    radius, angle = np.exp(-np.log1p(np.exp(recurrence["log_decay"]))), np.asarray(recurrence["angle"])
    outer, inner = [0, 1, 4, 5], [2, 3]  # blocks down and up, and the innermost level's
    assert (radius > 0.4999).all() and (radius[outer] < 0.6001).all() and radius[inner].max() > 0.8
    assert (angle >= 0).all() and angle[outer].max() < 0.01 * np.pi and angle[inner].max() > 0.5 * np.pi


def test_sampling_follows_the_distribution():
    model = make(CONFIGS["no pooling"], num_levels=4)
    probabilities = np.array([0.5, 0.3, 0.15, 0.05])
    logits = jnp.log(jnp.broadcast_to(jnp.asarray(probabilities), (10_000, 1, 1, 4)))
    uniform = jax.random.uniform(jax.random.key(0), (10_000, 1))
    shares = np.bincount(model.sample(logits, uniform)[:, 0], minlength=4) / 10_000
    np.testing.assert_allclose(shares, probabilities, atol=0.02)
    # 0.7 is reached by the first two alone; what is kept keeps its proportions.
    shares = np.bincount(model.sample(logits, uniform, top_p=0.7)[:, 0], minlength=4) / 10_000
    np.testing.assert_allclose(shares, [0.625, 0.375, 0, 0], atol=0.02)
    cold = model.sample(logits, uniform, temperature=1e-3)
    assert (cold == 0).all()
    ends = jnp.array([[0.0], [np.nextafter(np.float32(1), np.float32(0))]])
    np.testing.assert_array_equal(model.sample(logits[:2], ends)[:, 0], [0, 3])


@pytest.mark.parametrize("sizes", [{}, {"width": 32, "state_width": 64}], ids=["plain", "machine code"])
def test_generation_depends_on_seed_and_stream_alone(sizes):
    model, params = with_parameters(dataclasses.replace(CONFIGS["uneven"], **sizes))

    def run(**kwargs):
        return np.concatenate([c.tokens for c in generate(model, params, length=50, **kwargs)], axis=1)

    all_at_once = run(batch=3, chunk=50, seed=5)
    assert all_at_once.shape == (3, 50, 1) and all_at_once.dtype == np.uint8
    np.testing.assert_array_equal(run(batch=3, chunk=7, seed=5), all_at_once)
    np.testing.assert_array_equal(run(batch=1, chunk=50, seed=5), all_at_once[:1])
    assert (run(batch=3, chunk=50, seed=6) != all_at_once).any()
    assert (all_at_once[0] != all_at_once[1]).any()


def test_generation_continues_a_prompt_and_knows_its_likelihood():
    model, params = with_parameters(CONFIGS["uneven"])
    prompt = np.asarray(random_tokens(model, 1, 17)[0], np.uint8)
    chunks = list(generate(model, params, batch=2, length=25, seed=1, prompt=prompt, chunk=10))
    tokens = np.concatenate([c.tokens for c in chunks], axis=1)
    whole = np.concatenate([np.broadcast_to(prompt, (2, 17, 1)), tokens], axis=1)
    logits, _ = apply(model, params, jnp.asarray(whole))
    nats = -model.log_prob(logits, whole)[:, 17:].sum(1)
    np.testing.assert_allclose(sum(c.nats for c in chunks), nats, rtol=1e-4)


def test_state_is_small():
    model = make(ModelConfig())
    assert model.state_bytes() < 60_000  # 36 complex vectors of 128, and the edges of four pools


def test_pieces_may_change_their_settings_and_be_drawn_again():
    """A piece depends on what came before it and on its own settings; a mark brings back the place, bit for bit."""
    model, params = with_parameters(CONFIGS["uneven"])
    made = Streams(model, params, batch=2, chunk=20, seed=5)
    first = made.draw(20)
    mark = made.mark()
    whole = np.concatenate([first.tokens, made.draw(20).tokens], axis=1)
    (plain,) = generate(model, params, batch=2, length=40, seed=5)
    np.testing.assert_array_equal(whole, plain.tokens)

    made.rewind(mark)
    cold = made.draw(20, temperature=0.05).tokens
    assert made.position == 40 and (cold != whole[:, 20:]).any()
    made.rewind(mark)
    narrow = made.draw(20, top_p=1e-6).tokens  # the likeliest token alone, as at a temperature near zero
    made.rewind(mark)
    np.testing.assert_array_equal(narrow, made.draw(20, temperature=1e-4).tokens)
    made.rewind(mark)
    np.testing.assert_array_equal(made.draw(7).tokens, whole[:, 20:27])
    np.testing.assert_array_equal(made.draw(13).tokens, whole[:, 27:])
    with pytest.raises(UserError, match="top_p=0 is impossible"):
        made.draw(20, top_p=0)
