"""Disks that are full or read-only: small ones, really mounted, in a namespace of the test's own."""

import filecmp
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from archives import mine, write_folder
from tiny import config

from harmonic import files, records
from harmonic.checkpoint import Checkpoints
from harmonic.errors import UserError
from harmonic.metrics import read_metrics

ROOT = Path(__file__).parents[1]
# Fills the disk but for $LEFT KiB, runs the command, makes room, runs it again; keeps what stood there after each.
FULL = """
set -e
mount -t tmpfs -o size=12m tmpfs "$DISK"
cp -r "$BEFORE"/. "$DISK"
dd if=/dev/zero of="$DISK/filler" bs=4k 2> /dev/null || true
truncate -s -"${LEFT}K" "$DISK/filler"
status=0; "$@" > "$OUT/out1" 2> "$OUT/err1" || status=$?
echo $status > "$OUT/status1"
rm "$DISK/filler"
cp -r "$DISK" "$OUT/failed"
status=0; "$@" > "$OUT/out2" 2> "$OUT/err2" || status=$?
echo $status > "$OUT/status2"
cp -r "$DISK" "$OUT/ended"
"""
READ_ONLY = """
set -e
mount -t tmpfs -o size=12m tmpfs "$DISK"
cp -r "$BEFORE"/. "$DISK"
mount -o remount,ro "$DISK"
status=0; "$@" > "$OUT/out1" 2> "$OUT/err1" || status=$?
echo $status > "$OUT/status1"
"""
NAMESPACE = ["unshare", "--user", "--map-root-user", "--mount"]


