#!/usr/bin/env python
"""Exports a model to ONNX, OpenVINO or a `.pt2` file. See `--help`."""

import argparse
from pathlib import Path

from rich.console import Console
from rich.table import Table

from mmvmamba.analysis.inspection import find_images
from mmvmamba.deployment.check import compare, runtime_of
from mmvmamba.deployment.export import FORMATS, export_model
from mmvmamba.deployment.quantize import quantize
from mmvmamba.deployment.runtimes import Deployed, check_runtime
from mmvmamba.engine.cli import (
    CONFIG_HELP,
    add_cfg_options,
    load_config,
    run_command,
    tell_notices,
)
from mmvmamba.engine.errors import UsageError

WORST = 1e-4
"""Largest error of `--check`: a rounding error of the networks, which probabilities enlarge."""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Export a whole classifier, segmentor or detector, from pixels to results, and "
        "a JSON file beside it that says what to do with them."
    )
    parser.add_argument("config", help=CONFIG_HELP)
    parser.add_argument("checkpoint", help="a checkpoint file or URL")
    parser.add_argument(
        "out", type=Path, help=f"the file to write, which ends in {', '.join(FORMATS.values())}"
    )
    parser.add_argument(
        "--format", choices=FORMATS, help="what to write (default: what the file's end says)"
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--size",
        type=int,
        nargs=2,
        metavar=("HEIGHT", "WIDTH"),
        help="one image of this size a call, which some runtimes need",
    )
    size.add_argument(
        "--dynamic",
        action="store_true",
        help="images of any size and, but for detectors, any number (the default)",
    )
    parser.add_argument(
        "--check",
        nargs="+",
        metavar="IMAGES",
        help="run these images, or folders of them, through the original and the exported model, "
        "and fail where they differ",
    )
    parser.add_argument(
        "--int8",
        nargs="+",
        metavar="IMAGES",
        help="ONNX: products of 8-bit integers, calibrated on these images, or folders of them",
    )
    add_cfg_options(parser)
    return parser.parse_args()


def kind_of(options: argparse.Namespace) -> str:
    """The format to write."""
    if options.format:
        return options.format
    for kind, suffix in FORMATS.items():
        if options.out.suffix == suffix:
            return kind
    raise UsageError(f"{options.out}: exported models end in {', '.join(FORMATS.values())}.")


def check(options: argparse.Namespace, cfg, images: list[Path], console: Console) -> None:
    deployed = Deployed(options.out)
    table = Table("image", "size", f"{runtime_of(deployed)} differs by")
    for title in ("eager (ms)", f"{runtime_of(deployed)} (ms)"):
        table.add_column(title, justify="right")
    errors = []
    for one in compare(cfg, options.checkpoint, deployed, images):
        errors.append(one.error)
        times = (f"{1e3 * seconds:.0f}" for seconds in (one.eager, one.deployed))
        table.add_row(one.path.name, f"{one.size[0]}x{one.size[1]}", one.difference, *times)
    console.print(table)
    if not options.int8 and max(errors) > WORST:
        raise UsageError(
            f"{options.out} differs by {max(errors):.1e} from the original, more than {WORST:.0e}."
        )


def export(options: argparse.Namespace) -> None:
    kind = kind_of(options)
    if options.int8 and kind != "onnx":
        raise UsageError("--int8 is ONNX Runtime's: give a file that ends in .onnx.")
    # What could only fail after the export.
    calibration, checked = (
        find_images(given) if given else [] for given in (options.int8, options.check)
    )
    if calibration or checked:
        check_runtime(options.out)
    cfg = load_config(options.config, options.cfg_options)
    tell_notices(cfg)
    size = tuple(options.size) if options.size else None
    record = export_model(cfg, options.checkpoint, options.out, kind, size)
    if options.int8:
        quantize(cfg, options.out, calibration)
    console = Console(highlight=False, soft_wrap=True)
    weight = options.out.stat().st_size
    if options.out.suffix == ".xml":
        weight += options.out.with_suffix(".bin").stat().st_size
    sizes = "any size" if record.size is None else f"{record.size[0]}x{record.size[1]}"
    console.print(
        f"{options.out}: images of {sizes} to {', '.join(record.outputs)}, {weight / 1e6:.1f} MB"
    )
    if options.check:
        check(options, cfg, checked, console)


def main() -> None:
    options = parse_arguments()
    run_command(lambda: export(options), quiet=True)


if __name__ == "__main__":
    main()
