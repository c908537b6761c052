"""A zip archive, here or elsewhere."""

from __future__ import annotations

import lzma
import os
import struct
import zipfile
import zlib
from typing import Any, BinaryIO, cast

from harmonic.errors import Unreadable, UserError, one_line
from harmonic.sound.bombs import MAX_RATIO, is_bomb
from pipelines.limits import check_ratio
from pipelines.sources.base import HIDDEN, Files, is_hidden
from pipelines.sources.remote import RangeReader, RemoteFile
from pipelines.sources.spool import spooled

_HEADER_SLACK = 256  # bytes by which a member's own header may be longer than the directory's entry for it
_DAMAGED = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    struct.error,
    OSError,
    EOFError,
    ValueError,
    OverflowError,
    RuntimeError,
)


class Zip(Files):
    """A zip archive. Members are copied by name into memory or nameless temporary files: no path of it is written.

    Args:
      path: the archive's; only for messages if `remote` is given.
      remote: the archive on a server, read by ranges: the directory once, and each member by itself.
    """

    def __init__(self, path: str, remote: RemoteFile | None = None):
        super().__init__(path)
        self._remote = remote
        self._zip: zipfile.ZipFile | None = None
        self._reader: RangeReader | None = None
        self._backslashes = False
        self._renamed: dict[str, str] = {}  # names that are written otherwise in the archive

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_zip": None, "_reader": None, "_renamed": {}}

    def _open(self) -> zipfile.ZipFile:
        if self._zip is None:
            try:
                self._reader = self._remote.open() if self._remote else None
                self._zip = zipfile.ZipFile(self._reader or self.path)
            except _DAMAGED as error:
                reason = error.strerror if isinstance(error, OSError) else one_line(error)
                raise UserError(f"{self.path} cannot be opened as a zip archive ({reason}); get it again") from error
            # Some programs for Windows part the folders by a backslash, which a name may also hold elsewhere.
            names = [info.filename for info in self._zip.infolist()]
            self._backslashes = not any("/" in name for name in names)
            self._renamed = {plain: name for name in names if (plain := self._plain(name)) != name}
        return self._zip

    def _plain(self, name: str) -> str:
        name = name.replace("\\", "/") if self._backslashes else name
        return "/".join(part for part in name.split("/") if part != ".") if "./" in name else name

    def sizes(self) -> dict[str, int]:
        sizes = {}
        self.left_out = {}
        for info in self._open().infolist():
            name = self._plain(info.filename)
            if not name or name.endswith("/"):  # a name that begins with NUL is empty
                continue
            if is_hidden(name):
                self.leave_out(HIDDEN, name)
                continue
            if info.flag_bits & 1:
                raise UserError(f"{self.path} is encrypted; unpack it and give the folder as --source")
            sizes[name] = info.file_size
        packed = (self._remote.size if self._remote else os.path.getsize(self.path)) or 0
        # Catches members that overlap. A single member that claims too much is left to `open`, which skips it alone.
        infos = self._open().infolist()
        check_ratio(self.path, sum(i.file_size for i in infos if not is_bomb(i.file_size, i.compress_size)), packed)
        return sizes

    def open(self, name: str) -> BinaryIO:
        archive = self._open()
        try:
            info = archive.getinfo(self._renamed.get(name, name))
        except KeyError:
            raise UserError(f"{self.path} changed while it was read: {name!r} is gone; run again") from None
        if is_bomb(info.file_size, info.compress_size):
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
        except NotImplementedError as error:
            raise Unreadable(
                f"is packed by a method that is not read here ({one_line(error)}): unpack the archive and give the "
                "folder, or pack it again with Deflate"
            ) from error
        except _DAMAGED as error:
            raise Unreadable(f"is damaged in the archive: {one_line(error)}") from error

    def stamp(self, name: str) -> tuple[object, ...]:
        info = self._open().getinfo(self._renamed.get(name, name))
        return info.file_size, info.CRC

    def close(self) -> None:
        if self._zip is not None:
            self._zip.close()
            self._zip = None
        if self._reader is not None:
            self._reader.close()
            self._reader = None
        if self._remote is not None:
            self._remote.close()
