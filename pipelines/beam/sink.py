"""The atomic sharded sink: local temporary ArrayRecord files, copied out under temporary names, published at the end.

A run copies its shards into a folder of its own, `_partial-<run>` in the data set's folder. Only when all are there and
counted does one final step rename them into place and write the manifest, so that a run that dies leaves nothing that
looks whole, and one that lost its race or its parent cannot touch the files of another. Paths may be local or of any
file system that Beam knows (`gs://...`); Beam is imported only for those that are not local, or to write.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import gc
import hashlib
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

from harmonic.errors import UserError, one_line
from harmonic.records import (
    MANIFEST_NAME,
    Manifest,
    Record,
    Recording,
    Shard,
    Skipped,
    count_windows,
    encode_record,
    index_line,
    load_manifest,
)

# One record a group: random access reads one record. Not compressed: zstd takes 75 to 85 % of the bytes of 8-bit music
# and speech, and gives half as many windows a second.
WRITER_OPTIONS = "group_size:1,uncompressed"
_SHARD_FILE = re.compile(r"(train|validation|test)-\d{5,}-of-\d{5,}\.(array_record|recordings\.jsonl)")
_PARTIAL = re.compile(r"_partial-[0-9a-f]{32}")
_FULL = {errno.ENOSPC: "no space is left", errno.EDQUOT: "the quota is used up", errno.EFBIG: "a file is too large"}


@dataclasses.dataclass(frozen=True)
class WrittenShard:
    """What writing one shard came to: the shard, where its files stand until they are published, what was skipped."""

    split: str
    shard: Shard
    staged: tuple[str, str]
    skipped: tuple[Skipped, ...]


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Holds off the collection of cycles, which goes over all that there is, while much is made that stays."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def import_beam() -> None:
    """Imports Beam without its remark that it has no client for a service that is not used here."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        with uncollected():
            import apache_beam  # noqa: F401
    finally:
        root.setLevel(level)


def is_local(path: str) -> bool:
    """Whether `path` is not of a remote file system."""
    return "://" not in path


def join(folder: str, name: str) -> str:
    """A path below `folder`."""
    return os.path.join(folder, name) if is_local(folder) else f"{folder.rstrip('/')}/{name}"


def stage_folder(folder: str, run: str) -> str:
    """A run's own folder in the data set's."""
    return join(folder, f"_partial-{run}")


def disk_full(error: BaseException) -> bool:
    """Whether an error says that there is no room."""
    return isinstance(error, OSError) and error.errno in _FULL


@contextlib.contextmanager
def scratch_errors(folder: str | None = None) -> Iterator[None]:
    """Turns a full disk into a UserError; other errors pass. `folder` is the temporary files' if not given."""
    try:
        yield
    except OSError as error:
        if not disk_full(error):
            raise
        way_out = "" if folder else ", where temporary files go, or set TMPDIR to another disk"
        folder = folder or tempfile.gettempdir()
        raise UserError(f"{_FULL[error.errno or 0]} in {folder}; make room there{way_out}") from error


@contextlib.contextmanager
def output_errors(folder: str) -> Iterator[None]:
    """Turns what goes wrong on the output's file system into a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        cause = _root(error)
        if disk_full(cause):
            reason = f"{_FULL[getattr(cause, 'errno', 0)]}; make room there"
        elif isinstance(cause, OSError) and cause.strerror:
            reason = f"{cause.strerror}; make it writable"
        else:
            reason = one_line(error)
        raise UserError(f"cannot write to {folder}: {reason}, or give another --output_dir") from error


def _root(error: BaseException) -> BaseException:
    """The operating system's error below those that Beam's file systems wrap around it, or the error itself."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno is not None:
            return seen
        details = getattr(seen, "exception_details", None) or {}
        seen = next((e for e in details.values() if isinstance(e, BaseException)), seen.__cause__ or seen.__context__)
    return error


def shard_name(split: str, index: int, count: int) -> str:
    """The name of a shard's file, without its suffix."""
    return f"{split}-{index:05d}-of-{count:05d}"


