"""Shards, the manifest that they make up, and the Beam steps, as plain functions."""

import numpy as np
import pytest
import soundfile

from harmonic import audio, records
from harmonic.errors import UserError
from harmonic.records import Shard, Skipped, Split
from pipelines.beam import steps
from pipelines.beam.sharding import group_by_shard, shard_counts
from pipelines.beam.sink import WrittenShard
from pipelines.build import PrepareSpec, new_manifest
from pipelines.sources import open_source
from pipelines.sources.base import SourceRecording
from pipelines.sources.layouts import data_set


def listing(sizes, split="train"):
    return [SourceRecording(f"{split}{i}.wav", split, None, size) for i, size in enumerate(sizes)]


def test_number_of_shards():
    recordings = listing([100] * 40) + listing([10], "validation") + listing([1_000] * 3, "test")
    counts = shard_counts(recordings, shard_bytes=1_000)
    assert counts["train"] == 4 and counts["validation"] == 1 and 1 <= counts["test"] <= 3
    assert counts == shard_counts(recordings[::-1], shard_bytes=1_000)
    for wanted in (1, 2, 7, 40, 1_000):
        counts = shard_counts(recordings, 1_000, wanted)
        assert all(1 <= count <= wanted for count in counts.values())
        for split in counts:  # no shard is empty
            used = {index for name, index, _ in group_by_shard(recordings, counts) if name == split}
            assert used == set(range(counts[split]))


def test_recordings_are_grouped_by_shard():
    recording = SourceRecording("123456789", "test", "a", 7)  # its CRC-32 is known: CBF43926
    assert group_by_shard([recording], {"test": 5}) == [("test", 0xCBF43926 % 5, [("123456789", "a", 7)])]
    recordings = [*listing(range(100, 140)), *listing([5_000, 1], "validation"), *listing([], "test")]
    recordings.append(SourceRecording("z", "train", None, 9_000, group=recordings[0].id))
    shards = group_by_shard(recordings, {"train": 4, "validation": 1, "test": 1})
    rows = [(split, *row) for split, _, rows in shards for row in rows]
    assert sorted(rows) == sorted((r.split, r.id, r.label, r.size) for r in recordings)
    # The largest first, each in the order of the listing, groups together.
    sizes = [sum(size for _, _, size in rows) for _, _, rows in shards]
    assert sizes == sorted(sizes, reverse=True) and len(sizes) == 5
    order = [r.id for r in recordings]
    assert all(ids == sorted(ids, key=order.index) for ids in ([row[0] for row in rows] for _, _, rows in shards))
    assert [row[0] for row in shards[0][2]][:: len(shards[0][2]) - 1] == [recordings[0].id, "z"]


MANIFEST = new_manifest(PrepareSpec("mine", "a.zip", encoding="mu_law", window_length=128_000), "f")


def written(split, index, recordings, skipped=()):
    name = f"{split}-{index:05d}-of-00002"
    shard = Shard(f"{name}.array_record", 1, "a", f"{name}.jsonl", 1, "b", recordings, recordings, recordings, 7)
    return WrittenShard(split, shard, ("x", "y"), tuple(Skipped(s, split, "is empty") for s in skipped))


def test_assembled_manifest_does_not_depend_on_the_order():
    shards = [
        written("test", 0, 1),
        written("train", 1, 2, ["b", "a"]),
        written("train", 0, 3),
        written("validation", 0, 1),
    ]
    manifest = steps.assemble(MANIFEST, sorted(shards, key=lambda s: s.shard.file))
    assert list(manifest.splits) == list(records.SPLITS)
    assert manifest.splits["train"] == Split(5, 5, 14, (shards[2].shard, shards[1].shard))
    assert [s.recording for s in manifest.skipped] == ["a", "b"]
    listed = {"train": 7, "validation": 1, "test": 1}
    steps.check_counts(manifest, listed)
    for split in listed:
        for lost in (1, -1):
            with pytest.raises(UserError, match=f"the runner lost recordings of split {split}"):
                steps.check_counts(manifest, listed | {split: listed[split] + lost})


def test_skipped_recordings_stop_a_complete_data_set():
    shards = [
        written("test", 0, 1),
        written("train", 0, 1, ["1.wav", "2.wav", "3.wav", "4.wav"]),
        written("validation", 0, 1),
    ]
    manifest = steps.assemble(MANIFEST, shards)
    steps.check_skipped(manifest, complete=False)
    with pytest.raises(
        UserError, match=r"4 recordings of mine cannot be read: 1.wav is empty; .*3.wav is empty; ...; get"
    ):
        steps.check_skipped(manifest, complete=True)
    nothing = steps.assemble(MANIFEST, [*shards[1:], written("test", 0, 0, ["5.wav"])])
    with pytest.raises(UserError, match=r"none of the recordings of split test can be read: 5.wav is empty"):
        steps.check_skipped(nothing, complete=False)


def test_a_shard_is_in_the_listing_s_order_and_whole(tmp_path):
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    for i in (10, 9, 2):
        soundfile.write(tmp_path / f"{i}.wav", np.random.default_rng(i).normal(0, 0.1, (1_000 * i, 2)), 16_000)
    (tmp_path / "3.wav").write_bytes((tmp_path / "9.wav").read_bytes()[:100])
    source = open_source(data_set("mine"), str(tmp_path))
    shard = ("train", 0, [(recording.id, recording.label, recording.size) for recording in source.list()])
    step = steps.WriteShard(source, {"train": 1}, MANIFEST, str(tmp_path / "out"), "0" * 32, None)
    step.start_bundle()
    (first,), (second,) = (list(step.process(shard)) for _ in range(2))
    step.finish_bundle()
    assert first.shard == second.shard and first.staged != second.staged
    assert first.skipped == (Skipped("3.wav", "train", "is cut short: 100 bytes, and its header claims 36044"),)
    assert (first.shard.recordings, first.shard.records, first.shard.samples) == (3, 3, 21_000)
    read = [records.decode_record(data) for data in ArrayRecordDataSource(first.staged[0])]
    assert [record.recording for record in read] == ["2.wav", "9.wav", "10.wav"]
    mono = soundfile.read(tmp_path / "9.wav", dtype="float32")[0].mean(axis=1, dtype=np.float32)
    np.testing.assert_array_equal(read[1].tokens[:, 0], audio.encode(mono, "mu_law"))
