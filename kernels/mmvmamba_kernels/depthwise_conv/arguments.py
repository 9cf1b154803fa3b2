"""The arguments of the depth-wise convolution, as its backends take them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Arguments(NamedTuple):
    """See :func:`mmvmamba_kernels.depthwise_conv`."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    act: str