class _NativeErrors:
    """A context manager in which the native writer's errors, and those of the file beside it, become UserErrors: it
    reports a full disk, as all else, by a RuntimeError. Made once and entered for each record."""

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
      window_length, hop_length: windows are counted with them.

    Raises:
      UserError: in `with` or any method, when there is no room or the folder is not writable.
    """

    def __init__(self, folder: str, run: str, window_length: int, hop_length: int | None = None):
        self._window_length, self._hop_length = window_length, hop_length
        self._target, self._stage = folder, stage_folder(folder, run)
        # On a local disk the temporary files stand there too, so that the next run clears them away after a kill.
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
        """Enters the recording whose records have just been written."""
        with self._native_errors:
            self._index.write(index_line(recording))
        self.recordings += 1
        self.windows += count_windows(recording.length, self._window_length, self._hop_length)
        self.samples += recording.length
        self.longest = max(self.longest, recording.length)

    def stage(self, name: str) -> tuple[Shard, tuple[str, str]]:
        """Moves the files into the run's own folder. Returns the shard, and the files for `flush_staged`."""
        with self._native_errors:
            self._writer.close()
            self._index.close()
        files = f"{name}.array_record", f"{name}.recordings.jsonl"
        # A distributed runner may write a shard twice: the names differ, and only one of them is published.
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


def _file_systems() -> Any:
    import_beam()
    from apache_beam.io.filesystems import FileSystems

    return FileSystems


def create_file(path: str) -> BinaryIO:
    """A file to write, of a file system that Beam knows."""
    file_systems = _file_systems()
    from apache_beam.io.filesystem import CompressionTypes

    return file_systems.create(path, compression_type=CompressionTypes.UNCOMPRESSED)


def open_file(path: str) -> BinaryIO:
    """A file to read from, of a file system that Beam knows."""
    file_systems = _file_systems()
    from apache_beam.io.filesystem import CompressionTypes

    return file_systems.open(path, compression_type=CompressionTypes.UNCOMPRESSED)


def _rename(pairs: list[tuple[str, str]]) -> None:
    _file_systems().rename([source for source, _ in pairs], [target for _, target in pairs])


def _move_out(local: str, path: str) -> tuple[int, str]:
    """Moves a temporary file to where it is staged; returns its bytes and SHA-256."""
    if is_local(path):  # it lies in that folder already
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
    """Waits until staged files are on the disk, if that is a local one.

    Raises:
      UserError: they cannot be written.
    """
    with output_errors(folder):
        for path in staged if is_local(folder) else ():
            with open(path, "rb") as file:
                _flush(path, file)


def _flush(path: str, file: BinaryIO) -> None:
    """On a local disk, so that not even a loss of power leaves a manifest without its shards."""
    if is_local(path):
        file.flush()
        os.fsync(file.fileno())


