"""Audio files to blocks of float samples."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import BinaryIO

import numpy as np
import soundfile

from harmonic.errors import UserError, one_line
from pipelines.audio.header import Pcm, check_whole
from pipelines.errors import Unreadable
from pipelines.limits import MAX_RATIO, is_bomb

MIN_RATE, MAX_RATE = 1_000, 768_000  # Hz
_BLOCK_VALUES = 1 << 17  # samples times channels that are decoded at once
_MP3_SLACK = 2 * 1_152  # samples; encoders' delays make the length in MP3 headers wrong by up to two frames
_UNKNOWN_FRAMES = 1 << 62
_EXACT_FORMATS = ("WAV", "WAVEX", "FLAC")  # their headers give the number of frames: no read is needed to find the end


def decode(file: BinaryIO) -> tuple[int, Iterator[np.ndarray]]:
    """Opens a seekable audio file. Returns its sample rate in Hz, and its float32 blocks [time, channels].

    The samples do not depend on where the blocks are cut.

    Raises:
      Unreadable: not audio that libsndfile reads, damaged or cut short (now, or while the blocks are taken).
    """
    size, head, pcm = check_whole(file)
    # For a second of sound in a WAV file, opening it through libsndfile is a quarter of the whole preparing time.
    rate, blocks = (pcm.rate, _pcm_blocks(file, head, pcm)) if pcm else _libsndfile(file, size)
    if not MIN_RATE <= rate <= MAX_RATE:
        raise Unreadable(f"has a sample rate of {rate} Hz, not between {MIN_RATE} and {MAX_RATE}")
    return rate, blocks


def _pcm_blocks(file: BinaryIO, head: bytes, pcm: Pcm) -> Iterator[np.ndarray]:
    """Blocks [time, channels] with the same numbers as libsndfile's."""
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
    if isinstance(file, io.BufferedReader):  # a file on a disk: libsndfile reads it without Python callbacks
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
            if is_bomb(2 * count * channels, size):
                raise Unreadable(f"holds more than {MAX_RATIO:,} times its bytes: that is a decompression bomb")
            yield block
            if count == frames and audio.format in _EXACT_FORMATS:
                break
        slack = _MP3_SLACK if audio.format in ("MP3", "MPEG") else 0
        if count + slack < frames < _UNKNOWN_FRAMES:
            raise Unreadable(f"is cut short: {count} samples of {frames}")


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """Delays SIGINT to the end. libsndfile drops a KeyboardInterrupt that its callback raises, and ends the read."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals interrupt the main thread alone
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
    # str(error) would name the opened object with its address, and reasons go into the manifest.
    return one_line(getattr(error, "error_string", None) or error)


def check_disk(file: BinaryIO) -> None:
    """Reads a file on a disk once more to its end: libsndfile takes a read error for the end of the file.

    Raises:
      UserError: it cannot be read.
    """
    if not isinstance(file, io.BufferedReader):
        return
    offset = 0
    try:
        while data := os.pread(file.fileno(), 1 << 20, offset):
            offset += len(data)
    except OSError as error:
        raise UserError(f"{file.name!r} could not be read to its end: {error.strerror}; run again") from error
