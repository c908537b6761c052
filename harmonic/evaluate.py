"""Likelihood over whole splits, and the plain models that it is judged by.

Every sample of a split counts once, whatever the batch and the segments: nats and samples are summed apart and divided
at the end. The state is carried from one end of a recording to the other, in constant memory.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from harmonic.config import Config
from harmonic.data import EvaluationBatch, Split, evaluation_batches
from harmonic.errors import UserError
from harmonic.metrics import Progress
from harmonic.models.base import Model, in_precision

_MARKOV_LEVELS = 4_096  # beyond, a table of pairs is neither small nor ever filled


@dataclasses.dataclass(frozen=True)
class Likelihood:
    """A split's likelihood.

    Attributes:
      nats: negative log-likelihood of all samples.
      samples, recordings: how many there were.
      seconds: time that it took.
    """

    nats: float
    samples: int
    recordings: int
    seconds: float

    @property
    def bits_per_sample(self) -> float:
        """nats / ln 2 / samples."""
        return self.nats / math.log(2) / self.samples


@functools.lru_cache(maxsize=8)
def _segment_function(model: Model) -> Callable[..., tuple[jax.Array, Any]]:
    @jax.jit
    @functools.partial(in_precision, model)
    def segment(params, tokens, labels, left, state):
        """Nats of each row, [batch]; `left` is how many of its samples are still to come."""
        outputs, state = model.apply(model.prepare(params), {"tokens": tokens, "label": labels}, state)
        mask = jnp.arange(tokens.shape[1], dtype=left.dtype)[None] < left[:, None]
        return -jnp.where(mask, model.log_prob(outputs, tokens), 0).sum(1), state

    return segment


def segment_nats(model: Model, params: Any, batch: EvaluationBatch) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Negative log-likelihood in nats and number of samples of each row, [batch], segment by segment.

    The state is carried from one segment to the next; their length must be a multiple of the model's.
    """
    state = model.init_state(len(batch.lengths), jax.tree.leaves(params)[0].dtype)
    left = batch.lengths.copy()
    for tokens in batch.segments:
        nats, state = _segment_function(model)(params, tokens, batch.labels, left, state)
        yield np.asarray(nats, np.float64), np.clip(left, 0, tokens.shape[1])
        left = np.maximum(left - tokens.shape[1], 0)


def evaluate_split(
    model: Model,
    params: Any,
    split: Split,
    config: Config,
    *,
    reset_every: int = 0,
    limit: int = 0,
    shard: tuple[int, int] = (0, 1),
    labels: Sequence[str] = (),
    show_progress: bool = False,
) -> Likelihood:
    """The likelihood of a split's recordings (their first `data.crop_length` samples, if that is set).

    Args:
      model, params: what is evaluated.
      split: of a prepared data set.
      config: for `data.crop_length`, `evaluate.batch_size` and `evaluate.segment_length`.
      reset_every: forget the past every that many samples, for windowed figures; 0 for never.
      limit: look only at that many recordings, spread over the split; 0 for all.
      shard: (i, n): only the i-th of n shares, which together are the whole: its nats and its samples.
      labels: of the data set (`Dataset.labels`), for a model that is conditioned on them.

    Raises:
      UserError: the model gives a likelihood that is not finite.
    """
    started = time.monotonic()
    longest = int(split.lengths.max())
    for bound in (config.data.crop_length, reset_every):
        longest = min(longest, bound or longest)
    wanted = min(config.evaluate.segment_length, longest)
    segment_length = -(-wanted // model.multiple) * model.multiple
    lengths = np.minimum(split.lengths, config.data.crop_length or split.lengths)
    rows = int((-(-lengths // longest)).sum())
    batch_size = min(config.evaluate.batch_size, rows)
    nats, samples = 0.0, 0
    recordings = min(limit, len(split.recordings)) if limit else len(split.recordings)
    title = f"evaluate (reset every {reset_every:,})" if reset_every else "evaluate"
    progress = Progress(title, int(lengths.sum()), unit="sample", rate_unit="samples") if show_progress else None
    for batch in evaluation_batches(
        split,
        batch_size=batch_size,
        segment_length=segment_length,
        crop_length=config.data.crop_length,
        reset_every=reset_every,
        limit=limit,
        shard=shard,
        labels=labels,
    ):
        for row_nats, row_samples in segment_nats(model, params, batch):
            total, seen = float(row_nats.sum()), int(row_samples.sum())
            if not math.isfinite(total):
                raise UserError(
                    f"the likelihood of the {split.name} split is not finite: the weights are broken; "
                    "evaluate another checkpoint"
                )
            nats, samples = nats + total, samples + seen
            if progress:
                progress.update(seen, f"{nats / math.log(2) / samples:.4f} bits/sample")
    if progress:
        progress.close()
    return Likelihood(nats, samples, recordings, time.monotonic() - started)


@dataclasses.dataclass(frozen=True)
class Baselines:
    """Figures of plain models to compare a likelihood with, all in bits per sample.

    Attributes:
      uniform_bits: log2 of the number of levels.
      histogram_entropy_bits: entropy of the evaluated split's own token histogram.
      markov_bits: an order-1 Markov model, counted on the training split and read on the evaluated one; None where the
        levels are too many for a table of pairs.
    """

    uniform_bits: float
    histogram_entropy_bits: float
    markov_bits: float | None


def baselines(train: Split, evaluated: Split, *, crop_length: int = 0) -> Baselines:
    """The plain models' figures for a split, over the same samples as `evaluate_split`."""
    levels = evaluated.manifest.num_levels
    counts, pairs, firsts = _count(evaluated, crop_length)
    frequencies = counts[counts > 0] / counts.sum()
    entropy = float(-(frequencies * np.log2(frequencies)).sum())
    markov = None
    if levels <= _MARKOV_LEVELS:
        train_counts, train_pairs, _ = _count(train, crop_length)
        unigram = (train_counts + 1) / (train_counts.sum() + levels)
        # One pseudo-count a row, spread as the unigram: pairs that training never showed keep a probability.
        table = (train_pairs + unigram) / (train_pairs.sum(1, keepdims=True) + 1)
        bits = -(pairs * np.log2(table)).sum() - (firsts * np.log2(unigram)).sum()
        markov = float(bits / counts.sum())
    return Baselines(math.log2(levels), entropy, markov)


def _count(split: Split, crop_length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Counts of tokens [levels], of neighbours [levels, levels], and of first tokens [levels]."""
    levels, piece = split.manifest.num_levels, 1 << 22
    tokens_seen = np.zeros(levels, np.int64)
    with_pairs = levels <= _MARKOV_LEVELS
    pairs = np.zeros(levels * levels if with_pairs else 0, np.int64)
    firsts = np.zeros(levels, np.int64)
    for recording, length in enumerate(split.lengths):
        length = min(int(length), crop_length) if crop_length else int(length)
        before = None
        for start in range(0, length, piece):
            tokens = split.read(recording, start, min(start + piece, length))[:, 0].astype(np.int64)
            tokens_seen += np.bincount(tokens, minlength=levels)
            if before is None:
                firsts[tokens[0]] += 1
            else:
                tokens = np.concatenate([before, tokens])
            if with_pairs and len(tokens) > 1:
                index, number = np.unique(tokens[:-1] * levels + tokens[1:], return_counts=True)
                pairs[index] += number
            before = tokens[-1:]
    return tokens_seen, pairs.reshape(levels, levels) if with_pairs else pairs, firsts
