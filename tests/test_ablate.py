"""workflows.ablate as a user runs it: tiny models, synthetic digits, real processes."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
from mains import refused, run

from harmonic.config import Config, override

STUDY = """
import dataclasses
from configs.ablations import Published, Run, Study
from harmonic.config import *
from harmonic.models.harmonic_rnn.config import ModelConfig

def get_study(size):
    base = Config(
        name="tiny",
        model=ModelConfig(
            width=8, state_width=16, gate_blocks=4, pool_factors=(2,), blocks_per_level=1, pool_groups=8, dropout=0.0
        ),
        data=DataConfig(dataset="sc09", window_length=600),
        train=TrainConfig(
            steps=4, global_batch_size=2, warmup_steps=2, log_every=1, validate_every=2, checkpoint_every=2
        ),
        evaluate=EvaluateConfig(batch_size=2, segment_length=1_200),
        generate=GenerateConfig(num_samples=1, seconds=0.05, num_continuations=0),
    )
    model = dataclasses.replace(base.model, pool_groups=1)
    return Study(
        "tiny", "Tiny", "table 1", "", "diagonal",
        (
            Run("diagonal", "8", base, Published(1.854)),
            Run("dense", "1", dataclasses.replace(base, model=model), Published(1.956)),
        ),
    )
"""
ABLATE = ("workflows.ablate", "--study=tiny.py", "--source=sc09", "--workdir=study")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with digits of nobody's in SC09's layout, and a study."""
    place, names = tmp_path_factory.mktemp("place"), []
    numbers = np.random.default_rng(0)
    for digit in ("zero", "one"):
        (place / "sc09" / digit).mkdir(parents=True)
        for i in range(4):
            names.append(f"{digit}/someone_nohash_{i}.wav")
            tone = 0.3 * np.sin(np.arange(500 + 50 * i) * numbers.uniform(0.05, 0.5))
            soundfile.write(place / "sc09" / names[-1], tone, 16_000)
    (place / "sc09" / "validation_list.txt").write_text(f"{names[0]}\n{names[4]}\n")
    (place / "sc09" / "testing_list.txt").write_text(f"{names[1]}\n{names[5]}\n")
    (place / "tiny.py").write_text(STUDY)
    return place


def results(place, folder="study"):
    study = json.loads((place / folder / "study.json").read_text())
    return {(row["name"], one["seed"]): one for row in study["runs"] for one in row["results"]}


@pytest.mark.slow
def test_a_study_interrupted_and_gone_on_with(place):
    """One run of another config stands in the way: it is named, the other runs are made and shown. Once it is out of
    the way the same command makes what is missing, and leaves alone what is there."""
    other = place / "study" / "dense" / "seed_0"
    other.mkdir(parents=True)
    (other / "config.json").write_text(override(Config(), ["train.learning_rate=0.004"]).to_json())
    line = refused(*ABLATE, cwd=place)
    assert "1 of 2 runs failed (dense, seed 0: " in line and "train.learning_rate is 0.004 there" in line
    found = results(place)
    assert "another config" in found["dense", 0]["error"] and "bits_per_sample" not in found["dense", 0]
    assert "bits_per_sample" in found["diagonal", 0]
    assert "Failed:" in (place / "study" / "study.md").read_text()
    checkpoint = place / "study" / "diagonal" / "seed_0" / "checkpoints" / "4"
    made = checkpoint.stat().st_mtime_ns

    (other / "config.json").unlink()
    done = run(*ABLATE, cwd=place)
    assert done.stdout.strip().endswith("study: study/study.html") and checkpoint.stat().st_mtime_ns == made
    found = results(place)
    for name in ("diagonal", "dense"):
        folder = place / "study" / name / "seed_0"
        figures = json.loads((folder / "evaluation.json").read_text())["test"]
        one = found[name, 0]
        assert "error" not in one and one["bits_per_sample"] == figures["bits_per_sample"]
        assert [step for step, _ in one["validation"]] == [2, 4] and one["generated_per_second"] > 0
        assert one["test_samples"] == 1_100 and (folder / "report.html").exists()
        assert "workflows.ablate" in json.loads((folder / "summary.json").read_text())["command"]
    assert found["dense", 0]["parameters"] > found["diagonal", 0]["parameters"]
    with (place / "study" / "study.csv").open() as file:
        assert [line["state"] for line in csv.DictReader(file)] == ["done", "done"]
    assert "dense/seed_0/report.html" in (place / "study" / "study.html").read_text()
    # Runs of one seed differ in nothing but what is studied.
    configs = [json.loads((place / "study" / n / "seed_0" / "config.json").read_text()) for n in ("diagonal", "dense")]
    assert [config["model"].pop("pool_groups") for config in configs] == [8, 1] and configs[0] == configs[1]


