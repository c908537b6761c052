"""The model in the box, `harmonic.load("piano")`: the demo's piano, a wider model, an hour of training.

    python -m workflows.full_run --config=piano
    python -m workflows.export --workdir=runs/piano --output=harmonic/weights/piano

Two CPU cores: an hour. Bits per sample on the demo's test split: harmonic/weights/piano/README.md.
"""

import dataclasses

from configs import demo
from harmonic.config import Config, Stage


def get_config() -> Config:
    """The config."""
    config = demo.get_config()
    model = dataclasses.replace(config.model, width=48, state_width=96, gate_blocks=48)
    train = dataclasses.replace(
        config.train,
        steps=40_000,
        global_batch_size=16,
        stages=(Stage(start=28_000, window_length=1_024, global_batch_size=4), Stage(36_000, 4_096, 1)),
        ema_decay=0.999,
        warmup_steps=200,
        log_every=100,
        validate_every=4_000,
        checkpoint_every=2_000,
    )
    return dataclasses.replace(config, name="piano", model=model, train=train)
