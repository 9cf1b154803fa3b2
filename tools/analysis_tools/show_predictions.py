#!/usr/bin/env python3
"""Tile the pictures of a test run (tools/test.py --show-dir) into one: ground truth, prediction."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console

from mmvmamba.analysis.montage import draw_montage, newest_pictures


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "folder", type=Path, help="searched with its sub-folders for the latest run's pictures"
    )
    parser.add_argument("out_file", type=Path, help="the PNG to write")
    parser.add_argument("--num", type=int, default=12, help="pictures to show")
    parser.add_argument("--columns", type=int, default=3, help="pictures in a row")
    parser.add_argument("--title", default="", help="a line above all")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Draw the picture and report; returns the exit status."""
    args = parse_args(argv)
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    try:
        pictures = newest_pictures(args.folder, args.num)
        draw_montage(pictures, args.out_file, columns=args.columns, title=args.title)
    except (OSError, ValueError) as error:
        console.print(f"[bold red]error:[/] {error}")
        return 1
    console.print(f"{len(pictures)} predictions beside their ground truth: {args.out_file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
