"""Reads tensors from a file of `torch.save`, without PyTorch and without running any code in the file.

A pickle is a program: it names functions and calls them. This reader implements the few functions that rebuild tensors.
Every other name becomes an inert class that holds attributes and cannot be called, so that a whole pickled module comes
out as its tree of tensors; a pickle that calls any other name is refused. It reads both of PyTorch's formats: the zip
archive (since 1.6) and the older one.

A script that converts the file with PyTorch once would not do: the released classifier is a pickled DataParallel, which
`torch.load` refuses with `weights_only` and otherwise rebuilds by running code.
"""

from __future__ import annotations

import collections
import dataclasses
import io
import math
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from harmonic.errors import UserError

_MAGIC = 0x1950A86A20F9469CFC6C  # the number that starts a file of the older format
_MOST_OBJECTS, _LONGEST_NAME = 100_000, 500
_DTYPES = {
    "DoubleStorage": "<f8",
    "FloatStorage": "<f4",
    "HalfStorage": "<f2",
    "LongStorage": "<i8",
    "IntStorage": "<i4",
    "ShortStorage": "<i2",
    "CharStorage": "<i1",
    "ByteStorage": "<u1",
    "BoolStorage": "?",
}


@dataclasses.dataclass
class _Storage:
    """The numbers that tensors are views of; in the older format they follow the pickle."""

    key: str
    dtype: np.dtype[Any]
    size: int
    values: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class _Tensor:
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def array(self, name: str) -> np.ndarray:
        """The tensor's numbers.

        Raises:
          UserError: it reaches beyond its storage.
        """
        numbers = (self.offset, *self.shape, *self.strides)
        sound = len(self.shape) == len(self.strides) and all(isinstance(n, int) and n >= 0 for n in numbers)
        empty = 0 in self.shape
        last = self.offset + sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=False))
        values = self.storage.values
        # Without this check, a stride of 0 could turn a few bytes into an array of any size.
        if (
            not sound
            or values is None
            or math.prod(self.shape) > self.storage.size
            or (not empty and last >= len(values))
        ):
            raise UserError(f"the tensor {name} reaches beyond the numbers that the file holds; get the file again")
        if empty:
            return np.zeros(self.shape, values.dtype)
        strides = [s * values.itemsize for s in self.strides]
        return np.array(np.lib.stride_tricks.as_strided(values[self.offset :], self.shape, strides, writeable=False))


