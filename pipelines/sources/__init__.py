"""What a data set is, and where its recordings come from: the hub, an archive, a folder, or the synthesiser.

A source lists its recordings, opens one as a seekable binary file, and has a fingerprint. It travels to workers as a
short description (a path and a folder in it), and opens its archive there once.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import hashlib
import io
import itertools
import os
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath
from typing import Any, BinaryIO

import soundfile

from harmonic.audio import SAMPLE_RATE
from harmonic.errors import UserError, one_line
from harmonic.records import SPLITS
from pipelines.beam.runners import DEFAULT_RUNNER, is_elsewhere
from pipelines.sources import synth
from pipelines.sources.files import Archive, CloudFolder, Folder, Store, Unreadable
from pipelines.sources.hub import download, locate
from pipelines.sources.remote import CloudFile, HttpFile, Refused, RemoteFile, cloud_errors, file_system, shown
from pipelines.sources.tar import Tar, tar_kind

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
LISTS = {"validation": "validation_list.txt", "test": "testing_list.txt"}
AUDIO_SUFFIXES = frozenset(
    (
        *(".wav", ".wave", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".aifc", ".au", ".snd"),
        *(".caf", ".w64", ".rf64"),
        # libsndfile does not read these: listed all the same, so that they are reported and not passed over.
        *(".m4a", ".aac", ".mp4", ".wma", ".webm", ".wv", ".ape", ".mka"),
    )
)

_SOURCES = "a folder, an archive (zip or tar), a URL or hf:USER/NAME"


@dataclasses.dataclass(frozen=True)
class SourceRecording:
    """A recording that a source holds.

    Attributes:
      id: its path below the folder that holds the recordings, with `/` between the parts; unique.
      split: one of `harmonic.records.SPLITS`.
      label: what the source says of it (the digit, for SC09), or None.
      size: bytes in the source, unpacked.
      group: recordings of one group lie together and go into one shard, so that a worker reads them in one go; each by
        itself if None.
    """

    id: str
    split: str
    label: str | None
    size: int
    group: str | None = None


@dataclasses.dataclass(frozen=True)
class DataSet:
    """How a data set is laid out and what it is by default.

    Attributes:
      name: as on the command line.
      layout: `lists` (a folder a label, two lists of the validation and test recordings, the rest is train), `ranks`
        (WAV files in one folder in natural order, cut at 88 % and 94 %) or `hash` (audio files anywhere, split by a
        hash of the name).
      encoding: default encoding.
      window_length: default window, in samples.
      repo: Hugging Face data set repository, or None.
      archives: names of the archive in the repository, the first that exists.
      labels: with `lists`, the folders that count.
      complete: whether a recording that cannot be read is an error.
    """

    name: str
    layout: str
    encoding: str
    window_length: int
    repo: str | None = None
    archives: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    complete: bool = False


DATA_SETS = {
    "demo": DataSet("demo", "hash", "mu_law", 128_000),
    "sc09": DataSet("sc09", "lists", "mu_law", 16_000, "krandiash/sc09", ("sc09.zip",), DIGITS, complete=True),
    "beethoven": DataSet(
        "beethoven", "ranks", "linear", 128_000, "krandiash/beethoven", ("beethoven.zip",), complete=True
    ),
    "youtubemix": DataSet(
        "youtubemix",
        "ranks",
        "mu_law",
        960_512,
        "krandiash/youtubemix",
        ("youtube_mix.zip", "youtubemix.zip"),
        complete=True,
    ),
}


def data_set(name: str) -> DataSet:
    """The data set of that name; one's own for a name that is not published.

    Raises:
      UserError: the name has other characters than a-z, 0-9, `_` and `-`, or begins with `-`.
    """
    if not re.fullmatch(r"[a-z0-9_][a-z0-9_-]*", name):
        raise UserError(
            f"--dataset {name!r} cannot be a folder's name: use {', '.join(DATA_SETS)}, or a name of your own "
            "of a-z, 0-9, _ and -"
        )
    return DATA_SETS.get(name) or DataSet(name, "hash", "mu_law", 128_000)


def natural_key(name: str) -> tuple[str, str]:
    """Sorts `2.wav` before `10.wav`: digits compare as numbers, of any size."""
    return _DIGITS.sub(_number, name), name


_DIGITS = re.compile(r"[0-9]+")


def _number(digits: re.Match[str]) -> str:
    """Sorts before any text, and the shorter number before the longer."""
    number = digits[0].lstrip("0")
    return f"\0{chr(min(len(number), sys.maxunicode))}{number}"


# Splits: {id: split} from ids alone.


def split_by_rank(ids: Iterable[str]) -> dict[str, str]:
    """Natural order of the names, cut at int(0.88 n) and int(0.94 n)."""
    ordered = sorted(ids, key=natural_key)
    cuts = int(0.88 * len(ordered)), int(0.94 * len(ordered))
    return {name: SPLITS[sum(rank >= cut for cut in cuts)] for rank, name in enumerate(ordered)}


def split_by_hash(ids: Iterable[str], shares: tuple[float, float, float] = (0.88, 0.06, 0.06)) -> dict[str, str]:
    """A recording's split follows from its name: SHA-256 as a number in [0, 1), cut by the shares (at 0.88 and 0.94).

    Adding recordings moves none between splits, with one exception for small sets: from three recordings on, a split
    that stays empty (train, test, validation in this order) takes the recording whose number is nearest to its own
    interval, of a split that has more than one.
    """
    numbers = {
        name: int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:8], "big") / 2**64
        for name in ids
    }
    low_cut, high_cut = shares[0], round(1 - shares[2], 12)
    intervals = {"train": (0.0, low_cut), "test": (high_cut, 1.0), "validation": (low_cut, high_cut)}
    splits = {name: SPLITS[(u >= low_cut) + (u >= high_cut)] for name, u in numbers.items()}
    if len(splits) >= 3:
        for split, (low, high) in intervals.items():
            held = list(splits.values())
            if split not in held:
                spare = [name for name in splits if held.count(splits[name]) > 1]
                splits[min(spare, key=lambda name: (max(low - numbers[name], numbers[name] - high), name))] = split
    return splits


def split_by_lists(ids: Iterable[str], lists: dict[str, list[str]], labels: tuple[str, ...]) -> dict[str, str]:
    """`lists` names the recordings of validation and of test; the rest is train.

    Lines of folders that are not in `labels` are passed over (the lists of the whole Speech Commands set fit SC09).

    Raises:
      UserError: a line names a recording that is not there, or that another list has.
    """
    splits = dict.fromkeys(ids, "train")
    for split, names in lists.items():
        named = {name for name in names if name.split("/")[0] in labels}
        absent = sorted(named - splits.keys(), key=natural_key)
        if absent:
            raise UserError(
                f"{LISTS[split]} names {len(absent)} recordings that are not there, {absent[0]!r} the first; "
                "get the whole archive"
            )
        for name in named:
            if splits[name] != "train":
                raise UserError(f"{name!r} stands in both {' and '.join(LISTS.values())}; get the archive again")
            splits[name] = split
    return splits


class Source(abc.ABC):
    """Where recordings come from. Picklable: what travels is how to open them, not their list."""

    @abc.abstractmethod
    def list(self) -> Sequence[SourceRecording]:
        """Every recording, in natural order of the ids."""

    @abc.abstractmethod
    def open(self, recording: str) -> BinaryIO:
        """The recording of that id as a seekable audio file, which the caller closes.

        Raises:
          Unreadable: this recording cannot be read.
          UserError: none can.
        """

    @abc.abstractmethod
    def fingerprint(self) -> str:
        """SHA-256 in hexadecimal over what the source holds; equal sources, equal fingerprints."""

    def close(self) -> None:  # noqa: B027 - most keep nothing open
        """Lets go of what `open` keeps open."""


class SynthSource(Source):
    """The demo's synthesised recordings: no files and no network."""

    @functools.cached_property
    def _recordings(self) -> dict[str, synth.SynthRecording]:
        return {recording.name: recording for recording in synth.recordings()}

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def list(self) -> Sequence[SourceRecording]:
        return [
            SourceRecording(name, self._recordings[name].split, None, 4 * 128_000)
            for name in sorted(self._recordings, key=natural_key)
        ]

    def open(self, recording: str) -> BinaryIO:
        file = io.BytesIO()
        waveform = synth.render_recording(self._recordings[recording])
        soundfile.write(file, waveform, SAMPLE_RATE, format="WAV", subtype="FLOAT")
        file.seek(0)
        return file

    def fingerprint(self) -> str:
        return synth.fingerprint()


