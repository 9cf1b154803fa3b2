"""Where one warp of a kernel waits in an iteration of its main loop, other warps running too."""

# ruff: noqa: T201 - a command that prints

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from gpu_model.harness import PROCESSORS, Kernel, Launch
from gpu_model.predict import short_name, turns
from gpu_model.record import PHASES, SHAPES, core_launches, parse_shape
from gpu_model.sass import Instruction, longest_loop, loops
from gpu_model.sim import dram_share, loop_counts, replay, resident_blocks, unroll_trace

_ITERATIONS, _PROFILED = 6, 3
"""Of the main loop: how many run, and which one (from 0) is looked at."""

_EXPOSED = 100
"""Cycles from which a wait for a load counts as an exposed one."""


class Wait(NamedTuple):
    """Cycles that an instruction waited beyond the stall counts."""

    cycles: float
    step: int
    producer: str
    """Family of what it waited for; ISSUE where it was a pipe or another warp's turn."""


def _producer(instructions: Sequence[Instruction], trace: Sequence[int], step: int) -> str:
    """The family that is the slowest among those whose barriers a step waits for."""
    wait = instructions[trace[step]].wait
    families = set()
    for barrier in range(6):
        if wait >> barrier & 1:
            for i in reversed(trace[:step]):
                before = instructions[i]
                if barrier in (before.write_barrier, before.read_barrier):
                    families.add(before.family)
                    break
    order = ("LDG", "STG", "LOCAL", "LDS", "SHUFFLE", "MUFU", "CONVERT")
    return next((f for f in order if f in families), "OTHER" if families else "ISSUE")


def profile(
    kernel: Kernel, blocks: int, share: float, loop: int, states: int
) -> tuple[float, int, list[Wait]]:
    """Cycles and instructions of an iteration, and the waits in it, the longest first."""
    iterations = loop_counts(kernel, _ITERATIONS, states)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.txt"
        replay(kernel, iterations, blocks, share, trace_file=file)
        lines = file.read_text().splitlines()
    instructions = kernel.instructions
    trace, _ = unroll_trace(instructions, iterations)
    at: list[float] = []
    for line in lines[: len(trace)]:
        at.append(float(line.split()[1]))
    first = loops(instructions)[loop][0]
    starts = [step for step, i in enumerate(trace) if i == first]
    begin, end = starts[_PROFILED : _PROFILED + 2]
    waits = []
    for step in range(begin, end):
        stall = max(1, instructions[trace[step - 1]].stall)
        extra = at[step] - at[step - 1] - stall
        if extra > 0:
            waits.append(Wait(extra, step, _producer(instructions, trace, step)))
    return at[end] - at[begin], end - begin, sorted(waits, reverse=True)


def exposed(waits: Sequence[Wait]) -> int:
    """How often a warp waits for memory so long that others do not hide it."""
    return sum(wait.producer == "LDG" and wait.cycles >= _EXPOSED for wait in waits)


def profile_launch(launch: Launch, share: float) -> tuple[float, int, list[Wait]]:
    """:func:`profile` of the main loop, with the blocks that a multiprocessor gets of a launch."""
    kernel = launch.compile()
    loop = longest_loop(kernel.instructions)
    if loop is None:
        raise SystemExit(f"{kernel.name} has no loop")
    return profile(kernel, resident_share(launch), share, loop, turns(launch))


def resident_share(launch: Launch) -> int:
    """Blocks of a launch on one multiprocessor at a time."""
    return min(resident_blocks(launch.compile()), math.ceil(launch.programs / PROCESSORS))


def report(launch: Launch, share: float, top: int) -> None:
    """Print a profile of a kernel's main loop."""
    cycles, count, waits = profile_launch(launch, share)
    kernel = launch.compile()
    instructions = kernel.instructions
    trace, _ = unroll_trace(instructions, loop_counts(kernel, _ITERATIONS, turns(launch)))
    totals: dict[str, float] = {}
    for wait in waits:
        totals[wait.producer] = totals.get(wait.producer, 0) + wait.cycles
    parts = ", ".join(f"{name} {total:.0f}" for name, total in totals.items())
    print(f"{kernel.name}: {kernel.registers} registers, {resident_share(launch)} blocks")
    print(f"an iteration of a warp: {cycles:.0f} cycles, {count} instructions; waits: {parts}")
    print(f"exposed memory waits (>= {_EXPOSED} cycles) an iteration: {exposed(waits)}")
    for wait in waits[:top]:
        instruction = instructions[trace[wait.step]]
        print(
            f"{wait.cycles:6.0f} cycles for {wait.producer:7s} "
            f"{instruction.address:05x} {instruction.text}"
        )


def _choose(launches: dict[str, list[Launch]], name: str, phase: str) -> Launch:
    found = [launch for launch in launches[phase] if short_name(launch) == name]
    if not found:
        names = sorted({short_name(launch) for launch in launches[phase]})
        raise SystemExit(f"{phase} launches {', '.join(names)}, not {name}")
    return found[0]


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="gpu_model profile", description=__doc__)
    parser.add_argument("kernel", help="state, carry, fwd or bwd")
    parser.add_argument("--shape", type=parse_shape, default=SHAPES[0], help="B,H,W,D")
    parser.add_argument("--states", type=int, default=1)
    parser.add_argument("--phase", choices=PHASES, help="by default the last with the kernel")
    parser.add_argument("--top", type=int, default=18, help="waits to print")
    args = parser.parse_args(argv)
    launches = core_launches(args.shape, args.states)
    phases = [p for p in PHASES if args.kernel in map(short_name, launches[p])]
    launch = _choose(launches, args.kernel, args.phase or (phases or PHASES)[-1])
    report(launch, dram_share(args.shape), args.top)
