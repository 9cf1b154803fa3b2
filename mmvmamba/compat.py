"""What current versions of the stack need beside mmengine 0.10: a check and two registrations.

What another package does is replaced in one respect: mmengine reads weights as data alone, where it
would run what a file holds. The packages are imported where they are used, so that the check can
speak of one that is missing.
"""

import re
import sys
import warnings
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

from packaging.specifiers import SpecifierSet
from packaging.version import Version

# Module -> the distributions that bring it: OpenMMLab's, and OneDL's maintained fork of it. The two
# have the same files, so that of one module a single one can be installed.
MODULES = {
    "mmengine": ("mmengine", "onedl-mmengine"),
    "mmcv": ("mmcv", "onedl-mmcv"),
    "mmdet": ("mmdet", "onedl-mmdetection"),
    "mmseg": ("mmsegmentation", "onedl-mmsegmentation"),
    "mmpretrain": ("mmpretrain", "onedl-mmpretrain"),
}
_MODULE_OF = {name: module for module, names in MODULES.items() for name in names}

# Distribution -> (versions that work together, how to get one). The lowest and the newest of each
# were tested (requirements/bounds.in). mmdet 3.3 and mmseg 1.2 refuse mmcv >= 2.2
# (open-mmlab/mmcv#3096), and mmcv 2.0 compiles as C++14, which torch's headers refuse; a newer
# mmengine breaks `package::config` inheritance.
STACK = {
    # 2.6 comes with Triton 3.2, which cannot compile the scan.
    "torch": (SpecifierSet(">=2.7"), 'pip install "torch>=2.7,<2.15"'),
    # mmengine reads `package::config` names through pkg_resources.
    "setuptools": (SpecifierSet("<82"), 'pip install "setuptools<82"'),
    "mmengine": (SpecifierSet(">=0.10.5,<0.11"), 'pip install "mmengine>=0.10.5,<0.11"'),
    "mmcv": (
        SpecifierSet(">=2.1,<2.2"),
        'pip install "setuptools<82" && '
        "MMCV_WITH_OPS=1 pip install --no-build-isolation --no-binary mmcv mmcv==2.1.0",
    ),
    "mmdet": (SpecifierSet(">=3.3,<3.4"), 'pip install "mmdet>=3.3,<3.4"'),
    "mmsegmentation": (SpecifierSet(">=1.2.2,<1.3"), 'pip install "mmsegmentation>=1.2.2,<1.3"'),
    "mmpretrain": (SpecifierSet(">=1.2,<1.3"), 'pip install "mmpretrain>=1.2,<1.3"'),
}
# The same with OneDL's packages (requirements/onedl.in), which find configs without setuptools.
ONEDL = {
    "torch": STACK["torch"],
    "onedl-mmengine": (
        SpecifierSet(">=0.10.12,<0.11"),
        'pip install "onedl-mmengine>=0.10.12,<0.11"',
    ),
    "onedl-mmcv": (
        SpecifierSet(">=2.3.6,<2.4"),
        'pip install "setuptools>=77" && '
        "pip install --no-build-isolation --no-binary onedl-mmcv onedl-mmcv==2.3.6",
    ),
    "onedl-mmdetection": (
        SpecifierSet(">=3.5.1,<3.6"),
        'pip install "onedl-mmdetection>=3.5.1,<3.6"',
    ),
    "onedl-mmsegmentation": (
        SpecifierSet(">=1.4.2,<1.5"),
        'pip install "onedl-mmsegmentation>=1.4.2,<1.5"',
    ),
    "onedl-mmpretrain": (
        SpecifierSet(">=1.3.6,<1.4"),
        'pip install "onedl-mmpretrain>=1.3.6,<1.4"',
    ),
}
# The modules that every use of mmvmamba imports; the others are needed for their own tasks only.
REQUIRED = ("torch", "mmengine", "mmcv")

# What no test has seen and nothing is known to be wrong with: a warning.
TESTED = {"torch": SpecifierSet("<2.15")}

# As in pyproject.toml, for a checkout that is not installed.
PYTHON = SpecifierSet(">=3.10,<3.14")
# What works outside its window, but not everywhere: only `python -m mmvmamba.doctor` speaks of it.
# Distribution -> (versions, how to get one, what does not work with others).
ADVISED = {
    "torch": (
        SpecifierSet(">=2.10"),
        'pip install "torch>=2.10,<2.15"',
        "a checkpoint made for it can run code on earlier ones (CVE-2026-24747)",
    ),
    "numpy": (
        SpecifierSet("<2.4"),
        'pip install "numpy<2.4"',
        "Triton's interpreter, which runs its kernels without a GPU, breaks with later ones",
    ),
}


