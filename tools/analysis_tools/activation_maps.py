#!/usr/bin/env python
"""Draws how much each position contributes to another one in VMamba's scans. See `--help`."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import track

from mmvmamba.analysis.activation_maps import Mixed, arrays, capture, draw_maps, draw_matrices
from mmvmamba.analysis.inspection import (
    build_backbone,
    find_images,
    image_reader,
    save_figure,
    shown,
)
from mmvmamba.engine.cli import add_cfg_options, run_command
from mmvmamba.engine.errors import UsageError


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Draw the activation maps of a query, the attention matrices and their "
        "diagonals, for each scan path and combined (paper, figures 5, 8 and 9)."
    )
    parser.add_argument(
        "model", help="a config of any task, an arch of VMamba, or vim-tiny, -small or -base"
    )
    parser.add_argument("image", help="a picture; it is scaled and cut to --size")
    parser.add_argument("--checkpoint", help="weights; random ones without it")
    parser.add_argument(
        "--query",
        type=int,
        nargs=2,
        metavar=("ROW", "COLUMN"),
        help="the position in pixels of the scaled and cut image (default: the centre)",
    )
    parser.add_argument(
        "--class-token",
        action="store_true",
        help="of Vim's classifiers: the class token is the query",
    )
    parser.add_argument(
        "--at",
        nargs="+",
        metavar="STAGE.BLOCK",
        help="which blocks, counted from 1, as 3.8; Vim has one stage, 1.1 to 1.24; 'all' "
        "(default: the last of each stage)",
    )
    parser.add_argument(
        "--size", type=int, nargs="+", default=[224], help="height and width, or one number"
    )
    parser.add_argument(
        "--longest",
        type=int,
        default=1024,
        help="no attention matrices for maps of more positions than this (default: 1024)",
    )
    parser.add_argument("--out", type=Path, default=Path("activation_maps"), help="folder")
    parser.add_argument(
        "--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu"
    )
    add_cfg_options(parser)
    options = parser.parse_args(arguments)
    if len(options.size) > 2 or min(options.size) < 1:
        parser.error("--size takes a height and a width, or one number for both")
    if options.class_token and options.query:
        parser.error("--query and --class-token: give one")
    return options


def choose(found: Sequence[Mixed], wanted: Sequence[str] | None) -> list[Mixed]:
    places = {f"{mixed.stage}.{mixed.block}": mixed for mixed in found}
    if wanted == ["all"]:
        return list(found)
    if wanted is None:
        # Later blocks of a stage take the place of earlier ones.
        return list({mixed.stage: mixed for mixed in found}.values())
    for name in wanted:
        if name not in places:
            raise UsageError(f"--at: no block {name}; there are {', '.join(places)}.")
    return [places[name] for name in wanted]


def show(options: argparse.Namespace) -> None:
    size = (*options.size, *options.size)[:2]
    query = options.query or [size[0] // 2, size[1] // 2]
    if not all(0 <= at < side for at, side in zip(query, size, strict=True)):
        raise UsageError(
            f"--query {query[0]} {query[1]} lies outside of the image, {size[0]}x{size[1]}."
        )
    (path,) = find_images([options.image], limit=1)
    try:
        model = build_backbone(
            options.model, size, options.checkpoint, overrides=options.cfg_options
        )
        read = image_reader(model, options.model, size, options.cfg_options)
        image = read(path).to(options.device)
        found = choose(capture(model.to(options.device), image), options.at)
    except ValueError as error:
        raise UsageError(str(error)) from error
    console = Console()
    weights = Path(options.checkpoint).name if options.checkpoint else "random weights"
    name = Path(options.model.rpartition("::")[2]).stem
    for mixed in track(found, "scanning", console=Console(stderr=True), transient=True):
        scan = mixed.scan()
        cell = tuple(at * n // s for at, n, s in zip(query, mixed.size, size, strict=True))
        try:
            data = arrays(scan, None if options.class_token else cell, options.longest)
        except ValueError as error:
            raise UsageError(f"--class-token: {error}") from error
        file = options.out / f"stage{mixed.stage}_block{mixed.block}"
        title = f"{name}, {weights}: stage {mixed.stage}, block {mixed.block}"
        names = [scanned.name for scanned in scan.paths]
        save_figure(draw_maps(shown(image), data, names, title), file.with_suffix(".png"))
        if "matrix_qk" in data:
            figure = draw_matrices(scan, shown(image), data, title)
            save_figure(figure, file.with_name(f"{file.name}_attention.png"))
        np.savez_compressed(file.with_suffix(".npz"), **data)
        console.print(f"{title}: {file}.png, .npz", highlight=False)


def main() -> None:
    options = parse_arguments()
    run_command(lambda: show(options), quiet=True)


if __name__ == "__main__":
    main()
