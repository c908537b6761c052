"""Where the samples of uncompressed files are: WAV, RF64, W64, AIFF, AU, CAF; and how MP3 and Ogg files end.

A header's count of samples is no more than a claim. Recorders that crash leave 0, programs that write to a pipe leave
a largest size, some count their own header or wrap at 4 GiB, and copies are cut short. libsndfile believes too small a
count, and takes a file that is cut short for a shorter one, both without a word.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from typing import BinaryIO, Literal, NamedTuple

from harmonic.errors import Unreadable
from harmonic.records import MAX_CHANNELS

_HEAD_BYTES = 64 << 10  # of a file that are read at once
_FORMAT = struct.Struct("<HHIIHH")  # of a WAV file: tag, channels, rate, bytes a second, bytes a frame, bits
_MAX_OGG_PAGE = 27 + 255 + 255 * 255  # bytes
_COUNTED_HEADER = 64  # bytes by which a header that counts itself exceeds what is there
_SLIGHT_SHARE, _SLIGHT_SECONDS = 0.01, 0.1  # of a recording that may be missing for it to be used all the same
_TAGS = (b"TAG", b"ID3", b"APETAGEX", b"LYRICSBEGIN")  # that programs put behind the end of any file
_W64_TAIL = (
    b"\xf3\xac\xd3\x11\x8c\xd1\x00\xc0\x4f\x8e\xdb\x8a"  # of the GUIDs that begin with the names of WAV's chunks
)


class Pcm(NamedTuple):
    """The samples of a WAV file of 16 bits: rate in Hz, channels, offset in bytes, frames."""

    rate: int
    channels: int
    start: int
    frames: int


class Head(NamedTuple):
    """What a file's first bytes say.

    Attributes:
      size: bytes of the file.
      data: its first 64 KiB.
      pcm: the place of the samples if it is the usual WAV file.
      patch: (offset, bytes) to be read in the place of a count of bytes that is wrong; None if it is right.
      notes: what is not as the header says, each a clause whose subject is the file.
    """

    size: int
    data: bytes
    pcm: Pcm | None = None
    patch: tuple[int, bytes] | None = None
    notes: tuple[str, ...] = ()


class _Data(NamedTuple):
    """The chunk of samples: where they start, how many bytes its header counts, and the field with that count."""

    start: int
    claimed: int
    field: int
    width: int
    order: Literal["little", "big"]
    extra: int  # that the field counts besides the samples
    align: int  # of chunks


def read_head(file: BinaryIO) -> Head:
    """Reads a file's first bytes, and compares the size that they claim with the file's.

    Raises:
      Unreadable: the file is empty, or more than a little of it is missing at its end.
    """
    file.seek(0)
    head = file.read(_HEAD_BYTES)
    size = len(head) if len(head) < _HEAD_BYTES else file.seek(0, os.SEEK_END)
    if not size:
        raise Unreadable("is empty")
    if head[:4] == b"OggS":
        return Head(size, head, notes=_ogg_end(file, size))
    reader = _Reader(file, head, size)
    data, form, rate = _find_data(reader)
    if data is None:
        return Head(size, head)
    notes, patch, claimed_end = [], None, data.start + data.claimed
    end = claimed_end
    if claimed_end > size:
        end = size
        if not _is_unknown(data.claimed + data.extra, data.width):
            missing = claimed_end - size
            if missing > _COUNTED_HEADER:
                check_missing(missing, data.claimed, rate, f"{size} bytes, and its header claims {claimed_end}")
            notes.append(f"is {missing} bytes shorter than its header claims")
    elif claimed_end < size and not _is_tail(reader, claimed_end, data):
        end = size
        if data.claimed:
            notes.append(f"holds {size - data.start} bytes of samples, and its header counts {data.claimed}")
    if end != claimed_end:
        # Both libraries take the largest size for all that follows, where the right one does not fit.
        right = min(max(end - data.start, 0) + data.extra, (1 << 8 * data.width) - 1)
        patch = data.field, right.to_bytes(data.width, data.order)
    usual = head[:4] == b"RIFF" and head[8:12] == b"WAVE" and len(form) == _FORMAT.size
    return Head(size, head, _pcm(form, data.start, end - data.start) if usual else None, patch, tuple(notes))


def check_missing(missing: float, of: float, rate: float, text: str) -> None:
    """Refuses a recording of which more than a little is missing.

    Args:
      missing, of: in one unit, such as bytes.
      rate: such units a second; 0 if that is not known.
      text: what is there, and what should be.

    Raises:
      Unreadable: it is cut short.
    """
    slight = min(_SLIGHT_SHARE * of, _SLIGHT_SECONDS * rate if rate else _SLIGHT_SHARE * of)
    if missing > slight:
        raise Unreadable(f"is cut short: {text}")


class _Reader:
    """Reads anywhere in a file, from its first bytes where these have it."""

    def __init__(self, file: BinaryIO, head: bytes, size: int):
        self._file, self.head, self.size = file, head, size

    def at(self, position: int, count: int) -> bytes:
        if position + count <= len(self.head):
            return self.head[position : position + count]
        self._file.seek(position)
        return self._file.read(count)


def _find_data(reader: _Reader) -> tuple[_Data | None, bytes, float]:
    """The chunk of samples, a WAV file's format, and bytes a second (0 if they are not known)."""
    head, kind = reader.head, reader.head[:4]
    if kind == b".snd" and len(head) >= 24:
        start, claimed = struct.unpack(">II", head[4:12])
        return _Data(start, claimed, 8, 4, "big", 0, 1), b"", 0
    if kind == b"riff" and head[28:40] == _W64_TAIL:
        chunks, extra, header, wave = _chunks(reader, 40, "<16sQ", 8, 24), 24, 24, True
    elif kind == b"caff":
        chunks, extra, header, wave = _chunks(reader, 8, ">4sQ", 1, 0), 4, 16, False
    elif kind in (b"RIFF", b"RIFX", b"RF64", b"BW64", b"FORM"):
        big = kind in (b"RIFX", b"FORM")
        extra, header = (8, 16) if kind == b"FORM" else (0, 8)
        chunks, wave = _chunks(reader, 12, ">4sI" if big else "<4sI", 2, 0), not big
    else:
        return None, b"", 0
    wide, form, rate = 0, b"", 0.0
    order: Literal["little", "big"] = "big" if kind in (b"RIFX", b"FORM", b"caff") else "little"
    for name, position, length in chunks:
        if name[:4] == b"ds64":
            wide = position + 16  # where RF64 keeps the size
        elif name[:4] == b"fmt ":
            form = reader.at(position + (24 if len(name) == 16 else 8), min(length, _FORMAT.size))
            rate = _FORMAT.unpack(form)[3] if wave and len(form) == _FORMAT.size else 0.0
        elif name[:4] in (b"data", b"SSND"):
            field, width = position + len(name), 8 if kind in (b"riff", b"caff") else 4
            if kind in (b"RF64", b"BW64") and length == 0xFFFFFFFF and wide:
                field, width, length = wide, 8, int.from_bytes(reader.at(wide, 8), "little")
            align = 8 if header == 24 else 2
            return _Data(position + header, max(length - extra, 0), field, width, order, extra, align), form, rate
    return None, b"", 0


