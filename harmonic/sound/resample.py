"""Blocks of any rate and number of channels to mono blocks at 16 kHz."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import soxr

from harmonic.audio import SAMPLE_RATE


def mono(blocks: Iterator[np.ndarray], rate: int, target: int = SAMPLE_RATE) -> Iterator[np.ndarray]:
    """Mixes float32 blocks [time, channels] by their mean, resampled by soxr's HQ to `target` Hz: blocks [time].

    At that rate nothing is resampled. The samples do not depend on where the blocks are cut.
    """
    resampler = soxr.ResampleStream(rate, target, 1, dtype="float32", quality="HQ") if rate != target else None
    for block in blocks:
        # One channel: no mean, which would be a third of a short recording's decoding time.
        mixed = block[:, 0] if block.shape[1] == 1 else block.mean(axis=1, dtype=np.float32)
        yield mixed if resampler is None else resampler.resample_chunk(mixed)
    if resampler is not None:
        yield resampler.resample_chunk(np.zeros(0, np.float32), last=True)
