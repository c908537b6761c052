"""The prepare suite of workflows.benchmark: pipelines.prepare beside a bare script, shards beside raw files.

Both sides of a ratio are measured in turn, in the same run. Preparing is timed as what a user waits for: a command from
its start to its end, `workflows.plain_prepare` beside `pipelines.prepare` with as many worker processes.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import grain
import numpy as np
import soundfile

from harmonic.config import DataConfig
from harmonic.data import Dataset, Split, Windows
from harmonic.errors import UserError
from harmonic.records import Manifest
from pipelines.build import PrepareSpec, prepare

SPEECH = (40_000, 1.0, 16_000)  # recordings, seconds, Hz: as SC09
MUSIC = (20, 600.0, 44_100)
WINDOWS = ((16_000, 32), (128_000, 32), (960_512, 4))  # samples, in batches of so many: SC09, Beethoven, YouTubeMix
_READ_SAMPLES = 32_000_000  # for each size of window
_READ_SECONDS = 0.7
_READ_ROUNDS = 15  # short ones in turn, and their medians: the rate of a busy machine changes within seconds
_ROUNDS = 5


def platform() -> str:
    """What runs this: prepare never touches an accelerator."""
    return f"cpu: {os.cpu_count()} cores"


def suite(
    shapes: Sequence[tuple[int, float, int]] = (SPEECH, MUSIC),
    windows: Sequence[tuple[int, int]] = WINDOWS,
    *,
    processes: int | None = None,
    rounds: int = _ROUNDS,
    read_rounds: int = _READ_ROUNDS,
    read_samples: int = _READ_SAMPLES,
) -> Iterator[dict[str, Any]]:
    """Rows of preparing each shape (recordings, seconds of each, Hz), then of reading windows (samples, batch)."""
    processes = processes or os.cpu_count() or 1
    with tempfile.TemporaryDirectory(prefix="harmonic-bench-") as folder:
        few = write_recordings(Path(folder) / "few", 3, 1.0, 16_000)
        fixed = min(
            (_seconds(_ours(few, Path(folder) / f"{i}", processes)) for i in range(rounds if shapes else 0)), default=0
        )
        for number, shape in enumerate(shapes):
            yield _prepare_row(Path(folder) / f"shape-{number}", shape, processes, rounds, fixed)
    for window, batch in windows:
        with tempfile.TemporaryDirectory(prefix="harmonic-bench-") as folder:
            yield _read_row(Path(folder), window, batch, max(read_samples // window, 2 * batch), read_rounds)


def write_recordings(folder: Path, count: int, seconds: float, rate: int, first: int = 0) -> Path:
    """WAV files of a tone in noise, each another excerpt of the same minutes, over and over where it is longer."""
    folder.mkdir(parents=True, exist_ok=True)
    length, numbers = round(seconds * rate), np.random.default_rng(0)
    pool = 0.3 * np.sin(0.05 * np.arange(1 << 22)) + numbers.normal(0, 0.02, 1 << 22)
    pool = np.tile((32_767 * pool).astype(np.int16), 2)
    for i in range(first, first + count):
        start, left = 7_919 * i % (1 << 22), length
        with soundfile.SoundFile(folder / f"{i:07d}.wav", "w", rate, 1, subtype="PCM_16") as file:
            while left:
                part = pool[start : start + min(left, 1 << 22)]
                file.write(part)
                left -= len(part)
    return folder


def _prepare_row(
    folder: Path, shape: tuple[int, float, int], processes: int, rounds: int, fixed: float
) -> dict[str, Any]:
    count, seconds, rate = shape
    source = write_recordings(folder / "source", count, seconds, rate)
    plain, ours = [], []
    for i in range(rounds):
        target = folder / f"plain-{i}"
        plain.append(_seconds(["workflows.plain_prepare", str(source), str(target), str(processes)]))
        ours.append(_seconds(_ours(source, folder / f"ours-{i}", processes)))
    return {
        "platform": platform(),
        "what": "prepare",
        "recordings": count,
        "seconds_each": seconds,
        "sample_rate": rate,
        "processes": processes,
        "recordings_per_second": count / min(ours),
        "hours_per_second": count * seconds / 3600 / min(ours),
        "of_plain_script": min(plain) / min(ours),
        "seconds": min(ours),
        "plain_seconds": min(plain),
        "fixed_seconds": fixed,  # of three recordings of a second
    }


def _ours(source: Path, output: Path, processes: int) -> list[str]:
    runner = ["--direct_running_mode=multi_processing", f"--direct_num_workers={processes}"]
    names = ["--dataset=noise", f"--source={source}", f"--output_dir={output}"]
    return ["pipelines.prepare", *names, *(runner if processes > 1 else ())]


def _seconds(command: list[str]) -> float:
    os.sync()  # what was written before is not to be waited for, nor the disk to be shared with it
    start = time.perf_counter()
    ended = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True)
    if ended.returncode:
        raise UserError(f"{command[0]} failed: {(ended.stderr.splitlines() or ['without a word'])[-1]}")
    return time.perf_counter() - start


class RawSplit:
    """As much of a `Split` as `Windows` needs, read from one raw file of all recordings' tokens, one after another."""

    def __init__(self, split: Split, path: Path):
        self.manifest: Manifest = split.manifest
        self.name, self.lengths, self.label_numbers = split.name, split.lengths, split.label_numbers
        self._dtype = np.dtype(self.manifest.token_dtype)
        self._width = self._dtype.itemsize * self.manifest.channels
        self._first = np.concatenate([[0], np.cumsum(split.lengths)]) * self._width
        with open(path, "wb") as file:
            for i in range(len(split.lengths)):
                file.write(split.read(i).tobytes())
        self._file = os.open(path, os.O_RDONLY)

    def read(self, index: int, start: int, stop: int) -> np.ndarray:
        """As `harmonic.data.Split.read`."""
        data = os.pread(self._file, (stop - start) * self._width, int(self._first[index]) + start * self._width)
        return np.frombuffer(data, self._dtype).reshape(-1, self.manifest.channels)

    def close(self) -> None:
        """Closes the file."""
        os.close(self._file)


