"""The hub's archives: downloaded, gone on with, checked, cached, refused; from a hub of the tests' own on loopback."""

import contextlib
import hashlib
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hub_server import COMMIT, Fault, Hub, hub_environment, take_for_the_hub

from harmonic.errors import UserError
from pipelines.sources import hub as hubs
from pipelines.sources import remote
from pipelines.sources.remote import Transient

ROOT = Path(__file__).parent.parent
REPO = "krandiash/sc09"
DATA = random.Random(0).randbytes(5_000_000)


@pytest.fixture
def serve(monkeypatch, tmp_path):
    """(faults, ...) -> a hub that this process takes for the hub, with a cache of its own."""
    with contextlib.ExitStack() as stack:

        def serve(*faults, files=None, **options):
            hub = stack.enter_context(Hub({"sc09.zip": DATA} if files is None else files, faults=faults, **options))
            take_for_the_hub(monkeypatch, hub, tmp_path)
            return hub

        yield serve


def download(*names):
    return hubs.download(REPO, names or ("sc09.zip",))


def refusal(*names):
    with pytest.raises(UserError) as error:
        download(*names)
    assert "\n" not in str(error.value) and "hf_secret" not in str(error.value)
    return str(error.value)


def test_download_and_cache(serve, tmp_path):
    hub = serve()
    path = download("youtube_mix.zip", "sc09.zip")
    assert Path(path).read_bytes() == DATA and path.startswith(str(tmp_path))
    assert os.listdir(os.path.dirname(path)) == ["sc09.zip"]
    assert hub.sent() == len(DATA) + 1
    assert {request.authorization for request in hub.requests} == {"Bearer hf_secret"}
    assert hub.requests[-1].path == f"/datasets/{REPO}/resolve/{COMMIT}/sc09.zip"
    assert download() == path and hub.sent() == len(DATA) + 2  # looked at, not fetched


def test_the_token_stays_with_the_hub(serve):
    hub = serve(storage=100, token="hf_secret")
    assert Path(download()).read_bytes() == DATA
    assert {(r.path.split("/")[1], r.authorization) for r in hub.requests} == {
        ("datasets", "Bearer hf_secret"),
        ("storage", None),
    }


@pytest.mark.parametrize(
    "faults",
    [
        [Fault(after=1_500_000), Fault(after=0), Fault(after=2_000_000)],
        [Fault(after=1_500_000, reset=True), Fault(after=1_500_000, reset=True)],
        [Fault(status=503), Fault(status=429, headers={"Retry-After": "0"}), Fault(delay=0.1)],
    ],
    ids=["cut", "reset", "busy"],
)
def test_a_transfer_that_breaks_off_goes_on(serve, faults):
    hub = serve(None, *faults)
    assert Path(download()).read_bytes() == DATA
    assert not hub.faults and hub.sent() < (1.7 if faults[0].reset else 1.01) * len(DATA)


def test_a_transfer_that_was_given_up_goes_on_next_time(serve):
    hub = serve(None, Fault(after=3_000_000), *[Fault(after=0)] * 100)
    assert "sc09.zip: the connection broke off; try again later" in refusal()
    hub.faults.clear()
    before = hub.sent()
    assert Path(download()).read_bytes() == DATA
    assert before > 2_900_000 and hub.sent() - before < len(DATA) - 1_900_000  # what arrived, in whole mebibytes


