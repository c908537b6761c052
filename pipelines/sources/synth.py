"""A data set that needs no network: real tunes, played by a small piano-like instrument.

The tunes are melodies in the public domain, written below as text, most with a simple left hand.
The instrument adds a dozen decaying partials a note, with no noise and no reverberation, so that
a model small enough to train in minutes has something it can learn. Everything is a pure function
of this file: every run and every worker makes the same recordings.

    recording = recordings()[0]
    audio = render_recording(recording)   # float32 [128000], 8 seconds at 16 kHz

The notation: `C#5:2` is a pitch (C4 is middle C) and its length in steps, one step if not given;
`R` is a rest, `+` joins the notes of a chord, `|` ends a bar. A tune says how many steps make a
beat. Bars before the first full one hold the upbeat; the last bar is short by as much, so that a
tune can be played round and round.
"""

from __future__ import annotations

import functools
import hashlib
import io
import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import soundfile

from harmonic.audio import SAMPLE_RATE
from pipelines.sources.base import Source, SourceRecording, natural_key

VERSION = 1  # raise it when a change to the code below changes the audio
RECORDING_SECONDS = 8
RECORDING_SAMPLES = RECORDING_SECONDS * SAMPLE_RATE
DEFAULT_COUNT = 96


class Instrument(NamedTuple):
    """The constants of the sound; times in seconds, frequencies in Hz."""

    partials: int = 12
    highest: float = 7000.0  # of any partial: clear of the Nyquist frequency at 8,000
    stiffness: float = 2e-4  # partial n has the frequency n f0 sqrt(1 + stiffness n^2), as on a string
    brightness: float = 1.4  # partial n starts at n^-brightness
    decay: float = 0.8  # nepers a second, first partial of middle C
    decay_per_partial: float = 0.35  # higher partials fade faster, by this fraction each
    decay_by_pitch: float = 0.5  # and higher notes: (f0 / middle C) to this power
    attack: float = 0.004
    release: float = 0.08  # the damper: a note rings on this long after its end
    accents: tuple[float, float, float] = (1.0, 0.85, 0.7)  # on the bar, on a beat, between beats
    left_hand: float = 0.6  # level of all voices but the first


PIANO = Instrument()
PEAK = 0.5  # of a recording
FADE = 0.01  # seconds at the end, so that a recording that stops in a note does not click


@dataclass(frozen=True)
class Tune:
    """A tune as text: `voices` in steps, `steps_per_beat` of them at `tempo` beats a minute."""

    name: str
    title: str
    tempo: int
    steps_per_beat: int
    voices: tuple[str, ...]


def _broken(figure: str, *chords: str) -> str:
    """One bar a chord: the figure, each leading digit replaced by that note of the chord."""
    bars = []
    for chord in chords:
        notes = chord.split("+")
        tokens = (notes[int(t[0])] + t[1:] if t[0].isdigit() else t for t in figure.split())
        bars.append(" ".join(tokens))
    return " | ".join(bars)


_PRELUDE = (
    "C4+E4+G4+C5+E5", "C4+D4+A4+D5+F5", "B3+D4+G4+D5+F5", "C4+E4+G4+C5+E5",
    "C4+E4+A4+E5+A5", "C4+D4+F#4+A4+D5", "B3+D4+G4+D5+G5", "B3+C4+E4+G4+C5",
    "A3+C4+E4+G4+C5", "D3+A3+D4+F#4+C5", "G3+B3+D4+G4+B4",
)  # fmt: skip
_CANON = (
    "D3+A3+D4", "A2+E3+A3", "B2+F#3+B3", "F#2+C#3+F#3",
    "G2+D3+G3", "D3+A3+D4", "G2+D3+G3", "A2+E3+A3",
)  # fmt: skip
_AM, _C, _D, _E = "A2+E3+A3", "C3+G3+C4", "D3+A3+D4", "E2+B2+E3"
_F, _G = "F2+C3+F3", "G2+D3+G3"

