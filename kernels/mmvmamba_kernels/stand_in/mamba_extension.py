"""Stand-in for ``selective_scan_cuda``, the extension of mamba-ssm."""

from __future__ import annotations

import torch
from torch import Tensor

from mmvmamba_kernels.arguments import state_dtype
from mmvmamba_kernels.stand_in.scan import carried, gated, gradients, scan

__all__ = ["bwd", "fwd"]


def fwd(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    cu_seqlens: Tensor | None = None,
) -> list[Tensor]:
    """The scan without gradients.

    Returns:
        The output before the gate, the states to save, and with z the gated output.
    """
    refuse_packed(cu_seqlens)
    with torch.no_grad():
        dtype = state_dtype(u, delta, A, B, C)
        out, last = scan(
            u,
            delta,
            A,
            B,
            C,
            D,
            delta_bias,
            delta_softplus,
            return_last_state=True,
            out_dtype=dtype,
        )
        results = [out.to(u.dtype), carried(last)]
        return results if z is None else [*results, gated(out, z).to(u.dtype)]


def bwd(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    grad_out: Tensor,
    x: Tensor | None,
    out: Tensor | None,
    dz: Tensor | None,
    delta_softplus: bool,
    recompute_out_z: bool,
    cu_seqlens: Tensor | None = None,
) -> list[Tensor | None]:
    """The gradients, from the arguments alone; ``dz`` is filled if given.

    Returns:
        Those of u, delta, A, B, C, D and delta_bias; with z its own, and if asked for the gated
        output.
    """
    refuse_packed(cu_seqlens)
    del x, out
    outputs = []

    def function(z: Tensor | None, **tensors: Tensor | None) -> Tensor:
        dtype = state_dtype(grad_out, *tensors.values())
        y = scan(**tensors, delta_softplus=delta_softplus, out_dtype=dtype)
        outputs.append(y if z is None else gated(y, z))
        return outputs[-1]

    tensors = {"u": u, "delta": delta, "A": A, "B": B, "C": C, "D": D, "delta_bias": delta_bias}
    *grads, grad_z = gradients(function, {**tensors, "z": z}, grad_out)
    if z is None:
        return grads
    grads.append(grad_z if dz is None else dz.copy_(grad_z))
    return [*grads, outputs[0].detach().to(u.dtype)] if recompute_out_z else grads


def refuse_packed(cu_seqlens: Tensor | None) -> None:
    """Check that sequences are not packed into one.

    Raises:
        NotImplementedError: If they are.
    """
    if cu_seqlens is not None:
        raise NotImplementedError(
            "the stand-in for mamba-ssm does not support cu_seqlens (several sequences packed into "
            "one). Call it once per sequence."
        )
