"""Likelihood over whole splits: law 6, windowed figures, and the plain models beside it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import MODEL, config, parameters

from harmonic.data import Dataset
from harmonic.errors import UserError
from harmonic.evaluate import baselines, evaluate_split
from harmonic.models import HarmonicRNN


@pytest.mark.parametrize(("batch", "segment"), [(1, 6), (4, 300), (64, 10_000)])
def test_every_sample_counts_once(x64, tiny_data, batch, segment):
    """Law 6: the likelihood of a split is the same whatever the batch and the segments."""
    model, params, split = HarmonicRNN(MODEL), parameters(jnp.float64), Dataset(tiny_data).split("train")
    ours = config(f"evaluate.batch_size={batch}", f"evaluate.segment_length={segment}")
    result = evaluate_split(model, params, split, ours)
    nats = samples = 0.0
    apply = jax.jit(lambda x: model.apply(params, {"tokens": x}, model.init_state(1, jnp.float64))[0])
    for i, length in enumerate(split.lengths):
        tokens = jnp.asarray(split.read(i))[None]
        padded = jnp.pad(tokens, ((0, 0), (0, 1_200 - length), (0, 0)))
        nats -= float(model.log_prob(apply(padded), padded)[0, :length].sum())
        samples += length
    assert (result.samples, result.recordings) == (samples, len(split.recordings))
    np.testing.assert_allclose(result.nats, nats, rtol=1e-10)
    np.testing.assert_allclose(result.bits_per_sample, nats / np.log(2) / samples, rtol=1e-10)


def test_forgetting_gives_windowed_figures(x64, tiny_data):
    model, params, split = HarmonicRNN(MODEL), parameters(jnp.float64), Dataset(tiny_data).split("train")
    whole = evaluate_split(model, params, split, config())
    windowed = evaluate_split(model, params, split, config(), reset_every=100)
    assert windowed.samples == whole.samples and windowed.nats != whole.nats
    same = evaluate_split(model, params, split, config(), reset_every=int(split.lengths.max()))
    np.testing.assert_allclose(same.nats, whole.nats, rtol=1e-12)


def test_broken_weights_have_no_likelihood(tiny_data):
    model = HarmonicRNN(MODEL)
    broken = jax.tree.map(lambda v: v * jnp.nan, parameters(jnp.float32))
    with pytest.raises(UserError, match="not finite"):
        evaluate_split(model, broken, Dataset(tiny_data).split("test"), config())


def test_baselines_against_direct_computation(tiny_data):
    dataset = Dataset(tiny_data)
    train, test = dataset.split("train"), dataset.split("test")
    plain = baselines(train, test)
    tokens = [test.read(i)[:, 0].astype(int) for i in range(len(test.recordings))]
    shares = np.bincount(np.concatenate(tokens)) / sum(map(len, tokens))
    entropy = -sum(p * np.log2(p) for p in shares if p)
    unigram, table = np.ones(256), np.zeros((256, 256))
    for i in range(len(train.recordings)):
        row = train.read(i)[:, 0].astype(int)
        np.add.at(unigram, row, 1)
        np.add.at(table, (row[:-1], row[1:]), 1)
    unigram /= unigram.sum()
    table = (table + unigram) / (table.sum(1, keepdims=True) + 1)
    np.testing.assert_allclose(table.sum(1), 1)
    bits = sum(-np.log2(unigram[t[0]]) - np.log2(table[t[:-1], t[1:]]).sum() for t in tokens)
    assert plain.uniform_bits == 8
    np.testing.assert_allclose(plain.histogram_entropy_bits, entropy)
    np.testing.assert_allclose(plain.markov_bits, bits / sum(map(len, tokens)))
