"""Machine code that XLA calls, through the C interface of its foreign functions (`xla/ffi/api/c_api.h`).

`register` compiles an elementwise kernel and makes a custom call of it: the handler reads the buffers' addresses out of
the call frame by byte offsets, shares the work out over threads, and returns null, which means success. README.md
pictures the frame. The offsets hold for version 0.3 of the interface and later minor versions, on 64-bit machines.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import re
import struct
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from llvmlite import binding, ir

from harmonic.kernels.cpu.llvm import (
    BYTE,
    INT32,
    INT64,
    JOB_BUFFERS,
    JOB_WORDS,
    POINTER,
    Code,
    compile_module,
    find,
    follow,
    int64,
    load_word,
    loop,
    room,
)

_MAJOR, _MINOR = 0, 3
_EXTENSIONS, ARGUMENTS, RESULTS = 8, 40, 80  # offsets in a call frame
_METADATA = 1  # the type of the extension that asks for a handler's version
_GRAIN = 16  # channels of a thread are a multiple of this: a cache line of float32
_THREADED = 1 << 17  # elements; with fewer, starting a thread does not pay
_HUGE = 1 << 21  # bytes of a huge page
_MADV_HUGEPAGE = 14  # Linux's number for asking for them


@functools.cache
def obstacle() -> str | None:
    """Why XLA cannot call this machine code here, or None if it can."""
    if sys.platform not in ("linux", "darwin") or struct.calcsize("P") != 8:
        return f"it is written for 64-bit Linux and macOS, and this is {8 * struct.calcsize('P')}-bit {sys.platform}"
    header = Path(jax.ffi.include_dir()) / "xla" / "ffi" / "api" / "c_api.h"
    try:
        found = dict(re.findall(r"#define XLA_FFI_API_(MAJOR|MINOR) (\d+)", header.read_text()))
        major, minor = int(found["MAJOR"]), int(found["MINOR"])
    except (OSError, KeyError):
        return f"{header} does not tell the version of XLA's foreign function interface"
    if major != _MAJOR or minor < _MINOR:
        wanted = f"{_MAJOR}.{_MINOR} or a later {_MAJOR}.x"
        return f"XLA's foreign function interface has version {major}.{minor}, and {wanted} is needed"
    return None


def processor() -> str:
    """The name of this machine's processor, and a digest of its features: what machine code is compiled for."""
    features = binding.get_host_cpu_features().flatten()
    return f"{binding.get_host_cpu_name()} {hashlib.sha256(features.encode()).hexdigest()[:8]}"


def available() -> bool:
    """Whether XLA can call this machine code here."""
    return obstacle() is None


def threads() -> int:
    """The number of cores, shared out among the devices that this process makes of its CPU."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // jax.local_device_count("cpu"))


_Result = TypeVar("_Result")
_building = threading.RLock()


def once(build: Callable[..., _Result]) -> Callable[..., _Result]:
    """As `functools.cache`, and two threads never build the same thing: XLA refuses a name that it has."""
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
    """Makes a custom call of the CPU platform from the function body that `write` writes.

    Args:
      write: a function at the top of a module. It numbers the buffers through arguments and results; the first
        argument is [batch, time, ..], the last one [rows, channels]. It must touch nothing outside its job.
      dtype: of all buffers, float32 or float64.
      threads: that share the work on large arrays.

    Returns:
      The custom call's name, made of that function's module and name.
    """
    name, module = target_name(write, dtype, threads), build(write, dtype, threads)
    publish(module, name)
    return name


def target_name(write: Callable[[Code], None], dtype: str, threads: int) -> str:
    """The name of the custom call that `register` makes."""
    return f"{write.__module__}.{write.__qualname__}.{dtype}.{threads}"


def build(write: Callable[[Code], None], dtype: str, threads: int) -> ir.Module:
    """The LLVM module of `register`'s custom call: print it, or its `llvm.assembly`, to see what is compiled."""
    name = target_name(write, dtype, threads)
    module = ir.Module(name)
    code = Code(module, f"{name}.job", np.dtype(dtype))
    write(code)
    code.finish()
    _write_handler(module, name, code.function, threads, np.dtype(dtype).itemsize)
    return module