TUNES = (
    Tune("ode_to_joy", "Beethoven, Symphony no. 9, Ode to Joy", 112, 1, (
        "E4 E4 F4 G4 | G4 F4 E4 D4 | C4 C4 D4 E4 | E4:1.5 D4:.5 D4:2 |"
        "E4 E4 F4 G4 | G4 F4 E4 D4 | C4 C4 D4 E4 | D4:1.5 C4:.5 C4:2 |"
        "D4 D4 E4 C4 | D4 E4:.5 F4:.5 E4 C4 | D4 E4:.5 F4:.5 E4 D4 | C4 D4 G3:2 |"
        "E4 E4 F4 G4 | G4 F4 E4 D4 | C4 C4 D4 E4 | D4:1.5 C4:.5 C4:2",
        "C3:2 G3:2 | G2:2 G3:2 | C3:2 G3:2 | G2:2 G3:2 |"
        "C3:2 G3:2 | G2:2 G3:2 | C3:2 G3:2 | G2:2 C3:2 |"
        "G2:2 C3:2 | G2:2 C3:2 | G2:2 G#2:2 | A2 D3 G2:2 |"
        "C3:2 G3:2 | G2:2 G3:2 | C3:2 G3:2 | G2:2 C3:2",
    )),
    Tune("twinkle", "Ah vous dirai-je, maman", 108, 1, (
        "C5 C5 G5 G5 | A5 A5 G5:2 | F5 F5 E5 E5 | D5 D5 C5:2 |"
        "G5 G5 F5 F5 | E5 E5 D5:2 | G5 G5 F5 F5 | E5 E5 D5:2 |"
        "C5 C5 G5 G5 | A5 A5 G5:2 | F5 F5 E5 E5 | D5 D5 C5:2",
        "C3 C4 E4 C4 | F4 C4 E4 C4 | D4 B3 C4 A3 | F3 G3 C3:2 |"
        "E4 G3 D4 G3 | C4 G3 B3 G3 | E4 G3 D4 G3 | C4 G3 B3 G3 |"
        "C3 C4 E4 C4 | F4 C4 E4 C4 | D4 B3 C4 A3 | F3 G3 C3:2",
    )),
    Tune("frere_jacques", "Frere Jacques, as a round", 116, 1, (  # the second voice two bars behind
        "C5 D5 E5 C5 | C5 D5 E5 C5 | E5 F5 G5:2 | E5 F5 G5:2 |"
        "G5:.5 A5:.5 G5:.5 F5:.5 E5 C5 | G5:.5 A5:.5 G5:.5 F5:.5 E5 C5 |"
        "C5 G4 C5:2 | C5 G4 C5:2",
        "C4 G3 C4:2 | C4 G3 C4:2 | C4 D4 E4 C4 | C4 D4 E4 C4 | E4 F4 G4:2 | E4 F4 G4:2 |"
        "G4:.5 A4:.5 G4:.5 F4:.5 E4 C4 | G4:.5 A4:.5 G4:.5 F4:.5 E4 C4",
    )),
    Tune("fur_elise", "Beethoven, Fuer Elise WoO 59", 132, 2, (  # the beat is an eighth
        "E5 D#5 | E5 D#5 E5 B4 D5 C5 | A4:2 R C4 E4 A4 | B4:2 R E4 G#4 B4 | C5:2 R E4 E5 D#5 |"
        "E5 D#5 E5 B4 D5 C5 | A4:2 R C4 E4 A4 | B4:2 R E4 C5 B4 | A4:2 R B4 C5 D5 |"
        "E5:3 G4 F5 E5 | D5:3 F4 E5 D5 | C5:3 E4 D5 C5 | B4:2 R E4 E5 R |"
        "R E5 E6 R R D#5 | E5:2 R D#5",
        "R:2 | R:6 | A2 E3 A3 R:3 | E2 E3 G#3 R:3 | A2 E3 A3 R:3 |"
        "R:6 | A2 E3 A3 R:3 | E2 E3 G#3 R:3 | A2 E3 A3 R:3 |"
        "C3 G3 C4 R:3 | G2 G3 B3 R:3 | A2 E3 A3 R:3 | E2 E3 E4 R:2 E4 |"
        "E5 R:2 D#5 E5 R | R D#5 E5 R",
    )),
    Tune("minuet_in_g", "Petzold, Minuet BWV Anh. 114", 112, 2, (
        "D5:2 G4 A4 B4 C5 | D5:2 G4:2 G4:2 | E5:2 C5 D5 E5 F#5 | G5:2 G4:2 G4:2 |"
        "C5:2 D5 C5 B4 A4 | B4:2 C5 B4 A4 G4 | F#4:2 G4 A4 B4 G4 | A4:6 |"
        "D5:2 G4 A4 B4 C5 | D5:2 G4:2 G4:2 | E5:2 C5 D5 E5 F#5 | G5:2 G4:2 G4:2 |"
        "C5:2 D5 C5 B4 A4 | B4:2 C5 B4 A4 G4 | A4:2 B4 A4 G4 F#4 | G4:6",
        "G3+B3+D4:4 A3:2 | B3:6 | C4:6 | B3:6 | A3:6 | G3:6 | D4:2 B3:2 G3:2 | D4:2 D3 C4 B3 A3 |"
        "B3:4 A3:2 | G3:2 B3:2 G3:2 | C4:6 | B3:2 C4 B3 A3 G3 | A3:4 F#3:2 | G3:4 B3:2 |"
        "C4:2 D4:2 D3:2 | G3:4 G2:2",
    )),
    Tune("greensleeves", "Greensleeves", 126, 1, (
        "A4 | C5:2 D5 | E5:1.5 F#5:.5 E5 | D5:2 B4 | G4:1.5 A4:.5 B4 |"
        "C5:2 A4 | A4:1.5 G#4:.5 A4 | B4:2 G#4 | E4:2 A4 |"
        "C5:2 D5 | E5:1.5 F#5:.5 E5 | D5:2 B4 | G4:1.5 A4:.5 B4 |"
        "C5:1.5 B4:.5 A4 | G#4:1.5 F#4:.5 G#4 | A4:3 | A4:3 |"
        "G5:3 | G5:1.5 F#5:.5 E5 | D5:2 B4 | G4:1.5 A4:.5 B4 |"
        "C5:2 A4 | A4:1.5 G#4:.5 A4 | B4:2 G#4 | E4:3 |"
        "G5:3 | G5:1.5 F#5:.5 E5 | D5:2 B4 | G4:1.5 A4:.5 B4 |"
        "C5:1.5 B4:.5 A4 | G#4:1.5 F#4:.5 G#4 | A4:3 | A4:2",
        "R |" + _broken(
            "0 1 2", _AM, _AM, _G, _G, _AM, _AM, _E, _E, _AM, _AM, _G, _G, _AM, _E, _AM, _AM,
            _C, _C, _G, _G, _AM, _AM, _E, _E, _C, _C, _G, _G, _AM, _E, _AM,
        ) + " | A2:2",
    )),
    Tune("prelude_in_c", "Bach, Prelude BWV 846", 72, 4, (
        _broken("R:2 2 3 4 2 3 4 R:2 2 3 4 2 3 4", *_PRELUDE),
        _broken("0:8 0:8", *_PRELUDE),
        _broken("R 1:7 R 1:7", *_PRELUDE),
    )),
    Tune("canon_in_d", "Pachelbel, Canon", 108, 2, (  # two beats are a beat of the score
        "F#5:4 | E5:4 | D5:4 | C#5:4 | B4:4 | A4:4 | B4:4 | C#5:4 |"
        "D5:2 F#5:2 | A5:2 G5:2 | F#5:2 D5:2 | F#5:2 E5:2 |"
        "D5:2 B4:2 | D5:2 A5:2 | G5:2 B5:2 | A5:2 G5:2",
        _broken("0 1 2 1", *_CANON, *_CANON),
    )),
    Tune("sonata_in_c", "Mozart, Sonata K. 545", 100, 4, (
        "C5:8 E5:4 G5:4 | B4:6 C5 D5 C5:4 R:4 | A5:8 G5:4 C6:4 | G5:4 F5:2 E5 F5 E5:4 R:4 |"
        "A4:2 B4 C5 D5 E5 F5 G5 A5 G5 F5 E5 D5 C5 B4 A4 |"
        "G4:2 A4 B4 C5 D5 E5 F5 G5 F5 E5 D5 C5 B4 A4 G4 |"
        "F4:2 G4 A4 B4 C5 D5 E5 F5 E5 D5 C5 B4 A4 G4 F4 |"
        "E4:2 F4 G4 A4 B4 C5 D5 E5 D5 C5 B4 A4 G4 F4 E4",
        "C4:2 G4:2 E4:2 G4:2 C4:2 G4:2 E4:2 G4:2 | D4:2 G4:2 F4:2 G4:2 C4:2 G4:2 E4:2 G4:2 |"
        "C4:2 A4:2 F4:2 A4:2 C4:2 G4:2 E4:2 G4:2 | B3:2 G4:2 D4:2 G4:2 C4:2 G4:2 E4:2 G4:2 |"
        "F4:4 R:8 F3+C4:4 | E3+C4:4 R:8 E3+C4:4 | D3+C4:4 R:8 D3+B3:4 | C3+C4:4 R:8 C3+E3:4",
    )),
    Tune("turkish_march", "Mozart, Rondo alla Turca K. 331", 108, 4, (
        "B4 A4 G#4 A4 | C5:2 R:2 D5 C5 B4 C5 | E5:2 R:2 F5 E5 D#5 E5 |"
        "B5 A5 G#5 A5 B5 A5 G#5 A5 | C6:4 A5:2 C6:2 | B5:2 F#5+A5:2 E5+G5:2 F#5+A5:2 |"
        "B5:2 F#5+A5:2 E5+G5:2 F#5+A5:2 | B5:2 F#5+A5:2 E5+G5:2 D#5+F#5:2 |"
        "E5:4 C5+E5:2 D5+F5:2 | E5+G5:2 E5+G5:2 A5 G5 F5 E5 | B4+D5:4 C5+E5:2 D5+F5:2 |"
        "E5+G5:2 E5+G5:2 A5 G5 F5 E5 | B4+D5:4 A4+C5:2 B4+D5:2 |"
        "C5+E5:2 C5+E5:2 F5 E5 D5 C5 | G#4+B4:4 A4+C5:2 B4+D5:2 |"
        "C5+E5:2 C5+E5:2 F5 E5 D5 C5 | G#4+B4:4",
        "R:4 | A3:2 C4+E4:2 C4+E4:2 C4+E4:2 | A3:2 C4+E4:2 C4+E4:2 C4+E4:2 |"
        "A3:2 C4+E4:2 A3:2 C4+E4:2 | A3:2 C4+E4:2 C4+E4:2 C4+E4:2 |"
        "E3:2 B3+E4:2 B3+E4:2 B3+E4:2 | E3:2 B3+E4:2 B3+E4:2 B3+E4:2 |"
        "E3:2 B3+E4:2 B2:2 B3:2 | E3:4 R:4 | C3:2 C4:2 E3:2 E4:2 | G3:4 R:4 |"
        "C3:2 C4:2 E3:2 E4:2 | G3:4 R:4 | A2:2 A3:2 C3:2 C4:2 | E3:4 R:4 |"
        "A2:2 A3:2 C3:2 C4:2 | E3:4",
    )),
    Tune("lullaby", "Brahms, Wiegenlied op. 49 no. 4", 92, 1, (
        "E4:.5 E4:.5 | G4:1.5 E4:.5 E4 | G4:2 E4:.5 G4:.5 | C5 B4:1.5 A4:.5 | A4 G4 D4:.5 E4:.5 |"
        "F4:1.5 D4:.5 D4:.5 E4:.5 | F4:2 D4:.5 F4:.5 | B4:.5 A4:.5 G4 B4 | C5:2 C4:.5 C4:.5 |"
        "C5:2 A4:.5 F4:.5 | G4:2 E4:.5 C4:.5 | F4 G4 A4 | G4:2 C4:.5 C4:.5 |"
        "C5:2 A4:.5 F4:.5 | G4:2 E4:.5 C4:.5 | F4:.5 G4:.25 F4:.25 E4 D4 | C4:2",
        "R |" + _broken(
            "0 1 2", "C3+E3+G3", "C3+E3+G3", "C3+F3+A3", "C3+E3+G3",
            "G2+D3+G3", "G2+D3+G3", "G2+D3+F3", "C3+E3+G3", "F2+C3+F3", "C3+E3+G3",
            "G2+D3+F3", "C3+E3+G3", "F2+C3+F3", "C3+E3+G3", "G2+D3+F3",
        ) + " | C3:2",
    )),
    Tune("auld_lang_syne", "Auld Lang Syne", 104, 1, (
        "C4 | F4:1.5 F4:.5 F4 A4 | G4:1.5 F4:.5 G4 A4 | F4:1.5 F4:.5 A4 C5 | D5:3 D5 |"
        "C5:1.5 A4:.5 A4 F4 | G4:1.5 F4:.5 G4 A4 | F4:1.5 D4:.5 D4 C4 | F4:3 D5 |"
        "C5:1.5 A4:.5 A4 F4 | G4:1.5 F4:.5 G4 D5 | C5:1.5 A4:.5 A4 C5 | D5:3 D5 |"
        "C5:1.5 A4:.5 A4 F4 | G4:1.5 F4:.5 G4 A4 | F4:1.5 D4:.5 D4 C4 | F4:3",
        "R | F2 C3 F3 C3 | C3 G3 C4 G3 | F2 C3 F3 C3 | Bb2 F3 Bb3 F3 |"
        "F2 C3 F3 C3 | C3 G3 C4 G3 | Bb2 F3 C3 G3 | F2 C3 F3 C3 |"
        "F2 C3 F3 C3 | C3 G3 C4 G3 | F2 C3 F3 C3 | Bb2 F3 Bb3 F3 |"
        "F2 C3 F3 C3 | C3 G3 C4 G3 | Bb2 F3 C3 G3 | F2 C3 F3",
    )),
    Tune("moonlight", "Beethoven, Sonata op. 27 no. 2", 60, 3, (
        _broken("0 1 2 0 1 2 0 1 2 0 1 2", "G#3+C#4+E4", "G#3+C#4+E4") +
        "| A3 C#4 E4 A3 C#4 E4 A3 D4 F#4 A3 D4 F#4 | G#3 B#3 F#4 G#3 C#4 E4 G#3 C#4 D#4 F#3 B#3 D#4"
        "| E3 G#3 C#4 G#3 C#4 E4 G#3 C#4 E4 G#3 C#4 E4",
        "C#3:12 | B2:12 | A2:6 F#2:6 | G#2:6 G#2:6 | C#3:12",
    )),
    Tune("swan_lake", "Tchaikovsky, Swan Lake", 100, 2, (
        "E5:4 A4 B4 C5 D5 | E5:3 C5 E5:3 C5 | E5:3 A4 C5 A4 F4 C5 | A4:4 R D5 C5 B4 |"
        "E5:4 A4 B4 C5 D5 | E5:3 C5 E5:3 C5 | E5:3 A4 C5 A4 F4 C5 | A4:8",
        _broken(
            "0:2 1:2 2:2 3:2", "A2+E3+A3+E3", "A2+E3+A3+E3", "A2+E3+F2+C3", "A2+E3+A3+E3",
            "A2+E3+A3+E3", "A2+E3+A3+E3", "A2+E3+F2+C3", "A2+E3+A3+E3",
        ),
    )),
    Tune("amazing_grace", "Amazing Grace (New Britain)", 96, 1, (
        "D4 | G4:2 B4:.5 G4:.5 | B4:2 A4 | G4:2 E4 | D4:2 D4 |"
        "G4:2 B4:.5 G4:.5 | B4:2 A4 | D5:3 | D5:2 B4 |"
        "D5:2 B4:.5 G4:.5 | B4:2 A4 | G4:2 E4 | D4:2 D4 |"
        "G4:2 B4:.5 G4:.5 | B4:2 A4 | G4:3 | G4:2",
        "R |" + _broken(
            "0 1 2", _G, _G, _C, _G, _G, "A2+E3+A3", _D, _D, _G, _G, _C, _G, "E2+B2+E3", _D, _G,
        ) + " | G2:2",
    )),
    Tune("silent_night", "Gruber, Stille Nacht", 116, 1, (
        "G4:1.5 A4:.5 G4 | E4:3 | G4:1.5 A4:.5 G4 | E4:3 | D5:2 D5 | B4:3 | C5:2 C5 | G4:3 |"
        "A4:2 A4 | C5:1.5 B4:.5 A4 | G4:1.5 A4:.5 G4 | E4:3 |"
        "A4:2 A4 | C5:1.5 B4:.5 A4 | G4:1.5 A4:.5 G4 | E4:3 |"
        "D5:2 D5 | F5:1.5 D5:.5 B4 | C5:3 | E5:3 | C5 G4 E4 | G4:1.5 F4:.5 D4 | C4:3 | C4:2 R",
        _broken(
            "0 1 2", _C, _C, _C, _C, _G, _G, _C, _C, _F, _F, _C, _C, _F, _F, _C, _C,
            _G, _G, _C, _C, _C, _G, _C, _C,
        ),
    )),
)  # fmt: skip

