"""Decoding, resampling, quantising, cutting and the Beam steps, as plain functions."""

import io
import signal
import struct

import numpy as np
import pytest
import soundfile
import soxr

from harmonic import audio, records
from harmonic.errors import UserError
from harmonic.records import Manifest, Shard, Skipped, Split
from pipelines import transforms
from pipelines.array_record_io import WrittenShard
from pipelines.sources import SourceRecording, data_set, open_source
from pipelines.stores import Unreadable


def noise(*shape, seed=0):
    return np.random.default_rng(seed).normal(0, 0.1, shape).astype(np.float32)


def encoded(samples, rate=16_000, format="WAV", subtype=None):
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=format, subtype=subtype)
    return file.getvalue()


def decode_all(data):
    rate, blocks = transforms.decode(io.BytesIO(data))
    return rate, np.concatenate(list(blocks))


@pytest.mark.parametrize("channels", [1, 2, 6])
@pytest.mark.parametrize("rate", [8_000, 11_025, 16_000, 44_100, 96_000])
@pytest.mark.parametrize(
    ("format", "subtype"), [("WAV", "PCM_16"), ("WAV", "FLOAT"), ("FLAC", "PCM_24"), ("OGG", None)]
)
def test_streaming_equals_the_whole(monkeypatch, format, subtype, rate, channels):
    data = encoded(noise(rate // 2, channels), rate, format, subtype)
    whole, _ = soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)
    whole = soxr.resample(whole.mean(axis=1, dtype=np.float32), rate, 16_000, quality="HQ")
    results = []
    for block in (1 << 17, 6_000, 1_234):
        monkeypatch.setattr(transforms, "_BLOCK_VALUES", block)
        source_rate, streamed = decode_all(data)
        assert source_rate == rate and streamed.dtype == np.float32 and streamed.ndim == 1
        results.append(streamed)
    assert abs(len(whole) - 8_000) <= 1
    np.testing.assert_allclose(results[0], whole, atol=1e-6)
    for other in results[1:]:
        np.testing.assert_array_equal(other, results[0])


def test_samples_at_16_khz_pass_unchanged():
    samples = np.array([0, 100, -32_768, 32_767], np.int16)
    _, decoded = decode_all(encoded(samples))
    np.testing.assert_array_equal(decoded, samples.astype(np.float32) / 32_768)


@pytest.mark.parametrize("rate", [1_000, 768_000])
def test_extreme_rates(rate):
    _, decoded = decode_all(encoded(noise(rate), rate))
    assert len(decoded) == 16_000


def test_mp3():
    rate, decoded = decode_all(encoded(noise(44_100), 44_100, "MP3"))
    assert rate == 44_100 and len(decoded) == 16_000


WHOLE = encoded(noise(20_000))
OGG = encoded(noise(60_000), format="OGG")


def with_data_size(data, size):
    at = data.index(b"data")
    return data[: at + 4] + struct.pack("<I", size) + data[at + 8 :]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "is empty"),
        (b"text, and no audio at all" * 10, "is not audio that can be read: Format not recognised."),
        (WHOLE[:30], "is not audio that can be read"),
        (WHOLE[:-1], r"is cut short: 40043 bytes, and its header claims 40044"),
        (WHOLE[: len(WHOLE) // 2], "is cut short"),
        (encoded(noise(20_000), format="RF64")[:-2], "is cut short"),
        (encoded(noise(20_000), format="AIFF")[:-2], "is cut short"),
        (encoded(noise(20_000), format="W64")[:-2], "is cut short"),
        (encoded(noise(20_000), format="AU")[:-2], "is cut short"),
        (encoded(noise(20_000), format="FLAC")[:-5], "cannot be decoded after"),
        (OGG[:-10], "is cut short: its last page is not whole"),
        (encoded(noise(60_000), format="OGG", subtype="OPUS")[:-900], "is cut short: its last page is not whole"),
        (OGG[: OGG.rindex(b"OggS")], "is cut short: its last page does not end the stream"),
        (encoded(noise(60_000), format="MP3")[:8_000], "is cut short: .* samples of 60000"),
        (encoded(noise(0)), "holds no samples"),
        (encoded(noise(10), 768_000), "holds no samples"),  # resampled, a fifth of a sample
        (encoded(noise(100), 999), "has a sample rate of 999 Hz, not between 1000 and 768000"),
        (encoded(noise(100), 768_001), "has a sample rate of 768001 Hz"),
        (
            encoded(np.array([0, np.nan], "f4"), subtype="FLOAT"),
            r"holds samples that are not finite \(NaN or infinity\)",
        ),
        (encoded(np.array([0, np.inf], "f4"), subtype="FLOAT"), "not finite"),
        (encoded(np.array([0, 1e300]), subtype="DOUBLE"), "not finite"),
        (encoded(np.array([-3e38, 3e38], "f4"), subtype="FLOAT"), "too large"),
    ],
    ids=lambda value: "" if isinstance(value, bytes) else value[:30],  # libsndfile writes the date into some
)
@pytest.mark.filterwarnings("ignore:overflow")
def test_recordings_that_cannot_be_read(data, reason):
    with pytest.raises(Unreadable, match=reason) as error, transforms.measure(io.BytesIO(data)):
        pass
    assert "\n" not in str(error.value) and "0x" not in str(error.value)  # no addresses: reasons stand in the manifest


