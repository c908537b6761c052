"""The stages of a run after training, as functions over its folder: evaluation over a split, samples to listen to."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from harmonic import audio, files
from harmonic.data import Dataset, Split
from harmonic.errors import UserError
from harmonic.evaluate import Likelihood, baselines, evaluate_split
from harmonic.records import Manifest
from harmonic.run import EVALUATION, SAMPLES, Run
from harmonic.voice import Codec, Prompt, Voice


def evaluate_run(
    workdir: Path,
    data: Path,
    *,
    split: str = "test",
    checkpoint: str = "best",
    raw: bool = False,
    reset_every: int = 0,
    contexts: Sequence[float] = (),
) -> dict[str, Any]:
    """Evaluates a run on a split and writes the figures to its evaluation.json.

    Args:
      workdir: the run's folder.
      data: folder of the prepared data set.
      split: `train`, `validation` or `test`.
      checkpoint, raw: as for `Run.weights`.
      reset_every: forget the past every that many samples; 0 for never.
      contexts: evaluate also with recordings cut into pieces of so many seconds, for each of these numbers: what
        context is worth. Every figure is written when it is found, and figures of the same weights and data are kept,
        so that an interrupted evaluation continues. Without contexts the figure is always computed.

    Returns:
      {"bits_per_sample", "samples", "recordings", the baselines, and what was evaluated; with contexts also "contexts",
      a list of {"context_seconds", "context_samples", "bits_per_sample", "samples", "seconds", "whole"}, the shortest
      first. The last one is of whole recordings, and covers every context that no recording exceeds}.

    Raises:
      UserError: there is no such run or data, the weights are broken, or both `reset_every` and contexts are given.
    """
    if reset_every and contexts:
        raise UserError("contexts and reset_every are two ways to say how much past there is; give one of them")
    run, dataset = Run(workdir), Dataset(data)
    trained = run.weights(checkpoint, raw=raw)
    dataset.check(trained.config)
    manifest, part, crop = dataset.manifest, dataset.split(split), trained.config.data.crop_length
    key = split if not reset_every else f"{split} (reset every {reset_every})"
    made_from = {
        "dataset": manifest.dataset,
        "fingerprint": manifest.fingerprint,
        "step": trained.step,
        "checkpoint": checkpoint,
        "weights": trained.kind,
        "weights_sha256": trained.sha256,
        "reset_every": reset_every,
    }
    noted = (run.read(EVALUATION) or {}).get(key) or {}
    kept = noted if all(noted.get(name) == value for name, value in made_from.items()) else {}
    windowed = {row["context_samples"]: row for row in kept.get("contexts", []) if not row["whole"]}
    longest = int(min(part.lengths.max(), crop or part.lengths.max()))

    def measure(reset: int) -> Likelihood:
        return evaluate_split(
            trained.model,
            trained.params,
            part,
            trained.config,
            reset_every=reset,
            labels=dataset.labels(),
            show_progress=True,
        )

    def note(figures: dict[str, Any]) -> dict[str, Any]:
        if windowed or contexts:
            whole = _context_row(longest / manifest.sample_rate, longest, figures, whole=True)
            figures = {**figures, "contexts": [*(windowed[length] for length in sorted(windowed)), whole]}
        run.write(EVALUATION, {**(run.read(EVALUATION) or {}), key: figures})
        return figures

    if contexts and kept:
        figures = note(kept)
    else:
        result = measure(reset_every)
        plain = baselines(dataset.split("train"), part, crop_length=crop)
        figures = {**made_from, **_figures(result), "recordings": result.recordings, **dataclasses.asdict(plain)}
        figures = note(figures)
    for seconds in contexts:
        length = _context_samples(seconds, manifest)
        if length < longest and length not in windowed:
            windowed[length] = _context_row(seconds, length, _figures(measure(length)), whole=False)
            figures = note(figures)
    return figures


def evaluation(
    workdir: Path,
    manifest: Manifest,
    step: int,
    *,
    split: str = "test",
    contexts: Sequence[float] = (),
    weights_sha256: str | None = None,
) -> dict[str, Any] | None:
    """What `evaluate_run` has written for a split; None where that is of another step or other data, lacks a context,
    or is of other weights than those with `weights_sha256`, if that is given."""
    figures = (Run(workdir).read(EVALUATION) or {}).get(split)
    if not figures or (figures["step"], figures["fingerprint"]) != (step, manifest.fingerprint):
        return None
    if weights_sha256 and figures.get("weights_sha256") != weights_sha256:
        return None
    found = [row["context_samples"] for row in figures.get("contexts", [])] or [0]
    wanted = {min(_context_samples(seconds, manifest), found[-1] or math.inf) for seconds in contexts}
    return figures if wanted <= set(found) else None


def _context_samples(seconds: float, manifest: Manifest) -> int:
    return max(1, round(seconds * manifest.sample_rate))


def _context_row(seconds: float, length: int, figures: dict[str, Any], *, whole: bool) -> dict[str, Any]:
    found = {name: figures[name] for name in ("bits_per_sample", "samples", "seconds")}
    return {"context_seconds": seconds, "context_samples": length, **found, "whole": whole}


def _figures(result: Likelihood) -> dict[str, Any]:
    return {"bits_per_sample": result.bits_per_sample, "samples": result.samples, "seconds": result.seconds}


def sample_run(workdir: Path, data: Path, *, checkpoint: str = "best") -> dict[str, Any]:
    """What full_run lets a user listen to: samples, continuations of test recordings, and such recordings.

    The WAV files are written first, and samples.json, which describes them, last.

    Args:
      workdir: the run's folder, whose config says how much is generated.
      data: folder of the prepared data set.
      checkpoint: as for `Run.weights`.

    Returns:
      The content of samples.json.

    Raises:
      UserError: there is no such run or data, or the folder cannot be written.
    """
    started = time.monotonic()
    run, dataset = Run(workdir), Dataset(data)
    trained, test, folder = run.weights(checkpoint), dataset.split("test"), run.folder / "samples"
    voice = Voice(trained.model, trained.params, Codec.of(dataset.manifest))
    settings, rate = trained.config.generate, voice.codec.sample_rate
    with files.write_errors(folder):
        (run.folder / SAMPLES).unlink(missing_ok=True)  # its files are about to be replaced
    sampling: dict[str, Any] = {
        "seed": trained.config.seed,
        "temperature": settings.temperature,
        "top_p": settings.top_p,
    }
    samples = voice.write(folder, kind="sample", num_samples=settings.num_samples, seconds=settings.seconds, **sampling)
    generated = time.monotonic()
    prompts = list(_test_prompts(test, settings.num_continuations, settings.prompt_seconds, rate))
    if prompts:
        samples += voice.write(
            folder,
            kind="continuation",
            num_samples=len(prompts),
            seconds=max(settings.seconds, 2 * settings.prompt_seconds),
            prompts=prompts,
            **sampling,
        )
    samples += _write_real(test, voice.codec, folder, max(settings.num_continuations, 1), settings.seconds)
    described = {
        "step": trained.step,
        "checkpoint": checkpoint,
        "weights": trained.kind,
        "weights_sha256": trained.sha256,
        **sampling,
        "sample_rate": rate,
        "encoding": voice.codec.encoding,
        "settings": dataclasses.asdict(settings),
        "samples_per_second": settings.num_samples * round(settings.seconds * rate) / (generated - started),
        "seconds": time.monotonic() - started,
        "samples": samples,
    }
    listed = {row["file"] for row in samples}
    for path in folder.glob("*_[0-9][0-9][0-9][0-9].wav*"):  # of other settings, or cut short by a kill
        if path.name not in listed:
            path.unlink()
    run.write(SAMPLES, described)
    return described


def _spread(total: int, wanted: int) -> list[int]:
    return sorted({round(i) for i in np.linspace(0, total - 1, min(wanted, total))}) if wanted else []


def _test_prompts(split: Split, wanted: int, seconds: float, sample_rate: int) -> Iterator[Prompt]:
    length = round(seconds * sample_rate)
    long_enough = np.flatnonzero(split.lengths > length)
    for i in _spread(len(long_enough), wanted):
        index = int(long_enough[i])
        recording = split.recordings[index]
        yield Prompt(split.read(index, 0, length), recording.id, recording.label)


def _write_real(split: Split, codec: Codec, folder: Path, wanted: int, seconds: float) -> Iterator[dict[str, Any]]:
    rate = codec.sample_rate
    for number, index in enumerate(_spread(len(split.recordings), wanted)):
        recording = split.recordings[index]
        tokens = split.read(index, 0, round(seconds * rate))
        name = f"real_{number:04d}.wav"
        audio.write_wav(folder / name, codec.decode(tokens), rate)
        yield {
            "kind": "real",
            "file": name,
            "seconds": len(tokens) / rate,
            "source": recording.id,
            "label": recording.label,
            "prompt_seconds": 0.0,
        }
