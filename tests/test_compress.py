"""Clips written by arithmetic coding and read back: to the bit, of the size that the likelihood says, or refused."""

import dataclasses
import hashlib
import json
import struct

import jax
import numpy as np
import pytest
import soundfile
from mains import refused, run
from tiny import MODEL

from harmonic import compress as module
from harmonic.compress import compress, decompress, likelihood
from harmonic.errors import UserError
from harmonic.models import make
from harmonic.sound.whole import read_channels
from harmonic.voice import Codec, Voice

RATE = 16_000
CODEC = Codec("mu_law", 256, RATE)


def voice(codec=CODEC, seed=0, **changes):
    """A model that has learnt nothing, with probabilities that differ."""
    model = make(dataclasses.replace(MODEL, **changes), codec.num_levels)
    params = jax.jit(model.init)(jax.random.key(seed))
    params["head"]["dense"]["kernel"] *= 2 if model.config.head == "categorical" else 1
    return Voice(model, params, codec)


def write(path, length, *, rate=RATE, channels=1, subtype="PCM_16", scale=0.4, noise=0.05):
    time = np.arange(length) / rate
    hiss = noise * np.random.default_rng(2).standard_normal((length, channels))
    sound = scale * ((np.sin(2 * np.pi * 330 * time) * np.exp(-time))[:, None] + hiss)
    soundfile.write(path, sound, rate, subtype=subtype)
    return path


@pytest.fixture
def clip(tmp_path):
    return write(tmp_path / "clip.wav", 700)


def changed(data, **values):
    """A whole file with other values in its header."""
    at = len(b"HRNNCLIP")
    (size,) = struct.unpack("<I", data[at : at + 4])
    header = json.loads(data[at + 4 : at + 4 + size])
    header = {name: value for name, value in {**header, **values}.items() if value is not None}
    text = json.dumps(header).encode()
    body = data[:at] + struct.pack("<I", len(text)) + text + data[at + 4 + size : -32]
    return body + hashlib.sha256(body).digest()


@pytest.mark.parametrize("lossless", [False, True])
@pytest.mark.parametrize("head", ["categorical", "logistic"])
def test_round_trip(clip, head, lossless):
    spoken = voice(head=head)
    samples = read_channels(clip, RATE)
    packed = compress(spoken, samples, lossless=lossless)
    jax.clear_caches()  # the reader compiles for itself
    module._functions.cache_clear()
    again = decompress(spoken, packed.data)
    assert again.tokens.dtype == np.uint8 and (again.tokens == CODEC.encode(samples[:, 0])).all()
    assert again.sha256 == packed.sha256 and again.lossless == lossless
    original = soundfile.read(clip, dtype="int16")[0]
    assert (again.pcm == original).all() == lossless
    # Without the difference each sample is still one of its token's.
    scale = CODEC.scale(samples[:, 0])
    assert (CODEC.quantise(again.pcm / np.float32(2**15), scale) == again.tokens).all()


@pytest.mark.parametrize("head", ["categorical", "logistic"])
def test_the_size_is_the_likelihood(tmp_path, head):
    """Within 0.1 %, where `apply` over segments gives the likelihood and single steps wrote the stream."""
    # A logistic head that has learnt nothing holds large steps for all but impossible, and 24 bits are the most.
    codec = CODEC if head == "categorical" else dataclasses.replace(CODEC, encoding="linear")
    spoken = voice(codec, head=head)
    samples = read_channels(write(tmp_path / "long.wav", 8_001, noise=0.01), RATE)
    sizes = {size.what: size.bytes for size in compress(spoken, samples).sizes}
    nats = likelihood(spoken.model, spoken.params, codec.encode(samples[:, 0])[:, 0])
    assert sizes["tokens, by the model's likelihood"] == pytest.approx(nats / np.log(2) / 8)
    assert sizes["tokens, under the model"] == pytest.approx(nats / np.log(2) / 8, rel=1e-3)


def test_the_tables_other_rows(tmp_path):
    """FLAC of the tokens and of the 16-bit samples decode to them; a histogram's size is its entropy."""
    samples = read_channels(write(tmp_path / "clip.wav", 8_000), RATE)
    tokens = CODEC.encode(samples[:, 0])[:, 0]
    counts = np.bincount(tokens, minlength=256)
    entropy = -(counts[counts > 0] * np.log2(counts[counts > 0] / len(tokens))).sum() / 8
    assert module._histogram_bytes(tokens, 256) == pytest.approx(entropy, rel=1e-3)
    centred = module._centred(tokens, 256)
    soundfile.write(tmp_path / "tokens.flac", centred, RATE, subtype="PCM_S8", compression_level=1.0)
    assert ((soundfile.read(tmp_path / "tokens.flac", dtype="int16")[0] >> 8) + 128 == tokens).all()
    assert (tmp_path / "tokens.flac").stat().st_size == module._flac_bytes(centred, bits=8)
    sizes = {size.what: size.bytes for size in compress(voice(), samples, lossless=True).sizes}
    parts = ("tokens, under the model", "difference to 16 bits", "header and checksum")
    assert sum(sizes[part] for part in parts) == sizes["whole file"]


