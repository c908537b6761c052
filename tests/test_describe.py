"""What is told before anything is run, against what is then compiled."""

import dataclasses
import json
import math
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from tiny import batch_of

from harmonic import hlo
from harmonic import mesh as meshes
from harmonic.config import Config, DataConfig, MeshConfig, load_config, override
from harmonic.describe import bounds, costs, describe, fits, memory, weight_bytes
from harmonic.models import make
from harmonic.models.harmonic_rnn.config import ModelConfig
from harmonic.step import make_loss_and_grad, make_train_step, step_shapes


def compiled_step(config):
    """The training step of a config, compiled for shapes alone."""
    model, mesh = make(config.model, config.data.num_levels), meshes.make_mesh(config.mesh)
    return make_train_step(model, config, mesh).lower(*step_shapes(model, config, mesh)).compile()


@pytest.mark.parametrize(
    "assignments",
    [
        ["train.global_batch_size=8"],
        ["train.global_batch_size=4", "train.segment_length=3200", "mesh.seq=4", "mesh.data=2"],
        ["train.global_batch_size=8", "train.accumulate=4", "model.pool_factors=()", "model.blocks_per_level=4"],
        ["train.global_batch_size=2", "model.width=64", "model.state_width=256", "model.pool_groups=2"],
    ],
    ids=["batch", "segments on a mesh", "no pooling, in parts", "wide states"],
)
def test_memory_is_as_foretold(assignments):
    config = override(load_config("sc09_small"), ["data.window_length=16000", "train.stages=()", *assignments])
    actual = hlo.memory(compiled_step(config))
    assert memory(config)["total"] == pytest.approx(actual.temporaries + actual.arguments, rel=0.25)


def test_memory_is_that_of_the_largest_stage():
    stage = '{"start": 5, "window_length": 32000, "global_batch_size": 16}'
    config = override(load_config("sc09_small"), [f"train.stages=[{stage}]"])
    assert memory(config) == memory(config.at(5)) and memory(config)["total"] > memory(config.at(0))["total"]


def test_what_fits_fits_and_no_more():
    config = override(load_config("sc09"), ["train.segment_length=3200", "mesh.seq=4"])
    room = 2 << 30
    found = fits(config, room)

    def total(*assignments):
        return memory(override(config, assignments))["total"]

    for assignments in (
        ["train.segment_length=0", "data.window_length={longest_segment}"],
        ["data.window_length={longest_window}"],
        ["train.global_batch_size={largest_batch}"],
    ):
        at_most = [a.format(**found) for a in assignments]
        more = [f"{a.partition('=')[0]}={int(a.partition('=')[2]) + 640}" if "segment" not in a else a for a in at_most]
        assert total(*at_most) <= room < total(*more)
    assert fits(config, 1_000)["largest_batch"] == 0


def test_memory_falls_with_shards_and_parts():
    config = override(load_config("sc09"), ["train.global_batch_size=8", "data.window_length=51200"])
    whole = memory(config)["activations"]
    for assignments in (["mesh.seq=8"], ["mesh.data=8"], ["mesh.seq=4", "mesh.data=2"], ["train.accumulate=8"]):
        assert memory(override(config, assignments))["activations"] == pytest.approx(whole / 8, rel=0.01)


def test_operations_of_the_papers_model():
    """By hand: 5.48 M operations a sample forward, 10.7 MB of weights."""
    counts = costs(load_config("sc09")).operations
    # 8 blocks at the rates 1, 1/2, 1/8 and 1/32, 4 at 1/160. In each 128 x 256, 2 x 32 of 8 x 4, 256 x 128, 2 of
    # 128 x 128 and 6 of 128 x 128; the head has 128 x 256.
    blocks = 8 * (1 + 1 / 2 + 1 / 8 + 1 / 32) + 4 / 160
    matrices = 128 * 256 + 2 * 32 * 8 * 4 + 256 * 128 + 8 * 128 * 128
    head = 2 * 128 * 256
    assert blocks == 13.275 and matrices == 198_656
    assert counts["forward"]["dense"] == round(2 * blocks * matrices + head)
    assert counts["forward"]["pooling"] == round(2 * 2 * 128 * (1 + 1 / 2 + 1 / 8 + 1 / 32))
    assert counts["forward"]["recurrence"] == round(blocks * 128 * 8)
    assert counts["forward"]["total"] == pytest.approx(5.48e6, rel=0.005)
    assert counts["generation"]["dense"] == counts["forward"]["dense"]
    # Forward, again without the last 256 x 128, backward twice over; in segments once more.
    assert counts["training"]["dense"] == round(2 * blocks * (4 * matrices - 256 * 128) + 3 * head)
    several = costs(override(load_config("sc09"), ["train.segment_length=3200"])).operations["training"]["dense"]
    assert several == round(2 * blocks * (5 * matrices - 256 * 128) + 4 * head)

    weights = 4 * (blocks * (101_760 + 99_200) + 33_280 + 2 * (2 * 128 + 128) * (1 / 2) + 2 * (4 * 128 + 128) * (1 / 8)
                   + 2 * (4 * 128 + 128) / 32 + 2 * (5 * 128 + 128) / 160)  # fmt: skip
    assert weight_bytes(load_config("sc09")) == {str(n): round(weights / n) for n in (1, 8, 32, 1_024)}


