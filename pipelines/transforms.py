"""Decode, mix, resample, quantise, cut: pure functions over streams, and the Beam steps that apply them to shards.

A recording goes through in blocks, whatever its length: once to a scratch file of mono float samples at 16 kHz, which
gives its length, minimum and maximum, then from there, scaled, into records. Memory does not grow with the recording.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import signal
import struct
import tempfile
import threading
import time
import zlib
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

import apache_beam as beam
import numpy as np
import soundfile
import soxr
from apache_beam.metrics import Metrics

from harmonic.audio import SAMPLE_RATE, encode, token_dtype
from harmonic.errors import UserError
from harmonic.records import SPLITS, Manifest, Record, Recording, Skipped, Split
from pipelines.array_record_io import (
    ShardWriter,
    WrittenShard,
    clear,
    one_line,
    publish,
    scratch_errors,
    shard_name,
)
from pipelines.sources import Source, SourceRecording, natural_key
from pipelines.stores import SPOOL_BYTES, Unreadable

MIN_RATE, MAX_RATE = 1_000, 768_000  # Hz
_BLOCK_VALUES = 1 << 17  # samples times channels that are decoded at once
_UNKNOWN_SIZES = (0, 0xFFFFFFFF)  # in the header of a WAV file that was written to a pipe
_MP3_SLACK = 2 * 1_152  # samples; encoders' own delays make MP3 headers vague by up to two frames
_MAX_OGG_PAGE = 27 + 255 + 255 * 255  # bytes
_UNKNOWN_FRAMES = 1 << 62


def check_whole(file: BinaryIO) -> None:
    """Compares what the header of a WAV, AIFF, W64 or AU file claims with what is there, and looks for the end of an
    OGG stream: libsndfile reads what there is, and says nothing.

    Raises:
      Unreadable: the file is empty or cut short.
    """
    size = file.seek(0, os.SEEK_END)
    if not size:
        raise Unreadable("is empty")
    file.seek(0)
    claimed = _claimed_end(file, size)
    if claimed > size:
        raise Unreadable(f"is cut short: {size} bytes, and its header claims {claimed}")
    file.seek(0)
    if file.read(4) == b"OggS":
        file.seek(max(0, size - _MAX_OGG_PAGE))
        tail = file.read()
        page = tail[tail.rfind(b"OggS") :]
        table = page[27 : 27 + page[26]] if len(page) > 26 else b""
        if not table or len(page) < 27 + page[26] + sum(table):
            raise Unreadable("is cut short: its last page is not whole")
        if not page[5] & 4:
            raise Unreadable("is cut short: its last page does not end the stream")
    file.seek(0)


def _claimed_end(file: BinaryIO, size: int) -> int:
    """Where the header says that the samples end, in bytes; 0 if it does not say."""
    head = file.read(24)
    if head[:4] == b".snd" and len(head) == 24:
        offset, length = struct.unpack(">II", head[4:12])
        return 0 if length in _UNKNOWN_SIZES else offset + length
    if head[:4] == b"riff" and len(head) == 24:  # W64: a 16-byte GUID, then the file's size
        return int(struct.unpack("<Q", head[16:])[0])
    if head[:4] not in (b"RIFF", b"RIFX", b"RF64", b"FORM"):
        return 0
    order = ">" if head[:4] in (b"RIFX", b"FORM") else "<"
    position, wide = 12, 0
    for _ in range(1_000):  # chunks; a hostile file could hold millions
        if position + 8 > size:
            break
        file.seek(position)
        name, length = struct.unpack(f"{order}4sI", file.read(8))
        if name == b"ds64":
            wide = int.from_bytes(file.read(16)[8:], "little")
        if name in (b"data", b"SSND"):
            if length == 0xFFFFFFFF and wide:
                length = wide
            # sox, too, writes a largest possible size when it cannot go back to correct it.
            unknown = length in _UNKNOWN_SIZES or 0x7FFFF000 <= length <= 0x7FFFFFFF
            return 0 if unknown else position + 8 + length
        position += 8 + length + length % 2
    return 0


def decode(file: BinaryIO) -> tuple[int, Iterator[np.ndarray]]:
    """Opens a seekable audio file. Returns its sample rate in Hz, and its mono float32 blocks [time] at 16 kHz.

    Mixing is the mean of the channels; resampling is soxr's HQ, and none at 16 kHz. The blocks' contents do not depend
    on where they are cut.

    Raises:
      Unreadable: not audio that libsndfile reads, damaged or cut short (now or while the blocks are taken).
    """
    check_whole(file)
    try:
        with _interrupts_held():
            audio = soundfile.SoundFile(file)
    except (soundfile.LibsndfileError, OSError, ValueError, TypeError) as error:
        raise Unreadable(f"is not audio that can be read: {_reason(error)}") from error
    if not MIN_RATE <= audio.samplerate <= MAX_RATE:
        rate = audio.samplerate
        audio.close()
        raise Unreadable(f"has a sample rate of {rate} Hz, not between {MIN_RATE} and {MAX_RATE}")
    return audio.samplerate, _blocks(audio)


def _blocks(audio: soundfile.SoundFile) -> Iterator[np.ndarray]:
    rate = audio.samplerate
    resampler = (
        soxr.ResampleStream(rate, SAMPLE_RATE, 1, dtype="float32", quality="HQ") if rate != SAMPLE_RATE else None
    )
    with audio:
        count = 0
        while True:
            try:
                with _interrupts_held():
                    block = audio.read(max(1, _BLOCK_VALUES // audio.channels), dtype="float32", always_2d=True)
            except (soundfile.LibsndfileError, OSError, ValueError) as error:
                raise Unreadable(f"cannot be decoded after {count} samples: {_reason(error)}") from error
            if not len(block):
                break
            count += len(block)
            mono = block.mean(axis=1, dtype=np.float32)
            yield mono if resampler is None else resampler.resample_chunk(mono)
        slack = _MP3_SLACK if audio.format in ("MP3", "MPEG") else 0
        if count + slack < audio.frames < _UNKNOWN_FRAMES:
            raise Unreadable(f"is cut short: {count} samples of {audio.frames}")
        if resampler is not None:
            yield resampler.resample_chunk(np.zeros(0, np.float32), last=True)


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """Keeps SIGINT until the end: raised in a callback of libsndfile's, KeyboardInterrupt is dropped, and the read cut
    short."""
    if threading.current_thread() is not threading.main_thread():
        yield  # which no signal interrupts
        return
    caught: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: caught.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if caught:
            signal.raise_signal(signal.SIGINT)


def _reason(error: Exception) -> str:
    # Not str(error): it names the object that was opened, address and all, and reasons stand in the manifest.
    return one_line(getattr(error, "error_string", None) or error)


@dataclasses.dataclass
class Waveform:
    """A recording after the first pass: float32 mono samples at 16 kHz in a scratch file. A context manager.

    Attributes:
      file: the samples, native-endian.
      length: samples.
      low, high: minimum and maximum.
      source_rate: Hz.
    """

    file: BinaryIO
    length: int
    low: float
    high: float
    source_rate: int

    def __enter__(self) -> Waveform:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def pieces(self, encoding: str, num_levels: int, record_length: int) -> Iterator[tuple[int, np.ndarray]]:
        """Quantises the whole by its minimum and maximum. Yields (offset, tokens [length, 1]) in order."""
        self.file.seek(0)
        for offset in range(0, self.length, record_length):
            tokens = np.empty((min(record_length, self.length - offset), 1), token_dtype(num_levels))
            for start in range(0, len(tokens), _BLOCK_VALUES):
                part = tokens[start : start + _BLOCK_VALUES]
                samples = np.frombuffer(self.file.read(4 * len(part)), np.float32)[:, None]
                part[:] = encode(samples, encoding, low=self.low, high=self.high, num_levels=num_levels)
            yield offset, tokens


def measure(file: BinaryIO) -> Waveform:
    """The first pass over an open audio file; the caller closes both.

    Raises:
      Unreadable: as `decode`; or there are no samples, or some that are not finite.
      UserError: no room for the scratch file.
    """
    with scratch_errors():
        rate, blocks = decode(file)
        scratch: Any = tempfile.SpooledTemporaryFile(max_size=SPOOL_BYTES)
        try:
            length, low, high = 0, np.float32(np.inf), np.float32(-np.inf)
            for block in blocks:
                if not len(block):
                    continue
                if not np.isfinite(block).all():
                    raise Unreadable("holds samples that are not finite (NaN or infinity)")
                length, low, high = length + len(block), min(low, block.min()), max(high, block.max())
                scratch.write(block)
            if not length:
                raise Unreadable("holds no samples")
            with np.errstate(over="ignore"):
                if not np.isfinite(high - low):
                    raise Unreadable(f"holds samples that are too large ({low:g} to {high:g})")
        except BaseException:
            scratch.close()
            raise
    return Waveform(scratch, length, float(low), float(high), rate)


def shard_of(recording: SourceRecording, counts: dict[str, int]) -> tuple[str, int]:
    """(split, shard) of a recording: the CRC-32 of its id, modulo the split's number of shards."""
    return recording.split, zlib.crc32(recording.id.encode()) % counts[recording.split]


