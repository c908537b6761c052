"""Published data sets and their layouts: which files are recordings, in which splits, with which labels.

A layout is one object, and a published data set is one entry of `DATA_SETS` that names its layout.
"""

from __future__ import annotations

import abc
import dataclasses
import re
from collections.abc import Callable, Collection
from pathlib import PurePosixPath

from harmonic.errors import UserError, one_line
from harmonic.records import SPLITS
from pipelines.sources.base import AUDIO_SUFFIXES, is_audio
from pipelines.sources.splits import named_ids, split_by_hash, split_by_rank

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
# Speech Commands, of which SC09 is a part, has these as well: its lists name their recordings.
OTHER_WORDS = (
    "backward bed bird cat dog down follow forward go happy house learn left marvin no off on right sheila stop tree "
    "up visual wow yes"
).split()
LISTS = {"validation": "validation_list.txt", "test": "testing_list.txt"}


class Misfit(Exception):
    """A source's files are not laid out as they should be.

    Args:
      problem: continues the sentence that the source's path begins: "holds no ...".
      way_out: what the user can do; to give the data set's archive or folder, if None.
    """

    def __init__(self, problem: str, way_out: str | None = None):
        super().__init__(problem)
        self.problem, self.way_out = problem, way_out


class Layout(abc.ABC):
    """How the files of a data set are laid out. Paths have `/` between their parts; an id is a path below the root."""

    @abc.abstractmethod
    def root(self, paths: Collection[str]) -> str:
        """The folder below which the recordings are, with a `/` at its end; empty for the top.

        Raises:
          Misfit: these are not the files of such a data set.
        """

    @abc.abstractmethod
    def recordings(self, ids: Collection[str], read: Callable[[str], str]) -> dict[str, tuple[str, str | None]]:
        """The split and the label of each recording; files that are not listed are left out.

        Args:
          ids: all files below the root.
          read: gives the text of one of them, which then counts in the source's fingerprint.

        Raises:
          Misfit: these are not the files of such a data set.
          UserError: a file that assigns splits is wrong.
        """


@dataclasses.dataclass(frozen=True)
class Listed(Layout):
    """A folder of WAV files for each label, and two lists of the validation and test recordings; the rest is train.

    Attributes:
      labels: the folders that count.
    """

    labels: tuple[str, ...]

    def root(self, paths: Collection[str]) -> str:
        first = next(iter(LISTS.values()))
        roots = [path[: -len(first)] for path in paths if PurePosixPath(path).name == first]
        roots = sorted((root for root in roots if root.count("/") <= 1), key=lambda root: (len(root), root))
        if not roots:
            raise Misfit(f"holds no {first} at its root or under one folder")
        for file in LISTS.values():
            if roots[0] + file not in paths:
                raise Misfit(f"holds no {roots[0]}{file}")
        return roots[0]

    def recordings(self, ids: Collection[str], read: Callable[[str], str]) -> dict[str, tuple[str, str | None]]:
        wavs = [id for id in ids if id.split("/")[0] in self.labels and id.count("/") == 1 and id.endswith(".wav")]
        lists = {split: _lines(read(file)) for split, file in LISTS.items()}
        splits = split_by_lists(wavs, lists)
        return {id: (split, id.split("/")[0]) for id, split in splits.items()}


@dataclasses.dataclass(frozen=True)
class Ranked(Layout):
    """WAV files in one folder, in natural order of their names cut at 88 % and 94 %.

    Attributes:
      folders: names of that folder, to choose where several hold WAV files.
    """

    folders: tuple[str, ...]

    def root(self, paths: Collection[str]) -> str:
        roots = {path[: path.rfind("/") + 1] for path in paths if path.lower().endswith(".wav")}
        roots = {root for root in roots if root.count("/") <= 1}
        if "" in roots:
            return ""
        roots = (roots & {f"{folder}/" for folder in self.folders}) or roots
        if not roots:
            raise Misfit("holds no WAV files at its root or under one folder")
        if len(roots) > 1:
            first, second = sorted(roots)[:2]
            raise Misfit(f"holds WAV files in several folders, {first} and {second}", "give one")
        return roots.pop()

    def recordings(self, ids: Collection[str], read: Callable[[str], str]) -> dict[str, tuple[str, str | None]]:
        splits = split_by_rank(id for id in ids if "/" not in id and id.lower().endswith(".wav"))
        return {id: (split, None) for id, split in splits.items()}


