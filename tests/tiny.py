"""A model and a config that are small enough for every test."""

import jax

from harmonic.checkpoint import Checkpoints
from harmonic.config import Config, override
from harmonic.models import make
from harmonic.models.harmonic_rnn.config import SMALL
from harmonic.step import init_state

MODEL = SMALL


def config(*assignments):
    base = Config(name="tiny", model=MODEL)
    return override(
        base,
        [
            "data.dataset=tiny", "data.window_length=500", "train.global_batch_size=4", "train.steps=6",
            "train.warmup_steps=2", "train.log_every=1", "train.validate_every=3", "train.checkpoint_every=2",
            "evaluate.batch_size=3", "evaluate.segment_length=300", *assignments,
        ],
    )  # fmt: skip


def parameters(dtype):
    params = jax.jit(make(MODEL).init)(jax.random.key(0))
    return jax.tree.map(lambda v: v.astype(dtype), params)


def batch_of(tokens, lengths, rows, **conditions):
    """A batch as `make_loss_and_grad`'s function and the training step take it."""
    return {"tokens": tokens, "length": lengths, "row": rows, **conditions}


def final_state(workdir, *assignments):
    """(step, state) of a run's latest checkpoint, its model and optimiser as `config(*assignments)` says."""
    checkpoints, model = Checkpoints(workdir, read_only=True), make(MODEL)
    step = checkpoints.step("latest")
    restored = checkpoints.restore(step, jax.eval_shape(lambda: init_state(config(*assignments), model))._asdict())
    checkpoints.close()
    return step, restored
