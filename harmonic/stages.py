"""The stages of a run, as functions over its folder: what the mains and full_run are made of."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import jax
import numpy as np
import soundfile
import soxr

from harmonic import audio, files
from harmonic.checkpoint import Weights, load_weights
from harmonic.data import Dataset, Split
from harmonic.errors import UserError
from harmonic.evaluate import Likelihood, baselines, evaluate_split
from harmonic.generate import generate
from harmonic.loudness import gain
from harmonic.metrics import Progress
from harmonic.records import Manifest, load_manifest


def read_json(path: Path) -> Any:
    """A stage's output, or None where there is none that is whole."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def write_json(path: Path, value: Any) -> None:
    """Writes JSON, whole or not at all.

    Raises:
      UserError: it cannot be written.
    """
    files.write_whole(path, json.dumps(value, indent=2) + "\n")


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
    workdir: Path,
    data: Path,
    *,
    split: str = "test",
    checkpoint: str = "best",
    raw: bool = False,
    reset_every: int = 0,
    contexts: Sequence[float] = (),
) -> dict[str, Any]:
    """Evaluates a run on a split and notes the figures in its evaluation.json.

    Args:
      reset_every: forget the past every that many samples; 0 for never.
      contexts: what context is worth: also with recordings cut into pieces of that many seconds, for each of them.
        Every figure is noted when it is found, and with contexts those that are there for the same weights and data
        are kept, so that an interrupted evaluation goes on; without, the figure is made anew.

    Returns:
      {"bits_per_sample", "samples", "recordings", the baselines, and what was evaluated; with contexts also "contexts",
      a list of {"context_seconds", "context_samples", "bits_per_sample", "samples", "seconds", "whole"}, the shortest
      first. The last one has whole recordings, and stands for all contexts that no recording exceeds}.

    Raises:
      UserError: there is no such run or data, the weights are broken, or both `reset_every` and contexts are given.
    """
    if reset_every and contexts:
        raise UserError("contexts and reset_every are two ways to say how much past there is; give one of them")
    weights = load_weights(workdir, checkpoint, raw=raw)
    dataset = Dataset(data)
    dataset.check(weights.config)
    manifest, part, crop = dataset.manifest, dataset.split(split), weights.config.data.crop_length
    key, path = split if not reset_every else f"{split} (reset every {reset_every})", workdir / "evaluation.json"
    made_from = {
        "dataset": manifest.dataset,
        "fingerprint": manifest.fingerprint,
        "step": weights.step,
        "checkpoint": checkpoint,
        "weights": weights.kind,
        "weights_sha256": weights.sha256,
        "reset_every": reset_every,
    }
    noted = (read_json(path) or {}).get(key) or {}
    kept = noted if all(noted.get(name) == value for name, value in made_from.items()) else {}
    windowed = {row["context_samples"]: row for row in kept.get("contexts", []) if not row["whole"]}
    longest = int(min(part.lengths.max(), crop or part.lengths.max()))

    def measure(reset: int) -> Likelihood:
        return evaluate_split(
            weights.model, weights.params, part, weights.config, reset_every=reset, show_progress=True
        )

    def note(figures: dict[str, Any]) -> dict[str, Any]:
        if windowed or contexts:
            whole = _context_row(longest / manifest.sample_rate, longest, figures, whole=True)
            figures = {**figures, "contexts": [*(windowed[length] for length in sorted(windowed)), whole]}
        write_json(path, {**(read_json(path) or {}), key: figures})
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
    """What `evaluate_run` has noted for a split; None where that is of another step or data, of other weights than
    those of `weights_sha256` if that is given, or lacks a context."""
    figures = (read_json(workdir / "evaluation.json") or {}).get(split)
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


@dataclasses.dataclass(frozen=True)
class Prompt:
    """What a stream continues: tokens [time, channels], where they came from, and its label."""

    tokens: np.ndarray
    source: str
    label: str | None = None


def read_prompt(path: str, weights: Weights, manifest: Manifest, *, seconds: float | None, resample: bool) -> Prompt:
    """A prompt from an audio file, scaled as the data set's recordings are: by its own minimum and maximum, or to their
    loudness.

    Raises:
      UserError: it cannot be read, or is at another rate and `resample` is not set.
    """
    sample_rate = manifest.sample_rate
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
    scale: dict[str, float] = {}
    if manifest.loudness is not None:
        waveform = waveform * np.float32(gain(lambda: iter([waveform]), float(abs(waveform).max()), manifest.loudness))
        scale = {"low": -1.0, "high": 1.0}
    tokens = audio.encode(waveform, data.encoding, num_levels=data.num_levels, **scale)
    return Prompt(tokens[:, None], str(path))


def _lengths(seconds: float, sample_rate: int, prompts: list[Prompt] | None) -> tuple[int, int]:
    """(samples of a whole, of its prompt)."""
    length, given = round(seconds * sample_rate), len(prompts[0].tokens) if prompts else 0
    if length <= given:
        raise UserError(
            f"the prompt {prompts[0].source if prompts else ''} has {given / sample_rate:.2f} s, but --seconds="
            f"{seconds:g} counts prompt and continuation together; give more --seconds, or fewer --prompt_seconds"
        )
    return length, given


