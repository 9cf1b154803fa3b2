"""The 1D selective scan with groups: public function, checks and registration with PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from mmvmamba_kernels.checks import FLOATING, check_positive, check_rank, check_shape, check_tensors
from mmvmamba_kernels.chunked_scan import state_dtype
from mmvmamba_kernels.dispatch import Backend, Problem, check_name, register_backend, resolve
from mmvmamba_kernels.registration import (
    NAMESPACE,
    autocast_off,
    check_carries,
    forbid_double_backward,
    needs_backward,
)

_OP = "selective_scan"

register_backend(
    _OP, Backend("reference", f"{__package__}.reference", can_run=lambda problem: None, slow=True)
)


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    *,
    out_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """Run a selective state space model over sequences.

    With ``delta' = softplus(delta + delta_bias)`` (each part only if asked for), channel d of group k follows
    ``h_l = exp(delta'_l A[d]) h_{l-1} + delta'_l B_l[k] u_l[d]`` and gives ``y_l = C_l[k] . h_l + D[d] u_l[d]``.
    The meaning is that of ``selective_scan_fn`` in mamba_ssm with K groups. Source: "Mamba: Linear-Time Sequence
    Modeling with Selective State Spaces", arXiv 2312.00752.

    States and sums are float32 (float64 if any argument is float64), whatever the arguments' dtypes and whether or
    not autocast is on. Differentiable once in every tensor argument, each gradient in its argument's dtype, and
    deterministic.

    Shape letters: K groups, D channels of a group, N state dimension, L positions.

    Args:
        u: Input, (batch, K*D, L).
        delta: Step sizes, (batch, K*D, L).
        A: Negative rates of the states, (K*D, N).
        B: Input weights, (batch, K, N, L).
        C: Output weights, (batch, K, N, L).
        D: Skip weights, (K*D,).
        delta_bias: Added to ``delta`` before softplus, (K*D,).
        delta_softplus: Apply softplus to ``delta``; values above 20 pass as they are.
        out_dtype: Dtype of the result; None for that of ``u``.
        backend: Name of the implementation; None chooses one per call (see :mod:`mmvmamba_kernels.dispatch`).

    Returns:
        (batch, K*D, L).

    Raises:
        TypeError: If an argument is not a floating-point tensor, or ``out_dtype`` is not a floating-point dtype.
        ValueError: If shapes or devices do not fit one another.
        BackendError: If the backend does not exist or cannot run this call.
    """
    arguments = {"u": u, "delta": delta, "A": A, "B": B, "C": C, "D": D, "delta_bias": delta_bias}
    check_tensors(_OP, arguments)
    if out_dtype is None:
        out_dtype = u.dtype
    elif out_dtype not in FLOATING:
        raise TypeError(f"{_OP}: out_dtype must be a floating-point torch.dtype, got {out_dtype!r}")
    check_rank(_OP, "u", u, "(batch, K*D, L)")
    check_rank(_OP, "A", A, "(K*D, N)")
    check_rank(_OP, "B", B, "(batch, K, N, L)")
    batch, channels, length = u.shape
    groups, states = B.shape[1], A.shape[1]
    check_positive(_OP, L=length, K=groups, N=states, **{"K*D": channels})
    if channels % groups:
        raise ValueError(
            f"{_OP}: u has {channels} channels, which B of shape {tuple(B.shape)} cannot divide into {groups} groups"
        )
    check_shape(_OP, "delta", delta, "(batch, K*D, L)", (batch, channels, length))
    check_shape(_OP, "A", A, "(K*D, N)", (channels, states))
    check_shape(_OP, "B", B, "(batch, K, N, L)", (batch, groups, states, length))
    check_shape(_OP, "C", C, "(batch, K, N, L)", (batch, groups, states, length))
    check_shape(_OP, "D", D, "(K*D,)", (channels,))
    check_shape(_OP, "delta_bias", delta_bias, "(K*D,)", (channels,))
    name = check_name(_OP, backend)
    save_carries = needs_backward(*arguments.values())
    out, _ = _forward(*arguments.values(), delta_softplus, out_dtype, name, save_carries)
    return out


def _implementation(u: Tensor, A: Tensor, backend: str, fake: bool = False):
    states = A.shape[1]
    return resolve(_OP, backend, Problem(u.device, u.dtype, states, u.numel() * states), quiet=fake)


def _carries_shape(implementation, u: Tensor, B: Tensor) -> tuple[int, ...]:
    batch, groups, states, length = B.shape
    return implementation.carries_shape(batch, groups, u.shape[1] // groups, length, states)


@torch.library.custom_op(
    f"{NAMESPACE}::{_OP}",
    mutates_args=(),
    schema="(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? delta_bias, "
    "bool delta_softplus, ScalarType out_dtype, str backend, bool save_carries) -> (Tensor, Tensor)",
)
def _forward(u, delta, A, B, C, D, delta_bias, delta_softplus, out_dtype, backend, save_carries):
    implementation = _implementation(u, A, backend)
    with autocast_off(u):
        return implementation.forward(
            u, delta, A, B, C, D, delta_bias, delta_softplus, out_dtype, save_carries
        )


@_forward.register_fake
def _forward_fake(
    u, delta, A, B, C, D, delta_bias, delta_softplus, out_dtype, backend, save_carries
):
    implementation = _implementation(u, A, backend, fake=True)
    saved = _carries_shape(implementation, u, B) if save_carries else (0,)
    dtype = state_dtype(u, delta, A, B, C, D, delta_bias)
    return u.new_empty(u.shape, dtype=out_dtype), u.new_empty(saved, dtype=dtype)


# Operators cannot return None, so absent arguments get gradients without elements.
@torch.library.custom_op(
    f"{NAMESPACE}::{_OP}_backward",
    mutates_args=(),
    schema="(Tensor grad_out, Tensor carries, Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, "
    "Tensor? delta_bias, bool delta_softplus, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _backward(grad_out, carries, u, delta, A, B, C, D, delta_bias, delta_softplus, backend):
    implementation = _implementation(u, A, backend)
    check_carries(_OP, carries, _carries_shape(implementation, u, B))
    with autocast_off(u):
        grads = implementation.backward(
            grad_out, carries, u, delta, A, B, C, D, delta_bias, delta_softplus
        )
    return tuple(u.new_empty(0) if g is None else g for g in grads)


@_backward.register_fake
def _backward_fake(grad_out, carries, u, delta, A, B, C, D, delta_bias, delta_softplus, backend):
    tensors = (u, delta, A, B, C, D, delta_bias)
    return tuple(u.new_empty(0) if t is None else t.new_empty(t.shape) for t in tensors)


forbid_double_backward(_backward, _OP)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.delta_softplus, _, ctx.backend, _ = inputs
    ctx.save_for_backward(output[1], *tensors)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _autograd(ctx, grad_out, _):
    if grad_out is None:
        return (None,) * 11
    carries, *tensors = ctx.saved_tensors
    grads = _backward(grad_out, carries, *tensors, ctx.delta_softplus, ctx.backend)
    grads = (None if t is None else g for t, g in zip(tensors, grads, strict=True))
    return *grads, None, None, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)


@register_flop_formula(getattr(torch.ops, NAMESPACE).selective_scan)
def selective_scan_flops(
    u_shape, delta_shape, A_shape, B_shape, C_shape, D_shape=None, *args, **kwargs
) -> int:
    """Operations of one call: 9 N L D for the scan, as Mamba's authors count, and L D for the skip if there is one."""
    batch, channels, length = u_shape
    return batch * length * channels * (9 * A_shape[1] + (D_shape is not None))


@register_flop_formula(getattr(torch.ops, NAMESPACE).selective_scan_backward)
def _backward_flops(grad_out_shape, carries_shape, *shapes, **kwargs) -> int:
    return 2 * selective_scan_flops(*shapes)
