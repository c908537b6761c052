"""A recording from its file to pieces of tokens, in memory that does not grow with its length.

The file is decoded once, to mono float samples at 16 kHz, which gives its length, minimum and maximum; the pieces of
tokens come from these samples, scaled. Trimming and loudness pass over the samples in between. A recording of more than
a few megabytes of samples goes to a scratch file.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator
from typing import BinaryIO, cast

import numpy as np

from harmonic import loudness
from harmonic.audio import no_sound
from harmonic.errors import Unreadable
from harmonic.sound.decode import check_disk, decode
from harmonic.sound.level import Extent
from harmonic.sound.resample import mono
from pipelines.audio import quantise
from pipelines.errors import scratch_errors
from pipelines.limits import SPOOL_BYTES


class _Samples:
    """The float32 samples of a recording: in memory while they are few, then in a scratch file without a name."""

    def __init__(self) -> None:
        self._blocks: list[np.ndarray] = []
        self._bytes = 0
        self._file: BinaryIO | None = None

    def append(self, block: np.ndarray) -> None:
        self._bytes += block.nbytes
        self._blocks.append(block)
        if self._bytes > SPOOL_BYTES:
            self._file = self._file or cast(BinaryIO, tempfile.TemporaryFile())
            for held in self._blocks:
                self._file.write(held.data)
            self._blocks.clear()

    def end(self) -> None:
        if self._file is not None:
            self._file.flush()  # here a full disk is reported

    def read(self, start: int, stop: int) -> np.ndarray:
        if self._file is not None:
            self._file.seek(4 * start)
            return np.frombuffer(self._file.read(4 * (stop - start)), np.float32)
        if len(self._blocks) > 1:
            self._blocks = [np.concatenate(self._blocks)]
        return self._blocks[0][start:stop]

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


@dataclasses.dataclass
class Waveform:
    """A decoded recording: float32 mono samples at 16 kHz. A context manager.

    Attributes:
      samples: all of them, also those that trimming leaves out.
      length: samples that are kept.
      low, high: the samples that are quantised as -1 and 1.
      source_rate: Hz.
      level: root mean square of the kept samples, in dB below full scale (-200 for silence).
      notes: what is not as the file says, each a clause whose subject is the file.
      cut: numbers of samples that trimming leaves out at the front and at the back.
      gain: what loudness normalisation multiplies the samples by before they are quantised on the scale of [-1, 1];
        None quantises them by their own minimum and maximum, and 0 is for a recording without sound.
    """

    samples: _Samples
    length: int
    low: float
    high: float
    source_rate: int
    level: float
    notes: tuple[str, ...] = ()
    cut: tuple[int, int] = (0, 0)
    gain: float | None = None

    def __enter__(self) -> Waveform:
        return self

    def __exit__(self, *_: object) -> None:
        self.samples.close()

    def read(self, start: int, stop: int) -> np.ndarray:
        """The kept samples [start, stop)."""
        return self.samples.read(self.cut[0] + start, self.cut[0] + stop)

    def blocks(self, size: int = loudness.BLOCK) -> Iterator[np.ndarray]:
        """The kept samples in blocks of `size`, the last one perhaps shorter."""
        for start in range(0, self.length, size):
            yield self.read(start, min(start + size, self.length))

    def pieces(self, encoding: str, num_levels: int, record_length: int) -> Iterator[tuple[int, np.ndarray]]:
        """Quantises the kept samples. Yields (offset, tokens [samples, 1]) in order."""
        return quantise.pieces(
            self.read,
            self.length,
            low=self.low,
            high=self.high,
            gain=self.gain,
            encoding=encoding,
            num_levels=num_levels,
            record_length=record_length,
        )


def measure(
    file: BinaryIO, *, trim_silence: float | None = None, loudness: float | None = None, published: bool = False
) -> Waveform:
    """Decodes an open audio file and measures it; the caller closes both.

    Args:
      file: seekable.
      trim_silence: cut off leading and trailing silence that many decibels below the loudest frame.
      loudness: bring the recording to that loudness in LUFS, on one scale for all recordings. If its peak would exceed
        full scale, the gain is as large as fits; if nothing in it is above -70 LUFS, the gain is 1.
      published: scale a recording without sound as the published data sets do, to its own extremes. Others become the
        level of 0.

    Raises:
      Unreadable: as `decode`; or there are no samples, or samples that are not finite.
      UserError: there is no room for the scratch file, or the disk of the recording fails.
    """
    try:
        with scratch_errors():
            return _measure(file, trim_silence, loudness, published)
    except (Unreadable, OSError):
        check_disk(file)
        raise


def _measure(file: BinaryIO, trim_silence: float | None, target: float | None, published: bool) -> Waveform:
    sound = decode(file)
    samples, whole = _Samples(), Extent()
    try:
        for block in mono(sound.blocks, sound.rate):
            if len(block):
                whole.add(block)
                samples.append(block)
        samples.end()
        if not whole.length:
            raise Unreadable("holds no samples")
        if whole.high - whole.low > np.finfo(np.float32).max:
            raise Unreadable(f"holds samples that are too large ({whole.low:g} to {whole.high:g})")
        waveform = Waveform(samples, whole.length, whole.low, whole.high, sound.rate, whole.level, tuple(sound.notes))
        if trim_silence is not None:
            _trim(waveform, trim_silence)
        nothing = no_sound(waveform.low, waveform.high)
        if nothing:
            waveform.notes += (nothing,)
        if nothing and not published:
            waveform.gain, waveform.low, waveform.high = 0.0, -1.0, 1.0
        elif target is not None:
            _normalise(waveform, target)
    except BaseException:
        samples.close()
        raise
    return waveform


def _trim(waveform: Waveform, decibels: float) -> None:
    start, stop = loudness.trim(waveform.blocks, waveform.length, decibels)
    if stop - start == waveform.length:
        return
    waveform.cut, waveform.length = (start, waveform.length - stop), stop - start
    kept = Extent()
    for block in waveform.blocks():
        kept.add(block)
    waveform.low, waveform.high, waveform.level = kept.low, kept.high, kept.level


def _normalise(waveform: Waveform, target: float) -> None:
    gain = loudness.gain(waveform.blocks, max(abs(waveform.low), abs(waveform.high)), target)
    waveform.gain, waveform.low, waveform.high = gain, -1 / gain, 1 / gain
