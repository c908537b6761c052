"""Devices as a mesh with the axes `data` (groups of windows) and `seq` (shards of each sequence)."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from harmonic.config import MeshConfig
from harmonic.errors import UserError
from harmonic.processes import current

DATA, SEQ = "data", "seq"
REPLICATED = P()
TOKENS = P(None, DATA, SEQ)  # [segments, batch, segment_length, channels]
ROWS = P(DATA)  # [batch]


def make_mesh(config: MeshConfig) -> Mesh:
    """The mesh of a config, with an equal number of devices from every process.

    A single process on CPU gets as many CPU devices as the mesh asks for, if JAX has made none yet: a step that is too
    small for XLA to spread over the cores is spread by `data`.

    Raises:
      UserError: the mesh needs more devices than there are, leaves out a process, or cuts across processes.
    """
    wanted = config.data * config.seq
    _allow_cpu_devices(wanted)
    processes, devices = jax.process_count(), jax.devices()
    asked = f"mesh.data={config.data} x mesh.seq={config.seq} asks for {wanted} devices"
    if wanted > len(devices):
        raise UserError(
            f"{asked}, but there are {len(devices)}; on CPU, XLA_FLAGS=--xla_force_host_platform_device_count=N makes "
            "more"
        )
    if processes > 1:
        held = f"{processes} processes with {len(devices)} devices together"
        if wanted % processes or len(devices) % wanted:
            raise UserError(f"{asked}, but there are {held}: it must divide them, with an equal part of each process")
        counts = {p: 0 for p in range(processes)}
        each = []
        for device in devices:
            counts[device.process_index] += 1
            each += [device] if counts[device.process_index] <= wanted // processes else []
        if len(each) < wanted:
            raise UserError(f"{asked}, {wanted // processes} of each process, but some of {held} have fewer")
        devices = each
    mesh = mesh_of(config, devices)
    process_part(mesh)
    return mesh


def mesh_of(config: MeshConfig, devices: Sequence[jax.Device]) -> Mesh:
    """The mesh of a config on the first of `devices`, which need not be there."""
    shape = (config.data, config.seq)
    chosen = devices[: config.data * config.seq]
    return jax.make_mesh(shape, (DATA, SEQ), axis_types=(AxisType.Auto,) * 2, devices=chosen)


def _allow_cpu_devices(wanted: int) -> None:
    """Has JAX make that many CPU devices, unless there are several processes, or somebody said how many."""
    number = jax.config.jax_num_cpu_devices  # type: ignore[attr-defined]
    said = number > 0 or "device_count=" in os.environ.get("XLA_FLAGS", "")
    if wanted > 1 and current()[1] == 1 and not said:
        with contextlib.suppress(RuntimeError):  # JAX has made its devices
            jax.config.update("jax_num_cpu_devices", wanted)


def hardware() -> str:
    """What JAX runs on, such as `cpu (2 cores)` or `NVIDIA H200 x 1`."""
    device = jax.devices()[0]
    return (
        f"cpu ({os.cpu_count()} cores)" if device.platform == "cpu" else f"{device.device_kind} x {jax.device_count()}"
    )


def sharding(mesh: Mesh, spec: P) -> NamedSharding:
    """`spec` on `mesh`."""
    return NamedSharding(mesh, spec)


def sequence_axis(mesh: Mesh) -> str | None:
    """The name of the sequence axis for the model, or None where sequences are whole."""
    return SEQ if mesh.shape[SEQ] > 1 else None


@dataclasses.dataclass(frozen=True)
class Part:
    """The part of a batch that a process holds: part i of n along each axis.

    Attributes:
      rows: (i, n): rows i, i + n, ... of the batch.
      piece: (i, n): the i-th of n equal pieces of every segment.
    """

    rows: tuple[int, int]
    piece: tuple[int, int]


def process_part(mesh: Mesh) -> Part:
    """The part of this process.

    Raises:
      UserError: the devices of a process are no rectangle of the mesh, or the rectangles differ in size.
    """
    owners = np.array([d.process_index for d in mesh.devices.flat]).reshape(mesh.devices.shape)
    first, sizes = {}, set()
    regular = True
    for process in np.unique(owners):
        places = np.argwhere(owners == process)
        low, size = places.min(0), np.ptp(places, axis=0) + 1
        regular &= len(places) == size.prod() and not (low % size).any() and not (owners.shape % size).any()
        first[int(process)] = low // size
        sizes.add(tuple(size))
    if not regular or len(sizes) != 1:
        raise UserError(
            f"mesh.data={mesh.shape[DATA]} x mesh.seq={mesh.shape[SEQ]} gives {len(first)} processes uneven parts of "
            f"its {mesh.size} devices: mesh.seq must divide, or be a multiple of, the {mesh.size // len(first)} "
            "devices of a process"
        )
    (place, count) = first[jax.process_index()], owners.shape // np.array(sizes.pop())
    return Part((int(place[0]), int(count[0])), (int(place[1]), int(count[1])))


class Agreement:
    """The maximum over all processes of an int: how they agree on a stop signal at the same step.

    With several processes a call starts the reduction and returns the previous call's result, so that no step waits
    for it. A single process gets its own number back at once.
    """

    def __init__(self, mesh: Mesh):
        self._sharding = sharding(mesh, P((DATA, SEQ)))
        self._several = jax.process_count() > 1
        self._maximum = jax.jit(jnp.max, out_shardings=sharding(mesh, REPLICATED))
        self._before: jax.Array | None = None

    def __call__(self, number: int, *, wait: bool = False) -> int:
        """The maximum of the previous call (0 at first); with `wait`, of this call."""
        if not self._several:
            return number
        mine = np.full(1, number, np.int32)
        numbers = jax.make_array_from_callback((self._sharding.mesh.size,), self._sharding, lambda _: mine)
        before, self._before = self._before, self._maximum(numbers)
        known = self._before if wait else before
        return 0 if known is None else int(known)
