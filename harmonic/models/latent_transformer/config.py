"""Sizes of the latent Transformer."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar, Literal

from harmonic.errors import check
from harmonic.models import config


@dataclasses.dataclass(frozen=True)
class ModelConfig(config.ModelConfig):
    """Sizes of a causal Transformer over latents that a strided CNN makes of raw audio. Defaults match SaShiMi (4.05
    M).

    Attributes:
      kind: latent_transformer.
      width: features of a sample in the front-end and in the local layers.
      strides: of the front-end's convolutions; their product is a patch.
      front_widths: features after each of these but the last, which gives a latent.
      latent_width: features of a latent.
      depth, heads: layers of the Transformer, and attention heads of each.
      context: samples of the past that a latent attends to directly, a multiple of the patch.
      local_cycles, local_layers: of the causal convolutions on samples: dilations 1, 2, ... 2^(local_layers - 1), so
        many times over.
      skip_width: features of the sum of their skip connections.
    """

    about: ClassVar[config.About] = config.About(
        "Latent Transformer",
        "a causal Transformer over learned latents that generates raw audio sample by sample",
        "2206.08297",
    )
    not_in_architecture: ClassVar[tuple[str, ...]] = ("context",)

    kind: Literal["latent_transformer"] = "latent_transformer"
    width: int = 64
    strides: tuple[int, ...] = (4, 4, 4, 4)
    front_widths: tuple[int, ...] = (96, 128, 160)
    latent_width: int = 192
    depth: int = 6
    heads: int = 6
    context: int = 524_288
    local_cycles: int = 2
    local_layers: int = 9
    skip_width: int = 256

    def __post_init__(self) -> None:
        strides = self.strides
        check(len(strides) >= 1 and all(s >= 2 for s in strides), "model.strides", strides, "numbers from 2 on")
        ok = len(self.front_widths) == len(strides) - 1 and all(w >= 1 for w in self.front_widths)
        check(ok, "model.front_widths", self.front_widths, f"{len(strides) - 1} numbers, one less than model.strides")
        for name in ("width", "depth", "heads", "local_cycles", "local_layers", "skip_width"):
            check(getattr(self, name) >= 1, f"model.{name}", getattr(self, name), "at least 1")
        width, heads = self.latent_width, self.heads
        check(width >= 1 and width % (2 * heads) == 0, "model.latent_width", width, f"a multiple of 2 x heads={heads}")
        context, patch = self.context, self.multiple
        check(context >= patch and context % patch == 0, "model.context", context, f"a multiple of the patch, {patch}")
        layers = self.local_layers
        fit = layers <= 20 and patch % 2 ** (layers - 1) == 0
        check(fit, "model.local_layers", layers, f"such that 2^(local_layers - 1) divides the patch, {patch}")

    @property
    def multiple(self) -> int:
        """Samples of a patch, which makes a latent."""
        return math.prod(self.strides)

    @property
    def widths(self) -> tuple[int, ...]:
        """Features before and after each convolution of the front-end."""
        return (self.width, *self.front_widths, self.latent_width)

    @property
    def window(self) -> int:
        """Latents that a latent attends to, itself among them."""
        return self.context // self.multiple


# Matched to HarmonicRNN, with a context of a whole minute.
LARGE = ModelConfig(width=96, front_widths=(128, 176, 224), latent_width=256, heads=8, context=960_512)

REDUCED = config.Reduced(
    ModelConfig(
        width=16,
        strides=(4, 4, 4),
        front_widths=(20, 28),
        latent_width=64,
        depth=2,
        heads=4,
        context=65_536,
        local_cycles=1,
        local_layers=7,
        skip_width=64,
    ),
    trained_per_minute=1_500_000,
)

SMALL = ModelConfig(
    width=4, strides=(2, 3), front_widths=(6,), latent_width=8, depth=2, heads=2, context=12, local_cycles=2,
    local_layers=2, skip_width=8,
)  # fmt: skip
VARIANTS = {
    "one_latent": dataclasses.replace(SMALL, context=6, depth=1),
    "long": dataclasses.replace(SMALL, context=600, local_cycles=1),
}
