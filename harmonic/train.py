"""The training loop: from a prepared data set to a run's folder, interrupted and gone on with at will.

Over several processes each of them runs this loop, in step with the others; what is written and shown comes from
process 0, but for checkpoints, which all of them write together.
"""

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

from harmonic import audio, files, locks, models, processes
from harmonic import mesh as meshes
from harmonic.checkpoint import Checkpoints, check_architecture, load_run_config, load_weights, model_description
from harmonic.config import Config
from harmonic.data import Dataset, train_batches
from harmonic.errors import UserError
from harmonic.evaluate import evaluate_split
from harmonic.generate import generate
from harmonic.metrics import MetricsWriter, Progress
from harmonic.models.base import Model
from harmonic.records import MANIFEST_NAME
from harmonic.step import TrainState, init_state, learning_rate, make_train_step

_SAMPLES = 2  # generated each time that samples are due: as many as a small machine has cores
_DIVERGED = 100  # skipped updates on end after which training is given up
# What may differ when a run is continued: everything else decides its weights.
_FREE = (
    *("name", "evaluate", "generate", "mesh", "data.threads", "data.prefetch"),
    *(
        f"train.{name}"
        for name in (
            *("steps", "log_every", "validate_every", "checkpoint_every", "validation_recordings"),
            *("segment_length", "accumulate", "sample_every", "sample_seconds", "wandb_project"),
        )
    ),
)


class Interrupted(Exception):
    """Training was asked to stop, and has saved. `signal` says by what."""

    def __init__(self, message: str, signal: int):
        super().__init__(message)
        self.signal = signal


