"""Log-mel spectrograms, to compare excerpts by and to draw a sound. Imports no JAX.

`harmonic.perceptual.mel` has other ones: those of the published SC09 classifier, 32 bands of one second.
"""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Iterator

import numpy as np

MELS = 64
LOWEST = 50.0  # Hz; leaves out a constant offset, which quantisation can add
WINDOW_SECONDS, HOP_SECONDS = 0.064, 0.01  # length of a frame, and time between frames
_FLOOR = 1e-6  # mel power that counts as silence: quantisation noise of 8 bits is hardly above it


@functools.lru_cache(maxsize=8)
def _filters(sample_rate: int, window: int) -> np.ndarray:
    import librosa

    return librosa.filters.mel(sr=sample_rate, n_fft=window, n_mels=MELS, fmin=LOWEST).T.astype(np.float32)


def frame_sizes(sample_rate: int) -> tuple[int, int]:
    """(samples of a frame, samples from one frame to the next)."""
    return max(2 * round(sample_rate * WINDOW_SECONDS / 2), 2), max(round(sample_rate * HOP_SECONDS), 1)


def power_spectra(waveform: np.ndarray, sample_rate: int, hop: int) -> Iterator[np.ndarray]:
    """Power spectra of every whole frame of a waveform [time], some frames at a time: float32 [frames, bins].

    A bin is 1 / `WINDOW_SECONDS` wide. The spectrum of a sine at full scale has a peak of 1 and a sum of 1.5.
    """
    import scipy.fft

    window = frame_sizes(sample_rate)[0]
    if len(waveform) < window:
        return
    taper = np.hanning(window + 1)[:-1].astype(np.float32)
    taper *= 2 / taper.sum()
    frames = np.lib.stride_tricks.sliding_window_view(np.asarray(waveform, np.float32), window)[::hop]
    for first in range(0, len(frames), 1024):
        spectrum = scipy.fft.rfft(frames[first : first + 1024] * taper, axis=1)
        yield spectrum.real**2 + spectrum.imag**2


def mel_bands(power: np.ndarray, sample_rate: int) -> np.ndarray:
    """Power in `MELS` bands, float32 [frames, MELS], of power spectra."""
    window = frame_sizes(sample_rate)[0]
    # librosa's filters have equal areas in Hz; multiplied by this factor, they have them in bins.
    return (power @ _filters(sample_rate, window)) * np.float32(sample_rate / window)


def mel_power(waveform: np.ndarray, sample_rate: int, hop: int) -> np.ndarray:
    """Power in `MELS` bands, float32 [frames, MELS], of every whole frame of a waveform [time].

    A sine at full scale has a power between 0.1 and 1 in its band. librosa's melspectrogram agrees to 3e-5 dB; it takes
    twice the time and, since it keeps the whole complex spectrum, ten times the memory for ten minutes.
    """
    parts = [mel_bands(power, sample_rate) for power in power_spectra(waveform, sample_rate, hop)]
    return np.concatenate(parts or [np.zeros((0, MELS), np.float32)])


def decibels(power: np.ndarray) -> np.ndarray:
    """Mel power in dB; silence is at -60."""
    return 10 * np.log10(np.maximum(power, _FLOOR))


def log_mel(waveform: np.ndarray, sample_rate: int) -> np.ndarray:
    """Log-mel frames in dB, float32 [frames, MELS], a frame every `HOP_SECONDS`; silence is at -60."""
    return decibels(mel_power(waveform, sample_rate, frame_sizes(sample_rate)[1]))


