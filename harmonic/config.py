"""Configuration: frozen nested dataclasses, checked when they are made, overridden by dotted path.

    config = override(load_config("sc09"), ["train.steps=200", "model.pool_groups=4"])

Every refusal is a `UserError` that names the field, the value and what is allowed.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import difflib
import importlib
import json
import math
import re
import sys
import types
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

from harmonic import files, models
from harmonic.errors import UserError, check

T = TypeVar("T")

__all__ = [
    "Config",
    "DataConfig",
    "EvaluateConfig",
    "GenerateConfig",
    "MeshConfig",
    "ModelConfig",  # noqa: F822 (made by __getattr__, for configs that people have)
    "Stage",
    "TrainConfig",
    "config_names",
    "from_dict",
    "load_config",
    "override",
]


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The data set, and how it is read.

    Attributes:
      dataset: name of the prepared data set (a folder of the data folder).
      encoding: mu_law or linear.
      num_levels: levels of a token; 256 is 8 bits.
      window_length: samples of a training window.
      hop_length: samples from the start of one training window to the next; 0 is the data set's own where
        window_length is its own too, and else window_length: no overlap.
      crop_length: use only the first that many samples of each recording; 0 uses all.
      threads: reader threads.
      prefetch: batches read ahead.
    """

    dataset: str = "demo"
    encoding: Literal["mu_law", "linear"] = "mu_law"
    num_levels: int = 256
    window_length: int = 16_000
    hop_length: int = 0
    crop_length: int = 0
    threads: int = 4
    prefetch: int = 4

    def __post_init__(self) -> None:
        check(bool(self.dataset) and "/" not in self.dataset, "data.dataset", self.dataset, "a folder's plain name")
        check(2 <= self.num_levels <= 65_536, "data.num_levels", self.num_levels, "between 2 and 65536")
        check(self.window_length >= 1, "data.window_length", self.window_length, "at least 1 sample")
        check(self.hop_length >= 0, "data.hop_length", self.hop_length, "at least 0 (0: the data set's own)")
        check(self.crop_length >= 0, "data.crop_length", self.crop_length, "at least 0 (0: whole recordings)")
        check(self.threads >= 1, "data.threads", self.threads, "at least 1")
        check(self.prefetch >= 1, "data.prefetch", self.prefetch, "at least 1")


