"""A config's sizes and costs, by formula, before anything is run."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

from harmonic import models
from harmonic.config import Config
from harmonic.models.base import Model
from harmonic.models.costs import NUMBER, Costs, broadcast

_STREAMS = (1, 8, 32, 1_024)  # generated side by side


def costs(config: Config) -> Costs:
    """What the config's model costs."""
    return _costs(_model(config), min(config.segments[0], 2))


def _model(config: Config) -> Model:
    return models.make(config.model, config.data.num_levels)


@functools.lru_cache(maxsize=8)
def _costs(model: Model, segments: int) -> Costs:
    return model.costs(segments)


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
      (samples of a window and of a step, segments), "operations" (of a sample, as `Costs` has them), "weight_bytes" (as
      `weight_bytes` does), "bounds" (as `bounds` does), "memory" (as `memory` does), "fits" (as `fits` does),
      "communication" (as `communication` does)}.
    """
    model, found = _model(config), costs(config)
    segments, length = config.segments
    return {
        "config": config.name,
        "parameters": parameters(config),
        "blocks": found.blocks,
        "pooling_product": model.multiple,
        "state_bytes": model.state_bytes(),
        "training": {
            "window_samples": config.training_length,
            "samples_per_step": config.training_length * config.train.global_batch_size,
            "segments": segments,
            "segment_length": length,
        },
        "operations": found.operations,
        "weight_bytes": weight_bytes(config),
        "bounds": bounds(config, device_flops, device_bandwidth),
        "memory": memory(config),
        "fits": fits(config, device_bytes),
        "communication": communication(config),
    }


def parameters(config: Config) -> dict[str, Any]:
    """{"total", "by_part"} of the config's model."""
    by_part = costs(config).by_part
    return {"total": sum(by_part.values()), "by_part": by_part}


def weight_bytes(config: Config) -> dict[str, int]:
    """Bytes of weights that are read for a generated sample of one stream, by the number of streams side by side."""
    read = costs(config).weights_read
    return {str(streams): round(read * NUMBER / streams) for streams in _STREAMS}


def bounds(config: Config, flops: float, bandwidth: float) -> dict[str, Any]:
    """Samples a second that one device cannot exceed, by the model's operations and `weight_bytes`.

    Args:
      flops, bandwidth: of the device, operations and bytes a second; infinite for what is not known.

    Returns:
      {"training" (only with `flops`), "generation" (over all streams, by their number: limited by operations or by the
      reading of weights, whichever takes longer), and what was given}; nothing where nothing is known.
    """
    needed, read = costs(config).operations, weight_bytes(config)
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

    The copies of the weights were counted in compiled programs on CPU (`memory_analysis`); a test holds the formula to
    within 25 % of such programs. The process itself takes a gigabyte or more, which is not included.

    Returns:
      {"weights" (parameters and their average), "optimizer", "batch" (the tokens), "gradients" (with the copies of the
      weights that are made for a step), "activations" (of one segment), "states" (kept between segments), "total"}; of
      the stage that holds most.
    """
    return _memory(dearest_stage(config))


def dearest_stage(config: Config) -> Config:
    """The config of the stage that holds most, without stages."""
    stages = (config.at(start) for start in (0, *(stage.start for stage in config.train.stages)))
    return max(stages, key=lambda stage: _memory(stage)["total"])


def _memory(config: Config) -> dict[str, int]:
    model, found = _model(config), costs(config)
    weights = sum(found.by_part.values()) * NUMBER
    (segments, length), train = config.segments, config.train
    rows = train.global_batch_size // config.mesh.data
    at_once = rows // train.accumulate * length // config.mesh.seq
    parts = {
        "weights": 2 * weights,
        "optimizer": 2 * weights,
        "batch": rows * segments * length // config.mesh.seq * (1 if config.data.num_levels <= 256 else 2),
        "gradients": round((4.1 + 1.9 * (segments > 1) + (train.accumulate > 1)) * weights) + 4 * found.tables * NUMBER,
        "activations": round(found.kept * NUMBER * at_once),
        "states": (segments > 1) * segments * model.state_bytes(rows // train.accumulate),
    }
    return {**parts, "total": sum(parts.values())}


def fits(config: Config, device_bytes: int) -> dict[str, int]:
    """What a device of `device_bytes` holds with the rest of the config as it is, by `memory`.

    Returns:
      {"device_bytes", "longest_segment" (samples held at once), "longest_window" (in segments of the config's
      `train.segment_length`, or whole without one), "largest_batch" (over all devices)}; 0 where nothing fits.
    """
    unit = config.model.multiple * config.mesh.seq

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
    `hlo.Collective.sent_bytes` does.

    The backward pass sends the forward pass's messages again where it recomputes activations: in each layer, and with
    several segments in each segment. Only between segments is the state sent to all shards.

    Returns:
      For each place of the model where shards of a sequence send something, by its name (`layer` for each recurrent
      layer): {"forward", "backward"} for one segment; "layers", "edges" and "segment": sums of these over the model,
      for one segment; "gradients": the sum of the loss and the weights' gradients, and the number of samples, once a
      step; "step": all of a step.
    """
    found, shards, (segments, length) = costs(config), config.mesh.seq, config.segments
    rows = config.train.global_batch_size // config.mesh.data
    places = {
        exchange.name: exchange.sent(rows, shards, segments > 1, length // shards) for exchange in found.exchanges
    }

    def total(layers: bool) -> int:
        chosen = [exchange for exchange in found.exchanges if (exchange.times > 1) == layers]
        return sum(exchange.times * sum(places[exchange.name].values()) for exchange in chosen)

    in_layers, in_edges, weights = total(True), total(False), sum(found.by_part.values())
    summed = broadcast((weights + 1) * NUMBER, shards * config.mesh.data)
    gradients = summed + broadcast(NUMBER, config.mesh.data)
    return {
        **places,
        "layers": in_layers,
        "edges": in_edges,
        "segment": in_layers + in_edges,
        "gradients": gradients,
        "step": segments * (in_layers + in_edges) + gradients,
    }
