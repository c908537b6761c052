"""Decoding, resampling, trimming, normalising and quantising, as plain functions over files."""

import io
import signal
import struct
import tempfile

import hypothesis
import librosa
import numpy as np
import pytest
import soundfile
import soxr
from hypothesis import strategies as st
from sounds import encoded, noise

from harmonic import audio
from harmonic.errors import Unreadable
from harmonic.sound import decode
from harmonic.sound.resample import mono
from pipelines.audio import quantise
from pipelines.audio.waveform import measure


def decoded(file):
    sound = decode.decode(file)
    return sound.rate, mono(sound.blocks, sound.rate)


def decode_all(data):
    rate, blocks = decoded(io.BytesIO(data))
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
        monkeypatch.setattr(decode, "_BLOCK_VALUES", block)
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


def whole(data):
    """(rate, samples at 16 kHz, notes), the same from memory, from a disk, and whatever the blocks."""
    results = []
    for block, disk in ((1 << 17, False), (1 << 17, True), (999, False)):
        with pytest.MonkeyPatch.context() as monkeypatch, tempfile.TemporaryFile() as file:
            monkeypatch.setattr(decode, "_BLOCK_VALUES", block)
            file.write(data)
            file.flush()
            sound = decode.decode(file if disk else io.BytesIO(data))
            results.append((sound.rate, np.concatenate(list(mono(sound.blocks, sound.rate))), sound.notes))
    for rate, samples, notes in results[1:]:
        assert (rate, notes) == (results[0][0], results[0][2])
        np.testing.assert_array_equal(samples, results[0][1])
    return results[0]


