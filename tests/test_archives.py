"""Archives and folders that lie elsewhere, and tars: what is read of them, what is not followed, what is refused."""

import io
import lzma
import os
import pickle
import subprocess
import sys
import tarfile
import zipfile
import zlib
from pathlib import Path

import fsspec
import numpy as np
import pytest
import soundfile
from archives import PACK, sc09, tar_bytes, wav, write_folder, write_zip, zip_bytes
from hub_server import Fault, Hub

from harmonic.errors import Unreadable, UserError
from harmonic.sound import bombs
from harmonic.sound.level import Extent
from pipelines import limits
from pipelines.audio.waveform import measure
from pipelines.sources import open_source, remote, tar
from pipelines.sources.layouts import data_set

ROOT = Path(__file__).parent.parent
FILES = {f"tape/{side}/{i}.wav": wav(3_000 + i, seed=i) for side in "ab" for i in range(10)}


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    monkeypatch.setattr(remote, "FIRST_SECONDS", 0.001)
    monkeypatch.setattr(remote, "LONGEST_SECONDS", 0.01)
    monkeypatch.setenv("NO_PROXY", "*")
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tar.tempfile, "tempdir", str(tmp_path / "tmp"))
    yield
    assert not list((tmp_path / "tmp").iterdir()), "left behind"


@pytest.fixture
def bucket():
    files = fsspec.filesystem("memory")
    yield files
    files.store.clear()
    files.pseudo_dirs[:] = [""]


def link(name, target, kind=tarfile.SYMTYPE):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def read_all(source):
    """Every recording's bytes, out of a source that has travelled."""
    recordings = source.list()
    twin = pickle.loads(pickle.dumps(source))
    try:
        found = {}
        for recording in recordings:
            with twin.open(recording.id) as file:
                found[recording.id] = file.read()
        return found
    finally:
        twin.close()


WANTED = FILES


def refusal(source, name="mine"):
    with pytest.raises(UserError) as error:
        open_source(data_set(name), str(source)).list()
    assert "\n" not in str(error.value)
    return str(error.value)


# Zip archives elsewhere.


def test_a_zip_behind_http_is_read_by_parts(tmp_path):
    path = write_zip(tmp_path / "a.zip", FILES | {"cover.jpg": os.urandom(1_000_000)}, zipfile.ZIP_STORED)
    local = open_source(data_set("mine"), str(path))
    with Hub({"a.zip": path.read_bytes()}) as hub:
        source = open_source(data_set("mine"), f"{hub.url}/plain/a.zip?secret")
        assert source.list() == local.list() and source.fingerprint() == local.fingerprint()
        hub.requests.clear()
        assert read_all(source) == WANTED
        source.close()
        # The directory in some few requests, and one for each member; of the whole, no more than the recordings.
        assert len(hub.gets()) <= len(WANTED) + 4
        assert hub.sent() < sum(map(len, WANTED.values())) * 1.2 + 100_000 < 500_000


def test_sc09_out_of_a_zip_in_a_bucket(tmp_path, bucket):
    files = sc09()
    bucket.pipe("/bucket/sc09.zip", zip_bytes(files, zipfile.ZIP_DEFLATED))
    source = open_source(data_set("sc09"), "memory://bucket/sc09.zip")
    assert read_all(source) == {k.removeprefix("sc09/"): v for k, v in files.items() if k.endswith(".wav")}
    assert {r.split for r in source.list()} == {"train", "validation", "test"}


@pytest.mark.parametrize(
    ("faults", "message"),
    [
        ([Fault(after=0)] * 30, "the connection broke off; try again later"),
        ([Fault(status=404)], "there is no such file"),
        ([None, Fault(etag='"new"')], "it has changed since it was first looked at; run again"),
    ],
    ids=["drops", "gone", "changed"],
)
def test_a_network_that_fails_is_no_damaged_recording(tmp_path, faults, message):
    files = {f"{i}.wav": wav(100_000, seed=i) for i in range(3)}
    with Hub({"a.zip": write_zip(tmp_path / "a.zip", files).read_bytes()}) as hub:
        source = open_source(data_set("mine"), f"{hub.url}/plain/a.zip")
        hub.faults[:] = faults
        with pytest.raises(UserError, match=message):
            for recording in source.list():
                for _ in range(2 if faults[0] is None else 1):
                    source.open(recording.id).close()
        source.close()


