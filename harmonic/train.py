"""The training loop: from a prepared data set to a run's folder, interrupted and gone on with at will."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from harmonic import mesh as meshes
from harmonic.checkpoint import Checkpoints, check_architecture, load_run_config, load_weights, model_description
from harmonic.config import Config
from harmonic.data import Dataset, train_batches
from harmonic.errors import UserError
from harmonic.evaluate import evaluate_split
from harmonic.metrics import MetricsWriter, Progress
from harmonic.models import HarmonicRNN
from harmonic.records import MANIFEST_NAME
from harmonic.step import TrainState, init_state, learning_rate, make_train_step

_DIVERGED = 100  # skipped updates on end after which training is given up
# What may differ when a run is continued: everything else decides its weights.
_FREE = (
    *("name", "evaluate", "generate", "mesh", "data.threads", "data.prefetch", "train.segment_length"),
    *(
        f"train.{name}"
        for name in ("steps", "log_every", "validate_every", "checkpoint_every", "validation_recordings")
    ),
)


class Interrupted(Exception):
    """Training was asked to stop, and has saved. `signal` says by what."""

    def __init__(self, message: str, signal: int):
        super().__init__(message)
        self.signal = signal


def place_batch(batch: dict[str, np.ndarray], config: Config, mesh: Mesh) -> dict[str, jax.Array]:
    """A loader's batch as global arrays, tokens as [segments, batch, segment_length, channels]."""
    segments, length = config.segments
    tokens = batch["tokens"].reshape(len(batch["tokens"]), segments, length, -1).swapaxes(0, 1)
    place = jax.make_array_from_process_local_data
    return {
        "tokens": place(meshes.sharding(mesh, meshes.TOKENS), tokens),
        "length": place(meshes.sharding(mesh, meshes.ROWS), batch["length"]),
        "row": place(meshes.sharding(mesh, meshes.ROWS), batch["row"]),
    }


@contextlib.contextmanager
def _asked_to_stop() -> Iterator[list[int]]:
    """A list that SIGTERM and SIGINT append to, while it is open (in the main thread)."""
    caught: list[int] = []
    try:
        before = {s: signal.signal(s, lambda s, _: caught.append(s)) for s in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:  # not the main thread: whoever started us handles signals
        yield caught
        return
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """How training ended: the last step, the best validation (bits per sample) and its step, and seconds in all."""

    step: int
    best_step: int | None
    best_validation: float | None
    seconds: float


def train(config: Config, data: str | Path, workdir: str | Path, *, init_from: str | None = None) -> TrainResult:
    """Trains a run to its last step, from its latest checkpoint if it has one.

    Args:
      config: of the run. Saved as config.json; a run is continued only with what would give the same weights.
      data: folder of the prepared data set.
      workdir: the run's folder.
      init_from: another run's folder, whose best averaged weights this one starts from.

    Raises:
      UserError: data, config, folder or weights that do not go together, or training that diverges.
      Interrupted: SIGTERM or SIGINT; everything is saved.
    """
    started = time.monotonic()
    workdir, dataset = Path(workdir), Dataset(data)
    model = HarmonicRNN(config.model, config.data.num_levels, dataset.manifest.channels)
    mesh = meshes.make_mesh(config.mesh)
    batches = train_batches(dataset, config)
    prepare_workdir(workdir, config, dataset)

    checkpoints = Checkpoints(workdir)
    replicated = meshes.sharding(mesh, meshes.REPLICATED)
    meta: dict[str, Any] = {"step": 0, "best": None, "best_step": None, "seconds": 0.0, "data": batches.get_state()}
    latest = checkpoints.step("latest")
    if latest is not None:
        meta = checkpoints.meta(latest)
        check_architecture(meta, config, str(workdir))
        abstract = jax.eval_shape(lambda: init_state(config, model))
        abstract = jax.tree.map(lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=replicated), abstract)
        state = TrainState(**checkpoints.restore(latest, abstract._asdict()))
        batches.set_state(meta["data"])
    else:
        params = None
        if init_from:
            weights = load_weights(init_from)
            check_architecture({"model": model_description(weights.config)}, config, init_from)
            params = weights.params
        state = jax.device_put(jax.jit(lambda p: init_state(config, model, p))(params), replicated)
    step = int(meta["step"])
    if step >= config.train.steps:
        checkpoints.close()
        return TrainResult(step, meta["best_step"], meta["best"], meta["seconds"])

    step_function = make_train_step(model, config, mesh)
    rate = learning_rate(config)
    key = jax.device_put(jax.random.key(config.seed), replicated)
    samples_per_step = config.train.global_batch_size * config.training_length
    writer = MetricsWriter(workdir, step)
    progress = Progress(
        "train", config.train.steps, initial=step, unit="step", rate_unit="samples", rate_scale=samples_per_step
    )
    progress.say(f"training from step {step:,}; the first step compiles")
    window: list[dict[str, jax.Array]] = []
    window_start, window_samples = time.monotonic(), 0

    seconds = meta["seconds"]

    def save(validation: float | None = None) -> None:
        nonlocal seconds
        seconds = meta["seconds"] + time.monotonic() - started
        description = {"model": model_description(config), "data": batches.get_state()}
        progress_made = {"step": step, "seconds": seconds}
        checkpoints.save(step, state._asdict(), {**meta, **description, **progress_made}, validation)

    try:
        with _asked_to_stop() as caught:
            while step < config.train.steps and not caught:
                host_batch = next(batches)
                batch = place_batch(host_batch, config, mesh)
                state, metrics = step_function(state, batch, key, np.int32(step))
                step += 1
                window.append(metrics)
                window_samples += int(host_batch["length"].sum())
                if _due(step, config.train.log_every, config.train.steps):
                    values = {k: [float(m[k]) for m in window] for k in window[-1]}
                    now = time.monotonic()
                    finite = [loss for loss in values["loss"] if math.isfinite(loss)]
                    norm = values["grad_norm"][-1]
                    line = {
                        "loss": float(np.mean(finite)) if finite else None,
                        "grad_norm": norm if math.isfinite(norm) else None,
                        "learning_rate": float(rate(step - 1)),
                        "samples_per_second": window_samples / (now - window_start),
                        "skipped": int(values["skipped"][-1]),
                    }
                    writer.write("train", step, line)
                    progress.update(len(window), f"{line['loss']:.3f} bits/sample" if finite else "loss not finite")
                    if values["streak"][-1] >= _DIVERGED:
                        raise UserError(
                            f"training has diverged: the last {values['streak'][-1]:.0f} updates were skipped (loss "
                            f"{values['loss'][-1]}, gradient norm {values['grad_norm'][-1]:.3g}); lower "
                            f"train.learning_rate={config.train.learning_rate} and start a new workdir"
                        )
                    window, window_start, window_samples = [], now, 0
                validation = None
                if _due(step, config.train.validate_every, config.train.steps):
                    validation = _validate(model, config, state, dataset)
                    writer.write("validation", step, {"bits_per_sample": validation})
                    progress.say(f"step {step:,}: validation {validation:.4f} bits/sample")
                    if meta["best"] is None or validation < meta["best"]:
                        meta |= {"best": validation, "best_step": step}
                    window_start = time.monotonic()
                if meta["best_step"] == step or _due(step, config.train.checkpoint_every, config.train.steps):
                    save(validation)
                    window_start = time.monotonic()
            if caught:
                save()
                name = signal.Signals(caught[0]).name
                raise Interrupted(f"stopped by {name} after step {step:,}, saved; the same command goes on", caught[0])
    finally:
        progress.close()
        writer.close()
        checkpoints.close()
    return TrainResult(step, meta["best_step"], meta["best"], seconds)


