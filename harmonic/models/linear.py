"""Dense layers and tables of the peers' models, as plain dicts: {"kernel" [inputs, outputs], "bias" [outputs]}.

Their initial values are those of PyTorch's layers, with which the published models were trained: U(-b, b), where b is
1 / sqrt(inputs).
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from harmonic.kernels import dense as kernels
from harmonic.kernels.dense import beside
from harmonic.models.base import Params


def init_linear(
    key: jax.Array, inputs: int, outputs: int, *, bias: bool = True, weight_norm: bool = False, fan_in: int = 0
) -> Params:
    """A layer's parameters.

    Args:
      key: of its initial values.
      inputs, outputs: features.
      bias: whether it has one.
      weight_norm: the kernel's columns are given as directions, and their lengths as `gain` (Salimans and Kingma
        1602.07868).
      fan_in: what the initial values take for the number of inputs, where the kernel is a part of a larger one.
    """
    bound = 1 / math.sqrt(fan_in or inputs)
    keys = jax.random.split(key)
    params = {"kernel": jax.random.uniform(keys[0], (inputs, outputs), minval=-bound, maxval=bound)}
    if bias:
        params["bias"] = jax.random.uniform(keys[1], (outputs,), minval=-bound, maxval=bound)
    if weight_norm:
        params["gain"] = jnp.sqrt((params["kernel"] ** 2).sum(0))
    return params


def prepare_linear(params: Params) -> Params:
    """The layer with its weight norm, if it has one, multiplied out."""
    if "gain" not in params:
        return params
    kernel, gain = params["kernel"], params["gain"]
    length = jnp.sqrt((kernel * kernel).sum(0, keepdims=True))
    prepared = {"kernel": kernel * (gain[None] / length)}
    return prepared | ({"bias": params["bias"]} if "bias" in params else {})


def linear(weights: Params, x: jax.Array) -> jax.Array:
    """x [..., inputs] -> [..., outputs]."""
    if "bias" in weights:
        return kernels.dense(x, weights["kernel"], weights["bias"])
    return kernels.product(x, weights["kernel"])


def layer_norm(params: Params, x: jax.Array) -> jax.Array:
    """LayerNorm over the last axis, {"scale", "bias"}; RMSNorm (Zhang and Sennrich 1910.07467) without "bias"."""
    if "bias" not in params:
        square = (x * x).mean(-1, keepdims=True)
        return x * jax.lax.rsqrt(square + 1e-5) * beside(params["scale"], x)
    return kernels.normalise(x) * beside(params["scale"], x) + beside(params["bias"], x)


def init_norm(width: int, *, bias: bool = True) -> Params:
    """Parameters of `layer_norm`."""
    return {"scale": jnp.ones(width)} | ({"bias": jnp.zeros(width)} if bias else {})


def stacked(init: Any, key: jax.Array, count: int) -> Params:
    """Parameters of `count` equal layers along a leading axis."""
    return jax.vmap(init)(jax.random.split(key, count))
