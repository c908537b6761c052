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

SETTINGS = ("sc09", "beethoven", "youtubemix")  # the paper's: windows of 16,000, 128,000 and 960,512 samples
_SAMPLES = 16_000_000  # of noise, for each setting


def suite(
    configs: Sequence[Config], batch: int = 1, length: int = 16_000, samples: int = _SAMPLES
) -> Iterator[dict[str, Any]]:
    """Batches of each config's windows, encoding and size, from recordings as long as the windows, prepared for the
    purpose; over what that config's train step takes.

    Args:
      configs: settings to measure.
      batch, length: of the train step. Its time grows linearly in both, where they are large enough for the device.
      samples: of noise to prepare, for each config.
    """
    demands: dict[Any, float] = {}
    for config in configs:
        sizes = config.model, config.data.num_levels
        if sizes not in demands:
            demands[sizes] = measure(override(config, ["train.segment_length=0"]), batch, length)["samples_per_second"]
        with tempfile.TemporaryDirectory() as folder:
            given, dtype = _rate(config, Path(folder), max(samples // config.data.window_length, 8))
        yield {
            "config": config.name,
            "encoding": config.data.encoding,
            "shape": [config.train.global_batch_size, config.training_length],
            "dtype": dtype,
            "samples_per_second": given,
            "train_step_shape": [batch, length],
            "over_train_step": given / demands[sizes],
        }


def _rate(config: Config, folder: Path, recordings: int) -> tuple[float, str]:
    """Samples a second, and their type."""
    numbers, length = np.random.default_rng(0), config.data.window_length
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
    batches = train_batches(Dataset(folder / "data" / "noise"), config)
    dtype = next(batches)["tokens"].dtype.name
    read, start = 0, time.perf_counter()
    while read < 4 or time.perf_counter() - start < 3:  # batches, and seconds
        next(batches)
        read += 1
    samples = read * config.train.global_batch_size * config.training_length
    return samples / (time.perf_counter() - start), dtype
