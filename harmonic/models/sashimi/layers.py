"""SaShiMi's residual layers: S4 and the MLP behind it (arXiv 2202.09729, section 4; S4, 2111.00396; S4D,
2206.11893)."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from harmonic.kernels import state_space
from harmonic.kernels.dense import beside
from harmonic.models.base import Params
from harmonic.models.costs import Carry, Exchange, Gathered, Halo
from harmonic.models.linear import init_linear, linear
from harmonic.models.sashimi.config import ModelConfig
from harmonic.models.u_net import Layer

_LARGEST_B = 2.0  # of the imaginary part of an initial B, as the authors clip it


def scalar_norm(params: Params, x: jax.Array) -> jax.Array:
    """(x - mean + shift) scale / std over the last axis: the authors' LayerNorm, with one number each, no epsilon."""
    mean = x.mean(-1, keepdims=True)
    centred = x - mean
    deviation = jnp.sqrt((centred * centred).mean(-1, keepdims=True))
    return (centred + beside(params["shift"], x)) * (beside(params["scale"], x) / deviation)


def _init_norm() -> Params:
    return {"shift": jnp.zeros(1), "scale": jnp.ones(1)}


def hippo(modes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """HiPPO-LegS as a diagonal matrix less p p*, half of each conjugate pair (S4, appendix C.1): (lambda, p, b)."""
    n = np.arange(2 * modes)
    p, b = np.sqrt(n + 0.5), np.sqrt(2 * n + 1)
    a = -np.tril(np.outer(b, b), -1) - np.diag(n + 1.0)
    skew = a + np.outer(p, p)  # -1/2 on the diagonal, and skew-symmetric beside it
    imaginary, basis = np.linalg.eigh(-1j * (skew + 0.5 * np.eye(2 * modes)))
    chosen = np.argsort(imaginary)[modes:]
    basis = basis[:, chosen].conj().T
    b = basis @ b
    return -0.5 + 1j * imaginary[chosen], basis @ p, b.real + 1j * np.clip(b.imag, -_LARGEST_B, _LARGEST_B)


class S4(Layer):
    """norm, the state space layer, D u, gelu, and a dense layer with or without a gate; the branch is added."""

    def __init__(self, config: ModelConfig, width: int):
        self.config, self.width, self.modes = config, width, config.state_width // 2

    def init(self, key: jax.Array) -> Params:
        """As `Layer.init`; A is -exp(A_re) + i A_im, dt is softplus(dt)."""
        config, width, modes = self.config, self.width, self.modes
        copies = 1 if config.tied else width
        keys = jax.random.split(key, 4)
        if config.ssm == "s4":
            lam, p, b = hippo(modes)
            more = {"P_re": p.real, "P_im": p.imag}
        else:  # S4D-Lin
            lam, b = -0.5 + 1j * math.pi * np.arange(modes), np.ones(modes, complex)
            more = {}
        constants = {"A_re": np.log(-lam.real), "A_im": lam.imag, "B_re": b.real, "B_im": b.imag, **more}
        shared = {n: jnp.tile(jnp.asarray(v, jnp.float32)[None], (copies, 1)) for n, v in constants.items()}
        c = jax.random.normal(keys[0], (2, width, modes)) * math.sqrt(0.5)
        log_dt = jax.random.uniform(keys[1], (width,), minval=math.log(config.min_dt), maxval=math.log(config.max_dt))
        return {
            "norm": _init_norm(),
            **shared,
            "C_re": c[0],
            "C_im": c[1],
            "dt": jnp.log(jnp.expm1(jnp.exp(log_dt))),
            "D": jax.random.normal(keys[2], (width,)),
            "output": init_linear(keys[3], width, width * (1 + config.glu)),
        }

    def prepare(self, params: Params) -> Any:
        """{"norm", "D", "output"; "tables" of a segment, "step" of a sample}."""
        shape = self.width, self.modes

        def whole(name: str) -> jax.Array:
            return jnp.broadcast_to(jax.lax.complex(params[f"{name}_re"], params[f"{name}_im"]), shape)

        a = jax.lax.complex(-jnp.exp(params["A_re"]), params["A_im"])
        a, b, c = jnp.broadcast_to(a, shape), whole("B"), whole("C")
        dt = jax.nn.softplus(params["dt"])
        if self.config.ssm == "s4":
            step: Any = state_space.LowRank.of(a, whole("P"), b, c, dt)
            tables = step.tables()
        else:
            log_a = a * dt.astype(a.dtype)[:, None]
            held = c * b * ((jnp.exp(log_a) - 1) / a)
            step, tables = state_space.Diagonal(jnp.exp(log_a), held), state_space.diagonal(log_a, held)
        return {"tables": tables, "step": step, **{name: params[name] for name in ("norm", "D", "output")}}

    def init_state(self, batch: int, dtype: Any) -> jax.Array:
        """[batch, width, state_width]."""
        return jnp.zeros((batch, self.width, 2 * self.modes), dtype)

    def apply(self, weights: Any, x: jax.Array, state: jax.Array, axis: str | None) -> tuple[jax.Array, jax.Array]:
        """As `Layer.apply`."""
        u = scalar_norm(weights["norm"], x)
        y, state = state_space.convolve(weights["tables"], u, state, axis=axis)
        return x + self._read(weights, u, y), state

    def step(self, weights: Any, x: jax.Array, state: jax.Array) -> tuple[jax.Array, jax.Array]:
        """As `Layer.step`."""
        u = scalar_norm(weights["norm"], x)
        y, state = weights["step"](u, state)
        return x + self._read(weights, u, y), state

    def _read(self, weights: Any, u: jax.Array, y: jax.Array) -> jax.Array:
        y = linear(weights["output"], jax.nn.gelu(y + u * beside(weights["D"], u), approximate=False))
        if not self.config.glu:
            return y
        value, gate = jnp.split(y, 2, axis=-1)
        return value * jax.nn.sigmoid(gate)

    def exchanges(self) -> tuple[Exchange, ...]:
        """The states between shards."""
        numbers = self.width * 2 * self.modes
        if self.config.ssm == "s4":  # all shards know the matrix that the state is multiplied by
            return (Gathered("state", numbers),)
        return Carry("state", numbers), Halo("chunk", numbers)


class FeedForward(Layer):
    """norm, a dense layer, gelu, a dense layer; the branch is added."""

    def __init__(self, config: ModelConfig, width: int):
        self.config, self.width = config, width

    def init(self, key: jax.Array) -> Params:
        """As `Layer.init`."""
        keys, inner = jax.random.split(key), self.config.ff * self.width
        return {
            "norm": _init_norm(),
            "up": init_linear(keys[0], self.width, inner),
            "down": init_linear(keys[1], inner, self.width),
        }

    def prepare(self, params: Params) -> Params:
        """The parameters as they are."""
        return params

    def init_state(self, batch: int, dtype: Any) -> Any:
        """Nothing."""
        return ()

    def apply(self, weights: Any, x: jax.Array, state: Any, axis: str | None) -> tuple[jax.Array, Any]:
        """As `Layer.apply`."""
        inner = jax.nn.gelu(linear(weights["up"], scalar_norm(weights["norm"], x)), approximate=False)
        return x + linear(weights["down"], inner), state

    def step(self, weights: Any, x: jax.Array, state: Any) -> tuple[jax.Array, Any]:
        """As `Layer.step`."""
        return self.apply(weights, x, state, None)

    def exchanges(self) -> tuple[Exchange, ...]:
        """Nothing."""
        return ()
