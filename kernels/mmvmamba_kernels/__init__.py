"""Operators for VMamba: one public function each, several implementations.

Imports torch alone; ``kernels/README.md`` has the maths, the layouts and the support matrix.
"""

from mmvmamba_kernels.depthwise_conv.api import depthwise_conv
from mmvmamba_kernels.dispatch import BackendError, available_backends
from mmvmamba_kernels.layer_norm.api import add_layer_norm, layer_norm
from mmvmamba_kernels.patterns import register_pattern
from mmvmamba_kernels.selective_scan.api import selective_scan
from mmvmamba_kernels.selective_scan_2d.api import selective_scan_2d
from mmvmamba_kernels.selective_scan_2d_norm.api import selective_scan_2d_norm
from mmvmamba_kernels.state_space_dual.api import state_space_dual

__all__ = [
    "BackendError",
    "add_layer_norm",
    "available_backends",
    "depthwise_conv",
    "layer_norm",
    "register_pattern",
    "selective_scan",
    "selective_scan_2d",
    "selective_scan_2d_norm",
    "state_space_dual",
]
