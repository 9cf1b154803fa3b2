"""VMamba for OpenMMLab."""

from mmvmamba.compat import allow_mmengine_checkpoints, check_stack, register_config_scope
from mmvmamba.version import __version__

__all__ = ["__version__"]

check_stack()
allow_mmengine_checkpoints()
register_config_scope()
