"""One writer at a time for a folder or a file. Standard library only: data workers import it too.

The kernel keeps the lock (flock), so it ends with the process that holds it, however the process ends. The lock file's
text only tells others who that is.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import json
import os
import shlex
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from harmonic.errors import UserError
from harmonic.files import cannot_write

_WITHOUT = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP}  # from file systems without locks
_ATTEMPTS = 100
_held: dict[str, int] = {}  # how many times this process holds each lock file


@contextlib.contextmanager
def writing(folder: str | os.PathLike[str], *, file: str | os.PathLike[str] | None = None) -> Iterator[None]:
    """Keeps other processes from writing to `folder`. One process may hold the lock several times.

    Args:
      folder: made if it does not exist, and removed at the end if it is empty then.
      file: the lock file; `.lock` in the folder if None. It is removed at the end; after a kill it stays, and the next
        writer takes it over.

    Raises:
      UserError: another process holds the lock (the message says which, and since when), or the file cannot be made.
    """
    folder = Path(folder)
    path = os.path.realpath(file or folder / ".lock")
    if path in _held:
        _held[path] += 1
        try:
            yield
        finally:
            _held[path] -= 1
        return
    parent = os.path.dirname(path)
    made = not os.path.isdir(parent)
    for attempt in itertools.count(1):
        try:
            os.makedirs(parent, exist_ok=True)
            descriptor = _take(path, folder)
            break
        except (FileExistsError, FileNotFoundError) as error:
            # Another process may have removed the empty folder between makedirs and open.
            if attempt == _ATTEMPTS or (os.path.lexists(parent) and not os.path.isdir(parent)):
                raise cannot_write(folder, error) from error
        except OSError as error:
            raise cannot_write(folder, error) from error
    _held[path] = 1
    try:
        yield
    finally:
        del _held[path]
        with contextlib.suppress(OSError):
            os.unlink(path)  # before unlocking: a process that has it open then sees in `is_at` that it is gone
        os.close(descriptor)
        if made:
            with contextlib.suppress(OSError):
                os.rmdir(parent)


@contextlib.contextmanager
def locked_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """The file, open to read and to append, made if need be; waits until no other process has it locked."""
    while True:
        with open(path, "a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if is_at(file.fileno(), path):
                yield file
                return


def is_at(descriptor: int, path: str | os.PathLike[str]) -> bool:
    """Whether an open file is still the file at `path`: another process may have renamed or removed it."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _take(path: str, folder: Path) -> int:
    """The descriptor of the lock file, locked."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _holder(descriptor)
            os.close(descriptor)
            raise UserError(
                f"{folder} is being written by another process{holder}; wait for it, or end it, or give another folder"
            ) from None
        except OSError as error:
            if error.errno not in _WITHOUT:
                os.close(descriptor)
                raise
            print(f"{folder} is on a file system without locks: let no two processes write to it", file=sys.stderr)
        if is_at(descriptor, path):
            break
        os.close(descriptor)  # its last holder has just removed it
    about = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "command": shlex.join(sys.orig_argv)[:250],
    }
    with contextlib.suppress(OSError):  # a full disk: the lock holds without the text
        os.ftruncate(descriptor, 0)
        os.write(descriptor, json.dumps(about).encode() + b"\n")
    return descriptor


def _holder(descriptor: int) -> str:
    """Which process holds the lock, from the lock file's text, for a message."""
    try:
        about = json.loads(os.pread(descriptor, 4_096, 0))
        who = f" (pid {about['pid']} on {about['host']}, since {about['since']}: {about['command']})"
        return " " + " ".join(who.split())[:400]  # one line, whatever the command holds
    except (OSError, ValueError, KeyError, TypeError):
        return ""  # the holder has not written its text yet
