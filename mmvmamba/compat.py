"""What current versions of the stack need beside mmengine 0.10: a check and two registrations.

One function of another package is replaced: mmengine's download of weights, which would run what it
fetches. The packages are imported where they are used, so that the check can speak of one that is
missing.
"""

import sys
import warnings
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from itertools import pairwise

from packaging.specifiers import SpecifierSet
from packaging.version import Version

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
# What every use of mmvmamba imports; the others are needed for their own tasks only.
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


def stack_problem(name: str) -> str | None:
    """What is wrong with a package of `STACK`, or None.

    Of those that are not installed only the required ones are a problem: a user of mmdet needs no
    mmseg.
    """
    window, _ = STACK[name]
    found = installed_version(name)
    if found is None:
        # mmcv's module also comes from a distribution of another name, mmcv-lite.
        if name in REQUIRED and find_spec(name) is None:
            return f"{name} is not installed, mmvmamba needs {window}"
    elif not window.contains(found, prereleases=True):
        return f"{name} {found} is installed, mmvmamba needs {window}"
    return None


def stack_problems() -> list[str]:
    """Lists the packages that do not fit mmvmamba.

    Returns:
        One line per package: what is there, what is needed and the command that mends it.
    """
    problems = {name: stack_problem(name) for name in STACK}
    return [f"{text}: {STACK[name][1]}" for name, text in problems.items() if text]


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


def check_downloaded_weights() -> None:
    """Makes mmengine read the weights that it fetches as carefully as those of the disk.

    All its addresses (http(s)://, torchvision://, open-mmlab://, mmcls://) come to one function,
    PyTorch's, whose `weights_only` is off where it is not given: unlike `torch.load`, it would run
    what the file holds.
    """
    from functools import partial

    from mmengine.runner import checkpoint

    if not isinstance(checkpoint.load_url, partial):
        checkpoint.load_url = partial(checkpoint.load_url, weights_only=True)


def register_config_scope() -> None:
    """Makes `_base_ = 'mmvmamba::folder/config.py'` work in other projects.

    mmengine keeps a closed table of packages (open-mmlab/mmengine#1410). The entry names a module,
    not the distribution: that is found for a wheel, an editable install and a plain checkout alike.
    """
    from mmengine.config.utils import MODULE2PACKAGE

    MODULE2PACKAGE.setdefault("mmvmamba", "mmvmamba.registry")
