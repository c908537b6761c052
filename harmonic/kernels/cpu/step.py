"""A stack of residual blocks for one sample of a few streams, as machine code for CPUs: generation's inner loop.

It is the implementation of `kernels.block_step` that is called `native`. Weights are read once a sample, in the order
in which they are stored; everything else fits the nearest cache. Each block is cut into two parts, which two threads
can run side by side (`helper_thread`). A part has half of the channels and of the features: it multiplies by those
columns and then by those rows, and both parts add up the two sums. One thread alone makes the same two sums, and no
sum runs over rows: a stream's bits depend neither on the threads nor on the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from llvmlite import ir

from harmonic.kernels.arithmetic import Gates, Pair, add, gelu_share, multiply
from harmonic.kernels.cpu import ffi, helper_thread, llvm
from harmonic.kernels.cpu.llvm import INT32, INT64, POINTER, Floats, Value, int64
from harmonic.kernels.dense import EPSILON
from harmonic.kernels.plain_step import BlockWeights

_LANES = 16
_ACCUMULATORS = 20  # of 32 registers
_ROWS = (4, 2, 1)  # of a batch at a time
_PARTS = helper_thread.PARTS


def fits(width: int, channels: int, dtype: Any) -> bool:
    """Whether `run` takes blocks of these sizes and this type."""
    halves = _LANES * _PARTS
    return dtype == jnp.float32 and width % halves == 0 and channels % halves == 0


def pack(blocks: BlockWeights) -> jax.Array:
    """Weights along a leading axis, as [blocks, parts, floats] in the order in which `run` reads them."""

    def part(weights: BlockWeights, number: int) -> jax.Array:
        width, channels = weights.last.kernel.shape[0], weights.theta.shape[0]
        own = jnp.arange(channels // _PARTS) + number * (channels // _PARTS)
        feature = jnp.arange(width // _PARTS) + number * (width // _PARTS)
        inner = jnp.arange(width) + number * width
        entry = jnp.concatenate([own + channels * i for i in range(4)] + [4 * channels + feature])
        mlp = jnp.concatenate([inner, 2 * width + inner])
        pieces = (
            *(weights.entry.kernel[:, entry], weights.entry.bias[entry], weights.decay[own], weights.theta[own]),
            *(weights.read_re.kernel[own], weights.read_im[own], weights.read_re.bias[feature]),
            *(weights.last.kernel[feature], weights.last.bias),
            *(weights.mlp.kernel[:, mlp], weights.mlp.bias[mlp]),
            *(weights.mlp_last.kernel[inner], weights.mlp_last.bias),
        )
        return jnp.concatenate([piece.ravel() for piece in pieces])

    return jax.vmap(lambda weights: jnp.stack([part(weights, i) for i in range(_PARTS)]))(blocks)


def unstack(h: Pair) -> Pair:
    """States as `run` takes them: as they are."""
    return h


stack = unstack
helper = helper_thread.helper


def run(packed: jax.Array, x: jax.Array, h: Pair) -> tuple[jax.Array, Pair]:
    """`plain_step.run`: the blocks of a stack for one sample, one after the other.

    Args:
      packed: the result of `pack`.
      x: [batch, width].
      h: complex [blocks, batch, channels].

    Returns:
      (x, h) after this sample.

    Raises:
      ValueError: shapes or types that do not fit. Machine code would read past the arrays.
    """
    batch, width = x.shape
    blocks, _, channels = h[0].shape
    shapes = {v.shape for v in h} == {(blocks, batch, channels)} and packed.shape == (
        blocks,
        _PARTS,
        sum(_weights(width, channels).values()),
    )
    if not shapes or any(v.dtype != jnp.float32 for v in (packed, x, *h)):
        raise ValueError(f"x {x.dtype}{x.shape}, h {h[0].shape} and packed {packed.dtype}{packed.shape} do not fit")
    scratch = jax.ShapeDtypeStruct((_PARTS, batch, sum(_sizes(width, channels).values())), x.dtype)
    results = [jax.ShapeDtypeStruct(v.shape, v.dtype) for v in (x, *h)] + [scratch]
    y, re, im, _ = jax.ffi.ffi_call(_register(width, channels), results)(x, *h, packed)
    return y, (re, im)


def _weights(width: int, channels: int) -> dict[str, int]:
    """Floats of a part's weights, in the order in which they are read."""
    half, features = channels // _PARTS, width // _PARTS
    entry = 4 * half + features
    return {
        "entry": width * entry,
        "entry_bias": entry,
        "decay": half,
        "theta": half,
        "read": 2 * half * width,
        "read_bias": features,
        "last": features * width,
        "last_bias": width,
        "mlp": width * 2 * width,
        "mlp_bias": 2 * width,
        "out": width * width,
        "out_bias": width,
    }


