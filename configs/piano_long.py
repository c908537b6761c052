"""The second part of the model in the box: `piano` continued on whole recordings.

    python -m workflows.full_run --config=piano_long --init_from=runs/piano
    python -m workflows.export --workdir=runs/piano_long --output_dir=exports/piano --num_samples=0

2.146 bits per sample on the demo's test split, after five more minutes on two CPU cores (2026-11-29). From short
windows alone it falls into noise after some seven seconds of its own sound; from these it does not.
"""

import dataclasses

from configs import piano
from harmonic.config import Config


def get_config() -> Config:
    """The config."""
    config = piano.get_config()
    train = dataclasses.replace(
        config.train,
        steps=220,
        global_batch_size=1,
        stages=(),
        segment_length=12_800,
        learning_rate=0.002,
        decay_start=0.2,
        warmup_steps=20,
        ema_decay=0.95,
        log_every=5,
        validate_every=110,
        checkpoint_every=20,
    )
    data = dataclasses.replace(config.data, window_length=128_000)
    return dataclasses.replace(config, name="piano_long", data=data, train=train)
