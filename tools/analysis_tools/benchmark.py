#!/usr/bin/env python
"""Times VMamba beside other models in one run, or computes what they keep. See `--help`.

`--table N` does it for every row of one of the paper's tables.
"""

import argparse
import dataclasses
import itertools
import shlex
import sys
from collections.abc import Sequence
from datetime import date
from math import prod
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress

from mmvmamba.analysis.activations import Activations, count_activations
from mmvmamba.analysis.measured import PEERS, Subject
from mmvmamba.analysis.paper_tables import (
    Measurement,
    PaperTable,
    Row,
    comparison,
    find_tables,
)
from mmvmamba.analysis.passes import (
    EXECUTIONS,
    MEMORY_FORMATS,
    PASSES,
    PRECISIONS,
    RUNTIMES,
    Case,
)
from mmvmamba.analysis.reports import (
    Table,
    activations_panels,
    activations_tables,
    append_csv,
    check_csv,
    find_section,
    machine,
    plot,
    throughput_panels,
    throughput_table,
    write_section,
)
from mmvmamba.analysis.subjects import find_subject
from mmvmamba.analysis.throughput import ROUNDS, Result, case_of, measure_case
from mmvmamba.engine.cli import add_cfg_options, run_command
from mmvmamba.engine.errors import UsageError

MODELS = ("tiny", "swin-tiny", "convnext-tiny")
GPU_BATCH = 128
CPU_BATCHES = {"inference": 1, "training": 4}
SECONDS = 5.0
# What lets a table take minutes on a CPU: one image, one pass, a turn each, and of detectors and
# segmentors, which the paper does not time, a smaller image.
CPU_TABLE_BATCH, CPU_TABLE_SECONDS, CPU_TABLE_ROUNDS = 1, 0.2, 1
CPU_TABLE_PASSES = ["inference"]
CPU_TABLE_SIZE = (224, 256)

Shape = tuple[int | None, tuple[int, int]]


def shape(text: str) -> Shape:
    """Reads SIDE, HEIGHTxWIDTH or BATCHxHEIGHTxWIDTH."""
    numbers = [int(part) for part in text.split("x")]
    if not 1 <= len(numbers) <= 3 or min(numbers) < 1:
        raise ValueError(text)
    *batch, height, width = numbers if len(numbers) > 1 else numbers * 2
    return (batch[0] if batch else None), (height, width)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Time models, every one in the same modes and taking turns, and give their "
        "ratio to the first. A mode's output is compared with the model's own in fp32 first; a "
        "model that fails has no figures, and the exit status is 1."
    )
    parser.add_argument(
        "models",
        nargs="*",
        metavar="MODEL",
        help="configs (FILE.py or PACKAGE::FOLDER/FILE.py), archs of VMamba (with +cp behind the "
        f"name: gradient checkpointing), {', '.join(PEERS)}, or models of timm (default: "
        f"{' '.join(MODELS)})",
    )
    parser.add_argument(
        "--table",
        metavar="NUMBER",
        help="every row of this table of the paper, or of its part ('2, COCO', '2, ADE20K'): its "
        "parameters, FLOPs and throughput ratio to VMamba-T beside the paper's. Sizes and passes "
        "are the table's where they are not given; on the CPU one image, inference, and "
        f"{'x'.join(map(str, CPU_TABLE_SIZE))} of detectors and segmentors. Of a table over "
        "several sizes (9), --sizes chooses rows",
    )
    parser.add_argument(
        "--passes",
        nargs="+",
        choices=PASSES,
        help="(default: both; of a table, those that the paper times, on the CPU inference)",
    )
    parser.add_argument(
        "--precision", nargs="+", choices=PRECISIONS, default=["fp32"], help="(default: fp32)"
    )
    execution = parser.add_mutually_exclusive_group()
    execution.add_argument(
        "--execution",
        nargs="+",
        choices=EXECUTIONS,
        default=["eager"],
        help="a table each; 'graph' is a CUDA graph of the whole pass (default: eager)",
    )
    execution.add_argument(
        "--runtime",
        nargs="+",
        choices=("eager", *RUNTIMES),
        default=[],
        help="export every model to these, and let them take turns in one table; 'eager' is the "
        "model as it is",
    )
    parser.add_argument(
        "--batch",
        type=int,
        help=f"images in a batch (default: {GPU_BATCH}; on the CPU 1, in training 4, of a table 1)",
    )
    parser.add_argument(
        "--sizes",
        type=shape,
        nargs="+",
        metavar="SIZE",
        help="sizes of the images: 224, 800x1280 (height x width), or 2x800x1280 with the batch "
        "(default: 224)",
    )
    parser.add_argument(
        "--memory-format",
        choices=MEMORY_FORMATS,
        default="channels-last",
        help="of every model's weights and images (default: channels-last)",
    )
    parser.add_argument(
        "--backbone-only", action="store_true", help="leave heads and necks out, of every model"
    )
    parser.add_argument(
        "--activations",
        action="store_true",
        help="compute, without running it, what a training step keeps for its backward pass on a "
        "GPU, which need not be there",
    )
    parser.add_argument(
        "--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument(
        "--seconds",
        type=float,
        help=f"time for each model and case (default: {SECONDS:g}; of a table on the CPU "
        f"{CPU_TABLE_SECONDS:g}, but a call at least)",
    )
    parser.add_argument(
        "--rounds",
        type=int,
        help=f"turns that it is split in (default: {ROUNDS}; of a table on the CPU "
        f"{CPU_TABLE_ROUNDS})",
    )
    parser.add_argument("--csv", type=Path, help="append the results to this file")
    parser.add_argument("--plot", type=Path, help="draw the results over --sizes into this picture")
    parser.add_argument(
        "--markdown",
        type=Path,
        help="write the tables into this file, between its comments <!-- begin SECTION --> and "
        "<!-- end SECTION -->",
    )
    parser.add_argument("--section", default="measured", help="(default: measured)")
    add_cfg_options(parser)
    options = parser.parse_args(arguments)
    if any(number is not None and number < 1 for number in (options.rounds, options.batch)):
        parser.error("--rounds and --batch must be at least 1")
    table_on_cpu = options.table and options.device.type == "cpu"
    if options.seconds is None:
        options.seconds = CPU_TABLE_SECONDS if table_on_cpu else SECONDS
    if options.rounds is None:
        options.rounds = CPU_TABLE_ROUNDS if table_on_cpu else ROUNDS
    if options.table:
        given = {"models": options.models, "--plot": options.plot, "--csv": options.csv}
        given |= {"--activations": options.activations, "--backbone-only": options.backbone_only}
        given |= {"--cfg-options": options.cfg_options, "--runtime": options.runtime}
        wrong = [name for name, value in given.items() if value]
        if wrong:
            parser.error(f"--table has its own models and form: leave out {', '.join(wrong)}")
        if len(options.precision) > 1 or len(options.execution) > 1:
            parser.error("--table takes one --precision and one --execution")
        if table_on_cpu:
            options.batch = options.batch or CPU_TABLE_BATCH
            options.passes = options.passes or CPU_TABLE_PASSES
        return options
    options.models = options.models or list(MODELS)
    options.passes = options.passes or list(PASSES)
    options.sizes = options.sizes or [shape("224")]
    return options


