"""Training: the loss over segments, the step, and the loop.

The loss that is differentiated is in bits per sample over unmasked samples. The whole step runs under one
`jax.shard_map` over the mesh ("data", "seq"); one device is the 1 x 1 mesh.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from harmonic import mesh as meshes
from harmonic.checkpoint import Checkpoints, check_architecture, load_run_config, load_weights, model_description
from harmonic.config import Config
from harmonic.data import Dataset, train_batches
from harmonic.errors import UserError
from harmonic.evaluate import evaluate_split
from harmonic.metrics import MetricsWriter, Progress
from harmonic.models import Dropout, HarmonicRNN
from harmonic.records import MANIFEST_NAME

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


class TrainState(NamedTuple):
    """Everything that a step changes.

    Attributes:
      params, ema: the weights and their average.
      optimizer: {"adam": optax's state, "updates": updates made, "skipped": updates skipped, "streak": of them on end}.
    """

    params: Any
    ema: Any
    optimizer: Any


def make_optimizer(config: Config) -> optax.GradientTransformation:
    """AdamW behind a clipped gradient, its learning rate constant after a linear warm-up."""
    train = config.train
    return optax.chain(
        optax.clip_by_global_norm(train.clip_norm),
        optax.adamw(learning_rate(config), b1=train.beta1, b2=train.beta2, weight_decay=train.weight_decay),
    )


def learning_rate(config: Config) -> optax.Schedule:
    """Step (from 0) -> learning rate: reached in `warmup_steps` equal steps, the first of them above zero."""
    rate, warmup = config.train.learning_rate, config.train.warmup_steps
    return lambda step: rate * jnp.minimum(1.0, (step + 1) / max(warmup, 1))


def init_state(config: Config, model: HarmonicRNN, params: Any = None) -> TrainState:
    """The state before the first step; from fresh parameters of `config.seed` unless some are given."""
    params = model.init(jax.random.key(config.seed)) if params is None else params
    counters = {name: jnp.zeros((), jnp.int32) for name in ("updates", "skipped", "streak")}
    adam = make_optimizer(config).init(params)
    return TrainState(params, jax.tree.map(jnp.array, params), {"adam": adam, **counters})


def nats_over_segments(
    model: HarmonicRNN, params: Any, tokens: jax.Array, lengths: jax.Array, rng: Dropout | None, axis: str | None
) -> jax.Array:
    """Negative log-likelihood in nats, summed over this shard's unmasked samples.

    The segments are scanned, the state carried. Only the state between segments is kept for the backward pass, which
    makes the segments' activations again: the gradient is exact through any length, in the memory of one segment.

    Args:
      tokens: [segments, batch, segment_length, channels].
      lengths: [batch], of the whole sequences.
      rng: of dropout, its `chunk` 0.
      axis: the mesh axis that `segment_length` is cut over, inside `jax.shard_map`.
    """
    segments, batch, local, _ = tokens.shape
    shards, shard = (jax.lax.axis_size(axis), jax.lax.axis_index(axis)) if axis else (1, 0)
    per_segment = local * shards

    def body(state, scanned):
        piece, number = scanned
        chunk = number * (per_segment // model.multiple)
        segment_rng = None if rng is None else rng._replace(chunk=rng.chunk + chunk)
        outputs, state = model.apply(params, {"tokens": piece}, state, rng=segment_rng, axis=axis)
        position = number * per_segment + shard * local + jnp.arange(local)
        mask = position < lengths[:, None]
        return state, -jnp.where(mask, model.log_prob(outputs, piece), 0).sum()

    dtype = jax.tree.leaves(params)[0].dtype
    state = model.init_state(batch, dtype)
    if segments == 1:
        return body(state, (tokens[0], jnp.int32(0)))[1]
    _, nats = jax.lax.scan(jax.checkpoint(body), state, (tokens, jnp.arange(segments)))
    return nats.sum()


def make_loss_and_grad(model: HarmonicRNN, mesh: Mesh) -> Callable[..., tuple[jax.Array, Any]]:
    """(params, tokens, lengths, rows, words) -> (bits per sample, its gradient), on any mesh.

    tokens is [segments, batch, segment_length, channels], lengths and rows [batch]; words are dropout's, or None.
    """
    axis = meshes.sequence_axis(mesh)

    def local(params, tokens, lengths, rows, words):
        rng = None if words is None else Dropout(words, rows, jnp.int32(0))
        nats, grads = jax.value_and_grad(lambda p: nats_over_segments(model, p, tokens, lengths, rng, axis))(params)
        # What is differentiated is each shard's own sum: sums over shards stand outside, once each.
        nats, grads = jax.lax.psum((nats, grads), (meshes.DATA, meshes.SEQ))
        count = jax.lax.psum(lengths.sum(), meshes.DATA)
        to_bits = 1 / (math.log(2) * count)
        return nats * to_bits, jax.tree.map(lambda g: (g * to_bits).astype(g.dtype), grads)

    specs = (meshes.REPLICATED, meshes.TOKENS, meshes.ROWS, meshes.ROWS, meshes.REPLICATED)
    return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=meshes.REPLICATED, check_vma=False)


def make_train_step(model: HarmonicRNN, config: Config, mesh: Mesh) -> jax.stages.Wrapped:
    """(state, batch, key, step) -> (state, {"loss" in bits per sample, "grad_norm", "skipped", "streak"}), compiled.

    An update whose loss is not finite, or whose gradient's norm is not below `skip_norm`, is skipped: weights, average
    and optimiser stay as they are. The state that is given is donated.
    """
    optimizer, train = make_optimizer(config), config.train
    loss_and_grad = make_loss_and_grad(model, mesh)

    @functools.partial(jax.jit, donate_argnums=0)
    def step_function(state: TrainState, batch: dict[str, jax.Array], key: jax.Array, step: jax.Array):
        use_dropout = config.model.dropout > 0 or config.model.embedding_dropout > 0
        words = jax.random.bits(jax.random.fold_in(key, step), (2,), jnp.uint32) if use_dropout else None
        loss, grads = loss_and_grad(state.params, batch["tokens"], batch["length"], batch["row"], words)
        norm = optax.tree.norm(grads)
        good = jnp.isfinite(loss) & (norm < train.skip_norm)
        updates, adam = optimizer.update(grads, state.optimizer["adam"], state.params)
        params = optax.apply_updates(state.params, updates)
        count = state.optimizer["updates"] + 1
        weight = 1 - train.ema_decay
        if train.ema_debias:
            weight = weight / (1 - jnp.float32(train.ema_decay) ** count)
        ema = jax.tree.map(lambda old, new: old + (weight * (new - old)).astype(old.dtype), state.ema, params)
        kept = {**state.optimizer, "skipped": state.optimizer["skipped"] + 1, "streak": state.optimizer["streak"] + 1}
        moved = {**state.optimizer, "adam": adam, "updates": count, "streak": jnp.zeros((), jnp.int32)}
        new = TrainState(params, ema, moved)
        new = jax.tree.map(lambda a, b: jnp.where(good, a, b), new, state._replace(optimizer=kept))
        metrics = {"loss": loss, "grad_norm": norm, "skipped": new.optimizer["skipped"]}
        return new, {**metrics, "streak": new.optimizer["streak"]}

    return step_function


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
