"""Linear scans, gates and single steps: the public doors.

    h, h_last = linear_scan(x, a, h0)               # h_t = a_t h_{t-1} + x_t, complex, over time
    h, h_last = cg_lru(u, bias, decay, theta, h0)   # the same, with a_t and x_t computed from the gates in u + bias
    y = gated_gelu(x, x_bias, gate, gate_bias)      # (x + x_bias) gelu(gate + gate_bias)

    step = block_step(width, channels, dtype)       # a stack of residual blocks for one sample:
    packed, h = step.pack(blocks), step.unstack(h)  #   weights and states as the step reads them, once before a loop
    x, h = step.run(packed, x, h)                   #   the loop's body
    h = step.stack(h)                               #   the inverse of `unstack`, once after the loop
    with step.helper(): ...                         #   a thread of an idle core helps while the context lasts

Every door takes `implementation`, one of `IMPLEMENTATIONS`: `auto` picks by platform, and a door for which the named
kernel has no code of its own takes the plain form. Complex arrays are pairs of real ones (`Pair`), or real and
imaginary parts side by side. README.md says how a kernel is called, tested, debugged and added.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from harmonic.errors import UserError
from harmonic.kernels import associative, chunked, gates, plain_step, reference
from harmonic.kernels.arithmetic import Pair
from harmonic.kernels.cpu import ffi
from harmonic.kernels.cpu import ops as cpu_ops
from harmonic.kernels.cpu import step as cpu_step
from harmonic.kernels.dense import add_bias, widen
from harmonic.kernels.plain_step import BlockWeights
from harmonic.kernels.target import platform

__all__ = ["IMPLEMENTATIONS", "BlockStep", "Pair", "block_step", "cg_lru", "gated_gelu", "linear_scan", "pick"]


class Kernel(NamedTuple):
    """A row of the table of implementations.

    Attributes:
      load: gives a module with `linear_scan` and, where it has code for them, `cg_lru` and `gated_gelu`.
      platforms: where it runs.
      obstacle: gives the reason why it does not run there all the same, or None.
      sharded: whether it takes a sequence that is sharded over a mesh axis.
      mixed: whether it takes inputs narrower than the state (bfloat16 beside float32); if not, the doors widen them.
    """

    load: Callable[[], Any]
    platforms: tuple[str, ...] = ("cpu", "gpu", "tpu")
    obstacle: Callable[[], str | None] = lambda: None
    sharded: bool = True
    mixed: bool = False


def _pallas_gpu() -> Any:
    from harmonic.kernels.pallas import gpu  # not at the top: importing Pallas takes half a second

    return gpu


def _pallas_tpu() -> Any:
    from harmonic.kernels.pallas import tpu

    return tpu


KERNELS = {
    "reference": Kernel(lambda: reference, sharded=False),
    "associative": Kernel(lambda: associative, sharded=False),
    "chunked": Kernel(lambda: chunked),
    "native": Kernel(lambda: cpu_ops, platforms=("cpu",), obstacle=ffi.obstacle),
    # On CPU, Pallas' interpreter runs them, slowly.
    "pallas_gpu": Kernel(_pallas_gpu, platforms=("cpu", "gpu"), mixed=True),
    "pallas_tpu": Kernel(_pallas_tpu, platforms=("cpu", "tpu"), mixed=True),
}
IMPLEMENTATIONS = ("auto", *KERNELS)


def linear_scan(
    x: Pair, a: Pair, h0: Pair, *, axis: str | None = None, implementation: str = "auto"
) -> tuple[Pair, Pair]:
    """The first-order linear recurrence h_t = a_t h_{t-1} + x_t (De et al. 2402.19427, section 2.4).

    Args:
      x, a: [batch, time, channels] of bfloat16, float32 or float64.
      h0: [batch, channels], the state before the first step, in the precision that the state is kept in.
      axis: inside `jax.shard_map`, the mesh axis over which time is cut; h0 must be the same on all its shards.
      implementation: `auto` picks by platform and length; the Pallas ones are interpreted (slowly) on CPU.

    Returns:
      (h [batch, time, channels] of x's type, h_last [batch, channels] of h0's type, the state after the last step of
      the whole sequence).

    Raises:
      ValueError: shapes that do not fit.
      UserError: as of `pick`.
    """
    shape = x[0].shape
    _check({v.shape for v in (*x, *a)} == {shape}, h0, shape, f"x, a {shape}, {a[0].shape}")
    kernel = KERNELS[pick(implementation, shape[1], axis)]
    dtype = x[0].dtype
    if not kernel.mixed:
        x, a = _cast((x, a), h0[0].dtype)
    h, h_last = kernel.load().linear_scan(x, a, h0, axis)
    return _cast(h, dtype), h_last


def cg_lru(
    u: jax.Array,
    bias: jax.Array,
    decay: jax.Array,
    theta: jax.Array,
    h0: Pair,
    *,
    axis: str | None = None,
    implementation: str = "auto",
) -> tuple[jax.Array, Pair]:
    """The recurrence of the complex-gated linear recurrent unit (De et al. 2402.19427; Botev et al. 2404.07839).

    i = sigmoid(p_i), r = sigmoid(p_r); log|a| = -decay r, arg a = theta r
    h_t = a_t h_{t-1} + sqrt(1 - |a_t|^2) i_t z_t

    One kernel computes the gates and the scan, and one their gradients: machine code on CPU (`native`), Pallas on GPU
    and TPU (`pallas.scan` counts the passes over memory). The other implementations compute the gates beside
    `linear_scan`.

    Args:
      u: [batch, time, 4 channels], side by side Re z, Im z, p_i, p_r, less `bias`; the gates p before their sigmoids.
      bias: [4 channels], added to u.
      decay, theta: [channels]; decay >= 0, theta in radians.
      h0: [batch, channels], the state before the first step, in the precision that the state is kept in.
      axis, implementation: as for `linear_scan`.

    Returns:
      (h [batch, time, 2 channels] of u's type, Re and Im side by side; h_last [batch, channels] of h0's type). The
      derivative of the square root is held to at most 200: at |a| = 1 the true one is infinite.

    Raises:
      ValueError: shapes that do not fit.
      UserError: as of `pick`.
    """
    channels = decay.shape[0]
    shape = (*u.shape[:2], channels)
    fit = u.shape[2:] == bias.shape == (4 * channels,) and theta.shape == decay.shape
    _check(fit, h0, shape, f"u, bias, decay, theta {u.shape}, {bias.shape}, {decay.shape}, {theta.shape}")
    kernel = KERNELS[pick(implementation, shape[1], axis)]
    module, dtype, wide = kernel.load(), u.dtype, h0[0].dtype
    if hasattr(module, "cg_lru"):
        args = (u, bias, decay, theta)
        h, h_last = module.cg_lru(*(args if kernel.mixed else _cast(args, wide)), h0, axis)
    else:
        z_re, z_im, p_i, p_r = _cast(jnp.split(add_bias(u, bias), 4, axis=-1), wide)
        a, x = gates.recurrence((z_re, z_im), (p_i, p_r), *_cast((decay, theta), wide))
        pair, h_last = module.linear_scan(x, a, h0, axis)
        h = jnp.concatenate(pair, axis=-1)
    return h.astype(dtype), h_last


def gated_gelu(
    x: jax.Array, x_bias: jax.Array, gate: jax.Array, gate_bias: jax.Array, *, implementation: str = "auto"
) -> jax.Array:
    """(x + x_bias) gelu(gate + gate_bias), gelu by its tanh form (Hendrycks and Gimpel 1606.08415, section 2).

    Args:
      x, gate: [batch, time, width].
      x_bias, gate_bias: [width].
      implementation: as for `linear_scan`.
    """
    module = KERNELS[pick(implementation)].load()
    if hasattr(module, "gated_gelu"):
        wide = widen(x)
        return module.gated_gelu(wide, *_cast((x_bias, gate, gate_bias), wide.dtype)).astype(x.dtype)
    return add_bias(x, x_bias) * gates.gelu(add_bias(gate, gate_bias))


class BlockStep(Protocol):
    """A stack of residual blocks for one sample (`plain_step.BlockWeights` is a block's parameters).

    `pack` and `unstack` cost a copy: call them once before a loop over samples, under the same `jit`.
    """

    def pack(self, blocks: BlockWeights, /) -> Any:
        """Weights along a leading axis [blocks, ...], as `run` reads them: a pytree of arrays."""

    def unstack(self, h: Pair, /) -> Any:
        """States, complex [blocks, batch, channels], as `run` takes and returns them: a pytree of arrays."""

    def stack(self, h: Any, /) -> Pair:
        """The inverse of `unstack`."""

    def run(self, packed: Any, x: jax.Array, h: Any, /) -> tuple[jax.Array, Any]:
        """x [batch, width] through the blocks, one after the other -> (x, h)."""

    def helper(self) -> AbstractContextManager[None]:
        """Lets a thread on an otherwise idle core do half of the work of `run`, as long as the context lasts.

        It keeps that core busy. Of an implementation that has no use for a helper, it does nothing.
        """


def block_step(width: int, channels: int, dtype: Any, *, implementation: str = "auto") -> BlockStep:
    """How to run a stack of HarmonicRNN's blocks for one sample: the inner loop of generation.

    Args:
      width: of the residual stream.
      channels: complex channels of a block's state.
      dtype: of weights and states.
      implementation: `native`, which `auto` picks on CPU, is machine code where the sizes fit; all others are the plain
        step (`plain_step`).

    Raises:
      UserError: as of `pick`.
    """
    step = {"native": cpu_step}.get(pick(implementation))
    return step if step is not None and step.fits(width, channels, dtype) else plain_step


def pick(implementation: str, time: int | None = None, axis: str | None = None) -> str:
    """The row of `KERNELS` that `implementation`, perhaps `auto`, means here.

    Args:
      time, axis: of a scan: its length, and the mesh axis over which it is cut.

    Raises:
      UserError: an implementation that is unknown, does not run on this platform, or does not take a sharded sequence.
        The name may come from a config.
    """
    here = platform()
    if implementation == "auto":
        if time == 1 and axis is None:
            return "associative"
        return {"gpu": "pallas_gpu", "tpu": "pallas_tpu"}.get(here) or _for_cpu(KERNELS["native"].obstacle())
    if implementation not in KERNELS:
        names = ", ".join(("auto", *KERNELS))
        raise UserError(f"there is no kernel implementation {implementation!r}: use one of {names}")
    kernel = KERNELS[implementation]
    reason = kernel.obstacle() if here in kernel.platforms else f"it is for {', '.join(kernel.platforms)}"
    if reason is not None:
        others = (name for name, row in KERNELS.items() if here in row.platforms and row.obstacle() is None)
        names = ", ".join(("auto", *others))
        raise UserError(
            f"kernel implementation {implementation!r} does not run here, on {here} ({reason}): use {names}"
        )
    if axis is not None and not kernel.sharded:
        raise UserError(f"kernel implementation {implementation!r} does not take a sharded sequence: use auto")
    return implementation


@functools.cache
def _for_cpu(obstacle: str | None) -> str:
    """`native`; where there is an obstacle to machine code `chunked`, and one line that says so, once."""
    if obstacle is None:
        return "native"
    logging.getLogger(__name__).warning("machine code is off, and kernels are several times slower: %s", obstacle)
    return "chunked"


def _check(fit: bool, h0: Pair, shape: tuple[int, ...], what: str) -> None:
    if not fit or {v.shape for v in h0} != {(shape[0], shape[2])}:
        raise ValueError(f"{what} and h0 {h0[0].shape} do not fit")


def _cast(tree: Any, dtype: Any) -> Any:
    return jax.tree.map(lambda v: v.astype(dtype), tree)
