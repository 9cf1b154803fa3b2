"""The depth-wise convolution in Triton, forward and backward.

The backward pass is one kernel, which computes again what the activation took. It leaves its
programs' sums for weight and bias, which are added in a fixed order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import triton.language as tl
from torch import Tensor

from mmvmamba_kernels.arguments import ceil_div, state_dtype
from mmvmamba_kernels.backends.triton.depthwise_conv_kernels import (
    depthwise_conv_bwd_kernel,
    depthwise_conv_fwd_kernel,
)
from mmvmamba_kernels.backends.triton.support import (
    interpreting,
    lanes,
    multiprocessors,
    on_device,
)
from mmvmamba_kernels.depthwise_conv.arguments import Arguments

_WARPS = 16
"""Programs, of one warp, that a multiprocessor wants; with fewer, maps are cut into fewer rows."""

_SHORTEST = 2
"""Rows of the shortest programs, which read the two around them as well."""

_LONGEST = 16
"""Rows at which their overlap costs little: shorter programs share out the work more evenly."""

_WARPS_BACKWARD = {2: 8, 1: 12}
"""Programs that run at once on a multiprocessor, as many on each of its four schedulers, by the
tiles of a program. Backwards there are no more: four rows overlap, and each leaves partial sums."""

_LONGEST_BACKWARD = 256
"""Rows of the longest programs backwards, where strips and channels alone give more of them."""

_COLUMNS = 7
"""Columns of a program, in all maps, so that one kernel serves them.

