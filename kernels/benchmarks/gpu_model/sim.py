"""From a kernel's machine code to milliseconds: the trace, its addresses, and the model's runs."""

from __future__ import annotations

import math
import os
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from gpu_model.harness import PROCESSORS, Kernel, output_folder
from gpu_model.sass import Instruction, longest_loop, loops

CLOCK = 1.9e9
"""Cycles a second."""

L1_CYCLES = 38
L2_CYCLES = 300
DRAM_CYCLES = 750
"""Cycles from a load to its data: the last two are what was fitted to measured times."""

L2_BYTES_PER_CYCLE = 22.0
DRAM_BYTES_PER_CYCLE = 16.9
"""Of one multiprocessor; the second is the measured copy rate, 4.23 TB/s, shared by all."""

COPY_RATE = 4.2e12
"""Bytes a second of a streaming kernel, which is priced and not replayed."""

LAUNCH_MS = 0.003
"""What a kernel takes besides its work."""

_REGISTERS, _WARPS, _BLOCKS, _SHARED = 65536, 64, 32, 228 * 1024
"""Of one multiprocessor; a block takes one KiB of shared memory more than it asks for."""

# The order of Pipe in sim.cpp.
_PIPES = (
    "FMA",
    "ALU",
    "IMAD",
    "MUFU",
    "LDG",
    "STG",
    "LDS",
    "STS",
    "SHUFFLE",
    "CONTROL",
    "BARRIER",
    "CONSTANT",
    "MMA",
    "FP64",
    "MISC",
)
_LATENCY = {
    "MUFU": 22,
    "LDS": 30,
    "STS": 20,
    "SHUFFLE": 24,
    "CONSTANT": 40,
    "MISC": 24,
    "MMA": 34,
    "FP64": 48,
    "CONTROL": 6,
    "BARRIER": 20,
}
_OTHER_LATENCY = 6


@dataclass(frozen=True)
class Replay:
    """What the model says of blocks on one multiprocessor."""

    cycles: float
    issued: int

    @property
    def use(self) -> float:
        """Share of the issue slots that are used."""
        return self.issued / self.cycles / 4


@dataclass(frozen=True)
class Prediction:
    """Of one launch."""

    ms: float
    use: float
    """Share of the issue slots that are used; 0 for a kernel that was priced by its traffic."""
    resident: int
    """Blocks on a multiprocessor."""


def dram_share(shape: Sequence[int]) -> float:
    """Share of loads that miss L2, from the size of one bfloat16 map against 50 MB of L2."""
    megabytes = math.prod(shape) * 2 / 1e6
    for limit, share in ((60, 1.0), (30, 0.8), (15, 0.5)):
        if megabytes > limit:
            return share
    return 0.15


