"""The classifier of spoken words behind the perceptual figures: its files, and its outputs for clips.

classifier = Classifier.load("runs/sc09_classifier")      # or the published resnext.pth
features, logits = classifier.features_and_logits(clips)  # [n, 1024], [n, classes]
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from harmonic.errors import UserError
from harmonic.files import write_whole
from harmonic.perceptual.mel import log_mel
from harmonic.perceptual.network import FEATURES, Sizes, Variables, functions, shapes
from harmonic.perceptual.torch_weights import read_tensors

FILE = "classifier.npz"
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_FORMAT = "harmonic classifier 1"
_AT_ONCE = 64  # images a batch


@dataclasses.dataclass(frozen=True)
class Classifier:
    """A trained classifier.

    Attributes:
      sizes: of its network.
      classes: the class of each logit.
      params, stats: its weights, and the statistics of its batch norms, by name.
    """

    sizes: Sizes
    classes: tuple[str, ...]
    params: dict[str, np.ndarray]
    stats: dict[str, np.ndarray]

    @classmethod
    def load(cls, path: str | Path) -> Classifier:
        """Reads a classifier: the folder or the file that training wrote, or a PyTorch file of the published network.

        Nothing in the file is executed.

        Raises:
          UserError: the file is missing, damaged, of another architecture, or contains code.
        """
        path = Path(path)
        path = path / FILE if path.is_dir() else path
        if not path.is_file():
            raise UserError(
                f"{path} is missing: no classifier is there; train one with python -m workflows.train_classifier "
                f"--workdir={path.parent if path.name == FILE else path}"
            )
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if "description.npy" in archive.namelist():
                    return cls._load_own(path)
        return from_torch(read_tensors(path), str(path))

    @classmethod
    def _load_own(cls, path: Path) -> Classifier:
        try:
            with np.load(path, allow_pickle=False) as file:
                described = json.loads(str(file["description"]))
                arrays = {name: file[name] for name in file.files if name != "description"}
            if described["format"] != _FORMAT:
                raise ValueError(f"its format is {described['format']!r:.60}")
            given: dict[str, Any] = described["sizes"]
            given |= {name: tuple(given[name]) for name in ("widths", "inner")}
            sizes = Sizes(**given)
            classes = tuple(str(name) for name in described["classes"])
            params = {n.removeprefix("params/"): v for n, v in arrays.items() if n.startswith("params/")}
            stats = {n.removeprefix("stats/"): v for n, v in arrays.items() if n.startswith("stats/")}
            expected = shapes(sizes, len(classes))
        except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
            raise UserError(f"{path} is damaged ({str(error)[:200]}); train the classifier again") from error
        for found, wanted in zip((params, stats), expected, strict=True):
            _check_shapes({k: v.shape for k, v in found.items()}, {k: v.shape for k, v in wanted.items()}, str(path))
        return cls(sizes, classes, params, stats)

    def save(self, path: str | Path) -> None:
        """Writes the classifier to a file, whole or not at all."""
        described = {"format": _FORMAT, "sizes": dataclasses.asdict(self.sizes), "classes": list(self.classes)}
        arrays: dict[str, Any] = {f"params/{k}": np.asarray(v) for k, v in self.params.items()}
        arrays |= {f"stats/{k}": np.asarray(v) for k, v in self.stats.items()}
        out = io.BytesIO()
        np.savez(out, description=np.array(json.dumps(described)), **arrays)
        write_whole(path, out.getvalue())

    def features_and_logits(self, clips: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The network's outputs for clips: float32 [n, time] at 16 kHz in [-1, 1], cut or padded to one second.

        Returns:
          (float32 [n, 1024] the input of the last layer, float32 [n, classes] logits).
        """
        return self.of_images(log_mel(clips))

    def of_images(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The same for images [n, 32, 32], as `log_mel` makes them."""
        run = _evaluate_function(self.sizes, len(self.classes))
        features = np.zeros((len(images), self.sizes.widths[-1]), np.float32)
        logits = np.zeros((len(images), len(self.classes)), np.float32)
        for first in range(0, len(images), _AT_ONCE):
            batch = images[first : first + _AT_ONCE]
            part = slice(first, first + len(batch))
            padded = np.pad(batch, ((0, _AT_ONCE - len(batch)), (0, 0), (0, 0)))  # one shape, so one compiled program
            found = run(self._on_device[0], self._on_device[1], padded)
            features[part], logits[part] = (np.asarray(x)[: len(batch)] for x in found)
        return features, logits

    @functools.cached_property
    def _on_device(self) -> tuple[Variables, Variables]:
        return jax.device_put((self.params, self.stats))

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 over classes and weights, which identifies the classifier that figures were measured with."""
        digest = hashlib.sha256(json.dumps([self.classes, dataclasses.asdict(self.sizes)]).encode())
        for values in (self.params, self.stats):
            for name in sorted(values):
                digest.update(name.encode() + np.ascontiguousarray(values[name], "<f4").tobytes())
        return digest.hexdigest()


@functools.lru_cache(maxsize=4)
def _evaluate_function(sizes: Sizes, classes: int) -> Callable[..., Any]:
    return jax.jit(functions(sizes, classes).evaluate)


def from_torch(tensors: dict[str, np.ndarray], name: str) -> Classifier:
    """The classifier of the published PyTorch network's tensors (`CifarResNeXt`, of any sizes with 1,024 features).

    Raises:
      UserError: they are of another architecture, or of other classes than the ten digits.
    """
    sizes = _sizes_of(tensors, name)
    params_like, stats_like = shapes(sizes, len(DIGITS))
    theirs = {_torch_name(ours): ours for ours in (*params_like, *stats_like)}
    given = {k: v for k, v in tensors.items() if not k.endswith(".num_batches_tracked")}
    _check_shapes(dict.fromkeys(given, ()), dict.fromkeys(theirs, ()), name)
    converted = {}
    for key, value in given.items():
        if not np.issubdtype(value.dtype, np.floating):
            raise UserError(f"{name} holds {key} as {value.dtype}, not as floating point; save the network again")
        axes = {2: (1, 0), 4: (2, 3, 1, 0)}.get(value.ndim)
        converted[theirs[key]] = np.ascontiguousarray(value.transpose(axes) if axes else value, np.float32)
    wanted = {k: v.shape for k, v in (*params_like.items(), *stats_like.items())}
    _check_shapes({k: v.shape for k, v in converted.items()}, wanted, name)
    return Classifier(sizes, DIGITS, {k: converted[k] for k in params_like}, {k: converted[k] for k in stats_like})


def _sizes_of(tensors: dict[str, np.ndarray], name: str) -> Sizes:
    """The sizes of a PyTorch network, read from its tensors' shapes."""
    prefix = "stage_{0}.stage_{0}_bottleneck_{1}."
    try:
        stem, groups = tensors["conv_1_3x3.weight"].shape[0], set()
        widths, inner, blocks = [], [], set()
        for stage in (1, 2, 3):
            grouped = tensors[prefix.format(stage, 0) + "conv_conv.weight"]
            widths.append(tensors[prefix.format(stage, 0) + "conv_expand.weight"].shape[0])
            inner.append(grouped.shape[0])
            groups.add(grouped.shape[0] // grouped.shape[1])
            blocks.add(sum(prefix.format(stage, i) + "conv_conv.weight" in tensors for i in range(len(tensors))))
        classes, features = tensors["classifier.weight"].shape
    except (KeyError, IndexError, ValueError, ZeroDivisionError) as error:
        raise UserError(
            f"{name} is of another architecture: it has no {str(error)[:80]} as the published classifier, "
            f"CifarResNeXt, has, but {', '.join(sorted(tensors)[:3])}, ...; give that network's weights"
        ) from error
    if len(groups) != 1 or len(blocks) != 1 or features != FEATURES:
        raise UserError(
            f"{name} is of another architecture: its stages have cardinalities {sorted(groups)}, {sorted(blocks)} "
            f"bottlenecks and {features:,} features, where the published classifier has 8, 3 and {FEATURES:,}"
        )
    if classes != len(DIGITS):
        raise UserError(f"{name} tells {classes} classes apart, not the ten digits; give a classifier of digits")
    return Sizes(stem, tuple(widths), tuple(inner), groups.pop(), blocks.pop())


def _torch_name(ours: str) -> str:
    """The published name of a parameter: `stage_1.stage_1_bottleneck_1.bn.weight` for `stages.0.1.bn.scale`."""
    parts = ours.split(".")
    if parts[0] == "stages":
        stage, layer = int(parts[1]) + 1, parts[3]
        layer = f"shortcut.{layer}" if layer.startswith("shortcut") else layer
        parts = [f"stage_{stage}", f"stage_{stage}_bottleneck_{parts[2]}", layer, parts[4]]
    names = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}
    return ".".join([*parts[:-1], names.get(parts[-1], parts[-1])])


def _check_shapes(found: dict[str, Any], wanted: dict[str, Any], name: str) -> None:
    missing, unknown = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    other = [
        f"{k} is {found[k]}, not {wanted[k]}" for k in wanted if k in found and tuple(found[k]) != tuple(wanted[k])
    ]
    differs = [f"no {k}" for k in missing] + [f"an unknown {k}" for k in unknown] + other
    if differs:
        raise UserError(f"{name} is of another architecture: {'; '.join(differs[:3])}{'; ...' * (len(differs) > 3)}")
