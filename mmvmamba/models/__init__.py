"""Models, registered in the scope 'mmvmamba'."""

from mmvmamba.models.official import MM_VSSM
from mmvmamba.models.vmamba import VMamba
from mmvmamba.registry import MODELS

__all__ = ["MM_VSSM", "VMamba"]


@MODELS.register_module(name="VMambaClsHead")
def build_cls_head(**kwargs):
    """Builds `VMambaClsHead`; mmpretrain, which takes seconds to import, is imported only here."""
    try:
        from mmvmamba.models.cls_head import VMambaClsHead
    except ModuleNotFoundError as error:
        if error.name != "mmpretrain":
            raise
        raise ModuleNotFoundError(
            "VMambaClsHead needs mmpretrain: pip install 'mmvmamba[cls]'.", name="mmpretrain"
        ) from error
    return VMambaClsHead(**kwargs)
