"""Layer normalisation and the residual sum before it: public functions and registration.

Wherever PyTorch's own operations are as good, they are what runs: on the CPU, whose layer norm is
one pass, and in graphs that are compiled or exported, where the compiler joins the sum, the
normalisation and the conversions around them in one kernel of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmvmamba_kernels.arguments import FLOATING, check_rank, check_shape, check_tensors, state_dtype
from mmvmamba_kernels.backends.triton import support as triton_support
from mmvmamba_kernels.dispatch import (
    Backend,
    Problem,
    check_name,
    plain_or_pinned,
    register_backend,
    resolve,
)
from mmvmamba_kernels.layer_norm import reference
from mmvmamba_kernels.registration import OperatorPair

_OP = "layer_norm"

register_backend(_OP, Backend("triton", f"{__package__}.triton_impl", triton_support.can_run))
register_backend(_OP, Backend("reference", f"{__package__}.reference"))


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float = 1e-5,
    out_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """Layer normalisation over the last dimension, in the dtype that is asked for.

    Statistics and sums are float32 (float64 if x, weight or bias is), whatever the dtypes and
    whether or not autocast is on, and the result is converted once. Differentiable once in x,
    weight and bias, each gradient in its argument's dtype, and deterministic.

    Args:
        x: (..., C).
        weight: Scale, (C,), of any floating-point dtype.
        bias: Shift, (C,), likewise.
        eps: What is added to the variance.
        out_dtype: Dtype of the result; None for that of ``x``.
        backend: Name of the implementation; None chooses one per call.

    Returns:
        A tensor of the shape of ``x``.

    Raises:
        TypeError: If an argument is not a floating-point tensor, or ``out_dtype`` is not a
            floating-point dtype.
        ValueError: If shapes or devices do not fit one another.
        BackendError: If the backend does not exist or cannot run this call.
    """
    out_dtype = _check(x, None, None, weight, bias, out_dtype)
    name = _backend_name(x, backend)
    if name is None:
        return reference.normalise(x, weight, bias, eps, out_dtype)
    return _pair(x, None, None, weight, bias, eps, out_dtype, None, name)[1]


def add_layer_norm(
    x: Tensor,
    branch: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    scale: Tensor | None = None,
    eps: float = 1e-5,
    out_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The residual sum ``x + scale * branch`` and its layer normalisation.

    As :func:`layer_norm`, and differentiable in ``branch`` too.

    Args:
        x: The residual stream, (B, ..., C).
        branch: What is added to it, of the same shape and any floating-point dtype.
        weight: Scale of the normalisation, (C,).
        bias: Shift of the normalisation, (C,).
        scale: What samples' branches are multiplied by, (B,), as drop path does; no gradient.
        eps: What is added to the variance.
        out_dtype: Dtype of the normalised result; None for that of ``x``.
        backend: Name of the implementation; None chooses one per call.

    Returns:
        The sum in the dtype of ``x``, and its normalisation in ``out_dtype``.

    Raises:
        TypeError: If an argument is not a floating-point tensor, or ``out_dtype`` is not a
            floating-point dtype.
        ValueError: If shapes or devices do not fit one another.
        BackendError: If the backend does not exist or cannot run this call.
    """
    out_dtype = _check(x, branch, scale, weight, bias, out_dtype)
    name = _backend_name(x, backend)
    if name is None:
        total = reference.add_branch(x, branch, scale)
        return total, reference.normalise(total, weight, bias, eps, out_dtype)
    # A gradient that needs no conversion and no scale is that of x.
    branch_dtype = None if scale is None and branch.dtype == x.dtype else branch.dtype
    total, out, _ = _pair(x, branch, scale, weight, bias, eps, out_dtype, branch_dtype, name)
    return total, out


def _backend_name(x: Tensor, backend: str | None) -> str | None:
    """The operator's backend; None for PyTorch's own operations without an operator."""
    if backend is None:
        return plain_or_pinned(_OP, x.device, x.dtype)
    return check_name(_OP, backend)


