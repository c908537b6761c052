"""Machine code for CPUs, written as arithmetic in Python and called by XLA.

`Code` builds a function with llvmlite: `Value`s are vectors of floats whose operators become instructions, loops are
`with` blocks. `register` makes a custom call of it through XLA's foreign function interface: its handler reads the
buffers' addresses out of the call frame (`xla/ffi/api/c_api.h`, version 0.3, on 64-bit machines), shares the work
out over threads, and returns null, which is success.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import re
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from llvmlite import binding, ir

_VERSION = (0, 3)
_BYTE, _INT32, _INT64, _POINTER = ir.IntType(8), ir.IntType(32), ir.IntType(64), ir.PointerType()
_FLAGS = ("contract", "nsz")  # a product and a sum may become one instruction; no number is taken to be finite
_JOB = 32  # int64s of a job: channels from, to; recordings from, to; time, channels; the buffers' addresses
_BUFFERS = 6
ARGUMENTS, RESULTS = 40, 80  # where a call frame holds them
_GRAIN = 16  # channels of a thread are a multiple of this: a cache line of float32
_THREADED = 1 << 17  # elements; fewer are not worth starting a thread
_HUGE = 1 << 21  # bytes of a huge page, and Linux's word for wanting them
_MADV_HUGEPAGE = 14


@functools.cache
def available() -> bool:
    """Whether XLA speaks the version that is written here, on a machine that this module knows."""
    header = Path(jax.ffi.include_dir()) / "xla" / "ffi" / "api" / "c_api.h"
    try:
        found = re.findall(r"#define XLA_FFI_API_M(?:AJOR|INOR) (\d+)", header.read_text())
    except OSError:
        return False
    return sys.platform in ("linux", "darwin") and struct.calcsize("P") == 8 and tuple(map(int, found)) == _VERSION


class Value:
    """A float, or a vector of as many as `Floats.lanes` says, of the kernel's type."""

    def __init__(self, code: Floats, value: ir.Value):
        self.code, self.value = code, value

    def _other(self, other: Value | float) -> ir.Value:
        return other.value if isinstance(other, Value) else ir.Constant(self.value.type, self.code.splat(other))

    def _with(self, operation: Callable[..., ir.Value], left: Any, right: Any) -> Value:
        return Value(self.code, operation(self._other(left), self._other(right), flags=_FLAGS))

    def __add__(self, other: Value | float) -> Value:
        return self._with(self.code.builder.fadd, self, other)

    def __sub__(self, other: Value | float) -> Value:
        return self._with(self.code.builder.fsub, self, other)

    def __mul__(self, other: Value | float) -> Value:
        return self._with(self.code.builder.fmul, self, other)

    def __truediv__(self, other: Value | float) -> Value:
        return self._with(self.code.builder.fdiv, self, other)

    def __radd__(self, other: float) -> Value:
        return self._with(self.code.builder.fadd, other, self)

    def __rsub__(self, other: float) -> Value:
        return self._with(self.code.builder.fsub, other, self)

    def __rmul__(self, other: float) -> Value:
        return self._with(self.code.builder.fmul, other, self)

    def __rtruediv__(self, other: float) -> Value:
        return self._with(self.code.builder.fdiv, other, self)

    def __neg__(self) -> Value:
        return Value(self.code, self.code.builder.fneg(self.value))

    def __lt__(self, other: Value | float) -> ir.Value:
        """A condition for `Code.where`; false if either is NaN."""
        return self.code.builder.fcmp_ordered("<", self.value, self._other(other))

    def __gt__(self, other: Value | float) -> ir.Value:
        return self.code.builder.fcmp_ordered(">", self.value, self._other(other))


