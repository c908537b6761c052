"""The page that shows what a run achieved: `report.html`, made from the files of a run's folder.

One file that opens anywhere, offline: sounds and pictures are embedded, and a content security
policy in its head keeps the browser from loading anything else. The same folder gives the same
bytes.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shlex
from pathlib import Path
from typing import Any

import numpy as np

from harmonic import report_findings
from harmonic.errors import UserError
from harmonic.files import write_whole
from harmonic.report_page import SCRIPT, STYLE
from harmonic.report_parts import Room
from harmonic.report_parts import block as _block
from harmonic.report_parts import card as _card
from harmonic.report_parts import count as _count
from harmonic.report_parts import duration as _duration
from harmonic.report_parts import number as _number
from harmonic.report_parts import section as _section
from harmonic.report_parts import table as _table
from harmonic.report_parts import text as _text
from harmonic.report_plots import Chart, percent, smooth, spread, ticks

# Test bits per sample as published: (model, parameters, bits per sample).
PUBLISHED = {
    "sc09": (
        ("SampleRNN", "35.0 M", 2.042),
        ("WaveNet", "4.2 M", 1.925),
        ("SaShiMi", "5.8 M", 1.873),
        ("HarmonicRNN, 128 pooling groups", "7.3 M", 1.854),
        ("Mamba", "6.1 M", 1.852),
        ("HarmonicRNN, 4 pooling groups", "7.4 M", 1.848),
    ),
    "beethoven": (("SaShiMi", "", 0.946), ("HarmonicRNN", "", 0.915)),
    "youtubemix": (
        ("HarmonicRNN, whole minutes", "", 1.324),
        ("SaShiMi, windows of 8 seconds", "", 1.294),
    ),
}
BASELINES = (  # label, the same in a sentence, key in evaluation.json
    ("Markov model", "a Markov model", "markov_bits"),
    ("Histogram entropy", "the histogram entropy", "histogram_entropy_bits"),
    ("Uniform", "a uniform guess", "uniform_bits"),
)
GROUPS = {  # kind in samples.json: heading, what it is
    "sample": ("Generated", "From nothing but the model."),
    "continuation": ("Continuations", "Prompt in grey, then the model."),
    "real": ("Real recordings", "From the data set, to compare."),
}
Json = dict[str, Any]


def build_report(workdir: str | os.PathLike[str]) -> Path:
    """Writes `workdir`/report.html, whole or not at all.

    Needs config.json and metrics.jsonl; evaluation.json, samples/samples.json, perceptual.json, nearest.json and
    summary.json are shown as far as they exist, so that a run can be looked at while it trains.

    Returns:
      The path of the report.

    Raises:
      UserError: a needed file is missing, a file is not what it should be, or samples.json names a
        file outside its own folder.
    """
    folder = Path(workdir)
    config = _read_json(folder / "config.json", required=True)
    metrics = _read_metrics(folder / "metrics.jsonl")
    evaluation = _read_json(folder / "evaluation.json")
    summary = _read_json(folder / "summary.json")
    samples = _read_json(folder / "samples" / "samples.json")
    perceptual, nearest = _read_json(folder / "perceptual.json"), _read_json(folder / "nearest.json")
    manifest = _read_json(folder / "manifest.json")
    room = Room()

    name = str(config.get("name") or folder.resolve().name)
    named = (_section(part, "data").get("dataset") for part in (config, summary))
    dataset = str(next(filter(None, named), name))
    split = next((s for s in ("test", "validation") if _section(evaluation, s)), "")
    result = _section(evaluation, split)
    sections = [
        _outcome(name, dataset, split, result, metrics),
        _learning(config, metrics, result),
        _context(split, result),
        _listening(folder / "samples", samples, room),
        report_findings.nearest(folder / "nearest", nearest, samples, room),
        report_findings.perceptual(perceptual, dataset),
        _published(dataset, split, result, summary),
        _figures(evaluation, samples, summary, metrics),
        _reproduce(folder, config, summary, manifest),
    ]
    script = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = "default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'; "
    policy += f"script-src 'sha256-{script}'"
    page = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{_text(name)}: HarmonicRNN report</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n{''.join(sections)}</main>\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )
    report = folder / "report.html"
    # JSON strings may hold lone surrogates, which UTF-8 cannot.
    write_whole(report, page.encode("utf-8", "replace"))
    return report


# Reading: what is wrong in a file is a UserError or, in an optional value, as if it were absent.


def _read_json(path: Path, required: bool = False) -> Json:
    text = _read_text(path, required)
    return {} if text is None else _parse(text, path)


def _read_metrics(path: Path) -> list[Json]:
    lines = (_read_text(path, required=True) or "").split("\n")
    # What follows the last newline is a line that is still being written, or was cut off.
    return [_parse(line, path, n) for n, line in enumerate(lines[:-1], 1) if line.strip()]


def _read_text(path: Path, required: bool) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        if not required:
            return None
        raise UserError(f"{path} is missing; give the folder of a run that has begun") from None
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}); give a run's folder") from error


def _parse(text: str, path: Path, line: int = 1) -> Json:
    remedy = "mend it, or delete the file and run its stage again"
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        line += error.lineno - 1
        raise UserError(f"{path}, line {line}: not JSON ({error.msg}); {remedy}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}, line {line}: not a JSON object; {remedy}")
    return value


def _curve(metrics: list[Json], kind: str, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values. A run that was resumed may have logged a step twice: the last counts."""
    found: dict[float, float] = {}
    for line in metrics:
        step, value = _number(line, "step"), _number(line, key)
        if line.get("kind") == kind and step is not None and value is not None:
            found[step] = value
    steps = sorted(found)
    return np.array(steps, float), np.array([found[step] for step in steps], float)


