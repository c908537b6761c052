"""What the configs of all model kinds share."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal, TypeVar

from harmonic.errors import check

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class About:
    """What a kind is called, and where it is published.

    Attributes:
      name: for people to read, as in a model card.
      summary: what it is, in words that follow its name and "is".
      arxiv: its paper's number there; empty for a model without one.
    """

    name: str
    summary: str
    arxiv: str = ""


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A model's sizes. Each kind's config.py derives its own `ModelConfig`, and checks the values when it is made.

    Attributes:
      kind: the model's folder in harmonic/models.
      precision: least precision of products of float32 matrices in training, evaluation and generation, as JAX names
        it. high: TF32 on GPUs that have it, three passes of bfloat16 on TPU; highest: float32; default: what JAX takes
        by itself, TF32 on GPUs and one pass of bfloat16 on TPU. On a CPU all three are float32. Sums are float32 in any
        case; the kernels in Pallas multiply no matrices. The default is high: on a GPU that is what JAX takes by itself
        and so what the paper's figures were made with, and on a TPU no product falls below it.
    """

    kind: str = ""
    precision: Literal["default", "high", "highest"] = "high"
    about: ClassVar[About]
    # Fields that decide neither the parameters nor, but for rounding, what is computed: a run may change them. A kind
    # that adds some keeps these.
    free: ClassVar[tuple[str, ...]] = ("precision",)
    # Fields that decide no parameter: weights may be read with others.
    not_in_architecture: ClassVar[tuple[str, ...]] = ()
    # Whether a sequence may be cut over devices. A recurrence that is not linear must run in order.
    shardable: ClassVar[bool] = True

    @property
    def multiple(self) -> int:
        """Samples of which every segment is a whole multiple."""
        return 1

    @property
    def dtype(self) -> str:
        """The type of what the parallel forward keeps between layers: float32 or bfloat16."""
        return "float32"

    def architecture(self) -> dict[str, Any]:
        """What decides the names, shapes and meaning of the parameters, in JSON's types."""
        fields = {name: getattr(self, name) for name in (f.name for f in dataclasses.fields(self))}
        left_out = (*self.free, *self.not_in_architecture)
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in fields.items()
            if name not in left_out
        }


@dataclasses.dataclass(frozen=True)
class Reduced:
    """A model for two CPU cores.

    Attributes:
      config: its sizes.
      trained_per_minute: samples that such a machine trains it on in a minute.
    """

    config: ModelConfig
    trained_per_minute: int

    def source(self, between: str = ", ") -> str:
        """The config's fields as Python writes them in a call, without those at their defaults."""
        fields = ((field, getattr(self.config, field.name)) for field in dataclasses.fields(self.config))
        return between.join(f"{field.name}={value!r}" for field, value in fields if value != field.default)


def each_level(field: str, value: T | tuple[T, ...], factors: tuple[int, ...]) -> tuple[T, ...]:
    """A field's values by level, from the outermost to the innermost, where it has one for all levels or one a level.

    Raises:
      UserError: it has another number of them.
    """
    levels = len(factors) + 1
    values = value if isinstance(value, tuple) else (value,) * levels
    allowed = f"one value, or {levels} (one for each level of pool_factors={factors}, and the innermost)"
    check(len(values) == levels, field, value, allowed)
    return values
