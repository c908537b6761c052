"""Silence and loudness of waveforms of any length, block by block: for `--trim_silence` and `--loudness`.

A waveform is a function that yields its float32 blocks [time] from the start at each call: a measure that must know the
whole before it can judge a part passes over the blocks twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np

from harmonic.audio import SAMPLE_RATE

Blocks = Callable[[], Iterator[np.ndarray]]

# librosa.effects.trim's defaults.
_FRAME, _HOP = 2_048, 512
_FLOOR = 1e-10  # power, of an amplitude of 1e-5; all frames below it count as equally loud
BLOCK = 256 * _HOP  # samples; for `trim`, every block but the last must be a multiple of the hop
_GATE = 10 ** ((-70 + 0.691) / 10)  # power of -70 LUFS


def trim(blocks: Blocks, length: int, decibels: float) -> tuple[int, int]:
    """The first and the last sample + 1 of a waveform without leading and trailing silence.

    As `librosa.effects.trim(waveform, top_db=decibels)`: frames of 2,048 samples, 512 apart, are silent when their root
    mean square is that many decibels or more below the loudest one's.

    Args:
      blocks: yields blocks of `BLOCK` samples, the last one perhaps shorter.
      length: samples in all.
      decibels: above 0.
    """
    loudest = max(float(powers.max(initial=0)) for powers in _frame_powers(blocks()))
    threshold = max(loudest, _FLOOR) * 10 ** (-decibels / 10)
    first, last, frame = -1, -1, 0
    for powers in _frame_powers(blocks()):
        loud = np.flatnonzero(np.maximum(powers, _FLOOR) > threshold)
        if len(loud):
            first = frame + int(loud[0]) if first < 0 else first
            last = frame + int(loud[-1])
        frame += len(powers)
    return first * _HOP, min((last + 1) * _HOP, length)


def _frame_powers(blocks: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """Mean squares of the frames around 0, 512, 1,024, ..., with zeros beyond the ends."""
    before, length = np.zeros(2), 0
    for block in blocks:
        length += len(block)
        squares = np.zeros(-(-len(block) // _HOP) * _HOP)
        np.square(block, out=squares[: len(block)], dtype=np.float64)
        sums = np.concatenate([before, squares.reshape(-1, _HOP).sum(axis=1)])
        yield _sums_of_four(sums) / _FRAME
        before = sums[-3:]
    yield _sums_of_four(np.concatenate([before, np.zeros(2 if length % _HOP == 0 else 1)])) / _FRAME


def _sums_of_four(values: np.ndarray) -> np.ndarray:
    return values[:-3] + values[1:-2] + values[2:-1] + values[3:]


def gain(blocks: Blocks, peak: float, target: float) -> float:
    """The factor that brings a waveform to a loudness of `target` LUFS, but its peak not above full scale.

    It starts from 1 if nothing in the waveform is above -70 LUFS.
    """
    measured = loudness(blocks)
    # Hundredths of a decibel are far below what is heard, and far above the differences between processors.
    wanted = 10 ** (round(target - measured, 2) / 20) if math.isfinite(measured) else 1.0
    return min(wanted, 1 / max(peak, 1e-30))


def loudness(blocks: Blocks) -> float:
    """Integrated loudness of a mono waveform at 16 kHz in LUFS (ITU-R BS.1770-4, which EBU R 128 uses).

    K-weighted, over blocks of 400 ms that overlap by three quarters. Blocks below -70 LUFS are left out, and then those
    more than 10 LU below the mean of the others; -inf if none is left. A shorter waveform is one block. The memory is
    ten numbers for each second.
    """
    import pyloudnorm  # here, with SciPy, since most runs need neither
    from scipy.signal import lfilter

    # The standard's filters for any sample rate, after Brecht De Man. pyloudnorm's meter would need the whole at once.
    filters = (
        pyloudnorm.IIRfilter(3.99984385397, 0.7071752369554193, 1681.9744509555319, SAMPLE_RATE, "high_shelf_DeMan"),
        pyloudnorm.IIRfilter(0.0, 0.5003270373253953, 38.13547087613982, SAMPLE_RATE, "high_pass_DeMan"),
    )
    stages = [(stage.b, stage.a) for stage in filters]
    states = [np.zeros(2) for _ in stages]
    step = SAMPLE_RATE // 10
    parts, rest, length = [], np.zeros(0), 0
    for block in blocks():
        length += len(block)
        weighted = block.astype(np.float64)
        for number, (numerator, denominator) in enumerate(stages):
            weighted, states[number] = lfilter(numerator, denominator, weighted, zi=states[number])
        squares = np.concatenate([rest, np.square(weighted)])
        whole = len(squares) // step * step
        parts.append(squares[:whole].reshape(-1, step).sum(axis=1))
        rest = squares[whole:]
    sums = np.concatenate(parts)
    powers = _sums_of_four(sums) / (4 * step) if len(sums) >= 4 else np.array([(sums.sum() + rest.sum()) / length])
    powers = powers[powers >= _GATE]
    if not len(powers):
        return -np.inf
    powers = powers[powers > powers.mean() / 10]
    return float(-0.691 + 10 * np.log10(powers.mean()))