@pytest.mark.parametrize("size", [0xFFFFFFFF, 0x7FFFFFFF])
def test_a_wav_that_was_written_to_a_pipe_is_whole(size):
    """Such a header claims the largest size, or none: no sign of a file cut short."""
    _, decoded = decode_all(with_data_size(WHOLE, size))
    assert len(decoded) == 20_000


@pytest.mark.parametrize("at", [1, 12, 16])
def test_an_interrupt_in_the_middle_of_a_read_is_not_lost(at):
    class Interrupted(io.BytesIO):
        reads = 0

        def readinto(self, buffer):  # libsndfile's callback, which drops what is raised in it
            self.reads += 1
            if self.reads == at:
                signal.raise_signal(signal.SIGINT)
            return super().readinto(buffer)

    file = Interrupted()
    soundfile.write(file, np.zeros(1_000_000), 16_000, format="WAV")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            list(transforms.decode(file)[1])
    finally:
        signal.signal(signal.SIGINT, before)
    assert file.reads >= at


def test_a_header_of_endless_chunks_is_given_up():
    data = b"RIFF" + struct.pack("<I", 1 << 20) + b"WAVE" + b"junk\0\0\0\0" * 100_000
    with pytest.raises(Unreadable):
        decode_all(data)


@pytest.mark.parametrize(("encoding", "num_levels"), [("mu_law", 256), ("linear", 256), ("linear", 65_536)])
def test_pieces_equal_the_whole_quantised(monkeypatch, encoding, num_levels):
    samples = noise(10_000) + 0.3
    for block in (1 << 17, 999):
        monkeypatch.setattr(transforms, "_BLOCK_VALUES", block)
        with transforms.measure(io.BytesIO(encoded(samples, subtype="FLOAT"))) as waveform:
            assert (waveform.length, waveform.source_rate) == (10_000, 16_000)
            assert (waveform.low, waveform.high) == (samples.min(), samples.max())
            pieces = list(waveform.pieces(encoding, num_levels, 3_000))
        assert [offset for offset, _ in pieces] == [0, 3_000, 6_000, 9_000]
        assert [tokens.shape for _, tokens in pieces] == [(3_000, 1)] * 3 + [(1_000, 1)]
        tokens = np.concatenate([tokens for _, tokens in pieces])[:, 0]
        np.testing.assert_array_equal(tokens, audio.encode(samples, encoding, num_levels=num_levels))


def listing(sizes, split="train"):
    return [SourceRecording(f"{split}{i}.wav", split, None, size) for i, size in enumerate(sizes)]


