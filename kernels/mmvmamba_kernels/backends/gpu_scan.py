"""What GPU implementations of the 2D scan share beside their kernels: buffers and low ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_PART = 4096
"""Positions of one of the products that make up a sum over positions."""


@contextmanager
def exact_products() -> Iterator[None]:
    """Products of float32 factors are float32's, whatever the user allows his own to be.

    Step sizes are exponents, and no part of a model in which TF32 was asked for. PyTorch's setting
    is one for all threads of a process.
    """
    matmul = torch.backends.cuda.matmul
    # From PyTorch 2.9 on. The older functions refuse to read what was set through this one.
    newer = hasattr(matmul, "fp32_precision")
    before = matmul.fp32_precision if newer else torch.get_float32_matmul_precision()
    exact = "ieee" if newer else "highest"
    if before in (exact, "none"):
        yield
        return

    def choose(precision: str) -> None:
        if newer:
            matmul.fp32_precision = precision
        else:
            torch.set_float32_matmul_precision(precision)

    choose(exact)
    try:
        yield
    finally:
        choose(before)


def partial_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of the maps that directions write before they are summed, by that of the input.

    A partial sum may leave float16's range where the whole does not.
    """
    if dtype == torch.bfloat16:
        return dtype
    return torch.float64 if dtype == torch.float64 else torch.float32


def matmul(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
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


def low_rank(proj: Tensor, rank: int) -> Tensor:
    """The part of ``proj`` that step sizes come from, (K, positions, R), as a view."""
    return proj.flatten(0, 2)[..., :rank].transpose(0, 1)


def raw_step_sizes(proj: Tensor, dt_weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Step sizes before bias and softplus, (K, positions, D), in ``dtype``."""
    with exact_products():
        return torch.bmm(low_rank(proj, dt_weight.shape[2]).to(dtype), dt_weight.mT.to(dtype))


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
        return matmul(a.mT, b, dtype)
    total = torch.stack(
        [
            matmul(
                left[:whole].unflatten(0, (-1, _PART)).mT,
                right[:whole].unflatten(0, (-1, _PART)),
                dtype,
            ).sum(0)
            for left, right in zip(a, b, strict=True)
        ]
    )
    if whole < positions:
        total += matmul(a[:, whole:].mT, b[:, whole:], dtype)
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
