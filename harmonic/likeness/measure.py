"""How a run's generated clips sound, beside recordings and noise; written to the run's sound.json.

Generated clips are compared with held-out recordings by the Fréchet distance of their log-mel frames. Beside it are the
distances of training recordings (the floor), of noise with their mean spectrum and of white noise, each from the same
amount of audio. Nothing but the weights, the data and the settings decides the figures.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np

from harmonic.checkpoint import Trained
from harmonic.config import Config
from harmonic.data import Dataset, EvaluationBatch, Split, hop_length, stream_rows
from harmonic.errors import UserError
from harmonic.evaluate import segment_nats
from harmonic.likeness.clips import Excerpt, draws, excerpts, hear_excerpts, noise_of
from harmonic.likeness.hearing import FEATURES, Heard
from harmonic.likeness.longer import measure_longer, stretches_of
from harmonic.likeness.streams import Plan, generate_pieces, one_thread, slice_of, slices
from harmonic.perceptual.metrics import frechet, samples_needed
from harmonic.run import SOUND, Run
from harmonic.spectrogram import frame_sizes
from harmonic.voice import LONGEST, Codec

VERSION = 2  # of the figures' definition
CLIP_SECONDS, SECONDS, MOST_CLIPS = 4.0, 32.0, 128  # of a clip, of all clips, and how many, unless others are asked for
NEEDED = samples_needed(FEATURES)  # frames, for a covariance of full rank
FEW = 10 * FEATURES  # frames; with fewer, distances come out much too large
_HELD_OUT = 4  # times the generated audio, where the split has so much
_FLOORS = 3  # choices of training recordings, which show how far chance moves a distance
_SILENT_DB = 30.0  # below the level of the held-out recordings


def make_plan(
    config: Config, split: Split, *, clips: int | None = None, seconds: float | None = None, seed: int | None = None
) -> Plan:
    """The plan for a run, with its defaults: 32 seconds in clips of 4, or of the split's usual length if that is less.

    Raises:
      UserError: seconds that are impossible.
    """
    rate, crop = split.manifest.sample_rate, config.data.crop_length
    if seconds is None:
        lengths = np.minimum(split.lengths, crop) if crop else split.lengths
        length = max(1, min(round(CLIP_SECONDS * rate), int(np.median(lengths))))
    elif not 1 <= seconds * rate <= LONGEST:
        raise UserError(f"seconds={seconds} is impossible: it must be between {1 / rate:.2g} and {LONGEST // rate:,}")
    else:
        length = round(seconds * rate)
    wanted = min(MOST_CLIPS, math.ceil(SECONDS * rate / length)) if clips is None else clips
    if wanted < 1:
        raise UserError(f"clips={clips} is impossible: it must be at least 1")
    return Plan(split.name, wanted, length, config.seed if seed is None else seed)


def made_from(trained: Trained, dataset: Dataset, plan: Plan) -> dict[str, Any]:
    """What decides a run's figures, but for the temperature and top-p."""
    return {
        "version": VERSION,
        "dataset": dataset.manifest.dataset,
        "fingerprint": dataset.manifest.fingerprint,
        "step": trained.step,
        "weights": trained.kind,
        "weights_sha256": trained.sha256,
        "split": plan.split,
        "clips": plan.clips,
        "clip_seconds": plan.length / dataset.manifest.sample_rate,
        "seed": plan.seed,
    }


def written(run: Run) -> dict[str, Any]:
    """The content of sound.json; empty where it is missing or damaged."""
    found = run.read(SOUND)
    return found if isinstance(found, dict) else {}


def known(run: Run, trained: Trained, dataset: Dataset, config: Config) -> dict[str, Any] | None:
    """What sound.json has of these weights and this config's sampling, from at least the usual amount of audio."""
    found = written(run)
    plan = make_plan(config, dataset.split("test"))
    wanted = made_from(trained, dataset, plan)
    wanted |= {"temperature": config.generate.temperature, "top_p": config.generate.top_p}
    amounts = ("clips", "clip_seconds")
    same = all(found.get(name) == value for name, value in wanted.items() if name not in amounts)
    return found if same and all((found.get(name) or 0) >= wanted[name] for name in amounts) else None


