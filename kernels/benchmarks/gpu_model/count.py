"""Count launches, registers, instructions, and the distinct kernels that a model compiles."""

# ruff: noqa: T201 - a command that prints

from __future__ import annotations

import argparse
from collections import Counter
from itertools import product

import torch

from gpu_model.harness import Launch
from gpu_model.predict import short_name
from gpu_model.record import SHAPES, core_launches, model_launches, parse_shape
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


def count_distinct() -> None:
    """Print how many kernels the JIT compiles for VMamba-T; nothing is compiled for it."""
    wide = torch.float32
    known: set[str] = set()
    for title, *arguments in (
        ("inference 128x224", 128, 224, False),
        ("inference 1x224", 1, 224, False),
        ("inference 2x800", 2, 800, False),
        ("inference 1x1024", 1, 1024, False),
        ("training 128x224", 128, 224, True),
        ("training 2x800", 2, 800, True),
        ("training 128x224, fp32 stream", 128, 224, True, wide),
    ):
        names = {launch.key: short_name(launch) for launch in model_launches(*arguments)}
        new = Counter(name for key, name in names.items() if key not in known)
        known |= set(names)
        print(f"{title}: {len(names)} distinct, {sum(new.values())} new {dict(new)}", flush=True)
    sizes = product((1, 2), range(448, 1345, 32))
    many = {launch.key for size in sizes for launch in model_launches(*size, False)}
    print(f"inference at 448, 480 ... 1344, batch 1 and 2: {len(many)} distinct")


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="gpu_model count", description=__doc__)
    parser.add_argument("--shape", type=parse_shape, action="append", help="B,H,W,D; may repeat")
    parser.add_argument("--states", type=int, default=1)
    parser.add_argument("--distinct", action="store_true", help="distinct kernels of VMamba-T")
    args = parser.parse_args(argv)
    if args.distinct:
        count_distinct()
        return
    for shape in args.shape or SHAPES:
        for phase, launches in core_launches(shape, args.states).items():
            print(f"{shape} {phase}: {len(launches)} launches")
            for launch in launches:
                print("   ", describe(launch), flush=True)
