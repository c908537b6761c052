"""What a config is, told before anything is run."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax

from harmonic import program
from harmonic.config import Config, ModelConfig
from harmonic.models import HarmonicRNN

_NUMBER = 4  # bytes of a float32 and of a token that is sent
_STREAMS = (1, 8, 32, 1_024)  # generated side by side


def count(tree: Any) -> int:
    """Numbers in a tree of arrays or shapes."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def describe(
    config: Config, *, device_bytes: int = 16 << 30, device_flops: float = math.inf, device_bandwidth: float = math.inf
) -> dict[str, Any]:
    """Sizes of a config's model and batches, and what they cost. Nothing is allocated.

    Args:
      config: of a run.
      device_bytes: memory of one device, for what fits.
      device_flops, device_bandwidth: operations and bytes a second of one device, for its bounds.

    Returns:
      {"parameters": {"total", "by_part"}, "blocks", "pooling_product", "state_bytes" (of one stream), "training"
      (samples of a window and of a step, segments), "operations" (as `operations` gives them), "weight_bytes" (as
      `weight_bytes` does), "bounds" (as `bounds` does), "memory" (as `memory` does), "fits" (as `fits` does),
      "communication" (as `communication` does)}.
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
        "operations": operations(config),
        "weight_bytes": weight_bytes(config),
        "bounds": bounds(config, device_flops, device_bandwidth),
        "memory": memory(config),
        "fits": fits(config, device_bytes),
        "communication": communication(config),
    }


def _rates(model: ModelConfig) -> tuple[float, list[float]]:
    """Blocks a sample, over all levels at their own rates; and the rate of each level that is pooled, from 1 down."""
    rates = [1 / math.prod(model.pool_factors[:level]) for level in range(len(model.level_blocks))]
    passes = [2] * len(model.pool_factors) + [1]  # down and up, but for the innermost
    return sum(p * n * rate for p, n, rate in zip(passes, model.level_blocks, rates, strict=True)), rates[:-1]


def operations(config: Config) -> dict[str, dict[str, int]]:
    """Operations for one sample, by formula: what the model's equations ask for, each level at its own rate.

    An addition, a multiplication, a comparison and an elementary function count one each. Zeros between the gates'
    blocks and the pooling's groups are not counted, and the recurrence is one pass.

    Returns:
      {"forward" (up to the logits), "training", "generation"}, each {"dense" (with gates and head), "pooling",
      "recurrence", "elementwise", "total"}. In training, blocks but for their last layer are made again for the
      backward pass, and with several segments everything once more; the backward pass itself takes twice a forward's.
      The update, once a step, is not counted.
    """
    model, levels, several = config.model, config.data.num_levels, config.segments[0] > 1
    width, state, channels = model.width, model.state_width, model.state_width // 2
    blocks, pools = _rates(model)
    # Temporal: in, the two gates, out, gate, last. MLP: up, gate, last.
    temporal = width * state + 2 * state * channels // model.gate_blocks + state * width + 2 * width * width
    in_blocks = {
        "dense": blocks * 2 * (temporal + 6 * width * width),
        "recurrence": blocks * 8 * channels,
        # A feature: two norms of 7, three gelus of 9, three products with them, two sums. A channel: two sigmoids of 3,
        # log a and a 6, sqrt(1 - |a|^2) 3, times i and z 3.
        "elementwise": blocks * (46 * width + 18 * channels),
    }
    linear, sinusoidal = model.embedding == "linear", model.embedding == "sinusoidal"
    outside = {
        "dense": 2 * width * (levels + linear),
        "pooling": 2 * 2 * width * (width // model.pool_groups) * sum(pools),  # down and up, for each input sample
        "elementwise": (7 + 1.5 * sinusoidal + sum(pools)) * width,  # the last norm, the embedding, skip connections
    }

    def total(runs: float, runs_outside: float, **more: float) -> dict[str, int]:
        kinds = ("dense", "pooling", "recurrence", "elementwise")
        counts = {k: runs * in_blocks.get(k, 0) + runs_outside * outside.get(k, 0) + more.get(k, 0) for k in kinds}
        return {**{kind: round(n) for kind, n in counts.items()}, "total": round(sum(counts.values()))}

    forwards = 2 + several
    last = blocks * 2 * 2 * width * width
    masks = 10 * 2 * width * blocks * (model.dropout > 0)  # a hash and a choice for every feature of two branches
    # A softmax takes 3 for a level; its gradient, as a draw by the cumulative sum, 3 more.
    return {
        "forward": total(1, 1),
        "training": total(forwards + 2, forwards + 1, dense=-last, elementwise=forwards * masks + 6 * levels),
        "generation": total(1, 1, elementwise=6 * levels),
    }


def weight_bytes(config: Config) -> dict[str, int]:
    """Bytes of weights that are read for a generated sample of one stream, by the number of streams side by side.

    Every step reads the outermost level's weights, and an inner level's when it runs; all streams share them.
    """
    params = jax.eval_shape(HarmonicRNN(config.model, config.data.num_levels).init, jax.random.key(0))
    blocks, pools = _rates(config.model)
    read = blocks * count(params["blocks"]) / params["blocks"]["temporal"]["norm"]["scale"].shape[0]
    read += count(params["head"])
    for level, (rate, factor) in enumerate(zip(pools, config.model.pool_factors, strict=True)):
        read += rate / factor * (count(params[f"down_pool_{level}"]) + count(params[f"up_pool_{level}"]))
    # Of a learned embedding one row is read, of a linear one all.
    embedding = count(params["embedding"])
    read += embedding / config.data.num_levels if config.model.embedding == "learned" else embedding
    return {str(streams): round(read * _NUMBER / streams) for streams in _STREAMS}


def bounds(config: Config, flops: float, bandwidth: float) -> dict[str, Any]:
    """Samples a second that one device cannot exceed, by `operations` and `weight_bytes`.

    Args:
      flops, bandwidth: of the device, operations and bytes a second; infinite for what is not known.

    Returns:
      {"training" (only with `flops`), "generation" (over all streams, by their number: limited by operations or by the
      reading of weights, whichever takes longer), and what was given}; nothing where nothing is known.
    """
    needed, read = operations(config), weight_bytes(config)
    found: dict[str, Any] = {}
    if flops < math.inf:
        found |= {"device_flops": flops, "training": round(flops / needed["training"]["total"])}
    if bandwidth < math.inf:
        found["device_bandwidth"] = bandwidth
    if found:
        compute = needed["generation"]["total"] / flops
        found["generation"] = {n: round(1 / max(compute, size / bandwidth)) for n, size in read.items()}
    return found


def memory(config: Config) -> dict[str, int]:
    """Bytes that one device holds in a training step, by formula.

    The counts of arrays were read from compiled programs on CPU (`memory_analysis`), over widths, levels, segments and
    meshes; a test holds the formula to within 25 % of such programs. What the process itself takes, a gigabyte or
    more, is not in it.

    Returns:
      {"weights" (parameters and their average), "optimizer", "batch" (the tokens), "gradients" (with the copies of the
      weights that are made for a step), "activations" (of one segment), "states" (kept between segments), "total"}.
    """
    model = HarmonicRNN(config.model, config.data.num_levels)
    weights = count(jax.eval_shape(model.init, jax.random.key(0))) * _NUMBER
    (segments, length), width, train = config.segments, config.model.width, config.train
    rows = train.global_batch_size // config.mesh.data
    at_once = rows // train.accumulate * length // config.mesh.seq
    # Kept of each block is its input, and of each level the skip; at the outermost rate the most is alive.
    blocks, pools = _rates(config.model)
    kept = blocks + sum(pools)
    block = 7.5 * config.model.state_width / 2 + 17.5 * width
    alive = kept * width + max(block, 2.2 * config.data.num_levels + 6 * width)
    parts = {
        "weights": 2 * weights,
        "optimizer": 2 * weights,
        "batch": rows * segments * length // config.mesh.seq * (1 if config.data.num_levels <= 256 else 2),
        "gradients": round((4.1 + 1.9 * (segments > 1) + (train.accumulate > 1)) * weights),
        "activations": round(alive * _NUMBER * at_once),
        "states": (segments > 1) * segments * model.state_bytes(rows // train.accumulate),
    }
    return {**parts, "total": sum(parts.values())}


def fits(config: Config, device_bytes: int) -> dict[str, int]:
    """What a device of `device_bytes` holds with the rest of the config as it is, by `memory`.

    Returns:
      {"device_bytes", "longest_segment" (samples held at once), "longest_window" (in segments of the config's
      `train.segment_length`, or whole without one), "largest_batch" (over all devices)}; 0 where nothing fits.
    """
    unit = config.model.pooling_product * config.mesh.seq

    def longest(**train: Any) -> int:
        def fitting(units: int) -> bool:
            data = dataclasses.replace(config.data, window_length=units * unit, crop_length=0)
            changed = dataclasses.replace(config, data=data, train=dataclasses.replace(config.train, **train))
            return memory(changed)["total"] <= device_bytes

        return unit * _most(fitting)

    def batch_fits(parts: int) -> bool:
        train = dataclasses.replace(config.train, global_batch_size=parts * step)
        return memory(dataclasses.replace(config, train=train))["total"] <= device_bytes

    step = config.mesh.data * config.train.accumulate
    return {
        "device_bytes": device_bytes,
        "longest_segment": longest(segment_length=0),
        "longest_window": longest(),
        "largest_batch": step * _most(batch_fits),
    }


def _most(fitting: Callable[[int], bool], limit: int = 1 << 40) -> int:
    """The largest number up to `limit` that fits, where all smaller ones do; 0 if not even one does."""
    low, high = 0, 1
    while high < limit and fitting(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fitting(middle) else (low, middle)
    return low


def communication(config: Config) -> dict[str, Any]:
    """Bytes that one device sends in a training step on the config's mesh, by formula; counted as
    `program.Collective.sent_bytes` does. None of them depends on the length of a segment.

    What is sent forward is sent again where the backward pass makes activations anew: in each block, and with several
    segments in each segment. Only between segments does a state have to be told to all shards.

    Returns:
      {"layer" (each CG-LRU), "token_edge", "pool_edge_<i>" (from the outermost): each {"forward", "backward"} for one
      segment; "layers", "edges" and "segment": sums of these over the model, for one segment; "gradients": the sum of
      the loss and the weights' gradients, and the number of samples, once a step; "step": all of a step}.
    """
    model, shards, segments = config.model, config.mesh.seq, config.segments[0]
    rows, several = config.train.global_batch_size // config.mesh.data, segments > 1

    def broadcast(size: int, among: int = shards) -> int:
        return -(-2 * (among - 1) * size // among)

    def edge(size: int, carry: bool) -> dict[str, int]:
        """A halo of `size` bytes; `carry`: its transposes are sent too, which tokens have none of."""
        if shards == 1:
            return {"forward": 0, "backward": 0}
        last = broadcast(size) if several else 0
        return {"forward": size + last, "backward": size * several + (size + last) * carry}

    state = 2 * rows * (model.state_width // 2) * _NUMBER
    gathered = (shards - 1) * 2 * state  # of a map: its product, and the state it leaves
    last = broadcast(state) if several else 0
    # What the backward pass gathers: again what the forward pass did, and the gradients, without the products.
    layer = {"forward": gathered, "backward": gathered * (1 + several) + gathered // 2 + last}
    edges = {"token_edge": edge(rows * _NUMBER, carry=False)}
    for level, factor in enumerate(model.pool_factors):
        edges[f"pool_edge_{level}"] = edge((factor - 1) * rows * model.width * _NUMBER, carry=True)

    harmonic = HarmonicRNN(model, config.data.num_levels)
    weights = count(jax.eval_shape(harmonic.init, jax.random.key(0)))
    in_layers = harmonic.num_blocks * sum(layer.values())
    in_edges = sum(sum(e.values()) for e in edges.values())
    gradients = broadcast((weights + 1) * _NUMBER, shards * config.mesh.data) + broadcast(_NUMBER, config.mesh.data)
    return {
        "layer": layer,
        **edges,
        "layers": in_layers,
        "edges": in_edges,
        "segment": in_layers + in_edges,
        "gradients": gradients,
        "step": segments * (in_layers + in_edges) + gradients,
    }


def sent(compiled: jax.stages.Compiled | str, config: Config) -> dict[str, int]:
    """What `communication` foretells, read from a compiled training step, or from its loss and gradient alone.

    Blocks are told from edges by the loop over the blocks of a level, which XLA unrolls where it has one block: their
    exchanges then count among the edges.

    Returns:
      {"layers", "edges", "segment", "gradients", "step"}.
    """
    found, segments = program.collectives(compiled), config.segments[0]
    # JAX names after `jvp` what is differentiated, and its transpose; gradients are summed outside.
    differentiated = [c for c in found if "jvp(" in c.op_name]
    looped = [c for c in differentiated if len(c.loops) > (segments > 1)]
    inside, layers = program.sent_bytes(differentiated), program.sent_bytes(looped) // segments
    return {
        "layers": layers,
        "edges": inside // segments - layers,
        "segment": inside // segments,
        "gradients": program.sent_bytes(found) - inside,
        "step": program.sent_bytes(found),
    }
