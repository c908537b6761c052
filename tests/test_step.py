"""The training step: what laws 3, 6 and 7 mean for this model beyond test_laws.py, and the recipe's arithmetic."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import MODEL, batch_of, config, parameters
from work import operations

from harmonic.config import MeshConfig
from harmonic.errors import UserError
from harmonic.mesh import make_mesh
from harmonic.models import make
from harmonic.step import init_state, make_loss_and_grad, make_optimizer, make_train_step, schedule

pytestmark = pytest.mark.laws


def random_batch(segments, batch, length, seed=0):
    numbers = np.random.default_rng(seed)
    tokens = numbers.integers(0, 256, (segments, batch, length, 1)).astype(np.uint8)
    total = segments * length
    lengths = np.array([total, total - 7, 5, 0] * (batch // 4 or 1), np.int32)[:batch]
    return batch_of(tokens, lengths, np.arange(batch, dtype=np.int32))


def cut(batch, segments):
    """The same sequences in another number of segments."""
    tokens = batch["tokens"]
    _, rows, _, channels = tokens.shape
    return {**batch, "tokens": tokens.swapaxes(0, 1).reshape(rows, segments, -1, channels).swapaxes(0, 1)}


@functools.cache
def loss_and_grad(data_axis, seq_axis):
    model = make(MODEL)
    return jax.jit(make_loss_and_grad(model, make_mesh(MeshConfig(data_axis, seq_axis))))


def assert_same(actual, expected, tolerance):
    """Relative to the size of each array: single entries of a gradient may be nothing but rounding."""
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * float(np.abs(b).max()))


def test_segments_that_are_sharded(x64):
    params, batch = parameters(jnp.float64), random_batch(1, 4, 96)
    key = jnp.array([3, 4], jnp.uint32)
    expected = loss_and_grad(1, 1)(params, batch, key)
    assert_same(loss_and_grad(2, 4)(params, cut(batch, 4), key), expected, 1e-10)


@pytest.mark.parametrize("mesh", [(1, 1), (2, 2)])
def test_accumulated_gradients_are_those_of_the_batch(x64, mesh):
    """Law 6: rows of unequal lengths, one of them empty, in parts."""
    params, batch = parameters(jnp.float64), random_batch(2, 8, 48)
    key = jnp.array([3, 4], jnp.uint32)
    expected = loss_and_grad(1, 1)(params, batch, key)
    parts = make_loss_and_grad(make(MODEL), make_mesh(MeshConfig(*mesh)), accumulate=4)
    assert_same(jax.jit(parts)(params, batch, key), expected, 1e-10)


def test_loss_is_bits_per_unmasked_sample(x64):
    """Against the definition, sample by sample, and blind to what stands behind a row's end."""
    model, params = make(MODEL), parameters(jnp.float64)
    batch = random_batch(1, 4, 60)
    tokens, lengths = batch["tokens"], batch["length"]
    loss, _ = loss_and_grad(1, 1)(params, batch, None)
    logits, _ = model.apply(model.prepare(params), {"tokens": jnp.asarray(tokens[0])}, model.init_state(4, jnp.float64))
    log_p = np.asarray(jax.nn.log_softmax(logits))[:, :, 0]
    bits = [-log_p[b, t, tokens[0, b, t, 0]] / np.log(2) for b in range(4) for t in range(lengths[b])]
    np.testing.assert_allclose(loss, np.mean(bits), rtol=1e-12)
    behind = tokens.copy()
    behind[0, 1, lengths[1] :] = 9
    assert loss_and_grad(1, 1)(params, {**batch, "tokens": behind}, None)[0] == loss


