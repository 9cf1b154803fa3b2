"""Paths as lists of positions, as implementations take them: checked once, and kept."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from mmvmamba_kernels.patterns import check_positions, count_directions, find_listed, pattern_paths


class PathLists(NamedTuple):
    """The paths of all directions, on the device of the map."""

    table: Tensor
    """(K, 1 + L) int32: a path's number of positions, then they; then the last one again."""
    lengths: tuple[int, ...]
    """Positions of every path."""
    visited: Tensor | None
    """(K, H * W), one where a path comes by; None if all visit the whole map."""

    def path(self, k: int) -> Tensor:
        """The positions of path k."""
        return self.table[k, 1 : 1 + self.lengths[k]]

    def skips(self, D: Tensor) -> Tensor:
        """What the paths that come by multiply a position's input by, all together.

        Args:
            D: Skip weights, (K, D).

        Returns:
            (H * W, D), or (D,) if all visit the whole map.
        """
        return D.sum(0) if self.visited is None else self.visited.t().to(D.dtype) @ D

    def grad_skips(self, x: Tensor, grad_out: Tensor) -> Tensor:
        """The gradient of ``D`` in (x * skips(D)).

        Args:
            x: (B, H * W, D).
            grad_out: (B, H * W, D), of the product.

        Returns:
            (K, D).
        """
        products = (x * grad_out).sum(0)
        if self.visited is None:
            return products.sum(0).expand(len(self.lengths), -1)
        return self.visited.to(products.dtype) @ products


def _prepare(paths: Tensor, positions: int, whole: bool, device: torch.device) -> PathLists:
    """Checked paths, (K, L) int64 on the CPU, as lists."""
    lengths = (paths >= 0).sum(1, keepdim=True)
    last = paths.gather(1, (lengths - 1).clamp_min(0)).clamp_min(0)
    table = torch.cat((lengths, torch.where(paths < 0, last, paths)), 1).int()
    visited = None
    if not whole:
        visited = torch.zeros(len(paths), positions + 1, dtype=torch.bool)
        visited = visited.scatter_(1, torch.where(paths < 0, positions, paths), True)[:, :-1]
        visited = visited.to(device)
    return PathLists(table.to(device), tuple(lengths[:, 0].tolist()), visited)


@functools.lru_cache(maxsize=512)
def of_pattern(name: str, height: int, width: int, device: torch.device) -> PathLists:
    """The lists of a pattern over a map of this size.

    Raises:
        ValueError: If this process has no such pattern, or its function fails for this size.
    """
    pattern = find_listed(name)
    if pattern is None:
        raise ValueError(
            f"this process has no scan pattern {name!r}: mmvmamba_kernels.register_pattern adds it"
        )
    paths = pattern_paths(name, pattern, height, width)
    directions = count_directions("selective_scan_2d", name)
    if len(paths) != directions:
        raise ValueError(
            f"the scan pattern {name!r} gives {len(paths)} paths over a {height} x {width} map "
            f"and {directions} over others: it must give the same number for every size"
        )
    return _prepare(paths, height * width, pattern.length is None, device)


_known = WeakTensorKeyDictionary()


def of_tensor(op: str, paths: Tensor, height: int, width: int) -> PathLists:
    """The lists of a user's tensor of paths, whose values are looked at when it is new or changed.

    Raises:
        ValueError: If a path leaves the map, or visits a position twice.
    """
    # Changes of tensors that were made in inference mode are not counted.
    version = None if paths.is_inference() else paths._version
    known = _known.get(paths)
    if known is not None and version is not None and known[0] == (version, height, width):
        return known[1]
    positions = height * width
    whole = paths.shape[1] == positions
    what = f"{op}: paths over a {height} x {width} map"
    checked = check_positions(what, paths.detach().cpu().long(), positions, whole)
    lists = _prepare(checked, positions, whole, paths.device)
    _known[paths] = (version, height, width), lists
    return lists
