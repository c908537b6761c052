"""What a study shows: study.json, study.md, study.csv and study.html, from what its runs measured.

Everything published is marked so, and everything measured. Runs are compared with the study's baseline seed by seed,
since runs of one seed see the same windows in the same order.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import json
import math
from pathlib import Path
from typing import Any

from harmonic.files import write_whole
from harmonic.study_page import Dot, study_html

Json = dict[str, Any]

_NONE = "-"  # a cell without a figure
_EQUAL = 0.005  # bits: published differences below this are called none
METRICS = {  # of a row: where a result has it, where the published values have it (in other units, for speeds)
    "bits": ("bits_per_sample", "bits_per_sample"),
    "parameters": ("parameters", "parameters"),
    "fid": ("generated.fid", "fid"),
    "is": ("generated.is", "inception_score"),
    "rejected_fid": ("rejected.fid", ""),
    "rejected_is": ("rejected.is", ""),
    "trained": ("trained_per_second", "epochs_per_hour"),
    "generated": ("generated_per_second", "generated_per_second"),
}


@dataclasses.dataclass(frozen=True)
class Stat:
    """A figure over seeds."""

    mean: float
    low: float
    high: float
    count: int

    def text(self, digits: int, sign: str = "") -> str:
        """The mean, and in brackets the extremes where there are several."""
        shown = f"{self.mean:{sign},.{digits}f}"
        spread = f" ({self.low:{sign},.{digits}f} to {self.high:{sign},.{digits}f})"
        return shown + (spread if self.count > 1 and self.high > self.low else "")


@dataclasses.dataclass(frozen=True)
class Row:
    """One run of a study, over its seeds.

    Attributes:
      measured, published: by the names of METRICS; those that there are.
      difference: of bits per sample to the baseline's run of the same seed.
      published_difference: the same of the published ones.
      results: of each seed, as study.json has them.
    """

    name: str
    title: str
    measured: dict[str, Stat]
    published: dict[str, float]
    difference: Stat | None
    published_difference: float | None
    results: list[Json]

    @property
    def verdict(self) -> str:
        """How the measured difference stands to the published one; empty where one of them is missing."""
        ours, theirs = self.difference, self.published_difference
        if ours is None or theirs is None:
            return ""
        if ours.count > 1 and ours.low < 0 < ours.high:
            return "undecided: seeds differ in the sign"
        if abs(theirs) < _EQUAL:
            return "about equal, as published" if abs(ours.mean) < _EQUAL else "published as about equal"
        return "same direction" if ours.mean * theirs > 0 else "opposite direction"


def number(mapping: Any, path: str) -> float | None:
    """A finite number at a dotted path of nested objects, or None."""
    for key in path.split("."):
        mapping = mapping.get(key) if isinstance(mapping, dict) else None
    if isinstance(mapping, int | float) and not isinstance(mapping, bool):
        with contextlib.suppress(OverflowError):  # whole numbers have no largest
            return float(mapping) if math.isfinite(mapping) else None
    return None


def _stat(values: list[float | None]) -> Stat | None:
    found = [value for value in values if value is not None]
    return Stat(sum(found) / len(found), min(found), max(found), len(found)) if found else None


def _measured(result: Json, metric: str) -> float | None:
    path = METRICS[metric][0]
    return number(result.get("perceptual") if "." in path else result, path)


def rows(study: Json) -> list[Row]:
    """The runs of study.json, in its order."""
    base: Json = next((run for run in study["runs"] if run["name"] == study["baseline"]), {})
    base_bits = {result["seed"]: _measured(result, "bits") for result in base.get("results", [])}
    base_published = number(base, "published.bits_per_sample")
    found = []
    for run in study["runs"]:
        stats = {metric: _stat([_measured(result, metric) for result in run["results"]]) for metric in METRICS}
        told = {metric: number(run["published"], path) for metric, (_, path) in METRICS.items() if path}
        pairs = [(_measured(result, "bits"), base_bits.get(result["seed"])) for result in run["results"]]
        gaps = [ours - theirs if ours is not None and theirs is not None else None for ours, theirs in pairs]
        bits, other = told["bits"], run["name"] != study["baseline"]
        found.append(
            Row(
                name=run["name"],
                title=run["title"],
                measured={metric: stat for metric, stat in stats.items() if stat is not None},
                published={metric: value for metric, value in told.items() if value is not None},
                difference=_stat(gaps) if other else None,
                published_difference=bits - base_published
                if other and bits is not None and base_published is not None
                else None,
                results=run["results"],
            )
        )
    return found


def findings(study: Json) -> list[str]:
    """What the study shows against the paper, in sentences; also where it disagrees, and what it cannot say."""
    table = rows(study)
    done = [row for row in table if "bits" in row.measured]
    base = next((row.title for row in table if row.name == study["baseline"]), "")
    said = []
    if len(done) < len(table):
        said.append(f"{len(done)} of {len(table)} runs have been evaluated so far.")
    for row in done:
        ours, theirs = row.difference, row.published_difference
        if ours is None:
            continue
        sentence = f"{row.title}: {abs(ours.mean):.3f} bits {_way(ours.mean)} {base}"
        if theirs is not None:
            sentence += f"; published {abs(theirs):.3f} {_way(theirs)}: {row.verdict}"
        said.append(f"{sentence}.")
    if len(done) > 1 and study["baseline"]:
        spreads = [stat.high - stat.low for row in done if (stat := row.measured["bits"]).count > 1]
        if spreads:
            said.append(
                f"The seeds of one run lie up to {max(spreads):.3f} bits apart: smaller differences between runs may "
                "be chance."
            )
        else:
            said.append("One seed each: how far another seed would end from these is not known.")
    if study["size"] != "paper":
        said.append("A reduced model and a short training: it shows whether a comparison holds there, no more.")
    return said


def _way(difference: float) -> str:
    return "above" if difference >= 0 else "below"


@dataclasses.dataclass(frozen=True)
class Table:
    """Cells as text, the first column the run's title; `head` says of each column whether published or measured."""

    caption: str
    head: list[str]
    rows: list[list[str]]