def measure_run(
    workdir: str | Path,
    data: str | Path,
    *,
    split: str = "test",
    checkpoint: str = "best",
    raw: bool = False,
    temperature: float | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    clips: int | None = None,
    seconds: float | None = None,
    show_progress: bool = True,
) -> dict[str, Any]:
    """Generates clips of a run, compares them with recordings and noise, and writes `workdir`/sound.json.

    Args:
      workdir: the run.
      data: the data set that it was trained on.
      split: of the held-out recordings.
      checkpoint, raw: as in `Run.weights`.
      temperature, top_p, seed: of sampling; by default those of the run's config.
      clips, seconds: how many clips, and the length of each; see `make_plan`.

    Returns:
      The content of sound.json: what the figures were made from, and
      "rows": by name (generated, held_out, train, shaped_noise, white_noise) {"distance" (dB², to the held-out
      recordings), "frames", "seconds", "level_db", "peaks", "silence", "onsets_per_second"}; train's distance is the
      mean of several choices of recordings, with "least", "greatest" and "choices";
      "share": where the generated clips are between train (0) and shaped_noise (1);
      "drift": bits per sample of the generated clips and of held-out recordings by the second of the clip;
      "longer": whether streams of four times the clips' length stay as they are, from `measure_longer`;
      "notes": what limits the figures. Figures that cannot be computed are None, and a note says why.
      "choice", from `choose`, stays if it is of the same weights.

    Raises:
      UserError: no run, checkpoint or data, impossible settings, or weights that are broken.
    """
    run, dataset = Run(workdir), Dataset(data)
    trained = run.weights(checkpoint, raw=raw)
    dataset.check(trained.config)
    plan = make_plan(trained.config, dataset.split(split), clips=clips, seconds=seconds, seed=seed)
    settings = trained.config.generate
    temperature = settings.temperature if temperature is None else temperature
    top_p = settings.top_p if top_p is None else top_p
    described = made_from(trained, dataset, plan)
    comparison = Comparison(dataset, trained.config, plan)
    if comparison.too_short is None:
        made = generate_clips(trained, dataset, plan, temperature, top_p, show_progress=show_progress)
        figures = comparison.figures(made.heard)
        nats, counts = score(trained, dataset, comparison.scored, plan)
        rate = dataset.manifest.sample_rate
        figures["drift"] = drift(made.nats, (nats.sum(0), counts.sum(0)), plan, rate, trained.config)
        ends, _ = slices(plan, rate, trained.config)
        recordings = stretches_of(dataset.split(split), comparison.scored, ends, nats, counts)
        figures["longer"] = measure_longer(
            trained, dataset, plan, recordings, temperature, top_p, show_progress=show_progress
        )
    else:
        figures = {**comparison.figures(None), "drift": [], "longer": None}
    result = {**described, "checkpoint": checkpoint, "temperature": temperature, "top_p": top_p, **figures}
    choice = written(run).get("choice")
    if isinstance(choice, dict) and choice.get("weights_sha256") == trained.sha256:
        result["choice"] = choice
    run.write(SOUND, result)
    return result