def test_memory_in_segments_grows_by_a_state_and_the_tokens():
    """Law 7, read from the compiled program."""
    model, params = make(MODEL), parameters(jnp.float32)

    def temporaries(segments):
        batch = random_batch(segments, 1, 600)
        compiled = loss_and_grad(1, 1).lower(params, batch, jnp.zeros(2, jnp.uint32)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    short, long = temporaries(4), temporaries(40)
    # Saved for each segment: the state, and at most the tokens and their masks again.
    assert long - short <= 36 * (model.state_bytes() + 600 * 16), (short, long)
    assert long < 1.5 * short


def test_work_grows_linearly():
    """Law 7, in operations: sixteen times the length, in one segment or in more of them, is sixteen times the work."""
    model, shapes = make(MODEL), jax.ShapeDtypeStruct
    params = jax.eval_shape(model.init, jax.random.key(0))

    def forward(length):
        def function(params, tokens):
            return model.apply(model.prepare(params), {"tokens": tokens}, model.init_state(1))

        return operations(function, params, shapes((1, length, 1), jnp.uint8))

    def training(segments, length):
        rows = shapes((4,), jnp.int32)
        batch = batch_of(shapes((segments, 4, length, 1), jnp.uint8), rows, rows)
        return operations(loss_and_grad(1, 1), params, batch, shapes((2,), jnp.uint32))

    # What is done once, whatever the length, may be a hundredth of the shorter one.
    assert forward(16 * 768) == pytest.approx(16 * forward(768), rel=0.01)
    assert training(1, 16 * 768) == pytest.approx(16 * training(1, 768), rel=0.01)
    assert training(64, 768) == pytest.approx(16 * training(4, 768), rel=0.01)


def test_operations_are_counted_wherever_they_are():
    """The counter of the test above finds what is quadratic, and multiplies loops."""
    x, w = jnp.zeros((64, 8)), jnp.zeros((8, 32))
    products = 64 * 2 * 8 * 32
    assert operations(jnp.dot, x, w) == products
    assert operations(lambda x, w: jax.lax.scan(lambda carry, row: (carry, row @ w), 0, x), x, w) == products
    assert operations(lambda x: jax.lax.map(jax.jit(jnp.sin), x), x) == 64 * 2 * 8
    assert operations(lambda x: jnp.einsum("ik,jk->ij", x, x), x) == pytest.approx(2 * 64 * 64 * 8, rel=0.1)
    with pytest.raises(ValueError, match="rounds are not known"):
        operations(lambda x: jax.lax.while_loop(lambda x: (x > 0).all(), jnp.sin, x), x)


def test_recipe():
    """Warm-up, clipping and AdamW, against optax put together by hand."""
    ours = config("train.learning_rate=0.01", "train.warmup_steps=4", "train.clip_norm=1")
    rates = [float(schedule(ours, 0.01)(s)) for s in range(6)]
    np.testing.assert_allclose(rates, [0.0025, 0.005, 0.0075, 0.01, 0.01, 0.01], rtol=1e-6)
    params = {"w": jnp.array([1.0, -2.0])}
    optimizer = make_optimizer(make(ours.model), ours)
    with jax.numpy_dtype_promotion("standard"):
        update, _ = optimizer.update({"w": jnp.array([30.0, 40.0])}, optimizer.init(params), params)
    # Clipped to (0.6, 0.8); Adam's first step is the sign, and the weight decays beside it.
    np.testing.assert_allclose(update["w"], -0.0025 * (np.array([1, 1]) + 1e-4 * np.array([1, -2])), rtol=1e-4)


def test_schedules():
    """Up in equal steps, level until the fall begins, and zero where the step after the last would be."""
    shape = ("train.warmup_steps=2", "train.steps=8", "train.decay_start=0.5")
    rates = {
        name: [float(schedule(config(*shape, f"train.schedule={name}"), 2.0)(step)) for step in range(9)]
        for name in ("constant", "linear", "cosine")
    }
    np.testing.assert_allclose(rates["constant"], [1, 2, 2, 2, 2, 2, 2, 2, 2], rtol=1e-6)
    np.testing.assert_allclose(rates["linear"], [1, 2, 2, 2, 2, 1.5, 1, 0.5, 0], rtol=1e-6)
    half = [2, 1 + math.sqrt(0.5), 1, 1 - math.sqrt(0.5), 0]
    np.testing.assert_allclose(rates["cosine"], [1, 2, 2, 2, *half], rtol=1e-5, atol=1e-6)


def test_muon_takes_the_matrices_that_the_model_names():
    """Their updates are as long in every direction as Muon's rate says; the others are AdamW's."""
    ours = config("train.optimizer=muon", "train.learning_rate=0.01", "train.warmup_steps=0", "train.weight_decay=0")
    model, params = make(ours.model), parameters(jnp.float32)
    numbers = np.random.default_rng(0)
    grads = jax.tree.map(lambda v: jnp.asarray(numbers.normal(size=v.shape), jnp.float32), params)
    optimizer = make_optimizer(model, ours)
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = optimizer.update(grads, optimizer.init(params), params)
        adam = optax.adamw(0.01, weight_decay=0, nesterov=True)
        expected, _ = adam.update(grads, adam.init(params), params)
    seen = set()
    for path, update in jax.tree_util.tree_leaves_with_path(updates):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if model.matrix_axes(name, update.shape) is None:
            (same,) = [e for p, e in jax.tree_util.tree_leaves_with_path(expected) if p == path]
            np.testing.assert_allclose(update, same, rtol=2e-2, atol=1e-5)  # AdamW's eps after clipping
            continue
        seen.add(name.split(".")[-2])
        *_, inputs, outputs = update.shape
        values = np.linalg.svd(update, compute_uv=False) / (0.01 * ours.train.muon_scale)
        values /= math.sqrt(max(1, outputs / inputs))
        assert 0.3 < values.min() and values.max() < 1.3
    assert seen >= {"input", "output", "gate", "up", "last"}


def test_a_model_without_matrices_refuses_muon(monkeypatch):
    ours = config("train.optimizer=muon")
    model = make(ours.model)
    monkeypatch.setattr(model, "matrix_axes", lambda name, shape: None)
    with pytest.raises(UserError, match="adamw: a harmonic_rnn model names no matrices for Muon"):
        make_optimizer(model, ours)


def step_once(ours, state, batch, step=0):
    model = make(ours.model)
    function = make_train_step(model, ours, make_mesh(ours.mesh))
    return function(jax.tree.map(jnp.array, state), batch, jax.random.key(0), np.int32(step))


def test_bad_updates_are_skipped_and_leave_everything_alone():
    ours = config("train.skip_norm=1e-9")
    model = make(ours.model)
    state = jax.jit(lambda: init_state(ours, model))()
    batch = random_batch(1, 4, 60)
    after, metrics = step_once(ours, state, batch)
    assert metrics["skipped"] == 1 and metrics["streak"] == 1
    jax.tree.map(np.testing.assert_array_equal, (after.params, after.ema), (state.params, state.ema))
    jax.tree.map(np.testing.assert_array_equal, after.optimizer["adam"], state.optimizer["adam"])

    broken = jax.tree.map(lambda v: v * jnp.nan, state.params)
    ours = config()
    after, metrics = step_once(ours, state._replace(params=broken), batch)
    assert np.isnan(metrics["loss"]) and metrics["skipped"] == 1
    jax.tree.map(np.testing.assert_array_equal, after.ema, state.ema)
    # A batch without a sample has no loss: skipped too.
    _, metrics = step_once(ours, state, {**batch, "length": np.zeros(4, np.int32)})
    assert metrics["skipped"] == 1


@pytest.mark.parametrize("debias", [False, True])
def test_average_of_the_weights(debias):
    ours = config("train.ema_decay=0.9", f"train.ema_debias={debias}")
    state = jax.jit(lambda: init_state(ours, make(ours.model)))()
    expected, weights = state.params, []
    for step in range(3):
        state, _ = step_once(ours, state, random_batch(1, 4, 60), step=step)
        weights.append(state.params)
        expected = optax.incremental_update(state.params, expected, 0.1)
    if debias:
        shares = np.array([0.81, 0.9, 1.0]) * 0.1 / (1 - 0.9**3)
        expected = jax.tree.map(lambda *v: sum(s * w for s, w in zip(shares, v, strict=True)), *weights)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=1e-6), state.ema, expected)


