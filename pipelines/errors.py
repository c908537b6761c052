"""What can go wrong with disks and outputs, as a UserError."""

from __future__ import annotations

import contextlib
import errno
import tempfile
from collections.abc import Iterator

from harmonic.errors import UserError, one_line

_FULL = {errno.ENOSPC: "no space is left", errno.EDQUOT: "the quota is used up", errno.EFBIG: "a file is too large"}


def disk_full(error: BaseException) -> bool:
    """Whether an error says that there is no room on a disk."""
    return isinstance(error, OSError) and error.errno in _FULL


@contextlib.contextmanager
def scratch_errors(folder: str | None = None) -> Iterator[None]:
    """Turns a full disk into a UserError; other errors pass. `folder` defaults to that of temporary files."""
    try:
        yield
    except OSError as error:
        if not disk_full(error):
            raise
        way_out = "" if folder else ", where temporary files go, or set TMPDIR to another disk"
        folder = folder or tempfile.gettempdir()
        raise UserError(f"{_FULL[error.errno or 0]} in {folder}; make room there{way_out}") from error


@contextlib.contextmanager
def output_errors(folder: str) -> Iterator[None]:
    """Turns any error of the output's file system into a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        cause = _root(error)
        if disk_full(cause):
            reason = f"{_FULL[getattr(cause, 'errno', 0)]}; make room there"
        elif isinstance(cause, OSError) and cause.strerror:
            reason = f"{cause.strerror}; make it writable"
        else:
            reason = one_line(error)
        raise UserError(f"cannot write to {folder}: {reason}, or give another --output_dir") from error


def _root(error: BaseException) -> BaseException:
    """The operating system's error inside those that Beam's file systems raise around it, else `error` itself."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno is not None:
            return seen
        details = getattr(seen, "exception_details", None) or {}
        seen = next((e for e in details.values() if isinstance(e, BaseException)), seen.__cause__ or seen.__context__)
    return error
