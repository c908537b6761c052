"""Prepares a data set: reads recordings, quantises them, and writes sharded ArrayRecord files and a manifest.

    python -m pipelines.prepare --dataset demo
    python -m pipelines.prepare --dataset sc09 --source /data/sc09.zip
    python -m pipelines.prepare --dataset my_piano --source ~/recordings --window_length=32000 --hop_length=16000
    python -m pipelines.prepare --dataset speech --source ~/speech --trim_silence=40 --loudness=-23 \\
        --splits=0.8,0.1,0.1 --direct_running_mode=multi_processing --direct_num_workers=0

Writes OUTPUT_DIR/DATASET/{train,validation,test}-NNNNN-of-NNNNN.array_record, and manifest.json last of all: without a
manifest there is no data set. A data set that is whole already stays as it is. For recordings of your own, the folder
also gets a config.py to train on them. All other arguments are Beam's (--runner, --direct_running_mode,
--direct_num_workers, ...); an argument that Beam does not know is refused.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import os
import shlex
import sys
from collections.abc import Sequence

from harmonic.audio import ENCODINGS
from harmonic.records import Manifest
from pipelines.beam.loading import leave_out_unused
from pipelines.build import PrepareSpec, prepare
from pipelines.console import Parser, ProgressLine, guarded, manifest_lines, skipped_lines
from pipelines.own_config import CONFIG_NAME
from pipelines.paths import is_local, join
from pipelines.sources.layouts import DATA_SETS


def parse(argv: Sequence[str]) -> tuple[PrepareSpec, list[str]]:
    """The spec, and the arguments for Beam.

    Raises:
      UserError: a bad value, or a missing --dataset.
    """
    default = PrepareSpec("")
    parser = Parser(
        "python -m pipelines.prepare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--dataset", required=True, help=f"{', '.join(DATA_SETS)}, or a name of your own with --source")
    add(
        "--source",
        help="hub (the default of the published ones), synth (of the demo), hf:USER/NAME, or a folder or a zip or tar "
        "archive: a path, or a URL (https://, gs://, s3://)",
    )
    add("--output_dir", default=default.output_dir, help="where the data set's folder is made (%(default)s)")
    add("--encoding", choices=ENCODINGS, help="default: linear for beethoven, mu_law for the others")
    add("--num_levels", type=int, default=default.num_levels, help="2 to 65536 (%(default)s)")
    add("--window_length", type=int, help="samples of a training window (default: the data set's)")
    add(
        "--hop_length",
        type=int,
        help="samples from the start of one training window to the next: shorter than the window they overlap, longer "
        "they leave samples out (default: the window's length). Evaluation sees every sample once in any case",
    )
    add(
        "--splits",
        type=_shares,
        metavar="TRAIN,VALIDATION,TEST",
        help="shares of your own recordings, each by a hash of its name, so that new ones move none of the old "
        "(default: 0.88,0.06,0.06)",
    )
    add("--validation_list", metavar="FILE", help="names of your own recordings for validation, one a line")
    add("--test_list", metavar="FILE", help="names of those for test; recordings in neither list are trained on")
    add(
        "--trim_silence",
        type=float,
        metavar="DB",
        help="cut off leading and trailing silence, DB below a recording's loudest frame, as librosa.effects.trim; "
        "its default is 60, and 30 cuts closer (default: leave it)",
    )
    add(
        "--loudness",
        type=float,
        metavar="LUFS",
        help="bring every recording to that loudness, such as -23 (ITU-R BS.1770-4), and quantise all on one scale "
        "instead of each by its own minimum and maximum; none is clipped (default: leave it)",
    )
    add("--record_length", type=int, default=default.record_length, help="samples of a record (%(default)s)")
    add("--num_shards", type=int, help="at most so many a split (default: one for 32 MiB of source)")
    add(
        "--allow_skipped",
        action="store_true",
        help="leave out recordings of a published data set that are damaged; where none of a split of your own can be "
        "read, split the others anew",
    )
    add("--overwrite", action="store_true", help="replace the data set in the folder")
    known, rest = parser.parse_known_args(list(argv))
    return PrepareSpec(**{field.name: getattr(known, field.name) for field in dataclasses.fields(PrepareSpec)}), rest


def _shares(text: str) -> tuple[float, ...]:
    return tuple(float(share) for share in text.split(","))


_shares.__name__ = "shares"  # in argparse's message


def train_command(manifest: Manifest, output_dir: str) -> str:
    """The command that trains on a data set, or first copies it to a local disk."""
    name, local = manifest.dataset, is_local(output_dir)
    folder = join(output_dir, name) if local else name
    command = ["python", "-m", "workflows.train", f"--config={name}"]
    if name in DATA_SETS:
        default, m = DATA_SETS[name], manifest  # the published config has these defaults
        for field, usual in (
            ("encoding", m.encoding == default.encoding),
            ("num_levels", m.num_levels == 256),
            ("window_length", (m.window_length, m.hop_length) == 2 * (default.window_length,)),
        ):
            if not usual:
                command.append(f"--set=data.{field}={getattr(m, field)}")
    else:
        command[-1] = f"--config={join(folder, CONFIG_NAME)}"
    if not local:
        return f"copy {join(output_dir, name)} to a local disk; there: {shlex.join([*command, '--data_dir=.'])}"
    if os.path.normpath(output_dir) != "data":
        command.append(f"--data_dir={output_dir}")
    return f"train on it: {shlex.join(command)}"


def _main(argv: Sequence[str], line: ProgressLine) -> int:
    spec, rest = parse(argv)
    manifest = prepare(spec, rest, line)
    line.close()
    skipped = skipped_lines(manifest)
    lines = [*manifest_lines(manifest, spec.folder), "", *skipped, *([""] if skipped else [])]
    print("\n".join([*lines, train_command(manifest, spec.output_dir)]))
    return 0


def main(argv: Sequence[str]) -> int:
    """Runs; returns the exit status: 0, 2 for a UserError, 130 for an interrupt."""
    return guarded(_main, argv)


if __name__ == "__main__":
    # Another runner may need all of Beam, and `datasets`, which opens hf: sources, needs pandas.
    if not any(argument.startswith(("--runner", "hf:", "--source=hf:")) for argument in sys.argv):
        leave_out_unused()
    exit_status = main(sys.argv[1:])
    gc.freeze()  # the interpreter's last collection would visit all of Beam's objects for half a second
    sys.exit(exit_status)
