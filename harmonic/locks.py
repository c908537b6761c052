"""One writer at a time for a folder. Standard library only: data workers import it too.

The lock is the kernel's (flock), so that it ends with the process that holds it, however that ends. What stands in the
file only tells others who that is.
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

from harmonic.errors import UserError
from harmonic.files import cannot_write

_WITHOUT = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP}  # file systems that know no locks
_ATTEMPTS = 100
_held: dict[str, int] = {}  # how many times this process holds each


@contextlib.contextmanager
def writing(folder: str | os.PathLike[str], *, file: str | os.PathLike[str] | None = None) -> Iterator[None]:
    """Holds `folder` against other processes that would write to it. Within a process it may be held several times.

    Args:
      folder: made if it is not there, and removed again if it is empty in the end.
      file: the lock's file; `.lock` in the folder if not given. It is removed in the end, but after a kill, when the
        next writer takes it over.

    Raises:
      UserError: another process holds it: who, and since when; or the file cannot be made.
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
            # Another process may have removed the empty folder between two looks at it.
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
            os.unlink(path)  # before it is let go: whoever opened it meanwhile finds that it is no more
        os.close(descriptor)
        if made:
            with contextlib.suppress(OSError):
                os.rmdir(parent)


def _take(path: str, folder: Path) -> int:
    """The descriptor of the locked file."""
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
            print(f"{folder} lies where files cannot be locked: let no two processes write to it", file=sys.stderr)
        if _is_at(descriptor, path):
            break
        os.close(descriptor)  # its holder has just removed it
    about = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "command": shlex.join(sys.orig_argv)[:250],
    }
    with contextlib.suppress(OSError):  # a full disk: the lock holds all the same
        os.ftruncate(descriptor, 0)
        os.write(descriptor, json.dumps(about).encode() + b"\n")
    return descriptor


def _is_at(descriptor: int, path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _holder(descriptor: int) -> str:
    try:
        about = json.loads(os.pread(descriptor, 4_096, 0))
        who = f" (pid {about['pid']} on {about['host']}, since {about['since']}: {about['command']})"
        return " " + " ".join(who.split())[:400]  # one line, whatever stood in the command
    except (OSError, ValueError, KeyError, TypeError):
        return ""  # it has only just begun
