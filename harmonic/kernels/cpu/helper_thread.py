"""A second thread for jobs of a few microseconds, for which starting a thread each time would cost too much.

`helper` starts a Python thread that waits in machine code for jobs and does the second part of each. A caller offers
its job, and does all of it alone if no helper takes it within about a microsecond. Once the job is taken, its two parts
meet at barriers; if the system suspends the helper's thread, the caller waits for it there. A process has one place
for offers: a caller that finds it occupied works alone.
"""

from __future__ import annotations

import contextlib
import ctypes
import platform
import threading
import time
from collections.abc import Callable, Iterator

from llvmlite import ir

from harmonic.kernels.cpu import ffi, llvm
from harmonic.kernels.cpu.llvm import INT32, INT64, POINTER, int64

RUN = ir.FunctionType(ir.VoidType(), [POINTER, INT64, INT64])  # (job, first part, end)
PARTS = 2
# Offsets of the shared words. Words that different threads write are 128 bytes apart: processors fetch cache lines in
# pairs.
_OWNER, _HELPERS, _CLAIM, _JOB, _CALLS, _ARRIVED = 0, 128, 256, 264, 384, 512
_FREE, _OFFERED, _TAKEN = 0, 1, 2
_PATIENCE = 64  # looks at one's offer before it is withdrawn: about a microsecond
_SPINS = 10_000  # looks before the core is given to other threads: some tenths of a millisecond
_NAP = 50  # microseconds
_memory = ctypes.create_string_buffer(_ARRIVED + 128 * (PARTS + 1))
_base = (ctypes.addressof(_memory) + 127) // 128 * 128