# numpy's types of numbers that a checkpoint may hold.
_NUMBERS = "?bBhHiIlLqQefd"


class StackError(ImportError):
    """Raised when an installed package lies outside the versions that work together."""


def installed_version(name: str) -> str | None:
    """The version of a distribution, or None if it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def module_of(name: str) -> str:
    """The module that a distribution brings."""
    return _MODULE_OF.get(name, name)


def provider(module: str) -> tuple[str, str | None] | None:
    """The distribution whose files Python imports by the name of a module of `MODULES`.

    The files say it, not what is installed beside them: OneDL's `version.py` asks for the version
    of its own distribution, OpenMMLab's is the version itself.

    Returns:
        The distribution and its version, or None if there is no such module.
    """
    spec = find_spec(module)
    # A folder that an uninstalled package left behind has no origin.
    if spec is None or spec.origin is None:
        return None
    official, fork = MODULES[module]
    try:
        text = (Path(spec.origin).parent / "version.py").read_text(encoding="utf-8")
    except OSError:
        text = ""
    if f"'{fork}'" in text or f'"{fork}"' in text:
        return fork, installed_version(fork)
    literal = re.search(r"""^__version__ *= *['"]([^'"]+)""", text, re.MULTILINE)
    return official, literal[1] if literal else installed_version(official)


def stack() -> dict[str, tuple[SpecifierSet, str]]:
    """The packages that belong together here: OneDL's, if more of them are there, else `STACK`."""
    found = [provided[0] for provided in map(provider, MODULES) if provided]
    forks = sum(name in ONEDL for name in found)
    return ONEDL if forks > len(found) - forks else STACK


def stack_version(name: str) -> str | None:
    """The version of a package of `stack()`, or of what is imported in its place, or None."""
    if name not in _MODULE_OF:
        return installed_version(name)
    provided = provider(_MODULE_OF[name])
    return provided[1] if provided else None


def stack_problem(name: str) -> str | None:
    """What is wrong with a package of `stack()`, or None.

    Of those that are not installed only the required ones are a problem: a user of mmdet needs no
    mmseg.
    """
    window, _ = stack()[name]
    module, found = module_of(name), stack_version(name)
    installed = [f"{one} {installed_version(one)}" for one in _rivals(name)]
    if len(installed) > 1:
        both = " and ".join(installed)
        return f"{both} are both installed and overwrite each other's files ({module})"
    provided = provider(module) if module in MODULES else None
    if provided and provided[0] != name:
        return (
            f"{provided[0]} {found} is installed beside "
            f"{'OneDL' if name in ONEDL else 'OpenMMLab'}'s packages, which do not work with it: "
            f"mmvmamba needs {name} {window} here"
        )
    if found is None:
        # torch may be of a distribution of another name.
        missing = module in MODULES or find_spec(module) is None
        if provided or (module in REQUIRED and missing):
            return f"{name} is not installed, mmvmamba needs {window}"
    elif not window.contains(found, prereleases=True):
        return f"{name} {found} is installed, mmvmamba needs {window}"
    return None


def stack_command(name: str) -> str:
    """What installs a package of `stack()`, and nothing over its fork's files."""
    rivals, (_, command) = _rivals(name), stack()[name]
    # Removing either removes files of both. Without its files, pip takes a package to be there.
    if set(rivals) - {name} or (rivals and stack_version(name) is None):
        command = f"pip uninstall -y {' '.join(rivals)} && {command}"
    return command


def install_command(module: str) -> str:
    """What installs a module's package, of the stack that is here."""
    for name in stack():
        if module_of(name) == module:
            return stack_command(name)
    return f"pip install {module}"


def _rivals(name: str) -> list[str]:
    """The installed distributions that bring the module of a package of `stack()`."""
    names = MODULES.get(module_of(name), (name,))
    return [one for one in names if installed_version(one) is not None]


def stack_problems() -> list[str]:
    """Lists the packages that do not fit mmvmamba.

    Returns:
        One line per package: what is there, what is needed and the command that mends it.
    """
    problems = {name: stack_problem(name) for name in stack()}
    return [f"{text}: {stack_command(name)}" for name, text in problems.items() if text]


def untested(name: str) -> str | None:
    """What to say of a package that is newer than what tests were run with, else None."""
    found, window = installed_version(name), TESTED.get(name, SpecifierSet())
    # A local part (2.14.1+cpu) and a release candidate count as their release.
    if found is None or window.contains(Version(found).base_version):
        return None
    return (
        f"{name} {found} is newer than what mmvmamba was tested with ({window}). Where something "
        f"fails: {STACK[name][1]}"
    )


