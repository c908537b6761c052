"""Loading: windows within and across records, shuffling, sharding, resumption, evaluation's rows."""

import dataclasses
import json

import numpy as np
import pytest

from harmonic.config import Config, override
from harmonic.data import Dataset, Windows, evaluation_batches, hop_length, train_batches
from harmonic.errors import UserError

RECORD_LENGTH = 700  # so that recordings stretch over several records


@pytest.fixture(scope="module")
def folder(tmp_path_factory, make_dataset):
    lengths = [2_000, 350, 700, 1_401, 90, 3_000, 1_999, 640, 1_000, 777, 1_234, 20]
    return make_dataset(tmp_path_factory.mktemp("data"), "mine", lengths, record_length=RECORD_LENGTH)


@pytest.fixture
def dataset(folder):
    return Dataset(folder)


def config(**fields):
    base = ["data.dataset=mine", "data.window_length=500", "train.global_batch_size=4", "model.pool_factors=2,2",
            "model.pool_groups=1", "data.threads=2"]  # fmt: skip
    return override(Config(), [*base, *(f"{k.replace('__', '.')}={v}" for k, v in fields.items())])


def test_any_piece_of_a_recording_reads_like_a_slice(dataset, rng):
    split = dataset.split("train")
    for index, recording in enumerate(split.recordings):
        whole = split.read(index)
        assert whole.shape == (recording.length, 1) and whole.dtype == np.uint8
        for _ in range(20):
            start, stop = sorted(rng.integers(0, recording.length + 1, 2))
            np.testing.assert_array_equal(split.read(index, start, stop), whole[start:stop])
        np.testing.assert_array_equal(split.read(index, 0, recording.length + 99), whole)


def test_windows_cover_every_sample_once(dataset):
    split = dataset.split("train")
    windows = Windows(split, 500)
    seen = [np.zeros(n, int) for n in split.lengths]
    for i in range(len(windows)):
        recording, start, stop = windows.locate(i)
        seen[recording][start:stop] += 1
        item = windows[i]
        assert item["tokens"].shape == (500, 1) and item["length"] == stop - start
        np.testing.assert_array_equal(item["tokens"][: stop - start], split.read(recording, start, stop))
        assert (item["tokens"][stop - start :] == 0).all()
    assert all((s == 1).all() for s in seen)
    with pytest.raises(IndexError):
        windows[len(windows)]


@pytest.mark.parametrize("hop", [100, 300, 500, 800, 4_000])
def test_windows_overlap_or_skip(dataset, hop):
    split = dataset.split("train")
    windows = Windows(split, 500, hop=hop)
    expected = [
        (recording, start, min(start + 500, int(length)))
        for recording, length in enumerate(split.lengths)
        for start in range(0, int(length), hop)
        if start == 0 or start - hop + 500 < length
    ]
    assert [windows.locate(i) for i in range(len(windows))] == expected
    for i, (recording, start, stop) in enumerate(expected):
        np.testing.assert_array_equal(windows[i]["tokens"][: stop - start], split.read(recording, start, stop))
    if hop <= 500:
        for recording, length in enumerate(split.lengths):
            covered = np.concatenate([np.arange(a, b) for r, a, b in expected if r == recording])
            assert set(covered) == set(range(length))
    cropped = Windows(split, 500, hop=hop, crop=700)
    assert {cropped.locate(i)[2] for i in range(len(cropped))} <= set(range(701))


