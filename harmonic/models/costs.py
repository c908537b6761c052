"""What a model costs, by formula: its own numbers, which `harmonic.describe` puts beside the mesh and the device."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from jax.extend import core

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

    def sent(self, rows: int, shards: int, several: bool, samples: int) -> dict[str, int]:
        """Bytes that one device sends for one segment: {"forward", "backward"}.

        Args:
          rows: sequences a device.
          shards: of each sequence.
          samples: of a segment that a shard holds.
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

    def sent(self, rows: int, shards: int, several: bool, samples: int) -> dict[str, int]:
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

    def sent(self, rows: int, shards: int, several: bool, samples: int) -> dict[str, int]:
        """As `Exchange.sent`."""
        state = self.numbers * rows * NUMBER
        gathered = (shards - 1) * 2 * state
        last = broadcast(state, shards) if several else 0
        # The backward pass gathers the forward pass's maps again, and the gradients without the products.
        return {"forward": gathered, "backward": gathered * (1 + several) + gathered // 2 + last}


@dataclasses.dataclass(frozen=True)
class Gathered(Exchange):
    """Every shard gathers `numbers` of the others for each `every` samples; 0 for once a segment.

    Their gradients go back, and they are gathered again for the backward pass.
    """

    every: int = 0

    def sent(self, rows: int, shards: int, several: bool, samples: int) -> dict[str, int]:
        """As `Exchange.sent`."""
        size = self.numbers * rows * NUMBER * (samples // self.every if self.every else 1)
        gathered = (shards - 1) * size
        return {"forward": gathered, "backward": gathered * 2}


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
      tables: numbers that `Model.prepare` makes besides weights, once a step, whatever the length of a window.
    """

    by_part: dict[str, int]
    blocks: int
    operations: dict[str, dict[str, int]]
    weights_read: float
    kept: float
    exchanges: tuple[Exchange, ...]
    tables: int = 0


def rounded(counts: Mapping[str, float]) -> dict[str, int]:
    """Operations by kind as whole numbers, with their total."""
    return {**{kind: round(n) for kind, n in counts.items()}, "total": round(sum(counts.values()))}


_MOVES = frozenset(
    (
        "reshape broadcast_in_dim transpose slice dynamic_slice dynamic_update_slice concatenate squeeze gather "
        "scatter convert_element_type pad rev copy iota split stop_gradient optimization_barrier ppermute all_gather"
    ).split()
)


def operations(model: Any, segments: int = 1) -> dict[str, dict[str, int]]:
    """`Costs.operations` of a model, counted in its traced forward over some 4,096 samples.

    In training the layers are made again for the backward pass, with several segments everything is, and the backward
    pass itself takes twice a forward's. The update, once a step, is not counted.
    """
    time = model.multiple * max(1, 4_096 // model.multiple)
    weights = jax.eval_shape(lambda: model.prepare(model.init(jax.random.key(0))))
    tokens = jax.ShapeDtypeStruct((1, time, model.channels), "int32")
    inputs = {"tokens": tokens} | ({"label": jax.ShapeDtypeStruct((1,), "int32")} if model.labels else {})
    state = jax.eval_shape(lambda: model.init_state(1))
    traced = jax.make_jaxpr(model.apply)(weights, inputs, state)
    dense, elementwise = (n / time for n in _work(traced.jaxpr))
    softmax, forwards = 6 * model.num_levels, 2 + (segments > 1)

    def scaled(factor: float) -> dict[str, int]:
        return rounded({"dense": factor * dense, "elementwise": factor * elementwise + softmax * (factor > 0)})

    forward = rounded({"dense": dense, "elementwise": elementwise})
    return {"forward": forward, "training": scaled(forwards + 2), "generation": scaled(1)}


def _work(jaxpr: Any) -> tuple[float, float]:
    """(operations of products, of elements) of a jaxpr, loops as often as they run; moves count nothing."""
    dense, elements = 0.0, 0.0
    for equation in jaxpr.eqns:
        name, parameters = equation.primitive.name, equation.params
        inner = [jaxpr for value in parameters.values() for jaxpr in jaxprs(value)]
        out = math.prod(getattr(equation.outvars[0].aval, "shape", ())) if equation.outvars else 0
        if name == "dot_general":
            (contracted, _), _ = parameters["dimension_numbers"]
            dense += 2 * out * math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
        elif name == "conv_general_dilated":
            kernel = equation.invars[1].aval.shape
            dense += 2 * out * math.prod(kernel) / kernel[parameters["dimension_numbers"].rhs_spec[0]]
        elif inner:
            times = parameters["length"] if name == "scan" else 1
            # Of a function with a derivative of its own the first is the function.
            for part in inner[:1] if name.startswith("custom_") else inner:
                more = _work(part)
                dense, elements = dense + times * more[0], elements + times * more[1]
        elif name not in _MOVES:
            elements += max(out, *(math.prod(getattr(v.aval, "shape", ())) for v in equation.invars), 0)
    return dense, elements


def jaxprs(value: Any) -> Iterator[core.Jaxpr]:
    """The jaxprs in an equation's parameter."""
    if isinstance(value, core.ClosedJaxpr):
        yield value.jaxpr
    elif isinstance(value, core.Jaxpr):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from jaxprs(item)
