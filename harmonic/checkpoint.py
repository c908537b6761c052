"""Checkpoints of a run, by Orbax: whole or absent; the latest two and the best on validation are kept.

A checkpoint has the items `params`, `ema`, `optimizer` and `meta` (JSON: model, step, data iterator, validation), so
that evaluation and generation read the weights alone. Its `checksums.txt` covers all its files and is written last: a
folder without it is no checkpoint, and a checkpoint that no longer agrees with it is not used.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
import math
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from harmonic import files, models, processes
from harmonic.config import Config
from harmonic.errors import UserError
from harmonic.models.base import Model

_ITEMS = ("params", "ema", "optimizer")
_FOLDER = "checkpoints"
_CHECKSUMS = "checksums.txt"
_TRIES = 5  # to read a checkpoint of a run that is training and removes its old ones
_NATIVE = {"No space left": "no space is left", "File too large": "a file may not become that large"}
_LEAVING = "leaving"  # checkpoints are renamed into it before they are removed: a kill leaves no half of one
_LOGGERS = "orbax", "absl", "asyncio"


class Checkpoints:
    """The checkpoints of a run's folder.

    Saving is synchronous: on CPU the next step overwrites the very buffers that are written.

    Several processes save and restore together; with `read_only` each reads by itself.
    """

    def __init__(self, workdir: str | Path, *, read_only: bool = False):
        self.folder = Path(workdir).resolve() / _FOLDER
        if read_only and not self.folder.is_dir():
            raise UserError(
                f"{workdir} has no checkpoints; train it first: python -m workflows.train --workdir={workdir}"
            )
        self._lead = not read_only and processes.current()[0] == 0
        if self._lead:
            self._mend()
        if not read_only:
            processes.gather("")  # the others look when the folder is in order
        with _quiet():
            self._manager = _manager(self.folder, read_only)

    def save(self, step: int, items: dict[str, Any], meta: dict[str, Any], validation: float | None) -> None:
        """Writes `items` (params, ema, optimizer) and `meta`; nothing if there is a checkpoint of that step.

        Raises:
          UserError: the checkpoint cannot be written.
        """
        if step in self._manager.all_steps():
            return
        trees = {name: ocp.args.StandardSave(items[name]) for name in _ITEMS}
        try:
            with _quiet(logging.CRITICAL):
                self._manager.save(
                    step,
                    args=ocp.args.Composite(**trees, meta=ocp.args.JsonSave(meta)),
                    metrics=None if validation is None else {"validation": validation},
                    force=True,
                )
        except (OSError, ValueError) as error:
            raise self._not_written(step, error) from error
        if self._lead:
            folder = self.folder / str(step)
            files.write_whole(folder / _CHECKSUMS, files.checksums(folder, but=_CHECKSUMS))
            shutil.rmtree(self.folder / _LEAVING, ignore_errors=True)

    def _not_written(self, step: int, error: Exception) -> UserError:
        """Removes what was written of a checkpoint; the line that says why."""
        if self._lead:
            for left in self.folder.glob(f"{step}.*tmp*"):
                shutil.rmtree(left, ignore_errors=True)
        if isinstance(error, OSError):
            return files.cannot_write(self.folder / str(step), error)
        reason = next((r for sign, r in _NATIVE.items() if sign in str(error)), _first_line(error))
        return UserError(
            f"cannot write {self.folder / str(step)}: {reason}; make room there, or make it writable, then the same "
            "command goes on"
        )

    def _mend(self) -> None:
        """Removes a checkpoint that was never finished, and sets damaged ones aside.

        Raises:
          UserError: all checkpoints are damaged; or several have no checksums, which no interruption leaves behind.
        """
        with files.write_errors(self.folder):
            # Orbax would remove temporary folders in a thread, which fails when it finds them removed.
            for left in (self.folder / _LEAVING, *self.folder.glob("*.orbax-checkpoint-tmp*")):
                shutil.rmtree(left, ignore_errors=True)
            steps = [int(path.name) for path in self.folder.glob("[0-9]*") if path.name.isdigit()]
            found = {step: files.changes(self.folder / str(step), _CHECKSUMS) for step in sorted(steps)}
            damaged = {step: names for step, names in found.items() if names}
            unfinished = [step for step, names in found.items() if names is None]
            if len(unfinished) > 1:
                raise UserError(
                    f"checkpoints {unfinished} in {self.folder} have no {_CHECKSUMS}: an earlier version of this "
                    "program wrote them; go on with that one, or give another --workdir"
                )
            if damaged and [] not in found.values():
                raise self._none_left(*max(damaged.items()))
            for step, names in damaged.items():
                aside = self.folder / f"damaged-{step}"
                shutil.rmtree(aside, ignore_errors=True)
                (self.folder / str(step)).rename(aside)
                _say(f"{self._fault(step, names)}; it is set aside as {aside.name}")
            for step in unfinished:
                shutil.rmtree(self.folder / str(step))
                _say(f"checkpoint {step} in {self.folder} was never finished; it is removed")

    def _fault(self, step: int, names: list[str]) -> str:
        others = f" and {len(names) - 1} more files are" if len(names) > 1 else " is"
        return f"checkpoint {step} in {self.folder} is damaged: {names[0]}{others} not as written"

    def _none_left(self, step: int, names: list[str]) -> UserError:
        return UserError(
            f"{self._fault(step, names)}, and no other can take its place; bring one back from a copy, or give another "
            "--workdir"
        )

    def whole(self, which: str | int = "latest") -> int | None:
        """Like `step`, but only of undamaged checkpoints; a line says which ones are left out.

        Raises:
          UserError: there is no checkpoint of that step, or all are damaged.
        """
        named = which not in ("latest", "best")
        steps = self._ranked(which, self._finished()) if named else self._finished()
        found = {step: files.changes(self.folder / str(step), _CHECKSUMS) for step in steps}
        ranked = self._ranked(which, [step for step, names in found.items() if names == []]) if not named else steps
        chosen = next((step for step in ranked if found[step] == []), None)
        damaged = {step: names for step, names in found.items() if names and (which == "best" or step > (chosen or -1))}
        if damaged and chosen is None:
            raise self._none_left(*max(damaged.items()))
        for step, names in damaged.items():
            _say(f"{self._fault(step, names)}; it is left out, and {chosen} is used")
        return chosen

    def step(self, which: str | int = "latest") -> int | None:
        """The step of the `latest`, `best` (the latest, if none was validated) or numbered checkpoint; None if there
        is no checkpoint at all.

        Raises:
          UserError: there is no checkpoint of that step.
        """
        return next(iter(self._ranked(which, self._finished())), None)

    def _finished(self) -> list[int]:
        steps = sorted(self._manager.all_steps(), reverse=True)
        return [step for step in steps if (self.folder / str(step) / _CHECKSUMS).exists()]

    def _ranked(self, which: str | int, steps: list[int]) -> list[int]:
        """Which of `steps`, the latest first, may be used, in the order of preference."""
        if which == "latest":
            return steps
        if which == "best":
            scores = {step: (self._manager.metrics(step) or {}).get("validation", math.inf) for step in steps}
            return sorted(steps, key=lambda step: (scores[step], step if scores[step] < math.inf else -step))
        if not str(which).isdigit() or int(which) not in steps:
            raise UserError(f"{self.folder} has no checkpoint {which}; use latest, best or one of {steps[::-1]}")
        return [int(which)]

    def meta(self, step: int) -> dict[str, Any]:
        """The JSON part of a checkpoint."""
        return self._restore(step, {"meta": ocp.args.JsonRestore()})["meta"]

    def restore(self, step: int, targets: dict[str, Any]) -> dict[str, Any]:
        """Items of a checkpoint, in the shapes, types and shardings of `targets`.

        Raises:
          UserError: the checkpoint is damaged, or of another architecture.
        """
        return dict(self._restore(step, {k: ocp.args.StandardRestore(v) for k, v in targets.items()}).items())

    def _restore(self, step: int, args: dict[str, Any]) -> Any:
        try:
            with _quiet():
                return self._manager.restore(step, args=ocp.args.Composite(**args))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"checkpoint {step} in {self.folder} cannot be read ({_first_line(error)}); remove "
                f"{self.folder / str(step)} to go back to the one before"
            ) from error

    def close(self) -> None:
        """Releases the folder."""
        with _quiet():
            self._manager.close()


def _manager(folder: Path, read_only: bool) -> ocp.CheckpointManager:
    together = ocp.options.MultiprocessingOptions()
    if read_only:
        index = jax.process_index()
        together = ocp.options.MultiprocessingOptions(primary_host=index, active_processes={index})
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    for name in _ITEMS:
        handler = ocp.StandardCheckpointHandler(multiprocessing_options=together)
        registry.add(name, ocp.args.StandardSave, handler)
        registry.add(name, ocp.args.StandardRestore, handler)
    meta = ocp.JsonCheckpointHandler(multiprocessing_options=together)
    registry.add("meta", ocp.args.JsonSave, meta)
    registry.add("meta", ocp.args.JsonRestore, meta)
    best = BestN(get_metric_fn=lambda metrics: -metrics["validation"], n=1, keep_checkpoints_without_metrics=False)
    options = ocp.CheckpointManagerOptions(
        # Two of the latest: if the newest is damaged, the one before takes its place.
        preservation_policy=AnyPreservationPolicy([LatestN(n=2), best]),
        # Without it Orbax writes no metrics, and a later start knows no best checkpoint.
        best_fn=lambda metrics: -metrics["validation"],
        # A damaged checkpoint must not keep a reader from the others.
        lightweight_initialize=read_only,
        todelete_subdir=None if read_only else _LEAVING,
        enable_async_checkpointing=False,
        read_only=read_only,
        create=not read_only,
        multiprocessing_options=together,
    )
    return ocp.CheckpointManager(folder, options=options, handler_registry=registry)


@contextlib.contextmanager
def _quiet(level: int = logging.ERROR) -> Iterator[None]:
    """Keeps what Orbax logs below a level from the caller's log."""
    levels = {logger: logger.level for logger in map(logging.getLogger, _LOGGERS)}
    for logger, before in levels.items():
        logger.setLevel(max(level, before))
    try:
        yield
    finally:
        # After a failed save the loggers stay silent: Orbax's threads log its error again, with stack traces.
        if level < logging.CRITICAL or sys.exc_info()[0] is None:
            for logger, before in levels.items():
                logger.setLevel(before)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def check_architecture(theirs: dict[str, Any], config: Config, where: str) -> None:
    """Refuses weights of another architecture than the config's.

    Args:
      theirs: as `model_description` gives it.
      config: of the run that is to take the weights.
      where: what they are, for the error.

    Raises:
      UserError: names the fields that differ.
    """
    kind = theirs.get("kind", models.DEFAULT_KIND)
    # Fields that a later version added had one value before: their default.
    theirs, ours = {**models.config_class(kind)().architecture(), **theirs}, model_description(config)
    differing = [
        f"{key} is {theirs.get(key)!r} there and {ours[key]!r} here" for key in ours if theirs.get(key) != ours[key]
    ]
    if differing:
        raise UserError(f"{where} is a checkpoint of another architecture: {'; '.join(differing)}")


