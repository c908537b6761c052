"""The classifier: its images, its files, its training, and whole measurements of a small run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import librosa
import numpy as np
import pytest
import soundfile
from flax import nnx
from tiny import MODEL, config, parameters

from harmonic import audio, train, voice
from harmonic.config import override
from harmonic.data import Dataset
from harmonic.errors import UserError
from harmonic.generate import generate
from harmonic.models import make
from harmonic.perceptual import fit as fitting
from harmonic.perceptual import measure
from harmonic.perceptual.classifier import Classifier
from harmonic.perceptual.clips import read_clips
from harmonic.perceptual.fit import Settings, fit
from harmonic.perceptual.mel import log_mel
from harmonic.perceptual.metrics import fid, inception_score
from harmonic.perceptual.network import SIZES, Convolution, Sizes, functions, parameter_count
from harmonic.run import Run
from pipelines.build import PrepareSpec, prepare

TINY = Sizes(stem=4, widths=(4, 8, 1_024), inner=(4, 8, 8), groups=2, blocks=1)


@pytest.fixture(scope="module")
def tiny_settings():
    """Of a classifier that is small enough for a test, a size that the library does not have."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SIZES, "tiny", TINY)
        yield Settings(size="tiny", steps=60, batch_size=8, checkpoint_every=25, learning_rate=0.02)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """Two spoken "digits": a low and a high hum, 18 clips of each, of different lengths."""
    folder = tmp_path_factory.mktemp("digits")
    numbers = np.random.default_rng(0)
    for digit, pitch in (("zero", 200), ("one", 900)):
        (folder / "sc09" / digit).mkdir(parents=True)
        for i in range(18):
            time = np.arange(numbers.integers(9_000, 16_000)) / 16_000
            hum = np.sin(2 * np.pi * pitch * numbers.uniform(0.9, 1.1) * time) * numbers.uniform(0.1, 0.6)
            noisy = hum + 0.02 * numbers.standard_normal(len(time))
            soundfile.write(folder / "sc09" / digit / f"{i:02d}.wav", noisy, 16_000, subtype="PCM_16")
    for name, chosen in (("validation", "0.wav"), ("testing", "1.wav")):
        rows = [f"{digit}/{ten}{chosen}" for digit in ("zero", "one") for ten in (0, 1)]
        (folder / "sc09" / f"{name}_list.txt").write_text("\n".join(rows) + "\n")
    prepare(PrepareSpec(dataset="sc09", source=str(folder / "sc09"), output_dir=str(folder / "data")))
    return folder / "data" / "sc09"