@dataclasses.dataclass(frozen=True)
class Stage:
    """Another size of training windows, from a step on. The optimiser, its rate and the average go on.

    Attributes:
      start: the first step (from 0) that takes these windows.
      window_length: samples of a window, a whole multiple of the model's.
      global_batch_size: windows a step.
    """

    start: int
    window_length: int
    global_batch_size: int

    def __post_init__(self) -> None:
        for name in ("start", "window_length", "global_batch_size"):
            check(getattr(self, name) >= 1, f"train.stages: {name}", getattr(self, name), "at least 1")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The recipe. Defaults are the paper's but for `steps`, which depends on the data set.

    Attributes:
      steps: optimiser steps.
      global_batch_size: windows a step, over all devices.
      stages: other windows and batches from later steps on; () for one size from the first step to the last.
      optimizer: adamw (all parameters), or muon for the matrices that the model names and AdamW for the rest.
      learning_rate: AdamW's at its highest, reached after `warmup_steps`.
      muon_scale: Muon's learning rate over AdamW's.
      schedule: what the rates do after warm-up: constant; a fall to zero at the last step, linear or as a cosine; or
        plateau: times `plateau_factor` when the training loss has not fallen for a while.
      decay_start: the share of the steps after which they fall, for linear and cosine.
      plateau_factor, plateau_every, plateau_patience: the mean loss of every `plateau_every` steps (an epoch, say) is
        one look at it; after so many looks without a fall the rates are multiplied by the factor.
      warmup_steps: steps of linear warm-up.
      weight_decay: of both optimisers.
      beta1, beta2: AdamW's.
      clip_norm: the gradient (of bits per sample) is scaled down to this norm.
      clip_value: after that, each of its numbers is cut to at most this size; 0 for not.
      skip_norm: an update is skipped when the loss is not finite or the norm is not below this.
      ema_decay: of the average of the weights that is evaluated and sampled; 0 takes the raw weights.
      ema_debias: weigh the average by the updates made so far, so that the initial weights do not stay in it: for
        short runs.
      accumulate: parts that each device takes its windows in, one after another, their gradients added: the memory of
        one part, the same result.
      segment_length: samples held in memory at once, a multiple of the pooling product; 0 takes whole windows.
      log_every, validate_every, checkpoint_every: steps between; 0 for none but at the end.
      validation_recordings: recordings of the validation split that are looked at; 0 for all.
      sample_every: steps between samples that are generated to be heard in TensorBoard; 0 for none.
      sample_seconds: length of these.
      wandb_project: project of Weights & Biases that the run is shown in too; none if empty.
    """

    steps: int = 100_000
    global_batch_size: int = 32
    stages: tuple[Stage, ...] = ()
    optimizer: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = 0.002
    muon_scale: float = 3.0
    schedule: Literal["constant", "linear", "cosine", "plateau"] = "constant"
    decay_start: float = 0.5
    plateau_factor: float = 0.2
    plateau_every: int = 1_000
    plateau_patience: int = 20
    warmup_steps: int = 1_000
    weight_decay: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.999
    clip_norm: float = 200.0
    clip_value: float = 0.0
    skip_norm: float = 1_000.0
    ema_decay: float = 0.999
    ema_debias: bool = False
    accumulate: int = 1
    segment_length: int = 0
    log_every: int = 10
    validate_every: int = 1_000
    checkpoint_every: int = 1_000
    validation_recordings: int = 0
    sample_every: int = 0
    sample_seconds: float = 1.0
    wandb_project: str = ""

    def __post_init__(self) -> None:
        for name in ("steps", "global_batch_size", "accumulate", "plateau_every", "plateau_patience"):
            check(getattr(self, name) >= 1, f"train.{name}", getattr(self, name), "at least 1")
        for name in ("learning_rate", "muon_scale", "clip_norm", "skip_norm"):
            value = getattr(self, name)
            check(math.isfinite(value) and value > 0, f"train.{name}", value, "above 0")
        value = self.clip_value
        check(math.isfinite(value) and value >= 0, "train.clip_value", value, "at least 0")
        for name in ("beta1", "beta2", "ema_decay", "decay_start", "plateau_factor"):
            check(0 <= getattr(self, name) < 1, f"train.{name}", getattr(self, name), "at least 0 and below 1")
        for name in (
            "warmup_steps",
            "weight_decay",
            "segment_length",
            "log_every",
            "validate_every",
            "checkpoint_every",
            "validation_recordings",
            "sample_every",
        ):
            check(getattr(self, name) >= 0, f"train.{name}", getattr(self, name), "at least 0")
        starts = [stage.start for stage in self.stages]
        check(starts == sorted(set(starts)), "train.stages", starts, "stages that each start after the one before")
        check(0.01 <= self.sample_seconds < math.inf, "train.sample_seconds", self.sample_seconds, "at least 0.01")
        project = self.wandb_project
        check(not set(project) & set("/\\#?%: \n"), "train.wandb_project", project, "a project's plain name, or empty")


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """Evaluation over whole splits, the state carried from segment to segment.

    Attributes:
      batch_size: recordings side by side.
      segment_length: samples at a time; rounded up to a multiple of the pooling product.
      context_seconds: what full_run also evaluates: recordings cut into pieces of that many seconds, each with no past.
    """

    batch_size: int = 16
    segment_length: int = 16_000
    context_seconds: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        check(self.batch_size >= 1, "evaluate.batch_size", self.batch_size, "at least 1")
        check(self.segment_length >= 1, "evaluate.segment_length", self.segment_length, "at least 1")
        contexts = self.context_seconds
        ok = len(contexts) <= 16 and all(0.001 <= seconds < math.inf for seconds in contexts)
        check(ok, "evaluate.context_seconds", contexts, "at most 16 numbers of seconds, each at least 0.001")


@dataclasses.dataclass(frozen=True)
class GenerateConfig:
    """The clips that full_run generates, and the defaults of workflows.generate.

    Attributes:
      num_samples: clips generated side by side.
      seconds: length of each.
      temperature: logits are divided by it; 1 samples the model itself.
      top_p: sample from the smallest set of tokens that holds this probability; 1 for all.
      num_continuations: recordings of the test split that are continued, in full_run.
      prompt_seconds: how much of each is given.
    """

    num_samples: int = 8
    seconds: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    num_continuations: int = 4
    prompt_seconds: float = 0.5

    def __post_init__(self) -> None:
        check(self.num_samples >= 1, "generate.num_samples", self.num_samples, "at least 1")
        check(0 < self.seconds < math.inf, "generate.seconds", self.seconds, "above 0")
        check(0 < self.temperature < math.inf, "generate.temperature", self.temperature, "above 0")
        check(0 < self.top_p <= 1, "generate.top_p", self.top_p, "above 0 and at most 1")
        check(self.num_continuations >= 0, "generate.num_continuations", self.num_continuations, "at least 0")
        check(0 < self.prompt_seconds < math.inf, "generate.prompt_seconds", self.prompt_seconds, "above 0")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How devices are laid out: `data` groups of windows times `seq` shards of each sequence."""

    data: int = 1
    seq: int = 1

    def __post_init__(self) -> None:
        check(self.data >= 1, "mesh.data", self.data, "at least 1")
        check(self.seq >= 1, "mesh.seq", self.seq, "at least 1")


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole run."""

    name: str = "run"
    model: models.ModelConfig = dataclasses.field(default_factory=lambda: models.config_class(models.DEFAULT_KIND)())
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    generate: GenerateConfig = GenerateConfig()
    mesh: MeshConfig = MeshConfig()
    seed: int = 0

    def __post_init__(self) -> None:
        check(bool(self.name) and "/" not in self.name, "name", self.name, "a plain name")
        check(0 <= self.seed < 2**31, "seed", self.seed, "between 0 and 2**31 - 1")
        data, parts = self.mesh.data, self.train.accumulate
        for batch, where in [
            (self.train.global_batch_size, "train.global_batch_size"),
            *((stage.global_batch_size, "train.stages: global_batch_size") for stage in self.train.stages),
        ]:
            check(batch % data == 0, where, batch, f"a multiple of mesh.data={data}")
            rows = batch // data
            check(rows % parts == 0, "train.accumulate", parts, f"a divisor of a device's {rows} windows")
        seq, kind = self.mesh.seq, self.model.kind
        check(seq == 1 or self.model.shardable, "mesh.seq", seq, f"1: a {kind} model cannot be cut over time")
        multiple = self.model.multiple * seq
        segment = self.train.segment_length
        check(
            segment % multiple == 0,
            "train.segment_length",
            segment,
            f"a multiple of {multiple} (the model's multiple {self.model.multiple} x mesh.seq={self.mesh.seq}), "
            f"such as {-(-max(segment, 1) // multiple) * multiple}, or 0 for whole windows",
        )
        for stage in self.train.stages:
            window = stage.window_length
            check(
                window % multiple == 0,
                "train.stages: window_length",
                window,
                f"a multiple of {multiple} (the model's multiple {self.model.multiple} x mesh.seq={seq}), such as "
                f"{-(-window // multiple) * multiple}",
            )

    def at(self, step: int) -> Config:
        """The config with the windows and the batch of a step, and without stages.

        Each stage reads the data in an order of its own: it has another `seed`, which is that of the data alone.
        """
        number = sum(stage.start <= step for stage in self.train.stages)
        if not number:
            return dataclasses.replace(self, train=dataclasses.replace(self.train, stages=()))
        stage = self.train.stages[number - 1]
        return dataclasses.replace(
            self,
            data=dataclasses.replace(self.data, window_length=stage.window_length),
            train=dataclasses.replace(self.train, global_batch_size=stage.global_batch_size, stages=()),
            seed=(self.seed + number) % 2**31,
        )

    @property
    def training_length(self) -> int:
        """Samples of a window that training uses: `window_length`, or `crop_length` where that is shorter."""
        return min(self.data.window_length, self.data.crop_length or self.data.window_length)

    @property
    def segments(self) -> tuple[int, int]:
        """(number, length) of the segments that a training window is padded to and cut into."""
        multiple = self.model.multiple * self.mesh.seq
        whole = -(-self.training_length // multiple) * multiple
        length = min(self.train.segment_length or whole, whole)
        return -(-self.training_length // length), length

    def to_json(self) -> str:
        """The text of a run's config.json."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"


