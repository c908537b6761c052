"""Verifies a prepared data set: every file against its checksum, every record against index, manifest and itself."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
from collections.abc import Callable, Iterator, Sequence

from harmonic.errors import UserError, one_line
from harmonic.records import Manifest, Record, RecordError, Recording, Shard, count_windows, read_index
from pipelines.beam.storage import list_files
from pipelines.inspection.reading import fetched, open_shard, read_record

_OURS = re.compile(r".*\.array_record|.*\.recordings\.jsonl|_partial-.*|manifest\.json\.partial")


@dataclasses.dataclass
class Checked:
    """Files, records and samples that were read, and the number of problems."""

    files: int = 0
    records: int = 0
    samples: int = 0
    problems: int = 0


class Verifier:
    """Reads a whole data set, one record at a time.

    Args:
      folder: the data set's, local or of a file system that Beam knows.
      manifest: its manifest, which matched its own checksum when it was read.
      report: called with each problem, one line that names the file and, if known, the record.
      progress: called now and then with (bytes done, bytes in all).
    """

    def __init__(
        self,
        folder: str,
        manifest: Manifest,
        report: Callable[[str], None],
        progress: Callable[[int, int], None] = lambda done, total: None,
    ):
        self._folder, self._manifest = folder, manifest
        self._report, self._progress = report, progress
        shards = [shard for split in manifest.splits.values() for shard in split.shards]
        # Each shard is read twice, as bytes and as records.
        self._done, self._total = 0, sum(2 * shard.bytes + shard.index_bytes for shard in shards)
        self.checked = Checked()

    def run(self) -> Checked:
        """Checks everything. Each problem goes to `report`, their number into the result."""
        self._list()
        for name, split in self._manifest.splits.items():
            for total in ("recordings", "windows", "samples"):
                found = sum(getattr(shard, total) for shard in split.shards)
                if found != getattr(split, total):
                    self._problem(f"manifest.json: {name} has {getattr(split, total)} {total}, its shards {found}")
            for shard in split.shards:
                with fetched(self._folder, shard) as local:
                    self._shard(local, shard)
        return self.checked

    def _problem(self, line: str) -> None:
        self.checked.problems += 1
        self._report(line)

    def _advance(self, size: int) -> None:
        self._done += size
        self._progress(self._done, self._total)

    def _list(self) -> None:
        shards = [shard for split in self._manifest.splits.values() for shard in split.shards]
        listed = {name for shard in shards for name in (shard.file, shard.index_file)}
        for name in sorted(list_files(self._folder)):
            if name not in listed and _OURS.fullmatch(name):
                self._problem(f"{one_line(name)} is superfluous: the manifest does not list it")

    def _shard(self, folder: str, shard: Shard) -> None:
        readable = self._file(folder, shard.file, shard.bytes, shard.sha256)
        # The records are not compared with a damaged index.
        index = self._file(folder, shard.index_file, shard.index_bytes, shard.index_sha256) == ""
        before = self._done
        if readable is not None:
            self._records(folder, shard, self._index(folder, shard) if index else None)
        self._advance(before + shard.bytes - self._done)

    def _file(self, folder: str, name: str, size: int, sha256: str) -> str | None:
        """The problem with a file's bytes, "" for none, None if it cannot be read."""
        digest, found, before = hashlib.sha256(), 0, self._done
        wrong: str | None = ""
        try:
            with open(os.path.join(folder, name), "rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
                    found += len(block)
                    self._advance(min(len(block), before + size - self._done))
            if found != size:
                wrong = f"has {found} bytes, not the {size} of the manifest"
            elif digest.hexdigest() != sha256:
                wrong = "does not match its checksum"
            self.checked.files += 1
        except OSError as error:
            self._problem(f"{name} is missing" if isinstance(error, FileNotFoundError) else f"{name}: {error.strerror}")
            wrong = None
        if wrong:
            self._problem(f"{name} {wrong}")
        self._advance(before + size - self._done)
        return wrong

    def _index(self, folder: str, shard: Shard) -> Iterator[Recording]:
        """The recordings of a shard; on the way, the index against the manifest."""
        totals, longest = dict.fromkeys(("records", "recordings", "windows", "samples"), 0), 0
        m = self._manifest
        try:
            for row in read_index(folder, shard):
                if row.records != -(-row.length // m.record_length):
                    self._problem(f"{shard.index_file}: {one_line(row.id)} has {row.records} records for {row.length}")
                windows = count_windows(row.length, m.window_length, m.hop_length)
                for name, value in (("records", row.records), ("windows", windows), ("samples", row.length)):
                    totals[name] += value
                totals["recordings"] += 1
                longest = max(longest, row.length)
                yield row
        except UserError as error:
            self._problem(f"{shard.index_file}: {error}")
            return
        for name, found in totals.items():
            if found != getattr(shard, name):
                self._problem(f"{shard.index_file} has {found} {name}, not the {getattr(shard, name)} of the manifest")
        if shard.longest not in (0, longest):
            self._problem(f"{shard.index_file} has {longest} samples at most, not the {shard.longest} of the manifest")

    def _records(self, folder: str, shard: Shard, index: Iterator[Recording] | None) -> None:
        try:
            records: Sequence[bytes] = open_shard(os.path.join(folder, shard.file))
            count = len(records)
        except RecordError as error:
            self._problem(f"{shard.file} cannot be opened, nor any of its {shard.records} records: {error}")
            records, count = [], 0
        if records and count != shard.records:
            self._problem(f"{shard.file} has {count} records, not the {shard.records} of the manifest")
        first = 0
        for row in index or ():
            for piece in range(min(row.records, max(count - first, 0))):
                self._record(records, shard, first + piece, row, piece * self._manifest.record_length)
            first += row.records
        for number in range(first, count):
            self._record(records, shard, number)

    def _record(
        self, records: Sequence[bytes], shard: Shard, number: int, row: Recording | None = None, offset: int = 0
    ):
        try:
            record = read_record(records, number)
            self._compare(record)
            if row is not None:
                self._expect(record, row, offset)
            self.checked.records += 1
            self.checked.samples += len(record.tokens)
        except RecordError as error:
            where = f" ({one_line(row.id)} from sample {offset})" if row is not None else ""
            self._problem(f"{shard.file}: record {number}{where} is damaged: {error}")
        if shard.records:
            self._advance(shard.bytes // shard.records)

    def _compare(self, record: Record) -> None:
        m = self._manifest
        if record.tokens.dtype.name != m.token_dtype or record.tokens.shape[1] != m.channels:
            raise RecordError(f"it has {record.tokens.shape[1]} channels of {record.tokens.dtype.name}")
        if record.tokens.size and int(record.tokens.max()) >= m.num_levels:
            raise RecordError(f"it has a token {record.tokens.max()}, beyond {m.num_levels} levels")

    def _expect(self, record: Record, row: Recording, offset: int) -> None:
        length = min(self._manifest.record_length, row.length - offset)
        for name, found, wanted in (
            ("recording", record.recording, row.id),
            ("offset", record.offset, offset),
            ("length", len(record.tokens), length),
            ("recording_length", record.recording_length, row.length),
            ("label", record.label, row.label),
        ):
            if found != wanted:
                raise RecordError(f"its {name} is {one_line(found)}, not {one_line(wanted)}")
