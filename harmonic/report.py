"""The page that shows what a run achieved: `report.html`, made from the files of a run's folder.

One file that opens anywhere, offline: sounds and pictures are embedded, and a content security
policy in its head keeps the browser from loading anything else. The same folder gives the same
bytes.
"""

from __future__ import annotations

import base64
import hashlib
import html
import io
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np

from harmonic import audio
from harmonic.errors import UserError
from harmonic.report_page import SCRIPT, STYLE

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

    Needs config.json and metrics.jsonl; evaluation.json, samples/samples.json and summary.json are
    shown as far as they exist, so that a run can be looked at while it trains.

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

    name = str(config.get("name") or folder.resolve().name)
    named = (_section(part, "data").get("dataset") for part in (config, summary))
    dataset = str(next(filter(None, named), name))
    split = next((s for s in ("test", "validation") if _section(evaluation, s)), "")
    result = _section(evaluation, split)
    sections = [
        _outcome(name, dataset, split, result, metrics),
        _learning(config, metrics, result),
        _listening(folder / "samples", samples),
        _published(dataset, split, result, summary),
        _figures(evaluation, samples, summary, metrics),
        _reproduce(config, summary),
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
    temporary = folder / "report.html.partial"
    try:
        # JSON strings may hold lone surrogates, which UTF-8 cannot.
        temporary.write_bytes(page.encode("utf-8", "replace"))
        os.replace(temporary, report)
    finally:
        temporary.unlink(missing_ok=True)
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


def _section(mapping: Json, key: str) -> Json:
    value = mapping.get(key)
    return value if isinstance(value, dict) else {}


def _number(mapping: Json, key: str) -> float | None:
    value = mapping.get(key)
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


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


# Writing: everything that comes from a file goes through _text or is a number.


def _text(value: object) -> str:
    return html.escape(str(value))


def _count(value: object) -> str:
    number = isinstance(value, int | float) and math.isfinite(value)
    return f"{value:,.0f}" if number else "" if value is None else str(value)


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def _percent(fraction: float) -> str:
    return f"{100 * min(max(fraction, 0.0), 1.0):.2f}%"


def _table(caption: str, head: list[str], rows: list[list[str]], ours: int | None = None) -> str:
    """A table of plain text; every column but the first holds figures, row `ours` stands out."""
    if not rows:
        return ""
    titles = "".join(f'<th scope="col">{_text(title)}</th>' for title in head)
    lines = []
    for index, (first, *rest) in enumerate(rows):
        kind = ' class="ours"' if index == ours else ""
        cells = "".join(f"<td>{_text(cell)}</td>" for cell in rest)
        lines.append(f'<tr{kind}><th scope="row">{_text(first)}</th>{cells}</tr>\n')
    return (
        f'<div class="table"><table>\n<caption>{_text(caption)}</caption>\n'
        f"<thead><tr>{titles}</tr></thead>\n<tbody>\n{''.join(lines)}</tbody>\n</table></div>\n"
    )


# Sections of the page, in its order.


def _block(title: str, body: str) -> str:
    return f"<section>\n<h2>{title}</h2>\n{body}</section>\n"


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
        f'<rect width="{_percent(level / top)}" height="10" rx="2"/></svg>\n'
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

    def y(bits: float) -> float:
        return (high - bits) / (high - low)

    def curve(values: np.ndarray, kind: str) -> str:
        keep = _spread(len(steps), 600)
        points = " ".join(f"{1000 * steps[i] / right:.1f},{1000 * y(values[i]):.1f}" for i in keep)
        return f'<polyline class="{kind}" points="{points}"/>\n'

    shapes, labels = "", ""
    for tick in _ticks(low, high, 6):
        shapes += f'<path class="grid" d="M0 {1000 * y(tick):.1f}H1000"/>\n'
        labels += f'<span class="y" style="top:{_percent(y(tick))}">{tick:,.10g}</span>\n'
    for tick in _ticks(0.0, right, 5):
        if tick == round(tick):
            kind, left = "x end" if tick > 0.9 * right else "x", _percent(tick / right)
            labels += f'<span class="{kind}" style="left:{left}">{tick:,.0f}</span>\n'
    above = math.inf
    for label, _, level in baselines:
        # Of two levels that are close, the lower one's label hangs below its line.
        kind = "name below" if above - level < 0.08 * (high - low) else "name"
        shapes += f'<path class="base" d="M0 {1000 * y(level):.1f}H1000"/>\n'
        top = _percent(y(level))
        labels += f'<span class="{kind}" style="top:{top}">{label} {level:.3f}</span>\n'
        above = level
    smooth = _smooth(losses)
    shapes += curve(losses, "raw") + curve(smooth, "smooth")
    for i in _spread(len(checked), 60):
        at = f"{1000 * checked[i] / right:.1f} {1000 * y(validation[i]):.1f}"
        shapes += f'<path class="dot" d="M{at}h.01"/>\n'

    legend = '<span class="k-raw">training loss</span><span class="k-smooth">smoothed</span>'
    legend += '<span class="k-dot">validation</span>' if len(checked) else ""
    legend += '<span class="k-base">baselines</span>' if baselines else ""
    planned = _number(_section(config, "train"), "steps")
    state = f"Step {steps[-1]:,.0f}{f' of {planned:,.0f}' if planned else ''}; "
    state += f"smoothed training loss {smooth[-1]:.3f}"
    if len(checked):
        state += f"; validation {validation[-1]:.3f}, at best {validation.min():.3f}"
    return _block(
        "Learning",
        f'<p class="legend">{legend}</p>\n<p class="unit">bits per sample</p>\n'
        '<div class="chart"><svg viewBox="0 0 1000 1000" preserveAspectRatio="none" role="img" '
        f'aria-label="Loss in bits per sample against the training step">\n{shapes}</svg>\n'
        f'{labels}</div>\n<p class="unit right">training step</p>\n<p class="fine">{state}.</p>\n',
    )


def _spread(length: int, most: int) -> np.ndarray:
    """Indices of at most `most` of `length` points, evenly spread, both ends included."""
    return np.linspace(0, length - 1, min(length, most)).astype(int)


def _ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers from `low` to `high`, `most` steps apart at most."""
    magnitude = 10.0 ** math.floor(math.log10((high - low) / most))
    step = next(m * magnitude for m in (1, 2, 5, 10) if (high - low) / (m * magnitude) <= most)
    return [n * step for n in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _smooth(values: np.ndarray) -> np.ndarray:
    """A moving average over an eighth of a curve; shorter at its start, where the loss falls."""
    index = np.arange(len(values))
    half = np.minimum(max(1, len(values) // 16), index // 2)
    first, last = index - half, np.minimum(index + half + 1, len(values))
    total = np.concatenate([[0.0], np.cumsum(values)])
    return (total[last] - total[first]) / (last - first)


def _listening(folder: Path, samples: Json) -> str:
    listed = samples.get("samples")
    entries = [e for e in listed if isinstance(e, dict)] if isinstance(listed, list) else []
    if not entries:
        return _block("Listening", '<p class="fine">Nothing has been generated yet.</p>\n')
    groups = ""
    for kind in dict.fromkeys([*GROUPS, *(str(entry.get("kind")) for entry in entries)]):
        cards = [_card(folder, entry) for entry in entries if str(entry.get("kind")) == kind]
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


def _card(folder: Path, entry: Json) -> str:
    name = entry.get("file")
    if not isinstance(name, str) or name in ("", ".", "..") or set(name) & set("/\\\0"):
        raise UserError(
            f"{folder / 'samples.json'} names the file {name!r}, which is not a plain name inside "
            "that folder; run the generate stage again"
        )
    path = folder / name
    try:
        content = path.read_bytes()
    except OSError as error:
        remedy = "run the generate stage again"
        raise UserError(f"cannot read {path} ({error.strerror}); {remedy}") from error
    waveform, rate = audio.read_audio(io.BytesIO(content), name=str(path))
    seconds, bits = len(waveform) / rate, _number(entry, "bits_per_sample")
    facts = f"{seconds:.2f} s" + (f" · {bits:.3f} bits per sample" if bits is not None else "")
    title = _text(entry.get("label") or Path(name).stem.replace("_", " "))
    origin = str(entry.get("source") or name)
    prompt = _number(entry, "prompt_seconds") or 0.0
    mark = label = ""
    if entry.get("kind") != "continuation":
        prompt = 0.0
    if prompt > 0:
        left = _percent(prompt / seconds)
        mark = f'<i class="mark" style="left:{left}"></i>'
        label = f'<b style="left:{left}">{prompt:.2f} s</b>'
        origin = f"Prompt: {origin}"
    return (
        f'<figure class="card">\n<figcaption><strong>{title}</strong><span>{facts}</span>'
        f'</figcaption>\n<audio controls preload="metadata" aria-label="{title}" '
        f'src="data:audio/wav;base64,{base64.b64encode(content).decode()}"></audio>\n'
        f'<div class="views">{_waveform(waveform, prompt / seconds)}<img alt="Log-mel spectrogram" '
        f'src="data:image/png;base64,{_spectrogram(waveform, rate)}">{mark}'
        f'<i class="playhead"></i></div>\n<div class="axis"><span>0</span>{label}'
        f'<span>{seconds:.2f} s</span></div>\n<p class="origin">{_text(origin)}</p>\n</figure>\n'
    )


def _waveform(waveform: np.ndarray, prompt: float, columns: int = 240) -> str:
    """The envelope of a waveform as inline SVG; its first part, the prompt's, in grey."""
    starts = np.linspace(0, len(waveform), columns, endpoint=False).astype(int)
    top = 50 - 48 * np.maximum.reduceat(waveform, starts)
    bottom = np.maximum(50 - 48 * np.minimum.reduceat(waveform, starts), top + 1)
    split = round(min(prompt, 1.0) * columns)
    paths = ""
    # The second part starts a column early, so that the two touch.
    for kind, part in (("given", range(split)), ("made", range(max(split - 1, 0), columns))):
        outline = [f"{i} {top[i]:.1f}" for i in part]
        outline += [f"{i} {bottom[i]:.1f}" for i in reversed(part)]
        paths += f'<path class="{kind}" d="M{"L".join(outline)}Z"/>' if outline else ""
    return (
        f'<svg viewBox="0 0 {columns - 1} 100" preserveAspectRatio="none" role="img" '
        f'aria-label="Waveform">{paths}</svg>'
    )


def _spectrogram(waveform: np.ndarray, sample_rate: int, columns: int = 400) -> str:
    """A log-mel spectrogram, at most `columns` pixels wide, as a PNG in base64."""
    import librosa
    from matplotlib import colormaps, image

    window = 1024
    # Frames overlap however long the recording is; those that share a column are averaged.
    hop = min(max(len(waveform) // columns, 64), window // 2)
    padded = np.pad(waveform, (0, max(0, window - len(waveform))))
    power = librosa.feature.melspectrogram(
        y=padded,
        sr=sample_rate,
        n_fft=window,
        hop_length=hop,
        n_mels=64,
    )
    power = power[:, : max(1, len(waveform) // hop)]
    starts = np.arange(0, power.shape[1], math.ceil(power.shape[1] / columns))
    power = np.add.reduceat(power, starts, axis=1) / np.diff(starts, append=power.shape[1])
    decibels = librosa.power_to_db(power, ref=np.max)
    colours = colormaps["magma"](np.clip(1 + decibels[::-1] / 80, 0, 1), bytes=True)
    picture = io.BytesIO()
    nameless: dict[str, Any] = {"Software": None}  # else the version is in the file
    image.imsave(picture, colours, format="png", metadata=nameless)
    return base64.b64encode(picture.getvalue()).decode()


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


def _reproduce(config: Json, summary: Json) -> str:
    if summary.get("command"):
        command = f"<pre><code>{_text(summary['command'])}</code></pre>"
    else:
        command = (
            '<p class="fine">The command is recorded once the whole run is done. The configuration '
            "is complete: save it as config.json and give that path to --config.</p>"
        )
    saved = _text(json.dumps(config, indent=2, ensure_ascii=False))
    shown = f"<pre><code>{saved}</code></pre>"
    details = f"<details><summary>Configuration</summary>\n{shown}\n</details>\n"
    return _block("Reproduce", f"{command}\n{details}")
