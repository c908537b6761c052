"""A study of the paper: its runs one after another, and their figures beside the published ones.

    python -m workflows.ablate --study=groups --size=small --source=sc09.zip --workdir=studies/groups
    python -m workflows.ablate --study=pooling --size=paper --classifier=runs/classifier --seeds=0,1,2
    python -m workflows.ablate --study=datasets --source=sc09=a.zip --source=beethoven=b.zip --source=youtubemix=c.zip

Each run has a folder like any other run's, WORKDIR/RUN/seed_N; study.json, study.md, study.csv and study.html are
written again after each. After an interruption the same command continues. Faults that would stop every run (in a flag,
a config, the data, the classifier) are found before the first run starts. A run that fails later is reported, and the
others continue: they do not depend on it, and may take days.
"""

from __future__ import annotations

import sys
from pathlib import Path

import jax
from absl import flags

from configs.ablations import SIZES, load_study, study_names
from harmonic import locks, mesh
from harmonic.config import override
from harmonic.data import Dataset
from harmonic.errors import UserError
from harmonic.files import read_json
from harmonic.perceptual.classifier import Classifier
from harmonic.perceptual.measure import measure_reference, measure_run
from harmonic.perceptual.metrics import samples_needed, too_few
from harmonic.report import build_report
from harmonic.run import Run
from harmonic.study.folder import StudyFolder, measure_generation
from workflows import chain, cli

_STUDY = flags.DEFINE_string("study", None, f"{', '.join(study_names())}, or a path to a .py with get_study(size)")
_SIZE = flags.DEFINE_enum("size", "small", SIZES, "the paper's model and recipe, or reduced ones for two CPU cores")
_SOURCE = flags.DEFINE_multi_string(
    "source", [], "of recordings, as --source=sc09.zip, or for several data sets --source=DATASET=... (repeatable)"
)
_SEEDS = flags.DEFINE_list("seeds", ["0"], "seeds of initial weights, order and dropout; every run is made with each")
_RUNS = flags.DEFINE_list(
    "runs", [], "only these runs of the study; the page still shows the others' figures if they exist"
)
_CLASSIFIER = flags.DEFINE_string("classifier", None, "a classifier of spoken digits, for FID and inception score")
_NUM_SAMPLES = flags.DEFINE_integer(
    "num_samples", 10_240, "clips to compute FID and inception score from", lower_bound=1
)
_ALLOW = flags.DEFINE_bool(
    "allow_rank_deficient",
    False,
    "accept fewer clips than a covariance of 1,024 features needs; FID comes out too large",
)
_MATCH = flags.DEFINE_bool(
    "match_lengths", False, "silence each generated clip after a length drawn from the training recordings"
)
flags.adopt_module_key_flags(cli)


def main() -> None:
    """Makes the runs that are missing, and shows the whole study."""
    if cli.FLAGS.config:
        raise UserError("a study has its own configs: give --study, and --set to change a field in all of its runs")
    if not _STUDY.value:
        raise UserError(f"--study is missing; use {', '.join(study_names())}, or a path to a .py")
    study = load_study(_STUDY.value, _SIZE.value)
    workdir = Path(cli.FLAGS.workdir or f"studies/{study.name}_{_SIZE.value}")
    seeds = _seeds(_SEEDS.value)
    for name in _RUNS.value:
        if name not in [run.name for run in study.runs]:
            raise UserError(f"--runs: {study.name} has no run {name!r}; use {', '.join(r.name for r in study.runs)}")
    configs = {
        (run.name, seed): override(run.config, [*cli.FLAGS.set, f"seed={seed}"]) for seed in seeds for run in study.runs
    }
    folder = StudyFolder(study, _SIZE.value, workdir, configs, cli.command("ablate"))
    data_dir = Path(cli.FLAGS.data_dir)
    sources = _sources(_SOURCE.value, sorted({config.data.dataset for config in configs.values()}))
    wanted = [key for key in configs if not _RUNS.value or key[0] in _RUNS.value]
    datasets = {configs[key].data.dataset: configs[key] for key in wanted}
    for dataset, config in datasets.items():
        chain.prepare_data(config, data_dir, sources.get(dataset))
    platform = mesh.hardware()
    folder.write(platform)
    labelled = _check_classifier(data_dir, set(datasets), workdir / "perceptual")

    failed: dict[str, str] = {}
    for number, (name, seed) in enumerate(wanted, 1):
        config, run = configs[name, seed], folder.run(name, seed)
        print(f"=== {study.name}: {name}, seed {seed} ({number} of {len(wanted)})", file=sys.stderr, flush=True)
        try:
            with locks.writing(run):
                chain.full_run(
                    config, run, data_dir, source=sources.get(config.data.dataset), command=cli.command("ablate")
                )
                if config.data.dataset in labelled:
                    _measure_perceptual(
                        run, data_dir / config.data.dataset, _CLASSIFIER.value or "", workdir / "perceptual"
                    )
        except (UserError, jax.errors.JaxRuntimeError) as error:  # the latter: out of memory
            failed[f"{name}, seed {seed}"] = folder.errors[name, seed] = str(error).strip().splitlines()[0]
            print(f"{name}, seed {seed} failed: {folder.errors[name, seed]}", file=sys.stderr, flush=True)
        folder.write(platform)
        jax.clear_caches()  # the next run has another model, and needs none of this one's programs
    measure_generation(workdir, folder.trained(seeds[0]), platform)
    folder.write(platform)
    print(f"study: {workdir / 'study.html'}")
    if failed:
        reasons = "; ".join(f"{name}: {error}" for name, error in failed.items())
        raise UserError(f"{len(failed)} of {len(wanted)} runs failed ({reasons}); the same command tries them again")


