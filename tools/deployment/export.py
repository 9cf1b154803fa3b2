#!/usr/bin/env python
"""Exports a model to ONNX, OpenVINO or a `.pt2` file. See `--help`."""

import argparse
from pathlib import Path

from rich.console import Console
from rich.table import Table

from mmvmamba.analysis.inspection import find_images
from mmvmamba.deployment.check import compare, evaluate, runtime_of
from mmvmamba.deployment.export import FORMATS, export_model, load
from mmvmamba.deployment.quantize import quantize
from mmvmamba.deployment.record import scans_path
from mmvmamba.deployment.runtimes import Deployed, check_runtime
from mmvmamba.deployment.scans import export_scans
from mmvmamba.engine.cli import (
    add_config_arguments,
    load_config_and_data,
    run_command,
    tell_notices,
)
from mmvmamba.engine.errors import UsageError
from mmvmamba_kernels.backends.native import compiler, extension

WORST = 1e-4
"""Largest error of `--check`: a rounding error of the networks, which probabilities enlarge."""

WORST_METRIC = 1e-3
"""Largest difference of `--evaluate`, of metrics from 0 to 1; of percentages a hundred times it."""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Export a whole classifier, segmentor or detector, from pixels to results, and "
        "a JSON file beside it that says what to do with them."
    )
    add_config_arguments(parser)
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
        help="one image of this size per call, which some runtimes need",
    )
    size.add_argument(
        "--dynamic",
        action="store_true",
        help="images of any size and, except for detectors, of any number (the default)",
    )
    parser.add_argument(
        "--check",
        nargs="+",
        metavar="IMAGES",
        help="run these images, or folders of them, through the original and the exported model, "
        "and fail where they differ",
    )
    parser.add_argument(
        "--evaluate",
        action="store_true",
        help="compute the metrics of the config's test data with the original and the exported "
        "model, and fail where they differ",
    )
    parser.add_argument(
        "--int8",
        nargs="+",
        metavar="IMAGES",
        help="ONNX: products of 8-bit integers, calibrated on these images, or folders of them",
    )
    parser.add_argument(
        "--custom-op",
        action="store_true",
        help="ONNX Runtime: scan with the C++ kernel, in a library that "
        f"{extension.build_command(compiler.ONNX_RUNTIME)} makes",
    )
    parser.add_argument(
        "--activation-maps",
        action="store_true",
        help="ONNX: write a second graph beside it, for the activation maps that the page of "
        "`python -m mmvmamba.demo` shows",
    )
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


def compare_metrics(options: argparse.Namespace, cfg, console: Console) -> None:
    deployed = Deployed(options.out)
    ours, theirs = evaluate(cfg, options.checkpoint, deployed)
    table = Table("metric")
    for title in ("eager", runtime_of(deployed)):
        table.add_column(title, justify="right")
    for name, value in ours.items():
        table.add_row(name, f"{value:.4f}", f"{theirs[name]:.4f}")
    console.print(table)
    # Classifiers and segmentors have percentages.
    scale = 1 if deployed.record.task == "mmdet" else 100
    worst = max(abs(theirs[name] - value) / scale for name, value in ours.items())
    if not options.int8 and not worst <= WORST_METRIC:
        raise UsageError(
            f"a metric of {options.out} differs by {worst:.1e} from the original's, more than "
            f"{WORST_METRIC:.0e}."
        )


def export(options: argparse.Namespace) -> None:
    kind = kind_of(options)
    for name in ("int8", "custom_op", "activation_maps"):
        if getattr(options, name) and kind != "onnx":
            option = name.replace("_", "-")
            raise UsageError(f"--{option} is ONNX Runtime's: give a file that ends in .onnx.")
    # What could only fail after the export.
    calibration, checked = (
        find_images(given) if given else [] for given in (options.int8, options.check)
    )
    if calibration or checked or options.evaluate:
        check_runtime(options.out)
    cfg = load_config_and_data(options.config, options.cfg_options, options.data_root)
    tell_notices(cfg)
    size = tuple(options.size) if options.size else None
    loaded = load(cfg, options.checkpoint)
    record = export_model(loaded, options.out, kind, size, options.custom_op)
    if options.activation_maps:
        record = export_scans(loaded.module, options.out, record)
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
    if record.scans:
        scans = scans_path(options.out)
        console.print(f"{scans}: for activation maps, {scans.stat().st_size / 1e6:.1f} MB")
    if options.check:
        check(options, cfg, checked, console)
    if options.evaluate:
        compare_metrics(options, cfg, console)


def main() -> None:
    options = parse_arguments()
    run_command(lambda: export(options), quiet=True)


if __name__ == "__main__":
    main()