def subjects(options: argparse.Namespace) -> list[Subject]:
    try:
        models = [
            find_subject(name, options.backbone_only, options.cfg_options)
            for name in dict.fromkeys(options.models)
        ]
    except ValueError as error:
        raise UsageError(str(error)) from error
    if not options.runtime:
        return models
    return [
        dataclasses.replace(model, name=f"{model.name}, {runtime}", execution=runtime)
        for model in models
        for runtime in options.runtime
    ]


def cases(options: argparse.Namespace, passes: Sequence[str], sizes: Sequence[Shape]) -> list[Case]:
    def default_batch(passes: str) -> int:
        on_gpu = options.activations or options.device.type == "cuda"
        return options.batch or (GPU_BATCH if on_gpu else CPU_BATCHES[passes])

    return [
        Case(pass_, precision, batch or default_batch(pass_), size, execution, format_)
        for pass_ in passes
        for precision in options.precision
        for execution in (["eager"] if options.activations else options.execution)
        for batch, size in sizes
        for format_ in [options.memory_format]
    ]


def check_cases(options: argparse.Namespace, todo: Sequence[Case]) -> None:
    """Refuses what the device cannot do."""
    if options.device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"--device {options.device}: torch sees no GPU here.")
    try:
        for case in todo:
            case.check_device(options.device)
    except ValueError as error:
        raise UsageError(str(error)) from error


def check(options: argparse.Namespace, todo: Sequence[Case], about: dict[str, str]) -> None:
    """Refuses before anything is measured what could only fail after it."""
    kind = Activations if options.activations else Result
    if options.csv:
        check_csv(options.csv, kind("", todo[0]).row() | about)
    if options.markdown:
        find_section(options.markdown, options.section)
    if options.plot:
        from matplotlib.figure import Figure

        formats = Figure().canvas.get_supported_filetypes()
        if options.plot.suffix.lstrip(".") not in formats:
            raise UsageError(f"--plot {options.plot}: choose one of .{', .'.join(formats)}")


