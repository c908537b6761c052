"""Published figures that pages and studies show, each once, with its source and how well it is known.

To compare with another system, or on another data set, add rows to `RESULTS`. `CASES` has a paper's other cases, which
its study shows and a run's report does not.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from harmonic import models

_SAMPLE_RNN, _WAVENET, _SASHIMI, _MAMBA = "1612.07837", "1609.03499", "2202.09729", "2312.00752"
PAPER = models.about(models.DEFAULT_KIND).arxiv  # the paper that this project reproduces


@dataclasses.dataclass(frozen=True)
class Figure:
    """One published number.

    Attributes:
      value: in the unit that `Row` gives for its name.
      source: arXiv number and table, or the repository.
      known: read in the source; computed by running the source's code; recalled without the source at hand, so that no
        page shows it until somebody has read it.
    """

    value: float
    source: str
    known: Literal["read", "computed", "recalled"] = "read"


@dataclasses.dataclass(frozen=True)
class Row:
    """A system's figures on the test split of a data set.

    Attributes:
      dataset: as in a config.
      paper: arXiv number of the paper that describes the system; empty for real recordings.
      variant: what tells the row from the system's others; empty if there are none.
      figures: by name: bits_per_sample; of SC09's samples fid, inception_score, mis and am; parameters; of speed
        epochs_per_hour (training) and generated_per_second (samples).
    """

    dataset: str
    paper: str
    variant: str
    figures: dict[str, Figure]

    @property
    def title(self) -> str:
        """What a table calls the row: the system's name, and the variant."""
        abouts = (models.about(kind) for kind in models.kinds())
        name = next((about.name for about in abouts if about.arxiv == self.paper), self.paper)
        return ", ".join(filter(None, [name, self.variant]))

    def value(self, name: str) -> float | None:
        """A figure that may be shown; None if there is none."""
        figure = self.figures.get(name)
        return None if figure is None or figure.known == "recalled" else figure.value


def find(dataset: str, paper: str, variant: str) -> Row:
    """The row of RESULTS or CASES with these three.

    Raises:
      KeyError: there is none.
    """
    for row in (*RESULTS, *CASES):
        if (row.dataset, row.paper, row.variant) == (dataset, paper, variant):
            return row
    raise KeyError(f"nothing is published of {dataset}, {paper}, {variant!r}")


def _printed(table: str, **values: float) -> dict[str, Figure]:
    return {name: Figure(value, table) for name, value in values.items()}


def _counted(parameters: int) -> dict[str, Figure]:
    return {"parameters": Figure(parameters, f"{PAPER}, the authors' code", "computed")}


_MAMBA_4 = f"{_MAMBA} table 4"
_TABLE_1, _TABLE_2, _TABLE_4 = (f"{PAPER} table {number}" for number in (1, 2, 4))
_BASELINE = _counted(7_272_704)

RESULTS = (
    Row("sc09", _SAMPLE_RNN, "", _printed(_MAMBA_4, parameters=35.0e6, bits_per_sample=2.042)),
    Row("sc09", _WAVENET, "", _printed(_MAMBA_4, parameters=4.2e6, bits_per_sample=1.925)),
    Row(
        "sc09",
        _SASHIMI,
        "",
        _printed(_MAMBA_4, parameters=5.8e6, bits_per_sample=1.873, fid=1.99, inception_score=5.13, mis=42.57, am=0.74),
    ),
    Row(
        "sc09",
        _MAMBA,
        "",
        _printed(_MAMBA_4, parameters=6.1e6, bits_per_sample=1.852, fid=0.94, inception_score=6.26),
    ),
    Row(
        "sc09",
        PAPER,
        "128 pooling groups",
        _BASELINE
        | _printed(_TABLE_1, bits_per_sample=1.854)
        | _printed(_TABLE_2, fid=0.46, inception_score=6.46, epochs_per_hour=11.5, generated_per_second=103_000),
    ),
    Row("sc09", PAPER, "4 pooling groups", _counted(7_391_744) | _printed(_TABLE_1, bits_per_sample=1.848)),
    # By the released classifier, as users of the authors' code found it. Mamba's table 4 prints 8.56, 292.5 and 0.16.
    Row(
        "sc09",
        "",
        "Real training set",
        _printed("github state-spaces/s4 #64", fid=0.0, inception_score=8.553, mis=291.3, am=0.157),
    ),
    Row("beethoven", _SASHIMI, "", _printed(_SASHIMI, bits_per_sample=0.946)),
    Row("beethoven", PAPER, "", _BASELINE | _printed(_TABLE_4, bits_per_sample=0.915)),
    Row("youtubemix", PAPER, "whole minutes", _BASELINE | _printed(_TABLE_4, bits_per_sample=1.324)),
    Row("youtubemix", _SASHIMI, "windows of 8 seconds", _printed(_SASHIMI, bits_per_sample=1.294)),
)
CASES = (
    Row("sc09", PAPER, "1 pooling group", _counted(7_760_384) | _printed(_TABLE_1, bits_per_sample=1.956)),
    Row(
        "sc09",
        PAPER,
        "one pooling layer",
        _printed(
            _TABLE_2,
            bits_per_sample=1.853,
            fid=6.85,
            inception_score=2.03,
            epochs_per_hour=6.7,
            generated_per_second=55_000,
        ),
    ),
    Row(
        "sc09",
        PAPER,
        "no pooling",
        _printed(
            _TABLE_2,
            bits_per_sample=1.852,
            fid=2.95,
            inception_score=3.33,
            epochs_per_hour=6.1,
            generated_per_second=46_000,
        ),
    ),
)
