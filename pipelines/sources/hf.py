"""Data sets of the Hugging Face hub (`hf:user/name`): the rows of Parquet files, or audio files.

    source = HubSource("hf:user/name:config@revision")  # config and revision may be left out

`datasets` lists a repository's configuration, splits, columns and, pinned to a commit, its files. It decodes nothing
and prepares nothing in its cache: a row's encoded bytes are read by ranges from its row group. The recordings of a row
group go into one shard, so that each row group is read once.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import io
import logging
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath
from typing import Any, BinaryIO

from harmonic.errors import Unreadable, UserError, one_line
from harmonic.records import SPLITS
from pipelines.sources.base import Source, SourceRecording, is_audio, natural_key
from pipelines.sources.hub import HubFile, no_permission
from pipelines.sources.remote import RangeReader, Refused, Transient
from pipelines.sources.splits import split_by_hash
from pipelines.sources.spool import open_remote

SPLIT_NAMES = {
    "train": {"train", "training"},
    "validation": {"validation", "valid", "dev", "val"},
    "test": {"test", "testing", "eval", "evaluation"},
}
_THREADS = 8  # for listing, one file each
_BUFFER_BYTES = 1 << 20  # of a column that pyarrow reads ahead; it holds a page whole, which can be a row group
_METADATA = {"metadata.csv", "metadata.jsonl", "metadata.parquet"}
_ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".gz", ".7z", ".rar")
_FILE_COLUMNS = ("file_name", "audio_file_name")
_LABEL_COLUMNS = ("label", "labels", "class", "category")


@dataclasses.dataclass(frozen=True)
class Columns:
    """The columns of a Parquet file that are read.

    Attributes:
      audio: the column of the recordings.
      within: its field that holds the bytes, or None if the column itself does.
      label: the column of the labels, or None.
      names: the labels by number, or None if the column holds the labels themselves.
    """

    audio: str
    within: str | None
    label: str | None
    names: tuple[str, ...] | None


class HubSource(Source):
    """A data set repository of the hub.

    Args:
      source: `hf:user/name`, with `:config` if it has several and `@revision` if not the latest.

    Raises:
      UserError: there is no such data set or no permission to read it, or its recordings are not in a known form.
    """

    def __init__(self, source: str):
        found = re.fullmatch(r"hf:([\w.-]+(?:/[\w.-]+)?)(?::([^@:]+))?(?:@(.+))?", source)
        if not found:
            raise UserError(f"--source {source} must be hf:user/name, hf:user/name:config or hf:user/name@revision")
        self.name, (self._repo, self._config, revision) = source, found.groups()
        builder = _builder(source, self._repo, self._config, revision)
        self._files: dict[str, list[str]] = {}
        for split, urls in (builder.config.data_files or {}).items():
            self._files[str(split)] = [self._path(url) for url in urls]
        self._kind = type(builder).__mro__[1].__name__
        self._features = builder.info.features
        self._columns: Columns | None = None
        if self._kind == "Parquet":
            self._columns = self._find_columns()
        elif self._kind != "AudioFolder":
            raise UserError(
                f"{source} is stored as {self._kind}, and only Parquet and audio files are read here; the hub's own "
                f"conversion may serve (hf:{self._repo}@refs/convert/parquet), or a folder or tar that you download"
            )
        self._reset()

    def _reset(self) -> None:
        self._open_file: tuple[str, HubFile, RangeReader, Any] | None = None
        self._rows: tuple[str, int, int, Iterator[Any]] | None = None  # file, row group, next row, rows

    def __getstate__(self) -> dict[str, Any]:
        state = {key: value for key, value in self.__dict__.items() if key != "_listing"}
        return state | {"_files": {}, "_features": None, "_open_file": None, "_rows": None}

    def _path(self, url: str) -> str:
        found = re.fullmatch(rf"hf://datasets/{re.escape(self._repo)}@([0-9a-f]{{40}})/(.+)", url)
        if not found:
            raise UserError(f"{self.name} points to files elsewhere, {one_line(url)}; download them, give the folder")
        self._commit = found[1]
        return found[2]

    def fingerprint(self) -> str:
        return hashlib.sha256(repr((self._repo, self._config, self._commit)).encode()).hexdigest()

    @functools.cached_property
    def _listing(self) -> list[SourceRecording]:
        own = self._list_files() if self._columns is None else self._list_rows()
        if len({recording.id for recording in own}) < len(own):
            raise UserError(f"{self.name} has files in several splits; give another configuration of it")
        if len(own) < 3:
            raise UserError(f"{self.name} holds {len(own)} recordings: at least 3 are needed, one for each split")
        splits = _splits(self.name, {recording.id: recording.split for recording in own})
        kept = [dataclasses.replace(r, split=splits[r.id]) for r in own if r.id in splits]
        return sorted(kept, key=lambda recording: natural_key(recording.id))

    # Parquet.

    def _parquet(self, path: str) -> tuple[HubFile, RangeReader, Any]:
        import pyarrow
        import pyarrow.parquet

        file = HubFile(self._repo, path, revision=self._commit)
        try:
            file.pin()
        except Refused as error:
            raise file.refusal(error) from error
        reader = file.open()
        try:
            parquet = pyarrow.parquet.ParquetFile(
                reader, pre_buffer=False, buffer_size=_BUFFER_BYTES, page_checksum_verification=True
            )
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"{file.name} cannot be read as Parquet: {one_line(error)}") from error
        return file, reader, parquet

    def _find_columns(self) -> Columns:
        import datasets

        first = next((path for paths in self._files.values() for path in paths), None)
        if first is None:
            raise UserError(f"{self.name} holds no files")
        file, _, parquet = self._parquet(first)
        file.close()
        schema = parquet.schema_arrow
        features = self._features or datasets.Features.from_arrow_schema(schema)
        audio = [name for name, kind in features.items() if isinstance(kind, datasets.Audio) and name in schema.names]
        # Older files do not mark the column of audio.
        audio += [name for name in schema.names if "bytes" in getattr(features.get(name), "keys", tuple)()]
        audio += [name for name in schema.names if name == "audio"]
        if not audio:
            raise UserError(f"{self.name} has no column of audio, only {one_line(', '.join(schema.names))}")
        classes = {name: kind for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)}
        label = next((name for name in (*classes, *_LABEL_COLUMNS) if name in schema.names), None)
        return Columns(
            audio=audio[0],
            within=self._bytes_field(schema.field(audio[0]).type),
            label=label,
            names=tuple(classes[label].names) if label in classes else None,
        )

    def _bytes_field(self, kind: Any) -> str | None:
        import pyarrow

        if pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind):
            return None
        names = [kind.field(i).name for i in range(kind.num_fields)] if pyarrow.types.is_struct(kind) else [str(kind)]
        if "bytes" not in names:
            raise UserError(f"the column of audio of {self.name} holds {one_line(', '.join(names))} and no bytes")
        return "bytes"

    def _list_rows(self) -> list[SourceRecording]:
        pairs = [(split, path) for split, paths in self._files.items() for path in paths]
        with concurrent.futures.ThreadPoolExecutor(_THREADS) as threads:
            lists = threads.map(lambda pair: self._list_rows_of(*pair), pairs)
            return [recording for found in lists for recording in found]

    def _list_rows_of(self, split: str, path: str) -> list[SourceRecording]:
        import pyarrow

        assert self._columns is not None
        file, reader, parquet = self._parquet(path)
        recordings = []
        with contextlib.closing(file), reader:
            row = 0
            for group in range(parquet.num_row_groups):
                metadata = parquet.metadata.row_group(group)
                size = sum(c.total_compressed_size for c in _chunks(metadata, self._columns.audio))
                try:
                    labels = self._labels(parquet, group, metadata.num_rows)
                except (pyarrow.ArrowException, OSError, KeyError) as error:
                    raise UserError(f"{file.name} cannot be read as Parquet: {one_line(error)}") from error
                for label in labels:
                    place = f"{path}/{row}"
                    recordings.append(
                        SourceRecording(place, split, label, size // metadata.num_rows, group=f"{path}#{group}")
                    )
                    row += 1
        return recordings

    def _labels(self, parquet: Any, group: int, count: int) -> Sequence[str | None]:
        columns = self._columns
        assert columns is not None
        if columns.label is None:
            return [None] * count
        values = parquet.read_row_group(group, columns=[columns.label], use_threads=False)[columns.label].to_pylist()
        names = columns.names
        if names is None:
            return [None if value is None else str(value) for value in values]
        return [names[value] if value is not None and 0 <= value < len(names) else None for value in values]

    def open(self, recording: str) -> BinaryIO:
        if self._columns is None:
            return open_remote(HubFile(self._repo, recording, revision=self._commit), recording)
        path, _, row = recording.rpartition("/")
        value = self._row(path, int(row))
        if isinstance(value, dict):
            value = value.get(self._columns.within)
        if not value:
            raise Unreadable("has a row that holds no audio")
        return io.BytesIO(value)

    def _row(self, path: str, row: int) -> Any:
        """The audio column of a row. Rows of a row group that are asked for in order are read once."""
        import pyarrow

        if self._open_file is None or self._open_file[0] != path:
            self.close()
            self._open_file = path, *self._parquet(path)
        _, file, reader, parquet = self._open_file
        group = start = 0
        while group < parquet.num_row_groups and row >= start + parquet.metadata.row_group(group).num_rows:
            start += parquet.metadata.row_group(group).num_rows
            group += 1
        if group == parquet.num_row_groups:
            raise UserError(f"{file.name} has no row {row}: it changed while it was read; run again")
        if self._rows is None or self._rows[:2] != (path, group) or self._rows[2] > row:
            assert self._columns is not None
            chunks = list(_chunks(parquet.metadata.row_group(group), self._columns.audio, self._columns.within))
            reader.expect(max(chunk_start(chunk) + chunk.total_compressed_size for chunk in chunks))
            self._rows = path, group, start, self._values(parquet, group)
        _, _, at, values = self._rows
        try:
            for _ in range(row - at):
                next(values)
            value = next(values)
        except (pyarrow.ArrowException, OSError, StopIteration) as error:
            self._rows = None
            raise UserError(f"{file.name} cannot be read at row {row}: {one_line(error) or 'its end'}") from error
        self._rows = path, group, row + 1, values
        return value

    def _values(self, parquet: Any, group: int) -> Iterator[Any]:
        columns = self._columns
        assert columns is not None
        name = columns.audio if columns.within is None else f"{columns.audio}.{columns.within}"
        for batch in parquet.iter_batches(1, row_groups=[group], columns=[name], use_threads=False):
            yield from batch.column(0).to_pylist()

    # Audio files.

    def _list_files(self) -> list[SourceRecording]:
        import huggingface_hub

        everything = [path for paths in self._files.values() for path in paths]
        packed = next((path for path in everything if path.lower().endswith(_ARCHIVES)), None)
        if packed is not None:
            url = HubFile(self._repo, packed, revision=self._commit).url
            raise UserError(f"{self.name} holds an archive of recordings; give --source {url}")
        try:
            tree = huggingface_hub.HfApi().list_repo_tree(
                self._repo, recursive=True, revision=self._commit, repo_type="dataset"
            )
            sizes = {entry.path: entry.size for entry in tree if hasattr(entry, "size")}
        except Exception as error:
            raise UserError(f"cannot list {self.name}: {one_line(error)}; try again") from error
        labels = self._metadata_labels([path for path in everything if os.path.basename(path) in _METADATA])
        if labels is None:
            audio = [PurePosixPath(path) for path in everything if is_audio(path)]
            # Folders are labels if there are several, all at one depth: the rule of `datasets`.
            folders = {path.parent.name for path in audio}
            known = len(folders) > 1 and len({len(path.parts) for path in audio}) == 1
            labels = {str(path): path.parent.name for path in audio} if known else {}
        return [
            SourceRecording(path, split, labels.get(path), sizes.get(path, 0))
            for split, paths in self._files.items()
            for path in paths
            if is_audio(path)
        ]

    def _metadata_labels(self, paths: list[str]) -> dict[str, str] | None:
        """The labels in tables beside the audio files; None if there are no tables."""
        if not paths:
            return None
        import pandas

        labels: dict[str, str] = {}
        for path in dict.fromkeys(paths):
            readers: dict[str, Any] = {
                ".csv": functools.partial(pandas.read_csv, dtype=str),
                ".jsonl": functools.partial(pandas.read_json, lines=True, dtype=False),
                ".parquet": pandas.read_parquet,
            }
            try:
                with open_remote(HubFile(self._repo, path, revision=self._commit), path) as file:
                    table = readers[os.path.splitext(path)[1]](file)
            except (ValueError, OSError, Unreadable) as error:
                raise UserError(f"{path} of {self.name} cannot be read: {one_line(error)}") from error
            names, label = (next((c for c in kinds if c in table), None) for kinds in (_FILE_COLUMNS, _LABEL_COLUMNS))
            if names is not None and label is not None:
                folder = PurePosixPath(path).parent
                pairs = zip(table[names], table[label], strict=True)
                labels |= {str(folder / str(name)): str(value) for name, value in pairs}
        return labels

    def close(self) -> None:
        if self._open_file is not None:
            _, file, reader, _ = self._open_file
            reader.close()
            file.close()
        self._reset()

    def list(self) -> Sequence[SourceRecording]:
        return list(self._listing)


def _builder(source: str, repo: str, config: str | None, revision: str | None) -> Any:
    """The builder by which `datasets` describes a repository."""
    import datasets
    from huggingface_hub import constants

    try:
        # Without this request, `datasets` takes half a minute to miss a connection, and hardly explains a wrong token.
        probe = HubFile(repo, "README.md", revision)
        if not constants.HF_HUB_OFFLINE:
            probe.pin()
    except Refused as error:
        if error.status in (401, 403):
            raise probe.refusal(error) from error
        if isinstance(error, Transient):
            raise UserError(f"cannot open {source}: {error}; try again, or give a folder or archive") from error
    finally:
        probe.close()
    loggers = [logging.getLogger(name) for name in ("datasets", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        return datasets.load_dataset_builder(repo, config, revision=revision)
    except Exception as error:  # those of `datasets`, of the hub's client and of its HTTP client have no common base
        page = f"{constants.ENDPOINT}/datasets/{repo}"
        text = one_line(error)
        if "gated" in text or any(status in text for status in ("401 Client", "403 Client", "403 Forbidden")):
            raise UserError(no_permission(page)) from error
        if isinstance(error, datasets.exceptions.DatasetNotFoundError):
            text = "there is no such data set, or no permission to see it; see the name, or log in with `hf auth login`"
        elif constants.HF_HUB_OFFLINE or isinstance(error, ConnectionError):
            text = "there is no connection to the hub; try again, or give a folder or archive as --source"
        elif "Config name is missing" in text:
            text = f"it has several configurations, give one, such as {source}:NAME ({text})"
        raise UserError(f"cannot open {source}: {text}") from error
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _splits(source: str, theirs: dict[str, str]) -> dict[str, str]:
    """The split of each id: the repository's own if its name is known; others are left out with a warning.

    A missing split is taken from train by the hash of the ids. If no split is called train, all ids are split by hash.
    """
    known = {
        name: split
        for name in set(theirs.values())
        for split, names in SPLIT_NAMES.items()
        if re.split(r"[._-]", name.lower())[0] in names
    }
    if "train" not in known.values():
        return split_by_hash(theirs)
    if unknown := sorted(set(theirs.values()) - known.keys()):
        logging.getLogger(__name__).warning("%s: splits that are left out: %s", source, ", ".join(unknown))
    splits = {id: known[name] for id, name in theirs.items() if name in known}
    missing = set(SPLITS) - set(splits.values())
    if missing:
        drawn = split_by_hash(id for id, split in splits.items() if split == "train")
        splits |= {id: split for id, split in drawn.items() if split in missing}
    return splits


def _chunks(group: Any, column: str, within: str | None = None) -> Iterator[Any]:
    """The metadata of a column, or of one of its fields, in a row group."""
    wanted = column if within is None else f"{column}.{within}"
    for i in range(group.num_columns):
        chunk = group.column(i)
        if chunk.path_in_schema == wanted or chunk.path_in_schema.startswith(f"{wanted}."):
            yield chunk


def chunk_start(chunk: Any) -> int:
    """The offset of a column chunk in its file."""
    pages = (chunk.dictionary_page_offset, chunk.data_page_offset)
    return min(offset for offset in pages if offset is not None)
