"""The training loop: from a prepared data set to a run's folder. It may be interrupted and continued at any step.

Several processes run this loop in step with one another. Process 0 writes and shows everything but the checkpoints,
which all of them write together.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from harmonic import mesh as meshes
from harmonic import models, processes
from harmonic.checkpoint import Checkpoints, check_architecture, model_description
from harmonic.config import Config
from harmonic.data import Dataset, train_batches
from harmonic.errors import UserError
from harmonic.evaluators import VALIDATION, Evaluator, evaluators_of
from harmonic.metrics import MetricsWriter, Progress, Throughput
from harmonic.models.base import Model
from harmonic.run import Run, flatten
from harmonic.step import TrainState, init_state, make_train_step, schedule

_DIVERGED = 100  # skipped updates in a row after which training is given up
_PENDING = 100  # steps whose metrics are on the device at most


class Interrupted(Exception):
    """Training was asked to stop, and has saved. `signal` is the signal's number."""

    def __init__(self, message: str, signal: int):
        super().__init__(message)
        self.signal = signal


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """How training ended: the last step, the best validation (bits per sample) and its step, and seconds in all."""

    step: int
    best_step: int | None
    best_validation: float | None
    seconds: float


@dataclasses.dataclass
class Reached:
    """What a run has reached. Every checkpoint holds it as JSON.

    Attributes:
      step: updates made or skipped.
      best, best_step: the best validation, in bits per sample, and its step; None before the first.
      seconds: of training, in all starts.
      loss_sum, loss_count: of the finite losses since the last line of metrics.jsonl.
      data: the data iterator's state; None before the first checkpoint.
    """

    step: int = 0
    best: float | None = None
    best_step: int | None = None
    seconds: float = 0.0
    loss_sum: float = 0.0
    loss_count: int = 0
    data: Any = None

    @classmethod
    def from_meta(cls, meta: dict[str, Any]) -> Reached:
        """Reads a checkpoint's JSON; "window" held the losses before only their sum was kept."""
        losses = meta.get("window", [])
        found = {field.name: meta[field.name] for field in dataclasses.fields(cls) if field.name in meta}
        return cls(**{"loss_sum": sum(losses), "loss_count": len(losses), **found})

    def take(self, pending: list[dict[str, jax.Array]]) -> dict[str, float]:
        """Waits for the steps of which these are the metrics, adds up their losses, and forgets them.

        Returns:
          The last step's metrics.
        """
        steps = [{name: float(value) for name, value in step.items()} for step in jax.device_get(pending)]
        pending.clear()
        losses = [step["loss"] for step in steps if math.isfinite(step["loss"])]
        self.loss_sum, self.loss_count = self.loss_sum + sum(losses), self.loss_count + len(losses)
        return steps[-1] if steps else {}

    def mean_loss(self) -> float | None:
        """The mean loss since the last call; None if no loss was finite."""
        mean = self.loss_sum / self.loss_count if self.loss_count else None
        self.loss_sum, self.loss_count = 0.0, 0
        return mean


def train(
    config: Config,
    data: str | Path,
    workdir: str | Path,
    *,
    init_from: str | None = None,
    evaluators: Sequence[Evaluator] = (),
) -> TrainResult:
    """Trains a run to its last step, from its latest checkpoint if it has one.

    Args:
      config: of the run. Saved as config.json; a run is continued only with a config that gives the same weights.
      data: folder of the prepared data set.
      workdir: the run's folder.
      init_from: another run's folder; this run starts from its best averaged weights.
      evaluators: looks at the weights besides those that the config asks for.

    Raises:
      UserError: data, config, folder, processes or weights do not fit together, the folder cannot be written or another
        process writes to it, or training diverges.
      Interrupted: SIGTERM, SIGINT or SIGHUP, to any process; everything is saved.
    """
    started = time.monotonic()
    run, dataset = Run(workdir), Dataset(data)
    given = {"config": dataclasses.asdict(config), "data set's fingerprint": dataset.manifest.fingerprint}
    processes.check_same(flatten(given))
    lead = processes.current()[0] == 0
    with run.writing() if lead else contextlib.nullcontext():
        return _train(config, dataset, run, init_from, [*evaluators_of(config, dataset), *evaluators], started)


