"""What the report draws: curves and waveforms as inline SVG, spectrograms as PNG."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable

import numpy as np

from harmonic import spectrogram


class Chart:
    """A chart: lines in inline SVG, stretched to whatever room there is, and their labels as text above it.

    What is drawn first lies below. Labels are plain text that the caller answers for.

    Args:
      x, y: least and greatest value of the axes.
      logarithmic: of the x axis, which then begins above 0.
    """

    def __init__(self, x: tuple[float, float], y: tuple[float, float], *, logarithmic: bool = False):
        self._low, self._high = y
        self._scale = math.log if logarithmic else float
        self._left, self._right = map(self._scale, x)
        self._shapes = self._labels = ""

    def _x(self, value: float) -> float:
        return (self._scale(value) - self._left) / (self._right - self._left)

    def _y(self, value: float) -> float:
        return (self._high - value) / (self._high - self._low)

    def axes(self, x: Iterable[float], y: Iterable[float]) -> None:
        """Labels along both axes, and a line across at each of `y`."""
        for tick in y:
            self._shapes += f'<path class="grid" d="M0 {1000 * self._y(tick):.1f}H1000"/>\n'
            self._labels += f'<span class="y" style="top:{percent(self._y(tick))}">{tick:,.10g}</span>\n'
        for tick in x:
            kind = "x end" if self._x(tick) > 0.9 else "x"
            self._labels += f'<span class="{kind}" style="left:{percent(self._x(tick))}">{tick:,.10g}</span>\n'

    def levels(self, levels: Iterable[tuple[str, float]]) -> None:
        """Labelled lines across, the highest first."""
        above = math.inf
        for label, level in levels:
            # Of two levels that are close, the lower one's label hangs below its line.
            kind = "name below" if above - level < 0.08 * (self._high - self._low) else "name"
            self._shapes += f'<path class="base" d="M0 {1000 * self._y(level):.1f}H1000"/>\n'
            self._labels += f'<span class="{kind}" style="top:{percent(self._y(level))}">{label} {level:.3f}</span>\n'
            above = level

    def line(self, x: Iterable[float], y: Iterable[float], kind: str) -> None:
        """A line through points, of a class of the style sheet."""
        points = " ".join(f"{1000 * self._x(a):.1f},{1000 * self._y(b):.1f}" for a, b in zip(x, y, strict=True))
        self._shapes += f'<polyline class="{kind}" points="{points}"/>\n'

    def dots(self, x: Iterable[float], y: Iterable[float]) -> None:
        """Dots at points."""
        for a, b in zip(x, y, strict=True):
            self._shapes += f'<path class="dot" d="M{1000 * self._x(a):.1f} {1000 * self._y(b):.1f}h.01"/>\n'

    def html(self, meaning: str, x_unit: str) -> str:
        """The chart; `meaning` is what is read aloud."""
        return (
            '<p class="unit">bits per sample</p>\n'
            '<div class="chart"><svg viewBox="0 0 1000 1000" preserveAspectRatio="none" role="img" '
            f'aria-label="{meaning}">\n{self._shapes}</svg>\n'
            f'{self._labels}</div>\n<p class="unit right">{x_unit}</p>\n'
        )


def percent(fraction: float) -> str:
    """A share of a length, from 0 to 1, in CSS."""
    return f"{100 * min(max(fraction, 0.0), 1.0):.2f}%"


def spread(length: int, most: int) -> np.ndarray:
    """Indices of at most `most` of `length` points, evenly spread, both ends included."""
    return np.linspace(0, length - 1, min(length, most)).astype(int)


def ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers from `low` to `high`, `most` steps apart at most."""
    magnitude = 10.0 ** math.floor(math.log10((high - low) / most))
    step = next(m * magnitude for m in (1, 2, 5, 10) if (high - low) / (m * magnitude) <= most)
    return [n * step for n in range(math.ceil(low / step), math.floor(high / step) + 1)]


def smooth(values: np.ndarray) -> np.ndarray:
    """A moving average over an eighth of a curve; shorter at its start, where the loss falls."""
    index = np.arange(len(values))
    half = np.minimum(max(1, len(values) // 16), index // 2)
    first, last = index - half, np.minimum(index + half + 1, len(values))
    total = np.concatenate([[0.0], np.cumsum(values)])
    return (total[last] - total[first]) / (last - first)


def waveform_svg(waveform: np.ndarray, prompt: float, columns: int = 240) -> str:
    """The envelope of a waveform as inline SVG; its first part, the prompt's, in grey."""
    starts = np.linspace(0, len(waveform), columns, endpoint=False).astype(int)
    top = 50 - 48 * np.maximum.reduceat(waveform, starts)
    bottom = np.maximum(50 - 48 * np.minimum.reduceat(waveform, starts), top + 1)
    split = round(min(prompt, 1.0) * columns)
    paths = ""
    # The second part starts a column early, so that the two touch.
    for kind, part in (("given", range(split)), ("made", range(max(split - 1, 0), columns))):
        outline = [f"{i} {top[i]:.1f}" for i in part]
        outline += [f"{i} {bottom[i]:.1f}" for i in reversed(part)]
        paths += f'<path class="{kind}" d="M{"L".join(outline)}Z"/>' if outline else ""
    return (
        f'<svg viewBox="0 0 {columns - 1} 100" preserveAspectRatio="none" role="img" '
        f'aria-label="Waveform">{paths}</svg>'
    )


def spectrogram_png(waveform: np.ndarray, sample_rate: int, columns: int = 400) -> str:
    """A log-mel spectrogram, at most `columns` pixels wide, as a PNG in base64."""
    return base64.b64encode(spectrogram.png(spectrogram.picture(waveform, sample_rate, columns))).decode()
