"""SampleRNN's sizes."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar, Literal

from harmonic.errors import check
from harmonic.models import config


@dataclasses.dataclass(frozen=True)
class ModelConfig(config.ModelConfig):
    """SampleRNN's sizes. Defaults are the three tiers that SaShiMi and Mamba compare with (35,034,624 parameters).

    Attributes:
      kind: samplernn.
      frames: from the lowest tier to the highest: samples of the lowest tier's frame, then how many frames of the tier
        below make one.
      width: of the recurrent units.
      rnn_layers: recurrent layers of a tier.
      embedding_width: features of a token's vector.
    """

    about: ClassVar[config.About] = config.About(
        "SampleRNN", "tiers of recurrent networks that generate raw audio sample by sample", "1612.07837"
    )
    shardable: ClassVar[bool] = False

    kind: Literal["samplernn"] = "samplernn"
    frames: tuple[int, ...] = (8, 2, 2)
    width: int = 1_024
    rnn_layers: int = 1
    embedding_width: int = 256

    def __post_init__(self) -> None:
        check(len(self.frames) >= 1, "model.frames", self.frames, "at least one tier")
        check(all(f >= 2 for f in self.frames), "model.frames", self.frames, "numbers from 2 on")
        for name in ("width", "rnn_layers", "embedding_width"):
            check(getattr(self, name) >= 1, f"model.{name}", getattr(self, name), "at least 1")

    @property
    def frame_sizes(self) -> tuple[int, ...]:
        """Samples of each tier's frame, from the highest tier to the lowest."""
        return tuple(math.prod(self.frames[: i + 1]) for i in reversed(range(len(self.frames))))

    @property
    def multiple(self) -> int:
        """Samples of the highest tier's frame."""
        return math.prod(self.frames)


REDUCED = config.Reduced(ModelConfig(width=64, embedding_width=24), trained_per_minute=1_500_000)

SMALL = ModelConfig(frames=(3, 2), width=4, embedding_width=3)
VARIANTS = {"two_layers": dataclasses.replace(SMALL, frames=(2, 2, 2), rnn_layers=2)}