# As wide in the state as outside and without blocks in the gates: then nothing is filled up where weights are fused.
DENSE = ModelConfig(
    width=128, state_width=128, gate_blocks=1, pool_factors=(2, 4), blocks_per_level=1, pool_groups=128, dropout=0
)
LENGTHS = (2_048, 4_096)  # the difference between two lengths leaves out what is done once


def test_operations_are_those_of_the_compiled_forward():
    """Loops are counted once, so there is one block a level; 5 % for elementwise work, which XLA counts otherwise."""
    model = make(DENSE)
    params = jax.eval_shape(model.init, jax.random.key(0))
    forward = jax.jit(lambda p, tokens: model.apply(model.prepare(p), {"tokens": tokens}, model.init_state(1))[0])
    shapes = (jax.ShapeDtypeStruct((1, length, 1), jnp.uint8) for length in LENGTHS)
    short, long = (forward.lower(params, s).compile().cost_analysis()["flops"] for s in shapes)
    counts = costs(Config(model=DENSE)).operations["forward"]
    found = (long - short) / (LENGTHS[1] - LENGTHS[0])
    assert counts["dense"] == pytest.approx(found, rel=0.05) and counts["total"] == pytest.approx(found, rel=0.05)


def matrix_operations(jaxpr, times=1):
    """Of all products in a traced function, those in loops as often as they run."""
    total = 0
    for equation in jaxpr.eqns:
        inner = times * (equation.params["length"] if equation.primitive.name == "scan" else 1)
        if equation.primitive.name == "dot_general":
            (summed, _), _ = equation.params["dimension_numbers"]
            sizes = [equation.invars[0].aval.shape[i] for i in summed]
            total += times * 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(sizes)
        for value in jax.tree.leaves(tuple(equation.params.values())):
            value = getattr(value, "jaxpr", value)
            total += matrix_operations(value, inner) if hasattr(value, "eqns") else 0
    return total


@pytest.mark.parametrize("segments", [1, 3])
def test_training_runs_forward_as_often_as_is_told(segments):
    """Read from the traced gradient, with several blocks a level; 2 % for sums that are made as products with ones."""
    model = make(dataclasses.replace(DENSE, blocks_per_level=2))
    function = make_loss_and_grad(model, meshes.make_mesh(MeshConfig()))
    params, rows = jax.eval_shape(model.init, jax.random.key(0)), jax.ShapeDtypeStruct((1,), jnp.int32)
    shapes = (jax.ShapeDtypeStruct((segments, 1, length, 1), jnp.uint8) for length in LENGTHS)
    traced = (jax.make_jaxpr(function)(params, batch_of(s, rows, rows), None) for s in shapes)
    short, long = (matrix_operations(t.jaxpr) for t in traced)
    length = LENGTHS[0]
    config = Config(model=model.config, data=DataConfig(window_length=segments * length))
    config = override(config, [f"train.segment_length={length}"])
    found = (long - short) / segments / (LENGTHS[1] - LENGTHS[0])
    assert costs(config).operations["training"]["dense"] == pytest.approx(found, rel=0.02)


def test_bounds():
    """Operations limit many streams, the reading of weights few."""
    config = load_config("sc09")
    needed, read = costs(config).operations, weight_bytes(config)
    assert bounds(config, math.inf, math.inf) == {}
    found = bounds(config, 1e12, 1e11)
    assert found["training"] == round(1e12 / needed["training"]["total"])
    few, many = round(1e11 / read["1"]), round(1e12 / needed["generation"]["total"])
    assert few < many and (found["generation"]["1"], found["generation"]["1024"]) == (few, many)
    assert "training" not in bounds(config, math.inf, 1e11)


def test_command():
    command = [sys.executable, "-m", "workflows.describe", "--config=sc09", "--format=json", "--device_gib=80"]
    command += ["--device_tflops=67", "--device_gbps=4800"]
    told = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert told["parameters"]["total"] == 7_272_704
    assert told["fits"]["device_bytes"] == 80 << 30
    expected = describe(load_config("sc09"), device_bytes=80 << 30, device_flops=67e12, device_bandwidth=4.8e12)
    assert told == json.loads(json.dumps(expected)) and told["bounds"]["training"] > 0