def test_a_member_behind_faults_is_whole(tmp_path):
    files = {f"{i}.wav": wav(500_000, seed=i) for i in range(3)}
    with Hub({"a.zip": write_zip(tmp_path / "a.zip", files).read_bytes()}) as hub:
        source = open_source(data_set("mine"), f"{hub.url}/plain/a.zip")
        hub.faults[:] = [Fault(after=300_000, reset=True), Fault(status=503), Fault(after=100_000), Fault(status=429)]
        with source.open("1.wav") as file, measure(file) as waveform:
            assert waveform.length == 500_000
        assert not hub.faults
        source.close()


def test_bad_places(tmp_path, bucket):
    with Hub({"a.zip": b"no archive" * 100, "b.zip": b""}) as hub:
        assert "a.zip cannot be opened as a zip archive (File is not a zip file)" in refusal(
            f"{hub.url}/plain/a.zip?x=1"
        )
        assert refusal(f"{hub.url}/plain/b.zip") == f"cannot read {hub.url}/plain/b.zip: it is empty"
        assert "there is no such file (404)" in refusal(f"{hub.url}/plain/c.zip")
        hub.faults[:] = [Fault(whole=True)]
        assert "does not serve parts of files; download it and give its path" in refusal(f"{hub.url}/plain/a.zip")
        hub.faults[:] = [Fault(status=403)]
        assert "gives no permission to read (403)" in refusal(f"{hub.url}/plain/a.zip")
    assert "cannot read memory://bucket/x.zip: there is no such file" in refusal("memory://bucket/x.zip")
    assert "is of no known file system; give gs://" in refusal("nowhere://bucket/x.zip")
    with pytest.raises(
        UserError, match=r"workers of DataflowRunner do not see .*; give a URL such as gs://bucket/mine"
    ):
        open_source(data_set("mine"), str(write_zip(tmp_path / "a.zip", FILES)), unseen_by="DataflowRunner")
    assert "has a layout of its own" in refusal("hf:a/b", "sc09")
    assert "must be hf:user/name" in refusal("hf:a b/c")


# Folders.


def test_a_bucket_s_folder(tmp_path, bucket):
    for name, data in (FILES | {"tape/.hidden/x.wav": b"", "tape/cover.jpg": b"x"}).items():
        bucket.pipe(f"/bucket/in/{name}", data)
    local = open_source(data_set("mine"), str(write_folder(tmp_path / "f", FILES)))
    below = open_source(data_set("mine"), "memory://bucket/in/tape/")
    assert read_all(below) == {name.removeprefix("tape/"): data for name, data in FILES.items()}
    url = "memory://bucket/in"
    source = open_source(data_set("mine"), url)
    assert source.list() == local.list()
    assert read_all(source) == WANTED
    first = source.fingerprint()
    assert open_source(data_set("mine"), url).fingerprint() == first
    bucket.pipe("/bucket/in/tape/a/0.wav", FILES["tape/a/1.wav"])
    assert open_source(data_set("mine"), url).fingerprint() != first
    bucket.rm("/bucket/in/tape/a/0.wav")
    with pytest.raises(UserError, match=r"cannot read memory://bucket/in/tape/a/0.wav: there is no such file"):
        source.open("tape/a/0.wav")


@pytest.mark.parametrize("blocks", [0, 1, 2])
@pytest.mark.parametrize("name", ["0.wav", "0.flac"])
def test_a_local_file_that_fails_while_it_is_read_is_not_cut_short(tmp_path, monkeypatch, name, blocks):
    folder = write_folder(tmp_path / "f", {f"{i}.wav": b"" for i in range(3)})
    soundfile.write(folder / name, np.random.default_rng(0).normal(0, 0.1, 500_000), 16_000)
    file = open_source(data_set("mine"), str(folder)).open(name)
    add, added = Extent.add, []

    def fails_now(self, block):
        os.dup2(os.open(tmp_path, os.O_RDONLY), file.fileno())  # a folder: from now on, reading it fails

    def count(self, block):
        add(self, block)
        added.append(len(block))
        if len(added) == blocks:
            fails_now(self, block)

    monkeypatch.setattr(Extent, "add", count)
    if not blocks:
        fails_now(None, None)
    with file, pytest.raises(UserError, match=rf"{name}' could not be read to its end: Is a directory; run again"):
        measure(file)
    assert len(added) == blocks


def test_a_pipe_among_the_recordings_is_not_waited_for(tmp_path):
    folder = write_folder(tmp_path / "f", FILES)
    os.mkfifo(folder / "tape/pipe.wav")
    with pytest.raises(Unreadable, match="is not a regular file"):
        open_source(data_set("mine"), str(folder)).open("tape/pipe.wav")


