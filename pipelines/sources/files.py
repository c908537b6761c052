"""Where files lie: a folder, a zip archive here or elsewhere, a bucket's folder."""

from __future__ import annotations

import abc
import contextlib
import fcntl
import io
import lzma
import os
import shutil
import stat
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO, cast

from harmonic.errors import UserError, one_line
from pipelines.beam.sink import scratch_errors
from pipelines.sources.remote import (
    CloudFile,
    RangeReader,
    Refused,
    RemoteFile,
    cloud_errors,
    cloud_tag,
    file_system,
    shown,
)

SPOOL_BYTES = 8 << 20  # what is larger goes to a temporary file
# Beyond the first bytes, what shrinks by more than that is a decompression bomb. (Deflate and FLAC shrink silence by up
# to 1,000 to 1; hours of nothing else are no recording.)
MAX_RATIO = 100
RATIO_SLACK = 256 << 20  # bytes that may come out before the ratio is looked at
_HEADER_SLACK = 256  # bytes by which a zip member's own header may be longer than what the directory says of it
_DAMAGED = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    struct.error,
    OSError,
    EOFError,
    ValueError,
    OverflowError,
    RuntimeError,  # includes NotImplementedError: a compression that zipfile does not know
)


class Unreadable(Exception):
    """A recording cannot be read; the message is the reason, in one line."""


class Store(abc.ABC):
    """Files by name, `/` between the parts."""

    def __init__(self, path: str):
        self.path = path

    @abc.abstractmethod
    def sizes(self) -> dict[str, int]:
        """Bytes of every file, but for hidden ones."""

    @abc.abstractmethod
    def open(self, name: str) -> BinaryIO:
        """A seekable file that the caller closes. Raises Unreadable."""

    @abc.abstractmethod
    def stamp(self, name: str) -> tuple[object, ...]:
        """What changes when the file does."""

    def close(self) -> None:  # noqa: B027 - a folder keeps nothing open
        """Lets go of the archive; the next use opens it again."""


