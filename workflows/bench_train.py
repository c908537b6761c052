"""The train suite of workflows.benchmark: a whole training step, compiled and run, beside that of a plain model.

Every measurement is made in a process of its own, so that its peak of memory is its own.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from harmonic import hlo, models
from harmonic.config import Config, override
from harmonic.describe import costs
from harmonic.errors import UserError
from harmonic.mesh import hardware, make_mesh
from harmonic.step import init_state, make_train_step
from workflows import timing

OURS = "harmonic"
_ENOUGH = 120.0  # seconds of steps after which no other is begun


def suite(config: Config, batch: int, lengths: Sequence[int], *, baseline_samples: int = 0) -> Iterator[dict[str, Any]]:
    """The train step of a config at one length after another; the config's `train.segment_length` holds.

    Args:
      config: its model and recipe.
      batch: sequences.
      lengths: samples of each.
      baseline_samples: up to that many samples a step, the same step of the plain model is measured first, in one
        segment, with each of its variants.

    Yields:
      Rows as `measure` gives them. Ours have also the time per sample over that at the first length, and beside a
      plain model how much faster they are, and which share of its memory they take: of temporaries and arguments of
      the compiled program, and of the process's peak. A plain model that does not fit into memory has a row that says
      so.
    """
    first = None
    for length in lengths:
        plain = {}
        for variant in models.plain_variants(config.model) if batch * length <= baseline_samples else ():
            try:
                plain[variant] = timing.in_child(measure, config, batch, length, variant)
                yield plain[variant]
            except UserError as error:
                where = timing.in_child(hardware)  # asking here would take hold of it
                row = {"platform": where, "config": config.name, "implementation": variant, "shape": [batch, length]}
                yield {**row, "failed": str(error)}
        row = timing.in_child(measure, config, batch, length)
        first = first or row["samples_per_second"]
        row["seconds_per_sample_over_first"] = first / row["samples_per_second"]
        for name, other in plain.items():
            row[f"faster_than_{name}"] = row["samples_per_second"] / other["samples_per_second"]
            row[f"memory_of_{name}"] = _held(row) / _held(other)
            row[f"peak_resident_of_{name}"] = row["peak_resident_bytes"] / other["peak_resident_bytes"]
        yield row


def _held(row: dict[str, Any]) -> int:
    return row["temporary_bytes"] + row["argument_bytes"]


def measure(config: Config, batch: int, length: int, implementation: str = OURS) -> dict[str, Any]:
    """One row, in this process.

    Args:
      config: its model and recipe.
      batch, length: of the tokens.
      implementation: our model, in the config's segments; or a variant of the plain one, in one segment.

    Raises:
      UserError: the compiled program needs more memory than is free.
    """
    sizes = [f"train.global_batch_size={batch}", f"data.window_length={length}", "data.crop_length=0"]
    config = override(config, sizes if implementation == OURS else [*sizes, "train.segment_length=0"])
    make = models.make if implementation == OURS else functools.partial(models.plain, variant=implementation)
    model = make(config.model, config.data.num_levels)
    state = jax.jit(lambda: init_state(config, model))()
    segments, segment = config.segments
    arrays = {
        "tokens": jnp.zeros((segments, batch, segment, 1), jnp.uint8),
        "length": jnp.full(batch, length, jnp.int32),
        "row": jnp.arange(batch, dtype=jnp.int32),
    }
    start = time.perf_counter()
    mesh = make_mesh(config.mesh)
    lowered = make_train_step(model, config, mesh).lower(state, arrays, jax.random.key(0), np.int32(0))
    traced = time.perf_counter()
    step = lowered.compile()
    compiled = time.perf_counter()
    memory, free = hlo.memory(step), timing.free_bytes()
    if free is not None and memory.temporaries > free:
        gigabytes = f"{memory.temporaries / 1e9:.1f} GB beside its arguments, where {free / 1e9:.1f} GB are free"
        raise UserError(f"the step needs {gigabytes}")
    times: list[tuple[float, float]] = []
    while len(times) < timing.REPEATS and sum(seconds for seconds, _ in times) < _ENOUGH:
        begin, used = time.perf_counter(), time.process_time()
        state, _ = jax.block_until_ready(step(state, arrays, jax.random.key(0), np.int32(len(times))))
        times.append((time.perf_counter() - begin, time.process_time() - used))
    resident = timing.peak_resident_bytes()
    on_device = jax.devices()[0].memory_stats()  # None on a CPU
    seconds, cpu_seconds = min(times)
    dtype = config.model.dtype if implementation == OURS else "float32"
    samples, rate = batch * length / seconds, timing.matrix_rate(dtype)
    # Dense layers and gates of all levels, twice over again for the backward pass: what no implementation can avoid.
    needed = 3 * costs(config).operations["forward"]["dense"]
    return {
        "platform": hardware(),
        "config": config.name,
        "implementation": implementation,
        "shape": [batch, length],
        "segments": [segments, segment],
        "dtype": dtype,
        "samples_per_second": samples,
        "of_matrix_rate": samples * needed / rate,
        "steps": len(times),
        "step_seconds": seconds,
        "step_cpu_seconds": cpu_seconds,
        "trace_seconds": traced - start,
        "compile_seconds": compiled - traced,
        "temporary_bytes": memory.temporaries,
        "argument_bytes": memory.arguments,
        "peak_resident_bytes": resident,
        **({"peak_device_bytes": on_device["peak_bytes_in_use"]} if on_device else {}),
    }
