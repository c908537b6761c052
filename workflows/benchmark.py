"""Speed and memory, each figure beside a ratio that means something on a noisy machine. One JSON object a line.

python -m workflows.benchmark --suite=scan
python -m workflows.benchmark --suite=train --config=sc09 --length=16000 --length=960512 --set=train.segment_length=3200
python -m workflows.benchmark --suite=generate --config=sc09
python -m workflows.benchmark --suite=loader --config=sc09
python -m workflows.benchmark --suite=scaling --config=sc09 --length=10240 --batch=8
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

from absl import flags

from workflows import bench_generate, bench_loader, bench_scaling, bench_scan, bench_train, cli, stages

_SUITES = ("scan", "train", "generate", "loader", "scaling")
_SUITE = flags.DEFINE_enum("suite", "all", [*_SUITES, "all"], "what to measure")
_LENGTH = flags.DEFINE_multi_integer(
    "length", None, "samples of the train (16,000; repeatable) and scaling (10,240) suites' sequences", lower_bound=1
)
_BATCH = flags.DEFINE_integer("batch", None, "sequences of the train (1) and scaling (8) suites", lower_bound=1)
flags.adopt_module_key_flags(cli)


def main() -> None:
    """Prints one row a measurement."""
    config = cli.config_from_flags("sc09")
    suites: dict[str, Callable[[], Iterator[dict[str, Any]]]] = {
        "scan": bench_scan.suite,
        "train": lambda: bench_train.suite(config, _BATCH.value or 1, _LENGTH.value or [16_000]),
        "generate": lambda: bench_generate.suite(config),
        "loader": lambda: bench_loader.suite(config),
        "scaling": lambda: bench_scaling.suite(config, _BATCH.value or 8, (_LENGTH.value or [10_240])[0]),
    }
    for name in _SUITES if _SUITE.value == "all" else (_SUITE.value,):
        for row in suites[name]():
            print(json.dumps({"suite": name, "platform": stages.platform(), **row}), flush=True)


if __name__ == "__main__":
    cli.run(main)
