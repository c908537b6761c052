"""The atomic sink, on a local disk and on a file system of Beam's that is not local."""

import errno
import hashlib
import os

import numpy as np
import pytest
from apache_beam.io.filesystem import BeamIOError
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordReader
from memory_files import FILES

from harmonic import records
from harmonic.errors import UserError, one_line
from harmonic.records import Record, Recording
from pipelines import errors
from pipelines.beam import sink, steps
from pipelines.beam.sink import WrittenShard
from pipelines.build import PrepareSpec, new_manifest, prepare
from pipelines.paths import is_local


@pytest.fixture(params=["local", "remote"])
def folder(request, tmp_path):
    FILES.clear()
    yield str(tmp_path / "out") if request.param == "local" else "memory://bucket/out"
    FILES.clear()


def names(folder):
    if is_local(folder):
        return sorted(os.path.relpath(os.path.join(at, file), folder) for at, _, fs in os.walk(folder) for file in fs)
    return sorted(name.removeprefix(folder + "/") for name in FILES)


def contents(folder, name):
    if is_local(folder):
        with open(os.path.join(folder, name), "rb") as file:
            return file.read()
    return FILES[f"{folder}/{name}"]


RUN = "0123456789abcdef" * 2
MANIFEST = new_manifest(PrepareSpec("mine", "a.zip", encoding="mu_law", window_length=5), "f")


