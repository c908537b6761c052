"""One writer for a folder: what real processes make of it."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from archives import mine, write_folder
from prepared import subprocess_of

from harmonic import locks
from harmonic.errors import UserError

ROOT = Path(__file__).parents[1]
HOLD = """
import sys, time
from harmonic import locks
with locks.writing(*sys.argv[1:2], file=sys.argv[2] if len(sys.argv) > 2 else None):
    print("held", flush=True)
    time.sleep(1_000)
"""
COUNT = """
import sys
from harmonic import errors, locks
taken = 0
while taken < 60:
    try:
        with locks.writing(sys.argv[1] + "/run"):
            with open(sys.argv[1] + "/count", "r+") as file:  # lost updates would show two at once
                number = int(file.read())
                file.seek(0)
                file.write(f"{number + 1}")
                file.flush()
            taken += 1
    except errors.UserError as error:
        assert "is being written by another process" in str(error), error
"""


class Holder:
    """A process that holds a folder, until it is killed."""

    def __init__(self, *arguments):
        self.process = subprocess.Popen(
            [sys.executable, "-c", HOLD, *map(str, arguments)], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout.readline() == "held\n"

    def __enter__(self):
        return self.process

    def __exit__(self, *_):
        self.process.kill()
        self.process.communicate()


def test_the_second_is_told_who_the_first_is(tmp_path):
    with Holder(tmp_path / "run") as first:
        with pytest.raises(UserError) as caught, locks.writing(tmp_path / "run"):
            pytest.fail("held twice")
        line = str(caught.value)
        host = os.uname().nodename
        assert line.startswith(f"{tmp_path / 'run'} is being written by another process (pid {first.pid} on {host}, ")
        assert ", since 20" in line and "wait for it, or end it, or give another folder" in line and "\n" not in line
    # Killed: its file is still there, and holds nobody up.
    assert json.loads((tmp_path / "run" / ".lock").read_text())["pid"] == first.pid
    with locks.writing(tmp_path / "run"):
        assert json.loads((tmp_path / "run" / ".lock").read_text())["pid"] == os.getpid()
    assert not (tmp_path / "run" / ".lock").exists()


def test_a_process_may_hold_it_twice_and_leaves_nothing(tmp_path):
    with locks.writing(tmp_path / "a" / "run"):
        with locks.writing(tmp_path / "a" / ".." / "a" / "run"):
            pass
        assert (tmp_path / "a" / "run" / ".lock").exists()
    assert list((tmp_path / "a").iterdir()) == []
    with pytest.raises(ZeroDivisionError), locks.writing(tmp_path / "a"):
        raise ZeroDivisionError
    assert list((tmp_path / "a").iterdir()) == []


def test_never_two_at_once(tmp_path):
    """Four processes take and remove the same lock as fast as they can."""
    (tmp_path / "count").write_text("0")
    running = [subprocess.Popen([sys.executable, "-c", COUNT, str(tmp_path)], cwd=ROOT) for _ in range(4)]
    assert [process.wait(timeout=120) for process in running] == [0] * 4
    assert (tmp_path / "count").read_text() == "240"


def test_a_folder_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*/file/run: Not a directory; make it writable, or give anot"):
        with locks.writing(tmp_path / "file" / "run"):
            pytest.fail("impossible")


def test_two_prepare_one_data_set(tmp_path):
    """The first is refused while another writes, and goes on when that one is killed."""
    source = write_folder(tmp_path / "source", mine())
    argv = ("--dataset", "mine", "--source", source, "--output_dir", tmp_path / "data")
    with Holder(tmp_path / "data" / "mine", tmp_path / "data" / ".mine.lock") as other:
        process = subprocess_of(*argv)
        out, err = process.communicate(timeout=100)
        assert (process.returncode, out) == (2, "") and err.count("\n") == 1
        assert f"error: {tmp_path / 'data' / 'mine'} is being written by another process (pid {other.pid} " in err
    process = subprocess_of(*argv)
    assert process.wait(timeout=100) == 0
    process.communicate()
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == ["mine"]


@pytest.mark.slow
def test_two_train_one_workdir(tiny_data, tmp_path):
    """Real runs: while one trains, nothing else writes to its folder; once it is killed, the same command goes on."""
    from tiny import config

    path, run = tmp_path / "config.json", tmp_path / "run"
    path.write_text(config("train.steps=100000", "train.validate_every=0", "train.checkpoint_every=100").to_json())
    train = ("workflows.train", f"--config={path}", f"--workdir={run}", f"--data_dir={tiny_data.parent}")

    def start(*command):
        return subprocess.Popen(
            [sys.executable, "-m", *command], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    first = start(*train)
    try:
        while not list((run / "checkpoints").glob("[0-9]*/checksums.txt")):
            assert first.poll() is None, first.communicate()
        for command in (
            train,
            ("workflows.evaluate", f"--workdir={run}", f"--data_dir={tiny_data.parent}"),
            ("workflows.generate", f"--workdir={run}"),
            ("workflows.full_run", *train[1:]),
        ):
            second = start(*command)
            out, err = second.communicate(timeout=300)
            assert second.returncode == 2 and not out and "Traceback" not in err, err
            assert f"error: {run} is being written by another process (pid {first.pid} on " in err, err
        elsewhere = start(*("workflows.generate", f"--workdir={run}", f"--output_dir={tmp_path / 'heard'}"))
        assert elsewhere.wait(timeout=300) == 0, elsewhere.communicate()
        elsewhere.communicate()
    finally:
        first.send_signal(signal.SIGKILL)
        first.communicate()
    steps = max(int(p.parent.name) for p in (run / "checkpoints").glob("[0-9]*/checksums.txt"))
    again = start(*train, f"--set=train.steps={steps + 3}")
    out, err = again.communicate(timeout=300)
    assert again.returncode == 0 and f"trained to step {steps + 3:,}" in out, err
    assert not (run / ".lock").exists()
