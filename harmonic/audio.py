"""Quantisers between waveforms and tokens, and audio files (NumPy and libsndfile only).

The quantisers are SaShiMi's, which HarmonicRNN follows: each recording is scaled by its own minimum and maximum, then
cut into `num_levels` levels, after mu-law companding or linearly. All arithmetic is in float32, as SaShiMi's is: in
another precision, up to 6 % of the tokens of a very quiet recording differ.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np
import soundfile

from harmonic.errors import UserError
from harmonic.files import write_errors

SAMPLE_RATE = 16_000  # Hz, of every published data set
ENCODINGS = ("mu_law", "linear")
MAX_LEVELS = 1 << 16
PUBLISHED = ("sc09", "beethoven", "youtubemix")  # data sets whose figures are for the published scale, also of silence
_SILENCE_DB = -90  # of full scale: the smallest step of 16 bits


def token_dtype(num_levels: int) -> np.dtype:
    """The smallest unsigned integer type that holds `num_levels` levels.

    Raises:
      ValueError: `num_levels` is not between 2 and 65,536.
    """
    if not 2 <= num_levels <= MAX_LEVELS:
        raise ValueError(f"num_levels must be between 2 and {MAX_LEVELS}, got {num_levels}")
    return np.dtype(np.uint8 if num_levels <= 256 else np.uint16)


def no_sound(low: float, high: float) -> str:
    """Why a recording between these extremes has nothing to scale up, a clause about the recording; empty if it has.

    Scaled to its own extremes, silence would be a constant at full scale, and rounding noise would be loud noise.
    """
    if low == high:
        return "holds no sound: all its samples are equal"
    peak = max(abs(low), abs(high))
    if peak < 10 ** (_SILENCE_DB / 20):
        return f"holds no sound: its peak is {20 * math.log10(peak):.0f} dBFS"
    return ""


def encode(
    waveform: np.ndarray,
    encoding: str,
    *,
    low: float | None = None,
    high: float | None = None,
    num_levels: int = 256,
) -> np.ndarray:
    """Quantises a waveform, or a piece of one.

    Args:
      waveform: float samples of any shape; taken as float32.
      encoding: `mu_law` or `linear`.
      low, high: minimum and maximum of the *whole recording*; of `waveform` if None. Pad after scaling: zeros that are
        padded before can change every token of an all-positive recording.
      num_levels: number of levels; 256 is 8 bits.

    Returns:
      Tokens in [0, num_levels), of `token_dtype(num_levels)` and the shape of `waveform`.

    Raises:
      ValueError: an unknown encoding or number of levels, or an empty waveform without `low` and `high`.
    """
    _check_encoding(encoding)
    dtype = token_dtype(num_levels)
    x = np.asarray(waveform, np.float32)
    lowest = np.float32(x.min() if low is None else low)
    highest = np.float32(x.max() if high is None else high)
    unit = (x - lowest) / (highest - lowest + np.float32(1e-6))
    if encoding == "mu_law":
        mu = np.float32(num_levels - 1)
        scaled = np.float32(-1) + np.float32(2) * unit
        magnitude = np.log1p(mu * np.abs(scaled + np.float32(1e-8))) / np.log1p(mu)
        unit = (np.sign(scaled) * magnitude + np.float32(1)) / np.float32(2)
    # 255.99 instead of 256, so that full scale falls into the last level.
    tokens = np.trunc(unit * np.float32(num_levels - 0.01) + np.float32(0.005))
    return np.clip(tokens, 0, num_levels - 1).astype(dtype)


def decode(tokens: np.ndarray, encoding: str, *, num_levels: int = 256) -> np.ndarray:
    """The waveform of tokens: float32 in [-1, 1], of the same shape.

    The recording's own scale is lost: the waveform fills [-1, 1].

    Raises:
      ValueError: an unknown encoding or number of levels.
    """
    _check_encoding(encoding)
    token_dtype(num_levels)
    mu = np.float32(num_levels - 1)
    value = np.float32(2) * np.asarray(tokens).astype(np.float32) / mu - np.float32(1)
    if encoding == "linear":
        return value
    return np.sign(value) * (np.float32(num_levels) ** np.abs(value) - np.float32(1)) / mu


def _check_encoding(encoding: str) -> None:
    if encoding not in ENCODINGS:
        raise ValueError(f"encoding must be one of {', '.join(ENCODINGS)}, got {encoding!r}")


def read_audio(file: str | os.PathLike[str] | BinaryIO, *, name: str | None = None) -> tuple[np.ndarray, int]:
    """Reads a whole audio file that libsndfile understands, mixed to mono.

    Returns:
      (float32 [time] in [-1, 1), sample rate in Hz).

    Raises:
      UserError: the file is missing, empty or not audio, or holds samples that are not finite.
    """
    name = name or str(file)
    try:
        samples, sample_rate = soundfile.read(file, dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, OSError) as error:
        raise UserError(f"cannot read {name} as audio ({error}); give a WAV, FLAC, OGG or MP3 file") from error
    if not len(samples):
        raise UserError(f"{name} holds no samples; give another recording")
    if not np.isfinite(samples).all():
        raise UserError(f"{name} holds samples that are not finite (NaN or infinity); give another recording")
    return samples.mean(axis=1, dtype=np.float32), sample_rate


def pcm16(waveform: np.ndarray) -> bytes:
    """Float samples [time] in [-1, 1] as 16-bit little-endian PCM: the bytes that a WAV file of them has."""
    pcm = io.BytesIO()
    soundfile.write(pcm, waveform, SAMPLE_RATE, format="RAW", subtype="PCM_16", endian="LITTLE")
    return pcm.getvalue()


def write_wav(path: str | os.PathLike[str], waveform: np.ndarray, sample_rate: int = SAMPLE_RATE) -> None:
    """Writes samples [time], floats in [-1, 1] or int16, as a 16-bit PCM WAV file, whole or not at all.

    Raises:
      UserError: it cannot be written.
    """
    temporary = f"{os.fspath(path)}.partial"
    samples = waveform if waveform.dtype == np.int16 else np.clip(waveform, -1, 1)
    with wav_errors(path):
        soundfile.write(temporary, samples, sample_rate, subtype="PCM_16", format="WAV")
        os.replace(temporary, path)


@contextlib.contextmanager
def wav_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turns an error of libsndfile or of the system while `path` is written into a UserError.

    libsndfile does not give the reason, such as a full disk.
    """
    try:
        with write_errors(path):
            yield
    except soundfile.LibsndfileError as error:
        raise UserError(
            f"cannot write {path} ({error.error_string}); make room there, or make it writable, then the same command "
            "goes on"
        ) from error
