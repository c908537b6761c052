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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from harmonic.errors import UserError
from harmonic.kernels.target import platform
from harmonic.models.base import Model, State, in_precision

LONGEST = 2**31 - 2**16  # samples of a stream: positions are int32
_MAX_SEED = 2**32  # of what tells two seeds of JAX apart
_PREFILL = 16_000  # samples of a prompt that are run through the parallel forward at a time
# A core for itself, and Eigen's products, which have less to set up than YNNPACK's.
CPU_OPTIONS = {"xla_cpu_multi_thread_eigen": False, "xla_cpu_experimental_ynn_fusion_type": ""}


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
    return jax.jit(
        in_precision(model, lambda params, inputs, state: model.apply(model.prepare(params), inputs, state)[1])
    )


@functools.lru_cache(maxsize=8)
def _force_function(model: Model) -> Callable[..., State]:
    sampler = model.sampler()
    return jax.jit(
        in_precision(model, lambda params, inputs, state: sampler.force(sampler.prepare(params), inputs, state))
    )


def prefill_piece(model: Model) -> int:
    """Samples that `prefill` runs at a time. A prompt of a multiple of them needs one program, of any other length two
    more.
    """
    return max(_PREFILL // model.multiple, 1) * model.multiple


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
    conditions, multiple, piece = conditions or {}, model.multiple, prefill_piece(model)
    whole = tokens.shape[1] // multiple * multiple
    for start in range(0, whole, piece):
        inputs = {"tokens": tokens[:, start : min(start + piece, whole)], **conditions}
        state = _prefill_function(model)(params, inputs, state)
    if whole < tokens.shape[1]:
        rest = jnp.asarray(tokens[:, whole:], jnp.int32)
        state = _force_function(model)(params, {"tokens": rest, **conditions}, state)
    return state


@functools.lru_cache(maxsize=8)
def _chunk_function(model: Model, size: int, platform: str) -> jax.stages.Wrapped:
    sampler = model.sampler()

    @functools.partial(jax.jit, compiler_options=CPU_OPTIONS if platform == "cpu" else None)
    @functools.partial(in_precision, model)
    def run(
        weights, conditions, state: State, keys: jax.Array, first: jax.Array, steps: jax.Array, settings: jax.Array
    ):
        """`steps` <= `size` samples from position `first`; `settings` are temperature and top_p."""
        positions = first + jnp.arange(size)
        draw = jax.vmap(lambda p, k: jax.random.uniform(jax.random.fold_in(k, p), (model.channels,)), (None, 0))
        uniform = jax.vmap(draw, (0, None))(positions, keys)
        temperature, top_p = settings
        return sampler.draw(weights, conditions, state, uniform, steps, temperature=temperature, top_p=top_p)

    return run


def lower_chunk(model: Model, batch: int, size: int, sharding: jax.sharding.Sharding) -> jax.stages.Lowered:
    """The program of `size` samples of `batch` streams, lowered for shapes alone, on the platform of
    `kernels.target.platform`."""

    def shaped(tree: Any) -> Any:
        return jax.tree.map(lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=sharding), tree)

    params = jax.eval_shape(model.init, jax.random.key(0))
    weights = jax.eval_shape(_prepare_function(model), params)
    state = jax.eval_shape(lambda: model.init_state(batch))
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), batch))
    number, settings = jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct((2,), jnp.float32)
    conditions = {"label": jax.ShapeDtypeStruct((batch,), jnp.int32)} if model.labels else {}
    arguments = shaped((weights, conditions, state, keys, number, number, settings))
    return _chunk_function(model, size, platform()).lower(*arguments)


class Mark(NamedTuple):
    """A place in streams that `Streams.rewind` returns to: samples since the prompt, and the states there."""

    position: int
    states: list[State]