def write(folder, run=RUN):
    """A shard a split, each with two recordings of 10 and 3 samples. Returns the shards."""
    shards = []
    for split in records.SPLITS:
        with sink.ShardWriter(folder, run, 5) as writer:
            for name, length in (("a", 10), ("b", 3)):
                tokens = np.arange(length, dtype=np.uint8)[:, None]
                for offset in range(0, length, 8):
                    writer.write(Record(f"{split}/{name}", offset, length, tokens[offset : offset + 8]))
                writer.end_recording(Recording(f"{split}/{name}", length, -(-length // 8), None, -1.0, 1.0, 16_000))
            shard, staged = writer.stage(sink.shard_name(split, 0, 1))
        shards.append(WrittenShard(split, shard, staged, ()))
    return shards


def publish(folder, shards, run=RUN):
    manifest = steps.assemble(MANIFEST, shards)
    files = [pair for s in shards for pair in zip(s.staged, (s.shard.file, s.shard.index_file), strict=True)]
    sink.publish(folder, run, files, manifest)
    return manifest


def test_write_stage_publish_read(folder, tmp_path):
    sink.create_folder(folder)
    shards = write(folder)
    assert sink.read_manifest(folder) is None
    assert all(name.startswith(f"_partial-{RUN}/") for name in names(folder)) and len(names(folder)) == 6
    manifest = publish(folder, shards)
    assert sink.read_manifest(folder) == manifest
    assert sink.missing_files(folder, manifest) == []
    sink.clear(folder, RUN)
    expected = [f"{s}-00000-of-00001.{e}" for s in sorted(records.SPLITS) for e in ("array_record", "recordings.jsonl")]
    assert names(folder) == ["manifest.json", *expected]

    shard = manifest.splits["test"].shards[0]
    assert (shard.records, shard.recordings, shard.windows, shard.samples) == (3, 2, 3, 13)
    for name, size, digest in (
        (shard.file, shard.bytes, shard.sha256),
        (shard.index_file, shard.index_bytes, shard.index_sha256),
    ):
        data = contents(folder, name)
        assert (len(data), hashlib.sha256(data).hexdigest()) == (size, digest)
        (tmp_path / name).write_bytes(data)
    assert [r.id for r in records.read_index(tmp_path, shard)] == ["test/a", "test/b"]
    source = ArrayRecordDataSource(str(tmp_path / shard.file))
    read = [records.decode_record(source[i]) for i in range(len(source))]
    assert [(r.recording, r.offset, len(r.tokens)) for r in read] == [
        ("test/a", 0, 8),
        ("test/a", 8, 2),
        ("test/b", 0, 3),
    ]
    reader = ArrayRecordReader(str(tmp_path / shard.file))
    assert "group_size:1" in reader.writer_options_string()


def test_publishing_again_finds_its_work_done(folder):
    shards = write(folder)
    assert publish(folder, shards) == publish(folder, shards)


def test_a_run_whose_files_were_cleared_publishes_nothing(folder):
    shards = write(folder)
    sink.clear(folder)
    with pytest.raises(UserError, match="another run took"):
        publish(folder, shards)
    assert sink.read_manifest(folder) is None


def test_clear_removes_ours_alone(folder):
    publish(folder, write(folder))
    write(folder, "f" * 32)
    foreign = ["notes.txt", "train.array_record", "train-00000-of-00001.wav", "_partial-mine/x", "sub/manifest.json"]
    for name in foreign:
        if is_local(folder):
            os.makedirs(os.path.dirname(os.path.join(folder, name)), exist_ok=True)
            open(os.path.join(folder, name), "w").close()
        else:
            FILES[f"{folder}/{name}"] = b""
    sink.clear(folder)
    assert names(folder) == sorted(foreign)


def test_missing_files_are_named(folder):
    manifest = publish(folder, write(folder))
    victim = manifest.splits["train"].shards[0].file
    if is_local(folder):
        os.truncate(os.path.join(folder, victim), 10)
    else:
        FILES[f"{folder}/{victim}"] = b"short"
    assert sink.missing_files(folder, manifest) == [victim]


def test_a_damaged_manifest_is_told(folder):
    publish(folder, write(folder))
    if is_local(folder):
        os.truncate(os.path.join(folder, "manifest.json"), 20)
    else:
        FILES[f"{folder}/manifest.json"] = b"{"
    with pytest.raises(UserError, match="cannot be read"):
        sink.read_manifest(folder)


def test_prepare_writes_to_a_remote_folder(tmp_path):
    FILES.clear()
    remote = prepare(PrepareSpec("demo", output_dir="memory://bucket/data"))
    local = prepare(PrepareSpec("demo", output_dir=str(tmp_path)))
    assert remote == local
    folder = "memory://bucket/data/demo"
    assert names(folder) == names(str(tmp_path / "demo"))
    for name in names(folder):
        assert contents(folder, name) == contents(str(tmp_path / "demo"), name)
    assert prepare(PrepareSpec("demo", output_dir="memory://bucket/data")) == local
    FILES.clear()


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (errno.ENOSPC, "no space is left; make room there, or give another --output_dir"),
        (errno.EDQUOT, "the quota is used up; make room there"),
        (errno.EACCES, "Permission denied; make it writable, or give another --output_dir"),
    ],
)
def test_output_errors(folder, monkeypatch, code, message):
    with sink.ShardWriter(folder, RUN, 5) as writer:
        monkeypatch.setattr(sink, "_move_out", lambda *_: (_ for _ in ()).throw(OSError(code, os.strerror(code))))
        with pytest.raises(UserError, match=f"cannot write to {folder}: {message}"):
            writer.stage("x")
    with pytest.raises(UserError, match=message), errors.output_errors("x"):
        try:
            raise OSError(code, os.strerror(code))
        except OSError as error:
            raise BeamIOError("wrapped") from error


def test_a_full_temporary_disk_is_told():
    with pytest.raises(
        UserError, match=r"no space is left in .*; make room there, where temporary files go, or set TMPDIR"
    ):
        with errors.scratch_errors():
            raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(FileNotFoundError), errors.scratch_errors():
        raise FileNotFoundError


def test_a_native_writer_that_cannot_go_on_is_told(tmp_path):
    with sink.ShardWriter(str(tmp_path), RUN, 5) as writer, pytest.raises(UserError, match="no space is left in"):
        with writer._native_errors:
            raise RuntimeError("write() failed: No space left on device; writing x")
    assert names(str(tmp_path)) == []


def test_an_unknown_file_system_is_told():
    with pytest.raises(UserError, match="cannot write to nowhere://x/y: Unable to get filesystem"):
        sink.create_folder("nowhere://x/y")


def test_one_line():
    assert one_line("a\n  b\tc") == "a b c"
    assert one_line("a\x1b[31m\udcff") == "a\\x1b[31m\\udcff"
    assert len(one_line("x" * 1000)) == 200
