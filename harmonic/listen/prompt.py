"""What a listener gives a stream to continue: the content of an audio file, checked before it costs anything."""

from __future__ import annotations

import io

import numpy as np
import soundfile
import soxr

from harmonic.errors import UserError, one_line
from harmonic.voice import Codec

MOST_BYTES = 50_000_000
MOST_SECONDS = 60.0
_SILENCE = 1e-4  # -80 dB below full scale
_RATES = 1_000, 768_000  # Hz
_BLOCK = 1 << 20  # samples of all channels that are decoded at a time


def read(content: bytes, codec: Codec, units: tuple[int, int]) -> np.ndarray:
    """Tokens [time, 1] of a prompt: those that it would have as a recording of the model's data set.

    Its front is cut off, so that its length is a multiple of a unit: what runs a prompt through the model is compiled
    for each length.

    Args:
      content: of an audio file that libsndfile reads; it is mixed to one channel and resampled.
      codec: the model's.
      units: samples, the smaller unit for prompts that are shorter than the larger one.

    Raises:
      UserError: the content is too large, not audio, silent, too short or too long.
    """
    if len(content) > MOST_BYTES:
        raise too_large(len(content))
    waveform, rate = _decode(content)
    if abs(waveform - waveform.mean(dtype=np.float64)).max() < _SILENCE:
        raise UserError("the prompt is silent; give one that can be heard")
    if rate != codec.sample_rate:
        waveform = soxr.resample(waveform, rate, codec.sample_rate)
    unit = max(units) if len(waveform) >= max(units) else min(units)
    kept = len(waveform) // unit * unit
    if not kept:
        raise UserError(f"the prompt is shorter than {unit / codec.sample_rate:.2f} s; give a longer one")
    return codec.encode(waveform)[-kept:]


def too_large(size: int) -> UserError:
    """The refusal of a prompt of so many bytes."""
    return UserError(f"the prompt has {size / 1e6:.1f} MB; give at most {MOST_BYTES / 1e6:.0f} MB")


def _decode(content: bytes) -> tuple[np.ndarray, int]:
    """Mono samples and their rate. What a header claims is not believed: a small file can hold hours."""
    try:
        with soundfile.SoundFile(io.BytesIO(content)) as file:
            rate, blocks, frames = file.samplerate, [], 0
            if not _RATES[0] <= rate <= _RATES[1]:
                raise UserError(f"the prompt is at {rate:,} Hz; give one at {_RATES[0]:,} to {_RATES[1]:,} Hz")
            while frames <= MOST_SECONDS * rate:
                block = file.read(max(_BLOCK // file.channels, 1), dtype="float32", always_2d=True)
                if not len(block):
                    break
                blocks.append(block.mean(axis=1, dtype=np.float32))
                frames += len(block)
    except (soundfile.LibsndfileError, OSError, ValueError) as error:
        raise UserError(
            f"the prompt is not audio that can be read ({one_line(error)}); give a WAV, FLAC, OGG or MP3 file"
        ) from error
    if frames > MOST_SECONDS * rate:
        raise UserError(f"the prompt is longer than {MOST_SECONDS:.0f} s; give a shorter one")
    if not frames:
        raise UserError("the prompt holds no samples; give another file")
    waveform = np.concatenate(blocks)
    if not np.isfinite(waveform).all():
        raise UserError("the prompt holds samples that are not finite (NaN or infinity); give another file")
    return waveform, rate
