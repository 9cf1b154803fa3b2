"""What a config's data hold and whether they fit it, without a training.

`tools/dataset_tools/check_dataset.py` and `python -m mmvmamba.doctor --config` show it.
"""

import argparse
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import mmengine
import numpy as np
from mmengine.config import Config
from mmengine.dataset import BaseDataset
from mmengine.runner import Runner
from PIL import Image, UnidentifiedImageError
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from mmvmamba.analysis.montage import draw_montage
from mmvmamba.analysis.pictures import training_samples
from mmvmamba.engine.agreement import checks, class_number
from mmvmamba.engine.class_counts import absent_classes, count_classes
from mmvmamba.engine.cli import (
    add_config_arguments,
    build_runner,
    load_config_and_data,
    run_command,
)
from mmvmamba.engine.data import SPLITS, check_datasets
from mmvmamba.engine.data_checks import base_datasets
from mmvmamba.engine.errors import UsageError
from mmvmamba.engine.wrappers import unwrapped

# Of how many images the sizes are looked at.
MOST_IMAGES = 500
BAR = 30


@dataclass(frozen=True)
class Split:
    """What a split of the data holds.

    Attributes:
        name: 'train', 'val' or 'test'.
        images: How many images it has.
        what: What is counted: 'objects', 'pixels' or 'images'.
        counts: How often each class occurs, by name, in the classes' order.
        looked_at: In how many of the images that was counted.
        image_sizes: The smallest, middle and largest sides of images in pixels, (3, 2): width and
            height.
        object_sizes: The smallest, middle and largest objects, as the square root of their boxes'
            areas; empty where there are no boxes.
        absent: Which classes never occur, and why; '' if all do.
    """

    name: str
    images: int
    what: str
    counts: dict[str, int]
    looked_at: int
    image_sizes: np.ndarray
    object_sizes: np.ndarray
    absent: str


def examine(cfg: Config) -> tuple[list[Split], list[str]]:
    """Looks at the data of a config as a training and a test would before their first step.

    Args:
        cfg: The config, its data where they are on this machine.

    Returns:
        The splits that can be used, and what is refused.
    """
    problems, splits = [], []
    for split in SPLITS:
        try:
            check_datasets(cfg, (split,))
        except UsageError as error:
            problems.append(str(error))
            cfg[f"{split}_dataloader"] = cfg[f"{split}_cfg"] = cfg[f"{split}_evaluator"] = None
    if cfg.get("train_cfg") is None:
        cfg.optim_wrapper = cfg.param_scheduler = None
    runner = build_runner(cfg)
    for split in SPLITS:
        try:
            _build_loop(runner, split)
        except UsageError as error:
            problems.append(str(error))
    for check in checks(runner):
        try:
            check()
        except UsageError as error:
            problems.append(str(error))
    for split in SPLITS:
        loop = getattr(runner, f"_{split}_loop")
        if loop is None or isinstance(loop, dict):
            continue
        try:
            splits.append(_split(runner, split))
        except UsageError as error:
            problems.append(str(error))
    # Train and test often share what is wrong.
    return splits, list(dict.fromkeys(problems))


def _build_loop(runner: Runner, split: str) -> None:
    loop = getattr(runner, f"_{split}_loop")
    if loop is not None:
        setattr(runner, f"_{split}_loop", getattr(runner, f"build_{split}_loop")(loop))


def _split(runner: Runner, name: str) -> Split:
    dataset = getattr(runner, f"_{name}_loop").dataloader.dataset
    bases = list(base_datasets(dataset))
    counts, looked_at, what = Counter(), 0, ""
    for base in bases:
        found, seen, kind = count_classes(base, 10 / len(bases), name)
        counts, looked_at, what = counts + found, looked_at + seen, kind or what
    names = next((one.metainfo["classes"] for one in bases if one.metainfo.get("classes")), None)
    names = names or range(class_number(unwrapped(runner.model), dataset) or 0)
    infos = [info for base in bases for info in _infos(base)]
    sizes = [size for size in map(_image_size, infos) if size]
    objects = [
        max(0, x2 - x1) ** 0.5 * max(0, y2 - y1) ** 0.5
        for info in infos
        for x1, y1, x2, y2 in (one["bbox"] for one in info.get("instances", ()) if "bbox" in one)
    ]
    return Split(
        name,
        sum(map(len, bases)),
        what,
        {str(one): counts[label] for label, one in enumerate(names)},
        looked_at,
        np.percentile(sizes, (0, 50, 100), axis=0) if sizes else np.zeros((0, 2)),
        np.percentile(objects, (0, 50, 100)) if objects else np.zeros(0),
        absent_classes(list(names), counts, bases) if what else "",
    )


