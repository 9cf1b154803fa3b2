"""Check every backend of an operator, then time it.

A backend is timed at a shape only after its output and all gradients were right: against the
float64 oracle at a small shape of the same channels, dt rank and states, and, unless the shape is
too large for it, against the reference backend at the shape itself. A failing check reports no
time. Bandwidth counts what no implementation can avoid, one read of each input and one write of
each output, against the rate of a copy measured in the same run.

    python kernels/benchmarks/run.py
    python kernels/benchmarks/run.py --suite lengths --op selective_scan --backends reference
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import mmvmamba_kernels
from mmvmamba_kernels import BackendError, available_backends
from mmvmamba_kernels.testing import ARGUMENTS, ORACLES, errors, output_and_gradients

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
TOLERANCES = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
OPTIONS = {
    "selective_scan_2d": {},
    "selective_scan_2d_norm": {},
    "selective_scan": {"delta_softplus": True},
    "depthwise_conv": {"act": "silu"},
    "add_layer_norm": {},
}
# The parameters of every operator, which are float32 in training, also where maps are not.
PARAMETERS = {
    "selective_scan_2d": ("dt_weight", "dt_bias", "A", "D"),
    "selective_scan_2d_norm": ("dt_weight", "dt_bias", "A", "D"),
    "selective_scan": ("A", "D", "delta_bias"),
    "depthwise_conv": ("weight", "bias"),
    "add_layer_norm": ("weight", "bias"),
}
STATELESS = ("depthwise_conv", "add_layer_norm")
# Operators that are others with something before or after them, whose backends they use.
BACKENDS_OF = {"add_layer_norm": "layer_norm", "selective_scan_2d_norm": "selective_scan_2d"}

# Scanned elements beyond which the reference backend takes too long to check a shape on a CPU.
REFERENCE_LIMIT = 1 << 24
REPEATS = 50


@dataclass(frozen=True)
class Shape:
    """A problem of any operator; the 1D one scans the positions as one sequence of K groups."""

    batch: int
    height: int
    width: int
    channels: int
    states: int = 1

    @property
    def rank(self) -> int:
        return -(-self.channels // 16)

    @property
    def elements(self) -> int:
        """Scanned elements of four directions."""
        return 4 * self.batch * self.height * self.width * self.channels * self.states

    def arguments(
        self, op: str, dtype: torch.dtype, device: torch.device, extent: int | None = None
    ) -> dict[str, Tensor]:
        """Random arguments; maps of ``extent`` by ``extent`` positions and batch 1 if given."""
        batch, height, width = (
            (1, extent, extent) if extent else (self.batch, self.height, self.width)
        )
        sizes = (batch, height, width, self.channels)
        if op == "selective_scan":
            sizes = (batch, 4, self.channels, self.states, height * width)
        elif op.startswith("selective_scan_2d"):
            sizes = (*sizes, self.rank, self.states)
        arguments = ARGUMENTS[op](*sizes, dtype=dtype, device=device)
        for name in PARAMETERS[op]:
            arguments[name] = arguments[name].detach().float().requires_grad_()
        return arguments

    def __str__(self) -> str:
        text = f"{self.batch} x {self.height} x {self.width} x {self.channels}"
        return text if self.states == 1 else f"{text}, N = {self.states}"


MODEL_SHAPES = (
    Shape(128, 56, 56, 96),
    Shape(128, 28, 28, 192),
    Shape(128, 14, 14, 384),
    Shape(128, 7, 7, 768),
    Shape(2, 200, 320, 96),
    Shape(2, 100, 160, 192),
)
STATE_SHAPES = tuple(Shape(32, 56, 56, 96, states) for states in (1, 2, 4, 8, 16))


def shapes(suite: str, gpu: bool) -> list[Shape]:
    """The shapes of a suite; smaller ones without a GPU."""
    if suite == "lengths":
        # Maps as square as a power of two allows.
        exponents = range(8, 21 if gpu else 15, 1 if gpu else 2)
        return [Shape(1, 2 ** (e // 2), 2 ** (e - e // 2), 96) for e in exponents]
    chosen = MODEL_SHAPES if suite == "models" else STATE_SHAPES
    if gpu:
        return list(chosen)
    if suite == "models":
        return [Shape(1, s.height, s.width, s.channels) for s in chosen[:4]]
    return [Shape(1, 14, 14, s.channels, s.states) for s in chosen]


@dataclass
class Row:
    """One measurement, as a row of the CSV file."""

    date: str
    device: str
    versions: str
    op: str
    backend: str
    dtype: str
    passes: str
    shape: str
    median_ms: float
    p20_ms: float
    p80_ms: float
    first_call_s: float
    gb_per_s: float
    copy_gb_per_s: float
    error: float


def measure(function: Callable[[], object], device: torch.device, seconds: float) -> list[float]:
    """Milliseconds of single calls, after one that is not counted."""
    times: list[float] = []
    function()
    deadline = time.perf_counter() + seconds
    while len(times) < 3 or (len(times) < REPEATS and time.perf_counter() < deadline):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            function()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        else:
            begin = time.perf_counter()
            function()
            times.append((time.perf_counter() - begin) * 1e3)
    return times


def copy_rate(device: torch.device) -> float:
    """Gigabytes per second that a copy reads and writes, of a buffer that fits in no cache."""
    size = 1 << (30 if device.type == "cuda" else 28)
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    return 2 * size / statistics.median(measure(lambda: target.copy_(source), device, 1)) / 1e6


def runner(op: str, backend: str) -> Callable[..., Tensor]:
    function = getattr(mmvmamba_kernels, op)

    def run(**tensors: Tensor) -> Tensor:
        out = function(**tensors, **OPTIONS[op], backend=backend)
        return out[1] if op == "add_layer_norm" else out

    return run


def check(op: str, backend: str, shape: Shape, dtype: torch.dtype, device: torch.device) -> float:
    """The largest relative error of output and gradients.

    Raises:
        BackendError: If the backend cannot run this problem.
    """
    run = runner(op, backend)
    small = shape.arguments(op, dtype, device, extent=5)
    expected = output_and_gradients(lambda **t: ORACLES[op](**t, **OPTIONS[op]), small)
    found = errors(output_and_gradients(run, small), expected)
    if backend != "reference" and (device.type != "cpu" or shape.elements <= REFERENCE_LIMIT):
        full = shape.arguments(op, dtype, device)
        expected = output_and_gradients(runner(op, "reference"), full)
        large = errors(output_and_gradients(run, full), expected)
        found = {name: max(error, large[name]) for name, error in found.items()}
    return max(found.values())


def time_passes(
    op: str, backend: str, shape: Shape, dtype: torch.dtype, device: torch.device, seconds: float
) -> Iterable[tuple[str, list[float], float, int]]:
    """Name, milliseconds, seconds of the first call and bytes, of the forward and both passes."""
    run = runner(op, backend)
    arguments = shape.arguments(op, dtype, device)
    leaves = list(arguments.values())
    tensors = {name: t.detach() for name, t in arguments.items()}
    grad = torch.ones_like(tensors[next(iter(tensors))])
    inputs = sum(t.nbytes for t in tensors.values())

    def forward() -> Tensor:
        return run(**tensors)

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(run(**arguments), leaves, grad)

    # The backward pass reads the inputs again and the output's gradient, and writes every gradient.
    moved = inputs + grad.nbytes
    passes = (("forward", forward, moved), ("forward + backward", both, 2 * moved + inputs))
    for name, function, traffic in passes:
        begin = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        first = time.perf_counter() - begin
        yield name, measure(function, device, seconds), first, traffic


def versions() -> str:
    """Versions of what decides the speed."""
    found = [f"python {platform.python_version()}"]
    for package in ("torch", "triton", "mamba_ssm"):
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} of {os.cpu_count()} threads"


def append(path: Path, row: Row) -> None:
    """Add a row to a CSV file, which starts with the names of the columns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)])
        if fresh:
            writer.writeheader()
        writer.writerow(asdict(row))


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    gpu = torch.cuda.is_available()
    parser.add_argument("--op", choices=list(PARAMETERS), default="selective_scan_2d")
    parser.add_argument(
        "--suite",
        choices=["models", "lengths", "states"],
        default="models",
        help="VMamba-T's maps, 2**8 to 2**20 positions, or 1 to 16 states; less without a GPU",
    )
    parser.add_argument("--backends", nargs="+", help="default: all that can run")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bfloat16" if gpu else "float32")
    parser.add_argument("--device", default="cuda" if gpu else "cpu")
    parser.add_argument("--seconds", type=float, default=2, help="time spent on a measurement")
    parser.add_argument("--csv", type=Path, default=Path("work_dirs/kernel_benchmarks.csv"))
    options = parser.parse_args(argv)
    if options.suite == "states" and options.op in STATELESS:
        parser.error(f"{options.op} has no states; its suites are models and lengths")
    return options


