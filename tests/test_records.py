"""The record format, the index and the manifest."""

import dataclasses
import hashlib
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


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 60), st.integers(1, 20), st.integers(1, 30))
def test_windows_that_overlap_or_skip_reach_the_end_and_are_never_empty(length, window, hop):
    """Every one but the last is whole, and ends before the recording does; hops beyond a window skip samples."""
    count = records.count_windows(length, window, hop)
    starts = [index * hop for index in range(count)]
    assert count >= 1 and starts[-1] < length
    assert all(start + window < length for start in starts[:-1])
    assert starts[-1] + window >= length or starts[-1] + hop >= length


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
        hop_length=64_000,
        record_length=131_072,
        trim_silence=40.0,
        loudness=None,
        split_rule="default",
        splits={name: split(name, count) for name, count in zip(records.SPLITS, (2, 1, 1), strict=True)},
        skipped=(records.Skipped("b.wav", "train", "is empty"),),
    )


def test_manifest_round_trip(tmp_path):
    text = manifest().to_json()
    assert records.Manifest.from_json(text) == manifest()
    assert records.Manifest.from_json(text).to_json() == text
    (tmp_path / "manifest.json").write_text(text)
    assert records.load_manifest(tmp_path) == manifest()


def sealed(raw):
    """The text of a manifest's dictionary, with the checksum that goes with it."""
    body = {name: value for name, value in raw.items() if name != "checksum"}
    checksum = hashlib.sha256(json.dumps(body, indent=2).encode()).hexdigest()
    return json.dumps({**body, "checksum": checksum}, indent=2) + "\n"


def test_any_changed_byte_of_a_manifest_is_noticed(tmp_path):
    data = manifest().to_json().encode()
    path = tmp_path / "manifest.json"
    for place in range(len(data)):
        for bit in (0x01, 0x07, 0x80):  # 0x07 makes a carriage return of a line's end
            path.write_bytes(data[:place] + bytes([data[place] ^ bit]) + data[place + 1 :])
            with pytest.raises(UserError, match="cannot be read"):
                records.load_manifest(tmp_path)
    for text in (data[:-1], data[: len(data) // 2], data + b"\n", data.replace(b"\n", b"\r\n")):
        path.write_bytes(text)
        with pytest.raises(UserError, match="cannot be read"):
            records.load_manifest(tmp_path)


def test_a_manifest_of_format_1_is_read():
    """Which had no hop, no options, no longest recordings and no checksum."""
    raw = json.loads(manifest().to_json()) | {"format": 1}
    for name in ("hop_length", "trim_silence", "loudness", "split_rule", "checksum"):
        del raw[name]
    for split in raw["splits"].values():
        for shard in split["shards"]:
            del shard["longest"]
    read = records.Manifest.from_json(json.dumps(raw))
    assert read == dataclasses.replace(manifest(), hop_length=128_000, trim_silence=None)
    assert records.Manifest.from_json(read.to_json()) == read


def change(path, value):
    raw = json.loads(manifest().to_json())
    at = raw
    for key in path[:-1]:
        at = at[key]
    if value is None:
        del at[path[-1]]
    else:
        at[path[-1]] = value
    return sealed(raw)


def test_a_later_versions_field_is_passed_over_and_is_under_the_checksum():
    text = change(["later"], {"new": 1.5})
    assert records.Manifest.from_json(text) == manifest()
    with pytest.raises(ValueError, match="own checksum"):
        records.Manifest.from_json(text.replace("1.5", "2.5"))


def test_a_manifest_that_is_sealed_again_is_read():
    """So that what is refused below is refused for what it says."""
    assert records.Manifest.from_json(change(["loudness"], -23.0)).loudness == -23


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "null",
        '"text"',
        "{}",
        "[" * 100_000,
        change(["format"], 3),
        change(["channels"], records.MAX_CHANNELS + 1),
        change(["window_length"], 0),
        change(["hop_length"], 0),
        change(["hop_length"], None),
        change(["record_length"], 0),
        change(["sample_rate"], 0),
        change(["channels"], 0),
        change(["token_dtype"], "float32"),
        change(["loudness"], "loud"),
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
    with pytest.raises(UserError, match=r"there is no data set in .*; make one with python -m pipelines.prepare"):
        records.load_manifest(tmp_path / "mine")


def test_index_round_trip_and_damage(tmp_path):
    recordings = [
        records.Recording("a.wav", 7, 1, None, -0.5, 0.5, 16_000),
        records.Recording("ü\n.wav", 9, 2, "zero", -1.0, 1.0, 44_100, -12.5, 3, 4),
    ]
    data = b"".join(map(records.index_line, recordings))
    shard = dataclasses.replace(
        manifest().splits["test"].shards[0],
        index_file="i.jsonl",
        index_bytes=len(data),
        index_sha256=hashlib.sha256(data).hexdigest(),
        recordings=2,
        records=3,
    )
    (tmp_path / "i.jsonl").write_bytes(data)
    assert list(records.read_index(tmp_path, shard)) == recordings
    for damaged in (data[:-1], data.replace(b"7", b"x", 1), data.replace(b"a.wav", b"b.wav")):
        (tmp_path / "i.jsonl").write_bytes(damaged)
        with pytest.raises(UserError, match="missing or damaged"):
            list(records.read_index(tmp_path, shard))
    (tmp_path / "i.jsonl").write_bytes(data)
    with pytest.raises(UserError, match="does not match the manifest"):
        list(records.read_index(tmp_path, dataclasses.replace(shard, records=4)))
    (tmp_path / "i.jsonl").unlink()
    with pytest.raises(UserError, match="missing or damaged"):
        list(records.read_index(tmp_path, shard))


@pytest.mark.parametrize("name", ["a/1.wav", 'q"\\\n\x7f', "\u00e9 \U0001f3b9"])
@pytest.mark.parametrize("label", [None, "seven", "\t\u00fc"])
def test_a_record_s_head_is_json_of_sorted_keys_without_spaces(name, label):
    head = records.record_head(name, label, 131_072, 5, 10**12, 2, "uint16")
    fields = {"recording": name, "label": label, "offset": 131_072, "length": 5, "recording_length": 10**12}
    text = json.dumps({**fields, "channels": 2, "dtype": "uint16"}, sort_keys=True, separators=(",", ":")).encode()
    assert head == b"HRN1" + len(text).to_bytes(4, "little") + text
