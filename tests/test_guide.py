"""The examples of harmonic/README.md, copied out of it: a model that obeys the laws, a layout, an evaluator."""

import csv
import dataclasses
import importlib
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from harmonic import models
from harmonic.config import load_config, override
from harmonic.data import Dataset
from harmonic.evaluate import evaluate_split
from harmonic.generate import generate
from harmonic.mesh import make_mesh
from harmonic.run import Run
from harmonic.step import make_loss_and_grad
from harmonic.train import train

GUIDE = (Path(__file__).parents[1] / "harmonic/README.md").read_text()


def example(beginning):
    """The code block that begins with these words."""
    (code,) = [code for code in re.findall(r"^```python\n(.*?)^```", GUIDE, re.M | re.S) if code.startswith(beginning)]
    return code


def small(config):
    """Three steps on the tiny data set."""
    sizes = ["data.dataset=tiny", "data.window_length=320", "train.steps=3", "train.sample_every=0"]
    return override(config, [*sizes, "train.validate_every=0", "train.checkpoint_every=0", "model.width=8"])


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """The config of the example, its model's folder on the path of `harmonic.models` for as long as the tests take."""
    folder = tmp_path_factory.mktemp("guide")
    for path in ("harmonic/models/ngram/config.py", "harmonic/models/ngram/model.py", "configs/ngram.py"):
        (code,) = re.findall(rf"`{path}`:\n\n```python\n(.*?)^```", GUIDE, re.M | re.S)
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(code)
    (folder / "harmonic/models/ngram/__init__.py").touch()
    before = list(models.__path__)
    models.__path__ = [*before, str(folder / "harmonic/models")]
    importlib.invalidate_caches()
    yield load_config(str(folder / "configs/ngram.py"))
    models.__path__ = before
    for name in [name for name in sys.modules if name.startswith("harmonic.models.ngram")]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def model(config):
    return models.make(dataclasses.replace(config.model, order=3, width=8), num_levels=16)


def test_it_is_a_kind(config):
    assert "ngram" in models.kinds() and config.model.kind == "ngram"
    assert override(load_config("demo"), ["model.kind=ngram"]).model == config.model


def test_it_obeys_laws_1_and_2(model):
    """Causality; and steps give the logits and the state of the parallel forward, in one segment as in two."""
    params = jax.jit(model.init)(jax.random.key(0))
    weights, start = model.prepare(params), model.init_state(2)
    tokens = jax.random.randint(jax.random.key(1), (2, 12, 1), 0, 16)
    apply = jax.jit(lambda x, state: model.apply(weights, {"tokens": x}, state))
    logits, after = apply(tokens, start)
    for t in range(11):
        changed, _ = apply(tokens.at[:, t].add(5) % 16, start)
        np.testing.assert_array_equal(changed[:, : t + 1], logits[:, : t + 1])
        assert not np.array_equal(changed[:, t + 1], logits[:, t + 1])
    first, middle = apply(tokens[:, :6], start)
    second, _ = apply(tokens[:, 6:], middle)
    np.testing.assert_allclose(jnp.concatenate([first, second], 1), logits, atol=1e-6)
    state = start
    for t in range(12):
        out, state = model.step(weights, {}, state)
        np.testing.assert_allclose(out[:, 0], logits[:, t], atol=1e-6)
        state = model.observe(state, tokens[:, t])
    np.testing.assert_array_equal(state, after)


def test_it_obeys_law_3(config, model):
    """The loss and the gradient do not depend on the mesh, nor on the segments."""
    params = jax.jit(model.init)(jax.random.key(0))
    tokens = np.random.default_rng(2).integers(0, 16, (1, 4, 24, 1)).astype(np.uint8)
    batch = {"length": np.array([24, 20, 7, 24], np.int32), "row": np.arange(4, dtype=np.int32)}
    results = []
    for data, seq, segments in ((1, 1, 1), (1, 1, 2), (2, 2, 1), (1, 4, 2), (4, 2, 1)):
        cut = tokens.reshape(4, segments, -1, 1).swapaxes(0, 1)
        mesh = make_mesh(dataclasses.replace(config.mesh, data=data, seq=seq))
        results.append(jax.jit(make_loss_and_grad(model, mesh))(params, {"tokens": cut, **batch}, None))
    for loss, grads in results[1:]:
        np.testing.assert_allclose(loss, results[0][0], rtol=1e-5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), grads, results[0][1])


def test_it_trains_evaluates_and_generates(config, tiny_data, tmp_path):
    config = small(config)
    assert train(config, tiny_data, tmp_path / "run").step == 3
    trained, data = Run(tmp_path / "run").weights(), Dataset(tiny_data)
    found = evaluate_split(trained.model, trained.params, data.split("test"), config)
    assert found.samples == data.manifest.splits["test"].samples and 0 < found.bits_per_sample < 10
    (chunk,) = generate(trained.model, trained.params, batch=2, length=50)
    assert chunk.tokens.shape == (2, 50, 1)


def test_the_first_example():
    names = {}
    exec(example("import jax\nfrom harmonic import models").replace("sc09", "demo"), names)
    assert names["logits"].shape == (2, 1, 1, 12)  # the demo's mixture of four; 256 logits in the paper's configs


def test_the_layout(tmp_path, monkeypatch):
    from archives import wav

    from pipelines.build import PrepareSpec, prepare
    from pipelines.sources import layouts

    monkeypatch.setitem(layouts.DATA_SETS, "birds", None)  # removed again after the test
    exec(example("@dataclasses.dataclass"), {**vars(layouts), "csv": csv})
    folder = tmp_path / "birds"
    (folder / "a").mkdir(parents=True)
    rows = ["file,split,label"]
    for number, split in enumerate(("train", "validation", "test", "train")):
        (folder / f"a/{number}.wav").write_bytes(wav(seed=number))
        rows.append(f"a/{number}.wav,{split},wren")
    (folder / "splits.csv").write_text("\n".join(rows))
    manifest = prepare(PrepareSpec("birds", source=str(folder), output_dir=str(tmp_path / "data")))
    assert [manifest.splits[name].recordings for name in ("train", "validation", "test")] == [2, 1, 1]
    assert {row.label for row in Dataset(tmp_path / "data/birds").split("train").recordings} == {"wren"}


def test_the_evaluator(tiny_data, tmp_path):
    names = {"__name__": "example"}
    exec(example("import jax\n\nfrom harmonic.config"), names)
    config = small(override(load_config("demo"), ["model.state_width=16", "model.gate_blocks=4"]))
    train(config, tiny_data, tmp_path / "run", evaluators=[names["Norm"]()])
    lines = [line for line in Run(tmp_path / "run").metrics() if line["kind"] == "norm"]
    assert [line["step"] for line in lines] == [3] and lines[0]["norm"] > 0
