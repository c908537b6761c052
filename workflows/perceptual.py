"""FID, inception scores and AM score of a run's generated digits, by a classifier, beside real clips and noise.

python -m workflows.perceptual --workdir=runs/sc09 --classifier=runs/sc09_classifier
python -m workflows.perceptual --workdir=runs/sc09 --classifier=resnext.pth              # the published weights
python -m workflows.perceptual --dataset=sc09 --classifier=runs/sc09_classifier          # real clips and noise alone

After an interruption the same command continues.
"""

from __future__ import annotations

import sys
from pathlib import Path

from absl import flags

from harmonic.errors import UserError
from harmonic.perceptual.measure import measure_reference, measure_run, table
from harmonic.run import Run
from workflows import cli

_CLASSIFIER = flags.DEFINE_string("classifier", None, "a folder of workflows.train_classifier, or resnext.pth")
_NUM = flags.DEFINE_integer("num_samples", 10_240, "clips to generate", lower_bound=2)
_CHECKPOINT = flags.DEFINE_string("checkpoint", "best", "best (on validation), latest, or a step")
_RAW = flags.DEFINE_bool("raw_weights", False, "sample the raw weights instead of their average")
_TEMPERATURE = flags.DEFINE_float("temperature", None, "of sampling; the config's generate.temperature by default")
_TOP_P = flags.DEFINE_float("top_p", None, "of sampling; the config's generate.top_p by default")
_SEED = flags.DEFINE_integer("seed", 0, "of the clips and of the figures' random choices", lower_bound=0)
_MATCH = flags.DEFINE_bool(
    "match_lengths", False, "silence each generated clip after a length drawn from the training recordings"
)
_ALLOW = flags.DEFINE_bool(
    "allow_rank_deficient",
    False,
    "accept fewer clips than a covariance of 1,024 features needs; FID comes out too large",
)
_DATASET = flags.DEFINE_string("dataset", None, "without --workdir: the data set's name in --data_dir; sc09 by default")
_CACHE = flags.DEFINE_string(
    "cache_dir", None, "folder for features, which runs may share; <workdir>/perceptual by default"
)
flags.adopt_module_key_flags(cli)


def main() -> None:
    """Measures, and prints the table; a run's figures go to its perceptual.json."""
    if cli.FLAGS.config or cli.FLAGS.set:
        raise UserError("a run is measured with its own config: give --workdir alone")
    if not _CLASSIFIER.value:
        raise UserError(
            "--classifier is missing: give a folder of python -m workflows.train_classifier, or the published "
            "resnext.pth"
        )
    if cli.FLAGS.workdir is None:
        cache = _CACHE.value or "runs/perceptual"
        result = measure_reference(
            cli.data_folder(_DATASET.value or "sc09"),
            _CLASSIFIER.value,
            cache,
            seed=_SEED.value,
            allow_rank_deficient=_ALLOW.value,
        )
        print(table(result))
        return
    if _DATASET.value:
        raise UserError("a run knows its own data set: leave out --dataset")
    workdir = Path(cli.FLAGS.workdir)
    result = measure_run(
        workdir,
        cli.data_folder(Run(workdir).config.data.dataset),
        _CLASSIFIER.value,
        num_samples=_NUM.value,
        checkpoint=_CHECKPOINT.value,
        raw=_RAW.value,
        temperature=_TEMPERATURE.value,
        top_p=_TOP_P.value,
        seed=_SEED.value,
        match_lengths=_MATCH.value,
        allow_rank_deficient=_ALLOW.value,
        cache=_CACHE.value,
    )
    print(table(result))
    if result["rejected"] is None:
        print("too few clips are left after rejection for a covariance; give more --num_samples", file=sys.stderr)
    print(f"figures: {workdir / 'perceptual.json'}")


if __name__ == "__main__":
    cli.run(main)