class Floats:
    """Instructions on floats of one type, at the end of what `builder` writes.

    Attributes:
      lanes: values that one instruction works on now.
    """

    def __init__(self, module: ir.Module, builder: ir.IRBuilder, dtype: np.dtype, lanes: int):
        self.builder, self.dtype, self.lanes = builder, dtype, lanes
        self.kind = ir.FloatType() if dtype == np.float32 else ir.DoubleType()
        self._module = module

    def splat(self, number: float) -> Any:
        """A constant's lanes."""
        number = float(self.dtype.type(number))
        return number if self.lanes == 1 else [number] * self.lanes

    @property
    def _type(self) -> ir.Type:
        return self.kind if self.lanes == 1 else ir.VectorType(self.kind, self.lanes)

    @contextlib.contextmanager
    def loop(self, start: ir.Value | int, stop: ir.Value, step: int = 1) -> Iterator[ir.Value]:
        """The body of a loop over int64s from `start` to before `stop`."""
        with loop(self.builder, start, stop, step) as index:
            yield index

    def int64(self, number: int) -> ir.Value:
        """A count or a place."""
        return ir.Constant(_INT64, number)

    def constant(self, number: float) -> Value:
        """The number, in every lane."""
        return Value(self, ir.Constant(self._type, self.splat(number)))

    def where(self, condition: ir.Value, yes: Value, no: Value) -> Value:
        """Lane by lane."""
        return Value(self, self.builder.select(condition, yes.value, no.value))

    def call(self, name: str, x: Value) -> Value:
        """An LLVM intrinsic (`llvm.sqrt`) or, for single numbers, a function of the C library (`expm1`)."""
        kind = self.kind
        if name.startswith("llvm."):
            kind = self._type
            name += f".{'' if self.lanes == 1 else f'v{self.lanes}'}f{8 * self.dtype.itemsize}"
        else:
            find(name)
        function = self._module.globals.get(name)
        if function is None:
            function = ir.Function(self._module, ir.FunctionType(kind, [kind]), name)
        return Value(self, self.builder.call(function, [x.value]))

    def integers(self, x: Value) -> ir.Value:
        """int32s of a float32 that holds integers."""
        return self.builder.fptosi(x.value, self._integers)

    @property
    def _integers(self) -> ir.Type:
        return _INT32 if self.lanes == 1 else ir.VectorType(_INT32, self.lanes)

    def int32(self, number: int) -> ir.Value:
        """The number, in every lane."""
        return ir.Constant(self._integers, number if self.lanes == 1 else [number] * self.lanes)

    def bit(self, integers: ir.Value, number: int) -> ir.Value:
        """A condition: is any of `number`'s bits set?"""
        builder = self.builder
        return builder.icmp_signed("!=", builder.and_(integers, self.int32(number)), self.int32(0))

    def power_of_two(self, exponents: ir.Value) -> Value:
        """2^n in float32, for exponents from -126 to 127."""
        builder = self.builder
        bits = builder.shl(builder.add(exponents, self.int32(127)), self.int32(23))
        return Value(self, builder.bitcast(bits, self._type))


class Code(Floats):
    """A function being written, of one job: some channels, or some recordings, at all times.

    Attributes:
      time, channels: the sizes of the whole, int64.
    """

    def __init__(self, module: ir.Module, name: str, dtype: np.dtype):
        self.function = ir.Function(module, ir.FunctionType(_POINTER, [_POINTER]), name)
        # float64 calls the C library, a number at a time.
        super().__init__(
            module, ir.IRBuilder(self.function.append_basic_block()), dtype, 16 if dtype == np.float32 else 1
        )
        self._widest = self.lanes
        job = self.function.args[0]
        self._job = [load_word(self.builder, job, 8 * i) for i in range(_JOB)]
        self._from, self._to, self._first, self._end, self.time, self.channels = self._job[:_BUFFERS]

    def finish(self) -> None:
        """Ends the function."""
        self.builder.ret(ir.Constant(_POINTER, None))

    def each_recording(self) -> contextlib.AbstractContextManager[ir.Value]:
        """The body of a loop over the job's recordings."""
        return loop(self.builder, self._first, self._end)

    def each_channel(self, body: Callable[[ir.Value], None]) -> None:
        """`body(c)` for the job's channels, as many lanes at a time as fit, and the rest one by one."""
        count = self.builder.sub(self._to, self._from)
        whole = self.builder.add(self._from, self.builder.and_(count, ir.Constant(_INT64, -self._widest)))
        with self.loop(self._from, whole, self._widest) as channel:
            body(channel)
        if self._widest > 1:
            self.lanes = 1
            with self.loop(whole, self._to) as channel:
                body(channel)
            self.lanes = self._widest

    def row(self, recording: ir.Value, time: ir.Value) -> ir.Value:
        """The row of a [batch, time, ..] buffer."""
        return self.builder.add(self.builder.mul(recording, self.time), time)

    def _address(self, buffer: int, row: ir.Value, width: ir.Value, column: ir.Value) -> ir.Value:
        index = self.builder.add(self.builder.mul(row, width), column)
        base = self.builder.inttoptr(self._job[_BUFFERS + buffer], _POINTER)
        return self.builder.gep(base, [index], source_etype=self.kind)

    def load(self, buffer: int, row: ir.Value | int, column: ir.Value, parts: int = 1, part: int = 0) -> Value:
        """Row `row` of a buffer of rows of `parts` x channels, at channel `column` of part `part`."""
        where = self._place(buffer, row, column, parts, part)
        return Value(self, self.builder.load(where, align=self.dtype.itemsize, typ=self._type))

    def store(
        self, value: Value, buffer: int, row: ir.Value | int, column: ir.Value, parts: int = 1, part: int = 0
    ) -> None:
        """The other way."""
        where = self._place(buffer, row, column, parts, part)
        self.builder.store(value.value, where, align=self.dtype.itemsize)

    def _place(self, buffer: int, row: ir.Value | int, column: ir.Value, parts: int, part: int) -> ir.Value:
        row = ir.Constant(_INT64, row) if isinstance(row, int) else row
        width = self.builder.mul(self.channels, ir.Constant(_INT64, parts))
        skipped = self.builder.mul(self.channels, ir.Constant(_INT64, part))
        return self._address(buffer, row, width, self.builder.add(skipped, column))


