"""A study of the paper: its runs one after another, and what they show beside the published figures.

    python -m workflows.ablate --study=groups --size=small --source=sc09.zip --workdir=studies/groups
    python -m workflows.ablate --study=pooling --size=paper --classifier=runs/classifier --seeds=0,1,2
    python -m workflows.ablate --study=datasets --source=sc09=a.zip --source=beethoven=b.zip --source=youtubemix=c.zip

Each run is a run's folder like any other, WORKDIR/RUN/seed_N; study.json, study.md, study.csv and study.html are
written anew after each. Interrupted anywhere, the same command goes on. What would stop all runs (a flag, a config, the
data, the classifier) is looked at before the first; a run that fails later is named, and the others go on: they need
nothing of it, and may take days.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from configs.ablations import SIZES, Run, Study, load_study, study_names
from harmonic import locks, mesh
from harmonic.config import Config, override
from harmonic.data import Dataset
from harmonic.errors import UserError
from harmonic.files import read_json, write_json
from harmonic.generate import generate
from harmonic.metrics import read_metrics
from harmonic.perceptual.classifier import Classifier
from harmonic.perceptual.measure import measure_reference, measure_run
from harmonic.perceptual.metrics import samples_needed, too_few
from harmonic.report import build_report
from harmonic.run import Run as RunFolder
from harmonic.study import write_study
from workflows import chain, cli

_STUDY = flags.DEFINE_string("study", None, f"{', '.join(study_names())}, or a path to a .py with get_study(size)")
_SIZE = flags.DEFINE_enum("size", "small", SIZES, "the paper's model and recipe, or reduced ones for two CPU cores")
_SOURCE = flags.DEFINE_multi_string(
    "source", [], "of recordings, as --source=sc09.zip, or for several data sets --source=DATASET=... (repeatable)"
)
_SEEDS = flags.DEFINE_list("seeds", ["0"], "seeds of initial weights, order and dropout; each makes every run anew")
_RUNS = flags.DEFINE_list(
    "runs", [], "only these runs of the study; the others' figures are shown where they are there"
)
_CLASSIFIER = flags.DEFINE_string("classifier", None, "a classifier of spoken digits, for FID and inception score")
_NUM_SAMPLES = flags.DEFINE_integer(
    "num_samples", 10_240, "clips that FID and inception score are taken of", lower_bound=1
)
_ALLOW = flags.DEFINE_bool(
    "allow_rank_deficient", False, "take fewer clips than a covariance of 1,024 features needs; FID comes out too large"
)
_MATCH = flags.DEFINE_bool(
    "match_lengths", False, "silence generated clips from lengths on that are drawn from the training recordings"
)
flags.adopt_module_key_flags(cli)

_BATCH, _LENGTH, _ROUNDS = 8, 800, 5  # of the measured generation


def main() -> None:
    """Runs what is missing of the study, and shows all of it."""
    if cli.FLAGS.config:
        raise UserError("a study has its own configs: give --study, and --set for what all of its runs shall change")
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
    page = Page(study, workdir, configs)
    data_dir = Path(cli.FLAGS.data_dir)
    sources = _sources(_SOURCE.value, sorted({config.data.dataset for config in configs.values()}))
    wanted = [key for key in configs if not _RUNS.value or key[0] in _RUNS.value]
    datasets = {configs[key].data.dataset: configs[key] for key in wanted}
    for dataset, config in datasets.items():
        chain.prepare_data(config, data_dir, sources.get(dataset))
    page.write()
    heard = _listen(data_dir, set(datasets), workdir / "perceptual")

    failed: dict[str, str] = {}
    for number, (name, seed) in enumerate(wanted, 1):
        config, folder = configs[name, seed], page.folder(name, seed)
        print(f"=== {study.name}: {name}, seed {seed} ({number} of {len(wanted)})", file=sys.stderr, flush=True)
        try:
            with locks.writing(folder):
                chain.full_run(
                    config, folder, data_dir, source=sources.get(config.data.dataset), command=cli.command("ablate")
                )
                if config.data.dataset in heard:
                    _measure_perceptual(
                        folder, data_dir / config.data.dataset, _CLASSIFIER.value or "", workdir / "perceptual"
                    )
        except (UserError, jax.errors.JaxRuntimeError) as error:  # the latter: out of memory
            failed[f"{name}, seed {seed}"] = page.errors[name, seed] = str(error).strip().splitlines()[0]
            print(f"{name}, seed {seed} failed: {page.errors[name, seed]}", file=sys.stderr, flush=True)
        page.write()
        jax.clear_caches()  # the next run is another model
    measure_generation(workdir, page.trained(seeds[0]))
    page.write()
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


def measure_generation(workdir: Path, folders: dict[str, Path]) -> None:
    """Notes in the study's speed.json how fast the runs generate: in turns, since a machine's speed changes while other
    work comes and goes. Compiling is left out. Nothing is done if it is there for these weights.

    Args:
      workdir: of the study.
      folders: of one trained run each, by name.
    """
    trained = {name: RunFolder(folder).weights() for name, folder in folders.items()}
    made_from = {"steps": {name: weights.step for name, weights in trained.items()}, "platform": mesh.hardware()}
    noted = read_json(workdir / "speed.json") or {}
    if not trained or {key: noted.get(key) for key in made_from} == made_from:
        return
    streams = {}
    for name, weights in trained.items():
        length = _LENGTH * (_ROUNDS + 1)
        streams[name] = generate(weights.model, weights.params, batch=_BATCH, length=length, chunk=_LENGTH)
        next(streams[name])  # compiles
    seconds = dict.fromkeys(streams, math.inf)
    for _ in range(_ROUNDS):
        for name, stream in streams.items():
            started = time.perf_counter()
            next(stream)
            seconds[name] = min(seconds[name], time.perf_counter() - started)
    rates = {name: _BATCH * _LENGTH / best for name, best in seconds.items()}
    write_json(workdir / "speed.json", {**made_from, "batch": _BATCH, "generated_per_second": rates})


def _listen(data_dir: Path, datasets: set[str], cache: Path) -> set[str]:
    """The data sets that --classifier can say something about, those with labels; their real clips are heard first, so
    that a classifier which does not fit stops the study before it has begun."""
    if not _CLASSIFIER.value:
        return set()
    needed = samples_needed(Classifier.load(_CLASSIFIER.value).sizes.widths[-1], _ALLOW.value)
    if _NUM_SAMPLES.value < needed:
        raise UserError(f"--num_samples: {too_few(_NUM_SAMPLES.value, needed)}")
    labelled = {name for name in datasets if any(r.label for r in Dataset(data_dir / name).split("test").recordings)}
    if not labelled:
        raise UserError(f"--classifier: no data set of this study has labels ({', '.join(sorted(datasets))}); leave it")
    for name in sorted(labelled):
        measure_reference(data_dir / name, _CLASSIFIER.value, cache, allow_rank_deficient=_ALLOW.value)
    return labelled


def _measure_perceptual(folder: Path, data: Path, classifier: str, cache: Path) -> None:
    """Writes a run's perceptual.json, unless it is there for these weights, this classifier and as many clips."""
    noted = read_json(folder / "perceptual.json") or {}
    weights = RunFolder(folder).weights()
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


