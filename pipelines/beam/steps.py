"""The Beam steps that write shards and publish a data set, and the pure functions in them."""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import functools
import gzip
import json
import math
import os
import struct
import time
import zlib
from collections.abc import Iterable, Iterator
from typing import Any

import apache_beam as beam
from apache_beam.metrics import Metrics

from harmonic.errors import UserError
from harmonic.records import SPLITS, Manifest, Record, Recording, Skipped, Split
from pipelines.audio.waveform import measure
from pipelines.beam.sink import (
    ShardWriter,
    WrittenShard,
    clear,
    create_file,
    flush_staged,
    is_local,
    join,
    one_line,
    open_file,
    output_errors,
    publish,
    scratch_errors,
    shard_name,
    stage_folder,
)
from pipelines.sources import Source, SourceRecording
from pipelines.sources.files import Unreadable

# A shard's split and number, and the id, label and bytes of each of its recordings. It travels as what Beam encodes
# quickly, without a class of ours in it.
ShardRows = tuple[str, int, list[tuple[str, str | None, int]]]

PROGRESS_ENTRY = struct.Struct("<QQQ")  # recordings, bytes of the source and samples since the last entry
_REPORT_SECONDS = 0.2


def _hash(recording: SourceRecording) -> int:
    return zlib.crc32((recording.group or recording.id).encode())


