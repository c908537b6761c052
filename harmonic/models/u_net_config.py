"""What the configs of U-shaped models with linear pools share."""

from __future__ import annotations

import dataclasses
import math

from harmonic.errors import check
from harmonic.models import config


@dataclasses.dataclass(frozen=True)
class UNetConfig(config.ModelConfig):
    """Sizes of a U (SaShiMi, arXiv 2202.09729).

    Attributes:
      width: features of the outermost level.
      pool_factors: pooling factors from the outermost level to the innermost; () for none.
      expand: how many times wider each next level is.
      blocks_per_level: blocks up a level, again down it with `unet`, and within the innermost; one number for all, or
        one a level, from the outermost to the innermost.
      unet: blocks on the way down, too, and a skip connection from every layer there to its mirror on the way up; if
        not, the way down has pools alone, and skip connections are those of the levels.
    """

    width: int = 64
    pool_factors: tuple[int, ...] = (4, 4)
    expand: int = 2
    blocks_per_level: int | tuple[int, ...] = 8
    unet: bool = True

    def __post_init__(self) -> None:
        check(self.width >= 1, "model.width", self.width, "at least 1")
        check(all(f >= 2 for f in self.pool_factors), "model.pool_factors", self.pool_factors, "factors from 2 on")
        check(self.expand >= 1, "model.expand", self.expand, "at least 1")
        check(min(self.level_blocks) >= 1, "model.blocks_per_level", self.blocks_per_level, "at least 1")

    @property
    def level_blocks(self) -> tuple[int, ...]:
        """`blocks_per_level`, one number a level."""
        return config.each_level("model.blocks_per_level", self.blocks_per_level, self.pool_factors)

    @property
    def level_widths(self) -> tuple[int, ...]:
        """Features of each level."""
        return tuple(self.width * self.expand**level for level in range(len(self.pool_factors) + 1))

    @property
    def product(self) -> int:
        """Samples to one step of the innermost level."""
        return math.prod(self.pool_factors)

    @property
    def multiple(self) -> int:
        """The pooling product."""
        return self.product
