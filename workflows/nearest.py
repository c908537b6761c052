"""Memorised or composed? Finds the training excerpts that are nearest to a run's generated clips.

python -m workflows.nearest --workdir=runs/sc09_small
python -m workflows.nearest --workdir=runs/piano --seconds=2 --num_clips=4

Writes RUN/nearest.json and the excerpts as sounds, and builds the report again, which shows both.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from absl import flags

from harmonic.errors import UserError
from harmonic.nearest import QUANTILES, compare_run
from harmonic.records import load_manifest
from harmonic.report import build_report
from workflows import cli

_SECONDS = flags.DEFINE_float(
    "seconds", None, "length of the excerpts; a second by default, or less if clips or recordings are shorter"
)
_NUM = flags.DEFINE_integer("num_clips", 16, "how many generated clips to compare, at most", lower_bound=1)
flags.adopt_module_key_flags(cli)


def main() -> None:
    """Compares, and prints the table."""
    if cli.FLAGS.config or cli.FLAGS.set:
        raise UserError("a run is compared with its own data: give --workdir alone")
    workdir = Path(cli.FLAGS.workdir or "runs/demo")
    data = Path(cli.FLAGS.data_dir) / load_manifest(workdir).dataset
    found = compare_run(workdir, data, seconds=_SECONDS.value, num_clips=_NUM.value, show_progress=True)
    for line in _table(found):
        print(line)
    print(f"report: {build_report(workdir)}")


def _table(found: dict[str, Any]) -> list[str]:
    def number(value: float | None, form: str) -> str:
        return f"{'-' if value is None else format(value, form):>9}"

    training = found["training"]
    lines = [
        f"nearest of {training['compared']:,} training recordings ({training['seconds'] / 3600:.2f} h), excerpts of "
        f"{found['seconds']:g} s, distances in dB",
        f"{'':12}{'clips':>9}{'excerpts':>9}{'least':>9}"
        + "".join(f"{f'{100 * q:g} %':>9}" for q in QUANTILES[1:])
        + f"{'as a copy':>11}",
    ]
    for name, group in found["groups"].items():
        quantiles = "".join(number(value, ".2f") for value in group["quantiles"].values())
        share = number(group["as_near_as_a_copy"], ".1%")
        lines.append(f"{name.replace('_', '-'):12}{group['clips']:>9,}{group['excerpts']:>9,}{quantiles}{share:>11}")
    return lines


if __name__ == "__main__":
    cli.run(main)