class FileSource(Source):
    """Recordings that are files of a store, laid out as `dataset` says, at the root or under one top folder."""

    def __init__(self, dataset: DataSet, store: Store):
        self._dataset = dataset
        self._store = store
        self._sizes = store.sizes()
        for name in self._sizes:
            try:
                name.encode()
            except UnicodeEncodeError:
                raise UserError(f"{store.path} holds a name that is not UTF-8, {name!r}; rename it") from None
        self._root = {"lists": self._listed_root, "ranks": self._flat_root, "hash": self._common_root}[dataset.layout]()

    def __getstate__(self) -> dict[str, Any]:
        return {"_dataset": self._dataset, "_store": self._store, "_root": self._root, "_sizes": None}

    def _no_audio(self, what: str) -> UserError:
        return UserError(f"{self._store.path} holds no {what}; give the archive or folder of {self._dataset.name}")

    def _listed_root(self) -> str:
        file = next(iter(LISTS.values()))
        roots = [name[: -len(file)] for name in self._sizes if PurePosixPath(name).name == file]
        roots = sorted((root for root in roots if root.count("/") <= 1), key=lambda root: (len(root), root))
        if not roots:
            raise self._no_audio(f"{file} at its root or under one folder")
        for file in LISTS.values():
            if roots[0] + file not in self._sizes:
                raise self._no_audio(f"{roots[0]}{file}")
        return roots[0]

    def _flat_root(self) -> str:
        roots = {name[: name.rfind("/") + 1] for name in self._sizes if name.lower().endswith(".wav")}
        roots = {root for root in roots if root.count("/") <= 1}
        published = {archive.removesuffix(".zip") + "/" for archive in self._dataset.archives}
        if "" in roots:
            return ""
        roots = (roots & published) or roots
        if not roots:
            raise self._no_audio("WAV files at its root or under one folder")
        if len(roots) > 1:
            first, second = sorted(roots)[:2]
            raise UserError(f"{self._store.path} holds WAV files in several folders, {first} and {second}; give one")
        return roots.pop()

    def _common_root(self) -> str:
        """The deepest folder that holds them all, so that an archive of a folder and the folder give the same ids."""
        folders = [name.split("/")[:-1] for name in self._sizes if is_audio(name)]
        if not folders:
            raise self._no_audio(f"audio files ({', '.join(sorted(AUDIO_SUFFIXES)[:6])}, ...)")
        # What the first and the last have in common, all have.
        common = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(min(folders), max(folders), strict=False))
        return "".join(f"{part}/" for part, _ in common)

    @functools.cached_property
    def _listing(self) -> list[SourceRecording]:
        below = {name[len(self._root) :]: size for name, size in self._sizes.items() if name.startswith(self._root)}
        labels = self._dataset.labels
        if self._dataset.layout == "lists":
            members = [n for n in below if n.split("/")[0] in labels and n.count("/") == 1 and n.endswith(".wav")]
            splits = split_by_lists(members, {split: self._lines(file) for split, file in LISTS.items()}, labels)
        elif self._dataset.layout == "ranks":
            splits = split_by_rank(name for name in below if "/" not in name and name.lower().endswith(".wav"))
        else:
            splits = split_by_hash(name for name in below if is_audio(name))
            if len(splits) < 3:
                raise UserError(
                    f"{self._store.path} holds {len(splits)} recording{'s' * (len(splits) != 1)}: at least 3 are needed"
                    f", one for each of {', '.join(SPLITS)}; add recordings, or cut a long one"
                )
        if not splits:
            raise self._no_audio("recordings")
        return [
            SourceRecording(name, splits[name], name.split("/")[0] if labels else None, below[name])
            for name in sorted(splits, key=natural_key)
        ]

    def _lines(self, file: str) -> list[str]:
        try:
            with self._store.open(self._root + file) as lines:
                text = lines.read().decode()
        except (Unreadable, UnicodeDecodeError, OSError) as error:
            raise UserError(f"{file} in {self._store.path} cannot be read: {one_line(error)}; get it again") from error
        return [line.strip().removeprefix("./") for line in text.splitlines() if line.strip()]

    def list(self) -> Sequence[SourceRecording]:
        return list(self._listing)

    def open(self, recording: str) -> BinaryIO:
        return self._store.open(self._root + recording)

    def fingerprint(self) -> str:
        names = [recording.id for recording in self._listing]
        if self._dataset.layout == "lists":
            names += LISTS.values()
        digest = hashlib.sha256()
        for name in sorted(names):
            stamp = (name, *self._store.stamp(self._root + name)[1:])
            digest.update(repr(stamp).encode())
        return digest.hexdigest()

    def close(self) -> None:
        self._store.close()


