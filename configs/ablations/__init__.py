"""The studies of the paper (arXiv 2510.02401): each module's `get_study(size)` returns a `Study`.

`paper` is the paper's model and recipe; `small` is for two CPU cores: about two minutes a run on real digits.
"""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path
from typing import Any

from configs import sc09, sc09_small
from harmonic.config import Config, TrainConfig
from harmonic.errors import UserError
from harmonic.files import run_file
from harmonic.models.harmonic_rnn.config import ModelConfig
from harmonic.published import PAPER, find
from harmonic.study.plan import Published, Run, Study

__all__ = [
    "SIZES",
    "Published",
    "Run",
    "Study",
    "base",
    "load_study",
    "published",
    "study_names",
    "width",
    "with_model",
]

SIZES = ("paper", "small")
_SPEEDS = ("epochs_per_hour", "generated_per_second")


def published(dataset: str, variant: str = "", *, speeds: bool = False) -> Published:
    """What the paper prints of one of its cases.

    Args:
      dataset, variant: of a row in harmonic.published.
      speeds: also its speeds.
    """
    row = find(dataset, PAPER, variant)
    names = [field.name for field in dataclasses.fields(Published) if speeds or field.name not in _SPEEDS]
    return Published(**{name: row.value(name) for name in names})


def base(size: str) -> Config:
    """The baseline of the paper's studies on spoken digits: its architecture, with diagonal pooling convolutions, and
    its recipe; the small one with a higher rate, for a short run."""
    if size == "paper":
        return sc09.get_config()
    config = sc09_small.get_config()
    return dataclasses.replace(
        config,
        model=ModelConfig(
            width=32, state_width=64, pool_factors=(4, 4), blocks_per_level=2, pool_groups=32, dropout=0.0
        ),
        data=dataclasses.replace(config.data, window_length=2_000),
        train=TrainConfig(
            steps=600,
            global_batch_size=4,
            learning_rate=0.008,
            warmup_steps=50,
            ema_decay=0.99,
            ema_debias=True,
            validate_every=60,
            checkpoint_every=120,
            validation_recordings=48,
        ),
        generate=dataclasses.replace(config.generate, num_samples=4, num_continuations=2, temperature=0.8),
    )


def width(config: Config) -> int:
    """Features of the model's residual stream."""
    assert isinstance(config.model, ModelConfig)
    return config.model.width


def with_model(config: Config, name: str, **fields: Any) -> Config:
    """The config under another name, with other values of its model's fields."""
    return dataclasses.replace(config, name=name, model=dataclasses.replace(config.model, **fields))


def study_names() -> list[str]:
    """The names that `load_study` knows."""
    return sorted(path.stem for path in Path(__file__).parent.glob("*.py") if path.stem != "__init__")


def load_study(name: str, size: str) -> Study:
    """The study of a name in configs/ablations, or of a Python file with `get_study(size)`.

    Raises:
      UserError: there is none, or it does not give a Study.
    """
    if size not in SIZES:
        raise UserError(f"unknown size {size!r}; use {' or '.join(SIZES)}")
    if name.endswith(".py"):
        module = run_file(Path(name), f"the study {name}", f"use {', '.join(study_names())}, or a path to a .py")
    elif name in study_names():
        module = importlib.import_module(f"configs.ablations.{name}")
    else:
        raise UserError(f"unknown study {name!r}; use {', '.join(study_names())}, or a path to a .py")
    if not callable(getattr(module, "get_study", None)):
        raise UserError(f"the study {name} has no get_study(size) function")
    study = module.get_study(size)
    if not isinstance(study, Study):
        raise UserError(f"get_study() of {name} returned {type(study).__name__}, not a configs.ablations.Study")
    return study
