"""Stand-in for ``selective_scan_cuda_core``, the first extension of VMamba."""

from __future__ import annotations

import torch
from torch import Tensor

from mmvmamba_kernels.stand_in.scan import carried, gradients, scan

__all__ = ["bwd", "fwd"]


def fwd(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    nrows: int = 1,
) -> list[Tensor]:
    """The scan without gradients; ``nrows`` tunes the real one.

    Returns:
        The output and the states to save.
    """
    del nrows
    return scan_and_states(u, delta, A, B, C, D, delta_bias, delta_softplus, u.dtype)


def bwd(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    grad_out: Tensor,
    x: Tensor | None,
    *options: Tensor | int | None,
) -> list[Tensor | None]:
    """The gradients of u, delta, A, B, C, D and delta_bias, from the arguments alone.

    Args:
        u: As in the forward pass, and so on.
        delta: See above.
        A: See above.
        B: See above.
        C: See above.
        D: See above.
        delta_bias: See above.
        grad_out: Gradient of the output.
        x: The saved states.
        options: ``delta_softplus, nrows``; the output and ``delta_softplus`` in the first version.

    Raises:
        TypeError: If ``delta_softplus`` is not among the options.
    """
    del x
    softplus = [option for option in options if isinstance(option, bool)]
    if len(softplus) != 1:
        raise TypeError(
            "bwd takes u, delta, A, B, C, D, delta_bias, grad_out, x, delta_softplus (a bool) and "
            f"nrows; after x it got {', '.join(type(option).__name__ for option in options)}"
        )
    tensors = {"u": u, "delta": delta, "A": A, "B": B, "C": C, "D": D, "delta_bias": delta_bias}

    def function(**tensors: Tensor | None) -> Tensor:
        return scan(**tensors, delta_softplus=softplus[0], out_dtype=grad_out.dtype)

    return gradients(function, tensors, grad_out)


def scan_and_states(*arguments: Tensor | bool | torch.dtype | None) -> list[Tensor]:
    """Output, in the dtype that is the last argument, and the states to save, without gradients."""
    *arguments, dtype = arguments
    with torch.no_grad():
        out, last = scan(*arguments, return_last_state=True, out_dtype=dtype)
        return [out, carried(last)]
