"""Shows what a prepared data set holds, writes parts of it back as sound, and verifies that no byte of it has changed.

    python -m pipelines.inspect data/sc09
    python -m pipelines.inspect data/sc09 --verify
    python -m pipelines.inspect data/sc09 --play=10 --split=test --output_dir=listen
    python -m pipelines.inspect data/mine --recording=tape/3.flac --output_dir=listen

Without --verify: the data set's properties, durations, tokens, the loudest and the quietest recordings, the skipped
recordings and the reasons. With --verify, every byte of every file is read and compared with the checksums, and every
record with its own checksum, the index and the manifest. Each damaged file and record gets one line, and the exit
status is 2 if anything is damaged, missing or superfluous.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import soundfile

from harmonic import audio
from harmonic.errors import UserError, one_line
from harmonic.records import MANIFEST_NAME, SPLITS, Manifest, count_windows
from pipelines.beam.sink import read_manifest
from pipelines.console import Parser, ProgressLine, clock, columns, guarded, manifest_lines, skipped_lines
from pipelines.errors import output_errors
from pipelines.inspection.reading import Located, pieces, recordings
from pipelines.inspection.survey import QUANTILES, Survey, plot, survey
from pipelines.inspection.verify import Verifier
from pipelines.paths import is_local

_LARGEST_WAV = (1 << 31) - 100  # samples of 16 bits that a WAV file's header can count


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments.

    Raises:
      UserError: a bad value.
    """
    parser = Parser(
        "python -m pipelines.inspect",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("folder", metavar="DIR", help="the data set's folder, with a manifest.json")
    add("--verify", action="store_true", help="read everything again, and name what is damaged, missing or superfluous")
    add("--play", type=int, default=0, metavar="N", help="write N windows, spread over a split, as WAV files")
    add("--recording", metavar="ID", help="write that recording as a WAV file")
    add("--split", choices=SPLITS, default="train", help="where --play takes windows from (%(default)s)")
    add("--output_dir", default="inspected", help="where WAV files go (%(default)s)")
    add("--format", choices=("text", "json"), default="text", help="json: one object, of the same figures")
    arguments = parser.parse_args(list(argv))
    if arguments.play < 0:
        raise UserError(f"--play={arguments.play} must be a number of windows, from 1 on")
    return arguments


# Sound.


def write_windows(folder: str, manifest: Manifest, split: str, wanted: int, output: str) -> list[dict[str, Any]]:
    """Writes windows, spread evenly over a split, as WAV files. Returns a description of each.

    Raises:
      UserError: a record is damaged, or the files cannot be written.
    """
    total = manifest.splits[split].windows
    chosen = {index * total // wanted for index in range(wanted)} if wanted < total else set(range(total))
    first, written = 0, []
    for located in recordings(folder, manifest, split):
        length = located.recording.length
        count = count_windows(length, manifest.window_length, manifest.hop_length)
        for index in sorted(chosen.intersection(range(first, first + count))):
            start = (index - first) * manifest.hop_length
            stop = min(start + manifest.window_length, length)
            name = f"{split}-{index:06d}-{_plain(located.recording.id)}.wav"
            written.append(_write(manifest, located, start, stop, output, name))
        first += count
    return written


def write_recording(folder: str, manifest: Manifest, name: str, output: str) -> dict[str, Any]:
    """Writes a whole recording as a WAV file. Returns a description of it.

    Raises:
      UserError: there is no such recording, it is damaged, or the file cannot be written.
    """
    other = ""
    for located in recordings(folder, manifest):
        if located.recording.id == name:
            return _write(manifest, located, 0, located.recording.length, output, f"{_plain(name)}.wav")
        other = located.recording.id
    skipped = next((s for s in manifest.skipped if s.recording == name), None)
    if skipped:
        raise UserError(f"recording {one_line(name)} was skipped when the data set was prepared: it {skipped.reason}")
    raise UserError(f"{folder} has no recording {one_line(name)}; names are like {one_line(other)}")


def _plain(name: str) -> str:
    """A recording's id as part of a file name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", os.path.splitext(name)[0])[-80:].strip(".-") or "recording"


def _write(manifest: Manifest, located: Located, start: int, stop: int, output: str, name: str) -> dict[str, Any]:
    path = os.path.join(output, name)
    temporary, rate = f"{path}.partial", manifest.sample_rate
    with output_errors(output):
        os.makedirs(output, exist_ok=True)
        kind = "WAV" if stop - start < _LARGEST_WAV else "RF64"
        try:
            with soundfile.SoundFile(temporary, "w", rate, manifest.channels, subtype="PCM_16", format=kind) as file:
                for tokens in pieces(manifest, located, start, stop):
                    file.write(audio.decode(tokens, manifest.encoding, num_levels=manifest.num_levels))
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
    where = {"recording": located.recording.id, "split": located.split, "label": located.recording.label}
    return {"file": path, **where, "start_seconds": start / rate, "seconds": (stop - start) / rate}


# Text.


def survey_lines(manifest: Manifest, found: Survey) -> list[str]:
    """A survey as text."""
    names = [{0.0: "shortest", 0.5: "median", 1.0: "longest"}.get(q, f"{q:.0%}") for q in QUANTILES]
    rows = [("durations", *names)]
    rows += [(split, *(clock(seconds, 3) for seconds in values)) for split, values in found.durations.items()]
    lines = columns(rows)
    if manifest.trim_silence is not None:
        lines += ["", f"silence that was cut off: {clock(found.cut_seconds, 3)}"]
    seen = sum(found.tokens)
    peak = max(range(len(found.tokens)), key=found.tokens.__getitem__)
    of = sum(shard.records for split in manifest.splits.values() for shard in split.shards)
    which = "all" if found.records == of else f"{found.records:,} of {of:,}"
    unused = f"{found.tokens.count(0):,} of {len(found.tokens):,}"
    lines += [
        "",
        f"tokens ({which} records): {found.entropy:.3f} bits of entropy; the most frequent is {peak} "
        f"({found.tokens[peak] / seen:.2%}); {unused} are unused",
        *plot(found.tokens),
    ]
    for title, levels in (("loudest", found.loudest), ("quietest", found.quietest)):
        if levels:
            table = [(title, "split", "dBFS", "gain in dB")[: 3 if levels[0].gain is None else 4]]
            for level in levels:
                gain = [] if level.gain is None else [f"{level.gain:+.2f}"]
                table.append((one_line(level.recording), level.split, f"{level.level:.2f}", *gain))
            lines += ["", *columns(table, left=2)]
    return lines


def _played_lines(played: list[dict[str, Any]]) -> Iterable[str]:
    for row in played:
        end = row["start_seconds"] + row["seconds"]
        yield f"{row['file']}  {one_line(row['recording'])} {clock(row['start_seconds'], 3)} - {clock(end, 3)}"


def _main(argv: Sequence[str], line: ProgressLine) -> int:
    arguments = parse(argv)
    text = arguments.format == "text"
    folder = os.path.expanduser(arguments.folder) if is_local(arguments.folder) else arguments.folder
    manifest = read_manifest(folder)
    if manifest is None:
        raise UserError(f"{folder} holds no data set: {MANIFEST_NAME} is missing; make one with pipelines.prepare")
    shown: dict[str, Any] = {"folder": folder, "manifest": dataclasses.asdict(manifest)}

    def say(*lines: str) -> None:
        if text:
            line.close()
            print("\n".join(lines), flush=True)

    say(*manifest_lines(manifest, folder), "")
    if arguments.verify:
        problems: list[str] = []

        def report(problem: str) -> None:
            problems.append(problem) if not text else say(problem)

        checked = Verifier(folder, manifest, report, lambda done, total: line(done // 10**6, total // 10**6)).run()
        shown["verified"] = {**dataclasses.asdict(checked), "problems": problems}
        counts = f"{checked.files:,} files, {checked.records:,} records, {checked.samples:,} samples"
        if checked.problems:
            say(f"damaged: {checked.problems:,} problem{'s' * (checked.problems != 1)}; whole are {counts}")
        else:
            say(f"verified: {counts}, all as they were written")
        status = 2 if checked.problems else 0
    else:
        found = survey(folder, manifest, line)
        shown["survey"] = {**dataclasses.asdict(found), "quantiles": QUANTILES, "entropy": found.entropy}
        skipped = skipped_lines(manifest)
        say(*survey_lines(manifest, found), *([""] if skipped else []), *skipped)
        status = 0
    if status == 0 and (arguments.play or arguments.recording is not None):
        played = []
        if arguments.play:
            played += write_windows(folder, manifest, arguments.split, arguments.play, arguments.output_dir)
        if arguments.recording is not None:
            played.append(write_recording(folder, manifest, arguments.recording, arguments.output_dir))
        shown["played"] = played
        say("", *_played_lines(played))
    line.close()
    if not text:
        print(json.dumps(shown, indent=2))
    return status


def main(argv: Sequence[str]) -> int:
    """Runs; returns the exit status: 0, 2 for a UserError or a data set that is not whole, 130 for an interrupt."""
    return guarded(_main, argv, "MB" if "--verify" in argv else "recordings")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
