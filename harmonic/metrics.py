"""What a run writes and shows while it goes: metrics.jsonl, TensorBoard, and a progress bar or plain lines."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any, TextIO

from tensorboardX import SummaryWriter
from tqdm import tqdm

_LINE_EVERY = 10.0  # seconds between plain progress lines


class MetricsWriter:
    """Appends to a run's metrics.jsonl, one JSON object a line, and to its TensorBoard events.

    Args:
      workdir: the run's folder; None to write nothing, as all processes but the first.
      step: the step that the run goes on from. What an interrupted run wrote after it is dropped: it is made again.
    """

    def __init__(self, workdir: str | Path | None, step: int = 0):
        self._board = None
        if workdir is None:
            return
        path = Path(workdir) / "metrics.jsonl"
        kept = b"".join(line for line in _lines(path) if _step(line) <= step)
        temporary = path.with_suffix(".partial")
        temporary.write_bytes(kept)
        os.replace(temporary, path)
        self._file = path.open("a")
        self._board = SummaryWriter(str(Path(workdir) / "tensorboard"), purge_step=step + 1 if step else None)

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """One line of a kind (`train`, `validation`); numbers go to TensorBoard too."""
        if self._board is None:
            return
        self._file.write(json.dumps({"kind": kind, "step": step, **values}, allow_nan=False) + "\n")
        self._file.flush()
        for name, value in values.items():
            if isinstance(value, (int, float)):
                self._board.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        """Flushes and closes both."""
        if self._board is not None:
            self._file.close()
            self._board.close()


def read_metrics(workdir: str | Path) -> list[dict[str, Any]]:
    """The whole lines of a run's metrics.jsonl, in order."""
    lines = _lines(Path(workdir) / "metrics.jsonl")
    return [json.loads(line) for line in lines if _step(line) < float("inf")]


def _lines(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True) if path.exists() else []


def _step(line: bytes) -> float:
    with contextlib.suppress(ValueError, KeyError, TypeError):
        return float(json.loads(line)["step"])
    return float("inf")  # a line that a kill cut short


class Progress:
    """A progress bar where there is a terminal, a plain line every ten seconds where there is none.

    Args:
      title: what is going on.
      total: units in all.
      initial: units that an earlier run has done.
      unit: what is counted.
      rate_unit, rate_scale: what a unit is worth in the rate that is shown, such as samples.
    """

    def __init__(
        self,
        title: str,
        total: int,
        *,
        initial: int = 0,
        unit: str = "step",
        rate_unit: str = "samples",
        rate_scale: float = 1.0,
        stream: TextIO | None = None,
    ):
        self._stream = stream or sys.stderr
        self._title, self._total, self._initial, self._done, self._unit = title, total, initial, initial, unit
        self._rate_unit, self._rate_scale = rate_unit, rate_scale
        self._start = self._last_line = time.monotonic()
        self._note = ""
        self._bar = None
        if self._stream.isatty():
            self._bar = tqdm(total=total, initial=initial, desc=title, unit=unit, file=self._stream, dynamic_ncols=True)

    def update(self, units: int = 1, note: str | None = None) -> None:
        """Counts units done, with a note such as the loss."""
        self._done += units
        self._note = self._note if note is None else note
        if self._bar is not None:
            self._bar.set_postfix_str(", ".join(filter(None, [self._note, self._rate()])), refresh=False)
            self._bar.update(units)
        elif time.monotonic() - self._last_line >= _LINE_EVERY:
            self._print()

    def _rate(self) -> str:
        units = (self._done - self._initial) / max(time.monotonic() - self._start, 1e-9)
        return f"{units * self._rate_scale:,.0f} {self._rate_unit}/s"

    def _print(self) -> None:
        now = time.monotonic()
        self._last_line = now
        done = self._done - self._initial
        left = (self._total - self._done) * (now - self._start) / max(done, 1)
        parts = [f"{self._title}: {self._unit} {self._done:,}/{self._total:,}", self._note, self._rate()]
        parts.append(f"{left / 60:.1f} min left" if done else "")
        print(", ".join(filter(None, parts)), file=self._stream, flush=True)

    def say(self, line: str) -> None:
        """Prints a line without breaking the bar."""
        if self._bar is not None:
            self._bar.write(line, file=self._stream)
        else:
            print(line, file=self._stream, flush=True)

    def close(self) -> None:
        """The last line, or the bar's end."""
        if self._bar is not None:
            self._bar.close()
        elif self._done > self._initial:
            self._print()
