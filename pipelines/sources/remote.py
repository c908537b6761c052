"""Files on an HTTP server or in a cloud bucket, read by ranges.

A remote file is pinned when it is first seen, by its size and its entity tag: a worker that later finds another one in
its place stops, and does not mix two. A connection that drops, a slow answer, 429 and 5xx are tried again, where the
last byte arrived; what does not pass by itself ends in a UserError, never in a file that looks shorter than it is.

Requests, and not fsspec, speaks HTTP: fsspec's HTTP file system needs aiohttp, tries nothing again and pins nothing.
fsspec, and not Beam's file systems, reads buckets: Beam's reader of gs:// fetches 16 MiB wherever it is asked for a
few kilobytes, and Beam cannot list an hdfs:// folder with what is below it.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import email.utils
import io
import os
import random
import re
import time
import urllib.parse
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, TypeVar

from harmonic.errors import UserError, one_line

CONNECT_SECONDS, READ_SECONDS = 10, 60  # before a silent server counts as gone
TRIES = 8  # without a single new byte
FIRST_SECONDS, LONGEST_SECONDS = 0.5, 30.0  # between tries, doubled each time
LONGEST_RETRY_AFTER = 300.0  # seconds that a server may ask for: the hub counts requests over five minutes
WINDOW_BYTES = 1 << 16  # asked for at once where nothing is known of what will be read next
_CLOUD_BYTES = 8 << 20  # of a bucket's object in memory
_BLOCK_BYTES = 1 << 20
_AGAIN = (408, 425, 429, 500, 502, 503, 504)

T = TypeVar("T")


class Refused(Exception):
    """A remote file cannot be had; the message is the reason.

    Attributes:
      status: of HTTP, or None where there was no answer.
      headers: of the answer.
    """

    def __init__(self, reason: str, status: int | None = None, headers: Any = None):
        super().__init__(reason)
        self.status = status
        self.headers = headers or {}


class Transient(Refused):
    """It may be had if tried again, after as many seconds as the server asks for."""

    @property
    def retry_after(self) -> float:
        value = str(self.headers.get("Retry-After", "")).strip()
        if value.isdigit():
            return float(value)
        try:
            return email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except ValueError:
            return 0.0


def shown(source: str) -> str:
    """A URL as messages and manifests may show it: without a password, and without a signature in its query."""
    if "://" not in source:
        return source
    url = urllib.parse.urlsplit(source)
    return urllib.parse.urlunsplit((url.scheme, url.netloc.rpartition("@")[2], url.path, "", ""))


class RemoteFile(abc.ABC):
    """Where a remote file lies, and what it was when it was first seen. Picklable, with no credentials but a URL's.

    Attributes:
      name: for messages.
      size: bytes; None before `pin`.
      tag: what changes when the file does; None before `pin` or where the server says nothing.
    """

    name: str
    size: int | None = None
    tag: str | None = None

    @abc.abstractmethod
    def pin(self, patient: bool = True) -> None:
        """Looks at the file for the first time; once only if not `patient`. Raises Refused."""

    @abc.abstractmethod
    def fetch(self, start: int, end: int) -> BinaryIO:
        """Bytes [start, end) as a stream, or fewer of them from `start` on. Raises Refused."""

    def refusal(self, error: Refused) -> UserError:
        """The line for a user."""
        return UserError(f"cannot read {self.name}: {error}{'; try again later' * isinstance(error, Transient)}")

    def changed(self) -> Refused:
        return Refused("it has changed since it was first looked at; run again")

    def open(self) -> RangeReader:
        """A seekable file. Raises UserError, also when it is read."""
        return RangeReader(self)

    def close(self) -> None:  # noqa: B027 - some keep nothing open
        """Lets go of connections."""


class Patience:
    """Waits between tries, longer each time.

    Args:
      tries: how many follow the first.
      silent_tries: how many where there was no answer at all.
    """

    def __init__(self, tries: int = TRIES, silent_tries: int = TRIES):
        self._tries, self._silent_tries = tries, silent_tries
        self.restart()

    def restart(self) -> None:
        """There was progress."""
        self._made, self._seconds = 0, FIRST_SECONDS

    def wait(self, error: Transient) -> None:
        """Raises the error if it was the last try."""
        if self._made >= (self._silent_tries if error.status is None else self._tries):
            raise error
        self._made += 1
        # Workers that failed together should not come back together.
        pause = self._seconds * random.uniform(0.75, 1.25)
        time.sleep(min(max(pause, error.retry_after), LONGEST_RETRY_AFTER))
        self._seconds = min(2 * self._seconds, LONGEST_SECONDS)


def _first(call: Callable[[], T], patient: bool) -> T:
    """The result of a first look. Who has no connection, or mistyped, does not wait for minutes."""
    patience = Patience(TRIES, 1) if patient else Patience(0, 0)
    while True:
        try:
            return call()
        except Transient as error:
            patience.wait(error)


class RangeReader(io.RawIOBase):
    """A remote file as a seekable one. A read gives all that was asked for, but at the end of the file."""

    def __init__(self, file: RemoteFile):
        super().__init__()
        assert file.size is not None, "not pinned"
        self._file, self._size = file, file.size
        self._position = 0
        self._expected = 0
        self._body: BinaryIO | None = None
        self._body_position = self._body_end = 0

    def expect(self, end: int) -> None:
        """All up to `end` is going to be read, in order: it is asked for in one request."""
        self._expected = min(end, self._size)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        if origin + offset < 0:
            raise ValueError(f"negative position {origin + offset}")
        self._position = origin + offset
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        whole = io.BytesIO()  # which gives its bytes away without a copy
        for data in self._blocks(self._size if size is None or size < 0 else size):
            whole.write(data)
        return whole.getvalue()

    readall = read

    def readinto(self, buffer: Any) -> int:
        view, done = memoryview(buffer).cast("B"), 0
        for data in self._blocks(len(view)):
            view[done : done + len(data)] = data
            done += len(data)
        return done

    def _blocks(self, size: int) -> Iterator[bytes]:
        """The next bytes, as many of them as there are."""
        end, patience = min(self._position + size, self._size), Patience()
        while self._position < end:
            try:
                data = self._read_some(end - self._position)
            except Transient as error:
                self._drop(broken=True)
                try:
                    patience.wait(error)
                except Transient:
                    raise self._file.refusal(error) from error
                continue
            except Refused as error:
                raise self._file.refusal(error) from error
            self._position += len(data)
            patience.restart()
            yield data

    def _read_some(self, size: int) -> bytes:
        if self._body is None or self._body_position != self._position:
            self._drop()
            ahead = self._expected if self._expected > self._position else self._position + WINDOW_BYTES
            self._body_end = min(max(self._position + size, ahead), self._size)
            self._body = self._file.fetch(self._position, self._body_end)
            self._body_position = self._position
        data = read_body(self._body, min(size, self._body_end - self._body_position, _BLOCK_BYTES))
        self._body_position += len(data)
        if self._body_position >= self._body_end:
            self._drop()
        return data

    def _drop(self, broken: bool = False) -> None:
        if self._body is not None:
            body, self._body = self._body, None
            # A little that is left is read, so that the connection can be used again.
            if not broken and self._body_end - self._body_position <= WINDOW_BYTES:
                with contextlib.suppress(Transient):
                    while self._body_position < self._body_end:
                        self._body_position += len(read_body(body, WINDOW_BYTES))
            body.close()

    def close(self) -> None:
        if not self.closed:
            self._drop()
        super().close()


def read_body(body: BinaryIO, size: int) -> bytes:
    """At least one byte of an answer's body. Raises Transient if it breaks off."""
    import urllib3

    try:
        data = body.read(size)
    except (urllib3.exceptions.HTTPError, OSError) as error:
        raise Transient(f"the connection broke off{_system(error)}") from error
    if not data:
        raise Transient("the connection broke off")
    return data


