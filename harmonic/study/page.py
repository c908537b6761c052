"""A study's page, study.html: one file that opens offline, except for its links to the runs' own reports beside it."""

from __future__ import annotations

import math
from pathlib import Path

from harmonic.report.charts import Chart, percent, spread, ticks
from harmonic.report.inputs import Json
from harmonic.report.page import Player, SoundBudget, player, render
from harmonic.study.results import base_title, findings, model_names, notes, rows, state
from harmonic.study.tables import tables

_CURVES = 7  # kinds of line in study.css: a colour and a dash pattern each, for those who cannot tell colours apart


def study_page(folder: Path, study: Json) -> bytes:
    """The page.

    Args:
      folder: of the study, with its runs' folders in it.
      study: study.json.

    Raises:
      UserError: a clip cannot be read.
    """
    return render(
        "study.html.j2",
        study=study,
        model=model_names(study),
        base=base_title(study),
        findings=findings(study),
        notes=notes(study),
        tables=tables(study),
        gaps=_gaps(study),
        curves=_curves(study),
        players=_players(folder, study),
        runs=[_run(row.title, result) for row in rows(study) for result in row.results],
    )


def _gaps(study: Json) -> Json | None:
    """Dots on one scale, a row for each run: bits per sample, less the baseline's if there is one."""
    sign = "+" if study["baseline"] else ""
    found = []
    for row in rows(study):
        stat = row.gap if study["baseline"] else row.measured.get("bits")
        if stat is not None:
            found.append((row.title, stat, row.published_gap if study["baseline"] else row.published.get("bits")))
    if not found:
        return None
    values = [0.0] * bool(study["baseline"]) + [value for _, stat, _ in found for value in (stat.low, stat.high)]
    values += [printed for _, _, printed in found if printed is not None]
    margin = 0.12 * max(max(values) - min(values), 0.01)
    low, high = min(values) - margin, max(values) + margin

    def at(value: float) -> str:
        return percent((value - low) / (high - low))

    return {
        "rows": [
            {
                "title": title,
                "label": f"{title}: measured {stat.mean:{sign},.3f}"
                + (f", published {printed:{sign}.3f}" if printed is not None else ""),
                "low": at(stat.low),
                "mean": at(stat.mean),
                "high": at(stat.high),
                "published": None if printed is None else at(printed),
            }
            for title, stat, printed in found
        ],
        "zero": at(0.0) if study["baseline"] else None,
        "scale": [(at(tick), f"{tick:{sign}.4g}" if abs(tick) > 1e-9 else "0") for tick in ticks(low, high, 4)],
        "several": any(stat.spread for _, stat, _ in found),
        "published": any(printed is not None for _, _, printed in found),
    }


def _curves(study: Json) -> Json | None:
    """The validation losses of every run and seed, and (class, title) of each run for the legend."""
    curves, legend = [], []
    for index, run in enumerate(study["runs"]):
        kind = f"s{index % _CURVES}"
        found = [result["validation"] for result in run["results"] if len(result.get("validation", [])) > 1]
        curves += [(kind, curve) for curve in found]
        legend += [(kind, run["title"])] if found else []
    if not curves:
        return None
    right = max(curve[-1][0] for _, curve in curves)
    # The first losses are far above everything else, and would squash the part that is compared.
    late = [bits for _, curve in curves for step, bits in curve if step >= 0.2 * right]
    late = late or [bits for _, curve in curves for _, bits in curve]
    low, high = min(late), max(late)
    low, high = low - 0.05 * (high - low) - 0.005, high + 0.05 * (high - low) + 0.005
    chart = Chart((0.0, 1.02 * right), (low, high))
    chart.axes([tick for tick in ticks(0.0, 1.02 * right, 5) if tick == round(tick)], ticks(low, high, 6))
    for kind, curve in curves:
        inside = [point for point in curve if point[1] <= high]
        first = len(curve) - len(inside)
        if first:  # the line enters the picture at its upper edge
            (a, above), (b, below) = curve[first - 1], curve[first]
            inside.insert(0, [a + (b - a) * (above - high) / (above - below), high])
        chosen = [inside[i] for i in spread(len(inside), 300)]
        chart.line([step for step, _ in chosen], [bits for _, bits in chosen], f"curve {kind}")
    return {"chart": chart, "legend": legend}


def _players(folder: Path, study: Json) -> list[Player]:
    budget, again = SoundBudget(), "give the study's command again"
    return [
        player(
            folder / result["folder"] / "samples",
            {**result["clip"], "label": f"{run['title']}, seed {result['seed']}"},
            budget,
            again=again,
        )
        for run in study["runs"]
        for result in run["results"]
        if result.get("clip")
    ]


def _run(title: str, result: Json) -> Json:
    step, last = result.get("step"), result.get("validation")
    at = f"best at step {step:,} of {result['steps']:,}" if isinstance(step, int) and math.isfinite(step) else ""
    return {
        "title": title,
        "seed": result["seed"],
        "state": state(result),
        "error": result.get("error"),
        "step": at or (f"step {last[-1][0]:,} of {result['steps']:,}" if last else ""),
        "link": f"{result['folder']}/report.html",
    }
