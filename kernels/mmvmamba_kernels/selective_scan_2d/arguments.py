"""The arguments of the 2D selective scan, as its backends take them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from mmvmamba_kernels.patterns import PATTERNS, Path


class Arguments(NamedTuple):
    """See :func:`mmvmamba_kernels.selective_scan_2d`."""

    x: Tensor
    proj: Tensor
    dt_weight: Tensor
    dt_bias: Tensor
    A: Tensor
    D: Tensor
    pattern: str

    @property
    def paths(self) -> tuple[Path, ...]:
        """The path of every direction."""
        return PATTERNS[self.pattern]
