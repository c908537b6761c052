"""Two threads that share one stream's work, since at a few microseconds a piece starting a thread costs too much.

A thread of Python's, `helper`, waits in machine code for jobs and takes the second part of each. A caller offers its
job, and does all of it alone if nobody takes it at once. Once it is taken, parts meet at barriers, where the caller
waits for a helper that the system puts aside. There is one place for offers in a process; who finds it taken works
alone.
"""

from __future__ import annotations

import contextlib
import ctypes
import platform
import threading
import time
from collections.abc import Callable, Iterator

from llvmlite import ir

from harmonic.kernels.cpu import llvm

_INT32, _INT64, _POINTER = ir.IntType(32), ir.IntType(64), ir.PointerType()
RUN = ir.FunctionType(ir.VoidType(), [_POINTER, _INT64, _INT64])  # (job, first part, end)
PARTS = 2
# Words that different threads write lie 128 bytes apart: processors fetch cache lines in pairs.
_OWNER, _HELPERS, _CLAIM, _JOB, _CALLS, _ARRIVED = 0, 128, 256, 264, 384, 512
_FREE, _OFFERED, _TAKEN = 0, 1, 2
_PATIENCE = 64  # looks at an offer, about a microsecond
_SPINS = 10_000  # looks before a core is left to others, some tenths of a millisecond
_NAP = 50  # microseconds
_memory = ctypes.create_string_buffer(_ARRIVED + 128 * (PARTS + 1))
_base = (ctypes.addressof(_memory) + 127) // 128 * 128


