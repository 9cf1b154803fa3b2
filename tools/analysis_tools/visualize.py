#!/usr/bin/env python
"""Draws predictions beside the ground truth. See `--help`."""

import argparse
from pathlib import Path

import mmengine
import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import track

from mmvmamba.analysis.inspection import find_images
from mmvmamba.analysis.montage import draw_montage
from mmvmamba.analysis.pictures import predict_and_draw
from mmvmamba.engine.cli import (
    add_config_arguments,
    load_config_and_data,
    run_command,
    tell_notices,
)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Draw what a detector, a segmentor or a classifier predicts (right) beside the "
        "ground truth (left), for images of the test data set or for your own."
    )
    add_config_arguments(parser)
    parser.add_argument("checkpoint", help="a checkpoint file or URL")
    parser.add_argument(
        "images",
        nargs="*",
        help="images, or folders of them; those that are not of the test data set are drawn "
        "without a ground truth (default: the test data set's)",
    )
    parser.add_argument("--num", type=int, help="images at most (default: all)")
    parser.add_argument(
        "--score-thr", type=float, default=0.3, help="instances scored above are drawn"
    )
    parser.add_argument(
        "--out-dir", type=Path, help="folder for a PNG per image; ./work_dirs/CONFIG/pictures"
    )
    parser.add_argument("--sheet", type=Path, help="also tile all of them into this PNG")
    parser.add_argument("--columns", type=int, default=3, help="pictures in a row of the sheet")
    parser.add_argument("--title", default="", help="a line above the sheet")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    if options.num is not None and options.num < 1:
        parser.error(f"--num is a positive number, got {options.num}")
    if options.columns < 1:
        parser.error(f"--columns is a positive number, got {options.columns}")
    return options


def visualize(options: argparse.Namespace) -> None:
    cfg = load_config_and_data(options.config, options.cfg_options, options.data_root)
    tell_notices(cfg)
    folder = options.out_dir or Path("work_dirs") / Path(cfg.filename).stem / "pictures"
    images = find_images(options.images) if options.images else None
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    pairs = predict_and_draw(
        cfg, options.checkpoint, images, options.num, options.score_thr, options.device
    )
    mmengine.mkdir_or_exist(folder)
    files = []
    for index, pair in enumerate(track(pairs, "drawing", console=console, transient=True)):
        # Numbered, since images of several folders may have one name.
        files.append(folder / f"{index:04d}_{pair.path.stem}.png")
        Image.fromarray(np.hstack([pair.truth, pair.prediction])).save(files[-1])
    left = "image" if images else "ground truth"
    console.print(f"{len(files)} pictures, {left} left, predictions right: {folder}")
    if options.sheet:
        draw_montage(files, options.sheet, columns=options.columns, title=options.title)
        console.print(f"all of them: {options.sheet}")


def main() -> None:
    options = parse_arguments()
    run_command(lambda: visualize(options), quiet=True)


if __name__ == "__main__":
    main()
