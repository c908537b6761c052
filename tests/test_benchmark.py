"""The benchmark's suites, at sizes at which their figures mean nothing but are all there."""

import dataclasses
import json
import math
import subprocess
import sys

import jax
import numpy as np
import pytest
from tiny import config as tiny_config

from harmonic.config import MeshConfig, load_config
from harmonic.models import HarmonicRNN
from workflows import bench_generate, bench_loader, bench_scaling, bench_scan, bench_train
from workflows.plain_step import plain_step

SMALL = ("model.pool_factors=()", "model.blocks_per_level=2")


def is_figure(value):
    return isinstance(value, (int, float)) and math.isfinite(value) and value > 0


def test_scan_suite():
    (row,) = bench_scan.suite([(1, 64, 4)])
    figures = ("steps_per_second", "over_streaming_bound", "faster_than_associative")
    assert row["shape"] == [1, 64, 4] and all(is_figure(row[name]) for name in figures)


def test_train_suite():
    first, second = bench_train.suite(tiny_config(*SMALL, "train.segment_length=12"), batch=2, lengths=[30, 60])
    assert (first["shape"], first["segments"]) == ([2, 30], [3, 12])
    assert (second["shape"], second["segments"]) == ([2, 60], [5, 12])
    assert first["seconds_per_sample_over_first"] == 1
    wanted = {"samples_per_second", "of_matrix_rate", "compile_seconds", "temporary_bytes", "peak_resident_bytes"}
    for row in (first, second):
        assert wanted < row.keys()
        assert all(is_figure(value) for name, value in row.items() if name not in ("config", "shape", "segments"))


@pytest.mark.parametrize("groups", [2, 8])
def test_the_plain_step_is_the_model(groups):
    """What generation is compared with gives the same logits, over two pooling products and from any state."""
    ours = tiny_config(f"model.pool_groups={groups}")
    model = HarmonicRNN(ours.model)
    params = jax.jit(model.init)(jax.random.key(1))

    @jax.jit
    def run(params):
        def body(states, token):
            expected, fast = model.step(params, {}, states[0])
            logits, plain = plain_step(ours.model, params, states[1])
            return (model.observe(fast, token), model.observe(plain, token)), (expected[:, 0, 0], logits)

        tokens = jax.random.randint(jax.random.key(2), (2 * model.multiple + 1, 3, 1), 0, 256)
        return jax.lax.scan(body, (model.init_state(3),) * 2, tokens)

    states, (expected, logits) = run(params)
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *states)


def test_generate_suite():
    (row,) = bench_generate.suite(tiny_config(), batches=(2,), length=12)
    assert row.pop("config") == "tiny" and row.pop("batch") == 2
    assert row.keys() == {"samples_per_second", "faster_than_plain", "of_matrix_rate"}
    assert all(map(is_figure, row.values()))


def test_loader_suite():
    (row,) = bench_loader.suite(tiny_config(), lengths=(500,), samples=5_000, step_length=60)
    assert (row["window"], row["batch"]) == (500, 4)
    assert is_figure(row["samples_per_second"]) and is_figure(row["over_train_step"])


def test_dense_operations_of_the_papers_model():
    """5.48 M operations a sample forward, of which the scan and elementwise functions are a few per cent."""
    assert bench_train.dense_operations(load_config("sc09")) == pytest.approx(5.48e6, rel=0.05)


def test_scaling_rows(tmp_path):
    """Sharded as on one device, in loss and gradient; what is sent is what was foretold."""
    ours = tiny_config(*SMALL, "data.window_length=140", "train.segment_length=72", "train.global_batch_size=8")
    rows = [
        bench_scaling.measure(dataclasses.replace(ours, mesh=MeshConfig(*mesh)), tmp_path / "reference.npz")
        for mesh in ((1, 1), (2, 3))
    ]
    for row in rows:
        assert row["segments"] == [2, 72] and row["shape"] == [8, 140] and row["processes"] == 1
        assert row["loss_difference"] < 1e-5 and row["gradient_difference"] < 1e-5
        # Sums of several arrays are rounded up to whole bytes once, not one by one.
        assert row["sent_bytes"]["step"] == pytest.approx(row["foretold_bytes"], rel=1e-3)
    one, six = rows
    assert one["over_even_share"] == 1 and one["loss_difference"] == one["gradient_difference"] == 0
    assert set(one["sent_bytes"].values()) == {0} and all(map(is_figure, six["sent_bytes"].values()))
    assert six["temporary_bytes"] < one["temporary_bytes"]


def run(*arguments):
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


def test_a_mesh_that_is_none_is_refused():
    ended = run("workflows.scaling_rows", "--meshes=2x")
    assert ended.returncode == 2 and "--meshes=2x" in ended.stderr.splitlines()[-1]


@pytest.mark.slow
def test_scaling_suite_in_one_process_and_in_two():
    assignments = (*SMALL, "model.width=8", "model.state_width=16", "model.pool_groups=2", "model.gate_blocks=4")
    flags = [f"--set={assignment}" for assignment in assignments]
    ended = run("workflows.benchmark", "--suite=scaling", "--config=demo", "--length=48", *flags)
    assert ended.returncode == 0, ended.stderr
    rows = [json.loads(line) for line in ended.stdout.splitlines()]
    assert [(row["processes"], row["mesh"]) for row in rows] == [
        (processes, [int(n) for n in name.split("x")])
        for processes, names in bench_scaling.SETTINGS
        for name in names
    ]  # fmt: skip
    for row in rows:
        assert row["suite"] == "scaling" and row["platform"].startswith("cpu")
        assert row["loss_difference"] < 1e-5 and row["gradient_difference"] < 1e-5
        assert row["sent_bytes"]["step"] == row["foretold_bytes"]
