"""A study's page, study.html: one file that opens offline, but for its links to the runs' own reports beside it."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import math
from pathlib import Path
from typing import Any
from urllib.parse import quote

from harmonic.report_page import SCRIPT, STYLE
from harmonic.report_parts import Room, block, card, table, text
from harmonic.report_plots import Chart, percent, spread, ticks

Json = dict[str, Any]

_LINES = 7  # kinds of line: a colour each, and a pattern for who cannot tell colours apart
_STUDY_STYLE = """
:root { --s0: #0b6e69; --s1: #b8501c; --s2: #3c5fb0; --s3: #8a3ea8; --s4: #6b7a1e; --s5: #a8324a; --s6: #4d4d55; }
@media (prefers-color-scheme: dark) {
  :root { --s0: #55c7bf; --s1: #f0965a; --s2: #8fb0ff; --s3: #d39bf0; --s4: #c4d16a; --s5: #ff8fa3; --s6: #c8c8d0; }
}
.chart svg .curve { stroke-width: 2; }
.legend .curve::before { content: none; }
.legend svg { width: 30px; height: 8px; margin-right: 7px; vertical-align: middle; fill: none; stroke-width: 2; }
.findings { max-width: 44em; margin: 16px 0 0; padding-left: 1.2em; }
.gaps { display: grid; grid-template-columns: minmax(7em, auto) 1fr; gap: 12px 20px; align-items: center;
  margin: 0 0 8px; font-size: 14px; overflow-wrap: normal; }
.gaps svg { display: block; width: 100%; height: 28px; overflow: visible; }
.gaps .zero { stroke: var(--line); stroke-width: 2; }
.gaps .ours { fill: var(--accent); stroke: var(--accent); stroke-width: 2; }
.gaps .theirs { fill: none; stroke: var(--warm); stroke-width: 2.5; }
.gaps .scale { position: relative; height: 18px; color: var(--soft); font-size: 12px; }
.gaps .scale span { position: absolute; transform: translateX(-50%); white-space: nowrap; }
.legend .k-ours::before { width: 9px; height: 9px; border: 0; border-radius: 50%; background: var(--accent); }
.legend .k-theirs::before { width: 9px; height: 9px; border: 2.5px solid var(--warm); border-radius: 50%; }
td a { color: var(--accent); }
.table td, .table th { vertical-align: top; }
""" + "".join(
    f".s{i} {{ stroke: var(--s{i});{f' stroke-dasharray: {dash};' if dash else ''} }}\n"
    for i, dash in enumerate(("", "7 4", "2 3", "10 3 2 3", "14 4", "4 2", "1 4"))
)


@dataclasses.dataclass(frozen=True)
class Dot:
    """Bits per sample of a run, less the baseline's where there is one: the least, mean and greatest over seeds, and as
    published."""

    title: str
    measured: tuple[float, float, float]
    published: float | None


def study_html(
    folder: Path,
    study: Json,
    tables: list[tuple[str, list[str], list[list[str]]]],
    dots: list[Dot],
    states: list[tuple[str, str, Json]],
    findings: list[str],
    notes: list[str],
) -> str:
    """The page.

    Args:
      folder: of the study; the runs' folders lie in it.
      study: study.json.
      tables: (caption, head, rows) of text.
      dots: what the figure shows.
      states: (title of a run, its state, its result in study.json), one for each run and seed.
      findings, notes: sentences, for the head of the page and for below the tables.

    Raises:
      UserError: a clip cannot be read.
    """
    base = next((run["title"] for run in study["runs"] if run["name"] == study["baseline"]), "")
    likelihood, *others = (table(*one) for one in tables)
    said = "".join(f"<li>{text(sentence)}</li>\n" for sentence in findings)
    where = f"HarmonicRNN study · {study['reproduces']} · {study['size']} size"
    below = "".join(f'<p class="fine">{text(note)}</p>\n' for note in notes)
    sections = [
        f'<header>\n<p class="eyebrow">{text(where)}</p>\n<h1>{text(study["title"])}</h1>\n'
        f'<ul class="findings">\n{said}</ul>\n</header>\n',
        block("Likelihood, beside the paper", _dots(dots, base) + f'<div class="below wide">{likelihood}</div>\n'),
        block("Learning", _curves(study)),
        block("Figures", f'<div class="tables">\n{"".join(others)}</div>\n{below}'),
        block("Listening", _clips(folder, states)),
        block("Runs", _runs(states)),
        block("Reproduce", f"<pre><code>{text(study['command'])}</code></pre>\n"),
    ]
    script = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = "default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'; "
    policy += f"script-src 'sha256-{script}'"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{text(study['title'])}: HarmonicRNN study</title>\n<style>{STYLE}{_STUDY_STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n{''.join(sections)}</main>\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def _dots(dots: list[Dot], base: str) -> str:
    """Dots on one scale, a row for each run; left of the baseline's line where it needs fewer bits."""
    if not dots:
        return ""
    values = [0.0] * bool(base) + [value for dot in dots for value in dot.measured]
    values += [dot.published for dot in dots if dot.published is not None]
    room = max(max(values) - min(values), 0.01)
    low, high = min(values) - 0.12 * room, max(values) + 0.12 * room
    sign = "+" if base else ""

    def at(value: float) -> str:
        return percent((value - low) / (high - low))

    body = ""
    for dot in dots:
        least, mean, most = dot.measured
        drawn = f'<line class="zero" x1="{at(0)}" x2="{at(0)}" y1="0" y2="28"/>' if base else ""
        if dot.published is not None:
            drawn += f'<circle class="theirs" cx="{at(dot.published)}" cy="14" r="7"/>'
        drawn += f'<line class="ours" x1="{at(least)}" x2="{at(most)}" y1="14" y2="14"/>'
        drawn += f'<circle class="ours" cx="{at(mean)}" cy="14" r="4"/>'
        told = "" if dot.published is None else f", published {dot.published:{sign}.3f}"
        label = text(f"{dot.title}: measured {mean:{sign}.3f}{told}")
        body += f'<span>{text(dot.title)}</span><svg role="img" aria-label="{label}">{drawn}</svg>\n'
    marks = "".join(
        f'<span style="left:{at(tick)}">{f"{tick:{sign}.4g}" if abs(tick) > 1e-9 else "0"}</span>'
        for tick in ticks(low, high, 4)
    )
    legend = '<span class="k-ours">measured'
    legend += ", from the least to the greatest over seeds" if any(d.measured[0] < d.measured[2] for d in dots) else ""
    legend += "</span>"
    legend += '<span class="k-theirs">published</span>' if any(d.published is not None for d in dots) else ""
    less = f" less those of the baseline ({text(base)}): left of the line is better" if base else ": left is better"
    return (
        f'<p class="legend">{legend}</p>\n<div class="gaps">\n{body}<span></span>'
        f'<div class="scale">{marks}</div>\n</div>\n<p class="fine">Test bits per sample{less}.</p>\n'
    )


def _curves(study: Json) -> str:
    curves = [
        (index % _LINES, result["validation"])
        for index, run in enumerate(study["runs"])
        for result in run["results"]
        if len(result.get("validation", [])) > 1
    ]
    if not curves:
        return '<p class="fine">No run has been validated twice yet.</p>\n'
    right = max(curve[-1][0] for _, curve in curves)
    # The first losses lie far above everything else, and would squash what is compared.
    late = [bits for _, curve in curves for step, bits in curve if step >= 0.2 * right]
    late = late or [bits for _, curve in curves for _, bits in curve]
    low, high = min(late), max(late)
    low, high = low - 0.05 * (high - low) - 0.005, high + 0.05 * (high - low) + 0.005
    chart = Chart((0.0, 1.02 * right), (low, high))
    chart.axes([tick for tick in ticks(0.0, 1.02 * right, 5) if tick == round(tick)], ticks(low, high, 6))
    for index, curve in curves:
        inside = [point for point in curve if point[1] <= high]
        first = len(curve) - len(inside)
        if first:  # where the line comes in at the top
            (a, above), (b, below) = curve[first - 1], curve[first]
            inside.insert(0, [a + (b - a) * (above - high) / (above - below), high])
        chosen = [inside[i] for i in spread(len(inside), 300)]
        chart.line([step for step, _ in chosen], [bits for _, bits in chosen], f"curve s{index}")
    legend = "".join(
        f'<span class="curve"><svg aria-hidden="true"><path class="s{i % _LINES}" d="M0 4H30"/></svg>'
        f"{text(run['title'])}</span>"
        for i, run in enumerate(study["runs"])
        if any(len(result.get("validation", [])) > 1 for result in run["results"])
    )
    drawn = chart.html("Validation loss in bits per sample against the training step, for each run", "training step")
    seeds = f" Each run has a line for each of {len(study['seeds'])} seeds." if len(study["seeds"]) > 1 else ""
    note = f"Validation loss of the averaged weights. The first losses may lie above the picture.{seeds}"
    return f'<p class="legend">{legend}</p>\n{drawn}<p class="fine">{note}</p>\n'


def _clips(folder: Path, states: list[tuple[str, str, Json]]) -> str:
    cards, room, again = "", Room(), "give the study's command again"
    for title, _, result in states:
        if result.get("clip"):
            label = f"{title}, seed {result['seed']}"
            cards += card(folder / result["folder"] / "samples", {**result["clip"], "label": label}, room, again=again)
    if not cards:
        return '<p class="fine">Nothing has been generated yet.</p>\n'
    said = "The first clip of each run, from nothing but the model."
    return f'<p class="fine">{said}</p>\n<div class="cards">\n{cards}</div>\n'


def _runs(states: list[tuple[str, str, Json]]) -> str:
    lines = ""
    for title, state, result in states:
        path = quote(f"{result['folder']}/report.html")
        link = f'<a href="{path}">report</a>' if state == "done" else ""
        step, last = result.get("step"), result.get("validation")
        at = f"best at step {step:,} of {result['steps']:,}" if isinstance(step, int) and math.isfinite(step) else ""
        at = at or (f"step {last[-1][0]:,} of {result['steps']:,}" if last else "")
        why = f": {text(result['error'])}" if result.get("error") else ""
        lines += (
            f'<tr><th scope="row">{text(title)}</th><td>{result["seed"]}</td><td>{state}{why}</td>'
            f"<td>{at}</td><td>{link}</td></tr>\n"
        )
    head = "".join(f'<th scope="col">{name}</th>' for name in ("Run", "Seed", "State", "Step", "Report"))
    return f'<div class="table"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{lines}</tbody>\n</table></div>\n'
