"""A study's tables, as text for its page and for study.md, and study.csv with a line a run and seed."""

from __future__ import annotations

import csv
import dataclasses
import io

from harmonic.report.inputs import Json
from harmonic.study.results import METRICS, Row, findings, measured, notes, rows, state

_NONE = "-"  # a cell without a figure


@dataclasses.dataclass(frozen=True)
class Table:
    """Cells as text, the first column the run's title; `head` says of each column whether published or measured."""

    caption: str
    head: list[str]
    rows: list[list[str]]


def tables(study: Json) -> list[Table]:
    """Likelihood, samples, size and speed, as far as they are known."""
    table = rows(study)
    base = next((row for row in table if row.name == study["baseline"]), None)

    def found(metric: str, digits: int) -> list[str]:
        return [row.measured[metric].text(digits) if metric in row.measured else _NONE for row in table]

    def printed(metric: str, digits: int) -> list[str]:
        return [f"{row.published[metric]:,.{digits}f}" if metric in row.published else _NONE for row in table]

    def ratios(values: list[float | None], of_base: float | None) -> list[str]:
        return [f"{value / of_base:.2f}" if value is not None and of_base else _NONE for value in values]

    def means(row: Row | None, metric: str) -> float | None:
        return row.measured[metric].mean if row and metric in row.measured else None

    def speeds(caption: str, metric: str, unit: str, digits: int) -> Table:
        return columns(
            caption,
            ("Samples per second, measured", found(metric, 0)),
            ("Measured, of the baseline's", ratios([means(row, metric) for row in table], means(base, metric))),
            (f"{unit}, published", printed(metric, digits)),
            (
                "Published, of the baseline's",
                ratios([row.published.get(metric) for row in table], base.published.get(metric) if base else None),
            ),
        )

    def columns(caption: str, *parts: tuple[str, list[str]]) -> Table:
        # A column without any figure is left out.
        shown = [(title, cells) for title, cells in parts if any(cell != _NONE for cell in cells)]
        lines = [[row.title, *(cells[i] for _, cells in shown)] for i, row in enumerate(table)]
        return Table(caption, ["Run", *(title for title, _ in shown)], lines)

    gaps = [(row.gap, row.published_gap) for row in table]
    every = {  # by metric: without a measured value of it, the table would only repeat published figures
        "": columns(
            "Test likelihood, bits per sample",
            ("Measured", found("bits", 3)),
            ("Published", printed("bits", 3)),
            ("Measured, to the baseline", [gap.text(3, "+") if gap else _NONE for gap, _ in gaps]),
            ("Published, to the baseline", [f"{gap:+.3f}" if gap is not None else _NONE for _, gap in gaps]),
            ("Direction", [row.verdict or _NONE for row in table]),
        ),
        "sound_distance": columns(
            "How it sounds",
            ("Share of the way to noise, measured", found("sound_share", 2)),
            ("Distance in dB², measured", found("sound_distance", 0)),
            ("Share of longer streams that run away, measured", found("sound_away", 2)),
        ),
        "fid": columns(
            "Samples, by a classifier of spoken digits",
            ("FID, measured", found("fid", 2)),
            ("FID, measured with rejection", found("rejected_fid", 2)),
            ("FID, published", printed("fid", 2)),
            ("IS, measured", found("is", 2)),
            ("IS, measured with rejection", found("rejected_is", 2)),
            ("IS, published", printed("is", 2)),
        ),
        "parameters": columns(
            "Parameters",
            ("Measured", found("parameters", 0)),
            ("Published, at the paper's size", printed("parameters", 0)),
        ),
        "trained": speeds("Training speed", "trained", "Epochs per hour", 1),
        "generated": speeds("Generation speed", "generated", "Samples per second", 0),
    }
    known = {metric for row in table for metric in row.measured}
    return [one for metric, one in every.items() if not metric or metric in known]


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
    left_out = ("perceptual", "generated")
    ours = {
        metric: "_".join(["measured", *(key for key in keys if key not in left_out)])
        for metric, (keys, _) in METRICS.items()
    }
    theirs = {metric: f"published_{key}" for metric, (_, key) in METRICS.items() if key}
    head = ["run", "title", "seed", "state", "steps", "dataset", "test_samples", "folder", "measured_best_validation"]
    head += [*ours.values(), "measured_difference", *theirs.values(), "published_difference"]
    out = io.StringIO()
    writer = csv.DictWriter(out, head, restval="", lineterminator="\n")
    writer.writeheader()
    for row in rows(study):
        for result, gap in zip(row.results, row.gaps, strict=True):
            line: Json = {key: result.get(key, "") for key in ("seed", "steps", "dataset", "test_samples", "folder")}
            line |= {"run": row.name, "title": row.title, "state": state(result)}
            line |= {name: _plain(measured(result, metric)) for metric, name in ours.items()}
            line |= {theirs[metric]: _plain(value) for metric, value in row.published.items()}
            line["measured_best_validation"] = result.get("best_validation", "")
            line |= {"measured_difference": gap, "published_difference": row.published_gap}
            writer.writerow(line)
    return out.getvalue()


def _plain(value: float | None) -> float | int | None:
    """A whole number without its decimal point; csv writes None as nothing."""
    return int(value) if value is not None and value.is_integer() and abs(value) < 2**53 else value
