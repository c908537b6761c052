"""Paths that may be local or of a remote file system."""

from __future__ import annotations

import os


def is_local(path: str) -> bool:
    """Whether `path` is on this machine's file system, not behind a URL such as `gs://...`."""
    return "://" not in path


def join(folder: str, name: str) -> str:
    """The path of `name` in `folder`."""
    return os.path.join(folder, name) if is_local(folder) else f"{folder.rstrip('/')}/{name}"
