"""WaveNet's sizes."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

from harmonic.errors import check
from harmonic.models import config


@dataclasses.dataclass(frozen=True)
class ModelConfig(config.ModelConfig):
    """WaveNet's sizes. Defaults are those that SaShiMi and Mamba compare with (4,244,480 parameters).

    Attributes:
      kind: wavenet.
      embedding_width: features of a token's vector.
      width: features of the residual stream.
      skip_width: features of the sum of the skip connections.
      end_width: features of the hidden layer behind it.
      cycles, layers: dilations 1, 2, 4, ... 2^(layers - 1), so many times over.
    """

    about: ClassVar[config.About] = config.About(
        "WaveNet", "a stack of dilated causal convolutions that generates raw audio sample by sample", "1609.03499"
    )

    kind: Literal["wavenet"] = "wavenet"
    embedding_width: int = 256
    width: int = 64
    skip_width: int = 1_024
    end_width: int = 512
    cycles: int = 4
    layers: int = 10

    def __post_init__(self) -> None:
        for name in ("embedding_width", "width", "skip_width", "end_width", "cycles", "layers"):
            check(getattr(self, name) >= 1, f"model.{name}", getattr(self, name), "at least 1")
        check(self.layers <= 20, "model.layers", self.layers, "at most 20")

    @property
    def multiple(self) -> int:
        """The largest dilation: every piece of a sequence holds what the next one needs."""
        return 2 ** (self.layers - 1)

    @property
    def receptive_field(self) -> int:
        """Samples of the past that a sample depends on."""
        return self.cycles * (2**self.layers - 1) + 1


REDUCED = config.Reduced(
    ModelConfig(embedding_width=32, width=18, skip_width=64, end_width=64, cycles=3, layers=9),
    trained_per_minute=1_500_000,
)

SMALL = ModelConfig(embedding_width=4, width=4, skip_width=8, end_width=8, cycles=2, layers=3)