def _sizes(width: int, channels: int) -> dict[str, int]:
    """Floats that a part keeps for each row."""
    half = channels // _PARTS
    return {
        "x": width,
        "normal": width,
        "entry": 4 * half + width // _PARTS,
        "state": 2 * half,
        "gated": width // _PARTS,
        "mlp": 2 * width,
        "inner": width,
        # These sums are read by both parts.
        "read": width,
        "last": width,
        "out": width,
    }


def _before(sizes: dict[str, int], key: str) -> tuple[int, int]:
    """(the sum of the sizes before `key`, the sum of all sizes)."""
    keys = list(sizes)
    return sum(sizes[k] for k in keys[: keys.index(key)]), sum(sizes.values())


@ffi.once
def _register(width: int, channels: int) -> str:
    name = f"{__name__}.{width}.{channels}"
    module = ir.Module(name)
    function = ir.Function(module, helper_thread.RUN, f"{name}.job")
    _Job(module, function, width, channels).write()
    builder, frame = ffi.start_handler(module, name)
    arguments = ffi.buffers(builder, frame, ffi.ARGUMENTS, 4)
    results = ffi.buffers(builder, frame, ffi.RESULTS, 4)
    (_, x_shape), (_, h_shape) = arguments[:2]
    words = [builder.ptrtoint(v, INT64) for v in (function, *(data for data, _ in (*arguments, *results)))]
    words += [llvm.load_word(builder, x_shape, 0), llvm.load_word(builder, h_shape, 0)]
    job = llvm.room(builder, len(words))
    for i, word in enumerate(words):
        builder.store(word, builder.gep(job, [int64(i)], source_etype=INT64))
    helper_thread.Writer(module, builder).share(job, function)
    builder.ret(ir.Constant(POINTER, None))
    ffi.publish(module, name)
    return name


