"""What GPU implementations of the 2D scan share beside their kernels: buffers and low ranks."""

from __future__ import annotations

import torch
from torch import Tensor


def partial_buffers(dtype: torch.dtype, directions: int) -> tuple[torch.dtype, int]:
    """Dtype and number of the maps that directions write before they are summed.

    Every direction has its own in bfloat16. A partial sum may leave float16's range where the whole
    does not, so that float16 takes float32 maps, and then two for all directions, which is no more
    memory than a float16 map for each.
    """
    if dtype == torch.bfloat16:
        return dtype, directions
    return torch.float64 if dtype == torch.float64 else torch.float32, min(directions, 2)


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
    return torch.bmm(low_rank(proj, dt_weight.shape[2]).to(dtype), dt_weight.mT.to(dtype))


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
    columns[..., :rank] = torch.bmm(raw, dt_weight.to(raw.dtype)).transpose(0, 1)
    columns[..., rank:] = grad_weights.transpose(0, 1)
    grad_weight = matmul(raw.mT, low_rank(proj, rank).to(raw.dtype), dtype)
    return grad_proj, grad_weight.to(dt_weight.dtype), raw.sum(1, dtype=dtype)
