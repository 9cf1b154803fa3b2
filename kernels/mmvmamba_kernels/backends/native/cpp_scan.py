"""What the C++ implementations of the scans share: the library's arguments, buffers and calls."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from ctypes import c_bool, c_int, c_int64, c_void_p
from typing import NamedTuple

import torch
from torch import Tensor

from mmvmamba_kernels.arguments import ceil_div
from mmvmamba_kernels.backends.native import extension
from mmvmamba_kernels.patterns import Path

# The library's compile-time sizes: positions of a tile, channels and ranks computed together.
_TILE = 64
_LANES = 16
_RANK_LANES = 8

# Images in a wave: bounds the memory of partial gradients.
_WAVE_IMAGES = 16
# Tasks that a wave is divided into if there are enough channels.
_WAVE_TASKS = 12

# PyTorch's own choice, which ATEN_CPU_CAPABILITY lowers; other machines have one set alone.
_INSTRUCTION_SETS = {"AVX2": 1, "AVX512": 2}

Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


class _Map(ctypes.Structure):
    _fields_ = [("data", c_void_p), ("image_stride", c_int64), ("position_stride", c_int64)]


class _Path(ctypes.Structure):
    _fields_ = [
        ("sequences", c_int64),
        ("length", c_int64),
        ("sequence_stride", c_int64),
        ("inner", c_int64),
        ("inner_stride", c_int64),
        ("outer_stride", c_int64),
        ("reverse", c_bool),
        ("list", c_void_p),
    ]


class _Params(ctypes.Structure):
    """`ScanParams` of scan_params.h, where its fields are explained."""

    _fields_ = [
        ("channels", c_int64),
        ("padded_channels", c_int64),
        ("positions", c_int64),
        ("states", c_int),
        ("rank", c_int),
        ("directions", c_int),
        ("softplus", c_bool),
        ("paths", c_void_p),
        ("x", _Map),
        ("delta", _Map),
        ("out", _Map),
        ("sum_direction_stride", c_int64),
        ("coefficients", c_void_p),
        ("coefficients_image_stride", c_int64),
        ("coefficients_position_stride", c_int64),
        ("coefficients_direction_stride", c_int64),
        ("weight", c_void_p),
        ("bias", c_void_p),
        ("A", c_void_p),
        ("skip", c_void_p),
        ("carries", c_void_p),
        ("carries_direction_stride", c_int64),
        ("grad_out", _Map),
        ("grad_x", _Map),
        ("grad_delta", _Map),
        ("weight_by_channel", c_void_p),
        ("padded_rank", c_int64),
        ("grad_parameters", c_void_p),
        ("grad_parameters_slot_stride", c_int64),
        ("partials", c_void_p),
        ("partials_group_stride", c_int64),
        ("partials_slot_stride", c_int64),
        ("grad_coefficients", c_void_p),
    ]


class Scan(NamedTuple):
    """One scan over maps; all tensors are float32, or all float64."""

    x: Tensor
    """(B, P, D), contiguous channels."""
    delta: Tensor | None
    """(B, P, D), contiguous channels."""
    coefficients: Tensor
    """(B, P, K, R + 2N), contiguous rows."""
    weight: Tensor | None
    """(K, D, R)."""
    bias: Tensor | None
    """(K, D)."""
    A: Tensor
    """(K, D, N)."""
    D: Tensor | None
    """(K, D)."""
    height: int
    width: int
    paths: tuple[Path, ...]
    table: Tensor | None
    """(K, 1 + L), int32: the paths as lists, each behind its length."""
    softplus: bool


def carries_shape(
    batch: int, height: int, width: int, channels: int, states: int, paths: tuple[Path, ...]
) -> tuple[int, ...]:
    """Shape of the states that the forward pass saves: those that enter the tiles of the paths."""
    lines, length = paths[0].sequences(height, width)
    blocks = ceil_div(channels, _LANES)
    return len(paths), batch * lines, ceil_div(length, _TILE), states, blocks * _LANES


def path_codes(paths: tuple[Path, ...]) -> list[int]:
    """The paths as the libraries take them: bits for column-major, reverse and per line."""
    return [p.column_major + 2 * p.reverse + 4 * p.per_line for p in paths]


class Forward:
    """The forward pass of scans that differ in the values of ``x`` and coefficients alone.

    Parameters are laid out once: the library takes them with channels last, and padded.
    """

    def __init__(self, scan: Scan):
        self._params, self._kept = _describe(scan)
        self._batch = len(scan.x)
        self._tasks = self._batch * self._params.padded_channels // _LANES
        self._double = scan.x.dtype == torch.float64

    def __call__(
        self,
        x: Tensor,
        coefficients: Tensor,
        out: Tensor,
        carries: Tensor | None = None,
    ) -> None:
        """Writes the output (B, P, D), and into `carries` the states that enter the tiles."""
        # A copy, since other threads may be at work with this very scan.
        params = _Params.from_buffer_copy(self._params)
        threads = torch.get_num_threads()
        parts = _parts(params, out, self._tasks, threads)
        params.x.data, params.coefficients = x.data_ptr(), coefficients.data_ptr()
        params.out = _map(parts[0])
        if carries is not None:
            _save_carries(params, carries)
        how = _how(params, self._double, threads)
        extension.library().mmvmamba_scan_forward(*how, c_int64(self._batch))
        _sum_into(out, parts)


def backward(
    scan: Scan, grad_out: Tensor, carries: Tensor, grad_x: Tensor, grad_delta: Tensor | None
) -> Gradients:
    """Writes the maps' gradients (B, P, D).

    Returns:
        The gradients of coefficients, weight, bias and A, and that of each direction's D, (D,).
    """
    params, _kept = _describe(scan)
    _save_carries(params, carries)
    batch, positions, channels = scan.x.shape
    directions, states = len(scan.A), scan.A.shape[2]
    rank, padded, padded_rank = params.rank, params.padded_channels, params.padded_rank
    by_channel = _padded(scan.weight, (directions, padded, padded_rank), scan.x)
    blocks, rows = padded // _LANES, rank + 1 + states
    slots = min(max(batch, 1), _WAVE_IMAGES)
    groups = min(max(_WAVE_TASKS // slots, 1), blocks)
    parameters = scan.x.new_zeros((slots, directions * rows + 1, padded))
    shape = groups, slots, positions, directions, padded_rank + 2 * states
    # Listed paths may leave positions out.
    partials = scan.x.new_empty(shape) if scan.table is None else scan.x.new_zeros(shape)
    grad_coefficients = torch.empty_like(scan.coefficients, memory_format=torch.contiguous_format)
    threads = torch.get_num_threads()
    grads_x = _parts(params, grad_x, slots * groups, threads)
    params.grad_out, params.grad_x = _map(grad_out), _map(grads_x[0])
    if grad_delta is not None:
        params.grad_delta = _map(grad_delta)
    params.weight_by_channel = by_channel.data_ptr()
    params.grad_parameters = parameters.data_ptr()
    params.grad_parameters_slot_stride = parameters.stride(0)
    params.partials = partials.data_ptr()
    params.partials_group_stride, params.partials_slot_stride = partials.stride()[:2]
    params.grad_coefficients = grad_coefficients.data_ptr()

    for first in range(0, batch, slots):
        images = min(slots, batch - first)
        how = _how(params, scan.x.dtype == torch.float64, threads)
        # Plain integers would go as C's int.
        numbers = map(c_int64, (first, images, groups))
        extension.library().mmvmamba_scan_backward(*how, *numbers)

    _sum_into(grad_x, grads_x)
    total = _sum_in_place(parameters)[:, :channels]
    of_direction = total[:-1].unflatten(0, (directions, rows))
    return (
        grad_coefficients,
        of_direction[:, :rank].transpose(1, 2),
        of_direction[:, rank],
        of_direction[:, rank + 1 :].transpose(1, 2),
        total[-1],
    )


def cast_like(gradient: Tensor, argument: Tensor | None) -> Tensor | None:
    """A gradient as a tensor of its own, in its argument's dtype; None for an absent argument."""
    if argument is None:
        return None
    return gradient.to(argument.dtype, copy=True, memory_format=torch.contiguous_format)


