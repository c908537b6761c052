"""SaShiMi on SC09, its authors' later U-Net: 6,820,512 parameters.

    python -m workflows.full_run --config=sashimi_sc09 --source=sc09.zip

100 epochs of 1,947 steps of 16 clips: a week on one V100 with the authors' code. Published: 1.873 bits per sample on
the test split. Not run at this size.
"""

from harmonic.config import Config, DataConfig, GenerateConfig, TrainConfig
from harmonic.models.sashimi.config import ModelConfig


def get_config() -> Config:
    """The config."""
    return Config(
        name="sashimi_sc09",
        model=ModelConfig(),
        data=DataConfig(dataset="sc09", encoding="mu_law", window_length=16_000),
        train=TrainConfig(
            steps=200_000,
            global_batch_size=16,
            learning_rate=0.001,
            schedule="cosine",
            decay_start=0.005,
            warmup_steps=1_000,
            weight_decay=0.1,
            clip_norm=1e9,
            skip_norm=1e12,
            ema_decay=0.0,
            validate_every=1_947,
            checkpoint_every=1_947,
        ),
        generate=GenerateConfig(num_samples=32, seconds=1.0, prompt_seconds=0.25),
    )
