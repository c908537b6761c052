"""Objects and folders of cloud buckets, and of all other file systems that fsspec knows.

fsspec, and not Beam's file systems, reads buckets: Beam's reader of gs:// fetches 16 MiB wherever it is asked for a few
kilobytes, and Beam cannot list an hdfs:// folder with all that is below it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
from collections.abc import Iterator
from typing import Any, BinaryIO

from harmonic.errors import UserError, one_line
from pipelines.sources.base import HIDDEN, Files, is_hidden
from pipelines.sources.remote import Refused, RemoteFile, Transient, first_look, shown
from pipelines.sources.spool import open_remote

_CLOUD_BYTES = 8 << 20  # of an object in memory at once


@dataclasses.dataclass
class CloudFile(RemoteFile):
    """An object of a bucket, or any other file that fsspec reaches (`gs://`, `s3://`, `az://`, `hdfs://`, ...)."""

    url: str
    size: int | None = None
    tag: str | None = None

    def __post_init__(self) -> None:
        self.name = shown(self.url)
        self._opened: tuple[Any, str] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_opened": None}

    def pin(self, patient: bool = True) -> None:
        info = first_look(self._info, patient)
        if info["type"] != "file":
            raise Refused("it is not a file")
        self.size, self.tag = int(info["size"]), cloud_tag(info)

    def fetch(self, start: int, end: int) -> BinaryIO:
        if self._opened is None:
            info = self._info()
            if (int(info["size"]), cloud_tag(info)) != (self.size, self.tag):
                raise self.changed()
        assert self._opened is not None
        files, path = self._opened
        end = min(end, start + _CLOUD_BYTES)
        with cloud_errors():
            data = files.cat_file(path, start=start, end=end)
        if len(data) > end - start:
            raise Refused("more arrives than was asked for")
        return io.BytesIO(data)

    def _info(self) -> dict[str, Any]:
        files, path = file_system(self.url)
        with cloud_errors():
            info: dict[str, Any] = files.info(path)
        self._opened = files, path
        return info


def cloud_tag(info: dict[str, Any]) -> str:
    """A value that changes when an object does, from fsspec's description of it."""
    names = ("generation", "etag", "ETag", "mtime", "LastModified", "last_modified", "created")
    return next((str(info[name]) for name in names if info.get(name)), "")


def file_system(url: str) -> tuple[Any, str]:
    """fsspec's file system of a URL, and the path in it.

    Raises:
      UserError: fsspec does not know it, or its extra is missing.
    """
    import fsspec

    # gcsfs would first ask a gRPC service for the bucket's kind, which takes minutes where that is not permitted.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    try:
        files, path = fsspec.core.url_to_fs(url, use_listings_cache=False)
    except ImportError as error:
        extra = {"gs": "gcp", "gcs": "gcp", "s3": "aws"}.get(url.split("://")[0])
        what = f"pip install 'harmonic-rnn[{extra}]'" if extra else one_line(error)
        raise UserError(f"{shown(url)} needs a package that is not here: {what}") from error
    except ValueError as error:
        raise UserError(f"{shown(url)} is of no known file system; give gs://, s3://, https://, or a path") from error
    return files, path


@contextlib.contextmanager
def cloud_errors() -> Iterator[None]:
    """Turns a bucket's errors into Refused, and unknown ones into Transient."""
    try:
        yield
    except FileNotFoundError as error:
        raise Refused("there is no such file", 404) from error
    except Exception as error:
        if isinstance(error, PermissionError) or getattr(error, "code", None) in (401, 403):
            raise Refused(
                "there is no permission to read it; log in, or give the workers' account permission", 403
            ) from error
        raise Transient(one_line(error) or type(error).__name__) from error


class CloudFolder(Files):
    """A folder of a bucket, or of any other file system that fsspec knows."""

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
            self._listing, self.left_out = {}, {}
            for full, info in found.items():
                name = full[len(path) :].lstrip("/")
                if not name or info["type"] != "file":
                    continue
                if is_hidden(name):
                    self.leave_out(HIDDEN, name)
                else:
                    self._listing[name] = int(info["size"]), cloud_tag(info)
        return self._listing

    def sizes(self) -> dict[str, int]:
        return {name: size for name, (size, _) in self._list().items()}

    def open(self, name: str) -> BinaryIO:
        return open_remote(CloudFile(f"{self._url}/{name}"), name)

    def stamp(self, name: str) -> tuple[object, ...]:
        return self._list()[name]
