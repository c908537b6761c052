"""The three data sets: table 4.

    python -m workflows.ablate --study=datasets --size=paper        # two days, one and three quarters, and 19 hours
    python -m workflows.ablate --study=datasets --size=small --source=sc09=sc09.zip \\
      --source=beethoven=beethoven.zip --source=youtubemix=youtube_mix.zip

The paper evaluates whole minutes of YouTubeMix, SaShiMi windows of 8 seconds. The small study trains the same reduced
model on windows of an eighth of a second of each data set, and evaluates whole recordings.
"""

import dataclasses

from configs import beethoven, youtubemix
from configs.ablations import Run, Study, base, published

_PAPER = {
    "sc09": ("SC09", published("sc09", "128 pooling groups")),
    "beethoven": ("Beethoven", published("beethoven")),
    "youtubemix": ("YouTubeMix", published("youtubemix", "whole minutes")),
}


def get_study(size: str) -> Study:
    """The study."""
    small = base(size)
    runs = []
    for name, config in (
        ("sc09", small),
        ("beethoven", beethoven.get_config()),
        ("youtubemix", youtubemix.get_config()),
    ):
        if size == "small":
            data = dataclasses.replace(config.data, window_length=small.data.window_length)
            # A validation of all the minutes would take longer than the steps between.
            train = dataclasses.replace(small.train, validation_recordings=48 if name == "sc09" else 2)
            config = dataclasses.replace(small, data=data, train=train)
        title, printed = _PAPER[name]
        runs.append(Run(name, title, dataclasses.replace(config, name=f"datasets_{size}_{name}"), printed))
    return Study(
        name="datasets",
        title="Data sets",
        reproduces="table 4",
        note="Bits per sample of one data set say nothing about those of another.",
        baseline="",
        runs=tuple(runs),
    )
