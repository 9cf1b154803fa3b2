"""Selective-scan operators for VMamba: one public function each, several implementations.

Imports torch alone; ``kernels/README.md`` has the maths, the layouts and the support matrix.
"""

from mmvmamba_kernels.dispatch import BackendError, available_backends
from mmvmamba_kernels.selective_scan.api import selective_scan
from mmvmamba_kernels.selective_scan_2d.api import selective_scan_2d
from mmvmamba_kernels.state_space_dual.api import state_space_dual

__all__ = [
    "BackendError",
    "available_backends",
    "selective_scan",
    "selective_scan_2d",
    "state_space_dual",
]
