"""The 2D selective scan and the normalisation of its sum: public function and registration.

The scan's last step sums the directions. Where Triton runs it, that sum is normalised before it
leaves the registers; everywhere else, and in compiled graphs, this is ``selective_scan_2d`` and
then ``layer_norm``, with the same result.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from mmvmamba_kernels.arguments import FLOATING, check_shape, check_tensors, state_dtype
from mmvmamba_kernels.dispatch import Problem, check_name, resolve
from mmvmamba_kernels.layer_norm.api import layer_norm
from mmvmamba_kernels.registration import (
    OperatorPair,
    autocast_off,
    may_need_gradients,
    scan_flops,
)
from mmvmamba_kernels.selective_scan_2d.api import check_arguments, scan_sizes, selective_scan_2d
from mmvmamba_kernels.selective_scan_2d.arguments import Arguments

_OP = "selective_scan_2d_norm"
_SCAN = "selective_scan_2d"


def selective_scan_2d_norm(
    x: Tensor,
    proj: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    *,
    eps: float = 1e-5,
    out_dtype: torch.dtype | None = None,
    pattern: str = "cross2d",
    paths: Tensor | None = None,
    backend: str | None = None,
    return_sum: bool = False,
) -> Tensor | tuple[Tensor, Tensor | None]:
    """:func:`mmvmamba_kernels.selective_scan_2d` and a layer normalisation of its result.

    The sum is rounded to the dtype of ``x`` before it is normalised, but for float16, whose range
    it may leave. Differentiable once in every tensor argument, each gradient in its argument's
    dtype, and deterministic. Source: the out_norm of "VMamba: Visual State Space Model", arXiv
    2401.10166.

    Args:
        x: The map, (B, H, W, D); this and the next five as ``selective_scan_2d`` takes them.
        proj: (B, H, W, K, R + 2N).
        dt_weight: (K, D, R).
        dt_bias: (K, D).
        A: (K, D, N).
        D: (K, D).
        norm_weight: Scale of the normalisation, (D,).
        norm_bias: Shift of the normalisation, (D,).
        eps: What is added to the variance.
        out_dtype: Dtype of the result; None for that of ``x``.
        pattern: As ``selective_scan_2d``'s.
        paths: As ``selective_scan_2d``'s.
        backend: Of the scan; None chooses one per call.
        return_sum: Whether to return what was normalised too, from which :func:`layer_norm` makes
            the result again.

    Returns:
        The normalised sum over the K directions, (B, H, W, D); with ``return_sum``, a pair of it
        and the sum, which has no gradient and is None where nothing needs one.

    Raises:
        TypeError: If an argument is not a floating-point tensor, paths are no integer one, or
            ``out_dtype`` is not a floating-point dtype.
        ValueError: If shapes or devices do not fit one another, the pattern is unknown, or a path
            leaves the map or visits a position twice.
        BackendError: If the backend does not exist or cannot run this call.
    """
    if paths is not None or not _runs_fused(x, A, backend):
        wide = x
        if isinstance(x, Tensor):
            out_dtype = x.dtype if out_dtype is None else out_dtype
            wide = x.to(_sum_dtype(x))
        scan = (wide, proj, dt_weight, dt_bias, A, D)
        y = selective_scan_2d(*scan, pattern=pattern, paths=paths, backend=backend)
        out = layer_norm(y, norm_weight, norm_bias, eps=eps, out_dtype=out_dtype)
        total = y.detach() if out.requires_grad else None
        return (out, total) if return_sum else out
    scan = Arguments(x, proj, dt_weight, dt_bias, A, D, pattern=pattern)
    check_arguments(_OP, scan)
    norm = {"norm_weight": norm_weight, "norm_bias": norm_bias}
    check_tensors(_OP, {"x": x, **norm})
    for name, tensor in norm.items():
        check_shape(_OP, name, tensor, "(D,)", (x.shape[3],))
    out_dtype = x.dtype if out_dtype is None else out_dtype
    if out_dtype not in FLOATING:
        raise TypeError(f"{_OP}: out_dtype must be a floating-point torch.dtype, got {out_dtype!r}")
    tensors = (*scan[:6], *norm.values())
    save = torch.is_grad_enabled() and may_need_gradients(tensors)
    out, total, _, _ = _pair(*tensors, eps, out_dtype, pattern, save)
    return (out, total if save else None) if return_sum else out


def _runs_fused(x: Tensor, A: Tensor, backend: str | None) -> bool:
    """Whether Triton runs the scan, outside of compilers and tracers."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    if not isinstance(x, Tensor) or not isinstance(A, Tensor):
        return False
    problem = Problem(x.device, x.dtype, states=A.shape[-1] if A.ndim else 1, work=0)
    module = resolve(_SCAN, check_name(_SCAN, backend), problem, quiet=True)
    return module.__name__.endswith("triton_impl")


