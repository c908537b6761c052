"""Figures of a prepared data set: durations, levels, tokens. The memory does not grow with the data set."""

from __future__ import annotations

import collections
import dataclasses
import heapq
import math
import os
from collections.abc import Callable, Iterable

import numpy as np

from harmonic.errors import UserError
from harmonic.records import Manifest, RecordError
from pipelines.inspection.reading import fetched, open_shard, read_record, recordings

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
_EXTREMES = 5  # how many of the loudest and of the quietest recordings are named
_HISTOGRAM_RECORDS = 4_096  # read at most for the histogram, spread over all records
_LENGTH_BITS = 12  # lengths are rounded to this many binary digits: 0.05 %


@dataclasses.dataclass(frozen=True)
class Level:
    """A recording, its level in dB below full scale before normalisation, and its gain in dB."""

    recording: str
    split: str
    level: float
    gain: float | None


@dataclasses.dataclass(frozen=True)
class Survey:
    """A data set's figures.

    Attributes:
      durations: for each split, seconds of a recording at each of `QUANTILES`.
      cut_seconds: sum of the silence that trimming cut off.
      loudest, quietest: recordings by level, the loudest and the quietest first; none in a data set of format 1.
      tokens: [num_levels] how often each token was seen.
      records: how many records were read for `tokens`.
    """

    durations: dict[str, tuple[float, ...]]
    cut_seconds: float
    loudest: tuple[Level, ...]
    quietest: tuple[Level, ...]
    tokens: tuple[int, ...]
    records: int

    @property
    def entropy(self) -> float:
        """Entropy of the tokens in bits a sample: the score of a model that knows only the histogram."""
        counts = np.array([count for count in self.tokens if count], np.float64)
        shares = counts / counts.sum()
        return float(-(shares * np.log2(shares)).sum())


def survey(folder: str, manifest: Manifest, progress: Callable[[int, int], None]) -> Survey:
    """Reads all indices, and up to 4,096 records.

    Args:
      folder: the data set's.
      manifest: its manifest.
      progress: called with (recordings done, recordings in all).

    Raises:
      UserError: an index or a record is missing or damaged.
    """
    lengths: dict[str, collections.Counter[int]] = {split: collections.Counter() for split in manifest.splits}
    total, cut = sum(split.recordings for split in manifest.splits.values()), 0
    loudest: list[tuple[float, int, Level]] = []
    quietest: list[tuple[float, int, Level]] = []
    for number, located in enumerate(recordings(folder, manifest)):
        row = located.recording
        lengths[located.split][_rounded(row.length)] += 1
        cut += row.cut_front + row.cut_back
        if row.level is not None:
            gain = 20 * math.log10(1 / row.high) if manifest.loudness is not None and row.high > 0 else None
            entry = Level(row.id, located.split, row.level, None if gain is None else round(gain, 2))
            for heap, key in ((loudest, row.level), (quietest, -row.level)):
                heapq.heappush(heap, (key, -number, entry))
                if len(heap) > _EXTREMES:
                    heapq.heappop(heap)
        progress(number + 1, total)
    counts, read = _histogram(folder, manifest)
    return Survey(
        durations={split: _quantiles(found, manifest.sample_rate) for split, found in lengths.items()},
        cut_seconds=cut / manifest.sample_rate,
        loudest=tuple(level for *_, level in sorted(loudest, reverse=True)),
        quietest=tuple(level for *_, level in sorted(quietest, reverse=True)),
        tokens=tuple(int(count) for count in counts),
        records=read,
    )


def _rounded(length: int) -> int:
    shift = max(0, length.bit_length() - _LENGTH_BITS)
    return length >> shift << shift


def _quantiles(lengths: collections.Counter[int], sample_rate: int) -> tuple[float, ...]:
    """By nearest rank."""
    ordered = sorted(lengths)
    ends = np.cumsum([lengths[length] for length in ordered])
    ranks = (math.ceil(q * int(ends[-1])) or 1 for q in QUANTILES)
    return tuple(ordered[int(np.searchsorted(ends, rank))] / sample_rate for rank in ranks)


def _histogram(folder: str, manifest: Manifest) -> tuple[np.ndarray, int]:
    shards = [shard for split in manifest.splits.values() for shard in split.shards]
    stride = -(-sum(shard.records for shard in shards) // _HISTOGRAM_RECORDS)
    counts, first, read = np.zeros(manifest.num_levels, np.int64), 0, 0
    for shard in shards:
        chosen = range(-first % stride, shard.records, stride)
        first += shard.records
        if not chosen:
            continue
        with fetched(folder, shard) as local:
            number = 0
            try:
                records = open_shard(os.path.join(local, shard.file))
                for number in chosen:
                    tokens = read_record(records, number).tokens
                    if tokens.size and int(tokens.max()) >= manifest.num_levels:
                        raise RecordError(f"it has a token {tokens.max()}")
                    counts += np.bincount(tokens.ravel(), minlength=manifest.num_levels)
                    read += 1
            except RecordError as error:
                raise UserError(f"{shard.file} is damaged at record {number} ({error}); --verify names all") from error
    return counts, read


def plot(counts: Iterable[int], columns: int = 64, height: int = 8) -> list[str]:
    """A histogram as text; each column is the mean of equally many neighbouring values."""
    values = np.array(list(counts), np.float64)
    parts = np.array([part.mean() for part in np.array_split(values, min(columns, len(values)))])
    tops = np.ceil(parts / parts.max() * height)
    lines = ["".join("#" if top > row else " " for top in tops).rstrip() for row in reversed(range(height))]
    axis = f"0{len(values) - 1:>{max(len(parts) - 1, 1)}}"
    return [*lines, axis]
