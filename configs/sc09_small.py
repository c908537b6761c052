"""A reduced HarmonicRNN (139,072 parameters) that learns real spoken digits on two CPU cores in about ten minutes.

    python -m workflows.full_run --config=sc09_small --source=sc09.zip

Windows of half a second: digits are rarely longer, so that little of a batch is padding. The learning rate is three
times the paper's, and the average of the weights is short and debiased, since the run is short.
"""

from harmonic.config import Config, DataConfig, EvaluateConfig, GenerateConfig, ModelConfig, TrainConfig


def get_config() -> Config:
    """The config."""
    return Config(
        name="sc09_small",
        model=ModelConfig(
            width=32, state_width=64, pool_factors=(4, 4), blocks_per_level=2, pool_groups=32, dropout=0.0
        ),
        data=DataConfig(dataset="sc09", encoding="mu_law", window_length=8_000),
        train=TrainConfig(
            steps=1_400,
            global_batch_size=4,
            learning_rate=0.006,
            warmup_steps=50,
            ema_decay=0.98,
            ema_debias=True,
            validate_every=200,
            checkpoint_every=200,
        ),
        evaluate=EvaluateConfig(batch_size=32),
        # At temperature 1 a model this small drifts into noise: its own samples lead it where no recording ever was.
        generate=GenerateConfig(num_samples=8, seconds=1.0, temperature=0.8, prompt_seconds=0.25),
    )
