"""Trains the classifier behind the perceptual figures, on a prepared data set with labels.

python -m workflows.train_classifier --data_dir=data --workdir=runs/sc09_classifier
python -m workflows.train_classifier --dataset=mine --workdir=runs/my_classifier --size=paper

After an interruption the same command continues.
"""

from __future__ import annotations

import json
from pathlib import Path

from absl import flags

from harmonic.errors import UserError
from harmonic.perceptual.fit import Settings, fit
from workflows import cli

_DATASET = flags.DEFINE_string("dataset", "sc09", "the data set's name in --data_dir")
_SIZE = flags.DEFINE_enum("size", "small", ["small", "paper"], "279,226 parameters, or the published 34,425,546")
_STEPS = flags.DEFINE_integer("steps", 0, "updates; 0 for 16 epochs", lower_bound=0)
_BATCH = flags.DEFINE_integer("batch_size", 64, "clips an update", lower_bound=2)
_RATE = flags.DEFINE_float("learning_rate", Settings.learning_rate, "at its peak")
_EVERY = flags.DEFINE_integer("checkpoint_every", Settings.checkpoint_every, "steps between checkpoints", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "of weights, order and augmentation", lower_bound=0)
flags.adopt_module_key_flags(cli)


def main() -> None:
    """Trains, and prints the accuracies as JSON."""
    if cli.FLAGS.config or cli.FLAGS.set:
        raise UserError("a classifier has no config: give --data_dir, --dataset, --workdir, --size, --steps")
    settings = Settings(
        size=_SIZE.value,
        steps=_STEPS.value,
        batch_size=_BATCH.value,
        learning_rate=_RATE.value,
        checkpoint_every=_EVERY.value,
        seed=_SEED.value,
    )
    workdir = Path(cli.FLAGS.workdir or f"runs/{_DATASET.value}_classifier")
    print(json.dumps(fit(cli.data_folder(_DATASET.value), workdir, settings), indent=2))


if __name__ == "__main__":
    cli.run(main)
