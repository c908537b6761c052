"""Several processes: laws 3, 5 and 6 over them, and what goes wrong. Real processes over loopback."""

import json
import re
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import group
import jax
import numpy as np
import pytest
from mains import ROOT, ended, free_address, pair, started, train_command
from tiny import config

from harmonic import processes
from harmonic import train as training
from harmonic.checkpoint import Checkpoints
from harmonic.errors import UserError
from harmonic.mesh import SEQ, process_part
from harmonic.metrics import read_metrics
from harmonic.run import Run

REFUSED = 2
SLURM = {"SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "here", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}


@pytest.fixture
def saved(tmp_path):
    """The path of a config of so many steps, on a mesh over two processes of two devices each."""
    path = tmp_path / "config.json"
    path.write_text(
        config("train.steps=100000", "train.checkpoint_every=3", *LONG, "mesh.data=2", "mesh.seq=2").to_json()
    )
    return path


LONG = ("train.segment_length=48", "train.validate_every=3", "train.validation_recordings=2")


def wait_for(workdir, lines, running):
    deadline = time.monotonic() + 300
    while len(read_metrics(workdir)) < lines:
        assert time.monotonic() < deadline
        for process in running:
            assert process.poll() is None, process.communicate()
        time.sleep(0.02)


@pytest.mark.laws
@pytest.mark.parametrize("which", ["some", pytest.param("all", marks=pytest.mark.slow)])
def test_processes_are_invisible(tiny_data, tmp_path, which):
    """Law 3: loss and gradient of two processes of four devices are those of one device."""
    expected = {}
    for dtype in group.TOLERANCE:
        for number, value in enumerate(group.loss_and_grad(tiny_data, dtype, 1, 1)):
            expected[f"{dtype}_{number}"] = value
    np.savez(tmp_path / "expected.npz", **expected)
    address = free_address()
    files = tiny_data, tmp_path / "expected.npz"
    commands = [[ROOT / "tests" / "group.py", address, 2, i, *files, which] for i in range(2)]
    with started(*commands) as running:
        for status, output, errors in ended(running):
            assert (status, output) == (0, "equal\n"), errors


def test_interrupted_on_two_processes_and_gone_on_with_on_one(tiny_data, tmp_path, saved):
    """Laws 5 and 6: one of two processes is asked to stop, both do; one process goes on, as if it had been alone."""
    workdir = tmp_path / "run"
    with started(*pair(train_command(saved, workdir, tiny_data)), devices=2) as running:
        wait_for(workdir, 5, running)
        running[1].send_signal(signal.SIGTERM)
        (status, output, errors), silent = ended(running)
    assert (status, output) == (128 + signal.SIGTERM, "") and "the same command goes on" in errors, errors
    assert silent == (128 + signal.SIGTERM, "", "")
    stopped = int(re.search(r"stopped by SIGTERM after step ([\d,]+)", errors)[1].replace(",", ""))
    checkpoints = Checkpoints(workdir, read_only=True)
    assert checkpoints.step("latest") == stopped
    checkpoints.close()

    alone = [config(f"train.steps={stopped + 4}", "train.checkpoint_every=0", *LONG, f"mesh.data={n}") for n in (4, 1)]
    training.train(alone[0], tiny_data, workdir)
    training.train(alone[1], tiny_data, tmp_path / "alone")
    ours, theirs = read_metrics(workdir), read_metrics(tmp_path / "alone")
    assert [(line["kind"], line["step"]) for line in ours] == [(line["kind"], line["step"]) for line in theirs]
    for one, other in zip(ours, theirs, strict=True):
        for name in {"loss", "grad_norm", "bits_per_sample"} & set(one):
            assert one[name] == pytest.approx(other[name], rel=2e-4), (one, other)
    one, other = (Run(folder).weights("latest").params for folder in (workdir, tmp_path / "alone"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3), one, other)


@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_process_ends_the_others(tiny_data, tmp_path, saved, killed):
    workdir = tmp_path / "run"
    with started(*pair(train_command(saved, workdir, tiny_data)), devices=2) as running:
        wait_for(workdir, 3, running)
        running[killed].kill()
        before = time.monotonic()
        status, _, errors = ended(running)[1 - killed]
        assert time.monotonic() - before < 60
    assert status != 0 and f"error: process {killed} is gone" in errors, errors
    assert "the same command goes on from the last checkpoint" in errors and "Traceback" not in errors


def test_processes_that_disagree_are_refused(tiny_data, tmp_path, saved):
    commands = pair(train_command(saved, tmp_path / "run", tiny_data), (), ("--set=train.learning_rate=0.1",))
    with started(*commands) as running:
        for status, _, errors in ended(running):
            assert status == REFUSED, errors
            assert errors.count("error: ") == 1 and "Traceback" not in errors, errors
            assert "process 1 was started with something else" in errors
            assert "config.train.learning_rate is 0.1 there and 0.002 in process 0" in errors
    assert not (tmp_path / "run").exists()


def test_an_absent_coordinator_is_refused(tiny_data, tmp_path, saved):
    *_, command = pair(train_command(saved, tmp_path / "run", tiny_data, "--initialization_timeout=2"))
    with started(command) as running:
        [(status, _, errors)] = ended(running)
    assert status == REFUSED and errors.count("\n") == 1, errors
    assert re.match(r"error: no coordinator at 127.0.0.1:\d+.* within 2 s", errors), errors


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("somewhere:1", None, None), "give all three"),
        ((None, 2, 0), "give all three"),
        (("somewhere", 2, 0), "must be host:port"),
        (("somewhere:1", 2, 2), "--process_index=2 is impossible with --num_processes=2"),
    ],
)
def test_half_of_the_flags_is_refused(arguments, words):
    with pytest.raises(UserError, match=words):
        processes.initialise(*arguments)


