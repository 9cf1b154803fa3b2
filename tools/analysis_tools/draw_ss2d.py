#!/usr/bin/env python
"""Draws the picture that explains SS2D, on an image of yours. See `--help`."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, UnidentifiedImageError
from rich.console import Console

from mmvmamba.analysis.inspection import save_figure
from mmvmamba.analysis.ss2d_picture import draw_ss2d
from mmvmamba.engine.cli import run_command
from mmvmamba.engine.errors import UsageError


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Draw what SS2D does: four paths over the map, one scan along each, and their "
        "sum. Blue is what a position gives to the output at the star (computed, in float64)."
    )
    parser.add_argument("image", type=Path, help="the picture that stands for the map")
    parser.add_argument(
        "--grid", type=int, nargs=2, default=[8, 8], metavar=("H", "W"), help="(default: 8 8)"
    )
    parser.add_argument(
        "--query", type=int, nargs=2, metavar=("ROW", "COLUMN"), help="the star (default: centre)"
    )
    parser.add_argument("--out", type=Path, default=Path("ss2d.png"), help="the picture")
    options = parser.parse_args(arguments)
    if min(options.grid) < 1:
        parser.error("--grid takes two positive numbers")
    options.query = options.query or [side // 2 for side in options.grid]
    return options


def draw(options: argparse.Namespace) -> None:
    try:
        with Image.open(options.image) as image:
            figure = draw_ss2d(image, *options.grid, tuple(options.query))
    except (OSError, UnidentifiedImageError, ValueError) as error:
        raise UsageError(str(error)) from error
    save_figure(figure, options.out)
    Console().print(f"drawn into {options.out}")


def main() -> None:
    options = parse_arguments()
    run_command(lambda: draw(options), quiet=True)


if __name__ == "__main__":
    main()
