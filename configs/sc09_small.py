"""A reduced HarmonicRNN (154,944 parameters) that learns real spoken digits on two CPU cores in about ten minutes.

    python -m workflows.full_run --config=sc09_small --source=sc09.zip

Many small steps over windows of a quarter of a second, which hold little padding; evaluation carries the state through
whole recordings. The learning rate is four times the paper's, and the average of the weights is short and debiased,
since the run is short.
"""

from harmonic import models
from harmonic.config import Config, DataConfig, EvaluateConfig, GenerateConfig, TrainConfig


def get_config() -> Config:
    """The config."""
    return Config(
        name="sc09_small",
        model=models.reduced().config,
        data=DataConfig(dataset="sc09", encoding="mu_law", window_length=4_000),
        train=TrainConfig(
            steps=2_400,
            global_batch_size=4,
            learning_rate=0.008,
            warmup_steps=50,
            ema_decay=0.99,
            ema_debias=True,
            validate_every=400,
            checkpoint_every=400,
            sample_every=800,
        ),
        evaluate=EvaluateConfig(batch_size=32),
        # At temperature 1 a model this small drifts into noise: its own samples take it where no recording has been.
        generate=GenerateConfig(num_samples=8, seconds=1.0, temperature=0.8, prompt_seconds=0.25),
    )
