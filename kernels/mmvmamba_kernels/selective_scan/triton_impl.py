"""The 1D selective scan in Triton, forward and backward: the 2D kernels on maps of one row.

Kernels walk along positions with the channels across lanes, so sequences are turned channels-last
first, which costs nothing if that is how they are in memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmvmamba_kernels.arguments import state_dtype
from mmvmamba_kernels.backends.triton.scan import (
    Layout,
    Operands,
    rounds_states,
    scan_backward,
    scan_forward,
)
from mmvmamba_kernels.patterns import Path
from mmvmamba_kernels.selective_scan.arguments import Arguments


def _layout(scan: Arguments) -> Layout:
    batch, groups, states, length = scan.B.shape
    channels = scan.u.shape[1] // groups
    return Layout(
        batch=batch,
        height=1,
        width=length,
        channels=channels,
        states=states,
        paths=(Path(column_major=False, reverse=False),) * groups,
        low_rank=0,
        rank=0,
        stride=groups * channels,
        stride_u_k=channels,
        stride_y_k=channels,
        stride_delta_k=channels,
        rounded=rounds_states(
            torch.promote_types(scan.B.dtype, scan.C.dtype), state_dtype(*scan), states
        ),
    )


def carries_shape(scan: Arguments) -> tuple[int, ...]:
    """Shape of the states that the forward pass saves for the backward pass."""
    return _layout(scan).carries_shape


def _channels_last(sequence: Tensor) -> Tensor:
    return sequence.transpose(1, 2).contiguous()


def _operands(scan: Arguments) -> tuple[Layout, Operands]:
    u, delta, A, B, C, D, delta_bias, softplus, _ = scan
    return _layout(scan), Operands(
        u=_channels_last(u),
        proj=torch.cat([B, C], dim=2).permute(0, 3, 1, 2).contiguous(),
        A=A.contiguous(),
        delta=_channels_last(delta),
        weight=None,
        bias=None if delta_bias is None else delta_bias.contiguous(),
        skip=None if D is None else D.contiguous(),
        softplus=softplus,
        dtype=state_dtype(*scan),
    )


def forward(scan: Arguments, save_carries: bool) -> tuple[Tensor, Tensor]:
    """See :func:`mmvmamba_kernels.selective_scan`.

    Returns:
        The output in ``out_dtype``, and states of every group in the state's dtype (no elements
        unless ``save_carries``).
    """
    layout, operands = _operands(scan)
    out = torch.empty_like(operands.u, dtype=scan.out_dtype)
    carries = scan_forward(layout, operands, out, save_carries)
    return out.transpose(1, 2).contiguous(), carries


def backward(
    grad_out: Tensor, carries: Tensor, scan: Arguments
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """See :func:`mmvmamba_kernels.selective_scan.reference.backward`."""
    layout, operands = _operands(scan)
    _, delta, A, B, C, D, delta_bias, *_ = scan
    batch, groups, states, length = B.shape
    grad_u = torch.empty_like(operands.u)
    # The gradient of the bias is the sum of this one, so it keeps the precision of sums until then.
    raw = torch.empty_like(operands.u, dtype=delta.dtype if delta_bias is None else operands.dtype)
    grads = scan_backward(layout, operands, carries, _channels_last(grad_out), grad_u, raw)
    grad_B, grad_C = (
        part.to(t.dtype).contiguous()
        for part, t in zip(
            grads.proj.sum(0)
            .view(batch, length, groups, 2 * states)
            .permute(0, 2, 3, 1)
            .split(states, dim=2),
            (B, C),
            strict=True,
        )
    )
    return (
        grad_u.transpose(1, 2).contiguous(),
        raw.transpose(1, 2).to(delta.dtype).contiguous(),
        grads.A.flatten(0, 1).to(A.dtype).contiguous(),
        grad_B,
        grad_C,
        None if D is None else grads.skip.flatten().to(D.dtype),
        None if delta_bias is None else raw.sum((0, 1)).to(delta_bias.dtype),
    )