KEYS = (0, 5, -5)  # semitones; a fourth up or down keeps all but one of the notes in use
TEMPI = (1.0, 0.92, 1.08)  # times the tune's own
CLIPS = 2  # of each tune in each key and tempo
# Keys and tempi pair off diagonally, so that the first three variants have each of both once.
VARIANTS = tuple((KEYS[i % 3], TEMPI[(i + i // 3) % 3]) for i in range(9))
MAX_COUNT = len(VARIANTS) * CLIPS * len(TUNES)
_SPLITS = {1: "validation", 2: "test"}  # by place among len(TUNES); all other places are train


class Note(NamedTuple):
    """One note of a score: start and length in beats, MIDI pitch (A4 is 69), level in (0, 1]."""

    start: float
    beats: float
    pitch: int
    velocity: float


class Score(NamedTuple):
    """A parsed tune: its notes, its length and where its bars begin, all in beats."""

    notes: tuple[Note, ...]
    beats: float
    bars: tuple[float, ...]


_PITCH = r"[A-G][#b]?\d"
_TOKEN = re.compile(rf"(R|{_PITCH}(?:\+{_PITCH})*)(?::(\d+|\d*\.\d+))?")
_SEMITONE = {"C": 0, "D": 2, "E": 4, "F": 5, "G": 7, "A": 9, "B": 11, "#": 1, "b": -1}


def midi_pitch(name: str) -> int:
    """The MIDI number of a pitch such as "F#4"; C4 is 60."""
    return 12 * (int(name[-1]) + 1) + sum(_SEMITONE[letter] for letter in name[:-1])


def _parse_voice(tune: str, voice: str) -> tuple[list[tuple[float, float, list[int]]], list[float]]:
    """The (start, length, pitches) of a voice's chords, and its bar lines, all in steps."""
    chords, bars, now = [], [0.0], 0.0
    for token in voice.replace("|", " | ").split():
        if token == "|":
            bars.append(now)
            continue
        match = _TOKEN.fullmatch(token)
        steps = float(match[2] or 1) if match else 0.0
        if match is None or steps == 0:
            raise ValueError(f"tune {tune!r}: cannot read {token!r}; want a note such as 'C#5:2'")
        if match[1] != "R":
            chords.append((now, steps, [midi_pitch(name) for name in match[1].split("+")]))
        now += steps
    return chords, [*bars, now]


@functools.cache
def parse(tune: Tune) -> Score:
    """The score of a tune.

    Raises ValueError, naming the tune, for a note that does not parse and for voices whose bars
    differ in length.
    """
    voices = [_parse_voice(tune.name, voice) for voice in tune.voices]
    bars = voices[0][1]
    for number, (_, other) in enumerate(voices):
        if other != bars:
            raise ValueError(f"tune {tune.name!r}: bars of voice {number} at {other}, not {bars}")
    notes = []
    for number, (chords, _) in enumerate(voices):
        level = PIANO.left_hand if number else 1.0
        for start, steps, pitches in chords:
            since_bar = start - max(bar for bar in bars if bar <= start)
            off_beat = since_bar % tune.steps_per_beat != 0
            accent = PIANO.accents[2 if off_beat else 1 if since_bar else 0]
            beat, beats = start / tune.steps_per_beat, steps / tune.steps_per_beat
            notes += [Note(beat, beats, pitch, level * accent) for pitch in pitches]
    *starts, end = (bar / tune.steps_per_beat for bar in bars)
    return Score(tuple(sorted(notes)), end, tuple(starts))


@functools.lru_cache(maxsize=256)  # some 30 MB; a recording uses about 30 notes
def note_wave(pitch: int, samples: int) -> np.ndarray:
    """A note held for `samples` samples, then damped: float64 [samples + release], read-only."""
    f0 = 440 * 2 ** ((pitch - 69) / 12)
    n = np.arange(1, PIANO.partials + 1)
    hertz = n * f0 * np.sqrt(1 + PIANO.stiffness * n**2)
    n, hertz = n[hertz < PIANO.highest], hertz[hertz < PIANO.highest]
    decay = PIANO.decay * (f0 / 261.63) ** PIANO.decay_by_pitch
    nepers = decay * (1 + PIANO.decay_per_partial * (n - 1))
    rate = (2j * np.pi * hertz - nepers) / SAMPLE_RATE
    # exp(rate t) with t = 256 a + b is an outer product: few exponentials. Summed in a loop, since
    # the last bits of a matrix product depend on the number of threads.
    release = round(PIANO.release * SAMPLE_RATE)
    length, block = samples + release, 256
    coarse = np.exp(np.outer(rate, np.arange(0, length, block)))
    fine = np.exp(np.outer(rate, np.arange(block))) * (n**-PIANO.brightness)[:, None]
    wave = np.zeros((coarse.shape[1], block))
    for slow, fast in zip(coarse, fine, strict=True):
        wave += np.multiply.outer(slow, fast).imag
    wave = wave.ravel()[:length]
    attack = min(round(PIANO.attack * SAMPLE_RATE), samples)
    wave[:attack] *= np.sin(np.linspace(0, np.pi / 2, attack, endpoint=False)) ** 2
    wave[samples:] *= np.linspace(1, 0, release) ** 2
    wave.flags.writeable = False
    return wave


def render(
    score: Score,
    tempo: float,
    transpose: int = 0,
    start_beat: float = 0.0,
    seconds: float | None = None,
) -> np.ndarray:
    """Plays a score: float32 [time] at 16 kHz, not scaled (a loud chord exceeds 1).

    Args:
      score: from `parse`.
      tempo: beats a minute.
      transpose: semitones.
      start_beat: where to begin; notes that began earlier are left out.
      seconds: how long to play, repeating the tune; by default to its end, until the sound has died away.
    """
    if tempo <= 0:
        raise ValueError(f"tempo is {tempo}, must be positive")
    beat = 60 / tempo * SAMPLE_RATE  # in samples
    if seconds is None:
        length = round((score.beats - start_beat) * beat) + round(PIANO.release * SAMPLE_RATE)
        end_beat = score.beats
    else:
        length = round(seconds * SAMPLE_RATE)
        end_beat = start_beat + length / beat
    audio = np.zeros(length)
    for turn in range(int(start_beat // score.beats), int(np.ceil(end_beat / score.beats))):
        for note in score.notes:
            onset = round((turn * score.beats + note.start - start_beat) * beat)
            if 0 <= onset < length:
                wave = note_wave(note.pitch + transpose, round(note.beats * beat))
                wave = wave[: length - onset]
                audio[onset : onset + len(wave)] += note.velocity * wave
    return audio.astype(np.float32)


@dataclass(frozen=True)
class SynthRecording:
    """What to render: eight seconds of a tune from a bar line on, in a key, at a tempo."""

    name: str  # "fur_elise_+5_121_03.wav": tune, semitones, beats a minute, which eight seconds
    split: str  # train, validation or test
    tune: str
    transpose: int
    tempo: int
    start_beat: float


def recordings(count: int | None = None) -> list[SynthRecording]:
    """The first `count` recordings (96 unless told), always the same and in the same order.

    A tune in a key at a tempo is wholly in one split: of every 16 such, one is for validation and
    one for test; their tunes are trained on in other keys. Raises ValueError for a count that is
    not in 1..MAX_COUNT.
    """
    count = DEFAULT_COUNT if count is None else count
    if not 1 <= count <= MAX_COUNT:
        raise ValueError(f"count is {count}, must be from 1 to {MAX_COUNT}")
    places = itertools.product(range(len(VARIANTS)), range(CLIPS), range(len(TUNES)))
    listed = []
    for variant, clip, place in itertools.islice(places, count):
        tune = TUNES[(place + 5 * variant) % len(TUNES)]  # other tunes held out in each variant
        transpose, speed = VARIANTS[variant]
        tempo = round(tune.tempo * speed)
        score = parse(tune)
        # Each variant begins where the last one stopped, so that all of a long tune is played.
        number = variant * CLIPS + clip
        beat = number * RECORDING_SECONDS * tempo / 60 % score.beats
        start_beat = max(bar for bar in score.bars if bar <= beat)
        name = f"{tune.name}_{transpose:+d}_{tempo}_{number:02d}.wav"
        split = _SPLITS.get(place, "train")
        listed.append(SynthRecording(name, split, tune.name, transpose, tempo, start_beat))
    return listed


def render_recording(recording: SynthRecording) -> np.ndarray:
    """The audio of a recording: float32 [128000] in (-1, 1), 16 kHz, peak 0.5."""
    score = parse(next(tune for tune in TUNES if tune.name == recording.tune))
    tempo, start = recording.tempo, recording.start_beat
    audio = render(score, tempo, recording.transpose, start, RECORDING_SECONDS)
    fade = round(FADE * SAMPLE_RATE)
    audio[-fade:] *= np.linspace(1, 0, fade, dtype=np.float32)
    audio *= PEAK / np.max(np.abs(audio))
    # Mixed in float64 and rounded to 16 bits, so that differences between machines' last bits vanish.
    return np.round(audio * 32768) / 32768


def fingerprint() -> str:
    """SHA-256 in hexadecimal of everything that determines the audio: tunes, instrument, variants, version."""
    everything = [VERSION, SAMPLE_RATE, RECORDING_SECONDS, PIANO, PEAK, FADE, CLIPS, VARIANTS]
    text = json.dumps([*everything, [asdict(tune) for tune in TUNES]])
    return hashlib.sha256(text.encode()).hexdigest()


class SynthSource(Source):
    """The demo's recordings: no files and no network."""

    @functools.cached_property
    def _recordings(self) -> dict[str, SynthRecording]:
        return {recording.name: recording for recording in recordings()}

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def list(self) -> Sequence[SourceRecording]:
        return [
            SourceRecording(name, self._recordings[name].split, None, 4 * RECORDING_SAMPLES)
            for name in sorted(self._recordings, key=natural_key)
        ]

    def open(self, recording: str) -> BinaryIO:
        file = io.BytesIO()
        waveform = render_recording(self._recordings[recording])
        soundfile.write(file, waveform, SAMPLE_RATE, format="WAV", subtype="FLOAT")
        file.seek(0)
        return file

    def fingerprint(self) -> str:
        return fingerprint()