# Tars.


@pytest.mark.parametrize("kind", PACK)
@pytest.mark.parametrize("where", ["here", "http", "bucket"])
def test_tars(tmp_path, bucket, kind, where):
    path = tmp_path / f"a.{kind}"
    path.write_bytes(tar_bytes({"./tape/": link("./tape/", "", tarfile.DIRTYPE)} | FILES | {"tape/x.jpg": b""}, kind))
    with Hub({"a": path.read_bytes()}, faults=[None, None, Fault(after=30_000)]) as hub:
        bucket.pipe("/bucket/a", path.read_bytes())
        source = open_source(
            data_set("mine"), {"here": str(path), "http": f"{hub.url}/plain/a", "bucket": "memory://bucket/a"}[where]
        )
        assert read_all(source) == WANTED
        assert {r.id: r.size for r in source.list()} == {name: len(data) for name, data in WANTED.items()}
        first = source.fingerprint()
        source.close()
        assert source.fingerprint() == first  # opened again
        source.close()


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_odd_names(tmp_path, form):
    deep = "/".join(["folder" * 3] * 8)
    names = [
        f"{deep}/ä ö.wav",
        f"./{deep}//b.flac",
        f"{deep}/./c/../d.wav",
        f"/{deep}/e.ogg",
        f"{deep}/._e.wav",
        "../f.wav",
    ]
    path = tmp_path / "a.tar"
    path.write_bytes(tar_bytes(dict.fromkeys(names, b"data"), form=form))
    found = [r.id for r in open_source(data_set("mine"), str(path)).list()]
    assert found == [f"{deep}/{name}" for name in ("b.flac", "e.ogg", "ä ö.wav")]
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a.tar", "tmp"]


def test_links_are_not_followed_and_told(tmp_path):
    secret = tmp_path / "secret.wav"
    secret.write_bytes(wav())
    more = {
        "l.wav": link("l.wav", str(secret)),
        "h.wav": link("h.wav", "tape/a/0.wav", tarfile.LNKTYPE),
        "p.wav": link("p.wav", "", tarfile.FIFOTYPE),
    }
    path = tmp_path / "a.tar"
    path.write_bytes(tar_bytes(FILES | more))
    source = open_source(data_set("mine"), str(path))
    assert len(source.list()) == len(FILES) + 3
    for name, reason in (("l", "is a link, which is not followed"), ("h", "is a link"), ("p", "is no plain file")):
        with pytest.raises(Unreadable, match=reason):
            source.open(f"{name}.wav")
    source.close()