def create_folder(folder: str) -> None:
    """Makes the data set's folder where there is none.

    Raises:
      UserError: it cannot be made or written to, or its file system is not known.
    """
    with output_errors(folder):
        if is_local(folder):
            os.makedirs(folder, exist_ok=True)
            if not os.access(folder, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        else:
            _file_systems().get_filesystem(folder)


def publish(folder: str, run: str, staged: Iterable[tuple[str, str]], manifest: Manifest) -> None:
    """Renames staged files to their names, and last the manifest: from then on there is a data set.

    Args:
      folder: the data set's folder.
      run: the run's id.
      staged: (staged path, file name) of every file.
      manifest: lists exactly these files.

    Raises:
      UserError: the run's files are gone (another run took the folder), or the folder cannot be written.
    """
    pairs = [(path, join(folder, name)) for path, name in staged]
    with output_errors(folder):
        # A step that a distributed runner repeats finds some of its work done.
        there = [exists(source) for source, _ in pairs]
        if not all(found or exists(target) for found, (_, target) in zip(there, pairs, strict=True)):
            raise UserError(f"another run took {folder} over, or its files were removed; run one at a time")
        # Written before anything is moved: where no space is left for it, nothing is.
        temporary = join(stage_folder(folder, run), MANIFEST_NAME)
        with create_file(temporary) as file:
            file.write(manifest.to_json().encode())
            _flush(temporary, file)
        _rename([pair for found, pair in zip(there, pairs, strict=True) if found])
        _rename([(temporary, join(folder, MANIFEST_NAME))])


def exists(path: str) -> bool:
    """Whether a file is there."""
    if is_local(path):
        return os.path.exists(path)
    return _file_systems().exists(path)


def read_file(folder: str, name: str) -> bytes | None:
    """The bytes of a small file of a data set's folder; None if it is not there.

    Raises:
      UserError: it cannot be read.
    """
    path = join(folder, name)
    try:
        if not exists(path):
            return None
        with open(path, "rb") if is_local(path) else open_file(path) as file:
            return file.read()
    except Exception as error:  # Beam's file systems raise errors of their own
        raise UserError(f"{path} cannot be read ({one_line(error)}); make it readable, or remove it") from error


def write_file(folder: str, name: str, data: bytes) -> None:
    """Writes a small file into a data set's folder, whole or not at all.

    Raises:
      UserError: it cannot be written.
    """
    temporary = join(folder, f"{name}.partial")
    with output_errors(folder):
        with create_file(temporary) as file:
            file.write(data)
            _flush(temporary, file)
        _rename([(temporary, join(folder, name))])


def remove_file(folder: str, name: str) -> None:
    """Removes a file of a data set's folder.

    Raises:
      UserError: it cannot be removed.
    """
    with output_errors(folder):
        _delete(join(folder, name))


def read_manifest(folder: str) -> Manifest | None:
    """The manifest of a data set's folder; None if there is none.

    Raises:
      UserError: there is one that cannot be read.
    """
    path = join(folder, MANIFEST_NAME)
    if is_local(folder):
        return load_manifest(folder) if exists(path) else None
    with output_errors(folder):
        if not exists(path):
            return None
    try:
        with _file_systems().open(path) as file:
            return Manifest.from_json(file.read().decode())
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({one_line(error)}); give --overwrite to prepare it again") from error


def missing_files(folder: str, manifest: Manifest) -> list[str]:
    """The names of files that the manifest lists and that are not there at their full size."""
    sizes = list_files(folder)
    wanted = {
        name: size
        for split in manifest.splits.values()
        for shard in split.shards
        for name, size in ((shard.file, shard.bytes), (shard.index_file, shard.index_bytes))
    }
    return sorted(name for name, size in wanted.items() if sizes.get(name) != size)


def clear(folder: str, run: str | None = None) -> None:
    """Removes what a run left: the files of `run` alone, or every shard and temporary file without a manifest's cover.

    The manifest goes first. Files that are not named as ours stay.

    Raises:
      UserError: they cannot be removed.
    """
    with output_errors(folder):
        if run is not None:
            _delete(stage_folder(folder, run), is_folder=True)
            return
        names = list_files(folder)
        if MANIFEST_NAME in names:
            _delete(join(folder, MANIFEST_NAME))
        for name in sorted(names):
            if _SHARD_FILE.fullmatch(name):
                _delete(join(folder, name))
            elif _PARTIAL.fullmatch(name):
                _delete(join(folder, name), is_folder=True)


def clear_stages(folder: str) -> None:
    """Removes the folders of runs that were killed from a whole local data set. No other run may be at work.

    Raises:
      UserError: they cannot be removed.
    """
    with output_errors(folder):
        for name in list_files(folder) if is_local(folder) else ():
            if _PARTIAL.fullmatch(name):
                _delete(join(folder, name), is_folder=True)


def list_files(folder: str) -> dict[str, int]:
    """Name and bytes of what a folder holds; folders below it have no bytes."""
    if is_local(folder):
        try:
            with os.scandir(folder) as entries:
                return {entry.name: 0 if entry.is_dir() else entry.stat().st_size for entry in entries}
        except FileNotFoundError:
            return {}
    files = _file_systems().match([join(folder, "*"), join(folder, "_partial-*/*")])
    found = {}
    for metadata in (metadata for match in files for metadata in match.metadata_list):
        name, _, below = metadata.path[len(folder.rstrip("/")) + 1 :].partition("/")
        found[name] = 0 if below else metadata.size_in_bytes
    return found


def _delete(path: str, is_folder: bool = False) -> None:
    if is_local(path):
        with contextlib.suppress(FileNotFoundError):
            if is_folder:
                shutil.rmtree(path)
            else:
                os.unlink(path)
        return
    _file_systems().delete([path + "/" if is_folder else path])
