"""The paths along which the map is scanned: their order, a picture of them, and what they cost."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch

from mmvmamba.analysis.activations import Activations, count_activations
from mmvmamba.analysis.flops import count_config
from mmvmamba.analysis.passes import Case
from mmvmamba.analysis.reports import Table
from mmvmamba.analysis.subjects import find_subject
from mmvmamba.analysis.throughput import ROUNDS, Result, measure_case
from mmvmamba.engine.cli import load_config
from mmvmamba.engine.errors import UsageError
from mmvmamba.engine.tasks import type_name
from mmvmamba.models import VMamba
from mmvmamba.models.ss2d import SCANS, ScanName, count_directions, find_scan
from mmvmamba_kernels.patterns import PATTERNS, Path, find_listed, pattern_paths


@dataclass(frozen=True)
class ListedPath:
    """A path of a scan whose paths are lists of positions.

    It is one sequence, in an order of its own.

    Attributes:
        scan: The scan.
        k: The path's number.
    """

    scan: str
    k: int
    column_major: ClassVar[bool] = False
    reverse: ClassVar[bool] = False
    per_line: ClassVar[bool] = False


def paths_of(scan: ScanName) -> tuple[Path | ListedPath, ...]:
    """The paths of a scan; those of 'cascade2d' are two along rows, then two along columns.

    Raises:
        ValueError: If there is no such scan.
    """
    scan = find_scan(scan)
    if scan == "cascade2d":
        return PATTERNS["rows"] + PATTERNS["columns"]
    if scan in SCANS:
        return PATTERNS[scan]
    return tuple(ListedPath(scan, k) for k in range(count_directions(scan)))


def path_positions(path: Path | ListedPath, height: int, width: int) -> np.ndarray:
    """The order in which a path visits a map's positions.

    Args:
        path: The path.
        height: H of the map.
        width: W of the map.

    Returns:
        (sequences, steps): the position `row * width + column` at every step of every sequence.
        One sequence, unless every line is a sequence of its own. A path need not visit every
        position.
    """
    if isinstance(path, ListedPath):
        visited = _listed_positions(path.scan, height, width)[path.k]
        return visited[None, visited >= 0]
    lines = np.arange(height * width).reshape(height, width)
    if path.column_major:
        lines = lines.T
    if not path.per_line:
        lines = lines.reshape(1, -1)
    return lines[:, ::-1] if path.reverse else lines


@functools.lru_cache(maxsize=16)
def _listed_positions(scan: str, height: int, width: int) -> np.ndarray:
    """All paths of a scan, (K, L): they are made and checked together."""
    return pattern_paths(scan, find_listed(scan), height, width).numpy()


def path_name(path: Path | ListedPath) -> str:
    """What a picture calls a path."""
    if isinstance(path, ListedPath):
        return f"{path.scan}, path {path.k + 1}"
    line = "column" if path.column_major else "row"
    name = f"every {line}" if path.per_line else f"{line}s"
    return f"{name}, reversed" if path.reverse else name


def draw_patterns(scans: tuple[ScanName, ...] = SCANS, height: int = 6, width: int = 6):
    """Draws a row for each scan: its paths on a grid, the order as colour and arrows.

    Args:
        scans: The scans.
        height: H of the grid.
        width: W of the grid.

    Returns:
        matplotlib's figure.
    """
    # The object-oriented interface leaves pyplot's global state and back end alone.
    from matplotlib.figure import Figure

    aspect = height / width
    paths = [paths_of(scan) for scan in scans]
    most = max(map(len, paths))
    figure = Figure(
        figsize=(2.1 * most + 0.8, 2.15 * aspect * len(scans) + 0.3), layout="constrained"
    )
    grid = figure.subplots(len(scans), most, squeeze=False)
    for scan, own, row in zip(scans, paths, grid, strict=True):
        for k, (path, axes) in enumerate(zip(own, row, strict=False)):
            picture = _draw_path(axes, path, height, width)
            name = "" if isinstance(path, ListedPath) else f": {path_name(path)}"
            axes.set_title(f"{k + 1}{name}", fontsize="small")
        for axes in row[len(own) :]:
            axes.set_axis_off()
        row[0].set_ylabel(find_scan(scan), fontsize="large")
    bar = figure.colorbar(picture, ax=grid, shrink=0.5, ticks=[0, 1])
    bar.set_ticklabels(["first", "last"])
    bar.set_label("order within a sequence")
    return figure


def _draw_path(axes, path: Path | ListedPath, height: int, width: int):
    positions = path_positions(path, height, width)
    # White where the path does not come by.
    order = np.full(height * width, np.nan)
    order[positions] = np.linspace(0, 1, positions.shape[1])
    picture = axes.imshow(order.reshape(height, width), cmap="viridis", vmin=0, vmax=1, alpha=0.75)
    for sequence in positions:
        rows, columns = np.divmod(sequence, width)
        steps = {"angles": "xy", "scale_units": "xy", "scale": 1, "width": 0.012}
        axes.quiver(
            columns[:-1], rows[:-1], np.diff(columns), np.diff(rows), color="black", **steps
        )
        axes.plot(columns[:1], rows[:1], "o", color="tab:red", markersize=5, zorder=3)
    axes.set_xticks([])
    axes.set_yticks([])
    return picture


@dataclass(frozen=True)
class Comparison:
    """One variant of a model in table 10.

    Attributes:
        scan: How it scans.
        dwconv: Whether a depth-wise convolution stands before the scan.
        params: Number of parameters of the whole model.
        flops: FLOPs of the whole model at the measured size.
        inference: Its time in inference.
        training: Its time forward and backward.
        activations: What training keeps for the backward pass.
    """

    scan: ScanName
    dwconv: bool
    params: int
    flops: int
    inference: Result
    training: Result
    activations: Activations

    @classmethod
    def columns(cls) -> tuple[str, ...]:
        """The names of `row`'s columns."""
        return (
            *("scan", "dwconv", "params", "flops", "precision", "height", "width"),
            *("inference_batch", "inference_images_per_second"),
            *("training_batch", "training_images_per_second"),
            *("peak_gb", "activation_bytes", "failure"),
        )

    def row(self) -> dict:
        """The figures as one flat row for a CSV file."""
        inference, training = self.inference, self.training
        case = inference.case
        values = (
            *(self.scan, self.dwconv, self.params, self.flops, case.precision, *case.size),
            *(case.batch, inference.images_per_second),
            *(training.case.batch, training.images_per_second),
            *(training.peak_gb, self.activations.bytes, self.failure),
        )
        return dict(zip(self.columns(), values, strict=True))

    @property
    def failure(self) -> str:
        """Why figures are missing; empty where none is."""
        parts = (self.inference, self.training, self.activations)
        return "; ".join(dict.fromkeys(part.failure for part in parts if part.failure))


