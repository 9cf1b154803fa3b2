"""Puts the stand-ins where ``import`` finds them."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

from mmvmamba_kernels.backends.mamba_ssm import STAND_IN

# Name of a module -> the module here that has its functions; None for a package around others.
MODULES: dict[str, str | None] = {
    "csm_triton": "cross_scan",
    "mamba_ssm": None,
    "mamba_ssm.ops": None,
    "mamba_ssm.ops.selective_scan_interface": "mamba_interface",
    "selective_scan": "vmamba_interface",
    "selective_scan.selective_scan_interface": "vmamba_interface",
    "selective_scan_cuda": "mamba_extension",
    "selective_scan_cuda_core": "core_extension",
    # The same calls, with several rows to a block.
    "selective_scan_cuda_nrow": "core_extension",
    "selective_scan_cuda_ndstate": "ndstate_extension",
    "selective_scan_cuda_oflex": "oflex_extension",
}

# Every project has a copy of this one.
_COPIED = ".csm_triton"


def install(*, replace: bool = False) -> None:
    """Provide the stand-ins to every import from now on.

    A module that is really installed is left alone, a top-level package with all that is in it.

    Args:
        replace: Take the place of installed modules too, also of those that were imported already,
            and of a project's own ``csm_triton``, in whatever package it is.
    """
    sys.meta_path[:] = [f for f in sys.meta_path if not isinstance(f, StandInFinder)]
    sys.meta_path.insert(0, StandInFinder(replace))
    if not replace:
        return
    for name in list(sys.modules):
        ours = name.partition(".")[0] in MODULES or name.endswith(_COPIED)
        if ours and not _stands_in(name):
            del sys.modules[name]


class StandInFinder(MetaPathFinder):
    """Finds stand-ins, and refuses by name what they lack."""

    def __init__(self, replace: bool):
        self._replace = replace

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None = None,
        target: ModuleType | None = None,
    ) -> ModuleSpec | None:
        """As ``importlib`` asks for it.

        Raises:
            ModuleNotFoundError: If the module belongs to a stand-in and is not provided.
        """
        del path, target
        parent = fullname.rpartition(".")[0]
        if self._replace and fullname.endswith(_COPIED):
            return _spec(fullname)
        if parent and not _stands_in(parent):
            return None
        if fullname not in MODULES:
            if parent:
                # Without a name: `from package import name` would take an error about exactly that
                # module for a missing attribute, and say less.
                raise ModuleNotFoundError(_refusal(parent, fullname.rpartition(".")[2]))
            return None
        if not parent and not self._replace and self._is_installed(fullname):
            return None
        return _spec(fullname)

    def _is_installed(self, name: str) -> bool:
        """Whether another finder has the module; a folder that only has its name does not count."""
        for finder in sys.meta_path:
            if finder is not self and hasattr(finder, "find_spec"):
                spec = finder.find_spec(name, None)
                if spec is not None:
                    return spec.origin is not None
        return False


def _spec(name: str) -> ModuleSpec:
    # As packages, so that a name missing in `from module import name` is looked for here.
    return ModuleSpec(name, _Loader(), origin=STAND_IN, is_package=True)


class _Loader(Loader):
    def exec_module(self, module: ModuleType) -> None:
        name = module.__name__

        def refuse(attribute: str) -> object:
            raise AttributeError(_refusal(name, attribute))

        module.__getattr__ = refuse
        implementation = MODULES[name if name in MODULES else _COPIED[1:]]
        if implementation is None:
            module.__doc__, module.__all__ = f"A package around stand-ins of {STAND_IN}.", []
            return
        source = importlib.import_module(f"{__package__}.{implementation}")
        module.__doc__ = source.__doc__
        module.__all__ = source.__all__
        for attribute in source.__all__:
            setattr(module, attribute, getattr(source, attribute))


def _stands_in(name: str) -> bool:
    spec = getattr(sys.modules.get(name), "__spec__", None)
    return getattr(spec, "origin", None) == STAND_IN


def _refusal(module: str, name: str) -> str:
    """Why a stand-in lacks a name."""
    known = [n.rpartition(".")[2] for n in MODULES if n.rpartition(".")[0] == module]
    known += sys.modules[module].__all__
    return (
        f"{module!r} is a stand-in of {STAND_IN}, which has no {name!r}: only what VMamba-family "
        f"code calls is provided, here {', '.join(known)}. Install the real "
        f"{module.partition('.')[0]!r} for more."
    )
