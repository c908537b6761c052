"""The paper's model and as many samples on YouTubeMix, by another recipe than the paper's; see `sc09_best`.

    python -m workflows.full_run --config=youtubemix_best --source=youtube_mix.zip

About a day at 1.6 million samples a second, the paper's rate on a TPU v4-8. Not run; the aim is below the paper's 1.324
bits per sample. Windows of a quarter of a second, then of eight, and at last whole minutes, one a step, in segments.
"""

from configs import youtubemix
from configs.sc09_best import best
from harmonic.config import Config, Stage


def get_config() -> Config:
    """The config."""
    stages = (Stage(105_000, 128_000, 4), Stage(170_000, 960_000, 1))
    return best(youtubemix.get_config(), "youtubemix_best", steps=190_000, stages=stages)
