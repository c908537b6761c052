"""What a compiled program moves: the kernels that it runs and the bytes that each reads and writes, from its HLO.

    found = traffic.kernels(compiled)
    sum(k.runs * k.moved for k in found)    # bytes between the device and its memory, in one run

A kernel reads each operand once and writes each result once. Of an operand that it only cuts pieces from, and of a
result that is an operand with a piece replaced, the pieces count. What a kernel reads twice counts once, so that this
is the least that the program moves.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterator

import jax

from harmonic.hlo import ARRAY, BRANCHES, Computation, Instruction, Program, array_bytes, names, parse

# Nothing runs for these.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "add-dependency", "partition-id",
    "replica-id", "opt-barrier", "domain",
}  # fmt: skip
_NO_KERNELS = {"AllocateBuffer", "AssumeGatherIndicesInBound", "Sharding", "ConcatBitcast"}  # custom calls
_THROUGH = {"bitcast", "convert", "copy", "reshape"}  # inside a kernel, pieces of these are pieces of their operand
_PIECES = {"slice", "dynamic-slice", "gather"}


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One kernel of a program.

    Attributes:
      name: XLA's.
      kind: the opcode, or the target of a custom call.
      op_name: the name that JAX gave it; of a kernel that joins several operations, one of theirs.
      runs: how often it runs in one run of the program.
      read, written: bytes, each time.
      unknown: loops around it whose trip counts XLA does not know.
    """

    name: str
    kind: str
    op_name: str
    runs: float
    read: int
    written: int
    unknown: int

    @property
    def moved(self) -> int:
        """Bytes, each time."""
        return self.read + self.written


def kernels(
    compiled: jax.stages.Compiled | str,
    *,
    unknown: Callable[[int], float] | None = None,
    on_chip: bool = False,
) -> list[Kernel]:
    """Every kernel of a compiled program, or of its optimised HLO text; of a conditional, those of the dearest branch.

    Args:
      compiled: for one device of however many.
      unknown: how often a loop runs whose trip count cannot be told, given the number of such loops around it.
      on_chip: whether memory spaces other than 0 are on the chip, as on TPUs, and cost nothing.

    Raises:
      ValueError: a loop whose trip count cannot be told, without `unknown`; or HLO that cannot be read.
    """
    program = parse(compiled)
    return list(_Walk(program, unknown, on_chip).kernels(program.entry, 1.0, 0))


