"""A run's folder: its config, its manifest, its weights, its JSON files, and who may write to it.

    run = Run("runs/sc09")
    run.config.data.dataset, run.manifest.sample_rate
    trained = run.weights("best")
    figures = run.read("evaluation.json")

Only `weights` loads JAX and Orbax: pages and reports read a folder without them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harmonic import files, locks
from harmonic.config import Config, load_config
from harmonic.errors import UserError
from harmonic.records import MANIFEST_NAME, Manifest, load_manifest

if TYPE_CHECKING:
    from harmonic.checkpoint import Trained

CONFIG, EVALUATION, SAMPLES, SUMMARY = "config.json", "evaluation.json", "samples/samples.json", "summary.json"
SOUND = "sound.json"

# A run may be continued with other values of these fields: none of them changes its weights.
_MAY_DIFFER = [
    "name",
    "evaluate",
    "generate",
    "mesh",
    "data.threads",
    "data.prefetch",
    "train.steps",
    "train.log_every",
    "train.validate_every",
    "train.checkpoint_every",
    "train.validation_recordings",
    "train.segment_length",
    "train.accumulate",
    "train.sample_every",
    "train.sample_seconds",
    "train.wandb_project",
]


class Run:
    """A run's folder. Making this object reads and writes nothing.

    Attributes:
      folder: its path.
    """

    def __init__(self, workdir: str | os.PathLike[str]):
        self.folder = Path(workdir)

    @property
    def config(self) -> Config:
        """The config that the run was trained with.

        Raises:
          UserError: the folder is not a run's.
        """
        path = self.folder / CONFIG
        if not path.is_file():
            raise UserError(
                f"{self.folder} is not a run's folder: it has no config.json; train one with python -m workflows.train"
            )
        return load_config(str(path))

    @property
    def manifest(self) -> Manifest:
        """The manifest of the data set that the run was trained on.

        Raises:
          UserError: the folder has none.
        """
        return load_manifest(self.folder)

    def weights(self, checkpoint: str = "best", *, raw: bool = False) -> Trained:
        """The averaged weights (the raw ones with `raw`) of the `best`, `latest` or numbered checkpoint.

        Raises:
          UserError: there is no such run or checkpoint, or the checkpoint is damaged.
        """
        from harmonic.checkpoint import load_weights  # loads Orbax

        return load_weights(self.folder, self.config, checkpoint, raw=raw)

    def metrics(self) -> list[dict[str, Any]]:
        """The whole lines of metrics.jsonl, in order."""
        from harmonic.metrics import read_metrics  # loads TensorBoard's writer

        return read_metrics(self.folder)

    def read(self, name: str) -> Any:
        """The value in one of the folder's JSON files; None for a file that is missing or damaged."""
        return files.read_json(self.folder / name)

    def write(self, name: str, value: Any) -> None:
        """Writes one of the folder's JSON files, whole or not at all.

        Raises:
          UserError: the file cannot be written.
        """
        files.write_json(self.folder / name, value)

    def writing(self) -> contextlib.AbstractContextManager[None]:
        """Holds the folder against other processes that would write to it; see `locks.writing`."""
        return locks.writing(self.folder)

    def check(self, config: Config, data: Path, manifest: Manifest) -> None:
        """Checks that the folder is new, or is the run of this config and this data set.

        Args:
          config: what the run shall be trained with.
          data, manifest: the data set's folder and its manifest.

        Raises:
          UserError: the folder holds a run of another config or data set, or cannot be read.
        """
        if not (self.folder / CONFIG).exists():
            return
        theirs, ours = (flatten(dataclasses.asdict(c)) for c in (self.config, config))
        may_differ = [*_MAY_DIFFER, *(f"model.{name}" for name in config.model.free)]
        if config.train.schedule in ("linear", "cosine"):
            may_differ.remove("train.steps")  # they decide the rates
        differing = [
            f"{path} is {value!r} there and {ours.get(path)!r} here"
            for path, value in theirs.items()
            if ours.get(path) != value and not any(path == name or path.startswith(f"{name}.") for name in may_differ)
        ]
        if differing:
            raise UserError(
                f"{self.folder} holds a run of another config ({'; '.join(differing)}); give another --workdir, or "
                "the same config"
            )
        remedy = "bring it back from a copy, or give another --workdir"
        theirs = files.read_json(self.folder / MANIFEST_NAME, remedy=remedy)
        if not isinstance(theirs, dict) or theirs.get("fingerprint") != manifest.fingerprint:
            raise UserError(f"{self.folder} was trained on other data than {data}; give another --workdir")

    def prepare(self, config: Config, manifest: Manifest) -> None:
        """Makes the folder, with config.json and the data set's manifest.

        Raises:
          UserError: the folder cannot be written.
        """
        files.write_whole(self.folder / MANIFEST_NAME, manifest.to_json())
        files.write_whole(self.folder / CONFIG, config.to_json())  # the last file: it makes the folder a run's


def flatten(node: Any, prefix: str = "") -> dict[str, Any]:
    """The leaves of nested dictionaries by their dotted paths."""
    if not isinstance(node, dict):
        return {prefix: node}
    return {k: v for name, child in node.items() for k, v in flatten(child, f"{prefix}.{name}".strip(".")).items()}
