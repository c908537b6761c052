"""Audio files to waveforms: decode, mix, resample, trim, normalise, quantise, in blocks whatever the length.

A recording goes once to a scratch file of mono float samples at 16 kHz, which gives its length, minimum and maximum,
then from there, scaled, into pieces of tokens. Trimming and loudness, where they are asked for, pass over the scratch
file in between. Memory does not grow with the recording.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import signal
import struct
import tempfile
import threading
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np
import soundfile
import soxr

from harmonic.audio import SAMPLE_RATE, encode, token_dtype
from pipelines import levels
from pipelines.array_record_io import one_line, scratch_errors
from pipelines.stores import MAX_RATIO, RATIO_SLACK, SPOOL_BYTES, Unreadable

MIN_RATE, MAX_RATE = 1_000, 768_000  # Hz
_BLOCK_VALUES = 1 << 17  # samples times channels that are decoded at once
_UNKNOWN_SIZES = (0, 0xFFFFFFFF)  # in the header of a WAV file that was written to a pipe
_MP3_SLACK = 2 * 1_152  # samples; encoders' own delays make MP3 headers vague by up to two frames
_MAX_OGG_PAGE = 27 + 255 + 255 * 255  # bytes
_UNKNOWN_FRAMES = 1 << 62
_EXACT_FORMATS = ("WAV", "WAVEX", "FLAC")  # which hold as many frames as they say: no read is needed to find the end


def check_whole(file: BinaryIO) -> int:
    """Compares what the header of a WAV, AIFF, W64 or AU file claims with what is there, and looks for the end of an
    OGG stream: libsndfile reads what there is, and says nothing. Returns the file's bytes.

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
    return size


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
    size = check_whole(file)
    try:
        with _interrupts_held():
            audio = soundfile.SoundFile(file)
    except (soundfile.LibsndfileError, OSError, ValueError, TypeError) as error:
        raise Unreadable(f"is not audio that can be read: {_reason(error)}") from error
    if not MIN_RATE <= audio.samplerate <= MAX_RATE:
        rate = audio.samplerate
        audio.close()
        raise Unreadable(f"has a sample rate of {rate} Hz, not between {MIN_RATE} and {MAX_RATE}")
    return audio.samplerate, _blocks(audio, size)


def _blocks(audio: soundfile.SoundFile, size: int) -> Iterator[np.ndarray]:
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
            if 2 * count * audio.channels > MAX_RATIO * size + RATIO_SLACK:
                raise Unreadable(f"holds more than {MAX_RATIO:,} times its bytes: that is a decompression bomb")
            # Of one channel the mean is itself, at a third of what a short recording takes to decode.
            mono = block[:, 0] if audio.channels == 1 else block.mean(axis=1, dtype=np.float32)
            yield mono if resampler is None else resampler.resample_chunk(mono)
            if count == audio.frames and audio.format in _EXACT_FORMATS:
                break
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
      length: samples that are kept.
      low, high: what is quantised as -1 and 1, in these samples' own scale.
      source_rate: Hz.
      level: root mean square of what is kept, in dB below full scale (-200 for silence).
      cut: samples that trimming leaves out of the file at the front and at the back.
      gain: what loudness normalisation multiplies the samples by before they are quantised on the scale of [-1, 1];
        None quantises them by their own minimum and maximum.
    """

    file: BinaryIO
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
        self.file.close()

    def blocks(self, size: int = levels.BLOCK) -> Iterator[np.ndarray]:
        """What is kept, in blocks of `size` samples, the last one perhaps shorter."""
        self.file.seek(4 * self.cut[0])
        for start in range(0, self.length, size):
            yield np.frombuffer(self.file.read(4 * min(size, self.length - start)), np.float32)

    def pieces(self, encoding: str, num_levels: int, record_length: int) -> Iterator[tuple[int, np.ndarray]]:
        """Quantises the whole. Yields (offset, tokens [length, 1]) in order."""
        low, high = (self.low, self.high) if self.gain is None else (-1.0, 1.0)
        self.file.seek(4 * self.cut[0])
        for offset in range(0, self.length, record_length):
            tokens = np.empty((min(record_length, self.length - offset), 1), token_dtype(num_levels))
            for start in range(0, len(tokens), _BLOCK_VALUES):
                part = tokens[start : start + _BLOCK_VALUES]
                samples = np.frombuffer(self.file.read(4 * len(part)), np.float32)[:, None]
                if self.gain is not None:
                    samples = samples * np.float32(self.gain)
                part[:] = encode(samples, encoding, low=low, high=high, num_levels=num_levels)
            yield offset, tokens


@dataclasses.dataclass
class _Extent:
    """Length, minimum, maximum and energy of the blocks that were added."""

    length: int = 0
    low: float = math.inf
    high: float = -math.inf
    energy: float = 0.0

    def add(self, block: np.ndarray) -> None:
        self.length += len(block)
        self.low, self.high = min(self.low, float(block.min())), max(self.high, float(block.max()))
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
      UserError: no room for the scratch file.
    """
    with scratch_errors():
        rate, blocks = decode(file)
        scratch: Any = tempfile.SpooledTemporaryFile(max_size=SPOOL_BYTES)
        try:
            whole = _Extent()
            for block in blocks:
                if not len(block):
                    continue
                if not np.isfinite(block).all():
                    raise Unreadable("holds samples that are not finite (NaN or infinity)")
                whole.add(block)
                scratch.write(block)
            if not whole.length:
                raise Unreadable("holds no samples")
            if whole.high - whole.low > np.finfo(np.float32).max:
                raise Unreadable(f"holds samples that are too large ({whole.low:g} to {whole.high:g})")
            waveform = Waveform(scratch, source_rate=rate, **whole.values())
            if trim_silence is not None:
                _trim(waveform, trim_silence)
            if loudness is not None:
                _normalise(waveform, loudness)
        except BaseException:
            scratch.close()
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
