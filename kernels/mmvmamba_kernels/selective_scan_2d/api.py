"""The fused 2D selective scan: public function, checks and registration with PyTorch."""

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
from mmvmamba_kernels.selective_scan_2d.patterns import PATTERNS

_OP = "selective_scan_2d"

register_backend(
    _OP, Backend("reference", f"{__package__}.reference", can_run=lambda problem: None, slow=True)
)


def selective_scan_2d(
    x: Tensor,
    proj: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    *,
    pattern: str = "cross2d",
    backend: str | None = None,
) -> Tensor:
    """Scan a map along K paths with a selective state space model each, and sum the results at every position.

    For direction k and channel d, along that direction's path,
    ``delta_l = softplus(sum_r dt_weight[k, d, r] R_l[k, r] + dt_bias[k, d])``,
    ``h_l = exp(delta_l A[k, d]) h_{l-1} + delta_l B_l[k] x_l[d]`` and ``y_l = C_l[k] . h_l + D[k, d] x_l[d]``
    with R, B and C the parts of ``proj``. Source: "VMamba: Visual State Space Model", arXiv 2401.10166, SS2D.

    States and sums are float32 (float64 if any argument is float64), whatever the arguments' dtypes and whether or
    not autocast is on. Differentiable once in every tensor argument, each gradient in its argument's dtype, and
    deterministic.

    Shape letters: B batch, H height, W width, D channels, K directions, R dt rank, N state dimension.

    Args:
        x: The map, (B, H, W, D), channels last.
        proj: Per position and direction the low-rank dt, B and C side by side, (B, H, W, K, R + 2N).
        dt_weight: From the low rank to the channels' step sizes, (K, D, R).
        dt_bias: Bias of the step sizes before softplus, (K, D).
        A: Negative rates of the states, (K, D, N).
        D: Skip weights, (K, D).
        pattern: The paths. K = 4: 'cross2d' (k = 0 row by row, 1 column by column, 2 and 3 the same reversed), 'unidi'
            (row by row four times), 'bidi' (k = 0, 1 row by row, 2, 3 the same reversed). K = 2: 'rows' and
            'columns', in which every row or column is a sequence of its own (k = 0 forwards, 1 reversed).
        backend: Name of the implementation; None chooses one per call (see :mod:`mmvmamba_kernels.dispatch`).

    Returns:
        The sum over the K directions, (B, H, W, D), in the dtype of ``x``.

    Raises:
        TypeError: If an argument is not a floating-point tensor.
        ValueError: If shapes or devices do not fit one another, or the pattern is unknown.
        BackendError: If the backend does not exist or cannot run this call.
    """
    arguments = {
        "x": x,
        "proj": proj,
        "dt_weight": dt_weight,
        "dt_bias": dt_bias,
        "A": A,
        "D": D,
    }
    check_tensors(_OP, arguments)
    if pattern not in PATTERNS:
        raise ValueError(f"{_OP}: pattern must be one of {', '.join(PATTERNS)}, got {pattern!r}")
    directions = len(PATTERNS[pattern])
    check_rank(_OP, "x", x, "(B, H, W, D)")
    check_rank(_OP, "dt_weight", dt_weight, "(K, D, R)")
    check_rank(_OP, "A", A, "(K, D, N)")
    batch, height, width, channels = x.shape
    rank, states = dt_weight.shape[2], A.shape[2]
    check_positive(_OP, H=height, W=width, D=channels, R=rank, N=states)
    check_shape(
        _OP,
        "dt_weight",
        dt_weight,
        f"(K, D, R) with pattern {pattern!r}",
        (directions, channels, rank),
    )
    check_shape(_OP, "dt_bias", dt_bias, "(K, D)", (directions, channels))
    check_shape(_OP, "A", A, "(K, D, N)", (directions, channels, states))
    check_shape(_OP, "D", D, "(K, D)", (directions, channels))
    check_shape(
        _OP,
        "proj",
        proj,
        "(B, H, W, K, R + 2N)",
        (batch, height, width, directions, rank + 2 * states),
    )
    name = check_name(_OP, backend)
    out, _ = _forward(*arguments.values(), pattern, name, needs_backward(*arguments.values()))
    return out


def _implementation(x: Tensor, A: Tensor, pattern: str, backend: str, fake: bool = False):
    states = A.shape[2]
    work = x.numel() * states * len(PATTERNS[pattern])
    return resolve(_OP, backend, Problem(x.device, x.dtype, states, work), quiet=fake)


@torch.library.custom_op(
    f"{NAMESPACE}::{_OP}",
    mutates_args=(),
    schema="(Tensor x, Tensor proj, Tensor dt_weight, Tensor dt_bias, Tensor A, Tensor D, str pattern, str backend, "
    "bool save_carries) -> (Tensor, Tensor)",
)
def _forward(x, proj, dt_weight, dt_bias, A, D, pattern, backend, save_carries):
    implementation = _implementation(x, A, pattern, backend)
    with autocast_off(x):
        return implementation.forward(x, proj, dt_weight, dt_bias, A, D, pattern, save_carries)


@_forward.register_fake
def _forward_fake(x, proj, dt_weight, dt_bias, A, D, pattern, backend, save_carries):
    implementation = _implementation(x, A, pattern, backend, fake=True)
    saved = implementation.carries_shape(*x.shape, A.shape[2], pattern) if save_carries else (0,)
    dtype = state_dtype(x, proj, dt_weight, dt_bias, A, D)
    return x.new_empty(x.shape), x.new_empty(saved, dtype=dtype)


@torch.library.custom_op(
    f"{NAMESPACE}::{_OP}_backward",
    mutates_args=(),
    schema="(Tensor grad_out, Tensor carries, Tensor x, Tensor proj, Tensor dt_weight, Tensor dt_bias, Tensor A, "
    "Tensor D, str pattern, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _backward(grad_out, carries, x, proj, dt_weight, dt_bias, A, D, pattern, backend):
    implementation = _implementation(x, A, pattern, backend)
    check_carries(_OP, carries, implementation.carries_shape(*x.shape, A.shape[2], pattern))
    with autocast_off(x):
        return implementation.backward(
            grad_out, carries, x, proj, dt_weight, dt_bias, A, D, pattern
        )


@_backward.register_fake
def _backward_fake(grad_out, carries, x, proj, dt_weight, dt_bias, A, D, pattern, backend):
    return tuple(t.new_empty(t.shape) for t in (x, proj, dt_weight, dt_bias, A, D))


forbid_double_backward(_backward, _OP)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.pattern, ctx.backend, _ = inputs
    ctx.save_for_backward(output[1], *tensors)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _autograd(ctx, grad_out, _):
    if grad_out is None:
        return (None,) * 9
    grads = _backward(grad_out, *ctx.saved_tensors, ctx.pattern, ctx.backend)
    return *grads, None, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)


@register_flop_formula(getattr(torch.ops, NAMESPACE).selective_scan_2d)
def selective_scan_2d_flops(
    x_shape, proj_shape, dt_weight_shape, dt_bias_shape, A_shape, D_shape, *args, **kwargs
) -> int:
    """Operations of one call: 9 N L D per direction for the scan, as Mamba's authors count, and L D for the skip.

    The product with ``dt_weight`` is not in that figure.
    """
    batch, height, width, channels = x_shape
    directions, _, states = A_shape
    return batch * directions * height * width * channels * (9 * states + 1)


@register_flop_formula(getattr(torch.ops, NAMESPACE).selective_scan_2d_backward)
def _backward_flops(grad_out_shape, carries_shape, *shapes, **kwargs) -> int:
    return 2 * selective_scan_2d_flops(*shapes)