def main(argv: list[str] | None = None) -> None:
    options = parse_arguments(argv)
    console = Console()
    if not console.is_terminal:
        console = Console(width=150)
    device, dtype = torch.device(options.device), DTYPES[options.dtype]
    backends = options.backends or available_backends(BACKENDS_OF.get(options.op, options.op))
    name, packages, ceiling = device_name(device), versions(), copy_rate(device)
    table = Table(
        title=f"{options.op}, {options.dtype}, {name}; copy {ceiling:.0f} GB/s; {packages}"
    )
    refusals: dict[str, None] = {}
    table.add_column("batch x H x W x D")
    table.add_column("backend")
    table.add_column("pass")
    for column in ("median ms", "p20", "p80", "GB/s", "of copy", "first call s", "error"):
        table.add_column(column, justify="right")
    for shape in shapes(options.suite, device.type == "cuda"):
        for backend in backends:
            try:
                error = check(options.op, backend, shape, dtype, device)
                if not error <= TOLERANCES[dtype]:
                    cells = ("[red]wrong, not timed", *[""] * 6, f"{error:.0e}")
                    table.add_row(str(shape), backend, *cells)
                    continue
                for passes, times, first, traffic in time_passes(
                    options.op, backend, shape, dtype, device, options.seconds
                ):
                    low, *_, high = statistics.quantiles(times, n=5, method="inclusive")
                    median = statistics.median(times)
                    rate = traffic / median / 1e6
                    row = Row(
                        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
                        device=name,
                        versions=packages,
                        op=options.op,
                        backend=backend,
                        dtype=options.dtype,
                        passes=passes,
                        shape=str(shape),
                        median_ms=round(median, 4),
                        p20_ms=round(low, 4),
                        p80_ms=round(high, 4),
                        first_call_s=round(first, 2),
                        gb_per_s=round(rate, 2),
                        copy_gb_per_s=round(ceiling, 2),
                        error=error,
                    )
                    append(options.csv, row)
                    table.add_row(
                        row.shape,
                        backend,
                        passes,
                        f"{median:.3f}",
                        f"{low:.3f}",
                        f"{high:.3f}",
                        f"{rate:.3g}",
                        f"{rate / ceiling:.1%}",
                        f"{first:.2f}",
                        f"{error:.0e}",
                    )
            except BackendError as reason:
                table.add_row(str(shape), backend, "cannot run")
                refusals[str(reason)] = None
            except torch.OutOfMemoryError:
                table.add_row(str(shape), backend, "out of memory")
    console.print(table)
    for reason in refusals:
        console.print(reason)
    console.print(f"rows appended to {options.csv}")


if __name__ == "__main__":
    main()
