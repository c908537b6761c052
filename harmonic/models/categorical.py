"""Tokens as a categorical distribution given by logits: their likelihood, and draws."""

from __future__ import annotations

import jax
import jax.numpy as jnp

_SMALLEST = float(jnp.finfo(jnp.float32).tiny)


def log_prob(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """Log-likelihood in nats, [batch, time], of tokens [batch, time, channels] under logits [..., num_levels]."""
    tokens = tokens.astype(jnp.int32)[..., None]
    chosen = jnp.take_along_axis(logits, tokens, axis=-1)[..., 0]
    return (chosen - jax.nn.logsumexp(logits, axis=-1)).sum(-1)


def sample(
    logits: jax.Array, uniform: jax.Array, *, temperature: float | jax.Array = 1.0, top_p: float | jax.Array = 1.0
) -> jax.Array:
    """Draws tokens by inverting the cumulative distribution.

    Args:
      logits: [batch, 1, channels, num_levels].
      uniform: [batch, channels] in [0, 1).
      temperature: logits are divided by it. Like top_p, it may be traced: then other values need no other program.
      top_p: keeps the smallest set of tokens whose probabilities reach it (Holtzman et al. 1904.09751).

    Returns:
      int32 tokens [batch, channels].
    """
    temperature, top_p = _at_least(temperature), _at_least(top_p)
    logits = logits[:, 0]
    # Divided before the largest is subtracted, logits would overflow. XLA multiplies by the inverse of a constant; done
    # here, a traced temperature gives the same bits.
    below = (logits - logits.max(axis=-1, keepdims=True)) * (1 / temperature)
    probabilities = jax.nn.softmax(below, axis=-1)
    if isinstance(top_p, jax.Array):
        probabilities = jax.lax.cond(top_p < 1, _keep_likely, lambda p, _: p, probabilities, top_p)
    elif top_p < 1:
        probabilities = _keep_likely(probabilities, top_p)
    cumulative = jnp.cumsum(probabilities, axis=-1)
    threshold = uniform[..., None] * cumulative[..., -1:]
    token = (cumulative <= threshold).sum(-1)
    # Rounding may put the threshold at the very end: then the token that reached the end is taken.
    return jnp.minimum(token, (cumulative < cumulative[..., -1:]).sum(-1)).astype(jnp.int32)


def _at_least(value: float | jax.Array) -> float | jax.Array:
    """The value, or float32's smallest where that is larger: arithmetic takes what is smaller for zero."""
    return jnp.maximum(value, _SMALLEST) if isinstance(value, jax.Array) else max(value, _SMALLEST)


def _keep_likely(probabilities: jax.Array, top_p: float | jax.Array) -> jax.Array:
    # A stable sort settles ties and keeps the order of tokens; a token stays if less than top_p ranks above it.
    order = jnp.argsort(-probabilities, axis=-1, stable=True)
    ranked = jnp.take_along_axis(probabilities, order, axis=-1)
    ranked = jnp.where(jnp.cumsum(ranked, axis=-1) - ranked < top_p, ranked, 0)
    rank = jnp.argsort(order, axis=-1)
    return jnp.take_along_axis(ranked, rank, axis=-1)
