"""The formulas that JAX arrays, rows inside Pallas kernels and machine code share, each written once.

A formula runs over any `Number`, and takes the functions that are not operators from a `Math`: `gates.JaxMath`,
`pallas.cg_lru.RowMath` or `cpu.llvm.Floats`.
"""

from __future__ import annotations

from typing import Any, Generic, NamedTuple, Protocol, Self, TypeVar

import jax

Pair = tuple[jax.Array, jax.Array]
"""A complex array as (real part, imaginary part): faster on CPU than complex64, and what Pallas takes."""

LARGEST_SLOPE = 200.0
"""The bound on the derivative of the square root in sqrt(1 - |a|^2): at |a| = 1 it is infinite, and gives NaNs."""


class Number(Protocol):
    """A JAX array, or a value in machine code (`cpu.llvm.Value`)."""

    def __add__(self, other: Any, /) -> Self: ...
    def __radd__(self, other: Any, /) -> Self: ...
    def __sub__(self, other: Any, /) -> Self: ...
    def __rsub__(self, other: Any, /) -> Self: ...
    def __mul__(self, other: Any, /) -> Self: ...
    def __rmul__(self, other: Any, /) -> Self: ...
    def __truediv__(self, other: Any, /) -> Self: ...
    def __rtruediv__(self, other: Any, /) -> Self: ...
    def __neg__(self) -> Self: ...
    def __gt__(self, other: Any, /) -> Any: ...


N = TypeVar("N", bound=Number)


class Math(Protocol[N]):
    """Functions of one kind of number, elementwise."""

    def expm1(self, y: N, /) -> N:
        """exp(y) - 1 for y <= 0, without cancellation near 0."""

    def sigmoid(self, v: N, /) -> N:
        """1 / (1 + exp(-v)), to the last digits also where it is small."""

    def sqrt(self, v: N, /) -> N:
        """The square root."""

    def sincos(self, angle: N, /) -> tuple[N, N]:
        """(sine, cosine) of an angle in radians of at most 10,000."""

    def where(self, condition: Any, yes: N, no: N | float, /) -> N:
        """`yes` where the condition holds, else `no`."""


class MathWithIntegers(Math[N], Protocol):
    """What `sincos_polynomial` needs beside a `Math`."""

    def floor(self, v: N, /) -> N:
        """The greatest integer that is not above v."""

    def integers(self, v: N, /) -> Any:
        """int32s, which integers of Python can be added to, from integers in floating point."""

    def has_bit(self, integers: Any, bit: int, /) -> Any:
        """Whether the integers have that bit in two's complement: a condition for `where`."""


def multiply(a: tuple[N, N], b: tuple[N, N]) -> tuple[N, N]:
    """a * b."""
    return a[0] * b[0] - a[1] * b[1], a[0] * b[1] + a[1] * b[0]


def multiply_conjugate(a: tuple[N, N], b: tuple[N, N]) -> tuple[N, N]:
    """conj(a) * b."""
    return a[0] * b[0] + a[1] * b[1], a[0] * b[1] - a[1] * b[0]


def add(a: tuple[N, N], b: tuple[N, N]) -> tuple[N, N]:
    """a + b."""
    return a[0] + b[0], a[1] + b[1]


class Gates(NamedTuple, Generic[N]):
    """The gates of the CG-LRU, computed, and their derivative (Botev et al. 2404.07839, appendix A).

        i = sigmoid(p_i), r = sigmoid(p_r)
        log|a| = -decay r, arg a = theta r
        x = sqrt(1 - |a|^2) i z

    Attributes:
      z: the complex input.
      i, r: the input gate and the recurrence gate.
      magnitude, root: |a| and sqrt(1 - |a|^2).
      a: the recurrence's complex coefficient.
      decay, theta: the parameters; decay = 8 softplus(Lambda) >= 0, theta in radians.
    """

    z: tuple[N, N]
    i: N
    r: N
    magnitude: N
    root: N
    a: tuple[N, N]
    decay: N
    theta: N

    @staticmethod
    def compute(math: Math[N], z: tuple[N, N], p_i: N, p_r: N, decay: N, theta: N) -> Gates[N]:
        """The gates from z and p_i, p_r, the gates before their sigmoids."""
        i, r = math.sigmoid(p_i), math.sigmoid(p_r)
        # exp(y) and 1 - exp(2 y) from one expm1, without cancellation near |a| = 1.
        m = math.expm1(-decay * r)
        magnitude, root = 1.0 + m, math.sqrt(-m * (2.0 + m))
        sine, cosine = math.sincos(theta * r)
        return Gates(z, i, r, magnitude, root, (magnitude * cosine, magnitude * sine), decay, theta)

    @property
    def x(self) -> tuple[N, N]:
        """The driven input."""
        scale = self.root * self.i
        return scale * self.z[0], scale * self.z[1]

    def gradients(self, math: Math[N], da: tuple[N, N], dx: tuple[N, N]) -> tuple[N, ...]:
        """The gradients of (z re, z im, p_i, p_r, decay, theta), elementwise, from those of a and x.

        Written out, the derivative needs no second exponential or angle.
        """
        z, i, r, a, scale = self.z, self.i, self.r, self.a, self.root * self.i
        dscale = dx[0] * z[0] + dx[1] * z[1]
        # d root / d log|a| = -|a|^2 / root. The bound compares the root itself: where a gate is shut it is a zero of
        # either sign, and 1 / -0 is -inf, no large number.
        least = 0.5 / LARGEST_SLOPE
        slope = 1.0 / math.where(self.root > least, self.root, least)
        dlog = da[0] * a[0] + da[1] * a[1] - dscale * i * slope * self.magnitude * self.magnitude
        dangle = da[1] * a[0] - da[0] * a[1]
        dp_i = dscale * scale * (1.0 - i)
        dp_r = (self.theta * dangle - self.decay * dlog) * r * (1.0 - r)
        return scale * dx[0], scale * dx[1], dp_i, dp_r, -r * dlog, r * dangle


def gelu_share(math: Math[N], x: N) -> tuple[N, N]:
    """gelu(x) / x and its derivative: (1 + tanh(s)) / 2 = sigmoid(2 s), s = sqrt(2 / pi) (x + 0.044715 x^3)."""
    twice = 1.5957691216057308
    share = math.sigmoid(twice * x * (1.0 + 0.044715 * x * x))
    return share, share * (1.0 - share) * twice * (1.0 + 3 * 0.044715 * x * x)


def sincos_polynomial(math: MathWithIntegers[N], x: N) -> tuple[N, N]:
    """(sin x, cos x) in float32 to a few units in the last place for |x| up to 10,000.

    Polynomials on [-pi/4, pi/4] (Cephes) after a reduction by pi/2 in three parts (Cody and Waite).
    """
    quadrant = math.floor(x * 0.6366197723675814 + 0.5)
    y = x - quadrant * 1.5703125 - quadrant * 4.837512969970703125e-4 - quadrant * 7.549789948768648e-8
    y2 = y * y
    sine = y + y * y2 * (-1.6666654611e-1 + y2 * (8.3321608736e-3 + y2 * -1.9515295891e-4))
    cosine = (
        1.0 - 0.5 * y2 + y2 * y2 * (4.166664568298827e-2 + y2 * (-1.388731625493765e-3 + y2 * 2.443315711809948e-5))
    )
    number = math.integers(quadrant)
    swapped = math.has_bit(number, 1)
    sine, cosine = math.where(swapped, cosine, sine), math.where(swapped, sine, cosine)
    return math.where(math.has_bit(number, 2), -sine, sine), math.where(math.has_bit(number + 1, 2), -cosine, cosine)
