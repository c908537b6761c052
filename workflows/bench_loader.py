"""The loader suite of workflows.benchmark: what the loader gives, over what a train step takes."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from harmonic.config import Config, override
from harmonic.data import Dataset, train_batches
from pipelines.build import PrepareSpec, prepare
from workflows.bench_train import measure

_SETTINGS = (16_000, 128_000, 960_512)  # samples of a window: SC09, Beethoven, YouTubeMix
_SAMPLES = 16_000_000  # of noise, for each setting


def suite(
    config: Config, lengths: Sequence[int] = _SETTINGS, samples: int = _SAMPLES, step_length: int = 16_000
) -> Iterator[dict[str, Any]]:
    """Batches of the config's size, from recordings as long as the windows, prepared for the purpose."""
    demand = measure(config, 1, step_length)["samples_per_second"]
    for length in lengths:
        with tempfile.TemporaryDirectory() as folder:
            given = _rate(config, Path(folder), length, max(samples // length, 8))
        yield {
            "config": config.name,
            "window": length,
            "batch": config.train.global_batch_size,
            "samples_per_second": given,
            "over_train_step": given / demand,
        }


def _rate(config: Config, folder: Path, length: int, recordings: int) -> float:
    numbers = np.random.default_rng(0)
    (folder / "recordings").mkdir()
    for i in range(recordings):
        noise = numbers.normal(0, 0.1, length).astype(np.float32)
        soundfile.write(folder / "recordings" / f"{i:06d}.wav", noise, 16_000, subtype="PCM_16")
    spec = PrepareSpec(
        dataset="noise",
        source=str(folder / "recordings"),
        output_dir=str(folder / "data"),
        encoding=config.data.encoding,
        num_levels=config.data.num_levels,
    )
    prepare(spec)
    sizes = [f"data.window_length={length}", "data.crop_length=0", "train.segment_length=0"]
    batches = train_batches(Dataset(folder / "data" / "noise"), override(config, sizes))
    next(batches)
    read, start = 0, time.perf_counter()
    while read < 4 or time.perf_counter() - start < 3:  # batches, and seconds
        next(batches)
        read += 1
    return read * config.train.global_batch_size * length / (time.perf_counter() - start)