def shard_counts(recordings: Iterable[SourceRecording], shard_bytes: int, wanted: int | None = None) -> dict[str, int]:
    """How many shards each split gets: a function of the listing alone.

    `wanted`, or one for every `shard_bytes` of source; fewer where the recordings' hashes would leave a shard empty.
    """
    ids: dict[str, list[int]] = {split: [] for split in SPLITS}
    sizes = dict.fromkeys(SPLITS, 0)
    for recording in recordings:
        ids[recording.split].append(zlib.crc32(recording.id.encode()))
        sizes[recording.split] += recording.size
    counts = {}
    for split, hashes in ids.items():
        count = min(wanted or -(-sizes[split] // shard_bytes), len(hashes))
        while count > 1 and len({value % count for value in hashes}) < count:
            count -= -(-count // 16)
        counts[split] = max(count, 1)
    return counts


class KeyByShard(beam.DoFn):
    """SourceRecording → ((split, shard), SourceRecording)."""

    def __init__(self, counts: dict[str, int]):
        self._counts = counts

    def process(self, recording: SourceRecording) -> Iterator[tuple[tuple[str, int], SourceRecording]]:
        yield shard_of(recording, self._counts), recording


class WriteShard(beam.DoFn):
    """((split, shard), recordings) → WrittenShard: reads, decodes, resamples, quantises and writes one shard.

    Args:
      source: opens the recordings.
      counts: shards by split.
      manifest: what the data set is; its splits and skipped recordings are not looked at.
      folder, run: where to stage the shard, as for `ShardWriter`.
      progress: a local file that gets one byte a recording, or None.
    """

    def __init__(
        self, source: Source, counts: dict[str, int], manifest: Manifest, folder: str, run: str, progress: str | None
    ):
        self._source = source
        self._counts = counts
        self._manifest = manifest
        self._folder, self._run = folder, run
        self._progress = progress

    def teardown(self) -> None:
        self._source.close()

    def process(self, element: tuple[tuple[str, int], Iterable[SourceRecording]]) -> Iterator[WrittenShard]:
        (split, index), recordings = element
        skipped = []
        with ShardWriter(self._folder, self._run, self._manifest.window_length) as writer:
            for recording in sorted(recordings, key=lambda recording: natural_key(recording.id)):
                started = time.monotonic()
                try:
                    self._write(writer, recording)
                except Unreadable as error:
                    skipped.append(Skipped(recording.id, split, str(error)))
                    _count("skipped")
                _count("milliseconds", round(1000 * (time.monotonic() - started)))
                self._report()
            name = shard_name(split, index, self._counts[split])
            shard, staged = writer.stage(name)
        yield WrittenShard(split, shard, staged, tuple(skipped))

    def _write(self, writer: ShardWriter, recording: SourceRecording) -> None:
        with self._source.open(recording.id) as file, measure(file) as waveform:
            m = self._manifest
            records = 0
            with scratch_errors():
                for offset, tokens in waveform.pieces(m.encoding, m.num_levels, m.record_length):
                    record = Record(recording.id, offset, waveform.length, tokens, recording.label)
                    _count("bytes", writer.write(record))
                    records += 1
            writer.end_recording(
                Recording(
                    id=recording.id,
                    length=waveform.length,
                    records=records,
                    label=recording.label,
                    low=waveform.low,
                    high=waveform.high,
                    source_rate=waveform.source_rate,
                )
            )
            _count("recordings")
            _count("samples", waveform.length)

    def _report(self) -> None:
        if self._progress is not None:
            try:
                with open(self._progress, "ab") as file:
                    file.write(b".")
            except OSError:  # progress is not worth a run
                self._progress = None


def _count(name: str, value: int = 1) -> None:
    _counter(name).inc(value)


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
