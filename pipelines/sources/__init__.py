"""Where recordings come from: `open_source` is the one door.

A source lists its recordings, opens one as a seekable binary file, and has a fingerprint. It travels to workers without
its listing, and opens its archive there once.
"""

from __future__ import annotations

import os

from harmonic.errors import UserError
from pipelines.sources.base import Files, Source, is_audio
from pipelines.sources.cloud import CloudFile, CloudFolder, cloud_errors, file_system
from pipelines.sources.file_source import FileSource
from pipelines.sources.folder import Folder
from pipelines.sources.hub import download, locate
from pipelines.sources.layouts import AudioFiles, DataSet
from pipelines.sources.remote import HttpFile, Refused, RemoteFile, shown
from pipelines.sources.synth import SynthSource
from pipelines.sources.tar import Tar, tar_kind
from pipelines.sources.zip import Zip

_SOURCES = "a folder, an archive (zip or tar), a URL or hf:USER/NAME"

_PACKED = {b"7z\xbc\xaf\x27\x1c": "7-Zip", b"\x28\xb5\x2f\xfd": "Zstandard", b"Rar!": "RAR"}


def open_source(dataset: DataSet, source: str, *, download: bool = True, unseen_by: str | None = None) -> Source:
    """The source that `source` names.

    Args:
      dataset: gives the layout, and the archive's repository on the hub.
      source: `hub`, `synth`, `hf:user/name`, or a zip or tar archive or a folder: a path or a URL.
      download: downloads the hub's archive to this machine; otherwise the workers read it by ranges.
      unseen_by: a runner whose workers do not see this machine's files, so that paths are refused.

    Raises:
      UserError: there is no such source, it is not laid out as the data set, or the workers cannot see it.
    """
    if source == "synth":
        if dataset.name != "demo":
            raise UserError(f"--source synth makes the demo's recordings; {dataset.name} needs an archive or a folder")
        return SynthSource()
    if source.startswith("hf:") and "://" not in source:
        if dataset.layout != AudioFiles():
            raise UserError(f"{dataset.name} has a layout of its own; give hf: sources a --dataset name of your own")
        from pipelines.sources.hf import HubSource

        return HubSource(source)
    if source == "hub":
        files: Files = _open_hub(dataset, download)
    elif "://" in source:
        files = _open_url(source)
    else:
        files = _open_path(dataset, source, unseen_by)
    return FileSource(dataset, files)


def _open_hub(dataset: DataSet, downloaded: bool) -> Files:
    if dataset.repo is None:
        raise UserError(f"{dataset.name} is not on the hub; give --source, {_SOURCES}")
    if downloaded:
        return Zip(download(dataset.repo, dataset.archives))
    try:
        archive = locate(dataset.repo, dataset.archives)
    except Refused as error:
        raise UserError(f"cannot read {dataset.archives[0]} of {dataset.repo} on the hub: {error}") from error
    return Zip(archive.name, archive)


def _open_path(dataset: DataSet, source: str, unseen_by: str | None) -> Files:
    path = os.path.abspath(os.path.expanduser(source))
    if not os.path.exists(path):
        raise UserError(f"--source {source} is missing; give hub, or {_SOURCES}")
    if unseen_by:
        raise UserError(
            f"the workers of {unseen_by} do not see {path}; give a URL such as gs://bucket/{dataset.name}.zip"
        )
    if os.path.isdir(path):
        return Folder(path)
    try:
        with open(path, "rb") as file:
            head = file.read(512)
            kind = tar_kind(head, path)
    except OSError as error:
        raise UserError(f"--source {source} cannot be read: {error.strerror}") from error
    if kind is None:
        _check_kind(source, head)
    return Tar(path, kind) if kind else Zip(path)


def _check_kind(source: str, head: bytes) -> None:
    """Refuses a file that is no archive, or one of a kind that is not read."""
    packed = next((name for magic, name in _PACKED.items() if head.startswith(magic)), None)
    if packed:
        raise UserError(
            f"--source {source} is packed by {packed}, which is not read here; unpack it and give the folder, or make "
            "a zip or tar archive of it"
        )
    if not head.startswith(b"PK") and (is_audio(source) or head.startswith((b"RIFF", b"fLaC", b"OggS", b"ID3"))):
        raise UserError(
            f"--source {source} is one audio file, and at least three recordings are needed; cut it into several, and "
            "give their folder"
        )


def _open_url(source: str) -> Files:
    scheme = source.split("://")[0].lower()
    file: RemoteFile
    if scheme in ("http", "https"):
        file = HttpFile(source)
    else:
        files, path = file_system(source)
        try:
            with cloud_errors():
                is_folder = files.isdir(path)
        except Refused as error:
            raise UserError(f"cannot read {shown(source)}: {error}") from error
        if is_folder:
            return CloudFolder(source)
        file = CloudFile(source)
    try:
        file.pin()
    except Refused as error:
        raise file.refusal(error) from error
    with file.open() as reader:
        head = reader.read(512)
        kind = tar_kind(head, file.name)
    if kind is None:
        _check_kind(shown(source), head)
    return Tar(file.name, kind, file) if kind else Zip(file.name, file)
