"""A study's runs, compared with its baseline and with the published figures.

Runs are compared with the baseline seed by seed, since runs of one seed see the same windows in the same order.
"""

from __future__ import annotations

import dataclasses

from harmonic import models
from harmonic.report.inputs import Json, number

_EQUAL = 0.005  # bits; smaller published differences are called none
METRICS = {  # of a row: keys in a run's result, key in its published values (in another unit for speeds)
    "bits": (("bits_per_sample",), "bits_per_sample"),
    "parameters": (("parameters",), "parameters"),
    "sound_share": (("sound", "share"), None),
    "sound_distance": (("sound", "distance"), None),
    "sound_away": (("sound", "longer", "away"), None),
    "fid": (("perceptual", "generated", "fid"), "fid"),
    "is": (("perceptual", "generated", "is"), "inception_score"),
    "rejected_fid": (("perceptual", "rejected", "fid"), None),
    "rejected_is": (("perceptual", "rejected", "is"), None),
    "trained": (("trained_per_second",), "epochs_per_hour"),
    "generated": (("generated_per_second",), "generated_per_second"),
}


@dataclasses.dataclass(frozen=True)
class Stat:
    """A figure over seeds."""

    mean: float
    low: float
    high: float
    count: int

    def text(self, digits: int, sign: str = "") -> str:
        """The mean, and in brackets the extremes if they differ."""
        shown = f"{self.mean:{sign},.{digits}f}"
        return shown + (f" ({self.low:{sign},.{digits}f} to {self.high:{sign},.{digits}f})" if self.spread else "")

    @property
    def spread(self) -> float:
        """From the least to the greatest; 0 for one seed."""
        return self.high - self.low


@dataclasses.dataclass(frozen=True)
class Row:
    """One run of a study, over its seeds.

    Attributes:
      measured, published: by the names of METRICS; only those that exist.
      gaps: of each seed, measured bits per sample less those of the baseline's run of the same seed, or None.
      published_gap: the same of the published bits.
      results: of each seed, as study.json has them.
    """

    name: str
    title: str
    measured: dict[str, Stat]
    published: dict[str, float]
    gaps: list[float | None]
    published_gap: float | None
    results: list[Json]

    @property
    def gap(self) -> Stat | None:
        """The gaps over all seeds."""
        return _stat(self.gaps)

    @property
    def verdict(self) -> str:
        """How the measured difference compares with the published one; empty if one of them is missing."""
        ours, theirs = self.gap, self.published_gap
        if ours is None or theirs is None:
            return ""
        if ours.count > 1 and ours.low < 0 < ours.high:
            return "undecided: seeds differ in the sign"
        if abs(theirs) < _EQUAL:
            return "about equal, as published" if abs(ours.mean) < _EQUAL else "published as about equal"
        return "same direction" if ours.mean * theirs > 0 else "opposite direction"


def measured(result: Json, metric: str) -> float | None:
    """A metric of METRICS in one run's result."""
    return number(result, *METRICS[metric][0])


def state(result: Json) -> str:
    """`done`, `failed`, `begun` or `to come`."""
    if "bits_per_sample" in result and not result.get("error"):
        return "done"
    return "failed" if result.get("error") else "begun" if result.get("validation") else "to come"


def rows(study: Json) -> list[Row]:
    """The runs of study.json, in its order."""
    base: Json = next((run for run in study["runs"] if run["name"] == study["baseline"]), {})
    base_bits = {result["seed"]: measured(result, "bits") for result in base.get("results", [])}
    base_published = number(base, "published", "bits_per_sample")
    found = []
    for run in study["runs"]:
        other = run["name"] != study["baseline"]
        stats = {metric: _stat([measured(result, metric) for result in run["results"]]) for metric in METRICS}
        printed = {metric: number(run["published"], key) for metric, (_, key) in METRICS.items() if key}
        gaps = [_difference(measured(r, "bits"), base_bits.get(r["seed"])) if other else None for r in run["results"]]
        found.append(
            Row(
                name=run["name"],
                title=run["title"],
                measured={metric: stat for metric, stat in stats.items() if stat is not None},
                published={metric: value for metric, value in printed.items() if value is not None},
                gaps=gaps,
                published_gap=_difference(printed["bits"], base_published) if other else None,
                results=run["results"],
            )
        )
    return found


