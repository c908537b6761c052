"""Preparing at length: progress, long listings, many shards."""

import io

import pytest
from archives import mine, write_zip
from prepared import TWO_PROCESSES, read_folder

from harmonic.records import SPLITS
from pipelines import build, console
from pipelines.beam import graph, progress, sharding
from pipelines.beam.sink import stage_folder
from pipelines.build import PrepareSpec
from pipelines.sources.base import SourceRecording


def test_progress_lines(monkeypatch):
    clock = iter([0.0, 0.5, 1.0, 6.0, 7.0, 66.0])
    monkeypatch.setattr(console.time, "monotonic", lambda: next(clock))
    stream = io.StringIO()
    line = console.ProgressLine(stream)
    for done in (0, 1, 61, 70, 3_251):
        line(done, 3_600)
    line.close()
    assert stream.getvalue().splitlines() == [
        "61 of 3,600 recordings, 12.0 a second; 4 min 55 s left",
        "3,251 of 3,600 recordings, 50.0 a second; 7 s left",
    ]
    assert [console.duration(s) for s in (0, 59.4, 60, 3_599, 7_800)] == [
        *("0 s", "59 s", "1 min 00 s", "59 min 59 s", "2 h 10 min")
    ]


def test_progress_lines_of_audio(monkeypatch):
    """Hours of audio show that long recordings go on; what is left follows from their bytes, not from their number."""
    clock = iter([0.0, 5.0, 15.0, 25.0])
    monkeypatch.setattr(console.time, "monotonic", lambda: next(clock))
    stream = io.StringIO()
    line = console.ProgressLine(stream)
    for seconds, share in ((3_600.0, 0.0), (10_800.0, 0.0), (18_000.0, 0.25)):
        line(0, 8, seconds, share)
    assert stream.getvalue().splitlines() == [
        "0 of 8 recordings, 0.0 a second; 3.00 hours of audio, 0.200 a second",
        "0 of 8 recordings, 0.0 a second; 5.00 hours of audio, 0.200 a second; 1 min 00 s left",
    ]


@pytest.mark.parametrize("options", [(), TWO_PROCESSES])
def test_progress_is_reported_while_running(tmp_path, monkeypatch, options):
    monkeypatch.setattr(progress, "_POLL_SECONDS", 0.001)
    monkeypatch.setattr(progress, "_REPORT_SECONDS", 0)
    seen = []
    spec = PrepareSpec("mine", str(write_zip(tmp_path / "a.zip", mine(40))), str(tmp_path))
    manifest = build.prepare(spec, options, progress=lambda *row: seen.append(row))
    done, total, seconds, shares = zip(*seen, strict=True)
    assert set(total) == {40} and 0 < done[-1] <= 40
    for column in (done, seconds, shares):
        assert list(column) == sorted(column)
    assert 0 < seconds[-1] <= sum(split.samples for split in manifest.splits.values()) / 16_000
    assert 0 < shares[-1] <= 1


# Long listings.


def test_a_listing_travels_by_files(tmp_path):
    rows = [(f"\u00e9/{i}.wav", "a\nb" if i % 2 else None, 10**12 + i) for i in range(25)]
    listed = [(SPLITS[i % 3], i // 3, rows[5 * i : 5 * i + 5]) for i in range(5)]
    paths = sharding.stage_listing(str(tmp_path), "0" * 32, listed, 8)
    assert [path.rsplit("/", 1)[0] for path in paths] == 3 * [stage_folder(str(tmp_path), "0" * 32)]
    assert [shard for path in paths for shard in sharding.read_listing(path)] == listed


@pytest.mark.parametrize("options", [(), TWO_PROCESSES])
def test_a_long_listing_gives_the_same_bytes(tmp_path, monkeypatch, options):
    source = str(write_zip(tmp_path / "a.zip", mine(30)))
    short, long = (PrepareSpec("mine", source, str(tmp_path / name), num_shards=3) for name in ("short", "long"))
    build.prepare(short)
    monkeypatch.setattr(graph, "MAX_IN_GRAPH", 7)
    monkeypatch.setattr(graph, "_LISTING_ROWS", 4)
    build.prepare(long, options)
    assert read_folder(short.folder) == read_folder(long.folder)


def test_shards_grow_with_the_data_set_and_not_their_number():
    recordings = [SourceRecording(f"{i}.wav", "train", None, 1 << 40) for i in range(2_000)]
    assert sharding.shard_counts(recordings, graph.SHARD_BYTES, most=100)["train"] == 100
    assert sharding.shard_counts(recordings, graph.SHARD_BYTES, 150, most=100)["train"] == 150  # as it is asked for