class _Job(Floats):
    """Writes the function run(job, first part, end), which does the parts from `first part` to before `end`."""

    def __init__(self, module: ir.Module, function: ir.Function, width: int, channels: int):
        super().__init__(module, ir.IRBuilder(function.append_basic_block()), np.dtype(np.float32), _LANES)
        self.width, self.channels, self.half = width, channels, channels // _PARTS
        job, self.first, self.end = function.args
        pointers = [llvm.follow(self.builder, job, 8 * i) for i in range(1, 9)]
        self.x, self.re, self.im, self.weights, self.y, self.new_re, self.new_im, self.scratch = pointers
        self.batch, self.blocks = (llvm.load_word(self.builder, job, 8 * i) for i in (9, 10))
        self.team = helper_thread.Writer(module, self.builder)

    def write(self) -> None:
        """The whole function."""
        builder = self.builder

        def enter(part: ir.Value) -> None:
            self._rows(lambda row: self._copy(self.x, self._own("x", part), row))

        self._parts(enter)
        with self.loop(0, self.blocks) as block:

            def temporal(part: ir.Value) -> None:
                with builder.if_then(builder.icmp_signed(">", block, int64(0))):
                    self._add("out", part, builder.sub(block, int64(1)))
                self._recur(part, block)

            self._parts(temporal)
            self._meet()
            self._parts(lambda part: self._gate(part, block))
            self._meet()
            self._parts(lambda part: self._mlp(part, block))
            self._meet()
        # After the last barrier only part 0 may write: the caller frees the scratch as soon as part 0 returns.
        with builder.if_then(builder.icmp_signed("==", self.first, int64(0))):
            first = int64(0)
            self._add("out", first, builder.sub(self.blocks, int64(1)))
            self._rows(lambda row: self._copy(self._own("x", first), self.y, row))
        builder.ret_void()

    def _parts(self, body: Callable[[ir.Value], None]) -> None:
        with self.loop(self.first, self.end) as part:
            body(part)

    def _meet(self) -> None:
        builder = self.builder
        shared = builder.icmp_signed("==", builder.sub(self.end, self.first), int64(1))
        with builder.if_then(shared):
            self.team.barrier(self.first)

    def _rows(self, body: Callable[[ir.Value], None]) -> None:
        with self.loop(0, self.batch) as row:
            body(row)

    def _recur(self, part: ir.Value, block: ir.Value) -> None:
        half, builder = self.half, self.builder
        self._normalise(part)
        self._product(part, block, "normal", "entry", "entry", bias="entry_bias")
        decay, theta = self._parameters(part, block, "decay"), self._parameters(part, block, "theta")
        entry, state = self._own("entry", part), self._own("state", part)

        def step(row: ir.Value) -> None:
            u, s = self._row(entry, row, "entry"), self._row(state, row, "state")
            place = builder.add(builder.mul(block, self.batch), row)
            place = builder.add(builder.mul(place, int64(self.channels)), builder.mul(part, int64(half)))
            for c in range(0, half, _LANES):
                z_re, z_im, p_i, p_r = (self._load(u, c + i * half) for i in range(4))
                gates = Gates.compute(self, (z_re, z_im), p_i, p_r, self._load(decay, c), self._load(theta, c))
                at = builder.add(place, int64(c))
                h = self._load(self.re, at), self._load(self.im, at)
                new = add(multiply(gates.a, h), gates.x)
                for i, (value, target) in enumerate(zip(new, (self.new_re, self.new_im), strict=True)):
                    self._store(value, target, at)
                    self._store(value, s, c + i * half)

        self._rows(step)
        self._product(part, block, "state", "read", "read")

    def _gate(self, part: ir.Value, block: ir.Value) -> None:
        features = self.width // _PARTS
        bias = self._parameters(part, block, "read_bias")
        entry, gated = self._own("entry", part), self._own("gated", part)
        sums = [self._own("read", int64(i)) for i in range(_PARTS)]

        def gate_row(row: ir.Value) -> None:
            u, v = self._row(entry, row, "entry"), self._row(gated, row, "gated")
            first, second = (self._row(pointer, row, "read") for pointer in sums)
            mine = self.builder.mul(part, int64(features))
            for c in range(0, features, _LANES):
                at = self.builder.add(mine, int64(c))
                y = self._load(first, at) + self._load(second, at) + self._load(bias, c)
                gate = self._load(u, 4 * self.half + c)
                self._store(y * gate * gelu_share(self, gate)[0], v, c)

        self._rows(gate_row)
        self._product(part, block, "gated", "last", "last")

    def _mlp(self, part: ir.Value, block: ir.Value) -> None:
        self._add("last", part, block)
        self._normalise(part)
        self._product(part, block, "normal", "mlp", "mlp", bias="mlp_bias")
        mlp, inner = self._own("mlp", part), self._own("inner", part)

        def gate_row(row: ir.Value) -> None:
            m, v = self._row(mlp, row, "mlp"), self._row(inner, row, "inner")
            for c in range(0, self.width, _LANES):
                gate = self._load(m, self.width + c)
                self._store(self._load(m, c) * gate * gelu_share(self, gate)[0], v, c)

        self._rows(gate_row)
        self._product(part, block, "inner", "out", "out")

    def _add(self, branch: str, part: ir.Value, block: ir.Value) -> None:
        """Adds both parts' sums and the bias of a branch to the part's own x."""
        x, bias = self._own("x", part), self._parameters(part, block, f"{branch}_bias")
        sums = [self._own(branch, int64(i)) for i in range(_PARTS)]

        def add_row(row: ir.Value) -> None:
            target = self._row(x, row, "x")
            first, second = (self._row(pointer, row, branch) for pointer in sums)
            for c in range(0, self.width, _LANES):
                branch_sum = self._load(first, c) + self._load(second, c) + self._load(bias, c)
                self._store(self._load(target, c) + branch_sum, target, c)

        self._rows(add_row)

    def _normalise(self, part: ir.Value) -> None:
        x, normal = self._own("x", part), self._own("normal", part)

        def normalise(row: ir.Value) -> None:
            source, target = self._row(x, row, "x"), self._row(normal, row, "normal")
            pieces = [self._load(source, c) for c in range(0, self.width, _LANES)]
            mean = self._sum(pieces) * (1 / self.width)
            centred = [piece - mean for piece in pieces]
            variance = self._sum([piece * piece for piece in centred]) * (1 / self.width)
            inverse = 1.0 / self.sqrt(variance + EPSILON)
            for i, piece in enumerate(centred):
                self._store(piece * inverse, target, i * _LANES)

        self._rows(normalise)

    def _sum(self, pieces: Sequence[Value]) -> Value:
        """The sum over all lanes of all pieces, in every lane."""
        pieces = list(pieces)
        while len(pieces) > 1:
            pieces = [a + b for a, b in zip(pieces[::2], pieces[1::2], strict=False)] + pieces[len(pieces) & ~1 :]
        total = pieces[0]
        for distance in (8, 4, 2, 1):
            mask = ir.Constant(ir.VectorType(INT32, _LANES), [i ^ distance for i in range(_LANES)])
            total = total + Value(self, self.builder.shuffle_vector(total.value, total.value, mask))
        return total

    def _product(
        self, part: ir.Value, block: ir.Value, source: str, weights: str, target: str, bias: str | None = None
    ) -> None:
        """target = source @ weights (+ bias), for all rows; each element's sum is taken in the order of `source`."""
        sizes = _sizes(self.width, self.channels)
        kernel = self._parameters(part, block, weights)
        start = None if bias is None else self._parameters(part, block, bias)
        inputs, outputs = self._own(source, part), self._own(target, part)
        row: ir.Value = int64(0)
        for count in _ROWS:
            # As often as `count` rows are left; the rest is done with fewer at a time.
            left = self.builder.sub(self.batch, row)
            whole = self.builder.and_(left, int64(-count))
            end = self.builder.add(row, whole)
            with self.loop(row, end, count) as now:
                rows = [self.builder.add(now, int64(i)) for i in range(count)]
                xs = [self._row(inputs, r, source) for r in rows]
                ys = [self._row(outputs, r, target) for r in rows]
                self._tile(xs, kernel, start, ys, sizes[source], sizes[target])
            row = end

    def _tile(self, xs, kernel: ir.Value, start: ir.Value | None, ys, inputs: int, outputs: int) -> None:
        vectors = outputs // _LANES
        wide = max(v for v in range(1, vectors + 1) if vectors % v == 0 and v * len(xs) <= _ACCUMULATORS)
        for column in range(0, outputs, wide * _LANES):
            columns = [column + i * _LANES for i in range(wide)]
            zero = self.constant(0.0)
            sums = [zero if start is None else self._load(start, c) for c in columns]
            builder = self.builder
            before, body, after = builder.block, builder.append_basic_block(), builder.append_basic_block()
            builder.branch(body)
            builder.position_at_end(body)
            k = builder.phi(INT64)
            k.add_incoming(int64(0), before)
            phis = [[builder.phi(self.type) for _ in columns] for _ in xs]
            for row in phis:
                for phi, value in zip(row, sums, strict=True):
                    phi.add_incoming(value.value, before)
            line = builder.gep(kernel, [builder.mul(k, int64(outputs))], source_etype=self.kind)
            w = [self._load(line, c) for c in columns]
            for x, row in zip(xs, phis, strict=True):
                factor = self._spread(x, k)
                for phi, weight in zip(row, w, strict=True):
                    # a b + c rounded once: the same however the loop around it is compiled.
                    fused = self.intrinsic("llvm.fma", factor, weight, Value(self, phi))
                    phi.add_incoming(fused.value, body)
            following = builder.add(k, int64(1))
            k.add_incoming(following, body)
            builder.cbranch(builder.icmp_signed("<", following, int64(inputs)), body, after)
            builder.position_at_end(after)
            for y, row in zip(ys, phis, strict=True):
                for c, phi in zip(columns, row, strict=True):
                    self._store(Value(self, phi.incomings[1][0]), y, c)

    def _spread(self, pointer: ir.Value, index: ir.Value) -> Value:
        """Loads one float into every lane."""
        number = self.builder.load(self._at(pointer, index), align=4, typ=self.kind)
        lanes = ir.VectorType(INT32, _LANES)
        undefined = ir.Constant(self.type, ir.Undefined)
        vector = self.builder.insert_element(undefined, number, ir.Constant(INT32, 0))
        return Value(self, self.builder.shuffle_vector(vector, undefined, ir.Constant(lanes, [0] * _LANES)))

    def _own(self, key: str, part: ir.Value) -> ir.Value:
        """The address of the rows of a part's buffer."""
        before, size = _before(_sizes(self.width, self.channels), key)
        rows = self.builder.add(self.builder.mul(part, int64(size)), int64(before))
        return self._at(self.scratch, self.builder.mul(rows, self.batch))

    def _row(self, pointer: ir.Value, row: ir.Value, key: str) -> ir.Value:
        return self._at(pointer, self.builder.mul(row, int64(_sizes(self.width, self.channels)[key])))

    def _parameters(self, part: ir.Value, block: ir.Value, key: str) -> ir.Value:
        before, size = _before(_weights(self.width, self.channels), key)
        number = self.builder.add(self.builder.mul(block, int64(_PARTS)), part)
        return self._at(self.weights, self.builder.add(self.builder.mul(number, int64(size)), int64(before)))

    def _at(self, pointer: ir.Value, index: ir.Value | int) -> ir.Value:
        index = int64(index) if isinstance(index, int) else index
        return self.builder.gep(pointer, [index], source_etype=self.kind)

    def _load(self, pointer: ir.Value, index: ir.Value | int) -> Value:
        return Value(self, self.builder.load(self._at(pointer, index), align=4, typ=self.type))

    def _store(self, value: Value, pointer: ir.Value, index: ir.Value | int) -> None:
        self.builder.store(value.value, self._at(pointer, index), align=4)

    def _copy(self, source: ir.Value, target: ir.Value, row: ir.Value) -> None:
        source, target = self._row(source, row, "x"), self._row(target, row, "x")
        for c in range(0, self.width, _LANES):
            self._store(self._load(source, c), target, c)
