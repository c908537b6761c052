"""What a config is, told before anything is run."""

from __future__ import annotations

import math
from typing import Any

import jax

from harmonic.config import Config
from harmonic.models import HarmonicRNN


def count(tree: Any) -> int:
    """Numbers in a tree of arrays or shapes."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def describe(config: Config) -> dict[str, Any]:
    """Sizes of a config's model and batches. Nothing is allocated.

    Returns:
      {"parameters": {"total", "by_part"}, "blocks", "pooling_product", "state_bytes" (of one stream), "training"
      (samples of a window and of a step, segments)}.
    """
    model = HarmonicRNN(config.model, config.data.num_levels)
    params = jax.eval_shape(model.init, jax.random.key(0))
    by_part = {
        name: 0 for name in ("embedding", "CG-LRU", "temporal gate and output", "MLP", "norms", "pooling", "head")
    }
    for name, tree in params.items():
        if name in ("embedding", "head"):
            by_part[name] += count(tree)
        elif "pool" in name:
            by_part["pooling"] += count(tree)
        else:  # the blocks
            temporal, mlp = tree["temporal"], tree["mlp"]
            by_part["norms"] += count(temporal["norm"]) + count(mlp["norm"])
            by_part["CG-LRU"] += count(temporal["recurrence"])
            by_part["temporal gate and output"] += count(temporal["gate"]) + count(temporal["last"])
            by_part["MLP"] += count(mlp) - count(mlp["norm"])
    segments, length = config.segments
    return {
        "config": config.name,
        "parameters": {
            "total": count(params),
            "by_part": by_part,
        },
        "blocks": model.num_blocks,
        "pooling_product": config.model.pooling_product,
        "state_bytes": model.state_bytes(),
        "training": {
            "window_samples": config.training_length,
            "samples_per_step": config.training_length * config.train.global_batch_size,
            "segments": segments,
            "segment_length": length,
        },
    }
