"""Log-mel spectrograms: what excerpts are compared by, and what is drawn of a sound (no JAX)."""

from __future__ import annotations

import functools
import io
import math

import numpy as np

MELS = 64
WINDOW_SECONDS, HOP_SECONDS = 0.064, 0.01  # of a frame, and between frames
_FLOOR = 1e-6  # of mel power, below which is silence: quantisation noise of 8 bits hardly rises above it


@functools.lru_cache(maxsize=8)
def _filters(sample_rate: int, window: int) -> np.ndarray:
    import librosa

    lowest = 50.0  # leaves out a constant offset, which quantisation can bring
    return librosa.filters.mel(sr=sample_rate, n_fft=window, n_mels=MELS, fmin=lowest).T.astype(np.float32)


def frame_sizes(sample_rate: int) -> tuple[int, int]:
    """(samples of a frame, samples from one frame to the next)."""
    return max(2 * round(sample_rate * WINDOW_SECONDS / 2), 2), max(round(sample_rate * HOP_SECONDS), 1)


def mel_power(waveform: np.ndarray, sample_rate: int, hop: int) -> np.ndarray:
    """Power in `MELS` bands, float32 [frames, MELS], of every whole frame of a waveform [time].

    A sine at full scale has between 0.1 and 1 in its band.
    """
    import scipy.fft

    window = frame_sizes(sample_rate)[0]
    if len(waveform) < window:
        return np.zeros((0, MELS), np.float32)
    taper = np.hanning(window + 1)[:-1].astype(np.float32)
    taper *= 2 / taper.sum()
    frames = np.lib.stride_tricks.sliding_window_view(np.asarray(waveform, np.float32), window)[::hop]
    parts = []
    for first in range(0, len(frames), 1024):
        spectrum = scipy.fft.rfft(frames[first : first + 1024] * taper, axis=1)
        # librosa's filters are of equal area in Hz: here it is per bin that they add up.
        power = (spectrum.real**2 + spectrum.imag**2) @ _filters(sample_rate, window)
        parts.append(power * np.float32(sample_rate / window))
    return np.concatenate(parts)


def log_mel(waveform: np.ndarray, sample_rate: int) -> np.ndarray:
    """Log-mel frames in dB, float32 [frames, MELS], a frame every `HOP_SECONDS`; silence is at -60."""
    return 10 * np.log10(np.maximum(mel_power(waveform, sample_rate, frame_sizes(sample_rate)[1]), _FLOOR))


def picture(waveform: np.ndarray, sample_rate: int, columns: int = 400) -> np.ndarray:
    """A log-mel spectrogram as a picture: uint8 [MELS, at most `columns`], low frequencies at the bottom.

    255 is the loudest cell and 0 is 80 dB below it.
    """
    window = frame_sizes(sample_rate)[0]
    # Frames overlap however long the recording is; those that share a column are averaged.
    hop = min(max(len(waveform) // columns, 1), window // 2)
    power = mel_power(np.pad(waveform, (window // 2, window - window // 2 - 1)), sample_rate, hop)
    power = power[: max(1, len(waveform) // hop)]
    starts = np.arange(0, len(power), math.ceil(len(power) / columns))
    power = np.add.reduceat(power, starts, axis=0) / np.diff(starts, append=len(power))[:, None]
    decibels = 10 * np.log10(np.maximum(power, 1e-10))
    return np.round(255 * np.clip(1 + (decibels - decibels.max()) / 80, 0, 1)).astype(np.uint8).T[::-1]


def colours(levels: np.ndarray) -> np.ndarray:
    """RGB, uint8 [height, width, 3], of a picture of levels."""
    return _palette()[levels]


@functools.lru_cache(maxsize=1)
def _palette() -> np.ndarray:
    from matplotlib import colormaps

    return colormaps["magma"](np.arange(256), bytes=True)[:, :3]


def png(levels: np.ndarray) -> bytes:
    """A PNG file of a picture of levels, with a palette: a byte a pixel before compression."""
    from PIL import Image

    image, file = Image.fromarray(levels, "P"), io.BytesIO()
    image.putpalette(_palette().tobytes())
    image.save(file, "PNG", optimize=True)
    return file.getvalue()
