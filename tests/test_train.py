"""Training: law 5, resumption, and what is refused."""

import dataclasses
import functools
import json
import os
import signal
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest
from tiny import config, final_state

from harmonic import train as training
from harmonic.data import Dataset, train_batches
from harmonic.errors import UserError
from harmonic.mesh import make_mesh
from harmonic.metrics import read_metrics
from harmonic.run import Run


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
    weights = Run(reference_run).weights()
    assert (weights.step, weights.kind) == (best, "ema")
    assert Run(reference_run).weights("latest").step == 6
    with pytest.raises(UserError, match="no checkpoint 77; use latest, best or one of"):
        Run(reference_run).weights("77")


@pytest.mark.laws
def test_interruption_is_invisible(tiny_data, tmp_path, reference_run):
    """Law 5: stopped by a signal after a step, twice, and gone on with, the run ends as one left alone."""
    workdir, stops, signals = tmp_path / "run", 0, (signal.SIGTERM, signal.SIGHUP)
    while True:
        # The signal comes while the loop runs; wherever that is, the run saves and leaves.
        lines = len(read_metrics(workdir))

        def interrupt(lines=lines, number=signals[stops % 2]):
            while len(read_metrics(workdir)) <= lines:
                time.sleep(0.005)
            os.kill(os.getpid(), number)

        if stops < 2:
            threading.Thread(target=interrupt, daemon=True).start()
        try:
            training.train(config(), tiny_data, workdir)
            break
        except training.Interrupted as stop:
            assert stop.signal == signals[stops] and "same command goes on" in str(stop)
            stops += 1
    step, state = final_state(workdir)
    expected_step, expected = final_state(reference_run)
    assert step == expected_step
    jax.tree.map(np.testing.assert_array_equal, state, expected)
    assert without_time(read_metrics(workdir)) == without_time(read_metrics(reference_run))


