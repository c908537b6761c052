"""What other commands found of a run, for its report: perceptual figures, and the nearest training excerpts."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

from harmonic import published
from harmonic.report.inputs import Json, number, objects, section
from harmonic.report.page import Player, SoundBudget, player

_FIGURES = (  # key in perceptual.json, heading, digits
    ("fid", "FID", 2),
    ("is", "IS", 2),
    ("is_released", "IS, released code", 2),
    ("mis", "mIS", 2),
    ("am", "AM", 3),
)
_PUBLISHED = (  # name in harmonic.published, heading, digits
    ("fid", "FID", 2),
    ("inception_score", "IS", 2),
    ("mis", "mIS", 2),
    ("am", "AM", 3),
)
_ROWS = (  # key in perceptual.json, heading
    ("generated", "Generated"),
    ("rejected", "Generated, without the most and the least likely"),
    ("train", "Real: training split"),
    ("test", "Real: test split"),
    ("white_noise", "White noise"),
)
_GROUPS = (  # key in nearest.json, heading
    ("generated", "Generated"),
    ("held_out", "Held-out recordings"),
    ("copies", "Copies of training excerpts"),
)
_QUANTILES = ("0", "0.05", "0.25", "0.5", "0.75")


def perceptual(found: Json, dataset: str) -> Json | None:
    """The figures of perceptual.json, beside those published for the same data set."""
    rows: list[list[str]] = []
    ours: int | None = None
    for key, title in _ROWS:
        row = section(found, key)
        cells = _cells(_FIGURES, functools.partial(number, row))
        if any(cells):
            ours = len(rows) if key == "generated" else ours
            clips = number(row, "clips") or number(row, "kept")
            rows.append([title, f"{clips:,.0f}" if clips else "", *cells])
    if not rows:
        return None
    theirs = [
        [row.title, *cells]
        for row in published.RESULTS
        if row.dataset == dataset and any(cells := _cells(_PUBLISHED, row.value))
    ]
    return {
        "head": ["Clips", "Number", *(title for _, title, _ in _FIGURES)],
        "rows": rows,
        "ours": ours,
        "step": number(found, "step"),
        "temperature": number(found, "temperature"),
        "published_head": ["Model", *(title for _, title, _ in _PUBLISHED)],
        "published": theirs,
    }


def _cells(figures: tuple[tuple[str, str, int], ...], value_of: Callable[[str], float | None]) -> list[str]:
    values = [(value_of(name), digits) for name, _, digits in figures]
    return ["" if value is None else f"{value:,.{digits}f}" for value, digits in values]


def nearest(folder: Path, found: Json, samples: Json, budget: SoundBudget) -> Json | None:
    """Memorised or composed? The figures of nearest.json, and its nearest pairs; their sounds are in `folder`."""
    groups, seconds = section(found, "groups"), number(found, "seconds")
    if not groups or seconds is None:
        return None
    rows = []
    for key, title in _GROUPS:
        group = section(groups, key)
        if group:
            values = [number(group, "quantiles", q) for q in _QUANTILES]
            share, excerpts = number(group, "as_near_as_a_copy"), number(group, "excerpts") or 0
            cells = ["" if value is None else f"{value:.2f}" for value in values]
            rows.append([title, f"{excerpts:,.0f}", *cells, "" if share is None else f"{share:.1%}"])
    recordings, compared = (number(found, "training", name) or 0 for name in ("recordings", "compared"))
    step = number(found, "step")
    pairs = [
        (title, [_pair(folder, row, budget) for row in objects(found.get(key)) if row.get("file")])
        for key, title in _GROUPS[:2]
    ]
    return {
        "seconds": seconds,
        "share": number(groups, "generated", "as_near_as_a_copy"),
        "nearer": number(groups, "generated", "nearer_than_held_out"),
        "held_out_share": number(groups, "held_out", "as_near_as_a_copy") or 0,
        "head": [
            "Clips",
            "Excerpts",
            "Least",
            *(f"{100 * float(q):g} %" for q in _QUANTILES[1:]),
            "As close as a copy",
        ],
        "rows": rows,
        "compared": compared,
        "left_out": max(recordings - compared, 0),
        "other_step": step if number(samples, "step") not in (None, step) else None,
        "pairs": [(title, found) for title, found in pairs if found],
    }


def _pair(folder: Path, row: Json, budget: SoundBudget) -> list[Player]:
    theirs = section(row, "nearest")
    ours = {
        "file": row.get("file"),
        "label": "Generated" if row.get("split") is None else f"Held-out, {row['split']}",
        "source": f"{row.get('clip')}, from {number(row, 'start') or 0:.2f} s",
        "distance": number(theirs, "distance"),
    }
    nearest_one = {
        "file": row.get("nearest_file"),
        "label": "Nearest in training",
        "source": f"{theirs.get('recording')}, from {number(theirs, 'recording_start') or 0:.2f} s",
    }
    again = "run python -m workflows.nearest again"
    return [player(folder, entry, budget, again=again) for entry in (ours, nearest_one)]