class Writer:
    """Writes, where `builder` is, how threads offer, take and await jobs."""

    def __init__(self, module: ir.Module, builder: ir.IRBuilder):
        self.module, self.builder = module, builder

    def _place(self, offset: int | ir.Value) -> ir.Value:
        offset = int64(offset) if isinstance(offset, int) else offset
        return self.builder.inttoptr(self.builder.add(int64(_base), offset), POINTER)

    def _get(self, where: ir.Value, ordering: str = "acquire") -> ir.Value:
        return self.builder.load_atomic(where, ordering, 8, typ=INT64)

    def _set(self, value: ir.Value | int, where: ir.Value) -> None:
        value = int64(value) if isinstance(value, int) else value
        # An exchange: llvmlite's atomic store does not take opaque pointers.
        self.builder.atomic_rmw("xchg", where, value, "release")

    def _swap(self, offset: int, old: int, new: int) -> ir.Value:
        """Sets the word to `new` if it is `old`; whether it was."""
        values = (int64(number) for number in (old, new))
        return self.builder.extract_value(self.builder.cmpxchg(self._place(offset), *values, "seq_cst", "acquire"), 1)

    def _is(self, value: ir.Value, number: int) -> ir.Value:
        return self.builder.icmp_signed("==", value, int64(number))

    def _call(self, name: str, kind: ir.FunctionType, *arguments: ir.Value) -> None:
        if not name.startswith("llvm."):
            llvm.find(name)
        function = self.module.globals.get(name) or ir.Function(self.module, kind, name)
        self.builder.call(function, arguments)

    def _pause(self) -> None:
        none, void = ir.FunctionType(ir.VoidType(), []), ir.FunctionType(ir.VoidType(), [INT32])
        if platform.machine() in ("x86_64", "AMD64"):
            self._call("llvm.x86.sse2.pause", none)
        elif platform.machine() in ("aarch64", "arm64"):
            self._call("llvm.aarch64.hint", void, ir.Constant(INT32, 1))

    @contextlib.contextmanager
    def _again(self) -> Iterator[tuple[ir.Value, ir.Block]]:
        """The body of an endless loop: (rounds so far, the block after the loop, to leave to)."""
        builder = self.builder
        before, body, after = builder.block, builder.append_basic_block(), builder.append_basic_block()
        builder.branch(body)
        builder.position_at_end(body)
        rounds = builder.phi(INT64)
        rounds.add_incoming(int64(0), before)
        yield rounds, after
        rounds.add_incoming(builder.add(rounds, int64(1)), builder.block)
        builder.branch(body)
        builder.position_at_end(after)

    def _leave(self, condition: ir.Value, to: ir.Block) -> None:
        on = self.builder.append_basic_block()
        self.builder.cbranch(condition, to, on)
        self.builder.position_at_end(on)

    def barrier(self, part: ir.Value) -> None:
        """Waits until the other part, 1 - `part`, has come to the same barrier."""
        builder = self.builder
        mine, other = (
            self._place(builder.add(builder.mul(p, int64(128)), int64(_ARRIVED)))
            for p in (part, builder.sub(int64(1), part))
        )
        arrived = builder.add(self._get(mine, "monotonic"), int64(1))
        self._set(arrived, mine)
        with self._again() as (rounds, after):
            self._leave(builder.icmp_signed(">=", self._get(other), arrived), after)
            self._pause()
            with builder.if_then(builder.icmp_signed(">", rounds, int64(_SPINS))):
                self._call("sched_yield", ir.FunctionType(INT32, []))

    def share(self, job: ir.Value, run: ir.Function) -> None:
        """Calls run(job, 0, 1) here and run(job, 1, 2) in a helper, or run(job, 0, 2) here."""
        builder = self.builder
        whole = [job, int64(0), int64(PARTS)]
        helped = builder.icmp_signed(">", self._get(self._place(_HELPERS), "monotonic"), int64(0))
        with builder.if_else(helped) as (with_helper, alone):
            with with_helper, builder.if_else(self._swap(_OWNER, 0, 1)) as (owner, elsewhere):
                with owner:
                    calls = self._place(_CALLS)
                    self._set(builder.add(self._get(calls, "monotonic"), int64(1)), calls)
                    self._set(builder.ptrtoint(job, INT64), self._place(_JOB))
                    self._set(_OFFERED, self._place(_CLAIM))
                    with self._again() as (rounds, after):
                        taken = self._is(self._get(self._place(_CLAIM)), _TAKEN)
                        late = builder.icmp_signed(">=", rounds, int64(_PATIENCE))
                        self._leave(builder.or_(taken, late), after)
                        self._pause()
                    with builder.if_else(self._swap(_CLAIM, _OFFERED, _FREE)) as (withdrawn, together):
                        with withdrawn:
                            builder.call(run, whole)
                        with together:
                            builder.call(run, [*whole[:2], int64(1)])
                    self._set(0, self._place(_OWNER))
                with elsewhere:
                    builder.call(run, whole)
            with alone:
                builder.call(run, whole)

    def serve(self, words: ir.Value) -> None:
        """Takes jobs until the first of the two words is set; sets the second one when it is ready.

        A job's first word is the address of its function.
        """
        builder = self.builder
        helpers, one = self._place(_HELPERS), int64(1)
        builder.atomic_rmw("add", helpers, one, "seq_cst")
        self._set(1, builder.gep(words, [one], source_etype=INT64))
        idle, known = (llvm.room(builder, 1) for _ in range(2))
        for place in (idle, known):
            builder.store(int64(0), place)
        with self._again() as (_, after):
            self._leave(builder.icmp_signed("!=", self._get(words), int64(0)), after)
            offered = self._is(self._get(self._place(_CLAIM)), _OFFERED)
            with builder.if_else(offered) as (work, wait):
                with work, builder.if_then(self._swap(_CLAIM, _OFFERED, _TAKEN)):
                    job = builder.inttoptr(self._get(self._place(_JOB)), POINTER)
                    builder.call(_function(builder, job), [job, one, int64(PARTS)])
                    builder.store(int64(0), idle)
                with wait:
                    self._pause()
                    rounds = builder.add(builder.load(idle, typ=INT64), one)
                    builder.store(rounds, idle)
                    with builder.if_then(builder.icmp_signed(">", rounds, int64(_SPINS))):
                        # Idle: sleep between looks, until a caller has made an offer meanwhile.
                        nap = ir.Constant(INT32, _NAP)
                        self._call("usleep", ir.FunctionType(INT32, [INT32]), nap)
                        calls = self._get(self._place(_CALLS))
                        with builder.if_then(builder.icmp_signed("!=", calls, builder.load(known, typ=INT64))):
                            builder.store(int64(0), idle)
                        builder.store(calls, known)
        builder.atomic_rmw("sub", helpers, one, "seq_cst")


def _function(builder: ir.IRBuilder, job: ir.Value) -> ir.Value:
    address = llvm.load_word(builder, job, 0)
    return builder.inttoptr(address, ir.PointerType(RUN))


@ffi.once
def _serve() -> Callable[[int], None]:
    module = ir.Module("harmonic_serve")
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [POINTER]), "harmonic_serve")
    writer = Writer(module, ir.IRBuilder(function.append_basic_block()))
    writer.serve(function.args[0])
    writer.builder.ret_void()
    return ctypes.CFUNCTYPE(None, ctypes.c_void_p)(llvm.compile_module(module, "harmonic_serve"))


def calls() -> int:
    """The number of jobs that this process has offered to helpers."""
    return ctypes.c_int64.from_address(_base + _CALLS).value


@contextlib.contextmanager
def helper() -> Iterator[None]:
    """Runs a helper thread as long as the context lasts. It keeps a core busy while there are jobs."""
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