def _waveforms(
    weights: Weights,
    kind: str,
    num_samples: int,
    length: int,
    prompts: list[Prompt] | None,
    *,
    chunk: int = 4_000,
    **settings: Any,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(float32 [num_samples, time, 1], its nats [num_samples]) in pieces of `chunk` samples as they are made, behind
    the prompts, which count no nats. `settings` are those of `generate`."""
    data = weights.config.data

    def decode(tokens: np.ndarray) -> np.ndarray:
        return audio.decode(tokens, data.encoding, num_levels=data.num_levels)

    prompt = None
    if prompts:
        # One for all is given once: so it is the same as one of a kind.
        prompt = prompts[0].tokens if len(prompts) == 1 else np.stack([p.tokens for p in prompts])
        length -= prompt.shape[-2]
        yield decode(np.broadcast_to(prompt, (num_samples, *prompt.shape[-2:]))), np.zeros(num_samples)
    progress = Progress(f"generate {kind}s", length * num_samples, unit="sample")
    for made in generate(
        weights.model, weights.params, batch=num_samples, length=length, prompt=prompt, chunk=chunk, **settings
    ):
        yield decode(made.tokens), made.nats
        progress.update(made.tokens.shape[0] * made.tokens.shape[1])
    progress.close()


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
    length, given = _lengths(seconds, sample_rate, prompts)
    with files.write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(f"{kind}_*.wav.partial"):  # by a kill
            left.unlink()
    names = [f"{kind}_{i:04d}.wav" for i in range(num_samples)]
    partial = [folder / f"{name}.partial" for name in names]
    nats = np.zeros(num_samples)
    settings: dict[str, Any] = {"seed": seed, "temperature": temperature, "top_p": top_p}
    with audio.wav_errors(folder), contextlib.ExitStack() as stack:
        sounds = [
            stack.enter_context(soundfile.SoundFile(path, "w", sample_rate, 1, subtype="PCM_16", format="WAV"))
            for path in partial
        ]
        for waveforms, their_nats in _waveforms(weights, kind, num_samples, length, prompts, **settings):
            for sound, waveform in zip(sounds, waveforms, strict=True):
                sound.write(waveform)
            nats += their_nats
    with files.write_errors(folder):
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


def stream_sample(
    weights: Weights,
    out: BinaryIO,
    *,
    seconds: float,
    seed: int,
    temperature: float,
    top_p: float,
    sample_rate: int,
    prompts: list[Prompt] | None = None,
) -> float:
    """Hands out one sample while it is made: raw 16-bit little-endian PCM, flushed ten times a second of audio.

    The bytes are those of the first WAV file that `write_samples` writes with the same settings.

    Returns:
      Bits per sample of what was generated.

    Raises:
      UserError: a prompt that is as long as what is asked for.
      BrokenPipeError: nobody reads any more.
    """
    length, given = _lengths(seconds, sample_rate, prompts)
    settings: dict[str, Any] = {"seed": seed, "temperature": temperature, "top_p": top_p}
    settings["chunk"], nats = max(sample_rate // 10, 1), 0.0
    for waveforms, their_nats in _waveforms(weights, "sample", 1, length, prompts, **settings):
        pcm = io.BytesIO()
        soundfile.write(pcm, waveforms[0], sample_rate, format="RAW", subtype="PCM_16", endian="LITTLE")
        out.write(pcm.getvalue())
        out.flush()
        nats += float(their_nats[0])
    return nats / math.log(2) / (length - given)


def sample_run(workdir: Path, data: Path, *, checkpoint: str = "best") -> dict[str, Any]:
    """What full_run lets one hear: samples, continuations of test recordings, those recordings; samples.json last."""
    started = time.monotonic()
    weights = load_weights(workdir, checkpoint)
    settings, seed = weights.config.generate, weights.config.seed
    dataset, folder = Dataset(data), workdir / "samples"
    rate = dataset.manifest.sample_rate
    with files.write_errors(folder):
        (folder / "samples.json").unlink(missing_ok=True)  # what it describes is about to be replaced
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
        "weights_sha256": weights.sha256,
        **common,
        "encoding": weights.config.data.encoding,
        "settings": dataclasses.asdict(settings),
        "samples_per_second": settings.num_samples * round(settings.seconds * rate) / (generated - started),
        "seconds": time.monotonic() - started,
        "samples": samples,
    }
    listed = {row["file"] for row in samples}
    for path in folder.glob("*_[0-9][0-9][0-9][0-9].wav*"):  # of other settings, or half of one
        if path.name not in listed:
            path.unlink()
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


def run_manifest(workdir: Path) -> Manifest:
    """What a run was trained on, from the manifest in its folder."""
    return load_manifest(workdir)
