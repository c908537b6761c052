"""Decompression bombs, each read in a process whose memory and files are limited: none is followed."""

import gzip
import io
import json
import os
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import soundfile
from archives import mine, wav
from mains import ROOT

_CHILD = """
import json, resource, sys
from harmonic.errors import Unreadable, UserError
from pipelines.audio.waveform import measure
from pipelines.sources import open_source
from pipelines.sources.layouts import data_set
with open("/proc/self/status") as file:
    size = next(int(line.split()[1]) for line in file if line.startswith("VmSize"))
resource.setrlimit(resource.RLIMIT_AS, (1024 * size + (150 << 20),) * 2)
resource.setrlimit(resource.RLIMIT_FSIZE, (700 << 20,) * 2)
reasons = {}
try:
    source = open_source(data_set("mine"), sys.argv[1])
    for recording in source.list():
        try:
            with source.open(recording.id) as file, measure(file):
                pass
        except Unreadable as error:
            reasons[recording.id] = str(error)
except UserError as error:
    reasons = str(error)
print(json.dumps(reasons))
"""
_BOMB_BYTES = 600 << 20


def zeros(member, size=_BOMB_BYTES):
    member.write(wav(4))
    for _ in range(size >> 20):
        member.write(bytes(1 << 20))


def flac_of_silence():
    file = io.BytesIO()
    with soundfile.SoundFile(file, "w", 16_000, 1, format="FLAC", subtype="PCM_16") as sound:
        for _ in range(3 * 60):
            sound.write(np.zeros(960_000, np.int16))
    return file.getvalue()


def bomb(path, kind):
    recordings = {f"tape/{name}": sound for name, sound in mine(4).items()}
    if kind == "tar.gz":
        with gzip.open(path, "wb", 1) as file:
            zeros(file)
        return path
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, sound in recordings.items():
            archive.writestr(name, sound)
        if kind == "zip":
            with archive.open("tape/bomb.wav", "w") as member:
                zeros(member)
        elif kind == "nested":  # 600 MB in a zip in this zip, by the names of a zip and of a recording
            with zipfile.ZipFile(inner := io.BytesIO(), "w", zipfile.ZIP_DEFLATED, compresslevel=1) as within:
                with within.open("x.wav", "w") as member:
                    zeros(member)
            archive.writestr("tape/bomb.zip", inner.getvalue())
            archive.writestr("tape/bomb.wav", inner.getvalue())
        else:
            archive.writestr("tape/bomb.flac", flac_of_silence())
    return path


SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("flac", "tar.gz")]


@pytest.mark.parametrize("kind", ["zip", "nested", *SLOW])
def test_a_bomb_is_not_followed(tmp_path, kind):
    source = bomb(tmp_path / f"a.{kind}", kind)
    environment = os.environ | {"TMPDIR": str(tmp_path), "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-c", _CHILD, str(source)]
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    reasons = json.loads(ended.stdout)
    if kind == "tar.gz":
        assert "that is a decompression bomb" in reasons and "\n" not in reasons
        return
    assert isinstance(reasons, dict), reasons
    ((name, reason),) = reasons.items()
    assert name == ("tape/bomb.flac" if kind == "flac" else "tape/bomb.wav")
    assert ("is not audio that can be read" if kind == "nested" else "that is a decompression bomb") in reason
