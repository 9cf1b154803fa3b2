"""VMamba for OpenMMLab."""

import warnings

from mmvmamba.compat import (
    allow_mmengine_checkpoints,
    check_stack,
    imported_for,
    read_weights_as_data,
    register_config_scope,
)
from mmvmamba.timm import offer_models
from mmvmamba.version import __version__

__all__ = ["__version__"]

# A stack that does not work is what the doctor has to be able to run on.
if not imported_for("mmvmamba.doctor"):
    # mmengine imports it, from the setuptools below 82 that the stack has for that.
    warnings.filterwarnings("ignore", "pkg_resources is deprecated")
    check_stack()
    # These read no weights, and what follows imports for seconds.
    if not (imported_for("mmvmamba.engine.launch") or imported_for("mmvmamba.demo")):
        allow_mmengine_checkpoints()
        read_weights_as_data()
        register_config_scope()
        offer_models()
