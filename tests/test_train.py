"""Training: laws 3, 5, 6 and 7, the recipe's arithmetic, resumption, and what is refused."""

import functools
import json
import os
import signal
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from harmonic import train as training
from harmonic.checkpoint import Checkpoints, load_weights
from harmonic.config import Config, MeshConfig, ModelConfig, override
from harmonic.data import Dataset, train_batches
from harmonic.errors import UserError
from harmonic.evaluate import baselines, evaluate_split
from harmonic.mesh import make_mesh
from harmonic.metrics import read_metrics
from harmonic.models import HarmonicRNN

MODEL = ModelConfig(
    width=8, state_width=16, gate_blocks=4, pool_factors=(2, 3), blocks_per_level=1, pool_groups=2, dropout=0.2
)


def config(*assignments):
    base = Config(name="tiny", model=MODEL)
    return override(
        base,
        [
            "data.dataset=tiny", "data.window_length=500", "train.global_batch_size=4", "train.steps=6",
            "train.warmup_steps=2", "train.log_every=1", "train.validate_every=3", "train.checkpoint_every=2",
            "evaluate.batch_size=3", "evaluate.segment_length=300", *assignments,
        ],
    )  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory, make_dataset):
    lengths = [900, 350, 700, 401, 90, 1_200, 640, 1_000, 777, 20, 333, 444]
    return make_dataset(tmp_path_factory.mktemp("data"), "tiny", lengths)


