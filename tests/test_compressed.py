"""Compressed recordings: all that is there is decoded, nothing else is opened, and what is missing is told."""

import fractions
import io
import signal
import struct

import av
import numpy as np
import pytest
import soundfile
from sounds import by_ffmpeg, encoded, noise, of_unknown_length, with_picture

from harmonic.errors import Unreadable
from harmonic.sound import decode, ffmpeg


def whole(data, block=1 << 17):
    """(rate, samples [time, channels], notes)"""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(decode, "_BLOCK_VALUES", block)
        sound = decode.decode(io.BytesIO(data))
        return sound.rate, np.concatenate(list(sound.blocks)), sound.notes


def by_libsndfile(data):
    return soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)[0]


@pytest.mark.parametrize("channels", [1, 2, 6])
@pytest.mark.parametrize("rate", [8_000, 44_100])
@pytest.mark.parametrize(
    ("format", "subtype"), [("FLAC", "PCM_16"), ("FLAC", "PCM_24"), ("OGG", "VORBIS"), ("MP3", None)]
)
@pytest.mark.parametrize("length", [3_000, 200_001])
def test_as_libsndfile_decodes_them(format, subtype, rate, channels, length):
    """Two decoders of one standard: lossless the same bits, lossy the same but for rounding."""
    if format == "MP3" and channels > 2:
        return
    data = encoded(noise(length, channels), rate, format, subtype)
    found_rate, samples, notes = whole(data)
    assert found_rate == rate and notes == [] and samples.shape == (length, channels)
    # libsndfile leaves Vorbis's six channels in another order; they are mixed to one.
    ordered = np.sort if format == "OGG" else np.array
    expected = ordered(by_libsndfile(data))
    np.testing.assert_allclose(ordered(samples), expected, atol=0 if format == "FLAC" else 1e-5)
    for block in (999, 10_000):
        np.testing.assert_array_equal(whole(data, block)[1], samples)


VBR = {"write_xing": "0", "id3v2_version": "0", "q": "5", "flags": "+qscale", "global_quality": "590"}
CBR = {"write_xing": "0", "id3v2_version": "0", "b": "48000"}