@pytest.fixture(scope="module")
def classifier(digits, tiny_settings, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("classifier") / "whole"
    return workdir, fit(digits, workdir, tiny_settings, show_progress=False)


@pytest.fixture(scope="module")
def run(digits, tmp_path_factory):
    """A run of a tiny model, two steps long."""
    workdir = tmp_path_factory.mktemp("runs") / "run"
    ours = override(config("data.dataset=sc09", "train.steps=2", "generate.temperature=0.9"), [])
    train.train(ours, digits, workdir)
    return workdir


def test_images_are_librosas_clip_by_clip(rng):
    clips = [rng.normal(0, level, n).astype(np.float32) for level, n in ((0.3, 16_000), (0.01, 9_000), (0.2, 20_000))]
    images = log_mel(np.stack([np.pad(c, (0, 20_000 - len(c))) for c in clips]))
    assert images.shape == (3, 32, 32) and images.dtype == np.float32
    for image, clip in zip(images, clips, strict=True):
        second = np.pad(clip[:16_000], (0, max(0, 16_000 - len(clip))))
        mel = librosa.feature.melspectrogram(y=second, sr=16_000, n_mels=32)
        np.testing.assert_allclose(image, librosa.power_to_db(mel, ref=np.max), atol=1e-3)
        assert image.max() == 0 and image.min() >= -80
    assert np.isfinite(log_mel(np.zeros((1, 16_000), np.float32))).all()


def test_the_published_network_has_its_parameters():
    assert parameter_count(SIZES["paper"], 10) == 34_425_546
    assert parameter_count(SIZES["small"], 10) == 279_226


def test_groups_are_one_by_one_what_a_grouped_convolution_is(rng):
    network = functions(TINY, 3)
    params, stats = network.init(jax.random.key(0))
    kernel = params["stages.1.0.conv_conv.kernel"]
    assert kernel.shape == (3, 3, 4, 8)
    layer = Convolution(8, 8, 3, nnx.Rngs(0), 2, 2)
    x = rng.normal(size=(2, 32, 32, 8)).astype(np.float32)
    expected = jax.lax.conv_general_dilated(
        x,
        layer.kernel[...],
        (2, 2),
        ((1, 1), (1, 1)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=2,
    )
    np.testing.assert_allclose(layer(x), expected, atol=1e-5)
    features, logits = network.evaluate(params, stats, x[..., 0])
    assert features.shape == (2, 1_024) and logits.shape == (2, 3)


def test_a_classifier_learns_and_says_how_well(classifier):
    workdir, result = classifier
    assert result["classes"] == ["one", "zero"] and result["step"] == 60
    assert result["test"] == {"accuracy": 1.0, "clips": 4} and result["train"]["clips"] == 28
    assert json.loads((workdir / "accuracy.json").read_text()) == result
    assert Classifier.load(workdir).classes == ("one", "zero")


def test_an_interrupted_classifier_ends_with_the_same_weights(classifier, digits, tiny_settings, tmp_path, monkeypatch):
    rows, looked = fitting._rows, []

    def stop(count, settings, step):
        looked.append(step)
        if step == 37:
            raise KeyboardInterrupt
        return rows(count, settings, step)

    monkeypatch.setattr(fitting, "_rows", stop)
    with pytest.raises(KeyboardInterrupt):
        fit(digits, tmp_path / "a", tiny_settings, show_progress=False)
    monkeypatch.setattr(fitting, "_rows", lambda *a: looked.append(a[2]) or rows(*a))
    result = fit(digits, tmp_path / "a", tiny_settings, show_progress=False)
    assert looked == [*range(38), *range(25, 60)]
    assert result["classifier"] == classifier[1]["classifier"]
    assert fit(digits, tmp_path / "a", tiny_settings) == result and len(looked) == 73
    with pytest.raises(UserError, match="was begun with seed=0, not 1"):
        fit(digits, tmp_path / "a", Settings(**{**vars(tiny_settings), "seed": 1}))


def test_what_a_classifier_hears_does_not_depend_on_the_batch(classifier, digits):
    ours, clips = Classifier.load(classifier[0]), read_clips(Dataset(digits).split("train"), 0, 5)
    features, logits = ours.features_and_logits(clips)
    assert features.shape == (5, 1_024) and logits.shape == (5, 2)
    alone = [ours.features_and_logits(clip[None]) for clip in clips]
    np.testing.assert_allclose(np.concatenate([a[0] for a in alone]), features, atol=1e-5)
    np.testing.assert_allclose(np.concatenate([a[1] for a in alone]), logits, atol=1e-5)


def test_files_that_are_no_classifier_are_refused(classifier, tmp_path):
    with pytest.raises(UserError, match=r"no classifier is there.*train_classifier --workdir=\S+nothing"):
        Classifier.load(tmp_path / "nothing")
    data = bytearray((classifier[0] / "classifier.npz").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "changed.npz").write_bytes(bytes(data))
    with pytest.raises(UserError, match=r"changed\.npz is damaged"):
        Classifier.load(tmp_path / "changed.npz")
    ours = Classifier.load(classifier[0])
    Classifier(SIZES["small"], ours.classes, ours.params, ours.stats).save(tmp_path / "other.npz")
    with pytest.raises(UserError, match=r"other\.npz is of another architecture: no stages\.0\.0\.shortcut_bn"):
        Classifier.load(tmp_path / "other.npz")


def test_data_that_no_classifier_can_learn_is_refused(tmp_path, tiny_data, tiny_settings):
    with pytest.raises(UserError, match="has no labels"):
        fit(tiny_data, tmp_path / "run", tiny_settings)
    for name, value in (("size", "huge"), ("batch_size", 1), ("learning_rate", 0.0), ("steps", -1)):
        with pytest.raises(UserError, match=f"{name}={value!r} is impossible"):
            Settings(**{name: value})


def test_streams_have_their_numbers_and_their_own_likelihood():
    model, params = make(MODEL), parameters(np.float32)

    def made(**more):
        chunks = list(generate(model, params, length=90, chunk=40, seed=3, temperature=0.8, **more))
        return np.concatenate([c.tokens for c in chunks], 1), sum(c.nats for c in chunks)

    tokens, nats = made(batch=5)
    later, later_nats = made(batch=3, first_stream=2)
    np.testing.assert_array_equal(later, tokens[2:])
    np.testing.assert_allclose(later_nats, nats[2:], rtol=1e-5)
    logits, _ = model.apply(model.prepare(params), {"tokens": tokens.astype(np.int32)}, model.init_state(5))
    np.testing.assert_allclose(nats, -model.log_prob(logits, tokens).sum(1), rtol=1e-4)


def test_the_released_rejection_keeps_its_2816_of_10240(rng):
    nats = rng.normal(size=10_240)
    kept = measure.keep_likely(nats)
    assert len(kept) == len(set(kept)) == 2_816
    half = np.sort(nats[np.random.default_rng(0).permutation(10_240)[:5_120]])[::-1]  # the least likely first
    np.testing.assert_array_equal(nats[kept], half[2_048:4_864])


def test_real_clips_and_noise_stand_in_the_order_that_one_expects(digits, classifier, tmp_path, monkeypatch):
    settings = {"num_noise": 6, "allow_rank_deficient": True, "show_progress": False}
    result = measure.measure_reference(digits, classifier[0], tmp_path, **settings)
    rows = {name: result[name] for name in ("train", "test", "white_noise")}
    assert {name: row["clips"] for name, row in rows.items()} == {"train": 28, "test": 4, "white_noise": 6}
    assert rows["train"]["fid"] == pytest.approx(0, abs=1e-6) and rows["test"]["accuracy"] == 1
    assert rows["train"]["fid"] < rows["test"]["fid"] < rows["white_noise"]["fid"]
    assert all(name in measure.table(result) for name in ("real, test split", "white noise", "IS released"))
    heard = []
    listen = Classifier.features_and_logits
    monkeypatch.setattr(Classifier, "features_and_logits", lambda *a: heard.append(len(a[1])) or listen(*a))
    next(tmp_path.glob("test-*.npz")).write_bytes(b"cut short")
    assert measure.measure_reference(digits, classifier[0], tmp_path, **settings) == result and heard == [4]


@pytest.mark.slow
def test_a_run_is_measured_and_goes_on_where_it_stopped(run, digits, classifier, monkeypatch):
    monkeypatch.setattr(measure, "_PIECE", 4)
    settings = {"num_samples": 8, "allow_rank_deficient": True, "show_progress": False}
    result = measure.measure_run(run, digits, classifier[0], **settings)
    assert json.loads((run / "perceptual.json").read_text()) == result
    rows = {name: result[name] for name in ("generated", "train", "test", "white_noise")}
    assert {name: row["clips"] for name, row in rows.items()} == {
        "generated": 8, "train": 28, "test": 4, "white_noise": 8
    }  # fmt: skip
    assert result["train"]["fid"] == pytest.approx(0, abs=1e-6) and result["test"]["accuracy"] == 1
    assert result["train"]["fid"] < result["test"]["fid"] < result["white_noise"]["fid"]
    assert result["step"] == Run(run).weights().step and result["temperature"] == 0.9
    assert result["rejected"]["kept"] == result["rejected"]["clips"] == 2

    # The generated row, from the pieces, of which the second is made directly.
    weights, heard = Run(run).weights(), Classifier.load(classifier[0])
    pieces = sorted((run / "perceptual").glob("generated-*.npz"))
    stored = [dict(np.load(piece)) for piece in pieces]
    assert [len(piece["nats"]) for piece in stored] == [4, 4]
    sampling = {"batch": 4, "first_stream": 4, "length": 16_000, "temperature": 0.9, "chunk": 1_000}
    chunks = list(generate(weights.model, weights.params, **sampling))
    clips = audio.decode(np.concatenate([c.tokens[..., 0] for c in chunks], 1), "mu_law")
    np.testing.assert_allclose(heard.features_and_logits(clips)[1], stored[1]["logits"], atol=1e-3)
    np.testing.assert_allclose(sum(c.nats for c in chunks), stored[1]["nats"], rtol=1e-5)
    features, logits = (np.concatenate([piece[name] for piece in stored]) for name in ("features", "logits"))
    real = heard.features_and_logits(read_clips(Dataset(digits).split("train"), 0, 28))[0]
    assert result["generated"]["fid"] == pytest.approx(fid(real, features, allow_rank_deficient=True), rel=1e-3)
    assert result["generated"]["is"] == pytest.approx(inception_score(logits), rel=1e-4)

    # Whatever is there is taken; a piece that a kill cut short is made again, and it alone.
    made = []
    generated = voice.generate
    monkeypatch.setattr(voice, "generate", lambda *a, **k: made.append(k["first_stream"]) or generated(*a, **k))
    assert measure.measure_run(run, digits, classifier[0], **settings) == result and made == []
    pieces[1].write_bytes(pieces[1].read_bytes()[:1_000])
    assert measure.measure_run(run, digits, classifier[0], **settings) == result and made == [4]

    # With the lengths of training recordings, and silence behind them.
    heard = []
    listen = Classifier.features_and_logits
    monkeypatch.setattr(Classifier, "features_and_logits", lambda *a: heard.append(a[1]) or listen(*a))
    matched = measure.measure_run(run, digits, classifier[0], match_lengths=True, **settings)
    assert matched["match_lengths"] and not result["match_lengths"] and matched["generated"] != result["generated"]
    cut, lengths = np.concatenate(heard), Dataset(digits).split("train").lengths
    assert len(cut) == 8 and set(16_000 - (cut[:, ::-1] != 0).argmax(1)) <= set(np.minimum(lengths, 16_000))
    np.testing.assert_array_equal(cut[4:][cut[4:] != 0], clips[cut[4:] != 0])


def test_what_cannot_be_measured_is_refused(run, digits, classifier, tmp_path, tiny_data):
    with pytest.raises(
        UserError, match=r"train split of \S+ has 28 clips, fewer than the 1,025 .*allow_rank_deficient"
    ):
        measure.measure_run(run, digits, classifier[0])
    few = {"allow_rank_deficient": True, "show_progress": False}
    with pytest.raises(UserError, match="num_samples has 1 clips, fewer than the 2 that a covariance"):
        measure.measure_run(run, digits, classifier[0], num_samples=1, **few)
    with pytest.raises(UserError, match="nothing is not a run's folder"):
        measure.measure_run(tmp_path / "nothing", digits, classifier[0], **few)
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "config.json").write_bytes((run / "config.json").read_bytes())
    with pytest.raises(UserError, match="begun has no checkpoints; train it first"):
        measure.measure_run(tmp_path / "begun", digits, classifier[0], **few)
    with pytest.raises(UserError, match="has no labels"):
        measure.measure_reference(tiny_data, classifier[0], tmp_path / "cache", **few)
    ours = Classifier.load(classifier[0])
    Classifier(ours.sizes, ("cat", "dog"), ours.params, ours.stats).save(tmp_path / "pets.npz")
    with pytest.raises(UserError, match=r"pets\.npz was trained for other classes: it tells cat, dog apart"):
        measure.measure_run(run, digits, tmp_path / "pets.npz", **few)
    broken = {name: np.full_like(value, np.nan) for name, value in ours.params.items()}
    Classifier(ours.sizes, ours.classes, broken, ours.stats).save(tmp_path / "broken.npz")
    with pytest.raises(UserError, match=r"(features|logits) of 28 of 28 clips are not finite"):
        measure.measure_reference(digits, tmp_path / "broken.npz", tmp_path / "cache", num_noise=4, **few)


def command(*argv, cwd):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    environment["XLA_FLAGS"] = "--xla_backend_optimization_level=0"
    return subprocess.run([sys.executable, "-m", *argv], capture_output=True, text=True, cwd=cwd, env=environment)


@pytest.mark.slow
def test_the_commands(digits, tmp_path):
    done = command(
        "workflows.train_classifier", f"--data_dir={digits.parent}", "--workdir=ears", "--steps=2", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["parameters"] == parameter_count(SIZES["small"], 2)
    where = f"--data_dir={digits}", "--classifier=ears"
    done = command("workflows.perceptual", *where, "--allow_rank_deficient", "--cache_dir=heard", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [line.split("  ")[0] for line in done.stdout.splitlines()[1:]] == [
        "real, training split", "real, test split", "white noise"
    ]  # fmt: skip
    done = command("workflows.perceptual", *where, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: the train split of") and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
