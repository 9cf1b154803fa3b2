"""The scan patterns: which path each direction takes over the map.

Some are arithmetic on positions, the others lists of them: :mod:`.path_lists` makes the lists.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from mmvmamba_kernels import scan_paths

PathFunction = Callable[[int, int], Tensor | Sequence[Sequence[int]]]
"""From a map's height and width to (K, L) positions ``row * width + column``."""


class Path(NamedTuple):
    """One direction's order of positions."""

    column_major: bool
    """Columns one after another instead of rows."""
    reverse: bool
    """From the last position to the first."""
    per_line: bool = False
    """Every row (or column) is a sequence of its own, starting from a zero state."""

    def sequences(self, height: int, width: int) -> tuple[int, int]:
        """Number of sequences of one map, and positions of each."""
        lines, length = (width, height) if self.column_major else (height, width)
        return (lines, length) if self.per_line else (1, lines * length)


PATTERNS: dict[str, tuple[Path, ...]] = {
    "cross2d": (Path(False, False), Path(True, False), Path(False, True), Path(True, True)),
    "unidi": (Path(False, False),) * 4,
    "bidi": (Path(False, False),) * 2 + (Path(False, True),) * 2,
    "rows": (Path(False, False, True), Path(False, True, True)),
    "columns": (Path(True, False, True), Path(True, True, True)),
}
"""Path of direction k of each arithmetic pattern; the number of directions is K."""


class ListedPattern(NamedTuple):
    """A pattern whose paths are lists of positions."""

    paths: PathFunction
    length: Callable[[int, int], int] | None = None
    """Positions of the longest path, where no path need visit the whole map."""

    def steps(self, height: int, width: int) -> int:
        """Positions of the longest path."""
        return height * width if self.length is None else self.length(height, width)


_listed = {
    "snake": ListedPattern(scan_paths.snake),
    "diagonal": ListedPattern(scan_paths.diagonal),
    "hilbert": ListedPattern(scan_paths.hilbert),
}
_families = {
    "window": (scan_paths.window, None),
    "atrous": (scan_paths.atrous, scan_paths.atrous_length),
}
# Of models, which compose patterns.
_RESERVED = ("cascade2d",)
# A size at which a pattern says how many directions it has.
_SAMPLE = (8, 8)


def register_pattern(
    name: str, paths: PathFunction, length: Callable[[int, int], int] | None = None
) -> None:
    """Give paths a name that ``selective_scan_2d(pattern=...)`` and ``VMamba(scan=...)`` take.

    Args:
        name: The name.
        paths: From a map's height and width to its paths, (K, height * width) positions ``row *
            width + column``, each row a permutation. Called once for a size, and kept.
        length: Where the paths need not visit the whole map, how many positions the longest visits;
            shorter ones then end in -1.

    Raises:
        ValueError: If the name is another pattern's, or what it gives for a map of 8 by 8 positions
            is not as described.
    """
    pattern = ListedPattern(paths, length)
    if name in _listed and _listed[name] == pattern:
        return
    if name in (*PATTERNS, *_RESERVED) or find_listed(name) is not None:
        raise ValueError(
            f"the scan pattern {name!r} is registered already: choose another name. A function "
            "that was defined again counts as another one; restart the process to use its old name."
        )
    pattern_paths(name, pattern, *_SAMPLE)
    _listed[name] = pattern


def name_pattern(paths: PathFunction) -> str:
    """The name of a function of paths, which is registered if it has none yet.

    Raises:
        ValueError: If it is a lambda or inside of another function, where names say nothing, or as
            :func:`register_pattern`.
    """
    for name, pattern in _listed.items():
        if pattern == ListedPattern(paths):
            return name
    own = getattr(paths, "__qualname__", type(paths).__name__)
    if "<" in own:
        raise ValueError(
            f"{own} cannot be found by name in another process: register it with "
            "mmvmamba_kernels.register_pattern(name, function), and give that name instead"
        )
    base = name = f"{getattr(paths, '__module__', '')}.{own}"
    for number in itertools.count(2):
        if name not in _listed:
            break
        name = f"{base}#{number}"
    register_pattern(name, paths)
    return name