def _infos(dataset: BaseDataset) -> Iterator[dict]:
    step = max(1, len(dataset) // MOST_IMAGES)
    return (dataset.get_data_info(index) for index in range(0, len(dataset), step))


def _image_size(info: dict) -> tuple[int, int] | None:
    if "width" in info:
        return info["width"], info["height"]
    try:
        with Image.open(str(info.get("img_path"))) as image:
            return image.size
    except (OSError, UnidentifiedImageError):
        # Of a format that Pillow does not know, or elsewhere than on this disk.
        return None


def show(splits: Sequence[Split], problems: Sequence[str], console: Console) -> None:
    """Prints what `examine` returns."""
    for split, names in _distinct(splits):
        most = max(split.counts.values(), default=0) or 1
        seen = "" if split.looked_at >= split.images else f", counted in {split.looked_at}"
        table = Table(
            box=SIMPLE, title=f"{names}: {split.images} images{seen}", title_justify="left"
        )
        table.add_column("class")
        table.add_column(split.what or "not counted", justify="right")
        table.add_column("")
        for name, count in split.counts.items():
            bar = "█" * -(-BAR * count // most)
            table.add_row(name, f"{count}", bar, style=None if count else "red")
        console.print(table)
        for what, sizes in (("images", split.image_sizes), ("objects", split.object_sizes)):
            if len(sizes):
                shown = ["x".join(f"{side:.0f}" for side in np.atleast_1d(one)) for one in sizes]
                console.print(f"{what}, smallest, middle, largest: {', '.join(shown)} pixels")
        if split.absent:
            console.print(split.absent, style="red", markup=False)
    for problem in problems:
        console.print(f"refused: {problem}", style="red", markup=False)
    if not problems:
        console.print("Nothing is refused.")


def _distinct(splits: Sequence[Split]) -> Iterator[tuple[Split, str]]:
    """The splits and their names; val and test of equal content as one."""
    alike: dict[tuple[bool, str], list[Split]] = {}
    for split in splits:
        content = split.name == "train", str(replace(split, name=""))
        alike.setdefault(content, []).append(split)
    for same in alike.values():
        yield same[0], " and ".join(one.name for one in same)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Look at a config's data without training: classes and counts, sizes, what is "
        "left out and what is refused; ten training samples are drawn."
    )
    add_config_arguments(parser)
    parser.add_argument("--out-dir", type=Path, help="./work_dirs/CONFIG/data by default")
    options = parser.parse_args(arguments)
    run_command(lambda: _report(options), quiet=True)


def _report(options: argparse.Namespace) -> None:
    cfg = load_config_and_data(options.config, options.cfg_options, options.data_root)
    folder = options.out_dir or Path("work_dirs") / Path(cfg.filename).stem / "data"
    # Nothing is trained: what one GPU or a checkpoint is needed for is left out.
    cfg.work_dir, cfg.load_from, cfg.resume, cfg.launcher = str(folder), None, False, "none"
    cfg.log_level = "WARNING"
    console = Console(soft_wrap=True)
    with warnings.catch_warnings():
        # Of the libraries about themselves.
        warnings.simplefilter("ignore")
        splits, problems = examine(cfg.copy())
    show(splits, problems, console)
    if not problems:
        mmengine.mkdir_or_exist(folder)
        files = []
        for index, (path, image, annotated) in enumerate(training_samples(cfg, 10)):
            files.append(folder / f"{index:04d}_{path.stem}.png")
            Image.fromarray(np.hstack([image, annotated])).save(files[-1])
        sheet = folder / "samples.png"
        draw_montage(files, sheet, columns=2, headings=("to the model", "annotations"))
        console.print(f"{len(files)} training samples: {sheet}")
    if problems:
        raise UsageError(f"{len(problems)} refused, see above.")


if __name__ == "__main__":
    main()
