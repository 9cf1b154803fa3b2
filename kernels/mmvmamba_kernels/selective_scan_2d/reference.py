"""The 2D selective scan in plain PyTorch: the specification, for any device, float64 included.

Maps stay channels-last. Row-major paths read the map as it is; column-major ones read one
transposed copy that all of them share, and those that are lists of positions a copy each. Reversed
paths walk backwards over the same memory. Directions are computed one after another, so the
temporaries are those of one direction.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from mmvmamba_kernels.arguments import state_dtype
from mmvmamba_kernels.backends.reference.chunked_scan import carries_shape as scan_carries_shape
from mmvmamba_kernels.backends.reference.chunked_scan import (
    selective_scan_,
    selective_scan_backward_,
)
from mmvmamba_kernels.backends.reference.numerics import softplus
from mmvmamba_kernels.path_lists import PathLists
from mmvmamba_kernels.patterns import Path
from mmvmamba_kernels.selective_scan_2d.arguments import Arguments


def carries_shape(scan: Arguments) -> tuple[int, ...]:
    """Shape of the states that the forward pass saves for the backward pass."""
    batch, height, width, channels = scan.x.shape
    lines, length = 1, scan.steps
    if length is None:
        lines, length = scan.directions[0].sequences(height, width)
    shape = scan_carries_shape(batch * lines, length, channels, scan.A.shape[2])
    return len(scan.directions), *shape


class _Order(NamedTuple):
    """An order of positions that one or more directions walk along, forwards or backwards."""

    path: Path
    positions: Tensor | None = None
    """The list of positions, one longer where paths differ in length; None if they are computed."""
    count: int = 0
    """Positions of the list that count; behind them its last one is repeated."""

    def in_place(self) -> bool:
        """Whether it is that of the map in memory."""
        return self.positions is None and not self.path.column_major

    def sequences(self, maps: Tensor) -> Tensor:
        """(B, H, W, C) -> (S, L, C) in this order, not reversed; a copy unless it is in place."""
        batch, height, width, channels = maps.shape
        if self.positions is not None:
            return maps.flatten(1, 2).index_select(1, self.positions)
        lines, length = self.path.sequences(height, width)
        if self.path.column_major:
            maps = maps.transpose(1, 2)
        return maps.reshape(batch * lines, length, channels)

    def stop(self, sequence: Tensor) -> Tensor:
        """Puts zeros behind the positions that count."""
        if self.positions is not None:
            sequence[:, self.count :] = 0
        return sequence

    def write(self, maps: Tensor, sequence: Tensor, add: bool = False) -> None:
        """Puts what :meth:`sequences` gave back into the map, or adds it."""
        batch, height, width, channels = maps.shape
        if self.positions is None:
            sizes = (width, height) if self.path.column_major else (height, width)
            part = sequence.view(batch, *sizes, channels)
            if self.path.column_major:
                part = part.transpose(1, 2)
        else:
            part = sequence.new_zeros(batch, height * width, channels)
            part[:, self.positions[: self.count]] = sequence[:, : self.count]
            part = part.view(maps.shape)
        if add:
            maps += part
        else:
            maps.copy_(part)


def _orders(
    scan: Arguments, lists: PathLists | None
) -> Iterator[tuple[_Order, list[tuple[int, bool]]]]:
    """The orders that a scan needs, each with its directions and whether they walk backwards."""
    if lists is not None:
        for k, count in enumerate(lists.lengths):
            yield _Order(scan.directions[k], lists.table[k, 1:], count), [(k, False)]
        return
    for column_major in (False, True):
        found = [(k, p) for k, p in enumerate(scan.directions) if p.column_major == column_major]
        if found:
            yield _Order(found[0][1]), [(k, path.reverse) for k, path in found]


class _Direction(NamedTuple):
    """What one direction scans with."""

    low_rank: Tensor
    raw: Tensor
    """Step sizes before softplus."""
    delta: Tensor
    B: Tensor
    C: Tensor


def _direction(
    proj: Tensor, k: int, order: _Order, dt_weight: Tensor, dt_bias: Tensor, states: int
) -> _Direction:
    sequence = order.sequences(proj[:, :, :, k]).to(dt_weight.dtype)
    rank = dt_weight.shape[2]
    low_rank, B, C = sequence.split((rank, states, states), dim=2)
    raw = torch.addmm(dt_bias[k], low_rank.flatten(0, 1), dt_weight[k].t())
    raw = raw.view(*sequence.shape[:2], dt_weight.shape[1])
    # A step of no size leaves the state as it is.
    return _Direction(low_rank, raw, order.stop(softplus(raw)), B, C)


def forward(scan: Arguments, save_carries: bool) -> tuple[Tensor, Tensor]:
    """See :func:`mmvmamba_kernels.selective_scan_2d`.

    Returns:
        The output in ``x``'s dtype, and the states that enter the chunks of every direction in the
        state's dtype (no elements unless ``save_carries``).
    """
    x, proj, dt_weight, dt_bias, A, D = scan[:6]
    dtype = state_dtype(*scan)
    lists = scan.lists()
    states = A.shape[2]
    u = x.to(dtype).contiguous()
    dt_weight, dt_bias, A, D = (t.to(dtype) for t in (dt_weight, dt_bias, A, D))
    carries = x.new_empty(carries_shape(scan) if save_carries else (0,), dtype=dtype)

    out = u * _skips(D, lists, x.shape)
    for order, directions in _orders(scan, lists):
        sequence = order.sequences(u)
        # Sequences in place are the map itself; the others sum into a buffer of their own.
        total = out.view_as(sequence) if order.in_place() else torch.zeros_like(sequence)
        for k, reverse in directions:
            part = _direction(proj, k, order, dt_weight, dt_bias, states)
            selective_scan_(
                sequence,
                part.delta,
                A[k],
                part.B,
                part.C,
                reverse,
                total,
                carries[k] if save_carries else None,
            )
        if not order.in_place():
            order.write(out, total, add=True)
    return out.to(x.dtype), carries


def _skips(D: Tensor, lists: PathLists | None, shape: torch.Size) -> Tensor:
    """What the skip connections multiply a map by, (D,), or (H, W, D) where directions differ."""
    if lists is None or lists.visited is None:
        return D.sum(0)
    return lists.skips(D).view(shape[1:])


def backward(
    grad_out: Tensor, carries: Tensor, scan: Arguments
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of :func:`forward`.

    Args:
        grad_out: Gradient of the output, like ``x``.
        carries: What :func:`forward` saved.
        scan: As in the forward pass.

    Returns:
        The gradients of x, proj, dt_weight, dt_bias, A and D, each in its own dtype.
    """
    x, proj, dt_weight, dt_bias, A, D = scan[:6]
    dtype = state_dtype(*scan)
    lists = scan.lists()
    rank, states = dt_weight.shape[2], A.shape[2]
    u, grad_out = (t.to(dtype).contiguous() for t in (x, grad_out))
    weight, bias, rates, skip = (t.to(dtype) for t in (dt_weight, dt_bias, A, D))

    grad_x = grad_out * _skips(skip, lists, x.shape)
    grad_proj = torch.empty_like(proj, memory_format=torch.contiguous_format)
    grad_weight, grad_bias, grad_rates = (torch.empty_like(t) for t in (weight, bias, rates))
    for order, directions in _orders(scan, lists):
        sequence = order.sequences(u)
        grad_sequence = order.stop(order.sequences(grad_out))
        total = grad_x.view_as(sequence) if order.in_place() else torch.zeros_like(sequence)
        for k, reverse in directions:
            part = _direction(proj, k, order, weight, bias, states)
            grad_delta, grad_rates[k], grad_B, grad_C = selective_scan_backward_(
                grad_sequence,
                sequence,
                part.delta,
                rates[k],
                part.B,
                part.C,
                reverse,
                carries[k],
                total,
            )
            grad_raw = grad_delta.mul_(part.raw.sigmoid_()).flatten(0, 1)
            torch.sum(grad_raw, 0, out=grad_bias[k])
            torch.mm(grad_raw.t(), part.low_rank.flatten(0, 1), out=grad_weight[k])
            target = grad_proj[:, :, :, k]
            grad_low_rank = (grad_raw @ weight[k]).view(part.low_rank.shape)
            order.write(target[..., :rank], grad_low_rank)
            order.write(target[..., rank : rank + states], grad_B)
            order.write(target[..., rank + states :], grad_C)
        if not order.in_place():
            order.write(grad_x, total, add=True)
    if lists is None:
        grad_D = (u * grad_out).sum((0, 1, 2)).expand_as(D)
    else:
        grad_D = lists.grad_skips(u.flatten(1, 2), grad_out.flatten(1, 2))
    return (
        grad_x.to(x.dtype),
        grad_proj,
        grad_weight.to(dt_weight.dtype),
        grad_bias.to(dt_bias.dtype),
        grad_rates.to(A.dtype),
        grad_D.to(D.dtype, copy=True, memory_format=torch.contiguous_format),
    )
