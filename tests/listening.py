"""A model that has learnt nothing as an export, the page's server, and a listener without a page."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import jax
import numpy as np
import safetensors.numpy
from mains import ROOT
from tiny import config
from websockets.sync.client import ClientConnection, connect

from harmonic import pretrained
from harmonic.audio import pcm16
from harmonic.listen.server import Server
from harmonic.models import make


def make_export(folder: Path, sample_rate: int) -> Path:
    """An export at any sample rate: the lower it is, the faster than real time."""
    ours = config()
    arrays = pretrained.flatten(make(ours.model).init(jax.random.key(0)))
    # Logits that are sharp enough for temperature and top-p to matter.
    arrays = {name: np.asarray(leaf) * (8 if name == "head.dense.kernel" else 1) for name, leaf in arrays.items()}
    content = safetensors.numpy.save(arrays)
    about = {
        "format": pretrained.FORMAT,
        "library_name": "harmonic-rnn",
        "sample_rate": sample_rate,
        "weights": {"sha256": hashlib.sha256(content).hexdigest()},
        "data": {"loudness": None},
        "config": dataclasses.asdict(ours),
    }
    folder.mkdir(parents=True)
    (folder / pretrained.WEIGHTS).write_bytes(content)
    (folder / pretrained.CONFIG).write_text(json.dumps(about))
    return folder


def samples(sound: np.ndarray) -> np.ndarray:
    """Floats as the page gets them."""
    return np.frombuffer(pcm16(sound), "<i2")


@contextlib.contextmanager
def serving(model: pretrained.Pretrained, **options: Any) -> Iterator[Server]:
    """The server in a thread of this process."""
    with Server(model.voice, **{"name": "tiny", "port": 20_000 + os.getpid() % 10_000, **options}) as server:
        thread = threading.Thread(target=server.run)
        thread.start()
        try:
            yield server
        finally:
            server.stop()
            thread.join(60)
            assert not thread.is_alive()


class Command:
    """`python -m workflows.listen` in a process of its own; `lines` is what it has said until its page is there."""

    def __init__(self, *flags: object):
        command = [sys.executable, "-m", "workflows.listen", f"--port={20_000 + os.getpid() % 10_000}"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        del environment["XLA_FLAGS"]  # as users compile it: the other programs of tests are ten times as slow
        self.process = subprocess.Popen(
            [*command, *map(str, flags)],  # the last of two ports counts
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        self.lines: list[str] = []
        for line in self.process.stdout:
            self.lines.append(line.strip())
            if found := re.match(r"listen at (http://\S+)", line):
                self.url = found[1]
                return
        raise AssertionError((self.lines, self.process.communicate()))

    def interrupt(self) -> tuple[int, str, str]:
        """Ctrl-C: (status, the rest of what it says, errors)."""
        self.process.send_signal(signal.SIGINT)
        out, errors = self.process.communicate(timeout=60)
        return self.process.returncode, out, errors

    def __enter__(self) -> Command:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()


class Listener:
    """What the page does, without a page: it asks for pieces, and takes them."""

    def __init__(self, url: str, **options: Any):
        self.url = urlsplit(url)
        origin = f"{self.url.scheme}://{self.url.netloc}"
        address = url.replace("http", "ws", 1) + "stream"
        connection = connect(address, **{"origin": origin, "proxy": None, **options})
        self.socket: ClientConnection = connection.__enter__()
        self.first = json.loads(self.socket.recv(60))

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, kind: str, **message: Any) -> None:
        self.socket.send(json.dumps({"type": kind, **message}))

    def begin(self, seed: int = 0, prompt: bool = False) -> tuple[int, int]:
        """(the stream's number, the prompt's samples that are heard)."""
        self.send("begin", seed=seed, prompt=prompt)
        while True:
            received = self.socket.recv(120)
            if isinstance(received, str):
                message = json.loads(received)
                assert message["type"] == "begins", message
                return message["stream"], message["lead"]

    def piece(self, seconds: float = 60) -> tuple[int, int, np.ndarray]:
        """(stream, position, int16 samples) of the next piece."""
        received = self.socket.recv(seconds)
        assert isinstance(received, bytes), received
        stream, position, _ = struct.unpack_from("<IIf", received)
        return stream, position, np.frombuffer(received, "<i2", offset=12)

    def hear(self, stream: int, until: int, sound: np.ndarray | None = None) -> np.ndarray:
        """The stream up to a place, put together as the page does: a piece replaces what is there from its position."""
        sound = np.zeros(0, np.int16) if sound is None else sound
        self.send("ask", stream=stream, until=until, played=0)
        while len(sound) < until:
            number, position, samples = self.piece()
            assert number == stream and position <= len(sound)
            sound = np.concatenate([sound[:position], samples])
        return sound
