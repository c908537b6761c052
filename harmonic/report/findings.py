"""What was found of a run's generated clips, for its report: how they sound, perceptual figures, nearest excerpts."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

from harmonic import published
from harmonic.report.charts import Chart, spread, ticks
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
_SOUNDS = (  # key in sound.json, heading
    ("generated", "Generated"),
    ("train", "Training recordings"),
    ("held_out", "Held-out recordings"),
    ("shaped_noise", "Noise with their mean spectrum"),
    ("white_noise", "White noise"),
)
_SOUND_FIGURES = (  # key of a row in sound.json, heading, form
    ("frames", "Frames", ",.0f"),
    ("level_db", "Level, dB", ".1f"),
    ("peaks", "Energy in peaks", ".1%"),
    ("silence", "Silence", ".1%"),
    ("onsets_per_second", "Onsets a second", ".2f"),
)
_QUANTILES = ("0", "0.05", "0.25", "0.5", "0.75")


def sound(found: Json) -> Json | None:
    """The figures of sound.json: distances, what else is heard, the drift, and the choice of temperature and top-p."""
    every = section(found, "rows")
    floor, ceiling = (number(every, name, "distance") for name in ("train", "shaped_noise"))
    rows: list[list[str]] = []
    ours: int | None = None
    for key, title in _SOUNDS:
        row = section(every, key)
        if not row:
            continue
        distance, least, greatest = (number(row, name) for name in ("distance", "least", "greatest"))
        shown = "" if distance is None else f"{distance:,.0f}"
        if least is not None and greatest is not None:
            shown += f" ({least:,.0f} to {greatest:,.0f})"
        share = ""
        if distance is not None and floor is not None and ceiling is not None and ceiling > floor:
            share = f"{(distance - floor) / (ceiling - floor):.2f}"
        values = [(number(row, name), form) for name, _, form in _SOUND_FIGURES]
        ours = len(rows) if key == "generated" else ours
        rows.append([title, shown, share, *("" if value is None else format(value, form) for value, form in values)])
    choice = _choice(section(found, "choice"))
    if not rows and choice is None:
        return None
    phrases = (
        ("step", "step {:,.0f}"),
        ("clips", "{:,.0f} clips"),
        ("clip_seconds", "each of {:g} s"),
        ("temperature", "temperature {:g}"),
        ("top_p", "top_p {:g}"),
        ("seed", "seed {:g}"),
    )
    notes = found.get("notes")
    return {
        "share": number(found, "share"),
        "split": str(found.get("split", "test")),
        "head": ["Clips", "Distance, dB²", "Share of the way", *(title for _, title, _ in _SOUND_FIGURES)],
        "rows": rows,
        "ours": ours,
        "facts": [form.format(value) for key, form in phrases if (value := number(found, key)) is not None],
        "notes": [str(note) for note in notes] if isinstance(notes, list) else [],
        "drift": _drift(objects(found.get("drift"))),
        "longer": _longer(section(found, "longer")),
        "choice": choice,
    }


def _drift(found: list[Json]) -> Chart | None:
    """Bits per sample by the second of the clip, of generated clips and of held-out recordings."""
    lines: list[list[tuple[float, float]]] = []
    right = 0.0
    for name in ("generated", "held_out"):
        line = []
        for row in found:
            start, stop, bits = (number(row, key) for key in ("start", "stop", name))
            if start is not None and stop is not None and bits is not None:
                line.append(((start + stop) / 2, bits))
                right = max(right, stop)
        lines.append(line)
    if len(lines[0]) < 2:
        return None
    values = [bits for line in lines for _, bits in line]
    margin = 0.15 * (max(values) - min(values)) + 0.02
    low, high = min(values) - margin, max(values) + margin
    chart = Chart((0.0, right), (low, high))
    chart.axes([float(f"{tick:.6g}") for tick in ticks(0.0, right, 8)], ticks(low, high, 4))
    for line, kind in zip(lines, ("smooth", "base"), strict=True):
        chart.line([at for at, _ in line], [bits for _, bits in line], kind)
    return chart


def _longer(found: Json) -> Json | None:
    """Streams beyond the clips' end: the verdict, and some of the stretches."""
    names = ("start", "stop", "level_db", "bits_per_sample")
    every = [[number(row, name) for name in names] for row in objects(found.get("rows"))]
    rows = [
        [f"{start:.3g} to {stop:.3g} s", f"{level:.1f}", f"{bits:.3f}"]
        for start, stop, level, bits in every
        if start is not None and stop is not None and level is not None and bits is not None
    ]
    seconds, streams = number(found, "seconds"), number(found, "streams")
    if not rows or seconds is None or streams is None:
        return None
    most = [number(found, "most", name) for name in names[2:]]
    level, bits = most
    last = [] if level is None or bits is None else [["Away is above", f"{level:.1f}", f"{bits:.3f}"]]
    return {
        "verdict": str(found.get("verdict", "")),
        "caption": f"{streams:.0f} streams of {seconds:.3g} s, stretch by stretch",
        "head": ["Stretch", "Level, dB", "Bits per sample"],
        "rows": [rows[i] for i in spread(len(rows), 9)] + last,
    }


def _choice(found: Json) -> Json | None:
    names = ("temperature", "top_p", "distance", "share", "bits_per_sample")
    best = [number(found, "recommended", name) for name in names[:2]]
    rows: list[list[str]] = []
    ours: int | None = None
    for row in objects(found.get("rows")):
        values = [number(row, name) for name in names]
        ours = len(rows) if None not in best and values[:2] == best else ours
        forms = ("g", "g", ",.0f", ".3f", ".3f")
        rows.append(["" if value is None else format(value, form) for value, form in zip(values, forms, strict=True)])
    if not rows:
        return None
    step = number(found, "step")
    return {
        "head": ["Temperature", "Top-p", "Distance, dB²", "Share of the way", "Bits per sample"],
        "rows": rows,
        "ours": ours,
        "split": str(found.get("split", "validation")),
        "best": best if ours is not None else None,
        "alike": number(found, "recommended", "alike"),
        "step": step,
    }


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
