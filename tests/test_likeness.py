"""How it sounds: known answers, streaming, noise, excerpts, and the figures of a run."""

import dataclasses
import json
import math
import shutil

import jax
import numpy as np
import pytest
import scipy.linalg
import soundfile
from mains import refused, run
from tiny import MODEL, config, parameters

from harmonic import audio
from harmonic.checkpoint import Trained
from harmonic.config import override
from harmonic.data import Dataset, EvaluationBatch
from harmonic.errors import UserError
from harmonic.evaluate import segment_nats
from harmonic.generate import generate
from harmonic.likeness import choose as choosing
from harmonic.likeness import measure
from harmonic.likeness.clips import draws, excerpts, noise_of
from harmonic.likeness.hearing import FEATURES, Heard, Moments
from harmonic.likeness.longer import Stretches, judge
from harmonic.models import make
from harmonic.perceptual.metrics import frechet
from harmonic.run import Run
from harmonic.spectrogram import frame_sizes, log_mel
from harmonic.train import train
from harmonic.voice import Codec
from pipelines.build import PrepareSpec, prepare

RATES = (4_000, 8_000, 16_000, 22_050, 44_100)


def heard(rate, *clips):
    found = Heard(rate)
    for clip in clips:
        found.clip().feed(clip)
    return found


def tone(rate, seconds, hertz, amplitude=0.5):
    return amplitude * np.sin(2 * np.pi * hertz * np.arange(round(rate * seconds)) / rate)


# Known answers.


def test_moments_in_parts_are_those_of_the_whole(rng):
    x = 1e4 + rng.normal(size=(1_000, 5)) @ rng.normal(size=(5, 5))
    parts = Moments(5)
    for part in np.split(x, [0, 1, 2, 400, 999]):
        parts.add(part)
    np.testing.assert_allclose(parts.mean, x.mean(0), rtol=1e-12)
    np.testing.assert_allclose(parts.covariance, np.cov(x.T), rtol=1e-9)
    assert parts.count == 1_000 and not Moments(3).covariance.any()


def test_distance_of_gaussians_is_the_closed_form(rng):
    a, b = (rng.normal(size=(6, 6)) for _ in range(2))
    a, b, shift = a @ a.T, b @ b.T, np.linspace(-1, 2, 6)
    root = scipy.linalg.sqrtm(a)
    expected = (shift**2).sum() + np.trace(a + b - 2 * scipy.linalg.sqrtm(root @ b @ root).real)
    assert frechet((np.zeros(6), a), (shift, b)) == pytest.approx(expected, rel=1e-8)
    assert frechet((shift, a), (shift, a)) == pytest.approx(0, abs=1e-9 * np.trace(a))
    assert frechet((np.zeros(1), np.eye(1)), (np.full(1, 3.0), 4 * np.eye(1))) == pytest.approx(9 + 1)


