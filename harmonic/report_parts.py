"""What the reports' pages are made of: text, tables, sections, and cards with a player and pictures of its sound."""

from __future__ import annotations

import base64
import html
import io
import math
from pathlib import Path
from typing import Any
from urllib.parse import quote

import soundfile

from harmonic import audio
from harmonic.errors import UserError
from harmonic.report_plots import percent, spectrogram_png, waveform_svg

Json = dict[str, Any]
EMBEDDED = 16 << 20  # bytes of sound that a page carries, at most (a third more as text): 15 minutes of music or so
_SHORT = 2.0  # seconds of sounds that stay WAV: Chromium cannot play FLAC of a single frame (4,096 samples)


class Room:
    """How much sound a page still takes."""

    def __init__(self, size: int = EMBEDDED):
        self.left = size

    def takes(self, content: bytes) -> bool:
        """Whether this still fits, which uses the room up."""
        fits = len(content) <= self.left
        self.left -= len(content) * fits
        return fits


# Everything that comes from a file goes through text() or is a number.


def text(value: object) -> str:
    return html.escape(str(value))


def count(value: object) -> str:
    number = isinstance(value, int | float) and math.isfinite(value)
    return f"{value:,.0f}" if number else "" if value is None else str(value)


def duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def table(caption: str, head: list[str], rows: list[list[str]], ours: int | None = None) -> str:
    """A table of plain text; every column but the first holds figures, row `ours` stands out."""
    if not rows:
        return ""
    titles = "".join(f'<th scope="col">{text(title)}</th>' for title in head)
    lines = []
    for index, (first, *rest) in enumerate(rows):
        kind = ' class="ours"' if index == ours else ""
        cells = "".join(f"<td>{text(cell)}</td>" for cell in rest)
        lines.append(f'<tr{kind}><th scope="row">{text(first)}</th>{cells}</tr>\n')
    return (
        f'<div class="table"><table>\n<caption>{text(caption)}</caption>\n'
        f"<thead><tr>{titles}</tr></thead>\n<tbody>\n{''.join(lines)}</tbody>\n</table></div>\n"
    )


def block(title: str, body: str) -> str:
    return f"<section>\n<h2>{title}</h2>\n{body}</section>\n"


def section(mapping: Json, key: str) -> Json:
    """An object within an object; {} where there is none."""
    value = mapping.get(key)
    return value if isinstance(value, dict) else {}


def number(mapping: Json, key: str) -> float | None:
    """A finite number within an object; None where there is none."""
    value = mapping.get(key)
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def card(folder: Path, entry: Json, room: Room | None = None, *, again: str = "run the generate stage again") -> str:
    """A player with the waveform and the log-mel spectrogram below it.

    Args:
      folder: where the sound is, a direct child of the page's own.
      entry: {"file"}, and as far as known "label", "source", "bits_per_sample", "distance" (dB), and for a "kind" of
        continuation "prompt_seconds".
      room: on the page; a sound that does not fit is linked to instead. None for any size.
      again: what makes the files anew.

    Raises:
      UserError: the file is not in the folder, or cannot be read.
    """
    name = entry.get("file")
    if not isinstance(name, str) or name in ("", ".", "..") or set(name) & set("/\\\0"):
        listing = folder / "samples.json" if folder.name == "samples" else f"{folder}.json"
        raise UserError(f"{listing} names the file {name!r}, which is not a plain name inside that folder; {again}")
    path = folder / name
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}); {again}") from error
    waveform, rate = audio.read_audio(io.BytesIO(content), name=str(path))
    seconds = len(waveform) / rate
    facts = [f"{seconds:.2f} s"]
    for key, form in (("bits_per_sample", "{:.3f} bits per sample"), ("distance", "{:.2f} dB apart")):
        if (value := number(entry, key)) is not None:
            facts.append(form.format(value))
    title = text(entry.get("label") or Path(name).stem.replace("_", " "))
    origin = str(entry.get("source") or name)
    prompt = (number(entry, "prompt_seconds") or 0.0) if entry.get("kind") == "continuation" else 0.0
    mark = label = ""
    if prompt > 0:
        left = percent(prompt / seconds)
        mark = f'<i class="mark" style="left:{left}"></i>'
        label = f'<b style="left:{left}">{prompt:.2f} s</b>'
        origin = f"Prompt: {origin}"
    kind, content = _compressed(content)
    if room is None or room.takes(content):
        player = (
            f'<audio controls preload="metadata" aria-label="{title}" '
            f'src="data:audio/{kind};base64,{base64.b64encode(content).decode()}"></audio>'
        )
    else:
        link = f"{quote(folder.name)}/{quote(name)}"
        player = f'<p class="beside">Too long for this page: <a href="{link}">{text(link)}</a>, beside it.</p>'
    return (
        f'<figure class="card">\n<figcaption><strong>{title}</strong><span>{text(" · ".join(facts))}</span>'
        f"</figcaption>\n{player}\n"
        f'<div class="views">{waveform_svg(waveform, prompt / seconds)}<img alt="Log-mel spectrogram" '
        f'src="data:image/png;base64,{spectrogram_png(waveform, rate)}">{mark}'
        f'<i class="playhead"></i></div>\n<div class="axis"><span>0</span>{label}'
        f'<span>{seconds:.2f} s</span></div>\n<p class="origin">{text(origin)}</p>\n</figure>\n'
    )


def _compressed(content: bytes) -> tuple[str, bytes]:
    """A sound's type and bytes, losslessly compressed where that is smaller, and worth it."""
    info = soundfile.info(io.BytesIO(content))
    if info.subtype == "PCM_16" and info.duration >= _SHORT:
        samples, rate = soundfile.read(io.BytesIO(content), dtype="int16")
        flac = io.BytesIO()
        soundfile.write(flac, samples, rate, format="FLAC", subtype="PCM_16")
        if len(flac.getvalue()) < len(content):
            return "flac", flac.getvalue()
    return info.format.lower(), content
