"""The train suite of workflows.benchmark: a whole training step, compiled and run."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from harmonic import program
from harmonic.config import Config, override
from harmonic.mesh import make_mesh
from harmonic.models import HarmonicRNN
from harmonic.step import init_state, make_train_step
from workflows.timing import REPEATS, best_seconds

_ENOUGH = 60.0  # seconds of steps after which no other is begun


def suite(config: Config, batch: int, lengths: Sequence[int]) -> Iterator[dict[str, Any]]:
    """The train step of a config at one length after another: what it takes to compile, its memory, and its speed
    beside that of a large matrix product in the same run, and per sample beside that at the first length."""
    first = None
    for length in lengths:
        row = measure(config, batch, length)
        first = first or row["samples_per_second"]
        yield {**row, "seconds_per_sample_over_first": first / row["samples_per_second"]}


def measure(config: Config, batch: int, length: int) -> dict[str, Any]:
    """One row; the config's `train.segment_length` holds."""
    config = override(
        config, [f"train.global_batch_size={batch}", f"data.window_length={length}", "data.crop_length=0"]
    )
    model, mesh = HarmonicRNN(config.model, config.data.num_levels), make_mesh(config.mesh)
    state = jax.jit(lambda: init_state(config, model))()
    segments, segment = config.segments
    arrays = {
        "tokens": jnp.zeros((segments, batch, segment, 1), jnp.uint8),
        "length": jnp.full(batch, length, jnp.int32),
        "row": jnp.arange(batch, dtype=jnp.int32),
    }
    start = time.perf_counter()
    lowered = make_train_step(model, config, mesh).lower(state, arrays, jax.random.key(0), np.int32(0))
    traced = time.perf_counter()
    step = lowered.compile()
    compiled = time.perf_counter()
    memory = program.memory(step)
    seconds: list[float] = []
    while len(seconds) < REPEATS and sum(seconds) < _ENOUGH:
        begin = time.perf_counter()
        state, _ = jax.block_until_ready(step(state, arrays, jax.random.key(0), np.int32(len(seconds))))
        seconds.append(time.perf_counter() - begin)
    side = 2_048
    matrix = jnp.ones((side, side))
    flops = 2 * side**3 / best_seconds(jax.jit(lambda m: m @ m), matrix)
    # Dense layers and gates of all levels, twice over again for the backward pass: what no implementation can avoid.
    needed = 3 * dense_operations(config)
    samples = batch * length / min(seconds)
    return {
        "config": config.name,
        "shape": [batch, length],
        "segments": [segments, segment],
        "trace_seconds": traced - start,
        "compile_seconds": compiled - traced,
        "temporary_bytes": memory.temporaries,
        "argument_bytes": memory.arguments,
        "peak_resident_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1_024,
        "steps": len(seconds),
        "samples_per_second": samples,
        "of_matrix_rate": samples * needed / flops,
    }


def dense_operations(config: Config) -> float:
    """Multiplications and additions of the dense layers for one sample, forward, over all levels at their own rates."""
    model = config.model
    width, state = model.width, model.state_width
    block = width * state + state * state // model.gate_blocks + state * width + 2 * width * width + 6 * width * width
    total, stride = 0.0, 1
    for level, blocks in enumerate(model.level_blocks):
        inner = level == len(model.pool_factors)
        total += blocks * (1 if inner else 2) * block / stride
        stride *= 1 if inner else model.pool_factors[level]
    return 2 * (total + width * config.data.num_levels)