class Writer:
    """Writes what threads say to one another, where `builder` stands."""

    def __init__(self, module: ir.Module, builder: ir.IRBuilder):
        self.module, self.builder = module, builder

    def _place(self, offset: int | ir.Value) -> ir.Value:
        offset = ir.Constant(_INT64, offset) if isinstance(offset, int) else offset
        return self.builder.inttoptr(self.builder.add(ir.Constant(_INT64, _base), offset), _POINTER)

    def _get(self, where: ir.Value, ordering: str = "acquire") -> ir.Value:
        return self.builder.load_atomic(where, ordering, 8, typ=_INT64)

    def _set(self, value: ir.Value | int, where: ir.Value) -> None:
        value = ir.Constant(_INT64, value) if isinstance(value, int) else value
        # An exchange, since llvmlite's atomic store wants a pointer that knows its type.
        self.builder.atomic_rmw("xchg", where, value, "release")

    def _swap(self, offset: int, old: int, new: int) -> ir.Value:
        """Whether the word was `old`; it is `new` then."""
        values = (ir.Constant(_INT64, number) for number in (old, new))
        return self.builder.extract_value(self.builder.cmpxchg(self._place(offset), *values, "seq_cst", "acquire"), 1)

    def _is(self, value: ir.Value, number: int) -> ir.Value:
        return self.builder.icmp_signed("==", value, ir.Constant(_INT64, number))

    def _call(self, name: str, kind: ir.FunctionType, *arguments: ir.Value) -> None:
        if not name.startswith("llvm."):
            llvm.find(name)
        function = self.module.globals.get(name) or ir.Function(self.module, kind, name)
        self.builder.call(function, arguments)

    def _pause(self) -> None:
        none, void = ir.FunctionType(ir.VoidType(), []), ir.FunctionType(ir.VoidType(), [_INT32])
        if platform.machine() in ("x86_64", "AMD64"):
            self._call("llvm.x86.sse2.pause", none)
        elif platform.machine() in ("aarch64", "arm64"):
            self._call("llvm.aarch64.hint", void, ir.Constant(_INT32, 1))

    @contextlib.contextmanager
    def _again(self) -> Iterator[tuple[ir.Value, ir.Block]]:
        """A loop without end; (rounds so far, the block that leaves it)."""
        builder = self.builder
        before, body, after = builder.block, builder.append_basic_block(), builder.append_basic_block()
        builder.branch(body)
        builder.position_at_end(body)
        rounds = builder.phi(_INT64)
        rounds.add_incoming(ir.Constant(_INT64, 0), before)
        yield rounds, after
        rounds.add_incoming(builder.add(rounds, ir.Constant(_INT64, 1)), builder.block)
        builder.branch(body)
        builder.position_at_end(after)

    def _leave(self, condition: ir.Value, to: ir.Block) -> None:
        on = self.builder.append_basic_block()
        self.builder.cbranch(condition, to, on)
        self.builder.position_at_end(on)

    def barrier(self, part: ir.Value) -> None:
        """Waits until the other part, 1 - `part`, has come as far."""
        builder = self.builder
        mine, other = (
            self._place(builder.add(builder.mul(p, ir.Constant(_INT64, 128)), ir.Constant(_INT64, _ARRIVED)))
            for p in (part, builder.sub(ir.Constant(_INT64, 1), part))
        )
        arrived = builder.add(self._get(mine, "monotonic"), ir.Constant(_INT64, 1))
        self._set(arrived, mine)
        with self._again() as (rounds, after):
            self._leave(builder.icmp_signed(">=", self._get(other), arrived), after)
            self._pause()
            with builder.if_then(builder.icmp_signed(">", rounds, ir.Constant(_INT64, _SPINS))):
                self._call("sched_yield", ir.FunctionType(_INT32, []))

    def share(self, job: ir.Value, run: ir.Function) -> None:
        """Calls run(job, 0, 1) here and run(job, 1, 2) in a helper, or run(job, 0, 2) here."""
        builder = self.builder
        whole = [job, ir.Constant(_INT64, 0), ir.Constant(_INT64, PARTS)]
        helped = builder.icmp_signed(">", self._get(self._place(_HELPERS), "monotonic"), ir.Constant(_INT64, 0))
        with builder.if_else(helped) as (with_helper, alone):
            with with_helper, builder.if_else(self._swap(_OWNER, 0, 1)) as (owner, elsewhere):
                with owner:
                    calls = self._place(_CALLS)
                    self._set(builder.add(self._get(calls, "monotonic"), ir.Constant(_INT64, 1)), calls)
                    self._set(builder.ptrtoint(job, _INT64), self._place(_JOB))
                    self._set(_OFFERED, self._place(_CLAIM))
                    with self._again() as (rounds, after):
                        taken = self._is(self._get(self._place(_CLAIM)), _TAKEN)
                        late = builder.icmp_signed(">=", rounds, ir.Constant(_INT64, _PATIENCE))
                        self._leave(builder.or_(taken, late), after)
                        self._pause()
                    with builder.if_else(self._swap(_CLAIM, _OFFERED, _FREE)) as (withdrawn, together):
                        with withdrawn:
                            builder.call(run, whole)
                        with together:
                            builder.call(run, [*whole[:2], ir.Constant(_INT64, 1)])
                    self._set(0, self._place(_OWNER))
                with elsewhere:
                    builder.call(run, whole)
            with alone:
                builder.call(run, whole)

    def serve(self, words: ir.Value) -> None:
        """Sets the second of two words, and takes jobs until the first is set. A job's first word is its function."""
        builder = self.builder
        helpers, one = self._place(_HELPERS), ir.Constant(_INT64, 1)
        builder.atomic_rmw("add", helpers, one, "seq_cst")
        self._set(1, builder.gep(words, [one], source_etype=_INT64))
        idle, known = (llvm.room(builder, 1) for _ in range(2))
        for place in (idle, known):
            builder.store(ir.Constant(_INT64, 0), place)
        with self._again() as (_, after):
            self._leave(builder.icmp_signed("!=", self._get(words), ir.Constant(_INT64, 0)), after)
            offered = self._is(self._get(self._place(_CLAIM)), _OFFERED)
            with builder.if_else(offered) as (work, wait):
                with work, builder.if_then(self._swap(_CLAIM, _OFFERED, _TAKEN)):
                    job = builder.inttoptr(self._get(self._place(_JOB)), _POINTER)
                    builder.call(_function(builder, job), [job, one, ir.Constant(_INT64, PARTS)])
                    builder.store(ir.Constant(_INT64, 0), idle)
                with wait:
                    self._pause()
                    rounds = builder.add(builder.load(idle, typ=_INT64), one)
                    builder.store(rounds, idle)
                    with builder.if_then(builder.icmp_signed(">", rounds, ir.Constant(_INT64, _SPINS))):
                        # It is wide awake again as soon as somebody has called.
                        nap = ir.Constant(_INT32, _NAP)
                        self._call("usleep", ir.FunctionType(_INT32, [_INT32]), nap)
                        calls = self._get(self._place(_CALLS))
                        with builder.if_then(builder.icmp_signed("!=", calls, builder.load(known, typ=_INT64))):
                            builder.store(ir.Constant(_INT64, 0), idle)
                        builder.store(calls, known)
        builder.atomic_rmw("sub", helpers, one, "seq_cst")


def _function(builder: ir.IRBuilder, job: ir.Value) -> ir.Value:
    address = llvm.load_word(builder, job, 0)
    return builder.inttoptr(address, ir.PointerType(RUN))


@llvm.once
def _serve() -> Callable[[int], None]:
    module = ir.Module("harmonic_serve")
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [_POINTER]), "harmonic_serve")
    writer = Writer(module, ir.IRBuilder(function.append_basic_block()))
    writer.serve(function.args[0])
    writer.builder.ret_void()
    return ctypes.CFUNCTYPE(None, ctypes.c_void_p)(llvm.compile_module(module, "harmonic_serve"))


def calls() -> int:
    """How many jobs this process has offered."""
    return ctypes.c_int64.from_address(_base + _CALLS).value


@contextlib.contextmanager
def helper() -> Iterator[None]:
    """A thread that helps, as long as the context lasts. It keeps a core busy while there is work."""
    serve, words = _serve(), (ctypes.c_int64 * 2)()
    thread = threading.Thread(target=serve, args=(ctypes.addressof(words),), name="harmonic-helper", daemon=True)
    thread.start()
    try:
        while not words[1]:
            time.sleep(0)
        yield
    finally:
        words[0] = 1
        thread.join()
