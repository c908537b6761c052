"""The benchmark's suites, at sizes at which their figures mean nothing but are all there."""

import dataclasses
import json
import math
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import MODEL, batch_of, parameters
from tiny import config as tiny_config

from harmonic import models
from harmonic.config import MeshConfig, load_config
from harmonic.errors import UserError
from harmonic.mesh import make_mesh
from harmonic.step import make_loss_and_grad
from workflows import bench_generate, bench_loader, bench_scaling, bench_scan, bench_train, timing

SMALL = ("model.pool_factors=()", "model.blocks_per_level=2")
SIZES = (*SMALL, "model.width=8", "model.state_width=16", "model.pool_groups=2", "model.gate_blocks=4")
TINY = ("--config=demo", *(f"--set={assignment}" for assignment in SIZES))


def is_figure(value):
    return isinstance(value, (int, float)) and math.isfinite(value) and value > 0


def test_scan_suite():
    (row,) = bench_scan.suite([(1, 64, 4)])
    assert (row["implementation"], row["shape"], row["dtype"]) == ("native", [1, 64, 4], "float32")
    figures = ("samples_per_second", "over_streaming_bound", "faster_than_associative")
    assert all(is_figure(row[name]) for name in figures)


def test_train_suite_at_two_lengths():
    first, second = bench_train.suite(tiny_config(*SMALL, "train.segment_length=12"), batch=2, lengths=[30, 60])
    assert (first["shape"], first["segments"]) == ([2, 30], [3, 12])
    assert (second["shape"], second["segments"]) == ([2, 60], [5, 12])
    assert first["seconds_per_sample_over_first"] == 1 and is_figure(second["seconds_per_sample_over_first"])


def test_train_suite_beside_plain_models():
    """By the command, each model in a process of its own, the plain ones in one segment."""
    ended = run(
        "workflows.benchmark", "--suite=train", "--batch=2", "--length=30", "--set=train.segment_length=12", *TINY
    )
    assert ended.returncode == 0, ended.stderr
    *plain, ours = map(json.loads, ended.stdout.splitlines())
    assert [row["implementation"] for row in (*plain, ours)] == ["associative", "scan", "harmonic"]
    assert [row["segments"] for row in (*plain, ours)] == [[1, 30], [1, 30], [3, 12]]
    ratios = {
        f"{what}_{name}"
        for what in ("faster_than", "memory_of", "peak_resident_of")
        for name in models.plain_variants(MODEL)
    }
    for row in (*plain, ours):
        assert row.pop("platform").startswith("cpu")
        words = [row.pop(name) for name in ("suite", "config", "shape", "dtype")]
        assert words == ["train", "demo", [2, 30], "float32"]
        del row["segments"], row["implementation"]
        assert row.keys() - ratios - {"seconds_per_sample_over_first"} == {
            "samples_per_second", "of_matrix_rate", "steps", "step_seconds", "step_cpu_seconds", "trace_seconds",
            "compile_seconds", "temporary_bytes", "argument_bytes", "peak_resident_bytes",
        }  # fmt: skip
        assert all(map(is_figure, row.values()))
    assert ratios <= ours.keys() and not any(ratios & row.keys() for row in plain)


def test_a_plain_model_that_cannot_be_measured_has_a_row_that_says_so():
    rows = bench_train.suite(tiny_config("mesh.seq=2"), batch=1, lengths=[30], baseline_samples=30)
    row = next(rows)
    assert row["implementation"] == "associative" and row["shape"] == [1, 30] and row["platform"].startswith("cpu")
    assert "cannot cut a sequence over devices" in row["failed"]


def test_a_process_that_is_killed_is_told_of():
    with pytest.raises(UserError, match="killed by signal 9; most likely the memory did not suffice"):
        timing.in_child(signal.raise_signal, signal.SIGKILL)


def test_a_program_that_does_not_fit_is_not_run(monkeypatch):
    monkeypatch.setattr(timing, "free_bytes", lambda: 1_000)
    with pytest.raises(UserError, match=r"the step needs 0\.0 GB beside its arguments, where 0\.0 GB are free"):
        bench_train.measure(tiny_config(*SMALL), 1, 12)


@pytest.mark.parametrize(
    ("recurrence", "dtype", "tolerance"), [("associative", "float64", 1e-12), ("scan", "float32", 1e-5)]
)
def test_the_plain_model_is_the_model(x64, recurrence, dtype, tolerance):
    """What training is compared with has the same loss and gradients, dropout on."""
    tokens = jax.random.randint(jax.random.key(1), (1, 3, 24, 1), 0, 256)
    batch, words = (
        batch_of(tokens, jnp.array([24, 17, 0], jnp.int32), jnp.arange(3, dtype=jnp.int32)),
        jnp.array([3, 4], jnp.uint32),
    )
    both = models.make(MODEL), models.plain(MODEL, variant=recurrence)
    (loss, grads), plain = (
        jax.jit(make_loss_and_grad(m, make_mesh(MeshConfig())))(parameters(dtype), batch, words) for m in both
    )
    assert plain[0].dtype == loss.dtype == dtype
    np.testing.assert_allclose(plain[0], loss, rtol=tolerance)
    for actual, expected in zip(jax.tree.leaves(plain[1]), jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance * float(np.abs(expected).max()))


@pytest.mark.parametrize("groups", [2, 8])
def test_the_plain_step_is_the_model(groups):
    """What generation is compared with gives the same logits, over two pooling products and from any state."""
    ours = tiny_config(f"model.pool_groups={groups}")
    model, plain = models.make(ours.model), models.plain(ours.model)
    params = jax.jit(model.init)(jax.random.key(1))

    @jax.jit
    def run(params):
        def body(states, token):
            expected, fast = model.step(weights, {}, states[0])
            logits, slow = plain.step(params, {}, states[1])
            return (model.observe(fast, token), plain.observe(slow, token)), (expected[:, 0, 0], logits[:, 0, 0])

        weights = model.prepare(params)

        tokens = jax.random.randint(jax.random.key(2), (2 * model.multiple + 1, 3, 1), 0, 256)
        return jax.lax.scan(body, (model.init_state(3),) * 2, tokens)

    states, (expected, logits) = run(params)
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *states)


def test_generate_suite():
    (row,) = bench_generate.suite(tiny_config(), batches=(2,), length=12)
    assert (row.pop("config"), row.pop("shape"), row.pop("dtype")) == ("tiny", [2, 12], "float32")
    figures = {"samples_per_second", "faster_than_plain", "of_matrix_rate", "matrix_operations_per_second"}
    assert row.keys() == figures and all(map(is_figure, row.values()))


def test_loader_suite():
    (row,) = bench_loader.suite([tiny_config("data.encoding=linear")], length=60, samples=5_000)
    assert (row["encoding"], row["shape"], row["dtype"], row["train_step_shape"]) == (
        "linear",
        [4, 500],
        "uint8",
        [1, 60],
    )
    assert is_figure(row["samples_per_second"]) and is_figure(row["over_train_step"])


def test_the_loaders_settings_are_the_papers():
    settings = [load_config(name).data for name in bench_loader.SETTINGS]
    expected = [("mu_law", 16_000), ("linear", 128_000), ("mu_law", 960_512)]
    assert [(data.encoding, data.window_length) for data in settings] == expected


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
    ended = run("workflows.benchmark", "--suite=scaling", "--length=48", *TINY)
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
