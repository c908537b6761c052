"""Memorised or composed: copies are found where they are, and nothing else is taken for one."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

from harmonic import audio, nearest
from harmonic.data import Dataset
from harmonic.errors import UserError
from harmonic.nearest import compare_run, find_nearest
from harmonic.spectrogram import log_mel
from pipelines.build import PrepareSpec, prepare

RATE = 16_000
ROOT = Path(__file__).parent.parent


def melody(seconds: float, seed: int) -> np.ndarray:
    """Notes of random pitch, length and loudness, with overtones, over a little noise."""
    numbers, parts = np.random.default_rng(seed), []
    while sum(map(len, parts)) < seconds * RATE:
        time = np.arange(int(numbers.uniform(0.08, 0.3) * RATE)) / RATE
        pitch = numbers.uniform(100, 1_200)
        tone = sum(np.sin(2 * np.pi * pitch * k * time) / k ** numbers.uniform(0.5, 2) for k in range(1, 6))
        parts.append(numbers.uniform(0.2, 0.6) * np.exp(-numbers.uniform(2, 12) * time) * tone / 3)
    wave = np.concatenate(parts)[: round(seconds * RATE)]
    return (wave + 0.002 * numbers.standard_normal(len(wave))).astype(np.float32)


@pytest.fixture(scope="module")
def melodies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of 40 melodies, one of them of ten seconds, two too short for an excerpt."""
    folder = tmp_path_factory.mktemp("melodies")
    (folder / "in").mkdir()
    for i in range(40):
        seconds = {0: 10.0, 1: 0.2, 2: 0.03}.get(i, 1.0 + 0.02 * i)
        soundfile.write(folder / "in" / f"{i:02d}.wav", melody(seconds, i), RATE, subtype="PCM_16")
    (folder / "val").write_text("".join(f"{i:02d}.wav\n" for i in range(30, 35)))
    (folder / "test").write_text("".join(f"{i:02d}.wav\n" for i in range(35, 40)))
    lists = {"validation_list": str(folder / "val"), "test_list": str(folder / "test")}
    prepare(PrepareSpec(dataset="melodies", source=str(folder / "in"), output_dir=str(folder / "data"), **lists))
    return folder / "data" / "melodies"


def make_run(folder: Path, data: Path, clips: dict[str, np.ndarray], **rows: object) -> Path:
    (folder / "samples").mkdir(parents=True)
    shutil.copy(data / "manifest.json", folder)
    entries = []
    for name, waveform in clips.items():
        audio.write_wav(folder / "samples" / name, waveform, RATE)
        entries.append({"kind": "sample", "file": name, "prompt_seconds": 0.0, **rows})
    described = {"step": 7, "checkpoint": "best", "weights": "ema", "samples": entries}
    (folder / "samples" / "samples.json").write_text(json.dumps(described))
    return folder


def stored(data: Path, name: str) -> np.ndarray:
    """A training recording, as the data set gives it back."""
    train = Dataset(data).split("train")
    index = next(i for i, recording in enumerate(train.recordings) if recording.id == name)
    return audio.decode(train.read(index)[:, 0], "mu_law")


def again(waveform: np.ndarray) -> np.ndarray:
    """Quantised once more, on another scale."""
    return audio.decode(audio.encode(waveform, "mu_law", low=-1, high=1), "mu_law")