def model_description(config: Config) -> dict[str, Any]:
    """What decides a model's parameters, in JSON's types."""
    return {**config.model.architecture(), "num_levels": config.data.num_levels}


@dataclasses.dataclass(frozen=True)
class Trained:
    """A run's model with the weights of a checkpoint, ready to be evaluated or sampled.

    Attributes:
      model, params: the model and its parameters, as `model.init` names them.
      config: the run's.
      step: of the checkpoint.
      checkpoint: which one was asked for (`best`, `latest` or a step).
      kind: `ema`, or `params` where the run keeps no average.
      sha256: over the values; equal weights have equal sums.
    """

    model: Model
    params: dict[str, Any]
    config: Config
    step: int
    checkpoint: str
    kind: str
    sha256: str


class _RemovedError(Exception):
    """A run that is training has removed the checkpoint that was being read."""


def load_weights(workdir: Path, config: Config, checkpoint: str = "best", *, raw: bool = False) -> Trained:
    """Reads the weights of a run; `harmonic.run.Run.weights` is the door to it.

    Args:
      workdir: the run's folder.
      config: the run's.
      checkpoint: `best`, `latest` or a step.
      raw: read the raw weights instead of their average.

    Raises:
      UserError: there is no such checkpoint, or it is damaged.
    """
    for _ in range(_TRIES):
        with contextlib.suppress(_RemovedError):
            return _load_weights(workdir, config, checkpoint, raw)
    raise UserError(
        f"the run in {workdir} removes its checkpoints faster than they are read; raise train.checkpoint_every"
    )