def is_audio(name: str) -> bool:
    """Whether a file's name is that of a recording."""
    return name[name.rfind(".") :].lower() in AUDIO_SUFFIXES


def open_source(dataset: DataSet, source: str, runner: str = DEFAULT_RUNNER) -> Source:
    """The source that `source` names.

    Args:
      dataset: its layout, and its place on the hub.
      source: `hub`, `synth`, `hf:user/name`, or a zip or tar archive or a folder: the path of one, or a URL.
      runner: Beam's. The local one has the hub's archive downloaded, the workers of others read it where it lies.

    Raises:
      UserError: there is no such source, it is not laid out as the data set, or the runner's workers cannot see it.
    """
    if source == "synth":
        if dataset.name != "demo":
            raise UserError(f"--source synth makes the demo's recordings; {dataset.name} needs an archive or a folder")
        return SynthSource()
    if source.startswith("hf:") and "://" not in source:
        if dataset.layout != "hash":
            raise UserError(f"{dataset.name} has a layout of its own; give hf: sources a --dataset name of your own")
        from pipelines.sources.hf import HubData

        return HubData(source)
    return FileSource(dataset, _open_store(dataset, source, runner))


def _open_store(dataset: DataSet, source: str, runner: str) -> Store:
    if source == "hub":
        if dataset.repo is None:
            raise UserError(f"{dataset.name} is not on the hub; give --source, {_SOURCES}")
        if runner == DEFAULT_RUNNER:
            return Archive(download(dataset.repo, dataset.archives))
        try:
            archive = locate(dataset.repo, dataset.archives)
        except Refused as error:
            raise UserError(f"cannot read {dataset.archives[0]} of {dataset.repo} on the hub: {error}") from error
        return Archive(archive.name, archive)
    if "://" in source:
        return _open_url(source)
    path = os.path.abspath(os.path.expanduser(source))
    if not os.path.exists(path):
        raise UserError(f"--source {source} is missing; give hub, or {_SOURCES}")
    if is_elsewhere(runner):
        raise UserError(f"the workers of {runner} do not see {path}; give a URL such as gs://bucket/{dataset.name}.zip")
    if os.path.isdir(path):
        return Folder(path)
    try:
        with open(path, "rb") as file:
            kind = tar_kind(file.read(512), path)
    except OSError as error:
        raise UserError(f"--source {source} cannot be read: {error.strerror}") from error
    return Tar(path, kind) if kind else Archive(path)


def _open_url(source: str) -> Store:
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
        kind = tar_kind(reader.read(512), file.name)
    return Tar(file.name, kind, file) if kind else Archive(file.name, file)
