"""Recordings that are files, laid out as a data set's are."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, BinaryIO

from harmonic.errors import Unreadable, UserError, one_line
from harmonic.records import LeftOut
from pipelines.sources.base import Files, Source, SourceRecording, is_audio, natural_key
from pipelines.sources.layouts import DataSet, Misfit


class FileSource(Source):
    """Recordings that are files. Workers get how to open the files and the folder in them, not the listing."""

    def __init__(self, dataset: DataSet, files: Files):
        self._dataset, self._files = dataset, files
        self._sizes = files.sizes()
        for name in [name for name in self._sizes if not _is_utf8(name)]:
            if is_audio(name):
                raise UserError(f"{files.path} holds a name that is not UTF-8, {name!r}; rename it")
            files.leave_out("names that are not UTF-8", name)
            del self._sizes[name]
        self._deciding: set[str] = set()  # files that the layout has read
        with self._misfits():
            self._root = dataset.layout.root(self._sizes)

    def __getstate__(self) -> dict[str, Any]:
        return {"_files": self._files, "_root": self._root}

    @contextmanager
    def _misfits(self) -> Iterator[None]:
        try:
            yield
        except Misfit as error:
            way_out = error.way_out or f"give the archive or folder of {self._dataset.name}"
            raise UserError(f"{self._files.path} {error.problem}; {way_out}") from None

    @functools.cached_property
    def _listing(self) -> list[SourceRecording]:
        below = {name[len(self._root) :]: size for name, size in self._sizes.items() if name.startswith(self._root)}
        with self._misfits():
            found = self._dataset.layout.recordings(below, self._read)
            if not found:
                raise Misfit("holds no recordings")
        return [SourceRecording(id, *found[id], below[id]) for id in sorted(found, key=natural_key)]

    def _read(self, name: str) -> str:
        self._deciding.add(name)
        try:
            with self._files.open(self._root + name) as file:
                return file.read().decode("utf-8-sig")
        except (Unreadable, UnicodeDecodeError, OSError) as error:
            raise UserError(f"{name} in {self._files.path} cannot be read: {one_line(error)}; get it again") from error

    def left_out(self) -> tuple[LeftOut, ...]:
        listed = {recording.id for recording in self._listing} | self._deciding
        found = dict(self._files.left_out)
        for name in sorted(self._sizes, key=natural_key):
            if not (name.startswith(self._root) and name[len(self._root) :] in listed):
                reason = "sound files outside its layout" if is_audio(name) else "files of other kinds"
                before = found.get(reason, LeftOut(reason, 0, name))
                found[reason] = dataclasses.replace(before, files=before.files + 1)
        return tuple(found.values())

    def list(self) -> Sequence[SourceRecording]:
        return list(self._listing)

    def open(self, recording: str) -> BinaryIO:
        return self._files.open(self._root + recording)

    def fingerprint(self) -> str:
        names = [recording.id for recording in self._listing]
        digest = hashlib.sha256()
        for name in sorted([*names, *self._deciding]):
            digest.update(repr((name, *self._files.stamp(self._root + name))).encode())
        return digest.hexdigest()

    def close(self) -> None:
        self._files.close()


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
