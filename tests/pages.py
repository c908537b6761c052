"""A run's folder for reports to be made of, and pages as a browser reads them."""

from __future__ import annotations

import html.parser
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from harmonic import audio

SECONDS = (0.25, 0.5, 0.75, 1.0, 1.25, 2.5)  # of the six samples


class Page(html.parser.HTMLParser):
    """What a browser would see: elements with their attributes, and the text by element."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text: dict[str, str] = {}
        self._open: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert not self._open, f"not closed: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {key: value or "" for key, value in attrs}))
        if tag not in ("meta", "img"):
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {key: value or "" for key, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open:
            self.text[self._open[-1]] = self.text.get(self._open[-1], "") + data + "\n"

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def words(self) -> str:
        """All text that is shown."""
        shown = [text for tag, text in self.text.items() if tag not in ("style", "script")]
        return " ".join(" ".join(shown).split())


def sound(seconds: float, pitch: float, sample_rate: int = 16_000) -> np.ndarray:
    time = np.arange(round(seconds * sample_rate)) / sample_rate
    noise = np.random.default_rng(round(pitch)).normal(0, 0.02, len(time))
    return (0.5 * np.sin(2 * np.pi * pitch * time) * np.exp(-2 * time) + noise).astype(np.float32)


def write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def make_run(folder: Path, name: str = "sc09", label: str = "seven") -> Path:
    """A run's folder with every file, two samples of each kind."""
    (folder / "samples").mkdir(parents=True)
    train = {"steps": 300, "learning_rate": 0.002}
    config = {"name": name, "model": {"width": 128}, "data": {"dataset": "sc09"}, "train": train}
    write(folder / "config.json", {**config, "evaluate": {}, "generate": {}, "mesh": {}, "seed": 0})

    lines: list[dict[str, Any]] = []
    for step in range(10, 301, 10):
        loss = 4 + 4 * math.exp(-step / 60) + 0.05 * math.sin(step)
        speed = 4_000 + step
        train_line = {"kind": "train", "step": step, "loss": loss, "samples_per_second": speed}
        lines.append({**train_line, "grad_norm": 1.0, "learning_rate": 0.002, "skipped": 0})
        if step % 100 == 0:
            lines.append({"kind": "validation", "step": step, "bits_per_sample": loss - 0.01})
    metrics = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(metrics, encoding="utf-8")

    test = {"step": 300, "checkpoint": "best", "weights": "ema", "bits_per_sample": 4.1234}
    test |= {"samples": 123_456, "recordings": 15, "dataset": "sc09", "seconds": 12.3}
    test |= {"uniform_bits": 8.0, "histogram_entropy_bits": 7.4, "markov_bits": 5.0}
    contexts = [{"context_seconds": 0.125 * 4**n, "bits_per_sample": 4.5 - 0.1 * n} for n in range(3)]
    contexts.append({"context_seconds": 16.5, "bits_per_sample": 4.1234, "whole": True})
    write(folder / "evaluation.json", {"test": {**test, "contexts": contexts}})

    entries: list[dict[str, Any]] = []
    for number in range(6):
        kind = ("sample", "continuation", "real")[number // 2]
        file, seconds = f"{kind}_{number % 2:04d}.wav", SECONDS[number]
        audio.write_wav(folder / "samples" / file, sound(seconds, 200 + 90 * number))
        entry: dict[str, Any] = {"kind": kind, "file": file, "seconds": seconds}
        entry["prompt_seconds"] = seconds / 2 if kind == "continuation" else 0.0
        if kind != "sample":
            entry |= {"source": f"{label}/clip_{number}.wav", "label": label}
        entries.append({**entry, "bits_per_sample": 3.25})
    settings = {"step": 300, "checkpoint": "best", "seed": 0, "temperature": 1.0, "top_p": 1.0}
    settings |= {"sample_rate": 16_000, "encoding": "mu_law", "samples_per_second": 4_321.0}
    write(folder / "samples" / "samples.json", {**settings, "samples": entries})

    sizes = {"recordings": 31_158, "windows": 31_160, "samples": 494_412_303}
    parameters = {
        "total": 139_072,
        "by component": {"levels": {"level 0": 100_000}, "head": 39_072},
    }
    summary = {
        "command": "python -m workflows.full_run --config=sc09",
        "parameters": parameters,
        "stages": {"prepare": {"seconds": 1.2}, "train": {"seconds": 5_133.0}},
        "data": {"dataset": "sc09", "source": "hub", "splits": {"train": sizes}},
        "platform": "cpu",
    }
    write(folder / "summary.json", summary)

    real = {"is": 6.5, "is_released": 7.0, "mis": 200.0, "am": 0.2}
    figures = {"generated": {"fid": 21.25, "is": 3.5, "is_released": 4.0, "mis": 12.0, "am": 1.234, "clips": 512}}
    figures |= {"rejected": {"fid": 15.75, "clips": 140, "kept": 140}, "train": {"fid": 0.0, **real}}
    write(folder / "perceptual.json", {"step": 300, "temperature": 0.8, "num_samples": 512, **figures})

    heard = {"frames": 6_288, "seconds": 64.0, "level_db": -12.5, "peaks": 0.8125, "silence": 0.0625}
    heard |= {"onsets_per_second": 2.25}
    distances = {"generated": 4_000.0, "held_out": None, "train": 2_000.0, "shaped_noise": 10_000.0}
    every = {name: {**heard, "distance": distance} for name, distance in distances.items()}
    every["train"] |= {"least": 1_900.0, "greatest": 2_100.0, "choices": 3}
    every["white_noise"] = {**heard, "distance": 24_000.0, "level_db": None}
    pairs = [{"temperature": t, "top_p": 1.0, "distance": 5_000 * t, "share": t / 2} for t in (0.8, 0.9)]
    choice = {"split": "validation", "step": 300, "rows": pairs, "recommended": {**pairs[0], "alike": 1}}
    drift = [{"start": n, "stop": n + 1, "generated": 3 - 0.1 * n, "held_out": 3 + 0.1 * n} for n in range(4)]
    made_from = {"step": 300, "split": "test", "clips": 16, "clip_seconds": 4.0, "temperature": 0.9, "top_p": 1.0}
    notes = [f"A note of {label}."]
    stretches = [{"start": n, "stop": n + 1, "level_db": -14.5 + n, "bits_per_sample": 2 + n / 8} for n in range(16)]
    longer = {
        "streams": 4,
        "seconds": 16.0,
        "verdict": "2 of 4 streams run away, the first after 6 s",
        "rows": stretches,
    }
    longer |= {"most": {"level_db": -9.5, "bits_per_sample": 3.25}, "away": 0.5}
    sounds = {"rows": every, "share": 0.25, "drift": drift, "longer": longer, "notes": notes, "choice": choice}
    write(folder / "sound.json", {**made_from, **sounds})

    (folder / "nearest").mkdir()
    clips: dict[str, list[dict[str, Any]]] = {"generated": [], "held_out": []}
    for number in range(3):
        kind = "generated" if number < 2 else "held_out"
        files = [f"{kind}_{number:04d}{end}.wav" for end in ("", "_training")]
        for file in files:
            audio.write_wav(folder / "nearest" / file, sound(0.3, 1_000 + 50 * number + len(file)))
        place = {"distance": 2.5 + number, "recording": f"{label}/train_{number}.wav", "recording_start": 0.12}
        row = {"clip": f"{kind}.wav", "start": 0.25, "file": files[0], "nearest_file": files[1], "nearest": place}
        clips[kind].append({**row, "split": "test"} if kind == "held_out" else row)
    clips["generated"].append({"clip": "far.wav", "nearest": None})
    group = {"clips": 2, "excerpts": 140, "silent": 0, "as_near_as_a_copy": 0.125, "nearer_than_held_out": 0.25}
    group["quantiles"] = {"0": 1.5, "0.05": 2.0, "0.25": 2.5, "0.5": 3.25, "0.75": 4.0}
    groups = {"generated": group, "held_out": {**group, "as_near_as_a_copy": 0.0}, "copies": {"quantiles": {"0": 0.5}}}
    training = {"recordings": 31_158, "compared": 31_000, "seconds": 30_000.0}
    write(folder / "nearest.json", {"step": 300, "seconds": 0.3, "training": training, "groups": groups, **clips})
    return folder


def curves(page: Page) -> list[dict[str, str]]:
    """The curves of a page's charts."""
    return [path for path in page.all("path") if path["class"].split()[0] in ("raw", "smooth", "curve")]
