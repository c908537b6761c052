"""Configs: what is refused and how, overrides, files, and the configs that ship."""

import dataclasses
import json

import pytest

from harmonic.config import Config, Stage, TrainConfig, config_names, from_dict, load_config, override
from harmonic.errors import UserError
from harmonic.models.harmonic_rnn.config import ModelConfig

STAGE = '{"start": 5, "window_length": 320, "global_batch_size": 2}'


@pytest.mark.parametrize(
    ("assignment", "path", "value"),
    [
        ("train.steps=200", ("train", "steps"), 200),
        ("train.learning_rate=1", ("train", "learning_rate"), 1.0),
        ("train.ema_debias=true", ("train", "ema_debias"), True),
        ("model.pool_factors=4,4", ("model", "pool_factors"), (4, 4)),
        ("model.pool_factors=8", ("model", "pool_factors"), (8,)),
        ("model.embedding=learned", ("model", "embedding"), "learned"),
        ("data.dataset=123", ("data", "dataset"), "123"),
        ("model.blocks_per_level=1,2,3,4,5", ("model", "blocks_per_level"), (1, 2, 3, 4, 5)),
        ("seed=3", ("seed",), 3),
        ("train.optimizer=muon", ("train", "optimizer"), "muon"),
        ("model.max_angle=1", ("model", "max_angle"), 1.0),
        ("model.max_angle=1,1,1,1,0.5", ("model", "max_angle"), (1.0, 1.0, 1.0, 1.0, 0.5)),
        (
            'train.stages=[{"start": 5, "window_length": 320, "global_batch_size": 2}]',
            ("train", "stages"),
            (Stage(5, 320, 2),),
        ),
    ],
)
def test_override(assignment, path, value):
    node = override(Config(), [assignment])
    for name in path:
        node = getattr(node, name)
    assert node == value and type(node) is type(value)


def test_overrides_are_checked_together():
    config = override(Config(), ["model.width=32", "model.pool_groups=32", "model.pool_factors=()"])
    assert config.model.pool_factors == () and config.model.multiple == 1


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("train.stepz=2", ["train.stepz", "did you mean train.steps"]),
        ("trian.steps=2", ["trian", "did you mean train"]),
        ("steps=2", ["steps"]),
        ("train=2", ["train"]),
        ("train.steps", ["--set=train.steps", "no value"]),
        ("train.steps=2.5", ["train.steps=2.5", "a whole number"]),
        ("train.steps=many", ["train.steps='many'", "a whole number"]),
        ("train.steps=0", ["train.steps=0", "at least 1"]),
        ("train.learning_rate=-1", ["train.learning_rate=-1", "above 0"]),
        ("train.learning_rate=nan", ["train.learning_rate", "a number"]),
        ("train.ema_debias=1", ["train.ema_debias=1", "true or false"]),
        ("model.embedding=fourier", ["model.embedding='fourier'", "sinusoidal, linear, learned"]),
        ("model.pool_factors=2,x", ["model.pool_factors"]),
        ("model.pool_factors=1", ["model.pool_factors=(1,)", "from 2 on"]),
        ("model.pool_groups=3", ["model.pool_groups=3", "a divisor of model.width=128"]),
        ("model.gate_blocks=7", ["model.gate_blocks=7", "a divisor"]),
        ("model.blocks_per_level=1,2", ["model.blocks_per_level", "or 5"]),
        ("model.dropout=1.0", ["model.dropout=1.0", "below 1"]),
        ("train.segment_length=100", ["train.segment_length=100", "a multiple of 160", "such as 160"]),
        ("mesh.data=3", ["train.global_batch_size=32", "mesh.data=3"]),
        ("data.crop_length=-1", ["data.crop_length=-1"]),
        ("generate.top_p=0", ["generate.top_p=0", "above 0"]),
        ("data.encoding=alaw", ["data.encoding='alaw'", "mu_law, linear"]),
        ("seed=-1", ["seed=-1"]),
        ("train.optimizer=sgd", ["train.optimizer='sgd'", "adamw, muon"]),
        ("train.schedule=step", ["train.schedule='step'", "constant, linear, cosine"]),
        ("train.decay_start=1", ["train.decay_start=1.0", "below 1"]),
        ("train.stages=5", ["train.stages", "named fields"]),
        ('train.stages=[{"start": 5}]', ["train.stages", "window_length", "global_batch_size"]),
        (
            'train.stages=[{"start": 5, "window_length": 300, "global_batch_size": 2}]',
            ["window_length=300", "a multiple of 160", "such as 320"],
        ),
        (
            'train.stages=[{"start": 0, "window_length": 320, "global_batch_size": 2}]',
            ["train.stages: start=0", "at least 1"],
        ),
        (
            f"train.stages=[{STAGE}, {STAGE}]",
            ["train.stages=[5, 5]", "each start after the one before"],
        ),
        ("model.max_angle=3.5", ["model.max_angle=3.5", "a whole circle"]),
        ("model.max_radius=1", ["model.min_radius", "below 1"]),
        ("model.max_radius=0.99,0.9", ["model.max_radius", "or 5"]),
        ("name=a/b", ["name='a/b'"]),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(assignment, words):
    with pytest.raises(UserError) as error:
        override(Config(), [assignment])
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_json_round_trip(tmp_path):
    config = override(Config(name="mine"), ["model.blocks_per_level=1,2,3,4,5", "train.steps=7"])
    path = tmp_path / "config.json"
    path.write_text(config.to_json())
    assert load_config(str(path)) == config
    assert from_dict(json.loads(config.to_json())) == config


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"model": 3}', '{"model": {"width": "128"}}', '{"modle": {}}', "null"]
)
def test_broken_config_files_are_refused(tmp_path, text):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(UserError):
        load_config(str(path))


