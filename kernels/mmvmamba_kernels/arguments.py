"""Argument checks and the rules on dtypes and sizes that the operators share.

Every message names the argument, what it is and what was expected.
"""

from __future__ import annotations

from collections.abc import Container, Mapping

import torch
from torch import Tensor

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_tensors(
    op: str, tensors: Mapping[str, Tensor | None], optional: Container[str] = ()
) -> None:
    """Check that all are tensors of a supported dtype on one device; optional ones may be None.

    Raises:
        TypeError: If one is not a tensor, or not of a supported dtype.
        ValueError: If one is on another device than the first.
    """
    first_name, first = None, None
    for name, tensor in tensors.items():
        if tensor is None and name in optional:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}")
        if tensor.dtype not in FLOATING:
            raise TypeError(
                f"{op}: {name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}"
            )
        if first is None:
            first_name, first = name, tensor
        elif tensor.device != first.device:
            raise ValueError(
                f"{op}: {name} is on {tensor.device} but {first_name} is on {first.device}; "
                "move them to one device"
            )


def check_rank(op: str, name: str, tensor: Tensor, layout: str) -> None:
    """Check the number of dimensions against a layout such as '(B, H, W, D)'.

    Raises:
        ValueError: If it differs.
    """
    expected = layout.count(",") + 1
    if tensor.ndim != expected:
        raise ValueError(
            f"{op}: {name} must be {layout}, {expected}-dimensional, "
            f"got shape {tuple(tensor.shape)}"
        )


def check_shape(
    op: str, name: str, tensor: Tensor | None, layout: str, expected: tuple[int, ...]
) -> None:
    """Check a shape; None passes.

    Raises:
        ValueError: If the shape is not the expected one.
    """
    if tensor is None:
        return
    if tensor.ndim != len(expected) or any(
        a != b for a, b in zip(tensor.shape, expected, strict=True)
    ):
        raise ValueError(
            f"{op}: {name} must be {layout} = {tuple(expected)}, got shape {tuple(tensor.shape)}"
        )


def check_positive(op: str, **sizes: int) -> None:
    """Check that sizes are at least one.

    Raises:
        ValueError: If one is zero.
    """
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{op}: {name} must be at least 1, got {size}")


def state_dtype(*arguments: object) -> torch.dtype:
    """The dtype of states and sums: float64 if any tensor is float64, else float32."""
    double = any(isinstance(t, Tensor) and t.dtype == torch.float64 for t in arguments)
    return torch.float64 if double else torch.float32


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up. Triton's own is made for kernels too, and ten times as slow."""
    return (a + b - 1) // b