def _baselines(result: Json) -> list[tuple[str, str, float]]:
    values = [(label, phrase, _number(result, key)) for label, phrase, key in BASELINES]
    return [(label, phrase, bits) for label, phrase, bits in values if bits is not None]


# Sections of the page, in its order.


def _outcome(name: str, dataset: str, split: str, result: Json, metrics: list[Json]) -> str:
    header = f'<header>\n<p class="eyebrow">HarmonicRNN run</p>\n<h1>{_text(name)}</h1>\n'
    bits = _number(result, "bits_per_sample")
    if bits is None:
        lead = "This run has not been evaluated yet."
        steps, values = _curve(metrics, "validation", "bits_per_sample")
        if len(steps):
            lead += f" Validation at step {steps[-1]:,.0f}: {values[-1]:.3f} bits per sample."
        return f'{header}<p class="lead">{lead}</p>\n</header>\n'

    baselines = _baselines(result)
    gains = [(phrase, level - bits) for _, phrase, level in baselines]
    versus = [f"{abs(g):.3f} {'less' if g >= 0 else 'more'} than {phrase}" for phrase, g in gains]
    rows = [("This model", bits), *((label, level) for label, _, level in baselines)]
    top = max(level for _, level in rows) or 1.0
    tiles = "".join(f"<div><dt>{label}</dt><dd>{level:.3f}</dd></div>\n" for label, level in rows)
    bars = "".join(
        f'<span>{label}</span><svg width="100%" height="10" role="img" aria-label="{level:.3f}">'
        '<rect class="track" width="100%" height="10" rx="2"/>'
        f'<rect width="{percent(level / top)}" height="10" rx="2"/></svg>\n'
        for label, level in rows
    )
    phrases = {  # key in evaluation.json: how to say it
        "step": "step {}",
        "checkpoint": "{} checkpoint",
        "weights": "{} weights",
        "recordings": "{} recordings",
        "samples": "{} samples (each counted once)",
    }
    facts = [phrase.format(_count(result[key])) for key, phrase in phrases.items() if key in result]
    return (
        f'{header}<p class="lead">On the {split} split of {_text(dataset)} this model needs '
        f"<strong>{bits:.3f} bits per sample</strong>"
        f"{': ' if versus else ''}{', '.join(versus)}.</p>\n</header>\n"
        f'<section class="outcome" aria-label="Outcome">\n<dl class="tiles">\n{tiles}</dl>\n'
        f'<div class="bars">\n{bars}</div>\n<p class="fine">Bits per sample: lower is better. '
        f"Measured with: {_text(', '.join(facts))}.</p>\n</section>\n"
    )


