"""The paper's model and as many samples on Beethoven, by another recipe than the paper's; see `sc09_best`.

    python -m workflows.full_run --config=beethoven_best --source=beethoven.zip

About two days at 1.6 million samples a second, the paper's rate on a TPU v4-8. Not run; the aim is below the paper's
0.915 bits per sample. Windows of a quarter of a second, then of one, and at last the recordings' eight.
"""

from configs import beethoven
from configs.sc09_best import best
from harmonic.config import Config, Stage


def get_config() -> Config:
    """The config."""
    stages = (Stage(238_000, 16_000, 32), Stage(357_000, 128_000, 4))
    return best(beethoven.get_config(), "beethoven_best", steps=476_000, stages=stages)
