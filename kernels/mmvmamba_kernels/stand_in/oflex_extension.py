"""Stand-in for ``selective_scan_cuda_oflex``: VMamba's, with a float32 output for half inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from mmvmamba_kernels.stand_in.core_extension import bwd, scan_and_states

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
    out_float: bool = True,
) -> list[Tensor]:
    """The scan without gradients; ``nrows`` tunes the real one.

    Returns:
        The output, in float32 if ``out_float`` and in the dtype of ``u`` else, and the states to
        save.
    """
    del nrows
    dtype = torch.promote_types(u.dtype, torch.float32) if out_float else u.dtype
    return scan_and_states(u, delta, A, B, C, D, delta_bias, delta_softplus, dtype)
