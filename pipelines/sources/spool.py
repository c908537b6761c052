"""Streams and remote files as whole local files, in memory while they are small."""

from __future__ import annotations

import contextlib
import io
import shutil
import tempfile
from typing import BinaryIO, cast

from harmonic.errors import Unreadable, UserError
from pipelines.errors import scratch_errors
from pipelines.limits import SPOOL_BYTES
from pipelines.sources.remote import Refused, RemoteFile


def spooled(stream: BinaryIO, name: str, size: int) -> BinaryIO:
    """All of a stream in a temporary file without a name, in memory if it is small.

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
        data = stream.read(size + 1)  # one more: zipfile checks a member's CRC at its end
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


def open_remote(file: RemoteFile, name: str) -> BinaryIO:
    """A whole copy of a remote recording. libsndfile must not read from the network: it takes an error for the end.

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
