"""Local worker processes, forked from one that has imported Beam.

Importing Beam takes longer than preparing an hour of audio. A server imports it once, while the process that started it
lists the recordings, and forks a worker each time that Beam asks for one. Beam asks by a shell command, which hands its
environment on to the server by a local socket, and lives as long as the worker does.
"""

from __future__ import annotations

import gc
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
# What Beam imports where it is there, for steps that are not used here.
_UNUSED = ("google.cloud.bigquery", "google.cloud.pubsub", "pandas", "pymongo")
_LONGEST_PATH = 60  # of a folder: sockets have 104 bytes for theirs
_GRACE_SECONDS = 5.0  # for Beam to notice that a worker was lost


class LocalWorkers:
    """The server, and its workers. A context manager, within which Beam is best imported at once.

    Attributes:
      command: the shell command that starts a worker.
    """

    def __enter__(self) -> LocalWorkers:
        short = None if len(tempfile.gettempdir()) <= _LONGEST_PATH else "/tmp"
        self._folder = tempfile.TemporaryDirectory(prefix="harmonic-workers-", dir=short)
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(os.path.join(self._folder.name, "socket"))
            listener.listen()
            # The end of its standard input tells it and the workers that this process is gone, however it ended.
            self._server = subprocess.Popen(
                [sys.executable, "-c", f"from {__name__} import serve; serve({listener.fileno()})"],
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
        """Whether a worker has ended before its time or could not begin, or does within `wait` seconds."""
        until, mark = time.monotonic() + wait, os.path.join(self._folder.name, "lost")
        while not (found := os.path.exists(mark)) and time.monotonic() < until:
            time.sleep(0.05)
        return found

    def _watch(self) -> None:
        """Beam waits for a worker for ever that has never begun."""
        while not self._ended.wait(0.5):
            if self.lost():
                if not self._ended.wait(_GRACE_SECONDS) and self._in_main_thread:
                    os.kill(os.getpid(), signal.SIGINT)  # which alone ends a wait
                return


def leave_out_unused() -> None:
    """Keeps Beam, before its first import in a process that is all ours, from importing what a local run does not use:
    a third of the time."""
    for name in _UNUSED:
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]


def serve(listener_fd: int) -> None:
    """Forks a worker for each connection, until the process that started this one is gone."""
    listener = socket.socket(fileno=listener_fd)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all: leave when the parent has
    gc.disable()  # it would go over all that is being imported again and again
    handler = logging.StreamHandler()
    handler.setLevel(logging.CRITICAL)
    logging.getLogger().addHandler(handler)
    leave_out_unused()
    import apache_beam.runners.worker.sdk_worker_main  # noqa: F401

    import pipelines.beam.steps  # noqa: F401

    gc.freeze()
    gc.enable()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the workers
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

        # To where Beam prints every error that it reports anyway, and gRPC, below Python, that it was told to end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
        sdk_worker_main.main([])
        connection.sendall(b"0")
    except BaseException:
        os._exit(1)
    os._exit(0)  # not through the interpreter's end, where native modules tell of objects that an error left


def _leave_with_parent() -> NoReturn:
    os.read(sys.stdin.fileno(), 1)
    os._exit(1)
