"""What the CUDA implementations of the scans share: tensors' layouts, the low rank's gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from mmvmamba_kernels.arguments import ceil_div
from mmvmamba_kernels.backends.gpu_scan import exact_products, low_rank
from mmvmamba_kernels.patterns import Path

# Positions between saved states, by d_state: compile-time sizes of the library.
_SAVED_SINGLE = 8
_SAVED_SEVERAL = 64

_PART = 4096
"""Positions of one of the products that make up a sum over positions."""


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


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """A batched product whose sums are not rounded to the factors' dtype.

    Args:
        a: (K, I, J).
        b: (K, J, O).
        dtype: Dtype of sums and result.

    Returns:
        (K, I, O).
    """
    if a.dtype == b.dtype == dtype:
        return torch.bmm(a, b)
    unrounded = a.is_cuda and torch.version.hip is None and dtype == torch.float32
    if unrounded and a.dtype == b.dtype and "dtype" in torch.ops.aten.bmm.overloads():
        return torch.bmm(a, b, out_dtype=dtype)
    return torch.bmm(a.to(dtype), b.to(dtype))


def sum_of_products(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """A batched product a^T b over many positions, as shorter products that are added in order.

    One product of so few rows and columns would run on a handful of multiprocessors.

    Args:
        a: (K, positions, I), contiguous.
        b: (K, positions, J), contiguous.
        dtype: Dtype of sums and result.

    Returns:
        (K, I, J).
    """
    positions = a.shape[1]
    whole = positions // _PART * _PART
    if whole < 2 * _PART:
        return _product(a.mT, b, dtype)
    total = torch.stack(
        [
            _product(
                left[:whole].unflatten(0, (-1, _PART)).mT,
                right[:whole].unflatten(0, (-1, _PART)),
                dtype,
            ).sum(0)
            for left, right in zip(a, b, strict=True)
        ]
    )
    if whole < positions:
        total += _product(a[:, whole:].mT, b[:, whole:], dtype)
    return total


def low_rank_gradients(
    raw: Tensor, grad_weights: Tensor, proj: Tensor, dt_weight: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Takes the gradient of raw step sizes back to where they came from.

    Args:
        raw: Gradient of the raw step sizes, (K, positions, D). Its dtype is that of the products'
            factors.
        grad_weights: Gradient of B and C side by side, (K, positions, 2N).
        proj: (B, H, W, K, R + 2N).
        dt_weight: (K, D, R).
        dtype: Of sums.

    Returns:
        The gradients of ``proj`` and ``dt_weight`` in their own dtypes, and that of the bias, (K,
        D), in ``dtype``.
    """
    # Products differ in their last digits between layouts.
    proj, dt_weight = proj.contiguous(), dt_weight.contiguous()
    rank = dt_weight.shape[2]
    grad_proj = torch.empty_like(proj)
    columns = grad_proj.flatten(0, 2)
    # A column of ones: the bias's gradient is one more column, and the raw gradient is read once.
    low = torch.nn.functional.pad(low_rank(proj, rank).to(raw.dtype), (0, 1), value=1.0)
    with exact_products():
        columns[..., :rank] = torch.bmm(raw, dt_weight.to(raw.dtype)).transpose(0, 1)
        sums = sum_of_products(raw, low, dtype)
    columns[..., rank:] = grad_weights.transpose(0, 1)
    grad_weight, grad_bias = sums.split([rank, 1], dim=2)
    return grad_proj, grad_weight.to(dt_weight.dtype, copy=True), grad_bias[..., 0].contiguous()
