"""Small archives and folders of recordings, and pipelines.prepare run on them: what several tests share."""

import io
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import soundfile

ROOT = Path(__file__).parent.parent
TWO_PROCESSES = ["--direct_running_mode=multi_processing", "--direct_num_workers=2"]


def wav(samples=800, rate=16_000, channels=1, seed=0):
    file = io.BytesIO()
    soundfile.write(file, np.random.default_rng(seed).normal(0, 0.1, (samples, channels)), rate, format="WAV")
    return file.getvalue()


def sc09(count=6):
    files = {f"sc09/{d}/{i}.wav": wav(700 + 10 * i, seed=i) for d in ("zero", "one") for i in range(count)}
    return files | {"sc09/validation_list.txt": b"zero/0.wav\n", "sc09/testing_list.txt": b"one/0.wav\none/1.wav\n"}


def beethoven(count=20):
    return {f"beethoven/{i}.wav": wav(seed=i) for i in range(count)}


def mine(count=12):
    return {f"{i % 3}/{i}.wav": wav(2_000, 8_000 * (1 + i % 3), 1 + i % 2, i) for i in range(count)}


def write_folder(folder, files):
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def write_zip(path, files):
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def read_folder(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def shards_of(folder):
    return {name: data for name, data in read_folder(folder).items() if name != "manifest.json"}


def run_main(capsys, main, *argv):
    """Runs a main in this process; returns (exit status, standard output, the one line of error)."""
    status = main([str(argument) for argument in argv])
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    if status:
        lines = err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: "), err
    return status, out, err


def refused_main(capsys, main, *argv):
    """Runs a main, expects exit status 2, and returns the line."""
    status, out, err = run_main(capsys, main, *argv)
    assert status == 2 and not out
    return err


def subprocess_of(*argv, env=None, **more):
    command = [sys.executable, "-m", "pipelines.prepare", *map(str, argv)]
    return subprocess.Popen(
        command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **more
    )