def benchmark(options: argparse.Namespace) -> None:
    models = subjects(options)
    passes = ["training"] if options.activations else options.passes
    todo = cases(options, passes, options.sizes)
    if not options.activations:
        check_cases(options, [case_of(*pair) for pair in itertools.product(models, todo)])
    about = machine(options.device)
    if options.activations:
        del about["device"], about["load"]
    check(options, todo, about)

    console = Console()
    console.print(", ".join(f"{key} {value}" for key, value in about.items()), highlight=False)
    results, tables = [], []
    with Progress(console=Console(stderr=True), transient=True) as progress:
        steps = 1 if options.activations else 1 + options.rounds
        task = progress.add_task("", total=len(todo) * len(models) * steps)
        for case in todo:

            def advance(name: str, case: Case = case) -> None:
                progress.update(task, advance=1, description=f"{name}, {case}")

            found = measure(options, models, case, advance)
            results += found
            if options.csv:
                append_csv(options.csv, [result.row() | about for result in found])
            if not options.activations:
                tables.append(throughput_table(found))
                console.print(tables[-1].rich())
    if options.activations:
        tables = activations_tables(results)
        console.print(*(table.rich() for table in tables))
    report(options, results, tables, about)
    failed = sum(bool(result.failure) for result in results)
    if failed:
        raise UsageError(f"{failed} of {len(results)} measurements failed, see above.")


def benchmark_table(options: argparse.Namespace) -> None:
    """Every row of one of the paper's tables."""
    try:
        tables = find_tables(options.table)
    except ValueError as error:
        raise UsageError(f"--table: {error}") from error
    if options.markdown:
        find_section(options.markdown, options.section)
    parts = []
    for table in tables:
        rows, batch, size = choose_rows(options, table)
        todo = cases(options, options.passes or table.passes, [(batch, size or rows[0].shape)])
        check_cases(options, todo)
        parts.append((table, rows, todo, size))

    about = machine(options.device)
    console = Console()
    console.print(", ".join(f"{key} {value}" for key, value in about.items()), highlight=False)
    measure = Measurement(options.device, options.seconds, options.rounds)
    found, failures = [], 0
    with Progress(console=Console(stderr=True), transient=True) as progress:
        steps = sum(len(rows) * (1 + len(todo)) for _, rows, todo, _ in parts)
        task = progress.add_task("", total=steps)

        def advance(name: str) -> None:
            progress.update(task, advance=1, description=name)

        for table, rows, todo, size in parts:
            measured = measure(table, rows, todo, size, advance)
            found.append(comparison(table, measured, todo))
            failures += sum(bool(row.failures) for row in measured)
            console.print(found[-1].rich())
            # After every part: one may take many minutes.
            report(options, [], found, about)
    if failures:
        raise UsageError(f"{failures} rows failed, see above.")


def choose_rows(
    options: argparse.Namespace, table: PaperTable
) -> tuple[list[Row], int | None, tuple[int, int] | None]:
    """Which rows are measured, in which batch, and at which size, if not each at its own.

    Rows of several sizes are chosen by them, rows of one are timed at one.
    """
    given = options.sizes or []
    wanted, own = {size for _, size in given}, dict.fromkeys(row.shape for row in table.rows)
    several = len(own) > 1
    rows = [row for row in table.rows if not several or not wanted or row.shape in wanted]
    if not rows or (not several and len(wanted) > 1):
        sizes = ", ".join(f"{height}x{width}" for height, width in own)
        raise UsageError(
            f"--sizes: table {table.name} is measured at one size, or its rows are of {sizes}."
        )
    batch, size = given[0] if given else (None, None)
    if several:
        return rows, batch, None
    if size is None and options.device.type == "cpu" and prod(rows[0].shape) > prod(CPU_TABLE_SIZE):
        size = CPU_TABLE_SIZE
    return rows, batch, size


def measure(options: argparse.Namespace, models: Sequence[Subject], case: Case, advance) -> list:
    if options.activations:
        found = []
        for model in models:
            advance(model.name)
            found.append(count_activations(model, case))
        return found
    return measure_case(models, case, options.device, options.seconds, options.rounds, advance)


def report(
    options: argparse.Namespace, results, tables: Sequence[Table], about: dict[str, str]
) -> None:
    """Writes what is written once, at the end."""
    if options.markdown:
        command = shlex.join(["python", "tools/analysis_tools/benchmark.py", *sys.argv[1:]])
        head = f"{date.today()}: {', '.join(f'{key} {value}' for key, value in about.items())}"
        text = "\n\n".join(
            [f"```bash\n{command}\n```", head, *(table.markdown() for table in tables)]
        )
        write_section(options.markdown, options.section, text)
    if options.plot and not all(result.failure for result in results):
        panels = activations_panels if options.activations else throughput_panels
        plot(panels(results), options.plot)


def main() -> None:
    options = parse_arguments()
    work = benchmark_table if options.table else benchmark
    run_command(lambda: work(options), quiet=True)


if __name__ == "__main__":
    main()
