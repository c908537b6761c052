"""The format of a prepared data set: records, the index of recordings, and the manifest (NumPy only).

A data set is a folder:

    manifest.json                             properties and contents; written last: without it there is no data set
    train-00000-of-00002.array_record         records, each a piece of one recording
    train-00000-of-00002.recordings.jsonl     the shard's index: one recording a line, in the order of its records

A **record** is a contiguous piece of one recording. A recording's pieces follow one another in one shard, do not
overlap, and are `record_length` samples long, except that the last may be shorter. Windows are index arithmetic over
the pieces (`harmonic.data`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from harmonic.errors import UserError

FORMAT = 2  # format 1 had no hop, no options and no checksum; it can still be read
SPLITS = ("train", "validation", "test")
MANIFEST_NAME = "manifest.json"
MAX_CHANNELS = 1_024
_MAGIC = b"HRN1"
_PREFIX = struct.Struct("<4sI")  # magic, bytes of the JSON header
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}")
_quote = json.JSONEncoder().encode  # of text, or None
_CHECKSUM = struct.Struct("<I")  # CRC-32 of all bytes before it
_DTYPES: dict[str, np.dtype[Any]] = {"uint8": np.dtype("<u1"), "uint16": np.dtype("<u2")}
_NAMES = {dtype.newbyteorder(order): name for name, dtype in _DTYPES.items() for order in ("<", ">")}


class RecordError(ValueError):
    """The bytes are damaged, or they are no record."""


@dataclasses.dataclass(frozen=True)
class Record:
    """A piece of a recording.

    Attributes:
      recording: the recording's id, unique in its data set (its path below the source's root).
      offset: where the piece starts in the recording, in samples.
      recording_length: the recording's length, in samples.
      tokens: [length, channels], uint8 or uint16.
      label: the source's word for the recording (the digit, for SC09), or None.
    """

    recording: str
    offset: int
    recording_length: int
    tokens: np.ndarray
    label: str | None = None


def encode_record(record: Record) -> bytes:
    """The bytes of a record: magic, header length, JSON header, tokens (little-endian), CRC-32."""
    length, channels = record.tokens.shape
    dtype = _NAMES[record.tokens.dtype]
    head = record_head(record.recording, record.label, record.offset, length, record.recording_length, channels, dtype)
    body = head + np.ascontiguousarray(record.tokens, _DTYPES[dtype]).tobytes()
    return body + _CHECKSUM.pack(zlib.crc32(body))


def record_head(
    recording: str, label: str | None, offset: int, length: int, recording_length: int, channels: int, dtype: str
) -> bytes:
    """The first bytes of a record: magic, header length, JSON header (with sorted keys, without spaces)."""
    text = (
        f'{{"channels":{channels},"dtype":"{dtype}","label":{_quote(label)},"length":{length},"offset":{offset},'
        f'"recording":{_quote(recording)},"recording_length":{recording_length}}}'
    )
    return _PREFIX.pack(_MAGIC, len(text)) + text.encode()


def record_tokens(data: bytes, head: bytes, length: int, channels: int, dtype: str) -> np.ndarray | None:
    """The tokens [length, channels] of the record that begins with this head, or None if `data` is another record.

    They are a view of `data`. Nothing is parsed, and the checksum is not compared.
    """
    kind = _DTYPES[dtype]
    values = length * channels
    if not data.startswith(head) or len(data) != len(head) + values * kind.itemsize + _CHECKSUM.size:
        return None
    return np.frombuffer(data, kind, values, len(head)).reshape(length, channels)


def decode_record(data: bytes, *, verify: bool = True) -> Record:
    """The record that `encode_record` wrote.

    Args:
      data: its bytes; the tokens are a view of them.
      verify: compare with the checksum; not needed if the reader of the bytes has checked them.

    Raises:
      RecordError: the bytes are not a record, are cut short, or do not match their checksum.
    """
    if len(data) < _PREFIX.size + _CHECKSUM.size or data[:4] != _MAGIC:
        raise RecordError("not a HarmonicRNN record")
    if verify:
        (checksum,) = _CHECKSUM.unpack_from(data, len(data) - _CHECKSUM.size)
        if zlib.crc32(memoryview(data)[: -_CHECKSUM.size]) != checksum:
            raise RecordError("the record does not match its checksum")
    _, header_length = _PREFIX.unpack_from(data)
    start, stop = _PREFIX.size + header_length, len(data) - _CHECKSUM.size
    try:
        header = json.loads(data[_PREFIX.size : start].decode())
        dtype = _DTYPES[header["dtype"]]
        length, channels = header["length"], header["channels"]
        tokens = np.frombuffer(memoryview(data)[start:stop], dtype)
        if type(length) is not int or type(channels) is not int or not (length >= 0 < channels <= MAX_CHANNELS):
            raise ValueError(f"it has {length!r:.20} samples of {channels!r:.20} channels")
        recording, label = header["recording"], header["label"]
        if type(recording) is not str or not (label is None or type(label) is str):
            raise ValueError("recording and label must be text")
        offset, recording_length = header["offset"], header["recording_length"]
        if not (type(offset) is type(recording_length) is int and 0 <= offset < 2**63 > recording_length >= 0):
            raise ValueError(f"it is at {offset!r:.20} of {recording_length!r:.20} samples")
        return Record(recording, offset, recording_length, tokens.reshape(length, channels), label)
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise RecordError(f"the record's header does not describe its {stop - start} bytes: {error}") from error


@dataclasses.dataclass(frozen=True)
class Recording:
    """One line of a shard's index.

    Attributes:
      id: as in `Record.recording`.
      length: samples.
      records: number of its records.
      label: as in `Record.label`.
      low, high: the samples that were quantised as -1 and 1, in the waveform after mixing and resampling: its minimum
        and maximum or, if loudness was normalised, -1 / gain and 1 / gain.
      source_rate: the source file's sample rate, in Hz.
      level: root mean square of that waveform after trimming, in dB below full scale; None in a data set of format 1.
      cut_front, cut_back: samples that trimming cut off.
    """

    id: str
    length: int
    records: int
    label: str | None
    low: float
    high: float
    source_rate: int
    level: float | None = None
    cut_front: int = 0
    cut_back: int = 0


@dataclasses.dataclass(frozen=True)
class Shard:
    """A shard file of a split, with its index beside it. Checksums are SHA-256 in hexadecimal.

    `longest` is the length of its longest recording, in samples; 0 in a data set of format 1.
    """

    file: str
    bytes: int
    sha256: str
    index_file: str
    index_bytes: int
    index_sha256: str
    records: int
    recordings: int
    windows: int
    samples: int
    longest: int = 0


@dataclasses.dataclass(frozen=True)
class Split:
    """A split's totals, and its shards in order."""

    recordings: int
    windows: int
    samples: int
    shards: tuple[Shard, ...]


