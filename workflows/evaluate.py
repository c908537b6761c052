"""Likelihood of a run over a whole split, every sample once.

python -m workflows.evaluate --workdir=runs/sc09 --split=test
python -m workflows.evaluate --workdir=runs/piano --context=1,8,60    # what context is worth: pieces of so many seconds
"""

from __future__ import annotations

import json
from pathlib import Path

from absl import flags

from harmonic import stages
from harmonic.config import EvaluateConfig
from harmonic.errors import UserError
from harmonic.run import Run
from workflows import cli

_SPLIT = flags.DEFINE_enum("split", "test", ["train", "validation", "test"], "what to evaluate on")
_CHECKPOINT = flags.DEFINE_string("checkpoint", "best", "best (on validation), latest, or a step")
_RAW = flags.DEFINE_bool("raw_weights", False, "evaluate the raw weights instead of their average")
_RESET = flags.DEFINE_integer(
    "reset_every", 0, "forget the past every so many samples, for windowed figures", lower_bound=0
)
_CONTEXT = flags.DEFINE_list(
    "context",
    [],
    "also evaluate recordings cut into pieces of so many seconds, for each of a list such as 1,8,60, to see what "
    "context is worth; whole recordings (full) are always included. The same command continues after an interruption",
)
flags.adopt_module_key_flags(cli)


def main() -> None:
    """Evaluates, and prints the figures as JSON."""
    if cli.FLAGS.config or cli.FLAGS.set:
        raise UserError("a run is evaluated with its own config: give --workdir alone")
    contexts = _contexts(_CONTEXT.value)
    run = Run(cli.FLAGS.workdir or "runs/demo")
    data = Path(cli.FLAGS.data_dir) / run.config.data.dataset
    with run.writing():
        figures = stages.evaluate_run(
            run.folder,
            data,
            split=_SPLIT.value,
            checkpoint=_CHECKPOINT.value,
            raw=_RAW.value,
            reset_every=_RESET.value,
            contexts=contexts,
        )
    print(json.dumps(figures, indent=2))


def _contexts(items: list[str]) -> tuple[float, ...]:
    try:
        seconds = tuple(float(item) for item in items if item.strip() != "full")
        return EvaluateConfig(context_seconds=seconds).context_seconds
    except (ValueError, UserError):
        raise UserError(
            f"--context={','.join(items)} is impossible: it must be at most 16 numbers of seconds, each at least "
            "0.001, such as 1,8,60, or full"
        ) from None


if __name__ == "__main__":
    cli.run(main)
