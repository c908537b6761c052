"""The page's server: who may listen, what the page and a listener's session say to one another, and how it ends.

    with Server(voice, name="piano") as server:
        print(server.url)
        server.run()          # until a signal, or `stop` from another thread

A listener's WebSocket carries JSON texts and, to the page, pieces: little-endian uint32 number of the stream, uint32
position, float32 seconds that the piece took to make, then int16 samples. The page sends

    {"type": "settings", "temperature": 1.0, "top_p": 1.0, "stream": 1, "start": 3200}    act from a sample on
    {"type": "begin", "seed": 1, "prompt": false}                                         a new stream
    {"type": "ask", "stream": 1, "until": 48000, "played": 1600}                          make samples up to there

and gets {"type": "hello", "id"}, {"type": "begins", "stream", "lead"} and {"type": "error", "message"}. A prompt is the
body of a POST to prompt/ID. No other file or path is served.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hmac
import ipaddress
import json
import logging
import operator
import re
import secrets
import signal
import socket
import struct
import sys
import threading
import time
import traceback
from collections.abc import AsyncGenerator, Iterator
from typing import Any

import numpy as np
import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocket, WebSocketDisconnect

from harmonic.audio import pcm16
from harmonic.errors import UserError
from harmonic.generate import Streams, prefill_piece
from harmonic.listen import prompt as prompts
from harmonic.listen.session import Piece, Session, Settings, piece_size
from harmonic.report.page import environment
from harmonic.spectrogram import MAGMA
from harmonic.voice import Voice

PORT = 8765
_PORTS = 100  # that are tried, one after another
_HEAD = struct.Struct("<IIf")
_MESSAGE_BYTES, _MESSAGES_A_SECOND = 1_000, 60  # of the page, which sends some twenty a second at most
_PAUSE_SECONDS = 600.0  # without a word from the page: then its place is free again
_UPLOAD_SECONDS = 120.0
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_HEADERS = {
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "microphone=(self)",
    "Referrer-Policy": "no-referrer",  # the address may hold the token
    "X-Content-Type-Options": "nosniff",
}


class Server:
    """A page and its listeners, at a port that is taken when this object is made. Use it as a context.

    Args:
      voice: what is heard.
      name: of the model, for the page.
      host: an address of this machine. Where it is not the machine's own loopback, the page's address holds a token.
      port: the first that is tried.
      listeners: how many may listen at a time.

    Attributes:
      url: the page's address.
      port: the one that was free.

    Raises:
      UserError: there is no such address, or no free port.
    """

    def __init__(self, voice: Voice, *, name: str, host: str = "127.0.0.1", port: int = PORT, listeners: int = 4):
        self._socket = _bind(host, port)
        self.port = self._socket.getsockname()[1]
        local = host in _LOOPBACK or ipaddress.ip_address(self._socket.getsockname()[0]).is_loopback
        token = None if local else secrets.token_urlsafe(24)
        self._listening = Listening(voice, name, listeners)
        door = Door(self._listening.app(f"/{token}" if token else ""), host, local=local, token=token)
        self._uvicorn = uvicorn.Server(
            uvicorn.Config(
                door,
                http="h11",
                ws="websockets-sansio",
                ws_max_size=_MESSAGE_BYTES,
                ws_per_message_deflate=False,
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=2,
            )
        )
        shown = socket.gethostname() if host in ("0.0.0.0", "::") else host
        self.url = f"http://{f'[{shown}]' if ':' in shown else shown}:{self.port}/{f'{token}/' if token else ''}"

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def run(self) -> None:
        """Serves until SIGINT, SIGTERM or `stop`; then ends every session."""
        # uvicorn says what clients do wrong, with stack traces; faults of the program are told by `Door`.
        logging.getLogger("uvicorn").setLevel(logging.CRITICAL + 1)
        with _signals_end_quietly():
            self._uvicorn.run(sockets=[self._socket])
        self._listening.close()

    def stop(self) -> None:
        """Ends `run`, from another thread."""
        self._uvicorn.should_exit = True


def warm_up(voice: Voice) -> float:
    """Compiles what makes pieces, and gives how many times faster than real time a piece is made."""
    size = piece_size(voice.codec.sample_rate)
    # With one core for each stream, as sessions have it.
    streams = Streams(voice.model, voice.params, batch=1, chunk=size, help=False)
    times = [time.perf_counter()]
    for _ in range(4):
        streams.draw(size)
        times.append(time.perf_counter())
    # The first piece compiles; and a busy machine delays some.
    return size / voice.codec.sample_rate / min(map(operator.sub, times[2:], times[1:]))


def _bind(host: str, port: int) -> socket.socket:
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except (OSError, UnicodeError) as error:
        raise UserError(f"--host={host} is no address that this machine knows; give one of its own") from error
    for tried in range(port, min(port + _PORTS, 65_536)):
        place = socket.socket(family, socket.SOCK_STREAM)
        place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            place.bind((address[0], tried, *address[2:]))
            place.listen(128)  # a port may be bound by several, but only one listens
            return place
        except OSError as error:
            place.close()
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise UserError(f"cannot listen at {host}:{tried} ({error.strerror}); give another --host") from error
            refused = error
    raise UserError(f"no port from {port} to {tried} can be had ({refused.strerror}); give another --port")


@contextlib.contextmanager
def _signals_end_quietly() -> Iterator[None]:
    """uvicorn ends at a signal and then raises it again, for handlers that were there before."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Door:
    """Lets in only what comes from the page itself.

    The Host must be this machine's (else a stranger's page could reach it by a name that leads here: DNS rebinding),
    the Origin of whatever acts must be the page's own, and where there is a token, every path must begin with it.
    """

    def __init__(self, app: ASGIApp, host: str, *, local: bool, token: str | None):
        self._app, self._token, self._local = app, token, local
        self._names = {*_LOOPBACK, host.lower()}
        if not local:
            self._names |= {socket.gethostname().lower(), socket.getfqdn().lower()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request or WebSocket."""
        if reason := self._refusal(scope):
            answer = PlainTextResponse(f"{reason}\n", 403, _HEADERS)
            if scope["type"] == "websocket":
                await WebSocket(scope, receive, send).send_denial_response(answer)
            else:
                await answer(scope, receive, send)
            return
        try:
            await self._app(scope, receive, send)
        except Exception:  # a fault of the program: it is told, and other listeners hear on
            traceback.print_exc(file=sys.stderr)

    def _refusal(self, scope: Scope) -> str:
        given = {name: value.decode("latin-1") for name, value in scope["headers"] if name in (b"host", b"origin")}
        host = given.get(b"host", "")
        if not self._is_here(host):
            return "This address is not the server's. Use the one that the command printed."
        acts = scope["type"] == "websocket" or scope["method"] not in ("GET", "HEAD")
        if acts and re.sub(r"^https?://", "", given.get(b"origin", "")).lower() != host.lower():
            return "Only the server's own page may do this."
        if self._token is not None:
            first = scope["path"].split("/")[1]
            if not hmac.compare_digest(first.encode(), self._token.encode()):
                return "The address lacks its token. Use the one that the command printed, all of it."
        return ""

    def _is_here(self, host: str) -> bool:
        """A tunnel may have another port, so that only the name counts."""
        match = re.fullmatch(r"(?:\[([0-9a-f:.]+)\]|([\w.-]+))(?::\d+)?", host, re.IGNORECASE | re.ASCII)
        if not match:
            return False
        name = (match[1] or match[2]).lower()
        if name in self._names:
            return True
        with contextlib.suppress(ValueError):
            ipaddress.ip_address(name)  # an address, which no stranger's name server gives out
            return not self._local
        return False


class Rubbish(Exception):
    """A message that the page does not send."""


class Listener:
    """What the server keeps of one listener: what waits to be sent, the session, and the prompt."""

    def __init__(self, voice: Voice):
        loop = asyncio.get_running_loop()
        self.outgoing: asyncio.Queue[Piece | dict[str, Any]] = asyncio.Queue()
        self.prompt: np.ndarray | None = None
        self.uploading = False

        def post(item: Piece | dict[str, Any]) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(self.outgoing.put_nowait, item)

        def failed(error: Exception) -> None:
            traceback.print_exception(error)
            post({"type": "error", "message": "the server failed to make sound; its terminal says why"})

        self.session = Session(
            voice, post, lambda stream, lead: post({"type": "begins", "stream": stream, "lead": lead}), failed
        )

    def take(self, text: str) -> None:
        """Does what a message asks for.

        Raises:
          Rubbish: the page sends no such message.
        """
        try:
            message = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise Rubbish from error
        if not isinstance(message, dict):
            raise Rubbish
        kind = message.get("type")
        if kind == "ask":
            self.session.ask(*(_whole(message, name) for name in ("stream", "until", "played")))
        elif kind == "settings":
            settings = Settings(_number(message, "temperature", 0.01, 10), _number(message, "top_p", 0.001, 1))
            self.session.change(_whole(message, "stream"), _whole(message, "start"), settings)
        elif kind == "begin" and isinstance(message.get("prompt"), bool):
            self.session.begin(_whole(message, "seed"), self.prompt if message["prompt"] else None)
        else:
            raise Rubbish


def _whole(message: dict[str, Any], name: str) -> int:
    value = message.get(name)
    if type(value) is not int or not 0 <= value < 2**31:
        raise Rubbish
    return value


def _number(message: dict[str, Any], name: str, lowest: float, highest: float) -> float:
    value: Any = message.get(name)
    if type(value) not in (int, float) or not lowest <= value <= highest:
        raise Rubbish
    return float(value)


class Listening:
    """The page, its scripts, the prompts and the streams, for a fixed number of listeners."""

    def __init__(self, voice: Voice, name: str, listeners: int):
        self._voice, self._most = voice, listeners
        self._listeners: dict[str, Listener] = {}
        self._ending: set[Session] = set()
        templates = environment("harmonic.listen")
        values = {
            "name": name,
            "kind": voice.model.config.about.name,
            "rate": voice.codec.sample_rate,
            "palette": MAGMA.tobytes().hex(),
            "most_megabytes": prompts.MOST_BYTES // 1_000_000,
            "most_seconds": round(prompts.MOST_SECONDS),
        }
        self._page = templates.get_template("listen.html.j2").render(values)
        assert templates.loader is not None
        self._scripts = {name: templates.loader.get_source(templates, name)[0] for name in ("listen.js", "player.js")}

    def app(self, prefix: str) -> Starlette:
        """The application, at the paths below a prefix."""
        scripts = [Route(f"{prefix}/{name}", self._script) for name in self._scripts]
        return Starlette(
            routes=[
                Route(f"{prefix}/", self._show),
                *scripts,
                Route(f"{prefix}/prompt/{{id}}", self._take_prompt, methods=["POST"]),
                WebSocketRoute(f"{prefix}/stream", self._stream),
            ],
            exception_handlers={404: _nothing, 405: _nothing},
        )

    def close(self) -> None:
        """Ends all sessions, and waits for their threads."""
        for listener in self._listeners.values():
            self._ending.add(listener.session)
        for session in self._ending:
            session.close()
        for session in self._ending:
            session.join(10)

    async def _show(self, request: Request) -> Response:
        host = request.headers["host"]
        policy = (
            "default-src 'none'; script-src 'self'; style-src 'unsafe-inline'; img-src data:; "
            f"connect-src 'self' ws://{host}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )
        headers = {**_HEADERS, "Content-Security-Policy": policy}
        return Response(self._page.encode("utf-8", "replace"), 200, headers, "text/html")

    async def _script(self, request: Request) -> Response:
        script = self._scripts[request.url.path.rpartition("/")[2]]
        return Response(script, 200, _HEADERS, "text/javascript")

    async def _take_prompt(self, request: Request) -> Response:
        listener = self._listeners.get(request.path_params["id"])
        if listener is None:
            return _refused(404, "this listener has gone; press play first")
        if listener.uploading:
            return _refused(409, "another prompt is on its way; wait for it")
        listener.uploading = True
        try:
            async with asyncio.timeout(_UPLOAD_SECONDS):
                content = await _body(request)
            model = self._voice.model
            piece, multiple = piece_size(self._voice.codec.sample_rate), model.multiple
            units = (prefill_piece(model), max(piece // multiple, 1) * multiple)
            listener.prompt = await run_in_threadpool(prompts.read, content, self._voice.codec, units)
            return JSONResponse({"seconds": len(listener.prompt) / self._voice.codec.sample_rate}, headers=_HEADERS)
        except UserError as error:
            return _refused(413 if "MB" in str(error) else 400, str(error))
        except (TimeoutError, ClientDisconnect):
            return _refused(408, "the prompt took too long to arrive; try again")
        finally:
            listener.uploading = False

    async def _stream(self, websocket: WebSocket) -> None:
        if len(self._listeners) >= self._most:
            await websocket.accept()
            places = "the one place is" if self._most == 1 else f"all {self._most} places are"
            message = f"{places} taken: try again when somebody has left, or start the command with more --listeners"
            await websocket.send_json({"type": "error", "message": message})
            await websocket.close(1013)
            return
        number = secrets.token_urlsafe(16)
        listener = self._listeners[number] = Listener(self._voice)
        code, reason = 1000, ""
        sender: asyncio.Task[None] | None = None
        try:
            await websocket.accept()
            await websocket.send_json({"type": "hello", "id": number})
            sender = asyncio.create_task(_send(websocket, listener))
            async with contextlib.aclosing(_messages(websocket)) as messages:
                async for text in messages:
                    listener.take(text)
            return
        except WebSocketDisconnect:
            return
        except Rubbish:
            code, reason = 1008, "the server does not understand this page; load it again"
        except TimeoutError:
            reason = "the stream ended after ten minutes of silence; press play for another"
        finally:
            del self._listeners[number]
            if sender is not None:
                sender.cancel()
                (ended,) = await asyncio.gather(sender, return_exceptions=True)
                if isinstance(ended, Exception):  # a fault of the program
                    traceback.print_exception(ended)
            listener.session.close()
            self._ending = {session for session in self._ending if not session.join(0)} | {listener.session}
        with contextlib.suppress(WebSocketDisconnect, RuntimeError):
            await websocket.close(code, reason)


async def _messages(websocket: WebSocket) -> AsyncGenerator[str, None]:
    """The page's texts; too many, or something else, is rubbish."""
    loop = asyncio.get_running_loop()
    second, seen = 0.0, 0
    while True:
        async with asyncio.timeout(_PAUSE_SECONDS):
            message = await websocket.receive()
        if message["type"] == "websocket.disconnect":
            return
        if loop.time() - second >= 1:
            second, seen = loop.time(), 0
        seen += 1
        if seen > _MESSAGES_A_SECOND or message.get("text") is None:
            raise Rubbish
        yield message["text"]


async def _send(websocket: WebSocket, listener: Listener) -> None:
    with contextlib.suppress(WebSocketDisconnect):
        while True:
            item = await listener.outgoing.get()
            if isinstance(item, dict):
                await websocket.send_json(item)
                continue
            head = _HEAD.pack(item.stream, item.position, item.seconds)
            await websocket.send_bytes(head + pcm16(item.sound))
            listener.session.sent()


async def _body(request: Request) -> bytes:
    """A prompt's content, refused as soon as it is too large."""
    claimed = request.headers.get("content-length", "")
    if claimed.isdecimal() and int(claimed) > prompts.MOST_BYTES:
        raise prompts.too_large(int(claimed))
    content = bytearray()
    async for part in request.stream():
        content += part
        if len(content) > prompts.MOST_BYTES:
            raise prompts.too_large(len(content))
    return bytes(content)


def _refused(status: int, message: str) -> Response:
    return JSONResponse({"message": message}, status, _HEADERS)


async def _nothing(request: Request, error: Exception) -> Response:
    return PlainTextResponse("There is nothing here.\n", 404, _HEADERS)
