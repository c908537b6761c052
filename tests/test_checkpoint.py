"""Which checkpoints stay."""

import logging
import sys

import jax.numpy as jnp
import pytest

from harmonic.checkpoint import Checkpoints
from harmonic.errors import UserError


def test_the_latest_two_and_the_best_stay_and_are_known_again(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    items = {name: {"weight": jnp.ones(3)} for name in ("params", "ema", "optimizer")}
    for step, validation in ((1, 3.0), (2, 1.0), (3, 2.0), (4, 2.5), (5, None), (6, 4.0)):
        checkpoints.save(step, items, {"step": step}, validation)
    again = Checkpoints(tmp_path, read_only=True)
    assert again.whole("best") == 2 and again.whole("latest") == 6
    assert sorted(int(path.name) for path in (tmp_path / "checkpoints").glob("[0-9]*")) == [2, 5, 6]


def test_checkpoints_of_an_earlier_version_are_left_alone(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    items = {name: {"weight": jnp.ones(3)} for name in ("params", "ema", "optimizer")}
    for step in (1, 2):
        checkpoints.save(step, items, {"step": step}, None)
        (tmp_path / "checkpoints" / str(step) / "checksums.txt").unlink()
    with pytest.raises(UserError, match=r"checkpoints \[1, 2\] in .* have no checksums\.txt: an earlier version"):
        Checkpoints(tmp_path)
    assert (tmp_path / "checkpoints" / "1" / "params").is_dir() and (tmp_path / "checkpoints" / "2").is_dir()


def test_the_callers_loggers_and_hooks_stay_as_they_were(tmp_path):
    before = {name: logging.getLogger(name).level for name in ("absl", "asyncio", "orbax")}
    hook = sys.unraisablehook
    checkpoints = Checkpoints(tmp_path)
    items = {name: {"weight": jnp.ones(3)} for name in ("params", "ema", "optimizer")}
    checkpoints.save(1, items, {"step": 1}, None)
    assert checkpoints.meta(1) == {"step": 1}
    with pytest.raises(UserError, match=r"checkpoint 9 in .* cannot be read"):
        checkpoints.meta(9)
    checkpoints.close()
    assert {name: logging.getLogger(name).level for name in before} == before and sys.unraisablehook is hook
