"""The state space dual scan in plain PyTorch: the specification, for any device, float64 included.

A sequence is cut into chunks. Inside a chunk the scan is a masked matrix product, between chunks
states are carried. Decays over a range of positions are exponentials of that range's own sum, never
quotients or differences of longer sums, so every exponent is at most zero and none loses digits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mmvmamba_kernels.arguments import ceil_div, state_dtype
from mmvmamba_kernels.backends.reference.numerics import softplus
from mmvmamba_kernels.state_space_dual.arguments import Arguments


def split_length(length: int, chunk_size: int) -> tuple[int, int]:
    """Number of chunks and positions of each, evened out to pad less than one position a chunk."""
    chunks = ceil_div(length, chunk_size)
    return chunks, ceil_div(length, chunks)


def carries_shape(scan: Arguments) -> tuple[int, ...]:
    """Shape of the states that the forward pass saves for the backward pass."""
    batch, directions, length, heads, width = scan.x.shape
    chunks, _ = split_length(length, scan.chunk_size)
    return directions, batch, chunks, heads * width, scan.B.shape[3]


def _chunked(tensor: Tensor, chunks: int, size: int, dtype: torch.dtype) -> Tensor:
    """(B, L, ...) -> (B, chunks, size, ...), zeros behind the end."""
    padding = chunks * size - tensor.shape[1]
    tensor = tensor.to(dtype)
    if padding:
        tensor = F.pad(tensor, (0, 0) * (tensor.ndim - 2) + (0, padding))
    return tensor.unflatten(1, (chunks, size))


def _joined(tensor: Tensor, length: int) -> Tensor:
    """The inverse of :func:`_chunked`."""
    return tensor.flatten(1, 2)[:, :length]


class _Direction(NamedTuple):
    """One direction, cut into c chunks of T positions."""

    x: Tensor
    """(B, c, T, heads, P)."""
    raw: Tensor
    """Step sizes before softplus, (B, L, heads)."""
    steps: Tensor
    """(B, c, T, heads); zero behind the end, where nothing decays and nothing enters."""
    drive: Tensor
    """Steps times x, (B, c, heads, T, P)."""
    B: Tensor
    """(B, c, T, N)."""
    C: Tensor
    """(B, c, T, N)."""
    between: Tensor
    """Decay from position s to t >= s of a chunk, zero for t < s, (B, c, heads, s, t)."""
    since_start: Tensor
    """Decay from the state that enters the chunk to position t, (B, c, heads, T)."""


def _direction(scan: Arguments, k: int, dtype: torch.dtype) -> _Direction:
    chunks, size = split_length(scan.x.shape[2], scan.chunk_size)
    raw = scan.dt[:, k].to(dtype)
    if scan.dt_bias is not None:
        raw = raw + scan.dt_bias[k].to(dtype)
    steps = _chunked(softplus(raw), chunks, size, dtype)
    x, B, C = (_chunked(t[:, k], chunks, size, dtype) for t in (scan.x, scan.B, scan.C))
    drive = (x * steps.unsqueeze(-1)).transpose(2, 3)
    exponents = (steps * scan.A[k].to(dtype)).transpose(2, 3)
    between = exponents.unsqueeze(-2).expand(*exponents.shape[:-1], size, size).triu(1)
    between = between.cumsum(-1).exp_().triu_()
    return _Direction(x, raw, steps, drive, B, C, between, exponents.cumsum(-1).exp_())


def _rows(tensor: Tensor) -> Tensor:
    """(B, c, heads, T, P) -> (B, c, T, heads * P)."""
    return tensor.transpose(2, 3).flatten(3)


def _heads(tensor: Tensor, heads: int) -> Tensor:
    """The inverse of :func:`_rows`."""
    return tensor.unflatten(3, (heads, -1)).transpose(2, 3)


def _carry_decays(part: _Direction, width: int) -> Tensor:
    """Decay over each whole chunk, for every row of the state, (B, c, heads * P, 1)."""
    return part.since_start[..., -1].repeat_interleave(width, dim=-1).unsqueeze(-1)


def forward(scan: Arguments, save_carries: bool) -> tuple[Tensor, Tensor]:
    """See :func:`mmvmamba_kernels.state_space_dual`.

    Returns:
        The output in ``x``'s dtype, and the states that enter the chunks of every direction in the
        state's dtype (no elements unless ``save_carries``).
    """
    x, D, dtype = scan.x, scan.D, state_dtype(*scan)
    _, directions, length, heads, width = x.shape
    carries = x.new_empty(carries_shape(scan) if save_carries else (0,), dtype=dtype)

    out = x.new_empty(x.shape)
    for k in range(directions):
        part = _direction(scan, k, dtype)
        until_end = part.between[..., -1].unsqueeze(-1)
        # Holds each chunk's own end state first, then the state that enters it.
        entering = _rows(part.drive * until_end).transpose(2, 3) @ part.B
        _carry_(entering, _carry_decays(part, width), reverse=False)
        inside = (part.C @ part.B.transpose(2, 3)).transpose(2, 3).unsqueeze(2) * part.between
        total = inside.transpose(3, 4) @ part.drive
        total += _heads(part.C @ entering.transpose(2, 3), heads) * part.since_start.unsqueeze(-1)
        total = total.transpose(2, 3)
        if D is not None:
            total = total + part.x * D[k].to(dtype)
        out[:, k] = _joined(total, length)
        if save_carries:
            carries[k] = entering
    return out, carries


def _carry_(states: Tensor, decays: Tensor, reverse: bool) -> None:
    """Replace each chunk's own end state by the state that enters it, of all chunks before.

    Args:
        states: (B, c, rows, N), changed in place.
        decays: Over each whole chunk, (B, c, rows, 1).
        reverse: "Before" means behind: from the last chunk to the first.
    """
    slots, decays = states.unbind(1), decays.unbind(1)
    order = range(len(slots) - 1, -1, -1) if reverse else range(len(slots))
    carried = torch.zeros_like(slots[0])
    for c in order:
        following = torch.addcmul(slots[c], decays[c], carried)
        slots[c].copy_(carried)
        carried = following


def backward(
    grad_out: Tensor, carries: Tensor, scan: Arguments
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """The gradients of :func:`forward`.

    Args:
        grad_out: Gradient of the output, like ``x``.
        carries: What :func:`forward` saved.
        scan: As in the forward pass.

    Returns:
        The gradients of x, dt, A, B, C, D and dt_bias, each in its own dtype; None for absent
        arguments.
    """
    x, dt, A, B, C, D, dt_bias, chunk_size = scan
    dtype = state_dtype(*scan)
    _, directions, length, heads, width = x.shape
    chunks, size = split_length(length, chunk_size)
    grad_x, grad_dt, grad_A, grad_B, grad_C = (
        torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, dt, A, B, C)
    )
    grad_D, grad_bias = (
        None if t is None else torch.empty_like(t, memory_format=torch.contiguous_format)
        for t in (D, dt_bias)
    )
    for k in range(directions):
        part = _direction(scan, k, dtype)
        until_end = part.between[..., -1].unsqueeze(-1)
        since_start = part.since_start.unsqueeze(-1)
        entering = carries[k]
        grad = _chunked(grad_out[:, k], chunks, size, dtype)
        if D is not None:
            grad_D[k] = (grad * part.x).sum((0, 1, 2))
        grad_rows = grad.transpose(2, 3)

        # The states between chunks: what each state's gradient is, from the chunks behind it.
        decays = _carry_decays(part, width)
        decayed_grad = _rows(grad_rows * since_start)
        behind = decayed_grad.transpose(2, 3) @ part.C
        _carry_(behind, decays, reverse=True)
        grad_C_part = decayed_grad @ entering
        from_behind = _heads(part.B @ behind.transpose(2, 3), heads)
        grad_B_part = _rows(part.drive * until_end) @ behind
        grad_drive = from_behind * until_end

        # The masked product inside a chunk; everything is indexed (s, t).
        products = (part.B @ part.C.transpose(2, 3)).unsqueeze(2)
        grad_inside = part.drive @ grad_rows.transpose(3, 4)
        grad_drive += (products * part.between) @ grad_rows
        grad_products = grad_inside.mul_(part.between).sum(2)
        grad_C_part += grad_products.transpose(2, 3) @ part.B
        grad_B_part += grad_products @ part.C

        # Exponents: those between s and t reach the positions s + 1 to t, those since the start 1
        # to t, those until the end t + 1 to the last, those over a whole chunk all.
        grad_between = grad_inside.mul_(products)
        grad_between[..., -1] += (from_behind * part.drive * until_end).sum(-1)
        grad_exponents = _sum_from(grad_between).triu_(1).sum(-2)
        grad_since_start = (
            _heads(part.C @ entering.transpose(2, 3), heads) * grad_rows * since_start
        ).sum(-1)
        over_chunk = (behind * entering * decays).sum(-1).unflatten(2, (heads, width)).sum(-1)
        grad_since_start[..., -1] += over_chunk
        grad_exponents += _sum_from(grad_since_start)

        grad_exponents = grad_exponents.transpose(2, 3)
        grad_drive = grad_drive.transpose(2, 3)
        grad_A[k] = (grad_exponents * part.steps).sum((0, 1, 2))
        grad_steps = (grad_drive * part.x).sum(-1) + grad_exponents * A[k].to(dtype)
        grad_raw = _joined(grad_steps, length) * part.raw.sigmoid()
        if dt_bias is not None:
            grad_bias[k] = grad_raw.sum((0, 1))
        grad_dt[:, k] = grad_raw
        grad_x_part = grad_drive * part.steps.unsqueeze(-1)
        if D is not None:
            grad_x_part += grad * D[k].to(dtype)
        grad_x[:, k] = _joined(grad_x_part, length)
        grad_B[:, k] = _joined(grad_B_part, length)
        grad_C[:, k] = _joined(grad_C_part, length)
    return grad_x, grad_dt, grad_A, grad_B, grad_C, grad_D, grad_bias


def _sum_from(tensor: Tensor) -> Tensor:
    """Sum over this and all later positions of the last dimension."""
    return tensor.flip(-1).cumsum(-1).flip(-1)
