"""Values at the ends of what is allowed: what the arithmetic can do is what is checked."""

import math
import os
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from archives import mine, write_folder
from mains import ROOT
from tiny import config

from harmonic.config import MeshConfig
from harmonic.errors import UserError
from harmonic.generate import LONGEST, generate
from harmonic.mesh import make_mesh
from harmonic.models import make
from harmonic.models.categorical import sample
from harmonic.models.config import ModelConfig
from harmonic.models.dropout import Dropout, dropout
from harmonic.step import make_loss_and_grad


@pytest.mark.parametrize(
    "settings",
    [{"temperature": t} for t in (1e-6, 1e-9, 1e-37, 1e-40, 5e-324)]
    + [{"top_p": p} for p in (1e-6, 1e-37, 1e-39, 5e-324)],
    ids=str,
)
@pytest.mark.parametrize("scale", [1, 1e30])
def test_the_coldest_sample_is_the_likeliest(settings, scale):
    """Whatever the logits; and NaN, which gives token 255 for good, never comes out."""
    logits = scale * jax.random.normal(jax.random.key(0), (64, 1, 1, 256))
    uniform = jax.random.uniform(jax.random.key(1), (64, 1))
    drawn = jax.jit(lambda x, u: sample(x, u, **settings))(logits, uniform)
    np.testing.assert_array_equal(drawn, logits.argmax(-1)[:, 0])


def test_a_temperature_divides_the_logits():
    logits = 3 * jax.random.normal(jax.random.key(0), (1, 1, 1, 16))
    uniform = jnp.asarray((np.arange(4_000)[:, None] + 0.5) / 4_000, jnp.float32)
    many = jnp.broadcast_to(logits, (4_000, 1, 1, 16))
    for temperature in (0.5, 1.0, 2.0):
        counts = np.bincount(np.asarray(sample(many, uniform, temperature=temperature))[:, 0], minlength=16)
        expected = np.asarray(jax.nn.softmax(logits[0, 0, 0] / temperature))
        np.testing.assert_allclose(counts / 4_000, expected, atol=1e-3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seed": 2**63}, "seed=9223372036854775808 is impossible: it must be at least 0 and below 4,294,967,296"),
        ({"seed": 2**32}, "seed=4294967296 is impossible"),  # JAX would take it for 0
        ({"seed": -1}, "seed=-1 is impossible"),
        ({"length": LONGEST + 1}, "is impossible: it must be at least 1 and at most 2,147,418,112"),
        ({"temperature": math.nan}, "temperature=nan is impossible: it must be above 0"),
    ],
)
def test_settings_that_arithmetic_cannot_take(settings, message):
    model = make(config().model)
    with pytest.raises(UserError, match=message):
        next(generate(model, None, **{"batch": 1, "length": 1, **settings}))


def test_dropout_of_nearly_all():
    rng = Dropout(jnp.array([1, 2], jnp.uint32), jnp.arange(2), jnp.int32(0))
    dropped = dropout(jnp.ones((2, 800, 4)), 1 - 1e-11, rng, 0, 4)
    assert np.isfinite(dropped).all() and (dropped == 0).all()


def test_a_batch_of_more_samples_than_an_int32_counts():
    model = types.SimpleNamespace(
        config=ModelConfig(),
        prepare=lambda params: params,
        nats=lambda weights, inputs, lengths, **_: weights["w"] * math.log(2) * 2.0**31,
    )
    batch = {"tokens": jnp.zeros((1, 2, 1, 1), jnp.uint8), "length": jnp.array([2**30, 2**30]), "row": jnp.arange(2)}
    loss_and_grad = jax.jit(make_loss_and_grad(model, make_mesh(MeshConfig(1, 1))))
    loss, grads = loss_and_grad({"w": jnp.float32(3)}, batch, None)
    assert (float(loss), float(grads["w"])) == (pytest.approx(3), pytest.approx(1))


def test_more_samples_than_a_process_may_have_open_files(tmp_path):
    """By groups, each stream the one that it is in any batch."""
    code = (
        "import resource, sys, numpy as np; from pathlib import Path\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))\n"
        "from tiny import config\n"
        "import jax; from harmonic import voice; from harmonic.models import make\n"
        "voice._OPEN_FILES = 20\n"
        "model = make(config().model); params = model.init(jax.random.key(0))\n"
        "one = voice.Voice(model, params, voice.Codec('mu_law', 256, 16_000))\n"
        "rows = one.write(Path(sys.argv[1]), kind='sample', num_samples=70, seconds=8 / 16_000, seed=3)\n"
        "whole = np.concatenate([p.sound for p in one.pieces(8, num_samples=70, seed=3)], axis=1)\n"
        "import soundfile\n"
        "read = [soundfile.read(Path(sys.argv[1]) / row['file'])[0] for row in rows]\n"
        "print(len(rows), abs(np.stack(read) - whole).max() < 1e-4)"
    )
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT}/tests"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.stdout == "70 True\n", done.stderr


def test_more_shards_than_a_process_may_have_open_files(tmp_path):
    from harmonic import data
    from pipelines import build

    recordings = {f"{i}.wav": content for i, content in enumerate(list(mine(12).values()) * 4)}
    folder = write_folder(tmp_path / "f", recordings)
    build.prepare(build.PrepareSpec("mine", str(folder), str(tmp_path), num_shards=30))
    code = (
        "import os, resource, sys; from harmonic import data\n"
        "_, hard = resource.getrlimit(resource.RLIMIT_NOFILE)\n"
        "hard = int(sys.argv[2]) or hard; data._OTHER_FILES = 8\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir('/dev/fd')) + 10, hard))\n"
        "split = data.Dataset(sys.argv[1]).split('train')\n"
        "print(sum(len(split.read(i)) for i in range(len(split.recordings))))"
    )
    ends = []
    for hard in (0, 24):
        command = [sys.executable, "-c", code, str(tmp_path / "mine"), str(hard)]
        ends.append(subprocess.run(command, cwd=ROOT, capture_output=True, text=True))
    split = data.Dataset(tmp_path / "mine").split("train")
    assert len(split.manifest.splits["train"].shards) > 10
    assert ends[0].stdout == f"{split.lengths.sum()}\n", ends[0].stderr
    assert "shards, each an open file, and this system allows a process 24 open files" in ends[1].stderr


def test_names_that_standard_output_cannot_encode(tmp_path):
    files = {f"\u00fc{name}".replace("/", "-"): content for name, content in mine(6).items()} | {"\u00e9.wav": b""}
    source = write_folder(tmp_path / "f", files)
    command = [sys.executable, "-m", "pipelines.prepare", "--dataset=mine", f"--source={source}"]
    environment = os.environ | {"PYTHONIOENCODING": "ascii:strict"}
    done = subprocess.run(
        [*command, f"--output_dir={tmp_path}"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "") and r"skipped \xe9.wav" in done.stdout
