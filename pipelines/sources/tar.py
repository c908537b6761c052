"""Tar archives, compressed or not, here or elsewhere.

A tar has no directory, and a compressed one cannot be read from the middle. So each machine unpacks a compressed or
remote tar once into one plain tar among its temporary files; the machine's processes share it, and the last one removes
it. Members are read by their offset: no member is written to a path of its own, and no link is followed.

tarfile's extractall is not used: it takes 10 to 19 times as long as listing the offsets, copies plain tars too, bounds
neither headers nor the memory of xz, and its stream mode loses all but the first stream of a file that pigz wrote.
"""

from __future__ import annotations

import bz2
import contextlib
import fcntl
import gzip
import hashlib
import lzma
import os
import shutil
import tarfile
import tempfile
import weakref
import zlib
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, NamedTuple, cast

from harmonic.errors import Unreadable, UserError, one_line
from harmonic.locks import is_at, locked_file
from pipelines.errors import scratch_errors
from pipelines.limits import check_ratio
from pipelines.sources.base import HIDDEN, Files, is_hidden
from pipelines.sources.remote import RemoteFile
from pipelines.sources.spool import spooled

_BLOCK_BYTES = 1 << 20  # also the longest header that is read: a hostile header could claim gigabytes
_XZ_MEMORY = 256 << 20  # bytes; `xz -9` takes 65 MiB
_MAGIC = {b"\x1f\x8b": "gz", b"BZh": "bz2", b"\xfd7zXZ\0": "xz"}
_DAMAGED = (tarfile.TarError, zlib.error, lzma.LZMAError, EOFError, ValueError, OverflowError)


def tar_kind(head: bytes, name: str) -> str | None:
    """The kind of a file from its first 512 bytes: `gz`, `bz2`, `xz` (assumed to hold a tar), `tar`, or None."""
    for magic, kind in _MAGIC.items():
        if head.startswith(magic):
            return kind
    return "tar" if head[257:262] == b"ustar" or name.lower().endswith(".tar") else None


class _Entry(NamedTuple):
    """A member: its place in the plain tar, bytes, time of the last change, and why it cannot be read, if so."""

    offset: int
    size: int
    time: float
    reason: str


class Tar(Files):
    """A tar archive.

    Args:
      path: the archive's; only for messages if `remote` is given.
      kind: from `tar_kind`.
      remote: the archive on a server, read once from its beginning to its end.
    """

    def __init__(self, path: str, kind: str, remote: RemoteFile | None = None):
        super().__init__(path)
        self._kind, self._remote = kind, remote
        self._plain: BinaryIO | None = None
        self._finalizer: Any = None
        self._members: dict[str, _Entry] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_plain": None, "_members": {}, "_finalizer": None}

    def sizes(self) -> dict[str, int]:
        self._open()
        return {name: entry.size for name, entry in self._members.items()}

    def open(self, name: str) -> BinaryIO:
        plain = self._open()
        if name not in self._members:
            raise UserError(f"{self.path} changed while it was read: {name!r} is gone; run again")
        entry = self._members[name]
        if entry.reason:
            raise Unreadable(entry.reason)
        return spooled(cast(BinaryIO, _Member(plain, entry.offset, entry.size)), name, entry.size)

    def stamp(self, name: str) -> tuple[object, ...]:
        entry = self._members[name]
        return entry.size, entry.time

    def close(self) -> None:
        if self._plain is not None:
            self._plain = None
            self._finalizer()

    def _is_copy(self) -> bool:
        return self._remote is not None or self._kind != "tar"

    def _open(self) -> BinaryIO:
        if self._plain is None:
            self._plain = self._copy() if self._is_copy() else open(self.path, "rb")
            # The finalizer runs even if `close` is never called.
            self._finalizer = weakref.finalize(self, _release, self._plain, self._is_copy())
            try:
                self.left_out = {}
                self._members = dict(self._scan(self._plain))
            except BaseException:
                self.close()
                raise
        return self._plain

    def _scan(self, plain: BinaryIO) -> Iterator[tuple[str, _Entry]]:
        """(name, entry) of every member; of two members of one name, the later counts."""
        size = plain.seek(0, os.SEEK_END)
        plain.seek(0)
        try:
            with tarfile.open(fileobj=cast(BinaryIO, _SmallReads(plain)), mode="r:") as opened:
                archive: Any = opened
                while (info := archive.next()) is not None:
                    archive.members.clear()  # tarfile would keep all headers in memory
                    parts = [part for part in info.name.split("/") if part not in ("", ".")]
                    if info.isdir():
                        continue
                    if is_hidden("/".join(parts)):
                        self.leave_out(HIDDEN, info.name)
                        continue
                    reason = ""
                    if info.issparse() or not info.isreg():
                        reason = (
                            "is a link, which is not followed" if info.islnk() or info.issym() else "is no plain file"
                        )
                    elif info.offset_data + info.size > size:
                        raise tarfile.ReadError("it is cut short")
                    yield "/".join(parts), _Entry(info.offset_data, 0 if reason else info.size, info.mtime, reason)
                # tarfile takes a damaged header or the end of the file for the end of the archive, which is zeros.
                plain.seek(archive.offset)
                if plain.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
                    raise tarfile.ReadError(f"it is damaged, or cut short, at byte {archive.offset}")
        except _DAMAGED as error:
            raise UserError(
                f"{self.path} cannot be opened as a tar archive ({one_line(error)}); get it again"
            ) from error

    def _copy(self) -> BinaryIO:
        """The plain copy, open and with a shared lock."""
        if self._remote is not None:
            what: tuple[object, ...] = (self.path, self._remote.size, self._remote.tag)
        else:
            status = os.stat(self.path)
            what = (os.path.abspath(self.path), status.st_size, status.st_mtime_ns)
        key = hashlib.sha256(repr((*what, os.geteuid())).encode()).hexdigest()[:32]
        folder = os.path.join(tempfile.gettempdir(), f"harmonic-tar-{key}")
        path = os.path.join(folder, "plain.tar")
        while True:
            with scratch_errors():
                os.makedirs(folder, mode=0o700, exist_ok=True)
                if os.stat(folder).st_uid != os.geteuid():
                    raise UserError(f"{folder} belongs to somebody else; set TMPDIR to a folder of your own")
                if not os.path.exists(path):
                    with contextlib.suppress(FileNotFoundError), locked_file(f"{path}.incomplete") as partial:
                        if not os.path.exists(path):
                            partial.truncate(0)
                            try:
                                self._unpack(partial)
                            except BaseException:
                                shutil.rmtree(folder, ignore_errors=True)
                                raise
                            os.rename(partial.name, path)
            with contextlib.suppress(FileNotFoundError):
                plain = open(path, "rb")
                fcntl.flock(plain, fcntl.LOCK_SH)
                if is_at(plain.fileno(), path):
                    return plain
                plain.close()  # its last user has removed it meanwhile

    def _unpack(self, target: BinaryIO) -> None:
        packed: Any = open(self.path, "rb") if self._remote is None else self._remote.open()
        with packed:
            if self._remote is not None:
                packed.expect(self._remote.size)
            count = 0
            blocks = _READERS[self._kind](packed)
            while True:
                try:
                    block = next(blocks, b"")
                except (*_DAMAGED, OSError) as error:
                    raise UserError(
                        f"{self.path} cannot be unpacked ({one_line(error)}): it is damaged or cut short; get it again"
                    ) from error
                if not block:
                    break
                count += len(block)
                check_ratio(self.path, count, packed.tell())
                target.write(block)
        target.flush()


