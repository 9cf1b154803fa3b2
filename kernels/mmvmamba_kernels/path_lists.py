"""Paths as lists of positions, as implementations take them: checked once, and kept."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.weak import WeakTensorKeyDictionary

from mmvmamba_kernels.patterns import (
    check_positions,
    count_directions,
    find_listed,
    pattern_paths,
    real_values,
)


class PathLists(NamedTuple):
    """The paths of all directions, on the device of the map."""

    table: Tensor
    """(K, 1 + L) int32: a path's number of positions, then they; then the last one again."""
    lengths: tuple[int, ...]
    """Positions of every path."""
    visited: Tensor | None
    """(K, H * W), one where a path comes by; None if all visit the whole map."""

    def to(self, device: torch.device) -> PathLists:
        """The same on another device."""
        visited = None if self.visited is None else self.visited.to(device)
        return PathLists(self.table.to(device), self.lengths, visited)

    def skips(self, D: Tensor) -> Tensor:
        """What the paths that come by multiply a position's input by, all together.

        Args:
            D: Skip weights, (K, D).

        Returns:
            (H * W, D), or (D,) if all visit the whole map.
        """
        if self.visited is None:
            return D.sum(0)
        # Not as a matrix product, which TF32 would round.
        return sum(v[:, None] * d for v, d in zip(self.visited, D, strict=True))

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
        return torch.stack([(v[:, None] * products).sum(0) for v in self.visited])


def _prepare(paths: Tensor, positions: int, whole: bool) -> PathLists:
    """Checked paths, (K, L) int64 on the CPU, as lists there."""
    lengths = (paths >= 0).sum(1, keepdim=True)
    last = paths.gather(1, (lengths - 1).clamp_min(0)).clamp_min(0)
    table = torch.cat((lengths, torch.where(paths < 0, last, paths)), 1).int()
    visited = None
    if not whole:
        visited = torch.zeros(len(paths), positions + 1, dtype=torch.bool)
        visited = visited.scatter_(1, torch.where(paths < 0, positions, paths), True)[:, :-1]
    return PathLists(table, tuple(lengths[:, 0].tolist()), visited)


def of_pattern(name: str, height: int, width: int, x: Tensor) -> PathLists:
    """The lists of a pattern over a map, where its tensor is.

    Raises:
        ValueError: If this process has no such pattern, or its function fails for this size.
    """
    if isinstance(x, FakeTensor):
        lists = _make(name, height, width)
        whole = lists.visited is None
        return _without_values(x, len(lists.lengths), lists.table.shape[1] - 1, whole)
    return _kept_if_captured(_of_pattern(name, height, width, x.device), x)


_captured: dict[int, PathLists] = {}


def _kept_if_captured(lists: PathLists, x: Tensor) -> PathLists:
    """The lists, held for good while a CUDA graph is captured, whose replays read them."""
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        _captured[id(lists)] = lists
    return lists


@functools.lru_cache(maxsize=512)
def _of_pattern(name: str, height: int, width: int, device: torch.device) -> PathLists:
    return _make(name, height, width).to(device)


@functools.lru_cache(maxsize=64)
def _make(name: str, height: int, width: int) -> PathLists:
    """The lists on the CPU, for every device and for rehearsals, which ask for them often."""
    pattern = find_listed(name)
    if pattern is None:
        raise ValueError(
            f"the scan pattern {name!r} is not registered in this process: call "
            "mmvmamba_kernels.register_pattern before the scan"
        )
    with real_values():
        paths = pattern_paths(name, pattern, height, width)
        directions = count_directions("selective_scan_2d", name)
        if len(paths) != directions:
            raise ValueError(
                f"the scan pattern {name!r} gives {len(paths)} paths over a {height} x {width} map "
                f"and {directions} over others: it must give the same number for every size"
            )
        return _prepare(paths, height * width, pattern.length is None)


def _without_values(x: Tensor, directions: int, steps: int, whole: bool) -> PathLists:
    """Lists over a map that has no values, in a rehearsal of kernels' launches."""
    positions = x.shape[1] * x.shape[2]
    return PathLists(
        x.new_empty((directions, 1 + steps), dtype=torch.int32),
        (steps,) * directions,
        None if whole else x.new_empty((directions, positions), dtype=torch.bool),
    )


_known = WeakTensorKeyDictionary()


def of_tensor(op: str, paths: Tensor, x: Tensor) -> PathLists:
    """The lists of a user's tensor of paths, whose values are looked at when it is new or changed.

    Writes through `paths.data` or NumPy are no changes that PyTorch counts, and stay unseen.

    Raises:
        ValueError: If a path leaves the map, or visits a position twice.
    """
    _, height, width, _ = x.shape
    positions = height * width
    directions, steps = paths.shape
    whole = steps == positions
    if isinstance(paths, FakeTensor):
        return _without_values(x, directions, steps, whole)
    # Changes of tensors that were made in inference mode are not counted.
    version = None if paths.is_inference() else paths._version
    known = _known.get(paths)
    key = version, paths.data_ptr(), height, width
    if known is not None and version is not None and known[0] == key:
        return _kept_if_captured(known[1], x)
    what = f"{op}: paths over a {height} x {width} map"
    checked = check_positions(what, paths.detach().cpu().long(), positions, whole)
    lists = _prepare(checked, positions, whole).to(paths.device)
    _known[paths] = key, lists
    return _kept_if_captured(lists, x)
