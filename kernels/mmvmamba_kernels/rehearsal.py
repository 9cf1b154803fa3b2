"""Rehearsals: operators run on tensors without contents, so that what they launch can be recorded.

Fake tensors of a GPU need none. In a rehearsal an operator runs its implementation on them, and its
backward pass at once after the forward pass if gradients would be asked for: PyTorch's autograd
has no thread for a device that is not there.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

PROCESSORS = 132
"""Multiprocessors of the GPU that launchers are told of."""

_thread = threading.local()


def active() -> bool:
    """Whether this thread is in a rehearsal."""
    return getattr(_thread, "rehearses", False)


@contextmanager
def rehearsing() -> Iterator[None]:
    """Rehearse the operators that this thread calls meanwhile."""
    before, _thread.rehearses = active(), True
    try:
        yield
    finally:
        _thread.rehearses = before


class _Context:
    """Stands in for the context of an autograd function."""

    def __init__(self):
        self.saved_tensors: tuple[Tensor | None, ...] = ()
        self.without_gradient: tuple[Tensor, ...] = ()

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        self.saved_tensors = tensors

    def mark_non_differentiable(self, *tensors: Tensor) -> None:
        self.without_gradient = tensors

    def set_materialize_grads(self, _: bool) -> None:
        """Every output has a gradient here."""


def rehearse(
    forward: Callable[..., tuple[Tensor, ...]],
    setup_context: Callable[..., None],
    gradients: Callable[..., object],
    values: tuple,
) -> tuple[Tensor, ...]:
    """Both passes of an operator.

    Args:
        forward: The forward pass.
        setup_context: As ``torch.autograd.Function``'s.
        gradients: The backward pass, from the context and the gradients of the outputs.
        values: Arguments of ``forward``.

    Returns:
        The outputs, which need gradients where those of a real call would.
    """
    tensors = [value for value in values if isinstance(value, Tensor)]
    wanted = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    with torch.no_grad():
        outputs = forward(*values)
        if not wanted:
            return outputs
        context = _Context()
        setup_context(context, values, outputs)
        plain = [id(t) for t in context.without_gradient]
        given = [None if id(t) in plain else torch.empty_like(t) for t in outputs]
        gradients(context, *given)
    for output, grad in zip(outputs, given, strict=True):
        if grad is not None and output.numel():
            output.requires_grad_()
    return outputs
