"""SampleRNN of three tiers on SC09, as SaShiMi's and Mamba's authors compare with it: 35,034,624 parameters.

    python -m workflows.full_run --config=samplernn_sc09 --source=sc09.zip

100 epochs of 243 steps of 128 clips; days on one GPU, since its recurrence runs in order. Published: 2.042 bits per
sample on the test split (Mamba's table 4). The gradient's numbers are cut to at most 1 in nats, as there (1.4427 in
bits); the published runs also cut the gradient in time, every 1,024 samples, and here it is exact. Not run at this
size.
"""

from harmonic.config import Config, DataConfig, GenerateConfig, TrainConfig
from harmonic.models.samplernn.config import ModelConfig


def get_config() -> Config:
    """The config."""
    return Config(
        name="samplernn_sc09",
        model=ModelConfig(),
        data=DataConfig(dataset="sc09", encoding="mu_law", window_length=16_000),
        train=TrainConfig(
            steps=24_300,
            global_batch_size=128,
            learning_rate=0.001,
            schedule="plateau",
            plateau_every=243,
            plateau_patience=5,
            warmup_steps=0,
            weight_decay=0.0,
            clip_norm=1e9,
            clip_value=1.4427,
            skip_norm=1e12,
            ema_decay=0.0,
            validate_every=243,
            checkpoint_every=243,
        ),
        generate=GenerateConfig(num_samples=32, seconds=1.0, prompt_seconds=0.25),
    )