class Streams:
    """Streams that are generated side by side, a piece at a time. Each piece may have other settings.

        streams = Streams(model, params, batch=1, chunk=1_600, seed=1)
        chunk = streams.draw(1_600, temperature=0.9)

    Args:
      model, params: what is sampled.
      batch: streams.
      chunk: the most samples of a piece. Each size is compiled, once.
      seed, first_stream, prompt, conditions: as for `generate`.
      help: whether a core that has no stream helps another; not where other threads generate as well.

    Attributes:
      position: samples that each stream has, its prompt not counted.
    """

    def __init__(
        self,
        model: Model,
        params: Any,
        *,
        batch: int,
        chunk: int,
        seed: int = 0,
        first_stream: int = 0,
        prompt: np.ndarray | None = None,
        conditions: Mapping[str, np.ndarray] | None = None,
        help: bool = True,
    ):
        _check(
            batch=(batch, batch >= 1, "at least 1"),
            chunk=(chunk, chunk >= 1, "at least 1"),
            seed=(seed, 0 <= seed < _MAX_SEED, f"at least 0 and below {_MAX_SEED:,}"),
        )
        cores = _cores() if platform() == "cpu" else 1
        parts = np.array_split(np.arange(batch), min(batch, cores))
        self.position = 0
        self._states = [model.init_state(len(rows)) for rows in parts]
        self._given = [{name: value[rows] for name, value in (conditions or {}).items()} for rows in parts]
        if prompt is not None and prompt.shape[-2]:
            prompt = np.broadcast_to(prompt, (batch, *prompt.shape[-2:]))
            self._states = [
                prefill(model, params, prompt[rows], *part)
                for rows, *part in zip(parts, self._states, self._given, strict=True)
            ]
        key = jax.random.key(seed)
        self._keys = [jax.vmap(functools.partial(jax.random.fold_in, key))(first_stream + rows) for rows in parts]
        self._weights = _prepare_function(model)(params)
        self._run = _chunk_function(model, chunk, platform())
        # A core without streams of its own helps another.
        self._sampler, self._idle = model.sampler(), help and len(parts) < cores

    def draw(self, steps: int, *, temperature: float = 1.0, top_p: float = 1.0) -> Chunk:
        """The next `steps` samples of every stream, at most `chunk`.

        Raises:
          UserError: a temperature or top_p that cannot be.
        """
        _check(**_settings(temperature, top_p))
        on = functools.partial(
            self._run,
            self._weights,
            first=np.int32(self.position),
            steps=np.int32(steps),
            settings=np.array([temperature, top_p], np.float32),
        )
        helper = self._sampler.helper(self._weights) if self._idle else contextlib.nullcontext()
        with contextlib.ExitStack() as stack:
            stack.enter_context(helper)
            side_by_side = map if len(self._keys) == 1 else stack.enter_context(ThreadPoolExecutor(len(self._keys))).map
            made = jax.block_until_ready(list(side_by_side(on, self._given, self._states, self._keys)))
        self._states, tokens, nats = ([part[i] for part in made] for i in range(3))
        self.position += steps
        return Chunk(np.concatenate(tokens, axis=1)[:steps].swapaxes(0, 1), np.concatenate(nats))

    def mark(self) -> Mark:
        """This place in the streams. It holds their states, so keep few where a model's states are large."""
        return Mark(self.position, self._states)

    def rewind(self, mark: Mark) -> None:
        """Goes back: the same settings draw the same samples again, others draw others."""
        self.position, self._states = mark


def _settings(temperature: float, top_p: float) -> dict[str, tuple[float, bool, str]]:
    return {
        "temperature": (temperature, 0 < temperature < float("inf"), "above 0"),
        "top_p": (top_p, 0 < top_p <= 1, "above 0 and at most 1"),
    }


def _check(**values: tuple[float, bool, str]) -> None:
    for name, (value, ok, allowed) in values.items():
        if not ok:
            raise UserError(f"{name}={value} is impossible: it must be {allowed}")


def generate(
    model: Model,
    params: Any,
    *,
    batch: int,
    length: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    chunk: int = 4_000,
    **streams: Any,
) -> Iterator[Chunk]:
    """Generates `batch` streams side by side, handed out in chunks while they are made.

    Args:
      model, params: what is sampled.
      batch: streams.
      length: samples to generate, after the prompt.
      temperature: logits are divided by it.
      top_p: sample from the smallest set of tokens that holds this probability.
      chunk: samples a chunk.
      streams: any of
        seed: of the whole call; stream i of any batch is the same.
        first_stream: the number of the first of these streams, so that many can be made batch by batch.
        prompt: tokens [time, channels] that all streams continue, or [batch, time, channels].
        conditions: what conditions the model, such as "label" int32, each [batch, ...].

    Raises:
      UserError: a batch, length, seed, temperature or top_p that cannot be.
    """
    allowed = f"at least 1 and at most {LONGEST:,}"
    _check(length=(length, 1 <= length <= LONGEST, allowed), **_settings(temperature, top_p))
    made = Streams(model, params, batch=batch, chunk=min(chunk, length), **streams)
    while made.position < length:
        yield made.draw(min(chunk, length - made.position), temperature=temperature, top_p=top_p)


@functools.lru_cache(maxsize=8)
def _prepare_function(model: Model) -> Callable[..., Any]:
    return jax.jit(in_precision(model, model.sampler().prepare))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
