"""Generation, sample by sample, in memory that does not grow with the length.

    for chunk in generate(model, params, batch=4, length=16_000 * 60, seed=1):
        play(decode(chunk.tokens[0], "mu_law"))

A stream's samples depend on the weights, the seed and its number alone: not on the batch nor on the chunks. On CPU the
streams are cut over the cores: products of so few rows are faster side by side than each on all cores. A core that
would have none helps with another's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from harmonic.errors import UserError
from harmonic.kernels.target import platform
from harmonic.models.base import Model, State

LONGEST = 2**31 - 2**16  # samples of a stream: positions are int32
_MAX_SEED = 2**32  # of what tells two seeds of JAX apart
_PREFILL = 16_000  # samples of a prompt that are run through the parallel forward at a time
# A core for itself, and Eigen's products, which have less to set up than YNNPACK's.
_CPU_OPTIONS = {"xla_cpu_multi_thread_eigen": False, "xla_cpu_experimental_ynn_fusion_type": ""}


@dataclasses.dataclass(frozen=True)
class Chunk:
    """A piece of audio as it comes.

    Attributes:
      tokens: [batch, time, channels].
      nats: [batch] negative log-likelihood of the piece under the model at temperature 1.
    """

    tokens: np.ndarray
    nats: np.ndarray


@functools.lru_cache(maxsize=8)
def _prefill_function(model: Model) -> Callable[..., State]:
    return jax.jit(lambda params, inputs, state: model.apply(model.prepare(params), inputs, state)[1])


@functools.lru_cache(maxsize=8)
def _force_function(model: Model) -> Callable[..., State]:
    sampler = model.sampler()
    return jax.jit(lambda params, inputs, state: sampler.force(sampler.prepare(params), inputs, state))


def prefill(
    model: Model,
    params: Any,
    tokens: np.ndarray | jax.Array,
    state: State,
    conditions: Mapping[str, np.ndarray] | None = None,
) -> State:
    """The state after tokens [batch, time, channels]: whole multiples in parallel, the rest by steps.

    `state` must be after a whole number of multiples. `conditions` are what conditions the model, each [batch, ...].
    """
    conditions, multiple = conditions or {}, model.multiple
    whole = tokens.shape[1] // multiple * multiple
    piece = max(_PREFILL // multiple, 1) * multiple
    for start in range(0, whole, piece):
        inputs = {"tokens": tokens[:, start : min(start + piece, whole)], **conditions}
        state = _prefill_function(model)(params, inputs, state)
    if whole < tokens.shape[1]:
        rest = jnp.asarray(tokens[:, whole:], jnp.int32)
        state = _force_function(model)(params, {"tokens": rest, **conditions}, state)
    return state


@functools.lru_cache(maxsize=8)
def _chunk_function(model: Model, size: int, temperature: float, top_p: float, platform: str) -> Callable[..., Any]:
    sampler = model.sampler()

    @functools.partial(jax.jit, compiler_options=_CPU_OPTIONS if platform == "cpu" else None)
    def run(weights, conditions, state: State, keys: jax.Array, first: jax.Array, steps: jax.Array):
        """`steps` <= `size` samples from position `first`."""
        positions = first + jnp.arange(size)
        draw = jax.vmap(lambda p, k: jax.random.uniform(jax.random.fold_in(k, p), (model.channels,)), (None, 0))
        uniform = jax.vmap(draw, (0, None))(positions, keys)
        return sampler.draw(weights, conditions, state, uniform, steps, temperature=temperature, top_p=top_p)

    return run


def generate(
    model: Model,
    params: Any,
    *,
    batch: int,
    length: int,
    seed: int = 0,
    first_stream: int = 0,
    temperature: float = 1.0,
    top_p: float = 1.0,
    prompt: np.ndarray | None = None,
    conditions: Mapping[str, np.ndarray] | None = None,
    chunk: int = 4_000,
) -> Iterator[Chunk]:
    """Generates `batch` streams side by side, handed out in chunks while they are made.

    Args:
      model, params: what is sampled.
      length: samples to generate, after the prompt.
      seed: of the whole call; stream i of any batch is the same.
      first_stream: the number of the first of these streams, so that many can be made batch by batch.
      temperature: logits are divided by it.
      top_p: sample from the smallest set of tokens that holds this probability.
      prompt: tokens [time, channels] that all streams continue, or [batch, time, channels].
      conditions: what conditions the model, such as "label" int32, each [batch, ...].
      chunk: samples a chunk.

    Raises:
      UserError: a batch, length, seed, temperature or top_p that cannot be.
    """
    for name, value, ok in (
        ("batch", batch, batch >= 1),
        ("length", length, 1 <= length <= LONGEST),
        ("seed", seed, 0 <= seed < _MAX_SEED),
        ("temperature", temperature, 0 < temperature < float("inf")),
        ("top_p", top_p, 0 < top_p <= 1),
    ):
        if not ok:
            allowed = {
                "length": f"at least 1 and at most {LONGEST:,}",
                "seed": f"at least 0 and below {_MAX_SEED:,}",
                "temperature": "above 0",
                "top_p": "above 0 and at most 1",
            }.get(name, "at least 1")
            raise UserError(f"{name}={value} is impossible: it must be {allowed}")
    cores = _cores() if platform() == "cpu" else 1
    parts = np.array_split(np.arange(batch), min(batch, cores))
    states = [model.init_state(len(rows)) for rows in parts]
    given = [{name: value[rows] for name, value in (conditions or {}).items()} for rows in parts]
    if prompt is not None and prompt.shape[-2]:
        prompt = np.broadcast_to(prompt, (batch, *prompt.shape[-2:]))
        states = [prefill(model, params, prompt[rows], *part) for rows, *part in zip(parts, states, given, strict=True)]
    key = jax.random.key(seed)
    keys = [jax.vmap(functools.partial(jax.random.fold_in, key))(first_stream + rows) for rows in parts]
    weights = _prepare_function(model)(params)
    sampler, idle = model.sampler(), len(parts) < cores  # a core without streams of its own helps another
    run = _chunk_function(model, min(chunk, length), float(temperature), float(top_p), platform())
    for first in range(0, length, chunk):
        steps = min(chunk, length - first)
        on = functools.partial(run, weights, first=np.int32(first), steps=np.int32(steps))
        helper = sampler.helper(weights) if idle else contextlib.nullcontext()
        with ThreadPoolExecutor(len(parts)) as pool, helper:
            made = jax.block_until_ready(list(pool.map(on, given, states, keys)))
        states, tokens, nats = ([part[i] for part in made] for i in range(3))
        yield Chunk(np.concatenate(tokens, axis=1)[:steps].swapaxes(0, 1), np.concatenate(nats))


@functools.lru_cache(maxsize=8)
def _prepare_function(model: Model) -> Callable[..., Any]:
    return jax.jit(model.sampler().prepare)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
