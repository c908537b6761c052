"""HarmonicRNN's sizes."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar, Literal

from harmonic.errors import check
from harmonic.models import config


@dataclasses.dataclass(frozen=True)
class ModelConfig(config.ModelConfig):
    """HarmonicRNN's sizes. Defaults are the paper's baseline (7,272,704 parameters).

    Attributes:
      kind: harmonic_rnn.
      width: features of the residual stream.
      state_width: real numbers in a CG-LRU state: half as many complex channels.
      pool_factors: pooling factors from the outermost level to the innermost; () for none.
      blocks_per_level: temporal blocks (each with its MLP block) down and again up a level, and within the innermost;
        one number for all, or one a level, from the outermost to the innermost.
      pool_groups: feature groups of the pooling convolutions: `width` is diagonal, 1 is dense.
      gate_blocks: blocks of the block-diagonal gates.
      gated: whether the recurrences of a level have gates; one for all levels, or one a level, from the outermost to
        the innermost. Without, their gates are held open (i = r = 1), and the recurrence does not depend on its input;
        the gates' parameters stay in place, unused.
      embedding: how tokens enter: sinusoidal (fixed), linear (scaled to [-1, 1) and projected) or learned (a table).
      head: what is predicted of a sample: categorical (a logit for each level, as in the paper), or logistic (a mixture
        of logistic distributions around the sample before it: fewer outputs, and neighbours among levels are near).
      components: of the logistic head's mixture.
      embedding_dropout: probability that a feature of the embedding is dropped (the paper tries it on the table).
      dropout: probability that a feature of a residual branch is dropped.
      min_radius, max_radius: initial |a| of the recurrence at an open gate, uniform by area between these; one number
        for all levels, or one a level, from the outermost to the innermost.
      max_angle: initial angles are uniform from 0 to this many pi; one number, or one a level.
      activations: type of what the parallel forward and its gradient keep between layers; parameters, states, norms and
        logits are float32 in any case, and so is generation; `precision` is that of their products.
      kernel: implementation of the recurrence, to compare one with another: a name of `kernels.IMPLEMENTATIONS`; auto
        picks by platform.
    """

    about: ClassVar[config.About] = config.About(
        "HarmonicRNN", "a deep linear RNN that generates raw audio sample by sample", "2510.02401"
    )
    free: ClassVar[tuple[str, ...]] = (*config.ModelConfig.free, "kernel")
    not_in_architecture: ClassVar[tuple[str, ...]] = (
        "dropout", "embedding_dropout", "min_radius", "max_radius", "max_angle"
    )  # fmt: skip

    kind: Literal["harmonic_rnn"] = "harmonic_rnn"

    width: int = 128
    state_width: int = 256
    pool_factors: tuple[int, ...] = (2, 4, 4, 5)
    blocks_per_level: int | tuple[int, ...] = 4
    pool_groups: int = 128
    gate_blocks: int = 32
    gated: bool | tuple[bool, ...] = True
    embedding: Literal["sinusoidal", "linear", "learned"] = "sinusoidal"
    head: Literal["categorical", "logistic"] = "categorical"
    components: int = 4
    embedding_dropout: float = 0.0
    dropout: float = 0.2
    min_radius: float | tuple[float, ...] = 0.9
    max_radius: float | tuple[float, ...] = 0.99
    max_angle: float | tuple[float, ...] = 0.1
    activations: Literal["float32", "bfloat16"] = "float32"
    kernel: str = "auto"

    def __post_init__(self) -> None:
        w, s = self.width, self.state_width
        check(w >= 2 and w % 2 == 0, "model.width", w, "an even number from 2 on")
        check(s >= 2 and s % 2 == 0, "model.state_width", s, "an even number from 2 on")
        check(all(f >= 2 for f in self.pool_factors), "model.pool_factors", self.pool_factors, "factors from 2 on")
        check(min(self.level_blocks) >= 1, "model.blocks_per_level", self.blocks_per_level, "at least 1")
        groups = self.pool_groups
        check(groups >= 1 and w % groups == 0, "model.pool_groups", groups, f"a divisor of model.width={w}")
        gates = self.gate_blocks
        check(gates >= 1 and (s // 2) % gates == 0, "model.gate_blocks", gates, f"a divisor of state_width/2={s // 2}")
        for name in ("dropout", "embedding_dropout"):
            p = getattr(self, name)
            check(0 <= p < 1, f"model.{name}", p, "at least 0 and below 1")
        check(self.components >= 1, "model.components", self.components, "at least 1")
        _ = self.level_gated  # refuses another number of levels
        for low, high, angle in self.level_ranges:
            check(0 < low <= high < 1, "model.min_radius", low, f"above 0 and at most max_radius={high}, below 1")
            check(0 < angle <= 2, "model.max_angle", angle, "above 0 and at most 2 (a whole circle)")

    @property
    def level_ranges(self) -> tuple[tuple[float, float, float], ...]:
        """`min_radius`, `max_radius` and `max_angle` of each level."""
        names = ("min_radius", "max_radius", "max_angle")
        ranges = [config.each_level(f"model.{name}", getattr(self, name), self.pool_factors) for name in names]
        return tuple(zip(*ranges, strict=True))

    @property
    def level_gated(self) -> tuple[bool, ...]:
        """`gated`, one a level."""
        return config.each_level("model.gated", self.gated, self.pool_factors)

    @property
    def level_blocks(self) -> tuple[int, ...]:
        """`blocks_per_level`, one number a level."""
        return config.each_level("model.blocks_per_level", self.blocks_per_level, self.pool_factors)

    def outputs(self, num_levels: int) -> int:
        """Numbers that the head gives for a sample."""
        return num_levels if self.head == "categorical" else 3 * self.components

    @property
    def multiple(self) -> int:
        """Samples to one step of the innermost level: the pooling product."""
        return math.prod(self.pool_factors)

    @property
    def dtype(self) -> str:
        """`activations`."""
        return self.activations

    def architecture(self) -> dict[str, Any]:
        """As `ModelConfig.architecture`; `blocks_per_level` one number a level, `gated` where some level is not."""
        fields = {**super().architecture(), "blocks_per_level": list(self.level_blocks)}
        fields.pop("gated")
        return fields if all(self.level_gated) else {**fields, "gated": list(self.level_gated)}


REDUCED = config.Reduced(
    ModelConfig(
        width=32,
        state_width=64,
        pool_factors=(4, 4),
        blocks_per_level=(1, 3, 3),
        pool_groups=1,
        head="logistic",
        dropout=0.0,
        max_radius=0.9995,
        max_angle=1.0,
    ),
    trained_per_minute=6_000_000,
)

# For the tests of the laws: every part of the model, in seconds; and what is off by default.
SMALL = ModelConfig(
    width=8, state_width=16, gate_blocks=4, pool_factors=(2, 3), blocks_per_level=1, pool_groups=2, dropout=0.2
)
VARIANTS = {
    "ungated": dataclasses.replace(SMALL, gated=(False, True, False), max_angle=2.0, head="logistic"),
}
