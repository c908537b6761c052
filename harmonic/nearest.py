"""Memorised or composed? The training excerpts that are nearest to generated clips.

Sounds are compared as log-mel frames: every excerpt of a clip with every excerpt of every training recording, at steps
of one frame. The distance of two excerpts is the root mean square difference of their frames in dB, after removing the
difference in level: 0 for a copy, however loud. Two other groups give the scale: held-out recordings, which the model
has not seen, and copies of training excerpts (softer, quantised again, between frames).
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from harmonic import audio, files, locks
from harmonic.data import Dataset, Split
from harmonic.errors import UserError
from harmonic.metrics import Progress
from harmonic.records import load_manifest
from harmonic.spectrogram import MELS, frame_sizes, log_mel
from harmonic.voice import Codec

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75)
_SHORTEST = 0.1  # seconds of an excerpt: a few frames
_DEFAULT = 1.0  # seconds of an excerpt
_SILENT = 1.0  # dB of standard deviation; an excerpt with less has no shape to compare
_HELD_OUT, _COPIES = 32, 32  # clips, at least
_HELD_OUT_SECONDS = 4.0  # of a held-out clip, at most (and at least an excerpt)
_WRITTEN = {"generated": 8, "held_out": 4}  # how many of each group, the nearest first, become WAV files
_BLOCK, _ROWS = 8_192, 256  # training frames, and frames of a clip, in one matrix product
_CENTRE = 40.0  # dB added to every frame: it brings frames near 0, where float32 sums are more exact


@dataclasses.dataclass(frozen=True)
class Clip:
    """A sound to search for: its name, its waveform [time] in [-1, 1], and more fields for its row in nearest.json."""

    name: str
    waveform: np.ndarray
    about: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Nearest:
    """The nearest training excerpt to each excerpt of a clip, and the nearest to the whole clip.

    Attributes:
      distance: [excerpts + 1] float64 in dB, by the frame where the excerpt begins; the last is the whole clip's.
        Infinity if there is no training excerpt of that length.
      recording, frame: [excerpts + 1] where the nearest begins: index of the training recording, and its frame.
      silent: [excerpts + 1] bool: no shape to compare; the distance is infinity.
    """

    distance: np.ndarray
    recording: np.ndarray
    frame: np.ndarray
    silent: np.ndarray


@dataclasses.dataclass(frozen=True)
class _Block:
    """Training frames of several recordings, one recording after the other.

    Attributes:
      frames: [time, MELS].
      recording: [time] index of each frame's recording.
      frame: [time] each frame's number in its recording.
      run: [time] how many frames of the same recording precede each frame in this block.
    """

    frames: np.ndarray
    recording: np.ndarray
    frame: np.ndarray
    run: np.ndarray


def frames_of(seconds: float, sample_rate: int) -> int:
    """How many whole frames a sound of that length has."""
    window, hop = frame_sizes(sample_rate)
    return max(0, 1 + (round(seconds * sample_rate) - window) // hop)


def find_nearest(
    clips: Sequence[np.ndarray], split: Split, length: int, *, show_progress: bool = False
) -> list[Nearest]:
    """The nearest excerpts of a split, in memory that does not depend on the size of the split.

    Args:
      clips: log-mel frames [time, MELS] of each, time at least `length`.
      split: the recordings to search, all of them.
      length: frames of an excerpt.
    """
    clips = [clip.astype(np.float32) + np.float32(_CENTRE) for clip in clips]
    found = [_nothing(clip, length) for clip in clips]
    longest = max(len(clip) for clip in clips)
    progress = (
        Progress("compare", len(split.recordings), unit="recording", rate_unit="recordings") if show_progress else None
    )
    done = 0
    # On several threads these small products took more than four times as long (15 CPU-seconds against 3.2, two cores).
    with threadpool_limits(1, "blas"):
        for block in _blocks(split, longest - 1, max(_BLOCK, 2 * longest)):
            statistics = {n: _window_sums(block.frames, block.run, n) for n in {length, *map(len, clips)}}
            for clip, best in zip(clips, found, strict=True):
                _compare(clip, block, length, statistics, best)
            if progress:
                progress.update(int(block.recording[-1]) - done)
                done = int(block.recording[-1])
    if progress:
        progress.update(len(split.recordings) - done)
        progress.close()
    for best in found:
        best.distance[best.silent] = np.inf
    return found


def _nothing(clip: np.ndarray, length: int) -> Nearest:
    """The state before anything is compared."""
    excerpts = len(clip) - length + 1
    norms = np.append(_window_sums(clip, None, length)[1], _window_sums(clip, None, len(clip))[1][-1:])
    cells = np.append(np.full(excerpts, length), len(clip)) * MELS
    places = np.full((2, excerpts + 1), -1)
    return Nearest(np.full(excerpts + 1, np.inf), places[0], places[1], norms < _SILENT**2 * cells)


def _window_sums(frames: np.ndarray, run: np.ndarray | None, length: int) -> tuple[np.ndarray, np.ndarray]:
    """(sum, sum of squares about the mean) of every `length` consecutive frames; float64, by the first frame.

    With `run`, by the last frame instead, with as many entries as `frames`; the sum of squares is infinity where the
    recording has fewer than `length` frames so far.
    """
    wide = frames.astype(np.float64)
    totals = np.cumsum([np.append(0.0, wide.sum(1)), np.append(0.0, (wide**2).sum(1))], axis=1)
    if length > len(frames):
        sums = squares = np.zeros(0)
    else:
        sums, squares = totals[:, length:] - totals[:, :-length]
    norms = np.maximum(squares - sums**2 / (length * MELS), 0)
    if run is None:
        return sums, norms
    front = np.zeros(len(frames) - len(sums))
    sums, norms = np.append(front, sums), np.append(front, norms)
    norms[run < length - 1] = np.inf
    return sums, norms


def _compare(
    clip: np.ndarray, block: _Block, length: int, statistics: dict[int, tuple[np.ndarray, np.ndarray]], best: Nearest
) -> None:
    """Updates `best` with the excerpts of the block that are nearer.

    |a - b|^2 = |a|^2 + |b|^2 - 2ab. The sum ab over a window is the sum over the window one frame earlier (in both
    sounds), plus the product of the frames that enter, minus that of the frames that leave. So one matrix product of
    all frames is enough for all windows.
    """
    ours_sum, ours_norm = _window_sums(clip, None, length)
    whole_sum, whole_norm = _window_sums(clip, None, len(clip))
    running, whole, before, score = np.zeros((4, len(block.frames)))
    twice, apart = 2 * block.frames.T, len(clip) != length

    def note(place: int, cross: np.ndarray, size: int, total: float, norm: float) -> None:
        sums, norms = statistics[size]
        np.multiply(sums, 2 * total / (size * MELS), out=score)
        np.add(score, norms, out=score)
        np.subtract(score, cross, out=score)
        at = int(score.argmin())
        distance = math.sqrt(max(score[at] + norm, 0.0) / (size * MELS))
        if distance < best.distance[place]:
            best.distance[place], best.recording[place] = distance, block.recording[at]
            best.frame[place] = block.frame[at] - size + 1

    # Long clips have long blocks: fewer rows at a time bound the memory.
    rows = max(1, min(_ROWS, 8 * _BLOCK * _ROWS // len(block.frames)))
    for first in range(0, len(clip), rows):
        stop = min(first + rows, len(clip))
        entering, leaving = clip[first:stop] @ twice, clip[max(first - length, 0) : max(stop - length, 0)] @ twice
        for i in range(first, stop):
            row = entering[i - first]
            running, before = before, running
            np.add(before[:-1], row[1:], out=running[1:])
            running[0] = row[0]
            if i >= length:
                running[length:] -= leaving[i - length - max(first - length, 0), :-length]
            if apart:
                whole[1:] = whole[:-1] + row[1:]
                whole[0] = row[0]
            if (start := i - length + 1) >= 0:
                note(start, running, length, ours_sum[start], ours_norm[start])
    note(-1, whole if apart else running, len(clip), whole_sum[0], whole_norm[0])


def _blocks(split: Split, overlap: int, size: int) -> Iterator[_Block]:
    """All frames of a split, about `size` at a time; parts of a long recording overlap by `overlap` frames."""
    rate, codec = split.manifest.sample_rate, Codec.of(split.manifest)
    window, hop = frame_sizes(rate)
    pieces: list[tuple[np.ndarray, int, int]] = []
    held = 0
    for index, length in enumerate(split.lengths):
        total = frames_of(int(length) / rate, rate)
        for first in range(0, max(total - overlap, min(total, 1)), size - overlap):
            stop = min(first + size, total)
            waveform = codec.decode(split.read(index, first * hop, (stop - 1) * hop + window))
            pieces.append((log_mel(waveform, rate) + np.float32(_CENTRE), index, first))
            held += stop - first
            if held >= size:
                yield _block(pieces)
                pieces, held = [], 0
    if pieces:
        yield _block(pieces)


def _block(pieces: list[tuple[np.ndarray, int, int]]) -> _Block:
    runs = [np.arange(len(frames)) for frames, _, _ in pieces]
    return _Block(
        np.concatenate([frames for frames, _, _ in pieces]),
        np.repeat([index for _, index, _ in pieces], [len(run) for run in runs]),
        np.concatenate([first + run for (_, _, first), run in zip(pieces, runs, strict=True)]),
        np.concatenate(runs),
    )


def _frames(waveform: np.ndarray, sample_rate: int) -> np.ndarray:
    """Log-mel frames of a clip, scaled to full level as the data set's recordings are."""
    return log_mel(waveform / max(float(np.abs(waveform).max(initial=0)), 1e-9), sample_rate)


