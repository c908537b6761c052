"""Law 5 by trial: every stage killed (SIGKILL, with all that it started) at random moments and started again, until it
ends as it does when it is left alone.

    HARMONIC_KILL_TRIALS=100 python -m pytest -m slow tests/test_kills.py

A trial is one kill and the start after it. Half of the moments are drawn over a stage's whole duration, half over the
part in which it writes. After every kill, what looks whole must be whole; in the end nothing may be left lying about.
"""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import jax
import numpy as np
import pytest
import soundfile

from harmonic.checkpoint import Checkpoints
from harmonic.models import make
from harmonic.run import Run
from harmonic.step import init_state

ROOT = Path(__file__).parents[1]
TRIALS = int(os.environ.get("HARMONIC_KILL_TRIALS", 100))
SEED = int(os.environ.get("HARMONIC_KILL_SEED", 0))
CONFIG = """
from harmonic.config import *

def get_config():
    return Config(
        name="tiny",
        model=ModelConfig(
            width=8, state_width=16, gate_blocks=4, pool_factors=(2, 3), blocks_per_level=1, pool_groups=2
        ),
        data=DataConfig(dataset="mine", encoding="mu_law", window_length=480),
        train=TrainConfig(
            steps=24, global_batch_size=2, warmup_steps=2, log_every=5, validate_every=6, checkpoint_every=2
        ),
        evaluate=EvaluateConfig(batch_size=4, segment_length=480),
        generate=GenerateConfig(num_samples=2, seconds=0.05, num_continuations=1, prompt_seconds=0.02),
    )
"""
PREPARE = ("pipelines.prepare", "--dataset=mine", "--source=../source", "--output_dir=data", "--num_shards=3")
STAGES = {  # name: (the command, what it needs of the stages before, its share of the trials)
    "prepare": (PREPARE, (), 0.2),
    "prepare_in_two": ((*PREPARE, "--direct_running_mode=multi_processing", "--direct_num_workers=2"), (), 0.1),
    "train": (("workflows.train", "--config=../tiny.py", "--workdir=run"), ("prepare/data",), 0.25),
    "evaluate": (
        ("workflows.evaluate", "--workdir=run", "--split=train", "--context=0.005,0.01,0.02"),
        ("prepare/data", "train/run"),
        0.15,
    ),
    "generate": (
        ("workflows.generate", "--workdir=run", "--num_samples=6", "--seconds=0.2"),
        ("prepare/data", "train/run"),
        0.15,
    ),
    "full_run": (("workflows.full_run", "--config=../tiny.py", "--workdir=run", "--source=../source"), (), 0.15),
}
TIMES = {"seconds", "samples_per_second", "stages"}