def test_the_logistic_head_on_a_mesh(x64):
    """It needs the sample before each, also over the edge of a shard: loss and gradient are those of one device."""
    model = make(dataclasses.replace(MODEL, head="logistic", components=2))
    params = jax.tree.map(lambda v: v.astype(jnp.float64), jax.jit(model.init)(jax.random.key(0)))
    batch, words = random_batch(2, 8, 48), jnp.array([3, 4], jnp.uint32)
    found = [
        jax.jit(make_loss_and_grad(model, make_mesh(MeshConfig(*m))))(params, batch, words) for m in ((1, 1), (2, 4))
    ]
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-10), *found)


@pytest.mark.parametrize("mesh", [(1, 1), (2, 4)])
def test_bfloat16_activations(mesh):
    """Close to float32, in half the bytes; what adds up over segments and samples stays in float32."""
    params, batch, key = parameters(jnp.float32), random_batch(2, 8, 48), jnp.array([3, 4], jnp.uint32)
    model = make(dataclasses.replace(MODEL, activations="bfloat16"))
    loss, grads = jax.jit(make_loss_and_grad(model, make_mesh(MeshConfig(*mesh))))(params, batch, key)
    expected, expected_grads = loss_and_grad(1, 1)(params, batch, key)
    loss, expected = float(loss), float(expected)
    assert loss != expected and loss == pytest.approx(expected, rel=1e-3)
    for ours, theirs in zip(jax.tree.leaves(grads), jax.tree.leaves(expected_grads), strict=True):
        assert ours.dtype == jnp.float32
        difference = np.linalg.norm(np.asarray(ours) - np.asarray(theirs))
        assert difference <= 0.1 * np.linalg.norm(np.asarray(theirs))
    tokens = {"tokens": jnp.zeros((2, 12, 1), jnp.uint8)}
    logits, state = jax.jit(model.apply)(model.prepare(params), tokens, model.init_state(2))
    assert {v.dtype.name for v in jax.tree.leaves((logits, state))} == {"float32", "int32"}