Seven divides the maps of a 224 x 224 image.
"""

_COLUMNS_TWICE = 4
"""The same where a lane has two channels, or sums of twice the size."""


@dataclass(frozen=True)
class _Tiling:
    """How a map is cut into programs."""

    columns: int
    strips: int
    rows: int
    chunks: int
    block: int
    programs: int
    """Of one channel block; backwards, one may be two of these, which go from map to map."""
    blocks: int

    def sizes(self, shape: torch.Size) -> tuple[int, ...]:
        """Arguments of a kernel."""
        return shape[1], shape[2], self.strips, self.chunks, self.rows

    @property
    def grid(self) -> tuple[int]:
        return (self.programs * self.blocks,)


def tiling(shape: torch.Size, columns: int, block: int, longest: int, processors: int) -> _Tiling:
    """Cut maps into strips of columns and chunks of rows.

    Args:
        shape: (B, H, W, C).
        columns: Of a strip.
        block: Channels of a program.
        longest: Most rows of a program.
        processors: Multiprocessors of the GPU.
    """
    batch, height, width, channels = shape
    strips, blocks = ceil_div(width, columns), ceil_div(channels, block)
    wanted = ceil_div(processors * _WARPS, max(batch * strips * blocks, 1))
    chunks = max(ceil_div(height, longest), min(wanted, ceil_div(height, _SHORTEST)))
    rows = ceil_div(height, chunks)
    chunks = ceil_div(height, rows)
    return _Tiling(columns, strips, rows, chunks, block, batch * strips * chunks, blocks)


def stacked_tiling(
    shape: torch.Size, columns: int, block: int, together: int, processors: int
) -> _Tiling:
    """Cut maps that are one above the other, with a row below each, into strips and chunks.

    Args:
        shape: (B, H, W, C).
        columns: Of a strip.
        block: Channels of a program.
        together: Tiles of a program.
        processors: Multiprocessors of the GPU.
    """
    batch, height, width, channels = shape
    strips, blocks = ceil_div(width, columns), ceil_div(channels, block)
    total = batch * (height + 1)
    wanted = processors * _WARPS_BACKWARD[together] * together // max(strips * blocks, 1)
    rows = max(min(ceil_div(total, max(wanted, 1)), _LONGEST_BACKWARD), _SHORTEST)
    chunks = ceil_div(total, rows)
    return _Tiling(columns, strips, rows, chunks, block, strips * chunks, blocks)


def _positions(x: Tensor) -> tuple[Tensor, int]:
    """The map with channels next to each other, and elements from a position to the next.

    A slice of the channels of a wider map, as a gated mixer takes, is read where it is.
    """
    _, height, width, _ = x.shape
    stride = x.stride(2) if width > 1 else x.stride(1) if height > 1 else x.stride(0)
    expected = (height * width * stride, width * stride, stride, 1)
    apart = zip(x.shape, x.stride(), expected, strict=True)
    if stride >= x.shape[3] and all(size == 1 or a == b for size, a, b in apart):
        return x, stride
    return x.contiguous(), x.shape[3]


def _taps(weight: Tensor) -> Tensor:
    """The filters as (9, C), so that neighbouring channels are neighbours in memory."""
    return weight.flatten(1).t().contiguous()


def _tiling(x: Tensor, dtype: torch.dtype) -> _Tiling:
    """How the forward pass cuts maps; two channels a lane where that leaves no lane idle."""
    double, width = dtype == torch.float64, lanes(x.device)
    two = not (double or x.shape[3] % (2 * width))
    return tiling(
        x.shape,
        _COLUMNS_TWICE if double or two else _COLUMNS,
        2 * width if two else width,
        _LONGEST,
        multiprocessors(x.device),
    )


def _constants(x: Tensor, tiles: _Tiling, dtype: torch.dtype, act: str) -> Mapping[str, object]:
    nvidia = x.is_cuda and torch.version.hip is None and not interpreting()
    return {
        "P": tiles.columns,
        "BLOCK_C": tiles.block,
        "ACT": act,
        "ACC": tl.float64 if dtype == torch.float64 else tl.float32,
        "FAST": nvidia and dtype == torch.float32,
        "num_warps": 1,
    }


def carries_shape(_: Arguments) -> tuple[int, ...]:
    """Nothing is saved beside the arguments."""
    return (0,)


def forward(arguments: Arguments, save_carries: bool) -> tuple[Tensor, Tensor]:
    """See :func:`mmvmamba_kernels.depthwise_conv`.

    Returns:
        The output in ``x``'s dtype, and a tensor without elements.
    """
    del save_carries
    x, weight, bias, act = arguments
    dtype = state_dtype(*arguments)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if out.numel():
        x, stride = _positions(x)
        channels, tiles = x.shape[3], _tiling(x, dtype)
        with on_device(x):
            depthwise_conv_fwd_kernel[tiles.grid](
                x,
                _taps(weight),
                bias if bias is None else bias.contiguous(),
                out,
                *tiles.sizes(x.shape),
                channels,
                stride,
                CONSTANT_C=channels if stride == channels and tiles.block == lanes(x.device) else 0,
                WHOLE=channels % tiles.block == 0,
                HAS_BIAS=bias is not None,
                **_constants(x, tiles, dtype, act),
            )
    return out, x.new_empty(0, dtype=dtype)


def backward(
    grad_out: Tensor, carries: Tensor, arguments: Arguments
) -> tuple[Tensor, Tensor, Tensor | None]:
    """See :func:`mmvmamba_kernels.depthwise_conv.reference.backward`."""
    x, weight, bias, act = arguments
    dtype = carries.dtype
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    x, stride = _positions(x)
    # A lane has two channels of 16 bits in a word, and a program two tiles for it.
    together = 2 if x.element_size() == 2 and dtype == torch.float32 else 1
    batch, height, width, channels = x.shape
    columns = _COLUMNS_TWICE if dtype == torch.float64 else _COLUMNS
    processors = multiprocessors(x.device)
    tiles = stacked_tiling(x.shape, columns, lanes(x.device), together, processors)
    partial = x.new_empty((tiles.programs, 10, channels), dtype=dtype)
    if x.numel():
        with on_device(x):
            depthwise_conv_bwd_kernel[(ceil_div(tiles.programs, together) * tiles.blocks,)](
                x,
                _taps(weight),
                bias if bias is None else bias.contiguous(),
                grad_out.contiguous(),
                grad_x,
                partial,
                height,
                width,
                batch * (height + 1),
                tiles.strips,
                tiles.rows,
                tiles.programs,
                C=channels,
                STRIDE=stride,
                TILES=together,
                HAS_BIAS=bias is not None,
                **_constants(x, tiles, dtype, act),
            )
    sums = partial.sum(0)
    grad_weight = sums[:9].t().reshape(weight.shape).to(weight.dtype)
    return (
        grad_x,
        grad_weight.contiguous(),
        # A copy: compilers take an operator's results to be aligned, as a view need not be.
        None if bias is None else sums[9].to(bias.dtype, copy=True),
    )