def run_download(url, home, **more):
    code = (
        "from pipelines.sources.hub import download\nfrom harmonic.errors import UserError\n"
        f"try: print(download({REPO!r}, ('sc09.zip',)))\nexcept UserError as error: print('error:', error)"
    )
    env = hub_environment(url, home) | more
    return subprocess.Popen(
        [sys.executable, "-c", code], env=env, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_a_killed_download_goes_on(tmp_path):
    with Hub({"sc09.zip": DATA}, faults=[None, Fault(after=3_500_000, hang=True)]) as hub:
        process = run_download(hub.url, tmp_path)
        deadline = time.monotonic() + 60
        while not any(path.stat().st_size >= 3 << 20 for path in tmp_path.rglob("*.incomplete")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
        before = hub.sent()
        out, err = run_download(hub.url, tmp_path).communicate(timeout=60)
        assert not err and Path(out.strip()).read_bytes() == DATA
        assert hub.sent() - before < len(DATA) - (3 << 20) + 10
    # Nobody answers any more, or is to be asked: the cache does.
    for more in ({}, {"HF_HUB_OFFLINE": "1"}):
        assert run_download(hub.url, tmp_path, **more).communicate(timeout=60)[0] == out
    out, _ = run_download(hub.url, tmp_path / "empty", HF_HUB_OFFLINE="1").communicate(timeout=60)
    assert out.startswith(
        f"error: cannot download sc09.zip from {hub.url}/datasets/{REPO}: there is no connection to it"
    )
    assert "(HF_HUB_OFFLINE is set), and it is not in the cache" in out


def test_two_at_once_fetch_once(serve):
    hub = serve(None, None, Fault(delay=0.3))
    paths = []
    threads = [threading.Thread(target=lambda: paths.append(download())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(paths) == 2 and len(set(paths)) == 1 and Path(paths[0]).read_bytes() == DATA
    assert hub.sent() < 1.1 * len(DATA)
    assert os.listdir(os.path.dirname(paths[0])) == ["sc09.zip"]


def test_what_arrived_damaged_is_fetched_again(serve):
    wrong = bytearray(DATA)
    wrong[1_000_000] ^= 1
    hub = serve()
    hub.faults[:] = [None, Fault(data=bytes(wrong), etag=f'"{hashlib.sha256(DATA).hexdigest()}"')]
    assert re.search(r"sc09.zip arrived damaged \(SHA-256 [0-9a-f]{12}, not [0-9a-f]{12}\); run again", refusal())
    assert Path(download()).read_bytes() == DATA


def test_a_new_version_is_fetched(serve):
    hub = serve()
    first = download()
    hub.files["sc09.zip"] = DATA[::-1]
    second = download()
    assert Path(first).read_bytes() == DATA and Path(second).read_bytes() == DATA[::-1]
    hub.status = 503
    assert download() == second  # the newer one, and at once
    assert len([request for request in hub.requests if request.sent == 0]) == 1


def test_an_etag_is_no_path(serve, tmp_path):
    serve(etags={"sc09.zip": '"../../../../x"'})
    path = download()
    assert Path(path).read_bytes() == DATA and len(Path(path).parent.name) == 64
    assert Path(path).is_relative_to(tmp_path / "HF_ASSETS_CACHE/harmonic_rnn/krandiash--sc09")


def test_what_the_hub_s_own_tools_fetched_is_used(serve, tmp_path):
    hub = serve()
    theirs = tmp_path / "HF_HUB_CACHE/datasets--krandiash--sc09"
    for path, text in ((f"snapshots/{COMMIT}/sc09.zip", "theirs"), ("refs/main", COMMIT)):
        (theirs / path).parent.mkdir(parents=True)
        (theirs / path).write_text(text)
    assert download() == str(theirs / f"snapshots/{COMMIT}/sc09.zip")
    assert hub.sent() == 1
    hub.status = 500
    assert download() == str(theirs / f"snapshots/{COMMIT}/sc09.zip")


@pytest.mark.parametrize(("status", "code"), [(401, "GatedRepo"), (403, "GatedRepo"), (401, None), (403, None)])
def test_no_leave_to_read(serve, status, code):
    hub = serve(status=status, code=code)
    assert refusal() == (
        f"{hub.url}/datasets/krandiash/sc09 asks for permission to read: accept its terms there, then log in with "
        "`hf auth login` or set HF_TOKEN (on the machines of all workers), or give an archive that you have as --source"
    )


def test_a_token_that_the_hub_does_not_know(serve):
    serve(token="another")
    assert "does not know the token that it was given; log in again" in refusal()


def test_not_there(serve):
    hub = serve(files={})
    assert "datasets/krandiash/sc09 does not hold a.zip or b.zip (404); download it" in refusal("a.zip", "b.zip")
    assert len(hub.requests) == 2
    serve(status=404, code="RepoNotFound")
    assert "does not hold a.zip or b.zip (404)" in refusal("a.zip", "b.zip")


def test_no_answer(serve):
    hub = serve(status=503)
    assert "/datasets/krandiash/sc09: the server answers 503, and it is not in the cache; try again" in refusal()
    assert len(hub.requests) == remote.TRIES + 1
    hub.__exit__()
    assert "there is no connection (Connection refused), and it is not in the cache" in refusal()


def test_no_room(serve, monkeypatch, tmp_path):
    serve()
    monkeypatch.setattr(hubs.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    assert refusal() == f"no space left in {tmp_path}/HF_ASSETS_CACHE for sc09.zip; make room, or set HF_HOME"
    monkeypatch.undo()


def test_a_cache_that_cannot_be_written(serve, tmp_path):
    serve()
    (tmp_path / "HF_ASSETS_CACHE").write_text("a file")
    assert "cannot write sc09.zip to" in refusal() and "set HF_HOME" in refusal()


def test_a_worker_without_a_token(serve, monkeypatch):
    hub = serve(token="hf_secret")
    file = hubs.locate(REPO, ("sc09.zip",))
    assert file.url.endswith(f"/resolve/{COMMIT}/sc09.zip")
    file.close()
    monkeypatch.setenv("HF_TOKEN", "")
    with pytest.raises(UserError, match=r"set HF_TOKEN \(on the machines of all workers\)"):
        file.open().read(1)
    hub.status = 500
    with pytest.raises(Transient):
        hubs.locate(REPO, ("sc09.zip",), patient=False)