class Page:
    """What is known of a study, gathered from its runs' folders and written into its own.

    Attributes:
      errors: by run and seed, the line with which it failed this time.

    Raises:
      UserError: the folder holds another study.
    """

    def __init__(self, study: Study, workdir: Path, configs: dict[tuple[str, int], Config]):
        self._study, self._workdir, self._configs = study, workdir, configs
        self.errors: dict[tuple[str, int], str] = {}
        there = read_json(workdir / "study.json")
        ours = {"study": study.name, "size": _SIZE.value}
        theirs = {key: there.get(key) for key in ours} if isinstance(there, dict) else ours
        if theirs != ours:
            raise UserError(
                f"{workdir} holds the study {theirs['study']} at size {theirs['size']}; give another --workdir"
            )

    def folder(self, name: str, seed: int) -> Path:
        """A run's folder."""
        return self._workdir / name / f"seed_{seed}"

    def trained(self, seed: int) -> dict[str, Path]:
        """The folders of the runs that are done with this seed, by name."""
        folders = {run.name: self.folder(run.name, seed) for run in self._study.runs}
        return {name: path for name, path in folders.items() if "bits_per_sample" in self._result(name, seed)}

    def write(self) -> None:
        """Writes study.json, .md, .csv and .html."""
        seeds = sorted({seed for _, seed in self._configs})
        study = {
            "study": self._study.name,
            "size": _SIZE.value,
            **{name: getattr(self._study, name) for name in ("title", "reproduces", "note", "baseline")},
            "seeds": seeds,
            "command": cli.command("ablate"),
            "platform": mesh.hardware(),
            "runs": [self._row(run, seeds) for run in self._study.runs],
        }
        write_study(self._workdir, study)

    def _row(self, run: Run, seeds: list[int]) -> dict[str, Any]:
        return {
            "name": run.name,
            "title": run.title,
            "published": dataclasses.asdict(run.published),
            "results": [self._result(run.name, seed) for seed in seeds],
        }

    def _result(self, name: str, seed: int) -> dict[str, Any]:
        folder, config = self.folder(name, seed), self._configs[name, seed]
        result: dict[str, Any] = {"seed": seed, "folder": f"{name}/seed_{seed}", "steps": config.train.steps}
        if (name, seed) in self.errors:
            # What lies in its folder may be another config's.
            return {**result, "error": self.errors[name, seed], "validation": []}
        metrics = read_metrics(folder)
        curve = {line["step"]: line["bits_per_sample"] for line in metrics if line["kind"] == "validation"}
        result["validation"] = [[step, curve[step]] for step in sorted(curve)]
        summary = read_json(folder / "summary.json")
        if not summary or summary["train"]["steps"] < config.train.steps:
            return result
        speed = read_json(self._workdir / "speed.json") or {}
        trained = [line["samples_per_second"] for line in metrics if line["kind"] == "train"]
        samples = read_json(folder / "samples" / "samples.json") or {"samples": []}
        clips = [row for row in samples["samples"] if row["kind"] == "sample"]
        perceptual = read_json(folder / "perceptual.json")
        return {
            **result,
            "dataset": summary["data"]["dataset"],
            "test_samples": summary["test"]["samples"],
            "bits_per_sample": summary["test"]["bits_per_sample"],
            "markov_bits": summary["test"]["markov_bits"],
            "step": summary["test"]["step"],
            "best_validation": summary["train"]["best_validation"],
            "parameters": summary["parameters"]["total"],
            # Where the machine is shared, most of the lines tell of the others.
            "trained_per_second": float(np.quantile(trained, 0.9)),
            "generated_per_second": speed.get("generated_per_second", {}).get(name),
            "platform": summary["platform"],
            "perceptual": perceptual if perceptual and perceptual.get("step") == summary["test"]["step"] else None,
            "clip": clips[0] if clips else None,
        }


if __name__ == "__main__":
    cli.run(main)