class Comparison:
    """Held-out recordings, and the training recordings and noise beside them, for one plan.

    Attributes:
      held_out: the held-out recordings.
      scored: the excerpts of them whose likelihood is compared with the generated clips': as much audio.
      too_short: why the distance cannot be computed; None if it can.
    """

    def __init__(self, dataset: Dataset, config: Config, plan: Plan):
        rate, amount = dataset.manifest.sample_rate, plan.clips * plan.length
        places = {"hop": hop_length(dataset.manifest, config), "crop": config.data.crop_length}
        held_out, train = dataset.split(plan.split), dataset.split("train")
        chosen = draws(excerpts(held_out, plan.length, **places), _HELD_OUT * amount, 1)[0]
        self.scored = draws(chosen, amount, 1)[0]
        self._plan, self._codec = plan, Codec.of(dataset.manifest)
        with one_thread():
            self.held_out = _heard(held_out, chosen)
            self._floors = [
                _heard(train, part) for part in draws(excerpts(train, plan.length, **places), amount, _FLOORS)
            ]
            self._noises = self._noise(rate)
        self.too_short = self._too_short(rate)

    def _too_short(self, rate: int) -> str | None:
        window, hop = frame_sizes(rate)
        frames = {
            "the generated clips": self._plan.clips * max(0, (self._plan.length - window) // hop),
            f"the recordings of the {self._plan.split} split": self.held_out.frames,
            "the training recordings": self._floors[0].frames,
        }
        few = [f"{name} have {count:,}" for name, count in frames.items() if count < NEEDED]
        if not few:
            return None
        least = math.ceil(1_000 * (window + hop) / rate)
        return (
            f"too few frames for a covariance of {FEATURES} features, which needs {NEEDED:,}: {', '.join(few)} (a clip "
            f"needs {least} ms for the first one, and gives one more every {round(1_000 * hop / rate)} ms)"
        )

    def _noise(self, rate: int) -> dict[str, Heard]:
        like, noises = self._floors[0], {}
        for name, shape in (("shaped_noise", like), ("white_noise", None)):
            noises[name] = Heard(rate)
            if like.level is None:  # silence
                continue
            for number in range(self._plan.clips):
                clip, seed = noises[name].clip(), (int(shape is None), number)
                for block in noise_of(shape, 10 ** (like.level / 10), self._codec, self._plan.length, seed=seed):
                    clip.feed(block)
        return noises

    def figures(self, generated: Heard | None) -> dict[str, Any]:
        """{"rows", "share", "notes"} of sound.json; None for clips that were not made."""
        floors = [self._distance(floor) for floor in self._floors]
        measured = [value for value in floors if value is not None]
        rows = {} if generated is None else {"generated": self._row(generated)}
        rows["held_out"] = {**self._row(self.held_out), "distance": None}
        rows["train"] = {**self._row(self._floors[0]), "choices": len(floors)}
        if measured:
            rows["train"] |= {
                "distance": sum(measured) / len(measured),
                "least": min(measured),
                "greatest": max(measured),
            }
        rows |= {name: self._row(noise) for name, noise in self._noises.items()}
        notes = [] if self.too_short is None else [f"No distance was computed: {self.too_short}."]
        few = [name for name, row in rows.items() if NEEDED <= row["frames"] < FEW]
        if few and not notes:
            notes.append(
                f"Fewer than {FEW:,} frames ({', '.join(few)}): distances come out much too large, and vary by chance."
            )
        share = self._share(rows)
        if self.held_out.level is None or self._floors[0].level is None:
            notes.append("The recordings are silent: there is no noise as loud as they are.")
        elif share is None and generated is not None and not notes:
            notes.append("The noise is no farther from the held-out recordings than the training recordings are.")
        return {"rows": rows, "share": share, "notes": notes}

    def _share(self, rows: dict[str, Any]) -> float | None:
        ours, floor, ceiling = (rows.get(name, {}).get("distance") for name in ("generated", "train", "shaped_noise"))
        if None in (ours, floor, ceiling) or ceiling <= floor:
            return None
        return (ours - floor) / (ceiling - floor)

    def _distance(self, heard: Heard) -> float | None:
        if self.too_short is not None or heard.frames < NEEDED:
            return None
        with one_thread():
            return frechet(heard.gaussian(), self.held_out.gaussian())

    def _row(self, heard: Heard) -> dict[str, Any]:
        level = self.held_out.level
        return {
            "distance": self._distance(heard),
            "frames": heard.frames,
            "seconds": heard.seconds,
            "level_db": heard.level,
            "peaks": heard.peaks,
            "silence": None if level is None else heard.silence(level - _SILENT_DB),
            "onsets_per_second": heard.onsets_per_second,
        }


def _heard(split: Split, places: list[Excerpt]) -> Heard:
    heard = Heard(split.manifest.sample_rate)
    hear_excerpts(split, places, heard)
    return heard


@dataclasses.dataclass(frozen=True)
class Generated:
    """Generated clips: what is heard in them, their nats by slice of the clip, and their bits per sample."""

    heard: Heard
    nats: np.ndarray
    bits_per_sample: float


def generate_clips(
    trained: Trained,
    dataset: Dataset,
    plan: Plan,
    temperature: float,
    top_p: float,
    *,
    title: str = "listen",
    show_progress: bool = True,
) -> Generated:
    """Generates the clips of a plan and hears them; none is kept.

    Raises:
      UserError: the settings are impossible, or the likelihood is not finite.
    """
    rate = dataset.manifest.sample_rate
    heard, nats = Heard(rate), np.zeros(len(slices(plan, rate, trained.config)[0]))
    clips = [heard.clip() for _ in range(plan.clips)]
    made = generate_pieces(trained, dataset, plan, temperature, top_p, title=title, show_progress=show_progress)
    for first, number, piece in made:
        nats[number] += piece.nats.sum()
        with one_thread():
            for clip, sound in zip(clips[first:], piece.sound, strict=False):
                clip.feed(sound)
    if not np.isfinite(nats).all():
        raise UserError("the likelihood of the generated clips is not finite: the weights are broken")
    return Generated(heard, nats, float(nats.sum() / math.log(2) / (plan.clips * plan.length)))


def score(trained: Trained, dataset: Dataset, places: list[Excerpt], plan: Plan) -> tuple[np.ndarray, np.ndarray]:
    """(nats, samples) of held-out excerpts by slice of the clip, [excerpts, slices], each excerpt with no past."""
    split, config = dataset.split(plan.split), trained.config
    ends, segment = slices(plan, dataset.manifest.sample_rate, config)
    nats, counts = np.zeros((len(places), len(ends))), np.zeros((len(places), len(ends)), np.int64)
    size = min(config.evaluate.batch_size, len(places))
    numbers = split.label_numbers(dataset.labels())
    for first in range(0, len(places), size):
        rows = places[first : first + size]
        lengths, labels = np.zeros(size, np.int32), np.full(size, -1, np.int32)
        lengths[: len(rows)] = [stop - start for _, start, stop in rows]
        labels[: len(rows)] = [numbers[recording] for recording, _, _ in rows]
        batch = EvaluationBatch(lengths, labels, stream_rows(split, rows, size, segment))
        for number, (found, samples) in enumerate(segment_nats(trained.model, trained.params, batch)):
            place = slice_of(number * segment, ends)
            nats[first : first + size, place] += found[: len(rows)]
            counts[first : first + size, place] += samples[: len(rows)]
    return nats, counts


def drift(
    generated: np.ndarray, held_out: tuple[np.ndarray, np.ndarray], plan: Plan, rate: int, config: Config
) -> list[dict[str, Any]]:
    """Bits per sample by slice: {"start", "stop" (seconds), "generated", "held_out" (None where no recording is as
    long)}."""
    ends, _ = slices(plan, rate, config)
    starts = np.concatenate([[0], ends[:-1]])
    rows = []
    for number, (start, stop) in enumerate(zip(starts, ends, strict=True)):
        nats, count = (float(values[number]) for values in held_out)
        rows.append(
            {
                "start": float(start / rate),
                "stop": float(stop / rate),
                "generated": float(generated[number] / math.log(2) / ((stop - start) * plan.clips)),
                "held_out": nats / math.log(2) / count if count else None,
            }
        )
    return rows
