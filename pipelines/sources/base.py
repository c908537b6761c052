"""What every source has: recordings listed by id, each opened as a seekable file. And files by name, below that."""

from __future__ import annotations

import abc
import dataclasses
import re
import sys
from collections.abc import Sequence
from typing import BinaryIO

from harmonic.records import LeftOut

AUDIO_SUFFIXES = frozenset(
    # PCM and the like, as libsndfile reads them.
    ".wav .wave .bwf .rf64 .w64 .amb .aif .aiff .aifc .au .snd .caf .sph .nist .voc .sf .ircam .svx .8svx .iff .pvf "
    ".paf .avr .htk .sds .wve .xi "
    # What FFmpeg decodes.
    ".flac .ogg .oga .opus .spx .mp3 .mp2 .mp1 .mpga .m4a .m4b .m4r .aac .mp4 .3gp .wma .asf .webm .mka .amr .ac3 "
    ".eac3 .wv .ape .tta .tak .mpc".split()
)
HIDDEN = "hidden files or folders"
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

    def left_out(self) -> tuple[LeftOut, ...]:
        """What the source holds besides the recordings, by reason."""
        return ()

    @abc.abstractmethod
    def fingerprint(self) -> str:
        """SHA-256 in hexadecimal of the source's content; equal sources have equal fingerprints."""

    def close(self) -> None:  # noqa: B027 - most keep nothing open
        """Closes what `open` keeps open."""


class Files(abc.ABC):
    """Files by name, with `/` between the parts: those of a folder, an archive or a bucket.

    Attributes:
      path: for messages.
      left_out: what `sizes` does not list, by reason.
    """

    def __init__(self, path: str):
        self.path = path
        self.left_out: dict[str, LeftOut] = {}

    def leave_out(self, reason: str, name: str) -> None:
        """Counts a file that `sizes` does not list."""
        before = self.left_out.get(reason, LeftOut(reason, 0, name))
        self.left_out[reason] = dataclasses.replace(before, files=before.files + 1)

    @abc.abstractmethod
    def sizes(self) -> dict[str, int]:
        """Bytes of every file that is not hidden; the others are counted in `left_out`."""

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
