"""What is heard in a set of clips, clip by clip and block by block, in memory that does not grow with their length.

    heard = Heard(16_000)
    clip = heard.clip()
    for block in blocks:          # float32 [time] in [-1, 1], of any length
        clip.feed(block)
    heard.frames, heard.gaussian(), heard.peaks, heard.onsets_per_second

A frame is 64 ms, every 10 ms (`harmonic.spectrogram`). Its features are 64 log-mel bands in dB and their changes since
the frame before; frames of different clips are not compared. How a clip is cut into blocks changes nothing but the last
digits.
"""

from __future__ import annotations

import math

import numpy as np

from harmonic.perceptual.metrics import Gaussian
from harmonic.spectrogram import LOWEST, MELS, decibels, frame_sizes, mel_bands, power_spectra

FEATURES = 2 * MELS
PEAK_DB = 10.0  # a bin this far above the median of its neighbours belongs to a peak
_NEIGHBOURS = 32  # bins of 16 Hz that have one median: half a kilohertz
ONSET_DB = 3.0  # an onset: the bands rise by this in the mean over `_RISE` frames; falling bands count as 0
_RISE, _GAP = 2, 5  # frames that a rise takes, and frames between two onsets at least
_LEVELS = np.arange(-100, 12)  # dB; edges of the histogram of the frames' levels
_NOTHING = 1e-10  # power: a constant is left with less, in float32


class Moments:
    """Number, mean and covariance of vectors [n, features] that come in parts, in float64 (Chan et al. 1979)."""

    def __init__(self, features: int):
        self.count = 0
        self.mean = np.zeros(features)
        self._scatter = np.zeros((features, features))

    def add(self, x: np.ndarray) -> None:
        """Counts some more vectors."""
        if not len(x):
            return
        x = np.asarray(x, np.float64)
        mean = x.mean(0)
        centred, apart = x - mean, mean - self.mean
        total = self.count + len(x)
        self._scatter += centred.T @ centred + np.outer(apart, apart) * (self.count * len(x) / total)
        self.mean = self.mean + apart * (len(x) / total)
        self.count = total

    @property
    def covariance(self) -> np.ndarray:
        """Over n - 1; zeros for fewer than two vectors."""
        return self._scatter / max(self.count - 1, 1)


class Heard:
    """Running figures over clips.

    Attributes:
      sample_rate: Hz, of all clips.
      samples: how many there were, those that fill no frame included.
      spectrum: sum of the frames' power spectra, [bins].
    """

    def __init__(self, sample_rate: int):
        self.sample_rate, self.samples = sample_rate, 0
        window = frame_sizes(sample_rate)[0]
        self.spectrum = np.zeros(window // 2 + 1)
        self._moments = Moments(FEATURES)
        self._lowest = min(math.ceil(LOWEST * window / sample_rate), len(self.spectrum) - 1)
        self._all_frames, self._onsets = 0, 0
        self._peaks, self._energy = 0.0, 0.0
        self._levels = np.zeros(len(_LEVELS) + 1, np.int64)

    def clip(self) -> Clip:
        """A new clip, which begins in silence that is not heard."""
        return Clip(self)

    @property
    def frames(self) -> int:
        """Frames that have features: all but the first of each clip."""
        return self._moments.count

    @property
    def seconds(self) -> float:
        """Length of all clips together."""
        return self.samples / self.sample_rate

    def gaussian(self) -> Gaussian:
        """(mean, covariance) of the frames' features."""
        return self._moments.mean, self._moments.covariance

    @property
    def level(self) -> float | None:
        """Root mean square above 50 Hz in dB; full scale is a square wave's. None without sound, below -100."""
        power = self._energy / 3 / max(self._all_frames, 1)
        return 10 * math.log10(power) if power > _NOTHING else None

    @property
    def peaks(self) -> float | None:
        """Share of the energy in spectral peaks: near 1 for tones, below 0.01 for noise. None without sound."""
        return None if self.level is None else self._peaks / self._energy

    @property
    def onsets_per_second(self) -> float | None:
        """How often the bands rise together; None without frames."""
        rate = self.sample_rate / frame_sizes(self.sample_rate)[1]
        return self._onsets * rate / self.frames if self.frames else None

    def silence(self, level: float) -> float | None:
        """Share of the frames below a level in dB, which is rounded to whole ones; None without frames."""
        edge = int(np.searchsorted(_LEVELS, round(level)))
        return float(self._levels[: edge + 1].sum() / self._all_frames) if self._all_frames else None

    def _hear(self, power: np.ndarray) -> np.ndarray:
        """Counts power spectra; returns their log-mel frames."""
        self.spectrum += power.sum(0, dtype=np.float64)
        audible = power[:, self._lowest :]
        energy = audible.sum(1, dtype=np.float64)
        self._all_frames += len(power)
        self._energy += float(energy.sum())
        levels = 10 * np.log10(np.maximum(energy / 3, 1e-30))
        self._levels += np.bincount(np.searchsorted(_LEVELS, levels, side="right"), minlength=len(self._levels))
        size = min(_NEIGHBOURS, audible.shape[1])
        last = audible.shape[1] - audible.shape[1] % size
        groups = audible[:, :last].reshape(len(audible), -1, size)
        limits = np.median(groups, axis=2, keepdims=True) * np.float32(10 ** (PEAK_DB / 10))
        self._peaks += float(groups.sum(dtype=np.float64, where=groups > limits))
        return decibels(mel_bands(power, self.sample_rate))


class Clip:
    """One clip of a set; it is never closed, since what fills no frame is not heard."""

    def __init__(self, heard: Heard):
        self._heard = heard
        self._rest = np.zeros(0, np.float32)
        self._before = np.zeros((0, MELS), np.float32)  # the last frames
        self._rising, self._since = False, _GAP

    def feed(self, block: np.ndarray) -> None:
        """Hears the next samples, floats [time]."""
        heard = self._heard
        heard.samples += len(block)
        window, hop = frame_sizes(heard.sample_rate)
        waveform = np.concatenate([self._rest, np.asarray(block, np.float32)])
        whole = max(0, 1 + (len(waveform) - window) // hop)
        for power in power_spectra(waveform, heard.sample_rate, hop):
            self._follow(heard._hear(power))
        self._rest = waveform[whole * hop :].copy()

    def _follow(self, frames: np.ndarray) -> None:
        """Counts the features of the next log-mel frames, and the onsets among them."""
        every = np.concatenate([self._before, frames])
        new = every[max(len(self._before), 1) :]
        changes = new - every[len(every) - len(new) - 1 : -1]
        self._heard._moments.add(np.concatenate([new, changes], axis=1))
        rises = np.maximum(every[_RISE:] - every[:-_RISE], 0).mean(1)
        for rising in rises >= ONSET_DB:
            self._since += 1
            if rising and not self._rising and self._since >= _GAP:
                self._heard._onsets += 1
                self._since = 0
            self._rising = bool(rising)
        self._before = every[-_RISE:]
