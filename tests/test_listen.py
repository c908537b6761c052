"""workflows.listen without a browser: what the server plays, whom it lets in, and what it does with rubbish."""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import re
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
import soundfile
from listening import Command, Listener, make_export, samples, serving
from mains import refused
from websockets.exceptions import ConnectionClosed, InvalidStatus

import harmonic
from harmonic.errors import UserError
from harmonic.listen import prompt as prompts
from harmonic.listen import server as servers
from harmonic.listen.server import Server
from harmonic.listen.session import MOST_AHEAD_SECONDS
from harmonic.pretrained import Pretrained

RATE = 4_000


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Pretrained:
    return harmonic.load(make_export(tmp_path_factory.mktemp("listen") / "tiny", RATE))


@pytest.fixture(scope="module")
def server(model: Pretrained) -> Iterator[Server]:
    """For two listeners."""
    with serving(model, listeners=2) as server:
        yield server


def ask(server: Server, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, str]:
    """(status, body) of a request; `path` goes out as it is."""
    place = urlsplit(server.url)
    connection = http.client.HTTPConnection("127.0.0.1", place.port, timeout=60)
    given = {"Host": place.netloc, "Origin": f"http://{place.netloc}"} | headers
    connection.request(method, path, body, {name: value for name, value in given.items() if value})
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, text


def wav(waveform: np.ndarray, rate: int = RATE, **more: Any) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, waveform, rate, format="WAV", **more)
    return file.getvalue()


def tone(seconds: float, rate: int = RATE) -> np.ndarray:
    return 0.5 * np.sin(np.arange(int(seconds * rate)) * (2 * np.pi * 220 / rate))


