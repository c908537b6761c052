"""Reads the JSON files of a run: a damaged file is a UserError, a value of the wrong type counts as absent."""

from __future__ import annotations

import contextlib
import json
import math
from pathlib import Path
from typing import Any

from harmonic.errors import UserError

Json = dict[str, Any]


def read_json(path: Path, *, required: bool = False) -> Json:
    """The object in a file; {} if the file does not exist and is not required.

    Raises:
      UserError: the file cannot be read or holds no JSON object.
    """
    text = _read_text(path, required)
    return {} if text is None else _parse(text, path)


def read_metrics(path: Path) -> list[Json]:
    """The objects in a metrics.jsonl, one a line.

    Raises:
      UserError: the file is missing, cannot be read, or a line is no JSON object.
    """
    lines = (_read_text(path, required=True) or "").split("\n")
    # Text after the last newline is a line that is still being written, or was cut off.
    return [_parse(line, path, n) for n, line in enumerate(lines[:-1], 1) if line.strip()]


def section(value: Any, *keys: str) -> Json:
    """An object within nested objects; {} if there is none."""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value if isinstance(value, dict) else {}


def number(value: Any, *keys: str) -> float | None:
    """A finite number within nested objects; None if there is none."""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    if isinstance(value, int | float) and not isinstance(value, bool):
        with contextlib.suppress(OverflowError):  # Python's integers can exceed every float
            return float(value) if math.isfinite(value) else None
    return None


def objects(value: Any) -> list[Json]:
    """The objects in a list; [] if it is no list."""
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _read_text(path: Path, required: bool) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        if not required:
            return None
        raise UserError(f"{path} is missing; give the folder of a run that has begun") from None
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}); give a run's folder") from error


def _parse(text: str, path: Path, line: int = 1) -> Json:
    remedy = "mend it, or delete the file and run its stage again"
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        line += error.lineno - 1
        raise UserError(f"{path}, line {line}: not JSON ({error.msg}); {remedy}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}, line {line}: not a JSON object; {remedy}")
    return value