@pytest.mark.slow
def test_sigkill_is_invisible(tiny_data, tmp_path):
    """Law 5: killed without warning, three times at whatever moment, and started again."""
    path = tmp_path / "config.json"
    path.write_text(config().to_json())

    def command(workdir):
        flags = [f"--config={path}", f"--workdir={workdir}", f"--data_dir={tiny_data.parent}"]
        return [sys.executable, "-m", "workflows.train", *flags]

    # By the same command, not in this process: other options of the compiler round otherwise.
    reference, workdir = tmp_path / "reference", tmp_path / "run"
    subprocess.run(command(reference), check=True, capture_output=True)
    for wait in (0.05, 0.3, 0.6):
        before = len(read_metrics(workdir))
        process = subprocess.Popen(command(workdir), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        while process.poll() is None and len(read_metrics(workdir)) <= before:
            time.sleep(0.01)
        time.sleep(wait)
        assert process.poll() is None, "the run ended before it could be killed"
        process.kill()
        process.wait()
    subprocess.run(command(workdir), check=True, capture_output=True)
    step, state = final_state(workdir)
    expected_step, expected = final_state(reference)
    assert step == expected_step
    jax.tree.map(np.testing.assert_array_equal, state, expected)


def test_a_step_with_an_implicit_transfer_is_refused(tiny_data, tmp_path, monkeypatch):
    """Everything that a step takes is placed where it belongs before it is called."""
    monkeypatch.setattr(training, "place_step", lambda step, mesh: np.int32(step))
    with pytest.raises(jax.errors.JaxRuntimeError, match="Disallowed host-to-device transfer"):
        training.train(config(), tiny_data, tmp_path / "run")


def test_a_finished_run_is_left_alone_and_can_be_prolonged(tiny_data, tmp_path):
    workdir = tmp_path / "run"
    training.train(config("train.steps=2"), tiny_data, workdir)
    assert training.train(config("train.steps=2"), tiny_data, workdir).step == 2
    assert training.train(config("train.steps=3"), tiny_data, workdir).step == 3


@pytest.mark.laws
@pytest.mark.parametrize("stop", [2, 3, 4])
def test_stages_are_the_same_however_a_run_is_cut(tiny_data, tmp_path, stop):
    """Before, at and after the step where the windows change; also the optimiser's and the schedule's place."""
    stages = 'train.stages=[{"start": 3, "window_length": 60, "global_batch_size": 8}]'
    ours = [stages, "train.optimizer=muon", "train.steps=6"]
    training.train(config(*ours), tiny_data, tmp_path / "whole")
    training.train(config(*ours, f"train.steps={stop}"), tiny_data, tmp_path / "cut")
    training.train(config(*ours), tiny_data, tmp_path / "cut")
    whole, cut = (final_state(tmp_path / name, *ours) for name in ("whole", "cut"))
    jax.tree.map(np.testing.assert_array_equal, whole, cut)
    losses = [
        [line["loss"] for line in read_metrics(tmp_path / n) if line["kind"] == "train"] for n in ("whole", "cut")
    ]
    assert losses[0] == losses[1]


def test_each_stage_has_its_windows_and_an_order_of_its_own(tiny_data):
    stages = [{"start": 2, "window_length": 60, "global_batch_size": 8}, {"start": 4, "window_length": 60,
              "global_batch_size": 8}]  # fmt: skip
    ours = config(f"train.stages={json.dumps(stages)}")
    feed = training.Feed(Dataset(tiny_data), ours, make_mesh(ours.mesh))
    taken = [feed.take(step) for step in range(6)]
    shapes = [batch["tokens"].shape for batch, _ in taken]
    assert shapes == [(1, 4, 504, 1)] * 2 + [(1, 8, 60, 1)] * 4
    assert all(samples == int(batch["length"].sum()) for batch, samples in taken)
    assert not np.array_equal(taken[2][0]["tokens"], taken[4][0]["tokens"])


def test_a_decaying_rate_fixes_the_steps(tiny_data, tmp_path):
    decaying = config("train.schedule=linear", "train.steps=2")
    training.train(decaying, tiny_data, tmp_path / "run")
    with pytest.raises(UserError, match=r"train.steps is 2 there and 3 here"):
        training.train(config("train.schedule=linear", "train.steps=3"), tiny_data, tmp_path / "run")


def test_a_run_of_another_config_or_data_is_refused(tiny_data, tmp_path, reference_run, make_dataset):
    with pytest.raises(UserError, match=r"train.learning_rate is 0.002 there and 0.1 here"):
        training.train(config("train.learning_rate=0.1"), tiny_data, reference_run)
    with pytest.raises(UserError, match=r"model.width is 8 there and 16 here"):
        training.train(config("model.width=16"), tiny_data, reference_run)
    other = make_dataset(tmp_path, "tiny", [500] * 10)
    with pytest.raises(UserError, match="was trained on other data"):
        training.train(config(), other, reference_run)


def test_fine_tuning_starts_from_the_best_average(tiny_data, tmp_path, reference_run):
    workdir = tmp_path / "tuned"
    ours = config("train.steps=1", "train.learning_rate=1e-12")
    training.train(ours, tiny_data, workdir, init_from=str(reference_run))
    start, end = Run(reference_run).weights().params, Run(workdir).weights("latest", raw=True).params
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), start, end)
    with pytest.raises(UserError, match=r"another architecture: width is 8 there and 16 here"):
        training.train(config("model.width=16"), tiny_data, tmp_path / "other", init_from=str(reference_run))
    with pytest.raises(UserError, match="not a run's folder"):
        training.train(ours, tiny_data, tmp_path / "other2", init_from=str(tmp_path / "absent"))


def test_damaged_checkpoints_are_named(tiny_data, tmp_path):
    workdir = tmp_path / "run"
    training.train(config("train.steps=2"), tiny_data, workdir)
    for path in (workdir / "checkpoints" / "2" / "ema").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match=r"checkpoint 2 in .* is damaged: ema/.* more files are not as written, and no"):
        Run(workdir).weights("latest")


def test_divergence_is_said(tiny_data, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "_DIVERGED", 3)
    with pytest.raises(UserError, match=r"diverged.*lower train.learning_rate"):
        training.train(config("train.skip_norm=1e-9"), tiny_data, tmp_path / "run")


