"""The record format, the index and the manifest."""

import dataclasses
import json
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harmonic import records
from harmonic.errors import UserError

TOKENS = {"uint8": 255, "uint16": 65_535}


@st.composite
def any_record(draw):
    dtype = draw(st.sampled_from(sorted(TOKENS)))
    shape = draw(st.integers(0, 40)), draw(st.integers(1, 3))
    values = draw(st.lists(st.integers(0, TOKENS[dtype]), min_size=shape[0] * shape[1], max_size=shape[0] * shape[1]))
    return records.Record(
        recording=draw(st.text(max_size=30)),
        offset=draw(st.integers(0, 2**40)),
        recording_length=draw(st.integers(0, 2**40)),
        tokens=np.array(values, dtype).reshape(shape),
        label=draw(st.none() | st.text(max_size=10)),
    )


def assert_same(left, right):
    for field in ("recording", "offset", "recording_length", "label"):
        assert getattr(left, field) == getattr(right, field)
    assert left.tokens.dtype == right.tokens.dtype
    np.testing.assert_array_equal(left.tokens, right.tokens)


@settings(max_examples=200, deadline=None)
@given(any_record())
def test_round_trip(record):
    assert_same(records.decode_record(records.encode_record(record)), record)


@settings(max_examples=200, deadline=None)
@given(any_record(), st.data())
def test_any_damaged_byte_is_noticed(record, data):
    encoded = bytearray(records.encode_record(record))
    encoded[data.draw(st.integers(0, len(encoded) - 1))] ^= data.draw(st.integers(1, 255))
    with pytest.raises(records.RecordError):
        records.decode_record(bytes(encoded))


@settings(max_examples=100, deadline=None)
@given(any_record(), st.data())
def test_a_record_that_is_cut_short_is_noticed(record, data):
    encoded = records.encode_record(record)
    with pytest.raises(records.RecordError):
        records.decode_record(encoded[: data.draw(st.integers(0, len(encoded) - 1))])


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 2**32 - 1))
def test_bytes_that_are_no_record_are_refused(data, header_length):
    body = b"HRN1" + struct.pack("<I", header_length) + data
    for candidate in (data, b"HRN1" + data, body + struct.pack("<I", zlib.crc32(body))):
        with pytest.raises(records.RecordError):
            records.decode_record(candidate)


def test_tokens_are_little_endian():
    record = records.Record("a", 0, 1, np.array([[258]], ">u2"))
    assert records.encode_record(record)[-6:-4] == b"\x02\x01"


def test_count_windows():
    assert [records.count_windows(n, 10) for n in (0, 1, 10, 11, 20)] == [0, 1, 1, 2, 2]


def manifest():
    def split(name, count):
        shards = tuple(
            records.Shard(
                file=f"{name}-{i:05d}-of-{count:05d}.array_record",
                bytes=10,
                sha256="0" * 64,
                index_file=f"{name}-{i:05d}-of-{count:05d}.recordings.jsonl",
                index_bytes=5,
                index_sha256="1" * 64,
                records=1,
                recordings=1,
                windows=1,
                samples=7,
            )
            for i in range(count)
        )
        return records.Split(recordings=count, windows=count, samples=7 * count, shards=shards)

    return records.Manifest(
        dataset="mine",
        source="/data/mine.zip",
        fingerprint="f" * 64,
        sample_rate=16_000,
        encoding="mu_law",
        num_levels=256,
        token_dtype="uint8",
        channels=1,
        window_length=128_000,
        record_length=131_072,
        splits={name: split(name, count) for name, count in zip(records.SPLITS, (2, 1, 1), strict=True)},
        skipped=(records.Skipped("b.wav", "train", "is empty"),),
    )


def test_manifest_round_trip(tmp_path):
    text = manifest().to_json()
    assert records.Manifest.from_json(text) == manifest()
    assert records.Manifest.from_json(text).to_json() == text
    (tmp_path / "manifest.json").write_text(text)
    assert records.load_manifest(tmp_path) == manifest()


def change(path, value):
    raw = json.loads(manifest().to_json())
    at = raw
    for key in path[:-1]:
        at = at[key]
    if value is None:
        del at[path[-1]]
    else:
        at[path[-1]] = value
    return json.dumps(raw)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "null",
        '"text"',
        "{}",
        "[" * 100_000,
        change(["format"], 2),
        change(["dataset"], None),
        change(["dataset"], 3),
        change(["num_levels"], "256"),
        change(["num_levels"], True),
        change(["num_levels"], -1),
        change(["splits"], []),
        change(["splits", "test"], None),
        change(["splits", "other"], {}),
        change(["splits", "train", "shards"], {}),
        change(["splits", "train", "shards", 0], 3),
        change(["splits", "train", "shards", 0, "bytes"], -1),
        change(["splits", "train", "shards", 0, "file"], "../outside"),
        change(["splits", "train", "shards", 0, "file"], "/etc/passwd"),
        change(["splits", "train", "shards", 0, "index_file"], ".."),
        change(["splits", "train", "recordings"], None),
        change(["skipped"], None),
        change(["skipped", 0], []),
    ],
    ids=lambda text: text[:40],
)
def test_a_manifest_that_cannot_be_is_refused(text, tmp_path):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(UserError, match="cannot be read") as error:
        records.load_manifest(tmp_path)
    assert "\n" not in str(error.value)


def test_without_a_manifest_there_is_no_data_set(tmp_path):
    with pytest.raises(UserError, match=r"no data set stands in .*; make one with python -m pipelines.prepare"):
        records.load_manifest(tmp_path / "mine")


def test_index_round_trip_and_damage(tmp_path):
    recordings = [
        records.Recording("a.wav", 7, 1, None, -0.5, 0.5, 16_000),
        records.Recording("ü\n.wav", 9, 2, "zero", -1.0, 1.0, 44_100),
    ]
    data = b"".join(map(records.index_line, recordings))
    shard = dataclasses.replace(
        manifest().splits["test"].shards[0], index_file="i.jsonl", index_bytes=len(data), recordings=2, records=3
    )
    (tmp_path / "i.jsonl").write_bytes(data)
    assert list(records.read_index(tmp_path, shard)) == recordings
    for damaged in (data[:-1], data.replace(b"7", b"x", 1), data.replace(b'"records":1', b'"records":3')):
        (tmp_path / "i.jsonl").write_bytes(damaged)
        with pytest.raises(UserError, match="missing or damaged"):
            list(records.read_index(tmp_path, shard))
    (tmp_path / "i.jsonl").unlink()
    with pytest.raises(UserError, match="missing or damaged"):
        list(records.read_index(tmp_path, shard))
