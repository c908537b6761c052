"""Trains the classifier on a prepared data set with labels; after an interruption, the same call continues.

Images are made once and kept in memory (4 KB a clip). A step depends only on the seed and on its number.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from harmonic.checkpoint import Checkpoints
from harmonic.data import Dataset, Split
from harmonic.errors import UserError
from harmonic.files import write_whole
from harmonic.locks import writing
from harmonic.metrics import MetricsWriter, Progress
from harmonic.perceptual.classifier import DIGITS, FILE, Classifier
from harmonic.perceptual.clips import check_clips, label_numbers, labels_of, read_clips
from harmonic.perceptual.mel import SIZE, log_mel
from harmonic.perceptual.network import SIZES, Sizes, functions, parameter_count

RESULT = "accuracy.json"
_SETTINGS = "settings.json"
_EPOCHS = 16
_AT_ONCE = 256
_SILENCE = -80.0  # dB; fills the edge of a shifted image


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a classifier is trained.

    Attributes:
      size: small or paper.
      steps: updates; 0 for 16 epochs.
      batch_size: clips an update.
      learning_rate: of AdamW at its peak, after a twentieth of the steps; it then falls to zero as a cosine.
      weight_decay: of AdamW, on kernels.
      ema_decay: of the average of the weights, which becomes the classifier.
      checkpoint_every: steps from one checkpoint to the next.
      seed: of initial weights, order and augmentation.
    """

    size: str = "small"
    steps: int = 0
    batch_size: int = 64
    learning_rate: float = 0.004
    weight_decay: float = 0.01
    ema_decay: float = 0.99
    checkpoint_every: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        if self.size not in SIZES:
            raise UserError(f"size={self.size!r} is impossible: it must be one of {', '.join(SIZES)}")
        for name, least in (("steps", 0), ("batch_size", 2), ("checkpoint_every", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise UserError(f"{name}={getattr(self, name)} is impossible: it must be at least {least}")
        if not 0 < self.learning_rate < math.inf:
            raise UserError(f"learning_rate={self.learning_rate} is impossible: it must be above 0")


def fit(data: str | Path, workdir: str | Path, settings: Settings, *, show_progress: bool = True) -> dict[str, Any]:
    """Trains a classifier and writes it to `workdir`, with its accuracies in accuracy.json.

    Args:
      data: a prepared data set, 16 kHz, one channel, with labels.
      workdir: the classifier's folder; training continues from its checkpoint.
      settings: must be the same when training continues.

    Returns:
      The content of accuracy.json: {"validation", "test", "train": {"accuracy", "clips"}, "classes", "step", ...}.

    Raises:
      UserError: no labels, other settings than those of the checkpoint, a loss that is not finite.
    """
    dataset, workdir = Dataset(data), Path(workdir)
    check_clips(dataset)
    train = dataset.split("train")
    classes = _classes(train)
    numbers = {name: label_numbers(dataset.split(name), classes, "the train split") for name in dataset.manifest.splits}
    settings = dataclasses.replace(
        settings, steps=settings.steps or math.ceil(_EPOCHS * len(train.lengths) / settings.batch_size)
    )
    described = {**dataclasses.asdict(settings), "classes": list(classes), "data": dataset.manifest.fingerprint}
    with writing(workdir):
        return _claim(workdir, described) or _fit(
            dataset, workdir, settings, classes, numbers, described, show_progress
        )


def _fit(
    dataset: Dataset,
    workdir: Path,
    settings: Settings,
    classes: tuple[str, ...],
    numbers: dict[str, np.ndarray],
    described: dict[str, Any],
    show_progress: bool,
) -> dict[str, Any]:
    count = len(numbers["train"])
    images = {name: _images(dataset.split(name), show_progress) for name in dataset.manifest.splits}

    state, step, checkpoints = _start(workdir, settings, len(classes))
    sizes = SIZES[settings.size]
    update = _update_function(sizes, len(classes), settings)
    writer = MetricsWriter(workdir, step)
    progress = None
    if show_progress:
        progress = Progress(
            "train the classifier",
            settings.steps,
            initial=step,
            rate_unit="clips",
        )
    try:
        while step < settings.steps:
            rows = _rows(count, settings, step)
            state, loss, right = update(state, images["train"][rows], numbers["train"][rows], np.int32(step))
            step += 1
            if not math.isfinite(float(loss)):
                raise UserError(f"the loss at step {step} is not finite; start again with a lower learning_rate")
            accuracy = float(right) / settings.batch_size
            writer.write("train", step, {"loss": float(loss), "accuracy": accuracy})
            if progress:
                progress.update(1, f"loss {float(loss):.3f}, accuracy {accuracy:.0%}", settings.batch_size)
            if step % settings.checkpoint_every == 0 or step == settings.steps:
                figures = _score(_classifier(state["ema"], sizes, classes), images, numbers, "validation")
                writer.write("validation", step, figures)
                if progress:
                    progress.say(f"step {step:,}: {figures['accuracy']:.2%} of validation's {figures['clips']:,} clips")
                items = {"params": state["params"], "ema": state["ema"], "optimizer": state["optimizer"]}
                checkpoints.save(step, items, {"step": step}, None)
    finally:
        writer.close()
        checkpoints.close()
        if progress:
            progress.close()
    classifier = _classifier(state["ema"], sizes, classes)
    classifier.save(workdir / FILE)
    result = {
        **{name: _score(classifier, images, numbers, name) for name in ("train", "validation", "test")},
        "classes": list(classes),
        "step": step,
        "parameters": parameter_count(sizes, len(classes)),
        "classifier": classifier.fingerprint,
        "dataset": dataset.manifest.dataset,
        "settings": described,
    }
    write_whole(workdir / RESULT, json.dumps(result, indent=2) + "\n")
    return result


def _classes(train: Split) -> tuple[str, ...]:
    labels = set(labels_of(train))
    if len(labels) < 2:
        raise UserError(f"{train.folder} has a single label, {labels.pop()!r}; a classifier needs at least two")
    return DIGITS if labels == set(DIGITS) else tuple(sorted(labels))


def _claim(workdir: Path, described: dict[str, Any]) -> dict[str, Any] | None:
    """Writes the settings to a new folder, or checks that they are the folder's own.

    Returns:
      The content of accuracy.json if training is complete, else None.
    """
    path = workdir / _SETTINGS
    if path.exists():
        before = json.loads(path.read_text())
        for name, ours in described.items():
            if before.get(name) != ours:
                raise UserError(
                    f"{workdir} was begun with {name}={before.get(name)!r:.80}, not {ours!r:.80}; continue with that, "
                    "or give another --workdir"
                )
        if (workdir / RESULT).exists() and (workdir / FILE).exists():
            return json.loads((workdir / RESULT).read_text())
    else:
        write_whole(path, json.dumps(described, indent=2) + "\n")
    return None


def _images(split: Split, show_progress: bool) -> np.ndarray:
    count = len(split.recordings)
    progress = Progress(f"images of {split.name}", count, unit="clip", rate_unit="clips") if show_progress else None
    images = np.zeros((count, SIZE, SIZE), np.float32)
    for first in range(0, count, _AT_ONCE):
        last = min(first + _AT_ONCE, count)
        images[first:last] = log_mel(read_clips(split, first, last))
        if progress:
            progress.update(last - first)
    if progress:
        progress.close()
    return images


def _rows(count: int, settings: Settings, step: int) -> np.ndarray:
    """The clips of an update: epochs follow one another, each in its own order."""
    places = np.arange(step * settings.batch_size, (step + 1) * settings.batch_size)
    orders = {
        e: np.random.default_rng((settings.seed, e)).permutation(count) for e in {int(p) // count for p in places}
    }
    return np.array([orders[int(p) // count][p % count] for p in places])


def _start(workdir: Path, settings: Settings, classes: int) -> tuple[dict[str, Any], int, Checkpoints]:
    """(state, step, checkpoints): from the latest checkpoint, or a new start."""

    def new(key: jax.Array) -> dict[str, Any]:
        params, stats = functions(SIZES[settings.size], classes).init(key)
        weights = {"params": params, "stats": stats}
        return {"params": weights, "ema": weights, "optimizer": _optimizer(settings).init(params)}

    checkpoints = Checkpoints(workdir)
    step = checkpoints.step("latest")
    key = jax.random.key(settings.seed)
    if step is None:
        return jax.jit(new)(key), 0, checkpoints
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    like = jax.tree.map(lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=here), jax.eval_shape(new, key))
    return checkpoints.restore(step, like), step, checkpoints


def _optimizer(settings: Settings) -> optax.GradientTransformation:
    schedule = optax.warmup_cosine_decay_schedule(
        0, settings.learning_rate, max(settings.steps // 20, 1), max(settings.steps, 2)
    )
    return optax.adamw(
        schedule, weight_decay=settings.weight_decay, mask=lambda p: {k: k.endswith("kernel") for k in p}
    )


def _update_function(sizes: Sizes, classes: int, settings: Settings) -> Callable[..., Any]:
    network, optimizer = functions(sizes, classes), _optimizer(settings)

    @functools.partial(jax.jit, donate_argnums=0)
    def update(state: dict[str, Any], images: jax.Array, labels: jax.Array, step: jax.Array):
        """(state after one update, its loss, how many of the batch were right)."""
        params, stats = state["params"]["params"], state["params"]["stats"]
        images = augment(images, jax.random.fold_in(jax.random.key(settings.seed), step))

        def loss_of(params):
            logits, after = network.train(params, stats, images)
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
            return loss, (after, (logits.argmax(-1) == labels).sum())

        (loss, (stats, right)), gradients = jax.value_and_grad(loss_of, has_aux=True)(params)
        with jax.numpy_dtype_promotion("standard"):  # optax raises a float to its int32 count of updates
            changes, memory = optimizer.update(gradients, state["optimizer"], params)
        weights = {"params": optax.apply_updates(params, changes), "stats": stats}
        decay = jnp.minimum(settings.ema_decay, (1 + step) / (10 + step))  # the initial weights soon lose their share
        ema = optax.incremental_update(weights, state["ema"], 1 - decay)
        return {"params": weights, "ema": ema, "optimizer": memory}, loss, right

    return update


def augment(images: jax.Array, key: jax.Array) -> jax.Array:
    """Images [n, 32, 32] moved by up to four frames and one band, blurred by noise of 3 dB, some frames silenced."""
    count = len(images)
    keys = jax.random.split(key, 5)
    frames = jax.random.randint(keys[0], (count,), -4, 5)
    bands = jax.random.randint(keys[1], (count,), -1, 2)
    noise = 3 * jax.random.normal(keys[2], images.shape)
    begin = jax.random.randint(keys[3], (count,), 0, SIZE)
    length = jax.random.randint(keys[4], (count,), 0, 5)

    def one(image, frame, band, begin, length):
        at = jnp.arange(SIZE)
        rows, columns = at - band, at - frame
        inside = ((rows >= 0) & (rows < SIZE))[:, None] & ((columns >= 0) & (columns < SIZE))[None]
        moved = jnp.where(inside, image[rows % SIZE][:, columns % SIZE], _SILENCE)
        return jnp.where(((at >= begin) & (at < begin + length))[None], _SILENCE, moved)

    moved = jax.vmap(one)(images, frames, bands, begin, length)
    return jnp.clip(moved + noise, _SILENCE, 0)


def _classifier(weights: dict[str, Any], sizes: Sizes, classes: tuple[str, ...]) -> Classifier:
    params, stats = jax.device_get((weights["params"], weights["stats"]))
    return Classifier(sizes, classes, params, stats)


def _score(classifier: Classifier, images: dict[str, Any], numbers: dict[str, Any], name: str) -> dict[str, Any]:
    right = classifier.of_images(images[name])[1].argmax(-1) == numbers[name]
    return {"accuracy": float(right.mean()), "clips": len(right)}