def _learning(config: Json, metrics: list[Json], result: Json) -> str:
    steps, losses = _curve(metrics, "train", "loss")
    checked, validation = _curve(metrics, "validation", "bits_per_sample")
    if not len(steps):
        return _block("Learning", '<p class="fine">No training step has been logged yet.</p>\n')
    baselines = sorted(_baselines(result), key=lambda row: -row[2])
    levels = [*(level for _, _, level in baselines), *validation]
    low = min([*levels, losses.min()])
    # The very first losses may lie far above everything else, and would squash the rest.
    high = max([*levels, np.quantile(losses, 0.98)])
    low, high = low - 0.06 * (high - low) - 0.05, high + 0.08 * (high - low) + 0.05
    right = 1.015 * max([1.0, steps[-1], *checked])

    chart = Chart((0.0, right), (low, high))
    chart.axes([tick for tick in ticks(0.0, right, 5) if tick == round(tick)], ticks(low, high, 6))
    chart.levels((label, level) for label, _, level in baselines)
    smoothed, keep, few = smooth(losses), spread(len(steps), 600), spread(len(checked), 60)
    chart.line(steps[keep], losses[keep], "raw")
    chart.line(steps[keep], smoothed[keep], "smooth")
    chart.dots(checked[few], validation[few])

    legend = '<span class="k-raw">training loss</span><span class="k-smooth">smoothed</span>'
    legend += '<span class="k-dot">validation</span>' if len(checked) else ""
    legend += '<span class="k-base">baselines</span>' if baselines else ""
    planned = _number(_section(config, "train"), "steps")
    state = f"Step {steps[-1]:,.0f}{f' of {planned:,.0f}' if planned else ''}; "
    state += f"smoothed training loss {smoothed[-1]:.3f}"
    if len(checked):
        state += f"; validation {validation[-1]:.3f}, at best {validation.min():.3f}"
    drawn = chart.html("Loss in bits per sample against the training step", "training step")
    return _block("Learning", f'<p class="legend">{legend}</p>\n{drawn}<p class="fine">{state}.</p>\n')


def _context(split: str, result: Json) -> str:
    listed = result.get("contexts")
    found = [
        (_number(row, "context_seconds"), _number(row, "bits_per_sample"), row.get("whole") is True)
        for row in (listed if isinstance(listed, list) else [])
        if isinstance(row, dict)
    ]
    rows = sorted((at, bits, whole) for at, bits, whole in found if at is not None and at > 0 and bits is not None)
    if len(rows) < 2:
        return ""
    seconds, levels, whole = zip(*rows, strict=True)
    low, high = min(levels), max(levels)
    low, high = low - 0.08 * (high - low) - 0.002, high + 0.08 * (high - low) + 0.002
    left, right = seconds[0] / 1.3, seconds[-1] * 1.3
    chart = Chart((left, right), (low, high), logarithmic=True)
    marks = [seconds[0]]
    for at in seconds[1:]:
        # Room for the labels: a tenth of the axis.
        marks += [at] if at > marks[-1] * (right / left) ** 0.1 else []
    chart.axes([float(f"{at:.3g}") for at in marks], ticks(low, high, 6))
    chart.line(seconds, levels, "smooth")
    chart.dots(seconds, levels)
    drawn = chart.html("Bits per sample against the seconds of context", "seconds of context, on a logarithmic scale")
    note = (
        "Recordings are cut into pieces of that length, each evaluated without what came before it, and every sample "
        "counts once: those at the beginning of a piece have hardly any past, those at its end nearly all of it. Whole "
        "recordings come last."
    )
    table = _table(
        f"Bits per sample on the {split} split, by context",
        ["Context", "Bits per sample", "Above whole"],
        [
            [f"{at:,.5g} s{' (whole)' if all_of_it else ''}", f"{bits:.3f}", f"{bits - levels[-1]:+.3f}"]
            for at, bits, all_of_it in rows
        ],
        whole.index(True) if True in whole else None,
    )
    return _block("What context is worth", f'{drawn}<p class="fine">{note}</p>\n<div class="below">{table}</div>\n')


def _listening(folder: Path, samples: Json, room: Room) -> str:
    listed = samples.get("samples")
    entries = [e for e in listed if isinstance(e, dict)] if isinstance(listed, list) else []
    if not entries:
        return _block("Listening", '<p class="fine">Nothing has been generated yet.</p>\n')
    groups = ""
    for kind in dict.fromkeys([*GROUPS, *(str(entry.get("kind")) for entry in entries)]):
        cards = [_card(folder, entry, room) for entry in entries if str(entry.get("kind")) == kind]
        title, hint = GROUPS.get(kind, (kind, ""))
        if cards:
            groups += (
                f'<div class="group">\n<h3>{_text(title)} <small>{len(cards)}</small></h3>\n'
                f'<p class="fine">{hint}</p>\n<div class="cards">\n{"".join(cards)}</div>\n</div>\n'
            )
    keys = ("step", "checkpoint", "temperature", "top_p", "seed")
    facts = ", ".join(f"{key} {samples[key]}" for key in keys if key in samples)
    return _block(
        "Listening",
        f'<p class="fine">{_text(f"Drawn with {facts}. " if facts else "")}Below each player: the '
        "waveform and the log-mel spectrogram (80 dB, low frequencies at the bottom).</p>\n"
        f'<div class="groups">\n{groups}</div>\n',
    )


