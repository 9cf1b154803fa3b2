#!/usr/bin/env python
"""Measures a classifier on larger images, with and without linear tuning. See `--help`."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from mmvmamba.analysis.inspection import save_figure
from mmvmamba.analysis.passes import PRECISIONS
from mmvmamba.analysis.scale_up import SIZES, Study, draw_study, run_study, study_table
from mmvmamba.engine.cli import add_cfg_options, run_command


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Accuracy, FLOPs and throughput of a classifier over its images' size, as it "
        "is and with its last layer tuned at every size (paper, table 9 and figure 11). A run "
        "that was stopped goes on where it was; results are in scale_up.json and scale_up.png in "
        "the work directory."
    )
    parser.add_argument("config", help="a config of a classifier")
    parser.add_argument("checkpoint", help="its weights, official ones too")
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=list(SIZES), help=f"(default: {SIZES})"
    )
    parser.add_argument("--tune", action="store_true", help="tune the last layer at every size")
    parser.add_argument(
        "--data-root", help="a folder in the layout of ImageNet, if not where the config says"
    )
    parser.add_argument("--work-dir", type=Path, help="(default: work_dirs/scale_up/CONFIG)")
    parser.add_argument(
        "--batch",
        type=int,
        nargs=2,
        metavar=("INFERENCE", "TRAINING"),
        help="images in a batch for the throughput (default: 32 32, as in the paper; 1 1 on the "
        "CPU)",
    )
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32", help="of throughput")
    parser.add_argument(
        "--seconds", type=float, default=5.0, help="for each throughput (default: 5)"
    )
    parser.add_argument(
        "--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu"
    )
    add_cfg_options(parser)
    add_cfg_options(parser, "--tuning-options", "the tuning alone")
    options = parser.parse_args(arguments)
    if min(*options.sizes, *(options.batch or (1,))) < 1:
        parser.error("--sizes and --batch take positive numbers")
    return options


def scale_up(options: argparse.Namespace) -> None:
    name = Path(options.config.rpartition("::")[2]).stem
    study = Study(
        options.config,
        options.checkpoint,
        options.work_dir or Path("work_dirs/scale_up") / name,
        options.data_root,
        options.cfg_options,
        options.tune,
        options.tuning_options,
        tuple(options.batch or ((32, 32) if options.device.type == "cuda" else (1, 1))),
        options.precision,
        options.device,
        options.seconds,
    )
    console = Console()
    results = run_study(study, options.sizes, console.rule)
    console.print(study_table(results).rich())
    picture = study.file.with_suffix(".png")
    save_figure(draw_study(results), picture)
    console.print(f"results in {study.file}, drawn into {picture}")


def main() -> None:
    options = parse_arguments()
    run_command(lambda: scale_up(options), quiet=True)


if __name__ == "__main__":
    main()
