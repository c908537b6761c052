"""The config that is written beside a data set of one's own, so that it can be trained on at once."""

from __future__ import annotations

import contextlib

from harmonic import models
from harmonic.errors import UserError
from harmonic.records import Manifest
from pipelines.beam.sink import read_manifest
from pipelines.beam.storage import read_file, remove_file, write_file
from pipelines.sources.layouts import DATA_SETS

CONFIG_NAME = "config.py"
_AT_ONCE = 16_000  # samples of a recording that evaluation holds at once
_TO_SEE = 60_000_000  # samples of a training run: some ten minutes on two CPU cores
_AT_A_STEP = 2_048  # samples, in windows that grow: (the share of the steps that comes before, samples of a window)
_WINDOWS = ((0.0, 128), (0.375, 256), (0.75, 1_024))
_TO_VALIDATE = 2_000_000  # samples
_TEMPLATE = '''"""A reduced {model} on {recordings:,} recordings of one's own ({hours:.2f} hours to train on).

    python -m workflows.train --config=data/{name}/config.py
    python -m workflows.full_run --config=data/{name}/config.py        # trains, evaluates, generates, reports

Two CPU cores: training takes about {minutes} minutes. Written by pipelines.prepare from the manifest. Change what you
like: a config that was changed is left as it is when the data set is prepared again. The paper's model is
ModelConfig() alone, its recipe in configs/beethoven.py.
"""

from harmonic.config import Config, DataConfig, EvaluateConfig, GenerateConfig, ModelConfig, Stage, TrainConfig


def get_config() -> Config:
    """The config."""
    return Config(
        name="{name}",
        model=ModelConfig(
            {sizes},
        ),
        data=DataConfig(
            dataset="{name}",
            encoding="{encoding}",
            num_levels={levels:_},
            window_length={window:_},
        ),
        train=TrainConfig(
            steps={steps:_},
            global_batch_size={batch},
            stages={stages},
            optimizer="muon",
            learning_rate=0.005,
            schedule="linear",
            warmup_steps=50,
            beta2=0.95,
            ema_decay=0.99,
            ema_debias=True,
            log_every=50,
            validate_every={every},
            checkpoint_every={every},
            validation_recordings={validation},
        ),
        evaluate=EvaluateConfig(batch_size=16, segment_length={at_once:_}),
        generate=GenerateConfig(
            num_samples=4, seconds={seconds}, num_continuations={continuations}, prompt_seconds={prompt}
        ),
    )
'''


def _rows(window: int) -> int:
    """Windows a step."""
    return max(_AT_A_STEP // window, 1)


def config_text(manifest: Manifest) -> str:
    """The text of a data set's config.py: the same manifest always gives the same text.

    Windows are short, and longer at the end, as in configs/sc09_small.py, whatever the data set's own are; training
    takes minutes on two CPU cores.
    """
    model = models.reduced()
    multiple = model.config.multiple
    train, validation, test = (manifest.splits[split] for split in ("train", "validation", "test"))
    longest = max(shard.longest for shard in train.shards) or manifest.window_length
    steps = _TO_SEE // _AT_A_STEP
    sizes: dict[int, int] = {}  # the step that a window's length is taken from
    for share, length in _WINDOWS:
        fitting = min(length, longest if share == 0 else longest // multiple * multiple)
        if not sizes or fitting > max(sizes):
            sizes[fitting] = round(share * steps)
    (window, _), *later = sizes.items()
    rows = [f"\n{' ' * 16}Stage({start:_}, window_length={n:_}, global_batch_size={_rows(n)})," for n, start in later]
    seconds = min(4.0, max(shard.longest for shard in test.shards) / manifest.sample_rate or 4.0)
    few = validation.samples > _TO_VALIDATE
    return _TEMPLATE.format(
        model=model.config.about.name,
        sizes=model.source(",\n            "),
        name=manifest.dataset,
        recordings=train.recordings,
        hours=train.samples / manifest.sample_rate / 3600,
        minutes=max(1, round(steps * _rows(window) * window / model.trained_per_minute)),
        encoding=manifest.encoding,
        levels=manifest.num_levels,
        window=window,
        steps=steps,
        batch=_rows(window),
        stages=f"({''.join(rows)}\n{' ' * 12})" if rows else "()",
        every=max(steps // 6, 1),
        validation=max(validation.recordings * _TO_VALIDATE // validation.samples, 1) if few else 0,
        at_once=_AT_ONCE // multiple * multiple,
        seconds=max(round(seconds, 3), 0.002),
        continuations=min(test.recordings, 2),
        prompt=max(round(seconds / 2, 3), 0.001),
    )


def write_config(folder: str, manifest: Manifest) -> None:
    """Writes the config of a data set of one's own where there is none.

    Raises:
      UserError: it cannot be written.
    """
    if manifest.dataset not in DATA_SETS and read_file(folder, CONFIG_NAME) is None:
        write_file(folder, CONFIG_NAME, config_text(manifest).encode())


def remove_config(folder: str) -> None:
    """Removes the config of a data set that is to be prepared again, unless somebody changed it.

    Raises:
      UserError: it cannot be removed.
    """
    with contextlib.suppress(UserError):  # a damaged manifest, which says nothing of the config
        manifest = read_manifest(folder)
        text = read_file(folder, CONFIG_NAME)
        if manifest is None or text != config_text(manifest).encode():
            return
        remove_file(folder, CONFIG_NAME)
