"""The linear recurrence ``v_l = a_l v_{l-1} + b_l`` as a few hundred vectorised steps.

Sequences are laid out as chunks: every chunk is walked at the same time, so a sequence of L
positions takes about 2 * sqrt(2 L) tensor operations instead of L. ``README.md`` beside the package
derives the passes. Nothing here is differentiable; the operators that use it have hand-written
backward passes.

All tensors are (S, L, C): S independent sequences, L positions, C channels that never interact.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mmvmamba_kernels.arguments import ceil_div

_GROUP_ELEMENTS = 1 << 20
"""States are scanned in groups whose temporaries have at most this many elements, or one by one."""

# exp(a) = exp2(a * log2(e)); PyTorch's exp2 takes a quarter of exp's time on a CPU, at the same
# accuracy.
_LOG2_E = math.log2(math.e)


def chunk_length(length: int) -> int:
    """Chunk length for sequences of ``length`` positions: a power of two near ``sqrt(length / 2)``.

    Only comparisons with constants decide, so that under dynamic shapes a compiler gets range
    guards and no square root of a symbol.
    """
    chunk = 4
    while 4 * chunk * chunk < length:
        chunk *= 2
    return chunk


def scan_carries(decay: Tensor, value: Tensor, chunk: int, reverse: bool) -> Tensor:
    """The state that enters each chunk.

    Chunks are counted from the end at which the recurrence starts, so that only the last chunk it
    reaches may be short; the result lists them in order of their position.

    Args:
        decay: a, (S, L, C).
        value: b, (S, L, C).
        chunk: Positions per chunk.
        reverse: Run from position L - 1 down to 0.

    Returns:
        (S, ceil(L / chunk), C); zero for the chunk at which the recurrence starts.
    """
    sequences, length, channels = value.shape
    chunks = ceil_div(length, chunk)
    carries = value.new_empty(sequences, chunks, channels)
    carries[:, -1 if reverse else 0] = 0
    full = chunks - 1
    if full == 0:
        return carries

    start = length - full * chunk if reverse else 0
    decay = decay[:, start : start + full * chunk].unflatten(1, (full, chunk))
    value = value[:, start : start + full * chunk].unflatten(1, (full, chunk))
    decay_steps, value_steps = decay.unbind(2), value.unbind(2)
    order = range(chunk - 1, -1, -1) if reverse else range(chunk)
    state = value_steps[order[0]].clone()
    for t in order[1:]:
        torch.addcmul(value_steps[t], decay_steps[t], state, out=state)

    total = decay.prod(2).unbind(1)
    ends = state.unbind(1)
    slots = carries.unbind(1)
    if reverse:
        for c in range(full - 1, -1, -1):
            torch.addcmul(ends[c], total[c], slots[c + 1], out=slots[c])
    else:
        for c in range(full):
            torch.addcmul(ends[c], total[c], slots[c], out=slots[c + 1])
    return carries


def scan_(decay: Tensor, value: Tensor, carries: Tensor, chunk: int, reverse: bool) -> Tensor:
    """Replace b by v in place, given the states that enter the chunks.

    Args:
        decay: a, (S, L, C).
        value: b on entry, v on return, (S, L, C).
        carries: The result of :func:`scan_carries` for the same ``chunk`` and ``reverse``.
        chunk: Positions per chunk.
        reverse: Run from position L - 1 down to 0.

    Returns:
        ``value``.
    """
    length = value.shape[1]
    previous = carries
    for t in range(min(chunk, length)):
        # Position number t of every chunk that is long enough to have one.
        first = (length - 1 - t) % chunk if reverse else t
        current = value[:, first::chunk]
        count = current.shape[1]
        if count < previous.shape[1]:
            previous = previous[:, -count:] if reverse else previous[:, :count]
        current.addcmul_(decay[:, first::chunk], previous)
        previous = current
    return value


def carries_shape(sequences: int, length: int, channels: int, states: int) -> tuple[int, ...]:
    """Shape of the carries of one selective scan, as :func:`selective_scan_` writes them."""
    return states, sequences, ceil_div(length, chunk_length(length)), channels


def _state_groups(states: int, elements: int) -> list[slice]:
    """Groups of states that are scanned together, of a few megabytes each."""
    size = max(1, min(states, _GROUP_ELEMENTS // max(elements, 1)))
    return [slice(n, min(n + size, states)) for n in range(0, states, size)]


def selective_scan_(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    reverse: bool,
    out: Tensor,
    carries: Tensor | None = None,
) -> None:
    """Add C_l . h_l to ``out``, where h_l = exp(delta_l A) h_{l-1} + delta_l B_l u_l.

    Args:
        u: Input, (S, L, D).
        delta: Step sizes, (S, L, D).
        A: Rates, (D, N).
        B: Input weights, (S, L, N).
        C: Output weights, (S, L, N).
        reverse: Run from position L - 1 down to 0.
        out: The sum to add to, (S, L, D).
        carries: Where to leave the states that enter the chunks, of :func:`carries_shape`; None if
            no backward pass will follow.
    """
    sequences, length, _ = u.shape
    chunk = chunk_length(length)
    drive = delta * u
    rates = (A.t() * _LOG2_E).contiguous()
    weights_in, weights_out = B.movedim(2, 0), C.movedim(2, 0)
    for group in _state_groups(A.shape[1], u.numel()):
        decay = (delta * rates[group, None, None]).exp2_().flatten(0, 1)
        value = (drive * weights_in[group].unsqueeze(-1)).flatten(0, 1)
        entering = scan_carries(decay, value, chunk, reverse)
        scan_(decay, value, entering, chunk, reverse)
        if carries is not None:
            carries[group].flatten(0, 1).copy_(entering)
        value = value.unflatten(0, (group.stop - group.start, sequences))
        for state, weight in zip(value, weights_out[group], strict=True):
            out.addcmul_(state, weight.unsqueeze(-1))


def selective_scan_backward_(
    grad_out: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    reverse: bool,
    carries: Tensor,
    grad_u: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of :func:`selective_scan_`, states recomputed from the carries.

    Args:
        grad_out: Gradient of ``out``, (S, L, D).
        u: As in the forward pass.
        delta: As in the forward pass.
        A: As in the forward pass.
        B: As in the forward pass.
        C: As in the forward pass.
        reverse: As in the forward pass.
        carries: What the forward pass left.
        grad_u: Gradient of u to add to, (S, L, D).

    Returns:
        The gradients of delta (S, L, D), A (D, N), B (S, L, N) and C (S, L, N).
    """
    sequences, length, channels = u.shape
    states = A.shape[1]
    chunk = chunk_length(length)
    drive = delta * u
    rates = A.t().contiguous()
    weights_in, weights_out = B.movedim(2, 0), C.movedim(2, 0)
    grad_delta = torch.zeros_like(delta)
    grad_drive = torch.zeros_like(delta)
    grad_A, grad_B, grad_C = torch.empty_like(A), torch.empty_like(B), torch.empty_like(C)
    # The adjoint runs the other way with the decay of the position it comes from, so the decays get
    # one more position, and both recurrences read views of the same buffer.
    own, neighbour = (
        (slice(1, None), slice(None, -1)) if reverse else (slice(None, -1), slice(1, None))
    )
    edge = 0 if reverse else length
    # Pairs (position, the position before it) along the path, as slices.
    here, before = (
        (slice(None, -1), slice(1, None)) if reverse else (slice(1, None), slice(None, -1))
    )
    start = length - 1 if reverse else 0
    for group in _state_groups(states, u.numel()):
        count = group.stop - group.start
        decays = u.new_empty(count, sequences, length + 1, channels)
        decays[:, :, edge] = 0
        torch.mul(delta, rates[group, None, None] * _LOG2_E, out=decays[:, :, own]).exp2_()
        decays = decays.flatten(0, 1)
        decay = decays[:, own]
        state = (drive * weights_in[group].unsqueeze(-1)).flatten(0, 1)
        scan_(decay, state, carries[group].flatten(0, 1), chunk, reverse)
        adjoint = (grad_out * weights_out[group].unsqueeze(-1)).flatten(0, 1)
        incoming = decays[:, neighbour]
        scan_(
            incoming,
            adjoint,
            scan_carries(incoming, adjoint, chunk, not reverse),
            chunk,
            not reverse,
        )

        # exp(delta A) times its gradient: adjoint_l * a_l * h_{l-1}.
        decay.mul_(adjoint)
        decay[:, here].mul_(state[:, before])
        decay[:, start] = 0
        for i, n in enumerate(range(group.start, group.stop)):
            part = slice(i * sequences, (i + 1) * sequences)
            torch.sum(state[part].mul_(grad_out), -1, out=grad_C[..., n])
            grad_drive.addcmul_(adjoint[part], weights_in[n].unsqueeze(-1))
            torch.sum(adjoint[part].mul_(drive), -1, out=grad_B[..., n])
            grad_delta.addcmul_(decay[part], rates[n])
            torch.sum(decay[part].mul_(delta), (0, 1), out=grad_A[:, n])
    grad_delta.addcmul_(grad_drive, u)
    grad_u.addcmul_(grad_drive, delta)
    return grad_delta, grad_A, grad_B, grad_C
