"""Audio files to waveforms: decode, mix, resample, trim, normalise, quantise, in blocks whatever the length.

A recording is decoded once to mono float samples at 16 kHz, which gives its length, minimum and maximum, and from these
samples, scaled, come the pieces of tokens. Trimming and loudness, where they are asked for, pass over them in between.
Samples that are more than a few megabytes lie in a scratch file: memory does not grow with the recording.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import math
import os
import signal
import struct
import tempfile
import threading
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, NamedTuple, cast

import numpy as np
import soundfile
import soxr

from harmonic import loudness as levels
from harmonic.audio import SAMPLE_RATE, encode, token_dtype
from harmonic.errors import UserError, one_line
from harmonic.records import MAX_CHANNELS
from pipelines.beam.sink import scratch_errors
from pipelines.sources.files import MAX_RATIO, RATIO_SLACK, SPOOL_BYTES, Unreadable

MIN_RATE, MAX_RATE = 1_000, 768_000  # Hz
_BLOCK_VALUES = 1 << 17  # samples times channels that are decoded at once
_HEAD_BYTES = 64 << 10  # of a file that are read at once
_FORMAT = struct.Struct("<HHIIHH")  # of a WAV file: tag, channels, rate, bytes a second, bytes a frame, bits
_UNKNOWN_SIZES = (0, 0xFFFFFFFF)  # in the header of a WAV file that was written to a pipe
_MP3_SLACK = 2 * 1_152  # samples; encoders' own delays make MP3 headers vague by up to two frames
_MAX_OGG_PAGE = 27 + 255 + 255 * 255  # bytes
_UNKNOWN_FRAMES = 1 << 62
_EXACT_FORMATS = ("WAV", "WAVEX", "FLAC")  # which hold as many frames as they say: no read is needed to find the end


class _Pcm(NamedTuple):
    """Where the samples of a WAV file of 16 bits lie, and what they are."""

    rate: int  # Hz
    channels: int
    start: int  # bytes
    frames: int


def _check_whole(file: BinaryIO) -> tuple[int, bytes, _Pcm | None]:
    """Compares what the header of a WAV, AIFF, W64 or AU file claims with what is there, and looks for the end of an
    OGG stream: libsndfile reads what there is, and says nothing.

    Returns:
      (the file's bytes, its first `_HEAD_BYTES`, where its samples lie if it is the usual WAV file).

    Raises:
      Unreadable: the file is empty or cut short.
    """
    file.seek(0)
    head = file.read(_HEAD_BYTES)
    size = len(head) if len(head) < _HEAD_BYTES else file.seek(0, os.SEEK_END)
    if not size:
        raise Unreadable("is empty")
    claimed, pcm = _claimed_end(file, head, size)
    if claimed > size:
        raise Unreadable(f"is cut short: {size} bytes, and its header claims {claimed}")
    if head[:4] == b"OggS":
        file.seek(max(0, size - _MAX_OGG_PAGE))
        tail = file.read()
        page = tail[tail.rfind(b"OggS") :]
        table = page[27 : 27 + page[26]] if len(page) > 26 else b""
        if not table or len(page) < 27 + page[26] + sum(table):
            raise Unreadable("is cut short: its last page is not whole")
        if not page[5] & 4:
            raise Unreadable("is cut short: its last page does not end the stream")
    return size, head, pcm


def _claimed_end(file: BinaryIO, head: bytes, size: int) -> tuple[int, _Pcm | None]:
    """Where the header says that the samples end, in bytes, or 0 if it does not say; and where they lie."""
    kind = head[:4]
    if kind == b".snd" and len(head) >= 24:
        offset, length = struct.unpack(">II", head[4:12])
        return (0 if length in _UNKNOWN_SIZES else offset + length), None
    if kind == b"riff" and len(head) >= 24:  # W64: a 16-byte GUID, then the file's size
        return int(struct.unpack("<Q", head[16:24])[0]), None
    if kind not in (b"RIFF", b"RIFX", b"RF64", b"FORM"):
        return 0, None

    def at(position: int, count: int) -> bytes:
        if position + count <= len(head):
            return head[position : position + count]
        file.seek(position)
        return file.read(count)

    chunk = struct.Struct(">4sI" if kind in (b"RIFX", b"FORM") else "<4sI")
    position, wide, form = 12, 0, b""
    for _ in range(1_000):  # chunks; a hostile file could hold millions
        if position + 8 > size:
            break
        name, length = chunk.unpack(at(position, 8))
        if name == b"ds64":
            wide = int.from_bytes(at(position + 8, 16)[8:], "little")
        elif name == b"fmt ":
            form = at(position + 8, min(length, _FORMAT.size))
        elif name in (b"data", b"SSND"):
            if length == 0xFFFFFFFF and wide:
                length = wide
            # sox, too, writes a largest possible size when it cannot go back to correct it.
            unknown = length in _UNKNOWN_SIZES or 0x7FFFF000 <= length <= 0x7FFFFFFF
            if unknown:
                return 0, None
            is_wave = kind == b"RIFF" and head[8:12] == b"WAVE" and name == b"data" and len(form) == _FORMAT.size
            return position + 8 + length, _pcm(form, position + 8, length) if is_wave else None
        position += 8 + length + length % 2
    return 0, None


def _pcm(form: bytes, start: int, length: int) -> _Pcm | None:
    tag, channels, rate, _, width, bits = _FORMAT.unpack(form)
    if (tag, bits) != (1, 16) or not 1 <= channels <= MAX_CHANNELS or width != 2 * channels:
        return None
    return _Pcm(rate, channels, start, length // width)


def decode(file: BinaryIO) -> tuple[int, Iterator[np.ndarray]]:
    """Opens a seekable audio file. Returns its sample rate in Hz, and its mono float32 blocks [time] at 16 kHz.

    Mixing is the mean of the channels; resampling is soxr's HQ, and none at 16 kHz. The blocks' contents do not depend
    on where they are cut.

    Raises:
      Unreadable: not audio that libsndfile reads, damaged or cut short (now or while the blocks are taken).
    """
    size, head, pcm = _check_whole(file)
    # Of a second of sound in a WAV file, opening it through libsndfile takes a quarter of all that is done to it.
    rate, blocks = (pcm.rate, _pcm_blocks(file, head, pcm)) if pcm else _libsndfile(file, size)
    if not MIN_RATE <= rate <= MAX_RATE:
        raise Unreadable(f"has a sample rate of {rate} Hz, not between {MIN_RATE} and {MAX_RATE}")
    return rate, _mono(blocks, rate)


def _pcm_blocks(file: BinaryIO, head: bytes, pcm: _Pcm) -> Iterator[np.ndarray]:
    """Blocks [time, channels], the same numbers as libsndfile's."""
    width, step = 2 * pcm.channels, max(1, _BLOCK_VALUES // pcm.channels)
    in_head = pcm.start + pcm.frames * width <= len(head)
    if not in_head:
        file.seek(pcm.start)
    for first in range(0, pcm.frames, step):
        count = min(step, pcm.frames - first)
        data = memoryview(head)[pcm.start + first * width :] if in_head else file.read(count * width)
        if len(data) < count * width:
            raise Unreadable(f"is cut short: {first + len(data) // width} samples of {pcm.frames}")
        block = np.frombuffer(data, "<i2", count * pcm.channels).astype(np.float32)
        block *= np.float32(1 / 32_768)
        yield block.reshape(count, pcm.channels)


def _libsndfile(file: BinaryIO, size: int) -> tuple[int, Iterator[np.ndarray]]:
    """The sample rate, and blocks [time, channels]."""
    source: BinaryIO | int = file
    held: _Guard = _interrupts_held
    file.seek(0)
    if isinstance(file, io.BufferedReader):  # a file of a disk, which libsndfile reads without Python
        source, held = file.fileno(), contextlib.nullcontext
        os.lseek(source, 0, os.SEEK_SET)
    try:
        with held():
            audio = soundfile.SoundFile(source, closefd=False)
    except (soundfile.LibsndfileError, OSError, ValueError, TypeError) as error:
        raise Unreadable(f"is not audio that can be read: {_reason(error)}") from error
    return audio.samplerate, _libsndfile_blocks(audio, size, held)


def _libsndfile_blocks(audio: soundfile.SoundFile, size: int, held: _Guard) -> Iterator[np.ndarray]:
    channels, frames = audio.channels, audio.frames
    with audio:
        count = 0
        while True:
            try:
                with held():
                    block = audio.read(max(1, _BLOCK_VALUES // channels), dtype="float32", always_2d=True)
            except (soundfile.LibsndfileError, OSError, ValueError) as error:
                raise Unreadable(f"cannot be decoded after {count} samples: {_reason(error)}") from error
            if not len(block):
                break
            count += len(block)
            if 2 * count * channels > MAX_RATIO * size + RATIO_SLACK:
                raise Unreadable(f"holds more than {MAX_RATIO:,} times its bytes: that is a decompression bomb")
            yield block
            if count == frames and audio.format in _EXACT_FORMATS:
                break
        slack = _MP3_SLACK if audio.format in ("MP3", "MPEG") else 0
        if count + slack < frames < _UNKNOWN_FRAMES:
            raise Unreadable(f"is cut short: {count} samples of {frames}")


def _mono(blocks: Iterator[np.ndarray], rate: int) -> Iterator[np.ndarray]:
    """Mixes and resamples."""
    resampler = (
        soxr.ResampleStream(rate, SAMPLE_RATE, 1, dtype="float32", quality="HQ") if rate != SAMPLE_RATE else None
    )
    for block in blocks:
        # Of one channel the mean is itself, at a third of what a short recording takes to decode.
        mono = block[:, 0] if block.shape[1] == 1 else block.mean(axis=1, dtype=np.float32)
        yield mono if resampler is None else resampler.resample_chunk(mono)
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


_Guard = Callable[[], contextlib.AbstractContextManager[None]]


def _reason(error: Exception) -> str:
    # Not str(error): it names the object that was opened, address and all, and reasons stand in the manifest.
    return one_line(getattr(error, "error_string", None) or error)


def check_disk(file: BinaryIO) -> None:
    """Reads a file of a disk once more to its end: to libsndfile one that fails is like one that is cut short.

    Raises:
      UserError: it could not be read.
    """
    if not isinstance(file, io.BufferedReader):
        return
    offset = 0
    try:
        while data := os.pread(file.fileno(), 1 << 20, offset):
            offset += len(data)
    except OSError as error:
        raise UserError(f"{file.name!r} could not be read to its end: {error.strerror}; run again") from error


class _Samples:
    """The float32 samples of a recording: in memory while they are few, then in a scratch file without a name."""

    def __init__(self) -> None:
        self._blocks: list[np.ndarray] = []
        self._bytes = 0
        self._file: BinaryIO | None = None

    def append(self, block: np.ndarray) -> None:
        self._bytes += block.nbytes
        self._blocks.append(block)
        if self._bytes > SPOOL_BYTES:
            self._file = self._file or cast(BinaryIO, tempfile.TemporaryFile())
            for held in self._blocks:
                self._file.write(held.data)
            self._blocks.clear()

    def end(self) -> None:
        if self._file is not None:
            self._file.flush()  # here, where a full disk is reported

    def read(self, start: int, stop: int) -> np.ndarray:
        if self._file is not None:
            self._file.seek(4 * start)
            return np.frombuffer(self._file.read(4 * (stop - start)), np.float32)
        if len(self._blocks) > 1:
            self._blocks = [np.concatenate(self._blocks)]
        return self._blocks[0][start:stop]

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


@dataclasses.dataclass
class Waveform:
    """A recording after the first pass: float32 mono samples at 16 kHz. A context manager.

    Attributes:
      samples: all of them, with what trimming leaves out.
      length: samples that are kept.
      low, high: what is quantised as -1 and 1, in these samples' own scale.
      source_rate: Hz.
      level: root mean square of what is kept, in dB below full scale (-200 for silence).
      cut: samples that trimming leaves out at the front and at the back.
      gain: what loudness normalisation multiplies the samples by before they are quantised on the scale of [-1, 1];
        None quantises them by their own minimum and maximum.
    """

    samples: _Samples
    length: int
    low: float
    high: float
    source_rate: int
    level: float
    cut: tuple[int, int] = (0, 0)
    gain: float | None = None

    def __enter__(self) -> Waveform:
        return self

    def __exit__(self, *_: object) -> None:
        self.samples.close()

    def blocks(self, size: int = levels.BLOCK) -> Iterator[np.ndarray]:
        """What is kept, in blocks of `size` samples, the last one perhaps shorter."""
        first = self.cut[0]
        for start in range(0, self.length, size):
            yield self.samples.read(first + start, first + min(start + size, self.length))

    def pieces(self, encoding: str, num_levels: int, record_length: int) -> Iterator[tuple[int, np.ndarray]]:
        """Quantises the whole. Yields (offset, tokens [length, 1]) in order."""
        low, high = (self.low, self.high) if self.gain is None else (-1.0, 1.0)
        for offset in range(0, self.length, record_length):
            tokens = np.empty(min(record_length, self.length - offset), token_dtype(num_levels))
            for start in range(0, len(tokens), _BLOCK_VALUES):
                part = tokens[start : start + _BLOCK_VALUES]
                first = self.cut[0] + offset + start
                samples = self.samples.read(first, first + len(part))
                if self.gain is not None:
                    samples = samples * np.float32(self.gain)
                part[:] = encode(samples, encoding, low=low, high=high, num_levels=num_levels)
            yield offset, tokens[:, None]


@dataclasses.dataclass
class _Extent:
    """Length, minimum, maximum and energy of the blocks that were added."""

    length: int = 0
    low: float = math.inf
    high: float = -math.inf
    energy: float = 0.0

    def add(self, block: np.ndarray) -> None:
        low, high = float(block.min()), float(block.max())
        if not (math.isfinite(low) and math.isfinite(high)):  # NaN is both its least and its largest
            raise Unreadable("holds samples that are not finite (NaN or infinity)")
        self.length += len(block)
        self.low, self.high = min(self.low, low), max(self.high, high)
        self.energy += float(np.square(block, dtype=np.float64).sum())

    def values(self) -> dict[str, Any]:
        level = round(10 * math.log10(max(self.energy / self.length, 1e-20)), 2)
        return {"length": self.length, "low": self.low, "high": self.high, "level": level}


def measure(file: BinaryIO, *, trim_silence: float | None = None, loudness: float | None = None) -> Waveform:
    """The first pass over an open audio file, and those that the options need; the caller closes both.

    Args:
      file: seekable.
      trim_silence: cut off leading and trailing silence that many decibels below the loudest frame.
      loudness: bring the recording to that loudness in LUFS, on one scale for all recordings. One that would then
        exceed full scale gets as much as fits; one in which nothing is above -70 LUFS keeps its level.

    Raises:
      Unreadable: as `decode`; or there are no samples, or some that are not finite.
      UserError: no room for the scratch file, or the disk fails on which the recording lies.
    """
    try:
        with scratch_errors():
            return _measure(file, trim_silence, loudness)
    except (Unreadable, OSError):
        check_disk(file)
        raise


def _measure(file: BinaryIO, trim_silence: float | None, loudness: float | None) -> Waveform:
    rate, blocks = decode(file)
    samples, whole = _Samples(), _Extent()
    try:
        for block in blocks:
            if len(block):
                whole.add(block)
                samples.append(block)
        samples.end()
        if not whole.length:
            raise Unreadable("holds no samples")
        if whole.high - whole.low > np.finfo(np.float32).max:
            raise Unreadable(f"holds samples that are too large ({whole.low:g} to {whole.high:g})")
        waveform = Waveform(samples, source_rate=rate, **whole.values())
        if trim_silence is not None:
            _trim(waveform, trim_silence)
        if loudness is not None:
            _normalise(waveform, loudness)
    except BaseException:
        samples.close()
        raise
    return waveform


def _trim(waveform: Waveform, decibels: float) -> None:
    start, stop = levels.trim(waveform.blocks, waveform.length, decibels)
    if stop - start == waveform.length:
        return
    waveform.cut, waveform.length = (start, waveform.length - stop), stop - start
    kept = _Extent()
    for block in waveform.blocks():
        kept.add(block)
    for name, value in kept.values().items():
        setattr(waveform, name, value)


def _normalise(waveform: Waveform, target: float) -> None:
    gain = levels.gain(waveform.blocks, max(abs(waveform.low), abs(waveform.high)), target)
    waveform.gain, waveform.low, waveform.high = gain, -1 / gain, 1 / gain
