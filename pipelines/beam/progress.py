"""A local run's progress: workers append entries to a file, and a thread of the launcher adds them up."""

from __future__ import annotations

import collections
import contextlib
import functools
import math
import os
import struct
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from harmonic.audio import SAMPLE_RATE
from pipelines.paths import is_local, join
from pipelines.sources.base import SourceRecording

# (recordings done, recordings in all, seconds of audio done, share of the source's bytes that is done)
Progress = Callable[[int, int, float, float], None]

_ENTRY = struct.Struct("<QQQ")  # recordings, bytes of the source and samples since the last entry
_REPORT_SECONDS = 0.2
_POLL_SECONDS = 0.5


class Meter:
    """Counts a worker's work. Beam's counters and the progress file get the sums only now and then: for each short
    recording, both would cost as much as quantising it.

    Args:
      path: the progress file, or None.
    """

    def __init__(self, path: str | None):
        self._path = path
        self._counts: collections.Counter[str] = collections.Counter()
        self._started = time.monotonic()
        self._reported = -math.inf

    def add(self, name: str, value: int = 1) -> None:
        """Adds to a counter."""
        self._counts[name] += value

    def report(self, at_once: bool = False) -> None:
        """Reports what was counted since the last report, unless that was a moment ago."""
        now = time.monotonic()
        if now - self._reported < _REPORT_SECONDS and not at_once:
            return
        counts, self._counts = self._counts, collections.Counter()
        counts["milliseconds"] = round(1000 * (now - self._started))
        self._started = self._reported = now
        for name, value in counts.items():
            if name not in ("done", "source_bytes"):
                _counter(name).inc(value)
        if self._path is not None:
            try:
                with open(self._path, "ab") as file:
                    file.write(_ENTRY.pack(counts["done"], counts["source_bytes"], counts["samples"]))
            except OSError:  # a run does not fail for its progress
                self._path = None


@functools.cache
def _counter(name: str) -> Any:
    from apache_beam.metrics import Metrics

    return Metrics.counter("harmonic", name)


@contextlib.contextmanager
def watched(progress: Progress | None, recordings: Sequence[SourceRecording], stage: str) -> Iterator[str | None]:
    """Calls `progress` from a thread of its own. Yields the path of the progress file, or None without `progress`.

    Args:
      progress: the function to call.
      recordings: all that are to be prepared.
      stage: the run's own folder.
    """
    if progress is None:
        yield None
        return
    stop = threading.Event()
    total, size = len(recordings), max(sum(recording.size for recording in recordings), 1)
    with tempfile.TemporaryDirectory(prefix="harmonic-progress-") as folder:
        # A local data set's progress file is in the staging folder: after a kill, the next run clears it.
        path = join(stage, "progress") if is_local(stage) else os.path.join(folder, "progress")

        def report() -> None:
            read, sums = 0, [0, 0, 0]
            while not stop.wait(_POLL_SECONDS):
                with contextlib.suppress(OSError):
                    with open(path, "rb") as file:
                        file.seek(read)
                        data = file.read()
                    data = data[: len(data) // _ENTRY.size * _ENTRY.size]
                    read += len(data)
                    sums = [sum(values) for values in zip(sums, *_ENTRY.iter_unpack(data), strict=True)]
                    # Work that a runner repeats counts twice, hence the bounds.
                    done, source_bytes = min(sums[0], total), min(sums[1] / size, 1.0)
                    progress(done, total, sums[2] / SAMPLE_RATE, source_bytes)

        thread = threading.Thread(target=report, daemon=True)
        thread.start()
        try:
            yield path
        finally:
            stop.set()
            thread.join()
