"""Remote files read by ranges: what all of them share, and those on HTTP servers.

A remote file is pinned by its size and entity tag at the first look: a worker that later finds another file in its
place stops, instead of mixing the two. After a dropped connection, a timeout, 429 or 5xx, reading is tried again from
the last byte that arrived. All other failures end in a UserError, never in a file that looks shorter than it is.

HTTP goes through requests, not fsspec: fsspec's HTTP file system needs aiohttp, retries nothing and pins nothing.
"""

from __future__ import annotations

import abc
import contextlib
import email.utils
import io
import random
import re
import time
import urllib.parse
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, TypeVar

from harmonic.errors import UserError, one_line

CONNECT_SECONDS, READ_SECONDS = 10, 60  # of silence before a try has failed
TRIES = 8  # without a single new byte
FIRST_SECONDS, LONGEST_SECONDS = 0.5, 30.0  # between tries, doubled each time
LONGEST_RETRY_AFTER = 300.0  # seconds that a server may ask for: the hub limits requests over five minutes
WINDOW_BYTES = 1 << 16  # of one request, unless `expect` has announced a longer read
_BLOCK_BYTES = 1 << 20
_AGAIN = (408, 425, 429, 500, 502, 503, 504)

T = TypeVar("T")


class Refused(Exception):
    """A remote file cannot be read; the message is the reason.

    Attributes:
      status: of the HTTP answer, or None if there was none.
      headers: of the answer.
    """

    def __init__(self, reason: str, status: int | None = None, headers: Any = None):
        super().__init__(reason)
        self.status = status
        self.headers = headers or {}


class Transient(Refused):
    """A failure that may pass: try again, after as many seconds as the server asks for."""

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
    """A URL for messages and manifests: without a password, and without the query, which may hold a signature."""
    if "://" not in source:
        return source
    url = urllib.parse.urlsplit(source)
    return urllib.parse.urlunsplit((url.scheme, url.netloc.rpartition("@")[2], url.path, "", ""))


class RemoteFile(abc.ABC):
    """A remote file, pinned at the first look. Picklable; it carries no credentials but those in a URL.

    Attributes:
      name: for messages.
      size: bytes; None before `pin`.
      tag: changes when the file does; None before `pin`, or if the server sends none.
    """

    name: str
    size: int | None = None
    tag: str | None = None

    @abc.abstractmethod
    def pin(self, patient: bool = True) -> None:
        """Takes the file's size and tag; without `patient`, nothing is tried twice. Raises Refused."""

    @abc.abstractmethod
    def fetch(self, start: int, end: int) -> BinaryIO:
        """A stream of the bytes [start, end), perhaps without the last of them. Raises Refused."""

    def refusal(self, error: Refused) -> UserError:
        """The error as a line for the user."""
        return UserError(f"cannot read {self.name}: {error}{'; try again later' * isinstance(error, Transient)}")

    def changed(self) -> Refused:
        return Refused("it has changed since it was first looked at; run again")

    def open(self) -> RangeReader:
        """A seekable file, whose methods raise UserError."""
        return RangeReader(self)

    def close(self) -> None:  # noqa: B027 - some keep nothing open
        """Closes connections."""


class Patience:
    """Waits between tries, longer each time.

    Args:
      tries: how many may follow the first.
      silent_tries: the same, where there was no answer at all.
    """

    def __init__(self, tries: int = TRIES, silent_tries: int = TRIES):
        self._tries, self._silent_tries = tries, silent_tries
        self.restart()

    def restart(self) -> None:
        """Resets the number of tries and the wait; call it when a byte has arrived."""
        self._made, self._seconds = 0, FIRST_SECONDS

    def wait(self, error: Transient) -> None:
        """Waits before the next try; raises the error if there is none left."""
        if self._made >= (self._silent_tries if error.status is None else self._tries):
            raise error
        self._made += 1
        # Workers that failed together must not all come back at the same moment.
        pause = self._seconds * random.uniform(0.75, 1.25)
        time.sleep(min(max(pause, error.retry_after), LONGEST_RETRY_AFTER))
        self._seconds = min(2 * self._seconds, LONGEST_SECONDS)


