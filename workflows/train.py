"""Trains a model on a prepared data set, from its latest checkpoint if it has one.

python -m workflows.train --config=sc09 --workdir=runs/sc09
python -m workflows.train --config=my_config.py --init_from=runs/sc09 --workdir=runs/mine
python -m workflows.train --config=sc09 --set=mesh.data=8 --coordinator_address=host0:1234 --num_processes=2 \\
  --process_index=0    # and 1 on the other host; under SLURM, Open MPI and on TPUs without these flags
"""

from __future__ import annotations

from absl import flags

from harmonic.train import train
from workflows import cli

_INIT_FROM = flags.DEFINE_string("init_from", None, "another run's folder, whose best weights this run starts from")
cli.define_process_flags()
flags.adopt_module_key_flags(cli)


def main() -> None:
    """Trains."""
    lead = cli.join_processes()
    config = cli.config_from_flags()
    workdir = cli.workdir_from_flags(config)
    result = train(config, f"{cli.FLAGS.data_dir}/{config.data.dataset}", workdir, init_from=_INIT_FROM.value)
    if not lead:
        return
    best = "" if result.best_step is None else f", best validation {result.best_validation:.4f} at {result.best_step:,}"
    print(f"trained to step {result.step:,}{best}; evaluate it: {cli.next_command('evaluate', workdir)}")


if __name__ == "__main__":
    cli.run(main)