def _seeds(items: list[str]) -> list[int]:
    if not items or not all(item.strip().isdigit() for item in items) or len(set(map(int, items))) < len(items):
        raise UserError(f"--seeds={','.join(items)} is impossible: it must be different whole numbers, such as 0,1,2")
    return [int(item) for item in items]


def _sources(items: list[str], datasets: list[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for item in items:
        name, equals, source = item.partition("=")
        if not equals or name not in datasets:
            name, source = datasets[0], item
            if len(datasets) > 1:
                raise UserError(
                    f"--source={item} does not say of which data set; write --source=DATASET=... for "
                    f"{', '.join(datasets)}"
                )
        if name in found:
            raise UserError(f"--source is given twice for {name}: {found[name]} and {source}; give one")
        found[name] = source
    return found


def _check_classifier(data_dir: Path, datasets: set[str], cache: Path) -> set[str]:
    """Returns the data sets that --classifier can judge: those with labels.

    Classifies their real clips, so that a classifier that does not fit stops the study before its first run.
    """
    if not _CLASSIFIER.value:
        return set()
    needed = samples_needed(Classifier.load(_CLASSIFIER.value).sizes.widths[-1], _ALLOW.value)
    if _NUM_SAMPLES.value < needed:
        raise UserError(f"--num_samples: {too_few(_NUM_SAMPLES.value, needed)}")
    labelled = {name for name in datasets if any(r.label for r in Dataset(data_dir / name).split("test").recordings)}
    if not labelled:
        raise UserError(
            f"--classifier: no data set of this study has labels ({', '.join(sorted(datasets))}); leave it out"
        )
    for name in sorted(labelled):
        measure_reference(data_dir / name, _CLASSIFIER.value, cache, allow_rank_deficient=_ALLOW.value)
    return labelled


def _measure_perceptual(folder: Path, data: Path, classifier: str, cache: Path) -> None:
    """Writes a run's perceptual.json, unless it exists for these weights, this classifier and as many clips."""
    noted = read_json(folder / "perceptual.json") or {}
    weights = Run(folder).weights()
    wanted = {
        "step": weights.step,
        "fingerprint": Dataset(data).manifest.fingerprint,
        "classifier_sha256": Classifier.load(classifier).fingerprint,
        "num_samples": _NUM_SAMPLES.value,
        "match_lengths": _MATCH.value,
        "allow_rank_deficient": _ALLOW.value,
    }
    if {key: noted.get(key) for key in wanted} == wanted:
        return
    measure_run(
        folder,
        data,
        classifier,
        num_samples=_NUM_SAMPLES.value,
        match_lengths=_MATCH.value,
        allow_rank_deficient=_ALLOW.value,
        cache=cache,
    )
    build_report(folder)


if __name__ == "__main__":
    cli.run(main)
