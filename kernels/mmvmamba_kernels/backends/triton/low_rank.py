"""The gradient of raw step sizes, taken back to the low rank and its weights, in Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmvmamba_kernels.arguments import ceil_div
from mmvmamba_kernels.backends.triton.support import interpreting, on_device

_ROWS = 128
"""Positions of a program: more take too many registers, fewer leave more partial sums."""

_RANKS = 16
"""Columns of a program, the fewest that a matrix product has on tensor cores."""

_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float32: tl.float32, torch.float64: tl.float64}


@triton.jit(do_not_specialize=("positions", "directions", "rank", "width"))
def low_rank_gradients_kernel(
    raw_ptr,
    proj_ptr,
    weight_ptr,
    grad_proj_ptr,
    part_ptr,
    positions,
    directions,
    rank,
    width,
    channels,
    ROWS: tl.constexpr,
    RANKS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TYPE: tl.constexpr,
    ACC: tl.constexpr,
):
    """The gradients of RANKS columns of the low rank and its weights, at ROWS positions.

    A block of channels of the raw gradient is a factor of both products while it is on the
    multiprocessor: of that with the weights, a sum over channels that goes on from block to block,
    and of that with the low rank, a sum over this program's positions. The column behind the last
    is one everywhere: it gives the gradient of the bias.
    """
    blocks = (rank + RANKS) // RANKS
    pid = tl.program_id(0)
    r = pid % blocks * RANKS + tl.arange(0, RANKS)
    k = pid // blocks % directions
    tile = (pid // blocks // directions).to(tl.int64)
    first = tile * ROWS
    rows = tl.arange(0, ROWS)
    exists = (rows < positions - first)[:, None]
    of_rank = (r < rank)[None, :]
    columns = (rows * (directions * width))[:, None] + r[None, :]
    proj_ptr += (first * directions + k) * width
    grad_proj_ptr += (first * directions + k) * width
    raw_ptr += (k.to(tl.int64) * positions + first) * channels
    weight_ptr += k * channels * rank
    part_ptr += (tile * directions + k) * channels * (rank + 1)
    low = tl.load(proj_ptr + columns, mask=exists & of_rank, other=0.0).to(ACC)
    low = tl.where((r == rank)[None, :], 1.0, low).to(TYPE)
    grad_low = tl.zeros((ROWS, RANKS), ACC)
    for start in range(0, channels, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        inside = d < channels
        place = (rows * channels)[:, None] + d[None, :]
        raw = tl.load(raw_ptr + place, mask=exists & inside[None, :], other=0.0).to(TYPE)
        place = (d * rank)[:, None] + r[None, :]
        weight = tl.load(weight_ptr + place, mask=inside[:, None] & of_rank, other=0.0).to(TYPE)
        grad_low = tl.dot(raw, weight, grad_low, input_precision="ieee", out_dtype=ACC)
        part = tl.dot(tl.trans(raw), low, input_precision="ieee", out_dtype=ACC)
        place = (d * (rank + 1))[:, None] + r[None, :]
        tl.store(part_ptr + place, part, mask=inside[:, None] & (r <= rank)[None, :])
    grad_low = grad_low.to(grad_proj_ptr.dtype.element_ty)
    tl.store(grad_proj_ptr + columns, grad_low, mask=exists & of_rank)


def low_rank_gradients(
    raw: Tensor,
    grad_factors: Tensor,
    proj: Tensor,
    dt_weight: Tensor,
    grad_proj: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Takes the gradient of raw step sizes back to where they came from, and reads it once.

    Ranks above 15 read it again, from the second-level cache: it is smaller by as much.

    Args:
        raw: Gradient of the raw step sizes, (K, positions, D). Its dtype is that of the products'
            factors.
        grad_factors: Shares of the gradient of B and C side by side, to be added, (shares,
            positions, K, 2N).
        proj: (B, H, W, K, R + 2N).
        dt_weight: (K, D, R).
        grad_proj: Where the gradient of ``proj`` goes, contiguous.
        dtype: Of sums.

    Returns:
        The gradients of ``dt_weight`` and of the bias, (K, D, 1), as views, in ``dtype``.
    """
    directions, channels, rank = dt_weight.shape
    positions = raw.shape[1]
    grad_proj.flatten(0, 2)[..., rank:] = grad_factors.sum(0)
    tiles = ceil_div(positions, _ROWS)
    parts = raw.new_empty((tiles, directions, channels, rank + 1), dtype=dtype)
    factors = torch.float64 if dtype == torch.float64 else raw.dtype
    if factors == torch.bfloat16 and interpreting():
        # It would take their bits for integers.
        factors = torch.float32
    if raw.numel():
        with on_device(raw):
            low_rank_gradients_kernel[(tiles * directions * ceil_div(rank + 1, _RANKS),)](
                raw,
                proj.contiguous(),
                dt_weight.contiguous(),
                grad_proj,
                parts,
                positions,
                directions,
                rank,
                proj.shape[-1],
                channels,
                ROWS=_ROWS,
                RANKS=_RANKS,
                BLOCK_D=32,
                TYPE=_DTYPES[factors],
                ACC=_DTYPES[dtype],
                num_warps=4,
            )
    return parts.sum(0).split([rank, 1], dim=2)
