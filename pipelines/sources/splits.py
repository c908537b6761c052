"""Splits from ids alone: by rank, by a hash of the name, by lists; and the rule that flags ask for."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import unicodedata
from collections.abc import Collection, Iterable, Sequence

from harmonic.errors import UserError, one_line
from harmonic.records import SPLITS
from pipelines.sources.base import SourceRecording, natural_key

DEFAULT_SHARES = (0.88, 0.06, 0.06)
DEFAULT_RULE = "default"  # the source's own splits, or by hash


def split_by_rank(ids: Iterable[str]) -> dict[str, str]:
    """The split of each id: natural order, cut at int(0.88 n) and int(0.94 n)."""
    ordered = sorted(ids, key=natural_key)
    cuts = int(0.88 * len(ordered)), int(0.94 * len(ordered))
    return {name: SPLITS[sum(rank >= cut for cut in cuts)] for rank, name in enumerate(ordered)}


def split_by_hash(ids: Iterable[str], shares: tuple[float, float, float] = DEFAULT_SHARES) -> dict[str, str]:
    """The split of each id from its SHA-256 as a number in [0, 1), cut by the shares (by default at 0.88 and 0.94).

    New recordings move no others between splits, with one exception for small sets: from three recordings on, an empty
    split (train, test, validation in this order) takes the recording whose number is nearest to the split's interval,
    from a split that has more than one.
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


def named_ids(names: Iterable[str], ids: Collection[str]) -> tuple[set[str], list[str]]:
    """The ids that a list names, and what it names that is not there, in natural order.

    A name may be written in another of Unicode's forms than the id (macOS takes letters and accents apart).
    """
    named, absent, plain = set(), [], None
    for name in names:
        if name in ids:
            named.add(name)
            continue
        if plain is None:
            plain = {unicodedata.normalize("NFC", id): id for id in ids}
        found = plain.get(unicodedata.normalize("NFC", name.replace("\\", "/")))
        named.add(found) if found is not None else absent.append(name)
    return named, sorted(absent, key=natural_key)


@dataclasses.dataclass(frozen=True)
class SplitRule:
    """Which split each recording is in; without shares or lists, the source decides.

    Attributes:
      shares: of train, validation and test; a recording's split follows from a hash of its id.
      lists: the ids of the validation and test recordings; the rest is train.
      files: the paths of these lists, for messages.
    """

    shares: tuple[float, float, float] | None = None
    lists: dict[str, frozenset[str]] | None = None
    files: dict[str, str] | None = None

    @property
    def name(self) -> str:
        """The rule's name in the manifest; equal names split the same recordings equally."""
        if self.shares is not None:
            return f"hash {','.join(f'{share:g}' for share in self.shares)}"
        if self.lists is not None:
            text = json.dumps([sorted(self.lists[split]) for split in SPLITS[1:]])
            return f"lists {hashlib.sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()}"
        return DEFAULT_RULE

    def apply(self, recordings: Sequence[SourceRecording]) -> Sequence[SourceRecording]:
        """The recordings, each with its split.

        Raises:
          UserError: a list names a recording that is not there, or the lists leave a split empty.
        """
        if self.shares is not None:
            splits = split_by_hash((recording.id for recording in recordings), self.shares)
        elif self.lists is not None:
            splits = self._by_lists([recording.id for recording in recordings])
        else:
            return recordings
        return [dataclasses.replace(recording, split=splits[recording.id]) for recording in recordings]

    def _by_lists(self, ids: Sequence[str]) -> dict[str, str]:
        assert self.lists is not None and self.files is not None
        splits = dict.fromkeys(ids, "train")
        for split, names in self.lists.items():
            named, absent = named_ids(names, splits)
            if absent:
                raise UserError(
                    f"{self.files[split]} names {len(absent)} recordings that are not there, {one_line(absent[0])} the "
                    f"first; write names as the source has them, such as {one_line(min(ids))}"
                )
            splits.update(dict.fromkeys(named, split))
        if "train" not in splits.values():
            raise UserError("the validation and test lists name every recording; leave some to train on")
        return splits


def split_rule(shares: Sequence[float] | None, validation_list: str | None, test_list: str | None) -> SplitRule:
    """The rule that the flags ask for.

    Raises:
      UserError: shares that do not divide the whole, one list without the other, a list that cannot be read, names
        nothing, or shares a name with the other.
    """
    files = {"validation": validation_list, "test": test_list}
    given = {split: file for split, file in files.items() if file is not None}
    if shares is not None:
        if given:
            raise UserError("--splits and --validation_list or --test_list are two ways to split; give one of them")
        numbers = tuple(shares)
        if len(numbers) != 3 or not all(0 < share < 1 for share in numbers) or not math.isclose(sum(numbers), 1):
            raise UserError(
                f"--splits={','.join(f'{share:g}' for share in numbers)} must be three shares above 0 of train, "
                "validation and test that add up to 1, such as 0.88,0.06,0.06"
            )
        return SplitRule(shares=(numbers[0], numbers[1], numbers[2]))
    if not given:
        return SplitRule()
    if len(given) == 1:
        missing = next(split for split in files if split not in given)
        raise UserError(f"--{next(iter(given))}_list is given without --{missing}_list; every data set has both splits")
    lists = {split: _read_list(f"--{split}_list", file) for split, file in given.items()}
    both = sorted(lists["validation"] & lists["test"])
    if both:
        raise UserError(f"{one_line(both[0])} is in both {given['validation']} and {given['test']}; take it out of one")
    return SplitRule(lists=lists, files=given)


def _read_list(flag: str, path: str) -> frozenset[str]:
    try:
        with open(os.path.expanduser(path), encoding="utf-8-sig") as file:
            names = frozenset(line.strip().removeprefix("./") for line in file if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UserError(
            f"{flag}={path} cannot be read: {reason}; give a text file of recordings, one a line"
        ) from error
    if not names:
        raise UserError(f"{flag}={path} names no recordings; every split needs at least one")
    return names
