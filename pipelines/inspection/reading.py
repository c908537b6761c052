"""Reads prepared data sets shard by shard, for inspection. The memory does not grow with the data set."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np

from harmonic.errors import UserError, one_line
from harmonic.records import Manifest, Record, RecordError, Recording, Shard, decode_record, read_index
from pipelines.beam.storage import exists, open_file
from pipelines.errors import disk_full, scratch_errors
from pipelines.paths import is_local, join


@contextlib.contextmanager
def fetched(folder: str, shard: Shard) -> Iterator[str]:
    """A local folder that holds a shard and its index: the data set's own, or one with temporary copies.

    A missing file is missing there, too.

    Raises:
      UserError: a remote file cannot be read, or there is no room for it.
    """
    if is_local(folder):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="harmonic-shard-") as copy:
        for name in (shard.file, shard.index_file):
            path = join(folder, name)
            with scratch_errors():
                try:
                    if exists(path):
                        with open_file(path) as source, open(os.path.join(copy, name), "wb") as target:
                            shutil.copyfileobj(source, target, 1 << 20)
                except Exception as error:  # Beam's file systems raise errors of their own
                    if disk_full(error):
                        raise
                    raise UserError(f"{path} cannot be read ({one_line(error)}); try again") from error
        yield copy


def open_shard(path: str) -> Any:
    """A shard's records as bytes, at random access.

    Raises:
      RecordError: it is missing or damaged.
    """
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    if not os.path.isfile(path):
        raise RecordError("it is missing")
    try:
        return ArrayRecordDataSource([path])
    except (RuntimeError, ValueError, OSError) as error:
        raise RecordError(one_line(error)) from error


def read_record(records: Any, number: int) -> Record:
    """A record of an open shard.

    Raises:
      RecordError: it is damaged.
    """
    try:
        data = records[number]
    except (RuntimeError, ValueError, IndexError, OSError) as error:
        raise RecordError(one_line(error)) from error
    return decode_record(data)


@dataclasses.dataclass(frozen=True)
class Located:
    """A recording and its place in a data set.

    Attributes:
      folder: a local folder that holds the shard until the next recording is taken.
      split, shard: of the data set.
      recording: its line in the index.
      first_record: number of its first record in the shard.
    """

    folder: str
    split: str
    shard: Shard
    recording: Recording
    first_record: int


def recordings(folder: str, manifest: Manifest, split: str | None = None) -> Iterator[Located]:
    """Yields all recordings of a data set or of a split, in the order of the shards.

    Raises:
      UserError: an index is missing or damaged.
    """
    for name, part in manifest.splits.items():
        if split in (None, name):
            for shard in part.shards:
                with fetched(folder, shard) as local:
                    first = 0
                    for recording in read_index(local, shard):
                        yield Located(local, name, shard, recording, first)
                        first += recording.records


def pieces(manifest: Manifest, located: Located, start: int = 0, stop: int | None = None) -> Iterator[np.ndarray]:
    """Yields tokens [length, channels] of samples start .. stop of a recording (by default all), record by record.

    Raises:
      UserError: a record is damaged.
    """
    recording, shard, piece = located.recording, located.shard, manifest.record_length
    stop = recording.length if stop is None else min(stop, recording.length)
    try:
        records = open_shard(os.path.join(located.folder, shard.file))
        for number in range(start // piece, -(-stop // piece)):
            record = read_record(records, located.first_record + number)
            if (record.recording, record.offset) != (recording.id, number * piece):
                raise RecordError(f"it holds {one_line(record.recording)} from sample {record.offset}")
            yield record.tokens[max(0, start - number * piece) : stop - number * piece]
    except RecordError as error:
        raise UserError(
            f"{shard.file} is damaged at recording {one_line(recording.id)} ({error}); --verify names all that is"
        ) from error
