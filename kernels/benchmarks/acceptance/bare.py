"""The backbone on a machine that has PyTorch and none of OpenMMLab's packages.

``import mmvmamba`` checks those packages and refuses to go on without them. What the backbone takes
of mmengine is a base class, a registry, a log and a barrier, none of which has a part in a forward
or backward pass. So the same files are imported, with stand-ins for these names; where the packages
are installed, as usual.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

from torch import nn

_ROOT = Path(__file__).resolve().parents[3]
_PACKAGES = ("mmvmamba", "mmvmamba.models", "mmvmamba.analysis")


def import_backbone() -> str:
    """Makes ``mmvmamba.models.vmamba`` and ``mmvmamba.analysis`` importable.

    Returns:
        How, for the report.
    """
    if find_spec("mmengine") and find_spec("mmcv"):
        sys.path.insert(0, str(_ROOT))
        import_module("mmvmamba")
        return "with mmengine"
    for name in _PACKAGES:
        # Without running its __init__.
        package = ModuleType(name)
        package.__path__ = [str(_ROOT.joinpath(*name.split(".")))]
        sys.modules[name] = package
    sys.modules.update(_stand_ins())
    models = sys.modules["mmvmamba.models"]
    models.VMamba = import_module("mmvmamba.models.vmamba").VMamba
    return "without mmengine: stand-ins for its base class, registry, log and barrier"


class _BaseModule(nn.Module):
    def __init__(self, init_cfg=None):
        super().__init__()
        self.init_cfg = init_cfg
        self._is_init = False


class _Registry:
    def register_module(self, name: str | None = None):  # noqa: ARG002
        return lambda cls: cls


def _print_log(message: object, *_, **__) -> None:
    sys.stderr.write(f"{message}\n")


def _stand_ins() -> dict[str, ModuleType]:
    contents = {
        "mmengine": {},
        "mmengine.dist": {"barrier": lambda: None},
        "mmengine.logging": {"print_log": _print_log},
        "mmengine.model": {"BaseModule": _BaseModule},
        "mmengine.model.weight_init": {"PretrainedInit": type("PretrainedInit", (), {})},
        "mmvmamba.registry": {"MODELS": _Registry()},
    }
    modules = {}
    for name, attributes in contents.items():
        modules[name] = ModuleType(name)
        vars(modules[name]).update(attributes)
    return modules
