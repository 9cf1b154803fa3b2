"""Stand-in for ``mamba_ssm.ops.selective_scan_interface``."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from mmvmamba_kernels.arguments import state_dtype
from mmvmamba_kernels.stand_in.mamba_extension import refuse_packed
from mmvmamba_kernels.stand_in.scan import gated, scan

__all__ = [
    "mamba_inner_fn",
    "mamba_inner_fn_no_out_proj",
    "mamba_inner_ref",
    "selective_scan_fn",
    "selective_scan_ref",
]


def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The scan and the gate silu(z); as in mamba-ssm, no gradient flows through the last state.

    Returns:
        The output, and if asked for the last state, (batch, dim, N).
    """
    refuse_packed(cu_seqlens)
    result = _gated_scan(
        u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state=return_last_state
    )
    return (result[0], result[1].detach()) if return_last_state else result


def selective_scan_ref(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`selective_scan_fn` in plain PyTorch, and with the last state's gradients."""
    refuse_packed(cu_seqlens)
    return _gated_scan(
        *(u, delta, A, B, C, D, z, delta_bias, delta_softplus),
        return_last_state=return_last_state,
        backend="reference",
    )


def _gated_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    **options: object,
) -> Tensor | tuple[Tensor, Tensor]:
    if z is None:
        return scan(u, delta, A, B, C, D, delta_bias, delta_softplus, **options)
    # The gate rounds the output, once.
    options["out_dtype"] = state_dtype(u, delta, A, B, C)
    result = scan(u, delta, A, B, C, D, delta_bias, delta_softplus, **options)
    if not isinstance(result, tuple):
        return gated(result, z).to(u.dtype)
    out, last = result
    return gated(out, z).to(u.dtype), last


def mamba_inner_fn(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
    checkpoint_lvl: int = 1,
    b_rms_weight: Tensor | None = None,
    c_rms_weight: Tensor | None = None,
    dt_rms_weight: Tensor | None = None,
    b_c_dt_rms_eps: float = 1e-6,
) -> Tensor:
    """All of a Mamba block after its input projection.

    A causal depthwise convolution with SiLU, projections to the step sizes, B and C, the scan, the
    gate and the output projection. Section 3.4 of "Mamba: Linear-Time Sequence Modeling with
    Selective State Spaces", arXiv 2312.00752. ``checkpoint_lvl`` is taken for the signature's sake.

    Args:
        xz: Input of convolution and gate, (batch, 2 * dim, L).
        conv1d_weight: (dim, 1, width).
        conv1d_bias: (dim,).
        x_proj_weight: (rank + N for each of B and C that is None, dim).
        delta_proj_weight: (dim, rank).
        out_proj_weight: (model's width, dim).
        out_proj_bias: (model's width,).
        A: (dim, N).
        B: None for one projected from the input, else as ``selective_scan_fn``.
        C: Likewise.
        D: (dim,).
        delta_bias: (dim,).
        B_proj_bias: Added to the projected B, (N,).
        C_proj_bias: Added to the projected C, (N,).
        delta_softplus: Apply softplus to the step sizes.
        checkpoint_lvl: Ignored.
        b_rms_weight: Not provided, like the next two.
        c_rms_weight: Not provided.
        dt_rms_weight: Not provided.
        b_c_dt_rms_eps: Ignored.

    Returns:
        (batch, L, model's width).

    Raises:
        NotImplementedError: For the weights of normalised B, C or step sizes.
    """
    del checkpoint_lvl, b_c_dt_rms_eps
    weights = {"b_rms": b_rms_weight, "c_rms": c_rms_weight, "dt_rms": dt_rms_weight}
    given = [f"{name}_weight" for name, weight in weights.items() if weight is not None]
    if given:
        raise NotImplementedError(
            f"mamba_inner_fn: the stand-in does not support {', '.join(given)} (language models "
            "use them to normalise B, C and the step sizes). Leave them out."
        )
    out = mamba_inner_fn_no_out_proj(
        *(xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, A, B, C, D),
        *(delta_bias, B_proj_bias, C_proj_bias, delta_softplus),
    )
    return F.linear(out.transpose(1, 2), out_proj_weight, out_proj_bias)


mamba_inner_ref = mamba_inner_fn


def mamba_inner_fn_no_out_proj(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
    checkpoint_lvl: int = 1,
) -> Tensor:
    """:func:`mamba_inner_fn` without the output projection, as Vim's copy of mamba-ssm has it.

    Returns:
        (batch, dim, L).
    """
    del checkpoint_lvl
    length = xz.shape[2]
    x, z = xz.chunk(2, 1)
    width = conv1d_weight.shape[-1]
    x = F.conv1d(x, conv1d_weight, conv1d_bias, padding=width - 1, groups=x.shape[1])
    x = F.silu(x[..., :length])
    rank, states = delta_proj_weight.shape[1], A.shape[1]
    projected = F.linear(x.transpose(1, 2), x_proj_weight)
    delta = F.linear(projected[..., :rank], delta_proj_weight).transpose(1, 2)
    if B is None:
        B = _projected(projected[..., rank : rank + states], B_proj_bias)
    if C is None:
        C = _projected(projected[..., -states:], C_proj_bias)
    return _gated_scan(x, delta, A, B, C, D, z, delta_bias, delta_softplus)


def _projected(weights: Tensor, bias: Tensor | None) -> Tensor:
    """(batch, L, N) -> (batch, N, L)."""
    weights = weights if bias is None else weights + bias.to(weights.dtype)
    return weights.transpose(1, 2)
