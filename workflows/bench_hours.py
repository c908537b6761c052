"""Many hours of audio through pipelines.prepare, with the memory of every process noted each second.

Half of the hours are recordings of a second, half are recordings of two hours at 44.1 kHz, in one folder, so that a
worker meets both all the time.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from harmonic.errors import UserError
from harmonic.records import load_manifest
from workflows.bench_prepare import platform, write_recordings

_LONG_SECONDS = 7_200.0
_EVERY = 1.0  # seconds between two looks


def suite(
    hours: float, *, long_seconds: float = _LONG_SECONDS, processes: int | None = None, minute: float = 60.0
) -> Iterator[dict[str, Any]]:
    """A row of the run, then one a process: its peak of resident memory in each minute of its life.

    Args:
      hours: of audio to make and to prepare; at least that much is.
      long_seconds: of a long recording.
      processes: workers; one for each core if None.
      minute: seconds that count as a minute.
    """
    processes = processes or os.cpu_count() or 1
    with tempfile.TemporaryDirectory(prefix="harmonic-hours-") as folder:
        source = Path(folder) / "source"
        short, long = round(1_800 * hours), -(-round(1_800 * hours) // round(long_seconds))
        write_recordings(source, short, 1.0, 16_000)
        write_recordings(source, long, long_seconds, 44_100, first=short)
        command = [
            *(sys.executable, "-m", "pipelines.prepare", "--dataset=hours", f"--source={source}"),
            *(f"--output_dir={folder}", "--direct_running_mode=multi_processing", f"--direct_num_workers={processes}"),
        ]
        start = time.perf_counter()
        with open(Path(folder) / "errors", "w+") as errors:
            running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)
            try:
                seen = _watch(running, minute)
            finally:
                running.kill()
                running.wait()
            errors.seek(0)
            if running.returncode:
                raise UserError(f"preparing failed: {(errors.read().splitlines() or ['without a word'])[-1]}")
        seconds = time.perf_counter() - start
        manifest = load_manifest(Path(folder) / "hours")
        prepared = sum(split.samples for split in manifest.splits.values()) / manifest.sample_rate / 3600
        yield {
            "platform": platform(),
            "what": "hours",
            "hours": prepared,
            "recordings": sum(split.recordings for split in manifest.splits.values()),
            "longest_seconds": max(s.longest for split in manifest.splits.values() for s in split.shards) / 16_000,
            "processes": processes,
            "seconds": seconds,
            "hours_per_second": prepared / seconds,
        }
        for name, peaks in seen:
            later = peaks[1:] or peaks
            yield {
                "platform": platform(),
                "what": "memory",
                "process": name,
                "peak_bytes_by_minute": peaks,
                "highest_over_lowest_after_first_minute": max(later) / min(later),
            }


def _watch(running: subprocess.Popen[bytes], minute: float) -> list[tuple[str, list[int]]]:
    """Name and peaks of each process that was there for longer than a moment, the launcher first."""
    peaks: dict[int, list[int]] = {}
    born: dict[int, float] = {}
    workers: set[int] = set()
    while running.poll() is None:
        for pid in (running.pid, *_children(running.pid)):
            try:
                with open(f"/proc/{pid}/status", encoding="ascii", errors="replace") as file:
                    found = re.search(r"VmRSS:\s*(\d+) kB", file.read())
                with open(f"/proc/{pid}/cmdline", "rb") as file:
                    workers |= {pid} if b"pipelines.beam.workers" in file.read() else set()  # the server is the first
            except OSError:  # it has just ended
                continue
            if found and (pid in workers or pid == running.pid):
                now = time.monotonic()
                since = int((now - born.setdefault(pid, now)) // minute)
                mine = peaks.setdefault(pid, [])
                mine += [0] * (since + 1 - len(mine))
                mine[since] = max(mine[since], 1_024 * int(found[1]))
        time.sleep(_EVERY)
    ordered = [running.pid, *sorted(workers)]
    names = ["launcher", "server of workers", *(f"worker {i}" for i in range(len(workers) - 1))]
    return [(name, [p for p in peaks[pid] if p]) for name, pid in zip(names, ordered, strict=True) if pid in peaks]


def _children(pid: int) -> Iterator[int]:
    """All processes below one."""
    try:
        tasks = os.listdir(f"/proc/{pid}/task")
        found = [Path(f"/proc/{pid}/task/{task}/children").read_text().split() for task in tasks]
    except OSError:
        return
    for child in sorted({int(number) for numbers in found for number in numbers}):
        yield child
        yield from _children(child)
