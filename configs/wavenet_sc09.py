"""WaveNet on SC09, as SaShiMi's and Mamba's authors compare with it: 4,244,480 parameters.

    python -m workflows.full_run --config=wavenet_sc09 --source=sc09.zip

100 epochs of 3,895 steps of 8 clips; days on one GPU. Published: 1.925 bits per sample on the test split (Mamba's table
4). The rate falls to a fifth when the loss has not fallen for 5 epochs; the authors look at the validation loss, this
config at that of training. Not run at this size.
"""

from harmonic.config import Config, DataConfig, GenerateConfig, TrainConfig
from harmonic.models.wavenet.config import ModelConfig


def get_config() -> Config:
    """The config."""
    return Config(
        name="wavenet_sc09",
        model=ModelConfig(),
        data=DataConfig(dataset="sc09", encoding="mu_law", window_length=16_000),
        train=TrainConfig(
            steps=389_500,
            global_batch_size=8,
            learning_rate=0.001,
            schedule="plateau",
            plateau_every=3_895,
            plateau_patience=5,
            warmup_steps=0,
            weight_decay=0.0,
            clip_norm=1e9,
            skip_norm=1e12,
            ema_decay=0.0,
            validate_every=3_895,
            checkpoint_every=3_895,
        ),
        generate=GenerateConfig(num_samples=32, seconds=1.0, prompt_seconds=0.25),
    )