def tables(study: Json) -> list[Table]:
    """Likelihood, samples, size and speed: what there is of them."""
    table = rows(study)
    base = next((row for row in table if row.name == study["baseline"]), None)

    def told(row: Row, metric: str, digits: int) -> str:
        return f"{row.published[metric]:,.{digits}f}" if metric in row.published else _NONE

    def found(row: Row, metric: str, digits: int) -> str:
        return row.measured[metric].text(digits) if metric in row.measured else _NONE

    def times(row: Row, metric: str, *, published: bool) -> str:
        theirs = {k: v.mean for k, v in row.measured.items()} if not published else row.published
        ours = ({k: v.mean for k, v in base.measured.items()} if not published else base.published) if base else {}
        return f"{theirs[metric] / ours[metric]:.2f}" if metric in theirs and ours.get(metric) else _NONE

    def columns(caption: str, *parts: tuple[str, list[str]]) -> Table:
        # A column in which nothing stands is left out.
        shown = [(title, cells) for title, cells in parts if any(cell != _NONE for cell in cells)]
        lines = [[row.title, *(cells[i] for _, cells in shown)] for i, row in enumerate(table)]
        return Table(caption, ["Run", *(title for title, _ in shown)], lines)

    def gap(row: Row) -> str:
        return row.difference.text(3, "+") if row.difference else _NONE

    def published_gap(row: Row) -> str:
        return f"{row.published_difference:+.3f}" if row.published_difference is not None else _NONE

    all_of = [
        columns(
            "Test likelihood, bits per sample",
            ("Measured", [found(row, "bits", 3) for row in table]),
            ("Published", [told(row, "bits", 3) for row in table]),
            ("Measured, to the baseline", [gap(row) for row in table]),
            ("Published, to the baseline", [published_gap(row) for row in table]),
            ("Direction", [row.verdict or _NONE for row in table]),
        ),
        columns(
            "Samples, by a classifier of spoken digits",
            ("FID, measured", [found(row, "fid", 2) for row in table]),
            ("FID, measured with rejection", [found(row, "rejected_fid", 2) for row in table]),
            ("FID, published", [told(row, "fid", 2) for row in table]),
            ("IS, measured", [found(row, "is", 2) for row in table]),
            ("IS, measured with rejection", [found(row, "rejected_is", 2) for row in table]),
            ("IS, published", [told(row, "is", 2) for row in table]),
        ),
        columns(
            "Parameters",
            ("Measured", [found(row, "parameters", 0) for row in table]),
            ("Published, at the paper's size", [told(row, "parameters", 0) for row in table]),
        ),
        columns(
            "Training speed",
            ("Samples per second, measured", [found(row, "trained", 0) for row in table]),
            ("Measured, of the baseline's", [times(row, "trained", published=False) for row in table]),
            ("Epochs per hour, published", [told(row, "trained", 1) for row in table]),
            ("Published, of the baseline's", [times(row, "trained", published=True) for row in table]),
        ),
        columns(
            "Generation speed",
            ("Samples per second, measured", [found(row, "generated", 0) for row in table]),
            ("Measured, of the baseline's", [times(row, "generated", published=False) for row in table]),
            ("Samples per second, published", [told(row, "generated", 0) for row in table]),
            ("Published, of the baseline's", [times(row, "generated", published=True) for row in table]),
        ),
    ]
    measured = {metric for row in table for metric in row.measured}
    needs = ("", "fid", "parameters", "trained", "generated")  # a table of published figures alone compares nothing
    return [one for one, need in zip(all_of, needs, strict=True) if not need or need in measured]