def _due(step: int, every: int, last: int) -> bool:
    return step == last or (every > 0 and step % every == 0)


def _validate(model: HarmonicRNN, config: Config, state: TrainState, dataset: Dataset) -> float:
    weights = state.ema if config.train.ema_decay else state.params
    local = jax.tree.map(lambda v: v.addressable_data(0), weights)
    result = evaluate_split(model, local, dataset.split("validation"), config, limit=config.train.validation_recordings)
    return result.bits_per_sample


def prepare_workdir(workdir: Path, config: Config, dataset: Dataset) -> None:
    """Makes a run's folder with config.json and a copy of the data set's manifest, or checks that it is this run's.

    Raises:
      UserError: it holds a run of another config or data set, or cannot be written.
    """
    try:
        if (workdir / "config.json").exists():
            differing = list(_differences(load_run_config(workdir), config))
            if differing:
                raise UserError(
                    f"{workdir} holds a run of another config ({'; '.join(differing)}); give another --workdir, or the "
                    "same config"
                )
            theirs = json.loads((workdir / MANIFEST_NAME).read_text())["fingerprint"]
            if theirs != dataset.manifest.fingerprint:
                raise UserError(f"{workdir} was trained on other data than {dataset.folder}; give another --workdir")
        workdir.mkdir(parents=True, exist_ok=True)
        for name, text in ((MANIFEST_NAME, dataset.manifest.to_json()), ("config.json", config.to_json())):
            temporary = workdir / f"{name}.partial"
            temporary.write_text(text)
            os.replace(temporary, workdir / name)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"the run's folder {workdir} cannot be used: {error}") from error


def _differences(old: Config, new: Config) -> Iterator[str]:
    def flatten(node: Any, prefix: str = "") -> dict[str, Any]:
        if not isinstance(node, dict):
            return {prefix: node}
        return {k: v for name, child in node.items() for k, v in flatten(child, f"{prefix}.{name}".strip(".")).items()}

    theirs, ours = (flatten(dataclasses.asdict(c)) for c in (old, new))
    for path, value in theirs.items():
        free = any(path == name or path.startswith(f"{name}.") for name in _FREE)
        if ours[path] != value and not free:
            yield f"{path} is {value!r} there and {ours[path]!r} here"
