"""Layer normalisation in plain PyTorch: the specification, on any device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mmvmamba_kernels.arguments import state_dtype
from mmvmamba_kernels.registration import autocast_off


def add_branch(x: Tensor, branch: Tensor, scale: Tensor | None) -> Tensor:
    """x + scale * branch in the dtype of x, differentiable; ``scale`` has one number per sample."""
    dtype = state_dtype(x, branch)
    branch = branch.to(dtype)
    if scale is not None:
        branch = branch * scale.to(dtype).view(-1, *(1,) * (x.ndim - 1))
    return (x.to(dtype) + branch).to(x.dtype)


def normalise(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, out_dtype: torch.dtype
) -> Tensor:
    """The normalisation alone, differentiable."""
    dtype = state_dtype(x, weight, bias)
    # Autocast would choose dtypes of its own.
    with autocast_off(x):
        y = F.layer_norm(x.to(dtype), weight.shape, weight.to(dtype), bias.to(dtype), eps)
    return y.to(out_dtype)


def forward(
    x: Tensor,
    branch: Tensor | None,
    scale: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`mmvmamba_kernels.add_layer_norm`.

    Returns:
        The sum (no elements without a branch), its normalisation, and of every row the mean and the
        inverse standard deviation, (rows, 2).
    """
    total = x if branch is None else add_branch(x, branch, scale)
    rows = total.to(state_dtype(x, weight, bias)).flatten(0, -2)
    mean = rows.mean(1)
    inverse = (rows.var(1, correction=0) + eps).rsqrt()
    out = normalise(total, weight, bias, eps, out_dtype)
    return (
        x.new_empty(0) if branch is None else total,
        out,
        torch.stack([mean, inverse], 1),
    )


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
    """The gradients of :func:`forward`.

    Args:
        grad_total: Gradient of the sum, None for none.
        grad_out: Gradient of the normalised output.
        total: The sum, or the input where there was no branch.
        statistics: As saved.
        scale: As in the forward pass.
        weight: As in the forward pass.
        bias: As in the forward pass.
        branch_dtype: The branch's dtype if its gradient differs from that of x, else None.

    Returns:
        The gradients of x, of the branch (no elements unless ``branch_dtype``), weight and bias.
    """
    dtype = statistics.dtype
    mean, inverse = statistics.view(*total.shape[:-1], 1, 2).unbind(-1)
    normal = (total.to(dtype) - mean) * inverse
    grad_out = grad_out.to(dtype)
    grad_normal = grad_out * weight.to(dtype)
    along = (grad_normal * normal).mean(-1, keepdim=True)
    grad = (grad_normal - grad_normal.mean(-1, keepdim=True) - normal * along) * inverse
    if grad_total is not None:
        grad = grad + grad_total.to(dtype)
    grad_branch = total.new_empty(0)
    if branch_dtype is not None:
        grad_branch = grad
        if scale is not None:
            grad_branch = grad * scale.to(dtype).view(-1, *(1,) * (grad.ndim - 1))
        grad_branch = grad_branch.to(branch_dtype, copy=True)
    return (
        grad.to(total.dtype),
        grad_branch,
        (grad_out * normal).flatten(0, -2).sum(0).to(weight.dtype),
        grad_out.flatten(0, -2).sum(0).to(bias.dtype),
    )
