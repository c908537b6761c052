"""Generated streams, piece by piece, and the slices of time that their figures are summed over."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import numpy as np
from threadpoolctl import threadpool_limits

from harmonic.checkpoint import Trained
from harmonic.config import Config
from harmonic.data import Dataset
from harmonic.metrics import Progress
from harmonic.voice import Codec, Piece, Voice

_AT_ONCE, _CHUNK = 32, 4_000  # streams side by side, and samples between two looks at their likelihood


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is compared.

    Attributes:
      split: of the held-out recordings.
      clips: how many are generated.
      length: samples of each.
      seed: of the generated clips.
    """

    split: str
    clips: int
    length: int
    seed: int


def slices(plan: Plan, rate: int, config: Config, *, times: int = 1) -> tuple[np.ndarray, int]:
    """Where the slices end that figures are summed over, in samples, and the length of the segments that fill them.

    A slice is a second, or a quarter of a clip that is shorter than three, up to a multiple of the segments. They go on
    to `times` the length of a clip.
    """
    wanted = rate if plan.length >= 3 * rate else max(1, plan.length // 4)
    multiple = config.model.multiple
    segment = -(-min(config.evaluate.segment_length, wanted) // multiple) * multiple
    size = segment * max(1, round(wanted / segment))
    ends = np.arange(1, max(1, round(times * plan.length / size)) + 1) * size
    ends[-1] = times * plan.length
    return ends, segment


def slice_of(position: int, ends: np.ndarray) -> int:
    """The number of the slice that a sample belongs to."""
    return min(int(np.searchsorted(ends, position, side="right")), len(ends) - 1)


def generate_pieces(
    trained: Trained,
    dataset: Dataset,
    plan: Plan,
    temperature: float,
    top_p: float,
    *,
    times: int = 1,
    title: str = "listen",
    show_progress: bool = True,
) -> Iterator[tuple[int, int, Piece]]:
    """Generates the clips of a plan, each `times` as long; they begin as the clips do.

    Yields:
      (number of the piece's first stream, number of its slice, the piece), a stream's pieces in their order.

    Raises:
      UserError: the settings are impossible.
    """
    voice = Voice(trained.model, trained.params, Codec.of(dataset.manifest))
    ends, segment = slices(plan, voice.codec.sample_rate, trained.config, times=times)
    # The largest chunk of which segments, and so slices, are whole multiples.
    chunk = next(segment // n for n in range(-(-segment // _CHUNK), segment + 1) if segment % n == 0)
    length = times * plan.length
    progress = Progress(title, plan.clips * length, unit="sample") if show_progress else None
    for first in range(0, plan.clips, _AT_ONCE):
        position = 0
        made = voice.pieces(
            length,
            num_samples=min(_AT_ONCE, plan.clips - first),
            first_stream=first,
            chunk=chunk,
            seed=plan.seed,
            temperature=temperature,
            top_p=top_p,
            progress=progress,
        )
        for piece in made:
            yield first, slice_of(position, ends), piece
            position += piece.sound.shape[1]
    if progress:
        progress.close()


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """The products here are small: on one thread they are faster, and their last digits are the same on any machine
    of a kind."""
    with threadpool_limits(1, "blas"):
        yield
