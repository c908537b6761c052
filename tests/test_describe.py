"""What is told before anything is run, against what is then compiled."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from harmonic import mesh as meshes
from harmonic import program
from harmonic.config import load_config, override
from harmonic.describe import describe, fits, memory
from harmonic.models import HarmonicRNN
from harmonic.step import init_state, make_train_step


def compiled_step(config):
    """The training step of a config, compiled for shapes alone."""
    model, mesh = HarmonicRNN(config.model, config.data.num_levels), meshes.make_mesh(config.mesh)

    def shape(spec, *size, dtype=jnp.int32):
        return jax.ShapeDtypeStruct(size, dtype, sharding=meshes.sharding(mesh, spec))

    state = jax.eval_shape(lambda: init_state(config, model))
    state = jax.tree.map(lambda v: shape(meshes.REPLICATED, *v.shape, dtype=v.dtype), state)
    (segments, length), rows = config.segments, config.train.global_batch_size
    batch = {
        "tokens": shape(meshes.TOKENS, segments, rows, length, 1, dtype=jnp.uint8),
        "length": shape(meshes.ROWS, rows),
        "row": shape(meshes.ROWS, rows),
    }
    key, number = jax.eval_shape(lambda: jax.random.key(0)), shape(meshes.REPLICATED)
    return make_train_step(model, config, mesh).lower(state, batch, key, number).compile()


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
    config = override(load_config("sc09_small"), ["data.window_length=16000", *assignments])
    actual = program.memory(compiled_step(config))
    assert memory(config)["total"] == pytest.approx(actual.temporaries + actual.arguments, rel=0.25)


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


def test_command():
    command = [sys.executable, "-m", "workflows.describe", "--config=sc09", "--format=json", "--device_gib=80"]
    told = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert told["parameters"]["total"] == 7_272_704
    assert told["fits"]["device_bytes"] == 80 << 30
    assert told == json.loads(json.dumps(describe(load_config("sc09"), device_bytes=80 << 30)))
