"""HarmonicRNN and its peers on the three data sets: equal parameters, equal tokens, one protocol.

    python -m workflows.ablate --study=models --size=small --seeds=0,1,2 --source=sc09=sc09.zip \\
      --source=beethoven=beethoven.zip --source=youtubemix=youtube_mix.zip       # an hour and a half on two CPU cores
    python -m workflows.ablate --study=models --size=paper                       # each peer with its own paper's recipe

At the small size all models have about 168,000 parameters, a softmax over the levels, the same windows in the same
order and one recipe, which was tuned for none of them; of YouTubeMix the first 20 seconds of each recording are
taken. Whole recordings are evaluated with the state carried, and windows of a second each with no past. At the
paper's size every model has the config of its own paper, so tokens and parameters differ; nothing has been run.
"""

from __future__ import annotations

import dataclasses

from configs import (
    beethoven,
    mamba_sc09,
    mamba_youtubemix,
    million_youtubemix,
    samplernn_sc09,
    sashimi_beethoven,
    sashimi_sc09,
    sashimi_youtubemix,
    sc09,
    wavenet_sc09,
    youtubemix,
)
from configs.ablations import Published, Run, Study
from harmonic import models
from harmonic.config import Config, DataConfig, EvaluateConfig, GenerateConfig, TrainConfig
from harmonic.models import ModelConfig
from harmonic.published import RESULTS

KINDS = ("harmonic_rnn", "sashimi", "mamba", "latent_transformer", "wavenet", "samplernn")
_TITLES = {"sc09": "SC09", "beethoven": "Beethoven", "youtubemix": "YouTubeMix"}
_ENCODINGS = {"sc09": "mu_law", "beethoven": "linear", "youtubemix": "mu_law"}
_CROPS = {"sc09": 8_000, "beethoven": 0, "youtubemix": 320_000}  # samples of a recording; 0 for all
_PAPER = (
    *(module.get_config() for module in (sc09, wavenet_sc09, samplernn_sc09, sashimi_sc09, mamba_sc09)),
    *(module.get_config() for module in (beethoven, sashimi_beethoven)),
    *(module.get_config() for module in (youtubemix, sashimi_youtubemix, mamba_youtubemix, million_youtubemix)),
)


def reduced() -> dict[str, ModelConfig]:
    """A model of every kind with about 168,000 parameters, by kind, all with a softmax."""
    configs = {kind: models.reduced(kind).config for kind in KINDS}
    default = configs[models.DEFAULT_KIND]
    return {**configs, models.DEFAULT_KIND: dataclasses.replace(default, head="categorical")}  # type: ignore[call-arg]


def small(dataset: str, model: ModelConfig, name: str) -> Config:
    """A short training of a reduced model on windows of 1,024 samples."""
    return Config(
        name=name,
        model=model,
        data=DataConfig(
            dataset=dataset,
            encoding=_ENCODINGS[dataset],  # type: ignore[arg-type]
            window_length=1_024,
            crop_length=_CROPS[dataset],
        ),
        train=TrainConfig(
            steps=600,
            global_batch_size=2,
            learning_rate=0.004,
            schedule="linear",
            warmup_steps=30,
            beta2=0.95,
            ema_decay=0.99,
            ema_debias=True,
            log_every=20,
            validate_every=300,
            checkpoint_every=300,
            validation_recordings=24 if dataset == "sc09" else 1,
        ),
        evaluate=EvaluateConfig(batch_size=32, context_seconds=() if dataset == "sc09" else (1.0,)),
        generate=GenerateConfig(num_samples=4, seconds=1.0, num_continuations=1, prompt_seconds=0.25),
    )


def published(config: Config) -> Published:
    """What is published of the config's kind on its data set; of several rows the first."""
    paper = models.about(config.model.kind).arxiv
    for row in RESULTS:
        if (row.dataset, row.paper) == (config.data.dataset, paper):
            names = ("bits_per_sample", "fid", "inception_score", "parameters")
            return Published(**{name: row.value(name) for name in names})
    return Published()


def get_study(size: str) -> Study:
    """The study."""
    if size == "paper":
        configs = [dataclasses.replace(config, name=f"models_paper_{config.name}") for config in _PAPER]
    else:
        configs = [
            small(dataset, model, f"models_small_{dataset}_{kind}")
            for dataset in _TITLES
            for kind, model in reduced().items()
        ]
    return Study(
        name="models",
        title="HarmonicRNN and its peers",
        reproduces="table 4 of Mamba's paper and others",
        note="Bits per sample of one data set say nothing about those of another. Published figures are of the models' "
        "own sizes, and of the protocols of their papers.",
        baseline="",
        runs=tuple(
            Run(
                f"{config.data.dataset}_{config.model.kind}",
                f"{_TITLES[config.data.dataset]}: {models.about(config.model.kind).name}",
                config,
                published(config),
            )
            for config in configs
        ),
    )