@pytest.mark.parametrize(
    "codec",
    [Codec("linear", 1_024, RATE), Codec("mu_law", 256, RATE, loudness=-20.0), Codec("linear", 16, RATE)],
    ids=lambda codec: f"{codec.encoding}_{codec.num_levels}_{codec.loudness}",
)
def test_every_codec(clip, codec):
    spoken, samples = voice(codec), read_channels(clip, RATE)
    again = decompress(spoken, compress(spoken, samples, lossless=True).data)
    assert (again.pcm == soundfile.read(clip, dtype="int16")[0]).all()
    assert (again.tokens == codec.encode(samples[:, 0])).all()


def test_sounds_that_are_none(tmp_path):
    """Silence, a constant, one sample, full scale, and steps that are finer than 16 bits."""
    spoken = voice()
    extremes = np.array([-(2**15), 2**15 - 1] * 40, np.int16)
    for pcm in (np.zeros(300, np.int16), np.full(200, -7, np.int16), np.array([5], np.int16), extremes):
        again = decompress(spoken, compress(spoken, pcm[:, None] / np.float32(2**15), lossless=True).data)
        assert (again.pcm == pcm).all()
    quiet = np.linspace(-1e-4, 1e-4, 500, dtype=np.float32)[:, None]  # most tokens have no 16-bit value
    again = decompress(spoken, compress(spoken, quiet).data)
    assert (again.tokens == CODEC.encode(quiet[:, 0])).all() and np.abs(again.pcm).max() <= 5
    loud = 2 * np.ones((64, 1), np.float32) * np.sin(np.arange(64))[:, None]  # floats may exceed full scale
    again = decompress(spoken, compress(spoken, loud.astype(np.float32)).data)
    assert (again.tokens == CODEC.encode(loud[:, 0])).all()


def test_a_stereo_clip_is_mixed(tmp_path):
    spoken, stereo = voice(), read_channels(write(tmp_path / "two.wav", 700, channels=2), RATE)
    again = decompress(spoken, compress(spoken, stereo).data)
    assert (again.tokens == CODEC.encode(stereo.mean(axis=1))).all()


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ({"channels": 2}, "has 2 channels"),
        ({"subtype": "PCM_24"}, "are not 16-bit"),
        ({"subtype": "FLOAT"}, "are not 16-bit"),
    ],
)
def test_lossless_is_refused_where_it_would_lose(tmp_path, written, message):
    samples = read_channels(write(tmp_path / "clip.wav", 400, **written), RATE)
    with pytest.raises(UserError, match=message):
        compress(voice(), samples, lossless=True)


def test_clips_that_cannot_be(tmp_path):
    write(tmp_path / "slow.wav", 400, rate=8_000)
    write(tmp_path / "empty.wav", 0)
    (tmp_path / "text.wav").write_text("hello")
    cases = [("slow", "8,000 Hz.*convert"), ("empty", "no samples"), ("text", "as audio"), ("no", "as audio")]
    for name, message in cases:
        with pytest.raises(UserError, match=message):
            read_channels(tmp_path / f"{name}.wav", RATE)
    for samples, message in [(np.zeros((0, 1)), "0 samples"), (np.full((9, 1), np.nan), "finite")]:
        with pytest.raises(UserError, match=message):
            compress(voice(), samples.astype(np.float32))


def test_what_was_written_otherwise_is_refused(clip):
    spoken = voice()
    data = compress(spoken, read_channels(clip, RATE)).data
    machine = json.loads(data[12 : 12 + struct.unpack("<I", data[8:12])[0]])["machine"]
    other = {**machine, "jaxlib": "0.0.1", "machine code": "none"}
    louder = dataclasses.replace(CODEC, loudness=-20.0)
    cases = [
        (voice(seed=1), data, "other weights"),
        (voice(dropout=0.1), data, "other weights"),  # the config is part of it
        (dataclasses.replace(spoken, codec=louder), data, "another codec"),
        (spoken, changed(data, machine=other), r"jaxlib was 0.0.1 there and is \d.*; machine code was none there"),
        (spoken, changed(data, machine={**machine, "newer": "1"}), "newer was 1 there and is None here"),
        (spoken, changed(data, probe="0"), "other probabilities"),
        (spoken, changed(data, format=2), "format 2; this version reads 1"),
        (spoken, changed(data, sha256=["0", ""]), "does not decode to the sound that was written"),
    ]
    for reader, content, message in cases:
        with pytest.raises(UserError, match=message):
            decompress(reader, content, name="clip.hrnn")


