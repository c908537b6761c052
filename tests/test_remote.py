"""Files read by ranges, over HTTP on loopback from a server that goes wrong, and out of a bucket in memory."""

import contextlib
import io
import pickle
import random
import time

import fsspec
import pytest
from hub_server import Fault, Hub

from harmonic.errors import UserError
from pipelines.sources import cloud, remote
from pipelines.sources.cloud import CloudFile
from pipelines.sources.remote import HttpFile, Refused, Transient

DATA = random.Random(0).randbytes(1_000_000)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Waits of milliseconds, and no proxy."""
    monkeypatch.setattr(remote, "FIRST_SECONDS", 0.001)
    monkeypatch.setattr(remote, "LONGEST_SECONDS", 0.01)
    monkeypatch.setenv("NO_PROXY", "*")


@pytest.fixture
def serve():
    """(faults, ...) -> a server of DATA as /plain/x.zip, and its file, pinned."""
    with contextlib.ExitStack() as stack:

        def serve(*faults, path="plain/x.zip", **options):
            hub = stack.enter_context(Hub({"x.zip": DATA}, **options))
            file = HttpFile(f"{hub.url}/{path}")
            stack.callback(file.close)
            file.pin()
            hub.faults[:] = faults
            hub.requests.clear()
            return hub, file

        yield serve


def test_reads_and_seeks_like_a_file(serve):
    hub, file = serve()
    reader, plain = file.open(), io.BytesIO(DATA)
    numbers = random.Random(1)
    assert reader.readable() and reader.seekable() and not reader.writable()
    for _ in range(100):
        whence = numbers.choice([io.SEEK_SET, io.SEEK_END])
        offset = numbers.randrange(1_100_000) * (-1 if whence else 1)
        offset = max(offset, -len(DATA)) if whence else offset
        size = numbers.choice([0, 1, 100, 70_000, 10**9])
        assert reader.seek(offset, whence) == plain.seek(offset, whence)
        assert reader.read(size) == plain.read(size)
        assert reader.tell() == plain.tell()
    reader.seek(-5, io.SEEK_END)
    assert reader.read() == DATA[-5:] and reader.read() == b"" and reader.read(3) == b""
    with pytest.raises(ValueError, match="negative"):
        reader.seek(-1)
    assert all(request.authorization is None for request in hub.requests)


def test_what_is_expected_is_one_request(serve):
    hub, file = serve()
    with file.open() as reader:
        reader.seek(1000)
        reader.expect(500_000)
        assert b"".join(reader.read(10_000) for _ in range(49)) == DATA[1000:491_000]
        reader.seek(700_000)
        reader.read(10)
    assert [request.range for request in hub.requests] == ["bytes=1000-499999", "bytes=700000-765535"]


def test_a_pinned_file_travels_without_its_connections(serve):
    _, file = serve()
    file.open().read(10)
    twin = pickle.loads(pickle.dumps(file))
    assert (twin.size, twin.tag, twin._session) == (file.size, file.tag, None)
    assert twin.open().read() == DATA
    twin.close()


@pytest.mark.parametrize(
    "faults",
    [
        [Fault(after=0)],
        [Fault(after=100_000), Fault(after=1), Fault(after=300_000)],
        [Fault(after=200_000, reset=True)] * 3,
        [Fault(status=429, headers={"Retry-After": "0"})] * 3,
        [Fault(status=500), Fault(status=502), Fault(status=503), Fault(status=504), Fault(status=408)],
        [Fault(delay=0.2)],
        [Fault(after=10_000), Fault(status=503)] * 8,
    ],
    ids=["silence", "cut", "reset", "429", "5xx", "slow", "cut-and-503"],
)
def test_goes_on_where_the_last_byte_arrived(serve, faults):
    hub, file = serve(*faults)
    with file.open() as reader:
        reader.expect(len(DATA))
        assert reader.read() == DATA
    assert not hub.faults
    starts = [int(request.range[6:].split("-")[0]) for request in hub.requests]
    assert starts == sorted(starts)
    # A reset throws away what the client has not taken from its system yet.
    assert hub.sent() <= len(DATA) * (1.7 if faults[0].reset else 1)


def test_a_server_that_keeps_silent_is_left(serve, monkeypatch):
    monkeypatch.setattr(remote, "READ_SECONDS", 0.2)
    _, file = serve(Fault(delay=1), Fault(delay=1))
    assert file.open().read(100) == DATA[:100]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (Fault(after=0), "the connection broke off; try again later"),
        (Fault(status=429), "the server answers 429; try again later"),
        (Fault(status=503), "the server answers 503; try again later"),
    ],
)
def test_gives_up_in_the_end(serve, fault, message):
    hub, file = serve(*[fault] * 30)
    with pytest.raises(UserError) as error:
        file.open().read(10)
    assert str(error.value) == f"cannot read {hub.url}/plain/x.zip: {message}"
    assert len(hub.requests) == remote.TRIES + 1


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (Fault(status=401), r"it asks for credentials \(401\)"),
        (Fault(status=403), r"it gives no permission to read \(403\)"),
        (Fault(status=404), r"there is no such file \(404\)"),
        (Fault(status=410), r"the server will not give it \(410\)"),
        (Fault(whole=True), "does not serve parts of files; download it and give its path"),
        (Fault(shift=7), "sends another part than it was asked for"),
        (Fault(headers={"Content-Encoding": "gzip"}), "sends another part than it was asked for"),
        (Fault(etag='"other"'), "it has changed since it was first looked at; run again"),
        (Fault(data=DATA[:-1], etag="same"), "it has changed since"),
        (Fault(data=DATA[:10]), "it has changed since"),
        (Fault(data=DATA + b"more", whole=True), "it has changed since"),
    ],
)
def test_what_does_not_pass_is_told_at_once(serve, fault, message):
    hub, file = serve(None, fault)
    with file.open() as reader:
        reader.seek(100_000)
        assert reader.read(1000) == DATA[100_000:101_000]
        reader.seek(500_000)
        with pytest.raises(UserError, match=message):
            reader.read(1000)
    assert len(hub.requests) == 2


@pytest.mark.parametrize(
    ("fault", "status", "message"),
    [
        (Fault(status=404), 404, "there is no such file"),
        (Fault(whole=True), 200, "does not serve parts"),
        (Fault(data=b""), 416, "it is empty"),
    ],
)
def test_the_first_look(fault, status, message):
    with Hub({"x": DATA}, faults=[fault]) as hub, pytest.raises(Refused, match=message) as error:
        HttpFile(f"{hub.url}/plain/x").pin()
    assert error.value.status == status


def test_the_first_look_is_patient_with_a_busy_server_alone():
    with Hub({"x": DATA}, faults=[Fault(status=503)] * 5) as hub:
        HttpFile(f"{hub.url}/plain/x").pin()
        hub.faults[:] = [Fault(status=503)]
        with pytest.raises(Transient):
            HttpFile(f"{hub.url}/plain/x").pin(patient=False)
    with pytest.raises(Transient, match=r"there is no connection \(Connection refused\)"):
        HttpFile(f"{hub.url}/plain/x").pin()


@pytest.mark.parametrize(
    ("value", "seconds"),
    [("7", 7), ("Wed, 21 Oct 2015 07:28:00 GMT", 0.001), ("soon", 0.001), ("100000", 300), ("", 0.001)],
)
def test_waits_as_long_as_the_server_asks(monkeypatch, value, seconds):
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    remote.Patience().wait(Transient("busy", 429, {"Retry-After": value}))
    assert waits == [pytest.approx(seconds, rel=0.3)]


def test_from_storage_behind_a_redirection(serve):
    hub, file = serve(path="datasets/a/b/resolve/main/x.zip", storage=20)
    assert file.tag != '"of the storage"'
    twin = pickle.loads(pickle.dumps(file))
    with file.open() as reader:
        for start in range(0, 900_000, 90_000):
            reader.seek(start)
            assert reader.read(100) == DATA[start : start + 100]
    # Asked once at the hub, then at the storage.
    assert [request.path.split("/")[1] for request in hub.requests] == ["datasets"] + ["storage"] * 10
    assert twin.open().read(5) == DATA[:5]
    twin.close()


def test_leave_that_expires_is_asked_for_again(serve):
    hub, file = serve(path="datasets/a/b/resolve/main/x.zip", storage=3)
    with file.open() as reader:
        for start in range(0, 900_000, 90_000):
            reader.seek(start)
            assert reader.read(100) == DATA[start : start + 100]
    assert 1 < sum(request.path.startswith("/datasets") for request in hub.requests) < 6


def test_storage_that_changes_is_noticed(serve):
    _, file = serve(
        None, Fault(etag='"x"', headers={"ETag": '"x"'}), path="datasets/a/b/resolve/main/x.zip", storage=20
    )
    with file.open() as reader:
        reader.read(10)
        reader.seek(500_000)
        with pytest.raises(UserError, match="it has changed"):
            reader.read(10)


def test_nothing_secret_is_shown(serve):
    assert remote.shown("https://me:word@host:1/a/b.zip?X-Signature=secret#x") == "https://host:1/a/b.zip"
    assert remote.shown("gs://bucket/a b.zip") == "gs://bucket/a b.zip"
    assert remote.shown("/a?b") == "/a?b" and remote.shown("hub") == "hub"
    hub, _ = serve()
    url = f"{hub.url.replace('//', '//me:word@')}/plain/x.zip?X-Signature=secret"
    file = HttpFile(url)
    file.pin()
    assert hub.requests[-1].path.endswith("?X-Signature=secret") and hub.requests[-1].authorization.startswith("Basic")
    hub.server.shutdown()
    hub.server.server_close()
    file.close()
    with pytest.raises(UserError) as error:
        file.open().read(10)
    assert "secret" not in str(error.value) and "word" not in str(error.value)


# Buckets.


@pytest.fixture
def bucket():
    """A bucket in memory, empty again at the end."""
    files = fsspec.filesystem("memory")
    files.pipe("/bucket/x.zip", DATA)
    yield files
    files.store.clear()
    files.pseudo_dirs[:] = [""]


def test_an_object_is_read_in_pieces(bucket, monkeypatch):
    monkeypatch.setattr(cloud, "_CLOUD_BYTES", 300_000)
    file = CloudFile("memory://bucket/x.zip")
    file.pin()
    with pickle.loads(pickle.dumps(file)).open() as reader:
        reader.expect(len(DATA))
        assert reader.read() == DATA
        reader.seek(-10, io.SEEK_END)
        assert reader.read() == DATA[-10:]


def test_an_object_that_changed_or_went(bucket):
    file = CloudFile("memory://bucket/x.zip")
    file.pin()
    bucket.pipe("/bucket/x.zip", DATA[::-1])
    with pytest.raises(UserError, match=r"cannot read memory://bucket/x\.zip: it has changed"):
        pickle.loads(pickle.dumps(file)).open().read(1)
    bucket.rm("/bucket/x.zip")
    with pytest.raises(UserError, match="there is no such file"):
        pickle.loads(pickle.dumps(file)).open().read(1)
    with pytest.raises(Refused, match="there is no such file"):
        CloudFile("memory://bucket/x.zip").pin()


def test_a_bucket_that_fails_for_a_while(bucket, monkeypatch):
    file = CloudFile("memory://bucket/x.zip")
    file.pin()
    kind, answers = type(bucket), [OSError("reset"), TimeoutError(), b"short"]
    real = kind.cat_file

    def cat_file(self, *args, **kwargs):
        if not answers:
            return real(self, *args, **kwargs)
        answer = answers.pop(0)
        if isinstance(answer, bytes):
            return real(self, *args, **kwargs)[: len(answer)]
        raise answer

    monkeypatch.setattr(kind, "cat_file", cat_file)
    assert file.open().read(1000) == DATA[:1000]
    answers += [PermissionError("no")]
    with pytest.raises(UserError, match="there is no permission to read it; log in"):
        file.open().read(1000)


def test_schemes_that_nobody_knows():
    with pytest.raises(UserError, match="nowhere://x/y is of no known file system; give gs://"):
        cloud.file_system("nowhere://x/y?secret")