REFUSALS = """
import sys
from absl import flags
from harmonic.errors import UserError
from workflows import ablate

for line in sys.stdin.read().splitlines():
    for name in ("study", "workdir", "config", "classifier", "source", "seeds", "runs", "set"):
        flags.FLAGS[name].unparse()
    flags.FLAGS(["ablate", *line.split()])
    try:
        ablate.main()
        print("no refusal")
    except UserError as error:
        print(str(error).replace("\\n", "NEWLINE"))
"""
WRONG = [
    ("", ["--study is missing", "groups"]),
    ("--study=groups --config=sc09", ["a study has its own configs"]),
    ("--study=groups --runs=dens", ["no run 'dens'", "dense, four, diagonal"]),
    ("--study=groups --seeds=0,0", ["--seeds=0,0 is impossible"]),
    ("--study=groups --seeds=-1", ["--seeds=-1 is impossible"]),
    ("--study=groups --set=model.widht=3", ["did you mean model.width"]),
    ("--study=groups --set=model.width=30", ["model.pool_groups", "a divisor of model.width=30"]),
    ("--study=datasets --source=a.zip", ["--source=a.zip does not say of which data set", "youtubemix"]),
    ("--study=groups --source=a.zip --source=sc09=b.zip", ["twice for sc09: a.zip and b.zip"]),
    ("--study=groups --source=absent.zip", ["absent.zip"]),
    ("--study=groups --workdir=another", ["another holds the study tiny at size small; give another --workdir"]),
    ("--study=tiny.py --source=sc09 --classifier=absent --workdir=unheard", ["absent"]),
]


def test_what_is_wrong_stops_a_study_before_its_first_run(place):
    (place / "another").mkdir()
    (place / "another" / "study.json").write_text('{"study": "tiny", "size": "small"}')
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    asked = "".join(f"{line}\n" for line, _ in WRONG)
    done = subprocess.run(
        [sys.executable, "-c", REFUSALS], input=asked, cwd=place, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == len(WRONG), done.stdout
    for said, (_, words) in zip(lines, WRONG, strict=True):
        assert all(word in said for word in words) and "NEWLINE" not in said, said
    assert not list(place.glob("studies/*/*/seed_*")) and not list(place.glob("unheard/*/seed_*"))


@pytest.mark.slow
def test_a_study_killed_at_any_moment(place):
    """Law 5 for a study: kills and a polite stop spread over it, then one command to the end, and the same figures."""
    whole = [sys.executable, "-m", *ABLATE[:-1], "--seeds=0,1", "--data_dir=killed_data"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    for seconds, kill in ((4, 9), (8, 9), (12, 15), (16, 9), (20, 9), (25, 15), (30, 9)):
        process = subprocess.Popen(
            [*whole, "--workdir=killed"],
            cwd=place,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        time.sleep(seconds)
        process.send_signal(signal.Signals(kill))
        process.wait()
    for folder in ("killed", "unharmed"):
        subprocess.run([*whole, f"--workdir={folder}"], cwd=place, env=environment, check=True)
    ours, theirs = results(place, "killed"), results(place, "unharmed")
    assert len(ours) == 4
    for key, one in ours.items():
        assert (
            one["bits_per_sample"] == theirs[key]["bits_per_sample"] and one["validation"] == theirs[key]["validation"]
        )
