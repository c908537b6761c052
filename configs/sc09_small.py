"""A reduced HarmonicRNN (159,884 parameters) that learns real spoken digits on two CPU cores in about ten minutes.

    python -m workflows.full_run --config=sc09_small --source=sc09.zip

2.158 bits per sample on the test split, where an order-1 Markov model needs 4.498 (19 minutes on one busy core). Many
small steps over short windows, longer windows at the end; evaluation carries the state through whole recordings.
`python -m workflows.ablate --study=recipe` says what each part of the recipe is worth.
"""

from harmonic import models
from harmonic.config import Config, DataConfig, EvaluateConfig, GenerateConfig, Stage, TrainConfig


def get_config() -> Config:
    """The config."""
    return Config(
        name="sc09_small",
        model=models.reduced().config,
        data=DataConfig(dataset="sc09", encoding="mu_law", window_length=128),
        train=TrainConfig(
            steps=40_000,
            global_batch_size=16,
            stages=(Stage(15_000, window_length=256, global_batch_size=8), Stage(30_000, 1_024, 2)),
            optimizer="muon",
            learning_rate=0.005,
            schedule="linear",
            warmup_steps=50,
            beta2=0.95,
            ema_decay=0.99,
            ema_debias=True,
            log_every=50,
            validate_every=10_000,
            checkpoint_every=5_000,
            sample_every=20_000,
        ),
        evaluate=EvaluateConfig(batch_size=32),
        generate=GenerateConfig(num_samples=8, seconds=1.0, prompt_seconds=0.25),
    )
