"""Scan paths that are lists of positions: the built-in ones, as functions of a map's size.

Each function gives (K, L) positions ``row * width + column``: row k is the order in which direction
k visits them. Where L is height * width, every path is a permutation of all positions.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mmvmamba_kernels.arguments import ceil_div


def snake(height: int, width: int) -> Tensor:
    """Boustrophedon: every other row, or column, from its end, so that no step jumps.

    Source: "PlainMamba", arXiv 2403.17695, continuous 2D scanning. K = 4: rows, columns, and both
    reversed.
    """
    rows = _map(height, width)
    return _and_reversed(_turning(rows), _turning(rows.t()))


def diagonal(height: int, width: int) -> Tensor:
    """Diagonals one after another; one that leaves the map on a side goes on at the other.

    Source: "RS-Mamba", arXiv 2404.02668, the oblique half of its eight directions. K = 4: diagonals
    down to the right, diagonals down to the left, and both reversed.
    """
    rows = torch.arange(height)
    first = torch.arange(width)[:, None]
    right, left = (rows * width + (first + side * rows) % width for side in (1, -1))
    return _and_reversed(right.flatten(), left.flatten())


def hilbert(height: int, width: int) -> Tensor:
    """A Hilbert curve, generalised to any height and width: neighbours stay close on the path.

    Every step goes to one of the eight neighbours, and to one of the four if both sizes are even.
    K = 4: the curve, that of the transposed map, and both reversed.
    """
    across = _hilbert_curve(0, 1, width, width, height)
    down = _hilbert_curve(0, width, height, 1, width)
    return _and_reversed(torch.tensor(across), torch.tensor(down))


def window(height: int, width: int, size: int) -> Tensor:
    """Windows of ``size`` by ``size`` positions one after another, each as a map of its own.

    Source: "LocalMamba", arXiv 2403.09338, local scan. Windows at the right and at the bottom are
    smaller where sizes do not divide. K = 4: windows row by row, and rows in each; the same with
    columns; and both reversed.
    """
    rows = _map(height, width)
    return _and_reversed(_by_windows(rows, size), _by_windows(rows.t(), size))


def atrous(height: int, width: int, size: int) -> Tensor:
    """Every ``size``-th position of every ``size``-th row: each direction has a part of the map.

    Source: "EfficientVMamba", arXiv 2403.09977, skip sampling, which is this with size 2. K = size
    * size: direction k has the rows from k % size on and the columns from k // size on; it goes row
    by row, or column by column if k % size is odd. Shorter paths end in -1.
    """
    rows = _map(height, width)
    parts = []
    for column in range(size):
        for row in range(size):
            part = rows[row::size, column::size]
            parts.append((part.t() if row % 2 else part).flatten())
    return pad_sequence(parts, batch_first=True, padding_value=-1)


def atrous_length(height: int, width: int, size: int) -> int:
    """Positions of the longest of the paths of :func:`atrous`."""
    return ceil_div(height, size) * ceil_div(width, size)


def _map(height: int, width: int) -> Tensor:
    """The positions where they are, (height, width)."""
    return torch.arange(height * width).view(height, width)


def _and_reversed(*paths: Tensor) -> Tensor:
    """Paths, then the same from their ends."""
    forwards = torch.stack(paths)
    return torch.cat((forwards, forwards.flip(1)))


def _turning(rows: Tensor) -> Tensor:
    rows = rows.clone()
    rows[1::2] = rows[1::2].flip(1)
    return rows.flatten()


def _by_windows(rows: Tensor, size: int) -> Tensor:
    return torch.cat([part.flatten() for band in rows.split(size) for part in band.split(size, 1)])


def _hilbert_curve(start: int, along: int, length: int, across: int, breadth: int) -> list[int]:
    """A curve through a rectangle, from one corner to the next one along its first side.

    A long rectangle is two shorter ones in a row. Any other is three: up the near end, along the
    far half, and down the far end, the first and the last turned by a quarter.

    Args:
        start: The corner's position.
        along: From a position to the next along the first side.
        length: Positions of that side.
        across: The same of the other side.
        breadth: Positions of the other side.
    """
    if breadth == 1:
        return [start + i * along for i in range(length)]
    if length == 1:
        return [start + i * across for i in range(breadth)]
    # Halves are even where they can be: a curve of even length ends at the corner that is wanted.
    half = length // 2
    if 2 * length > 3 * breadth:
        half += half % 2 if length > 2 else 0
        return [
            *_hilbert_curve(start, along, half, across, breadth),
            *_hilbert_curve(start + half * along, along, length - half, across, breadth),
        ]
    rise = breadth // 2
    rise += rise % 2 if breadth > 2 else 0
    end = start + (length - 1) * along + (rise - 1) * across
    return [
        *_hilbert_curve(start, across, rise, along, half),
        *_hilbert_curve(start + rise * across, along, length, across, breadth - rise),
        *_hilbert_curve(end, -across, rise, -along, length - half),
    ]
