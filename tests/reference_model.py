"""HarmonicRNN written down plainly, as the papers have it: one loop over time, nothing fused, nothing written out."""

import jax
import jax.numpy as jnp
import numpy as np


def logits(config, params, tokens):
    """Logits [batch, time, num_levels] of tokens [batch, time], time a multiple of the pooling product."""
    z = jnp.concatenate([jnp.full_like(tokens[:, :1], 128), tokens[:, :-1]], axis=1)
    x = embed(config, params["embedding"], z)
    number = 0

    def blocks(x, count):
        nonlocal number
        for _ in range(count):
            x = block(jax.tree.map(lambda v, i=number: v[i], params["blocks"]), x)
            number += 1
        return x

    def level(x, i):
        if i == len(config.pool_factors):
            return blocks(x, config.level_blocks[i])
        x = blocks(x, config.level_blocks[i])
        inner = level(down(params[f"down_pool_{i}"], config, x), i + 1)
        x = up(params[f"up_pool_{i}"], config, inner) + x
        return blocks(x, config.level_blocks[i])

    x = level(x, 0)
    head = params["head"]
    return dense(head["dense"], layer_norm(head["norm"], x))


def embed(config, params, z):
    if config.embedding == "learned":
        return params["table"]["embedding"][z]
    if config.embedding == "linear":
        return dense(params["dense"], 2 * z[..., None] / 256 - 1)
    half = config.width // 2
    angles = z[..., None] * np.exp(-np.log(10_000) * np.arange(half) / half)
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], -1)


def dense(params, x):
    return x @ params["kernel"] + params["bias"]


def layer_norm(params, x):
    centred = x - x.mean(-1, keepdims=True)
    return centred / jnp.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * params["scale"] + params["bias"]


def block_diagonal(params, x):
    """One small matrix after another."""
    count, inputs, _ = params["kernel"].shape
    pieces = [x[..., k * inputs : (k + 1) * inputs] @ params["kernel"][k] + params["bias"][k] for k in range(count)]
    return jnp.concatenate(pieces, -1)


def cg_lru(params, x):
    u = dense(params["input"], x)
    channels = u.shape[-1] // 2
    z = u[..., :channels] + 1j * u[..., channels:]
    i = jax.nn.sigmoid(block_diagonal(params["input_gate"], u))
    r = jax.nn.sigmoid(block_diagonal(params["recurrence_gate"], u))
    log_a = -8 * r * jax.nn.softplus(params["log_decay"])
    a = jnp.exp(log_a + 1j * params["angle"] * r)
    driven = jnp.sqrt(1 - jnp.exp(2 * log_a)) * i * z

    def step(h, inputs):
        h = inputs[0] * h + inputs[1]
        return h, h

    _, h = jax.lax.scan(step, jnp.zeros_like(z[:, 0]), (a.swapaxes(0, 1), driven.swapaxes(0, 1)))
    h = h.swapaxes(0, 1)
    return dense(params["output"], jnp.concatenate([h.real, h.imag], -1))


def block(params, x):
    temporal, mlp = params["temporal"], params["mlp"]
    n = layer_norm(temporal["norm"], x)
    x = x + dense(temporal["last"], cg_lru(temporal["recurrence"], n) * jax.nn.gelu(dense(temporal["gate"], n)))
    n = layer_norm(mlp["norm"], x)
    return x + dense(mlp["last"], dense(mlp["up"], n) * jax.nn.gelu(dense(mlp["gate"], n)))


def down(params, config, x):
    """A strided convolution in feature groups, by XLA's own."""
    factor = params["kernel"].shape[0]
    y = jax.lax.conv_general_dilated(
        x, params["kernel"], (factor,), "VALID", dimension_numbers=("NWC", "WIO", "NWC"),
        feature_group_count=config.pool_groups,
    )  # fmt: skip
    return y + params["bias"]


def up(params, config, v):
    """The input-dilated convolution, delayed by f - 1."""
    factor = params["kernel"].shape[0]
    y = jax.lax.conv_general_dilated(
        v, params["kernel"], (1,), [(factor - 1, factor - 1)], lhs_dilation=(factor,),
        dimension_numbers=("NWC", "WIO", "NWC"), feature_group_count=config.pool_groups,
    )  # fmt: skip
    y = y + params["bias"]
    return jnp.concatenate([jnp.zeros_like(y[:, : factor - 1]), y], axis=1)[:, : v.shape[1] * factor]
