"""pipelines.prepare in a process of its own, and what a prepared data set's folder holds."""

import subprocess
import sys
from pathlib import Path

from mains import ROOT

TWO_PROCESSES = ["--direct_running_mode=multi_processing", "--direct_num_workers=2"]


def subprocess_of(*argv, env=None, **more):
    command = [sys.executable, "-m", "pipelines.prepare", *map(str, argv)]
    return subprocess.Popen(
        command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **more
    )


def read_folder(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def shards_of(folder):
    """All of a data set but its manifest, which names its source, and the config written beside one's own."""
    return {name: data for name, data in read_folder(folder).items() if not name.endswith((".json", ".py"))}
