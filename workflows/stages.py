"""The stages of a run, as functions over its folder: what the mains and full_run are made of."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import soundfile
import soxr

from harmonic import audio
from harmonic.checkpoint import Weights, load_weights
from harmonic.data import Dataset, Split
from harmonic.errors import UserError
from harmonic.evaluate import baselines, evaluate_split
from harmonic.generate import generate
from harmonic.metrics import Progress
from harmonic.records import load_manifest


def read_json(path: Path) -> Any:
    """A stage's output, or None where there is none that is whole."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def write_json(path: Path, value: Any) -> None:
    """Writes JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".partial")
    temporary.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(temporary, path)


def as_json(value: Any) -> Any:
    """A dataclass as JSON gives it back."""
    return json.loads(json.dumps(dataclasses.asdict(value)))


def platform() -> str:
    """What the run ran on, such as `cpu (2 cores)` or `NVIDIA H200`."""
    device = jax.devices()[0]
    return (
        f"cpu ({os.cpu_count()} cores)" if device.platform == "cpu" else f"{device.device_kind} x {jax.device_count()}"
    )


def evaluate_run(
    workdir: Path, data: Path, *, split: str = "test", checkpoint: str = "best", raw: bool = False, reset_every: int = 0
) -> dict[str, Any]:
    """Evaluates a run on a split and notes the figures in its evaluation.json.

    Returns:
      {"bits_per_sample", "samples", "recordings", the baselines, and what was evaluated}.
    """
    weights = load_weights(workdir, checkpoint, raw=raw)
    dataset = Dataset(data)
    dataset.check(weights.config)
    part = dataset.split(split)
    result = evaluate_split(
        weights.model, weights.params, part, weights.config, reset_every=reset_every, show_progress=True
    )
    plain = baselines(dataset.split("train"), part, crop_length=weights.config.data.crop_length)
    figures = {
        "dataset": dataset.manifest.dataset,
        "fingerprint": dataset.manifest.fingerprint,
        "step": weights.step,
        "checkpoint": checkpoint,
        "weights": weights.kind,
        "reset_every": reset_every,
        "bits_per_sample": result.bits_per_sample,
        "samples": result.samples,
        "recordings": result.recordings,
        **dataclasses.asdict(plain),
        "seconds": result.seconds,
    }
    key = split if not reset_every else f"{split} (reset every {reset_every})"
    path = workdir / "evaluation.json"
    write_json(path, {**(read_json(path) or {}), key: figures})
    return figures


@dataclasses.dataclass(frozen=True)
class Prompt:
    """What a stream continues: tokens [time, channels], where they came from, and its label."""

    tokens: np.ndarray
    source: str
    label: str | None = None


def read_prompt(path: str, weights: Weights, sample_rate: int, *, seconds: float | None, resample: bool) -> Prompt:
    """A prompt from an audio file, scaled by its own minimum and maximum as every recording is.

    Raises:
      UserError: it cannot be read, or is at another rate and `resample` is not set.
    """
    waveform, rate = audio.read_audio(path)
    if rate != sample_rate:
        if not resample:
            raise UserError(
                f"the prompt {path} is at {rate:,} Hz, but the model's audio is at {sample_rate:,} Hz; convert it, or "
                "give --resample_prompt"
            )
        waveform = soxr.resample(waveform, rate, sample_rate)
    waveform = waveform[: int(seconds * sample_rate)] if seconds else waveform
    if not len(waveform):
        raise UserError(f"the prompt {path} is shorter than a sample; give a longer one")
    data = weights.config.data
    tokens = audio.encode(waveform, data.encoding, num_levels=data.num_levels)
    return Prompt(tokens[:, None], str(path))


def write_samples(
    weights: Weights,
    folder: Path,
    *,
    kind: str,
    num_samples: int,
    seconds: float,
    seed: int,
    temperature: float,
    top_p: float,
    sample_rate: int,
    prompts: list[Prompt] | None = None,
) -> list[dict[str, Any]]:
    """Generates WAV files `<kind>_NNNN.wav`, each whole or absent, written while they are made.

    Args:
      seconds: of each file, its prompt included.
      prompts: one for all, or one a sample, all of one length.

    Returns:
      A description of each file for samples.json.

    Raises:
      UserError: a prompt that is as long as what is asked for.
    """
    data, length = weights.config.data, round(seconds * sample_rate)
    prompt = None if not prompts else np.stack([p.tokens for p in prompts])
    given = 0 if prompt is None else prompt.shape[1]
    if length <= given:
        raise UserError(
            f"the prompt {prompts[0].source if prompts else ''} has {given / sample_rate:.2f} s, but --seconds="
            f"{seconds:g} counts prompt and continuation together; give more --seconds, or fewer --prompt_seconds"
        )
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{kind}_{i:04d}.wav" for i in range(num_samples)]
    partial = [folder / f"{name}.partial" for name in names]
    nats = np.zeros(num_samples)
    progress = Progress(f"generate {kind}s", (length - given) * num_samples, unit="sample")
    with contextlib.ExitStack() as stack:
        files = [
            stack.enter_context(soundfile.SoundFile(path, "w", sample_rate, 1, subtype="PCM_16", format="WAV"))
            for path in partial
        ]

        def write(tokens: np.ndarray) -> None:
            for file, row in zip(files, audio.decode(tokens, data.encoding, num_levels=data.num_levels), strict=True):
                file.write(row)

        if prompt is not None:
            write(np.broadcast_to(prompt, (num_samples, *prompt.shape[1:])))
        for chunk in generate(
            weights.model,
            weights.params,
            batch=num_samples,
            length=length - given,
            seed=seed,
            temperature=temperature,
            top_p=top_p,
            prompt=prompt if prompts and len(prompts) > 1 else None if prompt is None else prompt[0],
        ):
            write(chunk.tokens)
            nats += chunk.nats
            progress.update(chunk.tokens.shape[0] * chunk.tokens.shape[1])
    progress.close()
    for path, name in zip(partial, names, strict=True):
        os.replace(path, folder / name)
    rows = []
    for i, name in enumerate(names):
        row = {
            "kind": kind,
            "file": name,
            "seconds": length / sample_rate,
            "bits_per_sample": float(nats[i] / np.log(2) / (length - given)),
            "prompt_seconds": given / sample_rate,
        }
        if prompts:
            source = prompts[i % len(prompts)]
            row |= {"source": source.source, "label": source.label}
        rows.append(row)
    return rows


def sample_run(workdir: Path, data: Path, *, checkpoint: str = "best") -> dict[str, Any]:
    """What full_run lets one hear: samples, continuations of test recordings, those recordings; samples.json last."""
    started = time.monotonic()
    weights = load_weights(workdir, checkpoint)
    settings, seed = weights.config.generate, weights.config.seed
    dataset, folder = Dataset(data), workdir / "samples"
    rate = dataset.manifest.sample_rate
    common: dict[str, Any] = {
        "seed": seed,
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "sample_rate": rate,
    }
    samples = write_samples(
        weights, folder, kind="sample", num_samples=settings.num_samples, seconds=settings.seconds, **common
    )
    generated = time.monotonic()
    prompts = list(_test_prompts(dataset.split("test"), settings.num_continuations, settings.prompt_seconds, rate))
    if prompts:
        samples += write_samples(
            weights,
            folder,
            kind="continuation",
            num_samples=len(prompts),
            seconds=max(settings.seconds, 2 * settings.prompt_seconds),
            prompts=prompts,
            **common,
        )
    samples += _write_real(dataset.split("test"), folder, max(settings.num_continuations, 1), settings.seconds)
    described = {
        "step": weights.step,
        "checkpoint": checkpoint,
        "weights": weights.kind,
        **common,
        "encoding": weights.config.data.encoding,
        "settings": dataclasses.asdict(settings),
        "samples_per_second": settings.num_samples * round(settings.seconds * rate) / (generated - started),
        "seconds": time.monotonic() - started,
        "samples": samples,
    }
    write_json(folder / "samples.json", described)
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


def _write_real(split: Split, folder: Path, wanted: int, seconds: float) -> Iterator[dict[str, Any]]:
    manifest = split.manifest
    for number, index in enumerate(_spread(len(split.recordings), wanted)):
        recording = split.recordings[index]
        tokens = split.read(index, 0, round(seconds * manifest.sample_rate))
        name = f"real_{number:04d}.wav"
        waveform = audio.decode(tokens[:, 0], manifest.encoding, num_levels=manifest.num_levels)
        audio.write_wav(folder / name, waveform, manifest.sample_rate)
        yield {
            "kind": "real",
            "file": name,
            "seconds": len(tokens) / manifest.sample_rate,
            "source": recording.id,
            "label": recording.label,
            "prompt_seconds": 0.0,
        }


def run_sample_rate(workdir: Path) -> int:
    """Hz of what a run was trained on, from the manifest in its folder."""
    return load_manifest(workdir).sample_rate
