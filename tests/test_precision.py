"""`model.precision`: what is asked of products of float32 matrices, in every program that runs a model."""

import dataclasses
import importlib
import json
import re

import jax
import numpy as np
import pytest
from tiny import batch_of, config

from harmonic import compress, evaluate, generate, models
from harmonic.config import MeshConfig, from_dict, load_config, override
from harmonic.errors import UserError
from harmonic.mesh import make_mesh
from harmonic.run import Run
from harmonic.step import make_loss_and_grad

PRECISIONS = ("default", "high", "highest")


def model_of(kind, precision):
    small = importlib.import_module(f"harmonic.models.{kind}.config").SMALL
    return models.make(dataclasses.replace(small, precision=precision))


def loss(model):
    """The gradient of the loss as a program, with arguments."""
    tokens = np.random.default_rng(0).integers(0, 256, (2, 2, model.multiple, 1)).astype(np.uint8)
    lengths = np.array([2 * model.multiple, model.multiple + 1], np.int32)
    conditions = {"label": np.zeros(2, np.int32)} if model.labels else {}
    batch = batch_of(tokens, lengths, np.arange(2, dtype=np.int32), **conditions)
    words = np.array([1, 2], np.uint32) if model.random else None
    params = jax.jit(model.init)(jax.random.key(0))
    return jax.jit(make_loss_and_grad(model, make_mesh(MeshConfig()))), (params, batch, words)


def programs(model):
    """Each program that runs a model, with arguments: loss and gradient, evaluation, prompts, generation, the coder."""
    yield loss(model)
    params, key = jax.eval_shape(model.init, jax.random.key(0)), jax.random.key(0)
    tokens, labels = np.zeros((2, model.multiple, 1), np.uint8), np.zeros(2, np.int32)
    conditions = {"label": labels} if model.labels else {}
    state = jax.eval_shape(lambda: model.init_state(2))
    yield evaluate._segment_function(model), (params, tokens, labels, labels, state)
    yield generate._prefill_function(model), (params, {"tokens": tokens, **conditions}, state)
    yield generate._force_function(model), (params, {"tokens": tokens, **conditions}, state)
    yield generate._prepare_function(model), (params,)
    weights = jax.eval_shape(generate._prepare_function(model), params)
    settings = (np.int32(0), np.int32(4), np.ones(2, np.float32))
    yield generate._chunk_function(model, 4, "cpu"), (weights, conditions, state, jax.random.split(key), *settings)
    if not model.labels:
        start, step = compress._functions(model, "cpu")
        yield start, (params,)
        yield step, (*jax.eval_shape(start, params), np.zeros(64, np.int32), np.int32(3), np.bool_(False))


@pytest.mark.parametrize("kind", models.kinds())
@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_product_has_the_precision(kind, precision):
    products = []
    for program, arguments in programs(model_of(kind, precision)):
        lines = [line for line in program.lower(*arguments).as_text().splitlines() if "stablehlo.dot_general" in line]
        asked = [set(re.findall(r"precision = \[(\w+), (\w+)\]", line)) for line in lines]
        assert all(found == {(precision.upper(),) * 2} for found in asked), lines
        products.append(len(lines))
    assert products[0] > products[1] > 0  # the backward pass has products of its own


_EVERY_KIND = [pytest.param(k, marks=[] if k == models.DEFAULT_KIND else pytest.mark.slow) for k in models.kinds()]


@pytest.mark.laws
@pytest.mark.parametrize("kind", _EVERY_KIND)
def test_no_bit_depends_on_it_on_a_cpu(kind):
    """Of a loss and its gradient."""
    made = []
    for precision in ("default", "highest"):
        program, arguments = loss(model_of(kind, precision))
        made.append(jax.tree.leaves(program(*arguments)))
    for mine, theirs in zip(*made, strict=True):
        np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("kind", models.kinds())
def test_a_run_may_change_it(kind):
    """It decides no weight, and configs from before it have the default."""
    made = models.config_class(kind)()
    assert made.precision == "high" and "precision" in made.free and "precision" not in made.architecture()


def test_old_configs_load(reference_run, tiny_data):
    raw = json.loads((reference_run / "config.json").read_text())
    del raw["model"]["precision"]
    assert from_dict(raw) == load_config(str(reference_run / "config.json"))
    run = Run(reference_run)
    run.check(config("model.precision=highest"), tiny_data, run.manifest)


def test_other_values_are_refused():
    with pytest.raises(UserError, match=r"model\.precision"):
        override(config(), ["model.precision=float16"])
