"""The atomic sharded sink: local temporary ArrayRecord files, staged in the data set's folder, published at the end.

A run stages its shards in a folder of its own, `_partial-<run>` in the data set's folder. Only when all of them are
there and counted does one last step rename them and write the manifest. So a run that dies leaves nothing that looks
whole, and two runs at once cannot touch each other's files. Paths may be local or of any file system that Beam knows.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import os
import re
import tempfile
from collections.abc import Iterable

from harmonic.errors import UserError, one_line
from harmonic.records import (
    MANIFEST_NAME,
    Manifest,
    Noted,
    Record,
    Recording,
    Shard,
    Skipped,
    count_windows,
    encode_record,
    index_line,
    load_manifest,
)
from pipelines.beam.storage import create_file, delete, exists, file_systems, flush, list_files, open_file, rename
from pipelines.errors import output_errors, scratch_errors
from pipelines.paths import is_local, join

# One record a group: random access reads one record. Not compressed: zstd saves 15 to 25 % of 8-bit music and speech,
# and halves the number of windows read a second.
WRITER_OPTIONS = "group_size:1,uncompressed"
_SHARD_FILE = re.compile(r"(train|validation|test)-\d{5,}-of-\d{5,}\.(array_record|recordings\.jsonl)")
_PARTIAL = re.compile(r"_partial-[0-9a-f]{32}")


@dataclasses.dataclass(frozen=True)
class WrittenShard:
    """The result of writing one shard.

    Attributes:
      split: the shard's.
      shard: as the manifest will list it.
      staged: paths of the shard and of its index until they are published.
      skipped: recordings that could not be read.
      noted: recordings that were read and are not as they should be.
    """

    split: str
    shard: Shard
    staged: tuple[str, str]
    skipped: tuple[Skipped, ...]
    noted: tuple[Noted, ...] = ()


def stage_folder(folder: str, run: str) -> str:
    """A run's own folder in the data set's."""
    return join(folder, f"_partial-{run}")


def shard_name(split: str, index: int, count: int) -> str:
    """The name of a shard's file, without its suffix."""
    return f"{split}-{index:05d}-of-{count:05d}"


class _NativeErrors:
    """A context manager that turns errors of the native writer, and of the index beside it, into UserErrors.

    The native writer raises RuntimeError for everything, a full disk included. One object serves all records: making
    a context manager for each would show in the run's time.
    """

    def __init__(self, folder: str):
        self._folder = folder

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, RuntimeError):
            if os.strerror(errno.ENOSPC) in str(error):
                raise UserError(f"no space is left in {self._folder}; make room there") from error
            raise UserError(f"cannot write to {self._folder}: {one_line(error)}; make it writable") from error
        if error is not None:
            with scratch_errors(self._folder):
                raise error


class ShardWriter:
    """Writes one shard and its index to local temporary files; `stage` moves them out. A context manager.

    Args:
      folder: the data set's folder.
      run: the run's id.
      window_length, hop_length: for counting windows.

    Raises:
      UserError: in `with` or any method, when there is no room or the folder is not writable.
    """

    def __init__(self, folder: str, run: str, window_length: int, hop_length: int | None = None):
        self._window_length, self._hop_length = window_length, hop_length
        self._target, self._stage = folder, stage_folder(folder, run)
        # For a local data set, temporary files are in the staging folder as well: after a kill, the next run clears it.
        with output_errors(folder):
            if is_local(folder):
                os.makedirs(self._stage, exist_ok=True)
            self._folder = tempfile.TemporaryDirectory(prefix="shard-", dir=self._stage if is_local(folder) else None)
        self._shard_path = os.path.join(self._folder.name, "shard.array_record")
        self._index_path = os.path.join(self._folder.name, "index.jsonl")
        self._native_errors = _NativeErrors(folder if is_local(folder) else tempfile.gettempdir())
        self.records = self.recordings = self.windows = self.samples = self.longest = 0

    def __enter__(self) -> ShardWriter:
        from array_record.python.array_record_module import ArrayRecordWriter

        with self._native_errors:
            self._writer = ArrayRecordWriter(self._shard_path, WRITER_OPTIONS)
        self._index = open(self._index_path, "wb")
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(Exception):
            self._index.close()
        with contextlib.suppress(Exception):
            if self._writer.is_open():
                self._writer.close()
        self._folder.cleanup()

    def write(self, record: Record) -> int:
        """Appends a record of the recording that `end_recording` will name; returns its bytes."""
        data = encode_record(record)
        with self._native_errors:
            self._writer.write(data)
        self.records += 1
        return len(data)

    def end_recording(self, recording: Recording) -> None:
        """Enters the recording whose records were written last into the index."""
        with self._native_errors:
            self._index.write(index_line(recording))
        self.recordings += 1
        self.windows += count_windows(recording.length, self._window_length, self._hop_length)
        self.samples += recording.length
        self.longest = max(self.longest, recording.length)

    def stage(self, name: str) -> tuple[Shard, tuple[str, str]]:
        """Moves both files into the run's own folder. Returns the shard, and the paths for `flush_staged`."""
        with self._native_errors:
            self._writer.close()
            self._index.close()
        files = f"{name}.array_record", f"{name}.recordings.jsonl"
        # A distributed runner may write a shard twice: the names differ, and only one of the two is published.
        attempt = os.urandom(8).hex()
        staged = tuple(join(self._stage, f"{attempt}-{file}") for file in files)
        with output_errors(self._target):
            size, digest = _move_out(self._shard_path, staged[0])
            index_size, index_digest = _move_out(self._index_path, staged[1])
        shard = Shard(
            file=files[0],
            bytes=size,
            sha256=digest,
            index_file=files[1],
            index_bytes=index_size,
            index_sha256=index_digest,
            records=self.records,
            recordings=self.recordings,
            windows=self.windows,
            samples=self.samples,
            longest=self.longest,
        )
        return shard, (staged[0], staged[1])


