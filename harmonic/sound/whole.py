"""A whole audio file in memory, decoded as recordings are: a prompt, or a clip to compress."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import numpy as np

from harmonic.errors import Unreadable, UserError
from harmonic.sound.decode import Sound, decode
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
    with _opened(path) as sound:
        if sound.rate != sample_rate and not resample:
            raise UserError(
                f"the prompt {path} is at {sound.rate:,} Hz, but the model's audio is at {sample_rate:,} Hz; "
                "convert it, or give workflows.generate --resample_prompt"
            )
        return _joined(path, list(mono(sound.blocks, sound.rate, sample_rate)))


def read_channels(path: str | os.PathLike[str], sample_rate: int) -> np.ndarray:
    """All samples of an audio file, float32 [time, channels], as they are.

    Args:
      path: any file that `pipelines.prepare` reads.
      sample_rate: Hz that it must have.

    Raises:
      UserError: the file cannot be read, holds no samples, or has another rate.
    """
    with _opened(path) as sound:
        if sound.rate != sample_rate:
            raise UserError(
                f"{path} is at {sound.rate:,} Hz, but the model's audio is at {sample_rate:,} Hz; convert it"
            )
        return _joined(path, list(sound.blocks))


@contextlib.contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[Sound]:
    try:
        with open(path, "rb") as file:
            yield decode(file)
    except Unreadable as error:
        raise UserError(f"cannot read {path} as audio: it {error}; give another recording") from error
    except OSError as error:
        raise UserError(f"cannot read {path} as audio: {error.strerror or error}; give an audio file") from error


def _joined(path: str | os.PathLike[str], blocks: list[np.ndarray]) -> np.ndarray:
    if not sum(map(len, blocks)):
        raise UserError(f"{path} holds no samples; give another recording")
    return np.concatenate(blocks)
