"""What the scaling suite of workflows.benchmark runs on forced devices and in several processes: its rows, as JSON.

python -m workflows.launch --processes=2 --devices_per_process=4 -- workflows.scaling_rows --config=demo ...
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from absl import flags

from harmonic.config import MeshConfig
from harmonic.errors import UserError
from harmonic.mesh import hardware
from workflows import bench_scaling, cli

_MESHES = flags.DEFINE_list("meshes", ["1x1"], "meshes to measure, as data x seq: 1x8,8x1")
_REFERENCE = flags.DEFINE_string("reference", "reference.npz", "what 1x1 writes, and the others are compared with")
cli.define_process_flags()
flags.adopt_module_key_flags(cli)


def main() -> None:
    """Prints one row a mesh, in the first process."""
    speaks = cli.join_processes()
    config = cli.config_from_flags()
    for name in _MESHES.value:
        data, cross, seq = name.partition("x")
        if not (cross and data.isdecimal() and seq.isdecimal()):
            raise UserError(f"--meshes={name} is no mesh; write data x seq, as 2x4")
        row = bench_scaling.measure(
            dataclasses.replace(config, mesh=MeshConfig(int(data), int(seq))), Path(_REFERENCE.value)
        )
        if speaks:
            print(json.dumps({"platform": hardware(), **row}), flush=True)


if __name__ == "__main__":
    cli.run(main)