def _chunks(reader: _Reader, position: int, layout: str, align: int, counted: int) -> Iterator[tuple[bytes, int, int]]:
    """(name, offset, bytes) of each chunk of a file; `counted` bytes of its head are part of a chunk's size."""
    head = struct.Struct(layout)
    for _ in range(1_000):  # a hostile file could hold millions
        if position + head.size > reader.size:
            return
        name, length = head.unpack(reader.at(position, head.size))
        yield name, position, length
        position += -(-(max(length - counted, 0) + head.size) // align) * align


def _is_unknown(claimed: int, width: int) -> bool:
    """Whether a size is what programs write that do not know it: none, or one near the largest, signed or not."""
    top = 1 << 8 * width
    if width == 8:
        return claimed == 0 or claimed >= top // 4
    # sox writes 0x7F000000, and others the largest size less their header's.
    return (
        claimed == 0
        or claimed >= top - 0x10000
        or 0x7FFF0000 <= claimed <= 0x80001000
        or 0 <= claimed - 0x7F000000 < 0x1000
    )


def _is_tail(reader: _Reader, end: int, data: _Data) -> bool:
    """Whether what follows the samples is something else: further chunks, tags, or no more than padding."""
    end += -end % data.align
    rest = reader.at(end, 16)
    if len(rest) < 8 or rest.startswith(_TAGS) or rest[4:16] == _W64_TAIL:
        return True
    if all(32 <= byte < 127 for byte in rest[:4]):
        sizes = (int.from_bytes(rest[4:8], order) for order in _ORDERS)
        return rest[:4] in _KNOWN or min(sizes) <= reader.size - end - 8
    # Silence is sound where nothing is counted, as in the file of a recorder that crashed.
    return bool(data.claimed) and not any(
        any(reader.at(position, 1 << 20)) for position in range(end, reader.size, 1 << 20)
    )


_ORDERS: tuple[Literal["little"], Literal["big"]] = ("little", "big")
_KNOWN = frozenset(b"LIST|id3 |ID3 |bext|fact|cue |smpl|inst|PEAK|JUNK|junk|FLLR|PAD |iXML|axml|afsp|_PMX".split(b"|"))


def _pcm(form: bytes, start: int, length: int) -> Pcm | None:
    tag, channels, rate, _, width, bits = _FORMAT.unpack(form)
    if (tag, bits) != (1, 16) or not 1 <= channels <= MAX_CHANNELS or width != 2 * channels:
        return None
    return Pcm(rate, channels, start, max(length, 0) // width)


def _ogg_end(file: BinaryIO, size: int) -> tuple[str, ...]:
    file.seek(max(0, size - _MAX_OGG_PAGE))
    tail = file.read()
    page = tail[tail.rfind(b"OggS") :]
    table = page[27 : 27 + page[26]] if len(page) > 26 else b""
    if not table or len(page) < 27 + page[26] + sum(table):
        raise Unreadable("is cut short: its last page is not whole")
    return () if page[5] & 4 else ("does not say that it is whole: its last page has no end flag",)


def mp3_samples(file: BinaryIO, head: bytes) -> int:
    """The samples that the Xing or Info header of an MP3 file counts, delays included; 0 without one.

    FFmpeg's own length is this, or an estimate from the first frames' bit rate, and it does not say which.
    """
    start = 0
    if head[:3] == b"ID3":
        start = 10 + sum((byte & 127) << shift for byte, shift in zip(head[6:10], (21, 14, 7, 0), strict=False))
    file.seek(start)
    frame = file.read(256)
    at = max(frame.find(b"Xing"), frame.find(b"Info"))
    if at < 4 or frame[0] != 0xFF or len(frame) < at + 12 or not frame[at + 7] & 1:
        return 0
    each = 1_152 if frame[1] & 0x08 else 576  # of MPEG 1, or of 2 and 2.5
    return int.from_bytes(frame[at + 8 : at + 12], "big") * each
