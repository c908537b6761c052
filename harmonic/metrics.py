"""What a run writes and shows while it trains: metrics.jsonl, TensorBoard, Weights & Biases if asked for, its speed,
and a progress bar or plain lines."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import secrets
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2
from tqdm import tqdm

from harmonic import files
from harmonic.config import Config
from harmonic.errors import UserError

_LINE_EVERY = 10.0  # seconds between plain progress lines


class _Board:
    """Writes TensorBoard's events at once. The library's own writer uses a thread, in which a full disk is not noticed
    and a clock that is set back stops training for good."""

    def __init__(self, folder: Path, purge_step: int | None):
        self._folder = folder
        with files.write_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            # The library names files by the clock: without a suffix a start may overwrite an earlier one's file.
            self._events = EventsWriter(str(folder / "events"), f".{secrets.token_hex(4)}")
        if purge_step is not None:
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._write(event_pb2.Event(step=purge_step, session_log=start))

    def add(self, step: int, shown: Any) -> None:
        self._write(event_pb2.Event(step=step, summary=shown))

    def _write(self, event: Any) -> None:
        event.wall_time = time.time()
        with files.write_errors(self._folder):
            self._events.write_event(event)
            self._events.flush()

    def close(self) -> None:
        with contextlib.suppress(OSError):  # write errors were already raised by _write
            self._events.close()


class MetricsWriter:
    """Appends to a run's metrics.jsonl, one JSON object a line, and to its TensorBoard events.

    Args:
      workdir: the run's folder; None to write nothing, as all processes but the first do.
      step: the step that the run continues from. Lines of later steps are dropped: those steps are made again.
      config: of the run; its `train.wandb_project` names a project of Weights & Biases to write to as well.

    Raises:
      UserError: the folder cannot be written, or Weights & Biases is asked for and not available.
    """

    def __init__(self, workdir: str | Path | None, step: int = 0, config: Config | None = None):
        self._board: _Board | None = None
        self._wandb = None
        if workdir is None:
            return
        self._path = path = Path(workdir) / "metrics.jsonl"
        files.write_whole(path, b"".join(line for line in _lines(path) if _step(line) <= step))
        if config is not None and config.train.wandb_project:
            self._wandb = _wandb_run(Path(workdir), config)
        with files.write_errors(path):
            self._file = path.open("a")
        self._board = _Board(Path(workdir) / "tensorboard", step + 1 if step else None)

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """One line of a kind (`train`, `validation`); numbers go to TensorBoard too."""
        if self._board is None:
            return
        with files.write_errors(self._path):
            self._file.write(json.dumps({"kind": kind, "step": step, **values}, allow_nan=False) + "\n")
            self._file.flush()
        for name, value in values.items():
            if isinstance(value, (int, float)):
                self._board.add(step, summary.scalar(f"{kind}/{name}", value))
        if self._wandb is not None:
            self._wandb.log({f"{kind}/{name}": value for name, value in values.items() if value is not None}, step=step)

    def write_sounds(self, step: int, waveforms: np.ndarray, sample_rate: int) -> None:
        """Shows samples [number, time] in [-1, 1] on the boards, each as sound and as a spectrogram."""
        if self._board is None:
            return
        from harmonic import spectrogram

        for number, waveform in enumerate(waveforms):
            name, picture = f"samples/{number}", spectrogram.colours(spectrogram.picture(waveform, sample_rate))
            self._board.add(step, summary.audio(name, waveform, sample_rate))
            self._board.add(step, summary.image(f"{name}/spectrogram", picture, dataformats="HWC"))
            if self._wandb is not None:
                import wandb

                sound = {name: wandb.Audio(waveform, sample_rate), f"{name}/spectrogram": wandb.Image(picture)}
                self._wandb.log(sound, step=step)

    def close(self) -> None:
        """Flushes and closes both."""
        if self._board is not None:
            with contextlib.suppress(OSError):  # write errors were already raised by `write`
                self._file.close()
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


def _wandb_run(workdir: Path, config: Config) -> Any:
    """The run in Weights & Biases, the same one at every start: steps that are made again have equal values."""
    remedy = "or leave train.wandb_project empty"
    try:
        import wandb
    except ImportError as error:
        raise UserError(
            f"train.wandb_project={config.train.wandb_project} needs Weights & Biases ({error}): "
            f"pip install 'harmonic-rnn[wandb]', {remedy}"
        ) from error
    path = workdir / "wandb_id"
    name = path.read_text().strip() if path.exists() else ""
    if not name:
        files.write_whole(path, f"{(name := secrets.token_hex(4))}\n")
    try:
        return wandb.init(
            project=config.train.wandb_project,
            id=name,
            resume="allow",
            name=config.name,
            config=dataclasses.asdict(config),
            dir=str(workdir),
            settings=wandb.Settings(silent=True, console="off"),
        )
    except (wandb.Error, OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"Weights & Biases does not take the run ({reason}); log in with `wandb login`, set WANDB_MODE=offline, "
            f"{remedy}"
        ) from error


def read_metrics(workdir: str | Path) -> list[dict[str, Any]]:
    """The whole lines of a run's metrics.jsonl, in order."""
    lines = _lines(Path(workdir) / "metrics.jsonl")
    return [json.loads(line) for line in lines if _step(line) < float("inf")]