def _describe(scan: Scan) -> tuple[_Params, tuple]:
    """The library's parameters, and what they point to and the caller has to keep."""
    x, coefficients = scan.x, scan.coefficients
    directions, channels, states = scan.A.shape
    rank = 0 if scan.weight is None else scan.weight.shape[2]
    padded = ceil_div(channels, _LANES) * _LANES
    by_rank = None if scan.weight is None else scan.weight.transpose(1, 2)
    total = None if scan.D is None else scan.D.sum(0)
    weight = _padded(by_rank, (directions, rank, padded), x)
    bias = _padded(scan.bias, (directions, padded), x)
    A = _padded(scan.A.transpose(1, 2), (directions, states, padded), x)
    skip = _padded(total, (padded,), x)
    paths = _paths(scan)
    params = _Params(
        channels=channels,
        padded_channels=padded,
        positions=scan.height * scan.width,
        states=states,
        rank=rank,
        directions=directions,
        softplus=scan.softplus,
        paths=ctypes.addressof(paths),
        x=_map(x),
        coefficients=coefficients.data_ptr(),
        coefficients_image_stride=coefficients.stride(0),
        coefficients_position_stride=coefficients.stride(1),
        coefficients_direction_stride=coefficients.stride(2),
        weight=weight.data_ptr(),
        bias=bias.data_ptr(),
        A=A.data_ptr(),
        skip=skip.data_ptr(),
        padded_rank=ceil_div(rank, _RANK_LANES) * _RANK_LANES,
    )
    if scan.delta is not None:
        params.delta = _map(scan.delta)
    return params, (weight, bias, A, skip, paths, scan.table)