@dataclasses.dataclass(frozen=True)
class Skipped:
    """A recording that could not be read, and the reason."""

    recording: str
    split: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Noted:
    """A recording that was read, and what is not usual about it: a clause whose subject is the recording."""

    recording: str
    split: str
    note: str


@dataclasses.dataclass(frozen=True)
class LeftOut:
    """How many files of the source are no recordings of the data set, why, and one of them."""

    reason: str
    files: int
    example: str


@dataclasses.dataclass(frozen=True)
class Manifest:
    """A data set's properties and contents.

    Attributes:
      dataset: its name.
      source: the source as it was given (`hub`, a path or URL, `synth`).
      fingerprint: SHA-256 of the source's content, and of hop, trimming, loudness and splits if they are not the
        defaults; equal fingerprints mean equal recordings to train on.
      sample_rate: Hz.
      encoding, num_levels, token_dtype, channels: of the tokens.
      window_length: samples of the data set's usual training window; `windows` are counted with it.
      hop_length: samples from the start of one such window to the start of the next.
      record_length: the longest piece in a record, in samples.
      trim_silence: leading and trailing silence that many dB below the loudest frame was cut off; None: nothing was.
      loudness: recordings were brought to that loudness, in LUFS, and to one scale; None: each has its own scale.
      split_rule: `default` (the source's own, or by hash), `hash` with the shares, or `lists` with their SHA-256.
      splits: by name, each of `SPLITS`.
      skipped: recordings that could not be read.
      noted: recordings that were read and are not as they should be. These two are in the text only if there are any.
      left_out: files that are no recordings, by reason.
    """

    dataset: str
    source: str
    fingerprint: str
    sample_rate: int
    encoding: str
    num_levels: int
    token_dtype: str
    channels: int
    window_length: int
    hop_length: int
    record_length: int
    trim_silence: float | None
    loudness: float | None
    split_rule: str
    splits: dict[str, Split]
    skipped: tuple[Skipped, ...] = ()
    noted: tuple[Noted, ...] = ()
    left_out: tuple[LeftOut, ...] = ()

    def to_json(self) -> str:
        """The text of manifest.json with its own checksum; the same manifest always gives the same text."""
        body = {"format": FORMAT, **dataclasses.asdict(self)}
        for name in _OPTIONAL:
            if not body[name]:
                del body[name]
        return _with_checksum(body)

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Reads the text of `to_json`.

        Raises:
          ValueError: it is not the JSON of a manifest, has another format or impossible values, or was changed.
        """
        raw = json.loads(text)
        if not isinstance(raw, dict) or raw.get("format") not in (1, FORMAT):
            raise ValueError(f"not a manifest of format {FORMAT}")
        if raw["format"] == 1:
            before = {"hop_length": raw.get("window_length"), "trim_silence": None, "loudness": None}
            raw = {**raw, **before, "split_rule": "default"}
        splits = _field(raw, "splits", dict)
        manifest = cls(
            **{
                f.name: _field(raw, f.name, _TYPES[str(f.type)])
                for f in dataclasses.fields(cls)
                if str(f.type) in _TYPES
            },
            splits={name: _split(splits, name) for name in splits},
            skipped=tuple(_row(Skipped, row) for row in _field(raw, "skipped", list)),
            noted=tuple(_row(Noted, row) for row in _field({"noted": [], **raw}, "noted", list)),
            left_out=tuple(_row(LeftOut, row) for row in _field({"left_out": [], **raw}, "left_out", list)),
        )
        if set(manifest.splits) != set(SPLITS):
            raise ValueError(f"splits are {sorted(manifest.splits)}, not {sorted(SPLITS)}")
        for name in ("sample_rate", "channels", "window_length", "hop_length", "record_length"):
            if getattr(manifest, name) < 1:
                raise ValueError(f"{name} is {getattr(manifest, name)}, below 1")
        if manifest.channels > MAX_CHANNELS:
            raise ValueError(f"channels is {manifest.channels}, above {MAX_CHANNELS}")
        if manifest.token_dtype not in _DTYPES:
            raise ValueError(f"token_dtype is {manifest.token_dtype!r:.60}, not one of {', '.join(_DTYPES)}")
        if raw["format"] == FORMAT and text != _with_checksum({n: v for n, v in raw.items() if n != "checksum"}):
            raise ValueError("it does not match its own checksum")  # of all fields, a later version's among them
        return manifest


def _with_checksum(body: dict[str, Any]) -> str:
    """A manifest's fields as the text of its file, their checksum last."""
    checksum = hashlib.sha256(json.dumps(body, indent=2).encode()).hexdigest()
    return json.dumps({**body, "checksum": checksum}, indent=2) + "\n"


