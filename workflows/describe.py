"""Tells what a config is before anything is run.

python -m workflows.describe --config=sc09 --set=mesh.seq=8 --device_gib=80 --format=json
python -m workflows.describe --config=sc09 --device_tflops=67 --device_gbps=4800
"""

from __future__ import annotations

import json
import math
from typing import Any

from absl import flags

from harmonic.describe import describe
from workflows import cli

_MEMORY = flags.DEFINE_float("device_gib", 16.0, "memory of a device, for what fits", lower_bound=0.001)
_FLOPS = flags.DEFINE_float("device_tflops", None, "10^12 operations a second, for its bounds", lower_bound=1e-9)
_BANDWIDTH = flags.DEFINE_float(
    "device_gbps",
    None,
    "10^9 bytes a second from where the weights lie, memory or cache, for its bounds",
    lower_bound=1e-9,
)
_FORMAT = flags.DEFINE_enum("format", "text", ["text", "json"], "how to print it")
flags.adopt_module_key_flags(cli)


def main() -> None:
    """Prints the description."""
    described = describe(
        cli.config_from_flags(),
        device_bytes=round(_MEMORY.value * 2**30),
        device_flops=math.inf if _FLOPS.value is None else _FLOPS.value * 1e12,
        device_bandwidth=math.inf if _BANDWIDTH.value is None else _BANDWIDTH.value * 1e9,
    )
    if _FORMAT.value == "json":
        print(json.dumps(described, indent=2))
    else:
        _print(described)


def _print(node: dict[str, Any], indent: str = "") -> None:
    for name, value in node.items():
        if value == {}:
            continue
        if isinstance(value, dict):
            print(f"{indent}{name}")
            _print(value, indent + "  ")
        else:
            shown = f"{value:,}" if isinstance(value, int) else value
            print(f"{indent}{name:<{34 - len(indent)}}{shown:>14}")


if __name__ == "__main__":
    cli.run(main)
