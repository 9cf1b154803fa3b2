"""Predict kernels that were measured on an H200, and print both."""

# ruff: noqa: T201 - a command that prints

from __future__ import annotations

import argparse
import math

from gpu_model.record import (
    SERIAL,
    SHAPES,
    TILES_MS,
    TILES_SETTINGS,
    parse_shape,
    serial_launches,
    tiles_launches,
)
from gpu_model.sim import COPY_RATE, LAUNCH_MS, dram_share, kernel_time


def serial_scans(shape: tuple[int, ...]) -> tuple[float, list[str]]:
    """Predicted milliseconds of the serial sketch's scans, and a description of each."""
    setting = SERIAL[shape]
    total, parts = 0.0, []
    for launch in serial_launches(shape):
        if launch.name != "seq_kernel":
            continue
        positions = setting.chunk if setting.mode == "chunk" else launch.integers["L"]
        found = kernel_time(
            kernel=launch.compile(),
            steps=math.ceil(positions / setting.unroll),
            programs=launch.programs,
            share=dram_share(shape),
            lanes=shape[3] / (launch.grid[0] * setting.block),
        )
        total += found.ms
        parts.append(f"{found.ms:.3f} use {found.use:.2f}")
    return total, parts


def tiles_core(shape: tuple[int, ...], chunk: int, block: int, warps: int) -> float:
    """Predicted milliseconds of the tiles sketch's whole core, without the host's time."""
    elements, channels = math.prod(shape), shape[3]
    columns = 4 * (-(-channels // 16) + 2)
    product_bytes = elements // channels * (channels + columns) * 2
    total = product_bytes / COPY_RATE * 1e3 + LAUNCH_MS
    for launch in tiles_launches(shape, chunk, block, warps):
        if launch.name == "merge_ln_kernel":
            total += elements * 2 * 3 / COPY_RATE * 1e3 + LAUNCH_MS
            continue
        chunks = -(-shape[1] * shape[2] // chunk)
        steps = -(-chunks // launch.options["NB"]) if launch.name == "carry_kernel" else 1
        found = kernel_time(launch.compile(), steps, launch.programs, dram_share(shape))
        total += found.ms + LAUNCH_MS
    return total


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="gpu_model calibrate", description=__doc__)
    parser.add_argument("--shape", type=parse_shape, action="append", help="B,H,W,D; may repeat")
    parser.add_argument(
        "--tiles", action="store_true", help="the tiles sketch, to which nothing was fitted"
    )
    args = parser.parse_args(argv)
    for shape in args.shape or SHAPES:
        if args.tiles:
            found = min(tiles_core(shape, *setting) for setting in TILES_SETTINGS)
            measured, parts = TILES_MS[shape], []
        else:
            found, parts = serial_scans(shape)
            measured = SERIAL[shape].scan_ms
        print(
            f"{shape} predicted {found:.3f} measured {measured:.3f} ratio {found / measured:.2f}",
            *parts,
            flush=True,
        )
