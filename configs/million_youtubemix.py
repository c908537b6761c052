"""The latent Transformer on YouTubeMix: 4,027,648 parameters, a context of 524,288 samples, in SaShiMi's budget.

    python -m workflows.full_run --config=million_youtubemix --source=youtube_mix.zip
    python -m workflows.evaluate --workdir=runs/million_youtubemix --context=1,8,33,60

Windows are whole minutes; attention runs once over their 3,752 latents, the layers on samples over segments.
`--set=model.context=16384` limits the past. The recipe is this project's: the paper (arXiv 2206.08297) names none. Its
claim is a lower likelihood than SaShiMi's with about as many parameters; SaShiMi's published figure is 1.294 bits per
sample. Not run at this size.
"""

from harmonic.config import Config, DataConfig, EvaluateConfig, GenerateConfig, TrainConfig
from harmonic.models.latent_transformer.config import ModelConfig


def get_config() -> Config:
    """The config."""
    return Config(
        name="million_youtubemix",
        model=ModelConfig(),
        data=DataConfig(dataset="youtubemix", encoding="mu_law", window_length=960_512),
        train=TrainConfig(
            steps=100_000,
            global_batch_size=1,
            segment_length=16_384,
            learning_rate=0.001,
            schedule="cosine",
            decay_start=0.05,
            warmup_steps=2_000,
            weight_decay=0.1,
            beta2=0.95,
            clip_norm=1.0,
        ),
        evaluate=EvaluateConfig(segment_length=32_768, context_seconds=(1.0, 8.0, 33.0, 60.0)),
        generate=GenerateConfig(num_samples=8, seconds=60.0, prompt_seconds=8.0),
    )
