"""workflows.export and harmonic.load: from a run to a folder, to the hub and back, to the same audio."""

import dataclasses
import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy
import soundfile
import yaml
from hub_server import hub_environment
from mains import ROOT
from model_hub_server import TOKENS, ModelHub, take_for_models
from tiny import config

import harmonic
from harmonic import hub, pretrained
from harmonic.checkpoint import Checkpoints, model_description
from harmonic.errors import UserError
from harmonic.export import export_run
from harmonic.model_card import public_command, public_source
from harmonic.models import make
from harmonic.records import load_manifest
from harmonic.run import Run
from harmonic.step import init_state
from harmonic.voice import Codec


@pytest.fixture(scope="module")
def make_run(tiny_data, tmp_path_factory):
    """(change of the state) -> a run's folder, of a model that has learnt nothing."""

    ours = config("generate.temperature=0.9")
    untrained = jax.jit(lambda: init_state(ours, make(ours.model)))()._asdict()

    def folder_of(change=lambda state: state, step=7):
        folder = tmp_path_factory.mktemp("run")
        (folder / "config.json").write_text(ours.to_json())
        shutil.copy(tiny_data / "manifest.json", folder)
        checkpoints = Checkpoints(folder)
        checkpoints.save(step, change(untrained), {"model": model_description(ours)}, None)
        checkpoints.close()
        return folder

    return folder_of


@pytest.fixture(scope="module")
def run(make_run):
    return make_run()


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    """An export without sounds, not to be changed."""
    folder = tmp_path_factory.mktemp("exports") / "tiny"
    export_run(run, folder, num_samples=0)
    return folder


@pytest.fixture
def copy(exported, tmp_path):
    """An export to be spoilt."""
    return Path(shutil.copytree(exported, tmp_path / "copy"))


@pytest.fixture
def the_hub(monkeypatch, tmp_path):
    with ModelHub(TOKENS) as server:
        take_for_models(monkeypatch, server, tmp_path)
        yield server


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def refused(call, *args, **kwargs):
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    line = str(caught.value)
    assert "\n" not in line and "secret" not in line
    return line


