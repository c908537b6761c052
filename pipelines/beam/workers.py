"""Local worker processes, forked from a server that has imported Beam.

Importing Beam takes longer than preparing an hour of audio. The server imports it once, while the launcher lists the
recordings, and forks a worker each time that Beam runs its shell command for one. The command sends its environment to
the server through a local socket, and lives as long as the worker does.
"""

from __future__ import annotations

import gc
import importlib
import json
import logging
import os
import select
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from typing import NoReturn

from pipelines.beam.loading import leave_out_unused

_CLIENT = """
import json, os, signal, socket, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
folder = sys.argv[1]
ended = b""
try:
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(os.path.join(folder, "socket"))
        server.sendall(json.dumps(dict(os.environ)).encode())
        server.shutdown(socket.SHUT_WR)
        ended = server.recv(1)
finally:
    if not ended and os.path.isdir(folder):
        open(os.path.join(folder, "lost"), "w").close()
    os._exit(0)
"""
_LONGEST_PATH = 60  # of the socket's folder: a socket's path has 104 bytes at most
_GRACE_SECONDS = 5.0  # for Beam to notice a lost worker


class LocalWorkers:
    """The server, and its workers. A context manager.

    Args:
      preload: the module that the server imports besides Beam, so that its workers have it.

    Attributes:
      command: the shell command that starts a worker.
    """

    def __init__(self, preload: str):
        self._preload = preload

    def __enter__(self) -> LocalWorkers:
        short = None if len(tempfile.gettempdir()) <= _LONGEST_PATH else "/tmp"
        self._folder = tempfile.TemporaryDirectory(prefix="harmonic-workers-", dir=short)
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(os.path.join(self._folder.name, "socket"))
            listener.listen()
            # When this process ends, in any way, the server and the workers see the end of their standard input.
            self._server = subprocess.Popen(
                [sys.executable, "-c", f"from {__name__} import serve; serve({listener.fileno()}, {self._preload!r})"],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                pass_fds=[listener.fileno()],
            )
        self.command = f"exec {shlex.join([sys.executable, '-S', '-E', '-c', _CLIENT, self._folder.name])}"
        self._in_main_thread = threading.current_thread() is threading.main_thread()
        self._ended = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._server.kill()
        self._server.wait()
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._folder.cleanup()

    def lost(self, wait: float = 0.0) -> bool:
        """Whether a worker has died or could not start, now or within `wait` seconds."""
        until, mark = time.monotonic() + wait, os.path.join(self._folder.name, "lost")
        while not (found := os.path.exists(mark)) and time.monotonic() < until:
            time.sleep(0.05)
        return found

    def _watch(self) -> None:
        """Ends Beam's wait for a lost worker: it waits for ever for one that never started."""
        while not self._ended.wait(0.5):
            if self.lost():
                if not self._ended.wait(_GRACE_SECONDS) and self._in_main_thread:
                    os.kill(os.getpid(), signal.SIGINT)  # nothing else ends the wait
                return


def serve(listener_fd: int, preload: str) -> None:
    """Forks a worker for each connection, until the launcher is gone.

    Args:
      listener_fd: descriptor of the listening socket.
      preload: as for `LocalWorkers`.
    """
    listener = socket.socket(fileno=listener_fd)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all processes: end with the launcher instead
    gc.disable()  # each collection would visit all that has been imported
    handler = logging.StreamHandler()
    handler.setLevel(logging.CRITICAL)
    logging.getLogger().addHandler(handler)
    leave_out_unused()
    import apache_beam.runners.worker.sdk_worker_main  # noqa: F401

    importlib.import_module(preload)

    gc.freeze()
    gc.enable()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no parent waits for the workers
    while sys.stdin not in select.select([listener, sys.stdin], [], [])[0]:
        connection, _ = listener.accept()
        with connection:
            if os.fork() == 0:
                _work(connection)


def _work(connection: socket.socket) -> NoReturn:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    try:
        given = b"".join(iter(lambda: connection.recv(1 << 16), b""))
        os.environ.clear()
        os.environ.update(json.loads(given))
        from apache_beam.runners.worker import sdk_worker_main

        # Beam prints every error there that it also reports, and gRPC that it was told to end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
        sdk_worker_main.main([])
        connection.sendall(b"0")
    except BaseException:
        os._exit(1)
    os._exit(0)  # skips the interpreter's end, where native modules print about objects that an error has left


def _leave_with_parent() -> NoReturn:
    os.read(sys.stdin.fileno(), 1)
    os._exit(1)
