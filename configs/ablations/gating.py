"""Gates by level: everywhere, only inside, or nowhere.

    python -m workflows.ablate --study=gating --size=small --seeds=0,1,2 --source=sc09=sc09.zip \\
      --source=youtubemix=youtube_mix.zip
    python -m workflows.ablate --study=gating --size=paper

Mamba's ablation (arXiv 2312.00752, figure 10) has time-invariant layers ahead near the waveform, on piano; on speech
its table 5 has it the other way round. Nobody has tried it with CG-LRU. At the paper's size nothing has been run.
"""

from __future__ import annotations

import dataclasses

from configs import sc09, youtubemix
from configs.ablations import Run, Study
from configs.ablations.models import reduced, small
from harmonic import models
from harmonic.config import Config
from harmonic.models.harmonic_rnn.config import ModelConfig

_GATES = {"all": "Gated everywhere", "inside": "Outermost level ungated", "none": "Ungated"}


def get_study(size: str) -> Study:
    """The study."""
    runs = []
    for dataset, title, published in (("sc09", "SC09", sc09), ("youtubemix", "YouTubeMix", youtubemix)):
        for gates, described in _GATES.items():
            config = published.get_config() if size == "paper" else _small(dataset)
            assert isinstance(config.model, ModelConfig)
            inner = len(config.model.pool_factors)
            choices: dict[str, bool | tuple[bool, ...]]
            choices = {"all": True, "inside": (False, *(True,) * inner), "none": False}
            name = f"{dataset}_{gates}"
            model = dataclasses.replace(config.model, gated=choices[gates])
            config = dataclasses.replace(config, name=f"gating_{size}_{name}", model=model)
            runs.append(Run(name, f"{title}: {described.lower()}", config))
    return Study(
        name="gating",
        title="Gates by level",
        reproduces="nothing in the paper",
        note="Bits per sample of one data set say nothing about those of another. Gates that are held open keep their "
        "parameters, which are not used.",
        baseline="",
        runs=tuple(runs),
    )


def _small(dataset: str) -> Config:
    return small(dataset, reduced()[models.DEFAULT_KIND], "reduced")
