"""The chain of a run's stages: prepare, train, evaluate, generate, sound, report.

full_run runs it once, ablate once a run.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import sys
import time
from pathlib import Path
from typing import Any

import harmonic
from harmonic import mesh, processes, stages
from harmonic.config import Config
from harmonic.data import Dataset
from harmonic.describe import parameters
from harmonic.likeness.measure import known, measure_run
from harmonic.records import MANIFEST_NAME, Manifest
from harmonic.report import build_report
from harmonic.run import SAMPLES, SUMMARY, Run
from harmonic.train import train
from pipelines.build import PrepareSpec, prepare


def _versions() -> dict[str, str]:
    """Versions of everything that decides a run's last digits: Python, and the libraries that compute."""
    found = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "numpy")}
    return {"harmonic-rnn": harmonic.__version__, "python": sys.version.split()[0], **found}


def prepare_data(config: Config, data_dir: Path, source: str | None = None) -> Manifest:
    """Prepares a config's data set, unless it is whole already."""
    return prepare(
        PrepareSpec(
            dataset=config.data.dataset,
            source=source,
            output_dir=str(data_dir),
            encoding=config.data.encoding,
            num_levels=config.data.num_levels,
        )
    )


def full_run(
    config: Config,
    workdir: Path,
    data_dir: Path,
    *,
    command: str,
    source: str | None = None,
    init_from: str | None = None,
) -> dict[str, Any]:
    """Runs all stages of a run, the report last; a stage whose output is whole is skipped.

    Args:
      config: of the run.
      workdir: the run's folder.
      data_dir: the folder of prepared data sets.
      command: the command line that the user gave, for the report.
      source: of recordings, if the data set is not prepared yet.
      init_from: another run's folder; this run starts from its best weights.

    Returns:
      The content of summary.json.

    Raises:
      UserError: another process writes to the run's folder; and what each stage raises.
    """
    run = Run(workdir)
    with run.writing():
        return _stages(config, run, data_dir, command, source, init_from)


def _stages(
    config: Config, run: Run, data_dir: Path, command: str, source: str | None, init_from: str | None
) -> dict[str, Any]:
    data, workdir = data_dir / config.data.dataset, run.folder
    before = run.read(SUMMARY) or {}
    seconds: dict[str, Any] = {}

    def stage(name: str) -> None:
        print(f"== {name}", file=sys.stderr, flush=True)

    def took(name: str, started: float, *, skipped: bool) -> None:
        earlier = before.get("stages", {}).get(name)
        seconds[name] = earlier if skipped and earlier else {"seconds": round(time.monotonic() - started, 3)}

    stage("prepare")
    started = time.monotonic()
    was_whole = (data / MANIFEST_NAME).exists()
    manifest = prepare_data(config, data_dir, source)
    took("prepare", started, skipped=was_whole)
    processes.gather("")

    stage("train")
    trained = train(config, data, workdir, init_from=init_from)
    processes.finish()
    seconds["train"] = {"seconds": round(trained.seconds, 3)}
    weights = run.weights()

    stage("evaluate")
    started = time.monotonic()
    contexts = config.evaluate.context_seconds
    figures: Any = stages.evaluation(workdir, manifest, weights.step, contexts=contexts, weights_sha256=weights.sha256)
    whole = figures is not None
    if not whole:
        figures = stages.evaluate_run(workdir, data, contexts=contexts)
    took("evaluate", started, skipped=whole)

    stage("generate")
    started = time.monotonic()
    samples: Any = run.read(SAMPLES)
    wanted = (weights.sha256, dataclasses.asdict(config.generate))
    whole = samples is not None and (samples.get("weights_sha256"), samples["settings"]) == wanted
    if not whole:
        samples = stages.sample_run(workdir, data)
    took("generate", started, skipped=whole)

    stage("sound")
    started = time.monotonic()
    sound: Any = known(run, weights, Dataset(data), config)
    whole = sound is not None
    if not whole:
        sound = measure_run(workdir, data, temperature=config.generate.temperature, top_p=config.generate.top_p)
    took("sound", started, skipped=whole)

    stage("report")
    curve = [line for line in run.metrics() if line["kind"] == "train"]
    summary = {
        "name": config.name,
        "command": command,
        "parameters": parameters(config),
        "data": {
            "dataset": manifest.dataset,
            "source": manifest.source,
            "encoding": manifest.encoding,
            "sample_rate": manifest.sample_rate,
            "skipped": len(manifest.skipped),
            "splits": {
                name: {"recordings": s.recordings, "windows": s.windows, "samples": s.samples}
                for name, s in manifest.splits.items()
            },
        },
        "train": {
            "steps": trained.step,
            "loss": curve[-1]["loss"] if curve else None,
            "best_step": trained.best_step,
            "best_validation": trained.best_validation,
            "skipped_updates": curve[-1]["skipped"] if curve else 0,
            "samples_per_second": sorted(line["samples_per_second"] for line in curve)[len(curve) // 2]
            if curve
            else None,
        },
        "test": figures,
        "generate": {"samples_per_second": samples["samples_per_second"], "samples": len(samples["samples"])},
        "sound": {
            "distance": sound["rows"].get("generated", {}).get("distance"),
            **{name: sound["rows"][name].get("distance") for name in ("train", "shaped_noise", "white_noise")},
            **{name: sound[name] for name in ("share", "drift", "longer", "temperature", "top_p", "notes")},
        },
        "platform": mesh.hardware(),
        "versions": _versions(),
        "stages": seconds,
    }
    run.write(SUMMARY, summary)
    build_report(workdir)
    return summary
