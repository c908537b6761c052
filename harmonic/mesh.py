"""Devices as a mesh with the axes `data` (groups of windows) and `seq` (shards of each sequence)."""

from __future__ import annotations

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from harmonic.config import MeshConfig
from harmonic.errors import UserError

DATA, SEQ = "data", "seq"
REPLICATED = P()
TOKENS = P(None, DATA, SEQ)  # [segments, batch, segment_length, channels]
ROWS = P(DATA)  # [batch]


def make_mesh(config: MeshConfig) -> Mesh:
    """The mesh of a config.

    Raises:
      UserError: it asks for more devices than there are.
    """
    devices, wanted = jax.devices(), config.data * config.seq
    if wanted > len(devices):
        raise UserError(
            f"mesh.data={config.data} x mesh.seq={config.seq} asks for {wanted} devices, but there are {len(devices)}; "
            "on CPU, XLA_FLAGS=--xla_force_host_platform_device_count=N makes more"
        )
    return jax.make_mesh(
        (config.data, config.seq), (DATA, SEQ), axis_types=(AxisType.Auto,) * 2, devices=devices[:wanted]
    )


def sharding(mesh: Mesh, spec: P) -> NamedSharding:
    """`spec` on `mesh`."""
    return NamedSharding(mesh, spec)


def sequence_axis(mesh: Mesh) -> str | None:
    """The name of the sequence axis for the model, or None where sequences are whole."""
    return SEQ if mesh.shape[SEQ] > 1 else None
