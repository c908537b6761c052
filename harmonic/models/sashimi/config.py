"""SaShiMi's sizes."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

from harmonic.errors import check
from harmonic.models import config
from harmonic.models.u_net_config import UNetConfig


@dataclasses.dataclass(frozen=True)
class ModelConfig(UNetConfig):
    """SaShiMi's sizes. Defaults are the authors' later U-Net (`sashimi-sc09-unet.yaml`, 6,820,512 parameters).

    With unet=False, glu=False, tied=True and pool_weight_norm=True it is the paper's model for music (4,059,360), with
    glu=True the one for speech in the authors' repository (4,751,072).

    Attributes:
      kind: sashimi.
      width, pool_factors, expand, blocks_per_level, unet: the U.
      ssm: s4 (a diagonal matrix less a product of rank one, bilinear) or s4d (diagonal, zero-order hold).
      state_width: real numbers in the state of each channel: half as many complex modes.
      tied: whether all channels of a layer share one matrix A and one B.
      glu: whether a gated linear unit follows the state space layer, or a dense layer.
      ff: how many times wider the MLP blocks are inside.
      pool_weight_norm: weight norm of the pools.
      min_dt, max_dt: initial steps, log-uniform between these.
    """

    about: ClassVar[config.About] = config.About(
        "SaShiMi", "a U of state space layers (S4) that generates raw audio sample by sample", "2202.09729"
    )
    not_in_architecture: ClassVar[tuple[str, ...]] = ("min_dt", "max_dt")

    kind: Literal["sashimi"] = "sashimi"
    ssm: Literal["s4", "s4d"] = "s4"
    state_width: int = 64
    tied: bool = False
    glu: bool = True
    ff: int = 2
    pool_weight_norm: bool = False
    min_dt: float = 0.001
    max_dt: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check(
            self.state_width >= 2 and self.state_width % 2 == 0, "model.state_width", self.state_width, "even, from 2"
        )
        check(self.ff >= 1, "model.ff", self.ff, "at least 1")
        check(0 < self.min_dt <= self.max_dt, "model.min_dt", self.min_dt, f"above 0 and at most max_dt={self.max_dt}")


# The paper's model for music.
MUSIC = ModelConfig(unet=False, glu=False, tied=True, pool_weight_norm=True)

REDUCED = config.Reduced(
    ModelConfig(width=18, blocks_per_level=(1, 2, 2), state_width=32, ssm="s4d"), trained_per_minute=1_500_000
)

SMALL = ModelConfig(width=4, state_width=8, pool_factors=(3,), blocks_per_level=(2, 1))
VARIANTS = {
    "two_pools": dataclasses.replace(SMALL, pool_factors=(2, 3), blocks_per_level=1),
    "s4d": dataclasses.replace(SMALL, ssm="s4d"),
    "music": dataclasses.replace(MUSIC, width=4, state_width=8, pool_factors=(2,), blocks_per_level=(1, 2)),
    "speech": dataclasses.replace(SMALL, unet=False, tied=True, pool_weight_norm=True, blocks_per_level=1),
    "no_pool": dataclasses.replace(SMALL, pool_factors=(), blocks_per_level=1, ssm="s4d", tied=True),
}