def _train(
    config: Config, dataset: Dataset, run: Run, init_from: str | None, evaluators: list[Evaluator], started: float
) -> TrainResult:
    lead, settings = processes.current()[0] == 0, config.train
    mesh = meshes.make_mesh(config.mesh)  # before anything else uses JAX's devices
    model = models.make(config.model, config.data.num_levels, dataset.manifest.channels)
    feed = Feed(dataset, config, mesh)
    run.check(config, dataset.folder, dataset.manifest)
    processes.gather("")  # no process writes before all have checked
    if lead:
        run.prepare(config, dataset.manifest)

    with contextlib.ExitStack() as stack:
        checkpoints = Checkpoints(run.folder)
        stack.callback(checkpoints.close)
        state, reached = _start(config, model, mesh, run, checkpoints, init_from)
        if reached.step >= settings.steps:
            return TrainResult(reached.step, reached.best_step, reached.best, reached.seconds)
        if reached.data is not None:
            feed.resume(reached.step, reached.data)
        seconds_before = reached.seconds
        step_function, rate = make_train_step(model, config, mesh), schedule(config, settings.learning_rate)
        key = jax.jit(lambda: jax.random.key(config.seed), out_shardings=meshes.sharding(mesh, meshes.REPLICATED))()
        writer = MetricsWriter(run.folder if lead else None, reached.step, config)
        stack.callback(writer.close)
        progress = Progress(
            "train",
            settings.steps,
            initial=reached.step,
            rate_unit="samples",
            stream=None if lead else stack.enter_context(open(os.devnull, "w")),
        )
        stack.callback(progress.close)
        progress.say(f"training from step {reached.step:,}; the first step compiles")

        def save(validation: float | None = None) -> None:
            reached.take(pending)
            reached.seconds = seconds_before + time.monotonic() - started
            reached.data = feed.get_state()
            meta = {"model": model_description(config), **dataclasses.asdict(reached)}
            checkpoints.save(reached.step, state._asdict(), meta, validation)

        caught = stack.enter_context(_asked_to_stop())
        agreed, stop = meshes.Agreement(mesh), 0
        pending: list[dict[str, jax.Array]] = []  # metrics of steps that may still run
        shown, counted, speed = reached.step, 0, Throughput()
        while reached.step < settings.steps and not (stop := agreed(max(caught, default=0))):
            batch, samples = feed.take(reached.step)
            number = place_step(reached.step, mesh)
            # An implicit transfer would make every step wait for the one before.
            with jax.profiler.StepTraceAnnotation("train", step_num=reached.step), jax.transfer_guard("disallow"):
                state, metrics = step_function(state, batch, key, number)
            step = reached.step = reached.step + 1
            pending.append(metrics)
            speed.add(samples)

            line_is_due = _due(step, settings.log_every, settings.steps)
            if line_is_due or len(pending) >= _PENDING:
                last, note = reached.take(pending), None
                if line_is_due:
                    loss = reached.mean_loss()
                    line = {
                        "loss": loss,
                        "grad_norm": last["grad_norm"] if math.isfinite(last["grad_norm"]) else None,
                        "learning_rate": float(rate(step - 1)),
                        "samples_per_second": speed.rate(),
                        "skipped": int(last["skipped"]),
                    }
                    writer.write("train", step, line)
                    note = "loss not finite" if loss is None else f"{loss:.3f} bits/sample"
                progress.update(step - shown, note, speed.total - counted)
                shown, counted = step, speed.total
                _check_divergence(last, config)

            validation = None
            for evaluator in evaluators:
                if _due(step, evaluator.every, settings.steps):
                    jax.block_until_ready(state)
                    with speed.paused():
                        figures = evaluator(model, _local_weights(config, state), step, writer)
                    if figures:
                        writer.write(evaluator.name, step, dict(figures))
                        progress.say(f"step {step:,}: {evaluator.name} {_readable(figures)}")
                    if evaluator.name == VALIDATION:
                        validation = figures["bits_per_sample"]
            if validation is not None and (reached.best is None or validation < reached.best):
                reached.best, reached.best_step = validation, step
            if reached.best_step == step or _due(step, settings.checkpoint_every, settings.steps):
                jax.block_until_ready(state)
                with speed.paused():
                    save(validation)
        if stop := stop or agreed(max(caught, default=0), wait=True):
            save()
            raise Interrupted(
                f"stopped by {signal.Signals(stop).name} after step {reached.step:,}, saved; the same command goes on",
                stop,
            )
    return TrainResult(reached.step, reached.best_step, reached.best, reached.seconds)