def test_a_single_process_is_left_alone(monkeypatch):
    """No flags and no scheduler, or a scheduler's single task: nothing is initialised."""
    monkeypatch.setattr(processes.jax.distributed, "initialize", lambda **_: pytest.fail("it was"))
    processes.initialise()
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SLURM_NTASKS", "1")
    processes.initialise()
    monkeypatch.setenv("SLURM_NTASKS", "4")  # of the allocation; this step has one
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    processes.initialise()
    processes.initialise("here:1", 1, 0)
    assert processes.current() == (0, 1) and processes.gather("x") == ["x"]


def test_values_that_differ_are_named(monkeypatch):
    ours = {"seed": 0, "sizes": (1, 2)}
    texts = [json.dumps(ours), json.dumps({**ours, "seed": 3})]
    monkeypatch.setattr(processes, "gather", lambda text: [text, texts[0]])
    processes.check_same(ours)
    monkeypatch.setattr(processes, "gather", lambda text: [text, *texts])
    with pytest.raises(UserError, match=r"process 2 was started with .*: seed is 3 there and 0 in process 0"):
        processes.check_same(ours)


@pytest.mark.parametrize(
    ("environment", "method"),
    [({**SLURM, "SLURM_NTASKS": "2"}, "slurm"), ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}, "ompi")],
    ids=["slurm", "ompi"],
)
def test_a_scheduler_is_found(monkeypatch, environment, method):
    asked = {}
    monkeypatch.setattr(processes.jax.distributed, "initialize", lambda **options: asked.update(options))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    processes.initialise()
    assert asked["cluster_detection_method"] == method
    processes.initialise("first:1234")  # the rest from the environment
    assert (asked["num_processes"], asked["process_id"]) == (2, int(method == "ompi"))


def fake_mesh(owners):
    owners = np.array(owners)
    devices = np.array([SimpleNamespace(process_index=int(i)) for i in owners.flat], object).reshape(owners.shape)
    return SimpleNamespace(devices=devices, shape={"data": owners.shape[0], SEQ: owners.shape[1]}, size=owners.size)


@pytest.mark.parametrize(
    ("owners", "rows", "piece"),
    [
        ([[0, 0], [0, 0], [1, 1], [1, 1]], (1, 2), (0, 1)),
        ([[0, 0, 1, 1]], (0, 1), (1, 2)),
        ([[0, 1], [2, 3]], (0, 2), (1, 2)),
        ([[0, 0, 1, 1], [2, 2, 3, 3]], (0, 2), (1, 2)),
    ],
    ids=["rows", "pieces", "both", "pairs"],
)
def test_what_a_process_holds(monkeypatch, owners, rows, piece):
    monkeypatch.setattr("jax.process_index", lambda: 1)
    part = process_part(fake_mesh(owners))
    assert (part.rows, part.piece) == (rows, piece)


@pytest.mark.parametrize("owners", [[[0, 0], [0, 1], [1, 1]], [[0, 0, 0, 1]], [[0, 1, 1, 0]]], ids=str)
def test_uneven_parts_are_refused(owners):
    with pytest.raises(UserError, match=r"mesh.data=\d x mesh.seq=\d gives 2 processes uneven parts"):
        process_part(fake_mesh(owners))


def launch(*arguments):
    command = [sys.executable, "-m", "workflows.launch", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120, check=False)


def test_launch_says_who_ended_and_how():
    done = launch("--processes=2", "--", "workflows.train", "--stepz=3")
    assert done.returncode == REFUSED, done.stderr
    assert re.search(r"^error: process [01] of 2 ended with status 2$", done.stderr, re.M), done.stderr
    assert "[1] error: Unknown command line flag 'stepz'" in done.stderr
    done = launch("--processes=2")
    assert done.returncode == REFUSED and done.stderr.startswith("error: nothing to run")
