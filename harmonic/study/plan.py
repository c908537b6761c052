"""A study: its runs, and the published figures of each."""

from __future__ import annotations

import dataclasses

from harmonic.config import Config
from harmonic.errors import UserError


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
    parameters: float | None = None
    epochs_per_hour: float | None = None
    generated_per_second: float | None = None


@dataclasses.dataclass(frozen=True)
class Run:
    """One row of a study.

    Attributes:
      name: of its folder.
      title: what tables call it.
      config: the run's.
      published: what the paper says of it.
    """

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
      baseline: name of the run that the others are compared with; empty if they are not comparable.
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
