"""Perceptual figures of a run, and for comparison those of real clips and of white noise.

Features are stored in a folder piece by piece, under names that identify the classifier, the data and the weights.
After an interruption, the same call continues.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import math
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from harmonic import audio
from harmonic.checkpoint import Trained
from harmonic.data import Dataset, Split
from harmonic.errors import UserError
from harmonic.files import write_whole
from harmonic.locks import writing
from harmonic.metrics import Progress
from harmonic.perceptual.classifier import Classifier
from harmonic.perceptual.clips import check_clips, label_numbers, read_clips
from harmonic.perceptual.metrics import (
    am_score,
    fid,
    inception_score,
    inception_score_released,
    modified_inception_score,
    samples_needed,
)
from harmonic.run import Run
from harmonic.voice import Codec, Voice

RESULT = "perceptual.json"
NOISE = 2_048  # clips of white noise, at most
REJECTED = (
    0.4,
    0.95,
)  # shares of the clips in order of likelihood: the thresholds that the released code always ends with
_PIECE = 256  # clips a file
_CHUNK = 1_000  # samples between two updates of the progress


@dataclasses.dataclass(frozen=True)
class Outputs:
    """A classifier's outputs for clips.

    Attributes:
      features, logits: [n, 1024] and [n, classes].
      nats: [n] negative log-likelihood of generated clips under their model, at temperature 1; else zeros.
    """

    features: np.ndarray
    logits: np.ndarray
    nats: np.ndarray

    def subset(self, chosen: np.ndarray) -> Outputs:
        """Those of some of the clips."""
        return Outputs(self.features[chosen], self.logits[chosen], self.nats[chosen])


def measure_run(
    workdir: str | Path,
    data: str | Path,
    classifier: str | Path,
    *,
    num_samples: int = 10_240,
    checkpoint: str = "best",
    raw: bool = False,
    temperature: float | None = None,
    top_p: float | None = None,
    seed: int = 0,
    match_lengths: bool = False,
    allow_rank_deficient: bool = False,
    cache: str | Path | None = None,
    show_progress: bool = True,
) -> dict[str, Any]:
    """Generates clips of a run and compares them with the training split; writes `workdir`/perceptual.json.

    Args:
      workdir: the run.
      data: the data set that it was trained on.
      classifier: a path for `Classifier.load`.
      num_samples: clips to generate; the published figures use 10,240, or 2,048 without rejection.
      checkpoint, raw: as in `Run.weights`.
      temperature, top_p: of sampling; by default those of the run's config.
      seed: of the clips, and of the random choices in the figures.
      match_lengths: silence each generated clip after a length drawn from the training recordings, which are padded
        with silence too. The published protocol does not, since nearly all of its recordings last a second.
      allow_rank_deficient: as in `metrics.fid`.
      cache: folder for features; `workdir`/perceptual by default. Runs on the same data may share one.

    Returns:
      {"step", "num_samples", "generated", "rejected", "train", "test", "white_noise", and the settings}. Each of the
      rows is {"fid", "is", "is_released", "mis", "am", "clips"}, real ones also "accuracy". "rejected" are the clips
      that the published protocol keeps, with their number as "kept"; None if they are too few for a covariance.

    Raises:
      UserError: no run, checkpoint or classifier, a classifier of other classes, too few clips, figures that are not
        finite.
    """
    workdir = Path(workdir)
    weights = Run(workdir).weights(checkpoint, raw=raw)
    with writing(workdir):
        reference = _Reference(data, classifier, cache or workdir / "perceptual", allow_rank_deficient, show_progress)
        reference.dataset.check(weights.config)
        reference.require(num_samples, "num_samples")
        settings = {
            "temperature": weights.config.generate.temperature if temperature is None else temperature,
            "top_p": weights.config.generate.top_p if top_p is None else top_p,
            "seed": seed,
        }
        outputs = _generated(reference, weights, num_samples, settings, match_lengths)
        rows = reference.rows(min(NOISE, num_samples), seed)
        kept = keep_likely(outputs.nats, seed)
        enough = len(kept) >= reference.needed
        result = {
            "step": weights.step,
            "checkpoint": checkpoint,
            "weights": weights.kind,
            "num_samples": num_samples,
            **settings,
            "match_lengths": match_lengths,
            **reference.described,
            "generated": reference.row(outputs, seed),
            "rejected": {**reference.row(outputs.subset(kept), seed), "kept": len(kept)} if enough else None,
            **rows,
        }
        write_whole(workdir / RESULT, json.dumps(result, indent=2, allow_nan=False) + "\n")
    return result


def measure_reference(
    data: str | Path,
    classifier: str | Path,
    cache: str | Path,
    *,
    num_noise: int = NOISE,
    seed: int = 0,
    allow_rank_deficient: bool = False,
    show_progress: bool = True,
) -> dict[str, Any]:
    """The rows that need no run: {"train", "test", "white_noise", and the settings}."""
    with writing(cache):
        reference = _Reference(data, classifier, cache, allow_rank_deficient, show_progress)
        return {**reference.described, **reference.rows(num_noise, seed)}


def keep_likely(nats: np.ndarray, seed: int = 0) -> np.ndarray:
    """The numbers of the clips that the published protocol keeps: those between its thresholds, likelier ones last.

    The released code tunes its thresholds on a random half of the clips and reports the other half. It always ends with
    the thresholds `REJECTED`, so that it keeps 2,816 of 10,240 clips.
    """
    half = np.random.default_rng(seed).permutation(len(nats))[: len(nats) // 2]
    order = half[np.argsort(-nats[half], kind="stable")]
    low, high = (int(share * len(order)) for share in REJECTED)
    return order[low:high]


class _Reference:
    """The classifier's outputs for the training split, which all rows are compared with."""

    def __init__(self, data: str | Path, classifier: str | Path, cache: str | Path, allow: bool, show_progress: bool):
        self.dataset, self.classifier = Dataset(data), Classifier.load(classifier)
        check_clips(self.dataset)
        self._allow, self._show, self._cache = allow, show_progress, Path(cache)
        self.needed = samples_needed(self.classifier.sizes.widths[-1], allow)
        self._labels = {
            name: label_numbers(self.dataset.split(name), self.classifier.classes, classifier)
            for name in ("train", "test")
        }
        for name, labels in self._labels.items():
            self.require(len(labels), f"the {name} split of {data}")
        self._train: Outputs | None = None
        self.described = {
            "classifier": str(classifier),
            "classifier_sha256": self.classifier.fingerprint,
            "dataset": self.dataset.manifest.dataset,
            "fingerprint": self.dataset.manifest.fingerprint,
            "allow_rank_deficient": allow,
        }

    def require(self, count: int, what: str) -> None:
        """Refuses fewer clips than a covariance needs."""
        if count < self.needed:
            way_out = "" if self._allow else " or allow_rank_deficient, for distances that come out too large"
            raise UserError(
                f"{what} has {count:,} clips, fewer than the {self.needed:,} that a covariance of "
                f"{self.classifier.sizes.widths[-1]:,} features needs; give more{way_out}"
            )

    @property
    def train(self) -> Outputs:
        """Those of the training split."""
        if self._train is None:
            self._train = self._split("train")
        return self._train

    def row(self, outputs: Outputs, seed: int) -> dict[str, Any]:
        """The figures of a set of clips."""
        return {
            "fid": fid(self.train.features, outputs.features, allow_rank_deficient=self._allow),
            "is": inception_score(outputs.logits),
            "is_released": inception_score_released(outputs.logits),
            "mis": modified_inception_score(outputs.logits, seed),
            "am": am_score(outputs.logits, self.train.logits),
            "clips": len(outputs.logits),
        }

    def rows(self, num_noise: int, seed: int) -> dict[str, Any]:
        """The figures of real clips and of white noise."""
        rows = {}
        for name in ("train", "test"):
            outputs = self.train if name == "train" else self._split(name)
            right = outputs.logits.argmax(-1) == self._labels[name]
            rows[name] = {**self.row(outputs, seed), "accuracy": float(right.mean())}
        rows["white_noise"] = self.row(self._noise(num_noise, seed), seed)
        return rows

    def _split(self, name: str) -> Outputs:
        split: Split = self.dataset.split(name)

        def make(first: int, last: int, _: Callable[[int], None]) -> tuple[np.ndarray, np.ndarray]:
            return read_clips(split, first, last), np.zeros(last - first)

        key = {"data": self.dataset.manifest.fingerprint, "split": name}
        return self.outputs(name, key, len(split.recordings), make, unit=1)

    def _noise(self, count: int, seed: int) -> Outputs:
        def make(first: int, last: int, _: Callable[[int], None]) -> tuple[np.ndarray, np.ndarray]:
            clips = [
                np.random.default_rng((seed, i)).uniform(-1, 1, audio.SAMPLE_RATE).astype(np.float32)
                for i in range(first, last)
            ]
            return np.stack(clips), np.zeros(last - first)

        return self.outputs("white_noise", {"noise": seed}, count, make, unit=1)

    def outputs(
        self,
        name: str,
        key: dict[str, Any],
        count: int,
        make: Callable[[int, int, Callable[[int], None]], tuple[np.ndarray, np.ndarray]],
        unit: int,
    ) -> Outputs:
        """The classifier's outputs for `count` clips; computes only those that are not in the cache.

        Args:
          name, key: identify the clips in the cache.
          count: how many clips.
          make: (first, last, tick) -> clips and their nats; it calls `tick(n)` when n samples of the clips are made.
          unit: samples a clip, if `make` calls `tick`; else 1.
        """
        key = {**key, "classifier": self.classifier.fingerprint}
        prefix = f"{name}-{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]}"
        parts, progress = [], None
        for first in range(0, count, _PIECE):
            last = min(first + _PIECE, count)
            path = self._cache / f"{prefix}-{first:06d}-{last:06d}.npz"
            found = _read_piece(path, last - first)
            if found is None:
                if self._show and progress is None:
                    rate_unit = "samples" if unit > 1 else "clips"
                    title = name.replace("_", " ")
                    progress = Progress(
                        title, count * unit, initial=first * unit, unit=rate_unit[:-1], rate_unit=rate_unit
                    )
                clips, nats = make(first, last, progress.update if progress else lambda _: None)
                features, logits = self.classifier.features_and_logits(clips)
                found = Outputs(features, logits, nats)
                _write_piece(path, found)
                if progress and unit == 1:
                    progress.update(last - first)
            parts.append(found)
        if progress:
            progress.close()
        return Outputs(*(np.concatenate([getattr(p, f.name) for p in parts]) for f in dataclasses.fields(Outputs)))