def chunk(name, data):
    return name + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2)


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
        (WHOLE[:-500], r"is cut short: 39544 bytes, and its header claims 40044"),
        (WHOLE[: len(WHOLE) // 2], "is cut short"),
        (encoded(noise(20_000), format="RF64")[:-500], "is cut short"),
        (encoded(noise(20_000), format="AIFF")[:-500], "is cut short"),
        (encoded(noise(20_000), format="W64")[:-500], "is cut short"),
        (encoded(noise(20_000), format="AU")[:-500], "is cut short"),
        (encoded(noise(20_000), format="CAF")[:-500], "is cut short"),
        (encoded(noise(20_000), format="FLAC")[:-5], "is cut short: 16384 samples of 20000"),
        (OGG[:-10], "is cut short: its last page is not whole"),
        (encoded(noise(60_000), format="OGG", subtype="OPUS")[:-900], "is cut short: its last page is not whole"),
        (encoded(noise(60_000), format="MP3")[:8_000], "is cut short: 30575 samples of 61632"),
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
    with pytest.raises(Unreadable, match=reason) as error, measure(io.BytesIO(data)):
        pass
    assert "\n" not in str(error.value) and "0x" not in str(error.value)  # no addresses: reasons stand in the manifest


@pytest.mark.parametrize("format", ["WAV", "AIFF", "W64", "AU", "CAF", "RF64"])
def test_a_few_samples_less_are_read_and_told(format):
    rate, samples, notes = whole(encoded(noise(20_000), format=format)[:-2])
    assert (rate, len(samples)) == (16_000, 19_999)
    assert len(notes) == 1 and "2 bytes shorter than its header claims" in notes[0]
    np.testing.assert_array_equal(samples, whole(WHOLE)[1][:-1])


def test_an_ogg_file_that_does_not_end_is_read_and_told():
    _, samples, notes = whole(OGG[: OGG.rindex(b"OggS")])
    assert 50_000 < len(samples) < 60_000 and notes == ["does not say that it is whole: its last page has no end flag"]


# Headers that do not know, or miscount, what follows them: what is there is read to its end.

PIPES = [0, 0x7F000008, 0x7FFFFFFF, 0x80000000, 0xFFFFF000, 0xFFFFFFDB, 0xFFFFFFFF]


@pytest.mark.parametrize("size", PIPES)
@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24", "FLOAT"])
def test_a_wav_that_was_written_to_a_pipe_is_whole(subtype, size):
    data = encoded(noise(20_000), subtype=subtype)
    expected = soundfile.read(io.BytesIO(data), dtype="float32")[0]
    _, samples, notes = whole(with_data_size(data, size))
    assert notes == []
    np.testing.assert_array_equal(samples, expected)


@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24"])
@pytest.mark.parametrize("silent", [False, True])
def test_a_recorder_that_crashed_before_it_counted(subtype, silent):
    """Padding chunks as phones write them, a count of 0, and perhaps silence at the beginning."""
    samples = noise(30_000)
    samples[:20_000] *= not silent
    data = encoded(samples, subtype=subtype)
    at = data.index(b"data")
    data = data[:12] + chunk(b"JUNK", b"\0" * 28) + data[12:at] + chunk(b"FLLR", b"\0" * 4_000) + data[at:]
    _, read, notes = whole(with_data_size(data, 0))
    assert len(read) == 30_000 and notes == []
    np.testing.assert_array_equal(read, whole(encoded(samples, subtype=subtype))[1])


@pytest.mark.parametrize("subtype", ["PCM_16", "FLOAT"])
@pytest.mark.parametrize("more", [16, 44])
def test_a_recorder_that_counts_its_header(subtype, more):
    data = encoded(noise(800), subtype=subtype)
    size = struct.unpack("<I", data[data.index(b"data") + 4 :][:4])[0]
    _, samples, notes = whole(with_data_size(data, size + more))
    assert len(samples) == 800 and notes == [f"is {more} bytes shorter than its header claims"]


@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24"])
@pytest.mark.parametrize("part", [0.5, 0.1])
def test_a_header_that_counts_too_few(subtype, part):
    """Half of the samples, or what is left of a size that was wrapped at 4 GiB."""
    data = encoded(noise(20_000), subtype=subtype)
    bytes_ = 20_000 * (2 if subtype == "PCM_16" else 3)
    _, samples, notes = whole(with_data_size(data, int(part * bytes_)))
    np.testing.assert_array_equal(samples, whole(data)[1])
    assert notes == [f"holds {bytes_} bytes of samples, and its header counts {int(part * bytes_)}"]


@pytest.mark.parametrize(
    "tail",
    [
        chunk(b"LIST", b"INFOISFT" + struct.pack("<I", 6) + b"Lavf60"),
        chunk(b"abcd", b"\1" * 100),
        chunk(b"LIST", b"INFO")[:6] + b"\0\1INFO",  # with a size of its own that is wrong
        b"TAG" + b"\x55" * 125,
        b"\0" * 4_096,
        b"\1",
    ],
    ids=["LIST", "abcd", "LIST that is cut", "ID3v1", "padding", "a byte"],
)
def test_what_follows_the_samples_is_no_sound(tail):
    _, samples, notes = whole(WHOLE + tail)
    assert len(samples) == 20_000 and notes == []


@pytest.mark.parametrize("format", ["AIFF", "W64", "AU", "CAF", "RF64"])
def test_other_formats_written_to_a_pipe(format):
    data = bytearray(encoded(noise(20_000), format=format))
    name, offset, layout, value = {
        "AIFF": (b"SSND", 4, ">I", 0x7F000008),  # as sox writes it
        "W64": (b"data", 16, "<Q", 0x7FFFFFFFFFFFFFFF),
        "AU": (b".snd", 8, ">I", 0xFFFFFFFF),
        "CAF": (b"data", 4, ">q", -1),
        "RF64": (b"ds64", 16, "<Q", 0xFFFFFFFFFFFFFFFF),
    }[format]
    if format == "W64":
        data[16:24] = b"\xff" * 8
    struct.pack_into(layout, data, data.index(name) + offset, value)
    _, samples, notes = whole(bytes(data))
    assert notes == []
    np.testing.assert_array_equal(samples, whole(WHOLE)[1])


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
    soundfile.write(file, np.zeros(1_000_000), 16_000, format="WAV", subtype="FLOAT")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            list(decoded(file)[1])
    finally:
        signal.signal(signal.SIGINT, before)
    assert file.reads >= at


@hypothesis.given(
    chunks=st.lists(
        st.tuples(st.sampled_from([b"LIST", b"JUNK", b"bext"]), st.binary(max_size=40), st.booleans()), max_size=4
    ),
    form=st.tuples(st.sampled_from([1, 1, 1, 3, 6, 7]), st.integers(1, 3), st.sampled_from([8_000, 16_000])),
    bits=st.sampled_from([16, 16, 16, 8, 24, 32]),
    extra=st.sampled_from([b"", b"\0\0", b"\0" * 24]),
    data=st.binary(max_size=400),
    far=st.sampled_from([0, 0, 70_000]),
)
def test_wav_files_of_any_layout_are_read_as_libsndfile_reads_them(chunks, form, bits, extra, data, far):
    tag, channels, rate = form
    width = channels * bits // 8
    layout = struct.pack("<HHIIHH", tag, channels, rate, rate * width, width, bits) + extra
    before = b"".join(chunk(name, content) for name, content, first in chunks if first) + chunk(b"JUNK", b"\1" * far)
    after = b"".join(chunk(name, content) for name, content, first in chunks if not first)
    body = b"WAVE" + before + chunk(b"fmt ", layout) + after + chunk(b"data", data)
    file = b"RIFF" + struct.pack("<I", len(body)) + body
    try:
        expected, expected_rate = soundfile.read(io.BytesIO(file), dtype="float32", always_2d=True)
    except soundfile.LibsndfileError:
        hypothesis.assume(False)
    hypothesis.assume(len(expected) and np.isfinite(expected).all())
    for block in (1 << 17, 7):
        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setattr(decode, "_BLOCK_VALUES", block)
            found_rate, blocks = decoded(io.BytesIO(file))
            mono = np.concatenate(list(blocks))
        assert found_rate == expected_rate
        if rate == 16_000:
            np.testing.assert_array_equal(mono, expected.mean(axis=1, dtype=np.float32))


@pytest.mark.parametrize("length", [100, 32_700, 200_000])
@pytest.mark.parametrize("channels", [1, 2])
def test_the_usual_wav_file_needs_no_libsndfile(tmp_path, monkeypatch, channels, length):
    samples = (32_767 * noise(length, channels)).astype(np.int16)
    soundfile.write(tmp_path / "a.wav", samples, 16_000)
    expected, _ = soundfile.read(tmp_path / "a.wav", dtype="float32", always_2d=True)
    monkeypatch.setattr(decode, "_open", None)
    with open(tmp_path / "a.wav", "rb") as file:
        rate, blocks = decoded(file)
        np.testing.assert_array_equal(np.concatenate(list(blocks)), expected.mean(axis=1, dtype=np.float32))
    assert rate == 16_000


@pytest.mark.parametrize("format", ["FLAC", "OGG", "MP3", "AIFF"])
def test_files_of_a_disk_are_read_as_those_in_memory(tmp_path, format):
    data = encoded(noise(300_000), 22_050, format)
    (tmp_path / "a").write_bytes(data)
    with open(tmp_path / "a", "rb") as file:
        rate, blocks = decoded(file)
        np.testing.assert_array_equal(np.concatenate(list(blocks)), decode_all(data)[1])
    assert rate == 22_050


def test_a_header_of_endless_chunks_is_given_up():
    data = b"RIFF" + struct.pack("<I", 1 << 20) + b"WAVE" + b"junk\0\0\0\0" * 100_000
    with pytest.raises(Unreadable):
        decode_all(data)


@pytest.mark.parametrize(("encoding", "num_levels"), [("mu_law", 256), ("linear", 256), ("linear", 65_536)])
def test_pieces_equal_the_whole_quantised(monkeypatch, encoding, num_levels):
    samples = noise(10_000) + 0.3
    for block in (1 << 17, 999):
        monkeypatch.setattr(decode, "_BLOCK_VALUES", block)
        monkeypatch.setattr(quantise, "_BLOCK_SAMPLES", block)
        with measure(io.BytesIO(encoded(samples, subtype="FLOAT"))) as waveform:
            assert (waveform.length, waveform.source_rate) == (10_000, 16_000)
            assert (waveform.low, waveform.high) == (samples.min(), samples.max())
            pieces = list(waveform.pieces(encoding, num_levels, 3_000))
        assert [offset for offset, _ in pieces] == [0, 3_000, 6_000, 9_000]
        assert [tokens.shape for _, tokens in pieces] == [(3_000, 1)] * 3 + [(1_000, 1)]
        tokens = np.concatenate([tokens for _, tokens in pieces])[:, 0]
        np.testing.assert_array_equal(tokens, audio.encode(samples, encoding, num_levels=num_levels))


def test_trimmed_samples_are_quantised_by_what_is_left():
    """The cut ends hold the extremes' opposite: a click that is too short to be loud."""
    samples = np.concatenate([np.zeros(20_000), noise(30_000), np.zeros(9_000)]).astype(np.float32)
    samples[10] = -0.6  # below the level of its frame
    kept, (start, stop) = librosa.effects.trim(samples, top_db=6)
    with measure(io.BytesIO(encoded(samples, subtype="FLOAT")), trim_silence=6) as waveform:
        assert waveform.cut == (start, len(samples) - stop) and waveform.length == len(kept) < 32_000
        assert (waveform.low, waveform.high) == (kept.min(), kept.max()) and waveform.low > -0.6
        assert waveform.level == pytest.approx(20 * np.log10(np.sqrt(np.mean(kept.astype("f8") ** 2))), abs=0.006)
        tokens = np.concatenate([piece for _, piece in waveform.pieces("mu_law", 256, 4_096)])[:, 0]
    np.testing.assert_array_equal(tokens, audio.encode(kept, "mu_law"))


@pytest.mark.parametrize("block", [1 << 17, 1_234])
def test_loudness_has_its_effect_on_the_tokens(monkeypatch, block):
    """By their own extremes, a recording and a quieter copy of it have the same tokens: one scale tells them apart."""
    monkeypatch.setattr(decode, "_BLOCK_VALUES", block)
    monkeypatch.setattr(quantise, "_BLOCK_SAMPLES", block)
    samples = noise(40_000)
    levels_of = {}
    for scale in (1.0, 0.01):
        for loudness in (None, -20, -30):
            data = encoded((samples * np.float32(scale)).astype(np.float32), subtype="FLOAT")
            with measure(io.BytesIO(data), loudness=loudness) as waveform:
                tokens = np.concatenate([piece for _, piece in waveform.pieces("linear", 65_536, 7_000)])[:, 0]
                decoded = audio.decode(tokens, "linear", num_levels=65_536)
                levels_of[scale, loudness] = np.sqrt(np.mean(decoded.astype(np.float64) ** 2))
                if loudness is not None:
                    assert (waveform.low, waveform.high) == (-1 / waveform.gain, 1 / waveform.gain)
                    restored = decoded * waveform.high
                    np.testing.assert_allclose(restored, samples * scale, atol=scale * 1e-3)
    for loudness in (None, -20, -30):
        assert levels_of[1.0, loudness] == pytest.approx(levels_of[0.01, loudness], rel=2e-3)
    assert levels_of[1.0, -20] / levels_of[1.0, -30] == pytest.approx(10**0.5, rel=2e-3)


def test_nothing_is_clipped_for_loudness():
    samples = np.zeros(16_000, np.float32)
    samples[::4_000] = [0.1, -0.5, 0.2, 0.1]
    with measure(io.BytesIO(encoded(samples, subtype="FLOAT")), loudness=0) as waveform:
        assert waveform.gain == 2.0
        tokens = np.concatenate([piece for _, piece in waveform.pieces("mu_law", 256, 7_000)])[:, 0]
    assert (tokens[4_000], tokens[1]) == (0, 127) and tokens.max() < 255
