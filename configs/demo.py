"""The demo: a reduced HarmonicRNN on tunes that the project's own small piano plays. No network.

    python -m workflows.full_run

Two CPU cores: four minutes, of which training takes three. 2.61 bits per sample on the test split, where an order-1
Markov model needs 5.24.

Many small steps over short windows, longer ones at the end, and a rate that falls to zero: workflows/README.md, "The
recipe". Temperature 0.9 is what `workflows.sound --choose` prefers among those that make no louder noise.
"""

from harmonic import models
from harmonic.config import Config, DataConfig, EvaluateConfig, GenerateConfig, Stage, TrainConfig


def get_config() -> Config:
    """The config."""
    return Config(
        name="demo",
        model=models.reduced().config,
        data=DataConfig(dataset="demo", encoding="mu_law", window_length=128),
        train=TrainConfig(
            steps=14_000,
            global_batch_size=16,
            stages=(Stage(5_500, window_length=256, global_batch_size=8), Stage(10_500, 1_024, 2)),
            optimizer="muon",
            learning_rate=0.005,
            schedule="linear",
            warmup_steps=50,
            beta2=0.95,
            ema_decay=0.99,
            ema_debias=True,
            log_every=20,
            validate_every=3_500,
            checkpoint_every=3_500,
            validation_recordings=3,
        ),
        evaluate=EvaluateConfig(batch_size=6),
        generate=GenerateConfig(num_samples=4, seconds=4.0, temperature=0.9, num_continuations=2, prompt_seconds=2.0),
    )