class _Walk:
    def __init__(self, program: Program, unknown: Callable[[int], float] | None, on_chip: bool):
        self._program, self._unknown, self._on_chip = program, unknown, on_chip
        self._users: dict[int, dict[str, list[Instruction]]] = {}  # by a computation's identity

    def kernels(self, name: str, runs: float, depth: int) -> Iterator[Kernel]:
        computation = self._program.computations[name]
        for instruction in computation.instructions.values():
            yield from self._of(computation, instruction, runs, depth)

    def _of(self, computation: Computation, i: Instruction, runs: float, depth: int) -> Iterator[Kernel]:
        if i.opcode in _FREE or i.opcode.endswith(("-done", "-update")):
            return
        branches = [n for value in BRANCHES.findall(i.attributes) for n in names(value)]
        if i.opcode == "while":
            times, inner = self._times(computation, i, depth)
            for part in ("condition", "body") if inner > depth else ("body",):
                yield from self.kernels(_attribute(i, part), runs * times, inner)
        elif branches:
            every = [list(self.kernels(n, runs, depth)) for n in branches]
            yield from max(every, key=lambda found: sum(k.runs * k.moved for k in found))
        elif i.opcode == "call":
            yield from self.kernels(_attribute(i, "to_apply"), runs, depth)
        elif i.opcode == "async-start":
            yield from self.kernels(_attribute(i, "calls"), runs, depth)
        else:
            target = re.search(r'custom_call_target="([^"]*)"', i.attributes)
            kind = target[1] if target else i.opcode.removesuffix("-start")
            if kind not in _NO_KERNELS:
                op_name = re.search(r'op_name="([^"]*)"', i.attributes)
                read, written = self._moved(computation, i, kind)
                yield Kernel(i.name, kind, op_name[1] if op_name else "", runs, read, written, depth)

    def _times(self, computation: Computation, loop: Instruction, depth: int) -> tuple[float, int]:
        """(how often a loop runs, unknown loops around its body)."""
        try:
            return self._program.trip_count(computation, loop), depth
        except ValueError:
            if self._unknown is None:
                raise
            return self._unknown(depth), depth + 1

    def _moved(self, computation: Computation, i: Instruction, kind: str) -> tuple[int, int]:
        shapes = [computation.instructions[n].shape for n in i.operands]
        if i.opcode == "fusion":
            called = self._program.called(i, "calls")
            read = sum(int(min(self._bytes(s), self._read(called, n))) for n, s in enumerate(shapes) if self._bytes(s))
            return read, self._written(called, called.root, i.shape)
        result = i.shape
        if i.opcode.endswith("-start"):  # its shape holds its operands as well
            result = next((j.shape for j in self._users_of(computation)[i.name] if j.opcode.endswith("-done")), result)
        if i.opcode == "dynamic-update-slice":
            return (self._bytes(shapes[1]),) * 2
        if kind in _PIECES:
            return self._bytes(shapes[0]) and self._bytes(result, space=False), self._bytes(result)
        if kind.startswith("__cublas"):  # the last part of its result is a workspace
            result = re.sub(r"s8\[\d*\]\S*", "", result)
        return sum(map(self._bytes, shapes)), self._bytes(result)

    def _bytes(self, shape: str, *, space: bool = True) -> int:
        """Bytes of a shape that are in the device's memory, or with `space` False anywhere."""
        return sum(size for size, where in array_bytes(shape) if not (space and self._on_chip and where))

    def _read(self, computation: Computation, number: int) -> int | float:
        """Bytes that a kernel reads of its operand `number`, at most."""
        for i in computation.instructions.values():
            if i.opcode == "parameter" and int(i.literal) == number:
                return self._used(computation, i.name)
        return 0

    def _used(self, computation: Computation, name: str) -> int | float:
        """Bytes of a value that are used: infinite for all of them."""
        if name == computation.root:
            return math.inf
        total: int | float = 0
        for user in self._users_of(computation)[name]:
            places = [n for n, operand in enumerate(user.operands) if operand == name]
            if user.opcode in _THROUGH:
                total += self._used(computation, user.name)
            elif user.opcode == "fusion":
                total += sum(self._read(self._program.called(user, "calls"), n) for n in places)
            elif user.opcode in _PIECES and places == [0]:
                total += self._bytes(user.shape, space=False)
            elif not (user.opcode in ("dynamic-update-slice", "scatter") and places == [0]):
                return math.inf
        return total

    def _users_of(self, computation: Computation) -> dict[str, list[Instruction]]:
        key = id(computation.instructions)
        if key not in self._users:
            found = self._users[key] = {n: [] for n in computation.instructions}
            for i in computation.instructions.values():
                for operand in dict.fromkeys(i.operands):
                    found[operand].append(i)
        return self._users[key]

    def _written(self, computation: Computation, name: str, shape: str) -> int:
        """Bytes that a kernel writes of its result `shape`, which instruction `name` computes."""
        i = computation.instructions[name]
        if i.opcode == "tuple":
            parts = _parts(shape)
            return sum(self._written(computation, n, part) for n, part in zip(i.operands, parts, strict=True))
        while i.opcode in _THROUGH:
            i = computation.instructions[i.operands[0]]
        if i.opcode in ("dynamic-update-slice", "scatter") and self._bytes(shape):
            piece = computation.instructions[i.operands[1 if i.opcode == "dynamic-update-slice" else 2]]
            return self._bytes(piece.shape, space=False)
        return self._bytes(shape)


def _attribute(instruction: Instruction, name: str) -> str:
    found = re.search(rf"\b{name}=%?([\w.\-]+)", instruction.attributes)
    assert found is not None, (instruction.name, name)
    return found[1]


def _parts(shape: str) -> list[str]:
    """The parts of a tuple's shape, which are arrays."""
    return [found[0] for found in ARRAY.finditer(shape)]
