"""Which recordings go into which shard, as a function of the listing alone; and long listings as files."""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Iterable, Iterator

from harmonic.records import SPLITS
from pipelines.beam.sink import stage_folder
from pipelines.beam.storage import create_file, open_file
from pipelines.errors import output_errors
from pipelines.paths import is_local, join
from pipelines.sources.base import SourceRecording

# A shard's split and number, and the id, label and bytes of each of its recordings. Plain tuples, since Beam encodes
# them faster than instances of a class.
ShardRows = tuple[str, int, list[tuple[str, str | None, int]]]


def _hash(recording: SourceRecording) -> int:
    return zlib.crc32((recording.group or recording.id).encode())


def shard_counts(
    recordings: Iterable[SourceRecording], shard_bytes: int, wanted: int | None = None, most: int = 65_536
) -> dict[str, int]:
    """The number of shards of each split.

    It is `wanted`, or one for every `shard_bytes` of source and at most `most`. It is lower if the recordings' hashes
    would leave a shard empty.
    """
    ids: dict[str, list[int]] = {split: [] for split in SPLITS}
    sizes = dict.fromkeys(SPLITS, 0)
    for recording in recordings:
        ids[recording.split].append(_hash(recording))
        sizes[recording.split] += recording.size
    counts = {}
    for split, hashes in ids.items():
        count = min(wanted or min(-(-sizes[split] // shard_bytes), most), len(hashes))
        while count > 1 and len({value % count for value in hashes}) < count:
            count -= -(-count // 16)
        counts[split] = max(count, 1)
    return counts


def group_by_shard(recordings: Iterable[SourceRecording], counts: dict[str, int]) -> list[ShardRows]:
    """The rows of each shard in the order of the listing; a recording's shard is the CRC-32 of its id or group.

    The largest shard comes first, so that workers that take shards in turn end at about the same time.
    """
    shards: dict[tuple[str, int], list[tuple[str, str | None, int]]] = {}
    for recording in recordings:
        key = recording.split, _hash(recording) % counts[recording.split]
        shards.setdefault(key, []).append((recording.id, recording.label, recording.size))
    largest_first = sorted(shards, key=lambda key: (-sum(size for _, _, size in shards[key]), key))
    return [(*key, shards[key]) for key in largest_first]


def stage_listing(folder: str, run: str, shards: Iterable[ShardRows], size: int) -> list[str]:
    """Writes the rows of each shard, a line of JSON, into files in the run's own folder; returns their paths.

    Args:
      folder, run: as for `ShardWriter`.
      shards: the rows.
      size: recordings after which the next file begins.

    Raises:
      UserError: the folder cannot be written.
    """
    paths: list[str] = []
    lines: list[str] = []
    held = 0

    def write() -> None:
        nonlocal held
        paths.append(join(stage_folder(folder, run), f"listing-{len(paths):05d}.gz"))
        with create_file(paths[-1]) as file:
            file.write(gzip.compress("\n".join(lines).encode(), 1))
        lines.clear()
        held = 0

    with output_errors(folder):
        if is_local(folder):
            os.makedirs(stage_folder(folder, run), exist_ok=True)
        for shard in shards:
            lines.append(json.dumps(shard))
            held += len(shard[2])
            if held >= size:
                write()
        if lines:
            write()
    return paths


def read_listing(path: str) -> Iterator[ShardRows]:
    """The rows in a file of `stage_listing`."""
    with open_file(path) as file:
        for line in gzip.decompress(file.read()).splitlines():
            split, index, rows = json.loads(line)
            yield split, index, [tuple(row) for row in rows]