def load_word(builder: ir.IRBuilder, pointer: ir.Value, offset: int) -> ir.Value:
    """The int64 that stands `offset` bytes behind the pointer."""
    return builder.load(builder.gep(pointer, [ir.Constant(_INT64, offset)], source_etype=_BYTE), typ=_INT64)


def follow(builder: ir.IRBuilder, pointer: ir.Value, offset: int) -> ir.Value:
    """The pointer that stands there."""
    return builder.inttoptr(load_word(builder, pointer, offset), _POINTER)


def room(builder: ir.IRBuilder, words: int) -> ir.Value:
    """int64s on the stack."""
    # By way of an integer: llvmlite's stack pointers know their type, all others do not.
    address = builder.ptrtoint(builder.alloca(ir.ArrayType(_INT64, words)), _INT64)
    return builder.inttoptr(address, _POINTER)


@contextlib.contextmanager
def loop(builder: ir.IRBuilder, start: ir.Value | int, stop: ir.Value, step: int = 1) -> Iterator[ir.Value]:
    """The body of a loop over int64s from `start` to before `stop`."""
    start = ir.Constant(_INT64, start) if isinstance(start, int) else start
    before, head = builder.block, builder.append_basic_block()
    body, after = builder.append_basic_block(), builder.append_basic_block()
    builder.branch(head)
    builder.position_at_end(head)
    index = builder.phi(_INT64)
    index.add_incoming(start, before)
    builder.cbranch(builder.icmp_signed("<", index, stop), body, after)
    builder.position_at_end(body)
    yield index
    index.add_incoming(builder.add(index, ir.Constant(_INT64, step)), builder.block)
    builder.branch(head)
    builder.position_at_end(after)


