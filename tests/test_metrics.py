"""What a run shows while it goes: TensorBoard's files read back, samples to be heard, Weights & Biases if asked for."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import soundfile
from mains import ended, pair, started, train_command
from PIL import Image
from tensorboardX.proto.event_pb2 import Event
from tiny import config, final_state

from harmonic import metrics, voice
from harmonic import train as training
from harmonic.errors import UserError
from harmonic.metrics import MetricsWriter, read_metrics

ROOT = Path(__file__).parent.parent


def events(workdir: Path) -> Iterator[Event]:
    """What TensorBoard would read: the files in their order, each a row of (length, checksum, event, checksum)."""
    for path in sorted((workdir / "tensorboard").glob("events*"), key=lambda path: path.stat().st_mtime_ns):
        data = path.read_bytes()
        while data:
            (size,) = struct.unpack_from("<Q", data)
            yield Event.FromString(data[12 : 12 + size])
            data = data[16 + size :]


def board(workdir: Path) -> dict[str, dict[int, Any]]:
    """Values by tag and step; a start that goes on from a step makes TensorBoard forget what is later."""
    found: dict[str, dict[int, Any]] = defaultdict(dict)
    for event in events(workdir):
        if event.session_log.status == event.session_log.START and event.step:
            for tag in found:
                found[tag] = {step: value for step, value in found[tag].items() if step < event.step}
        for value in event.summary.value:
            assert event.step not in found[value.tag], (value.tag, event.step)
            found[value.tag][event.step] = value
    return found


def test_tensorboard_shows_what_was_measured(tiny_data, tmp_path, reference_run):
    """Curves as in metrics.jsonl, samples to be heard and seen; and they change nothing in the weights."""
    workdir = tmp_path / "run"
    training.train(config("train.sample_every=2", "train.sample_seconds=0.05"), tiny_data, workdir)
    found = board(workdir)
    for line in read_metrics(workdir):
        for name in line.keys() - {"kind", "step"}:
            value = found[f"{line['kind']}/{name}"][line["step"]].simple_value
            assert value == pytest.approx(line[name], rel=1e-6), name
    curves = {f"train/{name}" for name in ("loss", "learning_rate", "grad_norm", "skipped", "samples_per_second")}
    samples = {f"samples/{i}{end}" for i in range(2) for end in ("", "/spectrogram")}
    assert found.keys() == curves | {"validation/bits_per_sample"} | samples
    for i in range(2):
        assert list(found[f"samples/{i}"]) == list(found[f"samples/{i}/spectrogram"]) == [2, 4, 6]
        heard = []
        for step in (2, 4, 6):
            sound, rate = soundfile.read(io.BytesIO(found[f"samples/{i}"][step].audio.encoded_audio_string))
            picture = Image.open(io.BytesIO(found[f"samples/{i}/spectrogram"][step].image.encoded_image_string))
            assert (len(sound), rate) == (800, 16_000) and picture.mode == "RGB" and picture.size[1] == 64
            heard.append(sound)
        assert 0.01 < np.abs(heard[0]).max() <= 1 and (heard[0] != heard[2]).any()
    assert not [tag for event in events(reference_run) for v in event.summary.value if (tag := v.tag).startswith("sam")]
    jax.tree.map(np.testing.assert_array_equal, final_state(workdir)[1], final_state(reference_run)[1])


def test_samples_keep_the_law_of_interruption(tiny_data, tmp_path, reference_run, monkeypatch):
    """Stopped while it generates, and gone on with: the same weights, and each sample once on the board."""
    workdir, generate = tmp_path / "run", voice.generate
    ours = config("train.sample_every=3", "train.sample_seconds=0.02")

    def stopped(*args, **settings):
        os.kill(os.getpid(), 15)
        return generate(*args, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(voice, "generate", stopped)
        with pytest.raises(training.Interrupted):
            training.train(ours, tiny_data, workdir)
    assert list(board(workdir)["samples/0"]) == [3]
    training.train(ours, tiny_data, workdir)
    assert list(board(workdir)["samples/0"]) == [3, 6]
    jax.tree.map(np.testing.assert_array_equal, final_state(workdir)[1], final_state(reference_run)[1])


@pytest.mark.slow
def test_samples_on_a_mesh(tiny_data, tmp_path):
    """They come from one device, wherever the weights lie: the same as on one."""
    heard = []
    for number, mesh in enumerate([(), ("mesh.data=2", "mesh.seq=2")]):
        workdir = tmp_path / str(number)
        ours = config("train.steps=1", "train.sample_every=1", "train.sample_seconds=0.02", *mesh)
        training.train(ours, tiny_data, workdir)
        heard.append(board(workdir)["samples/1"][1].audio.encoded_audio_string)
    sounds = [soundfile.read(io.BytesIO(sound))[0] for sound in heard]
    assert len(sounds[0]) == len(sounds[1]) == 320
    assert np.mean(sounds[0] == sounds[1]) > 0.8  # weights are equal to rounding


@pytest.mark.slow
def test_samples_over_processes(tiny_data, tmp_path):
    """One of two processes generates, however long that takes, and the other waits: they end at the same step."""
    path, workdir = tmp_path / "config.json", tmp_path / "run"
    samples = ("train.sample_every=2", "train.sample_seconds=3", "mesh.data=2", "mesh.seq=2")
    path.write_text(config("train.steps=4", "train.segment_length=48", *samples).to_json())
    with started(*pair(train_command(path, workdir, tiny_data)), devices=2) as running:
        for status, _, errors in ended(running):
            assert status == 0, errors
    assert list(board(workdir)["samples/0"]) == list(board(workdir)["samples/1"]) == [2, 4]
    assert [line["step"] for line in read_metrics(workdir) if line["kind"] == "train"] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("train.sample_every=-1", "train.sample_every=-1 is impossible: it must be at least 0"),
        ("train.sample_seconds=0", "train.sample_seconds=0.0 is impossible: it must be at least 0.01"),
        ("train.wandb_project=a/b", "train.wandb_project='a/b' is impossible: it must be a project's plain name"),
    ],
)
def test_impossible_settings(setting, message):
    with pytest.raises(UserError, match=message):
        config(setting)


def test_weights_and_biases_that_is_not_there(tiny_data, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"train.wandb_project=mine needs Weights & Biases .*pip install"):
        training.train(config("train.wandb_project=mine"), tiny_data, tmp_path / "run")


def test_weights_and_biases_offline(tiny_data, tmp_path):
    """In a process of its own, as it starts threads and a service: the run is written, and goes on as the same one."""
    pytest.importorskip("wandb", reason="Weights & Biases is not installed: pip install wandb")
    (tmp_path / "config.json").write_text(
        config("train.wandb_project=mine", "train.sample_every=2", "train.sample_seconds=0.05").to_json()
    )
    environment = {**os.environ, "WANDB_MODE": "offline", "HOME": str(tmp_path)}
    workdir, numbers = tmp_path / "run", set()
    command = [sys.executable, "-m", "workflows.train", f"--config={tmp_path / 'config.json'}", f"--workdir={workdir}"]
    command.append(f"--data_dir={tiny_data.parent}")
    for steps in (2, 3):
        done = subprocess.run(
            [*command, f"--set=train.steps={steps}"], cwd=ROOT, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(f"trained to step {steps}")
        numbers.add((workdir / "wandb_id").read_text().strip())
    (number,) = numbers
    files = sorted(workdir.glob(f"wandb/offline-run-*/run-{number}.wandb"))
    assert len(files) == 2
    for name in ("train/loss", "train/grad_norm", "validation/bits_per_sample", "samples/0", "samples/1/spectrogram"):
        assert name.encode() in files[0].read_bytes(), name
    media = [path.suffix for path in (workdir / "wandb").rglob("media/**/*") if path.is_file()]
    assert media.count(".wav") == media.count(".png") == 2 * 2  # two samples, at steps 2 and 3


def test_speed_counts_only_time_in_steps(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: clock[0])
    speed = metrics.Throughput()

    def steps(seconds, samples):
        clock[0] += seconds
        speed.add(samples)

    steps(2, 100)
    with speed.paused():
        clock[0] += 1_000  # validation
    steps(3, 150)
    assert speed.rate() == 50
    with pytest.raises(KeyboardInterrupt), speed.paused():
        clock[0] += 1_000
        raise KeyboardInterrupt
    steps(1, 70)
    assert speed.rate() == 70


def test_only_the_first_process_writes(tmp_path):
    writer = MetricsWriter(None)
    writer.write("train", 1, {"loss": 1.0})
    writer.write_sounds(1, np.zeros((1, 100), np.float32), 16_000)
    writer.close()
    assert not list(tmp_path.iterdir())


def test_lines_that_are_none_are_left_out(tmp_path):
    lines = [
        '{"step": 1}\n',
        f'{{"step": {10**400}}}\n',
        '{"step": "x"}\n',
        "[]\n",
        "\n",
        '{"step": 2}\n',
        '{"step": 3}',
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    assert read_metrics(tmp_path) == [{"step": 1}, {"step": 2}]