def _check(
    x: Tensor,
    branch: Tensor | None,
    scale: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    out_dtype: torch.dtype | None,
) -> torch.dtype:
    tensors = {"x": x, "branch": branch, "scale": scale, "weight": weight, "bias": bias}
    check_tensors(_OP, tensors, optional=("branch", "scale"))
    check_rank(_OP, "weight", weight, "(C)")
    channels = weight.shape[0]
    if x.ndim < 2 or x.shape[-1] != channels or not channels:
        raise ValueError(
            f"{_OP}: x must be (..., C) with C = {channels}, the length of weight, and C > 0, got "
            f"shape {tuple(x.shape)}"
        )
    check_shape(_OP, "bias", bias, "(C,)", (channels,))
    check_shape(_OP, "branch", branch, "the shape of x", tuple(x.shape))
    check_shape(_OP, "scale", scale, "(B,)", (x.shape[0],))
    if out_dtype is None:
        return x.dtype
    if out_dtype not in FLOATING:
        raise TypeError(f"{_OP}: out_dtype must be a floating-point torch.dtype, got {out_dtype!r}")
    return out_dtype


def _implementation(x: Tensor, backend: str):
    return resolve(_OP, backend, Problem(x.device, x.dtype, states=1, work=x.numel()))


def _forward(
    x: Tensor,
    branch: Tensor | None,
    scale: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    out_dtype: torch.dtype,
    branch_dtype: torch.dtype | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    del branch_dtype
    return _implementation(x, backend).forward(x, branch, scale, weight, bias, eps, out_dtype)


def _backward(
    grad_total: Tensor | None,
    grad_out: Tensor,
    total: Tensor,
    statistics: Tensor,
    scale: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    branch_dtype: torch.dtype | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _implementation(total, backend).backward(
        grad_total, grad_out, total, statistics, scale, weight, bias, branch_dtype
    )


def _forward_fake(x, branch, scale, weight, bias, eps, out_dtype, branch_dtype, backend):
    del scale, eps, branch_dtype, backend
    total = x.new_empty(0) if branch is None else x.new_empty(x.shape)
    statistics = x.new_empty((x.shape[:-1].numel(), 2), dtype=state_dtype(x, weight, bias))
    return total, x.new_empty(x.shape, dtype=out_dtype), statistics


def _backward_fake(
    grad_total, grad_out, total, statistics, scale, weight, bias, branch_dtype, backend
):
    del grad_total, grad_out, statistics, scale, backend
    branch = total.new_empty(0)
    if branch_dtype is not None:
        branch = total.new_empty(total.shape, dtype=branch_dtype)
    return total.new_empty(total.shape), branch, torch.empty_like(weight), torch.empty_like(bias)


def _setup_context(ctx, inputs, output) -> None:
    x, branch, scale, weight, bias, _, _, ctx.branch_dtype, ctx.backend = inputs
    total, _, statistics = output
    ctx.has_branch = branch is not None
    ctx.save_for_backward(total if ctx.has_branch else x, statistics, scale, weight, bias)
    ctx.mark_non_differentiable(statistics)
    ctx.set_materialize_grads(False)


def _gradients(ctx, grad_total: Tensor | None, grad_out: Tensor | None, _) -> tuple:
    total, statistics, scale, weight, bias = ctx.saved_tensors
    if not ctx.has_branch:
        grad_total = None
    if grad_out is None:
        if grad_total is None:
            return (None,) * 9
        grad_out = torch.zeros_like(total)
    grad_x, grad_branch, grad_weight, grad_bias = _pair.backward(
        grad_total,
        grad_out,
        total,
        statistics,
        scale,
        weight,
        bias,
        ctx.branch_dtype,
        ctx.backend,
    )
    if not ctx.has_branch:
        grad_branch = None
    elif ctx.branch_dtype is None:
        grad_branch = grad_x
    return grad_x, grad_branch, None, grad_weight, grad_bias, None, None, None, None


_pair = OperatorPair(
    _OP,
    _forward,
    _backward,
    "(Tensor x, Tensor? branch, Tensor? scale, Tensor weight, Tensor bias, float eps, "
    "ScalarType out_dtype, ScalarType? branch_dtype, str backend) -> (Tensor, Tensor, Tensor)",
    "(Tensor? grad_total, Tensor grad_out, Tensor total, Tensor statistics, Tensor? scale, "
    "Tensor weight, Tensor bias, ScalarType? branch_dtype, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _forward_fake,
    _backward_fake,
    _setup_context,
    _gradients,
)
