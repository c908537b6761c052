"""What each part of the reduced models' recipe is worth: all of it, and without one part at a time.

    python -m workflows.ablate --study=recipe --size=small --source=sc09.zip --seeds=0,1,2     # an hour and a half
    python -m workflows.ablate --study=recipe --size=paper                                     # two days a run

All runs see as many samples. The parts: Muon for the blocks' matrices; many steps over short windows, longer ones at
the end; a rate that falls to zero; a mixture of logistics instead of a softmax; recurrences that begin at all
frequencies and with long memories. A third level of pooling is the one thing that is added. At the paper's size nothing
has been run.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from configs import sc09, sc09_best, sc09_small
from configs.ablations import Run, Study, base
from harmonic.config import Config

_SAMPLES = 4_915_200  # of a small run: about two minutes


def _with(config: Config, **parts: dict[str, Any]) -> Config:
    """The config with other values of some fields of its parts."""
    return dataclasses.replace(config, **{n: dataclasses.replace(getattr(config, n), **v) for n, v in parts.items()})


def get_study(size: str) -> Study:
    """The study."""
    if size == "paper":
        published, found = sc09.get_config(), sc09_best.get_config()
        deep: dict[str, Any] = {"pool_factors": (2, 4, 4, 5, 5)}
    else:
        published, small = base("small"), sc09_small.get_config()
        steps = _SAMPLES // (small.train.global_batch_size * small.data.window_length)
        found = _with(
            small,
            train={
                "steps": steps,
                "stages": tuple(
                    dataclasses.replace(s, start=s.start * steps // small.train.steps) for s in small.train.stages
                ),
                "validate_every": steps // 6,
                "checkpoint_every": steps // 6,
                "validation_recordings": 48,
                "sample_every": 0,
            },
            generate={"num_samples": 4, "num_continuations": 2},
        )
        deep = {"pool_factors": (2, 4, 4), "blocks_per_level": (1, 1, 3, 3)}
    train, model = published.train, published.model
    per_step = train.global_batch_size * published.data.window_length
    per_found_step = found.train.global_batch_size * found.data.window_length
    long_windows = {
        "steps": found.train.steps * per_found_step // per_step,
        "global_batch_size": train.global_batch_size,
        "stages": (),
        "validate_every": train.validate_every,
        "checkpoint_every": train.checkpoint_every,
    }
    window = {"window_length": published.data.window_length}
    ranges = {name: getattr(model, name) for name in ("min_radius", "max_radius", "max_angle")}
    runs: dict[str, tuple[str, dict[str, dict[str, Any]]]] = {
        "found": ("The recipe", {}),
        "adamw": ("AdamW alone", {"train": {"optimizer": "adamw"}}),
        "windows": ("Long windows, fewer steps", {"train": long_windows, "data": window}),
        "constant": ("A constant rate", {"train": {"schedule": "constant"}}),
        "softmax": ("A softmax", {"model": {"head": "categorical"}}),
        "ranges": ("The paper's initial recurrences", {"model": ranges}),
        "pooling": (f"Pooling by {chr(215).join(map(str, deep['pool_factors']))}", {"model": deep}),
        "published": (
            "None of it",
            {
                "model": {"head": "categorical", **ranges},
                "train": {**long_windows, "optimizer": "adamw", "schedule": "constant"},
                "data": window,
            },
        ),
    }
    return Study(
        name="recipe",
        title="The recipe, part by part",
        reproduces="nothing in the paper",
        note="Each run but the first leaves out one part, or adds a level of pooling; the last leaves out all.",
        baseline="found",
        runs=tuple(
            Run(name, title, dataclasses.replace(_with(found, **parts), name=f"recipe_{size}_{name}"))
            for name, (title, parts) in runs.items()
        ),
    )
