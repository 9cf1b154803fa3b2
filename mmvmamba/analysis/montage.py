"""Tiles pictures into one."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image


def draw_montage(
    pictures: Sequence[str | os.PathLike],
    out_file: str | os.PathLike,
    *,
    columns: int = 3,
    title: str = "",
    headings: Sequence[str] = ("ground truth", "prediction"),
) -> None:
    """Tile pictures into one, with a caption row.

    Args:
        pictures: files, each of them as many equal parts side by side as there are `headings`.
        out_file: the PNG to write; its folder is made if need be.
        columns: pictures per row.
        title: a line above all.
        headings: captions of a picture's parts, above every column.

    Raises:
        ValueError: `pictures` is empty or `columns` is less than 1.
    """
    # The object-oriented interface leaves pyplot's global state and back end alone.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not pictures:
        raise ValueError("a montage needs at least one picture")
    if columns < 1:
        raise ValueError(f"columns must be at least 1, but is {columns}")
    images = [np.asarray(Image.open(path).convert("RGB")) for path in pictures]
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    cell_width = 4.6
    cell_height = cell_width * float(
        np.median([image.shape[0] / image.shape[1] for image in images])
    )
    header = 0.75 if title else 0.4
    figure = Figure(figsize=(cell_width * columns, cell_height * rows + header), dpi=100)
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(
        rows,
        columns,
        left=0.005,
        right=0.995,
        bottom=0.005,
        top=1.0 - header / figure.get_figheight(),
        wspace=0.03,
        hspace=0.03,
    )
    for index, image in enumerate(images):
        axes = figure.add_subplot(grid[index // columns, index % columns])
        axes.imshow(image, interpolation="lanczos")
        axes.set_axis_off()
        axes.set_anchor("N")
        for part in range(1, len(headings)):
            axes.axvline(part * image.shape[1] / len(headings) - 0.5, color="white", linewidth=4)
        if index < columns:
            for part, heading in enumerate(headings):
                middle = (part + 0.5) / len(headings), 1.02
                axes.text(*middle, heading, transform=axes.transAxes, ha="center", fontsize=11)
    if title:
        below_top = 1.0 - 0.08 / figure.get_figheight()
        figure.text(0.5, below_top, title, ha="center", va="top", fontsize=13, weight="bold")
    Path(out_file).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out_file)
