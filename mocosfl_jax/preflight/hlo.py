"""What a compiled program consists of, read from its text."""

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import NamedTuple

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# Operations that neither compute nor move anything.
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id"}
_FREE |= {"while", "call", "conditional"}  # what they call is counted
_DONE = re.compile(r"-(done|update)$")  # the second half of an operation whose start is counted
_BITS = {"pred": 8, "s4": 4, "u4": 4, "token": 0}


class Operation(NamedTuple):
    """An operation of a program that becomes a kernel."""

    name: str
    opcode: str
    place: str  # in the model
    cycles: int  # the compiler's estimate; 0 if it gives none
    moved: int  # bytes of its operands and results
    times: int  # how often it runs in a call of the program


class Program(NamedTuple):
    """The operations of a compiled program, and the bytes that its devices exchange."""

    operations: list[Operation]
    collectives: dict[str, int]  # kind -> bytes that a device receives in a call of the program


class _Instruction(NamedTuple):
    name: str
    shapes: str  # of its results
    opcode: str
    operands: list[str]
    line: str
    fused: bool = False  # part of a fusion, which is the kernel


def read(text: str, trips: int) -> Program:
    """Read a compiled program.

    Args:
      text: `compiled.as_text()`.
      trips: How often its outermost loop runs. XLA writes down only some numbers of iterations; an inner loop
        without one counts once.
    """
    computations, entry = _computations(text)
    operations: list[Operation] = []
    collectives: Counter[str] = Counter()
    channels: set[str] = set()  # of the collectives that are counted
    for instruction, names, times in _walk(computations, entry, 1, trips):
        kind = _DONE.sub("", instruction.opcode).removesuffix("-start")
        if kind in COLLECTIVES and not _DONE.search(instruction.opcode):
            # A TPU carries one collective through many fusions, each of which repeats it.
            channel = re.search(r"channel_id=\d+", instruction.line)
            if channel is None or channel[0] not in channels:
                collectives[kind] += times * _received(instruction)
            channels |= {channel[0]} if channel else set()
        if instruction.fused or instruction.opcode in _FREE:
            continue
        cycles = re.search(r'"estimated_cycles":"(\d+)"', instruction.line)
        moved = 0
        if not _DONE.search(instruction.opcode):
            moved = sum(
                map(size_in_bytes, [instruction.shapes, *(names.get(n, "") for n in instruction.operands)])
            )
        operations.append(
            Operation(
                instruction.name,
                instruction.opcode,
                _place(instruction.line),
                int(cycles[1]) if cycles else 0,
                moved,
                times,
            )
        )
    return Program(operations, dict(collectives))


def size_in_bytes(shapes: str) -> int:
    """Bytes of all arrays in the text of a shape.

    Example:
      >>> size_in_bytes("(bf16[200,32]{1,0:T(8,128)(2,1)}, s32[])")
      12804
    """
    total = 0
    for dtype, dims in re.findall(r"\b([a-z]+\d*\w*)\[([\d,]*)\]", shapes):
        bits = _BITS.get(dtype) or int((re.search(r"\d+", dtype) or [0])[0])
        total += math.prod(int(n) for n in dims.split(",") if n) * bits // 8
    return total


def _computations(text: str) -> tuple[dict[str, list[_Instruction]], str]:
    found: dict[str, list[_Instruction]] = {}
    entry, current = "", ""
    for line in text.splitlines():
        if header := re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line):
            current = header[2]
            found[current] = []
            entry = current if header[1] else entry
        elif instruction := re.match(r"  (?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\(", line):
            name, shapes, opcode = instruction.groups()
            operands = re.findall(r"%([\w.\-]+)", _in_parentheses(line[instruction.end() :]))
            found[current].append(_Instruction(name, shapes, opcode, operands, line))
    return found, entry


def _in_parentheses(rest: str) -> str:
    """The text before the parenthesis that closes the one before `rest`."""
    depth = 1
    for place, character in enumerate(rest):
        depth += (character == "(") - (character == ")")
        if not depth:
            return rest[:place]
    return rest


def _walk(
    computations: Mapping[str, list[_Instruction]], name: str, times: int, trips: int
) -> Iterator[tuple[_Instruction, dict[str, str], int]]:
    """Every instruction that runs as a part of computation `name`, with the shapes there and how often."""
    shapes = {instruction.name: instruction.shapes for instruction in computations[name]}
    for instruction in computations[name]:
        yield instruction, shapes, times
        if instruction.opcode == "while":
            known = re.search(r'"known_trip_count":\{"n":"(\d+)"', instruction.line)
            count = int(known[1]) if known else trips
            yield from _walk(computations, _called(instruction, "body"), times * count, 1)
        elif instruction.opcode == "call":
            yield from _walk(computations, _called(instruction, "to_apply"), times, trips)
        elif instruction.opcode == "conditional":  # as if every branch ran
            for branch in _branches(instruction):
                yield from _walk(computations, branch, times, trips)
        elif instruction.opcode == "fusion":  # a collective may be fused
            for inner in computations.get(_called(instruction, "calls"), []):
                if inner.opcode.removesuffix("-start") in COLLECTIVES:
                    yield inner._replace(fused=True), {}, times


def _called(instruction: _Instruction, attribute: str) -> str:
    found = re.search(rf"{attribute}=%?([\w.\-]+)", instruction.line)
    return found[1] if found else ""


def _branches(instruction: _Instruction) -> list[str]:
    several = re.search(r"branch_computations=\{([^}]*)\}", instruction.line)
    if several:
        return [name.strip().removeprefix("%") for name in several[1].split(",")]
    return [_called(instruction, f"{choice}_computation") for choice in ("true", "false")]


def _received(instruction: _Instruction) -> int:
    """Bytes of the results of a collective. The start of an asynchronous one also returns its operands."""
    total = size_in_bytes(instruction.shapes)
    if instruction.opcode in ("all-gather-start", "collective-permute-start"):
        parts = re.match(r"\(\(?(.*?)\)?, \(?(.*)\)", instruction.shapes)
        return size_in_bytes(parts[2]) if parts else total
    return total


def _place(line: str) -> str:
    """The place of an operation in the model, from JAX's name for it.

    Example:
      >>> _place('metadata={op_name="jit(several)/while/body/closed_call/vmap(Client)/layer0/conv1/dot"}')
      'vmap(Client)/layer0/conv1/dot'
    """
    found = re.search(r'op_name="([^"]*)"', line)
    if not found:
        return ""
    parts = found[1].replace("\\'", "'").split("/")
    loops = ("while", "body", "closed_call")
    return "/".join(part for part in parts if part not in loops and not part.startswith("jit("))
