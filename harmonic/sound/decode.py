"""Audio files to blocks of float samples: plain PCM by NumPy and libsndfile, everything compressed by FFmpeg."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
from collections.abc import Callable, Iterator
from typing import BinaryIO, cast

import numpy as np
import soundfile

from harmonic.errors import Unreadable, UserError, one_line
from harmonic.sound.bombs import MAX_RATIO, is_bomb
from harmonic.sound.ffmpeg import open_ffmpeg
from harmonic.sound.header import Head, Pcm, check_missing, read_head
from harmonic.sound.interrupts import interrupts_held

MIN_RATE, MAX_RATE = 1_000, 768_000  # Hz
_BLOCK_VALUES = 1 << 17  # samples times channels that are decoded at once
_UNKNOWN_FRAMES = 1 << 62
# What libsndfile decodes; FFmpeg is asked first for everything else, which libsndfile may stop reading early.
_PCM = ("PCM_S8", "PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW", "ALAW")
_COMPRESSED = ("FLAC", "OGG", "MP3")  # formats, whose subtypes may be called PCM
# libsndfile need not look at these at all.
_MAGIC = (b"fLaC", b"OggS", b"ID3", b"\xff\xfb", b"\xff\xfa", b"\xff\xf3", b"\xff\xf2", b"\x1a\x45\xdf\xa3")


@dataclasses.dataclass
class Sound:
    """An open audio file.

    Attributes:
      rate: sample rate in Hz.
      blocks: float32 [time, channels]; the samples do not depend on where the blocks are cut.
      notes: what is not as the file says, each a clause whose subject is the file; whole once the blocks are taken.
    """

    rate: int
    blocks: Iterator[np.ndarray]
    notes: list[str]


def decode(file: BinaryIO) -> Sound:
    """Opens a seekable audio file, to be decoded to its true end, whatever its header counts.

    Raises:
      Unreadable: not audio that libsndfile or FFmpeg reads, damaged or cut short (now, or while the blocks are taken).
    """
    head = read_head(file)
    notes = list(head.notes)
    # For a second of sound in a WAV file, opening it through libsndfile is a quarter of the whole preparing time.
    rate, blocks = (head.pcm.rate, _pcm_blocks(file, head.data, head.pcm)) if head.pcm else _open(file, head, notes)
    if not MIN_RATE <= rate <= MAX_RATE:
        raise Unreadable(f"has a sample rate of {rate} Hz, not between {MIN_RATE} and {MAX_RATE}")
    return Sound(rate, blocks, notes)


def _open(file: BinaryIO, head: Head, notes: list[str]) -> tuple[int, Iterator[np.ndarray]]:
    if head.patch:
        file = cast(BinaryIO, _Patched(file, *head.patch))
    audio, held, failed = None, cast(_Guard, interrupts_held), None
    # FFmpeg takes the largest size for all that follows; libsndfile would read 4 GiB.
    endless = head.patch is not None and set(head.patch[1]) == {0xFF}
    if not endless and not head.data.startswith(_MAGIC):
        try:
            audio, held = _open_libsndfile(file)
        except Unreadable as error:
            failed = error
        else:
            if audio.subtype in _PCM and audio.format not in _COMPRESSED:
                return audio.samplerate, _libsndfile_blocks(audio, head.size, held, notes)
    if isinstance(file, io.BufferedReader):  # its buffer does not know that libsndfile has moved the file's position
        file = cast(BinaryIO, file.raw)
    try:
        found = open_ffmpeg(file, head, _BLOCK_VALUES, notes)
    except Unreadable as error:
        if audio is not None:  # one of the few codecs that libsndfile alone has
            audio.seek(0)
            return audio.samplerate, _libsndfile_blocks(audio, head.size, held, notes)
        raise failed or error from error
    if audio is not None:
        audio.close()
    return found


class _Patched(io.RawIOBase):
    """A file in which a few bytes are read as others."""

    def __init__(self, file: BinaryIO, offset: int, data: bytes):
        self._file, self._offset, self._data = file, offset, data

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def readinto(self, buffer: memoryview, /) -> int:  # type: ignore[override]
        start = self._file.tell()
        found = bytearray(self._file.read(len(buffer)))
        for i, byte in enumerate(self._data, self._offset - start):
            if 0 <= i < len(found):
                found[i] = byte
        buffer[: len(found)] = found
        return len(found)


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


def _open_libsndfile(file: BinaryIO) -> tuple[soundfile.SoundFile, _Guard]:
    source: BinaryIO | int = file
    held: _Guard = interrupts_held
    file.seek(0)
    if isinstance(file, io.BufferedReader):  # a file on a disk: libsndfile reads it without Python callbacks
        source, held = file.fileno(), contextlib.nullcontext
        os.lseek(source, 0, os.SEEK_SET)
    try:
        with held():
            return soundfile.SoundFile(source, closefd=False), held
    except (soundfile.LibsndfileError, OSError, ValueError, TypeError) as error:
        raise Unreadable(f"is not audio that can be read: {_reason(error)}") from error


def _libsndfile_blocks(audio: soundfile.SoundFile, size: int, held: _Guard, notes: list[str]) -> Iterator[np.ndarray]:
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
            if count == frames and audio.format in ("WAV", "WAVEX"):
                break  # no read is needed to find the end
        if count < frames < _UNKNOWN_FRAMES:
            check_missing(frames - count, frames, audio.samplerate, f"{count} samples of {frames}")
            notes.append(f"holds {count} samples of the {frames} that its header counts")


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
