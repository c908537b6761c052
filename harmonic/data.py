"""From a prepared data set to batches: Grain over ArrayRecord files.

    dataset = Dataset("data/sc09")
    batches = train_batches(dataset, config)                 # an iterator: {"tokens", "length", "label", "row"}
    for batch in evaluation_batches(dataset, "test", ...):   # recordings in order, streamed in segments

Windows are index arithmetic over the records of a recording; only the records that a window touches are read, and of
several processes each reads its own rows and its own pieces of them.
"""

from __future__ import annotations

import bisect
import dataclasses
import os
import resource
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, SupportsIndex

import grain
import numpy as np
from array_record.python.array_record_module import ArrayRecordReader

from harmonic.config import Config
from harmonic.errors import UserError, one_line
from harmonic.records import (
    Manifest,
    RecordError,
    Recording,
    Shard,
    count_windows,
    decode_record,
    load_manifest,
    read_index,
    record_head,
    record_tokens,
)

_OTHER_FILES = 256  # that a process may have open besides shards


class Split:
    """The recordings of one split, at random access.

    Attributes:
      recordings: their index entries, in the order of the shards.
      lengths: [recordings] int64, in samples.
    """

    def __init__(self, folder: Path, manifest: Manifest, name: str):
        self.folder, self.manifest, self.name = folder, manifest, name
        shards = manifest.splits[name].shards
        self.recordings: list[Recording] = []
        for shard in shards:
            _check_size(folder, shard)
            self.recordings += read_index(folder, shard)
        if not self.recordings:
            raise UserError(f"{folder} has no recordings in its {name} split; prepare the data set again")
        self.lengths = np.array([r.length for r in self.recordings], np.int64)
        records = np.array([r.records for r in self.recordings], np.int64)
        self._first_record = np.concatenate([[0], np.cumsum(records)])
        self._shard_ends: list[int] = np.cumsum([shard.records for shard in shards]).tolist()
        self._shards = shards
        self._readers: list[ArrayRecordReader | None] = [None] * len(shards)
        self._lock = threading.Lock()
        _allow_open_files(folder, sum(len(split.shards) for split in manifest.splits.values()))
        for shard in shards:
            _check_records(folder, shard)

    def labels(self) -> tuple[str, ...]:
        """The labels of its recordings, in order; a recording's label is given as its place here."""
        return tuple(sorted({r.label for r in self.recordings if r.label is not None}))

    def label_numbers(self, labels: Sequence[str]) -> np.ndarray:
        """[recordings] int32, the place of each one's label in `labels`; -1 where it is not there, or has none."""
        places = {label: place for place, label in enumerate(labels)}
        return np.array([places.get(r.label or "", -1) for r in self.recordings], np.int32)

    def read(self, index: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Tokens [length, channels] of samples start .. stop of a recording (all of it by default).

        Raises:
          UserError: a record is damaged.
        """
        recording, piece = self.recordings[index], self.manifest.record_length
        stop = recording.length if stop is None else min(stop, recording.length)
        if stop <= start:
            return np.zeros((0, self.manifest.channels), self.manifest.token_dtype)
        first, last = start // piece, (stop - 1) // piece
        if first == last:
            return self._record(index, first)[start - first * piece : stop - first * piece]
        tokens = np.empty((stop - start, self.manifest.channels), self.manifest.token_dtype)
        for number in range(first, last + 1):
            begin, end = max(start, number * piece), min(stop, (number + 1) * piece)
            tokens[begin - start : end - start] = self._record(index, number)[
                begin - number * piece : end - number * piece
            ]
        return tokens

    def _record(self, index: int, number: int) -> np.ndarray:
        """The tokens of a recording's record of that number."""
        recording, m = self.recordings[index], self.manifest
        offset = number * m.record_length
        length = min(m.record_length, recording.length - offset)
        kind = m.channels, m.token_dtype
        head = record_head(recording.id, recording.label, offset, length, recording.length, *kind)
        try:
            (data,) = self._read_record(int(self._first_record[index]) + number)
            tokens = record_tokens(data, head, length, *kind)
            if tokens is None:
                record = decode_record(data, verify=False)
                tokens = record.tokens
                if (record.recording, record.offset, len(tokens)) != (recording.id, offset, length):
                    raise RecordError(
                        f"it holds {len(tokens)} samples of {record.recording} from {record.offset}, not {length} from "
                        f"{offset}"
                    )
        except (RecordError, RuntimeError, ValueError, IndexError, OSError) as error:
            raise UserError(
                f"{self._shard_of(index).file} in {self.folder} is damaged at recording {one_line(recording.id)}, "
                f"sample {offset} ({one_line(error)}); prepare the data set again"
            ) from error
        return tokens

    def _read_record(self, number: int) -> list[bytes]:
        # ArrayRecord holds the bytes to a hash of its own. Its own data source is slower by a third of a short record.
        shard = bisect.bisect_right(self._shard_ends, number)
        reader = self._readers[shard]
        if reader is None:
            with self._lock:
                reader = self._readers[shard] = self._readers[shard] or _open(self.folder / self._shards[shard].file)
        place = number - self._shard_ends[shard] + self._shards[shard].records
        return reader.read(place, place + 1)

    def _shard_of(self, index: int) -> Shard:
        return self._shards[bisect.bisect_right(self._shard_ends, self._first_record[index])]


class Dataset:
    """A prepared data set.

    Raises:
      UserError: there is no whole data set in `folder`, or a shard is not as the manifest says.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.manifest = load_manifest(folder)
        self._splits: dict[str, Split] = {}

    def split(self, name: str) -> Split:
        """`train`, `validation` or `test`."""
        if name not in self.manifest.splits:
            raise UserError(f"unknown split {name!r}; use one of {', '.join(self.manifest.splits)}")
        if name not in self._splits:
            self._splits[name] = Split(self.folder, self.manifest, name)
        return self._splits[name]

    def labels(self) -> tuple[str, ...]:
        """The labels that a model may be conditioned on: those of the training split."""
        return self.split("train").labels()

    def check(self, config: Config) -> None:
        """Refuses a config that reads other tokens than the data set holds."""
        for name, ours in (("encoding", config.data.encoding), ("num_levels", config.data.num_levels)):
            theirs = getattr(self.manifest, name)
            if ours != theirs:
                raise UserError(
                    f"{self.folder} was prepared with {name}={theirs}, but the config says data.{name}={ours}; "
                    f"use --set=data.{name}={theirs}, or prepare the data set again"
                )


def _allow_open_files(folder: Path, shards: int) -> None:
    """Raises this process's limit of open files, since each shard stays open once it has been read.

    Raises:
      UserError: the system does not allow as many.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = len(os.listdir("/dev/fd")) + shards + _OTHER_FILES
    if needed <= soft or soft == resource.RLIM_INFINITY:
        return
    if hard != resource.RLIM_INFINITY and needed > hard:
        raise UserError(
            f"{folder} has {shards:,} shards, each an open file, and this system allows a process {hard:,} "
            f"open files: raise that limit (ulimit -Hn), or prepare the data set with a smaller --num_shards"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def _open(path: Path) -> ArrayRecordReader:
    """A reader for records at random, by any number of threads."""
    options = "readahead_buffer_size:0,max_parallelism:0"
    return ArrayRecordReader(str(path), options=options, file_reader_buffer_size=1 << 15)


def _check_records(folder: Path, shard: Shard) -> None:
    path = folder / shard.file
    try:
        reader = _open(path)
        count = reader.num_records()
        reader.close()
    except (RuntimeError, ValueError, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} cannot be opened ({reason}); prepare the data set again") from error
    if count != shard.records:
        raise UserError(
            f"{path} holds {count} records, not the {shard.records} of the manifest; prepare the data set again"
        )


def _check_size(folder: Path, shard: Shard) -> None:
    path = folder / shard.file
    try:
        size = path.stat().st_size
    except OSError as error:
        raise UserError(f"{path} is missing ({error.strerror}); prepare the data set again") from error
    if size != shard.bytes:
        raise UserError(f"{path} has {size} bytes, not the {shard.bytes} of the manifest; prepare the data set again")


class Windows(grain.sources.RandomAccessDataSource):
    """A split cut into windows, each padded with zeros to `padded` samples.

    Args:
      split: what to read.
      window: samples of a window; a recording's last one may be shorter.
      hop: samples from one window's start to the next: they overlap, or skip some; `window` if not given.
      crop: use only the first that many samples of each recording; 0 for all.
      padded: length of a window with its padding; at least the longest window.
      segments: equal parts of that length, which are cut into pieces.
      labels: of the data set; a recording's label is its number among them.
      piece: (i, n): return and read only the i-th of n equal pieces of every segment, joined.

    Items are {"tokens": [padded / n, channels], "length": int32, of the whole window, "label": int32, its place in
    `labels`, or -1}.
    """

    def __init__(
        self,
        split: Split,
        window: int,
        *,
        hop: int | None = None,
        crop: int = 0,
        padded: int | None = None,
        segments: int = 1,
        labels: Sequence[str] = (),
        piece: tuple[int, int] = (0, 1),
    ):
        self._split, self.window, self.hop = split, window, hop or window
        self._labels = split.label_numbers(labels)
        self.lengths = np.minimum(split.lengths, crop) if crop else split.lengths
        self._ends = np.cumsum([count_windows(int(length), window, self.hop) for length in self.lengths])
        self.padded = padded or int(min(window, self.lengths.max()))
        index, count = piece
        stride, self._piece = self.padded // segments, self.padded // segments // count
        self._offsets = [segment * stride + index * self._piece for segment in range(segments)]
        # If the gap between two pieces is shorter than a record, one read of the whole span decodes each record once.
        self._at_once = stride - self._piece < split.manifest.record_length

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: SupportsIndex) -> dict[str, Any]:
        recording, start, stop = self.locate(index)
        pieces = [(start + offset, min(start + offset + self._piece, stop)) for offset in self._offsets]
        pieces = [(first, last) for first, last in pieces if first < stop]
        about = {"length": np.int32(stop - start), "label": self._labels[recording]}
        if len(self._offsets) == len(pieces) == 1 and pieces[0][1] - pieces[0][0] == self._piece:
            # Nothing to fill up, and nothing to copy.
            return {"tokens": self._split.read(recording, *pieces[0]), **about}
        shape = (len(self._offsets), self._piece, self._split.manifest.channels)
        tokens = np.zeros(shape, self._split.manifest.token_dtype)
        if pieces and self._at_once:
            begin = pieces[0][0]
            span = self._split.read(recording, begin, pieces[-1][1])
        for number, (first, last) in enumerate(pieces):
            read = span[first - begin : last - begin] if self._at_once else self._split.read(recording, first, last)
            tokens[number, : last - first] = read
        return {"tokens": tokens.reshape(-1, shape[2]), **about}

    def locate(self, index: SupportsIndex) -> tuple[int, int, int]:
        """(recording, start, stop) of a window."""
        index = int(index)
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        recording = int(np.searchsorted(self._ends, index, side="right"))
        first = self._ends[recording - 1] if recording else 0
        start = (index - int(first)) * self.hop
        return recording, start, min(start + self.window, int(self.lengths[recording]))

    def __repr__(self) -> str:
        # Grain tells data sources apart by this: a resumed iterator must find the same one.
        hop = f", {self.hop}" * (self.hop != self.window)
        return f"Windows({self._split.name}, {self._split.manifest.fingerprint}, {self.window}, {self.padded}{hop})"


def train_batches(
    dataset: Dataset, config: Config, *, shard: tuple[int, int] = (0, 1), piece: tuple[int, int] = (0, 1)
) -> grain.DatasetIterator:
    """An endless, shuffled iterator over training batches; every epoch has its own order, set by `config.seed`.

    Args:
      dataset: prepared with the config's encoding.
      config: its window and crop lengths, segments, batch size and seed.
      shard: (i, n): read only rows i, i + n, ... of each global batch. The n shards together read what one reads.
      piece: (j, m): read only the j-th of m equal pieces of each segment.

    Returns:
      Batches {"tokens": [batch / n, segments * segment_length / m, channels], and [batch / n] int32 "length", "label"
      (its place in `Dataset.labels`, or -1) and "row" (in the global batch)}. Its `get_state()` is a small dictionary
      that any number of shards, pieces and threads can `set_state()`.

    Raises:
      UserError: a batch that the shards do not divide.
    """
    dataset.check(config)
    index, count = shard
    batch = config.train.global_batch_size
    if batch % count:
        raise UserError(f"train.global_batch_size={batch} cannot be divided among {count} shards of the data axis")
    segments, length = config.segments
    windows = Windows(
        dataset.split("train"),
        config.data.window_length,
        hop=hop_length(dataset.manifest, config),
        crop=config.data.crop_length,
        padded=segments * length,
        segments=segments,
        labels=dataset.labels(),
        piece=piece,
    )
    rows = np.arange(index, batch, count, dtype=np.int32)
    # Batched before it becomes an iterator: the order is then the same for any number of threads, and repeated before
    # it is sliced: shards would otherwise run out at different times.
    batches = (
        grain.MapDataset.source(windows)
        .seed(config.seed)
        .shuffle()
        .repeat()[index::count]
        .batch(batch // count, drop_remainder=True)
        .map(lambda b: {**b, "row": rows})
    )
    options = grain.ReadOptions(num_threads=config.data.threads, prefetch_buffer_size=config.data.prefetch)
    return iter(batches.to_iter_dataset(options))


def hop_length(manifest: Manifest, config: Config) -> int:
    """Samples from the start of one training window to the next: the config's own, else the data set's where windows
    are as long as its own, else no overlap."""
    window = config.data.window_length
    return config.data.hop_length or (manifest.hop_length if window == manifest.window_length else window)


@dataclasses.dataclass(frozen=True)
class EvaluationBatch:
    """Rows that are evaluated side by side.

    Attributes:
      lengths: [batch] int32 samples of each row; 0 for rows that only fill the batch.
      labels: [batch] int32, the place of each row's label among those given, or -1.
      segments: yields tokens [batch, segment_length, channels] from the start to the end of the longest row.
    """

    lengths: np.ndarray
    labels: np.ndarray
    segments: Iterator[np.ndarray]


def evaluation_batches(
    split: Split,
    *,
    batch_size: int,
    segment_length: int,
    crop_length: int = 0,
    reset_every: int = 0,
    limit: int = 0,
    shard: tuple[int, int] = (0, 1),
    labels: Sequence[str] = (),
) -> Iterator[EvaluationBatch]:
    """A split, every sample once: recordings longest first, so that rows of a batch end together.

    Args:
      split: what to read.
      batch_size: rows side by side; the last batch is filled up with rows of length zero.
      segment_length: samples that are in memory at once.
      crop_length: look only at the first that many samples of each recording; 0 for all.
      reset_every: cut recordings into rows of that many samples, each with no past; 0 keeps recordings whole.
      limit: look only at that many recordings, spread over the split; 0 for all.
      shard: (i, n): only the i-th of n shares, of about the same size, which together are the whole.
      labels: of the data set; a recording's label is its number among them.
    """
    numbers = split.label_numbers(labels)
    chosen = np.arange(len(split.recordings))
    if limit and limit < len(chosen):
        chosen = chosen[np.linspace(0, len(chosen) - 1, limit).round().astype(int)]
    rows = []
    for recording in chosen:
        length = int(split.lengths[recording])
        length = min(length, crop_length) if crop_length else length
        step = reset_every or max(length, 1)
        rows += [(int(recording), start, min(start + step, length)) for start in range(0, length, step)]
    rows.sort(key=lambda row: (row[1] - row[2], row))
    rows = rows[shard[0] :: shard[1]]
    for first in range(0, len(rows), batch_size):
        batch = rows[first : first + batch_size]
        lengths = np.zeros(batch_size, np.int32)
        lengths[: len(batch)] = [stop - start for _, start, stop in batch]
        found = np.full(batch_size, -1, np.int32)
        found[: len(batch)] = [numbers[recording] for recording, _, _ in batch]
        yield EvaluationBatch(lengths, found, stream_rows(split, batch, batch_size, segment_length))


def stream_rows(
    split: Split, rows: list[tuple[int, int, int]], batch_size: int, segment_length: int
) -> Iterator[np.ndarray]:
    """Tokens [batch_size, segment_length, channels] of rows (recording, start, stop) side by side, then zeros."""
    longest = max(stop - start for _, start, stop in rows)
    shape = (batch_size, segment_length, split.manifest.channels)
    for offset in range(0, longest, segment_length):
        tokens = np.zeros(shape, split.manifest.token_dtype)
        for i, (recording, start, stop) in enumerate(rows):
            if start + offset < stop:
                piece = split.read(recording, start + offset, min(start + offset + segment_length, stop))
                tokens[i, : len(piece)] = piece
        yield tokens
