"""One-second clips and their labels, read from a prepared data set."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from harmonic import audio
from harmonic.data import Dataset, Split
from harmonic.errors import UserError
from harmonic.perceptual.mel import one_second
from harmonic.voice import Codec


def read_clips(split: Split, first: int, last: int) -> np.ndarray:
    """Recordings first .. last of a split as clips, float32 [last - first, 16000] in [-1, 1].

    They are decoded from tokens, as generated clips are, so that both have the same quantisation noise.
    """
    codec = Codec.of(split.manifest)
    return np.stack([one_second(codec.decode(split.read(i, 0, audio.SAMPLE_RATE))) for i in range(first, last)])


def check_clips(dataset: Dataset) -> None:
    """Refuses data that the classifier cannot take: it must be one channel at 16 kHz."""
    manifest = dataset.manifest
    if manifest.sample_rate != audio.SAMPLE_RATE or manifest.channels != 1:
        raise UserError(
            f"{dataset.folder} is at {manifest.sample_rate:,} Hz with {manifest.channels} channels; the classifier "
            f"hears one channel at {audio.SAMPLE_RATE:,} Hz: prepare the data set that way"
        )


def labels_of(split: Split) -> tuple[str, ...]:
    """The labels of a split's recordings, in order.

    Raises:
      UserError: a recording has none.
    """
    for recording in split.recordings:
        if recording.label is None:
            raise UserError(
                f"{split.folder} has no labels (such as for {recording.id}), which a classifier learns to tell apart; "
                "use a data set whose recordings are labelled, such as sc09"
            )
    return tuple(str(recording.label) for recording in split.recordings)


def label_numbers(split: Split, classes: tuple[str, ...], name: str | Path) -> np.ndarray:
    """int32 [recordings]: the number of each recording's class.

    Raises:
      UserError: a recording's label is none of the classes.
    """
    numbers = {label: number for number, label in enumerate(classes)}
    labels = labels_of(split)
    for label in sorted(set(labels)):
        if label not in numbers:
            raise UserError(
                f"{name} was trained for other classes: it tells {_some(classes)} apart, but {split.folder} also has "
                f"{label!r}; train a classifier on this data set: python -m workflows.train_classifier"
            )
    return np.array([numbers[label] for label in labels], np.int32)


def _some(names: tuple[str, ...]) -> str:
    return ", ".join(names[:10]) + ", ..." * (len(names) > 10)