def check_stack() -> None:
    """Refuses a stack that cannot work, and warns of one that is newer than the tested ones.

    Raises:
        StackError: With a line per package that does not fit.
    """
    problems = stack_problems()
    if problems:
        raise StackError("\n  ".join(["the installed packages do not fit together.", *problems]))
    for text in filter(None, map(untested, TESTED)):
        warnings.warn(text, stacklevel=2)


def imported_for(module: str) -> bool:
    """Whether Python imports the package to run `python -m MODULE`.

    While it does, `sys.argv` begins with '-m'.
    """
    return sys.argv[:1] == ["-m"] and ("-m", module) in pairwise(sys.orig_argv)


def _history_buffer_statistic(owner: type, name: str):
    """Stands in for `getattr` in a checkpoint's message hub, and for that use only.

    Raises:
        ValueError: On any other attribute of any other object.
    """
    from mmengine.logging import HistoryBuffer

    if owner is not HistoryBuffer or name not in ("min", "max", "current", "mean"):
        raise ValueError(
            f"the checkpoint asks for attribute {name!r} of {owner!r}, which is refused"
        )
    return getattr(owner, name)


def _plain_dtype(code: str, *_copy_or_align):
    """Stands in for `numpy.dtype` in a checkpoint: numbers of this machine, which nothing changes.

    numpy lets a pickle give a *copy* of a type fields of its own, and then takes the file's bytes
    for addresses of Python objects. Its own types ignore such a state, so no copies are made.

    Raises:
        ValueError: On any other type.
    """
    import numpy as np

    if not isinstance(code, str) or code not in {np.dtype(c).str[1:] for c in _NUMBERS}:
        raise ValueError(f"the checkpoint asks for the numpy type {code!r}, which is refused")
    return np.dtype(code)


def allow_mmengine_checkpoints() -> None:
    """Lets `torch.load(weights_only=True)` read what mmengine itself writes into checkpoints.

    mmengine 0.10 stores its message hub (scalars as `HistoryBuffer`, numpy arrays) beside the
    weights and reads it back without saying `weights_only` (open-mmlab/mmengine#1655). Only these
    classes are let in; the check stays on.
    """
    import numpy as np
    import torch
    from mmengine.logging import HistoryBuffer

    core = sys.modules[np.ndarray.__reduce__(np.empty(0))[0].__module__]
    allowed = [HistoryBuffer, np.ndarray, (_plain_dtype, "numpy.dtype")]
    allowed += sorted({type(np.dtype(code)) for code in _NUMBERS}, key=repr)
    for function in (core._reconstruct, core.scalar):
        # Files written under numpy 1 name the module's old place.
        allowed += [
            (function, f"numpy.{package}.multiarray.{function.__name__}")
            for package in ("core", "_core")
        ]
    allowed.append((_history_buffer_statistic, "builtins.getattr"))
    torch.serialization.add_safe_globals(allowed)


def read_weights_as_data() -> None:
    """Makes mmengine read all weights with `weights_only`, from the disk and from addresses.

    What it fetches (http(s)://, torchvision://, open-mmlab://, mmcls://) comes to one function,
    PyTorch's, whose `weights_only` is off where it is not given: unlike `torch.load`, it would run
    what the file holds. OneDL's mmengine reads files by a function of its own, which lets in more
    than `allow_mmengine_checkpoints` (`getattr`, any type of numpy) and, where that is not enough,
    switches the check off.
    """
    from functools import partial

    import torch
    from mmengine.runner import checkpoint

    if not isinstance(checkpoint.load_url, partial):
        checkpoint.load_url = partial(checkpoint.load_url, weights_only=True)
    if hasattr(checkpoint, "_safe_torch_load"):
        checkpoint._safe_torch_load = partial(torch.load, weights_only=True)


def register_config_scope() -> None:
    """Makes `_base_ = 'mmvmamba::folder/config.py'` work in other projects.

    mmengine keeps a closed table of packages (open-mmlab/mmengine#1410). The entry names a module,
    not the distribution: that is found for a wheel, an editable install and a plain checkout alike.
    The table of OneDL's mmengine has OpenMMLab's distributions, which it would even install.
    """
    from mmengine.config.utils import MODULE2PACKAGE

    MODULE2PACKAGE.setdefault("mmvmamba", "mmvmamba.registry")
    if stack() is ONEDL:
        for module in MODULES.keys() & MODULE2PACKAGE.keys():
            MODULE2PACKAGE[module] = module if find_spec(module) else MODULES[module][1]
