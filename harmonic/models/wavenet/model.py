"""WaveNet (van den Oord et al., arXiv 1609.03499), as SaShiMi's and Mamba's authors compare with it.

    model = make(ModelConfig())            # 4,244,480 parameters, a receptive field of 4,093 samples

Architecture as in github state-spaces/s4 (src/models/baselines/wavenet.py): no biases but in the last layers, one more
dense layer at the end, and a past of the middle token for ever. That code gives each excerpt such a past; here the
queues are carried from one segment to the next.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from harmonic.errors import check
from harmonic.kernels.context_parallel import left_halo
from harmonic.models import base
from harmonic.models.base import Inputs, Params
from harmonic.models.costs import Costs, Halo, count, operations
from harmonic.models.dilated import Dilated, RingSampler
from harmonic.models.dropout import Dropout
from harmonic.models.linear import init_linear, linear
from harmonic.models.wavenet.config import ModelConfig


class State(NamedTuple):
    """All that is kept of the past.

    Attributes:
      position: int32, samples since a segment's start, modulo the largest dilation.
      last: [batch, channels] int32, the newest token.
      queues: as `Dilated` has them.
    """

    position: jax.Array
    last: jax.Array
    queues: Any


class WaveNet(base.Model):
    """The methods are those of `base.Model`."""

    config: ModelConfig

    def __init__(self, config: ModelConfig, num_levels: int = 256, channels: int = 1):
        check(channels == 1, "channels", channels, "1: a wavenet model has one channel")
        super().__init__(config, num_levels, channels)
        self.dilated = Dilated(config.width, config.cycles, config.layers, config.skip_width)

    def init(self, key: jax.Array) -> Params:
        """Fresh float32 parameters."""
        c, levels, keys = self.config, self.num_levels, jax.random.split(key, 6)
        return {
            "embedding": jax.random.normal(keys[0], (levels, c.embedding_width)),
            "entry": init_linear(keys[1], c.embedding_width, c.width, bias=False),
            "layers": self.dilated.init(keys[2]),
            "end": init_linear(keys[3], c.skip_width, c.end_width),
            "output": init_linear(keys[4], c.end_width, levels),
            "decoder": init_linear(keys[5], levels, levels),
        }

    def prepare(self, params: Params) -> Any:
        """The parameters, the vectors of all tokens, and the inputs of all layers after an endless middle token."""
        table = params["embedding"] @ params["entry"]["kernel"]
        rest = self.dilated.rest(params["layers"], table[self.num_levels // 2])
        return {**{n: params[n] for n in ("layers", "end", "output", "decoder")}, "table": table, "rest": rest}

    def init_state(self, batch: int, dtype: jnp.dtype = jnp.float32) -> State:
        """As `base.Model.init_state`."""
        last = jnp.full((batch, self.channels), self.num_levels // 2, jnp.int32)
        return State(jnp.zeros((), jnp.int32), last, self.dilated.init_state(batch, dtype))

    def apply(
        self, weights: Any, inputs: Inputs, state: State, *, rng: Dropout | None = None, axis: str | None = None
    ) -> tuple[jax.Array, State]:
        """The logits of a segment, [batch, time, 1, num_levels], and the state after it; as `base.Model.apply`."""
        tokens = inputs["tokens"].astype(jnp.int32)
        time = tokens.shape[1]
        check(time > 0 and time % self.multiple == 0, "a segment", time, f"a multiple of {self.multiple} samples")
        before, last = left_halo(tokens[:, -1], state.last, axis)
        tokens = jnp.concatenate([before[:, None], tokens[:, :-1]], axis=1)
        x = jnp.take(weights["table"], tokens[..., 0], axis=0)
        skips, queues = self.dilated.apply(weights["layers"], x, state.queues, axis, weights["rest"])
        return self._logits(weights, skips)[:, :, None], State(state.position, last, queues)

    def step(self, weights: Any, inputs: Inputs, state: State) -> tuple[jax.Array, State]:
        """The logits of the next sample, [batch, 1, 1, num_levels], and the state; as `base.Model.step`."""
        if not isinstance(state.queues[0], tuple):
            sampler = self.sampler()
            logits, state = self.step(weights, inputs, sampler.enter(state))
            return logits, sampler.leave(state)
        x = weights["table"][state.last[:, 0]]
        skips, queues = self.dilated.step(weights["layers"], x, state.queues, state.position, weights["rest"])
        position = (state.position + 1) % self.dilated.longest
        return self._logits(weights, skips)[:, None, None], State(position, state.last, queues)

    def observe(self, state: State, tokens: jax.Array) -> State:
        """As `base.Model.observe`."""
        return state._replace(last=tokens.astype(jnp.int32))

    def _logits(self, weights: Any, skips: jax.Array) -> jax.Array:
        x = linear(weights["end"], jax.nn.relu(skips))
        return linear(weights["decoder"], linear(weights["output"], jax.nn.relu(x)))

    def sampler(self) -> RingSampler:
        """With the queues one by one."""
        return RingSampler(self)

    def matrix_axes(self, name: str, shape: tuple[int, ...]) -> tuple[int, int] | None:
        """The kernels of the layers and of the hidden layer behind them."""
        hidden = name.startswith("layers.") or name.startswith("end.")
        return (len(shape) - 2, len(shape) - 1) if hidden and name.endswith("kernel") else None

    def costs(self, segments: int = 1) -> Costs:
        """As `base.Model.costs`; operations are counted in the traced program."""
        c, params = self.config, jax.eval_shape(self.init, jax.random.key(0))
        sizes = {name: count(tree) for name, tree in params.items()}
        layers = c.cycles * c.layers
        return Costs(
            by_part={
                "embedding": sizes["embedding"] + sizes["entry"],
                "layers": sizes["layers"],
                "head": sizes["end"] + sizes["output"] + sizes["decoder"],
            },
            blocks=layers,
            operations=operations(self, segments),
            weights_read=sum(sizes.values()) - sizes["embedding"] - sizes["entry"] + c.width,
            kept=c.cycles * (c.width + c.skip_width) + c.layers * 5.5 * c.width + 2 * c.skip_width,
            exchanges=(*self.dilated.exchanges(), Halo("token_edge", 1, differentiated=False)),
        )


make = WaveNet
