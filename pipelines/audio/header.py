"""Headers of audio files: whether a file is whole, and where the samples of the usual WAV file are.

libsndfile decodes a file that is cut short without an error, as a shorter one.
"""

from __future__ import annotations

import os
import struct
from typing import BinaryIO, NamedTuple

from harmonic.records import MAX_CHANNELS
from pipelines.errors import Unreadable

_HEAD_BYTES = 64 << 10  # of a file that are read at once
_FORMAT = struct.Struct("<HHIIHH")  # of a WAV file: tag, channels, rate, bytes a second, bytes a frame, bits
_UNKNOWN_SIZES = (0, 0xFFFFFFFF)  # in the header of a WAV file that was written to a pipe
_MAX_OGG_PAGE = 27 + 255 + 255 * 255  # bytes


class Pcm(NamedTuple):
    """The samples of a WAV file of 16 bits: rate in Hz, channels, offset in bytes, frames."""

    rate: int
    channels: int
    start: int
    frames: int


def check_whole(file: BinaryIO) -> tuple[int, bytes, Pcm | None]:
    """Compares the size that a WAV, AIFF, W64 or AU header claims with the file's, and finds an OGG stream's end.

    Returns:
      (the file's bytes, its first 64 KiB, the place of its samples if it is the usual WAV file).

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


def _claimed_end(file: BinaryIO, head: bytes, size: int) -> tuple[int, Pcm | None]:
    """The offset at which the samples end by the header, or 0 if it does not say; and their place in a usual WAV."""
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
            # sox also writes a largest possible size when it cannot go back to correct it.
            unknown = length in _UNKNOWN_SIZES or 0x7FFFF000 <= length <= 0x7FFFFFFF
            if unknown:
                return 0, None
            is_wave = kind == b"RIFF" and head[8:12] == b"WAVE" and name == b"data" and len(form) == _FORMAT.size
            return position + 8 + length, _pcm(form, position + 8, length) if is_wave else None
        position += 8 + length + length % 2
    return 0, None


def _pcm(form: bytes, start: int, length: int) -> Pcm | None:
    tag, channels, rate, _, width, bits = _FORMAT.unpack(form)
    if (tag, bits) != (1, 16) or not 1 <= channels <= MAX_CHANNELS or width != 2 * channels:
        return None
    return Pcm(rate, channels, start, length // width)
