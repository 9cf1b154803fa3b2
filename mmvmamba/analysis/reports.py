"""Results of measurements as tables, CSV files, sections of Markdown files and plots."""

import csv
import itertools
import os
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import rich.table
import torch
from rich import box

from mmvmamba.analysis.activations import Activations
from mmvmamba.analysis.throughput import Result
from mmvmamba.compat import stack_version
from mmvmamba.engine.errors import UsageError

# On a quiet machine the 80th percentile is about a tenth above the 20th (docs/performance.md).
WIDE = 1.25


@dataclass(frozen=True)
class Table:
    """A table of text; `notes` stand below it.

    The first column is left-aligned, the others, numbers, are right-aligned.
    """

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()

    def rich(self) -> rich.table.Table:
        """For the terminal, of any width."""
        table = rich.table.Table(
            title=self.title,
            caption="\n".join(self.notes) or None,
            box=box.SIMPLE_HEAD,
            pad_edge=False,
            collapse_padding=True,
        )
        for i, name in enumerate(self.header):
            table.add_column(name, justify="right" if i else "left", overflow="fold")
        for row in self.rows:
            table.add_row(*row)
        return table

    def markdown(self) -> str:
        """For a Markdown file."""
        rules = ("---", *("--:" for _ in self.header[1:]))
        lines = ["| " + " | ".join(row) + " |" for row in (self.header, rules, *self.rows)]
        notes = [f"\n{note}" for note in self.notes]
        return "\n".join([f"**{self.title}**\n", *lines, *notes])


def throughput_table(results: Sequence[Result]) -> Table:
    """One case: times, throughput and its ratio to the first model's."""
    memory = any(result.peak_gb is not None for result in results)
    header = ("model", "params (M)", "ms", "p20-p80", "images/s", "relative")
    rows = []
    for result, ratio in zip(results, ratios(results), strict=True):
        millions = "-" if result.params is None else f"{result.params / 1e6:.1f}"
        if result.failure:
            cells = ("failed", "-", "-", "-")
        else:
            low, middle, high = (1e3 * t for t in (result.p20, result.seconds, result.p80))
            digits = 1 if middle >= 10 else 3
            cells = (
                f"{middle:.{digits}f}",
                f"{low:.{digits}f}-{high:.{digits}f}",
                f"{result.images_per_second:.1f}",
                "-" if ratio is None else f"{ratio:.2f}",
            )
        peak = ("-" if result.peak_gb is None else f"{result.peak_gb:.2f}",) * memory
        rows.append((result.model, millions, *cells, *peak))
    notes = _failures(results) + _doubts(results)
    return Table(str(results[0].case), header + ("peak GB",) * memory, tuple(rows), notes)


def _doubts(results: Sequence[Result]) -> tuple[str, ...]:
    """Whose times vary too much to be compared, as on a machine that does something else too."""
    wide = [r.model for r in results if not r.failure and r.p80 > WIDE * r.p20]
    if not wide:
        return ()
    return (
        f"Times of {', '.join(wide)} vary by more than {WIDE - 1:.0%} (p20 to p80): do other "
        "programs use the machine? Do not compare models before a run without such a warning.",
    )


def ratios(results: Sequence[Result]) -> list[float | None]:
    """Throughput over the first model's; None where either failed."""
    first = results[0].images_per_second
    return [r.images_per_second / first if first and r.images_per_second else None for r in results]


def activations_tables(results: Sequence[Activations]) -> list[Table]:
    """The models' figures in GB: a table for each precision, or one where there is one shape."""
    what = "computed activations kept for backward (GB)"
    if len({r.case.shape for r in results}) == 1:
        title = f"{what}, {results[0].case.shape}"
        return [_activations_table(title, results, lambda r: r.case.precision)]
    return [
        _activations_table(f"{what}, {precision}", group, lambda r: r.case.shape)
        for precision, group in _grouped(results, lambda r: r.case.precision)
    ]


def _activations_table(
    title: str, results: Sequence[Activations], column: Callable[[Activations], str]
) -> Table:
    columns = list(dict.fromkeys(map(column, results)))
    cells = {(r.model, column(r)): _gigabytes(r) for r in results}
    rows = (
        (model, *(cells[model, name] for name in columns))
        for model in dict.fromkeys(r.model for r in results)
    )
    return Table(title, ("model", *columns), tuple(rows), _failures(results))


def _gigabytes(result: Activations) -> str:
    return "failed" if result.failure else f"{result.bytes / 1e9:.2f}"


def _failures(results: Iterable[Result | Activations]) -> tuple[str, ...]:
    return tuple(f"{r.model}, {r.case.shape}: {r.failure}" for r in results if r.failure)


def _grouped(results: Sequence, key) -> list[tuple]:
    """Groups in the order of first appearance."""
    keys = list(dict.fromkeys(map(key, results)))
    return [(k, [r for r in results if key(r) == k]) for k in keys]


