"""What all pages share: one HTML file made from templates, which opens offline and loads nothing, and its sounds.

A content security policy in the head keeps the browser from loading anything that is not in the file. The same values
give the same bytes.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import io
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2
import soundfile
from markupsafe import Markup

from harmonic import audio, spectrogram
from harmonic.errors import UserError
from harmonic.report.charts import WAVEFORM_COLUMNS, percent, waveform_paths
from harmonic.report.inputs import Json, number

MOST_SOUND = 16 << 20  # bytes of sound in a page (a third more as base64): 15 minutes of music or so
_SHORT = 2.0  # seconds; shorter sounds stay WAV, since Chromium cannot play FLAC of a single frame (4,096 samples)


def environment(*packages: str) -> jinja2.Environment:
    """Templates in the `templates` of this package, and of others. Text is escaped; a missing value is an error."""
    return jinja2.Environment(
        loader=jinja2.ChoiceLoader([jinja2.PackageLoader(package) for package in (*packages, __package__)]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def render(template: str, **values: Any) -> bytes:
    """A page, from a template in this package's `templates`."""
    pages = environment()
    pages.filters |= {"form": format, "count": count, "duration": duration, "quote": quote}
    # The policy names the script by its hash, so the script is inserted unchanged.
    assert pages.loader is not None
    script = pages.loader.get_source(pages, "page.js")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    pages.globals |= {"script": Markup(script), "script_sha256": digest, "waveform_columns": WAVEFORM_COLUMNS}
    page = pages.get_template(template).render(values)
    # JSON strings may hold lone surrogates, which UTF-8 cannot encode.
    return page.encode("utf-8", "replace")


def count(value: object) -> str:
    """A number as a whole number with separators; "" for None, text as it is."""
    if value is None:
        return ""
    found = number(value)
    return str(value) if found is None else f"{found:,.0f}"


def duration(seconds: float) -> str:
    """Such as `12.3 s`, `86 min`, `3 h 20 min`."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


class SoundBudget:
    """The bytes of sound that a page may still embed."""

    def __init__(self, size: int = MOST_SOUND):
        self._left = size

    def take(self, size: int) -> bool:
        """Whether a sound of that size still fits; if so, its bytes are used up."""
        fits = size <= self._left
        self._left -= size * fits
        return fits


@dataclasses.dataclass(frozen=True)
class Player:
    """A sound with its pictures, as the template `parts.html.j2` shows it.

    Attributes:
      title, facts, origin: text above and below it.
      seconds: its length.
      prompt: seconds of the prompt at its start; 0 without one.
      sound: a data URI; None if the sound is too large for the page.
      link: path from the page to the file.
      waveform: (class, SVG path) of its parts.
      picture: data URI of its spectrogram.
    """

    title: str
    facts: list[str]
    origin: str
    seconds: float
    prompt: float
    sound: str | None
    link: str
    waveform: list[tuple[str, str]]
    picture: str

    @property
    def prompt_end(self) -> str:
        """Where the prompt ends, in CSS."""
        return percent(self.prompt / self.seconds)


def player(
    folder: Path, entry: Json, budget: SoundBudget | None = None, *, again: str = "run the generate stage again"
) -> Player:
    """Reads a sound for a page.

    Args:
      folder: the sound's folder, a direct child of the page's own.
      entry: {"file"}, and as far as known "label", "source", "bits_per_sample", "distance" (dB), and for a "kind" of
        continuation "prompt_seconds".
      budget: of the page; the page links to a sound that does not fit. None for sounds of any size.
      again: how to make the files again, for errors.

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
    prompt = (number(entry, "prompt_seconds") or 0.0) if entry.get("kind") == "continuation" else 0.0
    kind, content = _compressed(content)
    return Player(
        title=str(entry.get("label") or Path(name).stem.replace("_", " ")),
        facts=facts,
        origin=str(entry.get("source") or name),
        seconds=seconds,
        prompt=max(prompt, 0.0),
        sound=_data_uri(f"audio/{kind}", content) if budget is None or budget.take(len(content)) else None,
        link=f"{quote(folder.name)}/{quote(name)}",
        waveform=waveform_paths(waveform, prompt / seconds),
        picture=_data_uri("image/png", spectrogram.png(spectrogram.picture(waveform, rate))),
    )


def _data_uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _compressed(content: bytes) -> tuple[str, bytes]:
    """A sound's type and bytes, as FLAC if that is smaller and the sound is long enough."""
    info = soundfile.info(io.BytesIO(content))
    if info.subtype == "PCM_16" and info.duration >= _SHORT:
        samples, rate = soundfile.read(io.BytesIO(content), dtype="int16")
        flac = io.BytesIO()
        soundfile.write(flac, samples, rate, format="FLAC", subtype="PCM_16")
        if len(flac.getvalue()) < len(content):
            return "flac", flac.getvalue()
    return info.format.lower(), content
