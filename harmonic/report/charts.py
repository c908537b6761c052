"""The geometry of what pages draw: curves and waveforms as SVG paths, which the templates put into a page.

Charts are SVG by hand, since the colours come from the page's style sheet (dark mode), lines keep their width when a
phone squeezes the picture, and the same numbers give the same bytes whatever is installed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np


class Chart:
    """A chart: shapes in a square of 1000 x 1000 that the page stretches, and labels as text over it.

    Shapes that are added first are drawn below later ones.

    Args:
      x, y: least and greatest value of the axes.
      logarithmic: the scale of the x axis, which then begins above 0.

    Attributes:
      paths: (class in the style sheet, SVG path) of each shape.
      labels: (class, position in CSS, text) of each label.
    """

    def __init__(self, x: tuple[float, float], y: tuple[float, float], *, logarithmic: bool = False):
        self._low, self._high = y
        self._scale = math.log if logarithmic else float
        self._left, self._right = map(self._scale, x)
        self.paths: list[tuple[str, str]] = []
        self.labels: list[tuple[str, str, str]] = []

    def _x(self, value: float) -> float:
        return (self._scale(value) - self._left) / (self._right - self._left)

    def _y(self, value: float) -> float:
        return (self._high - value) / (self._high - self._low)

    def axes(self, x: Iterable[float], y: Iterable[float]) -> None:
        """Labels along both axes, and a line across at each of `y`."""
        for tick in y:
            self.paths.append(("grid", f"M0 {1000 * self._y(tick):.1f}H1000"))
            self.labels.append(("y", f"top:{percent(self._y(tick))}", f"{tick:,.10g}"))
        for tick in x:
            kind = "x end" if self._x(tick) > 0.9 else "x"
            self.labels.append((kind, f"left:{percent(self._x(tick))}", f"{tick:,.10g}"))

    def baselines(self, rows: Iterable[tuple[str, float]]) -> None:
        """Labelled lines across, the highest first."""
        above = math.inf
        for label, value in rows:
            # If two lines are close, the label of the lower one is below its line.
            kind = "name below" if above - value < 0.08 * (self._high - self._low) else "name"
            self.paths.append(("base", f"M0 {1000 * self._y(value):.1f}H1000"))
            self.labels.append((kind, f"top:{percent(self._y(value))}", f"{label} {value:.3f}"))
            above = value

    def line(self, x: Iterable[float], y: Iterable[float], kind: str) -> None:
        """A line through points, in a class of the style sheet."""
        points = (f"{1000 * self._x(a):.1f},{1000 * self._y(b):.1f}" for a, b in zip(x, y, strict=True))
        self.paths.append((kind, f"M{' '.join(points)}"))

    def dots(self, x: Iterable[float], y: Iterable[float]) -> None:
        """Dots at points: lines of no length with round ends."""
        for a, b in zip(x, y, strict=True):
            self.paths.append(("dot", f"M{1000 * self._x(a):.1f} {1000 * self._y(b):.1f}h.01"))


def percent(fraction: float) -> str:
    """A share of a length, from 0 to 1, in CSS."""
    return f"{100 * min(max(fraction, 0.0), 1.0):.2f}%"


def spread(length: int, most: int) -> np.ndarray:
    """Indices of at most `most` of `length` points, evenly spread, both ends included."""
    return np.linspace(0, length - 1, min(length, most)).astype(int)


def ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers from `low` to `high`, at most `most` steps apart."""
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


WAVEFORM_COLUMNS = 240


def waveform_paths(waveform: np.ndarray, prompt: float) -> list[tuple[str, str]]:
    """The envelope of a waveform as (class, SVG path), 100 high; its first part, a share `prompt` of it, in grey."""
    starts = np.linspace(0, len(waveform), WAVEFORM_COLUMNS, endpoint=False).astype(int)
    top = 50 - 48 * np.maximum.reduceat(waveform, starts)
    bottom = np.maximum(50 - 48 * np.minimum.reduceat(waveform, starts), top + 1)
    split = round(min(prompt, 1.0) * WAVEFORM_COLUMNS)
    paths = []
    # The second part starts a column early, so that the two touch.
    for kind, part in (("given", range(split)), ("made", range(max(split - 1, 0), WAVEFORM_COLUMNS))):
        outline = [f"{i} {top[i]:.1f}" for i in part] + [f"{i} {bottom[i]:.1f}" for i in reversed(part)]
        if outline:
            paths.append((kind, f"M{'L'.join(outline)}Z"))
    return paths
