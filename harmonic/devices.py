"""Devices that programs are compiled for, whether they are there or not: the makers' figures, and what XLA has to know.

target("cuda:h100:1x8").device.memory
"""

from __future__ import annotations

import dataclasses
import math
import re

from harmonic.errors import UserError


@dataclasses.dataclass(frozen=True)
class Device:
    """A kind of device, as JAX counts them.

    Attributes:
      name: as its maker writes it.
      platform: tpu or cuda.
      memory: bytes.
      bandwidth: bytes a second from that memory.
      operations: a second, by the type of a matrix product's operands: what the matrix units do with it by default,
        without sparsity. Of float32 that is TF32 on GPUs, one pass of bfloat16 on TPUs.
      smallest: the smallest topology that XLA compiles for.
      gpu: of GPUs, what XLA and ptxas have to know.
    """

    name: str
    platform: str
    memory: int
    bandwidth: float
    operations: dict[str, float]
    smallest: str
    gpu: Gpu | None = None


@dataclasses.dataclass(frozen=True)
class Gpu:
    """The numbers of a GPU that XLA compiles by.

    Attributes:
      capability: CUDA's compute capability, (major, minor).
      processors: streaming multiprocessors.
      lanes: float32 units of a processor.
      clock: GHz.
      cache: bytes of the second-level cache.
      shared: bytes of shared memory of a processor; a program may have all but one KB.
    """

    capability: tuple[int, int]
    processors: int
    lanes: int
    clock: float
    cache: int
    shared: int

    @property
    def architecture(self) -> str:
        """As ptxas calls it."""
        major, minor = self.capability
        return f"sm_{major}{minor}{'a' if major >= 9 else ''}"

    def target_config(self, device: Device) -> str:
        """XLA's `GpuTargetConfigProto` as text; its fields as in openxla/xla, xla/backends/gpu/target_config/specs."""
        major, minor = self.capability
        return f"""\
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {self.shared}
  shared_memory_per_block_optin: {self.shared - 1024}
  threads_per_core_limit: 2048
  core_count: {self.processors}
  fpus_per_core: {self.lanes}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  memory_bandwidth: {round(device.bandwidth)}
  l2_cache_size: {self.cache}
  clock_rate_ghz: {self.clock}
  device_memory_size: {device.memory}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  cuda_compute_capability {{ major: {major} minor: {minor} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
runtime_version {{ major: 12 minor: 8 patch: 0 }}
device_description_str: "{device.name}"
"""


def _gpu(
    name: str, memory: int, bandwidth: float, tf32: float, bfloat16: float, capability: tuple[int, int], **gpu
) -> Device:
    operations = {"float32": tf32, "bfloat16": bfloat16}
    return Device(name, "cuda", memory, bandwidth, operations, "1x1", Gpu(capability, **gpu))


def _tpu(name: str, gigabytes: int, bandwidth: float, operations: float, smallest: str) -> Device:
    return Device(name, "tpu", gigabytes << 30, bandwidth, dict.fromkeys(("float32", "bfloat16"), operations), smallest)


_HOPPER = {"processors": 132, "lanes": 128, "clock": 1.98, "cache": 50 << 20, "shared": 228 << 10}
# GPUs: the makers' data sheets, memory as the driver tells it. TPUs: cloud.google.com/tpu/docs/system-architecture.
DEVICES = {
    "cuda:a100": _gpu(
        "NVIDIA A100-SXM4-80GB", 85_100_068_864, 2.039e12, 156e12, 312e12, (8, 0),
        processors=108, lanes=64, clock=1.41, cache=40 << 20, shared=164 << 10,
    ),
    "cuda:h100": _gpu("NVIDIA H100 80GB HBM3", 84_942_979_072, 3.352e12, 494e12, 989e12, (9, 0), **_HOPPER),
    "cuda:h200": _gpu("NVIDIA H200 141GB HBM3e", 151_397_597_184, 4.8e12, 494e12, 989e12, (9, 0), **_HOPPER),
    "cuda:b200": _gpu(
        "NVIDIA B200", 191_514_411_008, 7.672e12, 1_100e12, 2_250e12, (10, 0),
        processors=148, lanes=128, clock=1.965, cache=132_644_864, shared=228 << 10,
    ),
    "tpu:v4": _tpu("TPU v4", 32, 1.228e12, 275e12, "2x2x1"),
    "tpu:v5e": _tpu("TPU v5e", 16, 0.819e12, 197e12, "1x1"),
    "tpu:v5p": _tpu("TPU v5p", 95, 2.765e12, 459e12, "2x2x1"),
    "tpu:v6e": _tpu("TPU v6e", 32, 1.640e12, 918e12, "1x1"),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Target:
    """Devices to compile for.

    Attributes:
      kind: a key of `DEVICES`.
      topology: how many there are along each axis: of GPUs machines x devices of each.
    """

    kind: str
    topology: tuple[int, ...]

    @property
    def device(self) -> Device:
        """The kind's figures."""
        return DEVICES[self.kind]

    @property
    def platform(self) -> str:
        """As `kernels.target.platform` calls it."""
        return "gpu" if self.device.platform == "cuda" else self.device.platform

    @property
    def size(self) -> int:
        """Devices."""
        return math.prod(self.topology)

    @property
    def topology_name(self) -> str:
        """The topology as it is written."""
        return "x".join(map(str, self.topology))


def target(name: str) -> Target:
    """The target that `cuda:h100`, `cuda:h100:1x8` or `tpu:v4:2x2x1` names; without a topology, the smallest.

    Raises:
      UserError: a device that is not known, or a topology that cannot be read.
    """
    kind, topology = ":".join(name.split(":")[:2]), ":".join(name.split(":")[2:])
    if kind not in DEVICES:
        raise UserError(f"--compile_for={name}: no such device is known: use one of {', '.join(DEVICES)}")
    smallest = DEVICES[kind].smallest
    axes = smallest.count("x") + 1
    topology = topology or smallest
    if not re.fullmatch("x".join([r"[1-9]\d*"] * axes), topology):
        raise UserError(f"--compile_for={name}: write its topology with {axes} numbers, such as {kind}:{smallest}")
    return Target(kind, tuple(map(int, topology.split("x"))))
