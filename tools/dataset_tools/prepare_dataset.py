#!/usr/bin/env python
"""Arranges a user's annotated images for the configs of `configs/finetune`. See `--help`."""

import argparse
from pathlib import Path

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from mmvmamba.datasets.own_data import TASKS, Options, prepare_dataset
from mmvmamba.engine.cli import run_command


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Arrange your annotated images for the configs of configs/finetune: split "
        "into train and val, classes numbered. The source stays as it is. docs/own_data.md has "
        "the way to a trained model."
    )
    parser.add_argument(
        "task",
        choices=TASKS,
        help="boxes of objects (detection), masks (segmentation), whole images (classification)",
    )
    parser.add_argument(
        "source",
        type=Path,
        help="a folder of images with labelme's JSON files; boxes: also a COCO file or CVAT's "
        "export 'COCO 1.0'; masks: also CVAT's export 'Segmentation mask 1.1' or folders images/ "
        "and masks/; images: a folder with a folder for each class",
    )
    parser.add_argument("out", type=Path, help="the data root to write")
    parser.add_argument(
        "--classes", nargs="+", metavar="NAME", help="the classes in order; all by default"
    )
    parser.add_argument(
        "--ignore",
        nargs="+",
        default=(),
        metavar="NAME",
        help="labels that are no class: left out, in masks 255",
    )
    parser.add_argument("--val", type=float, default=0.2, help="the share of val (0.2)")
    parser.add_argument("--seed", type=int, default=0, help="another seed is another split")
    options = parser.parse_args()
    if not 0 < options.val < 1:
        parser.error(f"--val is a share between 0 and 1, got {options.val}")
    return options


def prepare(options: argparse.Namespace) -> None:
    given = Options(options.classes, options.ignore, options.val, options.seed)
    made = prepare_dataset(options.task, options.source, options.out, given)
    console = Console(soft_wrap=True, highlight=False)
    table = Table(box=SIMPLE, title=f"{made.what} per class", title_justify="left")
    table.add_column("class")
    for split, number in made.images.items():
        table.add_column(f"{split}: {number} images", justify="right")
    for name in made.classes:
        table.add_row(name, *(f"{counts[name]}" for counts in made.counts.values()))
    console.print(table)
    names = ", ".join(f'"{name}"' for name in made.classes)
    console.print("The first lines of the config:")
    console.print(f'data_root = "{options.out}/"\nclasses = [{names}]', markup=False)
    if made.suffix:
        console.print(f'image_suffix = "{made.suffix}"', markup=False)


def main() -> None:
    options = parse_arguments()
    run_command(lambda: prepare(options), quiet=True)


if __name__ == "__main__":
    main()
