#!/usr/bin/env python
"""Draws the paths of VMamba's scan patterns and compares what they cost. See `--help`."""

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress

from mmvmamba.analysis.inspection import save_figure
from mmvmamba.analysis.passes import PRECISIONS, Case
from mmvmamba.analysis.reports import append_csv, check_csv, machine
from mmvmamba.analysis.scan_patterns import (
    Comparison,
    compare_patterns,
    draw_patterns,
    path_positions,
    paths_of,
    pattern_table,
)
from mmvmamba.analysis.throughput import ROUNDS
from mmvmamba.engine.cli import run_command
from mmvmamba.engine.errors import UsageError
from mmvmamba.models.ss2d import SCANS, find_scan

CONFIG = "configs/vmamba/vmamba-tiny-s1l8_8xb128_in1k.py"
GPU_BATCHES, CPU_BATCHES = (128, 128), (1, 2)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Draw the paths of each scan pattern on a grid, or compare speed and "
        "memory of the patterns, with and without depth-wise convolution (paper, table 10)."
    )
    parser.add_argument(
        "--scans",
        nargs="+",
        type=_scan,
        default=list(SCANS),
        metavar="SCAN",
        help="cross2d, unidi, bidi, cascade2d (all by default), snake, diagonal, hilbert, window7 "
        "or atrous2 (or another number)",
    )
    draw = parser.add_argument_group("the picture")
    draw.add_argument(
        "--grid", type=int, nargs=2, default=[6, 6], metavar=("H", "W"), help="(default: 6 6)"
    )
    draw.add_argument(
        "--out",
        type=Path,
        default=Path("scan_patterns.png"),
        help="the picture; the order of positions goes to a .npz file beside it",
    )
    compare = parser.add_argument_group("the comparison")
    compare.add_argument("--compare", action="store_true", help="measure instead of drawing")
    compare.add_argument(
        "--config", default=CONFIG, help="a config of any task with VMamba (default: VMamba-T's)"
    )
    compare.add_argument("--size", type=int, nargs="+", default=[224])
    compare.add_argument("--precision", choices=PRECISIONS, default="fp32")
    compare.add_argument(
        "--batch",
        type=int,
        nargs=2,
        metavar=("INFERENCE", "TRAINING"),
        help=f"(default: {GPU_BATCHES}, on the CPU {CPU_BATCHES})",
    )
    compare.add_argument("--seconds", type=float, default=5.0, help="for each figure (default: 5)")
    compare.add_argument("--rounds", type=int, default=ROUNDS, help="turns it is split in")
    compare.add_argument("--csv", type=Path, help="append the results to this file")
    compare.add_argument(
        "--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu"
    )
    options = parser.parse_args(arguments)
    if len(options.size) > 2 or min(*options.size, *options.grid, *(options.batch or ())) < 1:
        parser.error("--size, --grid and --batch take positive numbers, --size one or two")
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")
    return options


def _scan(name: str) -> str:
    try:
        return find_scan(name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def draw(options: argparse.Namespace) -> None:
    height, width = options.grid
    save_figure(draw_patterns(options.scans, height, width), options.out)
    arrays = {
        f"{scan}_{k + 1}": path_positions(path, height, width)
        for scan in options.scans
        for k, path in enumerate(paths_of(scan))
    }
    np.savez_compressed(options.out.with_suffix(".npz"), **arrays)
    Console().print(f"drawn into {options.out}, arrays in {options.out.with_suffix('.npz')}")


def compare(options: argparse.Namespace) -> None:
    size = (*options.size, *options.size)[:2]
    default = GPU_BATCHES if options.device.type == "cuda" else CPU_BATCHES
    inference, training = (
        Case(passes, options.precision, batch, size)
        for passes, batch in zip(("inference", "training"), options.batch or default, strict=True)
    )
    variants = list(itertools.product(options.scans, (True, False)))
    variants.sort(key=lambda variant: not variant[1])
    about = machine(options.device)
    if options.csv:
        # Refused before anything is measured rather than after it.
        check_csv(options.csv, [*Comparison.columns(), *about])
    console = Console()
    console.print(", ".join(f"{key} {value}" for key, value in about.items()), highlight=False)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=len(variants) * 2 * (1 + options.rounds))
        found = compare_patterns(
            options.config,
            variants,
            inference,
            training,
            options.device,
            options.seconds,
            options.rounds,
            lambda name: progress.update(task, advance=1, description=name),
        )
    console.print(pattern_table(found).rich())
    if options.csv:
        append_csv(options.csv, [one.row() | about for one in found])
    failed = sum(bool(one.failure) for one in found)
    if failed:
        raise UsageError(f"{failed} of {len(found)} variants failed, see above.")


def main() -> None:
    options = parse_arguments()
    run_command(lambda: (compare if options.compare else draw)(options), quiet=True)


if __name__ == "__main__":
    main()
