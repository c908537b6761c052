"""Likelihood over whole splits: law 6, windowed figures, and the plain models beside it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import MODEL, config, parameters

import harmonic.evaluate
from harmonic import stages
from harmonic.config import Config, override
from harmonic.data import Dataset
from harmonic.errors import UserError
from harmonic.evaluate import baselines, evaluate_split
from harmonic.files import write_json
from harmonic.models import make
from harmonic.run import Run
from harmonic.train import train


@pytest.mark.laws
@pytest.mark.parametrize(("batch", "segment"), [(1, 6), (4, 300), (64, 10_000)])
def test_every_sample_counts_once(x64, tiny_data, batch, segment):
    """Law 6: the likelihood of a split is the same whatever the batch and the segments."""
    model, params, split = make(MODEL), parameters(jnp.float64), Dataset(tiny_data).split("train")
    ours = config(f"evaluate.batch_size={batch}", f"evaluate.segment_length={segment}")
    result = evaluate_split(model, params, split, ours)
    nats = samples = 0.0
    apply = jax.jit(lambda x: model.apply(model.prepare(params), {"tokens": x}, model.init_state(1, jnp.float64))[0])
    for i, length in enumerate(split.lengths):
        tokens = jnp.asarray(split.read(i))[None]
        padded = jnp.pad(tokens, ((0, 0), (0, 1_200 - length), (0, 0)))
        nats -= float(model.log_prob(apply(padded), padded)[0, :length].sum())
        samples += length
    assert (result.samples, result.recordings) == (samples, len(split.recordings))
    np.testing.assert_allclose(result.nats, nats, rtol=1e-10)
    np.testing.assert_allclose(result.bits_per_sample, nats / np.log(2) / samples, rtol=1e-10)


def test_forgetting_gives_windowed_figures(x64, tiny_data):
    model, params, split = make(MODEL), parameters(jnp.float64), Dataset(tiny_data).split("train")
    whole = evaluate_split(model, params, split, config())
    windowed = evaluate_split(model, params, split, config(), reset_every=100)
    assert windowed.samples == whole.samples and windowed.nats != whole.nats
    same = evaluate_split(model, params, split, config(), reset_every=int(split.lengths.max()))
    np.testing.assert_allclose(same.nats, whole.nats, rtol=1e-12)


def test_a_batch_has_no_more_rows_than_there_are_pieces(tiny_data, monkeypatch):
    """Rows that only fill a batch cost as much as others."""
    sizes = []

    def batches(split, *, batch_size, **settings):
        sizes.append(batch_size)
        return iter(())

    monkeypatch.setattr(harmonic.evaluate, "evaluation_batches", batches)
    split = Dataset(tiny_data).split("train")
    pieces = int((-(-split.lengths // 500)).sum())
    for reset, crop, rows in ((0, 0, len(split.recordings)), (500, 0, pieces), (500, 100, len(split.recordings))):
        ours = config("evaluate.batch_size=1000", f"data.crop_length={crop}")
        evaluate_split(make(MODEL), parameters(jnp.float32), split, ours, reset_every=reset)
        assert sizes.pop() == rows


def test_broken_weights_have_no_likelihood(tiny_data):
    model = make(MODEL)
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


# What context is worth: `stages.evaluate_run` with contexts.


@pytest.fixture(scope="module")
def run(tiny_data, tmp_path_factory):
    """A trained run's folder."""
    workdir = tmp_path_factory.mktemp("context") / "tiny"
    train(config("train.steps=1", "train.validate_every=1"), tiny_data, workdir)
    return workdir


@pytest.fixture
def asked(run, monkeypatch):
    """The `reset_every` of each pass over a split, from a fresh evaluation.json on."""
    (run / "evaluation.json").unlink(missing_ok=True)
    passes = []

    def counted(*args, reset_every, **named):
        passes.append(reset_every)
        return evaluate_split(*args, reset_every=reset_every, **named)

    monkeypatch.setattr(stages, "evaluate_split", counted)
    return passes


def noted(run):
    return json.loads((run / "evaluation.json").read_text())


def test_contexts_are_separate_windowed_figures(run, tiny_data, asked):
    figures = stages.evaluate_run(run, tiny_data, split="train", contexts=(0.05, 0.01, 9, 0.05, 0.075))
    assert asked == [0, 800, 160]
    assert noted(run) == {"train": figures}
    weights, split = Run(run).weights(), Dataset(tiny_data).split("train")
    longest = int(split.lengths.max())
    rows = figures["contexts"]
    assert [row["context_samples"] for row in rows] == [160, 800, longest]
    assert [row["context_seconds"] for row in rows] == [0.01, 0.05, longest / 16_000]
    assert [row["whole"] for row in rows] == [False, False, True]
    for row, reset in zip(rows, (160, 800, 0), strict=True):
        alone = evaluate_split(weights.model, weights.params, split, weights.config, reset_every=reset)
        assert row["bits_per_sample"] == alone.bits_per_sample
        assert row["samples"] == alone.samples == split.lengths.sum()
        assert row["seconds"] > 0
    assert {name: figures[name] for name in ("bits_per_sample", "samples", "seconds")}.items() <= rows[-1].items()