def random_batch(segments, batch, length, seed=0):
    numbers = np.random.default_rng(seed)
    tokens = numbers.integers(0, 256, (segments, batch, length, 1)).astype(np.uint8)
    total = segments * length
    lengths = np.array([total, total - 7, 5, 0] * (batch // 4 or 1), np.int32)[:batch]
    return tokens, lengths, np.arange(batch, dtype=np.int32)


def cut(tokens, segments):
    """The same sequences in another number of segments."""
    _, batch, _, channels = tokens.shape
    return tokens.swapaxes(0, 1).reshape(batch, segments, -1, channels).swapaxes(0, 1)


@functools.cache
def loss_and_grad(data_axis, seq_axis):
    model = HarmonicRNN(MODEL)
    return jax.jit(training.make_loss_and_grad(model, make_mesh(MeshConfig(data_axis, seq_axis))))


def parameters(dtype):
    params = jax.jit(HarmonicRNN(MODEL).init)(jax.random.key(0))
    return jax.tree.map(lambda v: v.astype(dtype), params)


def assert_same(actual, expected, tolerance):
    """Relative to the size of each array: single entries of a gradient may be nothing but rounding."""
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * float(np.abs(b).max()))


PRECISIONS = [(jnp.float32, 1e-5), (jnp.float64, 1e-10)]


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
@pytest.mark.parametrize("mesh", [(8, 1), (1, 8), (2, 4), (4, 2)])
def test_sharding_is_invisible(x64, mesh, dtype, tolerance):
    """Law 3, with dropout on."""
    params, batch = parameters(dtype), random_batch(1, 8, 96)
    key = jnp.array([3, 4], jnp.uint32)
    expected = loss_and_grad(1, 1)(params, *batch, key)
    assert_same(loss_and_grad(*mesh)(params, *batch, key), expected, tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
@pytest.mark.parametrize("segments", [2, 8, 16])
def test_segments_are_invisible(x64, segments, dtype, tolerance):
    """Law 7: the gradient through segments is exact, down to one pooling product, dropout included."""
    params, (tokens, lengths, rows) = parameters(dtype), random_batch(1, 4, 96)
    key = jnp.array([3, 4], jnp.uint32)
    expected = loss_and_grad(1, 1)(params, tokens, lengths, rows, key)
    assert_same(loss_and_grad(1, 1)(params, cut(tokens, segments), lengths, rows, key), expected, tolerance)


def test_segments_that_are_sharded(x64):
    params, (tokens, lengths, rows) = parameters(jnp.float64), random_batch(1, 4, 96)
    key = jnp.array([3, 4], jnp.uint32)
    expected = loss_and_grad(1, 1)(params, tokens, lengths, rows, key)
    assert_same(loss_and_grad(2, 4)(params, cut(tokens, 4), lengths, rows, key), expected, 1e-10)


def test_loss_is_bits_per_unmasked_sample(x64):
    """Against the definition, sample by sample, and blind to what stands behind a row's end."""
    model, params = HarmonicRNN(MODEL), parameters(jnp.float64)
    tokens, lengths, rows = random_batch(1, 4, 60)
    loss, _ = loss_and_grad(1, 1)(params, tokens, lengths, rows, None)
    logits, _ = model.apply(params, {"tokens": jnp.asarray(tokens[0])}, model.init_state(4, jnp.float64))
    log_p = np.asarray(jax.nn.log_softmax(logits))[:, :, 0]
    bits = [-log_p[b, t, tokens[0, b, t, 0]] / np.log(2) for b in range(4) for t in range(lengths[b])]
    np.testing.assert_allclose(loss, np.mean(bits), rtol=1e-12)
    behind = tokens.copy()
    behind[0, 1, lengths[1] :] = 9
    assert loss_and_grad(1, 1)(params, behind, lengths, rows, None)[0] == loss


def test_memory_in_segments_grows_by_a_state_and_the_tokens():
    """Law 7, read from the compiled program."""
    model, params = HarmonicRNN(MODEL), parameters(jnp.float32)

    def temporaries(segments):
        shapes = random_batch(segments, 1, 600)
        compiled = loss_and_grad(1, 1).lower(params, *shapes, jnp.zeros(2, jnp.uint32)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    short, long = temporaries(4), temporaries(40)
    # Saved for each segment: the state, and at most the tokens and their masks again.
    assert long - short <= 36 * (model.state_bytes() + 600 * 16), (short, long)
    assert long < 1.5 * short


def test_work_grows_linearly():
    """Law 7, in operations of the compiled program: no part of it is quadratic in the length."""
    params = parameters(jnp.float32)

    def operations(length):
        model = HarmonicRNN(MODEL)
        function = jax.jit(lambda p, x: model.apply(p, {"tokens": x}, model.init_state(1))[0])
        compiled = function.lower(params, jnp.zeros((1, length, 1), jnp.uint8)).compile()
        return compiled.cost_analysis()["flops"]

    # Loops are counted once: chunks of one length make the programs comparable.
    assert operations(16 * 768) == pytest.approx(16 * operations(768), rel=0.35)


def test_recipe():
    """Warm-up, clipping and AdamW, against optax put together by hand."""
    ours = config("train.learning_rate=0.01", "train.warmup_steps=4", "train.clip_norm=1")
    rates = [float(training.learning_rate(ours)(s)) for s in range(6)]
    np.testing.assert_allclose(rates, [0.0025, 0.005, 0.0075, 0.01, 0.01, 0.01], rtol=1e-6)
    params = {"w": jnp.array([1.0, -2.0])}
    optimizer = training.make_optimizer(ours)
    update, _ = optimizer.update({"w": jnp.array([30.0, 40.0])}, optimizer.init(params), params)
    # Clipped to (0.6, 0.8); Adam's first step is the sign, and the weight decays beside it.
    np.testing.assert_allclose(update["w"], -0.0025 * (np.array([1, 1]) + 1e-4 * np.array([1, -2])), rtol=1e-4)


def step_once(ours, state, tokens, lengths, rows, step=0):
    model = HarmonicRNN(ours.model)
    function = training.make_train_step(model, ours, make_mesh(ours.mesh))
    batch = {"tokens": tokens, "length": lengths, "row": rows}
    return function(jax.tree.map(jnp.array, state), batch, jax.random.key(0), np.int32(step))


def test_bad_updates_are_skipped_and_leave_everything_alone():
    ours = config("train.skip_norm=1e-9")
    model = HarmonicRNN(ours.model)
    state = training.init_state(ours, model)
    batch = random_batch(1, 4, 60)
    after, metrics = step_once(ours, state, *batch)
    assert metrics["skipped"] == 1 and metrics["streak"] == 1
    jax.tree.map(np.testing.assert_array_equal, (after.params, after.ema), (state.params, state.ema))
    jax.tree.map(np.testing.assert_array_equal, after.optimizer["adam"], state.optimizer["adam"])

    broken = jax.tree.map(lambda v: v * jnp.nan, state.params)
    ours = config()
    after, metrics = step_once(ours, state._replace(params=broken), *batch)
    assert np.isnan(metrics["loss"]) and metrics["skipped"] == 1
    jax.tree.map(np.testing.assert_array_equal, after.ema, state.ema)
    # A batch without a sample has no loss: skipped too.
    _, metrics = step_once(ours, state, batch[0], np.zeros(4, np.int32), batch[2])
    assert metrics["skipped"] == 1


@pytest.mark.parametrize("debias", [False, True])
def test_average_of_the_weights(debias):
    ours = config("train.ema_decay=0.9", f"train.ema_debias={debias}")
    state = training.init_state(ours, HarmonicRNN(ours.model))
    expected, weights = state.params, []
    for step in range(3):
        state, _ = step_once(ours, state, *random_batch(1, 4, 60), step=step)
        weights.append(state.params)
        expected = optax.incremental_update(state.params, expected, 0.1)
    if debias:
        shares = np.array([0.81, 0.9, 1.0]) * 0.1 / (1 - 0.9**3)
        expected = jax.tree.map(lambda *v: sum(s * w for s, w in zip(shares, v, strict=True)), *weights)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=1e-6), state.ema, expected)


def final_state(workdir):
    checkpoints = Checkpoints(workdir, read_only=True)
    ours = config()
    target = jax.eval_shape(lambda: training.init_state(ours, HarmonicRNN(ours.model)))._asdict()
    step = checkpoints.step("latest")
    restored = checkpoints.restore(step, target)
    checkpoints.close()
    return step, restored


@pytest.fixture(scope="module")
def reference_run(data, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run") / "reference"
    result = training.train(config(), data, workdir)
    assert result.step == 6
    return workdir


def without_time(lines):
    return [{k: v for k, v in line.items() if k != "samples_per_second"} for line in lines]


def test_a_run_leaves_what_it_should(reference_run):
    lines = read_metrics(reference_run)
    assert [line["step"] for line in lines if line["kind"] == "train"] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in lines if line["kind"] == "validation"] == [3, 6]
    assert {"loss", "grad_norm", "learning_rate", "samples_per_second", "skipped"} <= set(lines[0])
    assert json.loads((reference_run / "config.json").read_text())["model"]["width"] == 8
    assert (reference_run / "manifest.json").is_file()
    assert list((reference_run / "tensorboard").glob("events*"))
    best = min((line["bits_per_sample"], line["step"]) for line in lines if line["kind"] == "validation")[1]
    weights = load_weights(reference_run)
    assert (weights.step, weights.kind) == (best, "ema")
    assert load_weights(reference_run, "latest").step == 6
    with pytest.raises(UserError, match="no checkpoint 77; use latest, best or one of"):
        load_weights(reference_run, "77")


def test_interruption_is_invisible(data, tmp_path, reference_run):
    """Law 5: stopped by a signal after a step, twice, and gone on with, the run ends as one left alone."""
    workdir, stops = tmp_path / "run", 0
    while True:
        # The signal comes while the loop runs; wherever that is, the run saves and leaves.
        lines = len(read_metrics(workdir))

        def interrupt(lines=lines):
            while len(read_metrics(workdir)) <= lines:
                time.sleep(0.005)
            os.kill(os.getpid(), signal.SIGTERM)

        if stops < 2:
            threading.Thread(target=interrupt, daemon=True).start()
        try:
            training.train(config(), data, workdir)
            break
        except training.Interrupted as stop:
            assert stop.signal == signal.SIGTERM and "same command goes on" in str(stop)
            stops += 1
    step, state = final_state(workdir)
    expected_step, expected = final_state(reference_run)
    assert step == expected_step
    jax.tree.map(np.testing.assert_array_equal, state, expected)
    assert without_time(read_metrics(workdir)) == without_time(read_metrics(reference_run))


@pytest.mark.slow
def test_sigkill_is_invisible(data, tmp_path, reference_run):
    """Law 5: killed without warning, three times at whatever moment, and started again."""
    workdir = tmp_path / "run"
    path = tmp_path / "config.json"
    path.write_text(config().to_json())
    command = [
        sys.executable,
        "-m",
        "workflows.train",
        f"--config={path}",
        f"--workdir={workdir}",
        f"--data_dir={data.parent}",
    ]
    for wait in (0.05, 0.3, 0.6):
        before = len(read_metrics(workdir))
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        while process.poll() is None and len(read_metrics(workdir)) <= before:
            time.sleep(0.01)
        time.sleep(wait)
        assert process.poll() is None, "the run ended before it could be killed"
        process.kill()
        process.wait()
    subprocess.run(command, check=True, capture_output=True)
    step, state = final_state(workdir)
    expected_step, expected = final_state(reference_run)
    assert step == expected_step
    jax.tree.map(np.testing.assert_array_equal, state, expected)


def test_a_finished_run_is_left_alone_and_can_be_prolonged(data, tmp_path):
    workdir = tmp_path / "run"
    training.train(config("train.steps=2"), data, workdir)
    assert training.train(config("train.steps=2"), data, workdir).step == 2
    assert training.train(config("train.steps=3"), data, workdir).step == 3


def test_a_run_of_another_config_or_data_is_refused(data, tmp_path, reference_run, make_dataset):
    with pytest.raises(UserError, match=r"train.learning_rate is 0.002 there and 0.1 here"):
        training.train(config("train.learning_rate=0.1"), data, reference_run)
    with pytest.raises(UserError, match=r"model.width is 8 there and 16 here"):
        training.train(config("model.width=16"), data, reference_run)
    other = make_dataset(tmp_path, "tiny", [500] * 10)
    with pytest.raises(UserError, match="was trained on other data"):
        training.train(config(), other, reference_run)


def test_fine_tuning_starts_from_the_best_average(data, tmp_path, reference_run):
    workdir = tmp_path / "tuned"
    ours = config("train.steps=1", "train.learning_rate=1e-12")
    training.train(ours, data, workdir, init_from=str(reference_run))
    start, end = load_weights(reference_run).params, load_weights(workdir, "latest", raw=True).params
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), start, end)
    with pytest.raises(UserError, match=r"another architecture: width is 8 there and 16 here"):
        training.train(config("model.width=16"), data, tmp_path / "other", init_from=str(reference_run))
    with pytest.raises(UserError, match="not a run's folder"):
        training.train(ours, data, tmp_path / "other2", init_from=str(tmp_path / "absent"))


