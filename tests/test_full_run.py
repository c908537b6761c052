"""Every main, as a user runs it: real processes, real files, synthetic audio."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
from mains import refused, run

from harmonic import audio

CONFIG = """
from harmonic.config import *

def get_config():
    return Config(
        name="tiny",
        model=ModelConfig(
            width=8, state_width=16, gate_blocks=4, pool_factors=(2, 3), blocks_per_level=1, pool_groups=2
        ),
        data=DataConfig(dataset="sc09", encoding="mu_law", window_length=1_200),
        train=TrainConfig(
            steps=4, global_batch_size=2, warmup_steps=2, log_every=1, validate_every=2, checkpoint_every=2
        ),
        evaluate=EvaluateConfig(batch_size=2, segment_length=1_200),
        generate=GenerateConfig(num_samples=2, seconds=0.05, num_continuations=1, prompt_seconds=0.02),
    )
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with spoken digits of nobody's in SC09's layout, and a config."""
    place = tmp_path_factory.mktemp("place")
    numbers = np.random.default_rng(0)
    names = []
    for digit in ("zero", "one"):
        (place / "sc09" / digit).mkdir(parents=True)
        for i in range(6):
            names.append(f"{digit}/someone_nohash_{i}.wav")
            tone = 0.3 * np.sin(np.arange(600 + 50 * i) * numbers.uniform(0.05, 0.5))
            soundfile.write(place / "sc09" / names[-1], tone, 8_000)
    (place / "sc09" / "validation_list.txt").write_text(f"{names[0]}\n{names[6]}\n")
    (place / "sc09" / "testing_list.txt").write_text(f"{names[1]}\n{names[7]}\n")
    (place / "tiny.py").write_text(CONFIG)
    return place


FULL = ("workflows.full_run", "--config=tiny.py", "--source=sc09")


@pytest.fixture(scope="module")
def finished(place):
    done = run(*FULL, cwd=place)
    assert "report: runs/tiny/report.html" in done.stdout
    return place / "runs" / "tiny"


def test_full_run_leaves_what_it_promises(finished):
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["data"]["splits"]["train"]["recordings"] == 8
    assert summary["test"]["samples"] == 2 * 1_300 and summary["test"]["uniform_bits"] == 8
    assert summary["train"]["steps"] == 4 and set(summary["stages"]) >= {"prepare", "train", "evaluate", "generate"}
    assert summary["command"] == "python -m workflows.full_run --config=tiny.py --source=sc09"
    described = json.loads((finished / "samples" / "samples.json").read_text())
    kinds = [row["kind"] for row in described["samples"]]
    assert kinds.count("sample") == 2 and kinds.count("continuation") == 1 and kinds.count("real") == 1
    for row in described["samples"]:
        waveform, rate = soundfile.read(finished / "samples" / row["file"])
        assert rate == 16_000 and len(waveform) == pytest.approx(row["seconds"] * rate)
    sound = json.loads((finished / "sound.json").read_text())
    assert sound["weights_sha256"] == described["weights_sha256"] and "needs 129" in sound["notes"][0]
    assert summary["sound"]["notes"] == sound["notes"] and summary["sound"]["share"] is None  # clips are too short
    report = (finished / "report.html").read_text()
    assert report.count("<audio") == len(kinds) and "How it sounds" in report
    assert not list(finished.rglob("*.partial"))


def test_a_finished_run_is_skipped(place, finished):
    before = {
        p: p.stat().st_mtime_ns
        for p in finished.rglob("*")
        if p.suffix in (".wav", ".jsonl") or "ema" in p.parts or p.name == "sound.json"
    }
    stages = json.loads((finished / "summary.json").read_text())["stages"]
    run(*FULL, cwd=place)
    assert {p: p.stat().st_mtime_ns for p in before} == before
    after = json.loads((finished / "summary.json").read_text())["stages"]
    assert {k: after[k] for k in ("train", "evaluate", "generate", "sound")} == {
        k: stages[k] for k in ("train", "evaluate", "generate", "sound")
    }


def test_a_lost_stage_is_made_again(place, finished):
    evaluation, sample = finished / "evaluation.json", finished / "samples" / "sample_0000.wav"
    figures, sound = json.loads(evaluation.read_text()), sample.read_bytes()
    heard = (finished / "sound.json").read_bytes()
    evaluation.unlink()
    (finished / "sound.json").unlink()
    (finished / "samples" / "samples.json").unlink()
    run(*FULL, cwd=place)
    again = json.loads(evaluation.read_text())
    assert again["test"]["bits_per_sample"] == figures["test"]["bits_per_sample"]
    assert sample.read_bytes() == sound and (finished / "sound.json").read_bytes() == heard


@pytest.mark.slow
def test_full_run_killed_at_any_moment(place, finished):
    """Law 5 for the chain: kills spread over it, then one run to the end, and the same figures and sounds."""
    command = [sys.executable, "-m", *FULL, "--workdir=killed", "--data_dir=killed_data"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    for seconds in (3, 6, 9, 12, 16, 20):
        process = subprocess.Popen(
            command, cwd=place, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        time.sleep(seconds)
        process.kill()
        process.wait()
    run(*FULL, "--workdir=killed", "--data_dir=killed_data", cwd=place)
    ours, theirs = (json.loads((p / "summary.json").read_text()) for p in (place / "killed", finished))
    assert ours["test"]["bits_per_sample"] == theirs["test"]["bits_per_sample"]
    for path in (finished / "samples").glob("*.wav"):
        assert (place / "killed" / "samples" / path.name).read_bytes() == path.read_bytes()


def test_full_run_of_two_processes(place, finished):
    """The first prepares, evaluates, generates and reports; the others only train, and say nothing."""
    launch = ("workflows.launch", "--processes=2", "--devices_per_process=2", "--", *FULL)
    others = ("--workdir=two", "--data_dir=two_data", "--set=mesh.data=2", "--set=mesh.seq=2")
    done = run(*launch, *others, cwd=place)
    assert "report: two/report.html" in done.stdout and "Gloo" not in done.stdout and "[1]" not in done.stderr
    ours, theirs = (json.loads((p / "summary.json").read_text()) for p in (place / "two", finished))
    assert ours["test"]["samples"] == theirs["test"]["samples"]
    for figure in ("bits_per_sample", "markov_bits"):
        assert ours["test"][figure] == pytest.approx(theirs["test"][figure], rel=1e-4)


def test_train_evaluate_and_report(place, finished):
    done = run(
        "workflows.train", "--config=tiny.py", "--workdir=other", "--set=seed=1", "--init_from=runs/tiny", cwd=place
    )
    assert "trained to step 4" in done.stdout
    done = run("workflows.evaluate", "--workdir=other", "--split=validation", "--checkpoint=latest", cwd=place)
    figures = json.loads(done.stdout)
    assert figures["recordings"] == 2 and figures["step"] == 4
    assert json.loads((place / "other" / "evaluation.json").read_text())["validation"] == figures
    assert run("workflows.report", "--workdir=other", cwd=place).stdout.strip() == "other/report.html"


def test_generate_continues_a_prompt(place, finished):
    time_axis = np.arange(3_000) / 16_000
    audio.write_wav(place / "prompt.wav", 0.5 * np.sin(2 * np.pi * 440 * time_axis))
    prompt = ("--prompt=prompt.wav", "--prompt_seconds=0.05")
    generate = ("workflows.generate", "--workdir=runs/tiny", "--seed=3")
    done = run(*generate, *prompt, "--seconds=0.1", "--num_samples=2", "--top_p=0.9", "--temperature=0.9", cwd=place)
    assert len(done.stdout.splitlines()) == 2
    waveforms = [soundfile.read(place / f"runs/tiny/generated/continuation_000{i}.wav")[0] for i in range(2)]
    assert [len(w) for w in waveforms] == [1_600, 1_600]
    np.testing.assert_array_equal(waveforms[0][:800], waveforms[1][:800])
    assert (waveforms[0][800:] != waveforms[1][800:]).any()
    # The prompt comes back as the data set's encoding gives it: at its own full scale.
    assert np.abs(waveforms[0][:800]).max() == pytest.approx(1, abs=0.01)

    assert "seconds=0.1 counts prompt and continuation" in refused(
        *generate, "--prompt=prompt.wav", "--seconds=0.1", cwd=place
    )
    soundfile.write(place / "fast.wav", np.zeros(100), 44_100)
    assert "is at 44,100 Hz" in refused(*generate, "--prompt=fast.wav", cwd=place)
    assert "cannot read absent.wav" in refused(*generate, "--prompt=absent.wav", cwd=place)


def test_describe(tmp_path):
    described = json.loads(run("workflows.describe", "--config=sc09", "--format=json", cwd=tmp_path).stdout)
    assert described["parameters"]["total"] == 7_272_704 == sum(described["parameters"]["by_part"].values())
    text = run("workflows.describe", "--config=sc09", "--set=model.pool_groups=1", cwd=tmp_path).stdout
    assert "7,760,384" in text


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("workflows.train", "--config=absent"), ["unknown config 'absent'", "demo"]),
        (("workflows.train", "--stepz=3"), ["stepz"]),
        (("workflows.train", "--set=train.stepz=3"), ["train.stepz", "did you mean train.steps"]),
        (("workflows.train", "stray"), ["stray"]),
        (("workflows.train", "--config=sc09"), ["manifest.json is missing", "pipelines.prepare --dataset sc09"]),
        (("workflows.full_run", "--config=sc09", "--source=absent.zip"), ["absent.zip"]),
        (("workflows.evaluate", "--workdir=nowhere"), ["nowhere is not a run's folder"]),
        (("workflows.generate", "--workdir=nowhere"), ["nowhere is not a run's folder"]),
        (("workflows.generate", "--workdir=nowhere", "--top_p=high"), ["top_p"]),
        (("workflows.sound", "--workdir=nowhere"), ["nowhere is not a run's folder"]),
        (("workflows.sound", "--choose", "--temperature=0.9"), ["--choose tries", "leave out --temperature"]),
        (("workflows.sound", "--top_ps=0.9"), ["only --choose tries several settings", "leave out --top_ps"]),
        (("workflows.report", "--workdir=nowhere"), ["nowhere"]),
        (("workflows.describe", "--format=xml"), ["format"]),
    ],
)
def test_what_is_wrong_gets_one_line(args, words, tmp_path):
    line = refused(*args, cwd=tmp_path)
    for word in words:
        assert word in line
