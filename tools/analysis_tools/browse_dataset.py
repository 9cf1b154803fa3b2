#!/usr/bin/env python
"""Draws what training data and their pipeline give to the model. See `--help`.

Upstream's tools of this name do not serve: mmsegmentation's hands OpenCV images that it refuses,
mmpretrain's stops at a visualizer that is inherited from another package, and mmdetection's cannot
be told how many images to draw.
"""

import argparse
from pathlib import Path

import mmengine
import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import track

from mmvmamba.analysis.montage import draw_montage
from mmvmamba.analysis.pictures import training_samples
from mmvmamba.engine.cli import (
    add_config_arguments,
    load_config_and_data,
    run_command,
    tell_notices,
)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Draw images of a config's training data after their pipeline, augmentations "
        "included (left), and with their annotations (right)."
    )
    add_config_arguments(parser)
    parser.add_argument("--num", type=int, default=12, help="images at most")
    parser.add_argument(
        "--out-dir", type=Path, help="folder for a PNG per image; ./work_dirs/CONFIG/train"
    )
    parser.add_argument("--sheet", type=Path, help="also tile all of them into this PNG")
    parser.add_argument("--columns", type=int, default=3, help="pictures in a row of the sheet")
    options = parser.parse_args()
    if min(options.num, options.columns) < 1:
        parser.error("--num and --columns are positive numbers")
    return options


def browse(options: argparse.Namespace) -> None:
    cfg = load_config_and_data(options.config, options.cfg_options, options.data_root)
    tell_notices(cfg)
    folder = options.out_dir or Path("work_dirs") / Path(cfg.filename).stem / "train"
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    mmengine.mkdir_or_exist(folder)
    samples = training_samples(cfg, options.num)
    files = []
    for index, (path, image, annotated) in enumerate(
        track(samples, "drawing", console=console, transient=True, total=options.num)
    ):
        files.append(folder / f"{index:04d}_{path.stem}.png")
        Image.fromarray(np.hstack([image, annotated])).save(files[-1])
    console.print(f"{len(files)} pictures of the training data set: {folder}")
    if options.sheet:
        headings = ("to the model", "annotations")
        draw_montage(files, options.sheet, columns=options.columns, headings=headings)
        console.print(f"all of them: {options.sheet}")


def main() -> None:
    options = parse_arguments()
    run_command(lambda: browse(options), quiet=True)


if __name__ == "__main__":
    main()
