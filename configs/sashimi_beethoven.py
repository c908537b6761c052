"""SaShiMi on Beethoven, the paper's model for music: 4,059,360 parameters.

    python -m workflows.full_run --config=sashimi_beethoven --source=beethoven.zip

1,000,000 steps of one window of 128,000 samples: a week on one V100 with the authors' code. Published: 0.946 bits per
sample on the test split, over windows that forget the past and are each scaled to their own extremes; here a
recording has one scale (`--reset_every=128000` evaluates windows). The rate falls to a fifth when the loss has not
fallen for 20 epochs; the authors look at the validation loss, this config at that of training. Not run at this size.
"""

from harmonic.config import Config, DataConfig, EvaluateConfig, GenerateConfig, TrainConfig
from harmonic.models.sashimi.config import MUSIC


def get_config() -> Config:
    """The config."""
    return Config(
        name="sashimi_beethoven",
        model=MUSIC,
        data=DataConfig(dataset="beethoven", encoding="linear", window_length=128_000),
        train=TrainConfig(
            steps=1_000_000,
            global_batch_size=1,
            learning_rate=0.004,
            schedule="plateau",
            plateau_every=3_808,
            warmup_steps=0,
            weight_decay=0.0,
            clip_norm=1e9,
            skip_norm=1e12,
            ema_decay=0.0,
            validate_every=3_808,
            checkpoint_every=3_808,
        ),
        evaluate=EvaluateConfig(segment_length=32_000, context_seconds=(1.0, 8.0)),
        generate=GenerateConfig(num_samples=8, seconds=16.0, prompt_seconds=4.0),
    )