def _stat(values: list[float | None]) -> Stat | None:
    found = [value for value in values if value is not None]
    return Stat(sum(found) / len(found), min(found), max(found), len(found)) if found else None


def _difference(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def base_title(study: Json) -> str:
    """What the baseline is called; empty if there is none."""
    return next((run["title"] for run in study["runs"] if run["name"] == study["baseline"]), "")


def findings(study: Json) -> list[str]:
    """What the study shows against the paper, in sentences; also where it disagrees, and what it cannot say."""
    table, base = rows(study), base_title(study)
    done = [row for row in table if "bits" in row.measured]
    sentences = []
    if len(done) < len(table):
        sentences.append(f"{len(done)} of {len(table)} runs have been evaluated so far.")
    for row in done:
        ours, theirs = row.gap, row.published_gap
        if ours is None:
            continue
        sentence = f"{row.title}: {abs(ours.mean):.3f} bits {_way(ours.mean)} {base}"
        if theirs is not None:
            sentence += f"; published {abs(theirs):.3f} {_way(theirs)}: {row.verdict}"
        sentences.append(f"{sentence}.")
    if len(done) > 1 and study["baseline"]:
        spreads = [stat.spread for row in done if (stat := row.measured["bits"]).count > 1]
        if spreads:
            sentences.append(
                f"The seeds of one run are up to {max(spreads):.3f} bits apart: smaller differences between runs may "
                "be chance."
            )
        else:
            sentences.append("One seed each: how much another seed would change is not known.")
    if study["size"] != "paper":
        sentences.append("This is a reduced model and a short training: other sizes may compare differently.")
    return sentences


def _way(difference: float) -> str:
    return "above" if difference >= 0 else "below"


def notes(study: Json) -> list[str]:
    """How the figures were measured, for below the tables."""
    sentences = [study["note"]] if study["note"] else []
    results = [result for run in study["runs"] for result in run["results"]]
    done = [result for result in results if "bits_per_sample" in result]
    if done:
        markov = {f"{result['dataset']} {result['markov_bits']:.3f}" for result in done if "markov_bits" in result}
        sentences.append(
            "Measured with the averaged weights of the best validation, on the whole test split, every sample once. A "
            f"Markov model of order 1 needs {', '.join(sorted(markov))} bits."
        )
        machines = ", ".join(sorted({str(result.get("platform", "")) for result in done}))
        ratios = ": compare ratios to the baseline, not speeds" if study["baseline"] else ""
        sentences.append(
            "Training speed: the 0.9 quantile of the logged speeds. Generation speed: the best of 5 rounds, which the "
            f"runs take in turns, with 8 streams side by side. Both on {machines}. Published speeds are of a TPU v4-8, "
            f"batch 32{ratios}."
        )
    if any(number(result, "sound", "distance") is not None for result in results):
        sentences.append(
            "How it sounds: the Fréchet distance of log-mel frames of generated clips to recordings of the test split, "
            "and where it is between training recordings (0) and noise with their mean spectrum (1). Streams of "
            "four times the clips' length run away when they stay louder, or less likely, than any of the recordings."
        )
    if not any(result.get("perceptual") for result in results):
        sentences.append("No FID or inception score was measured: give --classifier.")
    papers = ", ".join(
        dict.fromkeys(f"arXiv {arxiv}" for kind in study["kinds"] if (arxiv := models.about(kind).arxiv))
    )
    sentences.append(f"Published: as the paper prints it{f' ({papers})' if papers else ''}, on its own data.")
    return sentences


def model_names(study: Json) -> str:
    """What the kinds of the study's models are called."""
    return ", ".join(models.about(kind).name for kind in study["kinds"])
