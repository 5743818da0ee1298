"""The cost of a compiled program, read from its text: cycles by place, and communication between its devices.

The compiler for TPUs writes its estimate of the cycles of every instruction beside it. An instruction of a loop counts as often
as the loop runs, if the compiler knows how often.
"""

from __future__ import annotations

import collections
import math
import re
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import NamedTuple

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")

_NO_KERNEL = frozenset(
    {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call", "conditional", "after-all"}
)

_BEGINS = 'custom_call_target="AsyncCollectiveStart"'
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_ROUNDS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_CALLED = re.compile(r"\b(?:body|to_apply|true_computation|false_computation|called_computation)=%?([\w.-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_WRAPPED = re.compile(r"\bcalls=%?([\w.-]+)")
_GROUPS = re.compile(r"replica_groups=(?:\{\{([\d,]*)\}|\[\d+,(\d+)\]<=)")
_SHAPE = re.compile(r"\b(?:pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")  # bf16[8,128]
_KERNEL = re.compile(r'"cost_estimate":\{"flops":"(\d+)".*?"bytes_accessed":"(\d+)"')
_SHARED = re.compile(r"_of_(\d+)_heads/")  # the name of a kernel in which heads multiply each other's lanes, too
_LAYER = re.compile(r"(?<=[a-z]_)\d+$")
_WRAPPER = re.compile(r"^[a-z_]+\((.*)\)$")
# Components of a name that are not of the model.
_STRUCTURE = frozenset(
    {
        "while",
        "body",
        "cond",
        "closed_call",
        "checkpoint",
        "remat",
        "rematted_computation",
        "branch_0_fun",
        "branch_1_fun",
        "pjit",
    }
)


class Collective(NamedTuple):
    """A kind of communication in one step.

    Attributes:
        times: How often it happens.
        bytes: The bytes of the whole arrays together: those that a device gets, or in a reduce-scatter those that it gives.
    """

    times: int
    bytes: int


class FusedKernel(NamedTuple):
    """The kernels of our own in one place, whose cycles the compiler does not estimate.

    Attributes:
        operations: Operations of the unit that multiplies matrices, those on padding included.
        bytes: Bytes that are read and written.
    """

    operations: int
    bytes: int


class ProgramCost(NamedTuple):
    """The cost of a program on one device.

    Attributes:
        cycles: The compiler's estimate; None if it gives none.
        places: {place: cycles}, the most expensive first; a place is a path of the model, forward or backward.
        collectives: {kind: Collective}.
        kernels: Instructions that run on the device, communication included.
        unknown_loops: Loops whose number of rounds depends on the data; their bodies count once.
        fused: {place: FusedKernel}, which are not in the cycles.
    """

    cycles: int | None
    places: dict[str, int]
    collectives: dict[str, Collective]
    kernels: int
    unknown_loops: int
    fused: Mapping[str, FusedKernel] = MappingProxyType({})

    def fused_cycles(self, operations_per_cycle: float, bytes_per_cycle: float) -> float:
        """An estimate of the cycles of the fused kernels: by operations or bytes of each, whichever takes longer."""
        return sum(max(one.operations / operations_per_cycle, one.bytes / bytes_per_cycle) for one in self.fused.values())


class _Instruction(NamedTuple):
    opcode: str
    shape: str
    rest: str


def read(text: str) -> ProgramCost:
    """The cost of a program.

    Args:
        text: A compiled module as text: compiled.as_text() of what jax.jit(...).lower(...).compile() returns.

    >>> cost = read('''HloModule example
    ... ENTRY %main (x: f32[8]) -> f32[8] {
    ...   %x = f32[8]{0} parameter(0)
    ...   ROOT %y = f32[8]{0} all-reduce(%x), to_apply=%add, metadata={op_name="jit(step)/jvp(Encoder)/layer_3/add"}
    ... }''')
    >>> cost.collectives["all-reduce"]
    Collective(times=1, bytes=32)
    """
    computations, entry = _computations(text)
    places: collections.Counter[str] = collections.Counter()
    counts: collections.Counter[str] = collections.Counter()
    sizes: collections.Counter[str] = collections.Counter()
    unknown_loops = kernels = 0
    fused: dict[str, FusedKernel] = {}
    for instruction, times, unknown in _executed(computations, entry, 1):
        unknown_loops += unknown
        kernels += times * (instruction.opcode not in _NO_KERNEL and not instruction.opcode.endswith("-done"))
        if 'custom_call_target="tpu_custom_call"' in instruction.rest and (estimate := _KERNEL.search(instruction.rest)):
            shared, at = _SHARED.search(_op_name(instruction)), place(_op_name(instruction))
            operations = int(estimate[1]) * int(shared[1] if shared else 1)
            before = fused.get(at, FusedKernel(0, 0))
            fused[at] = FusedKernel(before.operations + times * operations, before.bytes + times * int(estimate[2]))
        cycles = _CYCLES.search(instruction.rest)
        if cycles and int(cycles[1]):
            places[place(_op_name(instruction))] += times * int(cycles[1])
        for kind, size in _sent(instruction, computations):
            counts[kind] += times
            sizes[kind] += times * size
    return ProgramCost(
        cycles=sum(places.values()) if places else None,
        places=dict(places.most_common()),
        collectives={kind: Collective(counts[kind], sizes[kind]) for kind in sorted(counts)},
        kernels=kernels,
        unknown_loops=unknown_loops,
        fused=fused,
    )


def _computations(text: str) -> tuple[dict[str, list[_Instruction]], str]:
    """{name: its instructions} for all computations, and the name of the entry computation."""
    computations: dict[str, list[_Instruction]] = {}
    name = entry = ""
    for line in text.splitlines():
        if line.endswith("{") and (line.startswith(("%", "ENTRY "))):
            name = line.removeprefix("ENTRY ").lstrip("%").split(" ", 1)[0].split("(", 1)[0]
            computations[name] = []
            entry = name if line.startswith("ENTRY ") else entry
        elif name and line.startswith("  ") and " = " in line:
            computations[name].append(_instruction(line.split(" = ", 1)[1]))
    return computations, entry


def _instruction(text: str) -> _Instruction:
    """An instruction from the text after its name: a shape, the opcode, and operands with attributes."""
    end = _closing(text) if text.startswith("(") else text.find(" ")
    shape, rest = text[:end], text[end:].lstrip()
    opcode, _, attributes = rest.partition("(")
    return _Instruction(opcode, shape, attributes)


def _closing(text: str) -> int:
    """The place after the parenthesis that closes the first one."""
    depth = 0
    for place_, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return place_ + 1
    return len(text)


def _executed(
    computations: Mapping[str, list[_Instruction]], name: str, times: int
) -> Iterator[tuple[_Instruction, int, bool]]:
    """Every instruction that runs, how often, and whether it is a loop of unknown length. All branches count as run."""
    for instruction in computations.get(name, ()):
        rounds, unknown = 1, False
        if instruction.opcode == "while":
            known = _ROUNDS.search(instruction.rest)
            rounds, unknown = (int(known[1]), False) if known else (1, True)
        yield instruction, times, unknown
        called = []
        if instruction.opcode in ("while", "call", "conditional"):
            called = _CALLED.findall(instruction.rest)
            for branches in _BRANCHES.findall(instruction.rest):
                called += [branch.strip().lstrip("%") for branch in branches.split(",")]
        elif instruction.opcode == "async-start":
            called = _WRAPPED.findall(instruction.rest)
        for callee in called:
            yield from _executed(computations, callee, times * rounds)


def _op_name(instruction: _Instruction) -> str:
    named = _OP_NAME.search(instruction.rest)
    return named[1].replace("\\'", "'") if named and named[1] else instruction.opcode


def place(op_name: str) -> str:
    """The place in the model of an operation, by its name; all layers of a kind are one place.

    >>> place("jit(train_step)/transpose(jvp(Encoder))/layer_3/attention/dot_general")
    'backward Encoder/layer_*/attention'
    >>> place("jit(train_step)/jvp(Encoder)/layer_0/attention/query/dot_general")
    'forward Encoder/layer_*/attention/query'
    >>> place("jit(train_step)/mul")
    'mul'
    """
    components: list[str] = []
    direction = ""
    parts = op_name.split("/")
    for part in parts:
        inner, outer = part, None
        while (match := _WRAPPER.match(inner)) is not None:
            outer = inner.partition("(")[0]
            if outer == "transpose":
                direction = "backward "
            elif outer in ("jvp", "linearize"):
                direction = direction or "forward "
            if outer in ("jit", "pjit"):
                inner = ""
                break
            inner = match[1]
        if inner and inner not in _STRUCTURE:
            components.append(_LAYER.sub("*", inner))
    if len(components) > 1:
        components.pop()  # the operation itself
    components = _without_remat(components)
    return direction + "/".join(components) if components else parts[-1]


def _sent(instruction: _Instruction, computations: Mapping[str, list[_Instruction]]) -> Iterator[tuple[str, int]]:
    """Kind and bytes of the communication of an instruction."""
    kind = instruction.opcode.removesuffix("-start")
    if kind == "reduce-scatter":
        yield kind, _bytes(instruction) * _group_size(instruction)
    elif kind in COLLECTIVES:
        yield kind, _bytes(instruction)
    elif kind == "fusion":
        for name in _WRAPPED.findall(instruction.rest):
            inside = computations.get(name, ())
            if "all-reduce-scatter" in name:  # on TPUs an all-reduce and the slices of it that a device keeps
                yield from (("reduce-scatter", _bytes(part)) for part in inside if part.opcode == "all-reduce")
            elif any(_BEGINS in part.rest for part in inside):  # the fusions that continue it name it, too
                yield from ((part.opcode, _bytes(part)) for part in inside if part.opcode in COLLECTIVES)


def _group_size(instruction: _Instruction) -> int:
    """How many devices take part."""
    match = _GROUPS.search(instruction.rest)
    if match is None:
        return 1
    return int(match[2]) if match[2] else match[1].count(",") + 1


def _without_remat(components: list[str]) -> list[str]:
    """The path of a place without the repetition in a rematerialised layer, whose path names its call and itself again."""
    calls = [number for number, name in enumerate(components) if name.endswith(".call")]
    if not calls or calls[-1] == len(components) - 1:
        return components
    before, inside = components[: calls[-1]], components[calls[-1] + 1 :]
    begin = len(before) - 1 - before[::-1].index(before[0]) if before else 0
    return before[begin:] + inside[1:] if before[-1:] == inside[:1] else before[begin:] + inside


def _bytes(instruction: _Instruction) -> int:
    """The bytes of a result; for an operation that only starts, those of the largest part of its tuple."""
    sizes = []
    for bits, sides in _SHAPE.findall(instruction.shape):
        numbers = math.prod(int(side) for side in sides.split(",") if side)
        sizes.append(numbers * int(bits or 8) // 8)
    return max(sizes, default=0) if instruction.opcode.endswith("-start") else sum(sizes)
