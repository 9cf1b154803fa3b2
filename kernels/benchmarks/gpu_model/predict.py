"""Predict the milliseconds of the product's kernels."""

# ruff: noqa: T201 - a command that prints

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

from gpu_model.harness import Launch
from gpu_model.record import PATTERN, PHASES, SHAPES, core_launches, parse_shape
from gpu_model.sim import COPY_RATE, LAUNCH_MS, Prediction, dram_share, kernel_time

_MAPS = {
    # Maps that a streaming kernel reads and writes, beside those that a launch asks for.
    "layer_norm_fwd_kernel": 1,
    "layer_norm_bwd_kernel": 3,
    "sum_buffers_kernel": 1,
}
_BACKWARD_RATE = 3.6e12
_BACKWARD_LAUNCH_MS = 0.004


def streaming_time(launch: Launch, shape: tuple[int, ...]) -> Prediction:
    """A kernel that reads and writes whole bfloat16 maps, from its bytes."""
    maps = _MAPS[launch.name]
    maps += launch.integers.get("parts", 0) + launch.integers.get("store_total", 0)
    maps += launch.options.get("COUNT", 0)
    backward = launch.name == "layer_norm_bwd_kernel"
    # The sum may be that of a part of the images.
    elements = launch.integers.get("size", math.prod(shape))
    seconds = elements * 2 * maps / (_BACKWARD_RATE if backward else COPY_RATE)
    return Prediction(seconds * 1e3 + (_BACKWARD_LAUNCH_MS if backward else LAUNCH_MS), 0.0, 0)


def main_steps(launch: Launch) -> int:
    """Iterations of a scan kernel's main loop in one program."""
    sizes, options = launch.integers, launch.options
    if launch.name == "low_rank_gradients_kernel":
        return math.ceil(sizes["channels"] / options["BLOCK_D"])
    if launch.name == "selective_scan_carry_kernel":
        return math.ceil(sizes["chunks"] / options["UNROLL"])
    return math.ceil(min(sizes["chunk"], sizes["length"]) / options["GROUP"])


def turns(launch: Launch) -> int:
    """Iterations of the loop within the main loop: turns of several states."""
    return launch.integers.get("turns", 1)


def scan_time(launch: Launch, shape: tuple[int, ...]) -> Prediction:
    """A scan kernel, from its machine code."""
    share = 0.1 if launch.name == "selective_scan_carry_kernel" else dram_share(shape)
    kernel = launch.compile()
    found = kernel_time(kernel, main_steps(launch), launch.programs, share, turns=turns(launch))
    return Prediction(found.ms + LAUNCH_MS, found.use, found.resident)


def predict(launch: Launch, shape: tuple[int, ...]) -> Prediction:
    """One of the product's launches at a shape."""
    return (streaming_time if launch.name in _MAPS else scan_time)(launch, shape)


def short_name(launch: Launch) -> str:
    return launch.name.replace("selective_scan_", "").replace("_kernel", "")


def _describe(launch: Launch, found: Prediction) -> str:
    text = f"{short_name(launch)} {found.ms:.3f}"
    if found.use:
        registers = launch.compile().registers
        text += f" (use {found.use:.2f}, {found.resident} resident, {registers} registers)"
    return text


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="gpu_model predict", description=__doc__)
    parser.add_argument("--shape", type=parse_shape, action="append", help="B,H,W,D; may repeat")
    parser.add_argument("--states", type=int, default=1)
    parser.add_argument("--pattern", default=PATTERN, help="of four directions")
    parser.add_argument("--save", type=Path, help="JSON file, for the acceptance run")
    args = parser.parse_args(argv)
    table = {}
    print("predicted, not measured; ms on an H200, bf16, without matrix products and small sums")
    for shape in args.shape or SHAPES:
        launches = core_launches(shape, args.states, args.pattern)
        totals = []
        for phase in PHASES:
            found = [(launch, predict(launch, shape)) for launch in launches[phase]]
            totals.append(round(sum(prediction.ms for _, prediction in found), 3))
            parts = ", ".join(_describe(*pair) for pair in found)
            print(f"{shape} {phase}: {totals[-1]:.3f} = {parts}", flush=True)
        table[",".join(map(str, shape))] = dict(zip(PHASES, totals, strict=True))
    if args.save:
        args.save.write_text(json.dumps(table, indent=2) + "\n")
