"""Where files lie: a folder, a zip archive, and the hub that archives come from."""

from __future__ import annotations

import abc
import lzma
import os
import shutil
import socket
import struct
import tempfile
import urllib.parse
import urllib.request
import zipfile
import zlib
from typing import Any, BinaryIO, cast

from harmonic.errors import UserError
from pipelines.array_record_io import disk_full, one_line, scratch_errors

SPOOL_BYTES = 8 << 20  # what is larger goes to a temporary file
# Deflate cannot shrink anything by more than 1,032 to 1: a member that claims more is a decompression bomb.
_MAX_DEFLATE_RATIO = 1_032
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

    def sizes(self) -> dict[str, int]:
        sizes = {}
        for folder, _, files in os.walk(self.path, onerror=self._unreadable):
            for file in files:
                full = os.path.join(folder, file)
                name = os.path.relpath(full, self.path).replace(os.sep, "/")
                if _hidden(name):
                    continue
                try:
                    sizes[name] = os.stat(full).st_size
                except OSError:  # a dangling link: listed, and then skipped with its reason
                    sizes[name] = 0
        return sizes

    def _unreadable(self, error: OSError) -> None:
        raise UserError(f"cannot list {error.filename} ({error.strerror}); make it readable") from error

    def open(self, name: str) -> BinaryIO:
        try:
            return open(os.path.join(self.path, *name.split("/")), "rb")
        except OSError as error:
            raise Unreadable(f"cannot be opened: {error.strerror}") from error

    def stamp(self, name: str) -> tuple[object, ...]:
        try:
            status = os.stat(os.path.join(self.path, *name.split("/")))
        except OSError:
            return (name, 0, 0)
        return (name, status.st_size, status.st_mtime_ns)


class Archive(Store):
    """A zip archive. Members are read by name into temporary files without one: no path of the archive is written."""

    def __init__(self, path: str):
        super().__init__(path)
        self._zip: zipfile.ZipFile | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "_zip": None}

    def _open(self) -> zipfile.ZipFile:
        if self._zip is None:
            try:
                self._zip = zipfile.ZipFile(self.path)
            except _DAMAGED as error:
                reason = error.strerror if isinstance(error, OSError) else one_line(error)
                raise UserError(f"{self.path} cannot be opened as a zip archive ({reason}); get it again") from error
        return self._zip

    def sizes(self) -> dict[str, int]:
        sizes = {}
        for info in self._open().infolist():
            if info.is_dir() or _hidden(info.filename):
                continue
            if info.flag_bits & 1:
                raise UserError(f"{self.path} is encrypted; unpack it and give the folder as --source")
            sizes[info.filename] = info.file_size
        return sizes

    def open(self, name: str) -> BinaryIO:
        archive = self._open()
        with scratch_errors():
            spool = tempfile.SpooledTemporaryFile(max_size=SPOOL_BYTES)
            try:
                info = archive.getinfo(name)
                self._check_size(info)
                with archive.open(info) as member:
                    shutil.copyfileobj(member, spool, 1 << 20)  # checks the CRC as well
                if spool.tell() != info.file_size:
                    raise Unreadable(f"has {spool.tell()} bytes in the archive instead of {info.file_size}")
            except KeyError:
                spool.close()
                raise UserError(f"{self.path} changed while it was read: {name!r} is gone; run again") from None
            except BaseException as error:
                spool.close()
                if isinstance(error, _DAMAGED) and not disk_full(error):
                    raise Unreadable(f"is damaged in the archive: {one_line(error)}") from error
                raise
            spool.seek(0)
            return cast(BinaryIO, spool)

    def _check_size(self, info: zipfile.ZipInfo) -> None:
        if info.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            if info.file_size > _MAX_DEFLATE_RATIO * info.compress_size + 64:
                raise Unreadable(f"claims {info.file_size} bytes out of {info.compress_size}, which cannot be")
        if info.file_size > SPOOL_BYTES:
            free = shutil.disk_usage(tempfile.gettempdir()).free
            if info.file_size > free:
                raise UserError(
                    f"{info.filename!r} takes {info.file_size:,} bytes unpacked, and {tempfile.gettempdir()} has "
                    f"{free:,} left; set TMPDIR to a larger disk"
                )

    def stamp(self, name: str) -> tuple[object, ...]:
        info = self._open().getinfo(name)
        return (name, info.file_size, info.CRC)

    def close(self) -> None:
        if self._zip is not None:
            self._zip.close()
            self._zip = None


def _hidden(name: str) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))


def download(repo: str, names: tuple[str, ...]) -> str:
    """The local path of a data set repository's archive: the first of `names` that exists, fetched unless cached.

    Without a connection, what is cached is used.

    Raises:
      UserError: no connection, no such repository or archive, or no leave to read it.
    """
    import huggingface_hub  # half a second, which a local source need not pay
    from huggingface_hub import constants, errors

    endpoint = constants.ENDPOINT
    page = f"{endpoint}/datasets/{repo}"
    # The client tries for some 25 seconds before it says that there is no connection.
    offline = constants.HF_HUB_OFFLINE or not _reachable(endpoint)
    for name in names:
        try:
            return huggingface_hub.hf_hub_download(repo, name, repo_type="dataset", local_files_only=offline)
        except errors.GatedRepoError as error:
            raise UserError(_gated(page)) from error
        except errors.LocalEntryNotFoundError as error:
            status = _status(error)
            if status in (401, 403):
                raise UserError(_gated(page)) from error
            if status == 404 or (offline and name != names[-1]):
                continue
            why = f"it answered {status}" if status else "there is no connection to it"
            raise UserError(
                f"cannot download {name} from {page}: {why}, and it is not in the cache; try again, or download it "
                "elsewhere and give its path as --source"
            ) from error
        except errors.RemoteEntryNotFoundError:
            continue
        except errors.HfHubHTTPError as error:
            status = _status(error)
            if status in (401, 403):
                raise UserError(_gated(page)) from error
            if status == 404:
                break
            raise UserError(f"cannot download {name} from {page}: it answered {status}; try again") from error
        except OSError as error:
            if disk_full(error):
                where = constants.HF_HUB_CACHE
                raise UserError(f"no space left in {where} for {name}; make room, or set HF_HOME") from error
            raise UserError(f"cannot download {name} from {page} ({one_line(error)}); try again") from error
    raise UserError(
        f"{page} does not hold {' or '.join(names)} (404); download the archive elsewhere and give its path as --source"
    )


def _gated(page: str) -> str:
    return (
        f"{page} asks for leave to read: accept its terms there, then log in with `hf auth login` or set HF_TOKEN, "
        "or give an archive that you have as --source"
    )


def _status(error: BaseException | None) -> int | None:
    """The HTTP status behind an error of the hub's client."""
    while error is not None:
        response = getattr(error, "response", None)
        if response is not None:
            return int(response.status_code)
        error = error.__cause__
    return None


def _reachable(endpoint: str) -> bool:
    url = urllib.parse.urlsplit(endpoint)
    if urllib.request.getproxies():
        return True  # the proxy resolves the name and connects
    try:
        with socket.create_connection((url.hostname, url.port or (443 if url.scheme == "https" else 80)), timeout=10):
            return True
    except OSError:
        return False