def shard_counts(
    recordings: Iterable[SourceRecording], shard_bytes: int, wanted: int | None = None, most: int = 65_536
) -> dict[str, int]:
    """How many shards each split gets: a function of the listing alone.

    `wanted`, or one for every `shard_bytes` of source and at most `most`; fewer where the recordings' hashes would
    leave a shard empty.
    """
    ids: dict[str, list[int]] = {split: [] for split in SPLITS}
    sizes = dict.fromkeys(SPLITS, 0)
    for recording in recordings:
        ids[recording.split].append(_hash(recording))
        sizes[recording.split] += recording.size
    counts = {}
    for split, hashes in ids.items():
        count = min(wanted or min(-(-sizes[split] // shard_bytes), most), len(hashes))
        while count > 1 and len({value % count for value in hashes}) < count:
            count -= -(-count // 16)
        counts[split] = max(count, 1)
    return counts


def group_by_shard(recordings: Iterable[SourceRecording], counts: dict[str, int]) -> list[ShardRows]:
    """What each shard is to hold, in the order of the listing; the largest shard first, so that workers that take them
    in turn have about as much to do.

    A recording's shard is the CRC-32 of its id or group, modulo its split's number of shards.
    """
    shards: dict[tuple[str, int], list[tuple[str, str | None, int]]] = {}
    for recording in recordings:
        key = recording.split, _hash(recording) % counts[recording.split]
        shards.setdefault(key, []).append((recording.id, recording.label, recording.size))
    largest_first = sorted(shards, key=lambda key: (-sum(size for _, _, size in shards[key]), key))
    return [(*key, shards[key]) for key in largest_first]


def stage_listing(folder: str, run: str, shards: Iterable[ShardRows], size: int) -> list[str]:
    """Writes what each shard is to hold, a line of JSON, into files in the run's own folder; returns their paths.

    Args:
      folder, run: as for `ShardWriter`.
      shards: what each is to hold.
      size: recordings after which the next file begins.

    Raises:
      UserError: the folder cannot be written.
    """
    paths: list[str] = []
    lines: list[str] = []
    held = 0

    def write() -> None:
        nonlocal held
        paths.append(join(stage_folder(folder, run), f"listing-{len(paths):05d}.gz"))
        with create_file(paths[-1]) as file:
            file.write(gzip.compress("\n".join(lines).encode(), 1))
        lines.clear()
        held = 0

    with output_errors(folder):
        if is_local(folder):
            os.makedirs(stage_folder(folder, run), exist_ok=True)
        for shard in shards:
            lines.append(json.dumps(shard))
            held += len(shard[2])
            if held >= size:
                write()
        if lines:
            write()
    return paths


def read_listing(path: str) -> Iterator[ShardRows]:
    """The shards of a file of `stage_listing`."""
    with open_file(path) as file:
        for line in gzip.decompress(file.read()).splitlines():
            split, index, rows = json.loads(line)
            yield split, index, [tuple(row) for row in rows]


class WriteShard(beam.DoFn):
    """ShardRows → WrittenShard: reads, decodes, resamples, quantises and writes one shard.

    Args:
      source: opens the recordings.
      counts: shards by split.
      manifest: what the data set is; its splits and skipped recordings are not looked at.
      folder, run: where to stage the shard, as for `ShardWriter`.
      progress: as for `Meter`.
    """

    def __init__(
        self, source: Source, counts: dict[str, int], manifest: Manifest, folder: str, run: str, progress: str | None
    ):
        self._source = source
        self._counts = counts
        self._manifest = manifest
        self._folder, self._run = folder, run
        self._progress = progress

    def start_bundle(self) -> None:
        self._flusher = concurrent.futures.ThreadPoolExecutor(1)  # for the disk, while the next shard is written
        self._flushing: list[concurrent.futures.Future[None]] = []

    def finish_bundle(self) -> None:
        with self._flusher:
            for flushed in self._flushing:
                flushed.result()

    def teardown(self) -> None:
        self._source.close()

    def process(self, element: ShardRows) -> Iterator[WrittenShard]:
        split, index, rows = element
        skipped = []
        m = self._manifest
        meter = Meter(self._progress)
        with ShardWriter(self._folder, self._run, m.window_length, m.hop_length) as writer:
            for recording, label, size in rows:
                try:
                    self._write(writer, recording, label, meter)
                    meter.add("recordings")
                except Unreadable as error:
                    skipped.append(Skipped(recording, split, str(error)))
                    meter.add("skipped")
                meter.add("done")
                meter.add("source_bytes", size)
                meter.report()
            meter.report(at_once=True)
            name = shard_name(split, index, self._counts[split])
            shard, staged = writer.stage(name)
        self._flushing.append(self._flusher.submit(flush_staged, self._folder, staged))
        yield WrittenShard(split, shard, staged, tuple(skipped))

    def _write(self, writer: ShardWriter, recording: str, label: str | None, meter: Meter) -> None:
        m = self._manifest
        with (
            self._source.open(recording) as file,
            measure(file, trim_silence=m.trim_silence, loudness=m.loudness) as waveform,
        ):
            records = 0
            with scratch_errors():
                for offset, tokens in waveform.pieces(m.encoding, m.num_levels, m.record_length):
                    record = Record(recording, offset, waveform.length, tokens, label)
                    meter.add("bytes", writer.write(record))
                    meter.add("samples", len(tokens))
                    meter.report()
                    records += 1
            writer.end_recording(
                Recording(
                    id=recording,
                    length=waveform.length,
                    records=records,
                    label=label,
                    low=waveform.low,
                    high=waveform.high,
                    source_rate=waveform.source_rate,
                    level=waveform.level,
                    cut_front=waveform.cut[0],
                    cut_back=waveform.cut[1],
                )
            )


class Meter:
    """Counts what a worker does, and tells Beam's counters and the progress file of it now and then: for each short
    recording both would cost as much as quantising it.

    Args:
      progress: a local file to which entries of `PROGRESS_ENTRY` are appended, or None.
    """

    def __init__(self, progress: str | None):
        self._progress = progress
        self._counts: collections.Counter[str] = collections.Counter()
        self._started = time.monotonic()
        self._reported = -math.inf

    def add(self, name: str, value: int = 1) -> None:
        """Adds to a counter."""
        self._counts[name] += value

    def report(self, at_once: bool = False) -> None:
        """Tells what was counted since the last time, if that is long enough ago."""
        now = time.monotonic()
        if now - self._reported < _REPORT_SECONDS and not at_once:
            return
        counts, self._counts = self._counts, collections.Counter()
        counts["milliseconds"] = round(1000 * (now - self._started))
        self._started = self._reported = now
        for name, value in counts.items():
            if name not in ("done", "source_bytes"):
                _counter(name).inc(value)
        if self._progress is not None:
            try:
                with open(self._progress, "ab") as file:
                    file.write(PROGRESS_ENTRY.pack(counts["done"], counts["source_bytes"], counts["samples"]))
            except OSError:  # progress is not worth a run
                self._progress = None


@functools.cache
def _counter(name: str) -> Any:
    return Metrics.counter("harmonic", name)


class Publish(beam.DoFn):
    """A list of all WrittenShards → the Manifest, written: counts, publishes, and only then is there a data set.

    Args:
      listed: how many recordings the source listed, by split.
      manifest: what the data set is, without splits and skipped recordings.
      folder, run: as for `ShardWriter`.
      complete: whether a skipped recording is an error.
    """

    def __init__(self, listed: dict[str, int], manifest: Manifest, folder: str, run: str, complete: bool):
        self._listed = listed
        self._manifest = manifest
        self._folder, self._run = folder, run
        self._complete = complete

    def process(self, shards: list[WrittenShard]) -> Iterator[Manifest]:
        # Of a shard that was written twice, either will do.
        written = sorted({shard.shard.file: shard for shard in shards}.values(), key=lambda s: s.shard.file)
        manifest = assemble(self._manifest, written)
        check_skipped(manifest, self._complete)
        check_counts(manifest, self._listed)
        files = [
            (path, name)
            for shard in written
            for path, name in zip(shard.staged, (shard.shard.file, shard.shard.index_file), strict=True)
        ]
        publish(self._folder, self._run, files, manifest)
        clear(self._folder, self._run)
        yield manifest


def assemble(manifest: Manifest, written: list[WrittenShard]) -> Manifest:
    """The manifest with its splits and skipped recordings filled in."""
    splits = {}
    for split in SPLITS:
        shards = tuple(shard.shard for shard in written if shard.split == split)
        splits[split] = Split(
            recordings=sum(shard.recordings for shard in shards),
            windows=sum(shard.windows for shard in shards),
            samples=sum(shard.samples for shard in shards),
            shards=shards,
        )
    skipped = [skipped for shard in written for skipped in shard.skipped]
    skipped.sort(key=lambda skipped: (SPLITS.index(skipped.split), skipped.recording))
    return dataclasses.replace(manifest, splits=splits, skipped=tuple(skipped))


def check_skipped(manifest: Manifest, complete: bool) -> None:
    """Refuses skipped recordings where the data set is to be complete, and splits of which nothing is left.

    Raises:
      UserError: names the first few recordings, and why they were skipped.
    """
    skipped = manifest.skipped
    if complete and skipped:
        first = "; ".join(f"{one_line(s.recording)} {s.reason}" for s in skipped[:3])
        raise UserError(
            f"{len(skipped)} recording{'s' * (len(skipped) != 1)} of {manifest.dataset} cannot be read: {first}"
            f"{'; ...' * (len(skipped) > 3)}; get the archive again, or give --allow_skipped to leave them out"
        )
    for name, split in manifest.splits.items():
        if not split.recordings:
            reason = next((f": {one_line(s.recording)} {s.reason}" for s in skipped if s.split == name), "")
            raise UserError(f"none of the recordings of split {name} can be read{reason}; give other recordings")


def check_counts(manifest: Manifest, listed: dict[str, int]) -> None:
    """Every listed recording was written or skipped, once.

    Raises:
      UserError: the runner lost or doubled recordings.
    """
    for name, split in manifest.splits.items():
        found = split.recordings + sum(skipped.split == name for skipped in manifest.skipped)
        if found != listed[name]:
            raise UserError(
                f"the runner lost recordings of split {name}: {found} came out of {listed[name]}; use another --runner"
            )