def same(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert a.dtype == b.dtype == np.float32
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_from_a_run_to_the_hub_and_back_to_the_same_audio(run, the_hub, tmp_path, monkeypatch):
    """The mains as processes: the hub gives the run's average back, which sounds as workflows.generate does."""
    environment = hub_environment(the_hub.url, tmp_path / "home") | {"HF_HUB_DISABLE_XET": "1", "NO_PROXY": "*"}
    environment["HF_TOKEN"] = "hf_writes_secret"

    def start(workflow, *flags):
        command = [sys.executable, "-m", f"workflows.{workflow}", f"--workdir={run}", *flags]
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    flags = ("--num_samples=2", "--seconds=0.2")
    folder = tmp_path / "out" / "tiny"
    exporting = start("export", *flags, f"--output_dir={folder}", "--push_to=someone/tiny", "--private")
    generating = start("generate", *flags, f"--output_dir={tmp_path / 'wavs'}", "--temperature=0.9")
    (told, errors), (_, complaints) = (process.communicate(timeout=300) for process in (exporting, generating))
    assert (exporting.returncode, generating.returncode) == (0, 0), errors + complaints
    assert f"{the_hub.url}/someone/tiny/commit/" in told
    assert "secret" not in told + errors

    assert the_hub.repos["someone/tiny"]["private"]
    written = files_of(folder)
    names = {"model.safetensors", "config.json", "README.md", "sample_0.wav", "sample_1.wav"}
    assert set(written) == names and [path.name for path in folder.parent.iterdir()] == ["tiny"]
    assert {name: data for name, data in the_hub.files("someone/tiny").items() if name in names} == written
    assert f"and no model {the_hub.url}/someone/tiny that may be read (401)" in refused(harmonic.load, "someone/tiny")

    monkeypatch.setenv("HF_TOKEN", "hf_reads_secret")
    model = harmonic.load("someone/tiny")
    fetched = {path.rsplit("/", 1)[-1] for method, path in the_hub.requests if "/resolve/" in path}
    assert fetched == {"model.safetensors", "config.json"}
    weights = Run(run).weights()
    assert (model.config, model.sample_rate) == (weights.config, 16_000)
    same(model.params, weights.params)
    assert model.about["weights"]["kind"] == "ema" and model.about["weights"]["step"] == 7

    audio = model.generate(seconds=0.2, num_samples=2, temperature=0.9)
    assert audio.shape == (2, 3_200) and audio.dtype == np.float32
    for i in range(2):
        made = soundfile.read(tmp_path / "wavs" / f"sample_{i:04d}.wav", dtype="int16")[0]
        np.testing.assert_array_equal(made, soundfile.read(folder / f"sample_{i}.wav", dtype="int16")[0])
        np.testing.assert_allclose(audio[i], made / 32_768, rtol=0, atol=1 / 32_768)


def test_a_runs_folder_loads_as_its_export_does(run, exported):
    ours, theirs = harmonic.load(run), harmonic.load(str(exported))
    same(ours.params, theirs.params)
    assert (ours.config, ours.sample_rate, ours.loudness) == (theirs.config, theirs.sample_rate, theirs.loudness)


def test_the_file_has_documented_names_and_the_average(run, exported):
    """Names are what others rely on: these must stay."""
    arrays = safetensors.numpy.load_file(exported / "model.safetensors")
    block = [f"{part}.{name}" for part in ("gate", "last", "up") for name in ("bias", "kernel")]
    recurrence = ("input.bias", "input.kernel", "input_gate.bias", "input_gate.kernel", "output.bias", "output.kernel")
    recurrence += ("recurrence_gate.bias", "recurrence_gate.kernel", "angle", "log_decay")
    expected = {f"blocks.mlp.{name}" for name in [*block, "norm.bias", "norm.scale"]}
    expected |= {f"blocks.temporal.{name}" for name in [*block[:4], "norm.bias", "norm.scale"]}
    expected |= {f"blocks.temporal.recurrence.{name}" for name in recurrence}
    expected |= {f"{way}_pool_{i}.{name}" for way in ("down", "up") for i in (0, 1) for name in ("bias", "kernel")}
    expected |= {"head.dense.bias", "head.dense.kernel", "head.norm.bias", "head.norm.scale"}
    assert set(arrays) == expected
    np.testing.assert_array_equal(arrays["head.dense.kernel"], Run(run).weights().params["head"]["dense"]["kernel"])


def test_raw_weights(make_run, tmp_path):
    def raw(state):
        return state | {"params": jax.tree.map(lambda v: v + 1, state["params"])}

    run = make_run(raw)
    export_run(run, tmp_path / "raw", raw=True, num_samples=0)
    model = harmonic.load(tmp_path / "raw")
    same(model.params, Run(run).weights(raw=True).params)
    assert model.about["weights"]["kind"] == "params" and "the raw ones" in (tmp_path / "raw/README.md").read_text()


def test_the_card(run, tmp_path, tiny_data):
    """Front matter that the hub reads, the figures of these very weights alone, and how to train and generate."""
    run = Path(shutil.copytree(run, tmp_path / "run"))
    fingerprint = json.loads((tiny_data / "manifest.json").read_text())["fingerprint"]
    test = {"step": 7, "weights": "ema", "fingerprint": fingerprint, "bits_per_sample": 4.25, "recordings": 2}
    test |= {"samples": 1_000, "markov_bits": 5.5, "histogram_entropy_bits": 6.5}
    command = (
        f"python -m workflows.full_run --config=tiny --source={tmp_path}/mine.zip --workdir={tmp_path} --set=seed=3"
    )
    perceptual = {
        "step": 7,
        "num_samples": 64,
        "generated": {"fid": 0.5, "is": 6.25},
        "rejected": {"fid": 0.25, "kept": 9},
    }
    (run / "evaluation.json").write_text(json.dumps({"test": test}))
    (run / "perceptual.json").write_text(json.dumps(perceptual))
    (run / "summary.json").write_text(json.dumps({"command": command, "platform": "cpu (2 cores)"}))
    export_run(run, tmp_path / "tiny", license_name="cc-by-4.0", num_samples=0, repo="someone/tiny")
    _, front, text = (tmp_path / "tiny" / "README.md").read_text().split("---\n", 2)
    meta = yaml.safe_load(front)
    assert (meta["license"], meta["library_name"], meta["pipeline_tag"]) == (
        "cc-by-4.0",
        "harmonic-rnn",
        "text-to-audio",
    )
    assert "arxiv:2510.02401" in meta["tags"]
    assert meta["model-index"][0]["results"][0]["metrics"][0]["value"] == 4.25
    assert 'harmonic.load("someone/tiny")' in text and fingerprint in text and "**4.250**" in text and "5.500" in text
    assert "FID 0.500, IS 6.250" in text and "(9 samples) | FID 0.250" in text
    assert "python -m workflows.full_run --config=tiny --source=mine.zip --set=seed=3\n" in text
    assert str(tmp_path) not in front + text

    (run / "evaluation.json").write_text(json.dumps({"test": test | {"step": 6}}))
    (run / "perceptual.json").write_text(json.dumps(perceptual | {"step": 6}))
    (run / "summary.json").unlink()
    export_run(run, tmp_path / "tiny", num_samples=0)
    _, front, text = (tmp_path / "tiny" / "README.md").read_text().split("---\n", 2)
    assert not {"license", "model-index"} & set(yaml.safe_load(front))
    assert "4.250" not in text and "FID" not in text and "not evaluated" in text
    assert "workflows.train --config=config.json" in text
    assert harmonic.config.load_config(str(tmp_path / "tiny" / "config.json")) == Run(run).weights().config


def test_the_cards_lines_generate(exported, monkeypatch):
    code = (exported / "README.md").read_text().split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(exported.parent)
    names = {}
    exec(code.replace("seconds=1,", "seconds=0.1,"), names)
    assert names["audio"].shape == (1, 1_600)


def test_sources_and_commands_keep_secrets():
    assert public_source("https://me:pw@host/a/b.zip?sig=1#x") == "https://host/a/b.zip"
    assert public_source("/home/me/b.zip") == public_source("~/b.zip") == "b.zip"
    assert [public_source(s) for s in ("hub", "synth", "hf:a/b@main", "gs://b/c")] == [
        "hub",
        "synth",
        "hf:a/b@main",
        "gs://b/c",
    ]
    command = (
        "python -m workflows.full_run --workdir /home/me/x --data_dir=/d --source 'https://h/a b.zip?k=1' --set=a=b"
    )
    assert public_command(command) == "python -m workflows.full_run --source 'https://h/a b.zip' --set=a=b"


def test_both_doors_have_the_data_set_s_codec(make_run, tiny_data, tmp_path):
    """Prompts are scaled, and trimmed, as its recordings are, from the run's folder and from an export of it."""
    run = make_run()
    manifest = dataclasses.replace(load_manifest(tiny_data), loudness=-23.0, trim_silence=40.0)
    (run / "manifest.json").write_text(manifest.to_json())
    export_run(run, tmp_path / "out", num_samples=0)
    codec = Codec.of(manifest)
    assert (codec.loudness, codec.trim_silence, codec.published) == (-23.0, 40.0, False)
    assert harmonic.load(run).voice.codec == harmonic.load(tmp_path / "out").voice.codec == codec
    assert Codec.of(dataclasses.replace(manifest, dataset="sc09")).published


def test_generate_and_stream(exported, tmp_path):
    """Streams are those of any batch and any pieces; a prompt comes first, from an array as from a file."""
    model, settings = harmonic.load(exported), {"seed": 5, "temperature": 0.9}
    whole = model.generate(seconds=0.3, num_samples=2, **settings)
    np.testing.assert_array_equal(whole[:1], model.generate(seconds=0.3, **settings))
    assert not np.array_equal(whole[0], model.generate(seconds=0.3, seed=6, temperature=0.9)[0])
    pieces = list(model.stream(seconds=0.3, num_samples=2, **settings))
    assert [piece.shape for piece in pieces] == [(2, 1_600)] * 3
    np.testing.assert_array_equal(np.concatenate(pieces, axis=1), whole)
    np.testing.assert_array_equal(next(model.stream(num_samples=2, **settings)), whole[:, :1_600])

    prompt = np.sin(np.arange(1_000, dtype=np.float32)) / 2
    soundfile.write(tmp_path / "p.wav", prompt, 16_000, subtype="FLOAT")
    settings |= {"seconds": 0.2, "num_samples": 2}
    continued = model.generate(prompt=prompt, **settings)
    assert continued.shape == (2, 3_200) and abs(continued[:, :1_000]).max() == 1  # scaled to its own extremes
    np.testing.assert_array_equal(continued, model.generate(prompt=str(tmp_path / "p.wav"), **settings))
    np.testing.assert_array_equal(continued, model.generate(prompt=np.stack([prompt] * 2), **settings))
    # Where recordings are on one scale, at a loudness, a prompt is brought to it: half as loud, it is the same.
    quiet, loud = (dataclasses.replace(model, loudness=loudness) for loudness in (-29.0, -23.0))
    peaks = [abs(next(one.stream(prompt=prompt, **settings))).max() for one in (quiet, loud)]
    assert peaks[1] < 0.9 and peaks[1] / peaks[0] == pytest.approx(10 ** (6 / 20), rel=0.1)
    # The two gains are rounded: a sample at the border of two levels may take either.
    full, half = (next(loud.stream(prompt=factor * prompt, **settings))[:, :1_000] for factor in (1, 0.5))
    assert (full == half).mean() > 0.99 and abs(full - half).max() < 0.01

    soundfile.write(tmp_path / "8.wav", prompt, 8_000)
    for settings, said in (
        ({"seconds": 0}, "seconds=0 is impossible"),
        ({"seconds": float("nan")}, "seconds=nan is impossible"),
        ({"num_samples": 0}, "num_samples=0 is impossible"),
        ({"temperature": 0}, "temperature=0 is impossible"),
        ({"prompt": prompt, "seconds": 1_000 / 16_000}, "counts prompt and continuation together"),
        ({"prompt": tmp_path / "8.wav"}, "is at 8,000 Hz, but the model's audio is at 16,000 Hz"),
        ({"prompt": prompt[:0]}, "must be floats"),
        ({"prompt": np.zeros(9, np.int16)}, "not int16[9]"),
        ({"prompt": np.full(9, np.nan)}, "not finite"),
        ({"prompt": np.zeros((3, 9))}, "[1, samples], not float64[3, 9]"),
    ):
        assert said in refused(model.generate, **settings)


def test_the_piano_in_the_box_makes_sound():
    """The weights that are installed with the package are whole, small, and not silent."""
    assert "piano" in pretrained.in_the_box()
    assert (pretrained.BOX / "piano" / "model.safetensors").stat().st_size < 3_000_000
    sound = harmonic.load("piano").generate(seconds=0.1, num_samples=2)
    assert sound.shape == (2, 1_600) and np.ptp(sound, axis=1).min() > 0.01


def test_a_model_in_the_box(exported, tmp_path, monkeypatch):
    """It is loaded by its name, unless a folder has that name; an unknown name is told which there are."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pretrained, "BOX", tmp_path / "box")
    assert "nor one in the box (none)" in refused(harmonic.load, "piano")
    shutil.copytree(exported, tmp_path / "box" / "piano")
    (tmp_path / "box" / "half").mkdir()  # no config.json
    assert pretrained.in_the_box() == ["piano"]
    same(harmonic.load("piano").params, harmonic.load(exported).params)
    assert "nor one in the box (piano)" in refused(harmonic.load, "violin")
    assert "nor one in the box (piano)" in refused(harmonic.load, "../box/piano/config.json")
    assert "which has no revisions" in refused(harmonic.load, "piano", revision="main")
    (tmp_path / "box" / "piano" / "model.safetensors").write_bytes(b"")
    assert "install harmonic-rnn again" in refused(harmonic.load, "piano")
    (tmp_path / "piano").mkdir()
    assert "neither an export" in refused(harmonic.load, "piano")


def test_what_stands_in_the_folder(run, exported, tmp_path):
    """Exports are replaced, other things are not, and nothing that is not an export's is ever removed."""
    folder = Path(shutil.copytree(exported, tmp_path / "out"))
    (folder / "sample_7.wav").write_bytes(b"of an earlier export")
    (folder / "LICENSE").write_text("mine")
    (folder / "model.safetensors").write_bytes(b"")
    export_run(run, folder, num_samples=0)
    assert files_of(folder) == files_of(exported) | {"LICENSE": b"mine"} | {"README.md": files_of(folder)["README.md"]}

    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "config.json").write_text("{}")
    assert "holds something else than an export" in refused(export_run, run, tmp_path / "full")
    assert files_of(tmp_path / "full") == {"config.json": b"{}"}
    export_run(run, tmp_path / "full", num_samples=0, overwrite=True)
    harmonic.load(tmp_path / "full")
    (tmp_path / "file").write_text("")
    assert "is a file" in refused(export_run, run, tmp_path / "file")