def _lines(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True) if path.exists() else []


def _step(line: bytes) -> float:
    with contextlib.suppress(ValueError, KeyError, TypeError, OverflowError):
        return float(json.loads(line)["step"] if line.endswith(b"\n") else "inf")
    return float("inf")  # a line that a kill cut short


class Throughput:
    """Samples per second of training steps alone.

        speed.add(samples)
        with speed.paused():
            validate()
        speed.rate()  # since the last call

    Steps are dispatched ahead of the device: wait for them before `paused`, or their time is lost in the pause.

    Attributes:
      total: samples so far.
    """

    def __init__(self) -> None:
        self.total = 0
        self._samples, self._seconds, self._since = 0, 0.0, time.monotonic()

    def add(self, samples: int) -> None:
        """Counts the samples of a step."""
        self._samples += samples
        self.total += samples

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves out the time until the end of the block."""
        self._seconds += time.monotonic() - self._since
        try:
            yield
        finally:
            self._since = time.monotonic()

    def rate(self) -> float:
        """Samples per second since the last call, or since the start."""
        now = time.monotonic()
        rate = self._samples / (self._seconds + now - self._since)
        self._samples, self._seconds, self._since = 0, 0.0, now
        return rate


class Progress:
    """A progress bar where there is a terminal, a plain line every ten seconds where there is none.

    Args:
      title: the name of the work.
      total: units in all.
      initial: units that an earlier run has done.
      unit: what is counted.
      rate_unit: what the rate that is shown counts, such as samples.
      stream: where it is shown; standard error if not given.
    """

    def __init__(
        self,
        title: str,
        total: int,
        *,
        initial: int = 0,
        unit: str = "step",
        rate_unit: str = "samples",
        stream: TextIO | None = None,
    ):
        self._stream = stream or sys.stderr
        self._title, self._total, self._initial, self._done, self._unit = title, total, initial, initial, unit
        self._rate_unit, self._counted = rate_unit, 0
        self._start = self._last_line = time.monotonic()
        self._note = ""
        self._bar = None
        if self._stream.isatty():
            self._bar = tqdm(total=total, initial=initial, desc=title, unit=unit, file=self._stream, dynamic_ncols=True)

    def update(self, units: int = 1, note: str | None = None, counted: int | None = None) -> None:
        """Counts units done, with a note such as the loss, and what they hold of the rate's unit if that is another."""
        self._done += units
        self._counted += units if counted is None else counted
        self._note = self._note if note is None else note
        if self._bar is not None:
            self._bar.set_postfix_str(", ".join(filter(None, [self._note, self._rate()])), refresh=False)
            self._bar.update(units)
        elif time.monotonic() - self._last_line >= _LINE_EVERY:
            self._print()

    def _rate(self) -> str:
        return f"{self._counted / max(time.monotonic() - self._start, 1e-9):,.0f} {self._rate_unit}/s"

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
