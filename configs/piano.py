"""The first part of the model in the box, `harmonic.load("piano")`: the demo's piano, a wider model, an hour.

    python -m workflows.full_run --config=piano

2.166 bits per sample on the demo's test split, in 40 minutes on one of two CPU cores (2026-11-29). `piano_long`
continues from its weights.
"""

import dataclasses

from configs import demo
from harmonic.config import Config, Stage
from harmonic.models.harmonic_rnn.config import ModelConfig


def get_config() -> Config:
    """The config."""
    config = demo.get_config()
    assert isinstance(config.model, ModelConfig)
    model = dataclasses.replace(config.model, width=48, state_width=96, gate_blocks=48)
    train = dataclasses.replace(
        config.train,
        steps=40_000,
        global_batch_size=16,
        stages=(Stage(28_000, window_length=1_024, global_batch_size=4), Stage(36_000, 4_096, 1)),
        learning_rate=0.008,
        warmup_steps=200,
        beta2=0.999,
        ema_decay=0.999,
        log_every=100,
        validate_every=4_000,
        checkpoint_every=2_000,
    )
    return dataclasses.replace(
        config,
        name="piano",
        model=model,
        data=dataclasses.replace(config.data, window_length=256),
        train=train,
    )
