"""What a model costs, by formula: its own numbers, which `harmonic.describe` puts beside the mesh and the device."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax

NUMBER = 4  # bytes of a float32, and of a token that is sent


def count(tree: Any) -> int:
    """Numbers in a tree of arrays or shapes."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def broadcast(size: int, among: int) -> int:
    """Bytes that one of `among` devices sends in a sum or a broadcast of `size` bytes (a ring)."""
    return -(-2 * (among - 1) * size // among)


@dataclasses.dataclass(frozen=True)
class Exchange:
    """What the shards of a sequence send one another at one place of the model, in each segment.

    Attributes:
      name: of the place.
      numbers: of one sequence, as each kind of exchange says.
      times: how many such places there are; above 1 for a layer.
    """

    name: str
    numbers: int
    times: int = 1

    def sent(self, rows: int, shards: int, several: bool) -> dict[str, int]:
        """Bytes that one device sends for one segment: {"forward", "backward"}.

        Args:
          rows: sequences a device.
          shards: of each sequence.
          several: segments follow one another: the backward pass makes each again, and the state between two of them
            is told to all shards.
        """
        raise NotImplementedError(f"{type(self).__name__} must say what it sends")


@dataclasses.dataclass(frozen=True)
class Halo(Exchange):
    """Each shard's end, of `numbers`, goes to its right neighbour.

    Attributes:
      differentiated: its gradient is sent back.
    """

    differentiated: bool = True

    def sent(self, rows: int, shards: int, several: bool) -> dict[str, int]:
        """As `Exchange.sent`."""
        if shards == 1:
            return {"forward": 0, "backward": 0}
        size = self.numbers * rows * NUMBER
        last = broadcast(size, shards) if several else 0
        return {"forward": size + last, "backward": size * several + (size + last) * self.differentiated}


@dataclasses.dataclass(frozen=True)
class Carry(Exchange):
    """Every shard gathers the others' maps of a linear recurrence: the product of its a, and the state it leaves.

    `numbers` are those of the state, real ones.
    """

    def sent(self, rows: int, shards: int, several: bool) -> dict[str, int]:
        """As `Exchange.sent`."""
        state = self.numbers * rows * NUMBER
        gathered = (shards - 1) * 2 * state
        last = broadcast(state, shards) if several else 0
        # The backward pass gathers the forward pass's maps again, and the gradients without the products.
        return {"forward": gathered, "backward": gathered * (1 + several) + gathered // 2 + last}


@dataclasses.dataclass(frozen=True)
class Costs:
    """What a model costs.

    Attributes:
      by_part: parameters of each component.
      blocks: residual blocks, or layers.
      operations: of one sample: "forward" (up to the logits), "training", "generation"; of each, by kind of operation
        ("dense", "recurrence", ...) and in "total". An addition, a multiplication, a comparison and an elementary
        function count one each.
      weights_read: numbers that are read of the weights for one generated sample; all streams share them.
      kept: numbers a sample that a training step holds at its largest, besides weights and tokens.
      exchanges: what shards of a sequence send one another.
    """

    by_part: dict[str, int]
    blocks: int
    operations: dict[str, dict[str, int]]
    weights_read: float
    kept: float
    exchanges: tuple[Exchange, ...]


def rounded(counts: Mapping[str, float]) -> dict[str, int]:
    """Operations by kind as whole numbers, with their total."""
    return {**{kind: round(n) for kind, n in counts.items()}, "total": round(sum(counts.values()))}
