"""What `pipelines.prepare` is measured against: the same decoding, quantising and writing, by multiprocessing alone.

    python -m workflows.plain_prepare FOLDER OUTPUT PROCESSES

Every recording of a folder of audio files is read whole, mixed, resampled, quantised and written to ArrayRecord files,
some 32 MiB of source in each. That is all: no splits, index, checksum or manifest; nothing is checked, and what goes
wrong ends it. Takes the time of a command, its start and its imports too.
"""

from __future__ import annotations

import multiprocessing
import os
import sys

import soundfile
from array_record.python.array_record_module import ArrayRecordWriter

from harmonic.audio import SAMPLE_RATE, encode
from harmonic.records import Record, encode_record

_SHARD_BYTES = 32 << 20  # of source, as in pipelines.beam.graph
_RECORD_LENGTH = 131_072
_OPTIONS = "group_size:1,uncompressed"  # as in pipelines.beam.sink


def write_shard(task: tuple[list[str], str]) -> int:
    """Writes the recordings of one shard; returns how many."""
    paths, target = task
    writer = ArrayRecordWriter(target, _OPTIONS)
    for path in paths:
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
        waveform = samples.mean(axis=1)
        if rate != SAMPLE_RATE:
            import soxr

            waveform = soxr.resample(waveform, rate, SAMPLE_RATE, quality="HQ")
        tokens = encode(waveform, "mu_law")[:, None]
        for start in range(0, len(tokens), _RECORD_LENGTH):
            piece = tokens[start : start + _RECORD_LENGTH]
            writer.write(encode_record(Record(os.path.basename(path), start, len(tokens), piece)))
    writer.close()
    return len(paths)


def main(folder: str, output: str, processes: int) -> None:
    """Prepares a folder of audio files."""
    os.makedirs(output)
    paths = sorted(entry.path for entry in os.scandir(folder))
    count = max(-(-sum(os.stat(path).st_size for path in paths) // _SHARD_BYTES), 1)
    tasks = [(paths[i::count], os.path.join(output, f"{i:05d}.array_record")) for i in range(count)]
    with multiprocessing.Pool(processes) as pool:
        written = sum(pool.imap_unordered(write_shard, tasks))
    print(f"{written} recordings in {count} shards")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
