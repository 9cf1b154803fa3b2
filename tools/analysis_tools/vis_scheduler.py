#!/usr/bin/env python
"""Draws a config's learning rate over its training. See `--help`.

mmpretrain's tool of this name builds the optimizer for a stand-in model, which constructors with
settings by layer (ours among them) cannot take, and counts mmpretrain's own data sets only.
"""

import argparse
from pathlib import Path

import numpy as np
from rich.console import Console

from mmvmamba.analysis.curves import plot, scheduled
from mmvmamba.engine.cli import (
    add_config_arguments,
    load_config_and_data,
    run_command,
    tell_notices,
)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Draw what a config's schedulers will do, without training."
    )
    add_config_arguments(parser)
    parser.add_argument(
        "--parameter",
        choices=("lr", "momentum", "weight_decay"),
        default="lr",
        help="what is drawn",
    )
    parser.add_argument("--processes", type=int, default=1, help="how many will train together")
    parser.add_argument(
        "--dataset-size",
        type=int,
        help="images of the training data set, if it is not on this machine",
    )
    parser.add_argument("--out", type=Path, help="the picture; ./work_dirs/CONFIG/PARAMETER.png")
    options = parser.parse_args()
    if min(options.processes, options.dataset_size or 1) < 1:
        parser.error("--processes and --dataset-size are positive numbers")
    return options


def draw(options: argparse.Namespace) -> None:
    cfg = load_config_and_data(options.config, options.cfg_options, options.data_root)
    tell_notices(cfg)
    values = scheduled(cfg, options.processes, options.dataset_size)[options.parameter]
    name = Path(cfg.filename).stem
    file = options.out or Path("work_dirs") / name / f"{options.parameter}.png"
    iterations = np.arange(1, len(values) + 1)
    plot({options.parameter: (iterations, values)}, options.parameter, file, name)
    console = Console(highlight=False, soft_wrap=True)
    console.print(
        f"{len(values)} iterations; {options.parameter} from {values[0]:.4g} over "
        f"{values.max():.4g} (iteration {values.argmax() + 1}) to {values[-1]:.4g}"
    )
    console.print(f"drawn into {file}")


def main() -> None:
    options = parse_arguments()
    run_command(lambda: draw(options), quiet=True)


if __name__ == "__main__":
    main()
