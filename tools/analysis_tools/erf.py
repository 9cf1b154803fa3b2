#!/usr/bin/env python
"""Draws and measures effective receptive fields of several models. See `--help`."""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from mmvmamba.analysis.effective_receptive_field import (
    THRESHOLDS,
    draw_fields,
    effective_receptive_field,
    smallest_square,
)
from mmvmamba.analysis.inspection import (
    build_backbone,
    find_images,
    image_reader,
    save_figure,
)
from mmvmamba.analysis.measured import image_channels, random_images
from mmvmamba.analysis.reports import Table
from mmvmamba.engine.cli import add_cfg_options, run_command
from mmvmamba.engine.errors import UsageError

ABLATIONS = "mmvmamba::vmamba_ablations/vmamba-tiny-s1l8-{}_8xb128_in1k.py"
PATTERNS = ("unidi", "bidi", "cascade", "cross")
# The models of the paper's figures.
FIGURES = {
    "6": ("resnet-50", "convnext-tiny", "swin-tiny", "deit-small", "hivit-tiny", "tiny"),
    "13": (
        *(ABLATIONS.format(name) for name in PATTERNS[:3]),
        "tiny",
        *(ABLATIONS.format(f"{name}-no-dwconv") for name in PATTERNS),
    ),
    "14": ("tiny", *(ABLATIONS.format(f"{name}-init") for name in ("rand", "zero"))),
}
BEFORE, AFTER = "before training", "after training"


class Run(NamedTuple):
    """One model to look at: `model` builds it, `label` names it."""

    label: str
    model: str
    checkpoint: str | None
    state: str


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Effective receptive fields of backbones before and after training (paper, "
        "figures 6, 10, 13 and 14), and the smallest centred squares that hold given shares."
    )
    parser.add_argument(
        "models",
        nargs="*",
        metavar="MODEL[=CHECKPOINT]",
        help="a config of any task, an arch of VMamba, a short name of others (swin-tiny, "
        "deit-small, ...) or a model of timm; with random weights and, where a checkpoint is "
        "given, with its weights as well. A model may be given several times",
    )
    parser.add_argument(
        "--figure",
        choices=FIGURES,
        help="all models of this figure of the paper; models that are named come after them, and "
        "MODEL=CHECKPOINT adds what a model's weights make of it",
    )
    parser.add_argument(
        "--images", nargs="+", help="pictures or folders of them (default: random images)"
    )
    parser.add_argument("--num", type=int, default=16, help="images at most (default: 16)")
    parser.add_argument(
        "--seeds", type=int, default=1, help="random weights to average over (default: 1)"
    )
    parser.add_argument(
        "--size", type=int, nargs="+", default=[224], help="height and width, or one number"
    )
    parser.add_argument(
        "--thresholds", type=float, nargs="+", default=list(THRESHOLDS), metavar="SHARE"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("erf.png"),
        help="the picture; the fields and areas go to a .npz file beside it",
    )
    parser.add_argument(
        "--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu"
    )
    add_cfg_options(parser)
    options = parser.parse_args(arguments)
    options.models = [*FIGURES.get(options.figure, ()), *options.models]
    if not options.models:
        parser.error("name models, or a --figure of the paper")
    if len(options.size) > 2 or min(*options.size, options.num, options.seeds) < 1:
        parser.error("--size, --num and --seeds take positive numbers, --size one or two")
    if not all(0 < share < 1 for share in options.thresholds):
        parser.error("--thresholds are shares between 0 and 1")
    return options


def runs(models: Sequence[str]) -> Iterator[Run]:
    """Each model before training once, then each checkpoint."""
    pairs = [name.partition("=")[::2] for name in models]
    for model in dict.fromkeys(model for model, _ in pairs):
        yield Run(_short(model), model, None, BEFORE)
    for model, checkpoint in pairs:
        if checkpoint:
            several = sum(model == other and bool(file) for other, file in pairs) > 1
            state = f"{Path(checkpoint).stem}" if several else AFTER
            yield Run(_short(model), model, checkpoint, state)


def _short(name: str) -> str:
    return Path(name.rpartition("::")[2]).stem if name.endswith(".py") else name


def measure(options: argparse.Namespace) -> dict[Run, np.ndarray]:
    size = (*options.size, *options.size)[:2]
    files = find_images(options.images, options.num) if options.images else None
    todo = list(runs(options.models))
    found = {}
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(
            "",
            total=(options.num if files is None else len(files))
            * sum(1 if run.checkpoint else options.seeds for run in todo),
        )
        for run in todo:
            progress.update(task, description=f"{run.label}, {run.state}")
            of_seeds = []
            for seed in range(1 if run.checkpoint else options.seeds):
                model = build_backbone(run.model, size, run.checkpoint, seed, options.cfg_options)
                images = images_for(run, model, files, options)
                of_seeds.append(
                    effective_receptive_field(
                        model.to(options.device), images, lambda: progress.advance(task)
                    )
                )
            found[run] = np.mean(of_seeds, axis=0)
    return found


def images_for(
    run: Run, model: nn.Module, files: Sequence[Path] | None, options: argparse.Namespace
) -> Iterator[Tensor]:
    """The images of the channels that a model takes."""
    size = (*options.size, *options.size)[:2]
    if files is None:
        yield from random_images(options.num, size, options.device, image_channels(model))
        return
    read = image_reader(model, run.model, size, options.cfg_options)
    for path in files:
        yield read(path).to(options.device)


def show(options: argparse.Namespace) -> None:
    try:
        fields = measure(options)
    except ValueError as error:
        raise UsageError(str(error)) from error
    areas = {
        run: [smallest_square(field, share) for share in options.thresholds]
        for run, field in fields.items()
    }
    height, width = next(iter(fields.values())).shape
    table = Table(
        f"smallest centred square of {height}x{width} pixels that holds a share: side, area ratio",
        ("model", "", *(f"{share:.0%}" for share in options.thresholds)),
        tuple(
            (run.label, run.state, *(f"{area.side}, {area.ratio:.1%}" for area in row))
            for run, row in areas.items()
        ),
    )
    console = Console()
    console.print(table.rich())
    rows: dict[str, list] = {}
    for run, field in fields.items():
        rows.setdefault(run.state, []).append((run.label, field))
    kind = "images" if options.images else "random images"
    figure = draw_fields(rows, f"effective receptive fields, {height}x{width}, {kind}")
    save_figure(figure, options.out)
    np.savez_compressed(
        options.out.with_suffix(".npz"),
        models=[run.label for run in fields],
        states=[run.state for run in fields],
        fields=np.stack(list(fields.values())),
        thresholds=options.thresholds,
        sides=[[area.side for area in row] for row in areas.values()],
        ratios=[[area.ratio for area in row] for row in areas.values()],
    )
    console.print(f"drawn into {options.out}, arrays in {options.out.with_suffix('.npz')}")


def main() -> None:
    options = parse_arguments()
    run_command(lambda: show(options), quiet=True)


if __name__ == "__main__":
    main()
