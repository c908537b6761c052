"""What generated clips are compared with: excerpts of recordings, and noise as loud as they are."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import scipy.signal

from harmonic import audio
from harmonic.data import Split
from harmonic.likeness.hearing import Heard
from harmonic.spectrogram import LOWEST
from harmonic.voice import Codec

Excerpt = tuple[int, int, int]  # recording, first sample, last sample + 1
_BLOCK = 1 << 16  # samples of a sound that are in memory at once


def excerpts(split: Split, length: int, *, hop: int, crop: int = 0) -> list[Excerpt]:
    """All excerpts of `length` samples that begin where a training window begins and do not overlap.

    Without a past, a model expects such beginnings. Recordings that are shorter are taken whole.

    Args:
      hop: samples from the start of one training window to the next.
      crop: only the first that many samples of each recording; 0 for all.
    """
    found, step = [], -(-length // hop) * hop
    for recording, whole in enumerate(split.lengths):
        total = min(int(whole), crop or int(whole))
        for start in range(0, max(total - length, 0) + 1, step):
            found.append((recording, start, min(start + length, total)))
    return found


def draws(places: list[Excerpt], samples: int, most: int, *, seed: int = 0) -> list[list[Excerpt]]:
    """Up to `most` random choices of excerpts that hold `samples` samples each, no excerpt twice.

    The first choice is there even if the excerpts do not hold so many.
    """
    found: list[list[Excerpt]] = []
    chosen: list[Excerpt] = []
    held = 0
    for place in np.random.default_rng(seed).permutation(len(places)):
        chosen.append(places[place])
        held += chosen[-1][2] - chosen[-1][1]
        if held >= samples:
            found.append(chosen)
            chosen, held = [], 0
            if len(found) == most:
                break
    return found or [chosen]


def hear_excerpts(split: Split, places: list[Excerpt], into: Heard) -> None:
    """Hears excerpts of a split, decoded from tokens as generated clips are."""
    codec = Codec.of(split.manifest)
    for recording, first, last in places:
        clip = into.clip()
        for start in range(first, last, _BLOCK):
            clip.feed(codec.decode(split.read(recording, start, min(start + _BLOCK, last))))


def noise_of(
    heard: Heard | None, power: float, codec: Codec, length: int, *, seed: tuple[int, int]
) -> Iterator[np.ndarray]:
    """Blocks of Gaussian noise, quantised as the data set's recordings are.

    Args:
      heard: clips whose mean spectrum above 50 Hz the noise has; None for white noise.
      power: mean square.
      codec: of the data set.
      length: samples in all.
      seed: of the noise: its kind, and the number of the clip.
    """
    response = np.ones(1) if heard is None else _impulse_response(heard)
    response = response * np.sqrt(power / (response**2).sum())
    numbers = np.random.default_rng(seed)
    before = numbers.standard_normal(len(response) - 1)
    for start in range(0, length, _BLOCK):
        white = np.concatenate([before, numbers.standard_normal(min(_BLOCK, length - start))])
        before = white[len(white) - len(before) :]
        noise = scipy.signal.oaconvolve(white, response, mode="valid")
        tokens = audio.encode(noise, codec.encoding, low=-1, high=1, num_levels=codec.num_levels)
        yield codec.decode(tokens[:, None])


def _impulse_response(heard: Heard) -> np.ndarray:
    """A filter that gives white noise the mean spectrum of clips, up to a factor."""
    amplitude = np.sqrt(heard.spectrum)
    window = 2 * (len(amplitude) - 1)
    amplitude[np.arange(len(amplitude)) * heard.sample_rate / window < LOWEST] = 0
    return np.roll(np.fft.irfft(amplitude, window), window // 2)
