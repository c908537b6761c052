"""Models, each kind in a folder of its own, behind one protocol (`harmonic.models.base.Model`).

    model = make(config.model, config.data.num_levels)
    params = model.init(jax.random.key(0))
    outputs, state = model.apply(model.prepare(params), {"tokens": tokens}, model.init_state(batch))

A kind is a folder here with `config.py`, whose `ModelConfig` derives from `models.config.ModelConfig`, and `model.py`,
whose `make(config, num_levels, channels)` returns the model. `config.py` may hold `REDUCED`, the kind's model for two
CPU cores; `plain.py` may hold the same function in the obvious way,
for tests and benchmarks. The folder's name is the kind: nothing else lists it.
Importing this package loads no JAX.
"""

from __future__ import annotations

import importlib
import importlib.util
import typing
from pathlib import Path

from harmonic.errors import UserError
from harmonic.models.config import About, ModelConfig, Reduced

if typing.TYPE_CHECKING:
    from harmonic.models.base import Model

DEFAULT_KIND = "harmonic_rnn"  # of a config without a kind: those written before there were several

__all__ = [
    "DEFAULT_KIND",
    "About",
    "ModelConfig",
    "Reduced",
    "about",
    "config_class",
    "kinds",
    "make",
    "plain",
    "plain_variants",
    "reduced",
]


def kinds() -> tuple[str, ...]:
    """All kinds: the folders of this package that have a config.py."""
    return tuple(sorted(path.parent.name for root in __path__ for path in Path(root).glob("*/config.py")))


def config_class(kind: object) -> type[ModelConfig]:
    """The config of a kind.

    Raises:
      UserError: there is no such kind.
    """
    # Only folders of this package are imported: a kind may come from a file that somebody else wrote.
    if kind not in kinds():
        raise UserError(f"model.kind={kind!r:.60} is impossible: it must be one of {', '.join(kinds())}")
    return importlib.import_module(f"harmonic.models.{kind}.config").ModelConfig


def make(config: ModelConfig, num_levels: int = 256, channels: int = 1) -> Model:
    """The model of a config.

    Args:
      config: of any kind.
      num_levels: levels of a token.
      channels: audio channels.

    Raises:
      UserError: the kind does not model as many channels.
    """
    return importlib.import_module(f"harmonic.models.{config.kind}.model").make(config, num_levels, channels)


def plain(config: ModelConfig, num_levels: int = 256, channels: int = 1, variant: str = "scan") -> Model:
    """The same function as `make`'s, in the obvious way: what tests and benchmarks compare with.

    Args:
      config, num_levels, channels: as for `make`.
      variant: one of the kind's `plain_variants`.
    """
    module = importlib.import_module(f"harmonic.models.{config.kind}.plain")
    return module.make(config, num_levels, channels, variant)


def plain_variants(config: ModelConfig) -> tuple[str, ...]:
    """The ways that the kind's plain.py knows to compute its recurrence; none where it has no plain.py."""
    if importlib.util.find_spec(f"harmonic.models.{config.kind}.plain") is None:
        return ()
    return importlib.import_module(f"harmonic.models.{config.kind}.plain").VARIANTS


def reduced(kind: str = DEFAULT_KIND) -> Reduced:
    """A kind's model for two CPU cores; of the default kind it is what a new config begins with."""
    return importlib.import_module(f"harmonic.models.{kind}.config").REDUCED


def about(kind: str) -> About:
    """What a kind is called, and where it is published."""
    return config_class(kind).about
