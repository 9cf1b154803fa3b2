"""VMamba for OpenMMLab."""

from mmvmamba.compat import (
    allow_mmengine_checkpoints,
    check_downloaded_weights,
    check_stack,
    diagnosing,
    register_config_scope,
)
from mmvmamba.version import __version__

__all__ = ["__version__"]

# A stack that does not work is what the doctor has to be able to run on.
if not diagnosing():
    check_stack()
    allow_mmengine_checkpoints()
    check_downloaded_weights()
    register_config_scope()
