"""Stand-in for ``selective_scan``, the package of VMamba's first version."""

from __future__ import annotations

from torch import Tensor

from mmvmamba_kernels.stand_in.scan import scan

__all__ = ["selective_scan_fn", "selective_scan_ref"]


def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    nrows: int = 1,
    backnrows: int = -1,
) -> Tensor:
    """The scan; ``nrows`` and ``backnrows`` tune the real one."""
    del nrows, backnrows
    return scan(u, delta, A, B, C, D, delta_bias, delta_softplus)


def selective_scan_ref(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
) -> Tensor:
    """The scan in plain PyTorch."""
    return scan(u, delta, A, B, C, D, delta_bias, delta_softplus, backend="reference")
