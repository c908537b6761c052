"""A reduced HarmonicRNN (146,892 parameters) that learns real spoken digits on two CPU cores in about ten minutes.

    python -m workflows.full_run --config=sc09_small --source=sc09.zip

Many small steps over short windows, longer windows at the end; evaluation carries the state through whole recordings.
`python -m workflows.ablate --study=recipe` says what each part of the recipe is worth.
"""

from harmonic import models
from harmonic.config import Config, DataConfig, EvaluateConfig, GenerateConfig, Stage, TrainConfig


def get_config() -> Config:
    """The config."""
    return Config(
        name="sc09_small",
        model=models.reduced().config,
        data=DataConfig(dataset="sc09", encoding="mu_law", window_length=256),
        train=TrainConfig(
            steps=7_200,
            global_batch_size=8,
            stages=(Stage(start=5_400, window_length=1_024, global_batch_size=2),),
            optimizer="muon",
            learning_rate=0.008,
            schedule="linear",
            warmup_steps=50,
            ema_decay=0.99,
            ema_debias=True,
            validate_every=900,
            checkpoint_every=900,
            sample_every=2_400,
        ),
        evaluate=EvaluateConfig(batch_size=32),
        generate=GenerateConfig(num_samples=8, seconds=1.0, prompt_seconds=0.25),
    )
