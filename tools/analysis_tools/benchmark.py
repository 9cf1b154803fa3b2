#!/usr/bin/env python
"""Times VMamba beside other backbones in one run. See `--help`."""

import argparse
import csv
import os
import platform
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from mmvmamba.analysis.throughput import PASSES, PRECISIONS, Case, Result, measure

PEERS = ("swin_tiny_patch4_window7_224", "convnext_tiny")


def parse_arguments() -> argparse.Namespace:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        description="Time classifiers, every one in the same modes, and give their ratio to the "
        "first."
    )
    parser.add_argument(
        "models",
        nargs="*",
        default=["tiny", *PEERS],
        help=f"archs of VMamba and models of timm (default: tiny {' '.join(PEERS)})",
    )
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=list(PASSES))
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=["fp32"])
    parser.add_argument(
        "--batch", type=int, help="images in a batch (128; on the CPU 1, in training 4)"
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=[224], help="sides of the images")
    parser.add_argument("--compile", action="store_true", help="through torch.compile")
    parser.add_argument("--device", default="cuda" if gpu else "cpu")
    parser.add_argument("--seconds", type=float, default=5.0, help="time for each measurement")
    parser.add_argument("--csv", type=Path, help="append the results to this file")
    return parser.parse_args()


def cases(options: argparse.Namespace) -> list[Case]:
    def batch(passes: str) -> int:
        if options.batch:
            return options.batch
        return 128 if options.device.startswith("cuda") else {"inference": 1, "training": 4}[passes]

    return [
        Case(passes, precision, batch(passes), size, options.compile)
        for passes in options.passes
        for precision in options.precision
        for size in options.sizes
    ]


def machine(device: torch.device) -> dict[str, str]:
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    return {"device": name, "torch": torch.__version__, "load": f"{os.getloadavg()[0]:.1f}"}


def show(results: list[Result], about: dict[str, str]) -> None:
    table = Table(title=", ".join(f"{key} {value}" for key, value in about.items()))
    for title in ("pass", "precision", "batch", "size", "model", "params (M)"):
        table.add_column(title)
    for title in ("ms", "p20-p80", "images/s", "x first", "peak GB"):
        table.add_column(title, justify="right")
    first: dict[Case, Result] = {}
    for result in results:
        case = result.case
        reference = first.setdefault(case, result)
        table.add_row(
            case.passes,
            case.precision + (", compiled" if case.compiled else ""),
            str(case.batch),
            str(case.size),
            result.model,
            f"{result.params / 1e6:.1f}",
            f"{result.seconds * 1e3:.1f}",
            f"{result.p20 * 1e3:.1f}-{result.p80 * 1e3:.1f}",
            f"{result.images_per_second:.1f}",
            f"{result.images_per_second / reference.images_per_second:.2f}",
            "-" if result.peak_gb is None else f"{result.peak_gb:.2f}",
        )
    Console().print(table)


def append(file: Path, results: list[Result], about: dict[str, str]) -> None:
    rows = [result.row() | about for result in results]
    file.parent.mkdir(parents=True, exist_ok=True)
    new = not file.is_file()
    with file.open("a", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, rows[0])
        if new:
            writer.writeheader()
        writer.writerows(rows)


def main() -> None:
    options = parse_arguments()
    device = torch.device(options.device)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    todo = [(case, name) for case in cases(options) for name in options.models]
    results = []
    with Progress(transient=True) as progress:
        task = progress.add_task("", total=len(todo))
        for case, name in todo:
            progress.update(task, description=f"{name}, {case.passes}, {case.size}")
            results.append(measure(name, case, device, options.seconds))
            progress.advance(task)
    about = machine(device)
    show(results, about)
    if options.csv:
        append(options.csv, results, about)


if __name__ == "__main__":
    main()
