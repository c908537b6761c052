"""Checkpoints of a run: Orbax, whole or absent, the latest and the best on validation kept.

A checkpoint has the items `params`, `ema`, `optimizer` and `meta` (JSON: model, step, data iterator, validation), so
that evaluation and generation read the weights alone.
"""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from harmonic.config import Config, load_config
from harmonic.errors import UserError
from harmonic.models import HarmonicRNN

_ITEMS = ("params", "ema", "optimizer")
_FOLDER = "checkpoints"

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
                cleanup_tmp_directories=not read_only,
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
            self._manager.save(
                step,
                args=ocp.args.Composite(**trees, meta=ocp.args.JsonSave(meta)),
                metrics=None if validation is None else {"validation": validation},
                force=True,
            )
        except (OSError, ValueError) as error:
            raise UserError(f"cannot write checkpoint {step} in {self.folder}: {_first_line(error)}") from error

    def step(self, which: str | int = "latest") -> int | None:
        """The step of the `latest` or `best` checkpoint (the latest, if none was validated), or a step that is there.

        Raises:
          UserError: no checkpoint of that step.
        """
        steps = sorted(self._manager.all_steps())
        if which == "latest":
            return steps[-1] if steps else None
        if which == "best":
            scores = {step: (self._manager.metrics(step) or {}).get("validation") for step in steps}
            scored = {step: score for step, score in scores.items() if score is not None}
            return min(scored, key=lambda step: (scored[step], step)) if scored else self.step("latest")
        if not str(which).isdigit() or int(which) not in steps:
            raise UserError(f"{self.folder} has no checkpoint {which}; use latest, best or one of {steps}")
        return int(which)

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


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def check_architecture(meta: dict[str, Any], config: Config, where: str) -> None:
    """Refuses weights of another architecture than the config's.

    Raises:
      UserError: names the fields that differ.
    """
    theirs, ours = meta["model"], model_description(config)
    differing = [
        f"{key} is {theirs.get(key)!r} there and {ours[key]!r} here" for key in ours if theirs.get(key) != ours[key]
    ]
    if differing:
        raise UserError(f"{where} is a checkpoint of another architecture: {'; '.join(differing)}")


def model_description(config: Config) -> dict[str, Any]:
    """What decides a model's parameters, in JSON's types."""
    fields = dataclasses.asdict(config.model)
    fields["blocks_per_level"] = list(config.model.level_blocks)
    fields["pool_factors"] = list(config.model.pool_factors)
    for name in ("dropout", "embedding_dropout"):
        del fields[name]
    return {**fields, "num_levels": config.data.num_levels}


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
    """

    model: HarmonicRNN
    params: dict[str, Any]
    config: Config
    step: int
    checkpoint: str
    kind: str


def load_weights(workdir: str | Path, checkpoint: str = "best", *, raw: bool = False) -> Weights:
    """Reads the averaged weights (the raw ones with `raw`) of a run's `best`, `latest` or numbered checkpoint.

    Raises:
      UserError: there is no such run or checkpoint, or it is damaged.
    """
    config = load_run_config(workdir)
    model = HarmonicRNN(config.model, config.data.num_levels)
    checkpoints = Checkpoints(workdir, read_only=True)
    try:
        step = checkpoints.step(checkpoint)
        if step is None:
            raise UserError(f"{workdir} has no checkpoint yet; train it: python -m workflows.train --workdir={workdir}")
        check_architecture(checkpoints.meta(step), config, f"{workdir}, step {step},")
        kind = "params" if raw or not config.train.ema_decay else "ema"
        # Onto one device, wherever they lay when they were written.
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        target = jax.eval_shape(model.init, jax.random.key(0))
        target = jax.tree.map(lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=here), target)
        params = checkpoints.restore(step, {kind: target})[kind]
    finally:
        checkpoints.close()
    return Weights(model, params, config, step, checkpoint, kind)