def threads() -> int:
    """As many as there are cores, shared out among the devices that this process makes of its CPU."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // jax.local_device_count("cpu"))


_Result = TypeVar("_Result")
_building = threading.RLock()


def once(build: Callable[..., _Result]) -> Callable[..., _Result]:
    """As `functools.cache`, for threads: streams are traced side by side, and XLA takes a name only once."""
    made: dict[Any, _Result] = {}

    @functools.wraps(build)
    def get(*key: Any) -> _Result:
        with _building:
            if key not in made:
                made[key] = build(*key)
            return made[key]

    return get


@once
def register(write: Callable[[Code], None], dtype: str, threads: int) -> str:
    """Makes a custom call of the CPU platform of what `write` writes.

    Args:
      write: writes the function's body. Buffers are numbered through arguments and results; the first argument is
        [batch, time, ..], the last one [.., channels]. It must touch nothing but its job's.
      dtype: of all buffers, float32 or float64.
      threads: that share the work on large arrays.

    Returns:
      The target's name.
    """
    name = f"harmonic_{write.__name__}_{dtype}_{threads}"
    module = ir.Module(name)
    code = Code(module, f"{name}_job", np.dtype(dtype))
    write(code)
    code.finish()
    _write_handler(module, name, code.function, threads, np.dtype(dtype).itemsize)
    publish(module, name)
    return name


_alive: list[Any] = []  # what is called lies in these


def compile_module(module: ir.Module, name: str) -> int:
    """The address of its function `name`, which stays for good."""
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    features = binding.get_host_cpu_features().flatten()
    target = binding.Target.from_default_triple()
    machine = target.create_target_machine(cpu=binding.get_host_cpu_name(), features=features, opt=3, jit=True)
    parsed = binding.parse_assembly(str(module))
    parsed.verify()
    passes = binding.create_pass_builder(machine, binding.create_pipeline_tuning_options(speed_level=2))
    passes.getModulePassManager().run(parsed, passes)
    engine = binding.create_mcjit_compiler(parsed, machine)
    engine.finalize_object()
    _alive.append(engine)
    return engine.get_function_address(name)


def find(name: str) -> None:
    """Lets a C function of this process be called by name."""
    if not binding.address_of_symbol(name):
        binding.add_symbol(name, ctypes.cast(getattr(ctypes.CDLL(None), name), ctypes.c_void_p).value)


def start_handler(module: ir.Module, name: str) -> tuple[ir.IRBuilder, ir.Value]:
    """A function that XLA can call: what is written next, and the call frame, where `buffers` finds the arrays.

    The frame holds {size, .., count, types, pointers} of the arguments at 40 and of the results at 80; a buffer its
    data at 24 and its dimensions at 40.
    """
    function = ir.Function(module, ir.FunctionType(_POINTER, [_POINTER]), name)
    builder, frame = ir.IRBuilder(function.append_basic_block()), function.args[0]
    null = ir.Constant(_POINTER, None)
    # An extension of type 1 asks for the version that the handler speaks: {.., type at 8, metadata at 24}, whose
    # version stands at 8 and in it the numbers at 16 and 20.
    extension = follow(builder, frame, 8)
    with builder.if_then(builder.icmp_unsigned("!=", extension, null)):
        metadata = follow(builder, extension, 24)
        for i, part in enumerate(_VERSION):
            place = builder.gep(metadata, [ir.Constant(_INT64, 8 + 16 + 4 * i)], source_etype=_BYTE)
            builder.store(ir.Constant(_INT32, part), place)
        builder.ret(null)
    return builder, frame


def buffers(builder: ir.IRBuilder, frame: ir.Value, group: int, count: int) -> list[tuple[ir.Value, ir.Value]]:
    """(data, dimensions) of the first arguments (group ARGUMENTS) or results (RESULTS) of a call."""
    pointers = follow(builder, frame, group + 32)
    found = (follow(builder, pointers, 8 * i) for i in range(count))
    return [(follow(builder, buffer, 24), follow(builder, buffer, 40)) for buffer in found]


def publish(module: ir.Module, name: str) -> None:
    """Compiles the module and makes its function `name` a custom call of the CPU platform."""
    handler = ctypes.c_void_p(compile_module(module, name))
    jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(handler), platform="cpu")


def _want_huge_pages(
    module: ir.Module, builder: ir.IRBuilder, count: ir.Value, pointers: ir.Value, itemsize: int
) -> None:
    """Results lie in fresh memory, and small pages cost more to map than to fill: threads even meet in them."""

    def number(value: int) -> ir.Value:
        return ir.Constant(_INT64, value)

    find("madvise")
    advise = ir.Function(module, ir.FunctionType(_INT32, [_INT64, _INT64, _INT32]), "madvise")
    with loop(builder, 0, count) as i:
        buffer = builder.load(builder.gep(pointers, [i], source_etype=_INT64), typ=_INT64)
        buffer = builder.inttoptr(buffer, _POINTER)
        # Those of three dimensions are the large ones.
        rank, data = load_word(builder, buffer, 32), load_word(builder, buffer, 24)
        dims = builder.inttoptr(load_word(builder, buffer, 40), _POINTER)
        with builder.if_then(builder.icmp_signed("==", rank, number(3))):
            size = number(itemsize)
            for place in range(3):
                size = builder.mul(size, load_word(builder, dims, 8 * place))
            start = builder.and_(builder.add(data, number(_HUGE - 1)), number(-_HUGE))
            length = builder.and_(builder.sub(builder.add(data, size), start), number(-_HUGE))
            with builder.if_then(builder.icmp_signed(">", length, number(0))):
                builder.call(advise, [start, length, ir.Constant(_INT32, _MADV_HUGEPAGE)])


def _write_handler(module: ir.Module, name: str, work: ir.Function, threads: int, itemsize: int) -> None:
    builder, frame = start_handler(module, name)
    null = ir.Constant(_POINTER, None)

    def number(value: int) -> ir.Value:
        return ir.Constant(_INT64, value)

    def element(pointer: ir.Value, index: ir.Value) -> ir.Value:
        return builder.gep(pointer, [index], source_etype=_INT64)

    jobs = room(builder, threads * _JOB)
    ids = room(builder, threads)
    placed: ir.Value = number(_BUFFERS)
    for group in (ARGUMENTS, RESULTS):
        count, pointers = load_word(builder, frame, group + 16), follow(builder, frame, group + 32)
        with loop(builder, 0, count) as i:
            buffer = builder.inttoptr(builder.load(element(pointers, i), typ=_INT64), _POINTER)
            builder.store(load_word(builder, buffer, 24), element(jobs, builder.add(placed, i)))
        placed = builder.add(placed, count)
    if sys.platform == "linux":
        _want_huge_pages(module, builder, load_word(builder, frame, 96), follow(builder, frame, 112), itemsize)
    arguments, pointers = load_word(builder, frame, 56), follow(builder, frame, 72)
    last = builder.load(element(pointers, builder.sub(arguments, number(1))), typ=_INT64)
    (_, shape), *_ = buffers(builder, frame, ARGUMENTS, 1)
    state_shape = follow(builder, builder.inttoptr(last, _POINTER), 40)
    batch, time, channels = (
        load_word(builder, shape, 0),
        load_word(builder, shape, 8),
        load_word(builder, state_shape, 8),
    )
    for i, value in enumerate((number(0), batch, time, channels)):
        builder.store(value, element(jobs, number(2 + i)))
    builder.store(number(0), element(jobs, number(0)))
    builder.store(channels, element(jobs, number(1)))

    # Each thread takes a share of the recordings, which lie apart, or where there are too few, of the channels; this
    # thread takes the first.
    large = builder.icmp_signed(">=", builder.mul(builder.mul(batch, time), channels), number(_THREADED))
    parts = builder.select(large, number(threads), number(1))
    apart = builder.icmp_signed(">=", batch, parts)
    grain = builder.select(apart, number(1), number(_GRAIN))
    whole = builder.select(apart, batch, channels)
    grains = builder.sdiv(builder.add(whole, builder.sub(grain, number(1))), grain)
    share = builder.sdiv(builder.add(grains, builder.sub(parts, number(1))), parts)
    share = builder.mul(share, grain)
    place = builder.select(apart, number(2), number(0))
    pthread = ir.FunctionType(_INT32, [_POINTER] * 4)
    find("pthread_create")
    find("pthread_join")
    create = ir.Function(module, pthread, "pthread_create")
    join = ir.Function(module, ir.FunctionType(_INT32, [_INT64, _POINTER]), "pthread_join")

    def least(a: ir.Value, b: ir.Value) -> ir.Value:
        return builder.select(builder.icmp_signed("<", a, b), a, b)

    with loop(builder, 1, parts) as i:
        job = element(jobs, builder.mul(i, number(_JOB)))
        with loop(builder, 0, number(_JOB)) as j:
            builder.store(builder.load(element(jobs, j), typ=_INT64), element(job, j))
        start = builder.mul(i, share)
        builder.store(least(start, whole), element(job, place))
        builder.store(least(builder.add(start, share), whole), element(job, builder.add(place, number(1))))
        failed = builder.call(create, [element(ids, i), null, work, job])
        with builder.if_then(builder.icmp_signed("!=", failed, ir.Constant(_INT32, 0))):
            builder.call(work, [job])
            builder.store(number(0), element(ids, i))
    builder.store(least(share, whole), element(jobs, builder.add(place, number(1))))
    builder.call(work, [jobs])
    with loop(builder, 1, parts) as i:
        thread = builder.load(element(ids, i), typ=_INT64)
        with builder.if_then(builder.icmp_signed("!=", thread, number(0))):
            builder.call(join, [thread, null])
    builder.ret(null)
