"""Runs a main as several CPU processes on this machine, connected over loopback.

    python -m workflows.launch --processes=2 --devices_per_process=4 -- \
      workflows.train --config=demo --set=mesh.data=2 --set=mesh.seq=4

Process 0 writes to this terminal; lines of the others are marked with their index.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

from absl import app, flags

_PROCESSES = flags.DEFINE_integer("processes", 2, "how many", lower_bound=1)
_DEVICES = flags.DEFINE_integer("devices_per_process", 1, "CPU devices of each", lower_bound=1)

_GRACE = 10.0  # seconds for the others to end by themselves when one has failed, and again after they are told to end


def launch(command: list[str], processes: int, devices: int) -> int:
    """Runs `python -m <command>` in several processes, and waits for all of them.

    Args:
      command: a module and its flags.
      processes: their number.
      devices: CPU devices of each process.

    Returns:
      An exit status: 0, 128 + the number of the signal that this process got, or that of the first process to fail.
    """
    flag = re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ.get("XLA_FLAGS", ""))
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices), "XLA_FLAGS": flag.strip()}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    group = ["--coordinator_address", address, "--num_processes", str(processes), "--process_index"]
    children: list[subprocess.Popen] = []
    forwarded: list[int] = []

    def send(number: int) -> None:
        for child in children:
            if child.poll() is None:
                child.send_signal(number)

    def forward(number: int, _: object) -> None:
        forwarded.append(number)
        send(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, forward)  # the children start with the default, even if it was ignored here
    for index in range(processes):
        children.append(
            subprocess.Popen(
                [sys.executable, "-m", *command, *group, str(index)],
                env=environment,
                process_group=0,  # a terminal's Ctrl-C reaches only this process, which forwards it once
                stdout=subprocess.PIPE if index else None,
                stderr=subprocess.STDOUT if index else None,
            )
        )
    readers = [threading.Thread(target=_mark, args=(i, c), daemon=True) for i, c in enumerate(children) if i]
    for reader in readers:
        reader.start()

    failed: int | None = None
    deadline, last_resort = float("inf"), False
    while any(child.poll() is None for child in children):
        time.sleep(0.05)
        if failed is None:
            failed = next((i for i, child in enumerate(children) if child.poll()), None)
            deadline = time.monotonic() + _GRACE if failed is not None else deadline
        elif time.monotonic() > deadline:
            send(signal.SIGKILL if last_resort else signal.SIGTERM)
            deadline, last_resort = time.monotonic() + _GRACE, True
    for reader in readers:
        reader.join()
    failed = next((i for i, child in enumerate(children) if child.returncode), None) if failed is None else failed
    if failed is None:
        return 0
    status = children[failed].returncode
    if forwarded and status in (-forwarded[0], 128 + forwarded[0]):
        return 128 + forwarded[0]
    how = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
    print(f"error: process {failed} of {processes} {how}", file=sys.stderr)
    return 128 - status if status < 0 else status


def _mark(index: int, child: subprocess.Popen) -> None:
    assert child.stdout is not None
    for line in child.stdout:
        sys.stderr.write(f"[{index}] {line.decode(errors='replace')}")
        sys.stderr.flush()


def main() -> None:
    """Launches the command after `--`."""
    app.define_help_flags()
    try:
        _, *command = flags.FLAGS(sys.argv)
    except SystemExit:  # --help, which absl ends with status 1
        sys.exit(0)
    except flags.Error as error:
        sys.exit(_refuse(f"{str(error).strip().splitlines()[0]}; see --helpfull"))
    if not command or command[0].startswith("-"):
        sys.exit(_refuse("nothing to run; write: python -m workflows.launch --processes=2 -- workflows.train"))
    sys.exit(launch(command, _PROCESSES.value, _DEVICES.value))


def _refuse(why: str) -> int:
    print(f"error: {why}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