def _system(error: BaseException) -> str:
    """The system's word for an error; not the error's own text, which holds the URL with whatever it is signed by."""
    seen: BaseException | None = error
    found = ""
    for _ in range(20):
        if isinstance(seen, OSError) and seen.strerror and isinstance(seen.strerror, str):
            found = f" ({one_line(seen.strerror)})"
        seen = seen and (seen.__cause__ or seen.__context__)
    return found


class HttpFile(RemoteFile):
    """A file on an HTTP server that serves ranges; credentials are those of the URL or of ~/.netrc."""

    authorize: Callable[[Any], Any] | None = None  # adds others to a prepared request to `url` itself

    def __init__(self, url: str):
        self.url = url
        self.name = shown(url)
        self.headers: Any = {}  # of the first answers
        self._reset()

    def _reset(self) -> None:
        self._session: Any = None
        self._direct: str | None = None
        self._direct_tag: str | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"headers": {}, "_session": None, "_direct": None, "_direct_tag": None}

    def pin(self, patient: bool = True) -> None:
        def look() -> Any:
            response, _ = self._get(0, 1)
            read_body(response.raw, 1)  # the connection is then used again
            return response

        response = _first(look, patient)
        self.size, self.tag = _total(response), self._tag_of(response)
        self.headers = response.headers
        for answer in reversed(response.history):  # the first to name something counts
            self.headers.update(answer.headers)

    def fetch(self, start: int, end: int) -> BinaryIO:
        response, direct = self._get(start, end)
        tag = response.headers.get("ETag") if direct else self._tag_of(response)
        if _total(response) != self.size or tag != (self._direct_tag if direct else self.tag):
            response.close()
            raise self.changed()
        if response.history and _host(response.url) != _host(self.url):
            # The hub sends to its storage: the next requests go there at once, until the leave in that address
            # expires. That is half as many requests, and none that the hub counts.
            self._direct, self._direct_tag = response.url, response.headers.get("ETag")
        return response.raw

    def _tag_of(self, response: Any) -> str | None:
        # The hub's own word for what it sends elsewhere: storage in another region may have other tags.
        for answer in response.history:
            if linked := answer.headers.get("X-Linked-ETag"):
                return str(linked)
        return response.headers.get("ETag") or response.headers.get("Last-Modified")

    def _get(self, start: int, end: int) -> tuple[Any, bool]:
        """The answer to a request for bytes [start, end), its body not yet read, and whether it came from `_direct`."""
        import requests

        if self._session is None:
            self._session = requests.Session()
            self._session.auth = self.authorize
        direct = self._direct
        try:
            response = self._session.get(
                direct or self.url,
                headers={"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"},
                auth=_as_it_is if direct else None,
                stream=True,
                timeout=(CONNECT_SECONDS, READ_SECONDS),
            )
        except requests.exceptions.Timeout as error:
            raise Transient("the server does not answer") from error
        except requests.exceptions.ConnectionError as error:
            raise Transient(f"there is no connection{_system(error)}") from error
        except requests.exceptions.RequestException as error:
            raise Refused(f"the request cannot be made ({type(error).__name__})") from error
        try:
            self._check(response, start, end)
        except Refused as error:
            response.close()
            if direct and error.status in (400, 401, 403, 404, 410):
                self._direct = None
                return self._get(start, end)
            raise
        return response, direct is not None

    def _check(self, response: Any, start: int, end: int) -> None:
        status, headers = response.status_code, response.headers
        if status == 206:
            found = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", headers.get("Content-Range", ""))
            if found and int(found[1]) == start and int(found[2]) < end and "Content-Encoding" not in headers:
                return
            raise Refused("the server sends another part than it was asked for; download it and give its path", status)
        if status in (200, 416):
            if self.size is not None and (status == 416 or _total(response) not in (None, self.size)):
                raise self.changed()
            if status == 416:
                raise Refused("it is empty", status)
            raise Refused("the server does not serve parts of files; download it and give its path", status, headers)
        if status in _AGAIN:
            raise Transient(f"the server answers {status}", status, headers)
        reason = {401: "it asks for credentials", 403: "it gives no leave to read", 404: "there is no such file"}
        raise Refused(f"{reason.get(status, 'the server will not give it')} ({status})", status, headers)

    def close(self) -> None:
        if self._session is not None:
            self._session.close()
        self._reset()


