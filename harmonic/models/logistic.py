"""Tokens as a mixture of logistic distributions, cut into the tokens' cells: their likelihood.

Salimans et al. (arXiv 1701.05517, section 2.1). Token k of n is the cell from -1 + 2 k / n to -1 + 2 (k + 1) / n; the
first and the last cell reach to infinity, so the probabilities add up to 1. A component's probability of a cell with
edges a < b is sigmoid(b) - sigmoid(a) = sigmoid(b) sigmoid(-a) (1 - exp(a - b)), which loses no digit in logarithms.

Outputs are [..., 3 * components]: the weights' logits, the centres in [-1, 1], the logarithms of the scales.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from harmonic.models import categorical

# Before training: 8 levels of 256 for a step of a centre, and a scale of 2.3, as neighbouring samples of music differ.
_SHIFT, _LOG_SCALE = 1 / 16, -4.0


def around(head: jax.Array, before: jax.Array, num_levels: int) -> jax.Array:
    """Outputs whose components are around the sample before: a model that has learned nothing yet expects no change.

    Args:
      head: [..., 3 * components], a layer's numbers of about 1.
      before: [...], the token before each.
      num_levels: levels of a token.
    """
    weights, shifts, spreads = jnp.split(head, 3, axis=-1)
    centre = (2 * before.astype(head.dtype) + 1) / num_levels - 1
    return jnp.concatenate([weights, centre[..., None] + _SHIFT * shifts, spreads + _LOG_SCALE], axis=-1)


def log_prob(outputs: jax.Array, tokens: jax.Array, num_levels: int) -> jax.Array:
    """Log-likelihood in nats, [batch, time], of tokens [batch, time, channels] under outputs [batch, time, channels,
    3 * components]."""
    weights, centres, log_scales = jnp.split(outputs, 3, axis=-1)
    tokens = tokens[..., None].astype(jnp.int32)
    rate = jnp.exp(-log_scales)
    width = 2 / num_levels * rate
    low = (tokens.astype(outputs.dtype) * (2 / num_levels) - 1 - centres) * rate
    first, last = tokens == 0, tokens == num_levels - 1
    below = jnp.where(last, 0, -jax.nn.softplus(-(low + width)))  # log sigmoid of the upper edge
    above = jnp.where(first, 0, -jax.nn.softplus(low))
    between = jnp.where(first | last, 0, jnp.log(-jnp.expm1(-width)))
    inside = jax.nn.logsumexp(weights + below + above + between, axis=-1)
    return (inside - jax.nn.logsumexp(weights, axis=-1)).sum(-1)


def logits(outputs: jax.Array, num_levels: int) -> jax.Array:
    """The log-probability of each token, [..., num_levels]."""
    weights, centres, log_scales = (part[..., None] for part in jnp.split(outputs, 3, axis=-1))
    rate = jnp.exp(-log_scales)
    edges = jnp.arange(1, num_levels, dtype=outputs.dtype) * (2 / num_levels) - 1
    at = (edges.reshape((1,) * outputs.ndim + (-1,)) - centres) * rate
    below = -jax.nn.softplus(-at)  # log sigmoid; of -at it is less by at, which saves half of the exponentials
    above = below - at
    between = jnp.log(-jnp.expm1(-2 / num_levels * rate))
    cells = [below[..., :1], below[..., 1:] + above[..., :-1] + between, above[..., -1:]]
    inside = jax.nn.logsumexp(weights + jnp.concatenate(cells, axis=-1), axis=-2)
    return inside - jax.nn.logsumexp(weights, axis=-2)


def sample(
    outputs: jax.Array,
    uniform: jax.Array,
    num_levels: int,
    *,
    temperature: float | jax.Array = 1.0,
    top_p: float | jax.Array = 1.0,
) -> jax.Array:
    """As `categorical.sample`, from outputs [batch, 1, channels, 3 * components]."""
    return categorical.sample(logits(outputs, num_levels), uniform, temperature=temperature, top_p=top_p)