def _save_carries(params: _Params, carries: Tensor) -> None:
    params.carries = carries.data_ptr()
    params.carries_direction_stride = carries.numel() // params.directions


def _how(params: _Params, double: bool, threads: int) -> tuple:
    """What both of the library's functions take first."""
    set_number = _INSTRUCTION_SETS.get(torch.backends.cpu.get_cpu_capability(), 0)
    return ctypes.byref(params), double, set_number, threads


def _map(tensor: Tensor) -> _Map:
    """A map (B, P, D), whose channels the library takes for contiguous."""
    if tensor.numel() > 0 and tensor.shape[2] > 1 and tensor.stride(2) != 1:
        raise AssertionError(f"channels are not contiguous: strides {tensor.stride()}")
    return _Map(tensor.data_ptr(), *tensor.stride()[:2])


def _padded(tensor: Tensor | None, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """A contiguous tensor of this shape, with zeros behind the tensor's own rows and columns."""
    if tensor is not None and tensor.shape == shape:
        return tensor.contiguous()
    result = like.new_zeros(shape)
    if tensor is not None:
        result[tuple(slice(size) for size in tensor.shape)] = tensor
    return result


def _sum_in_place(parts: Tensor) -> Tensor:
    """The sum over the first dimension, from the first part to the last, in the first's place."""
    total = parts[0]
    for part in parts[1:]:
        total += part
    return total


def _parts(params: _Params, out: Tensor, tasks: int, threads: int) -> Tensor:
    """The maps that directions are summed into: `out`, or one for each where threads would be idle.

    Those are added in the order of the directions, so that bits do not depend on the number of
    threads.
    """
    if params.directions == 1 or tasks >= 2 * threads:
        return out[None]
    parts = out.new_empty((params.directions, *out.shape))
    params.sum_direction_stride = parts.stride(0)
    return parts


def _sum_into(out: Tensor, parts: Tensor) -> None:
    """Adds the directions' maps up, from the first to the last, if they are others than `out`."""
    if len(parts) > 1:
        torch.add(parts[0], parts[1], out=out)
        for part in parts[2:]:
            out.add_(part)


def _paths(scan: Scan) -> ctypes.Array:
    if scan.table is None:
        return _computed_paths(scan.paths, scan.height, scan.width)
    lengths, row = scan.table[:, 0].tolist(), scan.table.stride(0) * scan.table.element_size()
    first = scan.table.data_ptr() + scan.table.element_size()
    return _array(
        [
            _Path(sequences=1, length=length, list=first + k * row)
            for k, length in enumerate(lengths)
        ]
    )


@functools.lru_cache(256)
def _computed_paths(paths: tuple[Path, ...], height: int, width: int) -> ctypes.Array:
    computed = _array([_Path() for _ in paths])
    for code, path in zip(path_codes(paths), computed, strict=True):
        numbers = map(c_int64, (code, height, width))
        extension.library().mmvmamba_make_path(*numbers, ctypes.byref(path))
    return computed


def _array(paths: Sequence[_Path]) -> ctypes.Array:
    return (_Path * len(paths))(*paths)
