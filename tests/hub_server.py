"""A server on loopback that speaks the hub's protocol, and goes wrong as it is told."""

import dataclasses
import hashlib
import http.server
import json
import os
import socket
import struct
import threading
import time
import urllib.parse

import loopback

COMMIT = "a" * 40


@dataclasses.dataclass
class Fault:
    """What becomes of one answer.

    Attributes:
      status: instead of the file.
      headers: more of them.
      after: bytes of the body, then the connection ends.
      reset: ... with a reset instead of in silence.
      hang: ... or does not end, and nothing more comes.
      delay: seconds before the first byte, and before the last ones.
      whole: as if no range had been asked for.
      data: instead of the file's.
      etag: instead of the file's.
      shift: bytes by which another range is sent than was asked for.
    """

    status: int | None = None
    headers: dict = dataclasses.field(default_factory=dict)
    after: int | None = None
    reset: bool = False
    hang: bool = False
    delay: float = 0
    whole: bool = False
    data: bytes | None = None
    etag: str | None = None
    shift: int = 0


@dataclasses.dataclass
class Request:
    """What was asked for, and how many bytes of a body were sent."""

    method: str
    path: str
    range: str | None
    authorization: str | None
    sent: int = 0


class Hub:
    """Serves `files` of any repository; at `/plain/NAME`, too.

    Args:
      files: bytes by name.
      status, code: every answer's, and its X-Error-Code.
      faults: what becomes of the answers to GETs of files, one after another; None for nothing.
      storage: how often each signature holds of a redirection to another host, from where files are sent.
      etags: by name; SHA-256 otherwise.
      token: what is needed to read.
      port: the server's; a free one otherwise.
    """

    def __init__(self, files, status=None, code=None, *, faults=(), storage=None, etags=None, token=None, port=0):
        self.files, self.status, self.code = dict(files), status, code
        self.faults, self.storage, self.etags, self.token = list(faults), storage, etags or {}, token
        self.requests = []
        self.signatures = {}
        self.lock, self.closing = threading.Lock(), threading.Event()
        hub = self

        class Handler(_Handler):
            def setup(self):
                self.hub = hub
                super().setup()

        self.server = loopback.Server(Handler, port)
        self.url = self.server.url

    def __enter__(self):
        self.server.start()
        return self

    def __exit__(self, *_):
        self.closing.set()
        self.server.stop()

    def sent(self):
        """Bytes of files that were sent."""
        return sum(request.sent for request in self.requests if "/api/" not in request.path)

    def gets(self):
        """Requests for parts of files."""
        return [r for r in self.requests if r.method == "GET" and r.range and "/api/" not in r.path]


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.begin()
        paths = urllib.parse.parse_qs(body.decode()).get("paths") or json.loads(body)["paths"]
        self.answer(200, json.dumps([e for e in map(self.entry, paths) if e]).encode())

    def begin(self):
        self.request_log = Request(
            self.command, self.path, self.headers.get("Range"), self.headers.get("Authorization")
        )
        with self.hub.lock:
            self.hub.requests.append(self.request_log)

    def do_GET(self):
        hub = self.hub
        self.begin()
        url = urllib.parse.urlsplit(self.path)
        parts = [urllib.parse.unquote(part) for part in url.path.strip("/").split("/")]
        if hub.status:
            return self.answer(hub.status, b"", {"X-Error-Code": hub.code} if hub.code else {})
        if parts[0] == "storage":
            with hub.lock:
                hub.signatures[url.query] = hub.signatures.get(url.query, 0) - 1
                expired = hub.signatures[url.query] < 0
            return self.answer(403, b"") if expired else self.send_file(parts[-1], linked=False)
        if hub.token is not None and self.request_log.authorization != f"Bearer {hub.token}":
            headers = {"X-Error-Code": "GatedRepo"}
            if self.request_log.authorization:
                headers = {"X-Error-Message": "Invalid credentials in Authorization header"}
            return self.answer(401, b"", headers)
        if parts[:2] == ["api", "datasets"]:
            return self.api(parts[4:], url.query)
        if "resolve" in parts:
            return self.send_file("/".join(parts[parts.index("resolve") + 2 :]))
        if parts[0] == "plain":
            return self.send_file("/".join(parts[1:]))
        return self.answer(404, b"")

    do_HEAD = do_GET

    def api(self, rest, query):
        files = self.hub.files
        if not rest or rest[0] == "revision":
            info = {"id": "a/b", "sha": COMMIT, "siblings": [{"rfilename": name} for name in files], "tags": []}
            more = {"private": False, "gated": False, "disabled": False, "downloads": 0, "likes": 0}
            return self.answer(200, json.dumps(info | more).encode())
        if rest[0] != "tree":
            return self.answer(404, b"")
        folder = "".join(f"{part}/" for part in rest[2:])
        recursive = "recursive=true" in query.lower()
        entries = {}
        for name in files:
            if name.startswith(folder):
                below = name[len(folder) :].split("/")
                for depth in range(1, len(below) + 1 if recursive else 2):
                    path = folder + "/".join(below[:depth])
                    entries[path] = self.entry(path)
        if folder and not entries:
            return self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
        return self.answer(200, json.dumps([*entries.values()]).encode())

    def entry(self, path):
        if path in self.hub.files:
            return {"type": "file", "oid": "b" * 40, "size": len(self.hub.files[path]), "path": path}
        if any(name.startswith(f"{path}/") for name in self.hub.files):
            return {"type": "directory", "oid": "c" * 40, "size": 0, "path": path}
        return None

    def answer(self, status, body, headers=None):
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
            self.request_log.sent += len(body)

    def send_file(self, name, linked=True):
        hub = self.hub
        if name not in hub.files:
            return self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
        fault = Fault()
        if self.command == "GET" and (hub.storage is None or not linked):
            with hub.lock:
                fault = (hub.faults.pop(0) if hub.faults else None) or fault
        time.sleep(fault.delay)
        if fault.status:
            return self.answer(fault.status, b"", fault.headers)
        data = hub.files[name] if fault.data is None else fault.data
        etag = fault.etag or hub.etags.get(name) or f'"{hashlib.sha256(data).hexdigest()}"'
        if hub.storage is not None and linked:
            with hub.lock:
                signature = f"signature={len(hub.signatures)}"
                hub.signatures[signature] = hub.storage
            place = f"{hub.url.replace('127.0.0.1', 'localhost')}/storage/{name}?{signature}"
            return self.answer(302, b"", {"Location": place, "X-Linked-ETag": etag, "X-Linked-Size": str(len(data))})
        start, end = 0, len(data)
        asked = None if fault.whole else self.headers.get("Range")
        headers = {"ETag": '"of the storage"' if not linked else etag, "X-Repo-Commit": COMMIT} | fault.headers
        if asked:
            first, last = asked.removeprefix("bytes=").split("-")
            start, end = int(first) + fault.shift, min(int(last) + 1 if last else len(data), len(data)) + fault.shift
            if start >= len(data):
                return self.answer(416, b"", headers | {"Content-Range": f"bytes */{len(data)}"})
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(data)}"
        self.send_response(206 if asked else 200)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(end - start))
        self.end_headers()
        if self.command == "HEAD":
            return
        body = data[start:end] if fault.after is None else data[start : min(end, start + fault.after)]
        for at in range(0, len(body), 1 << 16):
            block = body[at : at + (1 << 16)]
            self.request_log.sent += len(block)
            try:
                self.wfile.write(block)
            except OSError:  # whoever asked has heard enough
                self.close_connection = True
                return
        if fault.after is not None:
            self.close_connection = True
            self.wfile.flush()
            if fault.hang:
                self.hub.closing.wait(60)
            if fault.reset:
                time.sleep(0.05)  # a reset throws away what has not been read yet
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()

    def log_message(self, *_):
        pass


def take_for_the_hub(monkeypatch, hub, folder):
    """Makes this process take `hub` for the hub, with caches of its own, a token, and waits of milliseconds."""
    import datasets
    from huggingface_hub import HfFileSystem, constants

    from pipelines.sources import remote

    # It keeps listings by address, and the system gives a closed server's port to another one.
    HfFileSystem.clear_instance_cache()
    monkeypatch.setattr(remote, "FIRST_SECONDS", 0.001)
    monkeypatch.setattr(remote, "LONGEST_SECONDS", 0.01)
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub.url)
    template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    for module, name in (
        *((constants, "HF_ASSETS_CACHE"), (constants, "HF_HUB_CACHE")),
        *((datasets.config, "HF_DATASETS_CACHE"), (datasets.config, "HF_MODULES_CACHE")),
    ):
        monkeypatch.setattr(module, name, str(folder / name))


def hub_environment(url, home):
    """The environment of a process for which `url` is the hub."""
    env = {k: v for k, v in os.environ.items() if "proxy" not in k.lower() and not k.startswith("HF_")}
    return env | {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1"}
