#!/usr/bin/env python
"""Converts checkpoints between the official repository's layout and ours. See `--help`."""

import argparse
import csv
import os
from collections import Counter
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from mmvmamba import __version__
from mmvmamba.analysis.flops import build_structure
from mmvmamba.engine.cli import (
    CONFIG_HELP,
    add_cfg_options,
    load_config,
    run_command,
    tell_notices,
)
from mmvmamba.engine.errors import UsageError
from mmvmamba.engine.runner import load_strictly
from mmvmamba.engine.tasks import scope_of
from mmvmamba.models.checkpoint import STATE_DICT_ENTRIES, Conversion, convert, read_checkpoint


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Turn official classification, detection and segmentation files into files for "
        "our configs, or back. The config's model must have exactly the file's keys and shapes."
    )
    parser.add_argument("source", help="the file, or its http(s) address")
    parser.add_argument("target", type=Path, help="the file to write")
    parser.add_argument("--to", choices=("ours", "official"), required=True)
    parser.add_argument("--config", required=True, help=CONFIG_HELP)
    parser.add_argument(
        "--entry",
        help="which weights of the file to take (default: the first there is of "
        f"{', '.join(STATE_DICT_ENTRIES)})",
    )
    parser.add_argument(
        "--report", type=Path, help="write what became of every key to this CSV file"
    )
    parser.add_argument("--force", action="store_true", help="overwrite the target")
    add_cfg_options(parser)
    return parser.parse_args()


def run(options: argparse.Namespace) -> None:
    source, target = options.source, options.target
    if target.exists() and not options.force:
        raise UsageError(f"{target} exists. Name another file, or overwrite it with --force.")
    cfg = load_config(options.config, options.cfg_options)
    tell_notices(cfg)
    classifier = scope_of(cfg) == "mmpretrain"
    checkpoint = read_checkpoint(source)
    result = convert(checkpoint, source, options.to, classifier, options.entry)
    ours = result
    if options.to == "official":
        # The config's model has our keys, whichever are written.
        ours = convert(checkpoint, source, "ours", classifier, options.entry)
    shapes = matched_shapes(ours, cfg)
    state = {
        # A linear layer's weight may come as a 1x1 convolution's.
        name: result.state[name].reshape(shapes[own])
        for name, own in zip(result.state, ours.state, strict=True)
    }
    if classifier and options.to == "official":
        content = {"model": state}
    else:
        meta = dict(checkpoint.get("meta") or {})
        meta |= {"converted_from": Path(source).name, "mmvmamba_version": __version__}
        content = {"meta": meta, "state_dict": state}
    save(content, target)
    rows = report(result, state)
    if options.report:
        write_report(options.report, rows)
    show(result, rows, target)


def matched_shapes(ours: Conversion, cfg) -> dict[str, torch.Size]:
    """The model's shapes by key, after a check that the file has exactly its keys and shapes."""
    model = build_structure(cfg)
    load_strictly(model, {k: v.to("meta") for k, v in ours.state.items()}, ours.source)
    return {key: value.shape for key, value in model.state_dict().items()}


def save(content: dict, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    # Whoever looks finds the whole file or none.
    unfinished = target.with_name(f"{target.name}.{os.getpid()}.unfinished")
    try:
        torch.save(content, unfinished)
        unfinished.replace(target)
    finally:
        unfinished.unlink(missing_ok=True)


def report(result: Conversion, state: dict[str, Tensor]) -> list[dict[str, str]]:
    rows = []
    for key, name in result.names.items():
        value = None if name is None else state[name]
        change = "left out" if name is None else "renamed" if name != key else "kept"
        if value is not None and value.shape != result.state[name].shape:
            change += ", reshaped"
        row = {"key in the file": key, "key written": name or "", "what": change}
        shape = "" if value is None else " x ".join(map(str, value.shape))
        rows.append({**row, "shape": shape, "dtype": "" if value is None else str(value.dtype)})
    return rows


def write_report(path: Path, rows: list[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def show(result: Conversion, rows: list[dict[str, str]], target: Path) -> None:
    counts = Counter(
        ((row["key written"] or row["key in the file"]).split(".")[0], row["what"]) for row in rows
    )
    entry = f" ({result.entry})" if result.entry else ""
    table = Table("part", "what", title=f"{Path(result.source).name}{entry} to {target}")
    table.add_column("keys", justify="right")
    for (part, what), count in counts.items():
        table.add_row(part, what, str(count))
    console = Console()
    console.print(table)
    if result.left_out:
        console.print("left out:", ", ".join(result.left_out))
    console.print(
        f"every key and shape of the config's model is there: {len(result.state)} tensors"
    )


def main() -> None:
    options = parse_arguments()
    run_command(lambda: run(options), quiet=True)


if __name__ == "__main__":
    main()
