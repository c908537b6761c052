"""Importing Beam: quietly, and without what a local run does not use."""

from __future__ import annotations

import contextlib
import gc
import logging
import sys
from collections.abc import Iterator

# Beam imports these where they are installed, for steps that are not used here.
_UNUSED = ("google.cloud.bigquery", "google.cloud.pubsub", "pandas", "pymongo")


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Switches the collection of cycles off while many objects are made that all stay: each pass visits all of them."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def import_beam() -> None:
    """Imports Beam without its log line about a missing client of a service that is not used here."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        with uncollected():
            import apache_beam  # noqa: F401
    finally:
        root.setLevel(level)


def leave_out_unused() -> None:
    """Keeps Beam from importing what a local run does not use, a third of its import time.

    Call it before Beam's first import, and only in a process that runs nothing else.
    """
    for name in _UNUSED:
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]