def publish(module: ir.Module, name: str) -> None:
    """Compiles the module and makes its function `name` a custom call of the CPU platform."""
    handler = ctypes.c_void_p(compile_module(module, name))
    jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(handler), platform="cpu")


def start_handler(module: ir.Module, name: str) -> tuple[ir.IRBuilder, ir.Value]:
    """Begins a function that XLA can call.

    Returns:
      (what writes its body, the call frame, in which `buffers` finds the arrays).
    """
    function = ir.Function(module, ir.FunctionType(POINTER, [POINTER]), name)
    builder, frame = ir.IRBuilder(function.append_basic_block()), function.args[0]
    # A metadata extension {size, type at 8, next, metadata at 24} asks for the version that the handler was written
    # for, at 8 + 16 and 8 + 20 in the metadata. Any other extension comes with a call that has to be computed.
    extension = follow(builder, frame, _EXTENSIONS)
    with builder.if_then(builder.icmp_unsigned("!=", extension, ir.Constant(POINTER, None))):
        kind = builder.load(builder.gep(extension, [int64(8)], source_etype=BYTE), typ=INT32)
        with builder.if_then(builder.icmp_signed("==", kind, ir.Constant(INT32, _METADATA))):
            metadata = follow(builder, extension, 24)
            for offset, number in ((8 + 16, _MAJOR), (8 + 20, _MINOR)):
                place = builder.gep(metadata, [int64(offset)], source_etype=BYTE)
                builder.store(ir.Constant(INT32, number), place)
            builder.ret(ir.Constant(POINTER, None))
    return builder, frame


def buffers(builder: ir.IRBuilder, frame: ir.Value, group: int, count: int) -> list[tuple[ir.Value, ir.Value]]:
    """(data, dimensions) of the first `count` arguments (group `ARGUMENTS`) or results (`RESULTS`) of a call."""
    pointers = follow(builder, frame, group + 32)
    found = (follow(builder, pointers, 8 * i) for i in range(count))
    return [(follow(builder, buffer, 24), follow(builder, buffer, 40)) for buffer in found]


def _want_huge_pages(
    module: ir.Module, builder: ir.IRBuilder, count: ir.Value, pointers: ir.Value, itemsize: int
) -> None:
    """Asks for huge pages under the large results: fresh memory in small pages costs more to map than to fill, and
    threads wait for one another in the kernel meanwhile."""
    find("madvise")
    advise = ir.Function(module, ir.FunctionType(INT32, [INT64, INT64, INT32]), "madvise")
    with loop(builder, 0, count) as i:
        buffer = builder.load(builder.gep(pointers, [i], source_etype=INT64), typ=INT64)
        buffer = builder.inttoptr(buffer, POINTER)
        # The large results are those of three dimensions.
        rank, data = load_word(builder, buffer, 32), load_word(builder, buffer, 24)
        dims = builder.inttoptr(load_word(builder, buffer, 40), POINTER)
        with builder.if_then(builder.icmp_signed("==", rank, int64(3))):
            size: ir.Value = int64(itemsize)
            for place in range(3):
                size = builder.mul(size, load_word(builder, dims, 8 * place))
            start = builder.and_(builder.add(data, int64(_HUGE - 1)), int64(-_HUGE))
            length = builder.and_(builder.sub(builder.add(data, size), start), int64(-_HUGE))
            with builder.if_then(builder.icmp_signed(">", length, int64(0))):
                builder.call(advise, [start, length, ir.Constant(INT32, _MADV_HUGEPAGE)])


