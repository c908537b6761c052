"""Log-mel spectrograms: the right band, the right level, and pictures of any sound."""

import io

import numpy as np
import pytest
from PIL import Image

from harmonic import spectrogram

RATE = 16_000


def sine(frequency, level=1.0, samples=RATE):
    return (level * np.sin(2 * np.pi * frequency * np.arange(samples) / RATE)).astype(np.float32)


@pytest.mark.parametrize("frequency", [200, 1_000, 5_000])
def test_a_sine_is_in_its_band_at_its_level(frequency):
    import librosa

    frames = spectrogram.log_mel(sine(frequency), RATE)
    window, hop = spectrogram.frame_sizes(RATE)
    assert frames.shape == (1 + (RATE - window) // hop, 64) and frames.dtype == np.float32
    band = int(frames[50].argmax())
    centres = librosa.mel_frequencies(66, fmin=50, fmax=RATE / 2)[1:-1]
    assert abs(band - np.abs(centres - frequency).argmin()) <= 1
    assert -13 < frames[50].max() <= 0
    softer = spectrogram.log_mel(sine(frequency, 0.1), RATE)
    assert softer[50, band] == pytest.approx(frames[50, band] - 20, abs=0.01)


def test_silence_and_a_constant_are_at_the_floor():
    for waveform in (np.zeros(RATE), np.full(RATE, 0.5)):
        np.testing.assert_allclose(spectrogram.log_mel(waveform, RATE), -60, atol=1e-4)
    assert spectrogram.log_mel(np.zeros(1_023), RATE).shape == (0, 64)


@pytest.mark.parametrize("samples", [1, 400, 16_000, 3_000_000])
def test_a_picture_of_any_length(samples):
    picture = spectrogram.picture(sine(1_000, samples=samples), RATE)
    assert picture.dtype == np.uint8 and picture.shape[0] == 64 and 1 <= picture.shape[1] <= 400
    assert picture.max() == 255
    if samples > 1_000:
        assert 25 < picture.mean(1).argmax() < 55  # neither at the top nor at the bottom, which low frequencies have
        assert picture[0].mean() < picture.mean(1).max() / 2
    file = spectrogram.png(picture)
    drawn = np.asarray(Image.open(io.BytesIO(file)).convert("RGB"))
    np.testing.assert_array_equal(drawn, spectrogram.colours(picture))
    assert spectrogram.png(picture) == file