def test_damaged_checkpoints_are_named(data, tmp_path):
    workdir = tmp_path / "run"
    training.train(config("train.steps=2"), data, workdir)
    for path in (workdir / "checkpoints" / "2" / "ema").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match=r"checkpoint 2 in .* cannot be read"):
        load_weights(workdir, "latest")


def test_divergence_is_said(data, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "_DIVERGED", 3)
    with pytest.raises(UserError, match=r"diverged.*lower train.learning_rate"):
        training.train(config("train.skip_norm=1e-9"), data, tmp_path / "run")


def test_a_loss_that_is_not_finite_is_written_as_json(data, tmp_path, reference_run):
    """Weights that overflow: every update is skipped, and metrics.jsonl stays JSON."""
    workdir = tmp_path / "run"
    with pytest.raises(UserError, match="not finite"):  # what validation says of such weights
        training.train(config("train.learning_rate=1e30", "train.warmup_steps=0", "train.steps=3"), data, workdir)
    lines = [json.loads(line, parse_constant=pytest.fail) for line in (workdir / "metrics.jsonl").open()]
    assert lines[-1]["loss"] is None and lines[-1]["skipped"] >= 1


def test_too_large_a_mesh_is_refused(data, tmp_path):
    with pytest.raises(UserError, match="asks for 16 devices, but there are 8"):
        training.train(config("mesh.seq=16"), data, tmp_path / "run")


