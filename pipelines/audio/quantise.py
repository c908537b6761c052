"""A waveform's samples to pieces of tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from harmonic.audio import encode, token_dtype

_BLOCK_SAMPLES = 1 << 17  # quantised at once


def pieces(
    read: Callable[[int, int], np.ndarray],
    length: int,
    *,
    low: float,
    high: float,
    gain: float | None,
    encoding: str,
    num_levels: int,
    record_length: int,
) -> Iterator[tuple[int, np.ndarray]]:
    """Quantises a waveform. Yields (offset, tokens [samples, 1]) in order.

    Args:
      read: gives the float32 samples [start, stop).
      length: samples in all.
      low, high: the samples that are quantised as -1 and 1.
      gain: the samples are multiplied by it and then quantised on the scale of [-1, 1]; None uses `low` and `high`.
      encoding, num_levels: as for `harmonic.audio.encode`.
      record_length: samples of a piece; the last one may be shorter.
    """
    if gain is not None:
        low, high = -1.0, 1.0
    for offset in range(0, length, record_length):
        tokens = np.empty(min(record_length, length - offset), token_dtype(num_levels))
        for start in range(0, len(tokens), _BLOCK_SAMPLES):
            part = tokens[start : start + _BLOCK_SAMPLES]
            samples = read(offset + start, offset + start + len(part))
            if gain is not None:
                samples = samples * np.float32(gain)
            part[:] = encode(samples, encoding, low=low, high=high, num_levels=num_levels)
        yield offset, tokens[:, None]
