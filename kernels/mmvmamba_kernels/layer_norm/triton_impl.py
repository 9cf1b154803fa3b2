"""Layer normalisation in Triton, forward and backward."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from mmvmamba_kernels.arguments import ceil_div, state_dtype
from mmvmamba_kernels.backends.triton.layer_norm_kernels import (
    layer_norm_bwd_kernel,
    layer_norm_fwd_kernel,
)
from mmvmamba_kernels.backends.triton.support import multiprocessors, on_device

_FORWARD_TILE = 2048
"""Elements that a program holds of one map: 16 a thread with four warps."""

_BACKWARD_TILE = 1024
"""The same of the backward pass, which holds more maps and sums."""

_WIDTHS = (64, 256)
"""Channels of a line where a row takes one or two; more channels have wider lines, two a row."""

_MAX_CHANNELS = 1 << 16

_BACKWARD_PROGRAMS = 6
"""Programs per multiprocessor of the backward pass, each with one partial sum of the gradients of
weight and bias."""


class _Tile(NamedTuple):
    """How a program's tile holds rows of so many channels."""

    rows: int
    """Of the map."""
    paired: int
    """1 if a row takes two lines, 0 if it takes one."""
    constants: dict[str, int]
    """Of the kernels."""


@functools.cache
def _tile(channels: int, elements: int) -> _Tile:
    if channels > _MAX_CHANNELS:
        raise ValueError(
            f"layer_norm: Triton kernels take at most {_MAX_CHANNELS} channels, got {channels}; "
            "use backend='reference'"
        )
    # Half of the next power of two.
    widest = 1 << (channels - 1).bit_length() >> 1
    width = next((w for w in _WIDTHS if 2 * w >= channels), widest)
    pairs = max(1, elements // (2 * width))
    paired = int(channels > width)
    constants = {"ROWS": pairs, "WIDTH": width, "num_warps": 4 if 2 * width <= elements else 8}
    return _Tile(2 * pairs >> paired, paired, constants)


def _compute_type(dtype: torch.dtype) -> tl.dtype:
    return tl.float64 if dtype == torch.float64 else tl.float32


def forward(
    x: Tensor,
    branch: Tensor | None,
    scale: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`mmvmamba_kernels.layer_norm.reference.forward`."""
    total = torch.empty_like(x, memory_format=torch.contiguous_format) if branch is not None else x
    out, statistics = _launch_forward(
        x[None], branch, scale, weight, bias, eps, total, out_dtype, store=branch is not None
    )
    return total if branch is not None else x.new_empty(0), out, statistics


def normalise_sum(
    parts: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dtype: torch.dtype,
    out_dtype: torch.dtype,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum over the first dimension, in its order, and its normalisation.

    Args:
        parts: (parts, ..., C).
        weight: Scale, (C,).
        bias: Shift, (C,).
        eps: What is added to the variance.
        dtype: To which the sum is rounded.
        out_dtype: Dtype of the normalised result.
        save: Whether the sum is wanted.

    Returns:
        The sum (no elements unless it is wanted), its normalisation and the statistics, as
        :func:`forward`.
    """
    # The kernel asks it for its dtype alone if it is not stored.
    total = parts.new_empty(parts.shape[1:] if save else (0,), dtype=dtype)
    out, statistics = _launch_forward(
        parts, None, None, weight, bias, eps, total, out_dtype, store=save
    )
    return total, out, statistics


def _launch_forward(
    parts: Tensor,
    branch: Tensor | None,
    scale: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    total: Tensor,
    out_dtype: torch.dtype,
    store: bool,
) -> tuple[Tensor, Tensor]:
    parts, branch, scale = (t if t is None else t.contiguous() for t in (parts, branch, scale))
    channels = parts.shape[-1]
    rows = parts[0].numel() // channels
    dtype = state_dtype(parts, weight, bias)
    out = parts.new_empty(parts.shape[1:], dtype=out_dtype)
    statistics = parts.new_empty((rows, 2), dtype=dtype)
    if rows:
        tile = _tile(channels, _FORWARD_TILE)
        with on_device(parts):
            layer_norm_fwd_kernel[(ceil_div(rows, tile.rows),)](
                parts,
                # For what is not there stands something of the dtype that it would have.
                out if branch is None else branch,
                statistics if scale is None else scale,
                weight.contiguous(),
                bias.contiguous(),
                total,
                out,
                statistics,
                rows,
                rows // parts.shape[1],
                channels,
                tile.paired,
                parts.shape[0],
                int(branch is not None),
                int(scale is not None),
                int(store),
                EPS=eps,
                ACC=_compute_type(dtype),
                **tile.constants,
            )
    return out, statistics


def backward(
    grad_total: Tensor | None,
    grad_out: Tensor,
    total: Tensor,
    statistics: Tensor,
    scale: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    branch_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :func:`mmvmamba_kernels.layer_norm.reference.backward`."""
    grad_total, scale = (t if t is None else t.contiguous() for t in (grad_total, scale))
    grad_out, total = grad_out.contiguous(), total.contiguous()
    channels = total.shape[-1]
    rows = total.numel() // channels
    tile = _tile(channels, _BACKWARD_TILE)
    programs = min(ceil_div(rows, tile.rows), _BACKWARD_PROGRAMS * multiprocessors(total.device))
    grad_x = torch.empty_like(total)
    grad_branch = total.new_empty(0)
    if branch_dtype is not None:
        grad_branch = torch.empty_like(total, dtype=branch_dtype)
    partial = total.new_empty((2, programs, channels), dtype=statistics.dtype)
    if rows:
        with on_device(total):
            layer_norm_bwd_kernel[(programs,)](
                total if grad_total is None else grad_total,
                grad_out,
                total,
                statistics,
                statistics if scale is None else scale,
                weight.contiguous(),
                grad_x,
                grad_out if branch_dtype is None else grad_branch,
                partial,
                rows,
                rows // total.shape[0],
                channels,
                tile.paired,
                programs,
                int(grad_total is not None),
                int(branch_dtype is not None),
                int(scale is not None),
                ACC=_compute_type(statistics.dtype),
                **tile.constants,
            )
    grad_weight, grad_bias = partial
    return grad_x, grad_branch, grad_weight.sum(0).to(weight.dtype), grad_bias.sum(0).to(bias.dtype)
