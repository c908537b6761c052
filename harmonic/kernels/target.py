"""The platform that the program now being traced is for."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator

import jax

_chosen: contextvars.ContextVar[str | None] = contextvars.ContextVar("harmonic_target", default=None)


def platform() -> str:
    """cpu, gpu or tpu: what `compiling_for` says, else JAX's default device.

    Kernels ask while they are traced. `jax.lax.platform_dependent` would ask while lowering, but it traces and
    differentiates every platform's branch and joins their residuals: seconds of tracing, and zeros in memory for
    kernels that are not run.
    """
    chosen = _chosen.get()
    if chosen is not None:
        return chosen
    device = jax.config.jax_default_device  # type: ignore[attr-defined]
    return jax.default_backend() if device is None else getattr(device, "platform", device)


@contextlib.contextmanager
def compiling_for(name: str) -> Iterator[None]:
    """Makes `platform()` say `name` inside the context, to lower a program for a device that is not there.

    `jax.jit` remembers traces and does not know of this: trace a function that has not been traced before.
    """
    token = _chosen.set(name)
    try:
        yield
    finally:
        _chosen.reset(token)