def place_batch(batch: dict[str, np.ndarray], config: Config, mesh: Mesh) -> dict[str, jax.Array]:
    """A loader's batch as global arrays, tokens as [segments, batch, segment_length, channels].

    Over several processes each gives what `mesh.process_part` says: the rows come to lie in another order, by process.
    """
    (segments, length), rows = config.segments, config.train.global_batch_size
    tokens = batch["tokens"]
    tokens = tokens.reshape(len(tokens), segments, -1, tokens.shape[-1]).swapaxes(0, 1)

    def place(spec: jax.sharding.PartitionSpec, local: np.ndarray, *shape: int) -> jax.Array:
        return jax.make_array_from_process_local_data(meshes.sharding(mesh, spec), local, shape)

    placed = {name: place(meshes.ROWS, value, rows) for name, value in batch.items() if name != "tokens"}
    return {"tokens": place(meshes.TOKENS, tokens, segments, rows, length, tokens.shape[-1]), **placed}


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
      UserError: data, config, folder, processes or weights that do not go together, a folder that cannot be written,
        or that another process writes to, or training that diverges.
      Interrupted: SIGTERM or SIGINT, to any process; everything is saved.
    """
    started = time.monotonic()
    workdir, dataset = Path(workdir), Dataset(data)
    check_agreement(config, dataset)
    lead = processes.current()[0] == 0
    with locks.writing(workdir) if lead else contextlib.nullcontext():
        return _train(config, dataset, workdir, init_from, started)


def _train(config: Config, dataset: Dataset, workdir: Path, init_from: str | None, started: float) -> TrainResult:
    lead = processes.current()[0] == 0
    model = models.make(config.model, config.data.num_levels, dataset.manifest.channels)
    mesh = meshes.make_mesh(config.mesh)
    part = meshes.process_part(mesh)
    batches = train_batches(dataset, config, shard=part.rows, piece=part.piece)
    check_workdir(workdir, config, dataset)
    processes.gather("")  # all have looked, now it may be written
    if lead:
        prepare_workdir(workdir, config, dataset)

    checkpoints = Checkpoints(workdir)
    replicated = meshes.sharding(mesh, meshes.REPLICATED)
    meta: dict[str, Any] = {"step": 0, "best": None, "best_step": None, "seconds": 0.0, "data": batches.get_state()}
    latest = checkpoints.step("latest")
    if latest is not None:
        meta = checkpoints.meta(latest)
        check_architecture(meta["model"], config, str(workdir))
        abstract = jax.eval_shape(lambda: init_state(config, model))
        abstract = jax.tree.map(lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=replicated), abstract)
        state = TrainState(**checkpoints.restore(latest, abstract._asdict()))
        batches.set_state(meta["data"])
    else:
        params = None
        if init_from:
            weights = load_weights(init_from)
            check_architecture(model_description(weights.config), config, init_from)
            params = jax.tree.map(np.asarray, weights.params)
        state = jax.jit(lambda p: init_state(config, model, p), out_shardings=replicated)(params)
    step = int(meta["step"])
    if step >= config.train.steps:
        checkpoints.close()
        return TrainResult(step, meta["best_step"], meta["best"], meta["seconds"])

    step_function = make_train_step(model, config, mesh)
    rate = learning_rate(config)
    key = jax.jit(lambda: jax.random.key(config.seed), out_shardings=replicated)()
    samples_per_step = config.train.global_batch_size * config.training_length
    writer = MetricsWriter(workdir if lead else None, step, config)
    progress = Progress(
        "train",
        config.train.steps,
        initial=step,
        rate_unit="samples",
        rate_scale=samples_per_step,
        stream=None if lead else open(os.devnull, "w"),
    )
    progress.say(f"training from step {step:,}; the first step compiles")
    window: list[dict[str, jax.Array]] = []
    earlier = meta.get("window", [])  # losses since the last line that were made before this start
    window_start, window_samples = time.monotonic(), 0

    seconds = meta["seconds"]

    def save(validation: float | None = None) -> None:
        nonlocal seconds
        seconds = meta["seconds"] + time.monotonic() - started
        description = {"model": model_description(config), "data": batches.get_state()}
        progress_made = {"step": step, "seconds": seconds, "window": earlier + _finite(window)}
        checkpoints.save(step, state._asdict(), {**meta, **description, **progress_made}, validation)

    try:
        with _asked_to_stop() as caught:
            agreed, stop = meshes.Agreement(mesh), 0
            while step < config.train.steps and not (stop := agreed(max(caught, default=0))):
                host_batch = next(batches)
                batch = place_batch(host_batch, config, mesh)
                state, metrics = step_function(state, batch, key, np.int32(step))
                step += 1
                window.append(metrics)
                window_samples += int(host_batch["length"].sum()) * part.rows[1]  # the others' rows are about as long
                if _due(step, config.train.log_every, config.train.steps):
                    values = {k: [float(m[k]) for m in window] for k in window[-1]}
                    now = time.monotonic()
                    finite = earlier + _finite(window)
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
                    window, window_start, window_samples, earlier = [], now, 0, []
                validation = None
                if _due(step, config.train.validate_every, config.train.steps):
                    validation = _validate(model, config, state, dataset)
                    writer.write("validation", step, {"bits_per_sample": validation})
                    progress.say(f"step {step:,}: validation {validation:.4f} bits/sample")
                    if meta["best"] is None or validation < meta["best"]:
                        meta |= {"best": validation, "best_step": step}
                    window_start = time.monotonic()
                if config.train.sample_every and _due(step, config.train.sample_every, config.train.steps):
                    _write_samples(model, config, state, dataset, writer, step)
                    window_start = time.monotonic()
                if meta["best_step"] == step or _due(step, config.train.checkpoint_every, config.train.steps):
                    save(validation)
                    window_start = time.monotonic()
            if stop := stop or agreed(max(caught, default=0), wait=True):
                save()
                name = signal.Signals(stop).name
                raise Interrupted(f"stopped by {name} after step {step:,}, saved; the same command goes on", stop)
    finally:
        progress.close()
        writer.close()
        checkpoints.close()
    return TrainResult(step, meta["best_step"], meta["best"], seconds)


def _finite(window: list[dict[str, jax.Array]]) -> list[float]:
    losses = (float(metrics["loss"]) for metrics in window)
    return [loss for loss in losses if math.isfinite(loss)]


def _due(step: int, every: int, last: int) -> bool:
    return step == last or (every > 0 and step % every == 0)


def _validate(model: Model, config: Config, state: TrainState, dataset: Dataset) -> float:
    """Bits per sample of the validation split: each process evaluates its share, on one of its devices."""
    ours = evaluate_split(
        model,
        _local_weights(config, state),
        dataset.split("validation"),
        config,
        limit=config.train.validation_recordings,
        shard=processes.current(),
        labels=dataset.labels(),
    )
    shares = [json.loads(text) for text in processes.gather(json.dumps([ours.nats, ours.samples]))]
    nats, samples = (sum(numbers) for numbers in zip(*shares, strict=True))
    return nats / math.log(2) / samples


def _local_weights(config: Config, state: TrainState) -> Any:
    """What is evaluated and sampled, on one of this process's devices."""
    return jax.tree.map(lambda v: v.addressable_data(0), state.ema if config.train.ema_decay else state.params)