def count_windows(length: int, window_length: int, hop_length: int | None = None) -> int:
    """The number of windows of a recording. The last is the first one that reaches the end; it may be short.

    Args:
      length: samples of the recording.
      window_length: samples of a window.
      hop_length: from one window's start to the next; `window_length` if None. A longer hop skips samples.
    """
    hop = hop_length or window_length
    return -(-(max(length - window_length, 0) + min(window_length, hop)) // hop) if length else 0


def load_manifest(folder: str | os.PathLike[str]) -> Manifest:
    """Reads a data set's manifest.

    Raises:
      UserError: there is no whole data set in `folder`.
    """
    path = Path(folder) / MANIFEST_NAME
    try:
        return Manifest.from_json(path.read_bytes().decode())  # text mode would repair damaged line ends
    except FileNotFoundError:
        raise UserError(
            f"{path} is missing: there is no data set in {folder}; make one with "
            f"python -m pipelines.prepare --dataset {Path(folder).name} --output_dir {Path(folder).parent}"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error}); remove the folder and prepare the data set again") from error


def read_index(folder: str | os.PathLike[str], shard: Shard) -> Iterator[Recording]:
    """Yields the recordings of a shard, in the order of their records.

    Raises:
      UserError: the index is missing or damaged.
    """
    path = Path(folder) / shard.index_file
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size != shard.index_bytes:
                raise ValueError(f"{size} bytes instead of {shard.index_bytes}")
            if hashlib.file_digest(file, "sha256").hexdigest() != shard.index_sha256:
                raise ValueError("it does not match its checksum")
            file.seek(0)
            recordings = records = 0
            for line in file:
                row = _row(Recording, json.loads(line))
                recordings, records = recordings + 1, records + row.records
                yield row
            if (recordings, records) != (shard.recordings, shard.records):
                raise ValueError("it does not match the manifest")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is missing or damaged ({error}); prepare the data set again") from error


def index_line(recording: Recording) -> bytes:
    """A recording's line in the index."""
    return _INDEX_LINE.encode(vars(recording)).encode() + b"\n"


_OPTIONAL = ("noted", "left_out")
_INDEX_LINE = json.JSONEncoder(separators=(",", ":"))

_TYPES: dict[str, type | tuple[type, ...]] = {
    "str": str,
    "int": int,
    "float": (int, float),
    "float | None": (int, float, type(None)),
    "str | None": (str, type(None)),
}


def _field(raw: Any, name: str, kind: type | tuple[type, ...]) -> Any:
    if not isinstance(raw, dict) or name not in raw:
        raise ValueError(f"{name} is missing")
    value = raw[name]
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"{name} is {value!r:.60}")
    if isinstance(value, int) and not 0 <= value < 2**63:
        raise ValueError(f"{name} is {'below zero' if value < 0 else 'too large'}")
    return value


def _row(cls: type, raw: Any) -> Any:
    return cls(
        **{
            f.name: _field(raw, f.name, _TYPES[str(f.type)])
            for f in dataclasses.fields(cls)
            if f.default is dataclasses.MISSING or (isinstance(raw, dict) and f.name in raw)
        }
    )


def _split(splits: dict[str, Any], name: str) -> Split:
    raw = splits[name]
    shards = tuple(_row(Shard, row) for row in _field(raw, "shards", list))
    for shard in shards:
        for file in (shard.file, shard.index_file):
            if not _FILE_NAME.fullmatch(file):
                raise ValueError(f"{file!r:.60} is not a plain file name")
    totals = {key: _field(raw, key, int) for key in ("recordings", "windows", "samples")}
    return Split(**totals, shards=shards)