def _published(dataset: str, split: str, result: Json, summary: Json) -> str:
    bits = _number(result, "bits_per_sample")
    if dataset not in PUBLISHED or bits is None:
        return ""
    total = _number(_section(summary, "parameters"), "total")
    ours = ("This run", f"{total / 1e6:.1f} M" if total else "", bits)
    rows = sorted([*PUBLISHED[dataset], ours], key=lambda row: row[2])
    table = _table(
        f"{dataset}: as published (test split) and this run ({split} split)",
        ["Model", "Parameters", "Bits per sample"],
        [[model, size, f"{value:.3f}"] for model, size, value in rows],
        rows.index(ours),
    )
    note = (
        "As published: on the original data, by their authors' protocols. Like for like only with "
        "a run on the same recordings, splits and windows."
    )
    return _block("Beside the published likelihoods", f'{table}<p class="fine">{note}</p>\n')


def _figures(evaluation: Json, samples: Json, summary: Json, metrics: list[Json]) -> str:
    data, fields = _section(summary, "data"), ("recordings", "windows", "samples")
    splits = _section(data, "splits")
    sizes = [[s, *(_count(_section(splits, s).get(f)) for f in fields)] for s in splits]
    origin = f"{data.get('dataset', '')}, source {data.get('source', 'unknown')}"

    trained = _curve(metrics, "train", "samples_per_second")[1]
    speeds = [("training", float(np.median(trained)) if len(trained) else None)]
    speeds += [("generation", _number(samples, "samples_per_second"))]
    for split in evaluation:
        result = _section(evaluation, split)
        scored, seconds = _number(result, "samples"), _number(result, "seconds")
        speeds += [(f"evaluation, {split}", scored / seconds if scored and seconds else None)]

    stages = _section(summary, "stages")
    seconds_of = {name: _number(_section(stages, name), "seconds") for name in stages}
    times = [[name, _duration(s)] for name, s in seconds_of.items() if s is not None]
    platform = f" on {summary['platform']}" if summary.get("platform") else ""
    tables = [
        _table(f"Data: {origin}", ["Split", *map(str.capitalize, fields)], sizes),
        _table(
            f"Speed{platform}",
            ["Stage", "Samples per second"],
            [[name, _count(speed)] for name, speed in speeds if speed],
        ),
        _table("Time", ["Stage", "Duration"], times),
        _table("Parameters", ["Component", "Number"], _components(_section(summary, "parameters"))),
    ]
    found = "".join(tables)
    return _block("Figures", f'<div class="tables">\n{found}</div>\n') if found else ""


def _components(tree: Json, depth: int = 0) -> list[list[str]]:
    """The rows of a nested object of counts, indented by depth."""
    rows = []
    for name, value in tree.items():
        nested = isinstance(value, dict)
        rows.append(["\u2003" * depth + str(name), "" if nested else _count(value)])
        rows += _components(value, depth + 1) if nested else []
    return rows


def _reproduce(folder: Path, config: Json, summary: Json, manifest: Json) -> str:
    lines, hint = [str(summary["command"])] if summary.get("command") else [], ""
    if not lines:
        lines = _commands(folder, config, manifest)
        hint = '<p class="fine">The run was made step by step, or is not done. These commands make it again.</p>\n'
    shown = _text("\n".join(lines))
    facts = [f"the data set's fingerprint is {manifest['fingerprint']}"] if manifest.get("fingerprint") else []
    facts += [f"{name} {version}" for name, version in _section(summary, "versions").items()]
    under = f'<p class="fine">To compare: {_text("; ".join(facts))}.</p>\n' if facts else ""
    saved = _text(json.dumps(config, indent=2, ensure_ascii=False))
    details = f"<details><summary>Configuration</summary>\n<pre><code>{saved}</code></pre>\n</details>\n"
    return _block("Reproduce", f"{hint}<pre><code>{shown}</code></pre>\n{under}{details}")


def _commands(folder: Path, config: Json, manifest: Json) -> list[str]:
    """What makes a run with this config on this data, a stage a line."""
    run, data = shlex.quote(str(folder)), _section(config, "data")
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