def _move_out(local: str, path: str) -> tuple[int, str]:
    """Moves a temporary file to its staged path; returns its bytes and SHA-256."""
    if is_local(path):  # on the same disk
        with open(local, "rb") as file:
            digest, size = hashlib.file_digest(file, "sha256"), os.fstat(file.fileno()).st_size
        os.rename(local, path)
        return size, digest.hexdigest()
    digest, size = hashlib.sha256(), 0
    with open(local, "rb") as source, create_file(path) as target:
        while block := source.read(1 << 20):
            digest.update(block)
            size += len(block)
            target.write(block)
    return size, digest.hexdigest()


def flush_staged(folder: str, staged: Iterable[str]) -> None:
    """Waits until staged files are on the disk, if it is a local one.

    Raises:
      UserError: they cannot be written.
    """
    with output_errors(folder):
        for path in staged if is_local(folder) else ():
            with open(path, "rb") as file:
                flush(path, file)


def create_folder(folder: str) -> None:
    """Makes the data set's folder if it does not exist.

    Raises:
      UserError: it cannot be made or written to, or its file system is not known.
    """
    with output_errors(folder):
        if is_local(folder):
            os.makedirs(folder, exist_ok=True)
            if not os.access(folder, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        else:
            file_systems().get_filesystem(folder)


def publish(folder: str, run: str, staged: Iterable[tuple[str, str]], manifest: Manifest) -> None:
    """Renames staged files to their final names, and last the manifest: from then on there is a data set.

    Args:
      folder: the data set's folder.
      run: the run's id.
      staged: (staged path, final name) of every file.
      manifest: lists exactly these files.

    Raises:
      UserError: the run's files are gone (another run took the folder), or the folder cannot be written.
    """
    pairs = [(path, join(folder, name)) for path, name in staged]
    with output_errors(folder):
        # A distributed runner may repeat this step: some files may have their final names already.
        there = [exists(source) for source, _ in pairs]
        if not all(found or exists(target) for found, (_, target) in zip(there, pairs, strict=True)):
            raise UserError(f"another run took {folder} over, or its files were removed; run one at a time")
        # The manifest is written before any file is renamed: if there is no room for it, nothing is published.
        temporary = join(stage_folder(folder, run), MANIFEST_NAME)
        with create_file(temporary) as file:
            file.write(manifest.to_json().encode())
            flush(temporary, file)
        rename([pair for found, pair in zip(there, pairs, strict=True) if found])
        rename([(temporary, join(folder, MANIFEST_NAME))])


def read_manifest(folder: str) -> Manifest | None:
    """The manifest in a data set's folder; None if there is none.

    Raises:
      UserError: it cannot be read.
    """
    path = join(folder, MANIFEST_NAME)
    if is_local(folder):
        return load_manifest(folder) if exists(path) else None
    with output_errors(folder):
        if not exists(path):
            return None
    try:
        with open_file(path) as file:
            return Manifest.from_json(file.read().decode())
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({one_line(error)}); give --overwrite to prepare it again") from error


def missing_files(folder: str, manifest: Manifest) -> list[str]:
    """The names of files that the manifest lists and the folder does not have at their full size."""
    sizes = list_files(folder)
    wanted = {
        name: size
        for split in manifest.splits.values()
        for shard in split.shards
        for name, size in ((shard.file, shard.bytes), (shard.index_file, shard.index_bytes))
    }
    return sorted(name for name, size in wanted.items() if sizes.get(name) != size)


def clear(folder: str, run: str | None = None) -> None:
    """Removes a run's staging folder; without `run`, the manifest first, then all shards and staging folders.

    Files of other names stay.

    Raises:
      UserError: they cannot be removed.
    """
    with output_errors(folder):
        if run is not None:
            delete(stage_folder(folder, run), is_folder=True)
            return
        names = list_files(folder)
        if MANIFEST_NAME in names:
            delete(join(folder, MANIFEST_NAME))
        for name in sorted(names):
            if _SHARD_FILE.fullmatch(name):
                delete(join(folder, name))
        _clear_stages(folder, names)


def clear_stages(folder: str) -> None:
    """Removes the staging folders of killed runs from a whole local data set. No other run may be using it.

    Raises:
      UserError: they cannot be removed.
    """
    if is_local(folder):
        with output_errors(folder):
            _clear_stages(folder, list_files(folder))


def _clear_stages(folder: str, names: Iterable[str]) -> None:
    for name in names:
        if _PARTIAL.fullmatch(name):
            delete(join(folder, name), is_folder=True)
