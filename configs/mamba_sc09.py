"""Mamba on SC09: 6,255,104 parameters (the paper prints 6.1M).

    python -m workflows.full_run --config=mamba_sc09 --source=sc09.zip

100 epochs, 200,000 steps of 16 clips, as in the paper's appendix E.4.2; the cosine is taken from its protocol for
language. Its gradient clip, 0.1 in nats, is 0.144 in bits. Published: 1.852 bits per sample on the test split. Not
run at this size.
"""

from harmonic.config import Config, DataConfig, GenerateConfig, TrainConfig
from harmonic.models.mamba.config import ModelConfig


def get_config() -> Config:
    """The config."""
    return Config(
        name="mamba_sc09",
        model=ModelConfig(pool_factors=(4, 4), blocks_per_level=8, complex=False),
        data=DataConfig(dataset="sc09", encoding="mu_law", window_length=16_000),
        train=TrainConfig(
            steps=200_000,
            global_batch_size=16,
            learning_rate=0.002,
            schedule="cosine",
            decay_start=0.1,
            warmup_steps=20_000,
            weight_decay=0.1,
            beta2=0.95,
            clip_norm=0.144,
            skip_norm=1e12,
            ema_decay=0.0,
            validate_every=1_947,
            checkpoint_every=1_947,
        ),
        generate=GenerateConfig(num_samples=32, seconds=1.0, prompt_seconds=0.25),
    )