def _as_it_is(request: Any) -> Any:
    """No credentials: a signed address needs none, and is not to get those of another."""
    request.headers.pop("Authorization", None)
    return request


def _host(url: str) -> str:
    return urllib.parse.urlsplit(url).netloc.rpartition("@")[2]


def _total(response: Any) -> int | None:
    length = response.headers.get("Content-Range", "").rpartition("/")[2] or response.headers.get("Content-Length", "")
    return int(length) if length.isdigit() else None


@dataclasses.dataclass
class CloudFile(RemoteFile):
    """An object of a bucket, or whatever else fsspec reaches (`gs://`, `s3://`, `az://`, `hdfs://`, ...)."""

    url: str
    size: int | None = None
    tag: str | None = None

    def __post_init__(self) -> None:
        self.name = shown(self.url)
        self._opened: tuple[Any, str] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_opened": None}

    def pin(self, patient: bool = True) -> None:
        info = _first(self._info, patient)
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
    """What changes when an object does, out of what fsspec tells of it."""
    names = ("generation", "etag", "ETag", "mtime", "LastModified", "last_modified", "created")
    return next((str(info[name]) for name in names if info.get(name)), "")


def file_system(url: str) -> tuple[Any, str]:
    """fsspec's file system of a URL, and the path in it.

    Raises:
      UserError: fsspec does not know it, or its extra is missing.
    """
    import fsspec

    # gcsfs would first ask another service over gRPC what kind a bucket is of, for minutes where that is not allowed.
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
    """Turns what goes wrong in a bucket into Refused, or into Transient where that is not known."""
    try:
        yield
    except FileNotFoundError as error:
        raise Refused("there is no such file", 404) from error
    except Exception as error:
        if isinstance(error, PermissionError) or getattr(error, "code", None) in (401, 403):
            raise Refused("there is no leave to read it; log in, or give the workers' account leave", 403) from error
        raise Transient(one_line(error) or type(error).__name__) from error