@pytest.mark.parametrize(("batch", "segment"), [(1, 6), (4, 300), (64, 10_000)])
def test_every_sample_counts_once(x64, data, batch, segment):
    """Law 6: the likelihood of a split is the same whatever the batch and the segments."""
    model, params, split = HarmonicRNN(MODEL), parameters(jnp.float64), Dataset(data).split("train")
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


def test_forgetting_gives_windowed_figures(x64, data):
    model, params, split = HarmonicRNN(MODEL), parameters(jnp.float64), Dataset(data).split("train")
    whole = evaluate_split(model, params, split, config())
    windowed = evaluate_split(model, params, split, config(), reset_every=100)
    assert windowed.samples == whole.samples and windowed.nats != whole.nats
    same = evaluate_split(model, params, split, config(), reset_every=int(split.lengths.max()))
    np.testing.assert_allclose(same.nats, whole.nats, rtol=1e-12)


def test_broken_weights_have_no_likelihood(data):
    model = HarmonicRNN(MODEL)
    broken = jax.tree.map(lambda v: v * jnp.nan, parameters(jnp.float32))
    with pytest.raises(UserError, match="not finite"):
        evaluate_split(model, broken, Dataset(data).split("test"), config())


def test_baselines_against_direct_computation(data):
    dataset = Dataset(data)
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


def test_batches_as_they_are_placed(data):
    ours = config("train.segment_length=96")
    batch = next(train_batches(Dataset(data), ours))
    placed = training.place_batch(batch, ours, make_mesh(ours.mesh))
    assert placed["tokens"].shape == (6, 4, 96, 1)
    np.testing.assert_array_equal(np.asarray(placed["tokens"]).swapaxes(0, 1).reshape(4, -1, 1), batch["tokens"])
