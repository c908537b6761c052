"""Speed and memory, each figure beside a ratio that means something on a noisy machine. One JSON object a line.

python -m workflows.benchmark --suite=scan
python -m workflows.benchmark --suite=train --config=sc09 --length=16000
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from harmonic.config import Config, override
from harmonic.kernels import linear_scan
from harmonic.mesh import make_mesh
from harmonic.models import HarmonicRNN
from harmonic.step import init_state, make_train_step
from workflows import cli, stages

_SUITES = ("scan", "train")
_SUITE = flags.DEFINE_enum("suite", "all", [*_SUITES, "all"], "what to measure")
_LENGTH = flags.DEFINE_integer("length", 16_000, "samples of the train suite's sequences", lower_bound=1)
_BATCH = flags.DEFINE_integer("batch", 1, "sequences of the train suite", lower_bound=1)
flags.adopt_module_key_flags(cli)

_REPEATS = 5


def main() -> None:
    """Prints one row a measurement."""
    config = cli.config_from_flags("sc09")
    suites: dict[str, Callable[[], Iterator[dict[str, Any]]]] = {
        "scan": scan_suite,
        "train": lambda: train_suite(config, _BATCH.value, _LENGTH.value),
    }
    for name in _SUITES if _SUITE.value == "all" else (_SUITE.value,):
        for row in suites[name]():
            print(json.dumps({"suite": name, "platform": stages.platform(), **row}), flush=True)


def best_seconds(function: Callable[..., Any], *args: Any) -> float:
    """The least of a few runs, after one that warms up: what the machine can do when nothing disturbs it."""
    jax.block_until_ready(function(*args))
    times = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        jax.block_until_ready(function(*args))
        times.append(time.perf_counter() - start)
    return min(times)


def scan_suite() -> Iterator[dict[str, Any]]:
    """The scan, forward and backward, over the time of its least possible traffic: each input read once, each output
    written once, by a copy measured in the same run."""
    for batch, length, channels in ((1, 131_072, 128), (8, 16_000, 128)):
        keys = jax.random.split(jax.random.key(0), 4)
        x = tuple(jax.random.normal(k, (batch, length, channels)) for k in keys[:2])
        radius, angle = (jax.random.uniform(k, (batch, length, channels)) for k in keys[2:])
        a = (radius * jnp.cos(angle), radius * jnp.sin(angle))
        h0 = tuple(jnp.zeros((batch, channels)) for _ in range(2))

        def forward_backward(x: Any, a: Any, dh: Any, implementation: str, h0: Any = h0) -> Any:
            h, pullback = jax.vjp(lambda x, a: linear_scan(x, a, h0, implementation=implementation)[0], x, a)
            return h, pullback(dh)

        # Forward reads x, a and writes h; backward reads dh, a, h and writes dx, da: eight complex arrays.
        array = jnp.zeros((8, batch, length, channels))
        bound = best_seconds(jax.jit(lambda v: v + 1), array)
        seconds = {
            name: best_seconds(jax.jit(functools.partial(forward_backward, implementation=name)), x, a, x)
            for name in ("chunked", "associative")
        }
        yield {
            "shape": [batch, length, channels],
            "dtype": "float32",
            "steps_per_second": batch * length / seconds["chunked"],
            "over_streaming_bound": seconds["chunked"] / bound,
            "faster_than_associative": seconds["associative"] / seconds["chunked"],
        }


def train_suite(config: Config, batch: int, length: int) -> Iterator[dict[str, Any]]:
    """The train step of a config: what it takes to compile, temporaries, and its speed beside that of a large matrix
    product in the same run."""
    config = override(
        config, [f"train.global_batch_size={batch}", f"data.window_length={length}", "train.segment_length=0"]
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
    memory = step.memory_analysis()
    seconds = []
    for number in range(_REPEATS):
        begin = time.perf_counter()
        state, _ = jax.block_until_ready(step(state, arrays, jax.random.key(0), np.int32(number)))
        seconds.append(time.perf_counter() - begin)
    side = 2_048
    matrix = jnp.ones((side, side))
    flops = 2 * side**3 / best_seconds(jax.jit(lambda m: m @ m), matrix)
    # Dense layers and gates of all levels, twice over again for the backward pass: what no implementation can avoid.
    needed = 3 * dense_operations(config)
    samples = batch * length / min(seconds)
    yield {
        "config": config.name,
        "shape": [batch, length],
        "trace_seconds": traced - start,
        "compile_seconds": compiled - traced,
        "temporary_bytes": memory and memory.temp_size_in_bytes,
        "argument_bytes": memory and memory.argument_size_in_bytes,
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


if __name__ == "__main__":
    cli.run(main)
