"""Elementary functions of the reference backends."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def softplus(z: Tensor) -> Tensor:
    """log(1 + exp(z)), which is z beyond 20."""
    if z.dtype != torch.float32 or z.device.type != "cpu":
        return F.softplus(z, threshold=20)
    # PyTorch's own is built on Sleef's log1p, whose AVX-512 version was measured to take ten times
    # as long in some processes as in others, by where its stack frame happens to lie. With
    # e = exp(-|z|), log(1 + exp(z)) = max(z, 0) + log1p(e) and log1p(e) = 2 atanh(e / (2 + e)), to
    # the same accuracy. Beyond 20 the second part is less than half a unit of z's last place.
    small = z.abs().neg_().exp_()
    total = small + 2
    small.div_(total).atanh_()
    return torch.clamp_min(z, 0, out=total).add_(small, alpha=2)
