"""Sections of a run's report that other commands bring: perceptual figures, and the nearest training excerpts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harmonic.report_parts import Room, block, card, number, section, table, text

Json = dict[str, Any]

_FIGURES = (
    ("fid", "FID", 2),
    ("is", "IS", 2),
    ("is_released", "IS, released code", 2),
    ("mis", "mIS", 2),
    ("am", "AM", 3),
)
# As published, of SC09; blank where no figure was found.
_PUBLISHED: tuple[tuple[str, dict[str, float]], ...] = (
    ("SaShiMi", {"fid": 1.99, "is": 5.13, "mis": 42.57, "am": 0.74}),
    ("Mamba", {"fid": 0.94, "is": 6.26}),
    ("HarmonicRNN, 128 pooling groups", {"fid": 0.46, "is": 6.46}),
    ("Real training set", {"fid": 0.0, "is": 8.553, "mis": 291.3, "am": 0.157}),
)
_PERCEPTUAL_ROWS = (  # key in perceptual.json: heading
    ("generated", "Generated"),
    ("rejected", "Generated, likeliest and least likely rejected"),
    ("train", "Real: training split"),
    ("test", "Real: test split"),
    ("white_noise", "White noise"),
)
_GROUPS = (
    ("generated", "Generated"),
    ("held_out", "Held-out recordings"),
    ("copies", "Copies of training excerpts"),
)


def perceptual(found: Json, dataset: str) -> str:
    """The table of perceptual.json, beside what was published of the same data set."""
    rows: list[list[str]] = []
    ours = None
    for key, title in _PERCEPTUAL_ROWS:
        row = section(found, key)
        values = [number(row, name) for name, _, _ in _FIGURES]
        if any(value is not None for value in values):
            ours = len(rows) if key == "generated" else ours
            clips = number(row, "clips") or number(row, "kept")
            rows.append([title, f"{clips:,.0f}" if clips else "", *_cells(row)])
    if not rows:
        return ""
    head = ["Clips", "Number", *(title for _, title, _ in _FIGURES)]
    body = table("This run, by a classifier of the same classes", head, rows, ours)
    step, temperature = number(found, "step"), number(found, "temperature")
    made = "" if step is None else f" Generated at step {step:,.0f}"
    made += f", temperature {temperature:g}." if made and temperature is not None else "." if made else ""
    note = (
        "FID (against the training split) and AM: lower is better. IS and mIS: higher is better, as is the variant of "
        f"the released code, which is not bounded by the number of classes.{text(made)}"
    )
    body += f'<p class="fine">{note}</p>\n'
    if dataset == "sc09":
        listed = [figure for figure in _FIGURES if figure[0] != "is_released"]
        published = [[name, *_cells(row, listed)] for name, row in _PUBLISHED]
        titles = ["Model", *(title for _, title, _ in listed)]
        body += f'<div class="below wide">{table("As published", titles, published)}</div>\n'
        body += (
            '<p class="fine">Like for like only on the original recordings with the published classifier, and with the '
            "same rejection.</p>\n"
        )
    return block("Perceptual figures", body)


def _cells(row: Json, figures: Sequence[tuple[str, str, int]] = _FIGURES) -> list[str]:
    values = [(number(row, name), digits) for name, _, digits in figures]
    return ["" if value is None else f"{value:,.{digits}f}" for value, digits in values]


def nearest(folder: Path, found: Json, samples: Json, room: Room) -> str:
    """Memorised or composed? The table of nearest.json, and its nearest pairs to be heard; `folder` has the sounds."""
    groups, seconds = section(found, "groups"), number(found, "seconds")
    if not groups or seconds is None:
        return ""
    quantiles = ("0", "0.05", "0.25", "0.5", "0.75")
    head = ["Clips", "Excerpts", "Least", *(f"{100 * float(q):g} %" for q in quantiles[1:]), "As near as a copy"]
    rows = []
    for key, title in _GROUPS:
        group = section(groups, key)
        if group:
            values = [number(section(group, "quantiles"), q) for q in quantiles]
            share, excerpts = number(group, "as_near_as_a_copy"), number(group, "excerpts") or 0
            cells = ["" if value is None else f"{value:.2f}" for value in values]
            rows.append([title, f"{excerpts:,.0f}", *cells, "" if share is None else f"{share:.1%}"])
    caption = f"Distance to the nearest training excerpt of {seconds:g} s, in dB"
    training = section(found, "training")
    recordings, compared = number(training, "recordings") or 0, number(training, "compared") or 0
    note = (
        "Root mean square difference of log-mel frames, level taken out, to the nearest of all excerpts of "
        f"{compared:,.0f} training recordings, at every hundredth of a second of both. "
    )
    if recordings > compared:
        note += f"{recordings - compared:,.0f} shorter recordings are left out. "
    note += (
        "Held-out recordings are of the validation and test splits: what is new lies about as far as these. Copies are "
        "training excerpts made softer and quantised again: what is known by heart lies about as near as 95 % of these."
    )
    step, shown = number(found, "step"), number(samples, "step")
    if step is not None and shown is not None and step != shown:
        note += f" The clips were those of step {step:,.0f}."
    body = f'<p class="lead small">{text(_verdict(section(groups, "generated"), section(groups, "held_out")))}</p>\n'
    body += f'<div class="below wide">{table(caption, head, rows, 0)}</div>\n<p class="fine">{note}</p>\n'
    for key, title in _GROUPS[:2]:
        pairs = [_pair(folder, row, room) for row in found.get(key) or [] if isinstance(row, dict) and row.get("file")]
        if pairs:
            body += (
                f'<h3 class="pairs-of">{title}, and the nearest in training <small>the {len(pairs)} nearest</small>'
                f'</h3>\n<div class="pairs">\n{"".join(pairs)}</div>\n'
            )
    return block("Memorised or composed?", body)


def _verdict(generated: Json, held_out: Json) -> str:
    share, nearer = number(generated, "as_near_as_a_copy"), number(generated, "nearer_than_held_out")
    if share is None or nearer is None:
        return "There was nothing to compare with."
    held_out_share = number(held_out, "as_near_as_a_copy") or 0
    return (
        f"{share:.1%} of the generated excerpts lie as near to a training recording as a copy would; of the held-out "
        f"recordings' excerpts {held_out_share:.1%} do. {nearer:.1%} lie nearer than 95% of the held-out ones."
    )


def _pair(folder: Path, row: Json, room: Room) -> str:
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
    cards = "".join(card(folder, entry, room, again=again) for entry in (ours, nearest_one))
    return f'<div class="pair">\n{cards}</div>\n'
