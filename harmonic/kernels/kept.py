"""What the backward pass of a checkpointed block keeps beside the block's input: small, and dear to make again."""

from __future__ import annotations

import jax

CHUNK_STARTS = "chunk_starts"  # the states that enter a scan's chunks of time: a pass over all of its inputs makes them

POLICY = jax.checkpoint_policies.save_only_these_names(CHUNK_STARTS)
"""For `jax.checkpoint`."""