def test_of_two_members_of_one_name_the_later_counts(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive:
        for data in (b"old", b"newer"):
            for name in "abc":
                info = tarfile.TarInfo(f"{name}.wav")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    assert set(read_all(open_source(data_set("mine"), str(path))).values()) == {b"newer"}


def flipped(data, at):
    return data[:at] + bytes([data[at] ^ 255]) + data[at + 1 :]


def test_damaged_tars(tmp_path):
    def refused(name, data):
        (tmp_path / name).write_bytes(data)
        return refusal(tmp_path / name)

    plain = tar_bytes(FILES)
    for cut in (3_000, 50_000, len(plain) - tarfile.RECORDSIZE, plain.rindex(b"RIFF") - 512):
        assert "cannot be opened as a tar archive" in refused("cut.tar", plain[:cut])
    second = plain.index(b"RIFF", 1000) - 512
    assert f"it is damaged, or cut short, at byte {second}" in refused("flip.tar", flipped(plain, second))
    assert "cannot be opened as a tar archive" in refused("text.tar", b"text" * 1000)
    assert "cannot be opened as a tar archive" in refused("empty.tar", b"")
    for kind in ("tar.gz", "tar.bz2", "tar.xz"):
        packed = tar_bytes(FILES, kind)
        for data in (packed[: len(packed) // 2], packed[:-4], flipped(packed, len(packed) // 2)):
            assert "cannot be unpacked" in refused(f"a.{kind}", data)
        assert "cannot be opened as a tar archive" in refused("x", PACK[kind](b"no tar, but compressed" * 100))


def test_compressed_in_several_streams(tmp_path):
    plain = tar_bytes(FILES)
    for kind, pad in (("tar.gz", b""), ("tar.bz2", b""), ("tar.xz", b"\0" * 8)):
        path = tmp_path / f"a.{kind}"
        path.write_bytes(b"".join(PACK[kind](plain[at : at + 30_000]) + pad for at in range(0, len(plain), 30_000)))
        source = open_source(data_set("mine"), str(path))
        assert read_all(source) == WANTED
        source.close()


@pytest.mark.parametrize("kind", ["tar.gz", "tar.bz2", "tar.xz"])
def test_a_decompression_bomb_is_not_followed(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(bombs, "RATIO_SLACK", 1 << 20)
    path = tmp_path / f"a.{kind}"
    path.write_bytes(PACK[kind](bytes(60_000_000)))
    written = []
    monkeypatch.setattr(tar, "check_ratio", lambda *a: written.append(a[1]) or limits.check_ratio(*a))
    assert "more than 100 to 1: that is a decompression bomb and no archive of recordings" in refusal(path)
    assert max(written) < 40_000_000


def test_a_zip_bomb_of_members_that_overlap(tmp_path):
    """As https://www.bamsoftware.com/hacks/zipbomb does: every entry of the directory points to the same data."""
    path = write_zip(tmp_path / "a.zip", {"0.wav": bytes(10_000_000)})
    data = path.read_bytes()
    start = data.index(b"PK\x01\x02")
    entry, end = data[start : data.index(b"PK\x05\x06")], data.index(b"PK\x05\x06")
    entries = b"".join(entry.replace(b"0.wav", b"%05d" % i) for i in range(200))
    tail = bytearray(data[end:])
    tail[8:10] = tail[10:12] = (200).to_bytes(2, "little")
    tail[12:16] = len(entries).to_bytes(4, "little")
    path.write_bytes(data[:start] + entries + tail)
    assert "holds 2,000,000,000 bytes in" in refusal(path)


def test_headers_that_claim_gigabytes_are_not_held(tmp_path):
    header = tarfile.TarInfo("x")
    header.type, header.size = tarfile.XHDTYPE, 3 << 30
    with open(tmp_path / "a.tar", "wb") as file:
        file.write(header.tobuf(tarfile.GNU_FORMAT))
        file.truncate(4 << 30)  # a hole
    assert "a header claims 3,221,225,472 bytes" in refusal(tmp_path / "a.tar")


def test_xz_that_wants_gigabytes_of_memory(tmp_path):
    head = lzma.compress(b"x", filters=[{"id": lzma.FILTER_LZMA2, "preset": 0, "dict_size": 1 << 16}])
    # The size of the dictionary stands in the block's header: one byte, behind the filter's number, and a checksum.
    block = bytearray(head[12 : 12 + 4 * (head[12] + 1)])
    block[block.index(b"\x21\x01") + 2] = 36  # 1 GiB
    block[-4:] = zlib.crc32(bytes(block[:-4])).to_bytes(4, "little")
    (tmp_path / "a.tar.xz").write_bytes(head[:12] + bytes(block) + head[12 + len(block) :])
    assert "cannot be unpacked (Memory usage limit exceeded)" in refusal(tmp_path / "a.tar.xz")


def test_a_copy_is_shared_and_goes_with_the_last(tmp_path):
    path = tmp_path / "a.tar.gz"
    path.write_bytes(tar_bytes(FILES, "tar.gz"))
    source = open_source(data_set("mine"), str(path))
    (copy,) = (tmp_path / "tmp").rglob("*.tar")
    inode = copy.stat().st_ino
    code = f"import sys, pickle, tempfile; tempfile.tempdir = {str(tmp_path / 'tmp')!r}\n" + (
        "source = pickle.load(sys.stdin.buffer)\nsource.open('tape/a/3.wav').close(); print('open', flush=True)\n"
        "sys.stdin.buffer.read(); source.close()"
    )
    other = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    other.stdin.write(pickle.dumps(source))
    other.stdin.flush()
    assert other.stdout.readline() == b"open\n"
    source.close()
    assert copy.stat().st_ino == inode
    other.communicate(timeout=30)
    assert not copy.exists()
    # Nobody closes this one.
    source = open_source(data_set("mine"), str(path))
    assert copy.exists()
    del source
    # What a killed process has left is taken over, or made anew if it is not whole.
    for name in ("plain.tar", "plain.tar.incomplete"):
        copy.parent.mkdir(mode=0o700)
        (copy.parent / name).write_bytes(tar_bytes(FILES) if name == "plain.tar" else b"half")
        source = open_source(data_set("mine"), str(path))
        assert read_all(source) == WANTED
        source.close()
        assert not copy.parent.exists()
