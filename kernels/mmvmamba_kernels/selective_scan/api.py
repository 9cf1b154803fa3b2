"""The 1D selective scan with groups: public function, checks and registration with PyTorch."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from mmvmamba_kernels.arguments import (
    FLOATING,
    check_positive,
    check_rank,
    check_shape,
    check_tensors,
)
from mmvmamba_kernels.backends import mamba_ssm
from mmvmamba_kernels.backends.native import extension
from mmvmamba_kernels.backends.triton import support as triton_support
from mmvmamba_kernels.dispatch import Backend, check_name, register_backend
from mmvmamba_kernels.registration import Operator
from mmvmamba_kernels.selective_scan.arguments import Arguments
from mmvmamba_kernels.selective_scan.states import scan_with_states

_OP = "selective_scan"

register_backend(_OP, Backend("triton", f"{__package__}.triton_impl", triton_support.can_run))
register_backend(_OP, Backend("cpp", f"{__package__}.cpp_impl", extension.can_run))
register_backend(
    _OP,
    Backend(
        "mamba_ssm",
        f"{__package__}.mamba_ssm_impl",
        mamba_ssm.can_run,
        # Its backward pass is not deterministic, which nobody should get unasked.
        automatic=False,
    ),
)
register_backend(_OP, Backend("reference", f"{__package__}.reference", slow=True))


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
    initial_state: Tensor | None = None,
    return_last_state: bool = False,
    out_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Run a selective state space model over sequences.

    With ``delta' = softplus(delta + delta_bias)`` (each part only if asked for), channel d of group
    k follows ``h_l = exp(delta'_l A[d]) h_{l-1} + delta'_l B_l[k] u_l[d]`` and gives ``y_l = C_l[k]
    . h_l + D[d] u_l[d]``. The meaning is that of ``selective_scan_fn`` in mamba_ssm with K groups.
    Source: "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", arXiv 2312.00752.

    States and sums are float32 (float64 if any argument is float64), whatever the arguments' dtypes
    and whether or not autocast is on. Differentiable once in every tensor argument, each gradient
    in its argument's dtype, and deterministic.

    A last state costs N positions more, and copies of the maps; an initial one a scan with one
    state, and N maps more if gradients are needed.

    Shape letters: K groups, D channels of a group, N state dimension, L positions.

    Args:
        u: Input, (batch, K*D, L).
        delta: Step sizes, (batch, K*D, L); or (batch, G, L), each for K*D / G channels that follow
            one another.
        A: Negative rates of the states, (K*D, N).
        B: Input weights, (batch, K, N, L).
        C: Output weights, (batch, K, N, L).
        D: Skip weights, (K*D,).
        delta_bias: Added to ``delta`` before softplus, (K*D,), or (G,) like ``delta``.
        delta_softplus: Apply softplus to ``delta``; values above 20 pass as they are.
        initial_state: h_0, (batch, K*D, N); None for zero.
        return_last_state: Return h_L as well.
        out_dtype: Dtype of the result; None for that of ``u``.
        backend: Name of the implementation; None chooses one per call (see
            :mod:`mmvmamba_kernels.dispatch`).

    Returns:
        (batch, K*D, L); if asked for, also the last state, (batch, K*D, N), in the states' dtype.

    Raises:
        TypeError: If an argument is not a floating-point tensor, or ``out_dtype`` is not a
            floating-point dtype.
        ValueError: If shapes or devices do not fit one another.
        BackendError: If the backend does not exist or cannot run this call.
    """
    tensors = {"u": u, "delta": delta, "A": A, "B": B, "C": C, "D": D, "delta_bias": delta_bias}
    check_tensors(
        _OP,
        {**tensors, "initial_state": initial_state},
        optional=("D", "delta_bias", "initial_state"),
    )
    if out_dtype is None:
        out_dtype = u.dtype
    elif out_dtype not in FLOATING:
        raise TypeError(f"{_OP}: out_dtype must be a floating-point torch.dtype, got {out_dtype!r}")
    check_rank(_OP, "u", u, "(batch, K*D, L)")
    check_rank(_OP, "delta", delta, "(batch, K*D, L)")
    check_rank(_OP, "A", A, "(K*D, N)")
    check_rank(_OP, "B", B, "(batch, K, N, L)")
    batch, channels, length = u.shape
    groups, states = B.shape[1], A.shape[1]
    check_positive(_OP, L=length, K=groups, N=states, **{"K*D": channels})
    if channels % groups:
        raise ValueError(
            f"{_OP}: u has {channels} channels, which cannot be divided into the {groups} groups "
            f"of B, shape {tuple(B.shape)}"
        )
    if delta.shape[1] != channels:
        tensors["delta"], tensors["delta_bias"] = _for_channels(delta, delta_bias, channels)
    check_shape(_OP, "delta", tensors["delta"], "(batch, K*D, L)", (batch, channels, length))
    check_shape(_OP, "A", A, "(K*D, N)", (channels, states))
    check_shape(_OP, "B", B, "(batch, K, N, L)", (batch, groups, states, length))
    check_shape(_OP, "C", C, "(batch, K, N, L)", (batch, groups, states, length))
    check_shape(_OP, "D", D, "(K*D,)", (channels,))
    check_shape(_OP, "delta_bias", tensors["delta_bias"], "(K*D,)", (channels,))
    check_shape(_OP, "initial_state", initial_state, "(batch, K*D, N)", (batch, channels, states))
    arguments = Arguments(*tensors.values(), delta_softplus, out_dtype)
    run = functools.partial(_operator, backend=check_name(_OP, backend))
    if initial_state is None and not return_last_state:
        return run(arguments)
    return scan_with_states(run, arguments, initial_state, return_last_state)


def _for_channels(
    delta: Tensor, delta_bias: Tensor | None, channels: int
) -> tuple[Tensor, Tensor | None]:
    """Step sizes and bias that channels share, for every channel.

    Raises:
        ValueError: If the channels cannot be divided among the step sizes.
    """
    groups = delta.shape[1]
    if groups < 1 or channels % groups:
        raise ValueError(
            f"{_OP}: delta must be (batch, K*D, L) or (batch, G, L) with K*D = {channels} a "
            f"multiple of G, got shape {tuple(delta.shape)}"
        )
    check_shape(_OP, "delta_bias", delta_bias, "(G,)", (groups,))
    repeats = channels // groups
    bias = None if delta_bias is None else delta_bias.repeat_interleave(repeats)
    return delta.repeat_interleave(repeats, 1), bias


def _sizes(shapes: Arguments) -> tuple[int, int]:
    batch, channels, length = shapes.u
    return batch * channels * length, shapes.A[1]


_operator = Operator(_OP, Arguments, _sizes)
