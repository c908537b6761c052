"""HarmonicRNN on YouTubeMix (piano, whole minutes: 960,512 samples), the paper's baseline: 7,272,704 parameters.

    python -m workflows.full_run --config=youtubemix                # from the Hugging Face hub: gated, needs a token
    python -m workflows.full_run --config=youtubemix --source=youtube_mix.zip

500 epochs of 7 steps of 31 million samples: about 19 hours at the paper's 1.6 million samples a second. The paper:
1.324 bits per sample on the test split. A minute is cut into segments of 16,000 samples, whose gradient is exact:
memory is that of one segment for each recording in the batch.
"""

from harmonic.config import Config, DataConfig, EvaluateConfig, GenerateConfig, TrainConfig


def get_config() -> Config:
    """The config."""
    return Config(
        name="youtubemix",
        data=DataConfig(dataset="youtubemix", encoding="mu_law", window_length=960_512),
        train=TrainConfig(steps=3_500, segment_length=16_000, validate_every=35, checkpoint_every=35),
        evaluate=EvaluateConfig(segment_length=32_000, context_seconds=(1.0, 8.0, 60.0)),
        generate=GenerateConfig(num_samples=8, seconds=60.0, prompt_seconds=8.0),
    )
