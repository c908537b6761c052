"""The synthesised demo: the tunes hold together, the instrument is in tune, the list is stable."""

import dataclasses
import itertools

import numpy as np
import pytest

from pipelines.sources import synth


@pytest.fixture(scope="module")
def listed() -> list[synth.SynthRecording]:
    return synth.recordings()


@pytest.fixture(scope="module")
def audio(listed) -> dict[str, np.ndarray]:
    return {recording.name: synth.render_recording(recording) for recording in listed}


def _single(pitch: str, beats: float = 1.0) -> synth.Score:
    return synth.parse(synth.Tune("single", "", 60, 1, (f"{pitch}:{beats}",)))


@pytest.mark.parametrize("tune", synth.TUNES, ids=lambda tune: tune.name)
def test_tune_parses_into_equal_bars(tune):
    score = synth.parse(tune)
    ends = [sum(steps for *_, steps in _events(voice)) for voice in tune.voices]
    assert ends == [score.beats * tune.steps_per_beat] * len(tune.voices)
    bars = np.diff([*score.bars, score.beats])
    full = bars.max()
    assert set(bars[1:-1]) == {full}
    # An upbeat and the short last bar make one bar together.
    assert bars[0] == full == bars[-1] or bars[0] + bars[-1] == full
    assert all(36 <= note.pitch <= 90 for note in score.notes)
    assert max(note.start + note.beats for note in score.notes) <= score.beats


def _events(voice):
    """The (note, steps) of a voice, read in a second way."""
    for token in voice.replace("|", " ").split():
        name, _, steps = token.partition(":")
        yield name, float(steps or 1)


def test_parse_reads_pitches_lengths_rests_and_chords():
    tune = synth.Tune("t", "", 60, 2, ("R C4+Eb4:.5 F#4:1.5 | Bb3:3",))
    assert [(n.start, n.beats, n.pitch) for n in synth.parse(tune).notes] == [
        (0.5, 0.25, 60),
        (0.5, 0.25, 63),
        (0.75, 0.75, 66),
        (1.5, 1.5, 58),
    ]
    assert synth.parse(tune).bars == (0.0, 1.5)
    assert synth.midi_pitch("B#3") == synth.midi_pitch("C4") == 60


@pytest.mark.parametrize("token", ["H4", "C", "c4", "C4:", "C4:0", "C4:x", "C4+", "R+C4", "C4:-1"])
def test_bad_note_is_refused_with_tune_and_token(token):
    with pytest.raises(ValueError, match="broken_tune") as error:
        synth.parse(synth.Tune("broken_tune", "", 60, 1, (f"C4 {token} D4",)))
    assert repr(token) in str(error.value)


def test_voices_of_different_length_are_refused():
    with pytest.raises(ValueError, match="uneven"):
        synth.parse(synth.Tune("uneven", "", 60, 1, ("C4 D4 | E4:2", "C3:2 | E3:3")))


@pytest.mark.parametrize("pitch, hertz", [("A4", 440.0), ("A3", 220.0), ("C4", 261.63), ("E6", 1318.5)])
def test_pitch(pitch, hertz):
    wave = synth.render(_single(pitch, 2), tempo=60)
    spectrum = np.abs(np.fft.rfft(wave * np.hanning(len(wave)), 2**18))
    peak = np.argmax(spectrum) * synth.SAMPLE_RATE / 2**18
    assert peak == pytest.approx(hertz, abs=1.0)


def test_transposition_is_in_semitones():
    up = synth.render(_single("A3"), tempo=60, transpose=12)
    np.testing.assert_array_equal(up, synth.render(_single("A4"), tempo=60))


def test_a_held_note_decays_and_higher_notes_faster():
    ratios = []
    for pitch in ("A3", "A5"):
        wave = synth.render(_single(pitch, 2), tempo=60)[: 2 * synth.SAMPLE_RATE]
        first, second = np.split(wave.astype(np.float64) ** 2, 2)
        ratios.append(second.sum() / first.sum())
    assert ratios[1] < ratios[0] < 0.5


def test_no_partial_above_the_limit():
    wave = synth.note_wave(96, synth.SAMPLE_RATE)
    power = np.abs(np.fft.rfft(wave * np.hanning(len(wave)))) ** 2
    hertz = np.fft.rfftfreq(len(wave), 1 / synth.SAMPLE_RATE)
    assert power[hertz > synth.PIANO.highest + 100].sum() < 1e-6 * power.sum()


