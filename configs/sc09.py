"""HarmonicRNN on SC09 (spoken digits, one second), the paper's baseline: 7,272,704 parameters.

    python -m workflows.full_run --config=sc09                      # from the Hugging Face hub
    python -m workflows.full_run --config=sc09 --source=sc09.zip

500 epochs of 974 steps. The paper: 11.5 epochs an hour on a TPU v4-8 (two days), 1.854 bits per sample on the test
split. On two CPU cores a step takes a minute and a half: use sc09_small there.
"""

from harmonic.config import Config, DataConfig, GenerateConfig, TrainConfig


def get_config() -> Config:
    """The config."""
    return Config(
        name="sc09",
        data=DataConfig(dataset="sc09", encoding="mu_law", window_length=16_000),
        train=TrainConfig(steps=487_000, validate_every=974, checkpoint_every=974),
        generate=GenerateConfig(num_samples=32, seconds=1.0, prompt_seconds=0.25),
    )
