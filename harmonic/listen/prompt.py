"""What a listener gives a stream to continue: the content of an audio file, checked before it costs anything."""

from __future__ import annotations

import io

import numpy as np

from harmonic.errors import Unreadable, UserError
from harmonic.sound.decode import decode
from harmonic.sound.resample import mono
from harmonic.voice import Codec

MOST_BYTES = 50_000_000
MOST_SECONDS = 60.0
_SILENCE = 1e-4  # -80 dB below full scale


def read(content: bytes, codec: Codec, units: tuple[int, int]) -> np.ndarray:
    """Tokens [time, 1] of a prompt: those that it would have as a recording of the model's data set.

    Its front is cut off, so that its length is a multiple of a unit: what runs a prompt through the model is compiled
    for each length.

    Args:
      content: of any audio file that `pipelines.prepare` reads.
      codec: the model's.
      units: samples, the smaller unit for prompts that are shorter than the larger one.

    Raises:
      UserError: the content is too large, not audio, silent, too short or too long.
    """
    if len(content) > MOST_BYTES:
        raise too_large(len(content))
    waveform = _decode(content, codec.sample_rate)
    if abs(waveform - waveform.mean(dtype=np.float64)).max() < _SILENCE:
        raise UserError("the prompt is silent; give one that can be heard")
    tokens = codec.prompt(waveform)
    unit = max(units) if len(tokens) >= max(units) else min(units)
    kept = len(tokens) // unit * unit
    if not kept:
        raise UserError(f"the prompt is shorter than {unit / codec.sample_rate:.2f} s; give a longer one")
    return tokens[-kept:]


def too_large(size: int) -> UserError:
    """The refusal of a prompt of so many bytes."""
    return UserError(f"the prompt has {size / 1e6:.1f} MB; give at most {MOST_BYTES / 1e6:.0f} MB")


def _decode(content: bytes, rate: int) -> np.ndarray:
    """Mono samples at a rate, decoded as recordings are. What a header claims is not believed: a small file can hold
    hours."""
    blocks, samples = [], 0
    try:
        sound = decode(io.BytesIO(content))
        for block in mono(sound.blocks, sound.rate, rate):
            blocks.append(block)
            samples += len(block)
            if samples > MOST_SECONDS * rate:
                raise UserError(f"the prompt is longer than {MOST_SECONDS:.0f} s; give a shorter one")
    except Unreadable as error:
        raise UserError(f"the prompt is not audio that can be read: it {error}; give another file") from error
    if not samples:
        raise UserError("the prompt holds no samples; give another file")
    waveform = np.concatenate(blocks)
    if not np.isfinite(waveform).all():
        raise UserError("the prompt holds samples that are not finite (NaN or infinity); give another file")
    return waveform
