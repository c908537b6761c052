"""A folder on a local or mounted disk."""

from __future__ import annotations

import io
import os
import stat
from typing import Any, BinaryIO

from harmonic.errors import Unreadable, UserError
from pipelines.sources.base import HIDDEN, Files, is_hidden


class Folder(Files):
    """A folder. Links to files are followed, links to folders are not."""

    def __init__(self, path: str):
        super().__init__(path)
        self._stamps: dict[str, tuple[int, int]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_stamps": {}}

    def sizes(self) -> dict[str, int]:
        self._stamps, self.left_out = {}, {}
        folders = [""]
        while folders:
            folder = folders.pop()
            try:
                with os.scandir(os.path.join(self.path, folder)) as entries:
                    for entry in entries:
                        if is_hidden(entry.name):
                            self.leave_out(HIDDEN, folder + entry.name)
                        elif not entry.is_dir():
                            self._stamps[folder + entry.name] = _stamp(entry)
                        elif not entry.is_symlink():
                            folders.append(f"{folder}{entry.name}/")
                        else:
                            self.leave_out("links to folders, which are not followed", folder + entry.name)
            except OSError as error:
                raise UserError(f"cannot list {error.filename} ({error.strerror}); make it readable") from error
        return {name: size for name, (size, _) in self._stamps.items()}

    def open(self, name: str) -> BinaryIO:
        try:
            file = io.FileIO(os.path.join(self.path, name), opener=_without_waiting)
        except OSError as error:
            raise Unreadable(f"cannot be opened: {error.strerror}") from error
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            file.close()
            raise Unreadable("is not a regular file")
        return io.BufferedReader(file)

    def stamp(self, name: str) -> tuple[object, ...]:
        return self._stamps[name]


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # opening a pipe would else wait for its writer


def _stamp(entry: os.DirEntry[str]) -> tuple[int, int]:
    """Bytes, and the time of the last change in nanoseconds."""
    try:
        status = entry.stat()
    except OSError:  # a dangling link: it is listed, and skipped with its reason when it is opened
        return 0, 0
    return status.st_size, status.st_mtime_ns