def test_a_loss_that_is_not_finite_is_written_as_json(tiny_data, tmp_path, reference_run):
    """Weights that overflow: every update is skipped, and metrics.jsonl stays JSON."""
    workdir = tmp_path / "run"
    with pytest.raises(UserError, match="not finite"):  # what validation says of such weights
        training.train(config("train.learning_rate=1e30", "train.warmup_steps=0", "train.steps=3"), tiny_data, workdir)
    lines = [json.loads(line, parse_constant=pytest.fail) for line in (workdir / "metrics.jsonl").open()]
    assert lines[-1]["loss"] is None and lines[-1]["skipped"] >= 1


def test_too_large_a_mesh_is_refused(tiny_data, tmp_path):
    with pytest.raises(UserError, match="asks for 16 devices, but there are 8"):
        training.train(config("mesh.seq=16"), tiny_data, tmp_path / "run")


def test_batches_as_they_are_placed(tiny_data):
    ours = config("train.segment_length=96")
    batch = next(train_batches(Dataset(tiny_data), ours))
    placed = training.place_batch(batch, ours, make_mesh(ours.mesh))
    assert placed["tokens"].shape == (6, 4, 96, 1)
    np.testing.assert_array_equal(np.asarray(placed["tokens"]).swapaxes(0, 1).reshape(4, -1, 1), batch["tokens"])


def test_without_lines_little_is_kept(tiny_data, tmp_path, reference_run, monkeypatch):
    """train.log_every=0: a single line, with the mean of all losses; the device never keeps many steps' metrics."""
    held = []
    take = training.Reached.take
    monkeypatch.setattr(training, "_PENDING", 4)
    monkeypatch.setattr(training.Reached, "take", lambda self, steps: held.append(len(steps)) or take(self, steps))
    training.train(config("train.log_every=0", "train.checkpoint_every=0"), tiny_data, tmp_path / "run")
    assert max(held) <= 4 and sum(held) == 6
    (line,) = (line for line in read_metrics(tmp_path / "run") if line["kind"] == "train")
    losses = [line["loss"] for line in read_metrics(reference_run) if line["kind"] == "train"]
    assert line["step"] == 6 and line["loss"] == np.mean(losses)


def test_a_run_goes_on_from_a_checkpoint_with_a_list_of_losses():
    """As they were written before only the sum was kept."""
    meta = {"step": 14, "best": 8.1, "best_step": 10, "seconds": 33.4, "data": {"next_index": 14}, "model": {}}
    reached = training.Reached.from_meta({**meta, "window": [7.5, 8.5]})
    assert (reached.step, reached.best, reached.data) == (14, 8.1, {"next_index": 14})
    assert reached.mean_loss() == 8 and reached.mean_loss() is None
    written = dataclasses.asdict(dataclasses.replace(reached, loss_sum=3.0, loss_count=2))
    assert training.Reached.from_meta({**written, "model": {}}).mean_loss() == 1.5


def test_an_evaluator_of_ones_own(tiny_data, tmp_path, reference_run):
    """It looks at the averaged weights, its figures become lines, and training takes no notice."""
    seen = {}

    class Largest:
        name, every = "weights", 4

        def __call__(self, model, params, step, writer):
            seen[step] = params
            return {"largest": max(float(abs(v).max()) for v in jax.tree.leaves(params))}

    workdir = tmp_path / "run"
    training.train(config(), tiny_data, workdir, evaluators=[Largest()])
    lines = [line for line in read_metrics(workdir) if line["kind"] == "weights"]
    assert [line["step"] for line in lines] == list(seen) == [4, 6] and all(line["largest"] > 0 for line in lines)
    jax.tree.map(np.testing.assert_array_equal, seen[6], Run(workdir).weights("latest").params)
    jax.tree.map(np.testing.assert_array_equal, final_state(workdir)[1], final_state(reference_run)[1])


def test_a_mesh_on_a_cpu_makes_its_devices():
    """Where JAX has made none yet, and nobody said how many."""
    code = "from harmonic import config, mesh; print(mesh.make_mesh(config.MeshConfig(data=3)).size)"
    bare = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES")}
    for said, words in (({}, "3"), ({"JAX_NUM_CPU_DEVICES": "2"}, "but there are 2")):
        environment = {**bare, "JAX_PLATFORMS": "cpu", **said}
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
        assert words in (done.stdout or done.stderr), done.stderr
