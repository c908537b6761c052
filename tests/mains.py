"""Mains, run as a user runs them: in this process, in one of their own, or in several that train together."""

import contextlib
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


# In this process.


def run_main(capsys, main, *argv):
    """Returns (exit status, standard output, the one line of error)."""
    status = main([str(argument) for argument in argv])
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    if status:
        lines = err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: "), err
    return status, out, err


def refused_main(capsys, main, *argv):
    """Expects exit status 2 and no output; returns the one line of error."""
    status, out, err = run_main(capsys, main, *argv)
    assert status == 2 and not out
    return err


# In a process of its own.


def run(*args, cwd, check=True):
    """Runs `python -m args` in a folder, to its end."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment)
    if check:
        assert done.returncode == 0, done.stderr
    return done


def refused(*args, cwd):
    """Expects exit status 2; returns the one line of error."""
    done = run(*args, cwd=cwd, check=False)
    assert done.returncode == 2, (done.returncode, done.stderr)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in done.stderr, done.stderr
    return errors[0]


# In several processes that train together, over loopback.


def free_address():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


@contextlib.contextmanager
def started(*commands, devices=4):
    """The running processes of some command lines; killed at the end."""
    flags = re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ["XLA_FLAGS"]).strip()
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_NUM_CPU_DEVICES": str(devices), "PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    running = [subprocess.Popen([sys.executable, *map(str, command)], env=environment, **pipes) for command in commands]
    try:
        yield running
    finally:
        for process in running:
            process.kill()
            process.communicate()


def ended(running):
    """(status, output, errors) of each, once all have ended."""
    outputs = [process.communicate(timeout=900) for process in running]
    return [(process.returncode, *output) for process, output in zip(running, outputs, strict=True)]


def train_command(path, workdir, data, *others):
    return ["-m", "workflows.train", f"--config={path}", f"--workdir={workdir}", f"--data_dir={data.parent}", *others]


def pair(command, *others):
    """A command as each of two processes, which may differ in their last flags."""
    address = free_address()
    for index, own in enumerate(others or ((), ())):
        yield [*command, f"--coordinator_address={address}", "--num_processes=2", f"--process_index={index}", *own]
