"""Mamba on YouTubeMix, whole minutes, with a complex state: 3,557,248 parameters.

    python -m workflows.full_run --config=mamba_youtubemix --source=youtube_mix.zip

200,000 steps of one window of 960,512 samples, in segments whose gradient is exact (the paper: 958,464). Shorter
windows at as many samples a step are `--set=data.window_length=8192 --set=train.global_batch_size=128` and so on.
Published as a
figure only: about 1.30 bits per sample at this length. Not run at this size.
"""

from harmonic.config import Config, DataConfig, EvaluateConfig, GenerateConfig, TrainConfig
from harmonic.models.mamba.config import ModelConfig


def get_config() -> Config:
    """The config."""
    return Config(
        name="mamba_youtubemix",
        model=ModelConfig(),
        data=DataConfig(dataset="youtubemix", encoding="mu_law", window_length=960_512),
        train=TrainConfig(
            steps=200_000,
            global_batch_size=1,
            segment_length=16_384,
            learning_rate=0.002,
            schedule="cosine",
            decay_start=0.1,
            warmup_steps=20_000,
            weight_decay=0.1,
            beta2=0.95,
            clip_norm=0.144,
            skip_norm=1e12,
            ema_decay=0.0,
        ),
        evaluate=EvaluateConfig(segment_length=32_768, context_seconds=(1.0, 8.0, 60.0)),
        generate=GenerateConfig(num_samples=8, seconds=60.0, prompt_seconds=8.0),
    )