def test_damage_is_refused_before_decoding(clip, monkeypatch):
    spoken = voice()
    data = compress(spoken, read_channels(clip, RATE), lossless=True).data
    monkeypatch.setattr(module, "Coder", None)
    damaged = [data[:end] for end in (8, 11, 12, 40, 41, 500, len(data) // 2, len(data) - 1)] + [data + b"\0"]
    for place in (8, 11, 12, 30, 400, len(data) // 2, len(data) - 33, len(data) - 1):
        flipped = bytearray(data)
        flipped[place] ^= 1
        damaged.append(bytes(flipped))
    for content in damaged:
        with pytest.raises(UserError, match=r"clip.hrnn is damaged or cut short; get it again"):
            decompress(spoken, content, name="clip.hrnn")
    for content in (b"", data[:7], b"RIFF" + data, clip.read_bytes(), b"{}"):
        with pytest.raises(UserError, match=r"clip.hrnn is not a compressed clip"):
            decompress(spoken, content, name="clip.hrnn")
    # Headers that somebody made up, with a right checksum.
    for values in (
        {"samples": -1}, {"samples": 2**40}, {"samples": "9"}, {"samples": True}, {"bytes": [4]}, {"bytes": None},
        {"bytes": [-4, 4]}, {"bytes": [6, 2]}, {"scale": {"low": 0}}, {"scale": None}, {"lossless": 1}, {"machine": 3},
        {"extent": [1, 0]}, {"extent": [0, 2**15]}, {"extent": [0]}, {"extent": [0.0, 1]},
        {"scale": {"factor": "x", "low": 0, "high": 1}}, {"sha256": []}, {"probe": None}, {"format": None},
    ):  # fmt: skip
        with pytest.raises(UserError, match="damaged: its header"):
            decompress(spoken, changed(data, **values))


def test_a_made_up_stream_ends_with_one_line(clip):
    spoken = voice()
    data = compress(spoken, read_channels(clip, RATE), lossless=True).data
    rng = np.random.default_rng(0)
    tokens, difference = json.loads(data[12 : 12 + struct.unpack("<I", data[8:12])[0]])["bytes"]
    start = len(data) - 32 - tokens - difference
    for at, size in ((start, tokens), (start + tokens, difference)):
        body = data[:at] + rng.bytes(size) + data[at + size : -32]
        with pytest.raises(UserError, match="does not decode to the sound that was written"):
            decompress(spoken, body + hashlib.sha256(body).digest())


def test_blocks_that_give_other_bits_are_not_used(clip, monkeypatch):
    spoken, samples = voice(), read_channels(clip, RATE)
    monkeypatch.setattr(module.Coder, "_probe", lambda self, block: str(block))
    assert module.Coder(spoken.model, spoken.params)._block == 1
    assert (decompress(spoken, compress(spoken, samples[:200]).data).tokens[:, 0] < 256).all()


def test_models_that_cannot_code(clip, monkeypatch):
    spoken, samples = voice(), read_channels(clip, RATE)
    broken = dataclasses.replace(spoken, params=jax.tree.map(lambda leaf: leaf * np.nan, spoken.params))
    with pytest.raises(UserError, match="not finite: the weights are broken"):
        compress(broken, samples)
    monkeypatch.setitem(__import__("sys").modules, "constriction", None)
    with pytest.raises(UserError, match=r"pip install 'harmonic-rnn\[compress\]'"):
        compress(spoken, samples)


def test_the_command(reference_run, tmp_path):
    """In processes of their own; the export of a run reads what the run wrote."""
    clip, packed, again = write(tmp_path / "clip.wav", 2_000), tmp_path / "clip.hrnn", tmp_path / "again.wav"
    common = ("workflows.compress", f"--workdir={reference_run}")
    out = run(*common, "--lossless", f"--input={clip}", f"--output={packed}", cwd=tmp_path).stdout
    assert "tokens, under the model" in out and f"{packed}  0.12 s" in out
    exported = tmp_path / "export"
    run("workflows.export", f"--workdir={reference_run}", f"--output_dir={exported}", "--license=mit", cwd=tmp_path)
    reading = ("--decompress", f"--input={packed}", f"--output={again}")
    out = run("workflows.compress", f"--model={exported}", *reading, cwd=tmp_path).stdout
    assert "the 16-bit samples that were compressed" in out
    assert again.read_bytes() == clip.read_bytes()
    assert "other weights" in refused("workflows.compress", *reading, cwd=tmp_path)  # the model in the box


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "--input=FILE"),
        (("--input=a", "--output=a"), "over its own input"),
        (("--input=a", "--output=b", "--lossless", "--decompress"), "leave out --lossless"),
        (("--input=a", "--output=b", "--decompress"), "a is missing"),
        (("--input=a", "--output=b", "--config=demo"), "with its own config"),
    ],
)
def test_flags_that_cannot_be(flags, message, tmp_path, monkeypatch, capsys):
    from workflows import compress as main

    main.flags.FLAGS.unparse_flags()
    main.flags.FLAGS(["compress", *flags])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        main.main()