class Folder(Store):
    """A folder on a local or mounted disk. Links to files are followed, links to folders are not."""

    def __init__(self, path: str):
        super().__init__(path)
        self._stamps: dict[str, tuple[int, int]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_stamps": {}}

    def sizes(self) -> dict[str, int]:
        self._stamps = {}
        folders = [""]
        while folders:
            folder = folders.pop()
            try:
                with os.scandir(os.path.join(self.path, folder)) as entries:
                    for entry in entries:
                        if hidden(entry.name):
                            continue
                        if not entry.is_dir():
                            self._stamps[folder + entry.name] = _stamp(entry)
                        elif not entry.is_symlink():
                            folders.append(f"{folder}{entry.name}/")
            except OSError as error:
                raise UserError(f"cannot list {error.filename} ({error.strerror}); make it readable") from error
        return {name: size for name, (size, _) in self._stamps.items()}

    def open(self, name: str) -> BinaryIO:
        try:
            file = io.FileIO(os.path.join(self.path, name), opener=_without_waiting)
        except OSError as error:
            raise Unreadable(f"cannot be opened: {error.strerror}") from error
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            file.close()
            raise Unreadable("is not a regular file")
        return io.BufferedReader(file)

    def stamp(self, name: str) -> tuple[object, ...]:
        return (name, *self._stamps[name])


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # for whoever writes into a pipe


def _stamp(entry: os.DirEntry[str]) -> tuple[int, int]:
    """Bytes, and when it was changed, in nanoseconds."""
    try:
        status = entry.stat()
    except OSError:  # a dangling link: listed, and then skipped with its reason
        return 0, 0
    return status.st_size, status.st_mtime_ns


class Archive(Store):
    """A zip archive. Members are read by name into temporary files without one: no path of the archive is written.

    Args:
      path: where it lies; for messages alone if `remote` is given.
      remote: reads it by ranges, the directory once and each member by itself.
    """

    def __init__(self, path: str, remote: RemoteFile | None = None):
        super().__init__(path)
        self._remote = remote
        self._zip: zipfile.ZipFile | None = None
        self._reader: RangeReader | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_zip": None, "_reader": None}

    def _open(self) -> zipfile.ZipFile:
        if self._zip is None:
            try:
                self._reader = self._remote.open() if self._remote else None
                self._zip = zipfile.ZipFile(self._reader or self.path)
            except _DAMAGED as error:
                reason = error.strerror if isinstance(error, OSError) else one_line(error)
                raise UserError(f"{self.path} cannot be opened as a zip archive ({reason}); get it again") from error
        return self._zip

    def sizes(self) -> dict[str, int]:
        sizes = {}
        for info in self._open().infolist():
            if not info.filename or info.is_dir() or hidden(info.filename):  # cut off at a NUL, a name may be empty
                continue
            if info.flag_bits & 1:
                raise UserError(f"{self.path} is encrypted; unpack it and give the folder as --source")
            sizes[info.filename] = info.file_size
        packed = (self._remote.size if self._remote else os.path.getsize(self.path)) or 0
        # Members that overlap. One that alone claims too much is left to `open`.
        check_ratio(self.path, sum(i.file_size for i in self._open().infolist() if _is_plausible(i)), packed)
        return sizes

    def open(self, name: str) -> BinaryIO:
        archive = self._open()
        try:
            info = archive.getinfo(name)
        except KeyError:
            raise UserError(f"{self.path} changed while it was read: {name!r} is gone; run again") from None
        if not _is_plausible(info):
            raise Unreadable(
                f"claims {info.file_size:,} bytes out of {info.compress_size:,}, more than {MAX_RATIO} to 1: "
                "that is a decompression bomb"
            )
        if self._reader is not None:
            names = len(info.orig_filename.encode()) + len(info.extra)
            self._reader.expect(info.header_offset + 30 + names + info.compress_size + _HEADER_SLACK)
        try:
            with archive.open(info) as member:
                return spooled(cast(BinaryIO, member), name, info.file_size)  # checks the CRC as well
        except _DAMAGED as error:
            raise Unreadable(f"is damaged in the archive: {one_line(error)}") from error

    def stamp(self, name: str) -> tuple[object, ...]:
        info = self._open().getinfo(name)
        return (name, info.file_size, info.CRC)

    def close(self) -> None:
        if self._zip is not None:
            self._zip.close()
            self._zip = None
        if self._reader is not None:
            self._reader.close()
            self._reader = None
        if self._remote is not None:
            self._remote.close()


def _is_plausible(info: zipfile.ZipInfo) -> bool:
    return info.file_size <= MAX_RATIO * info.compress_size + RATIO_SLACK


class CloudFolder(Store):
    """A folder of a bucket, or of another file system that fsspec knows."""

    def __init__(self, url: str):
        super().__init__(shown(url).rstrip("/"))
        self._url = url.rstrip("/")
        self._listing: dict[str, tuple[int, str]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_listing": None}

    def _list(self) -> dict[str, tuple[int, str]]:
        if self._listing is None:
            files, path = file_system(self._url)
            try:
                with cloud_errors():
                    found = files.find(path, detail=True)
            except Refused as error:
                raise UserError(f"cannot list {self.path}: {error}") from error
            self._listing = {}
            for full, info in found.items():
                name = full[len(path) :].lstrip("/")
                if name and info["type"] == "file" and not hidden(name):
                    self._listing[name] = int(info["size"]), cloud_tag(info)
        return self._listing

    def sizes(self) -> dict[str, int]:
        return {name: size for name, (size, _) in self._list().items()}

    def open(self, name: str) -> BinaryIO:
        return open_remote(CloudFile(f"{self._url}/{name}"), name)

    def stamp(self, name: str) -> tuple[object, ...]:
        return (name, *self._list()[name])


def open_remote(file: RemoteFile, name: str) -> BinaryIO:
    """A remote recording, whole: libsndfile drops errors that are raised while it reads, and takes the file to end.

    Raises:
      UserError: it cannot be read.
    """
    try:
        file.pin()
    except Refused as error:
        raise file.refusal(error) from error
    with contextlib.closing(file), file.open() as reader:
        reader.expect(file.size or 0)
        return spooled(cast(BinaryIO, reader), name, file.size or 0)


def spooled(stream: BinaryIO, name: str, size: int) -> BinaryIO:
    """All of a stream in a temporary file without a name, in memory while it is small.

    Raises:
      Unreadable: it does not have that size.
      UserError: there is no room.
    """
    if size > SPOOL_BYTES:
        free = shutil.disk_usage(tempfile.gettempdir()).free
        if size > free:
            raise UserError(
                f"{name!r} takes {size:,} bytes unpacked, and {tempfile.gettempdir()} has {free:,} left; set TMPDIR to "
                "a larger disk"
            )
    else:
        data = stream.read(size + 1)  # a member's CRC is looked at where it ends
        if len(data) != size:
            raise Unreadable(f"has {len(data)} bytes instead of {size}")
        return io.BytesIO(data)
    with scratch_errors():
        spool = tempfile.TemporaryFile()
        try:
            shutil.copyfileobj(stream, spool, 1 << 20)
            if spool.tell() != size:
                raise Unreadable(f"has {spool.tell()} bytes instead of {size}")
        except BaseException:
            spool.close()
            raise
        spool.seek(0)
        return cast(BinaryIO, spool)


@contextlib.contextmanager
def locked(path: str) -> Iterator[BinaryIO]:
    """The file of that path, made if it is not there, for one process at a time."""
    while True:
        with open(path, "a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if is_still(file, path):  # whoever held it may have renamed it meanwhile
                yield file
                return


def is_still(file: BinaryIO, path: str) -> bool:
    """Whether an open file is the one of that path."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def check_ratio(name: str, unpacked: int, packed: int) -> None:
    """Refuses a decompression bomb.

    Raises:
      UserError: more comes out of it than can have been put in.
    """
    if unpacked > MAX_RATIO * packed + RATIO_SLACK:
        raise UserError(
            f"{name} holds {unpacked:,} bytes in {packed:,}, more than {MAX_RATIO:,} to 1: that is a decompression "
            "bomb and no archive of recordings; give another --source"
        )


def hidden(name: str) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))
