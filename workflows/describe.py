"""Tells what a config is before anything is run.

python -m workflows.describe --config=sc09 --set=mesh.seq=8 --device_gib=80 --format=json
python -m workflows.describe --config=sc09 --device_tflops=67 --device_gbps=4800
python -m workflows.describe --config=sc09 --compile_for=cuda:h100                  # read from the compiled program
python -m workflows.describe --config=youtubemix --set=mesh.seq=4 --compile_for=tpu:v4:2x2x1
python -m workflows.describe --config=sc09 --compile_for=tpu:v5e --what=generate --streams=8
"""

from __future__ import annotations

import json
import math
from typing import Any

from absl import flags

from harmonic.compile_for import compile_for
from harmonic.describe import describe
from harmonic.devices import DEVICES, target
from workflows import cli

_MEMORY = flags.DEFINE_float(
    "device_gib", None, "memory of a device, for what fits; 16, or that of --compile_for's", lower_bound=0.001
)
_FLOPS = flags.DEFINE_float("device_tflops", None, "10^12 operations a second, for its bounds", lower_bound=1e-9)
_BANDWIDTH = flags.DEFINE_float(
    "device_gbps",
    None,
    "10^9 bytes a second from where the weights lie, memory or cache, for its bounds",
    lower_bound=1e-9,
)
_COMPILE_FOR = flags.DEFINE_string(
    "compile_for",
    None,
    "compile for a device that need not be there, and tell what the program holds, moves, sends and runs: "
    f"{', '.join(DEVICES)}, with a topology such as cuda:h100:1x8 or tpu:v4:2x2x1 for several",
)
_WHAT = flags.DEFINE_enum("what", "train", ["train", "generate"], "what to compile: a training step or generation")
_STREAMS = flags.DEFINE_integer("streams", 32, "generated side by side, for --what=generate", lower_bound=1)
_KEEP = flags.DEFINE_string("keep_program", None, "a folder to keep the compiled program's text in")
_FORMAT = flags.DEFINE_enum("format", "text", ["text", "json"], "how to print it")
flags.adopt_module_key_flags(cli)


def main() -> None:
    """Prints the description."""
    import jax

    if not jax.config.jax_platforms:  # type: ignore[attr-defined]
        jax.config.update("jax_platforms", "cpu")  # no device is needed, nor taken from another process
    config = cli.config_from_flags()
    compiled_for = None if _COMPILE_FOR.value is None else target(_COMPILE_FOR.value)
    device_bytes = 16 << 30 if compiled_for is None else compiled_for.device.memory
    described = describe(
        config,
        device_bytes=device_bytes if _MEMORY.value is None else round(_MEMORY.value * 2**30),
        device_flops=math.inf if _FLOPS.value is None else _FLOPS.value * 1e12,
        device_bandwidth=math.inf if _BANDWIDTH.value is None else _BANDWIDTH.value * 1e9,
    )
    if compiled_for is not None:
        described["compiled"] = compile_for(
            config, compiled_for, what=_WHAT.value, streams=_STREAMS.value, keep=_KEEP.value
        )
    if _FORMAT.value == "json":
        print(json.dumps(described, indent=2))
    else:
        _print(described)


def _print(node: dict[str, Any], indent: str = "") -> None:
    for name, value in node.items():
        if value in ({}, []):
            continue
        if isinstance(value, dict):
            print(f"{indent}{name}")
            _print(value, indent + "  ")
        elif isinstance(value, list):
            print(f"{indent}{name}")
            for row in value:
                print(f"{indent}  " + "  ".join(f"{v:>16,}" if isinstance(v, int) else str(v) for v in row.values()))
        else:
            shown = f"{value:,}" if isinstance(value, int) else value
            print(f"{indent}{name:<{34 - len(indent)}}{shown:>14}")


if __name__ == "__main__":
    cli.run(main)
