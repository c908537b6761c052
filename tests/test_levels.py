"""Trimming against librosa, loudness against pyloudnorm and known answers, both whatever the blocks."""

import librosa
import numpy as np
import pyloudnorm
import pytest

from harmonic import loudness as levels


def blocks(waveform, size=levels.BLOCK):
    return lambda: (waveform[start : start + size] for start in range(0, len(waveform), size))


def pauses(length, seed):
    """Noise with bursts, between quieter and quieter ends."""
    numbers = np.random.default_rng(seed)
    envelope = np.repeat(10 ** numbers.uniform(-4, 0, -(-length // 300)), 300)[:length]
    fade = np.minimum(np.linspace(0, 3, length), np.linspace(2, 0, length)).clip(1e-4, 1)
    return (numbers.normal(0, 0.2, length) * envelope * fade**2).astype(np.float32)


@pytest.mark.parametrize(
    "length", [1, 511, 512, 513, 2_048, 5_000, levels.BLOCK, levels.BLOCK + 1, 3 * levels.BLOCK + 77]
)
@pytest.mark.parametrize("decibels", [6, 20, 40, 60])
def test_trimming_is_librosas(length, decibels):
    for seed in range(3):
        waveform = pauses(length, seed)
        trimmed, (start, stop) = librosa.effects.trim(waveform, top_db=decibels)
        assert levels.trim(blocks(waveform), length, decibels) == (start, stop) and len(trimmed) == stop - start > 0


def test_silence_is_not_trimmed_away():
    for waveform in (np.zeros(5_000, np.float32), np.full(5_000, 1e-6, np.float32)):
        assert levels.trim(blocks(waveform), 5_000, 30) == (0, 5_000)


def test_trimming_cuts_to_the_sound():
    waveform = np.zeros(400_000, np.float32)
    waveform[200_000:210_000] = 0.5
    start, stop = levels.trim(blocks(waveform), len(waveform), 30)
    assert 200_000 - 2_048 <= start <= 200_000 and 210_000 <= stop <= 210_000 + 2_048


@pytest.mark.parametrize("size", [1_000, 16_000, levels.BLOCK])
def test_loudness_is_the_standards(size):
    """Whole tenths of a second: pyloudnorm rounds the number of blocks, the standard has whole ones alone."""
    meter = pyloudnorm.Meter(16_000, filter_class="DeMan")
    for seed, seconds in enumerate((0.4, 1.0, 3.7, 30.0)):
        waveform = pauses(round(16_000 * seconds), seed)
        expected = meter.integrated_loudness(waveform.astype(np.float64))
        assert levels.loudness(blocks(waveform, size)) == pytest.approx(expected, abs=1e-9)


def sine(amplitude, seconds=5.0, frequency=997):
    return (amplitude * np.sin(2 * np.pi * frequency * np.arange(round(16_000 * seconds)) / 16_000)).astype(np.float32)


def test_known_loudness():
    """A full-scale sine of 997 Hz in one channel has -3.01 LKFS (BS.1770-4, annex 1); 20 dB less, 20 LU less."""
    assert levels.loudness(blocks(sine(1))) == pytest.approx(-3.01, abs=0.1)
    assert levels.loudness(blocks(sine(0.1))) == pytest.approx(-23.01, abs=0.1)
    # Both gates: what is 30 dB below the rest, and silence, do not count.
    mixed = np.concatenate([sine(0.1, 20), sine(0.003, 20), np.zeros(160_000, np.float32)])
    assert levels.loudness(blocks(mixed)) == pytest.approx(-23.01, abs=0.1)
    # Shorter than a block of the standard's.
    assert levels.loudness(blocks(sine(0.1, 0.3))) == pytest.approx(-23.01, abs=0.2)
    assert levels.loudness(blocks(np.zeros(16_000, np.float32))) == -np.inf


@pytest.mark.parametrize(("amplitude", "target"), [(0.01, -23), (0.5, -23), (0.1, -30)])
def test_gain_brings_it_to_the_target(amplitude, target):
    waveform = sine(amplitude)
    gain = levels.gain(blocks(waveform), amplitude, target)
    assert levels.loudness(blocks(waveform * np.float32(gain))) == pytest.approx(target, abs=0.006)


def test_gain_stays_within_full_scale():
    clicks = sine(0.01)
    clicks[::16_000] = 0.9
    assert levels.gain(blocks(clicks), 0.9, -14) == 1 / 0.9
    assert levels.gain(blocks(np.zeros(9_000, np.float32)), 0.0, -23) == 1.0
    assert levels.gain(blocks(np.full(9_000, 1e-6, np.float32)), 1e-6, -23) == 1.0