def test_equal_to_brute_force(melodies: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every window of every clip against every window of every recording, also where blocks and rows are cut."""
    train = Dataset(melodies).split("train")
    recordings = [log_mel(audio.decode(train.read(i)[:, 0], "mu_law"), RATE) for i in range(len(train.lengths))]
    length = 20
    clips = [log_mel(melody(seconds, 100 + i), RATE) for i, seconds in enumerate((0.3, 0.6, 1.1))]
    clips[0] = clips[0][:length]  # an excerpt and a whole at once

    def windows(size: int) -> tuple[np.ndarray, list[tuple[int, int]]]:
        places = [(i, frame) for i, r in enumerate(recordings) for frame in range(len(r) - size + 1)]
        cut = np.stack([recordings[i][frame : frame + size].ravel() for i, frame in places])
        return cut - cut.mean(1, keepdims=True), places

    monkeypatch.setattr(nearest, "_BLOCK", 300)
    monkeypatch.setattr(nearest, "_ROWS", 7)
    excerpts = windows(length)
    for clip, found in zip(clips, find_nearest(clips, train, length), strict=True):
        assert len(found.distance) == len(clip) - length + 2
        whole = (-1, clip, windows(len(clip)))
        for at, ours, (theirs, places) in [
            whole,
            *((i, clip[i : i + length], excerpts) for i in range(0, len(clip) - length + 1, 3)),
        ]:
            distances = np.sqrt(((theirs - (ours - ours.mean()).ravel()) ** 2).mean(1))
            best = int(distances.argmin())
            np.testing.assert_allclose(found.distance[at], distances[best], atol=1e-3)
            assert (found.recording[at], found.frame[at]) == places[best]


def test_a_memorised_second_is_found_at_its_place(melodies: Path, tmp_path: Path) -> None:
    """Softer, quantised again, at an odd offset of both the recording and a longer clip, which else is new."""
    source, start, at = stored(melodies, "00.wav"), 123_457, 13_331
    clip = 0.6 * melody(3.0, 1_000)
    clip[at : at + RATE] = 0.3 * source[start : start + RATE]
    run = make_run(tmp_path / "run", melodies, {"new.wav": melody(2.0, 1_001), "copied.wav": again(clip)})
    found = compare_run(run, melodies, seconds=0.9)
    copied, new = found["generated"]
    assert (copied["clip"], new["clip"]) == ("copied.wav", "new.wav")
    assert copied["nearest"]["recording"] == "00.wav"
    offset = copied["nearest"]["recording_start"] - copied["start"]
    assert offset == pytest.approx((start - at) / RATE, abs=0.0051)
    assert at / RATE - 0.01 <= copied["start"] <= at / RATE + 0.11
    held_out = found["groups"]["held_out"]["quantiles"]
    assert copied["nearest"]["distance"] < 0.5 * held_out["0"]
    assert copied["nearest"]["distance"] <= 1.2 * found["as_near_as_a_copy"] < held_out["0"]
    assert new["nearest"]["distance"] > found["as_near_as_a_copy"]
    assert new["nearest"]["distance"] > 0.7 * held_out["0.5"]
    assert 0 < found["groups"]["generated"]["as_near_as_a_copy"] < 0.5
    assert found["groups"]["held_out"]["as_near_as_a_copy"] == 0
    assert copied["whole"]["distance"] > 2 * copied["nearest"]["distance"]
    # What is heard is what was compared.
    ours, theirs = (soundfile.read(run / "nearest" / copied[name])[0] for name in ("file", "nearest_file"))
    assert len(ours) == len(theirs) == round(0.9 * RATE)
    assert max(abs(np.correlate(ours, theirs, "full"))) > 0.95 * np.linalg.norm(ours) * np.linalg.norm(theirs)
    assert json.loads((run / "nearest.json").read_text()) == found


def test_a_whole_clip_and_a_continuation(melodies: Path, tmp_path: Path) -> None:
    """A clip that is a training recording; and one whose prompt is a copy, which does not count."""
    source = stored(melodies, "20.wav")
    run = make_run(tmp_path / "whole", melodies, {"a.wav": again(0.5 * source[2_043:])})
    (row,) = compare_run(run, melodies, seconds=0.5)["generated"]
    assert row["whole"]["recording"] == "20.wav"
    assert row["whole"]["recording_start"] == pytest.approx(2_043 / RATE, abs=0.0051)
    assert row["whole"]["distance"] < 2
    clip = np.concatenate([source[:RATE], melody(1.0, 1_002)])
    run = make_run(tmp_path / "prompt", melodies, {"a.wav": clip}, kind="continuation", prompt_seconds=1.0)
    found = compare_run(run, melodies, seconds=0.5)
    (row,) = found["generated"]
    assert row["start"] >= 1.0 and row["seconds"] == 1.0
    assert row["nearest"]["distance"] > found["as_near_as_a_copy"]


def test_noise_is_not_taken_for_a_copy(melodies: Path, tmp_path: Path) -> None:
    noise = 0.2 * np.random.default_rng(0).standard_normal(2 * RATE)
    found = compare_run(make_run(tmp_path / "run", melodies, {"a.wav": noise}), melodies)
    assert found["seconds"] == 1.0
    assert found["training"] == {
        "recordings": 30,
        "compared": 28,
        "seconds": pytest.approx(10 + sum(1 + 0.02 * i for i in range(3, 30))),
    }
    assert found["groups"]["generated"]["as_near_as_a_copy"] == 0
    assert found["groups"]["generated"]["quantiles"]["0"] > 3 * found["as_near_as_a_copy"]
    assert found["groups"]["held_out"]["quantiles"]["0"] > 3 * found["as_near_as_a_copy"]


def test_silence_is_not_compared(melodies: Path, tmp_path: Path) -> None:
    silent, constant = np.zeros(RATE), np.full(RATE, 0.5)
    half = np.concatenate([np.zeros(RATE), melody(1.0, 1_003)])
    run = make_run(tmp_path / "half", melodies, {"a.wav": silent, "b.wav": half, "c.wav": constant})
    found = compare_run(run, melodies, seconds=0.3)
    rows = {row["clip"]: row for row in found["generated"]}
    assert rows["a.wav"]["nearest"] is None and rows["c.wav"]["nearest"] is None
    assert rows["b.wav"]["start"] > 0.6
    assert found["groups"]["generated"]["silent"] > 140
    run = make_run(tmp_path / "all", melodies, {"a.wav": silent, "c.wav": constant})
    with pytest.raises(UserError, match=r"every generated clip of .* is silent"):
        compare_run(run, melodies)
    assert not (run / "nearest.json").exists()


def test_what_cannot_be_compared_is_said(melodies: Path, tmp_path: Path, make_dataset: Callable[..., Path]) -> None:
    run = make_run(tmp_path / "run", melodies, {"a.wav": melody(1.5, 1_004)})
    for seconds, message in (
        (1.6, r"no generated clip has 1.6 s; the longest has 1.50"),
        (0.05, r"--seconds=0.05 is impossible: it must be at least 0.1"),
        (float("nan"), "--seconds=nan is impossible"),
    ):
        with pytest.raises(UserError, match=message):
            compare_run(run, melodies, seconds=seconds)
    long = make_run(tmp_path / "long", melodies, {"a.wav": melody(13, 1_005)})
    with pytest.raises(UserError, match=r"no training recording has 11 s; the longest has 10.00, nine tenths have 1"):
        compare_run(long, melodies, seconds=11)
    other = make_dataset(tmp_path, "other", [RATE] * 10)
    with pytest.raises(UserError, match="was trained on other data than"):
        compare_run(run, other)
    samples = run / "samples" / "samples.json"
    text = samples.read_text()
    for wrong, message in (
        (text.replace("a.wav", "../a.wav"), "which is not in that folder"),
        (text.replace("a.wav", "b.wav"), r"cannot read .*b\.wav as audio"),
        (text.replace('"sample"', '"real"'), "has no generated clip; generate some"),
        ("[]", "samples.json cannot be read"),
    ):
        samples.write_text(wrong)
        with pytest.raises(UserError, match=message):
            compare_run(run, melodies)
    samples.write_text(text)
    soundfile.write(run / "samples" / "a.wav", np.full(RATE, np.nan), RATE, subtype="FLOAT")
    with pytest.raises(UserError, match=r"a\.wav holds samples that are not finite"):
        compare_run(run, melodies)
    soundfile.write(run / "samples" / "a.wav", np.zeros(RATE), 8_000)
    with pytest.raises(UserError, match=r"a\.wav is at 8,000 Hz, but the run's audio is at 16,000"):
        compare_run(run, melodies)
    shutil.rmtree(run / "samples")
    with pytest.raises(UserError, match="has no samples; generate some"):
        compare_run(run, melodies)


def test_the_result_is_whole_or_absent(melodies: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "run", melodies, {"a.wav": melody(1.0, 1_006)})
    before = compare_run(run, melodies, seconds=0.5)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:  # while it looks: what was there stays
        patch.setattr(nearest, "_compare", interrupted)
        with pytest.raises(KeyboardInterrupt):
            compare_run(run, melodies, seconds=0.3)
    assert json.loads((run / "nearest.json").read_text()) == before
    with monkeypatch.context() as patch:  # while it writes: nothing is left that looks whole
        patch.setattr(nearest, "_row", interrupted)
        with pytest.raises(KeyboardInterrupt):
            compare_run(run, melodies, seconds=0.3)
    assert not (run / "nearest.json").exists()
    assert compare_run(run, melodies, seconds=0.5) == before


@pytest.mark.slow
def test_the_command(melodies: Path, tmp_path: Path) -> None:
    """As a process: the table, the progress, the report."""
    run = make_run(tmp_path / "run", melodies, {"a.wav": melody(1.0, 1_007)})
    (run / "config.json").write_text("{}")
    (run / "metrics.jsonl").write_text("")
    command = [sys.executable, "-m", "workflows.nearest", f"--workdir={run}", f"--data_dir={melodies.parent}"]
    done = subprocess.run([*command, "--seconds=0.4"], cwd=ROOT, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert "nearest of 28 training recordings" in lines[0]
    assert [line.split()[:2] for line in lines[2:5]] == [["generated", "1"], ["held-out", "10"], ["copies", "28"]]
    assert "compare: recording 30/30" in done.stderr
    assert "Memorised or composed?" in (run / "report.html").read_text()