def test_training_follows_the_hop_of_the_config_or_else_of_the_data_set(tmp_path, make_dataset):
    folder = make_dataset(tmp_path, "mine", [2_000] * 20, window_length=500, hop_length=250)
    overlapping = Dataset(folder)
    assert overlapping.manifest.hop_length == 250

    def hop(**fields):
        return hop_length(overlapping.manifest, config(**fields))

    assert (hop(), hop(data__window_length=400)) == (250, 400)  # that of windows of another length says nothing
    assert (hop(data__hop_length=125), hop(data__hop_length=125, data__window_length=400)) == (125, 125)
    rows = rows_of(
        take(train_batches(overlapping, config()), 1 + len(Windows(overlapping.split("train"), 500, hop=250)) // 4)
    )
    expected = Windows(overlapping.split("train"), 500, hop=250)
    assert len(expected) == 7 * len(overlapping.split("train").recordings)
    everything = sorted((bytes(w["tokens"]), int(w["length"])) for w in (expected[i] for i in range(len(expected))))
    assert sorted(rows[: len(expected)]) == everything
    # Evaluation sees every sample once, whatever the hop.
    batches = evaluation_batches(overlapping.split("test"), batch_size=2, segment_length=300)
    assert sum(int(batch.lengths.sum()) for batch in batches) == overlapping.manifest.splits["test"].samples


@pytest.mark.parametrize(
    ("window", "segments", "count"), [(3_000, 1, 2), (3_000, 2, 5), (500, 5, 2), (1_400, 1, 4)], ids=str
)
def test_pieces_together_are_the_windows(dataset, monkeypatch, window, segments, count):
    """Each process reads the records that its pieces touch, each once, and no others."""
    split = dataset.split("train")
    padded = -(-window // (segments * count)) * segments * count
    whole = Windows(split, window, padded=padded)
    parts = [Windows(split, window, padded=padded, segments=segments, piece=(j, count)) for j in range(count)]
    stride, size = padded // segments, padded // segments // count
    read = split.read
    for i in range(len(whole)):
        expected = whole[i]["tokens"].reshape(segments, count, size, 1)
        recording, start, stop = whole.locate(i)
        for j, part in enumerate(parts):
            asked = []
            monkeypatch.setattr(split, "read", lambda r, a, b, asked=asked: asked.append((r, a, b)) or read(r, a, b))
            item = part[i]
            np.testing.assert_array_equal(item["tokens"].reshape(segments, size, 1), expected[:, j])
            assert item["length"] == stop - start
            samples = start + np.add.outer(np.arange(segments) * stride + j * size, np.arange(size))
            wanted = samples[samples < stop]
            spans = [np.arange(a, b) for r, a, b in asked if r == recording]
            got = np.concatenate(spans) if spans else np.arange(0)
            assert len(spans) == len(asked) and np.isin(wanted, got).all()
            assert set(got // RECORD_LENGTH) == set(wanted // RECORD_LENGTH)
            if segments == 1:
                np.testing.assert_array_equal(got, wanted)
            monkeypatch.undo()


def test_shards_of_an_evaluation_are_together_the_whole(dataset):
    split = dataset.split("train")

    def lengths(**shard):
        batches = evaluation_batches(split, batch_size=2, segment_length=100, reset_every=300, **shard)
        return [int(n) for batch in batches for n in batch.lengths if n]

    shares = [lengths(shard=(i, 3)) for i in range(3)]
    assert (
        sorted(n for share in shares for n in share) == sorted(lengths())
        and sum(map(sum, shares)) == split.lengths.sum()
    )


def test_crop_takes_the_beginning(dataset):
    split = dataset.split("train")
    windows = Windows(split, 500, crop=300)
    assert len(windows) == len(split.recordings)
    for i, length in enumerate(split.lengths):
        assert windows.locate(i) == (i, 0, min(300, length))


def take(iterator, n):
    return [next(iterator) for _ in range(n)]


def rows_of(batches):
    return [(bytes(t), int(n)) for b in batches for t, n in zip(b["tokens"], b["length"], strict=True)]


def test_an_epoch_shows_every_window_once_and_the_next_in_another_order(dataset):
    windows = Windows(dataset.split("train"), 500)
    n = len(windows)
    rows = rows_of(take(train_batches(dataset, config()), 2 * n // 4 + 1))
    everything = sorted((bytes(w["tokens"]), int(w["length"])) for w in (windows[i] for i in range(n)))
    assert sorted(rows[:n]) == everything and sorted(rows[n : 2 * n]) == everything
    assert rows[:n] != rows[n : 2 * n]


@pytest.mark.parametrize("threads", [1, 8])
def test_order_depends_on_the_seed_alone(dataset, threads):
    reference = rows_of(take(train_batches(dataset, config()), 9))
    assert rows_of(take(train_batches(dataset, config(data__threads=threads)), 9)) == reference
    assert rows_of(take(train_batches(dataset, config(seed=1)), 9)) != reference


def test_state_restores_exactly_and_goes_through_json(dataset):
    batches = train_batches(dataset, config())
    take(batches, 7)
    state = json.loads(json.dumps(batches.get_state()))
    expected = rows_of(take(batches, 5))
    other = train_batches(dataset, config(data__threads=1, data__prefetch=1))
    other.set_state(state)
    assert rows_of(take(other, 5)) == expected


@pytest.mark.parametrize("shards", [2, 4])
def test_shards_together_read_what_one_reads(dataset, shards):
    whole = take(train_batches(dataset, config()), 6)
    parts = [take(train_batches(dataset, config(), shard=(i, shards)), 6) for i in range(shards)]
    for step, batch in enumerate(whole):
        assert list(batch["row"]) == [0, 1, 2, 3]
        for part in parts:
            for row, tokens, length in zip(*(part[step][k] for k in ("row", "tokens", "length")), strict=True):
                np.testing.assert_array_equal(tokens, batch["tokens"][row])
                assert length == batch["length"][row]


def test_shards_must_divide_the_batch(dataset):
    with pytest.raises(UserError, match="global_batch_size=4 cannot be divided among 3"):
        train_batches(dataset, config(), shard=(0, 3))


@pytest.mark.parametrize(
    ("batch_size", "segment", "reset", "crop"), [(3, 100, 0, 0), (5, 999, 250, 0), (1, 64, 0, 500)]
)
def test_evaluation_streams_every_sample_once(dataset, batch_size, segment, reset, crop):
    split = dataset.split("train")
    streams = []
    for batch in evaluation_batches(
        split, batch_size=batch_size, segment_length=segment, reset_every=reset, crop_length=crop
    ):
        tokens = np.concatenate(list(batch.segments), axis=1)
        assert len(tokens) == batch_size and tokens.shape[1] >= batch.lengths.max() > tokens.shape[1] - segment
        streams += [bytes(row[:n]) for row, n in zip(tokens, batch.lengths, strict=True) if n]
    expected = []
    for i, length in enumerate(split.lengths):
        whole = split.read(i, 0, min(length, crop or length))
        step = reset or len(whole)
        expected += [bytes(whole[s : s + step]) for s in range(0, len(whole), step)]
    assert sorted(streams) == sorted(expected)


def test_evaluation_of_a_part(dataset):
    split = dataset.split("train")
    batches = list(evaluation_batches(split, batch_size=2, segment_length=100, limit=3))
    assert sum((b.lengths > 0).sum() for b in batches) == 3


def test_another_encoding_is_refused(dataset):
    with pytest.raises(UserError, match=r"encoding=mu_law, but the config says data.encoding=linear"):
        train_batches(dataset, config(data__encoding="linear"))


def test_absent_and_damaged_data_sets_are_refused(folder, tmp_path):
    import shutil

    with pytest.raises(UserError, match=r"manifest.json is missing.*python -m pipelines.prepare"):
        Dataset(tmp_path / "nothing")
    copy = tmp_path / "copy"

    def fresh():
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(folder, copy)
        return sorted(copy.glob("train-*.array_record"))[0]

    with pytest.raises(UserError, match="unknown split 'dev'"):
        Dataset(folder).split("dev")
    fresh().unlink()
    with pytest.raises(UserError, match=r"array_record is missing"):
        Dataset(copy).split("train")
    shard = fresh()
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(UserError, match="bytes, not the"):
        Dataset(copy).split("train")
    fresh()
    next(copy.glob("train-*.jsonl")).write_text("{}\n")
    with pytest.raises(UserError, match=r"recordings.jsonl is missing or damaged"):
        Dataset(copy).split("train")
    fresh()
    (copy / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match=r"manifest.json cannot be read"):
        Dataset(copy)


def test_a_flipped_byte_is_noticed(folder, tmp_path):
    """Wherever in a record's tokens: the error names the shard and the recording, and nothing else is refused."""
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    whole = Dataset(folder).split("train")
    shard = sorted(copy.glob("train-*.array_record"))[0]
    data, victim = bytearray(shard.read_bytes()), 2
    place = data.index(whole.read(victim)[:RECORD_LENGTH].tobytes())
    data[place + 300] ^= 0x55
    shard.write_bytes(data)
    split = Dataset(copy).split("train")
    name = split.recordings[victim].id
    with pytest.raises(UserError, match=rf"{shard.name} in .* is damaged at recording {name}, sample 0 \(.*again$"):
        split.read(victim)
    for i in set(range(len(split.recordings))) - {victim}:
        np.testing.assert_array_equal(split.read(i), whole.read(i))


def test_manifest_counts_what_is_there(dataset):
    for name, split in dataset.manifest.splits.items():
        lengths = dataset.split(name).lengths
        assert (split.recordings, split.samples) == (len(lengths), lengths.sum())
    assert dataclasses.asdict(dataset.manifest)["record_length"] == RECORD_LENGTH
