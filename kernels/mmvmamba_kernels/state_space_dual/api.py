"""The state space dual scan of Mamba-2: public function, checks and registration with PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from mmvmamba_kernels.checks import check_positive, check_rank, check_shape, check_tensors
from mmvmamba_kernels.chunked_scan import state_dtype
from mmvmamba_kernels.dispatch import Backend, Problem, check_name, register_backend, resolve
from mmvmamba_kernels.registration import (
    NAMESPACE,
    autocast_off,
    check_carries,
    forbid_double_backward,
    needs_backward,
)

_OP = "state_space_dual"

register_backend(
    _OP, Backend("reference", f"{__package__}.reference", can_run=lambda problem: None, slow=True)
)


def state_space_dual(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    dt_bias: Tensor | None = None,
    chunk_size: int = 64,
    backend: str | None = None,
) -> Tensor:
    """Run Mamba-2's scan, in which a head's channels share one decay, over K directions of sequences.

    With ``step_l = softplus(dt_l + dt_bias)``, head h of direction k has a state of P rows and N columns that follows
    ``h_l = exp(step_l A[k, h]) h_{l-1} + step_l x_l (outer) B_l[k]`` and gives ``y_l = h_l C_l[k] + D[k, h] x_l``.
    Source: "Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured State Space
    Duality", arXiv 2405.21060.

    States and sums are float32 (float64 if any argument is float64), whatever the arguments' dtypes and whether or
    not autocast is on. Differentiable once in every tensor argument, each gradient in its argument's dtype, and
    deterministic.

    Args:
        x: Input, (B, K, L, heads, P).
        dt: Step sizes before bias and softplus, (B, K, L, heads).
        A: Negative rates, (K, heads).
        B: Input weights, (B, K, L, N).
        C: Output weights, (B, K, L, N).
        D: Skip weights, (K, heads, P).
        dt_bias: Added to ``dt``, (K, heads).
        chunk_size: Most positions that are handled as one matrix product. It trades speed and memory and does not
            change the result beyond rounding; a shorter or non-divisible L is evened out.
        backend: Name of the implementation; None chooses one per call (see :mod:`mmvmamba_kernels.dispatch`).

    Returns:
        (B, K, L, heads, P), in the dtype of ``x``. Directions are not summed.

    Raises:
        TypeError: If an argument is not a floating-point tensor, or ``chunk_size`` not an integer.
        ValueError: If shapes or devices do not fit one another, or ``chunk_size`` is less than 1.
        BackendError: If the backend does not exist or cannot run this call.
    """
    arguments = {"x": x, "dt": dt, "A": A, "B": B, "C": C, "D": D, "dt_bias": dt_bias}
    check_tensors(_OP, arguments)
    if not isinstance(chunk_size, int):
        raise TypeError(f"{_OP}: chunk_size must be an integer, got {chunk_size!r}")
    check_rank(_OP, "x", x, "(B, K, L, heads, P)")
    check_rank(_OP, "B", B, "(B, K, L, N)")
    batch, directions, length, heads, width = x.shape
    states = B.shape[3]
    check_positive(
        _OP, K=directions, L=length, heads=heads, P=width, N=states, chunk_size=chunk_size
    )
    check_shape(_OP, "dt", dt, "(B, K, L, heads)", (batch, directions, length, heads))
    check_shape(_OP, "A", A, "(K, heads)", (directions, heads))
    check_shape(_OP, "B", B, "(B, K, L, N)", (batch, directions, length, states))
    check_shape(_OP, "C", C, "(B, K, L, N)", (batch, directions, length, states))
    check_shape(_OP, "D", D, "(K, heads, P)", (directions, heads, width))
    check_shape(_OP, "dt_bias", dt_bias, "(K, heads)", (directions, heads))
    name = check_name(_OP, backend)
    out, _ = _forward(*arguments.values(), chunk_size, name, needs_backward(*arguments.values()))
    return out


def _implementation(x: Tensor, B: Tensor, backend: str, fake: bool = False):
    states = B.shape[3]
    return resolve(_OP, backend, Problem(x.device, x.dtype, states, x.numel() * states), quiet=fake)


@torch.library.custom_op(
    f"{NAMESPACE}::{_OP}",
    mutates_args=(),
    schema="(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? dt_bias, int chunk_size, "
    "str backend, bool save_carries) -> (Tensor, Tensor)",
)
def _forward(x, dt, A, B, C, D, dt_bias, chunk_size, backend, save_carries):
    implementation = _implementation(x, B, backend)
    with autocast_off(x):
        return implementation.forward(x, dt, A, B, C, D, dt_bias, chunk_size, save_carries)


@_forward.register_fake
def _forward_fake(x, dt, A, B, C, D, dt_bias, chunk_size, backend, save_carries):
    implementation = _implementation(x, B, backend, fake=True)
    saved = implementation.carries_shape(*x.shape, B.shape[3], chunk_size) if save_carries else (0,)
    dtype = state_dtype(x, dt, A, B, C, D, dt_bias)
    return x.new_empty(x.shape), x.new_empty(saved, dtype=dtype)


# Operators cannot return None, so absent arguments get gradients without elements.
@torch.library.custom_op(
    f"{NAMESPACE}::{_OP}_backward",
    mutates_args=(),
    schema="(Tensor grad_out, Tensor carries, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, "
    "Tensor? dt_bias, int chunk_size, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _backward(grad_out, carries, x, dt, A, B, C, D, dt_bias, chunk_size, backend):
    implementation = _implementation(x, B, backend)
    check_carries(_OP, carries, implementation.carries_shape(*x.shape, B.shape[3], chunk_size))
    with autocast_off(x):
        grads = implementation.backward(grad_out, carries, x, dt, A, B, C, D, dt_bias, chunk_size)
    return tuple(x.new_empty(0) if g is None else g for g in grads)


@_backward.register_fake
def _backward_fake(grad_out, carries, x, dt, A, B, C, D, dt_bias, chunk_size, backend):
    tensors = (x, dt, A, B, C, D, dt_bias)
    return tuple(x.new_empty(0) if t is None else t.new_empty(t.shape) for t in tensors)


forbid_double_backward(_backward, _OP)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.chunk_size, ctx.backend, _ = inputs
    ctx.save_for_backward(output[1], *tensors)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _autograd(ctx, grad_out, _):
    if grad_out is None:
        return (None,) * 10
    carries, *tensors = ctx.saved_tensors
    grads = _backward(grad_out, carries, *tensors, ctx.chunk_size, ctx.backend)
    grads = (None if t is None else g for t, g in zip(tensors, grads, strict=True))
    return *grads, None, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)


@register_flop_formula(getattr(torch.ops, NAMESPACE).state_space_dual)
def state_space_dual_flops(
    x_shape, dt_shape, A_shape, B_shape, C_shape, D_shape=None, *args, **kwargs
) -> int:
    """Operations of one call: 9 N L D per direction for the scan, as for the other scans, with D = heads * P
    channels, and L D for the skip if there is one.
    """
    batch, directions, length, heads, width = x_shape
    return batch * directions * length * heads * width * (9 * B_shape[3] + (D_shape is not None))


@register_flop_formula(getattr(torch.ops, NAMESPACE).state_space_dual_backward)
def _backward_flops(grad_out_shape, carries_shape, *shapes, **kwargs) -> int:
    return 2 * state_space_dual_flops(*shapes)