def _write_handler(module: ir.Module, name: str, work: ir.Function, threads: int, itemsize: int) -> None:
    """Writes the function that XLA calls: it fills in jobs, starts a thread for each but the first, and waits."""
    builder, frame = start_handler(module, name)
    null = ir.Constant(POINTER, None)

    def element(pointer: ir.Value, index: ir.Value) -> ir.Value:
        return builder.gep(pointer, [index], source_etype=INT64)

    jobs = room(builder, threads * JOB_WORDS)
    ids = room(builder, threads)
    placed: ir.Value = int64(JOB_BUFFERS)
    for group in (ARGUMENTS, RESULTS):
        count, pointers = load_word(builder, frame, group + 16), follow(builder, frame, group + 32)
        with loop(builder, 0, count) as i:
            buffer = builder.inttoptr(builder.load(element(pointers, i), typ=INT64), POINTER)
            builder.store(load_word(builder, buffer, 24), element(jobs, builder.add(placed, i)))
        placed = builder.add(placed, count)
    if sys.platform == "linux":
        count, pointers = load_word(builder, frame, RESULTS + 16), follow(builder, frame, RESULTS + 32)
        _want_huge_pages(module, builder, count, pointers, itemsize)
    arguments, pointers = load_word(builder, frame, ARGUMENTS + 16), follow(builder, frame, ARGUMENTS + 32)
    last = builder.load(element(pointers, builder.sub(arguments, int64(1))), typ=INT64)
    (_, shape), *_ = buffers(builder, frame, ARGUMENTS, 1)
    state_shape = follow(builder, builder.inttoptr(last, POINTER), 40)
    batch, time, channels = (
        load_word(builder, shape, 0),
        load_word(builder, shape, 8),
        load_word(builder, state_shape, 8),
    )
    for i, value in enumerate((int64(0), batch, time, channels)):
        builder.store(value, element(jobs, int64(2 + i)))
    builder.store(int64(0), element(jobs, int64(0)))
    builder.store(channels, element(jobs, int64(1)))

    # Each thread takes a share of the recordings, which are far apart in memory, or where there are too few of them, of
    # the channels. The calling thread takes the first share.
    large = builder.icmp_signed(">=", builder.mul(builder.mul(batch, time), channels), int64(_THREADED))
    parts = builder.select(large, int64(threads), int64(1))
    apart = builder.icmp_signed(">=", batch, parts)
    grain = builder.select(apart, int64(1), int64(_GRAIN))
    whole = builder.select(apart, batch, channels)
    grains = builder.sdiv(builder.add(whole, builder.sub(grain, int64(1))), grain)
    share = builder.sdiv(builder.add(grains, builder.sub(parts, int64(1))), parts)
    share = builder.mul(share, grain)
    place = builder.select(apart, int64(2), int64(0))
    pthread = ir.FunctionType(INT32, [POINTER] * 4)
    find("pthread_create")
    find("pthread_join")
    create = ir.Function(module, pthread, "pthread_create")
    join = ir.Function(module, ir.FunctionType(INT32, [INT64, POINTER]), "pthread_join")

    def least(a: ir.Value, b: ir.Value) -> ir.Value:
        return builder.select(builder.icmp_signed("<", a, b), a, b)

    with loop(builder, 1, parts) as i:
        job = element(jobs, builder.mul(i, int64(JOB_WORDS)))
        with loop(builder, 0, int64(JOB_WORDS)) as j:
            builder.store(builder.load(element(jobs, j), typ=INT64), element(job, j))
        start = builder.mul(i, share)
        builder.store(least(start, whole), element(job, place))
        builder.store(least(builder.add(start, share), whole), element(job, builder.add(place, int64(1))))
        failed = builder.call(create, [element(ids, i), null, work, job])
        # Where no thread can be started, this one does its job.
        with builder.if_then(builder.icmp_signed("!=", failed, ir.Constant(INT32, 0))):
            builder.call(work, [job])
            builder.store(int64(0), element(ids, i))
    builder.store(least(share, whole), element(jobs, builder.add(place, int64(1))))
    builder.call(work, [jobs])
    with loop(builder, 1, parts) as i:
        thread = builder.load(element(ids, i), typ=INT64)
        with builder.if_then(builder.icmp_signed("!=", thread, int64(0))):
            builder.call(join, [thread, null])
    builder.ret(null)