def notes(study: Json) -> list[str]:
    """How the figures came about, for below the tables."""
    said = [study["note"]] if study["note"] else []
    results = [result for run in study["runs"] for result in run["results"]]
    done = [result for result in results if "bits_per_sample" in result]
    if done:
        markov = {f"{result['dataset']} {result['markov_bits']:.3f}" for result in done if "markov_bits" in result}
        said.append(
            "Measured: the averaged weights of the best validation, on the whole test split, every sample once. A "
            f"Markov model of order 1 needs {', '.join(sorted(markov))} bits."
        )
        machines = ", ".join(sorted({str(result.get("platform", "")) for result in done}))
        said.append(
            "Speeds: of training, what the fastest tenth of its log's lines reach; of generation, 8 streams side by "
            f"side, the best of 5 rounds that the runs take in turns; on {machines}. Published speeds are of a TPU "
            f"v4-8, batch 32{': ratios to the baseline are what can be compared' if study['baseline'] else ''}."
        )
    if not any(result.get("perceptual") for result in results):
        said.append("No FID or inception score was measured: give --classifier.")
    said.append("Published: as the paper prints it (arXiv 2510.02401), on its own data.")
    return said


def markdown(study: Json) -> str:
    """The study as Markdown."""

    def line(cells: list[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |\n"

    text = f"# {study['title']} ({study['reproduces']}, {study['size']} size)\n\n"
    text += "".join(f"- {sentence}\n" for sentence in findings(study))
    for table in tables(study):
        text += f"\n**{table.caption}**\n\n{line(table.head)}{line(['---'] + ['---:'] * (len(table.head) - 1))}"
        text += "".join(line(cells) for cells in table.rows)
    failed = [(row.title, r["seed"], r["error"]) for row in rows(study) for r in row.results if r.get("error")]
    if failed:
        text += "\nFailed:\n\n" + "".join(f"- {title}, seed {seed}: {why}\n" for title, seed, why in failed)
    text += "\n" + "".join(f"{note}\n" for note in notes(study))
    return text + f"\n```\n{study['command']}\n```\n"


def csv_text(study: Json) -> str:
    """One line a run and seed; columns are called measured_... or published_... ."""
    out = io.StringIO()
    head = ["run", "title", "seed", "state", "steps", "dataset", "test_samples", "folder"]
    names = {
        metric: f"measured_{path.replace('generated.', '').replace('.', '_')}" for metric, (path, _) in METRICS.items()
    }
    told = {metric: f"published_{path}" for metric, (_, path) in METRICS.items() if path}
    head += ["measured_best_validation", *names.values(), "measured_difference", *told.values(), "published_difference"]
    writer = csv.DictWriter(out, head, restval="", lineterminator="\n")
    writer.writeheader()
    base = {
        r["seed"]: _measured(r, "bits") for x in study["runs"] if x["name"] == study["baseline"] for r in x["results"]
    }
    for row in rows(study):
        for result in row.results:
            values = {metric: _measured(result, metric) for metric in METRICS}
            line: Json = {key: result.get(key, "") for key in ("seed", "steps", "dataset", "test_samples", "folder")}
            line |= {"run": row.name, "title": row.title, "state": state(result)}
            line |= {names[metric]: _plain(value) for metric, value in values.items() if value is not None}
            line["measured_best_validation"] = result.get("best_validation", "")
            bits, theirs = values["bits"], base.get(result["seed"])
            if row.difference and bits is not None and theirs is not None:
                line["measured_difference"] = bits - theirs
            line |= {told[metric]: _plain(value) for metric, value in row.published.items()}
            if row.published_difference is not None:
                line["published_difference"] = row.published_difference
            writer.writerow(line)
    return out.getvalue()


def _plain(value: float) -> float | int:
    return int(value) if value.is_integer() and abs(value) < 2**53 else value


def state(result: Json) -> str:
    """`done`, `failed`, `begun` or `to come`."""
    if "bits_per_sample" in result and not result.get("error"):
        return "done"
    return "failed" if result.get("error") else "begun" if result.get("validation") else "to come"


def write_study(folder: Path, study: Json) -> None:
    """Writes study.json, .md, .csv and .html, each whole or not at all.

    Raises:
      UserError: they cannot be written, or a clip that a run's samples.json names cannot be read.
    """
    shown = [(table.caption, table.head, table.rows) for table in tables(study)]
    dots = []
    for row in rows(study):
        # Runs that have no baseline in common stand as they are.
        stat = row.difference if study["baseline"] else row.measured.get("bits")
        told = row.published_difference if study["baseline"] else row.published.get("bits")
        if stat is not None:
            dots.append(Dot(row.title, (stat.low, stat.mean, stat.high), told))
    states = [(row.title, state(result), result) for row in rows(study) for result in row.results]
    texts = {
        "study.json": json.dumps(study, indent=2) + "\n",
        "study.md": markdown(study),
        "study.csv": csv_text(study),
        "study.html": study_html(folder, study, shown, dots, states, findings(study), notes(study)),
    }
    for name, text in texts.items():
        # Titles and errors may hold lone surrogates, which UTF-8 cannot.
        write_whole(folder / name, text.encode("utf-8", "replace"))
