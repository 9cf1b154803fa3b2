"""Count launches, registers and instructions."""

# ruff: noqa: T201 - a command that prints

from __future__ import annotations

import argparse
from collections import Counter

from gpu_model.harness import Launch
from gpu_model.predict import short_name
from gpu_model.record import SHAPES, core_launches, parse_shape
from gpu_model.sass import longest_loop, loops


def describe(launch: Launch) -> str:
    """Resources of a launch's kernel, and the instructions of its main loop by family."""
    kernel = launch.compile()
    text = (
        f"{short_name(launch):14s} programs {launch.programs:6d} warps {kernel.warps} registers "
        f"{kernel.registers:3d} stack {kernel.stack} shared {kernel.shared} compiled in "
        f"{kernel.seconds:.1f} s, instructions {len(kernel.instructions)}"
    )
    loop = longest_loop(kernel.instructions)
    if loop is None:
        return text
    first, last = loops(kernel.instructions)[loop]
    body = kernel.instructions[first : last + 1]
    families = Counter(instruction.family for instruction in body)
    text += f", main loop {len(body)}"
    group = launch.options.get("GROUP")
    if group:
        each = len(body) / group / launch.options["BLOCKS"]
        text += f" ({each:.1f} a position and 32 channels)"
    return text + f": {', '.join(f'{name} {n}' for name, n in families.most_common())}"


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="gpu_model count", description=__doc__)
    parser.add_argument("--shape", type=parse_shape, action="append", help="B,H,W,D; may repeat")
    parser.add_argument("--states", type=int, default=1)
    args = parser.parse_args(argv)
    for shape in args.shape or SHAPES:
        for phase, launches in core_launches(shape, args.states).items():
            print(f"{shape} {phase}: {len(launches)} launches")
            for launch in launches:
                print("   ", describe(launch), flush=True)