def _read_piece(path: Path, count: int) -> Outputs | None:
    """A piece of the cache; None if it is missing or damaged."""
    try:
        with np.load(path, allow_pickle=False) as file:
            found = Outputs(file["features"], file["logits"], file["nats"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    return found if all(len(x) == count for x in (found.features, found.logits, found.nats)) else None


def _write_piece(path: Path, outputs: Outputs) -> None:
    out = io.BytesIO()
    np.savez(out, features=outputs.features, logits=outputs.logits, nats=outputs.nats)
    write_whole(path, out.getvalue())


def _generated(
    reference: _Reference, weights: Trained, count: int, settings: dict[str, Any], match_lengths: bool
) -> Outputs:
    voice = Voice(weights.model, weights.params, Codec.of(reference.dataset.manifest))
    length = audio.SAMPLE_RATE
    lengths = reference.dataset.split("train").lengths

    def make(first: int, last: int, tick: Callable[[int], None]) -> tuple[np.ndarray, np.ndarray]:
        sounds, nats = [], np.zeros(last - first)
        for piece in voice.pieces(length, num_samples=last - first, first_stream=first, chunk=_CHUNK, **settings):
            sounds.append(piece.sound)
            nats += piece.nats
            tick(piece.sound.size)
        bad = int((~np.isfinite(nats)).sum())
        if bad:
            raise UserError(f"{bad} generated clips have a likelihood that is not finite: the weights are broken")
        clips = np.concatenate(sounds, 1)
        if match_lengths:
            for number, clip in zip(range(first, last), clips, strict=True):
                clip[np.random.default_rng((settings["seed"], number)).choice(lengths) :] = 0
        return clips, nats

    key = {"weights": weights.sha256, "length": length, **settings}
    if match_lengths:
        key["lengths"] = reference.dataset.manifest.fingerprint
    return reference.outputs("generated", key, count, make, unit=length)


def table(result: dict[str, Any]) -> str:
    """A result's rows as a table of text."""
    names = {
        "train": "real, training split",
        "test": "real, test split",
        "generated": "generated",
        "rejected": "generated, rejection",
        "white_noise": "white noise",
    }
    lines = [f"{'':24}{'clips':>8}{'FID':>10}{'IS':>8}{'IS released':>13}{'mIS':>10}{'AM':>8}"]
    for key, name in names.items():
        row = result.get(key)
        if row:
            figures = f"{row['clips']:>8,}{row['fid']:>10.3f}{row['is']:>8.3f}{row['is_released']:>13.3f}"
            lines.append(f"{name:24}{figures}{_short(row['mis']):>10}{row['am']:>8.3f}")
    return "\n".join(lines)


def _short(value: float) -> str:
    return f"{value:.2f}" if value < 1e5 or math.isinf(value) else f"{value:.2e}"
