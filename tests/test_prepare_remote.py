"""Whole data sets out of sources that lie elsewhere, on several runners: always the same shards, byte for byte."""

import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import archives
import fsspec
import pytest
from archives import parquet, tar_bytes, wav, zip_bytes
from hub_server import Fault, Hub, hub_environment, take_for_the_hub
from prepared import shards_of

from harmonic import records
from pipelines import build
from pipelines.build import PrepareSpec
from pipelines.sources import remote
from pipelines.sources.zip import Zip

ROOT = Path(__file__).parent.parent
LOOPBACK = ["--runner=PortableRunner", "--job_endpoint=embed", "--environment_type=LOOPBACK"]
TWO_PROCESSES = ["--direct_running_mode=multi_processing", "--direct_num_workers=2"]
FILES = {f"{i % 3}/{i}.wav": wav(2_000 + 10 * i, seed=i) for i in range(20)}


def spoken():
    """SC09's layout, with a large file that is no recording."""
    return archives.sc09(15) | {"sc09/speakers.bin": random.Random(0).randbytes(2_000_000)}


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(remote, "FIRST_SECONDS", 0.001)
    monkeypatch.setenv("NO_PROXY", "*")


def test_wherever_the_recordings_lie(quick, tmp_path):
    bucket = fsspec.filesystem("memory")
    for name, data in FILES.items():
        bucket.pipe(f"/bucket/in/{name}", data)
    served = {"a.zip": zip_bytes(FILES), "a.tar.xz": tar_bytes(FILES, "tar.xz")}
    (tmp_path / "a.tar").write_bytes(tar_bytes(FILES))
    (tmp_path / "a.zip").write_bytes(served["a.zip"])
    faults = [None] * 6 + [Fault(after=1_000), Fault(status=503), Fault(after=500, reset=True), Fault(status=429)]
    with Hub(served, faults=faults) as hub:
        outputs = []
        for i, source in enumerate(
            (
                *(str(tmp_path / "a.zip"), str(tmp_path / "a.tar"), "memory://bucket/in"),
                *(f"{hub.url}/plain/a.zip?signature=x", f"{hub.url}/plain/a.tar.xz"),
            )
        ):
            spec = PrepareSpec("mine", source, str(tmp_path / str(i)), num_shards=4)
            manifest = build.prepare(spec)
            assert manifest.source == source.split("?")[0]
            outputs.append((manifest.splits, shards_of(spec.folder)))
        assert not hub.faults
    bucket.store.clear()
    assert len(outputs[0][1]) > 6
    assert all(output == outputs[0] for output in outputs[1:])


@pytest.fixture
def as_hub(monkeypatch, tmp_path):
    """(hub) -> makes this process take it for the hub."""
    return lambda hub, folder=".": take_for_the_hub(monkeypatch, hub, tmp_path / folder)


def test_workers_read_the_hub_s_archive_where_it_lies(as_hub, tmp_path):
    packed = zip_bytes(spoken())
    with Hub({"sc09.zip": packed}, storage=10, token="hf_secret") as hub:
        as_hub(hub)
        local = build.prepare(PrepareSpec("sc09", output_dir=str(tmp_path / "local"), num_shards=4))
        assert len(packed) <= hub.sent() < 1.01 * len(packed)  # the local runner downloads
        as_hub(hub, "without a cache")
        before = hub.sent()
        hub.faults[:] = [None] * 8 + [
            Fault(after=300),
            Fault(status=503),
            Fault(status=429, headers={"Retry-After": "0"}),
        ]
        far = build.prepare(PrepareSpec("sc09", output_dir=str(tmp_path / "far"), num_shards=4), LOOPBACK)
        assert not hub.faults and hub.sent() - before < 200_000
    assert not list((tmp_path / "without a cache").rglob("*.zip*"))
    assert local == far and shards_of(tmp_path / "local/sc09") == shards_of(tmp_path / "far/sc09")


@pytest.fixture
def worker_pool():
    """(environment) -> Beam's options for workers that are processes of their own, started by a pool."""
    pools = []

    def start(env):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = [sys.executable, "-m", "apache_beam.runners.worker.worker_pool_main", f"--service_port={port}"]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        pools.append(subprocess.Popen(command, cwd=ROOT, env=env, start_new_session=True, **quiet))
        deadline = time.monotonic() + 60
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert pools[-1].poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        return [
            *("--runner=PortableRunner", "--job_endpoint=embed"),
            *("--environment_type=EXTERNAL", f"--environment_config=localhost:{port}"),
        ]

    yield start
    for pool in pools:
        os.killpg(pool.pid, signal.SIGTERM)
        pool.wait(30)


