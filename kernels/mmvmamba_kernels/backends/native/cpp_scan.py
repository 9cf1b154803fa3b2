"""What the C++ implementations of the scans share: layouts and the calls into the library."""

from __future__ import annotations

import torch
from torch import Tensor

from mmvmamba_kernels.arguments import ceil_div
from mmvmamba_kernels.patterns import Path

# The library's compile-time sizes: positions of a tile, channels that are computed together.
_TILE = 64
_LANES = 16


def carries_shape(
    batch: int, height: int, width: int, channels: int, states: int, paths: tuple[Path, ...]
) -> tuple[int, ...]:
    """Shape of the states that the forward pass saves: those that enter the tiles of the paths."""
    lines, length = paths[0].sequences(height, width)
    blocks = ceil_div(channels, _LANES)
    return len(paths), batch * lines, ceil_div(length, _TILE), states, blocks * _LANES


def path_codes(paths: tuple[Path, ...]) -> list[int]:
    """The paths as the library takes them: bits for column-major, reverse and per line."""
    return [p.column_major + 2 * p.reverse + 4 * p.per_line for p in paths]


def cast_like(gradient: Tensor, argument: Tensor | None) -> Tensor | None:
    """A gradient as a tensor of its own, in its argument's dtype; None for an absent argument."""
    if argument is None:
        return None
    return gradient.to(argument.dtype, copy=True, memory_format=torch.contiguous_format)
