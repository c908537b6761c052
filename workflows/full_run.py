"""From an archive to sound: prepare, train, evaluate, generate, report.

    python -m workflows.full_run
    python -m workflows.full_run --config=sc09_small --source=sc09.zip

Each stage is skipped when its output is already whole: a run that was interrupted anywhere goes on with the same
command. Several processes train together; what comes before and after is done by the first, and the others wait, and
end.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from absl import flags

from harmonic import processes
from harmonic.checkpoint import load_weights
from harmonic.config import Config
from harmonic.describe import describe
from harmonic.metrics import read_metrics
from harmonic.report import build_report
from harmonic.train import train
from pipelines.build import PrepareSpec, prepare
from workflows import cli, stages

_SOURCE = flags.DEFINE_string(
    "source", None, "hub, an archive or folder of recordings, or synth; the data set's own if not given"
)
_INIT_FROM = flags.DEFINE_string("init_from", None, "another run's folder, whose best weights this run starts from")
cli.define_process_flags()
flags.adopt_module_key_flags(cli)


def main() -> None:
    """Runs every stage that is not whole yet."""
    lead = cli.join_processes()
    config = cli.config_from_flags()
    workdir = cli.workdir_from_flags(config)
    if not lead:
        processes.gather("")  # until the data is prepared
        train(config, Path(cli.FLAGS.data_dir) / config.data.dataset, workdir, init_from=_INIT_FROM.value)
        return
    summary = full_run(config, workdir, Path(cli.FLAGS.data_dir), source=_SOURCE.value, init_from=_INIT_FROM.value)
    print(json.dumps({k: summary[k] for k in ("test", "train", "stages")}, indent=2))
    print(f"report: {workdir / 'report.html'}")


def full_run(
    config: Config, workdir: Path, data_dir: Path, *, source: str | None = None, init_from: str | None = None
) -> dict[str, Any]:
    """All stages of a run; returns what summary.json holds."""
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
    manifest = prepare(
        PrepareSpec(
            dataset=config.data.dataset,
            source=source,
            output_dir=str(data_dir),
            encoding=config.data.encoding,
            num_levels=config.data.num_levels,
        )
    )
    took("prepare", started, skipped=was_whole)
    processes.gather("")

    stage("train")
    trained = train(config, data, workdir, init_from=init_from)
    processes.finish()
    seconds["train"] = {"seconds": round(trained.seconds, 3)}
    step = load_weights(workdir).step

    stage("evaluate")
    started = time.monotonic()
    contexts = config.evaluate.context_seconds
    figures: Any = stages.evaluation(workdir, manifest, step, contexts=contexts)
    whole = figures is not None
    if not whole:
        figures = stages.evaluate_run(workdir, data, contexts=contexts)
    took("evaluate", started, skipped=whole)

    stage("generate")
    started = time.monotonic()
    samples: Any = stages.read_json(workdir / "samples" / "samples.json")
    whole = samples is not None and samples["step"] == step and samples["settings"] == stages.as_json(config.generate)
    if not whole:
        samples = stages.sample_run(workdir, data)
    took("generate", started, skipped=whole)

    stage("report")
    curve = [line for line in read_metrics(workdir) if line["kind"] == "train"]
    summary = {
        "name": config.name,
        "command": cli.command("full_run"),
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
        "stages": seconds,
    }
    stages.write_json(workdir / "summary.json", summary)
    build_report(workdir)
    return summary


if __name__ == "__main__":
    cli.run(main)
