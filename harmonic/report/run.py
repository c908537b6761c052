"""The page that shows what a run achieved: `report.html`, made from the files of a run's folder."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path
from typing import Any

import numpy as np

from harmonic import models, published
from harmonic.files import write_whole
from harmonic.report import findings
from harmonic.report.charts import Chart, percent, smooth, spread, ticks
from harmonic.report.inputs import Json, number, objects, read_json, read_metrics, section
from harmonic.report.page import SoundBudget, count, duration, player, render

BASELINES = (  # label, the same in a sentence, key in evaluation.json
    ("Markov model", "a Markov model", "markov_bits"),
    ("Histogram entropy", "the histogram entropy", "histogram_entropy_bits"),
    ("Uniform", "a uniform guess", "uniform_bits"),
)
GROUPS = {  # kind in samples.json: heading, explanation
    "sample": ("Generated", "Without a prompt."),
    "continuation": ("Continuations", "The prompt in grey, then the model."),
    "real": ("Real recordings", "From the data set, to compare."),
}


def build_report(workdir: str | os.PathLike[str]) -> Path:
    """Writes `workdir`/report.html, whole or not at all.

    Needs config.json and metrics.jsonl; evaluation.json, samples/samples.json, sound.json, perceptual.json,
    nearest.json and summary.json are shown as far as they exist, so that a run can be looked at while it trains.

    Returns:
      The path of the report.

    Raises:
      UserError: a needed file is missing, a file is damaged, the config is of an unknown model, or samples.json names a
        file outside its own folder.
    """
    folder = Path(workdir)
    config = read_json(folder / "config.json", required=True)
    metrics = read_metrics(folder / "metrics.jsonl")
    evaluation = read_json(folder / "evaluation.json")
    summary = read_json(folder / "summary.json")
    samples = read_json(folder / "samples" / "samples.json")
    sound = read_json(folder / "sound.json")
    perceptual, nearest = read_json(folder / "perceptual.json"), read_json(folder / "nearest.json")
    manifest = read_json(folder / "manifest.json")
    budget = SoundBudget()

    name = str(config.get("name") or folder.resolve().name)
    named = (section(part, "data").get("dataset") for part in (config, summary))
    dataset = str(next(filter(None, named), name))
    split = next((s for s in ("test", "validation") if section(evaluation, s)), "")
    result = section(evaluation, split)
    page = render(
        "report.html.j2",
        name=name,
        model=models.about(section(config, "model").get("kind", models.DEFAULT_KIND)).name,
        dataset=dataset,
        split=split,
        outcome=_outcome(result),
        learning=_learning(config, metrics, result),
        context=_context(result),
        listening=_listening(folder / "samples", samples, budget),
        sound=findings.sound(sound),
        nearest=findings.nearest(folder / "nearest", nearest, samples, budget),
        perceptual=findings.perceptual(perceptual, dataset),
        published=_published(dataset, result, summary),
        figures=_figures(evaluation, samples, summary, metrics),
        reproduce=_reproduce(folder, config, summary, manifest),
    )
    report = folder / "report.html"
    write_whole(report, page)
    return report


def _curve(metrics: list[Json], kind: str, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values. A run that was resumed may have logged a step twice: the last line counts."""
    found: dict[float, float] = {}
    for line in metrics:
        step, value = number(line, "step"), number(line, key)
        if line.get("kind") == kind and step is not None and value is not None:
            found[step] = value
    steps = sorted(found)
    return np.array(steps, float), np.array([found[step] for step in steps], float)


def _baselines(result: Json) -> list[tuple[str, str, float]]:
    values = [(label, phrase, number(result, key)) for label, phrase, key in BASELINES]
    return [(label, phrase, bits) for label, phrase, bits in values if bits is not None]


# The sections of the page, in its order. Each returns what the template shows, or None to leave the section out.