def may_mount():
    """Whether an ordinary user, or whoever we are, may mount in a namespace of their own."""
    if not shutil.which("unshare"):
        return False
    return subprocess.run([*NAMESPACE, "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True).returncode == 0


mounting = pytest.mark.skipif(not may_mount(), reason="this system lets nobody but its owner mount a small disk")


class Disk:
    """A disk on which a command is run; what it said and what stood there."""

    def __init__(self, folder):
        self.disk, self.before, self.out = folder / "disk", folder / "before", folder / "out"
        for path in (self.disk, self.before, self.out):
            path.mkdir()

    def run(self, script, *command, left=0):
        names = {"DISK": self.disk, "BEFORE": self.before, "OUT": self.out, "LEFT": left, "PYTHONPATH": ROOT}
        environment = {**os.environ, **{name: str(value) for name, value in names.items()}}
        argv = [*NAMESPACE, "bash", "-c", script, "-", sys.executable, "-m", *map(str, command)]
        done = subprocess.run(argv, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr

    def refused(self, attempt=1):
        """The one line of an attempt that failed."""
        text = (self.out / f"err{attempt}").read_text()
        lines = [line for line in text.splitlines() if line.startswith("error: ")]
        assert (self.out / f"status{attempt}").read_text() == "2\n", text
        assert len(lines) == 1 and "Traceback" not in text and "Exception" not in text, text
        return lines[0]

    def went_on(self):
        assert (self.out / "status2").read_text() == "0\n", (self.out / "err2").read_text()
        return self.out / "ended"


@pytest.fixture
def disk(tmp_path):
    return Disk(tmp_path)


def same(one, other):
    """The same files with the same bytes."""
    compared = filecmp.dircmp(one, other)
    assert not compared.left_only and not compared.right_only and not compared.funny_files
    assert filecmp.cmpfiles(one, other, compared.common_files, shallow=False)[1:] == ([], [])


@mounting
@pytest.mark.parametrize("left", [0, 40, 140])
def test_prepare_on_a_full_disk(disk, tmp_path, left):
    source = write_folder(tmp_path / "source", mine())
    argv = ["pipelines.prepare", "--dataset=mine", f"--source={source}", "--num_shards=1"]
    disk.run(FULL, *argv, f"--output_dir={disk.disk}", left=left)
    line = disk.refused()
    assert f"{disk.disk}" in line and "no space is left" in line and "make room there" in line
    with pytest.raises(UserError, match="there is no data set in"):
        records.load_manifest(disk.out / "failed" / "mine")
    assert not list((disk.out / "failed").rglob("*_partial*"))
    ended = disk.went_on()
    subprocess.run([sys.executable, "-m", *argv, f"--output_dir={tmp_path / 'whole'}"], cwd=ROOT, check=True)
    same(ended / "mine", tmp_path / "whole" / "mine")
    assert sorted(path.name for path in ended.iterdir()) == ["mine"]


@pytest.fixture(scope="module")
def trained(tiny_data, tmp_path_factory):
    """A run by the command line: (its folder, the command without its workdir)."""
    place = tmp_path_factory.mktemp("trained")
    (place / "config.json").write_text(config().to_json())
    flags = [f"--config={place / 'config.json'}", f"--data_dir={tiny_data.parent}"]
    command = [sys.executable, "-m", "workflows.train", *flags, f"--workdir={place / 'run'}"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return place / "run", flags


def rows(workdir):
    return [{k: v for k, v in row.items() if k != "samples_per_second"} for row in read_metrics(workdir)]


@mounting
@pytest.mark.slow
@pytest.mark.parametrize("left", [0, 12, 20, 28, 200, 400, 800])
def test_training_on_a_full_disk(disk, trained, left):
    """Wherever the room ends: in config.json, in metrics.jsonl, in the first checkpoint, in a later one."""
    run, flags = trained
    disk.run(FULL, "workflows.train", *flags, f"--workdir={disk.disk / 'run'}", left=left)
    line = disk.refused()
    assert f"cannot write {disk.disk / 'run'}" in line and "no space is left; make room there" in line, line
    if (disk.out / "failed" / "run" / "checkpoints").exists():
        checkpoints = Checkpoints(disk.out / "failed" / "run", read_only=True)
        assert checkpoints.step("latest") in ((None,) if left < 400 else (None, 2, 4))
        checkpoints.close()
    ended = disk.went_on()
    assert rows(ended / "run") == rows(run)
    names = [sorted(p.name for p in (folder / "checkpoints").iterdir()) for folder in (ended / "run", run)]
    assert names[0] == names[1]
    assert not list(ended.rglob("*.partial")) and not list(ended.rglob("*tmp*"))


COMMANDS = {
    "evaluate": (["workflows.evaluate", "--split=train"], "evaluation.json", 0),
    "generate": (["workflows.generate", "--num_samples=2", "--seconds=1"], "generated", 16),
    "report": (["workflows.report"], "report.html", 0),
}


@mounting
@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_what_is_made_of_a_run_on_a_full_disk(disk, trained, tiny_data, name):
    command, made, left = COMMANDS[name]
    shutil.copytree(trained[0], disk.before / "run")
    flags = [f"--workdir={disk.disk / 'run'}", f"--data_dir={tiny_data.parent}"]
    disk.run(FULL, *command, *flags, left=left)
    line = disk.refused()
    assert f"cannot write {disk.disk / 'run'}" in line and "make room there" in line, line
    failed = disk.out / "failed" / "run"
    assert not (failed / made).is_file() and not list(failed.rglob("*.wav"))
    made = disk.went_on() / "run" / made
    assert made.is_file() or len(list(made.glob("*.wav"))) == 2
    assert not list(made.parent.rglob("*.partial"))


@mounting
@pytest.mark.slow
@pytest.mark.parametrize("name", ["train", *COMMANDS])
def test_a_read_only_run(disk, trained, tiny_data, name):
    shutil.copytree(trained[0], disk.before / "run")
    flags = [f"--workdir={disk.disk / 'run'}", f"--data_dir={tiny_data.parent}"]
    command = COMMANDS[name][0] if name in COMMANDS else ["workflows.train", "--set=train.steps=8", *trained[1]]
    disk.run(READ_ONLY, *command, *flags)
    line = disk.refused()
    assert f"cannot write {disk.disk / 'run'}" in line and "Read-only file system; make it writable" in line, line


@mounting
@pytest.mark.slow
def test_a_read_only_run_can_be_heard(disk, trained, tmp_path):
    shutil.copytree(trained[0], disk.before / "run")
    flags = [f"--workdir={disk.disk / 'run'}", f"--output_dir={tmp_path / 'heard'}", "--seconds=0.1"]
    disk.run(READ_ONLY, "workflows.generate", *flags)
    assert (disk.out / "status1").read_text() == "0\n", (disk.out / "err1").read_text()
    assert len(list((tmp_path / "heard").iterdir())) == 4


LIMITED = """
import resource, sys
from harmonic import errors, files
resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, 1_000))
try:
    files.write_whole(sys.argv[1], "x" * 5_000)
except errors.UserError as error:
    print(error)
"""


def test_a_file_that_may_not_become_that_large(tmp_path):
    """What was there stays, and nothing else does."""
    path = tmp_path / "folder" / "evaluation.json"
    files.write_whole(path, json.dumps({"before": 1}))
    done = subprocess.run([sys.executable, "-c", LIMITED, str(path)], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == (
        f"cannot write {path}: a file may not become that large; make room there, then the same command goes on\n"
    )
    assert json.loads(path.read_text()) == {"before": 1} and [p.name for p in path.parent.iterdir()] == [path.name]