def find_listed(name: str) -> ListedPattern | None:
    """The pattern of this name whose paths are lists, if there is one."""
    if name in _listed:
        return _listed[name]
    # Compilers read this: plain operations on strings.
    family = name.rstrip("0123456789")
    number = name[len(family) :]
    if family not in _families or number == "" or number[0] == "0":
        return None
    paths, length = _families[family]
    if length is not None:
        length = functools.partial(length, size=int(number))
    return ListedPattern(functools.partial(paths, size=int(number)), length)


def listed_names() -> tuple[str, ...]:
    """The patterns whose paths are lists, those with a number for any number."""
    return (*_listed, *(f"{family}{{n}}" for family in _families))


@torch.compiler.assume_constant_result
def count_directions(op: str, name: str) -> int:
    """The number of directions of a pattern.

    Raises:
        ValueError: If there is no such pattern; the message begins with ``op``.
    """
    if name in PATTERNS:
        return len(PATTERNS[name])
    if not isinstance(name, str) or find_listed(name) is None:
        known = ", ".join((*PATTERNS, *listed_names()))
        raise ValueError(
            f"{op}: pattern must be one of {known}, got {name!r}; "
            "register others with mmvmamba_kernels.register_pattern"
        )
    return _count_listed(name)


@functools.cache
def _count_listed(name: str) -> int:
    return len(pattern_paths(name, find_listed(name), *_SAMPLE))


def pattern_paths(name: str, pattern: ListedPattern, height: int, width: int) -> Tensor:
    """The paths of a pattern over a map, checked.

    Args:
        name: What messages call it.
        pattern: The pattern.
        height: H of the map.
        width: W of the map.

    Returns:
        (K, L) int64 on the CPU, of the longest path's length; shorter paths end in -1.

    Raises:
        ValueError: If they are no such paths.
    """
    what = f"the paths of scan pattern {name!r} over a {height} x {width} map"
    steps = pattern.steps(height, width)
    with real_values():
        paths = torch.as_tensor(pattern.paths(height, width), device="cpu")
        shape = tuple(paths.shape)
        if len(shape) != 2 or not shape[0] or shape[1] != steps or not is_integer(paths.dtype):
            raise ValueError(f"{what} must be (K, {steps}) integers, got {paths.dtype} of {shape}")
        return check_positions(what, paths.long(), height * width, whole=pattern.length is None)


@contextmanager
def real_values() -> Iterator[None]:
    """Tensors that are made meanwhile are on the CPU and have values.

    Models are built on other devices, and counted and rehearsed with tensors without values.
    """
    with torch.device("cpu"), _disable_current_modes():
        yield


def is_integer(dtype: torch.dtype) -> bool:
    """Whether it is a dtype in which paths may be given."""
    return dtype in (torch.int32, torch.int64)


def check_positions(what: str, paths: Tensor, positions: int, whole: bool) -> Tensor:
    """Check what paths visit.

    Args:
        what: What messages call them.
        paths: (K, L) int64 on the CPU.
        positions: Positions of the map.
        whole: Whether every path visits all of them; otherwise paths may end in -1.

    Returns:
        The paths.

    Raises:
        ValueError: If one leaves the map, or visits a position twice.
    """
    expected = f"a permutation of the {positions} positions of the map"
    if not whole:
        expected = f"different positions of the {positions} of the map, then nothing but -1"
    for k, path in enumerate(paths):
        ended = torch.zeros_like(path) if whole else (path == -1).cumsum(0)
        steps, rest = path[ended == 0], path[ended > 0]
        wrong = torch.cat((steps[(steps < 0) | (steps >= positions)], rest[rest != -1]))
        if wrong.numel():
            raise ValueError(f"{what}: path {k} must be {expected}, and has {int(wrong[0])}")
        twice = (torch.bincount(steps, minlength=1) > 1).nonzero()
        if twice.numel():
            raise ValueError(
                f"{what}: path {k} must be {expected}, and has {int(twice[0])} more than once"
            )
    return paths
