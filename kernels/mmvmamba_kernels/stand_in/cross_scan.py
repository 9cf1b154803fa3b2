"""Stand-in for ``csm_triton``: maps as the sequences of VMamba's paths, and back.

Views and one copy, differentiable; layouts are (batch, C, ...) or (batch, ..., C).
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from mmvmamba_kernels.patterns import PATTERNS, Path

__all__ = [
    "CrossMergeTriton",
    "CrossMergeTritonF",
    "CrossScanTriton",
    "CrossScanTriton1b1",
    "CrossScanTriton1b1F",
    "CrossScanTritonF",
    "cross_merge_fn",
    "cross_scan_fn",
    "getCSM",
]

_PATTERN_OF_SCANS = ("cross2d", "unidi", "bidi")


def _paths(scans: int) -> tuple[Path, ...]:
    if scans not in range(len(_PATTERN_OF_SCANS)):
        names = ", ".join(f"{i} ({name})" for i, name in enumerate(_PATTERN_OF_SCANS))
        raise ValueError(f"cross scan: scans must be one of {names}, got {scans!r}")
    return PATTERNS[_PATTERN_OF_SCANS[scans]]


def cross_scan_fn(
    x: Tensor,
    in_channel_first: bool = True,
    out_channel_first: bool = True,
    one_by_one: bool = False,
    scans: int = 0,
    force_torch: bool = False,
) -> Tensor:
    """A map as four sequences.

    Args:
        x: (B, C, H, W), or (B, H, W, C) unless ``in_channel_first``; with ``one_by_one`` a map a
            path, (B, 4, C, H, W) or (B, H, W, 4, C).
        in_channel_first: The layout of ``x``.
        out_channel_first: The layout of the result.
        one_by_one: Every path has a map of its own.
        scans: 0 by rows, by columns and both reversed; 1 by rows four times; 2 by rows twice and
            reversed twice.
        force_torch: Ignored.

    Returns:
        (B, 4, C, H * W) or (B, H * W, 4, C).

    Raises:
        ValueError: If ``x`` has another number of dimensions, or there are no such scans.
    """
    del force_torch
    paths = _paths(scans)
    _check_rank(x, 5 if one_by_one else 4)
    # (B, [4,] C, H, W)
    maps = x if in_channel_first else x.movedim((1, 2), (-2, -1))
    sequences = [_walk(maps[:, k] if one_by_one else maps, path) for k, path in enumerate(paths)]
    if out_channel_first:
        return torch.stack(sequences, 1)
    return torch.stack([sequence.mT for sequence in sequences], 2)


def cross_merge_fn(
    y: Tensor,
    in_channel_first: bool = True,
    out_channel_first: bool = True,
    one_by_one: bool = False,
    scans: int = 0,
    force_torch: bool = False,
) -> Tensor:
    """The adjoint of :func:`cross_scan_fn`, with the meaning that its arguments have there.

    Args:
        y: Sequences in the shape of maps, (B, 4, C, H, W), or (B, H, W, 4, C) unless
            ``out_channel_first``.
        in_channel_first: The layout of the result.
        out_channel_first: The layout of ``y``.
        one_by_one: Do not sum over the paths.
        scans: As there.
        force_torch: Ignored.

    Returns:
        (B, C, H * W) or (B, H * W, C); with ``one_by_one`` (B, 4, C, H * W) or (B, H * W, 4, C).

    Raises:
        ValueError: If ``y`` has another number of dimensions, or there are no such scans.
    """
    del force_torch
    paths = _paths(scans)
    _check_rank(y, 5)
    maps = y if out_channel_first else y.movedim((1, 2), (-2, -1))
    height, width = maps.shape[-2:]
    sequences = maps.flatten(-2)
    parts = [_walk_back(sequences[:, k], path, height, width) for k, path in enumerate(paths)]
    if not in_channel_first:
        parts = [part.mT for part in parts]
    if one_by_one:
        return torch.stack(parts, 1 if in_channel_first else 2)
    return ((parts[0] + parts[2]) + (parts[1] + parts[3])).contiguous()


def _check_rank(maps: Tensor, expected: int) -> None:
    if maps.ndim != expected:
        layouts = "(B, C, H, W) or (B, H, W, C)"
        if expected == 5:
            layouts = "(B, 4, C, H, W) or (B, H, W, 4, C)"
        raise ValueError(f"cross scan: expected {layouts}, got shape {tuple(maps.shape)}")


def _walk(maps: Tensor, path: Path) -> Tensor:
    """(B, C, H, W) -> (B, C, H * W) in the path's order."""
    sequence = (maps.mT if path.column_major else maps).flatten(-2)
    return sequence.flip(-1) if path.reverse else sequence


def _walk_back(sequence: Tensor, path: Path, height: int, width: int) -> Tensor:
    """(B, C, H * W) from the path's order to that of rows."""
    if path.reverse:
        sequence = sequence.flip(-1)
    if path.column_major:
        sequence = sequence.unflatten(-1, (width, height)).mT.flatten(-2)
    return sequence


class _Applied:
    """A function that is called with ``apply``, as the autograd functions of older copies are."""

    def __init__(self, function: Callable[..., Tensor]):
        self.apply = function


CrossScanTriton = CrossScanTritonF = _Applied(cross_scan_fn)
CrossMergeTriton = CrossMergeTritonF = _Applied(cross_merge_fn)
CrossScanTriton1b1F = _Applied(
    lambda x, channel_first=True: cross_scan_fn(x, channel_first, one_by_one=True)
)
CrossScanTriton1b1 = CrossScanTriton1b1F


def getCSM(mode: int = 1) -> tuple[_Applied, _Applied]:  # noqa: N802
    """Scan and merge of the paths that ``scans`` names in :func:`cross_scan_fn`."""
    return (
        _Applied(functools.partial(cross_scan_fn, scans=mode)),
        _Applied(functools.partial(cross_merge_fn, scans=mode)),
    )