def from_dict(raw: object) -> Config:
    """The config of a nested dictionary (as JSON gives it); fields that are not given keep their defaults."""
    return _build(Config, raw, "")


def _build(cls: type[T], raw: object, prefix: str) -> T:
    if not isinstance(raw, dict):
        raise UserError(f"{prefix.rstrip('.') or 'the config'} must be an object with named fields, got {raw!r:.60}")
    hints = typing.get_type_hints(cls)
    hints = {field.name: hints[field.name] for field in dataclasses.fields(cast(Any, cls))}
    for name in raw:
        if name not in hints:
            raise UserError(_unknown(f"{prefix}{name}", hints, prefix))
    values: dict[str, Any] = {}
    for name, value in raw.items():
        if hints[name] is models.ModelConfig and isinstance(value, dict):
            kind = models.config_class(value.get("kind", models.DEFAULT_KIND))
            values[name] = _build(kind, value, f"{prefix}{name}.")
        elif dataclasses.is_dataclass(hints[name]):
            values[name] = _build(cast(type, hints[name]), value, f"{prefix}{name}.")
        else:
            values[name] = _coerce(hints[name], value, f"{prefix}{name}")
    needed = [
        f.name for f in dataclasses.fields(cast(Any, cls)) if f.default is f.default_factory is dataclasses.MISSING
    ]
    missing = [name for name in needed if name not in values]
    if missing:
        raise UserError(f"{prefix.rstrip('.')} lacks {', '.join(missing)}; an entry has {', '.join(hints)}")
    return cls(**values)


