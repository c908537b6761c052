"""The README.md of an exported model: what the hub reads, what the run measured, and how to use and make the model."""

from __future__ import annotations

import os
import shlex
import urllib.parse
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from harmonic import models
from harmonic.config import Config
from harmonic.files import read_json
from harmonic.records import Manifest

_PERCEPTUAL = {"fid": "FID", "is": "IS", "is_released": "IS, released code", "mis": "mIS", "am": "AM"}
_USE = """```python
import harmonic
model = harmonic.load("{name}")
audio = model.generate(seconds={seconds:g}, temperature={temperature:g}, seed=0)
```

`audio` is float32 [1, samples] at `model.sample_rate`."""


def model_card(
    workdir: Path,
    about: dict[str, Any],
    config: Config,
    manifest: Manifest,
    *,
    load_name: str,
    license_name: str | None,
    samples: list[str],
    settings: dict[str, Any],
) -> str:
    """The card's text. Figures of another step or of other data than the weights' are left out.

    Args:
      workdir: the run's folder; its summary.json, evaluation.json and perceptual.json may be missing.
      about: the export's config.json.
      config: the run's.
      manifest: of the data that it was trained on.
      load_name: the argument for `harmonic.load`.
      license_name: the hub's name of a licence; None leaves it open.
      samples: names of the WAV files beside the card.
      settings: seconds and temperature of the samples.
    """
    weights = about["weights"]
    test = (read_json(workdir / "evaluation.json") or {}).get("test") or {}
    made_from = {"step": weights["step"], "weights": weights["kind"], "fingerprint": manifest.fingerprint}
    if any(test.get(name) != value for name, value in made_from.items()):
        test = {}
    perceptual = read_json(workdir / "perceptual.json") or {}
    if perceptual.get("step") != weights["step"]:
        perceptual = {}
    model = models.about(config.model.kind)
    papers = [f"arxiv:{model.arxiv}"] if model.arxiv else []
    link = f" ([arXiv {model.arxiv}](https://arxiv.org/abs/{model.arxiv}))" if model.arxiv else ""
    sections = [
        f"{model.summary[:1].upper()}{model.summary[1:]}{link}, trained on {manifest.dataset}: "
        f"{weights['parameters']:,} parameters, {manifest.num_levels} {manifest.encoding} levels at "
        f"{manifest.sample_rate:,} Hz."
    ]
    if samples:
        made = f"{settings['seconds']:g} s at temperature {settings['temperature']:g}, seed 0"
        links = ", ".join(f"[{name}]({name})" for name in samples)
        sections.append(f"Samples ({made}, not chosen): {links}")
    sections.append("## Generate\n\n" + _USE.format(name=load_name, **settings))
    sections.append("## Figures\n\n" + _figures(weights, test, perceptual))
    sections.append("## Data\n\n" + _data(manifest, about))
    sections.append("## Train it\n\n" + _command(read_json(workdir / "summary.json") or {}, config))
    card = ModelCardData(
        license=license_name,
        library_name="harmonic-rnn",
        pipeline_tag="text-to-audio",  # the nearest one: the hub has no tag for audio without text
        tags=["audio", "audio-generation", "raw-audio", "harmonic-rnn", "jax", *papers, manifest.dataset],
        model_name=config.name if test else None,
        eval_results=_results(test, manifest) if test else None,
    )
    return f"---\n{card.to_yaml()}\n---\n\n# {model.name}: {config.name}\n\n" + "\n\n".join(sections) + "\n"


def _results(test: dict[str, Any], manifest: Manifest) -> list[EvalResult]:
    return [
        EvalResult(
            task_type="audio-generation",
            dataset_type=manifest.dataset,
            dataset_name=manifest.dataset,
            dataset_split="test",
            metric_type="bits_per_sample",
            metric_name="bits per sample",
            metric_value=round(test["bits_per_sample"], 4),
        )
    ]


def _figures(weights: dict[str, Any], test: dict[str, Any], perceptual: dict[str, Any]) -> str:
    kind = "their running average" if weights["kind"] == "ema" else "the raw ones"
    rows = [("weights", f"step {weights['step']:,} ({weights['checkpoint']}), {kind}")]
    if test:
        counted = f"{test['recordings']:,} recordings, {test['samples']:,} samples, each once"
        rows.append(("test, bits per sample", f"**{test['bits_per_sample']:.3f}** ({counted})"))
        for name, key in (("order-1 Markov model", "markov_bits"), ("histogram entropy", "histogram_entropy_bits")):
            if isinstance(test.get(key), float):
                rows.append((f"the same, {name}", f"{test[key]:.3f}"))
    for group, label in (("generated", "all"), ("rejected", "after rejection by likelihood")):
        figures = perceptual.get(group) or {}
        known = [
            f"{name} {figures[key]:.3f}" for key, name in _PERCEPTUAL.items() if isinstance(figures.get(key), float)
        ]
        if known:
            count = figures.get("kept") if group == "rejected" else perceptual.get("num_samples")
            rows.append((f"perceptual, {label} ({count} samples)", ", ".join(known)))
    if not test:
        rows.append(("test", "not evaluated: python -m workflows.evaluate, then export again"))
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


def _data(manifest: Manifest, about: dict[str, Any]) -> str:
    counts = ", ".join(
        f"{name} {split.recordings:,} recordings ({split.samples / manifest.sample_rate / 3600:.2f} h)"
        for name, split in manifest.splits.items()
    )
    return (
        f"Data set `{manifest.dataset}` from `{about['data']['source']}`: {counts}. Fingerprint of the prepared data: "
        f"`{manifest.fingerprint}`."
    )


def _command(summary: dict[str, Any], config: Config) -> str:
    lines = []
    if isinstance(summary.get("command"), str):
        lines.append(public_command(summary["command"]))
    else:
        lines.append(f"python -m workflows.train --config=config.json --workdir=runs/{config.name}  # this folder's")
    platform = f"\n\nTrained on {summary['platform']}." if isinstance(summary.get("platform"), str) else ""
    return "```\n" + "\n".join(lines) + f"\n```{platform}"


def public_source(source: str) -> str:
    """Where data came from, without private parts: a URL's password and query, a local path's folders."""
    if "://" in source:
        parts = urllib.parse.urlsplit(source)
        return urllib.parse.urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
    return os.path.basename(source.rstrip("/")) if os.path.isabs(source) or source.startswith(("~", "..")) else source


def public_command(command: str) -> str:
    """A command without folders of its machine: no `--workdir`, no `--data_dir`, and files by their names."""
    kept, skip = [], False
    for argument in shlex.split(command):
        flag, equals, value = argument.partition("=")
        if skip or flag.lstrip("-") in ("workdir", "data_dir"):
            skip = not skip and not equals
        elif flag.startswith("-") and equals:
            kept.append(f"{flag}={public_source(value)}")
        else:
            kept.append(public_source(argument))
    return shlex.join(kept)
