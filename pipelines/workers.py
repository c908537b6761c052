"""Local worker processes, forked from one that has imported Beam.

Importing Beam takes longer than preparing an hour of audio. A server imports it once, while the process that started it
lists the recordings, and forks a worker each time that Beam asks for one. Beam asks by a shell command, which hands its
environment on to the server by a local socket, and lives as long as the worker does.
"""

from __future__ import annotations

import contextlib
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
from collections.abc import Iterator
from typing import NoReturn

_CLIENT = """
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect(sys.argv[1])
    server.sendall(json.dumps(dict(os.environ)).encode())
    server.shutdown(socket.SHUT_WR)
    sys.exit(server.recv(1) != b"0")
"""
# What Beam imports where it is there, for steps that are not used here.
_UNUSED = ("google.cloud.bigquery", "google.cloud.pubsub", "pandas", "pymongo")
_LONGEST_PATH = 60  # of a folder: sockets have 104 bytes for theirs


@contextlib.contextmanager
def local_workers() -> Iterator[str]:
    """Starts the server; yields the shell command that starts a worker. Within, Beam is best imported at once."""
    folder = None if len(tempfile.gettempdir()) <= _LONGEST_PATH else "/tmp"
    with (
        tempfile.TemporaryDirectory(prefix="harmonic-workers-", dir=folder) as folder,
        socket.socket(socket.AF_UNIX) as listener,
    ):
        path = os.path.join(folder, "socket")
        listener.bind(path)
        listener.listen()
        # That its standard input ends tells the server and the workers that this process is gone, however it ended.
        server = subprocess.Popen(
            [sys.executable, "-c", f"from {__name__} import serve; serve({listener.fileno()})"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            pass_fds=[listener.fileno()],
        )
        try:
            yield f"exec {shlex.join([sys.executable, '-S', '-E', '-c', _CLIENT, path])}"
        finally:
            server.kill()
            server.wait()
            assert server.stdin is not None
            server.stdin.close()


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

    import pipelines.transforms  # noqa: F401

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

        sys.stderr = open(os.devnull, "w")  # to where it prints every error that it reports anyway
        sdk_worker_main.main([])
        connection.sendall(b"0")
    except BaseException:
        os._exit(1)
    os._exit(0)  # not through the interpreter's end, where native modules tell of objects that an error left


def _leave_with_parent() -> NoReturn:
    os.read(sys.stdin.fileno(), 1)
    os._exit(1)