class Place:
    """A folder in which stages run, each in a folder of its own, left alone once as what the others must equal."""

    def __init__(self, folder):
        self.folder = folder
        self.durations = {}  # stage: seconds (in all, until it first writes)
        flags = re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ.get("XLA_FLAGS", "")).strip()
        # A cache that is complete when the first kill comes, so that all runs execute the same programs.
        cache = {"JAX_COMPILATION_CACHE_DIR": str(folder / "cache"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        self.environment = {**os.environ, **cache, "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}
        (folder / "source").mkdir()
        (folder / "tiny.py").write_text(CONFIG)
        numbers = np.random.default_rng(0)
        for i in range(12):
            tone = 0.3 * np.sin(np.arange(300 + 60 * i) * numbers.uniform(0.05, 0.5))
            soundfile.write(folder / "source" / f"{i:03d}.wav", tone, 16_000)

    def start(self, stage, name):
        """The stage's process, in a session of its own; it marks all that it starts."""
        self.mark = f"HARMONIC_KILL_MARK={uuid.uuid4().hex}"
        key, value = self.mark.split("=")
        with open(self.folder / name / "output.txt", "ab") as output:
            return subprocess.Popen(
                [sys.executable, "-m", *STAGES[stage][0]],
                cwd=self.folder / name,
                env={**self.environment, key: value},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def make(self, stage, name):
        """A folder with what a stage needs."""
        shutil.rmtree(self.folder / name, ignore_errors=True)
        (self.folder / name).mkdir()
        for needed in STAGES[stage][1]:
            self.reference(needed.split("/")[0])
            shutil.copytree(self.folder / needed, self.folder / name / needed.split("/")[1])

    def reference(self, stage):
        """The folder of the stage when it is left alone."""
        folder = self.folder / stage
        if not folder.exists():
            self.make(stage, stage)
            for attempt in range(2 if STAGES[stage][0][0] != "workflows.train" else 1):
                if attempt:  # the second time without compiling: that is what a trial's duration is
                    self.make(stage, stage)
                self.durations[stage] = self.timed(stage)
        return folder

    def timed(self, stage):
        before, started, first = stamps(self.folder / stage), time.monotonic(), None
        process = self.start(stage, stage)
        while process.poll() is None:
            if first is None and stamps(self.folder / stage) != before:
                first = time.monotonic() - started
            time.sleep(0.01)
        assert process.returncode == 0, (self.folder / stage / "output.txt").read_text()
        total = time.monotonic() - started
        return total, first or total

    def kill(self, stage, name, rng):
        """Starts a stage and kills it; false if it ended before."""
        total, first = self.durations[stage]
        folder, while_writing = self.folder / name, rng.random() < 0.5
        moment = rng.random() * (total - first if while_writing else total)
        before = stamps(folder)
        process = self.start(stage, name)
        if while_writing:
            while process.poll() is None and stamps(folder) == before:
                time.sleep(0.002)
        try:
            process.wait(moment)
            assert process.returncode == 0, (folder / "output.txt").read_text()
            return False
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return True
        finally:
            self.nobody_left()

    def nobody_left(self):
        """No process that a stage started outlives it, wherever it went."""
        deadline = time.monotonic() + 20
        while left := marked(self.mark):
            assert time.monotonic() < deadline, left
            time.sleep(0.05)

    def finish(self, stage, name):
        process = self.start(stage, name)
        assert process.wait() == 0, (self.folder / name / "output.txt").read_text()
        self.nobody_left()


def marked(mark):
    """The living processes with this in their environment."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (folder / "environ").read_bytes() and ") Z " not in (folder / "stat").read_text():
                found.append(folder.name)
        except OSError:
            continue
    return found


def stamps(folder):
    """Changes when anything below a folder is written, but for the process's own output and its lock."""
    found = set()
    for path, folders, files in os.walk(folder):
        for name in (*folders, *files):
            try:
                status = os.stat(os.path.join(path, name))
            except OSError:
                continue
            if name not in ("output.txt", ".lock", ".mine.lock"):
                found.add((path, name, status.st_mtime_ns, status.st_size if name in files else 0))
    return found


def without_times(value):
    if isinstance(value, dict):
        return {key: without_times(v) for key, v in value.items() if key not in TIMES}
    return [without_times(v) for v in value] if isinstance(value, list) else value


def check_what_looks_whole(ours, theirs):
    """After a kill: a file under its own name is the file that an undisturbed run writes."""
    for path in ours.rglob("*"):
        other = theirs / path.relative_to(ours)
        if path.suffix == ".wav":
            assert path.read_bytes() == other.read_bytes(), path
        elif path.suffix == ".json" and "checkpoints" not in path.parts:
            json.loads(path.read_text())
    if (ours / "data" / "manifest.json").exists():
        for path in (theirs / "data" / "mine").iterdir():
            assert path.name == "config.py" or (ours / "data/mine" / path.name).read_bytes() == path.read_bytes(), path


def names(folder):
    """What lies in a folder, but for what TensorBoard and Orbax name at random."""
    found = {path.relative_to(folder) for path in folder.rglob("*")}
    return {path for path in found if len(path.parts) < 4 and path.parts[1:2] != ("tensorboard",)}


def checkpoints_of(workdir):
    config = Run(workdir).config
    target = jax.eval_shape(lambda: init_state(config, make(config.model)))._asdict()
    checkpoints = Checkpoints(workdir, read_only=True)
    try:
        steps = {which: checkpoints.step(which) for which in ("latest", "best")}
        return steps, {s: (checkpoints.restore(s, target), without_times(checkpoints.meta(s))) for s in steps.values()}
    finally:
        checkpoints.close()


def check_the_end(ours, theirs):
    """Everything as an undisturbed run leaves it, but for what takes time."""
    assert names(ours) == names(theirs)
    for path in (p for p in theirs.rglob("*") if p.is_file()):
        other, parts = ours / path.relative_to(theirs), path.relative_to(theirs).parts
        if path.suffix in (".array_record", ".wav", ".py") or "data" in parts or path.name == "config.json":
            assert other.read_bytes() == path.read_bytes(), path
        elif path.suffix == ".json" and "checkpoints" not in parts:
            assert without_times(json.loads(other.read_text())) == without_times(json.loads(path.read_text())), path
        elif path.name == "metrics.jsonl":
            rows = [[without_times(json.loads(line)) for line in p.read_text().splitlines()] for p in (other, path)]
            assert rows[0] == rows[1]
    if (theirs / "run").exists():
        (steps, states), (expected_steps, expected) = checkpoints_of(ours / "run"), checkpoints_of(theirs / "run")
        assert steps == expected_steps
        jax.tree.map(np.testing.assert_array_equal, states, expected)


def survive(place, stage, trials, rng):
    """So many trials, in chains of one to six kills; after each chain the stage is left to end, and compared."""
    reference, done, chain, attempts = place.reference(stage), 0, 0, 0
    while done < trials:
        name, chain = f"{stage}-{chain}", chain + 1
        place.make(stage, name)
        for _ in range(min(rng.randint(1, 6), trials - done)):
            attempts += 1
            assert attempts < 5 * trials + 20, f"only {done} kills in {attempts} attempts"
            if not place.kill(stage, name, rng):
                break
            done += 1
            check_what_looks_whole(place.folder / name, reference)
        place.finish(stage, name)
        check_the_end(place.folder / name, reference)
        shutil.rmtree(place.folder / name)
    print(f"{stage}: {done} of {trials} kills survived, {attempts} starts, {chain} chains", flush=True)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return Place(tmp_path_factory.mktemp("kills"))


def test_a_killed_training_run_goes_on(place):
    """The short version: one kill while training writes."""
    survive(place, "train", 1, random.Random(3))


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_survives_kills(place, stage):
    survive(place, stage, max(1, round(TRIALS * STAGES[stage][2])), random.Random(f"{SEED} {stage}"))