def compare_patterns(
    config: str,
    variants: Sequence[tuple[ScanName, bool]],
    inference: Case,
    training: Case,
    device: torch.device,
    seconds: float,
    rounds: int = ROUNDS,
    progress: Callable[[str], None] = lambda _: None,
) -> list[Comparison]:
    """Measures what the scans of a model cost (paper, table 10).

    Args:
        config: A config of any task whose backbone is VMamba.
        variants: Scans, and whether a depth-wise convolution stands before them.
        inference: How inference is timed.
        training: How training is timed, and its activations counted.
        device: Where.
        seconds: How long each variant is timed in each of the two cases.
        rounds: In how many turns.
        progress: Called with what is measured, 2 * (1 + rounds) times for each variant.

    Returns:
        The figures of each variant, in their order.

    Raises:
        UsageError: If there is no such config, or its backbone is not VMamba.
        ValueError: If a scan is unknown or a case does not fit the device.
    """
    subjects, costs = [], []
    for scan, dwconv in variants:
        paths_of(scan)
        overrides = {"model.backbone.scan": scan, "model.backbone.dwconv": dwconv}
        cfg = load_config(config)
        kind = type_name(cfg.model.get("backbone")) or "nothing"
        if kind != VMamba.__name__:
            raise UsageError(f"{config}: its backbone is {kind}, and scan patterns are VMamba's.")
        cfg.merge_from_dict(overrides)
        costs.append(count_config(cfg, inference.size))
        name = f"{scan}, {'with' if dwconv else 'without'} dwconv"
        subjects.append(replace(find_subject(config, overrides=overrides), name=name))
    timed = [
        measure_case(subjects, case, device, seconds, rounds, progress)
        for case in (inference, training)
    ]
    kept = [count_activations(subject, training) for subject in subjects]
    return [
        Comparison(scan, dwconv, cost.params, cost.flops, *figures)
        for (scan, dwconv), cost, *figures in zip(variants, costs, *timed, kept, strict=True)
    ]


def pattern_table(found: Sequence[Comparison]) -> Table:
    """Table 10, but for the accuracy."""
    inference, training = found[0].inference.case, found[0].training.case
    rows = []
    for one in found:
        rates = (one.inference.images_per_second, one.training.images_per_second)
        size = one.activations.bytes
        rows.append(
            (
                one.scan,
                "yes" if one.dwconv else "no",
                f"{one.params / 1e6:.1f}",
                f"{one.flops / 1e9:.2f}",
                *("failed" if rate is None else f"{rate:.2f}" for rate in rates),
                "failed" if size is None else f"{size / 1e6:.0f}",
            )
        )
    header = (
        "scan",
        "dwconv",
        "params (M)",
        "FLOPs (G)",
        "images/s",
        "training images/s",
        "activations (MB)",
    )
    failures = (f"{one.scan}: {one.failure}" for one in found if one.failure)
    notes = (f"{inference}; {training}; activations as computed for a GPU", *failures)
    return Table("scan patterns", header, tuple(rows), notes)
