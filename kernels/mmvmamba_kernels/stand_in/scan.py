"""What the stand-ins of interfaces and extensions share: one scan, and the gradients of a call."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from mmvmamba_kernels.arguments import state_dtype
from mmvmamba_kernels.selective_scan.api import selective_scan


def scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    **options: object,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`mmvmamba_kernels.selective_scan` with B and C in any of mamba-ssm's layouts.

    These are (K*D, N), the same at all positions (computed as K*D groups of one channel), (batch,
    N, L) and (batch, K, N, L).

    Raises:
        ValueError: If B or C has another number of dimensions, or beside the causes of
            ``selective_scan``.
    """
    B, C = (_grouped(name, t, u) for name, t in (("B", B), ("C", C)))
    groups = max(B.shape[1], C.shape[1])
    B, C = (
        t.repeat_interleave(groups // t.shape[1], 1) if 1 < groups != t.shape[1] else t
        for t in (B, C)
    )
    return selective_scan(u, delta, A, B, C, D, delta_bias, delta_softplus, **options)


def _grouped(name: str, weights: Tensor, u: Tensor) -> Tensor:
    """B or C as (batch, K, N, L)."""
    if weights.ndim == 2:
        return weights[None, :, :, None].expand(u.shape[0], -1, -1, u.shape[2])
    if weights.ndim == 3:
        return weights.unsqueeze(1)
    if weights.ndim == 4:
        return weights
    raise ValueError(
        f"selective_scan: {name} must be (K*D, N), (batch, N, L) or (batch, K, N, L), "
        f"got shape {tuple(weights.shape)}"
    )


def gated(out: Tensor, z: Tensor) -> Tensor:
    """out * silu(z), in the wider dtype of the two and at least float32."""
    dtype = torch.promote_types(out.dtype, state_dtype(z))
    return out.to(dtype) * F.silu(z.to(dtype))


def carried(last_state: Tensor) -> Tensor:
    """The states that an extension saves for its backward pass, (batch, K*D, 1, 2N).

    The real ones save two numbers a state for every 2048 positions; callers read the last state at
    ``[:, :, -1, 1::2]``. The products of decays between them, which nobody reads, are NaN.
    """
    products = torch.full_like(last_state, torch.nan)
    return torch.stack((products, last_state), 3).flatten(2).unsqueeze(2)


def gradients(
    function: Callable[..., Tensor], tensors: dict[str, Tensor | None], grad_out: Tensor
) -> list[Tensor | None]:
    """The gradient of each argument, None for absent ones; runs the forward pass once more."""
    leaves = {k: t if t is None else t.detach().requires_grad_() for k, t in tensors.items()}
    with torch.enable_grad():
        out = function(**leaves)
        present = {name: t for name, t in leaves.items() if t is not None}
        grads = torch.autograd.grad(out, list(present.values()), grad_out.to(out.dtype))
    found = dict(zip(present, grads, strict=True))
    return [found.get(name) for name in tensors]