def _read_row(folder: Path, window: int, batch: int, recordings: int, rounds: int) -> dict[str, Any]:
    """Windows a second of recordings as long as they are, shuffled and in batches, by the loader's own threads."""
    source = write_recordings(folder / "source", recordings, window / 16_000, 16_000)
    prepare(PrepareSpec("noise", str(source), str(folder), window_length=window))
    split = Dataset(folder / "noise").split("train")
    raw = RawSplit(split, folder / "raw")
    ours, plain = [], []
    for _ in range(rounds):
        plain.append(_rate(raw, window, batch))
        ours.append(_rate(split, window, batch))
    raw.close()
    return {
        "platform": platform(),
        "what": "read",
        "window": window,
        "batch": batch,
        "windows_per_second": statistics.median(ours),
        "of_raw_files": statistics.median(ours) / statistics.median(plain),
        "raw_windows_per_second": statistics.median(plain),
        "of_raw_bytes": sum(shard.bytes for shard in split.manifest.splits["train"].shards) / int(split.lengths.sum()),
    }


def _rate(split: Any, window: int, batch: int) -> float:
    data = DataConfig()
    options = grain.ReadOptions(num_threads=data.threads, prefetch_buffer_size=data.prefetch)
    windows = grain.MapDataset.source(Windows(split, window)).seed(0).shuffle().repeat()
    batches = iter(windows.batch(batch, drop_remainder=True).to_iter_dataset(options))
    next(batches)
    read, start = 0, time.perf_counter()
    while (passed := time.perf_counter() - start) < _READ_SECONDS:
        next(batches)
        read += batch
    return read / passed
