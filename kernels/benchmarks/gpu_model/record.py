"""The launches of the product's cores, of whole models and of the sketches that were measured."""

from __future__ import annotations

from typing import NamedTuple

import torch

from gpu_model.harness import Launch, meta, recording
from gpu_model.sketches import serial, tiles

SHAPES = (
    (128, 56, 56, 96),
    (128, 28, 28, 192),
    (128, 14, 14, 384),
    (128, 7, 7, 768),
    (2, 200, 320, 96),
    (2, 100, 160, 192),
)
"""Batch, height, width and channels at which the official implementation was measured."""

PHASES = ("inference forward", "training forward", "training backward")

_DIRECTIONS = 4
PATTERN = "cross2d"


def parse_shape(text: str) -> tuple[int, ...]:
    """B,H,W,D."""
    shape = tuple(int(number) for number in text.split(","))
    if len(shape) != 4:
        raise ValueError(f"a shape is B,H,W,D, got {text}")
    return shape


def core_arguments(shape: tuple[int, ...], states: int) -> dict[str, torch.Tensor]:
    """What ``selective_scan_2d`` takes in a bfloat16 model."""
    batch, height, width, channels = shape
    rank = -(-channels // 16)
    wide = torch.float32
    return {
        "x": meta(*shape),
        "proj": meta(batch, height, width, _DIRECTIONS, rank + 2 * states),
        "dt_weight": meta(_DIRECTIONS, channels, rank),
        "dt_bias": meta(_DIRECTIONS, channels, dtype=wide),
        "A": meta(_DIRECTIONS, channels, states, dtype=wide),
        "D": meta(_DIRECTIONS, channels, dtype=wide),
    }


def core_launches(
    shape: tuple[int, ...], states: int = 1, pattern: str = PATTERN
) -> dict[str, list[Launch]]:
    """What ``selective_scan_2d_norm`` launches, by phase; ``pattern`` has four directions."""
    from mmvmamba_kernels.backends.triton import low_rank
    from mmvmamba_kernels.backends.triton import scan as walks
    from mmvmamba_kernels.layer_norm import triton_impl as norm
    from mmvmamba_kernels.selective_scan_2d import triton_impl as scan
    from mmvmamba_kernels.selective_scan_2d.arguments import Arguments

    arguments = Arguments(**core_arguments(shape, states), pattern=pattern)
    weight = meta(shape[3], dtype=torch.float32)
    low = torch.bfloat16
    launches = {}
    with recording(walks, norm, low_rank) as log:
        for train in (False, True):
            parts, carries = scan.forward_parts(arguments, save_carries=train)
            total, out, statistics = norm.normalise_sum(
                parts, weight, weight, 1e-5, low, low, train
            )
            launches[PHASES[train]] = list(log)
            log.clear()
        grad, *_ = norm.backward(None, out, total, statistics, None, weight, weight, None)
        scan.backward(grad, carries, arguments)
        launches[PHASES[2]] = list(log)
    return launches


class SketchSetting(NamedTuple):
    """With which the serial sketch was measured at a shape, and what was measured."""

    mode: str
    chunk: int
    block: int
    unroll: int
    scan_ms: float
    """Its scans alone: measured at the first shape; else its kernels less norm, product, carry."""


SERIAL = dict(
    zip(
        SHAPES,
        (
            SketchSetting("chunk", 64, 128, 4, 0.83),
            SketchSetting("seq", 64, 64, 4, 0.445),
            SketchSetting("seq", 64, 64, 2, 0.205),
            SketchSetting("seq", 64, 64, 2, 0.155),
            SketchSetting("chunk", 64, 128, 8, 0.30),
            SketchSetting("chunk", 64, 64, 4, 0.15),
        ),
        strict=True,
    )
)

TILES_MS = dict(zip(SHAPES, (1.85, 1.07, 0.76, 0.48, 0.75, 0.40), strict=True))
"""The whole core of the tiles sketch, the best of its block sizes."""

TILES_SETTINGS = ((64, 32, 4), (32, 32, 2))
"""Positions, channels and warps of a tile."""


def _sketch_arguments(shape: tuple[int, ...], rank_first: bool) -> tuple[torch.Tensor, ...]:
    batch, height, width, channels = shape
    rank = -(-channels // 16)
    wide = torch.float32
    weight = (rank, channels) if rank_first else (channels, rank)
    return (
        meta(batch, height * width, channels),
        meta(_DIRECTIONS * (rank + 2), channels),
        meta(_DIRECTIONS, *weight, dtype=wide),
        *(meta(_DIRECTIONS, channels, dtype=wide) for _ in range(3)),
        *(meta(channels, dtype=wide) for _ in range(2)),
    )


def serial_launches(shape: tuple[int, ...]) -> list[Launch]:
    """What the serial sketch launches with its best setting."""
    setting = SERIAL[shape]
    with recording(serial) as log:
        serial.core(
            *_sketch_arguments(shape, rank_first=True),
            *shape[1:3],
            mode=setting.mode,
            T=setting.chunk,
            BD=setting.block,
            U=setting.unroll,
        )
    return log


def tiles_launches(shape: tuple[int, ...], chunk: int, block: int, warps: int) -> list[Launch]:
    """What the tiles sketch launches."""
    with recording(tiles) as log:
        arguments = _sketch_arguments(shape, rank_first=False)
        tiles.core(*arguments, *shape[1:3], T=chunk, BD=block, nw=warps)
    return log
