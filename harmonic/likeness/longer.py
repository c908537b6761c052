"""Whether streams that are longer than the clips stay as they begin.

A model that was trained on short windows may fall into loud noise after some seconds, which no clip of a few seconds
shows. A stream runs away when every stretch from some time to its end, two at least, is louder than any stretch of the
recordings, or needs more bits per sample of its own making than any of these. It falls silent when all are quieter.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from harmonic.checkpoint import Trained
from harmonic.data import Dataset, Split
from harmonic.errors import UserError
from harmonic.likeness.clips import Excerpt
from harmonic.likeness.streams import Plan, generate_pieces, slices
from harmonic.voice import Codec

STREAMS, TIMES = 32, 4  # at most, and the length of each over that of a clip
_LOUDER_DB, _MORE_BITS = 3.0, 0.5  # above what the recordings' stretches reach
_SILENT_DB = 30.0  # below the recordings' level
_LASTING = 2  # stretches at a stream's end that have to be so


@dataclasses.dataclass(frozen=True)
class Stretches:
    """Level in dB and bits per sample of every stretch of some sounds, [sounds, stretches]; NaN where there is none."""

    levels: np.ndarray
    bits: np.ndarray


def stretches_of(
    split: Split, places: list[Excerpt], ends: np.ndarray, nats: np.ndarray, counts: np.ndarray
) -> Stretches:
    """Those of recordings, without the ones that a recording's end cuts to less than half.

    Args:
      places: excerpts.
      ends: where stretches end, in samples.
      nats, counts: negative log-likelihood and samples of each, [places, stretches].
    """
    codec, starts = Codec.of(split.manifest), [0, *ends[:-1]]
    whole = 2 * counts >= max(counts.max(initial=0), 1)
    levels = np.full(nats.shape, np.nan)
    for row, (recording, first, _) in enumerate(places):
        for number in np.flatnonzero(whole[row]):
            start = first + starts[number]
            sound = codec.decode(split.read(recording, start, start + int(counts[row, number])))
            levels[row, number] = _level(sound.var(dtype=np.float64))
    return Stretches(levels, np.where(whole, nats / math.log(2) / np.maximum(counts, 1), np.nan))


def measure_longer(
    trained: Trained,
    dataset: Dataset,
    plan: Plan,
    recordings: Stretches,
    temperature: float,
    top_p: float,
    *,
    show_progress: bool = True,
) -> dict[str, Any]:
    """Generates half as many streams as clips, at most 32, of four times their length, and compares their stretches
    with those of recordings.

    Returns:
      What `judge` says, with "rows": by stretch {"start", "stop" (seconds), "level_db", "bits_per_sample"} of all
      streams together.

    Raises:
      UserError: the settings are impossible, or the likelihood is not finite.
    """
    few = dataclasses.replace(plan, clips=min(STREAMS, -(-plan.clips // 2)))
    rate = dataset.manifest.sample_rate
    ends, _ = slices(plan, rate, trained.config, times=TIMES)
    starts = np.concatenate([[0], ends[:-1]])
    nats, sums, squares = (np.zeros((few.clips, len(ends))) for _ in range(3))
    made = generate_pieces(
        trained, dataset, few, temperature, top_p, times=TIMES, title="longer", show_progress=show_progress
    )
    for first, number, piece in made:
        sound = piece.sound.astype(np.float64)
        streams = slice(first, first + len(sound))
        nats[streams, number] += piece.nats
        sums[streams, number] += sound.sum(1)
        squares[streams, number] += (sound**2).sum(1)
    if not np.isfinite(nats).all():
        raise UserError("the likelihood of the generated streams is not finite: the weights are broken")
    lengths = ends - starts
    powers = squares / lengths - (sums / lengths) ** 2
    bits = nats / math.log(2) / lengths
    rows = [
        {
            "start": float(start / rate),
            "stop": float(stop / rate),
            "level_db": _level(power),
            "bits_per_sample": float(b),
        }
        for start, stop, power, b in zip(starts, ends, powers.mean(0), bits.mean(0), strict=True)
    ]
    ours = Stretches(np.vectorize(_level)(powers), bits)
    return {**judge(ours, recordings, starts / rate, float(ends[-1] / rate)), "rows": rows}


def judge(streams: Stretches, recordings: Stretches, starts: np.ndarray, seconds: float) -> dict[str, Any]:
    """What becomes of streams.

    Args:
      streams, recordings: their stretches.
      starts: of the streams' stretches, in seconds.
      seconds: length of the streams.

    Returns:
      {"streams", "seconds", "away", "silent" (shares of the streams), "after" (seconds until the first of these, or
      None), "most" ({"level_db", "bits_per_sample"}: a stretch above these is away), "verdict"}.
    """
    most_level = float(np.nanmax(recordings.levels)) + _LOUDER_DB
    most_bits = float(np.nanmax(recordings.bits)) + _MORE_BITS
    mean = _level(float(np.nanmean(10 ** (recordings.levels / 10))))
    quiet = min(float(np.nanmin(recordings.levels)), mean - _SILENT_DB)
    away = _lasting((streams.levels > most_level) | (streams.bits > most_bits))
    silent = _lasting(streams.levels < quiet)
    count, phrases, begun = len(streams.levels), [], []
    for word, lasting in (("run away", away), ("fall silent", silent)):
        since = [float(starts[-n]) for n in lasting if n]
        if since:
            phrases.append(f"{len(since)} of {count} streams {word}, the first after {min(since):.2g} s")
            begun += since
    return {
        "streams": count,
        "seconds": seconds,
        "away": float((away > 0).mean()),
        "silent": float((silent > 0).mean()),
        "after": min(begun, default=None),
        "most": {"level_db": most_level, "bits_per_sample": most_bits},
        "verdict": "; ".join(phrases) or "steady",
    }


def _lasting(marked: np.ndarray) -> np.ndarray:
    """How many stretches at each stream's end are all marked; 0 for fewer than `_LASTING`. [streams]."""
    last = np.cumprod(marked[:, ::-1], axis=1).sum(1)
    return np.where(last >= _LASTING, last, 0)


def _level(power: float) -> float:
    return 10 * math.log10(max(float(power), 1e-10))