def test_config_of_ones_own(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("from harmonic.config import Config\ndef get_config():\n    return Config(name='mine')\n")
    assert load_config(str(path)).name == "mine"
    path.write_text("x = 1\n")
    with pytest.raises(UserError, match="no get_config"):
        load_config(str(path))
    path.write_text("def get_config():\n    return 3\n")
    with pytest.raises(UserError, match="returned int"):
        load_config(str(path))
    with pytest.raises(UserError, match="does not exist"):
        load_config(str(tmp_path / "absent.py"))


@pytest.mark.parametrize(("text", "words"), [("def", "SyntaxError"), ("import absent_", "absent_"), ("1 / 0", "Zero")])
def test_a_config_that_cannot_be_run_is_named(tmp_path, text, words):
    (tmp_path / "bad.py").write_text(text)
    with pytest.raises(UserError, match=rf"bad\.py cannot be run: .*{words}"):
        load_config(str(tmp_path / "bad.py"))


def test_unknown_config_lists_the_known():
    with pytest.raises(UserError, match=r"unknown config 'sc10'; use .*demo.*sc09"):
        load_config("sc10")


@pytest.mark.parametrize("name", config_names())
def test_configs_that_ship(name):
    config = load_config(name)
    assert from_dict(json.loads(config.to_json())) == config
    module = __import__(f"configs.{name.replace('/', '.')}", fromlist=["x"])
    assert f"--config={name}" in module.__doc__ or name == "demo", "the docstring gives the command"


@pytest.mark.parametrize("name", ["sc09", "beethoven", "youtubemix"])
def test_paper_configs_are_the_papers(name):
    config = load_config(name)
    assert config.model == ModelConfig()
    paper = TrainConfig()
    ours = dataclasses.asdict(config.train)
    for field in ("global_batch_size", "learning_rate", "warmup_steps", "weight_decay", "ema_decay", "ema_debias"):
        assert ours[field] == getattr(paper, field)
    assert (config.train.clip_norm, config.train.skip_norm) == (200, 1_000)


def test_segments_cover_the_window():
    config = override(Config(), ["data.window_length=960_512"])
    assert config.segments == (1, 960_640)
    assert override(config, ["train.segment_length=16_000"]).segments == (61, 16_000)
    assert override(config, ["data.crop_length=4_000"]).segments == (1, 4_000)
    assert override(config, ["mesh.seq=8"]).segments == (1, 961_280)


def test_configs_that_people_have_still_load(tmp_path):
    """Those written beside their recordings, and those of before models had kinds."""
    made = "def get_config():\n    return Config(model=ModelConfig(width=64, pool_groups=1))\n"
    for line in ("from harmonic.config import Config, ModelConfig", "from harmonic.config import *"):
        (tmp_path / "mine.py").write_text(f"{line}\n\n{made}")
        assert load_config(str(tmp_path / "mine.py")).model == ModelConfig(width=64, pool_groups=1)
    raw = json.loads(Config().to_json())
    del raw["model"]["kind"], raw["model"]["kernel"]
    assert from_dict(raw) == Config()


def test_a_kind_brings_its_own_fields():
    with pytest.raises(UserError, match="'gpt' is impossible: it must be one of harmonic_rnn"):
        override(Config(), ["model.kind=gpt"])
    with pytest.raises(UserError, match="'os' is impossible"):
        from_dict({"model": {"kind": "os"}})
    assert override(Config(), ["model.width=64", "model.kind=harmonic_rnn", "model.pool_groups=2"]).model.width == 64
