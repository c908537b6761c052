"""`workflows.generate --stream`: audio on standard output while it is made."""

import os
import shutil
import subprocess
import sys

import jax
import pytest
import soundfile
from tiny import config

from harmonic.checkpoint import Checkpoints, model_description
from harmonic.models import make
from harmonic.step import init_state


@pytest.fixture(scope="module")
def workdir(tiny_data, tmp_path_factory):
    """A run's folder, of a model that has learnt nothing."""
    ours, folder = config(), tmp_path_factory.mktemp("run")
    (folder / "config.json").write_text(ours.to_json())
    shutil.copy(tiny_data / "manifest.json", folder)
    state = jax.jit(lambda: init_state(ours, make(ours.model)))()
    checkpoints = Checkpoints(folder)
    checkpoints.save(1, state._asdict(), {"model": model_description(ours)}, None)
    checkpoints.close()
    return folder


def generate(workdir, *flags, **kwargs):
    command = [sys.executable, "-m", "workflows.generate", f"--workdir={workdir}", *flags]
    return subprocess.Popen(command, stderr=subprocess.PIPE, **{"stdout": subprocess.PIPE, **kwargs})


def test_a_stream_has_the_bytes_of_the_file(workdir):
    """The prompt, and what follows it; nothing else on standard output, and no file."""
    prompt = workdir / "prompt.wav"
    soundfile.write(prompt, [0.5, -0.5, 0.1] * 500, 16_000)
    flags = ("--seed=3", "--seconds=0.5", f"--prompt={prompt}", "--temperature=0.9")
    processes = [generate(workdir, *flags, "--stream"), generate(workdir, *flags, "--num_samples=1")]
    (streamed, told), (names, errors) = (process.communicate(timeout=300) for process in processes)
    assert [process.returncode for process in processes] == [0, 0], (told, errors)
    file = workdir / "generated" / "continuation_0000.wav"
    assert names.decode().startswith(str(file)) and b"16000 Hz" in told and b"bits/sample" in told
    assert len(streamed) == 2 * 8_000
    assert streamed == soundfile.read(file, dtype="int16")[0].astype("<i2").tobytes()
    assert sorted(path.name for path in (workdir / "generated").iterdir()) == ["continuation_0000.wav"]


def test_audio_comes_while_generation_goes_on_and_a_closed_pipe_ends_it(workdir):
    """A day of audio: it is heard long before its end, and nobody has to wait for that."""
    with generate(workdir, "--stream", "--seconds=86400") as process:
        assert len(process.stdout.read(6_400)) == 6_400 and process.poll() is None
        process.stdout.close()
        errors = process.stderr.read().decode()
        assert process.wait(timeout=120) == 0
    assert "Error" not in errors and "error" not in errors, errors
    assert not (workdir / "generated" / "sample_0000.wav").exists()


def test_a_stream_is_one(workdir):
    with generate(workdir, "--stream", "--num_samples=2") as process:
        errors = process.stderr.read().decode()
    assert process.returncode == 2 and "one sample" in errors and len(errors.splitlines()) == 1


def test_raw_audio_is_not_written_to_a_terminal(workdir):
    ours, theirs = os.openpty()
    with generate(workdir, "--stream", stdout=theirs) as process:
        errors = process.stderr.read().decode()
    os.close(ours), os.close(theirs)
    assert process.returncode == 2 and "pipe it into a player" in errors
