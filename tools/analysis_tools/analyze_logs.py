#!/usr/bin/env python
"""Shows what trainings logged. See `--help`.

Upstream's tools of this name take one task's logs each, ask for a package (seaborn) that nothing
else here needs, and leave a training that was resumed in pieces.
"""

import argparse
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from mmvmamba.analysis.curves import curve, metrics, plot, read_log
from mmvmamba.engine.cli import run_command


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Summarise the logs of trainings of any task: times, losses and metrics; draw "
        "any logged value over the iterations."
    )
    parser.add_argument(
        "logs", nargs="+", type=Path, help="work directories, or scalars.json files"
    )
    parser.add_argument(
        "--keys", nargs="+", default=["loss"], help="what is drawn, by its name in the log"
    )
    parser.add_argument("--plot", type=Path, help="draw --keys into this picture")
    parser.add_argument("--title", default="", help="a line above the picture")
    return parser.parse_args()


def summary(path: Path, lines: list[dict]) -> Table:
    """Times, the loss and the metrics of one training."""
    table = Table(title=str(path))
    table.add_column("value", no_wrap=True)
    for title in ("last", "smallest", "largest", "median", "logged"):
        table.add_column(title, justify="right")
    trained = any("loss" in line for line in lines)
    for name in (*(("loss", "lr", "time", "data_time") if trained else ()), *metrics(lines)):
        if not any(name in line for line in lines):
            continue
        _, values = curve(lines, name)
        if len(values):
            statistics = (values[-1], values.min(), values.max(), np.median(values))
            table.add_row(name, *(f"{value:.4g}" for value in statistics), str(len(values)))
    return table


def analyze(options: argparse.Namespace) -> None:
    console = Console(highlight=False)
    logs = {path: read_log(path) for path in options.logs}
    for path, lines in logs.items():
        console.print(summary(path, lines))
    if options.plot:
        curves = {
            f"{path.name} {key}" if len(logs) > 1 else key: curve(lines, key)
            for path, lines in logs.items()
            for key in options.keys
        }
        plot(curves, ", ".join(options.keys), options.plot, options.title)
        console.print(f"drawn into {options.plot}")


def main() -> None:
    options = parse_arguments()
    run_command(lambda: analyze(options))


if __name__ == "__main__":
    main()
