"""Checkpoints of a run: Orbax, whole or absent, the latest and the best on validation kept.

A checkpoint has the items `params`, `ema`, `optimizer` and `meta` (JSON: model, step, data iterator, validation), so
that evaluation and generation read the weights alone. Last of all its `checksums.txt` is written, over all its files:
without it there is no checkpoint, and what no longer agrees with it is not used.
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
from harmonic.config import Config, load_config
from harmonic.errors import UserError
from harmonic.models.base import Model

_ITEMS = ("params", "ema", "optimizer")
_FOLDER = "checkpoints"
_CHECKSUMS = "checksums.txt"
_TRIES = 5  # to read a checkpoint of a run that still trains, and removes the old ones
_NATIVE = {"No space left": "no space is left", "File too large": "a file may not become that large"}
_LEAVING = "leaving"  # checkpoints are renamed into it before they are removed: a kill leaves no half of one

logging.getLogger("orbax").setLevel(logging.ERROR)
logging.getLogger("absl").setLevel(logging.WARNING)


class Checkpoints:
    """The checkpoints of a run's folder.

    Saving is not asynchronous: on CPU the buffers that are written are the very ones that the next step overwrites.

    Of several processes all save and restore together; with `read_only`, each reads by itself.
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
            processes.gather("")  # before the others look
        together = ocp.options.MultiprocessingOptions()
        if read_only:
            index = jax.process_index()
            together = ocp.options.MultiprocessingOptions(primary_host=index, active_processes={index})
        handlers: dict[str, Any] = {
            name: ocp.StandardCheckpointHandler(multiprocessing_options=together) for name in _ITEMS
        }
        registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
        for name, handler in handlers.items():
            registry.add(name, ocp.args.StandardSave, handler)
            registry.add(name, ocp.args.StandardRestore, handler)
        registry.add("meta", ocp.args.JsonSave, meta := ocp.JsonCheckpointHandler(multiprocessing_options=together))
        registry.add("meta", ocp.args.JsonRestore, meta)
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                # Two of the latest: the one before, should the newest be damaged.
                preservation_policy=AnyPreservationPolicy(
                    [
                        LatestN(n=2),
                        BestN(
                            get_metric_fn=lambda metrics: -metrics["validation"],
                            n=1,
                            keep_checkpoints_without_metrics=False,
                        ),
                    ]
                ),
                # Without it Orbax writes no metrics, and whoever opens the folder again knows of no best.
                best_fn=lambda metrics: -metrics["validation"],
                # A damaged checkpoint must not keep a reader from the others.
                lightweight_initialize=read_only,
                todelete_subdir=None if read_only else _LEAVING,
                enable_async_checkpointing=False,
                read_only=read_only,
                create=not read_only,
                multiprocessing_options=together,
            ),
            handler_registry=registry,
        )

    def save(self, step: int, items: dict[str, Any], meta: dict[str, Any], validation: float | None) -> None:
        """Writes `items` (params, ema, optimizer) and `meta`; nothing if the step is already there.

        Raises:
          UserError: it cannot be written.
        """
        if step in self._manager.all_steps():
            return
        trees = {name: ocp.args.StandardSave(items[name]) for name in _ITEMS}
        try:
            with _traces_unlogged():
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
        """The line for a checkpoint that could not be written, of which nothing stays."""
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
        """Removes a checkpoint that was never finished, and sets aside those that are no more as they were written.

        Raises:
          UserError: the latter are all there is; or several have no checksums, which no interruption leaves behind.
        """
        with files.write_errors(self.folder):
            # Orbax would remove temporary folders in a thread, which trips over itself.
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
        """Like `step`, of checkpoints whose files are as they were written; a line says what is left out.

        Raises:
          UserError: no checkpoint of that step, or none that is not damaged.
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
        """The step of the `latest` or `best` checkpoint (the latest, if none was validated), or a step that is there.

        Raises:
          UserError: no checkpoint of that step.
        """
        return next(iter(self._ranked(which, self._finished())), None)

    def _finished(self) -> list[int]:
        steps = sorted(self._manager.all_steps(), reverse=True)
        return [step for step in steps if (self.folder / str(step) / _CHECKSUMS).exists()]

    def _ranked(self, which: str | int, steps: list[int]) -> list[int]:
        """Those of `steps`, the latest first, that may be taken, in the order of preference."""
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
            return self._manager.restore(step, args=ocp.args.Composite(**args))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"checkpoint {step} in {self.folder} cannot be read ({_first_line(error)}); remove "
                f"{self.folder / str(step)} to go back to the one before"
            ) from error

    def close(self) -> None:
        """Lets go of the folder."""
        self._manager.close()


@contextlib.contextmanager
def _traces_unlogged() -> Iterator[None]:
    """What Orbax raises, its threads log with stack traces as well, and go on with that after it was raised: once
    something was, they stay unheard."""
    levels = {log: log.level for log in map(logging.getLogger, ("absl", "asyncio"))}
    for log in levels:
        log.setLevel(logging.CRITICAL)
    print_any = sys.unraisablehook

    def print_others(unraisable: Any) -> None:
        # What tensorstore has left to tell an event loop that has ended over an error.
        if str(unraisable.exc_value) != "Event loop is closed":
            print_any(unraisable)

    sys.unraisablehook = print_others
    yield
    sys.unraisablehook = print_any
    for log, level in levels.items():
        log.setLevel(level)


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
    theirs, ours = {"kind": models.DEFAULT_KIND, **theirs}, model_description(config)
    differing = [
        f"{key} is {theirs.get(key)!r} there and {ours[key]!r} here" for key in ours if theirs.get(key) != ours[key]
    ]
    if differing:
        raise UserError(f"{where} is a checkpoint of another architecture: {'; '.join(differing)}")


def model_description(config: Config) -> dict[str, Any]:
    """What decides a model's parameters, in JSON's types."""
    return {**config.model.architecture(), "num_levels": config.data.num_levels}


def load_run_config(workdir: str | Path) -> Config:
    """The config that a run was trained with.

    Raises:
      UserError: `workdir` is not a run's folder.
    """
    path = Path(workdir) / "config.json"
    if not path.is_file():
        raise UserError(
            f"{workdir} is not a run's folder: it has no config.json; train one with python -m workflows.train"
        )
    return load_config(str(path))


@dataclasses.dataclass(frozen=True)
class Weights:
    """A run's weights, ready to be evaluated or sampled.

    Attributes:
      model, params: for `model.apply(params, ...)`.
      config: the run's.
      step: of the checkpoint.
      checkpoint: what was asked for (`best`, `latest` or a step).
      kind: `ema`, or `params` where the run keeps no average.
      sha256: of the values themselves: the same weights have the same.
    """

    model: Model
    params: dict[str, Any]
    config: Config
    step: int
    checkpoint: str
    kind: str
    sha256: str


class _RemovedError(Exception):
    """A run that still trains has removed the checkpoint that was being read."""


def load_weights(workdir: str | Path, checkpoint: str = "best", *, raw: bool = False) -> Weights:
    """Reads the averaged weights (the raw ones with `raw`) of a run's `best`, `latest` or numbered checkpoint.

    Raises:
      UserError: there is no such run or checkpoint, or it is damaged.
    """
    config = load_run_config(workdir)
    for _ in range(_TRIES):
        with contextlib.suppress(_RemovedError):
            return _load_weights(workdir, config, checkpoint, raw)
    raise UserError(
        f"the run in {workdir} removes its checkpoints faster than they are read; raise train.checkpoint_every"
    )


def _load_weights(workdir: str | Path, config: Config, checkpoint: str, raw: bool) -> Weights:
    model = models.make(config.model, config.data.num_levels)
    checkpoints = Checkpoints(workdir, read_only=True)
    step = None
    try:
        step = checkpoints.whole(checkpoint)
        if step is None:
            raise UserError(f"{workdir} has no checkpoint yet; train it: python -m workflows.train --workdir={workdir}")
        check_architecture(checkpoints.meta(step)["model"], config, f"{workdir}, step {step},")
        kind = "params" if raw or not config.train.ema_decay else "ema"
        # Onto one device, wherever they lay when they were written.
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
    return Weights(model, params, config, step, checkpoint, kind, _sha256(params))


def _sha256(params: dict[str, Any]) -> str:
    """Of names, types, shapes and values."""
    digest = hashlib.sha256()
    for path, value in jax.tree_util.tree_leaves_with_path(params):
        value = np.asarray(value)
        digest.update(f"{jax.tree_util.keystr(path)} {value.dtype} {value.shape}\n".encode())
        digest.update(np.ascontiguousarray(value).tobytes())
    return digest.hexdigest()
