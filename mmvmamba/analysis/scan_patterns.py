"""The paths along which the map is scanned: their order of positions, and a picture of them."""

import numpy as np

from mmvmamba.models.ss2d import SCANS, ScanName
from mmvmamba_kernels.selective_scan_2d.patterns import PATTERNS, Path


def paths_of(scan: ScanName) -> tuple[Path, ...]:
    """The four paths of a scan; those of 'cascade2d' are two along rows, then two along columns.

    Raises:
        ValueError: If there is no such scan.
    """
    if scan not in SCANS:
        raise ValueError(f"scan={scan!r} is unknown: choose from {', '.join(SCANS)}.")
    if scan == "cascade2d":
        return PATTERNS["rows"] + PATTERNS["columns"]
    return PATTERNS[scan]


def path_positions(path: Path, height: int, width: int) -> np.ndarray:
    """The order in which a path visits a map's positions.

    Args:
        path: The path.
        height: H of the map.
        width: W of the map.

    Returns:
        (sequences, steps): the position `row * width + column` at every step of every sequence.
        One sequence, unless every line is a sequence of its own.
    """
    lines = np.arange(height * width).reshape(height, width)
    if path.column_major:
        lines = lines.T
    if not path.per_line:
        lines = lines.reshape(1, -1)
    return lines[:, ::-1] if path.reverse else lines


def path_name(path: Path) -> str:
    """What a picture calls a path."""
    lines = "columns" if path.column_major else "rows"
    each = f"each of the {lines}" if path.per_line else lines
    return f"{each}, reversed" if path.reverse else each


def draw_patterns(scans: tuple[ScanName, ...] = SCANS, height: int = 6, width: int = 6):
    """Draws a row for each scan: its four paths on a grid, the order as colour and arrows.

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
    figure = Figure(figsize=(9.2, 2.5 * aspect * len(scans) + 0.5), layout="constrained")
    grid = figure.subplots(len(scans), 4, squeeze=False)
    for scan, row in zip(scans, grid, strict=True):
        for k, (path, axes) in enumerate(zip(paths_of(scan), row, strict=True)):
            picture = _draw_path(axes, path, height, width)
            axes.set_title(f"{k + 1}: {path_name(path)}", fontsize="small")
        row[0].set_ylabel(scan, fontsize="large")
    bar = figure.colorbar(picture, ax=grid, shrink=0.5, ticks=[0, 1])
    bar.set_ticklabels(["first", "last"])
    bar.set_label("order within a sequence")
    return figure


def _draw_path(axes, path: Path, height: int, width: int):
    positions = path_positions(path, height, width)
    order = np.empty(height * width)
    order[positions] = np.linspace(0, 1, positions.shape[1])
    picture = axes.imshow(order.reshape(height, width), cmap="viridis", vmin=0, vmax=1, alpha=0.75)
    for sequence in positions:
        rows, columns = np.divmod(sequence, width)
        steps = {"angles": "xy", "scale_units": "xy", "scale": 1, "width": 0.012}
        axes.quiver(
            columns[:-1], rows[:-1], np.diff(columns), np.diff(rows), color="black", **steps
        )
        axes.plot(columns[:1], rows[:1], "o", color="tab:red", markersize=4)
    axes.set_xticks([])
    axes.set_yticks([])
    return picture
