"""The prepare suite of the benchmark, at sizes at which its figures mean nothing but are all there."""

import math

import numpy as np
import pytest

from harmonic.data import Dataset, Windows
from workflows import bench_hours, bench_prepare


def is_figure(value):
    return isinstance(value, (int, float)) and math.isfinite(value) and value > 0


@pytest.mark.slow
def test_prepare_beside_a_bare_script_and_reading_beside_raw_files():
    prepared, read = bench_prepare.suite([(6, 0.5, 22_050)], [(500, 2)], processes=1, rounds=1, read_samples=20_000)
    assert (prepared.pop("what"), prepared["recordings"], prepared["sample_rate"]) == ("prepare", 6, 22_050)
    assert (read.pop("what"), read["window"], read["batch"]) == ("read", 500, 2)
    for row in (prepared, read):
        assert row.pop("platform").startswith("cpu")
        assert all(map(is_figure, row.values()))
    assert prepared["of_plain_script"] == prepared["plain_seconds"] / prepared["seconds"]
    assert read["of_raw_files"] == read["windows_per_second"] / read["raw_windows_per_second"]


def test_raw_files_give_what_records_give(make_dataset, tmp_path):
    """Or else the ratio would compare two things."""
    split = Dataset(make_dataset(tmp_path, "raw", [900, 400, 1_000], record_length=300)).split("train")
    raw = bench_prepare.RawSplit(split, tmp_path / "raw")
    ours, plain = Windows(split, 250), Windows(raw, 250)
    assert len(ours) == len(plain) > 1
    for i in range(len(ours)):
        np.testing.assert_array_equal(ours[i]["tokens"], plain[i]["tokens"])
        assert ours[i]["length"] == plain[i]["length"]
    raw.close()


@pytest.mark.slow
def test_hours_with_the_memory_of_each_process():
    run, *memory = bench_hours.suite(0.02, long_seconds=20, processes=2, minute=1)
    assert run["hours"] >= 0.02 and run["longest_seconds"] == 20 and run["recordings"] == 36 + 2
    assert [row["process"] for row in memory] == ["launcher", "server of workers", "worker 0", "worker 1"]
    for row in memory:
        assert min(row["peak_bytes_by_minute"]) > 0 and max(row["peak_bytes_by_minute"]) > 100 << 20
        assert row["highest_over_lowest_after_first_minute"] >= 1