def test_features_are_log_mel_frames_and_their_changes(rng):
    clips = [0.1 * rng.standard_normal(size) for size in (9_000, 5_000, 1_183)]
    found = heard(16_000, *clips)
    frames = [log_mel(clip, 16_000) for clip in clips]
    features = np.concatenate([np.concatenate([f[1:], np.diff(f, axis=0)], axis=1) for f in frames])
    mean, covariance = found.gaussian()
    assert features.shape == (found.frames, FEATURES) and found.samples == 15_183
    np.testing.assert_allclose(mean, features.mean(0, dtype=np.float64), atol=1e-4)
    np.testing.assert_allclose(covariance, np.cov(features.T, dtype=np.float64), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rate", RATES)
def test_a_tone_has_its_level_and_all_its_energy_in_peaks(rate):
    found = heard(rate, tone(rate, 2, 440))
    assert found.level == pytest.approx(20 * math.log10(0.5 / math.sqrt(2)), abs=0.05)
    assert found.peaks > 0.99 and found.onsets_per_second == 0
    window, hop = frame_sizes(rate)
    assert found.frames == (2 * rate - window) // hop
    assert found.silence(-30) == 0 and found.silence(10) == 1


@pytest.mark.parametrize("rate", RATES)
def test_noise_has_hardly_any_peaks(rate, rng):
    found = heard(rate, 0.1 * rng.standard_normal(4 * rate))
    limit = 10 * math.log(2)  # over the median of an exponential distribution of mean 1
    assert found.peaks == pytest.approx((1 + limit) * math.exp(-limit), rel=0.6)
    assert found.level == pytest.approx(-20, abs=0.3)


def test_onsets_are_counted():
    """Notes that begin after others have faded, as on a piano; a slow swell is none."""
    rate = 16_000
    time = np.arange(rate // 4) / rate
    note = sum(np.sin(2 * np.pi * n * 220 * time) / n for n in range(1, 20)) * np.exp(-12 * time) * 0.3
    clip = np.concatenate([np.zeros(rate // 2), *[note] * 12])
    found = heard(rate, clip)
    assert found.onsets_per_second * found.frames / 100 == pytest.approx(12)
    assert found.silence(found.level - 30) == pytest.approx(0.5 / 3.5, abs=0.05)
    swell = tone(rate, 4, 300) * np.linspace(0, 1, 4 * rate)
    assert heard(rate, swell[rate // 10 :]).onsets_per_second == 0


def test_silence_and_a_constant_are_no_sound():
    found = heard(16_000, np.zeros(16_000))
    assert found.level is None and found.peaks is None and found.silence(-60) == 1 and found.frames == 93
    assert np.ptp(found.gaussian()[0][:64]) == 0 and not found.gaussian()[1].any()
    for constant in (0.3, -1.0):
        found = heard(16_000, np.full(16_000, constant))
        assert found.level is None and found.peaks is None and found.silence(-60) == 1


@pytest.mark.parametrize("samples", [0, 1, 1_023, 1_024, 1_183])
def test_clips_that_are_too_short_have_no_frames(samples):
    found = heard(16_000, np.ones(samples))
    assert found.frames == 0 and found.onsets_per_second is None and found.samples == samples
    assert heard(16_000, np.ones(1_184)).frames == 1


@pytest.mark.parametrize("rate", RATES)
def test_blocks_are_heard_as_the_whole_is(rate, rng):
    clip = np.concatenate([tone(rate, 0.7, 300), 0.3 * rng.standard_normal(rate), tone(rate, 0.8, 900, 0.2)])
    whole, parts = heard(rate, clip, clip[:rate]), Heard(rate)
    for sound in (clip, clip[:rate]):
        one = parts.clip()
        for block in np.split(sound, np.sort(rng.integers(0, len(sound), 40))):
            one.feed(block)
    assert (parts.samples, parts.frames) == (whole.samples, whole.frames)
    assert parts.onsets_per_second == whole.onsets_per_second > 0
    assert parts.silence(-20) == whole.silence(-20)
    for ours, theirs in zip(parts.gaussian(), whole.gaussian(), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)
    assert (parts.level, parts.peaks) == pytest.approx((whole.level, whole.peaks), rel=1e-5)
    np.testing.assert_allclose(parts.spectrum, whole.spectrum, rtol=1e-4, atol=1e-9)


# What clips are compared with.


@pytest.mark.parametrize("codec", [Codec("mu_law", 256, 16_000), Codec("linear", 65_536, 8_000)])
def test_shaped_noise_has_the_spectrum_and_the_level(codec, rng):
    rate = codec.sample_rate
    filtered = np.convolve(rng.standard_normal(8 * rate), [0.06, 0.05, 0.03, 0.02])
    like = heard(rate, filtered)
    power = 10 ** (like.level / 10)
    noise, again = (np.concatenate(list(noise_of(like, power, codec, 8 * rate, seed=(0, 1)))) for _ in range(2))
    found = heard(rate, noise)
    assert found.samples == 8 * rate and found.level == pytest.approx(like.level, abs=0.15)
    smooth = [np.convolve(one.spectrum[8:-8], np.ones(20), "valid") for one in (found, like)]
    assert np.abs(10 * np.log10(smooth[0] / smooth[1])).max() < 1
    np.testing.assert_array_equal(again, noise)
    other = np.concatenate(list(noise_of(None, power, codec, 8 * rate, seed=(1, 1))))
    white = heard(rate, other)
    assert white.level == pytest.approx(like.level, abs=0.15)
    assert frechet(found.gaussian(), like.gaussian()) < 0.1 * frechet(white.gaussian(), like.gaussian())
    tokens = audio.encode(other, codec.encoding, low=-1, high=1, num_levels=codec.num_levels)
    assert len(np.unique(codec.decode(tokens[:, None]))) <= codec.num_levels


def test_excerpts_begin_where_training_windows_do(tiny_data):
    split = Dataset(tiny_data).split("train")
    for length, hop, crop in ((200, 70, 0), (200, 500, 0), (100, 100, 450), (10_000, 500, 0)):
        found = excerpts(split, length, hop=hop, crop=crop)
        assert {recording for recording, _, _ in found} == set(range(len(split.lengths)))
        for recording, start, stop in found:
            total = min(int(split.lengths[recording]), crop or 10**9)
            assert start % hop == 0 and stop <= total
            assert stop - start == length or (start, stop) == (0, total)
        ends = {}
        for recording, start, stop in sorted(found):
            assert start >= ends.get(recording, 0)
            ends[recording] = stop


def test_draws_hold_enough_and_share_nothing(rng):
    places = [(i, 0, int(size)) for i, size in enumerate(rng.integers(50, 150, 40))]
    found = draws(places, 1_000, 3)
    assert len(found) == 3 and all(sum(stop for *_, stop in part) >= 1_000 for part in found)
    assert len({place for part in found for place in part}) == sum(map(len, found))
    assert draws(places, 1_000, 3) == found
    (every,) = draws(places, 10**6, 3)
    assert sorted(every) == places


# Data sets and runs.


@pytest.fixture(scope="module")
def piano(tmp_path_factory):
    """The demo's synthesised piano."""
    folder = tmp_path_factory.mktemp("piano")
    prepare(PrepareSpec(dataset="demo", source=None, output_dir=str(folder)))
    return Dataset(folder / "demo")


def test_noise_is_worse_than_shaped_noise_and_that_is_worse_than_training_recordings(piano):
    demo = override(config(), ["data.dataset=demo", "data.window_length=2000"])
    plan = measure.make_plan(demo, piano.split("test"))
    assert (plan.clips, plan.length) == (8, 64_000)
    plan = measure.Plan("test", 16, 64_000, 0)
    comparison = measure.Comparison(piano, demo, plan)
    assert comparison.too_short is None
    figures = comparison.figures(comparison._floors[1])  # training recordings in the place of generated clips
    rows = figures["rows"]
    assert 1.5 * rows["train"]["greatest"] < rows["shaped_noise"]["distance"] < rows["white_noise"]["distance"] / 1.5
    assert abs(figures["share"]) < 0.1 and figures["notes"] == []
    assert rows["train"]["choices"] == 3 and rows["train"]["least"] <= rows["train"]["distance"]
    assert rows["train"]["frames"] == rows["white_noise"]["frames"] == 16 * 393
    assert rows["held_out"]["peaks"] > 0.9 > 0.3 > rows["shaped_noise"]["peaks"] > rows["white_noise"]["peaks"]
    assert 1 < rows["held_out"]["onsets_per_second"] < 5 and rows["white_noise"]["onsets_per_second"] == 0
    for name in ("train", "shaped_noise", "white_noise"):
        assert rows[name]["level_db"] == pytest.approx(rows["held_out"]["level_db"], abs=1)
    assert comparison.figures(comparison._noises["shaped_noise"])["share"] == pytest.approx(1)
    assert measure.Comparison(piano, demo, plan).figures(comparison._floors[1]) == figures


def test_the_reference_with_itself_is_at_no_distance(piano):
    plan = measure.Plan("test", 4, 32_000, 0)
    comparison = measure.Comparison(piano, config(), plan)
    assert comparison.figures(comparison.held_out)["rows"]["generated"]["distance"] == pytest.approx(0, abs=1e-6)


def test_silent_recordings_have_no_noise_beside_them(tmp_path):
    """A data set of one level; nothing is divided by zero."""
    (tmp_path / "silent").mkdir()
    for i in range(12):
        soundfile.write(tmp_path / "silent" / f"{i}.wav", np.zeros(40_000), 16_000, subtype="PCM_16")
    prepare(PrepareSpec(dataset="silent", source=str(tmp_path / "silent"), output_dir=str(tmp_path / "data")))
    dataset = Dataset(tmp_path / "data" / "silent")
    plan = measure.Plan("test", 3, 16_000, 0)
    figures = measure.Comparison(dataset, config(), plan).figures(heard(16_000, *[np.zeros(16_000)] * 3))
    assert figures["share"] is None and figures["rows"]["generated"]["level_db"] is None
    assert figures["rows"]["generated"]["distance"] == pytest.approx(0, abs=1e-6)
    assert "The recordings are silent" in " ".join(figures["notes"])
    json.dumps(figures, allow_nan=False)


@pytest.mark.parametrize(
    ("rate", "length", "segment", "ends"),
    [
        (16_000, 64_000, 16_002, [16_002, 32_004, 48_006, 64_000]),
        (16_000, 16_000, 3_996, [3_996, 7_992, 11_988, 16_000]),
        (44_100, 132_300, 300, [44_100, 88_200, 132_300]),
        (16_000, 3, 6, [3]),
    ],
)
def test_slices_are_seconds_of_whole_segments(rate, length, segment, ends):
    plan, settings = measure.Plan("test", 1, length, 0), override(config(), [f"evaluate.segment_length={segment}"])
    found, size = measure.slices(plan, rate, settings)
    assert (size % 6 == 0 and found[0] % size == 0) or len(found) == 1
    assert found.tolist() == ends


def test_generated_clips_are_scored_as_recordings_are(tiny_data):
    """The nats that come with generation are those of evaluation, slice by slice."""
    model, dataset = make(MODEL), Dataset(tiny_data)
    params, settings = parameters(np.float32), override(config(), ["evaluate.segment_length=120"])
    trained = Trained(model, params, settings, 0, "best", "ema", "0" * 64)
    plan = measure.Plan("test", 3, 1_500, seed=5)
    made = measure.generate_clips(trained, dataset, plan, 0.9, 0.95, show_progress=False)
    sampling = {"batch": 3, "length": 1_500, "seed": 5, "temperature": 0.9, "top_p": 0.95, "chunk": 120}
    tokens = np.concatenate([piece.tokens for piece in generate(model, params, **sampling)], axis=1)
    ends, segment = measure.slices(plan, 16_000, settings)
    assert ends.tolist() == [360, 720, 1_080, 1_500] and segment == 120
    padded = np.zeros((3, 1_560, 1), tokens.dtype)
    padded[:, :1_500] = tokens
    segments = (padded[:, start : start + segment] for start in range(0, 1_560, segment))
    batch = EvaluationBatch(np.full(3, 1_500, np.int32), np.full(3, -1, np.int32), segments)
    sums = np.zeros(4)
    for number, (nats, _) in enumerate(segment_nats(model, params, batch)):
        sums[measure.slice_of(number * segment, ends)] += nats.sum()
    np.testing.assert_allclose(made.nats, sums, rtol=1e-5)
    assert made.bits_per_sample == pytest.approx(sums.sum() / math.log(2) / 4_500, rel=1e-5)
    codec = Codec.of(dataset.manifest)
    whole = heard(16_000, *codec.decode(tokens))
    assert (whole.frames, whole.samples) == (made.heard.frames, made.heard.samples) == (3 * 2, 4_500)
    assert whole.level == pytest.approx(made.heard.level, abs=1e-4)


CALM = Stretches(np.array([[-20.0, -15.0], [-60.0, np.nan]]), np.array([[2.0, 3.0], [1.0, np.nan]]))


def stretches(*streams):
    """Of streams that are each a list of (level, bits)."""
    return Stretches(*np.moveaxis(np.array(streams, float), -1, 0))


STEADY, LOUD, LOST, SILENT = (-15, 3), (-11, 3), (-15, 3.6), (-61, 0.1)


@pytest.mark.parametrize(
    ("streams", "verdict", "after"),
    [
        ([[STEADY] * 4, [SILENT, LOUD, LOST, STEADY]], "steady", None),
        ([[STEADY] * 4, [STEADY, STEADY, STEADY, LOUD]], "steady", None),  # a single loud stretch
        ([[LOUD, STEADY, LOUD, LOST], [STEADY] * 4], "1 of 2 streams run away, the first after 4 s", 4.0),
        ([[STEADY, LOST, LOST, LOST], [LOUD] * 4], "2 of 2 streams run away, the first after 0 s", 0.0),
        ([[STEADY, STEADY, SILENT, SILENT], [STEADY] * 4], "1 of 2 streams fall silent, the first after 4 s", 4.0),
        (
            [[STEADY, SILENT, SILENT, SILENT], [STEADY, STEADY, LOST, LOST]],
            "1 of 2 streams run away, the first after 4 s; 1 of 2 streams fall silent, the first after 2 s",
            2.0,
        ),
    ],
)
def test_streams_are_judged_by_what_recordings_reach(streams, verdict, after):
    found = judge(stretches(*streams), CALM, np.arange(4) * 2.0, 8.0)
    assert (found["verdict"], found["after"]) == (verdict, after)
    assert found["most"] == {"level_db": -12, "bits_per_sample": 3.5} and found["seconds"] == 8
    assert (found["away"] > 0, found["silent"] > 0) == ("away" in verdict, "silent" in verdict)


@pytest.fixture(scope="module")
def clicks(tmp_path_factory):
    """(a run's folder, its data): nearly silent recordings with loud clicks."""
    folder = tmp_path_factory.mktemp("clicks")
    (folder / "clicks").mkdir()
    for i in range(12):
        sound = np.random.default_rng(i).normal(size=48_000) * 0.002
        sound[100::2_000], sound[101::2_000] = 1, -1
        soundfile.write(folder / "clicks" / f"{i}.wav", sound, 16_000, subtype="PCM_16")
    prepare(PrepareSpec(dataset="clicks", source=str(folder / "clicks"), output_dir=str(folder)))
    train(config("data.dataset=clicks", "train.steps=1"), folder / "clicks", folder / "run")
    return folder / "run", folder / "clicks"


def with_head(trained, bias):
    """A model of a random walk: its head has a bias alone, so that it heeds the sample before and nothing else."""
    model = make(dataclasses.replace(trained.config.model, head="logistic", components=1))
    params = jax.tree.map(np.asarray, jax.jit(model.init)(jax.random.key(0)))
    params["head"]["dense"] = {"kernel": 0 * params["head"]["dense"]["kernel"], "bias": np.array(bias, np.float32)}
    return dataclasses.replace(
        trained, model=model, params=params, config=dataclasses.replace(trained.config, model=model.config)
    )


def test_a_model_that_gets_louder_runs_away_and_one_that_stands_still_falls_silent(clicks, monkeypatch):
    workdir, data = clicks
    trained = Run(workdir).weights()
    for walk, verdict in ((-0.5, "run away"), (-12.0, "fall silent")):
        monkeypatch.setattr(Run, "weights", lambda *_, walk=walk, **__: with_head(trained, [0.0, 0.0, walk]))
        found = measure.measure_run(workdir, data, clips=5, seconds=0.5, show_progress=False)["longer"]
        assert f"3 of 3 streams {verdict}, the first after" in found["verdict"], found
        assert found["streams"] == 3 and found["seconds"] == 2


@pytest.fixture(scope="module")
def place(tmp_path_factory, make_dataset):
    """(a run's folder, its data): twelve recordings of three seconds, and a model that has learned little."""
    folder = tmp_path_factory.mktemp("place")
    data = make_dataset(folder, "tiny", [48_000] * 12)
    workdir = folder / "run"
    train(config("train.steps=2", "generate.temperature=0.9"), data, workdir)
    return workdir, data


AMOUNT = {"clips": 6, "seconds": 0.4, "show_progress": False}


@pytest.fixture(scope="module")
def measured(place):
    workdir, data = place
    return measure.measure_run(workdir, data, **AMOUNT)


def test_a_run_is_measured(place, measured):
    workdir, data = place
    assert json.loads((workdir / "sound.json").read_text()) == measured
    rows = measured["rows"]
    assert list(rows) == ["generated", "held_out", "train", "shaped_noise", "white_noise"]
    assert rows["generated"]["frames"] == 6 * 33 and rows["generated"]["seconds"] == pytest.approx(2.4)
    assert measured["temperature"] == 0.9 and measured["split"] == "test" and measured["clips"] == 6
    assert measured["share"] > 0.2  # tones with a little noise are far from what it makes
    assert "Fewer than 1,280 frames" in measured["notes"][0]
    assert [row["start"] for row in measured["drift"]] == pytest.approx([0, 0.094, 0.188, 0.281], abs=0.001)
    split = Dataset(data).split("test")
    assert all(0 < row["generated"] < 12 and 0 < row["held_out"] < 12 for row in measured["drift"]), len(split.lengths)
    longer = measured["longer"]
    assert (longer["streams"], longer["seconds"], longer["verdict"]) == (3, 1.6, "steady")
    assert len(longer["rows"]) == 17 and longer["rows"][-1]["stop"] == 1.6
    assert [row["start"] for row in longer["rows"][:4]] == [row["start"] for row in measured["drift"]]


def test_the_same_weights_give_the_same_figures(place, measured):
    workdir, data = place
    before = (workdir / "sound.json").read_bytes()
    (workdir / "sound.json").unlink()
    measure.measure_run(workdir, data, **AMOUNT)
    assert (workdir / "sound.json").read_bytes() == before
    other = measure.measure_run(workdir, data, **AMOUNT, seed=7)
    assert other["rows"]["generated"] != measured["rows"]["generated"]
    assert other["rows"]["train"] == measured["rows"]["train"]
    measure.measure_run(workdir, data, **AMOUNT)


def test_figures_are_known_for_these_weights_and_settings_alone(place, measured, monkeypatch):
    workdir, data = place
    run, dataset = Run(workdir), Dataset(data)
    trained = run.weights()
    assert measure.known(run, trained, dataset, trained.config) is None  # too little audio
    monkeypatch.setattr(measure, "CLIP_SECONDS", 0.4)
    monkeypatch.setattr(measure, "SECONDS", 2.0)
    assert measure.known(run, trained, dataset, trained.config) == measured
    for change in ("generate.temperature=1.0", "generate.top_p=0.5", "seed=3"):
        assert measure.known(run, trained, dataset, override(trained.config, [change])) is None
    for wrong in ({"weights_sha256": "0"}, {"fingerprint": "0"}):
        (workdir / "sound.json").write_text(json.dumps({**measured, **wrong}))
        assert measure.known(run, trained, dataset, trained.config) is None
    for text in ("", "[]", "{}"):
        (workdir / "sound.json").write_text(text)
        assert measure.known(run, trained, dataset, trained.config) is None
    run.write("sound.json", measured)


def test_too_little_audio_is_said(reference_run, tiny_data, tmp_path, monkeypatch):
    """Nothing is generated for a distance that cannot be computed."""
    workdir = tmp_path / "run"
    shutil.copytree(reference_run, workdir)
    monkeypatch.setattr(measure, "generate_clips", None)
    found = measure.measure_run(workdir, tiny_data, show_progress=False)
    assert (
        found["share"] is None and found["drift"] == [] and found["longer"] is None and "generated" not in found["rows"]
    )
    assert "needs 129" in found["notes"][0] and "a clip needs 74 ms" in found["notes"][0]
    run = Run(workdir)
    assert measure.known(run, run.weights(), Dataset(tiny_data), run.config) == found
    with pytest.raises(UserError, match="nothing to choose by: too few frames"):
        choosing.choose(workdir, tiny_data)
    assert "nothing to choose by" in refused(
        "workflows.sound", "--choose", f"--workdir={workdir}", f"--data_dir={tiny_data}", cwd=tmp_path
    )


def test_a_choice_continues_where_it_stopped(place, measured, monkeypatch):
    workdir, data = place
    grid = {"temperatures": [0.5, 1.0], "top_ps": [1.0], **AMOUNT}
    made, generate_clips = [], measure.generate_clips

    def stops_at_the_second(trained, dataset, plan, temperature, top_p, **more):
        if made:
            raise KeyboardInterrupt
        made.append((temperature, top_p))
        return generate_clips(trained, dataset, plan, temperature, top_p, **more)

    with monkeypatch.context() as patch:
        patch.setattr(choosing, "generate_clips", stops_at_the_second)
        with pytest.raises(KeyboardInterrupt):
            choosing.choose(workdir, data, **grid)
    noted = json.loads((workdir / "sound.json").read_text())
    assert {**noted, "choice": None} == {**measured, "choice": None}
    assert len(noted["choice"]["rows"]) == 1 and "recommended" not in noted["choice"]
    calls = []
    with monkeypatch.context() as patch:
        patch.setattr(choosing, "generate_clips", lambda *a, **k: calls.append(a[3:5]) or generate_clips(*a, **k))
        found = choosing.choose(workdir, data, **grid)
        assert choosing.choose(workdir, data, **grid) == found
    assert made == [(0.5, 1.0)] and calls == [(1.0, 1.0)]
    assert found["split"] == "validation" and found["rows"][0] == noted["choice"]["rows"][0]
    least = min(found["rows"], key=lambda row: row["distance"])
    assert {key: found["recommended"][key] for key in least} == least and 0 <= found["recommended"]["alike"] <= 1
    again = measure.measure_run(workdir, data, **AMOUNT)
    assert again["choice"] == found and {**again, "choice": None} == {**measured, "choice": None}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperatures": [0.0]}, "temperature=0.0 is impossible: it must be above 0"),
        ({"temperatures": [float("nan")]}, "temperature=nan is impossible"),
        ({"top_ps": [0.9, 1.1]}, "top_p=1.1 is impossible"),
        ({"top_ps": []}, "top_p=nothing is impossible"),
        ({"seconds": float("inf")}, "seconds=inf is impossible"),
        ({"seconds": 0.0}, "seconds=0.0 is impossible"),
        ({"clips": 0}, "clips=0 is impossible"),
    ],
)
def test_what_is_impossible_is_refused(place, settings, message):
    workdir, data = place
    with pytest.raises(UserError, match=message):
        choosing.choose(workdir, data, show_progress=False, **settings)


def test_other_data_and_broken_weights_are_refused(place, tiny_data):
    workdir, data = place
    with pytest.raises(UserError, match=r"nowhere is not a run's folder"):
        measure.measure_run("nowhere", data)
    trained = Run(workdir).weights()
    broken = dataclasses.replace(trained, params=jax.tree.map(lambda leaf: np.full_like(leaf, np.nan), trained.params))
    plan = measure.Plan("test", 1, 600, 0)
    with pytest.raises(UserError, match="not finite: the weights are broken"):
        measure.generate_clips(broken, Dataset(data), plan, 1.0, 1.0, show_progress=False)


def test_the_command(place):
    workdir, data = place
    done = run(
        "workflows.sound", f"--workdir={workdir}", f"--data_dir={data}", "--num_clips=6", "--seconds=0.4", cwd=data
    )
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["distance", "frames", "level", "peaks", "silence", "onsets/s"]
    assert lines[1].startswith("generated") and "share of the way" in lines[6]
    assert "How it sounds" in (workdir / "report.html").read_text()
