"""HarmonicRNN on Beethoven (piano sonatas, clips of 8 seconds), the paper's baseline: 7,272,704 parameters.

    python -m workflows.full_run --config=beethoven                 # from the Hugging Face hub
    python -m workflows.full_run --config=beethoven --source=beethoven.zip

500 epochs of 119 steps of 4.1 million samples: about a day and three quarters at the paper's 1.6 million samples a
second (a TPU v4-8). The paper: 0.915 bits per sample on the test split. Linear quantisation, as published.
"""

from harmonic.config import Config, DataConfig, EvaluateConfig, GenerateConfig, TrainConfig


def get_config() -> Config:
    """The config."""
    return Config(
        name="beethoven",
        data=DataConfig(dataset="beethoven", encoding="linear", window_length=128_000),
        train=TrainConfig(steps=59_500, validate_every=119, checkpoint_every=119),
        evaluate=EvaluateConfig(segment_length=32_000, context_seconds=(1.0, 8.0)),
        generate=GenerateConfig(num_samples=8, seconds=16.0, prompt_seconds=4.0),
    )
