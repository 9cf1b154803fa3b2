"""What the CUDA implementations of the scans share: layouts of what the library is given."""

from __future__ import annotations

import torch
from torch import Tensor

from mmvmamba_kernels.arguments import ceil_div
from mmvmamba_kernels.patterns import Path

# Positions between saved states, by d_state: compile-time sizes of the library.
_SAVED_SINGLE = 8
_SAVED_SEVERAL = 64


def operators():
    """The library's operators."""
    return torch.ops.mmvmamba_cuda


def carries_shape(
    batch: int, height: int, width: int, channels: int, states: int, paths: tuple[Path, ...]
) -> tuple[int, ...]:
    """Shape of the states that the forward pass saves."""
    lines, length = paths[0].sequences(height, width)
    saved = _SAVED_SINGLE if states == 1 else _SAVED_SEVERAL
    return batch * lines, len(paths), ceil_div(length, saved), states, channels


def map_dtype(dtype: torch.dtype, *maps: Tensor) -> torch.dtype:
    """The dtype that maps are read in, given that of states and sums: float64 stays unmixed."""
    if dtype == torch.float64:
        return dtype
    return maps[0].dtype if len({m.dtype for m in maps}) == 1 else torch.float32


def parameter(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A parameter, channels last, as kernels read it."""
    return None if tensor is None else tensor.to(dtype).contiguous()