def test_without_contexts_there_are_none(run, tiny_data, asked):
    figures = stages.evaluate_run(run, tiny_data)
    assert "contexts" not in figures and asked == [0]
    assert {"dataset", "fingerprint", "step", "checkpoint", "weights", "recordings", "markov_bits"} <= set(figures)
    windowed = stages.evaluate_run(run, tiny_data, reset_every=100)
    assert noted(run) == {"test": figures, "test (reset every 100)": windowed}


def test_an_interrupted_evaluation_goes_on(run, tiny_data, asked, monkeypatch):
    counted = stages.evaluate_split
    manifest, step = Dataset(tiny_data).manifest, Run(run).weights().step

    def interrupted(*args, reset_every, **named):
        if reset_every == 160:
            raise KeyboardInterrupt
        return counted(*args, reset_every=reset_every, **named)

    contexts = (0.02, 0.01)
    with monkeypatch.context() as patch:
        patch.setattr(stages, "evaluate_split", interrupted)
        with pytest.raises(KeyboardInterrupt):
            stages.evaluate_run(run, tiny_data, split="train", contexts=contexts)
    before = noted(run)["train"]
    assert asked == [0, 320] and [row["context_samples"] for row in before["contexts"]][:-1] == [320]
    whole = [stages.evaluation(run, manifest, step, split="train", contexts=c) for c in ((), (0.02, 9.0), contexts)]
    assert whole == [before, before, None]

    figures = stages.evaluate_run(run, tiny_data, split="train", contexts=contexts)
    assert asked == [0, 320, 160]
    assert figures["contexts"][1:] == before["contexts"]
    assert {k: v for k, v in figures.items() if k != "contexts"} == {k: v for k, v in before.items() if k != "contexts"}
    assert stages.evaluate_run(run, tiny_data, split="train", contexts=contexts) == figures == noted(run)["train"]
    assert asked == [0, 320, 160]
    assert stages.evaluation(run, manifest, step, split="train", contexts=contexts) == figures
    # Asked without contexts, the figure is made anew, and what stands beside it stays.
    again = stages.evaluate_run(run, tiny_data, split="train")
    assert asked == [0, 320, 160, 0]
    assert again["contexts"][:-1] == figures["contexts"][:-1] and again["contexts"][-1]["seconds"] == again["seconds"]


@pytest.mark.parametrize("name", ["step", "fingerprint", "weights"])
def test_figures_of_other_weights_or_data_are_not_kept(run, tiny_data, asked, name):
    stages.evaluate_run(run, tiny_data, contexts=(0.01,))
    changed = noted(run)
    changed["test"][name] = 17
    write_json(run / "evaluation.json", changed)
    if name != "weights":
        assert stages.evaluation(run, Dataset(tiny_data).manifest, Run(run).weights().step) is None
    stages.evaluate_run(run, tiny_data, contexts=(0.005,))
    assert asked == [0, 160, 0, 80]
    assert [row["context_samples"] for row in noted(run)["test"]["contexts"]][:-1] == [80]


def test_nothing_noted_is_no_evaluation(run, tiny_data, asked):
    assert stages.evaluation(run, Dataset(tiny_data).manifest, Run(run).weights().step) is None


def test_contexts_and_reset_every_exclude_each_other(tmp_path):
    with pytest.raises(UserError, match="give one of them"):
        stages.evaluate_run(tmp_path, tmp_path, reset_every=10, contexts=(1.0,))


def test_contexts_in_a_config():
    assert override(Config(), ["evaluate.context_seconds=1,8.5,60"]).evaluate.context_seconds == (1.0, 8.5, 60.0)
    assert override(Config(), ["evaluate.context_seconds=0.5"]).evaluate.context_seconds == (0.5,)
    assert override(Config(), ["evaluate.context_seconds=()"]).evaluate.context_seconds == ()


@pytest.mark.parametrize(
    "value", ["0", "-1", "1,0.0009", "1e400", "1,x", "true", ",".join(["1"] * 17)], ids=lambda v: v[:9]
)
def test_contexts_that_cannot_be_are_refused(value):
    with pytest.raises(UserError, match=r"evaluate\.context_seconds.* number"):
        override(Config(), [f"evaluate.context_seconds={value}"])


def evaluate(*flags, cwd):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-m", "workflows.evaluate", *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment)


def test_contexts_on_the_command_line(run, tiny_data, asked):
    flags = (f"--workdir={run}", f"--data_dir={tiny_data.parent}", "--split=train")
    done = evaluate(*flags, "--context=0.01,full", cwd=run)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == noted(run)["train"]
    assert [row["whole"] for row in noted(run)["train"]["contexts"]] == [False, True]


@pytest.mark.parametrize("value", ["0", "nan", "1,x"])
def test_contexts_that_cannot_be_are_refused_on_the_command_line(value, tmp_path):
    done = evaluate(f"--context={value}", cwd=tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and f"--context={value} is impossible" in errors[0] and "1,8,60" in errors[0]