def picture(waveform: np.ndarray, sample_rate: int, columns: int = 400) -> np.ndarray:
    """A log-mel spectrogram as a picture: uint8 [MELS, at most `columns`], low frequencies at the bottom.

    255 is the loudest cell and 0 is 80 dB below it.
    """
    window = frame_sizes(sample_rate)[0]
    # Frames always overlap, so that a long recording has several in each column: they are averaged.
    hop = min(max(len(waveform) // columns, 1), window // 2)
    power = mel_power(np.pad(waveform, (window // 2, window - window // 2 - 1)), sample_rate, hop)
    power = power[: max(1, len(waveform) // hop)]
    starts = np.arange(0, len(power), math.ceil(len(power) / columns))
    power = np.add.reduceat(power, starts, axis=0) / np.diff(starts, append=len(power))[:, None]
    levels = 10 * np.log10(np.maximum(power, 1e-10))
    return np.round(255 * np.clip(1 + (levels - levels.max()) / 80, 0, 1)).astype(np.uint8).T[::-1]


def colours(levels: np.ndarray) -> np.ndarray:
    """RGB, uint8 [height, width, 3], of a picture of levels."""
    return MAGMA[levels]


def png(levels: np.ndarray) -> bytes:
    """A PNG file of a picture of levels, with a palette: a byte a pixel before compression."""
    from PIL import Image

    image, file = Image.fromarray(levels, "P"), io.BytesIO()
    image.putpalette(MAGMA.tobytes())
    image.save(file, "PNG", optimize=True)
    return file.getvalue()


# The palette magma, from the softest to the loudest (Stéfan van der Walt and Nathaniel Smith for matplotlib, CC0).
MAGMA = np.frombuffer(
    bytes.fromhex(
        """
        00000300000400000601000701010901010b02020d02020f03031104031304041505041706051907051b08061d09071f0a07220b0824
        0c09260d0a280e0a2a0f0b2c100c2f110c31120d33140d35150e38160e3a170f3c180f3f1a10411b10441c10461e10491f114b20114d
        2211502311522511552611572811592a115c2b115e2d10602f1062301065321067341068350f6a370f6c390f6e3b0f6f3c0f713e0f72
        400f73420f74430f75450f76470f774810784a10794b10794d117a4f117b50127b52127c53137c55137d57147d58157e5a157e5b167e
        5d177e5e177f60187f61187f63197f651a80661a80681b80691c806b1c806c1d806e1e816f1e81711f81731f81742081762181772181
        7922817a22817c23817e24817f24818125818225818426818526818727818928818a28818c29808d29808f2a80912a80922b80942b80
        952c80972c7f992d7f9a2d7f9c2e7f9e2e7e9f2f7ea12f7ea3307ea4307da6317da7317da9327cab337cac337bae347bb0347bb1357a
        b3357ab53679b63679b83778b93778bb3877bd3977be3976c03a75c23a75c33b74c53c74c63c73c83d72ca3e72cb3e71cd3f70ce4070
        d0416fd1426ed3426dd4436dd6446cd7456bd9466ada4769dc4869dd4968de4a67e04b66e14c66e24d65e44e64e55063e65162e75262
        e85461ea5560eb5660ec585fed595fee5b5eee5d5def5e5df0605df1615cf2635cf3655cf3675bf4685bf56a5bf56c5bf66e5bf6705b
        f7715bf7735cf8755cf8775cf9795cf97b5df97d5dfa7f5efa805efa825ffb8460fb8660fb8861fb8a62fc8c63fc8e63fc9064fc9265
        fc9366fd9567fd9768fd9969fd9b6afd9d6bfd9f6cfda16efda26ffda470fea671fea873feaa74feac75feae76feaf78feb179feb37b
        feb57cfeb77dfeb97ffebb80febc82febe83fec085fec286fec488fec689fec78bfec98dfecb8efdcd90fdcf92fdd193fdd295fdd497
        fdd698fdd89afdda9cfddc9dfddd9ffddfa1fde1a3fce3a5fce5a6fce6a8fce8aafceaacfcecaefceeb0fcf0b1fcf1b3fcf3b5fcf5b7
        fbf7b9fbf9bbfbfabdfbfcbf
        """
    ),
    np.uint8,
).reshape(256, 3)
