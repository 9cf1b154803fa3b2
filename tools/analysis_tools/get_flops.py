#!/usr/bin/env python
"""Counts parameters and FLOPs, the selective scan included. See `--help`."""

import argparse
import json
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from mmvmamba.analysis.flops import Complexity, count_classifier, count_config, plot_flops
from mmvmamba.analysis.subjects import is_config
from mmvmamba.engine.cli import add_cfg_options, load_config, run_command, tell_notices
from mmvmamba.engine.errors import UsageError

MODEL_HELP = (
    "config files or names such as mmvmamba::mask_rcnn/CONFIG.py and mmpretrain::convnext/"
    "CONFIG.py; or, for classifiers, archs of VMamba, short names of others (swin-tiny, "
    "convnext-base, deit-small, ...) and models of timm"
)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Count parameters and FLOPs of classifiers, detectors and segmentors in the "
        "paper's convention: a multiply-add is one FLOP, the selective scan counts."
    )
    parser.add_argument("models", nargs="+", metavar="MODEL", help=MODEL_HELP)
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--shape",
        type=int,
        nargs="+",
        metavar="SIDE",
        help="height and width of the image, or one number for both (default: the paper's, 224 "
        "224 for classification, 800 1280 for detection, 512 2048 for segmentation)",
    )
    size.add_argument(
        "--sizes", type=int, nargs="+", metavar="SIDE", help="sides of several square images"
    )
    parser.add_argument(
        "--depth", type=int, default=2, help="depth of the modules shown; 2 shows the stages"
    )
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    parser.add_argument("--plot", type=Path, help="draw FLOPs over --sizes into this picture")
    add_cfg_options(parser)
    options = parser.parse_args()
    if options.shape and len(options.shape) > 2:
        parser.error("--shape takes a height and a width, or one number for both")
    if min([1, *(options.shape or ()), *(options.sizes or ())]) < 1:
        parser.error("sides of images are positive numbers of pixels")
    if options.plot and not options.sizes:
        parser.error("--plot draws FLOPs over several sizes: give them as --sizes")
    return options


def count(name: str, shape: tuple[int, int] | None, overrides: dict) -> Complexity:
    try:
        if not is_config(name):
            return count_classifier(name, shape)
        cfg = load_config(name, overrides)
        tell_notices(cfg)
        return count_config(cfg, shape)
    except ValueError as error:
        raise UsageError(f"{name}: {error}") from error


def short(name: str) -> str:
    return Path(name.rpartition("::")[2]).stem if name.endswith(".py") else name


def module_table(name: str, result: Complexity, depth: int) -> Table:
    table = Table(title=f"{short(name)}, {result.shape[0]} x {result.shape[1]}")
    for title in ("module", "class"):
        table.add_column(title)
    for title in ("params (M)", "FLOPs (G)", "share"):
        table.add_column(title, justify="right")
    parents = {}
    for module in result.modules:
        parents[module.depth] = f"{module.name}."
        if module.depth <= depth:
            own = module.name.removeprefix(parents.get(module.depth - 1, ""))
            table.add_row(
                "  " * module.depth + (own or "all"),
                module.kind,
                f"{module.params / 1e6:.3f}",
                f"{module.flops / 1e9:.3f}",
                f"{module.flops / max(result.flops, 1):.1%}",
            )
    return table


def operator_table(result: Complexity) -> Table:
    table = Table("operator", title="by operator")
    table.add_column("FLOPs (G)", justify="right")
    for operator, flops in result.operators.items():
        table.add_row(operator, f"{flops / 1e9:.3f}")
    return table


def size_table(curves: dict[str, list[Complexity]]) -> Table:
    table = Table("model", title="FLOPs (G) by image side")
    table.add_column("params (M)", justify="right")
    for result in next(iter(curves.values())):
        table.add_column(str(result.shape[0]), justify="right")
    for name, results in curves.items():
        flops = (f"{result.flops / 1e9:.2f}" for result in results)
        table.add_row(name, f"{results[0].params / 1e6:.1f}", *flops)
    return table


def show(options: argparse.Namespace) -> None:
    shapes: list = [(side, side) for side in options.sizes or ()]
    if not shapes:
        shapes = [(*options.shape, *options.shape)[:2] if options.shape else None]
    console = Console()
    todo = [(name, shape) for name in options.models for shape in shapes]
    results = [
        (name, count(name, shape, options.cfg_options))
        for name, shape in track(todo, "counting", console=Console(stderr=True), transient=True)
    ]
    curves: dict[str, list[Complexity]] = {}
    for name, result in results:
        curves.setdefault(short(name), []).append(result)
    if options.sizes:
        console.print(size_table(curves))
    else:
        for name, result in results:
            console.print(module_table(name, result, options.depth), operator_table(result))
    if options.plot:
        plot_flops(curves, options.plot)
        console.print(f"drawn into {options.plot}")
    if options.out:
        rows = [{"model": name, **result.as_dict(options.depth)} for name, result in results]
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(rows, indent=1) + "\n")
        console.print(f"written to {options.out}")


def main() -> None:
    options = parse_arguments()
    run_command(lambda: show(options), quiet=True)


if __name__ == "__main__":
    main()