# The three groups of clips.


def generated_clips(workdir: str | Path, sample_rate: int, most: int) -> tuple[list[Clip], dict[str, Any]]:
    """The clips of a run's samples folder (continuations without their prompt), and samples.json's step and weights.

    Raises:
      UserError: there are none, or one cannot be read.
    """
    folder = Path(workdir) / "samples"
    generate = f"generate some: python -m workflows.full_run --config={workdir}/config.json --workdir={workdir}"
    try:
        described = json.loads((folder / "samples.json").read_text())
        rows = [row for row in described["samples"] if row["kind"] in ("sample", "continuation")]
    except FileNotFoundError:
        raise UserError(f"{workdir} has no samples; {generate}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / 'samples.json'} cannot be read ({error}); {generate}") from error
    clips = []
    for row in rows[:most]:
        name = str(row.get("file"))
        if Path(name).name != name:
            raise UserError(
                f"{folder / 'samples.json'} names the file {name!r}, which is not in that folder; {generate}"
            )
        waveform, rate = audio.read_audio(folder / name)
        if rate != sample_rate:
            raise UserError(
                f"{folder / name} is at {rate:,} Hz, but the run's audio is at {sample_rate:,} Hz; {generate}"
            )
        given = round(float(row.get("prompt_seconds") or 0) * rate)
        clips.append(Clip(name, waveform[given:], {"kind": row["kind"], "prompt_seconds": given / rate}))
    if not clips:
        raise UserError(f"{folder} has no generated clip; {generate}")
    return clips, {key: described[key] for key in ("step", "checkpoint", "weights") if key in described}