def test_number_of_shards():
    recordings = listing([100] * 40) + listing([10], "validation") + listing([1_000] * 3, "test")
    counts = transforms.shard_counts(recordings, shard_bytes=1_000)
    assert counts["train"] == 4 and counts["validation"] == 1 and 1 <= counts["test"] <= 3
    assert counts == transforms.shard_counts(recordings[::-1], shard_bytes=1_000)
    for wanted in (1, 2, 7, 40, 1_000):
        counts = transforms.shard_counts(recordings, 1_000, wanted)
        assert all(1 <= count <= wanted for count in counts.values())
        for split in counts:  # no shard is empty
            used = {transforms.shard_of(r, counts) for r in recordings if r.split == split}
            assert used == {(split, shard) for shard in range(counts[split])}
    recording = SourceRecording("123456789", "test", None, 0)  # its CRC-32 is known: CBF43926
    assert list(transforms.KeyByShard({"test": 5}).process(recording)) == [(("test", 0xCBF43926 % 5), recording)]


MANIFEST = Manifest("mine", "a.zip", "f", 16_000, "mu_law", 256, "uint8", 1, 128_000, 131_072, {})


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
    manifest = transforms.assemble(MANIFEST, sorted(shards, key=lambda s: s.shard.file))
    assert list(manifest.splits) == list(records.SPLITS)
    assert manifest.splits["train"] == Split(5, 5, 14, (shards[2].shard, shards[1].shard))
    assert [s.recording for s in manifest.skipped] == ["a", "b"]
    listed = {"train": 7, "validation": 1, "test": 1}
    transforms.check_counts(manifest, listed)
    for split in listed:
        for lost in (1, -1):
            with pytest.raises(UserError, match=f"the runner lost recordings of split {split}"):
                transforms.check_counts(manifest, listed | {split: listed[split] + lost})


def test_skipped_recordings_stop_a_complete_data_set():
    shards = [
        written("test", 0, 1),
        written("train", 0, 1, ["1.wav", "2.wav", "3.wav", "4.wav"]),
        written("validation", 0, 1),
    ]
    manifest = transforms.assemble(MANIFEST, shards)
    transforms.check_skipped(manifest, complete=False)
    with pytest.raises(
        UserError, match=r"4 recordings of mine cannot be read: 1.wav is empty; .*3.wav is empty; ...; get"
    ):
        transforms.check_skipped(manifest, complete=True)
    nothing = transforms.assemble(MANIFEST, [*shards[1:], written("test", 0, 0, ["5.wav"])])
    with pytest.raises(UserError, match=r"none of the recordings of split test can be read: 5.wav is empty"):
        transforms.check_skipped(nothing, complete=False)


def test_a_shard_is_in_natural_order_and_whole(tmp_path):
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    for i in (10, 9, 2):
        (tmp_path / f"{i}.wav").write_bytes(encoded(noise(1_000 * i, 2, seed=i)))
    (tmp_path / "3.wav").write_bytes(WHOLE[:100])
    source = open_source(data_set("mine"), str(tmp_path))
    recordings = source.list()
    step = transforms.WriteShard(source, {"train": 1}, MANIFEST, str(tmp_path / "out"), "0" * 32, None)
    results = [list(step.process((("train", 0), order))) for order in (recordings, recordings[::-1])]
    (first,), (second,) = results
    assert first.shard == second.shard and first.staged != second.staged
    assert first.skipped == (Skipped("3.wav", "train", "is cut short: 100 bytes, and its header claims 40044"),)
    assert (first.shard.recordings, first.shard.records, first.shard.samples) == (3, 3, 21_000)
    read = [records.decode_record(data) for data in ArrayRecordDataSource(first.staged[0])]
    assert [record.recording for record in read] == ["2.wav", "9.wav", "10.wav"]
    mono = soundfile.read(tmp_path / "9.wav", dtype="float32")[0].mean(axis=1, dtype=np.float32)
    np.testing.assert_array_equal(read[1].tokens[:, 0], audio.encode(mono, "mu_law"))
