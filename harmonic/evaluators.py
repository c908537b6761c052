"""Evaluators: what looks at a run's weights while it trains. Training does not depend on them.

class Silence:
    name, every = "silence", 500

    def __call__(self, model, params, step, writer):
        return {"share": ...}  # a line of kind "silence" in metrics.jsonl, and curves in TensorBoard

train(config, data, workdir, evaluators=[Silence()])
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from harmonic import processes
from harmonic.config import Config
from harmonic.data import Dataset
from harmonic.evaluate import evaluate_split
from harmonic.metrics import MetricsWriter
from harmonic.models.base import Model
from harmonic.voice import Codec, Voice

VALIDATION = "validation"  # the evaluator whose bits per sample choose the best weights
_SAMPLES = 2  # generated at a time: as many as a small machine has cores


class Evaluator(Protocol):
    """A look at the weights every so many steps.

    Attributes:
      name: the kind of its lines in metrics.jsonl.
      every: steps between two looks; 0 looks after the last step only. There is always a look after the last step.
    """

    name: str
    every: int

    def __call__(self, model: Model, params: Any, step: int, writer: MetricsWriter) -> Mapping[str, float]:
        """Looks at the weights.

        Every process calls it at the same step. Work for one process alone ends with `processes.gather("")`, as
        `Samples` does: the others must not wait in a collective.

        Args:
          model: of the run.
          params: its averaged weights, on one device of this process.
          step: updates so far.
          writer: for anything but the figures.

        Returns:
          Figures by name, the same in all processes; none for no line.
        """
        ...


class Validation:
    """Bits per sample of the validation split."""

    name = VALIDATION

    def __init__(self, config: Config, dataset: Dataset):
        self.every = config.train.validate_every
        self._config, self._dataset = config, dataset

    def __call__(self, model: Model, params: Any, step: int, writer: MetricsWriter) -> Mapping[str, float]:
        """{"bits_per_sample"}; each process evaluates its share of the recordings, on one of its devices."""
        share = evaluate_split(
            model,
            params,
            self._dataset.split("validation"),
            self._config,
            limit=self._config.train.validation_recordings,
            shard=processes.current(),
            labels=self._dataset.labels(),
        )
        shares = [json.loads(text) for text in processes.gather(json.dumps([share.nats, share.samples]))]
        nats, samples = (sum(numbers) for numbers in zip(*shares, strict=True))
        return {"bits_per_sample": nats / math.log(2) / samples}


class Samples:
    """A few samples, to be heard on the boards, from the same random numbers each time."""

    name = "samples"

    def __init__(self, config: Config, dataset: Dataset):
        self.every = config.train.sample_every
        self._config, self._codec = config, Codec.of(dataset.manifest)

    def __call__(self, model: Model, params: Any, step: int, writer: MetricsWriter) -> Mapping[str, float]:
        """No figures. Process 0 generates, and the others wait: a collective would not wait as long."""
        if processes.current()[0] == 0:
            rate = self._codec.sample_rate
            pieces = Voice(model, params, self._codec).pieces(
                max(1, round(self._config.train.sample_seconds * rate)),
                num_samples=_SAMPLES,
                seed=self._config.seed,
                temperature=self._config.generate.temperature,
                top_p=self._config.generate.top_p,
            )
            writer.write_sounds(step, np.concatenate([piece.sound for piece in pieces], axis=1), rate)
        processes.gather("")
        return {}


def evaluators_of(config: Config, dataset: Dataset) -> list[Evaluator]:
    """The evaluators that a config asks for."""
    samples: list[Evaluator] = [Samples(config, dataset)] if config.train.sample_every else []
    return [Validation(config, dataset), *samples]
