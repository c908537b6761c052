"""Damage, NaNs and clocks: each ends in recovery or in one clear error."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import soundfile
from tiny import config

from harmonic import stages
from harmonic import train as training
from harmonic.checkpoint import Checkpoints
from harmonic.data import Dataset, train_batches
from harmonic.errors import UserError
from harmonic.metrics import read_metrics
from harmonic.models import make
from harmonic.run import Run
from harmonic.step import init_state
from pipelines.build import PrepareSpec, prepare

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def reference(tiny_data, tmp_path_factory):
    """A run of six steps, with checkpoints of 4 and 6."""
    workdir = tmp_path_factory.mktemp("faults") / "reference"
    training.train(config(), tiny_data, workdir)
    return workdir


@pytest.fixture
def run(reference, tmp_path):
    """A copy of it, to be damaged."""
    return Path(shutil.copytree(reference, tmp_path / "run"))


def state_of(workdir, ours=None):
    """(step, all that a checkpoint holds of the latest state)."""
    ours = ours or config()
    target = jax.eval_shape(lambda: init_state(ours, make(ours.model)))._asdict()
    checkpoints = Checkpoints(workdir, read_only=True)
    step = checkpoints.step("latest")
    restored = checkpoints.restore(step, target)
    checkpoints.close()
    return step, restored


def flip(path, at=None):
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if at is None else at] ^= 1
    path.write_bytes(data)


def files_of(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


# Checkpoints.


def test_every_file_of_a_checkpoint_is_watched(run, capsys):
    """One bit flipped anywhere, the list of checksums included: the one before is used, and a line says so."""
    latest = run / "checkpoints" / "6"
    paths = [path for path in files_of(latest) if path.stat().st_size]
    assert {path.relative_to(latest).parts[0] for path in paths} >= {"params", "ema", "optimizer", "checksums.txt"}
    for path in paths:
        whole = path.read_bytes()
        for at in {0, len(whole) // 2, len(whole) - 1}:
            flip(path, at)
            checkpoints = Checkpoints(run, read_only=True)
            assert checkpoints.whole("latest") == 4, path
            checkpoints.close()
            said = capsys.readouterr().err
            assert f"checkpoint 6 in {run / 'checkpoints'} is damaged: " in said, path
            assert "; it is left out, and 4 is used" in said and said.count("\n") == 1
            path.write_bytes(whole)
    assert Run(run).weights("latest").step == 6 and capsys.readouterr().err == ""


@pytest.mark.parametrize("which", ["latest", "best"])
def test_weights_of_a_damaged_checkpoint_are_the_next_ones(run, capsys, which):
    step, other = Run(run).weights(which).step, {4: 6, 6: 4}
    flip(max(files_of(run / "checkpoints" / str(step) / "ema"), key=lambda path: path.stat().st_size))
    assert Run(run).weights(which).step == other[step]
    assert f"it is left out, and {other[step]} is used" in capsys.readouterr().err
    with pytest.raises(UserError, match=rf"checkpoint {step} in .* is damaged: ema/.* and no other can take its place"):
        Run(run).weights(str(step))
    flip(files_of(run / "checkpoints" / str(other[step]) / "params")[0], 0)
    with pytest.raises(UserError, match="bring one back from a copy, or give another --workdir"):
        Run(run).weights(which)


def remove_a_file(latest):
    (latest / "params" / "manifest.ocdbt").unlink()


def cut_a_file(latest):
    path = max(files_of(latest / "optimizer"), key=lambda path: path.stat().st_size)
    path.write_bytes(path.read_bytes()[:-1])


def add_a_file(latest):
    (latest / "ema" / "more").write_text("")


def flip_a_bit(latest):
    flip(latest / "meta" / "metadata")


def leave_it_unfinished(latest):
    (latest / "checksums.txt").rename(latest / "checksums.txt.partial")


def leave_it_temporary(latest):
    latest.rename(latest.with_name("6.orbax-checkpoint-tmp"))


def leave_half_of_it(latest):
    leave_it_unfinished(latest)
    for path in files_of(latest)[::2]:
        path.unlink()


@pytest.mark.parametrize(
    ("damage", "said", "aside"),
    [
        (remove_a_file, "is damaged: params/manifest.ocdbt is not as written; it is set aside as damaged-6", True),
        (cut_a_file, "is damaged: optimizer/", True),
        (add_a_file, "is damaged: ema/more is not as written", True),
        (flip_a_bit, "is damaged: meta/metadata is not as written; it is set aside as damaged-6", True),
        (leave_it_unfinished, "was never finished; it is removed", False),
        (leave_half_of_it, "was never finished; it is removed", False),
        (leave_it_temporary, "", False),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_training_goes_on_from_the_checkpoint_before(run, capsys, damage, said, aside):
    damage(run / "checkpoints" / "6")
    checkpoints = Checkpoints(run)
    assert checkpoints.step("latest") == 4 and checkpoints.meta(4)["step"] == 4
    checkpoints.close()
    errors = capsys.readouterr().err
    assert said in errors and errors.count("\n") == bool(said)
    left = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert left == (["4", "damaged-6"] if aside else ["4"])


def test_a_run_with_a_damaged_checkpoint_ends_as_it_would_have(run, reference, tiny_data):
    flip_a_bit(run / "checkpoints" / "6")
    training.train(config(), tiny_data, run)
    (step, state), (expected_step, expected) = state_of(run), state_of(reference)
    assert step == expected_step
    jax.tree.map(np.testing.assert_array_equal, state, expected)


def test_without_a_whole_checkpoint_training_stops(run, tiny_data):
    for step in (4, 6):
        flip(files_of(run / "checkpoints" / str(step) / "params")[0], 0)
    for _ in range(2):  # nothing is moved or removed
        with pytest.raises(UserError, match=r"checkpoint 6 in .* is damaged: params/.* no other can take its place"):
            training.train(config(), tiny_data, run)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["4", "6"]


# Shards.


@pytest.fixture
def data(tiny_data, tmp_path):
    return Path(shutil.copytree(tiny_data, tmp_path / "data" / "tiny"))


def test_a_flipped_byte_in_a_shard_is_met_in_training(data):
    """Wherever it is: either nothing that is read has changed, or the shard is named."""
    shard = data / "train-00000-of-00001.array_record"
    whole = shard.read_bytes()

    def read():
        split = Dataset(data).split("train")
        return [split.read(i).tobytes() for i in range(len(split.recordings))]

    expected, found = read(), 0
    used = np.flatnonzero(np.frombuffer(whole, np.uint8))
    for at in [*used[:: max(len(used) // 400, 1)], len(whole) - 1]:
        flip(shard, at)
        try:
            assert read() == expected, at
        except UserError as error:
            assert "train-00000-of-00001.array_record" in str(error) and "prepare the data set again" in str(error)
            assert "\n" not in str(error), error
            found += 1
        shard.write_bytes(whole)
    assert found > 300


def test_training_on_a_damaged_shard_names_it(data, tmp_path):
    shard = data / "train-00000-of-00001.array_record"
    used = np.flatnonzero(np.frombuffer(shard.read_bytes(), np.uint8))
    flip(shard, used[len(used) // 3])
    with pytest.raises(UserError, match=r"train-00000-of-00001.array_record in .* is damaged at recording"):
        batches = train_batches(Dataset(data), config())
        for _ in range(20):
            next(batches)


def test_a_deleted_shard_is_named(data, tmp_path):
    (data / "train-00000-of-00001.array_record").unlink()
    with pytest.raises(UserError, match=r"train-00000-of-00001.array_record is missing .*prepare the data set again"):
        training.train(config(), data, tmp_path / "run")


# NaNs.

LEARNED = ("model.embedding=learned", "model.dropout=0", "train.validate_every=0", "train.checkpoint_every=3")


@pytest.fixture(scope="module")
def two_tokens(tmp_path_factory):
    """A data set of square waves, which are two tokens, and of one recording for training that has all of them."""
    place = tmp_path_factory.mktemp("nan")
    (place / "source").mkdir()
    for i in range(10):
        wave = np.sign(np.sin(np.arange(500) * 0.05 * (i + 1)) + 1e-3) if i else np.sin(np.arange(500) * 0.1)
        soundfile.write(place / "source" / f"{i}.wav", 0.5 * wave, 16_000)
    (place / "validation.txt").write_text("8.wav\n")
    (place / "test.txt").write_text("9.wav\n")
    lists = {"validation_list": str(place / "validation.txt"), "test_list": str(place / "test.txt")}
    prepare(PrepareSpec("tiny", str(place / "source"), str(place), **lists))
    return place / "tiny"


def with_nan(workdir, ours, token):
    """The latest checkpoint again, one step later, with NaN for what the model knows of a token."""
    step, state = state_of(workdir, ours)
    for name in ("params", "ema"):
        tables = [v for v in jax.tree.leaves(state[name]) if v.shape == (256, ours.model.width)]
        assert len(tables) == 1
        broken = np.array(tables[0])
        broken[token] = np.nan
        state[name] = jax.tree.map(lambda v, table=tables[0], new=broken: new if v is table else v, state[name])
    checkpoints = Checkpoints(workdir)
    meta = checkpoints.meta(step)
    checkpoints.save(step + 1, state, {**meta, "step": step + 1}, None)
    checkpoints.close()


def test_a_nan_batch_is_skipped_and_counted(two_tokens, tmp_path):
    """Batches that meet a NaN leave everything as it was; the others go on."""
    workdir = tmp_path / "run"
    training.train(config(*LEARNED, "train.steps=1"), two_tokens, workdir)
    with_nan(workdir, config(*LEARNED), 100)
    ours = config(*LEARNED, "train.steps=14")
    batches = train_batches(Dataset(two_tokens), ours)
    met = [bool((next(batches)["tokens"][:, :-1] == 100).any()) for _ in range(13)][1:]  # as data of step 2 on
    assert 0 < sum(met) < len(met)
    training.train(ours, two_tokens, workdir)
    lines = [line for line in read_metrics(workdir) if line["kind"] == "train" and line["step"] > 2]
    assert [line["skipped"] for line in lines] == list(np.cumsum(met))
    assert [line["loss"] is None for line in lines] == met
    _, state = state_of(workdir, ours)
    broken = sum(int(np.isnan(v).any()) for v in jax.tree.leaves(state["params"]))
    assert broken == 1 and int(state["optimizer"]["skipped"]) == sum(met)


def test_nothing_but_nan_stops_training(two_tokens, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "_DIVERGED", 4)
    workdir = tmp_path / "run"
    training.train(config(*LEARNED, "train.steps=1"), two_tokens, workdir)
    for token in (0, 255):  # in every recording
        with_nan(workdir, config(*LEARNED), token)
    with pytest.raises(UserError, match=r"diverged: the last 4 updates were skipped \(loss nan, .*start a new workdir"):
        training.train(config(*LEARNED, "train.steps=30"), two_tokens, workdir)
    assert [line["skipped"] for line in read_metrics(workdir) if line["step"] > 3] == [1, 2, 3, 4]


# What figures and sounds were made from.


def test_figures_of_weights_trained_again_to_the_same_step_are_not_kept(run, tiny_data):
    stages.evaluate_run(run, tiny_data)
    weights, manifest = Run(run).weights(), Dataset(tiny_data).manifest
    known = {"weights_sha256": weights.sha256}
    assert stages.evaluation(run, manifest, weights.step, **known)["weights_sha256"] == weights.sha256
    assert stages.evaluation(run, manifest, weights.step, weights_sha256="of others") is None


# Clocks.

JUMPING = """
import itertools, runpy, sys, time
real, calls = time.time, itertools.count()
def jumping():
    return real() + (-1e8, 1e8, -3e8, 3.6e3)[next(calls) % 4]