def _write_samples(
    model: Model, config: Config, state: TrainState, dataset: Dataset, writer: MetricsWriter, step: int
) -> None:
    """Process 0 generates, from the same random numbers each time, and the others wait: training takes no notice."""
    if processes.current()[0] == 0:
        rate, data = dataset.manifest.sample_rate, config.data
        chunks = generate(
            model,
            _local_weights(config, state),
            batch=_SAMPLES,
            length=max(1, round(config.train.sample_seconds * rate)),
            seed=config.seed,
            temperature=config.generate.temperature,
            top_p=config.generate.top_p,
        )
        tokens = np.concatenate([chunk.tokens for chunk in chunks], axis=1)
        waveforms = audio.decode(tokens[..., 0], data.encoding, num_levels=data.num_levels)
        writer.write_sounds(step, waveforms, rate)
    processes.gather("")  # a collective would not wait as long


def check_agreement(config: Config, dataset: Dataset) -> None:
    """Refuses processes that were not given the same config and data.

    Raises:
      UserError: names the first process that differs from process 0, and in what.
    """
    ours = {"config": dataclasses.asdict(config), "data set's fingerprint": dataset.manifest.fingerprint}
    first, *others = (_flatten(json.loads(text)) for text in processes.gather(json.dumps(ours)))
    for number, other in enumerate(others, 1):
        differing = [
            f"{path} is {other.get(path)!r} there and {value!r} in process 0"
            for path, value in first.items()
            if other.get(path) != value
        ]
        if differing:
            raise UserError(f"process {number} was started with something else than process 0: {'; '.join(differing)}")


def check_workdir(workdir: Path, config: Config, dataset: Dataset) -> None:
    """Checks that a run's folder, where it is there, is this run's.

    Raises:
      UserError: it holds a run of another config or data set, or cannot be read.
    """
    if not (workdir / "config.json").exists():
        return
    differing = list(_differences(load_run_config(workdir), config))
    if differing:
        raise UserError(
            f"{workdir} holds a run of another config ({'; '.join(differing)}); give another --workdir, or the same "
            "config"
        )
    try:
        theirs = json.loads((workdir / MANIFEST_NAME).read_text())["fingerprint"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"the run's folder {workdir} cannot be used: {error}") from error
    if theirs != dataset.manifest.fingerprint:
        raise UserError(f"{workdir} was trained on other data than {dataset.folder}; give another --workdir")


def prepare_workdir(workdir: Path, config: Config, dataset: Dataset) -> None:
    """Makes a run's folder with config.json and a copy of the data set's manifest.

    Raises:
      UserError: it cannot be written.
    """
    for name, text in ((MANIFEST_NAME, dataset.manifest.to_json()), ("config.json", config.to_json())):
        files.write_whole(workdir / name, text)


def _flatten(node: Any, prefix: str = "") -> dict[str, Any]:
    """Leaves of nested dictionaries by dotted path."""
    if not isinstance(node, dict):
        return {prefix: node}
    return {k: v for name, child in node.items() for k, v in _flatten(child, f"{prefix}.{name}".strip(".")).items()}


def _differences(old: Config, new: Config) -> Iterator[str]:
    theirs, ours = (_flatten(dataclasses.asdict(c)) for c in (old, new))
    allowed = *_FREE, *(f"model.{name}" for name in new.model.free)
    for path, value in theirs.items():
        free = any(path == name or path.startswith(f"{name}.") for name in allowed)
        if ours.get(path) != value and not free:
            yield f"{path} is {value!r} there and {ours.get(path)!r} here"
