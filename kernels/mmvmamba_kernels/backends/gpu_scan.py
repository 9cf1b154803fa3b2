"""What GPU implementations of the 2D scan share beside their kernels: buffers and low ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def exact_products() -> Iterator[None]:
    """Products of float32 factors are float32's, whatever the user allows his own to be.

    Step sizes are exponents, and no part of a model in which TF32 was asked for. PyTorch's setting
    is one for all threads of a process.
    """
    matmul = torch.backends.cuda.matmul
    # From PyTorch 2.9 on. The older functions refuse to read what was set through this one.
    newer = hasattr(matmul, "fp32_precision")
    before = matmul.fp32_precision if newer else torch.get_float32_matmul_precision()
    exact = "ieee" if newer else "highest"
    if before in (exact, "none"):
        yield
        return

    def choose(precision: str) -> None:
        if newer:
            matmul.fp32_precision = precision
        else:
            torch.set_float32_matmul_precision(precision)

    choose(exact)
    try:
        yield
    finally:
        choose(before)


def partial_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of the maps that directions write before they are summed, by that of the input.

    A partial sum may leave float16's range where the whole does not.
    """
    if dtype == torch.bfloat16:
        return dtype
    return torch.float64 if dtype == torch.float64 else torch.float32


def low_rank(proj: Tensor, rank: int) -> Tensor:
    """The part of ``proj`` that step sizes come from, (K, positions, R), as a view."""
    return proj.flatten(0, 2)[..., :rank].transpose(0, 1)


def raw_step_sizes(proj: Tensor, dt_weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Step sizes before bias and softplus, (K, positions, D), in ``dtype``."""
    with exact_products():
        return torch.bmm(low_rank(proj, dt_weight.shape[2]).to(dtype), dt_weight.mT.to(dtype))
