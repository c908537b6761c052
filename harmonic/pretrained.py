"""Trained models, ready to generate: those in the box, and from an export, the hub or a run's folder.

    model = harmonic.load("USER/NAME")
    audio = model.generate(seconds=4, num_samples=2)     # float32 [2, samples] at model.sample_rate

An export (`harmonic.export`) is a folder of `config.json` (`read_config` checks it) and `model.safetensors`: float32
arrays named by their path in the dict of the model's `init`, joined by dots (`blocks.temporal.gate.kernel`, its first
axis the blocks'). Nothing else in a folder is read, and nothing in it is executed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors
import safetensors.numpy

from harmonic import files, hub, models
from harmonic.audio import PUBLISHED
from harmonic.config import Config, from_dict
from harmonic.errors import UserError
from harmonic.models.base import Model
from harmonic.run import Run
from harmonic.voice import LONGEST, Codec, Voice

FORMAT = 1
CONFIG, WEIGHTS = "config.json", "model.safetensors"
BOX = Path(__file__).parent / "weights"  # the models in the box: exports that are installed with the package, by name
_PICKLES = (".bin", ".ckpt", ".h5", ".msgpack", ".pickle", ".pkl", ".pt", ".pth")


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A trained model.

    Attributes:
      model, params: the model and its parameters, as `model.init` names them.
      config: the run's.
      sample_rate: Hz.
      loudness: of its recordings in LUFS; None where each was scaled to its own minimum and maximum.
      trim_silence: silence that was cut off at both ends, in dB below the loudest frame; None where it was left.
      about: `weights` and `data` of an export's config.json; empty for a run's folder.
    """

    model: Model
    params: dict[str, Any] = dataclasses.field(repr=False)
    config: Config
    sample_rate: int
    loudness: float | None = None
    trim_silence: float | None = None
    about: dict[str, Any] = dataclasses.field(default_factory=dict, repr=False)

    @property
    def voice(self) -> Voice:
        """The model with its codec, to generate sound."""
        data = self.config.data
        scale = self.loudness, self.trim_silence, data.dataset in PUBLISHED
        return Voice(self.model, self.params, Codec(data.encoding, data.num_levels, self.sample_rate, *scale))

    def generate(
        self,
        seconds: float = 1.0,
        *,
        num_samples: int = 1,
        seed: int = 0,
        temperature: float = 1.0,
        top_p: float = 1.0,
        prompt: np.ndarray | str | os.PathLike[str] | None = None,
    ) -> np.ndarray:
        """Generates `num_samples` streams side by side: those of `workflows.generate` with the same settings.

        Args:
          seconds: of each stream, its prompt included.
          num_samples: streams. A stream depends on the seed and its number, not on how many there are.
          seed: of the random numbers.
          temperature: logits are divided by it; 1 samples the model itself.
          top_p: sample from the smallest set of tokens that holds this probability.
          prompt: an audio file, or floats at `sample_rate`: [samples] that all streams continue, or [num_samples,
            samples]. It is scaled as the data set's recordings are: to their `loudness`, or to its own extremes.

        Returns:
          float32 [num_samples, samples] in [-1, 1], the prompt first.

        Raises:
          UserError: a value is impossible, or a prompt is at another rate or as long as what is asked for.
        """
        pieces = self.stream(
            seconds, num_samples=num_samples, seed=seed, temperature=temperature, top_p=top_p, prompt=prompt
        )
        return np.concatenate(list(pieces), axis=1)

    def stream(
        self,
        seconds: float | None = None,
        *,
        num_samples: int = 1,
        seed: int = 0,
        temperature: float = 1.0,
        top_p: float = 1.0,
        prompt: np.ndarray | str | os.PathLike[str] | None = None,
    ) -> Iterator[np.ndarray]:
        """The result of `generate` in pieces [num_samples, a tenth of a second] as they are made, the prompt first.

        Without `seconds` it continues for as long as more is asked for (some 37 hours at 16 kHz).
        """
        if num_samples < 1:
            raise UserError(f"num_samples={num_samples} is impossible: it must be at least 1")
        voice = self.voice
        tokens = None if prompt is None else voice.codec.prompt(prompt, num_samples=num_samples)
        length = LONGEST if seconds is None else voice.length(seconds, tokens)
        pieces = voice.pieces(
            length,
            num_samples=num_samples,
            prompt=tokens,
            chunk=max(self.sample_rate // 10, 1),  # the same for both methods: each size is compiled
            seed=seed,
            temperature=temperature,
            top_p=top_p,
        )
        return (piece.sound for piece in pieces)


def in_the_box() -> list[str]:
    """The names of the models that are installed with the package."""
    return sorted(path.parent.name for path in BOX.glob(f"*/{CONFIG}"))


def load(path_or_hub_id: str | os.PathLike[str], revision: str | None = None) -> Pretrained:
    """See `harmonic.load`."""
    folder, name = Path(path_or_hub_id).expanduser(), str(path_or_hub_id)
    if folder.is_dir():
        if revision is not None:
            raise UserError(f"{name} is a folder here, which has no revisions; leave out revision={revision!r}")
        return _load_folder(folder)
    if name in in_the_box() and not folder.exists():
        if revision is not None:
            raise UserError(f"{name} is a model in the box, which has no revisions; leave out revision={revision!r}")
        return read_export(BOX / name, again="install harmonic-rnn again")
    if not isinstance(path_or_hub_id, str) or not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) or folder.exists():
        boxed = ", ".join(in_the_box()) or "none"
        raise UserError(f"{name} is neither a folder nor a model of the hub (USER/NAME) nor one in the box ({boxed})")
    fetched = hub.fetch(name, (CONFIG, WEIGHTS), revision)
    return read_export(fetched, again=f"remove {hub.cache_folder(name)} and load it again")


