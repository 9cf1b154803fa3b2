"""The arguments of the 2D selective scan, as its backends take them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from mmvmamba_kernels import path_lists
from mmvmamba_kernels.path_lists import PathLists
from mmvmamba_kernels.patterns import PATTERNS, Path, find_listed


def count_steps(paths: Sequence[int] | None, pattern: str, height: int, width: int) -> int:
    """Positions that a direction visits, or the one that visits most.

    Args:
        paths: The shape of the paths that were given.
        pattern: The pattern, which counts where none were.
        height: H of the map.
        width: W of the map.
    """
    if paths is not None:
        return paths[1]
    listed = find_listed(pattern)
    return height * width if listed is None else listed.steps(height, width)


def is_listed(scan: Arguments) -> bool:
    """Whether paths are lists of positions."""
    return scan.paths is not None or scan.pattern not in PATTERNS


class Arguments(NamedTuple):
    """See :func:`mmvmamba_kernels.selective_scan_2d`."""

    x: Tensor
    proj: Tensor
    dt_weight: Tensor
    dt_bias: Tensor
    A: Tensor
    D: Tensor
    paths: Tensor | None = None
    pattern: str = "cross2d"

    @property
    def listed(self) -> bool:
        """Whether paths are lists of positions."""
        return is_listed(self)

    @property
    def directions(self) -> tuple[Path, ...]:
        """The path of every direction: over the map, or over the list of its positions."""
        if self.listed:
            return (Path(column_major=False, reverse=False),) * self.A.shape[0]
        return PATTERNS[self.pattern]

    @property
    def steps(self) -> int | None:
        """Positions of the longest list; None without lists."""
        if not self.listed:
            return None
        shape = None if self.paths is None else self.paths.shape
        return count_steps(shape, self.pattern, *self.x.shape[1:3])

    @property
    def partial(self) -> bool:
        """Whether paths need not visit every position."""
        if self.paths is not None:
            return self.paths.shape[1] < self.x.shape[1] * self.x.shape[2]
        pattern = find_listed(self.pattern)
        return pattern is not None and pattern.length is not None

    def lists(self) -> PathLists | None:
        """The paths where they are lists, else None.

        Raises:
            ValueError: If a path leaves the map, or visits a position twice.
        """
        if self.paths is not None:
            return path_lists.of_tensor("selective_scan_2d", self.paths, self.x)
        if self.listed:
            return path_lists.of_pattern(self.pattern, *self.x.shape[1:3], self.x)
        return None
