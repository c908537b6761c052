"""Writes a run's model as a folder to publish, and pushes it to the Hugging Face hub if asked to.

python -m workflows.export --workdir=runs/sc09 --output_dir=exports/sc09 --license=cc-by-4.0
python -m workflows.export --workdir=runs/sc09 --output_dir=exports/sc09 --push_to=USER/NAME --private
"""

from __future__ import annotations

from pathlib import Path

from absl import flags

from harmonic import hub
from harmonic.errors import UserError
from harmonic.export import export_run
from workflows import cli

_OUTPUT = flags.DEFINE_string("output_dir", None, "the folder to write; exports/<the run's name> by default")
_PUSH = flags.DEFINE_string("push_to", None, "USER/NAME of a model repository on the hub, made if there is none")
_PRIVATE = flags.DEFINE_bool("private", False, "with --push_to: a private repository")
_LICENSE = flags.DEFINE_string("license", None, "the hub's name of a licence for the card, such as cc-by-4.0")
_CHECKPOINT = flags.DEFINE_string("checkpoint", "best", "best (on validation), latest, or a step")
_RAW = flags.DEFINE_bool("raw", False, "the raw weights instead of their running average")
_SAMPLES = flags.DEFINE_integer("num_samples", 2, "sample WAVs beside the card", lower_bound=0, upper_bound=100)
_SECONDS = flags.DEFINE_float("seconds", 1.0, "length of each")
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "write into a folder, or a repository, that holds something else")
flags.adopt_module_key_flags(cli)


def main() -> None:
    """Exports, and prints the files."""
    if cli.FLAGS.config or cli.FLAGS.set:
        raise UserError("a run is exported with its own config: give --workdir alone")
    if _PRIVATE.value and not _PUSH.value:
        raise UserError("--private goes with --push_to")
    if _PUSH.value is not None:
        hub.check_push(_PUSH.value)
    workdir = Path(cli.FLAGS.workdir or "runs/demo")
    folder = Path(_OUTPUT.value or Path("exports") / workdir.resolve().name)
    files = export_run(
        workdir,
        folder,
        checkpoint=_CHECKPOINT.value,
        raw=_RAW.value,
        license_name=_LICENSE.value,
        num_samples=_SAMPLES.value,
        seconds=_SECONDS.value,
        repo=_PUSH.value,
        overwrite=_OVERWRITE.value,
    )
    for name in files:
        print(f"{folder / name}  {(folder / name).stat().st_size:,} bytes")
    if _PUSH.value:
        print(hub.push(folder, _PUSH.value, files, private=_PRIVATE.value, overwrite=_OVERWRITE.value))


if __name__ == "__main__":
    cli.run(main)
