"""Small files of a data set's folder, on a local disk or on any file system that Beam knows (`gs://...`).

Beam is imported only for paths that are not local, and for writing.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from typing import Any, BinaryIO

from harmonic.errors import UserError, one_line
from pipelines.beam.loading import import_beam
from pipelines.errors import output_errors
from pipelines.paths import is_local, join


def file_systems() -> Any:
    """Beam's FileSystems."""
    import_beam()
    from apache_beam.io.filesystems import FileSystems

    return FileSystems


def create_file(path: str) -> BinaryIO:
    """A file to write to."""
    systems = file_systems()
    from apache_beam.io.filesystem import CompressionTypes

    return systems.create(path, compression_type=CompressionTypes.UNCOMPRESSED)


def open_file(path: str) -> BinaryIO:
    """A file to read from."""
    systems = file_systems()
    from apache_beam.io.filesystem import CompressionTypes

    return systems.open(path, compression_type=CompressionTypes.UNCOMPRESSED)


def flush(path: str, file: BinaryIO) -> None:
    """Waits until an open local file is on the disk, so that a loss of power leaves no manifest without its shards."""
    if is_local(path):
        file.flush()
        os.fsync(file.fileno())


def exists(path: str) -> bool:
    """Whether a file exists."""
    if is_local(path):
        return os.path.exists(path)
    return file_systems().exists(path)


def rename(pairs: list[tuple[str, str]]) -> None:
    """Renames (old path, new path) files in this order."""
    file_systems().rename([source for source, _ in pairs], [target for _, target in pairs])


def delete(path: str, is_folder: bool = False) -> None:
    """Deletes a file, or a folder with all that is in it; none is no error on a local disk."""
    if is_local(path):
        with contextlib.suppress(FileNotFoundError):
            if is_folder:
                shutil.rmtree(path)
            else:
                os.unlink(path)
        return
    file_systems().delete([path + "/" if is_folder else path])


def read_file(folder: str, name: str) -> bytes | None:
    """The bytes of a small file; None if it does not exist.

    Raises:
      UserError: it cannot be read.
    """
    path = join(folder, name)
    try:
        if not exists(path):
            return None
        with open(path, "rb") if is_local(path) else open_file(path) as file:
            return file.read()
    except Exception as error:  # Beam's file systems raise errors of their own
        raise UserError(f"{path} cannot be read ({one_line(error)}); make it readable, or remove it") from error


def write_file(folder: str, name: str, data: bytes) -> None:
    """Writes a small file, whole or not at all.

    Raises:
      UserError: it cannot be written.
    """
    temporary = join(folder, f"{name}.partial")
    with output_errors(folder):
        with create_file(temporary) as file:
            file.write(data)
            flush(temporary, file)
        rename([(temporary, join(folder, name))])


def remove_file(folder: str, name: str) -> None:
    """Removes a file.

    Raises:
      UserError: it cannot be removed.
    """
    with output_errors(folder):
        delete(join(folder, name))


def list_files(folder: str) -> dict[str, int]:
    """Name and bytes of all that a folder holds; the folders in it have no bytes. Empty if it does not exist."""
    if is_local(folder):
        try:
            with os.scandir(folder) as entries:
                return {entry.name: 0 if entry.is_dir() else entry.stat().st_size for entry in entries}
        except FileNotFoundError:
            return {}
    # Only the staging folders of runs are looked into.
    files = file_systems().match([join(folder, "*"), join(folder, "_partial-*/*")])
    found = {}
    for metadata in (metadata for match in files for metadata in match.metadata_list):
        name, _, below = metadata.path[len(folder.rstrip("/")) + 1 :].partition("/")
        found[name] = 0 if below else metadata.size_in_bytes
    return found
