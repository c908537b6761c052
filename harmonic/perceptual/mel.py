"""Log-mel images of one-second clips, as the published SC09 classifier sees them."""

from __future__ import annotations

import librosa
import numpy as np

from harmonic.audio import SAMPLE_RATE

SIZE = 32  # mel bands, and frames of one second at a hop of 512
_TOP_DB = 80.0
_AT_ONCE = 256  # clips whose spectrograms are in memory together


def one_second(waveform: np.ndarray) -> np.ndarray:
    """A waveform [time] at 16 kHz, cut or padded with zeros to one second."""
    clip = np.zeros(SAMPLE_RATE, np.float32)
    kept = waveform[:SAMPLE_RATE]
    clip[: len(kept)] = kept
    return clip


def log_mel(clips: np.ndarray) -> np.ndarray:
    """Images of clips: dB below the loudest point of each, from -80 to 0.

    librosa's mel spectrogram with 32 bands and its defaults otherwise (windows of 2,048 samples, hops of 512), then
    `power_to_db(ref=np.max)`, clip by clip (Goel et al. 2202.09729, their classifier's transforms).

    Args:
      clips: float32 [n, time] at 16 kHz in [-1, 1]; cut or padded with zeros to one second.

    Returns:
      float32 [n, 32, 32]: clip, band, frame.
    """
    images = np.zeros((len(clips), SIZE, SIZE), np.float32)
    for first in range(0, len(clips), _AT_ONCE):
        batch = np.stack([one_second(clip) for clip in clips[first : first + _AT_ONCE]])
        power = librosa.feature.melspectrogram(y=batch, sr=SAMPLE_RATE, n_mels=SIZE)
        for i, image in enumerate(power):
            images[first + i] = librosa.power_to_db(image, ref=np.max, top_db=_TOP_DB)
    return images
