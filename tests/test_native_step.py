"""Generation's machine code against the plain step: any batch, alone and with a helper."""

import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from harmonic.generate import prefill
from harmonic.kernels import plain_step
from harmonic.kernels.cpu import ffi, helper_thread, step
from harmonic.kernels.plain_step import BlockWeights, Dense, step_block
from harmonic.models import make
from harmonic.models.harmonic_rnn.config import ModelConfig

pytestmark = [
    pytest.mark.laws,
    pytest.mark.skipif(not ffi.available(), reason="this machine's XLA does not take this machine code"),
]
CONFIG = ModelConfig(width=32, state_width=64, gate_blocks=8, pool_factors=(2, 3), blocks_per_level=2, pool_groups=32)


def blocks_of(width, state_width, count=2):
    """Weights of blocks, along a leading axis."""
    rng = np.random.default_rng(1)
    channels = state_width // 2

    def normal(*shape, scale=1.0):
        return jnp.asarray(scale * rng.standard_normal((count, *shape)), jnp.float32)

    def dense(inputs, outputs):
        return Dense(normal(inputs, outputs, scale=inputs**-0.5), normal(outputs, scale=0.1))

    return BlockWeights(
        entry=dense(width, 4 * channels + width),
        decay=jnp.abs(normal(channels, scale=0.3)),
        theta=normal(channels, scale=0.3),
        read_re=dense(channels, width),
        read_im=dense(channels, width).kernel,
        last=dense(width, width),
        mlp=dense(width, 4 * width),
        mlp_last=dense(2 * width, width),
    )


def inputs(width, channels, batch, count=2):
    keys = jax.random.split(jax.random.key(2), 3)
    x = 3 * jax.random.normal(keys[0], (batch, width), jnp.float32)
    return x, tuple(jax.random.normal(k, (count, batch, channels), jnp.float32) for k in keys[1:])


@pytest.mark.parametrize(("width", "state_width"), [(32, 64), (64, 192), (128, 256)])
def test_equals_the_plain_step(x64, width, state_width):
    blocks = blocks_of(width, state_width)
    packed = jax.jit(step.pack)(blocks)
    for batch in (1, 2, 3, 4, 11):
        x, h = inputs(width, state_width // 2, batch)
        y, new = jax.jit(step.run)(packed, x, h)
        assert y.dtype == new[0].dtype == jnp.float32
        expected, states = x.astype(jnp.float64), []
        for i in range(2):
            block = jax.tree.map(lambda v, i=i: v[i].astype(jnp.float64), blocks)
            expected, state = jax.jit(step_block)(block, expected, tuple(v[i].astype(jnp.float64) for v in h))
            states.append(state)
        np.testing.assert_allclose(y, expected, atol=2e-5, err_msg=f"batch {batch}")
        for part in (0, 1):
            np.testing.assert_allclose(new[part], np.stack([s[part] for s in states]), atol=2e-5)


def test_a_streams_bits_depend_neither_on_the_batch_nor_on_a_helper():
    packed = jax.jit(step.pack)(blocks_of(64, 128))
    run = jax.jit(lambda packed, *state: jax.lax.fori_loop(0, 50, lambda _, s: step.run(packed, *s), state))
    x, h = inputs(64, 64, 11)
    together = run(packed, x, h)
    taken = helper_thread.calls()
    for rows in (slice(0, 1), slice(3, 5), slice(4, 11)):
        for help_ in (contextlib.nullcontext, helper_thread.helper):
            with help_():
                y, new = jax.block_until_ready(run(packed, x[rows], tuple(v[:, rows] for v in h)))
            np.testing.assert_array_equal(y, together[0][rows])
            jax.tree.map(lambda a, b, rows=rows: np.testing.assert_array_equal(a, b[:, rows]), new, together[1])
    assert helper_thread.calls() == taken + 3 * 50  # offered whenever a helper was there, and only then


def test_kernels_are_made_once_whoever_asks_first():
    """Parts of a batch are traced side by side, and XLA takes a name only once."""
    x, h = inputs(96, 96, 2)
    packed = jax.jit(step.pack)(blocks_of(96, 192))
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: jax.jit(lambda *args: step.run(*args))(packed, x, h), range(8)))
    for one in made[1:]:
        jax.tree.map(np.testing.assert_array_equal, one, made[0])


def test_callers_at_once_share_one_helper():
    packed = jax.jit(step.pack)(blocks_of(32, 64))
    run = jax.jit(lambda packed, *state: jax.lax.fori_loop(0, 2_000, lambda _, s: step.run(packed, *s), state))
    x, h = inputs(32, 32, 2)
    alone = jax.block_until_ready(run(packed, x, h))
    with helper_thread.helper(), helper_thread.helper(), ThreadPoolExecutor(4) as pool:
        for made in pool.map(lambda _: jax.block_until_ready(run(packed, x, h)), range(8)):
            jax.tree.map(np.testing.assert_array_equal, made, alone)
    assert not any(thread.name == "harmonic-helper" for thread in threading.enumerate())


def test_training_is_generation():
    """Law 2, in float32: pooled levels at their own rates, from any position."""
    model = make(CONFIG)
    sampler = model.sampler()
    params = jax.jit(model.init)(jax.random.key(0))
    assert sampler.blocks(jnp.float32) is step and sampler.blocks(jnp.float64) is plain_step
    tokens = jax.random.randint(jax.random.key(3), (3, 24, 1), 0, 256)
    parallel, _ = model.apply(model.prepare(params), {"tokens": tokens}, model.init_state(3))

    @jax.jit
    def steps(params, state, tokens):
        def body(carry, token):
            logits, carry = model.step(weights, {}, carry)
            return model.observe(carry, token), logits[:, 0]

        weights = sampler.prepare(params)
        carry, logits = jax.lax.scan(body, sampler.enter(state), tokens.swapaxes(0, 1))
        return logits.swapaxes(0, 1), sampler.leave(carry)

    for t in (0, 1, 6, 9):
        state = prefill(model, params, tokens[:, :t], model.init_state(3)) if t else model.init_state(3)
        logits, after = steps(params, state, tokens[:, t:])
        np.testing.assert_allclose(logits, parallel[:, t:], atol=2e-5, err_msg=f"from {t}")
        assert int(after.position) == 0


def test_sizes_that_no_vector_halves_take_the_plain_step():
    assert step.fits(32, 96, jnp.float32)
    packed = jax.jit(step.pack)(blocks_of(32, 64))
    x, h = inputs(32, 32, 2)
    for wrong in ((packed[:1], x, h), (packed, x[:, :16], h), (packed, x.astype(jnp.bfloat16), h)):
        with pytest.raises(ValueError, match="do not fit"):
            step.run(*wrong)
    for width, channels, dtype in ((24, 32, jnp.float32), (32, 16, jnp.float32), (32, 32, jnp.float64)):
        assert not step.fits(width, channels, dtype)