def test_an_export_that_is_broken_off_leaves_nothing(run, tmp_path, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(pretrained.Pretrained, "generate", interrupt)
    with pytest.raises(KeyboardInterrupt):
        export_run(run, tmp_path / "out")
    assert not [*tmp_path.iterdir()]


def test_killed_while_it_replaces_an_export(copy, run):
    """New weights beside the old config: refused until the same command has been given again."""
    arrays = safetensors.numpy.load_file(copy / "model.safetensors")
    arrays["head.dense.bias"] = arrays["head.dense.bias"] + 1
    (copy / "model.safetensors").write_bytes(safetensors.numpy.save(arrays))
    line = refused(harmonic.load, copy)
    assert "does not match its checksum" in line and "export it again" in line
    export_run(run, copy, num_samples=0)
    harmonic.load(copy)


def rewrite(folder, change):
    """Other weights, their checksum in the config."""
    arrays = safetensors.numpy.load_file(folder / "model.safetensors")
    change(arrays)
    (folder / "model.safetensors").write_bytes(safetensors.numpy.save(arrays))
    edit(folder, lambda raw: raw["weights"].update(sha256=_sha256(folder / "model.safetensors")))


def _sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def edit(folder, change):
    raw = json.loads((folder / "config.json").read_text())
    change(raw)
    (folder / "config.json").write_text(json.dumps(raw))


def cut(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def flip(folder):
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)


def written(name, data):
    return lambda folder: (folder / name).write_bytes(data)


def model_field(**fields):
    return lambda folder: edit(folder, lambda raw: raw["config"]["model"].update(fields))


def field(**fields):
    return lambda folder: edit(folder, lambda raw: raw.update(fields))


def arrays(**changed):
    """Other weights under their names, with _ for the dot; none for None."""

    def change(held):
        for name, array in changed.items():
            name = name.replace("_", ".")
            held[name] = array
            if array is None:
                del held[name]

    return lambda folder: rewrite(folder, change)


UNREADABLE = "cannot be read as safetensors"
SPOILT = {
    "cut": (cut, UNREADABLE),
    "empty": (written("model.safetensors", b""), UNREADABLE),
    "huge header": (written("model.safetensors", b"\xff" * 64), UNREADABLE),
    "flipped": (flip, "does not match its checksum in config.json"),
    "nan": (arrays(head_norm_bias=np.full(8, np.nan, np.float32)), "(NaN or infinity), first in head.norm.bias"),
    "missing name": (arrays(head_norm_bias=None), "head.norm.bias is missing"),
    "other name": (arrays(lm_head=np.ones(2)), "lm.head is superfluous"),
    "other type": (
        arrays(head_norm_bias=np.zeros(8, np.float16)),
        "head.norm.bias is F16[8] there and F32[8] by config.json",
    ),
    "other width": (model_field(width=16), "is of another architecture: "),
    "other format": (field(format=2), "is of format 2; this version reads 1"),
    "unknown field": (model_field(heads=8), "unknown config field 'model.heads'"),
    "impossible value": (model_field(width=-1), "model.width=-1 is impossible"),
    "no rate": (field(sample_rate=None), "is damaged: sample_rate is None"),
    "no checksum": (field(weights={}), "is damaged: weights is {}"),
    "odd data": (field(data=[]), "is damaged: data is []"),
    "other config": (written("config.json", b'{"model_type": "gpt2"}'), "is not that of a HarmonicRNN export"),
    "no JSON": (written("config.json", b"{"), "cannot be read as JSON"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "is neither an export (config.json, model."),
}


@pytest.mark.parametrize("name", SPOILT)
def test_spoilt_exports(copy, name):
    spoil, said = SPOILT[name]
    spoil(copy)
    line = refused(harmonic.load, copy)
    assert said in line and str(copy) in line


def test_nothing_in_a_folder_is_executed(copy, tmp_path):
    """Code beside the weights is not read; code instead of weights is refused."""

    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    (copy / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    (copy / "modeling_harmonic.py").write_text(f"import os; os.mkdir({str(tmp_path / 'executed')!r})")
    harmonic.load(copy)
    (copy / "model.safetensors").unlink()
    assert "pytorch_model.bin is not read: a file of its kind can run code" in refused(harmonic.load, copy)
    (copy / "model.safetensors").write_bytes(pickle.dumps(Bomb()))
    assert "cannot be read as safetensors" in refused(harmonic.load, copy)
    assert not (tmp_path / "executed").exists()


def test_runs_without_a_model(make_run, run, tmp_path):
    assert "is not a run's folder" in refused(export_run, tmp_path, tmp_path / "out")
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    assert "has no checkpoints; train it first" in refused(export_run, tmp_path / "run", tmp_path / "out")
    assert "has no checkpoints; train it first" in refused(harmonic.load, tmp_path / "run")
    assert "has no checkpoint 3" in refused(export_run, run, tmp_path / "out", checkpoint="3")
    nan = make_run(lambda state: state | {"ema": jax.tree.map(lambda v: v * np.nan, state["ema"])})
    assert "not finite" in refused(export_run, nan, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_names_that_are_no_models(exported, tmp_path, the_hub):
    for name in ("tiny", "a/b/c", "./no/such", "/no/such", "", "a b/c", "../x/y"):
        assert "is neither a folder nor a model of the hub" in refused(harmonic.load, name) or name == ""
    assert "has no revisions" in refused(harmonic.load, exported, revision="main")
    assert not the_hub.requests


def test_a_download_that_arrives_damaged(the_hub, exported):
    the_hub.add("a/c", files_of(exported))
    the_hub.damage = lambda data: data[:-1] + bytes([data[-1] ^ 1]) if len(data) > 5_000 else data
    line = refused(harmonic.load, "a/c")
    assert "does not match its checksum" in line and f"remove {hub.cache_folder('a/c')} and load it again" in line
    the_hub.damage = lambda data: data
    shutil.rmtree(hub.cache_folder("a/c"))
    harmonic.load("a/c")
