"""Quantisers against values worked out by hand, and audio files."""

import math

import numpy as np
import pytest
import soundfile

from harmonic import audio
from harmonic.errors import UserError

# Worked out by hand from token = trunc(e * 255.99 + 0.005), with e = (x - min) / (max - min + 1e-6), for mu-law first
# companded: s = 2 e - 1, then e = (sign(s) log(1 + 255 |s|) / log(256) + 1) / 2. At s = 0.5: 0.8757, so 240.08.
CASES = [
    ("linear", [0.0, 0.0, 0.0], [0, 0, 0]),
    ("mu_law", [0.0, 0.0, 0.0], [0, 0, 0]),
    ("linear", [0.25] * 4, [0] * 4),
    ("linear", [-1.0, -0.5, 0.0, 0.5, 1.0], [0, 64, 127, 191, 255]),
    ("mu_law", [-1.0, -0.5, 0.0, 0.5, 1.0], [0, 15, 127, 240, 255]),
    ("linear", [0.5, 0.75, 1.0], [0, 127, 255]),  # all positive: the lowest sample is the lowest level
    ("mu_law", [0.5, 0.625, 0.75, 0.875, 1.0], [0, 15, 127, 240, 255]),
    ("linear", [-0.25, 0.5], [0, 255]),
    # Very quiet, 1e-5 wide: the 1e-6 in the denominator takes a tenth of the scale. 255.99 / 1.1 = 232.7.
    ("linear", [0.0, 1e-5], [0, 232]),
    # s = 2 / 1.1 - 1 = 0.81818: log(209.636) / log(256) = 0.96397, so 251.38.
    ("mu_law", [0.0, 1e-5], [0, 251]),
]


@pytest.mark.parametrize(("encoding", "waveform", "tokens"), CASES)
def test_encode_by_hand(encoding, waveform, tokens):
    encoded = audio.encode(np.array(waveform, np.float32), encoding)
    assert encoded.dtype == np.uint8
    assert encoded.tolist() == tokens


@pytest.mark.parametrize("encoding", audio.ENCODINGS)
def test_integers_of_16_bits_do_not_overflow(encoding):
    encoded = audio.encode(np.array([-32768, 0, 32767], np.int16), encoding)
    assert encoded.tolist() == [
        0,
        128,
        255,
    ]  # 32,768 / 65,535 is above one half: 255.99 times it is 127.997, plus 0.005


@pytest.mark.parametrize("encoding", audio.ENCODINGS)
def test_pieces_of_a_recording_take_its_scale(encoding):
    whole = np.random.default_rng(0).normal(0, 0.1, 1000).astype(np.float32)
    pieces = [audio.encode(part, encoding, low=whole.min(), high=whole.max()) for part in np.split(whole, 4)]
    np.testing.assert_array_equal(np.concatenate(pieces), audio.encode(whole, encoding))


def test_padding_before_scaling_changes_the_tokens_of_an_all_positive_recording():
    clip = np.linspace(0.5, 0.9, 100, dtype=np.float32)
    padded = audio.encode(np.concatenate([clip, np.zeros(10, np.float32)]), "linear")[:100]
    assert np.mean(padded != audio.encode(clip, "linear")) > 0.9


@pytest.mark.parametrize("num_levels", [2, 16, 256, 1024, 65_536])
@pytest.mark.parametrize("encoding", audio.ENCODINGS)
def test_decode_undoes_encode_to_within_a_level(encoding, num_levels):
    waveform = np.linspace(-1, 1, 5001, dtype=np.float32)
    tokens = audio.encode(waveform, encoding, num_levels=num_levels)
    assert tokens.dtype == (np.uint8 if num_levels <= 256 else np.uint16)
    assert tokens.min() == 0 and tokens.max() == num_levels - 1
    assert np.all(np.diff(tokens.astype(int)) >= 0)
    decoded = audio.decode(tokens, encoding, num_levels=num_levels)
    assert decoded.dtype == np.float32 and decoded[0] == -1 and decoded[-1] == 1
    step = 2.1 / (num_levels - 1)
    # The slope of the expander is log(levels) (|x| + 1 / mu); its largest value over the step bounds the error.
    slope = math.log(num_levels) * (np.abs(waveform) + step + 1 / (num_levels - 1)) if encoding == "mu_law" else 1
    if num_levels > 2:
        slope = slope * (num_levels**step if encoding == "mu_law" else 1)
    assert np.all(np.abs(decoded - waveform) <= step * slope + 1e-6)


def test_decode_by_hand():
    np.testing.assert_allclose(audio.decode(np.array([0, 51, 255]), "linear"), [-1, -0.6, 1], rtol=1e-6)
    # v = -0.6: (256 ** 0.6 - 1) / 255 = (27.8576 - 1) / 255 = 0.105324
    np.testing.assert_allclose(audio.decode(np.array([0, 51, 255]), "mu_law"), [-1, -0.105324, 1], rtol=1e-5)


def test_refusals():
    with pytest.raises(ValueError, match="encoding must be one of mu_law, linear, got 'alaw'"):
        audio.encode(np.zeros(1), "alaw")
    with pytest.raises(ValueError, match="got 'alaw'"):
        audio.decode(np.zeros(1, np.uint8), "alaw")
    for num_levels in (0, 1, 65_537):
        with pytest.raises(ValueError, match=f"got {num_levels}"):
            audio.encode(np.zeros(1), "linear", num_levels=num_levels)
    with pytest.raises(ValueError):
        audio.encode(np.zeros(0), "linear")


def test_wav_round_trip(tmp_path):
    waveform = np.array([0, 0.5, -0.5, 2, -2], np.float32)
    audio.write_wav(tmp_path / "a.wav", waveform)
    read, rate = audio.read_audio(tmp_path / "a.wav")
    assert rate == 16_000 and read.dtype == np.float32
    np.testing.assert_allclose(read, [0, 0.5, -0.5, 1, -1], atol=1 / 32767)
    assert [path.name for path in tmp_path.iterdir()] == ["a.wav"]


def test_read_audio_mixes_to_mono(tmp_path):
    soundfile.write(tmp_path / "a.flac", np.array([[0.5, 0.0], [0.25, -0.25]]), 44_100)
    read, rate = audio.read_audio(tmp_path / "a.flac")
    assert rate == 44_100
    np.testing.assert_allclose(read, [0.25, 0])


def test_read_audio_refusals(tmp_path):
    (tmp_path / "text.wav").write_text("no audio")
    soundfile.write(tmp_path / "empty.wav", np.zeros(0), 16_000)
    soundfile.write(tmp_path / "nan.wav", np.array([0.0, np.nan]), 16_000, subtype="FLOAT")
    for name, message in (
        ("missing.wav", "cannot read"),
        ("text.wav", "cannot read"),
        ("empty.wav", "holds no samples"),
        ("nan.wav", "not finite"),
    ):
        with pytest.raises(UserError, match=message) as error:
            audio.read_audio(tmp_path / name)
        assert name in str(error.value) and "\n" not in str(error.value)
