#!/usr/bin/env python3
"""Make the sample data: COCO, ADE20K and ImageNet in miniature."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mmvmamba.datasets import SampleDataError, SampleDataParams, make_sample_data


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    defaults = SampleDataParams()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out-dir", type=Path, default=Path("data/sample"))
    parser.add_argument("--num-train", type=int, default=defaults.num_train, help="training images")
    parser.add_argument("--num-val", type=int, default=defaults.num_val, help="validation images")
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument(
        "--image-size",
        type=int,
        default=defaults.image_size,
        help="longer side of a scene in pixels",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace sample data made with other parameters"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Make the data and report; returns the exit status."""
    args = parse_args(argv)
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    try:
        params = SampleDataParams(args.num_train, args.num_val, args.seed, args.image_size)
        with Progress(*columns, console=console) as progress:
            task = progress.add_task("Sample data", total=params.num_images)
            made = make_sample_data(
                args.out_dir,
                params,
                overwrite=args.overwrite,
                on_image=lambda: progress.advance(task),
            )
            if not made:
                progress.update(task, visible=False)
    except (SampleDataError, ValueError) as error:
        console.print(f"[bold red]error:[/] {error}", highlight=False)
        return 1
    console.print(f"{'Made' if made else 'Found complete'}: {args.out_dir}", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