def test_a_stream_is_that_of_generate_and_is_made_no_further_than_asked(server: Server, model: Pretrained) -> None:
    with Listener(server.url) as listener:
        stream, lead = listener.begin(seed=3)
        assert (stream, lead) == (1, 0)
        heard = listener.hear(stream, RATE)
        with pytest.raises(TimeoutError):  # the buffer is full
            listener.piece(0.5)
        np.testing.assert_array_equal(heard, samples(model.generate(1.0, seed=3)[0]))
        heard = listener.hear(stream, RATE + 1, heard)
        assert len(heard) == RATE + RATE // 10  # a piece more
        stream, _ = listener.begin(seed=4)
        assert stream == 2
        np.testing.assert_array_equal(listener.hear(stream, RATE // 2), samples(model.generate(0.5, seed=4)[0]))


def test_nobody_is_served_further_ahead_than_the_buffer(server: Server) -> None:
    with Listener(server.url) as listener:
        stream, _ = listener.begin()
        listener.send("ask", stream=stream, until=2**31 - 1, played=0)
        end = 0
        with contextlib.suppress(TimeoutError):
            while True:
                _, position, sound = listener.piece(2)
                end = position + len(sound)
        assert end == MOST_AHEAD_SECONDS * RATE


def test_settings_act_from_a_place_on_and_what_was_made_beyond_is_made_again(server: Server) -> None:
    with Listener(server.url) as listener:
        stream, _ = listener.begin(seed=5)
        plain = listener.hear(stream, 2 * RATE)
        listener.send("settings", stream=stream, start=RATE + 1, temperature=0.05, top_p=1.0)
        _, position, cold = listener.piece()
        assert position == RATE + RATE // 10
        for _ in range(8):
            cold = np.concatenate([cold, listener.piece()[2]])
        assert len(cold) == len(plain) - position and (cold != plain[position:]).mean() > 0.5
        # A place that is behind all that was made: nothing is made again.
        listener.send("settings", stream=stream, start=2**31 - 1, temperature=1.0, top_p=0.5)
        with pytest.raises(TimeoutError):
            listener.piece(0.5)
        listener.send("ask", stream=stream, until=2 * RATE + 1, played=RATE)
        assert listener.piece()[1] == 2 * RATE


def test_two_hear_their_own_streams_and_a_third_is_told(server: Server, model: Pretrained) -> None:
    with Listener(server.url) as one, Listener(server.url) as other:
        first, second = one.begin(seed=1)[0], other.begin(seed=2)[0]
        with Listener(server.url) as third:
            assert third.first["type"] == "error" and "all 2 places are taken" in third.first["message"]
            with pytest.raises(ConnectionClosed) as closed:
                third.socket.recv(10)
            assert closed.value.rcvd is not None and closed.value.rcvd.code == 1013
        one.send("ask", stream=first, until=RATE, played=0)  # and does not take what it gets
        np.testing.assert_array_equal(other.hear(second, RATE), samples(model.generate(1.0, seed=2)[0]))
        np.testing.assert_array_equal(one.hear(first, RATE), samples(model.generate(1.0, seed=1)[0]))
    begins_again(server)


def begins_again(server: Server) -> None:
    """A place is free, and the server plays."""
    for _ in range(100):
        with Listener(server.url) as listener:
            if listener.first["type"] == "hello":
                stream, _ = listener.begin()
                assert len(listener.hear(stream, 1)) == RATE // 10
                return
        time.sleep(0.05)
    raise AssertionError("no place became free")


def test_a_listener_that_vanishes_frees_its_place(server: Server) -> None:
    """Without a goodbye, while pieces are made for it."""
    for _ in range(4):
        listener = Listener(server.url)
        stream, _ = listener.begin()
        listener.send("ask", stream=stream, until=10 * RATE, played=0)
        listener.socket.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        listener.socket.socket.shutdown(socket.SHUT_RDWR)
        listener.socket.socket.close()
        begins_again(server)


@pytest.mark.parametrize(
    "rubbish",
    [
        "", "nonsense", "[]", "1", "{}", '{"type": "dance"}', "[" * 900, b"\0\1\2", "x" * 2_000, b"\xff" * 70_000,
        '{"type": "ask", "stream": 1, "until": 1e9, "played": 0}',
        '{"type": "ask", "stream": 1, "until": -1, "played": 0}',
        '{"type": "ask", "stream": true, "until": 1, "played": 0}',
        '{"type": "begin", "seed": 99999999999, "prompt": false}',
        '{"type": "begin", "seed": 1, "prompt": "/etc/passwd"}',
        '{"type": "settings", "stream": 1, "start": 0, "temperature": 0, "top_p": 1}',
        '{"type": "settings", "stream": 1, "start": 0, "temperature": NaN, "top_p": 1}',
        '{"type": "settings", "stream": 1, "start": 0, "temperature": 1, "top_p": "1"}',
    ],
)  # fmt: skip
def test_rubbish_is_closed(server: Server, rubbish: str | bytes, capfd: pytest.CaptureFixture[str]) -> None:
    """And another listener hears on."""
    with Listener(server.url) as other, Listener(server.url) as listener:
        stream, _ = other.begin()
        listener.socket.send(rubbish)
        with pytest.raises(ConnectionClosed) as closed:
            listener.socket.recv(60)
        assert closed.value.rcvd is None or closed.value.rcvd.code in (1003, 1007, 1008, 1009)
        assert len(other.hear(stream, 1)) == RATE // 10
    begins_again(server)
    assert capfd.readouterr().err == ""


def test_a_flood_is_closed(server: Server) -> None:
    with Listener(server.url) as listener:
        with pytest.raises(ConnectionClosed) as closed:
            for _ in range(100_000):
                listener.send("ask", stream=0, until=1, played=0)
            listener.socket.recv(60)
        assert closed.value.rcvd is None or closed.value.rcvd.code == 1008
    begins_again(server)


def test_silence_ends(model: Pretrained, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers, "_PAUSE_SECONDS", 0.2)
    with serving(model) as server, Listener(server.url) as listener:
        with pytest.raises(ConnectionClosed) as closed:
            listener.socket.recv(60)
        assert closed.value.rcvd is not None and "press play" in closed.value.rcvd.reason


@pytest.mark.parametrize(
    "options",
    [
        {"origin": "http://elsewhere.example"},
        {"origin": None},
        {"origin": "null"},
        {"origin": "http://127.0.0.1:1"},
    ],
    ids=str,
)
def test_another_origin_is_refused(server: Server, options: dict[str, Any]) -> None:
    with pytest.raises(InvalidStatus) as status:
        Listener(server.url, **options)
    assert status.value.response.status_code == 403
    origin = options["origin"] or ""
    assert ask(server, "POST", "/prompt/x", b"", Origin=origin)[0] == 403
    assert ask(server, "GET", "/", Origin=origin)[0] == 200


def test_another_host_is_refused(server: Server) -> None:
    """A stranger's name that leads here: its page would be of the same origin as its address."""
    for name in ("elsewhere.example", "elsewhere.example:80", "127.0.0.1.elsewhere.example", "10.0.0.1", "a b", ""):
        status, text = ask(server, "GET", "/", Host=name or " ", Origin=f"http://{name}")
        assert status in (400, 403) and "listen" not in text, name
    for name in ("localhost", f"127.0.0.1:{server.port}", "LOCALHOST:9000", "[::1]:8"):  # a tunnel has its own port
        assert ask(server, "GET", "/", Host=name)[0] == 200


def test_paths_reach_no_file(server: Server) -> None:
    here = Path(servers.__file__).parent
    for path in (
        "/server.py", "/templates/listen.css", "/listen.css", "/..", "/../server.py", "/%2e%2e/server.py",
        "//etc/passwd", "/..%2f..%2f..%2f..%2fetc%2fpasswd", str(here / "server.py"), "/listen.js/../server.py",
        "/prompt/../server.py", "/model.safetensors", "/config.json", "/%00", "/listen.js%00", "/stream",
        "/favicon.ico", "/prompt/x",
    ):  # fmt: skip
        status, text = ask(server, "GET", path)
        assert status == 404 and text == "There is nothing here.\n", path
    assert ask(server, "POST", "/")[0] == 405 or ask(server, "POST", "/")[0] == 404
    assert ask(server, "GET", "/listen.js")[0] == ask(server, "GET", "/player.js")[0] == 200


def test_the_page_asks_for_nothing_from_elsewhere(server: Server) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.request("GET", "/")
    answer = connection.getresponse()
    text = answer.read().decode()
    policy = answer.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy and "script-src 'self'" in policy
    assert answer.headers["Referrer-Policy"] == "no-referrer" and answer.headers["Cache-Control"] == "no-store"
    assert re.findall(r'(?:src|href)="([^"]*)"', text) == ["data:,", "listen.js"] and "url(" not in text
    connection.close()


def test_a_name_is_escaped(model: Pretrained) -> None:
    with serving(model, name="<script>alert(1)</script>\"'") as server:
        _, text = ask(server, "GET", "/")
    assert "<script>alert" not in text and "&lt;script&gt;alert(1)&lt;/script&gt;&#34;&#39;" in text


def test_another_address_needs_the_token_of_its_url(model: Pretrained) -> None:
    with serving(model, host="0.0.0.0") as server:
        token = urlsplit(server.url).path.strip("/")
        assert len(token) >= 32
        url = f"http://127.0.0.1:{server.port}/{token}/"
        for path in ("/", "/listen.js", "/prompt/x", f"/{token[:-1]}/", f"/{token}x/", "/%00/"):
            status, text = ask(server, "GET", path)
            assert status == 403 and "lacks its token" in text, path
        for name in ("", "wrong/"):
            with pytest.raises(InvalidStatus) as refusal:
                Listener(f"http://127.0.0.1:{server.port}/{name}")
            assert refusal.value.response.status_code == 403
        assert ask(server, "GET", f"/{token}/", Host="elsewhere.example")[0] == 403
        assert ask(server, "GET", f"/{token}/", Host=f"10.1.2.3:{server.port}")[0] == 200
        with Listener(url) as listener:
            stream, _ = listener.begin()
            assert len(listener.hear(stream, 1)) == RATE // 10


@pytest.mark.parametrize("rate", [RATE, 44_100])
def test_a_prompt_is_continued(server: Server, model: Pretrained, rate: int) -> None:
    """Two seconds of it are heard first, then what follows all of it, its length but for a part of a tenth."""
    unit = 400 // model.model.multiple * model.model.multiple
    kept = 12_200 // unit * unit
    content = wav(np.stack([tone(3.05, rate)] * 2, axis=1), rate)
    with Listener(server.url) as listener:
        status, text = ask(server, "POST", f"/prompt/{listener.first['id']}", content)
        assert (status, json.loads(text)) == (200, {"seconds": kept / RATE})
        stream, lead = listener.begin(seed=6, prompt=True)
        assert lead == 2 * RATE
        sound = listener.hear(stream, 3 * RATE)
    if rate == RATE:
        given = np.float32(soundfile.read(io.BytesIO(content), dtype="float32")[0][:, 0])
        tokens = model.voice.codec.encode(given)[-kept:]
        (first, *pieces) = model.voice.pieces(kept + RATE, prompt=tokens, chunk=RATE // 10, seed=6)
        expected = np.concatenate([first.sound[0][-2 * RATE :], *(piece.sound[0] for piece in pieces)])
        np.testing.assert_array_equal(sound, samples(expected))
    else:
        expected = model.voice.codec.decode(model.voice.codec.encode(np.float32(tone(3.05))))[-2 * RATE :]
        assert np.corrcoef(sound[: 2 * RATE], expected)[0, 1] > 0.99


HOUR = {"samplerate": 8_000, "format": "FLAC", "subtype": "PCM_16"}


def compressed(seconds: int) -> bytes:
    """A small file that holds a long recording."""
    file = io.BytesIO()
    with soundfile.SoundFile(file, "w", channels=1, **HOUR) as sound:
        for _ in range(seconds // 60):
            sound.write(np.full(60 * 8_000, 0.25))
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "status", "said"),
    [
        (lambda: b"", 400, "not audio"),
        (lambda: b"<html>" * 100, 400, "not audio"),
        (lambda: wav(tone(1))[:20], 400, "not audio"),
        (lambda: wav(np.zeros(RATE)), 400, "silent"),
        (lambda: wav(np.full(RATE, 0.25)), 400, "silent"),
        (lambda: wav(tone(0.02)), 400, "shorter than 0.10 s"),
        (lambda: wav(tone(61)), 400, "longer than 60 s"),
        (lambda: compressed(3_600), 400, "longer than 60 s"),
        (lambda: wav(np.full(RATE, np.nan), subtype="FLOAT"), 400, "not finite"),
        (lambda: wav(tone(1), 100), 400, "a sample rate of 100 Hz"),
        (lambda: wav(tone(0)), 400, "no samples"),
        (lambda: bytes(50_000_001), 413, "50.0 MB; give at most 50 MB"),
    ],
    ids=["empty", "html", "cut", "silent", "constant", "short", "long", "bomb", "nan", "slow", "nothing", "large"],
)
def test_a_bad_prompt_is_refused_and_the_server_plays_on(
    server: Server, content: Any, status: int, said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with Listener(server.url) as listener:
        path = f"/prompt/{listener.first['id']}"
        try:
            got, text = ask(server, "POST", path, content())
        except (BrokenPipeError, ConnectionResetError):  # it does not read what is too large
            assert status == 413
        else:
            assert (got, said in json.loads(text)["message"]) == (status, True), text
        stream, _ = listener.begin()
        assert len(listener.hear(stream, 1)) == RATE // 10
    assert capfd.readouterr().err == ""


def test_what_is_too_large_is_refused_before_it_has_arrived(server: Server) -> None:
    with Listener(server.url) as listener, socket.create_connection(("127.0.0.1", server.port), 60) as raw:
        host = f"127.0.0.1:{server.port}"
        head = f"POST /prompt/{listener.first['id']} HTTP/1.1\r\nHost: {host}\r\nOrigin: http://{host}\r\n"
        raw.sendall(f"{head}Content-Length: 900000000\r\n\r\n".encode() + bytes(1_000))
        assert raw.recv(4_096).startswith(b"HTTP/1.1 413 ")
        status, text = ask(server, "POST", "/prompt/of_nobody", wav(tone(1)))
        assert status == 404 and "press play first" in text


def test_a_prompt_of_many_channels_needs_little_memory() -> None:
    """A block of a thousand channels is as large as one of a single channel."""
    codec_rate = 8_000
    codec = harmonic.voice.Codec("mu_law", 256, codec_rate)
    sound = np.repeat(tone(0.5, codec_rate)[:, None], 1_000, axis=1)
    tokens = prompts.read(wav(sound, codec_rate, subtype="PCM_16"), codec, (800, 8_000))
    assert tokens.shape == (4_000, 1)


def test_ports_and_addresses(model: Pretrained) -> None:
    voice = model.voice
    with Server(voice, name="a", port=31_000) as first, Server(voice, name="b", port=first.port) as second:
        assert first.port < second.port
    for host in ("nowhere.invalid", "256.1.1.1", "192.0.2.7"):
        with pytest.raises(UserError, match=r"give (one of its own|another --host)"):
            Server(voice, name="c", host=host)


def test_the_command(server: Server, tmp_path: Path) -> None:
    """It takes the next port where one is taken, says so, plays, and ends at Ctrl-C while somebody listens."""
    export = make_export(tmp_path / "tiny", RATE)
    with Command(f"--model={export}", "--listeners=1", f"--port={server.port}") as command:
        assert f"port {server.port} is in use; this is {urlsplit(command.url).port}" in command.lines
        assert any("times as fast as it plays" in line for line in command.lines)
        with Listener(command.url) as listener:
            stream, _ = listener.begin()
            assert len(listener.hear(stream, RATE)) == RATE
            with Listener(command.url) as late:
                assert "the one place is taken" in late.first["message"]
            assert command.interrupt() == (0, "stopped\n", "")
            with pytest.raises(ConnectionClosed) as closed:
                listener.socket.recv(10)
            assert closed.value.rcvd is not None and closed.value.rcvd.code == 1012


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--workdir=runs/none",), "runs/none is not a run's folder"),
        pytest.param(("--model=nowhere",), "neither a folder nor a model of the hub", marks=pytest.mark.slow),
        pytest.param(("--model=a", "--workdir=b"), "give one of them", marks=pytest.mark.slow),
        pytest.param(("--model=a", "--config=demo"), "with its own config", marks=pytest.mark.slow),
        pytest.param(("--listeners=0",), "listeners", marks=pytest.mark.slow),
    ],
)
def test_wrong_commands(tmp_path: Path, flags: tuple[str, ...], said: str) -> None:
    line = refused("workflows.listen", *flags, cwd=tmp_path)
    assert said in line, line
