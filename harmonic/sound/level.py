"""The extremes and the energy of a waveform, block by block."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from harmonic.errors import Unreadable


@dataclasses.dataclass
class Extent:
    """Length, minimum, maximum and energy of the blocks [time] that were added."""

    length: int = 0
    low: float = math.inf
    high: float = -math.inf
    energy: float = 0.0

    def add(self, block: np.ndarray) -> None:
        """Adds a block of at least one sample.

        Raises:
          Unreadable: a sample is not finite.
        """
        low, high = float(block.min()), float(block.max())
        if not (math.isfinite(low) and math.isfinite(high)):  # a NaN makes both NaN
            raise Unreadable("holds samples that are not finite (NaN or infinity)")
        self.length += len(block)
        self.low, self.high = min(self.low, low), max(self.high, high)
        self.energy += float(np.square(block, dtype=np.float64).sum())

    @property
    def level(self) -> float:
        """Root mean square in dB below full scale; -200 for silence."""
        return round(10 * math.log10(max(self.energy / self.length, 1e-20)), 2)