def _outcome(result: Json) -> Json | None:
    bits = number(result, "bits_per_sample")
    if bits is None:
        return None
    baselines = _baselines(result)
    gains = [(phrase, value - bits) for _, phrase, value in baselines]
    rows = [("This model", bits), *((label, value) for label, _, value in baselines)]
    top = max(value for _, value in rows) or 1.0
    phrases = {  # key in evaluation.json: how to say it
        "step": "step {}",
        "checkpoint": "{} checkpoint",
        "weights": "{} weights",
        "recordings": "{} recordings",
        "samples": "{} samples (each counted once)",
    }
    return {
        "bits": bits,
        "versus": [f"{abs(gain):.3f} {'less' if gain >= 0 else 'more'} than {phrase}" for phrase, gain in gains],
        "rows": [(label, f"{value:.3f}", percent(value / top)) for label, value in rows],
        "facts": [phrase.format(count(result[key])) for key, phrase in phrases.items() if key in result],
    }


def _learning(config: Json, metrics: list[Json], result: Json) -> Json:
    steps, losses = _curve(metrics, "train", "loss")
    checked, validation = _curve(metrics, "validation", "bits_per_sample")
    last = (checked[-1], validation[-1], validation.min()) if len(checked) else None
    if not len(steps):
        return {"chart": None, "validation": last}
    baselines = sorted(_baselines(result), key=lambda row: -row[2])
    values = [*(value for _, _, value in baselines), *validation]
    low = min([*values, losses.min()])
    # The very first losses may be far above everything else, and would squash the rest.
    high = max([*values, np.quantile(losses, 0.98)])
    low, high = low - 0.06 * (high - low) - 0.05, high + 0.08 * (high - low) + 0.05
    right = 1.015 * max([1.0, steps[-1], *checked])

    chart = Chart((0.0, right), (low, high))
    chart.axes([tick for tick in ticks(0.0, right, 5) if tick == round(tick)], ticks(low, high, 6))
    chart.baselines((label, value) for label, _, value in baselines)
    smoothed, keep, few = smooth(losses), spread(len(steps), 600), spread(len(checked), 60)
    chart.line(steps[keep], losses[keep], "raw")
    chart.line(steps[keep], smoothed[keep], "smooth")
    chart.dots(checked[few], validation[few])
    planned = number(config, "train", "steps")
    return {
        "chart": chart,
        "validation": last,
        "baselines": bool(baselines),
        "step": steps[-1],
        "planned": planned,
        "loss": smoothed[-1],
    }


def _context(result: Json) -> Json | None:
    found = [
        (number(row, "context_seconds"), number(row, "bits_per_sample"), row.get("whole") is True)
        for row in objects(result.get("contexts"))
    ]
    rows = sorted((at, bits, whole) for at, bits, whole in found if at is not None and at > 0 and bits is not None)
    if len(rows) < 2:
        return None
    seconds, values, whole = zip(*rows, strict=True)
    low, high = min(values), max(values)
    low, high = low - 0.08 * (high - low) - 0.002, high + 0.08 * (high - low) + 0.002
    left, right = seconds[0] / 1.3, seconds[-1] * 1.3
    chart = Chart((left, right), (low, high), logarithmic=True)
    labelled = [seconds[0]]
    for at in seconds[1:]:
        # A label takes about a tenth of the axis.
        labelled += [at] if at > labelled[-1] * (right / left) ** 0.1 else []
    chart.axes([float(f"{at:.3g}") for at in labelled], ticks(low, high, 6))
    chart.line(seconds, values, "smooth")
    chart.dots(seconds, values)
    return {
        "chart": chart,
        "rows": [
            (f"{at:,.5g} s{' (whole)' if all_of_it else ''}", f"{bits:.3f}", f"{bits - values[-1]:+.3f}")
            for at, bits, all_of_it in rows
        ],
        "whole": whole.index(True) if True in whole else None,
    }


def _listening(folder: Path, samples: Json, budget: SoundBudget) -> Json:
    entries = objects(samples.get("samples"))
    groups = []
    for kind in dict.fromkeys([*GROUPS, *(str(entry.get("kind")) for entry in entries)]):
        players = [player(folder, entry, budget) for entry in entries if str(entry.get("kind")) == kind]
        if players:
            groups.append((*GROUPS.get(kind, (kind, "")), players))
    keys = ("step", "checkpoint", "temperature", "top_p", "seed")
    return {
        "groups": groups,
        "facts": [f"{key} {samples[key]}" for key in keys if key in samples],
        "command": f"python -m workflows.listen --workdir={shlex.quote(str(folder.parent))}",
    }