time.time = jumping
time.time_ns = lambda: int(jumping() * 1e9)
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_clocks_that_jump_change_nothing(tiny_data, tmp_path):
    """A real run whose clock goes back and forth by years: the same weights and losses, in order, at positive rates."""
    path = tmp_path / "config.json"
    path.write_text(config("train.log_every=2").to_json())
    for name, start in (("steady", ["-m"]), ("jumping", ["-c", JUMPING])):
        flags = [f"--config={path}", f"--workdir={tmp_path / name}", f"--data_dir={tiny_data.parent}"]
        command = [sys.executable, *start, "workflows.train", *flags]
        done = subprocess.run(command, cwd=ROOT, env={**os.environ}, capture_output=True, text=True)
        assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
        assert not any(word in done.stderr for word in (", -", "nan", "inf")), done.stderr
    rows = [read_metrics(tmp_path / name) for name in ("steady", "jumping")]
    assert all(row.pop("samples_per_second", 1) > 0 for some in rows for row in some)
    assert rows[0] == rows[1]
    steps = [sorted(p.name for p in (tmp_path / name / "checkpoints").iterdir()) for name in ("steady", "jumping")]
    assert steps[0] == steps[1]
    (_, one), (_, other) = state_of(tmp_path / "steady"), state_of(tmp_path / "jumping")
    jax.tree.map(np.testing.assert_array_equal, one, other)
    seconds = [
        json.loads((tmp_path / n / f"checkpoints/{steps[0][-1]}/meta/metadata").read_text()) for n in ("jumping",)
    ]
    assert 0 < seconds[0]["seconds"] < 600