class _Named(type):
    """A name in the file that this reader never calls."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        raise UserError(
            f"the weights file calls {cls.__name__}, which is code, not numbers: it is not loaded; get the file from "
            "where it was published, or save the network's state_dict() alone"
        )


class _Inert(metaclass=_Named):
    """An object of any class: only its attributes."""

    def __new__(cls, *args: Any, **kwargs: Any) -> _Inert:
        return object.__new__(cls)

    def __setstate__(self, state: Any) -> None:
        self.__dict__["attributes"] = state if isinstance(state, dict) else {}


def _rebuild_tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> _Tensor:
    if not isinstance(storage, _Storage):
        raise pickle.UnpicklingError("a tensor without a storage")
    return _Tensor(storage, offset, tuple(size), tuple(stride))


_KNOWN: dict[tuple[str, str], Any] = {
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch", "device"): lambda *_: None,
    ("torch", "Size"): tuple,
    ("builtins", "set"): set,
    ("__builtin__", "set"): set,
    **{("torch", name): np.dtype(code) for name, code in _DTYPES.items()},
}


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: BinaryIO, storages: dict[str, _Storage], read: Callable[[_Storage], None] | None):
        super().__init__(file, encoding="latin1")
        self._storages, self._read = storages, read

    def find_class(self, module: str, name: str) -> Any:
        known = _KNOWN.get((module, name))
        return known if known is not None else _Named(f"{module}.{name}", (_Inert,), {})

    def persistent_load(self, pid: Any) -> Any:
        if isinstance(pid, tuple) and len(pid) > 1 and pid[0] == "module":
            return pid[1]  # the older format adds the class's source text
        try:
            kind, dtype, key, _, size = pid[:5]
        except (TypeError, ValueError) as error:
            raise pickle.UnpicklingError("a storage that is not described") from error
        if kind != "storage" or not isinstance(dtype, np.dtype) or not isinstance(size, int) or size < 0:
            raise pickle.UnpicklingError(f"a storage of an unknown kind ({getattr(dtype, '__name__', dtype)!s:.60})")
        if len(pid) > 5 and pid[5] is not None:
            raise pickle.UnpicklingError("a storage that is a view of another")
        if key not in self._storages:
            self._storages[key] = _Storage(str(key), dtype, size)
            if self._read:
                self._read(self._storages[key])
        return self._storages[key]


def read_tensors(path: str | Path) -> dict[str, np.ndarray]:
    """The tensors of a saved state_dict or of a whole saved module, by their names in a state_dict.

    Removes the `module.` that DataParallel puts before every name.

    Raises:
      UserError: the file cannot be read, calls code, or holds no tensors.
    """
    try:
        with open(path, "rb") as file:
            root = _read_zip(file) if zipfile.is_zipfile(file) else _read_older(file)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}); give a file of weights") from error
    except Exception as error:  # damaged bytes can make an unpickler raise anything
        raise UserError(
            f"{path} is not a whole file of PyTorch weights ({type(error).__name__}: {str(error)[:120]}); get it again"
        ) from error
    found: dict[str, Any] = {}
    _collect(root, found)
    while found and all(name.startswith("module.") for name in found):
        found = {name.removeprefix("module."): tensor for name, tensor in found.items()}
    if not found:
        raise UserError(f"{path} holds no tensors; give a saved network or its state_dict")
    return {name: tensor.array(f"{name} of {path}") for name, tensor in found.items()}


def _read_zip(file: BinaryIO) -> Any:
    file.seek(0)
    with zipfile.ZipFile(file) as archive:
        pickles = [name for name in archive.namelist() if name == "data.pkl" or name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise UserError("it is a zip archive, but not one of PyTorch's; give a file that torch.save wrote")
        prefix = pickles[0].removesuffix("data.pkl")
        order = f"{prefix}byteorder"
        if order in archive.namelist() and archive.read(order) != b"little":
            raise UserError("its numbers are big-endian; save it again on an ordinary machine")

        def read(storage: _Storage) -> None:
            entry = archive.getinfo(f"{prefix}data/{storage.key}")
            if entry.file_size != storage.size * storage.dtype.itemsize:
                raise pickle.UnpicklingError(f"storage {storage.key} has {entry.file_size} bytes")
            storage.values = np.frombuffer(archive.read(entry), storage.dtype)

        return _Unpickler(io.BytesIO(archive.read(pickles[0])), {}, read).load()


def _read_older(file: BinaryIO) -> Any:
    file.seek(0)
    storages: dict[str, _Storage] = {}

    def load() -> Any:
        return _Unpickler(file, storages, None).load()

    if load() != _MAGIC:
        raise UserError("it is a pickle, but not one of PyTorch's; give a file that torch.save wrote")
    load()  # the format's version
    described = load()
    if isinstance(described, dict) and not described.get("little_endian", True):
        raise UserError("its numbers are big-endian; save it again on an ordinary machine")
    root = load()
    for key in load():
        storage = storages[key]
        stored = int.from_bytes(file.read(8), "little", signed=True)
        data = file.read(storage.size * storage.dtype.itemsize)
        if stored != storage.size or len(data) != storage.size * storage.dtype.itemsize:
            raise pickle.UnpicklingError(f"storage {key} is cut short")
        storage.values = np.frombuffer(data, storage.dtype)
    return root


def _collect(root: Any, found: dict[str, Any]) -> None:
    """Collects the tensors of state_dicts (also inside a checkpoint) and of modules, by their dotted names."""
    waiting = [(root, "")]
    for _ in range(_MOST_OBJECTS):
        if not waiting:
            return
        value, name = waiting.pop()
        if len(name) > _LONGEST_NAME:
            break
        if isinstance(value, _Tensor):
            found[name] = value
        elif isinstance(value, _Inert):
            attributes = value.__dict__.get("attributes", {})
            waiting += [(attributes.get(kind), name) for kind in ("_parameters", "_buffers", "_modules")]
        elif isinstance(value, dict):
            wrapped = value.get("state_dict")
            items = wrapped if isinstance(wrapped, dict) else value
            waiting += [(item, f"{name}.{key}" if name else str(key)) for key, item in items.items()]
    raise UserError("the weights file refers to itself, or holds more objects than any network; give a state_dict")