def _published(dataset: str, result: Json, summary: Json) -> Json | None:
    theirs = [
        (row.title, row.value("parameters"), bits)
        for row in published.RESULTS
        if row.dataset == dataset and (bits := row.value("bits_per_sample")) is not None
    ]
    bits = number(result, "bits_per_sample")
    if not theirs or bits is None:
        return None
    ours = ("This run", number(summary, "parameters", "total"), bits)
    rows = sorted([*theirs, ours], key=lambda row: row[2])
    return {
        "rows": [(title, f"{size / 1e6:.1f} M" if size else "", f"{value:.3f}") for title, size, value in rows],
        "ours": rows.index(ours),
    }


def _figures(evaluation: Json, samples: Json, summary: Json, metrics: list[Json]) -> list[tuple[str, list[str], Any]]:
    """(caption, head, rows) of each table."""
    data, fields = section(summary, "data"), ("recordings", "windows", "samples")
    splits = section(data, "splits")
    sizes = [[split, *(count(section(splits, split).get(field)) for field in fields)] for split in splits]
    origin = f"{data.get('dataset', '')}, source {data.get('source', 'unknown')}"

    trained = _curve(metrics, "train", "samples_per_second")[1]
    speeds = [("training", float(np.median(trained)) if len(trained) else None)]
    speeds += [("generation", number(samples, "samples_per_second"))]
    for split in evaluation:
        scored, seconds = (number(evaluation, split, name) for name in ("samples", "seconds"))
        speeds += [(f"evaluation, {split}", scored / seconds if scored and seconds else None)]

    stages = section(summary, "stages")
    times = [(name, number(stages, name, "seconds")) for name in stages]
    platform = f" on {summary['platform']}" if summary.get("platform") else ""
    tables: list[tuple[str, list[str], Any]] = [
        (f"Data: {origin}", ["Split", *map(str.capitalize, fields)], sizes),
        (
            f"Speed{platform}",
            ["Stage", "Samples per second"],
            [(name, count(speed)) for name, speed in speeds if speed],
        ),
        ("Time", ["Stage", "Duration"], [(name, duration(took)) for name, took in times if took is not None]),
        ("Parameters", ["Component", "Number"], _components(section(summary, "parameters"))),
    ]
    return [table for table in tables if table[2]]


def _components(tree: Json, depth: int = 0) -> list[list[str]]:
    """The rows of a nested object of counts, indented by depth."""
    rows = []
    for name, value in tree.items():
        nested = isinstance(value, dict)
        rows.append(["\u2003" * depth + str(name), "" if nested else count(value)])
        rows += _components(value, depth + 1) if nested else []
    return rows


def _reproduce(folder: Path, config: Json, summary: Json, manifest: Json) -> Json:
    command = str(summary["command"]) if summary.get("command") else ""
    facts = [f"the data set's fingerprint is {manifest['fingerprint']}"] if manifest.get("fingerprint") else []
    return {
        "command": command,
        "stages": [] if command else _commands(folder, config, manifest),
        "facts": facts + [f"{name} {version}" for name, version in section(summary, "versions").items()],
        "config": json.dumps(config, indent=2, ensure_ascii=False),
    }


def _commands(folder: Path, config: Json, manifest: Json) -> list[str]:
    """The commands that make a run with this config on this data."""
    run, data = shlex.quote(str(folder)), section(config, "data")
    prepare = ["--dataset", str(data.get("dataset", "demo"))]
    if manifest.get("source"):
        prepare += ["--source", str(manifest["source"])]
    prepare += [f"--{name}={data[name]}" for name in ("encoding", "num_levels") if name in data]
    for name in ("window_length", "hop_length", "trim_silence", "loudness"):
        if manifest.get(name) is not None:
            prepare.append(f"--{name}={manifest[name]}")
    return [
        f"python -m pipelines.prepare {shlex.join(prepare)}",
        f"python -m workflows.full_run --config={run}/config.json --workdir={run}-again",
    ]