def _held_out(dataset: Dataset, wanted: int, length: int, shortest: int) -> list[Clip]:
    """Clips of `length` samples (`shortest` at least), spread over the validation and the test split."""
    splits = [dataset.split("validation"), dataset.split("test")]
    usable = [(split, i) for split in splits for i in range(len(split.lengths)) if split.lengths[i] >= shortest]
    numbers, clips = np.random.default_rng(0), []
    for place in sorted({round(i) for i in np.linspace(0, len(usable) - 1, min(wanted, len(usable)))}):
        split, i = usable[place]
        start = int(numbers.integers(0, max(split.lengths[i] - length, 0) + 1))
        recording = split.recordings[i]
        about = {"split": split.name, "label": recording.label, "prompt_seconds": start / split.manifest.sample_rate}
        clips.append(Clip(recording.id, Codec.of(split.manifest).decode(split.read(i, start, start + length)), about))
    return clips


def _copies(split: Split, wanted: int, length: int) -> list[Clip]:
    """Training excerpts as a model that memorised them might play them: softer, quantised again, between frames."""
    usable, numbers, clips = np.flatnonzero(split.lengths >= length), np.random.default_rng(1), []
    codec, hop = Codec.of(split.manifest), frame_sizes(split.manifest.sample_rate)[1]
    for place in sorted({round(i) for i in np.linspace(0, len(usable) - 1, min(wanted, len(usable)))}):
        i = int(usable[place])
        room = int(split.lengths[i]) - length
        start = min(int(numbers.integers(0, room + 1)) // hop * hop + hop // 2, room)
        softer = 0.3 * codec.decode(split.read(i, start, start + length))
        tokens = audio.encode(softer, codec.encoding, low=-1, high=1, num_levels=codec.num_levels)
        clips.append(Clip(split.recordings[i].id, codec.decode(tokens[:, None])))
    return clips


def compare_run(
    workdir: str | Path,
    data: str | Path,
    *,
    seconds: float | None = None,
    num_clips: int = 16,
    show_progress: bool = False,
) -> dict[str, Any]:
    """Searches a run's training data for its generated clips; writes RUN/nearest.json, and sounds to RUN/nearest.

    Args:
      workdir: the run's folder, with samples.
      data: folder of the data set that it was trained on.
      seconds: of an excerpt. By default a second, or less if the clips or a tenth of the training recordings are
        shorter.
      num_clips: generated clips to compare, at most.

    Returns:
      The content of nearest.json: {"seconds", "as_near_as_a_copy" and "nearer_than_held_out" (limits in dB),
      "training", "groups" (by group: "clips", "excerpts", "silent", "quantiles", and the shares of excerpts within
      those limits), "generated" and "held_out" (a row for each clip, the nearest first), and samples.json's step and
      weights}.

    Raises:
      UserError: no samples, other data than the run's, or excerpts that do not fit.
    """
    folder, dataset, ours = Path(workdir), Dataset(data), load_manifest(workdir)
    if dataset.manifest.fingerprint != ours.fingerprint:
        raise UserError(f"{workdir} was trained on other data than {data}; give the --data_dir that it was trained on")
    rate, train = ours.sample_rate, dataset.split("train")
    clips, described = generated_clips(folder, rate, num_clips)
    usual = float(np.quantile(train.lengths, 0.1)) / rate
    if seconds is None:
        longest_clip = max(len(clip.waveform) for clip in clips) / rate
        seconds = math.floor(100 * max(min(_DEFAULT, usual, longest_clip), _SHORTEST)) / 100
    if not _SHORTEST <= seconds < math.inf:
        raise UserError(f"--seconds={seconds:g} is impossible: it must be at least {_SHORTEST}")
    size = round(seconds * rate)
    long_enough = [clip for clip in clips if len(clip.waveform) >= size]
    if not long_enough:
        longest = max(len(clip.waveform) for clip in clips) / rate
        raise UserError(f"no generated clip has {seconds:g} s; the longest has {longest:.2f}: give fewer --seconds")
    within = train.lengths >= size
    if not within.any():
        raise UserError(
            f"no training recording has {seconds:g} s; the longest has {train.lengths.max() / rate:.2f}, nine tenths "
            f"have {usual:.2f}: give fewer --seconds"
        )
    usual_clip = min(int(np.median([len(clip.waveform) for clip in long_enough])), round(_HELD_OUT_SECONDS * rate))
    groups = {
        "generated": long_enough,
        "held_out": _held_out(dataset, max(len(long_enough), _HELD_OUT), max(usual_clip, size), size),
        "copies": _copies(train, _COPIES, size),
    }
    every = [_frames(clip.waveform, rate) for group in groups.values() for clip in group]
    found = iter(find_nearest(every, train, frames_of(seconds, rate), show_progress=show_progress))
    results = {name: [next(found) for _ in group] for name, group in groups.items()}
    if all(result.silent[:-1].all() for result in results["generated"]):
        raise UserError(f"every generated clip of {folder / 'samples'} is silent: there is nothing to compare")

    limits = {
        "as_near_as_a_copy": _quantile(results["copies"], 0.95),
        "nearer_than_held_out": _quantile(results["held_out"], 0.05),
    }
    report: dict[str, Any] = {
        **described,
        "dataset": ours.dataset,
        "fingerprint": ours.fingerprint,
        "seconds": seconds,
        **limits,
        "training": {
            "recordings": len(train.recordings),
            "compared": int(within.sum()),
            "seconds": float(train.lengths[within].sum()) / rate,
        },
        "too_short": len(clips) - len(long_enough),
        "groups": {name: _summary(results[name], limits) for name in groups},
    }
    with locks.writing(folder):
        _write(folder, report, groups, results, train, size)
    return report


def _write(
    folder: Path,
    report: dict[str, Any],
    groups: dict[str, list[Clip]],
    results: dict[str, list[Nearest]],
    train: Split,
    size: int,
) -> None:
    """Writes the nearest excerpts as sounds, and nearest.json last, with a row for each clip."""
    (folder / "nearest.json").unlink(missing_ok=True)  # its sounds are about to be replaced
    sounds = folder / "nearest"
    shutil.rmtree(sounds, ignore_errors=True)
    sounds.mkdir()
    for name, written in _WRITTEN.items():
        rows = sorted(zip(groups[name], results[name], strict=True), key=lambda row: row[1].distance[:-1].min())
        names = [f"{name}_{number:04d}" if number < written else None for number in range(len(rows))]
        report[name] = [_row(*row, train, size, sounds, file) for row, file in zip(rows, names, strict=True)]
    files.write_whole(folder / "nearest.json", json.dumps(report, indent=2, allow_nan=False) + "\n")


def _distances(results: list[Nearest]) -> np.ndarray:
    """The finite distances of all excerpts."""
    every = np.concatenate([result.distance[:-1] for result in results] or [np.zeros(0)])
    return every[np.isfinite(every)]


def _quantile(results: list[Nearest], q: float) -> float | None:
    distances = _distances(results)
    return float(np.quantile(distances, q)) if len(distances) else None


def _summary(results: list[Nearest], limits: dict[str, float | None]) -> dict[str, Any]:
    distances = _distances(results)
    shares = {
        name: float((distances <= limit).mean()) if limit is not None and len(distances) else None
        for name, limit in limits.items()
    }
    return {
        "clips": len(results),
        "excerpts": len(distances),
        "silent": int(sum(result.silent[:-1].sum() for result in results)),
        "quantiles": {f"{q:g}": _quantile(results, q) for q in QUANTILES},
        **shares,
    }


def _row(clip: Clip, result: Nearest, train: Split, size: int, sounds: Path, file: str | None) -> dict[str, Any]:
    """The nearest excerpt to an excerpt of a clip, and the nearest to the whole clip.

    With a file name, writes the clip's excerpt and its nearest training excerpt as sounds.
    """
    rate = train.manifest.sample_rate
    hop = frame_sizes(rate)[1]

    def place(at: int) -> dict[str, Any] | None:
        if not np.isfinite(result.distance[at]):
            return None
        recording = train.recordings[result.recording[at]]
        start = int(result.frame[at]) * hop / rate
        return {
            "distance": float(result.distance[at]),
            "recording": recording.id,
            "label": recording.label,
            "recording_start": start,
        }

    at = int(result.distance[:-1].argmin())
    row = {
        "clip": clip.name,
        **clip.about,
        "seconds": len(clip.waveform) / rate,
        "nearest": place(at),
        "whole": place(-1),
    }
    if row["nearest"] is not None:
        row["start"] = at * hop / rate + clip.about.get("prompt_seconds", 0.0)
        if file is not None:
            names = {"file": f"{file}.wav", "nearest_file": f"{file}_training.wav"}
            start = int(result.frame[at]) * hop
            theirs = Codec.of(train.manifest).decode(train.read(int(result.recording[at]), start, start + size))
            for name, waveform in zip(names.values(), (clip.waveform[at * hop :][:size], theirs), strict=True):
                audio.write_wav(sounds / name, waveform, rate)
            row |= names
    return row
