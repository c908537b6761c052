"""A whole audio file as mono samples in memory: what a prompt is, decoded as recordings are."""

from __future__ import annotations

import os

import numpy as np

from harmonic.errors import Unreadable, UserError
from harmonic.sound.decode import decode
from harmonic.sound.resample import mono


def read_sound(path: str | os.PathLike[str], sample_rate: int, *, resample: bool) -> np.ndarray:
    """All samples of an audio file, float32 [time], mixed to one channel.

    Args:
      path: any file that `pipelines.prepare` reads.
      sample_rate: Hz of the result.
      resample: convert a file of another rate, as `pipelines.prepare` does.

    Raises:
      UserError: the file cannot be read, holds no samples, or has another rate.
    """
    try:
        with open(path, "rb") as file:
            sound = decode(file)
            if sound.rate != sample_rate and not resample:
                raise UserError(
                    f"the prompt {path} is at {sound.rate:,} Hz, but the model's audio is at {sample_rate:,} Hz; "
                    "convert it, or give workflows.generate --resample_prompt"
                )
            blocks = list(mono(sound.blocks, sound.rate, sample_rate))
    except Unreadable as error:
        raise UserError(f"cannot read {path} as audio: it {error}; give another recording") from error
    except OSError as error:
        raise UserError(f"cannot read {path} as audio: {error.strerror or error}; give an audio file") from error
    samples = np.concatenate(blocks) if blocks else np.zeros(0, np.float32)
    if not len(samples):
        raise UserError(f"{path} holds no samples; give another recording")
    return samples
