"""The Beam steps that write shards and publish a data set, and the pure functions in them."""

from __future__ import annotations

import concurrent.futures
import dataclasses
from collections.abc import Collection, Iterator

import apache_beam as beam

from harmonic.audio import PUBLISHED
from harmonic.errors import Unreadable, UserError, one_line
from harmonic.records import SPLITS, Manifest, Noted, Record, Recording, Skipped, Split
from pipelines.audio.waveform import measure
from pipelines.beam.progress import Meter
from pipelines.beam.sharding import ShardRows
from pipelines.beam.sink import ShardWriter, WrittenShard, clear, flush_staged, publish, shard_name
from pipelines.errors import scratch_errors
from pipelines.sources.base import Source
from pipelines.sources.layouts import DATA_SETS


class WriteShard(beam.DoFn):
    """ShardRows -> WrittenShard: reads, decodes, resamples, quantises and writes one shard.

    Args:
      source: opens the recordings.
      counts: shards by split.
      manifest: the data set's properties; its splits and skipped recordings are not used.
      folder, run: as for `ShardWriter`.
      progress: the path for `Meter`.
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
        self._flusher = concurrent.futures.ThreadPoolExecutor(1)  # waits for the disk while the next shard is written
        self._flushing: list[concurrent.futures.Future[None]] = []

    def finish_bundle(self) -> None:
        with self._flusher:
            for flushed in self._flushing:
                flushed.result()

    def teardown(self) -> None:
        self._source.close()

    def process(self, element: ShardRows) -> Iterator[WrittenShard]:
        split, index, rows = element
        skipped, noted = [], []
        m = self._manifest
        meter = Meter(self._progress)
        with ShardWriter(self._folder, self._run, m.window_length, m.hop_length) as writer:
            for recording, label, size in rows:
                try:
                    notes = self._write(writer, recording, label, meter)
                    noted += [Noted(recording, split, note) for note in notes]
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
        yield WrittenShard(split, shard, staged, tuple(skipped), tuple(noted))

    def _write(self, writer: ShardWriter, recording: str, label: str | None, meter: Meter) -> tuple[str, ...]:
        """Returns notes on the recording."""
        m = self._manifest
        with (
            self._source.open(recording) as file,
            measure(
                file, trim_silence=m.trim_silence, loudness=m.loudness, published=m.dataset in PUBLISHED
            ) as waveform,
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
            return waveform.notes


class Publish(beam.DoFn):
    """A list of all WrittenShards -> the Manifest: checks the counts, publishes the shards, writes the manifest last.

    Args:
      listed: number of recordings in the source's listing, by split.
      manifest: the data set's properties, without splits and skipped recordings.
      folder, run: as for `ShardWriter`.
      complete: whether a skipped recording is an error.
    """

    def __init__(self, listed: dict[str, int], manifest: Manifest, folder: str, run: str, complete: bool):
        self._listed = listed
        self._manifest = manifest
        self._folder, self._run = folder, run
        self._complete = complete

    def process(self, shards: list[WrittenShard]) -> Iterator[Manifest]:
        # If a runner wrote a shard twice, either copy will do.
        written = sorted({shard.shard.file: shard for shard in shards}.values(), key=lambda s: s.shard.file)
        manifest = assemble(self._manifest, written)
        check_skipped(manifest, self._complete)
        check_counts(manifest, self._listed, self._manifest.skipped)
        files = [
            (path, name)
            for shard in written
            for path, name in zip(shard.staged, (shard.shard.file, shard.shard.index_file), strict=True)
        ]
        publish(self._folder, self._run, files, manifest)
        clear(self._folder, self._run)
        yield manifest


def assemble(manifest: Manifest, written: list[WrittenShard]) -> Manifest:
    """The manifest with its splits, skipped recordings and notes filled in."""
    splits = {}
    for split in SPLITS:
        shards = tuple(shard.shard for shard in written if shard.split == split)
        splits[split] = Split(
            recordings=sum(shard.recordings for shard in shards),
            windows=sum(shard.windows for shard in shards),
            samples=sum(shard.samples for shard in shards),
            shards=shards,
        )
    skipped = [*manifest.skipped, *(skipped for shard in written for skipped in shard.skipped)]
    skipped.sort(key=lambda skipped: (SPLITS.index(skipped.split), skipped.recording))
    noted = [noted for shard in written for noted in shard.noted]
    noted.sort(key=lambda noted: (SPLITS.index(noted.split), noted.recording))
    return dataclasses.replace(manifest, splits=splits, skipped=tuple(skipped), noted=tuple(noted))


def check_skipped(manifest: Manifest, complete: bool) -> None:
    """Refuses skipped recordings of a data set that must be complete, and splits without recordings.

    Raises:
      UserError: names the first few skipped recordings and the reasons.
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
            way_out = (
                "" if complete or manifest.dataset in DATA_SETS else ", or --allow_skipped to split the others anew"
            )
            raise UserError(
                f"none of the recordings of split {name} can be read{reason}; give other recordings{way_out}"
            )


def check_counts(manifest: Manifest, listed: dict[str, int], before: Collection[Skipped] = ()) -> None:
    """Checks that every listed recording was written or skipped, once; those in `before` were not listed.

    Raises:
      UserError: the runner lost or doubled recordings.
    """
    for name, split in manifest.splits.items():
        found = split.recordings + sum(skipped.split == name for skipped in manifest.skipped if skipped not in before)
        if found != listed[name]:
            raise UserError(
                f"the runner lost recordings of split {name}: {found} came out of {listed[name]}; use another --runner"
            )