def test_notes_begin_where_the_score_says():
    tune = synth.Tune("two", "", 60, 1, ("R A4:.5 R:.5 A4:.5 R:.5",))
    wave = synth.render(synth.parse(tune), tempo=120)
    sounding = np.abs(wave) > 1e-4
    assert np.flatnonzero(sounding)[0] == pytest.approx(8000, abs=16)
    assert not sounding[12000 + 1280 : 16000].any()
    assert np.flatnonzero(sounding[14000:])[0] + 14000 == pytest.approx(16000, abs=16)


def test_playing_round_and_round_repeats():
    score = synth.parse(synth.TUNES[0])
    turn = round(score.beats * 0.5 * synth.SAMPLE_RATE)  # at 120 beats a minute
    wave = synth.render(score, 120, seconds=turn / synth.SAMPLE_RATE + 4)
    tail = round(synth.PIANO.release * synth.SAMPLE_RATE)  # the last note rings into the next turn
    np.testing.assert_array_equal(wave[turn + tail :], wave[tail : len(wave) - turn])


def test_beginning_at_a_bar_is_the_end_of_the_whole():
    score = synth.parse(synth.TUNES[0])
    whole = synth.render(score, 120)
    part = synth.render(score, 120, start_beat=score.bars[4])
    tail = round(synth.PIANO.release * synth.SAMPLE_RATE)
    np.testing.assert_array_equal(part[tail:], whole[len(whole) - len(part) + tail :])


def test_tempo_must_be_positive():
    with pytest.raises(ValueError, match="tempo"):
        synth.render(_single("A4"), tempo=0)


def test_recordings_are_unique_and_split_by_tune_key_and_tempo(listed):
    assert len(listed) == synth.DEFAULT_COUNT
    everything = synth.recordings(synth.MAX_COUNT)
    assert everything[: len(listed)] == listed == synth.recordings()
    assert len({recording.name for recording in everything}) == synth.MAX_COUNT
    for chosen in (listed, everything):
        held = {"train": set(), "validation": set(), "test": set()}
        for recording in chosen:
            held[recording.split].add((recording.tune, recording.transpose, recording.tempo))
        for one, other in itertools.combinations(held.values(), 2):
            assert not one & other
        share = {split: sum(r.split == split for r in chosen) / len(chosen) for split in held}
        assert share == {"train": 0.875, "validation": 0.0625, "test": 0.0625}
    trained = {recording.tune for recording in listed if recording.split == "train"}
    assert trained == {tune.name for tune in synth.TUNES}


def test_a_few_recordings_still_have_every_split():
    assert {recording.split for recording in synth.recordings(3)} == {
        "train",
        "validation",
        "test",
    }


@pytest.mark.parametrize("count", [0, -1, synth.MAX_COUNT + 1])
def test_impossible_counts_are_refused(count):
    with pytest.raises(ValueError, match=str(count)):
        synth.recordings(count)


def test_recordings_sound(audio):
    for name, wave in audio.items():
        assert wave.shape == (synth.RECORDING_SAMPLES,) and wave.dtype == np.float32, name
        assert np.isfinite(wave).all(), name
        assert np.abs(wave).max() == pytest.approx(synth.PEAK, abs=1e-3), name
        # Somebody plays in every one of its eight seconds.
        loudness = np.sqrt(np.mean(wave.reshape(8, -1).astype(np.float64) ** 2, axis=1))
        assert loudness.min() > 0.01, (name, loudness)
        assert abs(wave.mean()) < 1e-3, name


def test_no_two_recordings_are_the_same(audio):
    assert len({wave.tobytes() for wave in audio.values()}) == len(audio)


def test_rendering_is_deterministic(listed, audio):
    for recording in (listed[3], listed[-1]):
        synth.note_wave.cache_clear()
        again = synth.render_recording(dataclasses.replace(recording))
        assert again.tobytes() == audio[recording.name].tobytes()


def test_fingerprint_follows_the_tunes_and_the_instrument(monkeypatch):
    before = synth.fingerprint()
    assert len(before) == 64 and before == synth.fingerprint()
    with monkeypatch.context() as patch:
        patch.setattr(synth, "PIANO", synth.PIANO._replace(decay=1.0))
        assert synth.fingerprint() != before
    monkeypatch.setattr(synth, "TUNES", synth.TUNES[1:])
    assert synth.fingerprint() != before
