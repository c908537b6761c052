"""Files that are whole or absent, errors that name them, and checksums over a folder. Standard library only."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from harmonic.errors import UserError

_FULL = {
    errno.ENOSPC: "no space is left",
    errno.EDQUOT: "the quota is used up",
    errno.EFBIG: "a file may not become that large",
}
_LINE = re.compile(r"([0-9a-f]{64})  (.+)")


@contextlib.contextmanager
def write_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turns an operating system's error while `path` is written into a UserError that names it and the way out."""
    try:
        yield
    except OSError as error:
        raise cannot_write(path, error) from error


def cannot_write(path: str | os.PathLike[str], error: OSError) -> UserError:
    """The line for a file or folder that cannot be written."""
    if error.errno in _FULL:
        return UserError(f"cannot write {path}: {_FULL[error.errno]}; make room there, then the same command goes on")
    return UserError(f"cannot write {path}: {error.strerror or error}; make it writable, or give another folder")


def write_whole(path: str | os.PathLike[str], data: str | bytes) -> None:
    """Writes a file, whole or not at all, also should the machine lose power.

    Raises:
      UserError: it cannot be written; what stood there stays.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".partial")
    with write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                file.write(data.encode() if isinstance(data, str) else data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise


def checksums(folder: Path, *, but: str) -> str:
    """A line `<SHA-256>  <path>` for each file below `folder`, but for the file `but`: what `sha256sum -c` reads."""
    lines = []
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        if name != but:
            lines.append(f"{_digest(path)}  {name}\n")
    return "".join(lines)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def changes(folder: Path, listing: str) -> list[str] | None:
    """The files below `folder` that are not as its file `listing` says, written from `checksums`: missing, changed, or
    more than there were. None if there is no such listing.

    Raises:
      UserError: a file is there and cannot be read.
    """
    try:
        text = (folder / listing).read_bytes().decode(errors="replace")
        matches = [_LINE.fullmatch(line) for line in text.removesuffix("\n").split("\n")]
        listed = {match[2]: match[1] for match in matches if match}
        if not text.endswith("\n") or len(listed) != len(matches):
            return [listing]
        found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
        del found[listing]
        digests = {name: _digest(path) for name, path in found.items()}
        return sorted(name for name in {**listed, **digests} if digests.get(name) != listed.get(name))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"cannot read {error.filename or folder}: {error.strerror or error}; mend that") from error