def first_look(call: Callable[[], T], patient: bool) -> T:
    """Calls until there is an answer. No answer at all, as after a typing mistake, is tried only once more."""
    patience = Patience(TRIES, 1) if patient else Patience(0, 0)
    while True:
        try:
            return call()
        except Transient as error:
            patience.wait(error)


class RangeReader(io.RawIOBase):
    """A remote file as a seekable local one. A read gives all that it is asked for, except at the file's end."""

    def __init__(self, file: RemoteFile):
        super().__init__()
        assert file.size is not None, "not pinned"
        self._file, self._size = file, file.size
        self._position = 0
        self._expected = 0
        self._body: BinaryIO | None = None
        self._body_position = self._body_end = 0

    def expect(self, end: int) -> None:
        """Announces that everything up to `end` will be read in order: it is then one request."""
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
        whole = io.BytesIO()  # getvalue() makes no copy
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
        """The next `size` bytes, or all up to the file's end."""
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
            # A short rest of the body is read, so that the connection can be used again.
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
    """The operating system's reason, in brackets. The error's own text may not be shown: it holds a signed URL."""
    seen: BaseException | None = error
    found = ""
    for _ in range(20):
        if isinstance(seen, OSError) and seen.strerror and isinstance(seen.strerror, str):
            found = f" ({one_line(seen.strerror)})"
        seen = seen and (seen.__cause__ or seen.__context__)
    return found


class HttpFile(RemoteFile):
    """A file on an HTTP server that serves ranges. Credentials are the URL's, or those of ~/.netrc."""

    authorize: Callable[[Any], Any] | None = None  # adds other credentials to a prepared request to `url`

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
            read_body(response.raw, 1)  # with its body read, the connection can be used again
            return response

        response = first_look(look, patient)
        self.size, self.tag = _total(response), self._tag_of(response)
        self.headers = response.headers
        for answer in reversed(response.history):  # of redirections, the first to send a header wins
            self.headers.update(answer.headers)

    def fetch(self, start: int, end: int) -> BinaryIO:
        response, direct = self._get(start, end)
        tag = response.headers.get("ETag") if direct else self._tag_of(response)
        if _total(response) != self.size or tag != (self._direct_tag if direct else self.tag):
            response.close()
            raise self.changed()
        if response.history and _host(response.url) != _host(self.url):
            # The hub redirects to its storage. The next requests go there directly until the signature in that URL
            # expires: half as many requests, and none that the hub's rate limit counts.
            self._direct, self._direct_tag = response.url, response.headers.get("ETag")
        return response.raw

    def _tag_of(self, response: Any) -> str | None:
        # The hub's own tag for a file that it redirects: storage in another region may have other tags.
        for answer in response.history:
            if linked := answer.headers.get("X-Linked-ETag"):
                return str(linked)
        return response.headers.get("ETag") or response.headers.get("Last-Modified")

    def _get(self, start: int, end: int) -> tuple[Any, bool]:
        """The answer to a request for the bytes [start, end), its body unread, and whether it came from `_direct`."""
        import requests

        if self._session is None:
            self._session = requests.Session()
            self._session.auth = self.authorize
        direct = self._direct
        try:
            response = self._session.get(
                direct or self.url,
                headers={"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"},
                auth=_without_credentials if direct else None,
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
        reason = {401: "it asks for credentials", 403: "it gives no permission to read", 404: "there is no such file"}
        raise Refused(f"{reason.get(status, 'the server will not give it')} ({status})", status, headers)

    def close(self) -> None:
        if self._session is not None:
            self._session.close()
        self._reset()


def _without_credentials(request: Any) -> Any:
    """Removes credentials: a signed URL needs none, and must not be sent those of another host."""
    request.headers.pop("Authorization", None)
    return request


def _host(url: str) -> str:
    return urllib.parse.urlsplit(url).netloc.rpartition("@")[2]


def _total(response: Any) -> int | None:
    length = response.headers.get("Content-Range", "").rpartition("/")[2] or response.headers.get("Content-Length", "")
    return int(length) if length.isdigit() else None
