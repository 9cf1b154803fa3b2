"""Models, registered in the scope 'mmvmamba'."""

from importlib import import_module

from mmvmamba.models.official import MM_VSSM
from mmvmamba.models.vmamba import VMamba
from mmvmamba.registry import MODELS

__all__ = ["MM_VSSM", "VMamba"]

# Classes made of parts of upstream packages, which take seconds to import and may be missing:
# name -> (module, upstream package, mmvmamba's extra that brings it).
NEED_UPSTREAM = {
    "VMambaClsHead": ("mmvmamba.models.cls_head", "mmpretrain", "cls"),
    "Float32RPNHead": ("mmvmamba.models.float32_heads", "mmdet", "det"),
    "Float32RetinaHead": ("mmvmamba.models.float32_heads", "mmdet", "det"),
    "Float32RoIExtractor": ("mmvmamba.models.float32_heads", "mmdet", "det"),
}


def _register_lazily(name: str, module: str, package: str, extra: str) -> None:
    @MODELS.register_module(name=name)
    def build(**kwargs):
        """Imports the class where it is used, and builds it."""
        try:
            cls = getattr(import_module(module), name)
        except ModuleNotFoundError as error:
            if error.name != package:
                raise
            raise ModuleNotFoundError(
                f"{name} needs {package}: pip install 'mmvmamba[{extra}]'.", name=package
            ) from error
        return cls(**kwargs)


for _name, _where in NEED_UPSTREAM.items():
    _register_lazily(_name, *_where)
