"""What the operators' registrations with ``torch.library`` have in common."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor
from torch.library import CustomOpDef

NAMESPACE = "mmvmamba"


def autocast_off(tensor: Tensor) -> AbstractContextManager:
    """A context in which autocast casts nothing: an operator decides its own dtypes.

    Autocast stays active inside a custom operator and would otherwise reach the products it is made of.
    """
    return torch.autocast(tensor.device.type, enabled=False)


def needs_backward(*tensors: Tensor | None) -> bool:
    """Whether autograd will record a call on these tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def forbid_double_backward(backward_op: CustomOpDef, name: str) -> None:
    """Make differentiating an operator's backward pass an error that says so."""

    def backward(ctx, *grads):
        raise RuntimeError(
            f"{name} is differentiable once: its backward pass has no gradient. Call backward() or autograd.grad() "
            f"without create_graph=True, or differentiate a composition of plain PyTorch operations instead."
        )

    backward_op.register_autograd(backward)


def check_carries(name: str, carries: Tensor, expected: tuple[int, ...]) -> None:
    """Check that the backward pass runs on the backend that ran the forward pass.

    Raises:
        RuntimeError: If the saved states are not of the shape that this backend saves.
    """
    if tuple(carries.shape) != tuple(expected):
        raise RuntimeError(
            f"{name}: the backward pass got saved states of shape {tuple(carries.shape)}, expected "
            f"{tuple(expected)}. Forward and backward must run on one backend: do not change the default backend "
            f"between them."
        )