def _start(
    config: Config, model: Model, mesh: Mesh, run: Run, checkpoints: Checkpoints, init_from: str | None
) -> tuple[TrainState, Reached]:
    """The state and what the run has reached: of the latest checkpoint, or before the first step."""
    replicated = meshes.sharding(mesh, meshes.REPLICATED)
    latest = checkpoints.step("latest")
    if latest is not None:
        meta = checkpoints.meta(latest)
        check_architecture(meta["model"], config, str(run.folder))
        abstract = jax.eval_shape(lambda: init_state(config, model))
        abstract = jax.tree.map(lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=replicated), abstract)
        return TrainState(**checkpoints.restore(latest, abstract._asdict())), Reached.from_meta(meta)
    params = None
    if init_from:
        trained = Run(init_from).weights()
        check_architecture(model_description(trained.config), config, init_from)
        params = jax.tree.map(np.asarray, trained.params)
    return jax.jit(lambda p: init_state(config, model, p), out_shardings=replicated)(params), Reached()


class Feed:
    """The batches of a run's steps on the mesh, stage after stage; each stage has a data iterator of its own.

    Args:
      dataset, config: of the run.
      mesh: of all processes.

    Raises:
      UserError: the data does not fit the config, or the mesh.
    """

    def __init__(self, dataset: Dataset, config: Config, mesh: Mesh):
        self._dataset, self._config, self._mesh = dataset, config, mesh
        self._part = meshes.process_part(mesh)
        self._enter(0)

    def _enter(self, step: int) -> None:
        self._stage = self._config.at(step)
        self._batches = train_batches(self._dataset, self._stage, shard=self._part.rows, piece=self._part.piece)

    def resume(self, step: int, state: Any) -> None:
        """Goes to where the data was after so many steps, `state` as `get_state` gave it."""
        self._enter(step - 1)  # a stage's first step begins with fresh data, and `take` sees that
        self._batches.set_state(state)

    def take(self, step: int) -> tuple[dict[str, jax.Array], int]:
        """(the batch of a step, the samples in it)."""
        if self._config.at(step) != self._stage:
            self._enter(step)
        batch = next(self._batches)
        samples = int(batch["length"].sum()) * self._part.rows[1]  # other processes' rows are about as long
        return place_batch(batch, self._stage, self._mesh), samples

    def get_state(self) -> Any:
        """Where the data is, for a later start."""
        return self._batches.get_state()


def place_batch(batch: dict[str, np.ndarray], config: Config, mesh: Mesh) -> dict[str, jax.Array]:
    """A loader's batch as global arrays, tokens as [segments, batch, segment_length, channels].

    Each of several processes gives the part that `mesh.process_part` says; the global rows are then ordered by process.
    """
    (segments, length), rows = config.segments, config.train.global_batch_size
    tokens = batch["tokens"]
    tokens = tokens.reshape(len(tokens), segments, -1, tokens.shape[-1]).swapaxes(0, 1)

    def place(spec: jax.sharding.PartitionSpec, local: np.ndarray, *shape: int) -> jax.Array:
        return jax.make_array_from_process_local_data(meshes.sharding(mesh, spec), local, shape)

    placed = {name: place(meshes.ROWS, value, rows) for name, value in batch.items() if name != "tokens"}
    return {"tokens": place(meshes.TOKENS, tokens, segments, rows, length, tokens.shape[-1]), **placed}


def place_step(step: int, mesh: Mesh) -> jax.Array:
    """A step's number as an int32 on all devices."""
    value = np.int32(step)
    return jax.make_array_from_callback((), meshes.sharding(mesh, meshes.REPLICATED), lambda _: value)


@contextlib.contextmanager
def _asked_to_stop() -> Iterator[list[int]]:
    """A list that SIGTERM, SIGINT and SIGHUP append to within the block (in the main thread)."""
    caught: list[int] = []
    wanted = [signal.SIGTERM, signal.SIGINT]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup has it ignored
        wanted.append(signal.SIGHUP)
    try:
        before = {s: signal.signal(s, lambda s, _: caught.append(s)) for s in wanted}
    except ValueError:  # another thread: the main thread handles signals
        yield caught
        return
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _due(step: int, every: int, last: int) -> bool:
    return step == last or (every > 0 and step % every == 0)


def _local_weights(config: Config, state: TrainState) -> Any:
    """The weights that are evaluated and sampled, on one of this process's devices."""
    return jax.tree.map(lambda v: v.addressable_data(0), state.ema if config.train.ema_decay else state.params)


def _check_divergence(last: dict[str, float], config: Config) -> None:
    if last["streak"] >= _DIVERGED:
        raise UserError(
            f"training has diverged: the last {last['streak']:.0f} updates were skipped (loss {last['loss']}, gradient "
            f"norm {last['grad_norm']:.3g}); lower train.learning_rate={config.train.learning_rate} and start a new "
            "workdir"
        )


def _readable(figures: Mapping[str, float]) -> str:
    """Such as `3.1416 bits/sample`."""
    return ", ".join(f"{value:.4f} {name.replace('_per_', '/').replace('_', ' ')}" for name, value in figures.items())
