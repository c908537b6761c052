"""Writes a run's report.html: curves, likelihoods, players, in one file that opens offline.

python -m workflows.report --workdir=runs/sc09
"""

from __future__ import annotations

from absl import flags

from harmonic.report import build_report
from workflows import cli

flags.adopt_module_key_flags(cli)


def main() -> None:
    """Builds the report and prints where it is."""
    print(build_report(cli.FLAGS.workdir or "runs/demo"))


if __name__ == "__main__":
    cli.run(main)