def speech(seconds, rate):
    """Quiet, then loud: a variable rate that the first frames do not tell."""
    samples = noise(seconds * rate)
    samples[: rate // 2] *= 0.001
    return samples


@pytest.mark.parametrize("options", [VBR, CBR], ids=["variable", "constant"])
@pytest.mark.parametrize("picture", [False, True])
@pytest.mark.parametrize("rate", [44_100, 16_000])
def test_an_mp3_without_a_header_is_read_to_its_end(rate, picture, options):
    """FFmpeg and libsndfile can but estimate its length from its first frames."""
    data = by_ffmpeg(speech(14, rate), rate, "mp3", "libmp3lame", **options)
    assert not any(name in data[:400] for name in (b"Xing", b"Info"))
    found, samples, notes = whole(with_picture(data) if picture else data)
    assert found == rate and notes == [] and 14 * rate <= len(samples) < 14 * rate + 3 * 1_152
    # The sound itself, delayed by the encoder and the decoder.
    late = len(samples) - rate
    assert np.abs(samples[late - rate // 2 : late]).mean() > 0.05


@pytest.mark.parametrize("claim", [None, 0, 0xFFFFFFFF])
def test_mp3_in_a_wav_file(claim):
    data = bytearray(by_ffmpeg(noise(64_000), 16_000, "wav", "libmp3lame", b="48000"))
    if claim is not None:
        struct.pack_into("<I", data, data.index(b"data") + 4, claim)
    rate, samples, notes = whole(bytes(data))
    assert rate == 16_000 and notes == [] and 64_000 <= len(samples) < 64_000 + 3 * 1_152


def test_pcm_of_more_than_4_gib_is_for_ffmpeg():
    """Its size does not fit into the header: FFmpeg reads to the end of the file, libsndfile would stop at 4 GiB."""
    data = encoded(noise(20_000), subtype="PCM_24")
    at = data.index(b"data") + 4
    head = decode.read_head(io.BytesIO(data))._replace(patch=(at, b"\xff" * 4))
    rate, blocks = decode._open(io.BytesIO(data[:at] + b"\1\0\0\0" + data[at + 4 :]), head, [])
    assert rate == 16_000
    np.testing.assert_array_equal(np.concatenate(list(blocks)), by_libsndfile(data))


@pytest.mark.parametrize("kind", ["MP3 in WAV", "m4a", "MP3"])
def test_files_of_a_disk_are_read_as_those_in_memory(tmp_path, kind):
    """libsndfile looks at them first, through the file's descriptor."""
    format, codec = {"MP3 in WAV": ("wav", "libmp3lame"), "m4a": ("mp4", "aac"), "MP3": ("mp3", "libmp3lame")}[kind]
    data = by_ffmpeg(noise(200_000), 16_000, format, codec, b="64000")
    for content in (data, b"\0" * 700 + data):
        (tmp_path / "a").write_bytes(content)
        with open(tmp_path / "a", "rb") as file:
            if kind != "MP3" and content is not data:
                continue
            np.testing.assert_array_equal(np.concatenate(list(decode.decode(file).blocks)), whole(content)[1])


def test_tags_may_be_in_any_encoding():
    data = encoded(noise(20_000))
    tag = b"ISFT" + struct.pack("<I", 4) + b"\xff\xe9\xfc\0"
    tagged = bytearray(by_ffmpeg(noise(64_000), 16_000, "wav", "libmp3lame", b="48000"))
    at = tagged.index(b"data")
    tagged[at:at] = b"LIST" + struct.pack("<I", 4 + len(tag)) + b"INFO" + tag
    assert len(whole(bytes(tagged))[1]) >= 64_000
    assert len(whole(data + b"LIST" + struct.pack("<I", 4 + len(tag)) + b"INFO" + tag)[1]) == 20_000


def test_a_flac_of_unknown_length():
    data = encoded(noise(50_000), format="FLAC")
    _, samples, notes = whole(of_unknown_length(data))
    np.testing.assert_array_equal(samples, by_libsndfile(data))
    assert notes == []


def test_damaged_flac_frames_are_no_sound():
    """Without the frames' checksums, a flipped bit would be a burst of noise."""
    data = bytearray(encoded(noise(4_096 * 300), format="FLAC"))
    data[len(data) // 2] ^= 16
    with pytest.raises(Unreadable, match=r"is cut short: \d+ samples of 1228800"):
        whole(bytes(data))


OTHERS = {
    "m4a": ("mp4", "aac"),
    "fragmented m4a": ("mp4", "aac", {"movflags": "frag_keyframe+empty_moov"}),
    "Apple Lossless": ("mp4", "alac"),
    "ADTS": ("adts", "aac"),
    "WMA": ("asf", "wmav2", {"b": "128000"}),
    "WebM": ("webm", "libopus"),
    "Matroska": ("matroska", "aac"),
    "AC-3": ("matroska", "ac3"),
    "MP2": ("mp2", "mp2"),
    "WavPack": ("wv", "wavpack"),
    "TTA": ("tta", "tta"),
    "ADPCM": ("wav", "adpcm_ms"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_what_libsndfile_does_not_read(kind):
    format, codec, *options = OTHERS[kind]
    rate = 48_000
    data = by_ffmpeg(noise(3 * rate), rate, format, codec, **(options[0] if options else {}))
    found, samples, notes = whole(data)
    assert found == rate and notes == [] and 3 * rate - 2_048 <= len(samples) <= 3 * rate + 3 * 2_048
    assert 0.05 < samples[rate : 2 * rate].std() < 0.15
    np.testing.assert_array_equal(whole(data, 999)[1], samples)


# Several recordings in one file.


@pytest.mark.parametrize(
    ("format", "subtype", "rate"),
    [("MP3", None, 44_100), ("FLAC", None, 16_000), ("OGG", "VORBIS", 44_100), ("OGG", "OPUS", 48_000)],
)
def test_joined_files_are_read_as_one(format, subtype, rate):
    first, second = (encoded(noise(n, seed=n), rate, format, subtype) for n in (3 * rate, 2 * rate))
    alone, found = whole(second)[1], whole(first + second)[1]
    # Where they are joined, the delays of encoders are sound, too.
    assert 5 * rate <= len(found) <= 5 * rate + 3 * 1_152
    part = alone[rate : rate + 999]
    errors = [np.abs(found[at : at + 999] - part).max() for at in range(4 * rate, 4 * rate + 3 * 1_152)]
    assert min(errors) < 1e-5


def test_what_cannot_be_joined_is_told():
    rate, samples, notes = whole(encoded(noise(60_000), format="OGG") + encoded(noise(44_100), 44_100, "OGG"))
    assert rate == 16_000 and abs(len(samples) - 60_000) < 1_152
    assert len(notes) == 1 and notes[0].startswith("changes its sample rate or codec after")


def test_one_stream_of_several_is_told():
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as container:
        streams = [container.add_stream("aac", rate=16_000, layout="mono") for _ in range(2)]
        for n, stream in enumerate(streams):
            frame = av.AudioFrame.from_ndarray(noise(1, 1_024, seed=n), "fltp", "mono")
            frame.sample_rate, frame.pts, frame.time_base = 16_000, 0, fractions.Fraction(1, 16_000)
            container.mux([*stream.encode(frame), *stream.encode(None)])
    _, samples, notes = whole(file.getvalue())
    assert len(samples) >= 1_024 and notes == ["holds 2 streams of sound, of which one is read"]


# What may not be opened.


@pytest.mark.parametrize(
    "text",
    [
        "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n{path}\n#EXT-X-ENDLIST\n",
        "ffconcat version 1.0\nfile {path}\n",
        "ffconcat version 1.0\nfile file:{path}\n",
        "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=audio 5004 RTP/AVP 0\n",
        '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011"><BaseURL>{path}</BaseURL></MPD>',
    ],
    ids=["HLS", "concat", "concat with a protocol", "SDP", "DASH"],
)
def test_no_other_file_is_opened(tmp_path, text):
    (tmp_path / "a.wav").write_bytes(encoded(noise(16_000)))
    with pytest.raises(Unreadable, match="is not audio that can be read"):
        whole(text.format(path=tmp_path / "a.wav").encode())


def test_pictures_and_films_are_not_decoded(tmp_path):
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as container:
        stream = container.add_stream("mjpeg", rate=10)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuvj420p"
        for _ in range(3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), "u1"), format="rgb24")))
        container.mux(stream.encode(None))
    with pytest.raises(Unreadable, match="it holds no sound of a known kind"):
        whole(file.getvalue())


def test_a_bomb_is_not_followed():
    """Hours of silence in a few kilobytes: it ends at the bound, not at the end of the file."""
    frame = encoded(np.zeros(48_000 * 60, np.float32), 48_000, "OGG", "OPUS")
    head = decode.read_head(io.BytesIO(frame))
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(ffmpeg, "is_bomb", lambda unpacked, packed: unpacked > 100 * packed)
        notes = []
        _, blocks = ffmpeg.open_ffmpeg(io.BytesIO(frame), head, 1 << 17, notes)
        with pytest.raises(Unreadable, match="that is a decompression bomb"):
            list(blocks)


@pytest.mark.parametrize("format", ["FLAC", "MP3", "OGG"])
@pytest.mark.parametrize("at", [1, 5, 8])
def test_an_interrupt_in_the_middle_of_a_read_is_not_lost(format, at):
    class Interrupted(io.BytesIO):
        reads = 0

        def read(self, size=-1):
            self.reads += 1
            if self.reads == at + 1:  # the first read is our own
                signal.raise_signal(signal.SIGINT)
            return super().read(size)

    file = Interrupted(encoded(noise(600_000), format=format))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            list(decode.decode(file).blocks)
    finally:
        signal.signal(signal.SIGINT, before)
    assert file.reads > at


def test_a_read_error_is_no_end():
    class Failing(io.BytesIO):
        reads = 0

        def read(self, size=-1):
            self.reads += 1
            if self.reads > 6:
                raise OSError(5, "Input/output error")
            return super().read(size)

    with pytest.raises(OSError, match="Input/output error"):
        list(decode.decode(Failing(encoded(noise(600_000), format="FLAC"))).blocks)
