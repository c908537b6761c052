"""Files that are whole or absent, JSON, users' Python files, errors that name the file, checksums of a folder.

Standard library only.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib.util
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from harmonic.errors import UserError, one_line

_FULL = {
    errno.ENOSPC: "no space is left",
    errno.EDQUOT: "the quota is used up",
    errno.EFBIG: "a file may not become that large",
}
_LINE = re.compile(r"([0-9a-f]{64})  (.+)")


@contextlib.contextmanager
def write_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turns an OSError while `path` is written into a UserError that names the path and the way out."""
    try:
        yield
    except OSError as error:
        raise cannot_write(path, error) from error


def cannot_write(path: str | os.PathLike[str], error: OSError) -> UserError:
    """The line for a file or folder that cannot be written."""
    if error.errno in _FULL:
        return UserError(f"cannot write {path}: {_FULL[error.errno]}; make room there, then the same command goes on")
    return UserError(f"cannot write {path}: {error.strerror or error}; make it writable, or give another folder")


@contextlib.contextmanager
def refusing(
    path: str | os.PathLike[str], remedy: str, *errors: type[Exception], kind: str | None = None
) -> Iterator[None]:
    """Turns errors while `path` is read into a UserError that names the path and the way out.

    Args:
      path: the file that is read.
      remedy: the way out, the end of the line.
      errors: besides OSError, which errors a damaged file causes.
      kind: the format that the file should have.
    """
    caught: tuple[type[Exception], ...] = (OSError, *errors)
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{path} is missing; {remedy}") from None
    except caught as error:
        form = f" as {kind}" if kind else ""
        raise UserError(f"{path} cannot be read{form} ({one_line(error)}); {remedy}") from error


def write_whole(path: str | os.PathLike[str], data: str | bytes) -> None:
    """Writes a file, whole or not at all, even if the machine loses power.

    Raises:
      UserError: the file cannot be written; an earlier file of that name is unchanged.
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


def read_json(path: str | os.PathLike[str], *, remedy: str | None = None) -> Any:
    """The value in a JSON file; without `remedy`, None for a file that is missing or damaged.

    Raises:
      UserError: with `remedy`, which ends the line: the file is missing or damaged.
    """
    try:
        with refusing(path, remedy or "", ValueError, RecursionError, kind="JSON"):
            return json.loads(Path(path).read_bytes())
    except UserError:
        if remedy is None:
            return None
        raise


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes a value as JSON, whole or not at all.

    Raises:
      UserError: the file cannot be written.
    """
    write_whole(path, json.dumps(value, indent=2) + "\n")


def checksums(folder: Path, *, but: str) -> str:
    """A line `<SHA-256>  <path>`, as `sha256sum -c` reads it, for each file below `folder` except the file `but`."""
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
    """The files below `folder` that are missing, changed or new since `checksums` wrote its file `listing`.

    Returns:
      Their names; None if there is no such listing.

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


def run_file(path: Path, what: str, instead: str) -> ModuleType:
    """The module that a user's Python file makes.

    Args:
      what, instead: for the error: what the file is, and what to give if it is not there.

    Raises:
      UserError: it is not there, or cannot be run.
    """
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise UserError(f"{what} does not exist; {instead}")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except UserError:
        raise
    except Exception as error:  # whatever the file does wrong
        raise UserError(f"{what} cannot be run: {type(error).__name__}: {' '.join(str(error).split())}") from error
    return module
