"""Models, registered in the scope 'mmvmamba'."""

from importlib import import_module

from mmvmamba.compat import install_command
from mmvmamba.models.compared import NAT, S4ND, S4NDViT, VisionMamba
from mmvmamba.models.complexity import register_with_mmengine
from mmvmamba.models.layers import VSSBlock
from mmvmamba.models.official import MM_VSSM
from mmvmamba.models.ss2d import SS2D, Mamba2Mixer
from mmvmamba.models.vmamba import VMamba
from mmvmamba.registry import MODELS

__all__ = [
    "MM_VSSM",
    "NAT",
    "S4ND",
    "SS2D",
    "Mamba2Mixer",
    "S4NDViT",
    "VMamba",
    "VSSBlock",
    "VisionMamba",
]

# Classes made of parts of upstream packages, which take seconds to import and may be missing:
# name -> (module, upstream package).
NEED_UPSTREAM = {
    "VMambaClsHead": ("mmvmamba.models.cls_head", "mmpretrain"),
    "S4NDConvNeXt": ("mmvmamba.models.compared.s4nd_convnext", "mmpretrain"),
    "Float32RPNHead": ("mmvmamba.models.float32_heads", "mmdet"),
    "Float32RetinaHead": ("mmvmamba.models.float32_heads", "mmdet"),
    "Float32RoIExtractor": ("mmvmamba.models.float32_heads", "mmdet"),
}


def _register_lazily(name: str, module: str, package: str) -> None:
    @MODELS.register_module(name=name)
    def build(**kwargs):
        """Imports the class where it is used, and builds it."""
        try:
            cls = getattr(import_module(module), name)
        except ModuleNotFoundError as error:
            if error.name != package:
                raise
            raise ModuleNotFoundError(
                f"{name} needs {package}: {install_command(package)}", name=package
            ) from error
        return cls(**kwargs)


for _name, _where in NEED_UPSTREAM.items():
    _register_lazily(_name, *_where)

register_with_mmengine()
