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
_PATTERN = "cross2d"


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


def _product_modules():
    from mmvmamba_kernels.backends.triton import scan
    from mmvmamba_kernels.depthwise_conv import triton_impl as convolution
    from mmvmamba_kernels.layer_norm import triton_impl as norm

    return scan, norm, convolution


def core_launches(shape: tuple[int, ...], states: int = 1) -> dict[str, list[Launch]]:
    """What ``selective_scan_2d_norm`` launches, by phase."""
    with recording(*_product_modules()) as log:
        return _core_launches(log, shape, states)


def _core_launches(log: list[Launch], shape: tuple[int, ...], states: int):
    from mmvmamba_kernels.layer_norm import triton_impl as norm
    from mmvmamba_kernels.selective_scan_2d import triton_impl as scan
    from mmvmamba_kernels.selective_scan_2d.arguments import Arguments

    arguments = Arguments(**core_arguments(shape, states), pattern=_PATTERN)
    weight = meta(shape[3], dtype=torch.float32)
    low = torch.bfloat16
    launches = {}
    for train in (False, True):
        log.clear()
        parts, carries = scan.forward_parts(arguments, save_carries=train)
        total, out, statistics = norm.normalise_sum(parts, weight, weight, 1e-5, low, low, train)
        launches[PHASES[train]] = list(log)
    log.clear()
    grad, *_ = norm.backward(None, out, total, statistics, None, weight, weight, None)
    scan.backward(grad, carries, arguments)
    launches[PHASES[2]] = list(log)
    log.clear()
    return launches


def model_launches(
    batch: int, side: int, train: bool, stream: torch.dtype = torch.bfloat16
) -> list[Launch]:
    """One launch of every kind in a step of VMamba-T on square images.

    Args:
        batch: Images.
        side: Of an image, in pixels.
        train: Forward and backward, and not only forward.
        stream: Dtype of the residual stream.
    """
    low, wide = torch.bfloat16, torch.float32
    with recording(*_product_modules()) as log:
        from mmvmamba_kernels.depthwise_conv import triton_impl as convolution
        from mmvmamba_kernels.depthwise_conv.arguments import Arguments
        from mmvmamba_kernels.layer_norm import triton_impl as norm

        launches: list[Launch] = []
        size = side // 4
        for stage, channels in enumerate((96, 192, 384, 768)):
            weight = meta(channels, dtype=wide)
            if stage:
                size = (size + 1) // 2
            else:
                half = meta(channels // 2, dtype=wide)
                norm.forward(
                    meta(batch, 2 * size, 2 * size, channels // 2),
                    None,
                    None,
                    half,
                    half,
                    1e-5,
                    low,
                )
            shape = (batch, size, size, channels)
            x, branch = meta(*shape, dtype=stream), meta(*shape)
            norm.forward(branch, None, None, weight, weight, 1e-5, stream)
            _, out, statistics = norm.forward(x, None, None, weight, weight, 1e-5, low)
            if train:
                norm.backward(None, out, x, statistics, None, weight, weight, None)
            taps = meta(channels, 1, 3, 3)
            filters = Arguments(branch, taps, None, "silu")
            y, saved = convolution.forward(filters, train)
            if train:
                convolution.backward(y, saved, filters)
            for scale in (None, meta(batch, dtype=wide)) if train else (None,):
                total, _, statistics = norm.forward(x, branch, scale, weight, weight, 1e-5, low)
                if train:
                    to = None if scale is None and stream == low else low
                    norm.backward(total, total, total, statistics, scale, weight, weight, to)
            launches += log
            core = _core_launches(log, shape, states=1)
            for phase in PHASES[1:] if train else PHASES[:1]:
                launches += core[phase]
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
