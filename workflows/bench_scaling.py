"""The scaling suite of workflows.benchmark: what more devices change (nothing), send and hold. Nothing is timed."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from harmonic import hlo, models
from harmonic import mesh as meshes
from harmonic.config import Config, override
from harmonic.describe import communication, costs
from harmonic.errors import UserError
from harmonic.models.base import Model
from harmonic.step import make_loss_and_grad

DEVICES = 8
# (processes, meshes of data x seq): the first row is what the others are compared with.
SETTINGS = (
    (1, ("1x1", "1x2", "1x4", "1x8", "2x1", "4x1", "8x1")),
    (2, ("1x8", "8x1", "2x4")),
)


def suite(
    config: Config, batch: int, length: int, settings: Sequence[tuple[int, Sequence[str]]] = SETTINGS
) -> Iterator[dict[str, Any]]:
    """Loss and gradient of a config on meshes of eight forced CPU devices, in one process and in several.

    Args:
      config: its model, and `train.segment_length` (0: one segment), which is rounded up to fit every mesh.
      batch: sequences; a multiple of the largest mesh's data axis.
      length: samples of each.

    Yields:
      Rows as `measure` gives them.
    """
    multiple = config.model.multiple * DEVICES
    segment = -(-(config.train.segment_length or length) // multiple) * multiple
    config = override(
        config,
        [
            f"train.global_batch_size={batch}",
            f"train.segment_length={segment}",
            f"data.window_length={length}",
            "data.crop_length=0",
            "mesh.data=1",
            "mesh.seq=1",
        ],
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        path.write_text(config.to_json())
        for processes, names in settings:
            launch = ["workflows.launch", f"--processes={processes}", f"--devices_per_process={DEVICES // processes}"]
            rows = ["workflows.scaling_rows", f"--config={path}", f"--reference={folder}/reference.npz"]
            command = [sys.executable, "-m", *launch, "--", *rows, f"--meshes={','.join(names)}"]
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
                assert child.stdout is not None
                try:
                    yield from map(json.loads, child.stdout)
                except BaseException:
                    child.terminate()  # and so its processes
                    raise
            if child.returncode:
                raise UserError(f"the scaling suite's {processes} process(es) ended with status {child.returncode}")


def measure(config: Config, reference: Path) -> dict[str, Any]:
    """One row, on this run's devices and the config's mesh: loss and gradient of random tokens, with dropout.

    Args:
      config: of the row.
      reference: an .npz with the figures to compare with; on a single device it is written.

    Returns:
      {"mesh" [data, seq], "processes", "shape", "segments", "dtype", "loss", "loss_difference" (relative),
      "gradient_difference" (of any entry, to the largest in its array), "sent_bytes" (by one device; read from the
      compiled program: "layer", one scan in one segment; "segment", "gradients" and "step"), "foretold_bytes" (of a
      step, by `describe`), "temporary_bytes" (of one device), "over_even_share" (these times the devices, over those of
      a single one), "argument_bytes"}.
    """
    model, mesh = models.make(config.model, config.data.num_levels), meshes.make_mesh(config.mesh)
    arguments = _arguments(config, model, mesh)
    compiled = jax.jit(make_loss_and_grad(model, mesh)).lower(*arguments).compile()
    outputs = [np.asarray(v.addressable_data(0)) for v in jax.tree.leaves(compiled(*arguments))]
    traffic, memory = hlo.sent(compiled, config.segments[0]), hlo.memory(compiled)
    if mesh.size == 1:
        np.savez(reference, memory.temporaries, *outputs)
    with np.load(reference) as saved:
        temporaries, *expected = (saved[name] for name in saved.files)
    differences = [float(np.abs(a - b).max() / (np.abs(b).max() or 1)) for a, b in zip(outputs, expected, strict=True)]
    segments, segment = config.segments
    return {
        "config": config.name,
        "mesh": [config.mesh.data, config.mesh.seq],
        "processes": jax.process_count(),
        "shape": [config.train.global_batch_size, config.training_length],
        "segments": [segments, segment],
        "dtype": config.model.dtype,
        "loss": float(outputs[0]),
        "loss_difference": differences[0],
        "gradient_difference": max(differences[1:]),
        "sent_bytes": {
            "layer": traffic["layers"] // costs(config).blocks,
            **{name: traffic[name] for name in ("segment", "gradients", "step")},
        },
        "foretold_bytes": communication(config)["step"],
        "temporary_bytes": memory.temporaries,
        "over_even_share": memory.temporaries * mesh.size / int(temporaries),
        "argument_bytes": memory.arguments,
    }


def _arguments(config: Config, model: Model, mesh: jax.sharding.Mesh) -> tuple[Any, ...]:
    """Parameters and a batch, the same on every mesh and in every process."""

    def place(value: Any, spec: jax.sharding.PartitionSpec) -> jax.Array:
        value = np.asarray(value)
        return jax.make_array_from_callback(value.shape, meshes.sharding(mesh, spec), lambda index: value[index])

    numbers = np.random.default_rng(config.seed)
    (segments, length), batch = config.segments, config.train.global_batch_size
    levels = config.data.num_levels
    tokens = numbers.integers(0, levels, (segments, batch, length, 1)).astype(np.uint8 if levels <= 256 else np.uint16)
    params = jax.jit(model.init)(jax.random.key(config.seed))
    batch_arrays = {
        "tokens": place(tokens, meshes.TOKENS),
        "length": place(np.full(batch, config.training_length, np.int32), meshes.ROWS),
        "row": place(np.arange(batch, dtype=np.int32), meshes.ROWS),
    }
    params = jax.tree.map(lambda v: place(v, meshes.REPLICATED), params)
    return params, batch_arrays, place(np.array([1, 2], np.uint32), meshes.REPLICATED)
