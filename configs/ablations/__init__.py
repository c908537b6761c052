"""The studies of the paper (arXiv 2510.02401): each module's `get_study(size)` returns a `Study`.

`paper` is the paper's model and recipe; `small` is for two CPU cores: about two minutes a run on real digits.
"""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path

from configs import sc09, sc09_small
from harmonic.config import Config, run_file
from harmonic.errors import UserError

SIZES = ("paper", "small")


@dataclasses.dataclass(frozen=True)
class Published:
    """What the paper prints of a run; None where it prints nothing.

    Attributes:
      bits_per_sample: test likelihood.
      fid, inception_score: of its samples.
      parameters: exact, as the published code counts them.
      epochs_per_hour, generated_per_second: speeds on a TPU v4-8, batch 32; the second in samples a second.
    """

    bits_per_sample: float | None = None
    fid: float | None = None
    inception_score: float | None = None
    parameters: int | None = None
    epochs_per_hour: float | None = None
    generated_per_second: float | None = None


@dataclasses.dataclass(frozen=True)
class Run:
    """One row of a study: its folder's name, what it is called, its config, and what the paper says of it."""

    name: str
    title: str
    config: Config
    published: Published = Published()


@dataclasses.dataclass(frozen=True)
class Study:
    """Runs that differ in one thing.

    Attributes:
      name: of its folder and its files.
      title: its heading.
      reproduces: which table or figure of the paper.
      note: what a reader must know to compare.
      baseline: name of the run that the others are compared with; empty where they are not comparable.
      runs: in the order of the table.
    """

    name: str
    title: str
    reproduces: str
    note: str
    baseline: str
    runs: tuple[Run, ...]

    def __post_init__(self) -> None:
        names = [run.name for run in self.runs]
        if not names or len(set(names)) < len(names) or any(not n or set(n) & set("/\\. ") for n in names):
            raise UserError(f"study {self.name!r}: its runs need plain names, each another: {names}")
        if self.baseline and self.baseline not in names:
            raise UserError(f"study {self.name!r}: baseline={self.baseline!r} is none of its runs {', '.join(names)}")


def base(size: str) -> Config:
    """The baseline of the studies on spoken digits, with diagonal pooling convolutions."""
    if size == "paper":
        return sc09.get_config()
    config = sc09_small.get_config()
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, pool_groups=config.model.width),
        data=dataclasses.replace(config.data, window_length=2_000),
        train=dataclasses.replace(
            config.train, steps=600, validate_every=60, checkpoint_every=120, validation_recordings=48
        ),
        generate=dataclasses.replace(config.generate, num_samples=4, num_continuations=2),
    )


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