def _load_folder(folder: Path) -> Pretrained:
    names = sorted(path.name for path in folder.iterdir())
    if WEIGHTS in names:
        return read_export(folder)
    if "checkpoints" in names or (CONFIG in names and not hub.is_export(files.read_json(folder / CONFIG))):
        return _load_run(folder)
    if pickles := [name for name in names if name.endswith(_PICKLES)]:
        raise UserError(
            f"{folder} has no {WEIGHTS}, and {pickles[0]} is not read: a file of its kind can run code; ask whoever "
            "made it for safetensors"
        )
    raise UserError(f"{folder} is neither an export ({CONFIG}, {WEIGHTS}) nor a run's folder (checkpoints)")


def _load_run(workdir: Path) -> Pretrained:
    run = Run(workdir)
    trained, manifest = run.weights(), run.manifest
    scale = manifest.loudness, manifest.trim_silence
    return Pretrained(trained.model, trained.params, trained.config, manifest.sample_rate, *scale)


def read_export(folder: Path, *, again: str = "export it again") -> Pretrained:
    """Reads an export, and checks its format, checksum and finiteness, and names, shapes and types against its config.

    Args:
      folder: with `config.json` and `model.safetensors`.
      again: the way out if a file is damaged.

    Raises:
      UserError: names what differs.
    """
    about, config = read_config(folder / CONFIG)
    model = models.make(config.model, config.data.num_levels)
    params = _read_weights(folder / WEIGHTS, model, about["weights"]["sha256"], again)
    scale = about["sample_rate"], about["data"]["loudness"], about["data"].get("trim_silence")  # not in old exports
    return Pretrained(model, params, config, *scale, {name: about[name] for name in ("weights", "data")})


def read_config(path: Path) -> tuple[dict[str, Any], Config]:
    """Reads an export's config.json: (all of it, the run's config in it).

    Raises:
      UserError: the file is something else, of another version, or has impossible values.
    """
    raw = files.read_json(path, remedy=f"it says which model {WEIGHTS} is: export it again")
    if not hub.is_export(raw):
        raise UserError(f"{path} is not that of a HarmonicRNN export; make one with python -m workflows.export")
    if raw.get("format") != FORMAT:
        raise UserError(
            f"{path} is of format {raw.get('format')!r:.20}; this version reads {FORMAT}: update harmonic-rnn"
        )
    try:
        config = from_dict(raw["config"])
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    rate, weights, data = raw.get("sample_rate"), raw.get("weights"), raw.get("data")
    scale = [data.get(name) if isinstance(data, dict) else "" for name in ("loudness", "trim_silence")]
    for name, value, ok in (
        ("sample_rate", rate, type(rate) is int and rate >= 1),
        ("weights", weights, isinstance(weights, dict) and isinstance(weights.get("sha256"), str)),
        ("data", data, all(value is None or type(value) in (int, float) for value in scale)),
    ):
        if not ok:
            raise UserError(f"{path} is damaged: {name} is {value!r:.60}")
    return raw, config


def flatten(params: Any) -> dict[str, Any]:
    """Parameters, or their shapes, by their names in model.safetensors."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _read_weights(path: Path, model: Model, sha256: str, again: str) -> dict[str, Any]:
    expected = jax.eval_shape(model.init, jax.random.key(0))
    shapes = {name: ("F32", leaf.shape) for name, leaf in flatten(expected).items()}
    with files.refusing(path, again, safetensors.SafetensorError, kind="safetensors"):
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        # The header first: it says what differs, and a wrong file is not worth reading.
        with safetensors.safe_open(path, framework="numpy") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}
            found = {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
        _check_names(path, shapes, found)
        if digest != sha256:
            raise UserError(
                f"{path} does not match its checksum in {CONFIG}: it is damaged, or of another export; {again}"
            )
        arrays = safetensors.numpy.load_file(path)
    check_finite(arrays, str(path))
    return jax.tree.unflatten(jax.tree.structure(expected), [jax.numpy.asarray(arrays[name]) for name in shapes])


def _check_names(path: Path, expected: dict[str, Any], found: dict[str, Any]) -> None:
    if expected == found:
        return
    differing = [f"{name} is missing" for name in expected if name not in found]
    differing += [f"{name} is superfluous" for name in found if name not in expected]
    for name in expected.keys() & found.keys():
        if expected[name] != found[name]:
            (kind, shape), (theirs, is_there) = expected[name], found[name]
            differing.append(f"{name} is {theirs}{list(is_there)} there and {kind}{list(shape)} by {CONFIG}")
    more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
    raise UserError(f"{path} is of another architecture: {'; '.join(sorted(differing)[:3])}{more}")


def check_finite(arrays: dict[str, np.ndarray], where: str) -> None:
    """Refuses weights with NaN or infinity in them.

    Raises:
      UserError: names the first.
    """
    for name, array in arrays.items():
        if not math.isfinite(float(np.sum(np.abs(array), dtype=np.float64))):
            raise UserError(f"{where} holds weights that are not finite (NaN or infinity), first in {name}: no model")
