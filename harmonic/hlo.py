"""What a compiled program sends and holds, read from its optimised HLO: before it runs, and without running it.

    compiled = jax.jit(f).lower(*shapes).compile()
    hlo.sent_bytes(hlo.collectives(compiled))     # by one device, in one run
    hlo.memory(compiled).temporaries                  # on one device

A program over several devices is one text for all of them, so that every figure here is one device's.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax

KINDS = ("all-reduce", "all-gather", "collective-permute", "all-to-all", "reduce-scatter")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One instruction by which devices communicate, and its place in the program.

    Attributes:
      kind: one of `KINDS`; a pair of -start and -done counts as one.
      operand_bytes: what one device puts in, each time it runs; several operands are added up.
      group: devices that talk to one another; 1 sends nothing.
      targets: of a collective-permute: other devices that the busiest one sends its operand to.
      loops: trip counts of the loops around it, the outermost first.
      op_name: the name that JAX gave it, such as `jit(f)/shard_map/psum`. Where XLA joined several, one of theirs.
    """

    kind: str
    operand_bytes: int
    group: int
    targets: int
    loops: tuple[int, ...]
    op_name: str

    @property
    def runs(self) -> int:
        """How often it runs in one run of the program."""
        return math.prod(self.loops)

    @property
    def sent_bytes(self) -> int:
        """Bytes that one device sends each time it runs; of devices that differ, the one that sends most.

        With an operand of b bytes in a group of n:

        - all-gather: (n - 1) b; its operand, once for each other device.
        - collective-permute: b for each of its targets other than itself. It does not depend on n.
        - all-reduce: 2 (n - 1) / n b, rounded up; a reduce-scatter of n parts, then their all-gather, which is the
          least that can be done. One that sends whole operands around takes more.
        - reduce-scatter, all-to-all: (n - 1) / n b, rounded up; all parts but its own.
        """
        b, n = self.operand_bytes, self.group
        match self.kind:
            case "all-gather":
                return (n - 1) * b
            case "collective-permute":
                return self.targets * b
            case "all-reduce":
                return -(-2 * (n - 1) * b // n)
            case _:
                return -(-(n - 1) * b // n)


def sent_bytes(found: Iterable[Collective]) -> int:
    """Bytes that one device sends in one run of the program, through all these together."""
    return sum(c.runs * c.sent_bytes for c in found)


def collectives(compiled: jax.stages.Compiled | str) -> list[Collective]:
    """Every collective of a compiled program, or of its optimised HLO text.

    Loops, called computations and fusions are followed; of a conditional, the branch that sends most.

    Raises:
      ValueError: a loop around a collective whose trip count cannot be told, or HLO that cannot be read.
    """
    program = parse(compiled)
    found = _Walk(program).collectives(program.entry)
    return [dataclasses.replace(c, group=c.group or program.devices) for c in found]


class Memory(NamedTuple):
    """Bytes on one device: what the program needs beside its arguments and outputs, and these."""

    temporaries: int
    arguments: int
    outputs: int


def memory(compiled: jax.stages.Compiled) -> Memory:
    """What a compiled program holds on one device.

    Raises:
      ValueError: the backend does not tell.
    """
    stats = compiled.memory_analysis()
    if stats is None:
        raise ValueError("this backend does not tell what a compiled program holds")
    return Memory(stats.temp_size_in_bytes, stats.argument_size_in_bytes, stats.output_size_in_bytes)


# Optimised HLO as text: computations of instructions, one a line:
#     %name = f32[8,128]{1,0} all-gather(%operand), replica_groups={{0,1}}, metadata={op_name="..."}


class Instruction(NamedTuple):
    """A line of a program."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    literal: str  # the text between the parentheses: a constant's value, a parameter's number


class Computation(NamedTuple):
    """A part of a program that instructions call by its name."""

    instructions: dict[str, Instruction]
    root: str


class Program(NamedTuple):
    """A program's computations by name, the name of the one that is run, and how many devices run it."""

    computations: dict[str, Computation]
    entry: str
    devices: int

    def trip_count(self, computation: Computation, loop: Instruction) -> int:
        """XLA's own figure, or that of a counter which a constant is added to until it reaches a constant."""
        known = _TRIP_COUNT.search(loop.attributes)
        if known:
            return int(known[1])
        condition, body = (self.called(loop, name) for name in ("condition", "body"))
        test = self._value(condition, condition.root, (_CARRY,))
        if isinstance(test, tuple) and test[0] == "compare" and isinstance(test[2], tuple) and test[2][0] == "carry":
            _, direction, (_, index), limit = test
            start = self._element(computation, loop.operands[0], index, ())
            step = self._element(body, body.root, index, (_CARRY,))
            step = step[2] if isinstance(step, tuple) and step[:2] == ("add", ("carry", index)) else None
            if isinstance(start, int) and isinstance(limit, int) and isinstance(step, int) and step > 0:
                limit += direction == "LE"
                if direction in ("LT", "LE"):
                    return max(0, -(-(limit - start) // step))
        raise ValueError(
            f"the trip count of the loop {loop.name} cannot be told, so that what is in it cannot be counted: its "
            "condition is not a counter compared with a constant"
        )

    def called(self, instruction: Instruction, name: str) -> Computation:
        """The computation that is an attribute of an instruction, such as a loop's `body`."""
        found = re.search(rf"\b{name}=%?([\w.\-]+)", instruction.attributes)
        assert found is not None, (instruction.name, name)
        return self.computations[found[1]]

    def _element(self, computation: Computation, name: str, index: int, arguments: tuple[Any, ...]) -> Any:
        """The value of one element of a tuple."""
        instruction = computation.instructions[name]
        if instruction.opcode == "copy":
            return self._element(computation, instruction.operands[0], index, arguments)
        if instruction.opcode != "tuple":
            return None
        return self._value(computation, instruction.operands[index], arguments)

    def _value(self, computation: Computation, name: str, arguments: tuple[Any, ...]) -> Any:
        """An instruction's value as far as it can be told: a whole number, a part of the loop's carry, one of these
        added to or compared with another, or None."""
        instruction = computation.instructions[name]
        opcode, operands = instruction.opcode, instruction.operands
        if opcode == "constant":
            return int(instruction.literal) if re.fullmatch(r"-?\d+", instruction.literal) else None
        if opcode == "parameter":
            number = int(instruction.literal)
            return arguments[number] if number < len(arguments) else None
        values = [self._value(computation, n, arguments) for n in operands] if opcode in _FOLLOWED else []
        match opcode:
            case "copy" | "bitcast" | "reshape":
                return values[0]
            case "fusion" | "call":
                called = self.called(instruction, "calls" if opcode == "fusion" else "to_apply")
                return self._value(called, called.root, tuple(values))
            case "get-tuple-element" if values[0] == _CARRY:
                found = re.search(r"index=(\d+)", instruction.attributes)
                return ("carry", int(found[1])) if found else None
            case "add":
                first, second = values
                return ("add", second, first) if isinstance(first, int) else ("add", first, second)
            case "compare":
                found = re.search(r"direction=(\w+)", instruction.attributes)
                return ("compare", found[1], *values) if found else None
        return None


_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_OPCODE = re.compile(r"\s([a-z][a-z0-9\-]*)\(")
CALLED = re.compile(r"\b(?:calls|to_apply|body|called_computations)=(\{[^}]*\}|%?[\w.\-]+)")
BRANCHES = re.compile(r"\b(?:branch_computations|true_computation|false_computation)=(\{[^}]*\}|%?[\w.\-]+)")
_TRIP_COUNT = re.compile(r'known_trip_count\\?":\{\\?"n\\?":\\?"(\d+)')
ARRAY = re.compile(r"\b([a-z][a-z0-9]*)\[([\d,<=]*)\](?:\{([^}]*)\})?")  # type, sizes, layout


def parse(compiled: jax.stages.Compiled | str) -> Program:
    """Reads a compiled program, or its optimised HLO text.

    Raises:
      ValueError: HLO that cannot be read.
    """
    text = compiled if isinstance(compiled, str) else compiled.as_text()
    if not text:
        raise ValueError("the compiled program has no HLO text")
    computations: dict[str, Computation] = {}
    entry = name = root = ""
    instructions: dict[str, Instruction] = {}
    for line in text.splitlines():
        if not line[:1].isspace():
            header = _HEADER.match(line)
            if header:
                name, root, instructions = header[2], "", {}
                entry = name if header[1] else entry
            elif line.startswith("}"):
                computations[name] = Computation(instructions, root)
        elif name and (found := _LINE.match(line)):
            instruction = _instruction(found[2], found[3])
            instructions[instruction.name] = instruction
            root = instruction.name if found[1] else root
    if not entry:
        raise ValueError("the HLO text has no ENTRY computation")
    devices = math.prod(int(n) for n in re.findall(r"(?:replica_count|num_partitions)=(\d+)", text.split("\n", 1)[0]))
    return Program(computations, entry, devices)


def _instruction(name: str, rest: str) -> Instruction:
    opcode = _OPCODE.search(rest)
    if opcode is None:
        raise ValueError(f"cannot read the HLO instruction {name} = {rest[:200]}")
    end = _closing(rest, opcode.end())
    literal = rest[opcode.end() : end]
    # An operand is a name, or a shape and a name.
    operands = tuple(re.findall(r"%([\w.\-]+)", literal))
    return Instruction(name, rest[: opcode.start()], opcode[1], operands, rest[end + 1 :], literal)


def _closing(text: str, start: int) -> int:
    """Where the parenthesis closes that was opened before `start`."""
    depth = 1
    for found in re.finditer(r"[()]", text[start:]):
        depth += 1 if found[0] == "(" else -1
        if not depth:
            return start + found.start()
    raise ValueError(f"unbalanced parentheses in HLO: {text[:200]}")


def shape_bytes(shape: str) -> int:
    """Bytes of `f32[8,128]{1,0}`, or of all parts of a tuple. Tokens have none."""
    total = 0
    for kind, dimensions, _ in ARRAY.findall(re.sub(r"/\*.*?\*/", "", shape)):
        total += -(-math.prod(_sizes(dimensions)) * _bits(kind) // 8)
    return total


def array_bytes(shape: str) -> Iterator[tuple[int, int]]:
    """(bytes with what a tile such as T(8,128) is filled up by, memory space S) of each array of a shape."""
    for kind, dimensions, layout in ARRAY.findall(re.sub(r"/\*.*?\*/", "", shape)):
        sizes = _sizes(dimensions)
        tile, space = re.search(r"T\(([\d,]+)\)", layout), re.search(r"S\((\d+)\)", layout)
        if tile:
            inner = [int(axis) for axis in layout.split(":")[0].split(",") if axis]  # the innermost first
            for axis, size in zip(inner, reversed(_sizes(tile[1])), strict=False):
                sizes[axis] = -(-sizes[axis] // size) * size
        yield -(-math.prod(sizes) * _bits(kind) // 8), int(space[1]) if space else 0


def _sizes(dimensions: str) -> list[int]:
    return [int(d.lstrip("<=")) for d in dimensions.split(",") if d]


def _bits(kind: str) -> int:
    if kind in ("pred", "token", "opaque"):
        return 8 if kind == "pred" else 0
    width = re.match(r"[a-z]+(\d+)", kind)
    if width is None:
        raise ValueError(f"unknown element type {kind!r} in HLO")
    return int(width[1])


def names(value: str) -> list[str]:
    return re.findall(r"[\w.\-]+", value)


class _Walk:
    """Follows a program from its entry."""

    def __init__(self, program: Program):
        self._program = program
        self._found: dict[str, list[Collective]] = {}

    def collectives(self, name: str) -> list[Collective]:
        """Those of a computation and of all that it calls; `loops` from this computation inwards."""
        if name not in self._found:
            computation = self._program.computations[name]
            self._found[name] = [c for i in computation.instructions.values() for c in self._of(computation, i)]
        return self._found[name]

    def _of(self, computation: Computation, instruction: Instruction) -> Iterator[Collective]:
        kind = instruction.opcode.removesuffix("-start")
        if kind in KINDS:
            yield _collective(computation, instruction, kind)
            return
        if instruction.opcode.endswith(("-done", "-update")):
            return  # what they wait for is counted where it starts
        branches = [n for value in BRANCHES.findall(instruction.attributes) for n in names(value)]
        if branches:
            yield from max((self.collectives(n) for n in branches), key=sent_bytes)
        for called in (n for value in CALLED.findall(instruction.attributes) for n in names(value)):
            inner = self.collectives(called)
            if instruction.opcode == "while" and inner:
                count = self._program.trip_count(computation, instruction)
                inner = [dataclasses.replace(c, loops=(count, *c.loops)) for c in inner]
            yield from inner


_CARRY = "carry"
_FOLLOWED = ("copy", "bitcast", "reshape", "fusion", "call", "get-tuple-element", "add", "compare")


def _collective(computation: Computation, instruction: Instruction, kind: str) -> Collective:
    attributes = instruction.attributes
    size = sum(shape_bytes(computation.instructions[n].shape) for n in instruction.operands)
    group = targets = 0
    if kind == "collective-permute":
        pairs = re.findall(r"\{(\d+),(\d+)\}", attributes)
        senders = [source for source, target in pairs if source != target]
        targets = max((senders.count(s) for s in senders), default=0)
    elif listed := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        group = listed[1].count(",") + 1
    elif iota := re.search(r"replica_groups=\[\d+,(\d+)\]", attributes):
        group = int(iota[1])
    op_name = re.search(r'op_name="([^"]*)"', attributes)
    # No groups means all devices: their number is filled in once the header is read.
    return Collective(kind, size, group, targets, (), op_name[1] if op_name else "")


def sent(compiled: jax.stages.Compiled | str, segments: int) -> dict[str, int]:
    """What `describe.communication` predicts, read from a compiled training step, or from its loss and gradient alone.

    An exchange inside a loop over a level's blocks counts as a layer's. XLA unrolls such a loop where it has one block:
    its exchanges then count among the edges.

    Returns:
      {"layers", "edges", "segment", "gradients", "step"}.
    """
    found = collectives(compiled)
    # JAX's names of differentiated operations and of their transposes hold `jvp`; gradients are summed outside.
    differentiated = [c for c in found if "jvp(" in c.op_name]
    looped = [c for c in differentiated if len(c.loops) > (segments > 1)]
    inside, layers = sent_bytes(differentiated), sent_bytes(looped) // segments
    return {
        "layers": layers,
        "edges": inside // segments - layers,
        "segment": inside // segments,
        "gradients": sent_bytes(found) - inside,
        "step": sent_bytes(found),
    }
