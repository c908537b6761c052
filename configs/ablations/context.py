"""What context is worth: by the likelihood of pieces of recordings, and by training on windows of each length.

    python -m workflows.ablate --study=context --size=small --source=youtube_mix.zip
    python -m workflows.ablate --study=context --size=paper --source=youtube_mix.zip

Every run is evaluated on whole recordings, and on pieces of 1/16, 1/4, 1, 4 and 16 seconds (at the paper's size up to
a minute), each with no past: its report shows the curve of one set of weights. All runs see as many samples. Mamba's
paper (arXiv 2312.00752, figure 7) has this curve for Mamba and S4, without numbers; the claim of arXiv 2206.08297 is
that a context of half a million samples is worth having. At the paper's size nothing has been run.
"""

from __future__ import annotations

import dataclasses

from configs import mamba_youtubemix, million_youtubemix, sashimi_youtubemix, youtubemix
from configs.ablations import Run, Study
from configs.ablations.models import reduced, small
from harmonic import models
from harmonic.config import Config

_KINDS = ("harmonic_rnn", "sashimi", "latent_transformer", "mamba")
_PAPER = dict(zip(_KINDS, (youtubemix, sashimi_youtubemix, million_youtubemix, mamba_youtubemix), strict=True))
_LENGTHS = {"small": (1_024, 8_192, 65_536), "paper": (16_384, 122_880, 524_288, 960_512)}
_SECONDS = {"small": (0.0625, 0.25, 1.0, 4.0, 16.0), "paper": (1.0, 8.0, 32.0, 60.0)}


def get_study(size: str) -> Study:
    """The study."""
    runs = []
    for kind in _KINDS:
        for length in _LENGTHS[size]:
            config = _PAPER[kind].get_config() if size == "paper" else small("youtubemix", reduced()[kind], "reduced")
            config = _with_windows(config, length, _SECONDS[size])
            name = f"{kind}_{length}"
            title = f"{models.about(kind).name}: windows of {length / 16_000:.2g} s"
            runs.append(Run(name, title, dataclasses.replace(config, name=f"context_{size}_{name}")))
    return Study(
        name="context",
        title="What context is worth",
        reproduces="figure 7 of Mamba's paper",
        note="All runs see as many samples in training; those of short windows take more windows a step.",
        baseline="",
        runs=tuple(runs),
    )


def _with_windows(config: Config, length: int, seconds: tuple[float, ...]) -> Config:
    """As many samples a run: more windows a step where that gives whole ones, else fewer steps."""
    samples = config.data.window_length * config.train.global_batch_size
    batch = max(1, samples // length)
    steps = max(1, config.train.steps * samples // (batch * length))
    every = max(1, steps // 2)
    segment = min(config.train.segment_length or 16_384, length)
    train = dataclasses.replace(
        config.train,
        steps=steps,
        global_batch_size=batch,
        segment_length=segment if length > segment else 0,
        warmup_steps=min(config.train.warmup_steps, max(1, steps // 10)),
        validate_every=every,
        checkpoint_every=every,
        log_every=max(1, min(config.train.log_every, steps // 10)),
    )
    data = dataclasses.replace(config.data, window_length=length)
    evaluate = dataclasses.replace(config.evaluate, context_seconds=seconds)
    return dataclasses.replace(config, data=data, train=train, evaluate=evaluate)
