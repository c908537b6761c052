"""Speed and memory, each figure beside a ratio that means something on a noisy machine. One JSON object a line.

python -m workflows.benchmark --suite=scan
python -m workflows.benchmark --suite=train --length=16000 --length=32000
python -m workflows.benchmark --suite=train --length=960512 --set=train.segment_length=3200
python -m workflows.benchmark --suite=generate --batch=1 --batch=32
python -m workflows.benchmark --suite=loader
python -m workflows.benchmark --suite=scaling --length=10240 --batch=8
python -m workflows.benchmark --suite=prepare
python -m workflows.benchmark --suite=prepare --hours=50

A row names the platform, what was measured (config, shape, dtype) and samples_per_second (a sample is a token, or a
step of the scan); `over_...`, `faster_than_...` and `..._of_...` are ratios to what was measured in the same run.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

from absl import flags

from harmonic.config import load_config, override
from harmonic.mesh import hardware
from workflows import (
    bench_generate,
    bench_hours,
    bench_loader,
    bench_prepare,
    bench_scaling,
    bench_scan,
    bench_train,
    cli,
)

# The train suite comes first: its processes need the accelerator that the others do not give back.
_SUITES = ("train", "scan", "generate", "loader", "prepare", "scaling")
_BASELINE = 32_000  # samples a step, which take the plain model 17 GB
_SUITE = flags.DEFINE_enum("suite", "all", [*_SUITES, "all"], "what to measure")
_LENGTH = flags.DEFINE_multi_integer(
    "length",
    None,
    "samples of a sequence: train 16,000 (repeatable), loader 16,000 (of the train step), scaling 10,240",
    lower_bound=1,
)
_BATCH = flags.DEFINE_multi_integer(
    "batch",
    None,
    "sequences: train 1, generate 1, 8, 32 (both repeatable), loader 1 (of the train step), scaling 8",
    lower_bound=1,
)
_PLAIN = flags.DEFINE_bool(
    "baseline",
    None,
    "in the train suite also the plain model, by associative_scan and by lax.scan, in one segment; by default with "
    f"--suite=train up to {_BASELINE:,} samples a step, which take it 17 GB",
)
_HOURS = flags.DEFINE_float(
    "hours", None, "in the prepare suite: so many hours of audio instead, and the memory of each process", lower_bound=0
)
flags.adopt_module_key_flags(cli)


def _train() -> Iterator[dict[str, Any]]:
    baseline = _BASELINE if _SUITE.value == "train" else 0
    if _PLAIN.value is not None:
        baseline = sys.maxsize if _PLAIN.value else 0
    for batch in _BATCH.value or [1]:
        yield from bench_train.suite(
            cli.config_from_flags("sc09"), batch, _LENGTH.value or [16_000], baseline_samples=baseline
        )


def _loader() -> Iterator[dict[str, Any]]:
    names = [cli.FLAGS.config] if cli.FLAGS.config else bench_loader.SETTINGS
    configs = [override(load_config(name), cli.FLAGS.set) for name in names]
    return bench_loader.suite(configs, (_BATCH.value or [1])[0], (_LENGTH.value or [16_000])[0])


def main() -> None:
    """Prints one row a measurement."""
    suites: dict[str, Callable[[], Iterator[dict[str, Any]]]] = {
        "train": _train,
        "scan": bench_scan.suite,
        "generate": lambda: bench_generate.suite(cli.config_from_flags("sc09"), _BATCH.value or (1, 8, 32)),
        "loader": _loader,
        "prepare": lambda: bench_hours.suite(_HOURS.value) if _HOURS.value else bench_prepare.suite(),
        "scaling": lambda: bench_scaling.suite(
            cli.config_from_flags("sc09"), (_BATCH.value or [8])[0], (_LENGTH.value or [10_240])[0]
        ),
    }
    for name in _SUITES if _SUITE.value == "all" else (_SUITE.value,):
        for row in suites[name]():
            # Asking for the platform takes hold of it: rows that come from other processes name it themselves.
            platform = {} if "platform" in row else {"platform": hardware()}
            print(json.dumps({"suite": name, **platform, **row}), flush=True)


if __name__ == "__main__":
    cli.run(main)
