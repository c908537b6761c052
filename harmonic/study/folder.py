"""A study's folder: what its runs have measured, gathered into study.json, study.md, study.csv and study.html."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np

from harmonic.config import Config
from harmonic.errors import UserError
from harmonic.files import read_json, write_json, write_whole
from harmonic.generate import generate
from harmonic.metrics import read_metrics
from harmonic.report.inputs import Json
from harmonic.run import Run as RunFolder
from harmonic.study.page import study_page
from harmonic.study.plan import Run, Study
from harmonic.study.tables import csv_text, markdown

_BATCH, _LENGTH, _ROUNDS = 8, 800, 5  # of the measured generation


class StudyFolder:
    """The folder of a study, with a folder for each run and seed.

    Args:
      study: the plan.
      size: paper or small.
      workdir: the folder.
      configs: by run and seed.
      command: that the user gave.

    Attributes:
      errors: by run and seed, the line with which it failed this time.

    Raises:
      UserError: the folder holds another study.
    """

    def __init__(self, study: Study, size: str, workdir: Path, configs: dict[tuple[str, int], Config], command: str):
        self._study, self._size, self._workdir, self._configs, self._command = study, size, workdir, configs, command
        self.errors: dict[tuple[str, int], str] = {}
        there = read_json(workdir / "study.json") or {}
        if there and (there.get("study"), there.get("size")) != (study.name, size):
            raise UserError(
                f"{workdir} holds the study {there.get('study')} at size {there.get('size')}; give another --workdir"
            )

    def run(self, name: str, seed: int) -> Path:
        """A run's folder."""
        return self._workdir / name / f"seed_{seed}"

    def trained(self, seed: int) -> dict[str, Path]:
        """The folders of the runs that are done with this seed, by name."""
        folders = {run.name: self.run(run.name, seed) for run in self._study.runs}
        return {name: path for name, path in folders.items() if "bits_per_sample" in self._result(name, seed)}

    def write(self, platform: str) -> None:
        """Writes study.json, .md, .csv and .html; `platform` is what the runs compute on."""
        seeds = sorted({seed for _, seed in self._configs})
        study = {
            "study": self._study.name,
            "size": self._size,
            **{name: getattr(self._study, name) for name in ("title", "reproduces", "note", "baseline")},
            "kinds": sorted({config.model.kind for config in self._configs.values()}),
            "seeds": seeds,
            "command": self._command,
            "platform": platform,
            "runs": [self._row(run, seeds) for run in self._study.runs],
        }
        write_study(self._workdir, study)

    def _row(self, run: Run, seeds: list[int]) -> Json:
        return {
            "name": run.name,
            "title": run.title,
            "published": dataclasses.asdict(run.published),
            "results": [self._result(run.name, seed) for seed in seeds],
        }

    def _result(self, name: str, seed: int) -> Json:
        folder, config = self.run(name, seed), self._configs[name, seed]
        result: Json = {"seed": seed, "folder": f"{name}/seed_{seed}", "steps": config.train.steps}
        if (name, seed) in self.errors:
            # The files in its folder may be another config's.
            return {**result, "error": self.errors[name, seed], "validation": []}
        metrics = read_metrics(folder)
        curve = {line["step"]: line["bits_per_sample"] for line in metrics if line["kind"] == "validation"}
        result["validation"] = [[step, curve[step]] for step in sorted(curve)]
        summary = read_json(folder / "summary.json") or {}
        if not summary or summary["train"]["steps"] < config.train.steps:
            return result
        speed = read_json(self._workdir / "speed.json") or {}
        trained = [line["samples_per_second"] for line in metrics if line["kind"] == "train"]
        samples = read_json(folder / "samples" / "samples.json") or {"samples": []}
        clips = [row for row in samples["samples"] if row["kind"] == "sample"]
        perceptual = read_json(folder / "perceptual.json") or {}
        return {
            **result,
            "dataset": summary["data"]["dataset"],
            "test_samples": summary["test"]["samples"],
            "bits_per_sample": summary["test"]["bits_per_sample"],
            "markov_bits": summary["test"]["markov_bits"],
            "step": summary["test"]["step"],
            "best_validation": summary["train"]["best_validation"],
            "parameters": summary["parameters"]["total"],
            # On a shared machine, most of the lines measure the other programs too.
            "trained_per_second": float(np.quantile(trained, 0.9)),
            "generated_per_second": speed.get("generated_per_second", {}).get(name),
            "platform": summary["platform"],
            "perceptual": perceptual if perceptual and perceptual.get("step") == summary["test"]["step"] else None,
            "sound": summary.get("sound"),
            "clip": clips[0] if clips else None,
        }


def write_study(folder: Path, study: Json) -> None:
    """Writes study.json, .md, .csv and .html, each whole or not at all.

    Raises:
      UserError: a file cannot be written, or a clip that a run's samples.json names cannot be read.
    """
    texts = {
        "study.json": json.dumps(study, indent=2) + "\n",
        "study.md": markdown(study),
        "study.csv": csv_text(study),
    }
    # JSON strings may hold lone surrogates, which UTF-8 cannot encode.
    contents = {name: text.encode("utf-8", "replace") for name, text in texts.items()}
    for name, content in {**contents, "study.html": study_page(folder, study)}.items():
        write_whole(folder / name, content)


def measure_generation(workdir: Path, folders: dict[str, Path], platform: str) -> None:
    """Measures how fast runs generate, and writes it to the study's speed.json, unless it is there for these weights.

    The runs take turns, since a machine's speed changes while other work comes and goes. Compiling is not counted.

    Args:
      workdir: of the study.
      folders: of one trained run each, by name.
      platform: that they are measured on.
    """
    trained = {name: RunFolder(folder).weights() for name, folder in folders.items()}
    made_from: dict[str, Any] = {
        "steps": {name: weights.step for name, weights in trained.items()},
        "platform": platform,
    }
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
    speed = {**made_from, "batch": _BATCH, "generated_per_second": rates}
    write_json(workdir / "speed.json", speed)
