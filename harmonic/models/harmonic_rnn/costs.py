"""What HarmonicRNN costs, by formula.

The operations are what the equations ask for, each level at its own rate: zeros between the gates' blocks and the
pooling's groups are not counted, and the recurrence is one pass. What a training step holds was read from compiled
programs on CPU (`memory_analysis`), over widths, levels, segments and meshes; a test holds the formula to within 25 %.
"""

from __future__ import annotations

import math
from typing import Any

from harmonic.models.costs import Carry, Costs, Exchange, Halo, count, rounded
from harmonic.models.harmonic_rnn.config import ModelConfig


def costs(config: ModelConfig, num_levels: int, params: Any, segments: int = 1) -> Costs:
    """The model's costs.

    Args:
      config: its sizes.
      num_levels: levels of a token.
      params: the parameters' shapes.
      segments: that a training window is cut into.
    """
    num_blocks = params["blocks"]["temporal"]["norm"]["scale"].shape[0]
    blocks, pools = _rates(config)
    # A training step keeps each block's input and each level's skip; at the outermost rate the most is held at once.
    in_a_block = 7.5 * config.state_width / 2 + 17.5 * config.width
    if config.level_blocks[0] == 1 and config.pool_factors and segments == 1:
        in_a_block *= 1.75  # XLA makes no loop of a single block, and holds much of both passes at once
    kept = (blocks + sum(pools)) * config.width + max(in_a_block, 2.2 * config.outputs(num_levels) + 6 * config.width)
    return Costs(
        by_part=_by_part(params),
        blocks=num_blocks,
        operations=_operations(config, num_levels, segments > 1),
        weights_read=_weights_read(config, num_levels, params),
        kept=kept,
        exchanges=_exchanges(config, num_blocks),
    )


def _by_part(params: Any) -> dict[str, int]:
    temporal, mlp = params["blocks"]["temporal"], params["blocks"]["mlp"]
    return {
        "embedding": count(params["embedding"]),
        "CG-LRU": count(temporal["recurrence"]),
        "temporal gate and output": count(temporal["gate"]) + count(temporal["last"]),
        "MLP": count(mlp) - count(mlp["norm"]),
        "norms": count(temporal["norm"]) + count(mlp["norm"]),
        "pooling": sum(count(tree) for name, tree in params.items() if "pool" in name),
        "head": count(params["head"]),
    }


def _rates(config: ModelConfig) -> tuple[float, list[float]]:
    """Blocks a sample, over all levels at their own rates; and the rate of each level that is pooled, from 1 down."""
    rates = [1 / math.prod(config.pool_factors[:level]) for level in range(len(config.level_blocks))]
    passes = [2] * len(config.pool_factors) + [1]  # down and up, but for the innermost
    return sum(p * n * rate for p, n, rate in zip(passes, config.level_blocks, rates, strict=True)), rates[:-1]


def _operations(config: ModelConfig, levels: int, several: bool) -> dict[str, dict[str, int]]:
    """{"forward", "training", "generation"}, each {"dense" (with gates and head), "pooling", "recurrence",
    "elementwise", "total"}.

    In training, blocks but for their last layer are made again for the backward pass, and with several segments
    everything once more; the backward pass itself takes twice a forward's. The update, once a step, is not counted.
    """
    width, state, channels = config.width, config.state_width, config.state_width // 2
    blocks, pools = _rates(config)
    # Temporal: in, the two gates, out, gate, last. MLP: up, gate, last.
    temporal = width * state + 2 * state * channels // config.gate_blocks + state * width + 2 * width * width
    in_blocks = {
        "dense": blocks * 2 * (temporal + 6 * width * width),
        "recurrence": blocks * 8 * channels,
        # A feature: two norms of 7, three gelus of 9, three products with them, two sums. A channel: two sigmoids of 3,
        # log a and a 6, sqrt(1 - |a|^2) 3, times i and z 3.
        "elementwise": blocks * (46 * width + 18 * channels),
    }
    linear, sinusoidal = config.embedding == "linear", config.embedding == "sinusoidal"
    outside = {
        "dense": 2 * width * (config.outputs(levels) + linear),
        "pooling": 2 * 2 * width * (width // config.pool_groups) * sum(pools),  # down and up, for each input sample
        "elementwise": (7 + 1.5 * sinusoidal + sum(pools)) * width,  # the last norm, the embedding, skip connections
    }

    def total(runs: float, runs_outside: float, **more: float) -> dict[str, int]:
        kinds = ("dense", "pooling", "recurrence", "elementwise")
        counts = {k: runs * in_blocks.get(k, 0) + runs_outside * outside.get(k, 0) + more.get(k, 0) for k in kinds}
        return rounded(counts)

    forwards = 2 + several
    last = blocks * 2 * 2 * width * width
    masks = 10 * 2 * width * blocks * (config.dropout > 0)  # a hash and a choice for every feature of two branches
    # A softmax takes 3 for a level; its gradient, as a draw by the cumulative sum, 3 more. A component of a mixture
    # takes some 24 for one cell, as much for its gradient, and for a draw 24 for each level.
    mixture = 24 * config.components * (config.head == "logistic")
    softmax = 6 * levels * (not mixture)
    return {
        "forward": total(1, 1),
        "training": total(
            forwards + 2, forwards + 1, dense=-last, elementwise=forwards * masks + softmax + 2 * mixture
        ),
        "generation": total(1, 1, elementwise=6 * levels + mixture * levels),
    }


def _weights_read(config: ModelConfig, levels: int, params: Any) -> float:
    """Every step reads the outermost level's weights, and an inner level's when it runs."""
    blocks, pools = _rates(config)
    read = blocks * count(params["blocks"]) / params["blocks"]["temporal"]["norm"]["scale"].shape[0]
    read += count(params["head"])
    for level, (rate, factor) in enumerate(zip(pools, config.pool_factors, strict=True)):
        read += rate / factor * (count(params[f"down_pool_{level}"]) + count(params[f"up_pool_{level}"]))
    # Of a learned embedding one row is read, of a linear one all.
    embedding = count(params["embedding"])
    return read + (embedding / levels if config.embedding == "learned" else embedding)


def _exchanges(config: ModelConfig, blocks: int) -> tuple[Exchange, ...]:
    edges = [
        Halo(f"pool_edge_{level}", (factor - 1) * config.width) for level, factor in enumerate(config.pool_factors)
    ]
    return Carry("layer", config.state_width, times=blocks), Halo("token_edge", 1, differentiated=False), *edges
