"""What every source has: recordings listed by id, each opened as a seekable file. And files by name, below that."""

from __future__ import annotations

import abc
import dataclasses
import re
import sys
from collections.abc import Sequence
from typing import BinaryIO

AUDIO_SUFFIXES = frozenset(
    ".wav .wave .flac .ogg .oga .opus .mp3 .aif .aiff .aifc .au .snd .caf .w64 .rf64".split()
    # libsndfile does not read these; they are listed all the same, so that they are reported as skipped.
    + ".m4a .aac .mp4 .wma .webm .wv .ape .mka".split()
)
_DIGITS = re.compile(r"[0-9]+")


@dataclasses.dataclass(frozen=True)
class SourceRecording:
    """A recording that a source holds.

    Attributes:
      id: its path below the folder of all recordings, with `/` between the parts; unique.
      split: one of `harmonic.records.SPLITS`.
      label: the source's word for it (the digit, for SC09), or None.
      size: bytes in the source, unpacked.
      group: recordings of one group go into one shard, so that one worker reads them together; None for a group of one.
    """

    id: str
    split: str
    label: str | None
    size: int
    group: str | None = None


class Source(abc.ABC):
    """Where recordings come from. It is pickled for the workers: what opens the recordings, not their list."""

    @abc.abstractmethod
    def list(self) -> Sequence[SourceRecording]:
        """Every recording, in natural order of the ids."""

    @abc.abstractmethod
    def open(self, recording: str) -> BinaryIO:
        """The recording of that id as a seekable audio file, which the caller closes.

        Raises:
          Unreadable: this recording cannot be read.
          UserError: no recording can.
        """

    @abc.abstractmethod
    def fingerprint(self) -> str:
        """SHA-256 in hexadecimal of the source's content; equal sources have equal fingerprints."""

    def close(self) -> None:  # noqa: B027 - most keep nothing open
        """Closes what `open` keeps open."""


class Files(abc.ABC):
    """Files by name, with `/` between the parts: those of a folder, an archive or a bucket.

    Attributes:
      path: for messages.
    """

    def __init__(self, path: str):
        self.path = path

    @abc.abstractmethod
    def sizes(self) -> dict[str, int]:
        """Bytes of every file that is not hidden."""

    @abc.abstractmethod
    def open(self, name: str) -> BinaryIO:
        """A seekable file that the caller closes. Raises Unreadable."""

    @abc.abstractmethod
    def stamp(self, name: str) -> tuple[object, ...]:
        """Values that change when the file does."""

    def close(self) -> None:  # noqa: B027 - a folder keeps nothing open
        """Closes an archive; the next use opens it again."""


def is_hidden(name: str) -> bool:
    """Whether a part of the path begins with a dot (`..` does, too), or is the Mac's folder of metadata."""
    return any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))


def is_audio(name: str) -> bool:
    """Whether a file's name ends as a recording's does."""
    return name[name.rfind(".") :].lower() in AUDIO_SUFFIXES


def natural_key(name: str) -> tuple[str, str]:
    """Sorts `2.wav` before `10.wav`: runs of digits compare as numbers, of any size."""
    return _DIGITS.sub(_number, name), name


def _number(digits: re.Match[str]) -> str:
    """Sorts before any text, and shorter numbers before longer ones."""
    number = digits[0].lstrip("0")
    return f"\0{chr(min(len(number), sys.maxunicode))}{number}"
