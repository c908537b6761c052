"""The protocol that everything outside `harmonic.models` sees of a model, and the parts that most kinds share."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeVar

import jax
import jax.numpy as jnp

from harmonic.models import categorical
from harmonic.models.config import ModelConfig
from harmonic.models.costs import Costs
from harmonic.models.dropout import Dropout

Params = dict[str, Any]  # nested, of arrays
Weights = Any  # a pytree: parameters as `apply` multiplies by them
State = Any  # a pytree
Inputs = Mapping[str, jax.Array]
_Result = TypeVar("_Result")


@dataclasses.dataclass(frozen=True)
class ParamGroup:
    """How the optimiser treats a group of parameters; None takes the config's value.

    Attributes:
      learning_rate: of the group, after warm-up.
      weight_decay: of the group.
    """

    learning_rate: float | None = None
    weight_decay: float | None = None


class Model(Protocol):
    """An autoregressive model of tokens, as functions over a plain dict of parameters.

    A kind derives from this class and writes `init`, `init_state`, `apply`, `step`, `observe` and `costs`; the rest has
    a default. Models are cheap to make, hold no arrays, and are equal where their configs are, so that programs that
    were compiled for one serve all its equals.

    Causality: outputs at t depend on tokens before t alone. `apply` over a segment and `step` over its samples give the
    same outputs and the same state; the tests of the laws hold every kind to that.

    Attributes:
      config: its sizes.
      num_levels: levels of a token.
      channels: audio channels.
      context: samples of the past that the outputs depend on, where the state grows until it holds that many; None
        where the state is constant in the length of the past.
      random: whether `apply` draws random numbers in training.
      labels: whether `inputs` must hold "label" [batch] int32, the number of each recording's label.
    """

    config: ModelConfig
    num_levels: int
    channels: int
    context: int | None = None
    random: bool = False
    labels: bool = False

    def __init__(self, config: ModelConfig, num_levels: int = 256, channels: int = 1):
        self.config, self.num_levels, self.channels = config, num_levels, channels

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def _key(self) -> tuple[Any, ...]:
        return self.config, self.num_levels, self.channels

    @property
    def multiple(self) -> int:
        """Samples of which every segment is a whole multiple."""
        return self.config.multiple

    def init(self, key: jax.Array) -> Params:
        """Fresh float32 parameters."""
        ...

    def init_state(self, batch: int, dtype: jnp.dtype = jnp.float32) -> State:
        """The state before a recording: no past, and the middle token (128 of 256) for the newest."""
        ...

    def apply(
        self, weights: Weights, inputs: Inputs, state: State, *, rng: Dropout | None = None, axis: str | None = None
    ) -> tuple[jax.Array, State]:
        """The outputs of a segment, in parallel.

        Args:
          weights: as `prepare` gives them.
          inputs: "tokens" [batch, time, channels], those to predict, time a multiple of `multiple`; and what else
            conditions the model, each [batch, ...].
          state: after a whole number of multiples.
          rng: of dropout; without it there is none.
          axis: inside `jax.shard_map`, the mesh axis over which time is cut. The state is the same on all its shards.

        Returns:
          (outputs for `log_prob` and `sample`, [batch, time, channels, num_levels] where they are logits; the state
          after the segment).
        """
        ...

    def step(self, weights: Weights, inputs: Inputs, state: State) -> tuple[jax.Array, State]:
        """The outputs of the next sample, [batch, 1, ...], and the state, which `observe` completes.

        Args:
          weights: as `prepare` gives them, or as the sampler's `prepare` does.
          inputs: what conditions the model, each [batch, ...].
          state: at any position.
        """
        ...

    def observe(self, state: State, tokens: jax.Array) -> State:
        """The state once the sample that `step` predicted is known: tokens [batch, channels]."""
        ...

    def costs(self, segments: int = 1) -> Costs:
        """What the model costs, where a training window is cut into so many segments."""
        ...

    def prepare(self, params: Params) -> Weights:
        """Parameters as `apply` multiplies by them. Made once a step for all segments, and differentiated through."""
        return params

    def nats(
        self,
        weights: Weights,
        inputs: Inputs,
        lengths: jax.Array,
        *,
        rng: Dropout | None = None,
        axis: str | None = None,
    ) -> jax.Array:
        """Negative log-likelihood in nats, summed over this shard's unmasked samples: `apply`, scanned over segments.

        Only the state between segments is kept for the backward pass, which makes the segments' activations again: the
        gradient is exact through any length, in the memory of one segment. A model that must see all segments at one
        place, as attention over latents does, writes its own.

        Args:
          weights: as `prepare` gives them.
          inputs: "tokens" [segments, batch, segment_length, channels]; what else conditions the model, [batch, ...].
          lengths: [batch], of the whole sequences, in samples.
          rng: of dropout, its `chunk` 0.
          axis: the mesh axis that `segment_length` is cut over, inside `jax.shard_map`.
        """
        conditions = {name: value for name, value in inputs.items() if name != "tokens"}
        tokens = inputs["tokens"]
        segments, batch, local, _ = tokens.shape
        shards, shard = (jax.lax.axis_size(axis), jax.lax.axis_index(axis)) if axis else (1, 0)
        per_segment = local * shards

        def body(state: State, scanned: tuple[jax.Array, jax.Array]) -> tuple[State, jax.Array]:
            piece, number = scanned
            chunk = number * (per_segment // self.multiple)
            segment_rng = None if rng is None else rng._replace(chunk=rng.chunk + chunk)
            outputs, state = self.apply(weights, {"tokens": piece, **conditions}, state, rng=segment_rng, axis=axis)
            position = number * per_segment + shard * local + jnp.arange(local, dtype=jnp.int32)
            mask = position[None] < lengths[:, None]
            return state, -jnp.where(mask, self.log_prob(outputs, piece), 0).sum()

        state = self.init_state(batch, jax.tree.leaves(weights)[0].dtype)
        if segments == 1:
            return body(state, (tokens[0], jnp.int32(0)))[1]
        _, nats = jax.lax.scan(jax.checkpoint(body), state, (tokens, jnp.arange(segments, dtype=jnp.int32)))
        return nats.sum()

    def sampler(self) -> Sampler:
        """How samples are drawn one after another."""
        return Sampler(self)

    def log_prob(self, outputs: jax.Array, tokens: jax.Array) -> jax.Array:
        """Log-likelihood in nats, [batch, time], of tokens [batch, time, channels]."""
        return categorical.log_prob(outputs, tokens)

    def sample(
        self,
        outputs: jax.Array,
        uniform: jax.Array,
        *,
        temperature: float | jax.Array = 1.0,
        top_p: float | jax.Array = 1.0,
    ) -> jax.Array:
        """Tokens [batch, channels] int32 from outputs [batch, 1, ...] and uniform numbers [batch, channels].

        temperature and top_p may be traced: they change while a stream is made.
        """
        return categorical.sample(outputs, uniform, temperature=temperature, top_p=top_p)

    def param_groups(self, params: Params) -> tuple[Any, dict[str, ParamGroup]]:
        """(a tree like `params` of each one's group by name, the groups); by default all are in one."""
        return jax.tree.map(lambda _: "all", params), {"all": ParamGroup()}

    def matrix_axes(self, name: str, shape: tuple[int, ...]) -> tuple[int, int] | None:
        """Which parameters Muon takes: (axis of a matrix's inputs, axis of its outputs); its other axes are a batch of
        matrices. None for what is no matrix between hidden vectors: biases, scales, embeddings, the head.

        Args:
          name: the parameter's path in the dict of `init`, joined by dots.
          shape: its shape.
        """
        return None

    def state_bytes(self, batch: int = 1) -> int:
        """Bytes of a state; of a full one, where it grows."""
        state = jax.eval_shape(lambda: self.init_state(batch))
        return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def in_precision(model: Model, program: Callable[..., _Result]) -> Callable[..., _Result]:
    """The program, its products of float32 matrices in the precision that the model's config asks for.

    Whatever runs a model is traced through this: loss and gradient, evaluation, prompts, generation. It goes around the
    whole program, as derivatives are traced outside the model's methods.
    """

    @functools.wraps(program)
    def traced(*args: Any, **kwargs: Any) -> _Result:
        with jax.default_matmul_precision(model.config.precision):
            return program(*args, **kwargs)

    return traced


class Sampler:
    """Draws one sample after another; the default calls `Model.step`.

    A kind may arrange weights and states for its loop (`prepare`, `enter`, `leave`), or replace the loop (`draw`).
    """

    def __init__(self, model: Model):
        self.model = model

    def prepare(self, params: Params) -> Weights:
        """Weights as the loop reads them; made once."""
        return self.model.prepare(params)

    def enter(self, state: State) -> Any:
        """The state as the loop carries it."""
        return state

    def leave(self, carry: Any) -> State:
        """Undoes `enter`."""
        return carry

    def helper(self, weights: Weights) -> contextlib.AbstractContextManager[Any]:
        """A context within which an idle core helps a loop that runs on another, if it can."""
        return contextlib.nullcontext()

    def force(self, weights: Weights, inputs: Inputs, state: State) -> State:
        """The state after inputs["tokens"] [batch, time, channels], from any state."""
        conditions = {name: value for name, value in inputs.items() if name != "tokens"}

        def body(carry: Any, token: jax.Array) -> tuple[Any, None]:
            _, carry = self.model.step(weights, conditions, carry)
            return self.model.observe(carry, token), None

        carry, _ = jax.lax.scan(body, self.enter(state), inputs["tokens"].astype(jnp.int32).swapaxes(0, 1))
        return self.leave(carry)

    def draw(
        self,
        weights: Weights,
        inputs: Inputs,
        state: State,
        uniform: jax.Array,
        steps: jax.Array,
        *,
        temperature: float | jax.Array = 1.0,
        top_p: float | jax.Array = 1.0,
    ) -> tuple[State, jax.Array, jax.Array]:
        """Draws `steps` samples, each from the ones before it.

        Args:
          weights: as `prepare` gives them.
          inputs: what conditions the model, each [batch, ...].
          state: at any position.
          uniform: [size, batch, channels] in [0, 1), a number for each sample.
          steps: at most `size`.
          temperature, top_p: as for `Model.sample`.

        Returns:
          (state, tokens [size, batch, channels], nats [batch] of the tokens at temperature 1).
        """
        model, (size, batch, channels) = self.model, uniform.shape
        dtype = jnp.uint8 if model.num_levels <= 256 else jnp.uint16

        def body(i: jax.Array, loop: Any) -> Any:
            carry, tokens, nats = loop
            outputs, carry = model.step(weights, inputs, carry)
            token = model.sample(outputs, uniform[i], temperature=temperature, top_p=top_p)
            nats = nats - model.log_prob(outputs, token[:, None])[:, 0]
            tokens = jax.lax.dynamic_update_index_in_dim(tokens, token.astype(dtype), i, 0)
            return model.observe(carry, token), tokens, nats

        start = self.enter(state), jnp.zeros((size, batch, channels), dtype), jnp.zeros(batch)
        carry, tokens, nats = jax.lax.fori_loop(0, steps, body, start)
        return self.leave(carry), tokens, nats