def machine(device: torch.device) -> dict[str, str]:
    """What the figures depend on beside the models: device, versions, how busy it is."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        instructions = torch.backends.cpu.get_cpu_capability()
        name = f"{_cpu_name()}, {instructions}, {torch.get_num_threads()} threads"
    found = {"device": name, "torch": torch.__version__}
    for package in ("triton", "timm", "mmpretrain"):
        found[package] = stack_version(package) or "-"
    return found | {"load": f"{os.getloadavg()[0]:.1f}"}


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def check_csv(file: Path, columns: Iterable[str]) -> None:
    """Makes sure that rows can be added to a file that may exist.

    Raises:
        UsageError: If its header is another one.
    """
    if not file.exists():
        return
    with file.open(newline="", encoding="utf-8") as stream:
        header = next(csv.reader(stream), [])
    if header != list(columns):
        raise UsageError(
            f"{file} has other columns than this run's results; choose another file, or move it "
            f"away.\n  its header: {','.join(header) or 'none'}\n  expected:   {','.join(columns)}"
        )


def append_csv(file: Path, rows: Sequence[Mapping]) -> None:
    """Adds rows to a CSV file, which is made with a header if it does not exist.

    Raises:
        UsageError: If the file has another header.
    """
    check_csv(file, rows[0])
    new = not file.exists()
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        if new:
            writer.writeheader()
        writer.writerows(rows)


def find_section(file: Path, name: str) -> tuple[str, str]:
    """The text before and after a generated section, its two marking comments included.

    Raises:
        UsageError: If there is no such file or section.
    """
    begin, end = (f"<!-- {word} {name} -->" for word in ("begin", "end"))
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    if begin not in text or end not in text.partition(begin)[2]:
        raise UsageError(
            f"{file} has no section {name!r}: put two lines where the tables should be, {begin} "
            f"and {end}"
        )
    before, _, rest = text.partition(begin)
    return before + begin, end + rest.partition(end)[2]


def write_section(file: Path, name: str, text: str) -> None:
    """Replaces what stands between a section's marking comments.

    Raises:
        UsageError: If there is no such file or section.
    """
    before, after = find_section(file, name)
    file.write_text(f"{before}\n\n{text}\n\n{after}", encoding="utf-8")


@dataclass(frozen=True)
class Panel:
    """One plot: for each model, values over the image's side in pixels."""

    title: str
    quantity: str
    curves: dict[str, list[tuple[float, float]]]


def throughput_panels(results: Sequence[Result]) -> list[list[Panel]]:
    """A row of panels for each mode: throughput, and memory where it was measured."""
    found = [r for r in results if not r.failure]
    rows = []
    for title, group in _grouped(found, lambda r: _mode(r, r.case.execution)):
        rows.append([_panel(title, "throughput (images/s)", group, lambda r: r.images_per_second)])
        if any(r.peak_gb is not None for r in found):
            rows[-1].append(_panel(title, "peak memory (GB)", group, lambda r: r.peak_gb))
    return rows


def activations_panels(results: Sequence[Activations]) -> list[list[Panel]]:
    """One row, with a panel for each precision."""
    found = [r for r in results if not r.failure]
    return [
        [
            _panel(title, "computed activations (GB)", group, lambda r: r.bytes / 1e9)
            for title, group in _grouped(found, _mode)
        ]
    ]


def _mode(result: Result | Activations, *more: str) -> str:
    batches = f"batch {result.case.batch}"
    return ", ".join((result.case.passes, result.case.precision, *more, batches))


def _panel(title: str, quantity: str, results: Sequence, value) -> Panel:
    curves: dict[str, list[tuple[float, float]]] = {}
    for result in results:
        height, width = result.case.size
        point = ((height * width) ** 0.5, value(result))
        curves.setdefault(result.model, []).append(point)
    return Panel(title, quantity, {name: sorted(points) for name, points in curves.items()})


def plot(panels: Sequence[Sequence[Panel]], file: Path) -> None:
    """Draws rows of panels: lines over the image's side, or bars where there is one side.

    Args:
        panels: The rows.
        file: The picture, of any format of matplotlib; its folder is made if need be.
    """
    figure = make_figure(panels)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)


def make_figure(panels: Sequence[Sequence[Panel]]):
    """The figure that `plot` writes."""
    # The object-oriented interface leaves pyplot's global state and back end alone.
    from matplotlib.figure import Figure

    columns = max(map(len, panels))
    figure = Figure(figsize=(5.6 * columns, 3.8 * len(panels)), layout="constrained")
    grid = figure.subplots(len(panels), columns, squeeze=False)
    models = list(
        dict.fromkeys(name for panel in itertools.chain(*panels) for name in panel.curves)
    )
    colors = {name: f"C{i % 10}" for i, name in enumerate(models)}
    for axes, panel in zip(grid.flat, itertools.chain(*panels), strict=True):
        _draw(axes, panel, colors)
    return figure


def _draw(axes, panel: Panel, colors: Mapping[str, str]) -> None:
    axes.set_title(panel.title, fontsize="medium")
    axes.set_ylabel(panel.quantity)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    sides = sorted({side for points in panel.curves.values() for side, _ in points})
    if len(sides) == 1:
        heights = [points[0][1] for points in panel.curves.values()]
        bars = axes.bar(
            list(panel.curves), heights, color=[colors[name] for name in panel.curves], width=0.6
        )
        axes.bar_label(bars, fmt=lambda value: f"{value:.3g}")
        axes.tick_params(axis="x", rotation=20 if len(heights) > 3 else 0)
        axes.set_xlabel(f"model, image side {sides[0]:.0f} pixels")
        axes.margins(y=0.12)
        return
    for name, points in panel.curves.items():
        axes.plot(*zip(*points, strict=True), marker="o", label=name, color=colors[name])
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xticks(sides, [f"{side:.0f}" for side in sides])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("image side, or root of height x width (pixels)")
    axes.legend(fontsize="small")