@dataclasses.dataclass(frozen=True)
class AudioFiles(Layout):
    """Audio files anywhere, each split by a hash of its name: recordings of one's own."""

    def root(self, paths: Collection[str]) -> str:
        """The top: an id, and with it the split, depends on the path below the source alone, not on other files."""
        if not any(map(is_audio, paths)):
            raise Misfit(f"holds no audio files ({', '.join(sorted(AUDIO_SUFFIXES)[:6])}, ...)")
        return ""

    def recordings(self, ids: Collection[str], read: Callable[[str], str]) -> dict[str, tuple[str, str | None]]:
        splits = split_by_hash(id for id in ids if is_audio(id))
        if len(splits) < 3:
            raise Misfit(
                f"holds {len(splits)} recording{'s' * (len(splits) != 1)}: at least 3 are needed, one for each of "
                f"{', '.join(SPLITS)}",
                "add recordings, or cut a long one",
            )
        return {id: (split, None) for id, split in splits.items()}


def _lines(text: str) -> list[str]:
    return [line.strip().replace("\\", "/").removeprefix("./") for line in text.splitlines() if line.strip()]


def split_by_lists(ids: Collection[str], lists: dict[str, list[str]]) -> dict[str, str]:
    """The split of each id: `lists` names those of validation and of test, the rest is train.

    Lines of `OTHER_WORDS` are ignored: the lists of the whole Speech Commands set fit SC09.

    Raises:
      UserError: a line names a recording that does not exist or that the other list has.
    """
    splits = dict.fromkeys(ids, "train")
    for split, names in lists.items():
        named, absent = named_ids({name for name in names if name.split("/")[0] not in OTHER_WORDS}, splits)
        if absent:
            raise UserError(
                f"{LISTS[split]} names {len(absent)} recordings that are not there, {one_line(absent[0])!r} the first; "
                "get the whole archive"
            )
        for name in named:
            if splits[name] != "train":
                raise UserError(f"{name!r} is in both {' and '.join(LISTS.values())}; get the archive again")
            splits[name] = split
    return splits


@dataclasses.dataclass(frozen=True)
class DataSet:
    """A data set's layout and defaults.

    Attributes:
      name: as on the command line.
      layout: of its files.
      encoding: default encoding.
      window_length: default window, in samples.
      repo: Hugging Face data set repository, or None.
      archives: possible names of the archive in the repository; the first that exists is taken.
      complete: whether a recording that cannot be read is an error.
    """

    name: str
    layout: Layout
    encoding: str
    window_length: int
    repo: str | None = None
    archives: tuple[str, ...] = ()
    complete: bool = False


DATA_SETS = {
    "demo": DataSet("demo", AudioFiles(), "mu_law", 128_000),
    "sc09": DataSet("sc09", Listed(DIGITS), "mu_law", 16_000, "krandiash/sc09", ("sc09.zip",), complete=True),
    "beethoven": DataSet(
        name="beethoven",
        layout=Ranked(("beethoven",)),
        encoding="linear",
        window_length=128_000,
        repo="krandiash/beethoven",
        archives=("beethoven.zip",),
        complete=True,
    ),
    "youtubemix": DataSet(
        name="youtubemix",
        layout=Ranked(("youtube_mix", "youtubemix")),
        encoding="mu_law",
        window_length=960_512,
        repo="krandiash/youtubemix",
        archives=("youtube_mix.zip", "youtubemix.zip"),
        complete=True,
    ),
}


def data_set(name: str) -> DataSet:
    """The published data set of that name; for any other name, recordings of one's own.

    Raises:
      UserError: the name has other characters than a-z, 0-9, `_` and `-`, or begins with `-`.
    """
    if not re.fullmatch(r"[a-z0-9_][a-z0-9_-]*", name):
        raise UserError(
            f"--dataset {name!r} cannot be a folder's name: use {', '.join(DATA_SETS)}, or a name of your own "
            "of a-z, 0-9, _ and -"
        )
    return DATA_SETS.get(name) or DataSet(name, AudioFiles(), "mu_law", 128_000)
