"""Stand-in for ``selective_scan_cuda_ndstate``: VMamba's for one state, without its dimension.

A is (K*D,), B and C are (batch, K, L).
"""

from __future__ import annotations

from torch import Tensor

from mmvmamba_kernels.stand_in import core_extension

__all__ = ["bwd", "fwd"]


def fwd(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    nrows: int = 1,
) -> list[Tensor]:
    """The scan without gradients; ``nrows`` tunes the real one.

    Returns:
        The output and the states to save.
    """
    A, B, C = A.unsqueeze(1), B.unsqueeze(2), C.unsqueeze(2)
    return core_extension.fwd(u, delta, A, B, C, D, delta_bias, delta_softplus, nrows)


def bwd(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    grad_out: Tensor,
    x: Tensor | None,
    *options: int,
) -> list[Tensor | None]:
    """The gradients, as those of the extension for several states, in the arguments' layouts."""
    A, B, C = A.unsqueeze(1), B.unsqueeze(2), C.unsqueeze(2)
    grads = core_extension.bwd(u, delta, A, B, C, D, delta_bias, grad_out, x, *options)
    grad_u, grad_delta, grad_A, grad_B, grad_C, *rest = grads
    return [grad_u, grad_delta, grad_A.squeeze(1), grad_B.squeeze(2), grad_C.squeeze(2), *rest]