def _sum_dtype(x: Tensor) -> torch.dtype:
    """Dtype of what is normalised: a sum over positions may leave float16's range."""
    return torch.float32 if x.dtype == torch.float16 else x.dtype


# Triton is what these two are for, so it is imported with them, and not before.
def _forward(*values) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from mmvmamba_kernels.layer_norm.triton_impl import normalise_sum
    from mmvmamba_kernels.selective_scan_2d.triton_impl import forward_parts

    *tensors, weight, bias, eps, out_dtype, pattern, save = values
    scan = Arguments(*tensors, pattern=pattern)
    with autocast_off(scan.x):
        parts, carries = forward_parts(scan, save)
        total, out, statistics = normalise_sum(
            parts, weight, bias, eps, _sum_dtype(scan.x), out_dtype, save
        )
    return out, total, statistics, carries


def _backward(
    grad_out: Tensor, total: Tensor, statistics: Tensor, carries: Tensor, *values
) -> tuple[Tensor, ...]:
    from mmvmamba_kernels.layer_norm import triton_impl as norm
    from mmvmamba_kernels.selective_scan_2d import triton_impl as scan

    *tensors, weight, bias, pattern = values
    with autocast_off(grad_out):
        grad_total, _, grad_weight, grad_bias = norm.backward(
            None, grad_out, total, statistics, None, weight, bias, None
        )
        grads = scan.backward(grad_total, carries, Arguments(*tensors, pattern=pattern))
    return *grads, grad_weight, grad_bias


_TENSORS = (
    "Tensor x, Tensor proj, Tensor dt_weight, Tensor dt_bias, Tensor A, Tensor D, "
    "Tensor norm_weight, Tensor norm_bias"
)


def _forward_fake(*values):
    from mmvmamba_kernels.selective_scan_2d.triton_impl import carries_shape

    *tensors, weight, bias, _, out_dtype, pattern, save = values
    scan = Arguments(*tensors, pattern=pattern)
    x = scan.x
    return (
        x.new_empty(x.shape, dtype=out_dtype),
        x.new_empty(x.shape if save else (0,), dtype=_sum_dtype(x)),
        x.new_empty((x.shape[:3].numel(), 2), dtype=state_dtype(x, weight, bias)),
        x.new_empty(carries_shape(scan) if save else (0,), dtype=state_dtype(*scan)),
    )


def _backward_fake(_grad_out, _total, _statistics, _carries, *tensors_and_pattern):
    return tuple(t.new_empty(t.shape) for t in tensors_and_pattern[:-1])


def _setup_context(ctx, inputs, output) -> None:
    *tensors, _, _, ctx.pattern, _ = inputs
    _, total, statistics, carries = output
    ctx.save_for_backward(total, statistics, carries, *tensors)
    ctx.mark_non_differentiable(total, statistics, carries)
    ctx.set_materialize_grads(False)


def _gradients(ctx, grad_out: Tensor | None, *_) -> tuple[Tensor | None, ...]:
    if grad_out is None:
        return (None,) * 12
    return *_pair.backward(grad_out, *ctx.saved_tensors, ctx.pattern), None, None, None, None


_pair = OperatorPair(
    _OP,
    _forward,
    _backward,
    f"({_TENSORS}, float eps, ScalarType out_dtype, str pattern, bool save) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    f"(Tensor grad_out, Tensor total, Tensor statistics, Tensor carries, {_TENSORS}, "
    f"str pattern) -> ({', '.join(['Tensor'] * 8)})",
    _forward_fake,
    _backward_fake,
    _setup_context,
    _gradients,
)


@register_flop_formula(getattr(torch.ops.mmvmamba, _OP))
def _forward_flops(*shapes, **_) -> int:
    *scan, _weight, _bias, _eps, _out_dtype, pattern, _save = shapes
    return scan_flops(*scan_sizes(Arguments(*scan, pattern=pattern)))


@register_flop_formula(getattr(torch.ops.mmvmamba, f"{_OP}_backward"))
def _backward_flops(_grad, _total, _statistics, _carries, *shapes, **_) -> int:
    *scan, _weight, _bias, pattern = shapes
    return 2 * scan_flops(*scan_sizes(Arguments(*scan, pattern=pattern)))