def _release(plain: BinaryIO, is_copy: bool) -> None:
    with plain:
        if is_copy:
            with contextlib.suppress(OSError):  # no lock: another process still reads it
                fcntl.flock(plain, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(os.path.dirname(plain.name), ignore_errors=True)


class _Member:
    """The bytes of one member."""

    def __init__(self, file: BinaryIO, offset: int, size: int):
        self._file, self._offset, self._left = file, offset, size

    def read(self, size: int) -> bytes:
        self._file.seek(self._offset)
        data = self._file.read(min(size, self._left))
        self._offset += len(data)
        self._left -= len(data)
        return data


class _SmallReads:
    """The file in which tarfile reads headers; headers that claim gigabytes are refused, not read into memory."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= _BLOCK_BYTES:
            raise tarfile.ReadError(f"a header claims {size:,} bytes")
        return self._file.read(size)


def _plain_blocks(file: BinaryIO) -> Iterator[bytes]:
    while block := file.read(_BLOCK_BYTES):
        yield block


def _gzip_blocks(file: BinaryIO) -> Iterator[bytes]:
    with gzip.GzipFile(fileobj=file) as stream:
        yield from _plain_blocks(cast(BinaryIO, stream))


def _stream_blocks(file: BinaryIO, new: Callable[[], Any]) -> Iterator[bytes]:
    """The blocks of one stream after the other, as pbzip2 and pixz write them, holding one block at a time."""
    data = file.read(_BLOCK_BYTES)
    while data:
        decompressor = new()
        while not decompressor.eof:
            if decompressor.needs_input and not data and not (data := file.read(_BLOCK_BYTES)):
                raise EOFError("the end is missing")
            if block := decompressor.decompress(data, _BLOCK_BYTES):
                yield block
            data = b""
        data = decompressor.unused_data.lstrip(b"\0") or file.read(_BLOCK_BYTES)  # padding between streams of xz


_READERS: dict[str, Callable[[BinaryIO], Iterator[bytes]]] = {
    "tar": _plain_blocks,
    "gz": _gzip_blocks,
    "bz2": lambda file: _stream_blocks(file, bz2.BZ2Decompressor),
    "xz": lambda file: _stream_blocks(file, lambda: lzma.LZMADecompressor(memlimit=_XZ_MEMORY)),
}