def run_prepare(hub, tmp_path, *argv):
    """Runs pipelines.prepare in a process for which `hub` is the hub."""
    env = hub_environment(hub.url, tmp_path / "home") | {"HF_TOKEN": "hf_secret"}
    command = [sys.executable, "-m", "pipelines.prepare", *map(str, argv)]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=200)


@pytest.mark.slow
def test_workers_that_are_other_processes_have_tokens_of_their_own(tmp_path, worker_pool):
    with Hub({"sc09.zip": zip_bytes(spoken())}, token="hf_secret") as hub:
        path = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"  # a worker is started as `python`
        env = hub_environment(hub.url, tmp_path / "workers") | {"PATH": path}
        argv = ["--dataset", "sc09", "--num_shards", 4, "--output_dir"]
        done = run_prepare(hub, tmp_path, *argv, tmp_path / "far", *worker_pool(env | {"HF_TOKEN": "hf_secret"}))
        assert done.returncode == 0, done.stderr
        assert hub.sent() < 300_000
        before = len(hub.requests)
        done = run_prepare(hub, tmp_path, *argv, tmp_path / "none", *worker_pool(env))
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert done.stderr.startswith(f"error: {hub.url}/datasets/krandiash/sc09 asks for permission to read")
        assert {request.authorization for request in hub.requests[before:]} == {"Bearer hf_secret", None}
        assert not (tmp_path / "none/sc09/manifest.json").exists()
    (tmp_path / "a.zip").write_bytes(zip_bytes(spoken()))
    spec = PrepareSpec("sc09", str(tmp_path / "a.zip"), str(tmp_path / "local"), num_shards=4)
    build.prepare(spec)
    assert shards_of(spec.folder) == shards_of(tmp_path / "far/sc09")


ROWS = {f"data/train-{i:05d}-of-00002.parquet": parquet(range(30 * i, 30 * i + 30), 5) for i in range(2)}
ROWS["data/test-00000-of-00001.parquet"] = parquet(range(60, 66), 5)


def test_rows_of_the_hub_on_two_runners(as_hub, tmp_path):
    with Hub(ROWS, token="hf_secret") as hub:
        as_hub(hub)
        specs = [PrepareSpec("mine", "hf:some/thing", str(tmp_path / name), num_shards=3) for name in ("one", "far")]
        manifest = build.prepare(specs[0])
        assert build.prepare(specs[1], LOOPBACK) == manifest
    assert shards_of(specs[0].folder) == shards_of(specs[1].folder)
    assert (manifest.source, manifest.splits["test"].recordings) == ("hf:some/thing", 6)
    assert len(manifest.splits["train"].shards) == 3
    assert sum(split.recordings for split in manifest.splits.values()) == 66
    labels = {}
    for split in manifest.splits.values():
        for shard in split.shards:
            labels |= {row.id: row.label for row in records.read_index(specs[0].folder, shard)}
    assert labels["data/train-00001-of-00002.parquet/1"] == "yes" and set(labels.values()) == {"no", "yes"}


@pytest.mark.parametrize("source", [["--source", "hf:some/thing"], ["--source=hf:some/thing", *TWO_PROCESSES]])
def test_rows_of_the_hub_by_the_command(as_hub, tmp_path, source):
    """The command leaves out of Beam what a local run does not use: not for `datasets`."""
    with Hub(ROWS, token="hf_secret") as hub:
        argv = ["--dataset", "mine", "--num_shards", 3, "--output_dir", tmp_path / "command", *source]
        done = run_prepare(hub, tmp_path, *argv)
        assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
        as_hub(hub)
        build.prepare(PrepareSpec("mine", "hf:some/thing", str(tmp_path / "library"), num_shards=3))
    assert shards_of(tmp_path / "command/mine") == shards_of(tmp_path / "library/mine")


def test_a_source_that_changes_meanwhile_stops_the_run(quick, tmp_path, monkeypatch):
    with Hub({"a.zip": zip_bytes(FILES)}) as hub:
        opened = Zip.open

        def swap(self, name):
            hub.files["a.zip"] = zip_bytes(FILES | {"0/0.wav": wav(100)})
            return opened(self, name)

        monkeypatch.setattr(Zip, "open", swap)
        with pytest.raises(build.UserError, match=r"a\.zip: it has changed since it was first looked at; run again"):
            build.prepare(PrepareSpec("mine", f"{hub.url}/plain/a.zip", str(tmp_path)))
    assert [path.name for path in (tmp_path / "mine").iterdir()] == []
