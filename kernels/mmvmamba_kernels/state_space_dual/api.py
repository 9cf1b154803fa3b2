"""The state space dual scan of Mamba-2: public function, checks and registration with PyTorch."""

from __future__ import annotations

from torch import Tensor

from mmvmamba_kernels.arguments import check_positive, check_rank, check_shape, check_tensors
from mmvmamba_kernels.dispatch import Backend, check_name, register_backend
from mmvmamba_kernels.registration import Operator
from mmvmamba_kernels.state_space_dual.arguments import Arguments

_OP = "state_space_dual"

register_backend(_OP, Backend("reference", f"{__package__}.reference", slow=True))


def state_space_dual(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    dt_bias: Tensor | None = None,
    chunk_size: int = 32,
    backend: str | None = None,
) -> Tensor:
    """Run Mamba-2's scan, in which a head's channels share one decay, over K sequences.

    With ``step_l = softplus(dt_l + dt_bias)``, head h of direction k has a state of P rows and N
    columns that follows ``h_l = exp(step_l A[k, h]) h_{l-1} + step_l x_l (outer) B_l[k]`` and gives
    ``y_l = h_l C_l[k] + D[k, h] x_l``.
    Source: "Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured
    State Space Duality", arXiv 2405.21060.

    States and sums are float32 (float64 if any argument is float64), whatever the arguments' dtypes
    and whether or not autocast is on. Differentiable once in every tensor argument, each gradient
    in its argument's dtype, and deterministic.

    Args:
        x: Input, (B, K, L, heads, P).
        dt: Step sizes before bias and softplus, (B, K, L, heads).
        A: Negative rates, (K, heads).
        B: Input weights, (B, K, L, N).
        C: Output weights, (B, K, L, N).
        D: Skip weights, (K, heads, P).
        dt_bias: Added to ``dt``, (K, heads).
        chunk_size: Most positions that are handled as one matrix product. It trades speed and
            memory and does not change the result beyond rounding; a shorter or non-divisible L is
            evened out.
        backend: Name of the implementation; None chooses one per call (see
            :mod:`mmvmamba_kernels.dispatch`).

    Returns:
        (B, K, L, heads, P), in the dtype of ``x``. Directions are not summed.

    Raises:
        TypeError: If an argument is not a floating-point tensor, or ``chunk_size`` not an integer.
        ValueError: If shapes or devices do not fit one another, or ``chunk_size`` is less than 1.
        BackendError: If the backend does not exist or cannot run this call.
    """
    tensors = {"x": x, "dt": dt, "A": A, "B": B, "C": C, "D": D, "dt_bias": dt_bias}
    check_tensors(_OP, tensors, optional=("D", "dt_bias"))
    if not isinstance(chunk_size, int):
        raise TypeError(f"{_OP}: chunk_size must be an integer, got {chunk_size!r}")
    check_rank(_OP, "x", x, "(B, K, L, heads, P)")
    check_rank(_OP, "B", B, "(B, K, L, N)")
    batch, directions, length, heads, width = x.shape
    states = B.shape[3]
    check_positive(
        _OP, K=directions, L=length, heads=heads, P=width, N=states, chunk_size=chunk_size
    )
    check_shape(_OP, "dt", dt, "(B, K, L, heads)", (batch, directions, length, heads))
    check_shape(_OP, "A", A, "(K, heads)", (directions, heads))
    check_shape(_OP, "B", B, "(B, K, L, N)", (batch, directions, length, states))
    check_shape(_OP, "C", C, "(B, K, L, N)", (batch, directions, length, states))
    check_shape(_OP, "D", D, "(K, heads, P)", (directions, heads, width))
    check_shape(_OP, "dt_bias", dt_bias, "(K, heads)", (directions, heads))
    return _operator(Arguments(*tensors.values(), chunk_size), check_name(_OP, backend))


def _sizes(shapes: Arguments) -> tuple[int, int]:
    batch, directions, length, heads, width = shapes.x
    return batch * directions * length * heads * width, shapes.B[3]


_operator = Operator(_OP, Arguments, _sizes)
