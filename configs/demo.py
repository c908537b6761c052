"""The demo: a reduced HarmonicRNN on tunes that the project's own small piano plays. No network.

    python -m workflows.full_run

Two CPU cores: about five minutes, of which training takes three and a half.
"""

from harmonic.config import Config, DataConfig, EvaluateConfig, GenerateConfig, ModelConfig, TrainConfig


def get_config() -> Config:
    """The config."""
    return Config(
        name="demo",
        model=ModelConfig(
            width=32, state_width=64, pool_factors=(4, 4), blocks_per_level=2, pool_groups=32, dropout=0.0
        ),
        data=DataConfig(dataset="demo", encoding="mu_law", window_length=16_000),
        train=TrainConfig(
            steps=450,
            global_batch_size=2,
            learning_rate=0.006,
            warmup_steps=50,
            ema_decay=0.98,
            ema_debias=True,
            validate_every=150,
            checkpoint_every=150,
        ),
        evaluate=EvaluateConfig(batch_size=6),
        generate=GenerateConfig(num_samples=4, seconds=4.0, num_continuations=2, prompt_seconds=2.0),
    )
