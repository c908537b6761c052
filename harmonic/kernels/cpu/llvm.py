"""Arithmetic in Python that writes machine code: values whose operators become LLVM instructions.

`Floats` writes instructions on vectors of floats and is an `arithmetic.Math`, so that the shared formulas run over its
`Value`s. `Code` adds what an elementwise kernel needs: loops over recordings, time and channels, loads and stores.
`ffi` compiles what was written and registers it with XLA.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from llvmlite import binding, ir

from harmonic.kernels.arithmetic import sincos_polynomial

BYTE, INT32, INT64, POINTER = ir.IntType(8), ir.IntType(32), ir.IntType(64), ir.PointerType()
_FLAGS = ("contract", "nsz")  # a product and a sum may become one instruction; NaN and infinity keep their meaning
JOB_WORDS = 32  # int64s of a job: channels from, to; recordings from, to; time, channels; the buffers' addresses
JOB_BUFFERS = 6  # where in a job the buffers' addresses begin


class Value:
    """A float, or a vector of `Floats.lanes` floats, of the kernel's type."""

    def __init__(self, code: Floats, value: ir.Value):
        self.code, self.value = code, value

    def _with(self, operation: Callable[..., ir.Value], left: Value | float, right: Value | float) -> Value:
        return Value(self.code, operation(self._operand(left), self._operand(right), flags=_FLAGS))

    def _operand(self, v: Value | float) -> ir.Value:
        return v.value if isinstance(v, Value) else self.code.constant(v).value

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
        """A condition for `Floats.where`; false where either is NaN."""
        return self.code.builder.fcmp_ordered("<", self.value, self._operand(other))

    def __gt__(self, other: Value | float) -> ir.Value:
        return self.code.builder.fcmp_ordered(">", self.value, self._operand(other))


class Integers:
    """int32s beside a `Value`, one in each lane."""

    def __init__(self, code: Floats, value: ir.Value):
        self.code, self.value = code, value

    def constant(self, number: int) -> ir.Value:
        """The number, in every lane."""
        lanes = self.code.lanes
        return ir.Constant(self.value.type, number if lanes == 1 else [number] * lanes)

    def __add__(self, other: int) -> Integers:
        return Integers(self.code, self.code.builder.add(self.value, self.constant(other)))


