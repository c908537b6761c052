"""The chain of a run's stages: prepare, train, evaluate, generate, report. full_run runs it once, ablate often."""

from __future__ import annotations

import importlib.metadata
import sys
import time
from pathlib import Path
from typing import Any

import harmonic
from harmonic import locks, processes, stages
from harmonic.checkpoint import load_weights
from harmonic.config import Config
from harmonic.describe import describe
from harmonic.metrics import read_metrics
from harmonic.records import Manifest
from harmonic.report import build_report
from harmonic.train import train
from pipelines.build import PrepareSpec, prepare


def _versions() -> dict[str, str]:
    """What decides a run's last digits: Python, and the libraries that compute."""
    found = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "numpy")}
    return {"harmonic-rnn": harmonic.__version__, "python": sys.version.split()[0], **found}


def prepare_data(config: Config, data_dir: Path, source: str | None = None) -> Manifest:
    """A config's data set, prepared unless it is whole already."""
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
    """All stages of a run, of which those that are whole are skipped; the report last.

    Args:
      command: what the user ran, to be pasted again; noted.
      source: of recordings, where the data set is not prepared yet.
      init_from: another run's folder, whose best weights this run starts from.

    Returns:
      What summary.json holds.

    Raises:
      UserError: another process writes to the run's folder; and what each stage raises.
    """
    with locks.writing(workdir):
        return _stages(config, workdir, data_dir, command, source, init_from)


def _stages(
    config: Config, workdir: Path, data_dir: Path, command: str, source: str | None, init_from: str | None
) -> dict[str, Any]:
    data = data_dir / config.data.dataset
    before = stages.read_json(workdir / "summary.json") or {}
    seconds: dict[str, Any] = {}

    def stage(name: str) -> None:
        print(f"== {name}", file=sys.stderr, flush=True)

    def took(name: str, started: float, *, skipped: bool) -> None:
        earlier = before.get("stages", {}).get(name)
        seconds[name] = earlier if skipped and earlier else {"seconds": round(time.monotonic() - started, 3)}

    stage("prepare")
    started = time.monotonic()
    was_whole = (data / "manifest.json").exists()
    manifest = prepare_data(config, data_dir, source)
    took("prepare", started, skipped=was_whole)
    processes.gather("")

    stage("train")
    trained = train(config, data, workdir, init_from=init_from)
    processes.finish()
    seconds["train"] = {"seconds": round(trained.seconds, 3)}
    weights = load_weights(workdir)
    step = weights.step

    stage("evaluate")
    started = time.monotonic()
    contexts = config.evaluate.context_seconds
    figures: Any = stages.evaluation(workdir, manifest, step, contexts=contexts, weights_sha256=weights.sha256)
    whole = figures is not None
    if not whole:
        figures = stages.evaluate_run(workdir, data, contexts=contexts)
    took("evaluate", started, skipped=whole)

    stage("generate")
    started = time.monotonic()
    samples: Any = stages.read_json(workdir / "samples" / "samples.json")
    wanted = (weights.sha256, stages.as_json(config.generate))
    whole = samples is not None and (samples.get("weights_sha256"), samples["settings"]) == wanted
    if not whole:
        samples = stages.sample_run(workdir, data)
    took("generate", started, skipped=whole)

    stage("report")
    curve = [line for line in read_metrics(workdir) if line["kind"] == "train"]
    summary = {
        "name": config.name,
        "command": command,
        "parameters": describe(config)["parameters"],
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
        "platform": stages.platform(),
        "versions": _versions(),
        "stages": seconds,
    }
    stages.write_json(workdir / "summary.json", summary)
    build_report(workdir)
    return summary