def _load_weights(workdir: Path, config: Config, checkpoint: str, raw: bool) -> Trained:
    model = models.make(config.model, config.data.num_levels)
    checkpoints = Checkpoints(workdir, read_only=True)
    step = None
    try:
        step = checkpoints.whole(checkpoint)
        if step is None:
            raise UserError(f"{workdir} has no checkpoint yet; train it: python -m workflows.train --workdir={workdir}")
        check_architecture(checkpoints.meta(step)["model"], config, f"{workdir}, step {step},")
        kind = "params" if raw or not config.train.ema_decay else "ema"
        # Onto one device, whatever mesh wrote them.
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        target = jax.eval_shape(model.init, jax.random.key(0))
        target = jax.tree.map(lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=here), target)
        params = checkpoints.restore(step, {kind: target})[kind]
    except UserError as error:
        if step is not None and not (checkpoints.folder / str(step) / _CHECKSUMS).exists():
            raise _RemovedError from error
        raise
    finally:
        checkpoints.close()
    return Trained(model, params, config, step, checkpoint, kind, _sha256(params))


def _sha256(params: dict[str, Any]) -> str:
    """Over names, types, shapes and values."""
    digest = hashlib.sha256()
    for path, value in jax.tree_util.tree_leaves_with_path(params):
        value = np.asarray(value)
        digest.update(f"{jax.tree_util.keystr(path)} {value.dtype} {value.shape}\n".encode())
        digest.update(np.ascontiguousarray(value).tobytes())
    return digest.hexdigest()