def resident_blocks(kernel: Kernel) -> int:
    """Blocks of a kernel that a multiprocessor holds."""
    registers = math.ceil(kernel.registers / 8) * 8 * 32 * kernel.warps
    limits = [_REGISTERS // registers, _WARPS // kernel.warps, _BLOCKS]
    if kernel.shared:
        limits.append(_SHARED // (kernel.shared + 1024))
    return min(limits)


def unroll_trace(
    instructions: Sequence[Instruction], iterations: dict[int, int]
) -> tuple[list[int], list[tuple[int, int]]]:
    """Indices of the instructions that a warp executes, and the loops.

    Forward branches are taken to fall through and predicated instructions to be issued.

    Args:
        instructions: Of a kernel.
        iterations: By a loop's number, in the order of :func:`loops`; others have one.
    """
    found = loops(instructions)
    last_start = found[-1][1] if found else 0
    exits = (
        i
        for i, instruction in enumerate(instructions)
        if instruction.opcode.startswith("EXIT") and not instruction.predicate and i > last_start
    )

    def walk(first: int, last: int, around: tuple[int, int] | None) -> list[int]:
        trace, i = [], first
        while i <= last:
            inner = [loop for loop in found if loop[0] == i and loop != around and loop[1] <= last]
            if not inner:
                trace.append(i)
                i += 1
                continue
            loop = max(inner, key=lambda loop: loop[1])
            trace += walk(*loop, loop) * max(iterations.get(found.index(loop), 1), 1)
            i = loop[1] + 1
        return trace

    return walk(0, next(exits, len(instructions) - 1), None), found


_NOTHING_WRITTEN = {
    "STG",
    "STS",
    "STL",
    "BRA",
    "EXIT",
    "BAR",
    "NOP",
    "RED",
    "WARPSYNC",
    "BSYNC",
    "BSSY",
}
_MEMORY = {"LDG", "STG", "LDS", "STS", "RED", "ATOM"}
_SECOND_PREDICATE = {"ISETP", "FSETP", "PLOP3", "UISETP", "DSETP", "HSETP2", "LOP3"}
_CARRY = {"LEA", "IADD3", "UIADD3", "ULEA", "IMAD", "UIMAD"}
_ALWAYS_NEW = {"LDG", "LDS", "LDL", "S2R", "MUFU", "SHFL"}
_CONSTANT_REGISTERS = {"RZ", "URZ", "PT", "UPT"}
_REGISTER = re.compile(r"\b(U?R\d+|U?P\d|RZ|URZ|PT|UPT)\b")
_ADDRESS_REGISTER = re.compile(r"U?R\d+")


class _Values:
    """Registers' numbers, equal where they hold the same value, and whether lanes differ in it."""

    def __init__(self):
        self._numbers: dict[str, int] = {}
        self._by_expression: dict[tuple, int] = {}
        self._differs: dict[str, bool] = {}
        self._next = 1

    def number(self, register: str) -> int:
        if register in _CONSTANT_REGISTERS:
            return 0
        if register not in self._numbers:
            self._numbers[register] = self._take(1)
        return self._numbers[register]

    def differs(self, registers: Sequence[str]) -> bool:
        return any(self._differs.get(register, False) for register in registers)

    def _take(self, count: int) -> int:
        first = self._next
        self._next += count
        return first

    def write(
        self, expression: tuple, registers: Sequence[str], width: int, differs: bool, keeps: bool
    ) -> None:
        """Give the result of an expression to registers, ``width`` in a row from each.

        Args:
            expression: What is computed.
            registers: Where it goes.
            width: How many registers it takes.
            differs: Whether it differs from lane to lane.
            keeps: Whether a predicate may keep what was there.
        """
        if expression not in self._by_expression:
            self._by_expression[expression] = self._take(8)
        number = self._by_expression[expression]
        for register in registers:
            if register in _CONSTANT_REGISTERS:
                continue
            if not _ADDRESS_REGISTER.fullmatch(register):
                self._numbers[register], self._differs[register] = number + 5, differs
                continue
            prefix = register.rstrip("0123456789")
            first = int(register[len(prefix) :])
            for i in range(width):
                name = f"{prefix}{first + i}"
                self._numbers[name] = number + i
                self._differs[name] = differs or (keeps and self._differs.get(name, False))


def addresses(
    instructions: Sequence[Instruction], trace: Sequence[int]
) -> list[tuple[tuple | None, bool]]:
    """What identifies the address of every memory access of a trace; whether lanes differ in it.

    Two accesses with one key have one address: the registers were computed by the same operations
    from the same values, and the offset is the same.
    """
    values = _Values()
    result = []
    for step, i in enumerate(trace):
        instruction = instructions[i]
        opcode, base = instruction.opcode, instruction.base
        body = re.sub(r"^@!?U?P\w+\s+", "", instruction.text).replace(".reuse", "")
        operands = [o.strip() for o in re.split(r",(?![^\[]*\])", body[len(opcode) :])]
        key, differs = None, False
        address = next((o for o in operands if "[" in o and "R" in o), None)
        if base in _MEMORY and address:
            inner = re.search(r"\[([^\]]*)\]", re.sub(r"desc\[UR\d+\]", "", address))[1]
            registers = _ADDRESS_REGISTER.findall(inner)
            offset = re.search(r"[+-]0x[0-9a-f]+", inner)
            offset = int(offset[0], 16) if offset else 0
            key = (tuple(values.number(register) for register in registers), offset)
            differs = values.differs(registers)
        result.append((key, differs))
        if base not in _NOTHING_WRITTEN:
            _write_result(values, instruction, operands, step)
    return result


def _write_result(
    values: _Values, instruction: Instruction, operands: list[str], step: int
) -> None:
    opcode, base = instruction.opcode, instruction.base
    written, rest = _REGISTER.findall(operands[0])[:1], operands[1:]
    if base in _SECOND_PREDICATE and rest and re.fullmatch(r"U?P(T|\d)", rest[0]):
        written, rest = written + _REGISTER.findall(rest[0]), rest[1:]
    if base in _CARRY and rest and re.fullmatch(r"U?P\d", rest[0]):
        written, rest = written + _REGISTER.findall(rest[0]), rest[1:]
    read = [register for operand in rest for register in _REGISTER.findall(operand)]
    if base in ("LDG", "LDS", "LDC", "ULDC", "LDL"):
        width = 4 if ".128" in opcode else 2 if ".64" in opcode else 1
    else:
        width = 2 if ".WIDE" in opcode or ".64" in opcode else 1
    lane = base == "S2R" and ("TID" in instruction.text or "LANE" in instruction.text)
    differs = (lane or values.differs(read)) and base not in ("LDG", "LDS", "LDL")
    condition = ()
    if instruction.predicate:
        register = re.match(r"@!?(U?P\w+)", instruction.predicate)[1]
        condition = (instruction.predicate, values.number(register))
    form = re.sub(r"U?R\d+|U?P\d", "r", ",".join(rest))
    expression = (opcode, form, tuple(values.number(register) for register in read), condition)
    if base in _ALWAYS_NEW or (instruction.predicate and written):
        expression += (step,)
    values.write(expression, written, width, differs, bool(instruction.predicate))


def _pipe(instruction: Instruction) -> str:
    family, base = instruction.family, instruction.base
    if base == "BAR":
        return "BARRIER"
    if family == "CONVERT":
        return "ALU" if base in ("F2FP", "I2FP") else "MUFU"
    if family == "LOCAL":
        return "LDG" if base == "LDL" else "STG"
    if base in ("S2UR", "R2UR", "S2R", "CS2R"):
        return "MISC"
    if family == "SYNC":
        return "CONTROL"
    return family if family in _PIPES else "ALU"


def _access_bytes(opcode: str) -> int:
    sizes = {".128": 16, ".64": 8, "U16": 2, "S16": 2, "U8": 1}
    return next((size for mark, size in sizes.items() if mark in opcode), 4)


@cache
def _program() -> Path:
    """The compiled sim.cpp."""
    source = Path(__file__).with_name("sim.cpp")
    program = output_folder() / "sim"
    if not program.exists() or program.stat().st_mtime < source.stat().st_mtime:
        # Renamed when it is whole: another process may want it at the same time.
        new = program.with_name(f"sim.{os.getpid()}")
        subprocess.run(["g++", "-O2", "-std=c++17", "-o", new, source], check=True)
        new.replace(program)
    return program


def replay(
    kernel: Kernel,
    iterations: dict[int, int],
    blocks: int,
    share: float,
    lanes: float = 1.0,
    trace_file: Path | None = None,
) -> Replay:
    """Run blocks on one multiprocessor.

    Args:
        kernel: The machine code.
        iterations: As :func:`unroll_trace` takes them.
        blocks: How many blocks, of which as many as fit are resident.
        share: Of the loads that go to DRAM.
        lanes: Share of a warp's lanes that are inside the map.
        trace_file: Where the cycles of one warp's instructions go.
    """
    instructions = kernel.instructions
    trace, _ = unroll_trace(instructions, iterations)
    keys: dict[tuple, int] = {}
    records: dict[tuple, int] = {}
    steps = []
    for step, (i, (address, differs)) in enumerate(
        zip(trace, addresses(instructions, trace), strict=True)
    ):
        instruction = instructions[i]
        pipe = _pipe(instruction)
        key, sectors = -1, 1
        if pipe in ("LDG", "STG") and address is not None:
            registers, offset = address
            if differs:
                sectors = max(1, math.ceil(_access_bytes(instruction.opcode) * lanes))
            else:
                offset //= 32
            key = keys.setdefault((registers, offset), len(keys) + 1)
        elif pipe in ("LDS", "STS", "SHUFFLE") and (differs or pipe != "LDS"):
            sectors = 4 if ".128" in instruction.opcode else 2 if ".64" in instruction.opcode else 1
        jumps = instruction.opcode.startswith("BRA") and trace[step + 1 : step + 2] <= [i]
        record = (
            _PIPES.index(pipe),
            instruction.stall,
            instruction.write_barrier,
            instruction.read_barrier,
            instruction.wait,
            key,
            sectors,
            int(jumps and step + 1 < len(trace)),
            _LATENCY.get(pipe, _OTHER_LATENCY),
        )
        steps.append(records.setdefault(record, len(records)))
    resident = max(1, min(resident_blocks(kernel), blocks))
    lines = [
        (len(records), len(steps), kernel.warps, resident, blocks),
        (L1_CYCLES, L2_CYCLES, DRAM_CYCLES, L2_BYTES_PER_CYCLE, DRAM_BYTES_PER_CYCLE, share),
        *records,
        *((record,) for record in steps),
    ]
    run = subprocess.run(
        [_program(), *([trace_file] if trace_file else [])],
        input="\n".join(" ".join(map(str, line)) for line in lines),
        capture_output=True,
        text=True,
        check=False,
    )
    if run.returncode:
        raise RuntimeError(f"{kernel.name}: {run.stderr.strip()} (status {run.returncode})")
    cycles, issued = run.stdout.split()
    return Replay(float(cycles), int(issued))


def loop_counts(kernel: Kernel, iterations: int, turns: int = 1) -> dict[int, int]:
    """Iterations by loop, as :func:`unroll_trace` takes them.

    Args:
        kernel: The machine code.
        iterations: Of the main loop, the longest.
        turns: Of the last innermost loop within it; half as many of those before, in which the
            backward walk finds the states that are not saved, at every second step.
    """
    found = loops(kernel.instructions)
    main = longest_loop(kernel.instructions)
    if main is None:
        return {}
    first, last = found[main]
    inner = [
        i
        for i, (start, end) in enumerate(found)
        if first < start and end < last and not any(start < a and b < end for a, b in found)
    ]
    # All but the last find states, before every second step.
    counts = {i: max(turns // 2, 1) for i in inner[:-1]}
    return {main: iterations, **counts, **dict.fromkeys(inner[-1:], turns)}


def kernel_time(
    kernel: Kernel,
    steps: int,
    programs: int,
    share: float,
    lanes: float = 1.0,
    turns: int = 1,
) -> Prediction:
    """Milliseconds of a launch, without :data:`LAUNCH_MS`, from short runs that are extrapolated.

    The main loop is the longest.

    Args:
        kernel: The machine code.
        steps: Iterations of its main loop.
        programs: Blocks of the whole grid.
        share: Of the loads that go to DRAM.
        lanes: Share of a warp's lanes that are inside the map.
        turns: As :func:`loop_counts` takes it.
    """
    resident = resident_blocks(kernel)
    each = programs / PROCESSORS

    def run(iterations: int, blocks: int) -> Replay:
        counts = loop_counts(kernel, iterations, turns)
        return replay(kernel, counts, blocks, share, lanes)

    if each <= resident:
        # One wave: the busiest multiprocessor counts; iterations are extrapolated.
        few, many = min(steps, max(16 // turns, 4)), min(steps, max(40 // turns, 8))
        last = run(many, math.ceil(each))
        cycles = last.cycles
        if many > few:
            slope = (last.cycles - run(few, math.ceil(each)).cycles) / (many - few)
            cycles += slope * (steps - many)
    else:
        # Several: blocks are extrapolated, and iterations taken in proportion.
        simulated = min(steps, max(60 // turns, 8))
        if each < 4 * resident:
            last = run(simulated, math.ceil(each))
            cycles = last.cycles
        else:
            last = run(simulated, 4 * resident)
            slope = (last.cycles - run(simulated, 2 * resident).cycles) / (2 * resident)
            cycles = last.cycles + slope * (each - 4 * resident)
        cycles *= steps / simulated
    return Prediction(cycles / CLOCK * 1e3, last.use, min(resident, math.ceil(each)))
