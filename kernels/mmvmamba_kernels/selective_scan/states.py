"""Scans that start from a state or return the last one, composed of calls that every backend runs.

The operator itself starts from zero and returns outputs alone.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from mmvmamba_kernels.arguments import state_dtype
from mmvmamba_kernels.selective_scan.arguments import Arguments

# Before softplus: a step of exactly zero in every dtype, with any bias that is not as large.
_NO_STEP = -1e4


def scan_with_states(
    run: Callable[[Arguments], Tensor],
    scan: Arguments,
    initial_state: Tensor | None,
    return_last_state: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """See :func:`mmvmamba_kernels.selective_scan`; ``run`` calls the operator."""
    dtype = state_dtype(*scan, initial_state)
    length = scan.u.shape[2]
    whole = _with_probes(scan, dtype) if return_last_state else scan
    out = run(whole._replace(out_dtype=dtype))
    out, last = out[..., :length], out[..., length:]
    if initial_state is not None:
        response, left = _response(run, scan, initial_state.to(dtype))
        out = out + response
        last = last + left if return_last_state else last
    out = out.to(scan.out_dtype).contiguous()
    return (out, last.contiguous()) if return_last_state else out


def _with_probes(scan: Arguments, dtype: torch.dtype) -> Arguments:
    """The scan with N more positions, at which states stay and the output is one state each."""
    batch, groups, states, _ = scan.B.shape
    delta, bias = scan.delta, scan.delta_bias
    if bias is not None and not scan.delta_softplus:
        # A step that cancels the bias would be rounded in delta's dtype.
        delta, bias = delta.to(dtype) + bias.to(dtype)[:, None], None
    reading = torch.eye(states, dtype=scan.C.dtype, device=scan.C.device)
    return scan._replace(
        u=F.pad(scan.u, (0, states)),
        delta=F.pad(delta, (0, states), value=_NO_STEP if scan.delta_softplus else 0.0),
        B=F.pad(scan.B, (0, states)),
        C=torch.cat((scan.C, reading.expand(batch, groups, states, states)), 3),
        delta_bias=bias,
    )


def _response(
    run: Callable[[Arguments], Tensor], scan: Arguments, initial_state: Tensor
) -> tuple[Tensor, Tensor]:
    """What the initial state adds to the output, (batch, K*D, L), and what is left of it."""
    batch, channels, length = scan.u.shape
    groups = scan.B.shape[1]
    dtype = initial_state.dtype
    ones = scan.u.new_ones((), dtype=dtype)
    weights = ones.expand(batch, 1, 1, length)
    # The sums of the steps so far are a scan too: of ones, with a state that does not decay.
    elapsed = run(
        Arguments(
            ones.expand(batch, channels, length),
            scan.delta,
            ones.new_zeros(channels, 1),
            weights,
            weights,
            None,
            scan.delta_bias,
            scan.delta_softplus,
            dtype,
        )
    )
    A, C = scan.A.to(dtype), scan.C.to(dtype)
    response = torch.zeros_like(elapsed)
    for n in range(A.shape[1]):
        state = initial_state[:, :, n, None] * torch.exp(A[:, n, None] * elapsed)
        response = response + (C[:, :, None, n] * state.unflatten(1, (groups, -1))).flatten(1, 2)
    return response, initial_state * torch.exp(A * elapsed[:, :, -1:])