class Floats:
    """Writes instructions on floats of one type where `builder` is; an `arithmetic.Math`.

    float32 takes polynomials (Cephes), float64 the C library's functions, one number at a time.

    Attributes:
      lanes: floats of a `Value`.
      kind: the floats' type in LLVM.
    """

    def __init__(self, module: ir.Module, builder: ir.IRBuilder, dtype: np.dtype, lanes: int):
        self.builder, self.dtype, self.lanes = builder, dtype, lanes
        self.kind = ir.FloatType() if dtype == np.float32 else ir.DoubleType()
        self.module = module

    @property
    def type(self) -> ir.Type:
        """A `Value`'s type in LLVM."""
        return self.kind if self.lanes == 1 else ir.VectorType(self.kind, self.lanes)

    def constant(self, number: float) -> Value:
        """The number, in every lane."""
        number = float(self.dtype.type(number))
        return Value(self, ir.Constant(self.type, number if self.lanes == 1 else [number] * self.lanes))

    @contextlib.contextmanager
    def loop(self, start: ir.Value | int, stop: ir.Value, step: int = 1) -> Iterator[ir.Value]:
        """The body of a loop over int64s from `start` to before `stop`."""
        with loop(self.builder, start, stop, step) as index:
            yield index

    def intrinsic(self, name: str, *arguments: Value) -> Value:
        """Calls an LLVM intrinsic, such as `llvm.sqrt`, on all lanes."""
        lanes = "" if self.lanes == 1 else f"v{self.lanes}"
        return self._call(f"{name}.{lanes}f{8 * self.dtype.itemsize}", self.type, *arguments)

    def _c_function(self, name: str, x: Value) -> Value:
        find(name)
        return self._call(name, self.kind, x)

    def _call(self, name: str, kind: ir.Type, *arguments: Value) -> Value:
        function = self.module.globals.get(name)
        if function is None:
            function = ir.Function(self.module, ir.FunctionType(kind, [kind] * len(arguments)), name)
        return Value(self, self.builder.call(function, [v.value for v in arguments]))

    def where(self, condition: ir.Value, yes: Value, no: Value | float) -> Value:
        """Lane by lane."""
        no = no if isinstance(no, Value) else self.constant(no)
        return Value(self, self.builder.select(condition, yes.value, no.value))

    def sqrt(self, v: Value) -> Value:
        return self.intrinsic("llvm.sqrt", v)

    def floor(self, v: Value) -> Value:
        return self.intrinsic("llvm.floor", v)

    def expm1(self, y: Value) -> Value:
        if self.dtype == np.float64:
            return self._c_function("expm1", y)
        power, p = self._exponential(y)
        return power * p + (power - 1.0)

    def sigmoid(self, v: Value) -> Value:
        y = -self.intrinsic("llvm.fabs", v)  # exp(-|v|) never overflows
        if self.dtype == np.float64:
            e = self._c_function("exp", y)
        else:
            power, p = self._exponential(y)
            e = power * p + power  # and not expm1(y) + 1, which has few digits left where e is small
        return self.where(v < 0.0, e, 1.0) / (1.0 + e)

    def sincos(self, angle: Value) -> tuple[Value, Value]:
        if self.dtype == np.float64:
            return self._c_function("sin", angle), self._c_function("cos", angle)
        return sincos_polynomial(self, angle)

    def _exponential(self, y: Value) -> tuple[Value, Value]:
        """(2^n, p) of exp(y) = 2^n (1 + p) for y <= 0 in float32, by Cephes' polynomial."""
        y = self.where(y < -87.0, self.constant(-87.0), y)
        n = self.floor(y * 1.4426950408889634 + 0.5)
        r = y - n * 0.693359375 - n * -2.12194440e-4
        p = r * 1.9875691500e-4 + 1.3981999507e-3
        for coefficient in (8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
            p = p * r + coefficient
        # 2^n is the float whose exponent's bits are n + 127.
        exponents = self.integers(n) + 127
        bits = self.builder.shl(exponents.value, exponents.constant(23))
        return Value(self, self.builder.bitcast(bits, self.type)), p * r * r + r

    def integers(self, v: Value) -> Integers:
        lanes = INT32 if self.lanes == 1 else ir.VectorType(INT32, self.lanes)
        return Integers(self, self.builder.fptosi(v.value, lanes))

    def has_bit(self, integers: Integers, bit: int) -> ir.Value:
        masked = self.builder.and_(integers.value, integers.constant(bit))
        return self.builder.icmp_signed("!=", masked, integers.constant(0))


class Code(Floats):
    """A function being written, which does one job: some channels of some recordings, at all times.

    Attributes:
      time, channels: the sizes of the whole arrays, int64.
    """

    def __init__(self, module: ir.Module, name: str, dtype: np.dtype):
        self.function = ir.Function(module, ir.FunctionType(POINTER, [POINTER]), name)
        builder = ir.IRBuilder(self.function.append_basic_block())
        super().__init__(module, builder, dtype, 16 if dtype == np.float32 else 1)
        self._widest = self.lanes
        job = self.function.args[0]
        self._job = [load_word(builder, job, 8 * i) for i in range(JOB_WORDS)]
        self._from, self._to, self._first, self._end, self.time, self.channels = self._job[:JOB_BUFFERS]

    def finish(self) -> None:
        """Ends the function."""
        self.builder.ret(ir.Constant(POINTER, None))

    def each_recording(self) -> contextlib.AbstractContextManager[ir.Value]:
        """The body of a loop over the job's recordings."""
        return self.loop(self._first, self._end)

    def each_channel(self, body: Callable[[ir.Value], None]) -> None:
        """`body(c)` for the job's channels, as many lanes at a time as fit, and the rest one by one."""
        count = self.builder.sub(self._to, self._from)
        whole = self.builder.add(self._from, self.builder.and_(count, int64(-self._widest)))
        with self.loop(self._from, whole, self._widest) as channel:
            body(channel)
        if self._widest > 1:
            self.lanes = 1
            with self.loop(whole, self._to) as channel:
                body(channel)
            self.lanes = self._widest

    def row(self, recording: ir.Value, time: ir.Value) -> ir.Value:
        """The number of a row of a [batch, time, ..] buffer."""
        return self.builder.add(self.builder.mul(recording, self.time), time)

    def load(self, buffer: int, row: ir.Value | int, column: ir.Value, parts: int = 1, part: int = 0) -> Value:
        """Reads row `row` of a buffer whose rows are `parts` x channels wide, at channel `column` of part `part`."""
        place = self._place(buffer, row, column, parts, part)
        return Value(self, self.builder.load(place, align=self.dtype.itemsize, typ=self.type))

    def store(
        self, value: Value, buffer: int, row: ir.Value | int, column: ir.Value, parts: int = 1, part: int = 0
    ) -> None:
        """Stores `value`; other arguments as for `load`."""
        place = self._place(buffer, row, column, parts, part)
        self.builder.store(value.value, place, align=self.dtype.itemsize)

    def _place(self, buffer: int, row: ir.Value | int, column: ir.Value, parts: int, part: int) -> ir.Value:
        builder = self.builder
        row = int64(row) if isinstance(row, int) else row
        width = builder.mul(self.channels, int64(parts))
        skipped = builder.mul(self.channels, int64(part))
        index = builder.add(builder.mul(row, width), builder.add(skipped, column))
        base = builder.inttoptr(self._job[JOB_BUFFERS + buffer], POINTER)
        return builder.gep(base, [index], source_etype=self.kind)


def int64(number: int) -> ir.Constant:
    """A count or an index."""
    return ir.Constant(INT64, number)


def load_word(builder: ir.IRBuilder, pointer: ir.Value, offset: int) -> ir.Value:
    """The int64 at `offset` bytes from the pointer."""
    return builder.load(builder.gep(pointer, [int64(offset)], source_etype=BYTE), typ=INT64)


def follow(builder: ir.IRBuilder, pointer: ir.Value, offset: int) -> ir.Value:
    """The pointer at `offset` bytes from the pointer."""
    return builder.inttoptr(load_word(builder, pointer, offset), POINTER)


def room(builder: ir.IRBuilder, words: int) -> ir.Value:
    """A pointer to int64s on the stack."""
    # Cast to an integer and back: llvmlite's pointers from alloca have a typed pointee, all others here are opaque.
    address = builder.ptrtoint(builder.alloca(ir.ArrayType(INT64, words)), INT64)
    return builder.inttoptr(address, POINTER)


@contextlib.contextmanager
def loop(builder: ir.IRBuilder, start: ir.Value | int, stop: ir.Value, step: int = 1) -> Iterator[ir.Value]:
    """The body of a loop over int64s from `start` to before `stop`."""
    start = int64(start) if isinstance(start, int) else start
    before, head = builder.block, builder.append_basic_block()
    body, after = builder.append_basic_block(), builder.append_basic_block()
    builder.branch(head)
    builder.position_at_end(head)
    index = builder.phi(INT64)
    index.add_incoming(start, before)
    builder.cbranch(builder.icmp_signed("<", index, stop), body, after)
    builder.position_at_end(body)
    yield index
    index.add_incoming(builder.add(index, int64(step)), builder.block)
    builder.branch(head)
    builder.position_at_end(after)


_engines: list[Any] = []  # keeps MCJIT engines alive: XLA holds raw pointers into their code


def compile_module(module: ir.Module, name: str) -> int:
    """The address of the module's function `name`, valid for the life of the process."""
    parsed, machine = _optimised(module)
    engine = binding.create_mcjit_compiler(parsed, machine)
    engine.finalize_object()
    _engines.append(engine)
    return engine.get_function_address(name)


def assembly(module: ir.Module) -> str:
    """What `compile_module` makes of the module, to read."""
    parsed, machine = _optimised(module)
    return machine.emit_assembly(parsed)


def _optimised(module: ir.Module) -> tuple[binding.ModuleRef, binding.TargetMachine]:
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    features = binding.get_host_cpu_features().flatten()
    target = binding.Target.from_default_triple()
    machine = target.create_target_machine(cpu=binding.get_host_cpu_name(), features=features, opt=3, jit=True)
    parsed = binding.parse_assembly(str(module))
    parsed.verify()
    passes = binding.create_pass_builder(machine, binding.create_pipeline_tuning_options(speed_level=2))
    passes.getModulePassManager().run(parsed, passes)
    return parsed, machine


def find(name: str) -> None:
    """Lets compiled code call a C function of this process by name."""
    if not binding.address_of_symbol(name):
        binding.add_symbol(name, ctypes.cast(getattr(ctypes.CDLL(None), name), ctypes.c_void_p).value)
