"""From an archive to sound: prepare, train, evaluate, generate, measure how that sounds, report.

    python -m workflows.full_run
    python -m workflows.full_run --config=sc09_small --source=sc09.zip

A stage is skipped when its output is already whole: the same command continues a run that was interrupted anywhere.
Several processes train together; the first one alone does the stages before and after, and the others wait, and end.
"""

from __future__ import annotations

import json
from pathlib import Path

from absl import flags

from harmonic import processes
from harmonic.train import train
from workflows import cli
from workflows.chain import full_run

_SOURCE = flags.DEFINE_string(
    "source", None, "hub, an archive or folder of recordings, or synth; the data set's own if not given"
)
_INIT_FROM = flags.DEFINE_string("init_from", None, "another run's folder, whose best weights this run starts from")
cli.define_process_flags()
flags.adopt_module_key_flags(cli)


def main() -> None:
    """Runs every stage whose output is not whole."""
    lead = cli.join_processes()
    config = cli.config_from_flags()
    workdir = cli.workdir_from_flags(config)
    if not lead:
        processes.gather("")  # until the data is prepared
        train(config, Path(cli.FLAGS.data_dir) / config.data.dataset, workdir, init_from=_INIT_FROM.value)
        return
    summary = full_run(
        config,
        workdir,
        Path(cli.FLAGS.data_dir),
        source=_SOURCE.value,
        init_from=_INIT_FROM.value,
        command=cli.command("full_run"),
    )
    print(json.dumps({k: summary[k] for k in ("test", "train", "stages")}, indent=2))
    print(f"report: {workdir / 'report.html'}")


if __name__ == "__main__":
    cli.run(main)
