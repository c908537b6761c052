"""Shared by both command lines: arguments, a line of progress, tables, and errors in one line."""

from __future__ import annotations

import argparse
import io
import sys
import time
from collections.abc import Callable, Sequence
from typing import NoReturn, TextIO

from harmonic.errors import UserError, one_line
from harmonic.records import Manifest

_PLAIN_SECONDS, _TERMINAL_SECONDS = 5.0, 0.5  # between lines of progress


class Parser(argparse.ArgumentParser):
    """A parser that raises UserError."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


class ProgressLine:
    """Progress, rate and time left on stderr: one line that changes on a terminal, plain lines elsewhere."""

    def __init__(self, stream: TextIO, unit: str = "recordings"):
        self._stream, self._unit = stream, unit
        self._terminal = stream.isatty()
        self._last = time.monotonic()
        self._first: tuple[float, int, float, float] | None = None  # time and values when work was first done
        self._shown = False

    def __call__(self, done: int, total: int, seconds: float = 0.0, share: float | None = None) -> None:
        """Shows the progress, unless that was just done.

        Args:
          done, total: numbers of units.
          seconds: of audio that are done, if known.
          share: of the work that is done, if that is not done / total.
        """
        now = time.monotonic()
        share = done / total if share is None else share
        if self._first is None and (done or seconds):
            self._first = now, done, seconds, share  # the start's duration does not count in the rate
        if self._first is None or now - self._last < (_TERMINAL_SECONDS if self._terminal else _PLAIN_SECONDS):
            return
        since, done_before, seconds_before, share_before = self._first
        passed = now - since
        if not passed:
            return
        self._last = now
        text = f"{done:,} of {total:,} {self._unit}, {(done - done_before) / passed:,.1f} a second"
        if seconds:
            rate = (seconds - seconds_before) / passed / 3600
            text += f"; {seconds / 3600:,.2f} hours of audio, {rate:.3f} a second"
        if share > share_before:
            text += f"; {duration((1 - share) * passed / (share - share_before))} left"
        self._stream.write(f"\r\033[K{text}" if self._terminal else f"{text}\n")
        self._stream.flush()
        self._shown = True

    def close(self) -> None:
        """Clears the line on a terminal."""
        if self._shown and self._terminal:
            self._stream.write("\r\033[K")
            self._stream.flush()


def guarded(main: Callable[[Sequence[str], ProgressLine], int], argv: Sequence[str], unit: str = "recordings") -> int:
    """Runs a main; returns its exit status, or 2 for a UserError, or 130 for an interrupt."""
    for stream in (sys.stdout, sys.stderr):  # names of files that the terminal's encoding does not have
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    line = ProgressLine(sys.stderr, unit)
    try:
        return main(argv, line)
    except UserError as error:
        line.close()
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        line.close()
        print("interrupted; run the same command again", file=sys.stderr)
        return 130


def duration(seconds: float) -> str:
    """A time left as text: `42 s`, `3 min 05 s`, `2 h 10 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def clock(seconds: float, decimals: int = 0) -> str:
    """Seconds as `h:mm:ss`, with `decimals` digits after the point."""
    units = 10**decimals
    ticks = round(seconds * units)
    whole = ticks // units
    text = f"{whole // 3600}:{whole % 3600 // 60:02d}:{whole % 60:02d}"
    return f"{text}.{ticks % units:0{decimals}d}" if decimals else text


def columns(rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """Rows as lines of aligned columns: the first `left` columns to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def manifest_lines(manifest: Manifest, folder: str) -> list[str]:
    """A data set's properties and totals by split, as lines of text."""
    m = manifest
    hop = "" if m.hop_length == m.window_length else f" every {m.hop_length:,}"
    lines = [
        f"{m.dataset} in {folder}: {m.encoding}, {m.num_levels:,} levels, {m.sample_rate:,} Hz, "
        f"windows of {m.window_length:,} samples{hop}"
    ]
    options = []
    if m.trim_silence is not None:
        options.append(f"silence trimmed {m.trim_silence:g} dB below the loudest")
    if m.loudness is not None:
        options.append(f"loudness {m.loudness:g} LUFS")
    if m.split_rule != "default":
        options.append(f"splits by {m.split_rule if len(m.split_rule) < 60 else m.split_rule[:18]}")
    lines += [", ".join(options)] * bool(options)
    rows: list[Sequence[str]] = [
        ("split", "recordings", "windows", "samples", "duration", "shards", "bytes", "skipped")
    ]
    for name, split in m.splits.items():
        size = sum(shard.bytes + shard.index_bytes for shard in split.shards)
        skipped = sum(skipped.split == name for skipped in m.skipped)
        numbers = (split.recordings, split.windows, split.samples)
        time = clock(split.samples / m.sample_rate)
        rows.append((name, *(f"{n:,}" for n in numbers), time, f"{len(split.shards):,}", f"{size:,}", f"{skipped:,}"))
    return [*lines, "", *columns(rows)]


def skipped_lines(manifest: Manifest, limit: int = 10) -> list[str]:
    """What was skipped, noted and left out, with the reasons, as lines of text."""
    skipped = [f"skipped {one_line(s.recording)} ({s.split}): {s.reason}" for s in manifest.skipped]
    noted = [f"noted {one_line(n.recording)} ({n.split}): {n.note}" for n in manifest.noted]
    lines = []
    for kind, all_lines in (("skipped", skipped), ("noted", noted)):
        lines += all_lines[:limit]
        if len(all_lines) > limit:
            lines.append(f"{kind} {len(all_lines) - limit:,} more; manifest.json lists them all")
    if manifest.left_out:
        parts = [f"{out.reason}: {out.files:,} ({one_line(out.example)})" for out in manifest.left_out]
        lines.append(f"left out: {'; '.join(parts)}")
    return lines
