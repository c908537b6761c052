"""Tells what a config is before anything is run.

python -m workflows.describe --config=sc09 --set=mesh.seq=8 --device_gib=80 --format=json
"""

from __future__ import annotations

import json
from typing import Any

from absl import flags

from harmonic.describe import describe
from workflows import cli

_MEMORY = flags.DEFINE_float("device_gib", 16.0, "memory of a device, for what fits", lower_bound=0.001)
_FORMAT = flags.DEFINE_enum("format", "text", ["text", "json"], "how to print it")
flags.adopt_module_key_flags(cli)


def main() -> None:
    """Prints the description."""
    described = describe(cli.config_from_flags(), device_bytes=round(_MEMORY.value * 2**30))
    if _FORMAT.value == "json":
        print(json.dumps(described, indent=2))
    else:
        _print(described)


def _print(node: dict[str, Any], indent: str = "") -> None:
    for name, value in node.items():
        if isinstance(value, dict):
            print(f"{indent}{name}")
            _print(value, indent + "  ")
        else:
            shown = f"{value:,}" if isinstance(value, int) else value
            print(f"{indent}{name:<{34 - len(indent)}}{shown:>14}")


if __name__ == "__main__":
    cli.run(main)
