"""The generate suite of workflows.benchmark: samples a second, against a plain step."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from harmonic import models
from harmonic.config import Config
from harmonic.describe import costs
from harmonic.generate import generate
from harmonic.models.base import Model
from workflows.timing import REPEATS, best_seconds, matrix_rate


def suite(config: Config, batches: Sequence[int] = (1, 8, 32), length: int = 800) -> Iterator[dict[str, Any]]:
    """Generation with fresh weights, batch by batch, beside the plain step with the same weights and sampling, and
    beside the rate of a large matrix product: the operations that it needs, over those that such a product makes.

    A kind without a plain form is measured alone.
    """
    model = models.make(config.model, config.data.num_levels)
    params = jax.jit(model.init)(jax.random.key(0))
    dtype = jax.tree.leaves(params)[0].dtype
    needed = costs(config).operations["generation"]["dense"]
    for batch in batches:
        chunks = generate(model, params, batch=batch, length=length * (REPEATS + 1), chunk=length)
        next(chunks)  # compiles
        seconds = min(_seconds(functools.partial(next, chunks)) for _ in range(REPEATS))
        samples, rate, beside = batch * length / seconds, matrix_rate(dtype), {}
        if models.plain_variants(config.model):
            plain = plain_function(models.plain(config.model, config.data.num_levels), length // 4)
            plain_seconds = best_seconds(plain, params, model.init_state(batch), jax.random.key(0)) / (length // 4)
            beside = {"faster_than_plain": samples * plain_seconds / batch}
        yield {
            "config": config.name,
            "shape": [batch, length],
            "dtype": dtype.name,
            "samples_per_second": samples,
            **beside,
            "of_matrix_rate": samples * needed / rate,
            "matrix_operations_per_second": rate,
        }


def _seconds(function: Any) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def plain_function(model: Model, steps: int) -> Any:
    """(params, state, key) -> (state, tokens [steps, batch, 1]) by the plain model's step, compiled."""

    @jax.jit
    def run(params: Any, state: Any, key: jax.Array):
        def body(state, step_key):
            logits, state = model.step(params, {}, state)
            uniform = jax.random.uniform(step_key, (len(logits), 1))
            token = model.sample(logits, uniform)
            return model.observe(state, token), token

        return jax.lax.scan(body, state, jax.random.split(key, steps))

    return run