def _unknown(path: str, fields: Iterable[str], prefix: str) -> str:
    names = [prefix + name for name in fields]
    close = difflib.get_close_matches(path[:80], names, 1)
    return f"unknown config field {path!r:.80}; " + (
        f"did you mean {close[0]}?" if close else f"use {', '.join(names)}"
    )


def _coerce(kind: Any, value: object, path: str) -> Any:
    """`value` as the annotated type, or a UserError that says what is allowed."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType:
        for option in args:
            try:
                return _coerce(option, value, path)
            except UserError:
                continue
    elif origin is Literal and value in args:
        return value
    elif origin is tuple:
        items = value if isinstance(value, (list, tuple)) else (value,)
        if dataclasses.is_dataclass(args[0]):
            return tuple(_build(cast(type, args[0]), item, f"{path}.") for item in items)
        return tuple(_coerce(args[0], item, path) for item in items)
    elif kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        with contextlib.suppress(OverflowError):  # whole numbers have no largest
            return float(value)
    elif kind in (int, str, bool) and type(value) is kind:
        return value
    raise UserError(f"{path:.80}={value!r:.80} is not allowed: it must be {_describe(kind)}")


def _describe(kind: Any) -> str:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType:
        return " or ".join(_describe(option) for option in args)
    if origin is Literal:
        return "one of " + ", ".join(map(str, args))
    if origin is tuple:
        examples = {float: "numbers such as 1,8,60", bool: "truth values such as true,false"}
        return f"a list of {examples.get(args[0], 'whole numbers such as 2,4,4,5')}"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    return names[kind]


def override(config: Config, assignments: Iterable[str]) -> Config:
    """A config with `section.field=value` assignments applied, all together, then checked.

    Values are read as Python or JSON literals (`200`, `0.1`, `true`, `2,4,4`, `()`), else as text. Another
    `model.kind` begins with that kind's defaults.
    """
    raw = dataclasses.asdict(config)
    for assignment in sorted(assignments, key=lambda text: text.partition("=")[0].strip() != "model.kind"):
        path, equals, text = assignment.partition("=")
        if not equals:
            shown = assignment if assignment.isprintable() else repr(assignment)
            raise UserError(f"--set={shown:.80} has no value; write --set=section.field=value")
        *sections, name = path.strip().split(".")
        node, prefix = raw, ""
        for section in sections:
            if not isinstance(node.get(section), dict):
                raise UserError(_unknown(f"{prefix}{section}", node, prefix))
            node, prefix = node[section], f"{prefix}{section}."
        if name not in node or isinstance(node[name], dict):
            raise UserError(_unknown(f"{prefix}{name}", node, prefix))
        value = _literal(text.strip(), as_text=isinstance(node[name], str))
        if node is raw["model"] and name == "kind" and value != node[name]:
            raw["model"] = dataclasses.asdict(models.config_class(value)())
        else:
            node[name] = value
    return from_dict(raw)


def _literal(text: str, *, as_text: bool) -> object:
    if as_text:
        return text
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return ast.literal_eval(re.sub(r"\b(true|false)\b", lambda word: word[0].title(), text))
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def load_config(name: str) -> Config:
    """The config of a name in `configs`, a Python file with `get_config()`, or a saved config.json.

    Raises:
      UserError: there is none, or it does not give a Config.
    """
    path = Path(name)
    shown = name if name.isprintable() and len(name) < 300 else f"{name!r:.80}"
    if path.suffix == ".json":
        try:
            raw = json.loads(path.read_text())
            # An export's config.json has the run's within.
            return from_dict(raw["config"] if isinstance(raw, dict) and "library_name" in raw else raw)
        except (OSError, ValueError, KeyError, RecursionError) as error:
            raise UserError(f"cannot read the config {shown}: {' '.join(str(error).split())[:300]}") from error
    if path.suffix == ".py":
        module = files.run_file(path, f"the config {shown}", "give a name such as demo, or a path to a .py or .json")
    else:
        dotted = name.replace("/", ".")
        try:
            module = importlib.import_module(f"configs.{dotted}")
        except ModuleNotFoundError as error:
            if not f"configs.{dotted}".startswith(error.name or "?"):
                raise
            raise UserError(f"unknown config {name!r:.80}; use {', '.join(config_names())}, or a path") from error
    if callable(getattr(module, "get_study", None)):
        study = path.name if path.suffix != ".py" else name
        raise UserError(f"{shown} is a study of several runs: python -m workflows.ablate --study={study}")
    if not callable(getattr(module, "get_config", None)):
        raise UserError(f"the config {shown} has no get_config() function")
    config = module.get_config()
    if not isinstance(config, Config):
        raise UserError(f"get_config() of {shown} returned {type(config).__name__}, not a harmonic.config.Config")
    return config


def config_names() -> list[str]:
    """The names that `load_config` knows: the modules of configs, but for the studies."""
    module = importlib.import_module("configs")
    sys.modules.setdefault("configs", module)
    root = Path(next(iter(module.__path__)))
    paths = sorted(p.relative_to(root).with_suffix("") for p in root.glob("*.py") if p.stem != "__init__")
    return [path.as_posix() for path in paths]


def __getattr__(name: str) -> Any:
    # Configs that were written beside people's own recordings import it from here.
    if name == "ModelConfig":
        return models.config_class(models.DEFAULT_KIND)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
