"""Prepares a data set: reads recordings, quantises them, and writes sharded ArrayRecord files and a manifest.

    python -m pipelines.prepare --dataset demo
    python -m pipelines.prepare --dataset sc09 --source /data/sc09.zip
    python -m pipelines.prepare --dataset my_piano --source ~/recordings --direct_running_mode=multi_processing \
        --direct_num_workers=0

Writes OUTPUT_DIR/DATASET/{train,validation,test}-NNNNN-of-NNNNN.array_record, and manifest.json last of all: without a
manifest there is no data set. What stands there already whole is left as it is. All other arguments are Beam's
(--runner, --direct_running_mode, --direct_num_workers, ...); one that Beam does not know is refused.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Sequence
from typing import NoReturn, TextIO

from harmonic.audio import ENCODINGS
from harmonic.errors import UserError
from harmonic.records import Manifest
from pipelines.build import PrepareSpec, prepare
from pipelines.sources import DATA_SETS

_PLAIN_SECONDS, _TERMINAL_SECONDS = 5.0, 0.5  # between lines of progress


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


def parse(argv: Sequence[str]) -> tuple[PrepareSpec, list[str]]:
    """The spec, and the arguments that are left to Beam.

    Raises:
      UserError: a value that cannot be, or a missing --dataset.
    """
    default = PrepareSpec("")
    parser = _Parser(
        "python -m pipelines.prepare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--dataset", required=True, help=f"{', '.join(DATA_SETS)}, or a name of your own with --source")
    add("--source", help="hub (the default of the published ones), synth (of the demo), or a zip archive or folder")
    add("--output_dir", default=default.output_dir, help="where the data set's folder is made (%(default)s)")
    add("--encoding", choices=ENCODINGS, help="default: linear for beethoven, mu_law for the others")
    add("--window_length", type=int, help="samples of a training window (default: the data set's)")
    add("--record_length", type=int, default=default.record_length, help="samples of a record (%(default)s)")
    add("--num_shards", type=int, help="at most so many a split (default: one for 32 MiB of source)")
    add("--num_levels", type=int, default=default.num_levels, help="2 to 65536 (%(default)s)")
    add("--allow_skipped", action="store_true", help="leave out recordings of a published data set that are damaged")
    add("--overwrite", action="store_true", help="replace what stands in the data set's folder")
    known, rest = parser.parse_known_args(list(argv))
    return PrepareSpec(**{field.name: getattr(known, field.name) for field in dataclasses.fields(PrepareSpec)}), rest


class ProgressLine:
    """Recordings done, rate and time left on stderr: one line that changes on a terminal, plain lines elsewhere."""

    def __init__(self, stream: TextIO):
        self._stream = stream
        self._terminal = stream.isatty()
        self._started = self._last = time.monotonic()
        self._shown = False

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self._last < (_TERMINAL_SECONDS if self._terminal else _PLAIN_SECONDS) or not done:
            return
        self._last = now
        rate = done / (now - self._started)
        text = f"{done:,} of {total:,} recordings, {rate:,.1f} a second, {duration((total - done) / rate)} left"
        self._stream.write(f"\r\033[K{text}" if self._terminal else f"{text}\n")
        self._stream.flush()
        self._shown = True

    def close(self) -> None:
        """Clears the line on a terminal."""
        if self._shown and self._terminal:
            self._stream.write("\r\033[K")
            self._stream.flush()


def duration(seconds: float) -> str:
    """Seconds for people: `42 s`, `3 min 05 s`, `2 h 10 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def table(manifest: Manifest, folder: str) -> str:
    """What a data set holds, split by split."""
    header = ("split", "recordings", "windows", "samples", "hours", "shards", "bytes", "skipped")
    rows = []
    for name, split in manifest.splits.items():
        skipped = sum(skipped.split == name for skipped in manifest.skipped)
        size = sum(shard.bytes for shard in split.shards)
        hours = split.samples / manifest.sample_rate / 3600
        numbers = (split.recordings, split.windows, split.samples, hours, len(split.shards), size, skipped)
        rows.append((name, *(f"{n:,.3f}" if isinstance(n, float) else f"{n:,}" for n in numbers)))
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in [header, *rows]
    ]
    skipped_lines = [f"skipped {s.recording} ({s.split}): {s.reason}" for s in manifest.skipped[:10]]
    if len(manifest.skipped) > 10:
        skipped_lines.append(f"skipped {len(manifest.skipped) - 10:,} more; manifest.json lists them all")
    title = (
        f"{manifest.dataset} in {folder}: {manifest.encoding}, {manifest.num_levels:,} levels, "
        f"{manifest.sample_rate:,} Hz, windows of {manifest.window_length:,} samples"
    )
    return "\n".join([title, "", *lines, *([""] if skipped_lines else []), *skipped_lines])


def main(argv: Sequence[str]) -> int:
    """Runs; returns the exit status: 0, 2 for what the user can mend, 130 for an interrupt."""
    line = ProgressLine(sys.stderr)
    try:
        spec, rest = parse(argv)
        manifest = prepare(spec, rest, line)
        line.close()
        print(table(manifest, spec.folder))
        return 0
    except UserError as error:
        line.close()
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        line.close()
        print("interrupted; run the same command again", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
