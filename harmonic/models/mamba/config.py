"""Sizes of Mamba's model of audio."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

from harmonic.errors import check
from harmonic.models import config
from harmonic.models.u_net_config import UNetConfig


@dataclasses.dataclass(frozen=True)
class ModelConfig(UNetConfig):
    """Sizes of Mamba in SaShiMi's U-Net. Defaults are those on YouTubeMix (3,557,248 parameters).

    Attributes:
      kind: mamba.
      width, pool_factors, expand, blocks_per_level, unet: the U.
      selective: whether the state space of a level depends on its input (Mamba, S6) or not ("Mamba-S4"); one for all
        levels, or one a level, from the outermost to the innermost.
      complex: whether a selective state is complex: half as many modes, so that the parameters are as many.
      inner: how many times wider a block is inside.
      state_width: real numbers in the state of each inner channel of a selective level.
      fixed_state_width: the same of a level that is not selective.
      conv: taps of the causal convolution before the state space.
      min_dt, max_dt: initial steps, log-uniform between these.
    """

    about: ClassVar[config.About] = config.About(
        "Mamba", "a U of selective state spaces that generates raw audio sample by sample", "2312.00752"
    )
    not_in_architecture: ClassVar[tuple[str, ...]] = ("min_dt", "max_dt")

    kind: Literal["mamba"] = "mamba"
    pool_factors: tuple[int, ...] = (16, 16)
    blocks_per_level: int | tuple[int, ...] = 3
    selective: bool | tuple[bool, ...] = True
    complex: bool = True
    inner: int = 2
    state_width: int = 16
    fixed_state_width: int = 64
    conv: int = 4
    min_dt: float = 0.001
    max_dt: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.level_selective  # refuses another number of levels
        for name in ("state_width", "fixed_state_width"):
            value = getattr(self, name)
            check(value >= 2 and value % 2 == 0, f"model.{name}", value, "an even number from 2 on")
        check(self.inner >= 1, "model.inner", self.inner, "at least 1")
        check(self.conv >= 2, "model.conv", self.conv, "at least 2")
        check(0 < self.min_dt <= self.max_dt, "model.min_dt", self.min_dt, f"above 0 and at most max_dt={self.max_dt}")

    @property
    def level_selective(self) -> tuple[bool, ...]:
        """`selective`, one a level."""
        return config.each_level("model.selective", self.selective, self.pool_factors)

    @property
    def multiple(self) -> int:
        """The pooling product times the convolution's taps: every piece of a sequence holds a whole convolution."""
        return self.product * self.conv


REDUCED = config.Reduced(
    ModelConfig(width=18, pool_factors=(4, 4), blocks_per_level=(1, 2, 2)), trained_per_minute=1_500_000
)

SMALL = ModelConfig(width=4, pool_factors=(3,), blocks_per_level=(2, 1), state_width=4, fixed_state_width=4, conv=3)
VARIANTS = {
    "two_pools": dataclasses.replace(SMALL, pool_factors=(2, 3), blocks_per_level=1),
    "real": dataclasses.replace(SMALL, complex=False),
    "fixed": dataclasses.replace(SMALL, selective=False),
    "outer_fixed": dataclasses.replace(SMALL, selective=(False, True)),
}
