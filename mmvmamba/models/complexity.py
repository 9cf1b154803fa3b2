"""FLOPs of the scans, for counters that know PyTorch's own operators and no others.

In the paper's convention: 9 N per element and direction, one for the skip, and for the 2D scan the
product of the low-rank time steps with their weight, which the operator computes too.
"""

from collections.abc import Callable

import torch
from mmengine.analysis import complexity_analysis
from mmengine.analysis.jit_handles import generic_activation_jit
from torch.utils.flop_counter import flop_registry

import mmvmamba_kernels  # noqa: F401 (registers the scans' formulas)
from mmvmamba_kernels.selective_scan_2d.api import scan_sizes
from mmvmamba_kernels.selective_scan_2d.arguments import Arguments


def count_selective_scan_2d(*values, **_) -> int:
    """FLOPs of a 2D scan, from the operator's arguments with shapes in place of tensors."""
    scan = flop_registry[torch.ops.mmvmamba.selective_scan_2d](*values)
    shapes = Arguments(*values[: len(Arguments._fields)])
    elements, _states = scan_sizes(shapes)
    return scan + elements * shapes.dt_weight[2]


def _handle(formula: Callable[..., int]) -> Callable[[list, list], int]:
    """A formula of shapes as mmengine's counter calls it, with values of a traced graph."""

    def count(inputs: list, _outputs: list) -> int:
        values = (v.type().sizes() if v.isCompleteTensor() else v.toIValue() for v in inputs)
        return formula(*values)

    return count


JIT_HANDLES = {
    "mmvmamba::selective_scan": _handle(flop_registry[torch.ops.mmvmamba.selective_scan]),
    "mmvmamba::selective_scan_2d": _handle(count_selective_scan_2d),
    "mmvmamba::state_space_dual": _handle(flop_registry[torch.ops.mmvmamba.state_space_dual]),
}
"""For `set_op_handle` of fvcore's counters; mmengine's `FlopAnalyzer` has them already."""


def register_with_mmengine() -> None:
    """Makes mmengine's `get_model_complexity_info` count the scans, FLOPs and activations.

    It takes no handles, and upstream's get_flops.py scripts call it.
    """
    complexity_analysis._DEFAULT_SUPPORTED_FLOP_OPS.update(JIT_HANDLES)
    complexity_analysis._DEFAULT_SUPPORTED_ACT_OPS.update(
        dict.fromkeys(JIT_HANDLES, generic_activation_jit())
    )
