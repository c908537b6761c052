"""A run's model as a folder to publish: `model.safetensors`, `config.json`, `README.md`, sample WAVs.

    export_run("runs/sc09", "exports/sc09", license_name="cc-by-4.0")
    model = harmonic.load("exports/sc09")

The same run gives the same bytes, except that the card shows the newest evaluations. `harmonic.pretrained` documents
the format and reads it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from harmonic import audio, files, hub, pretrained
from harmonic.errors import UserError
from harmonic.model_card import model_card, public_source
from harmonic.pretrained import CONFIG, FORMAT, WEIGHTS, Pretrained
from harmonic.run import Run

CARD = "README.md"


def export_run(
    workdir: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    checkpoint: str = "best",
    raw: bool = False,
    license_name: str | None = None,
    num_samples: int = 2,
    seconds: float = 1.0,
    repo: str | None = None,
    overwrite: bool = False,
) -> list[str]:
    """Writes a run's averaged weights (the raw ones with `raw`), config and card to `folder`, whole or not at all.

    Args:
      workdir: the run's folder.
      folder: a new or empty folder, or an earlier export: its files are replaced.
      checkpoint: best, latest or a step.
      raw: write the raw weights.
      license_name: the hub's name of a licence, for the card.
      num_samples, seconds: sample WAVs, generated at the config's temperature with seed 0.
      repo: the repository that it will be pushed to, for the card.
      overwrite: also write into a folder that holds something else. Files of other names stay in it.

    Returns:
      The names of the files.

    Raises:
      UserError: there is no such run or checkpoint, the weights are not finite, or the folder holds something else.
    """
    run, folder = Run(workdir), Path(folder)
    _check_folder(folder, overwrite)
    trained, manifest = run.weights(checkpoint, raw=raw), run.manifest
    arrays = {name: np.ascontiguousarray(leaf, np.float32) for name, leaf in pretrained.flatten(trained.params).items()}
    pretrained.check_finite(arrays, f"checkpoint {trained.step} of {workdir}")
    scale = manifest.loudness, manifest.trim_silence
    model = Pretrained(trained.model, trained.params, trained.config, manifest.sample_rate, *scale)
    content = safetensors.numpy.save(arrays)
    about: dict[str, Any] = {
        "format": FORMAT,
        "library_name": "harmonic-rnn",
        "model_type": trained.config.model.kind,
        "sample_rate": manifest.sample_rate,
        "weights": {
            "sha256": hashlib.sha256(content).hexdigest(),
            "parameters": sum(array.size for array in arrays.values()),
            "kind": trained.kind,
            "checkpoint": checkpoint,
            "step": trained.step,
        },
        "data": {
            "dataset": manifest.dataset,
            "source": public_source(manifest.source),
            "fingerprint": manifest.fingerprint,
            "loudness": manifest.loudness,
            "trim_silence": manifest.trim_silence,
        },
        "config": dataclasses.asdict(trained.config),
    }
    settings: dict[str, Any] = {"seconds": seconds, "temperature": trained.config.generate.temperature}
    names = [f"sample_{i}.wav" for i in range(num_samples)]
    card = model_card(
        run.folder,
        about,
        trained.config,
        manifest,
        load_name=repo or folder.name,
        license_name=license_name,
        samples=names,
        settings=settings,
    )

    temporary = folder.with_name(folder.name + ".partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        (temporary / WEIGHTS).write_bytes(content)
        if names:
            for name, waveform in zip(names, model.generate(num_samples=num_samples, **settings), strict=True):
                audio.write_wav(temporary / name, waveform, manifest.sample_rate)
        (temporary / CARD).write_text(card)
        files.write_json(temporary / CONFIG, about)
        _move(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return [WEIGHTS, CONFIG, CARD, *names]


def _check_folder(folder: Path, overwrite: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; give a folder as --output_dir")
    if overwrite or not folder.is_dir() or not any(folder.iterdir()):
        return
    if not hub.is_export(files.read_json(folder / CONFIG)):
        raise UserError(f"{folder} holds something else than an export; give another --output_dir, or --overwrite")


def _move(temporary: Path, folder: Path) -> None:
    """Moves all files at once into a new folder. In an earlier export config.json is replaced last: until then its
    checksum differs, and the export is refused."""
    try:
        os.rename(temporary, folder)
        return
    except OSError:
        if not folder.is_dir():
            raise
    names = sorted((path.name for path in temporary.iterdir()), key=lambda name: name == CONFIG)
    for name in names:
        os.replace(temporary / name, folder / name)
    for stale in folder.glob("sample_*.wav"):
        if stale.name not in names and stale.stem.removeprefix("sample_").isdigit():
            stale.unlink()
