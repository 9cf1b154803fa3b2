"""What tests and benchmarks of the operators share: oracles, random arguments, error measures.

The oracles follow the definitions position by position in float64 and share no code with any
backend. They are differentiable, which gives the oracle of every gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor

from mmvmamba_kernels.patterns import PATTERNS


def _double(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.double() for t in tensors]


def _recurrence(decay: Tensor, drive: Tensor, dim: int, state: Tensor | None = None) -> Tensor:
    """The states h_i = decay_i h_(i-1) + drive_i along a dimension, from zero if not given."""
    state = torch.zeros_like(drive.select(dim, 0)) if state is None else state
    states = []
    for a, b in zip(decay.unbind(dim), drive.unbind(dim), strict=True):
        state = a * state + b
        states.append(state)
    return torch.stack(states, dim)


def selective_scan_oracle(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    initial_state: Tensor | None = None,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`mmvmamba_kernels.selective_scan` as a loop over positions, in float64."""
    u, delta, A, B, C, D, delta_bias = _double(u, delta, A, B, C, D, delta_bias)
    (initial_state,) = _double(initial_state)
    if delta_bias is not None:
        delta = delta + delta_bias[:, None]
    if delta_softplus:
        delta = F.softplus(delta, threshold=20)
    delta = delta.repeat_interleave(u.shape[1] // delta.shape[1], 1)
    channels = u.shape[1] // B.shape[1]
    B, C = (t.repeat_interleave(channels, 1) for t in (B, C))
    decay = torch.exp(delta[..., None] * A[:, None])
    states = _recurrence(decay, (delta * u)[..., None] * B.mT, 2, initial_state)
    out = (states * C.mT).sum(-1)
    out = out if D is None else out + D[:, None] * u
    return (out, states[:, :, -1]) if return_last_state else out


def paths(pattern: str, height: int, width: int) -> list[list[list[tuple[int, int]]]]:
    """The (row, column) positions that each direction visits, one list per sequence."""
    rows = [[(i, j) for j in range(width)] for i in range(height)]
    columns = [[(i, j) for i in range(height)] for j in range(width)]
    by_row, by_column = ([list(chain.from_iterable(lines))] for lines in (rows, columns))

    def back(sequences: list[list[tuple[int, int]]]) -> list[list[tuple[int, int]]]:
        return [sequence[::-1] for sequence in sequences]

    return {
        "cross2d": [by_row, by_column, back(by_row), back(by_column)],
        "unidi": [by_row] * 4,
        "bidi": [by_row, by_row, back(by_row), back(by_row)],
        "rows": [rows, back(rows)],
        "columns": [columns, back(columns)],
    }[pattern]


def listed_paths(pattern: str, height: int, width: int) -> list[list[int]]:
    """The positions ``row * width + column`` that each direction visits, as loops over the map.

    Of the built-in patterns that are lists, but for 'hilbert'.
    """
    family = pattern.rstrip("0123456789")
    size = int(pattern[len(family) :] or 0)

    def snake(column_major: bool) -> list[tuple[int, int]]:
        places = []
        for i in range(width if column_major else height):
            line = [
                (j, i) if column_major else (i, j) for j in range((width, height)[column_major])
            ]
            places += line[::-1] if i % 2 else line
        return places

    def diagonal(side: int) -> list[tuple[int, int]]:
        places = []
        for first in range(width):
            column = first
            for i in range(height):
                places.append((i, column))
                column += side
                if column == width:
                    column = 0
                elif column < 0:
                    column = width - 1
        return places

    def window(column_major: bool) -> list[tuple[int, int]]:
        def key(place: tuple[int, int]) -> tuple[int, ...]:
            i, j = place[::-1] if column_major else place
            return i // size, j // size, i % size, j % size

        return sorted(((i, j) for i in range(height) for j in range(width)), key=key)

    def atrous(k: int) -> list[tuple[int, int]]:
        def key(place: tuple[int, int]) -> tuple[int, int]:
            return place[::-1] if k % size % 2 else place

        mine = (
            (i, j)
            for i in range(height)
            for j in range(width)
            if (i % size, j % size) == (k % size, k // size)
        )
        return sorted(mine, key=key)

    if family == "atrous":
        found = [atrous(k) for k in range(size * size)]
    else:
        one, other = {
            "snake": lambda: (snake(False), snake(True)),
            "diagonal": lambda: (diagonal(1), diagonal(-1)),
            "window": lambda: (window(False), window(True)),
        }[family]()
        found = [one, other, one[::-1], other[::-1]]
    return [[i * width + j for i, j in path] for path in found]


def selective_scan_2d_oracle(
    x: Tensor,
    proj: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    pattern: str = "cross2d",
    orders: Sequence[Sequence[Sequence[int]]] | None = None,
) -> Tensor:
    """:func:`mmvmamba_kernels.selective_scan_2d` as a loop over positions, in float64.

    ``orders`` has, in place of a pattern, the positions that each direction visits, one list per
    sequence.
    """
    x, proj, dt_weight, dt_bias, A, D = _double(x, proj, dt_weight, dt_bias, A, D)
    height, width = x.shape[1:3]
    rank, states = dt_weight.shape[2], A.shape[2]
    if orders is None and pattern in PATTERNS:
        orders = [
            [[i * width + j for i, j in sequence] for sequence in sequences]
            for sequences in paths(pattern, height, width)
        ]
    elif orders is None:
        orders = [[path] for path in listed_paths(pattern, height, width)]
    total = torch.zeros_like(x.flatten(1, 2))
    # All directions at once whose paths are equally long.
    for length in sorted({len(sequences[0]) for sequences in orders} - {0}):
        k = [k for k, sequences in enumerate(orders) if len(sequences[0]) == length]
        # (directions, sequences, positions): the places in the map, one after the other.
        places = torch.tensor([orders[i] for i in k], device=x.device)
        k = torch.tensor(k, device=x.device)[:, None, None]
        u = x.flatten(1, 2)[:, places]
        low_rank, B, C = proj.flatten(1, 2)[:, places, k].split((rank, states, states), -1)
        one = k[:, 0, 0]
        raw = torch.einsum("bkslr,kdr->bksld", low_rank, dt_weight[one])
        step = F.softplus(raw + dt_bias[one][:, None, None], threshold=20)
        decay = torch.exp(step[..., None] * A[one][:, None, None])
        h = _recurrence(decay, (step * u)[..., None] * B[..., None, :], 3)
        y = (h * C[..., None, :]).sum(-1) + D[one][:, None, None] * u
        total = total.index_add(1, places.flatten(), y.flatten(1, 3))
    return total.unflatten(1, (height, width))


def state_space_dual_oracle(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
) -> Tensor:
    """:func:`mmvmamba_kernels.state_space_dual` as a loop over positions, in float64."""
    x, dt, A, B, C, D, dt_bias = _double(x, dt, A, B, C, D, dt_bias)
    if dt_bias is not None:
        dt = dt + dt_bias[:, None]
    steps = F.softplus(dt, threshold=20)
    decay = torch.exp(steps * A[:, None])[..., None, None]
    drive = (steps[..., None] * x)[..., None] * B[:, :, :, None, None]
    out = (_recurrence(decay, drive, 2) * C[:, :, :, None, None]).sum(-1)
    return out if D is None else out + D[:, None] * x


def add_layer_norm_oracle(
    x: Tensor,
    branch: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """:func:`mmvmamba_kernels.add_layer_norm` by its definition, in float64."""
    x, branch, weight, bias, scale = _double(x, branch, weight, bias, scale)
    if scale is not None:
        branch = branch * scale.view(-1, *(1,) * (x.ndim - 1))
    total = x + branch
    centred = total - total.mean(-1, keepdim=True)
    variance = (centred * centred).mean(-1, keepdim=True)
    return total, centred / torch.sqrt(variance + eps) * weight + bias


def selective_scan_2d_norm_oracle(
    norm_weight: Tensor, norm_bias: Tensor, pattern: str = "cross2d", **scan: Tensor
) -> Tensor:
    """``selective_scan_2d_norm`` in float64, as its two parts one after the other."""
    y = selective_scan_2d_oracle(**scan, pattern=pattern)
    return add_layer_norm_oracle(y, torch.zeros_like(y), norm_weight, norm_bias)[1]


def depthwise_conv_oracle(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, act: str = "silu"
) -> Tensor:
    """:func:`mmvmamba_kernels.depthwise_conv` as a sum of nine shifted maps, in float64."""
    x, weight, bias = _double(x, weight, bias)
    _, height, width, _ = x.shape
    around = F.pad(x, (0, 0, 1, 1, 1, 1))
    z = 0 if bias is None else bias
    for p in range(3):
        for q in range(3):
            z = z + weight[:, 0, p, q] * around[:, p : p + height, q : q + width]
    return {
        "silu": lambda: z / (1 + torch.exp(-z)),
        "gelu": lambda: z * (1 + torch.erf(z / 2**0.5)) / 2,
        "relu": lambda: torch.where(z > 0, z, 0),
        "none": lambda: z,
    }[act]()


def _generator(seed: int) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)


def _cast(
    tensors: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device | str
) -> dict[str, Tensor]:
    return {name: t.to(device, dtype).requires_grad_() for name, t in tensors.items()}


def selective_scan_arguments(
    batch: int,
    groups: int,
    channels: int,
    states: int,
    length: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> dict[str, Tensor]:
    """Random tensor arguments of ``selective_scan``, with softplus; leaves that need gradients.

    ``channels`` is of one group.
    """
    normal = _generator(seed)
    total = groups * channels
    tensors = {
        "u": normal(batch, total, length),
        "delta": normal(batch, total, length),
        "A": -normal(total, states).exp(),
        "B": normal(batch, groups, states, length),
        "C": normal(batch, groups, states, length),
        "D": normal(total),
        "delta_bias": normal(total) - 1,
    }
    return _cast(tensors, dtype, device)


def selective_scan_2d_arguments(
    batch: int,
    height: int,
    width: int,
    channels: int,
    rank: int,
    states: int,
    directions: int = 4,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> dict[str, Tensor]:
    """Random tensor arguments of ``selective_scan_2d``; leaves that need gradients."""
    normal = _generator(seed)
    tensors = {
        "x": normal(batch, height, width, channels),
        "proj": normal(batch, height, width, directions, rank + 2 * states),
        "dt_weight": normal(directions, channels, rank) / rank**0.5,
        "dt_bias": normal(directions, channels) - 1,
        "A": -normal(directions, channels, states).exp(),
        "D": normal(directions, channels),
    }
    return _cast(tensors, dtype, device)


def selective_scan_2d_norm_arguments(*sizes: int, **options) -> dict[str, Tensor]:
    """As ``selective_scan_2d_arguments``, and the parameters of the normalisation.

    These are float32 where the map has fewer bits.
    """
    tensors = selective_scan_2d_arguments(*sizes, **options)
    x = tensors["x"]
    normal = _generator(3)
    parameters = {name: normal(x.shape[3]) for name in ("norm_weight", "norm_bias")}
    dtype = torch.promote_types(x.dtype, torch.float32)
    return tensors | _cast(parameters, dtype, x.device)


def state_space_dual_arguments(
    batch: int,
    directions: int,
    length: int,
    heads: int,
    width: int,
    states: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> dict[str, Tensor]:
    """Random tensor arguments of ``state_space_dual``; leaves that need gradients."""
    normal = _generator(seed)
    tensors = {
        "x": normal(batch, directions, length, heads, width),
        "dt": normal(batch, directions, length, heads),
        "A": -normal(directions, heads).exp(),
        "B": normal(batch, directions, length, states),
        "C": normal(batch, directions, length, states),
        "D": normal(directions, heads, width),
        "dt_bias": normal(directions, heads) - 1,
    }
    return _cast(tensors, dtype, device)


def depthwise_conv_arguments(
    batch: int,
    height: int,
    width: int,
    channels: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> dict[str, Tensor]:
    """Random tensor arguments of ``depthwise_conv``; leaves that need gradients."""
    normal = _generator(seed)
    tensors = {
        "x": normal(batch, height, width, channels),
        "weight": normal(channels, 1, 3, 3) / 3,
        "bias": normal(channels),
    }
    return _cast(tensors, dtype, device)


def add_layer_norm_arguments(
    batch: int,
    height: int,
    width: int,
    channels: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> dict[str, Tensor]:
    """Random tensor arguments of ``add_layer_norm``; leaves that need gradients."""
    normal = _generator(seed)
    tensors = {
        "x": normal(batch, height, width, channels),
        "branch": normal(batch, height, width, channels),
        "weight": normal(channels),
        "bias": normal(channels),
    }
    return _cast(tensors, dtype, device)


ARGUMENTS = {
    "selective_scan_2d": selective_scan_2d_arguments,
    "selective_scan_2d_norm": selective_scan_2d_norm_arguments,
    "selective_scan": selective_scan_arguments,
    "state_space_dual": state_space_dual_arguments,
    "depthwise_conv": depthwise_conv_arguments,
    "add_layer_norm": add_layer_norm_arguments,
}
"""Random arguments by operator."""

ORACLES = {
    "selective_scan_2d": selective_scan_2d_oracle,
    "selective_scan_2d_norm": selective_scan_2d_norm_oracle,
    "selective_scan": selective_scan_oracle,
    "state_space_dual": state_space_dual_oracle,
    "depthwise_conv": depthwise_conv_oracle,
    "add_layer_norm": lambda **tensors: add_layer_norm_oracle(**tensors)[1],
}
"""The definition by operator, from its arguments to its output."""


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest absolute difference over the largest expected value; infinite if not finite."""
    actual, expected = actual.double(), expected.double()
    if not actual.numel():
        return 0.0
    if not actual.isfinite().all():
        return float("inf")
    difference = (actual - expected).abs().max()
    return (difference / expected.abs().max().clamp_min(1e-300)).item()


def output_and_gradients(
    function: Callable[..., Tensor], arguments: Mapping[str, Tensor], seed: int = 1
) -> dict[str, Tensor]:
    """The output, as 'out', and the gradient of every argument for one random output gradient.

    The output gradient is rounded to bfloat16, so that it is the same for every dtype.
    """
    out = function(**arguments)
    grad = _generator(seed)(*out.shape).bfloat16().to(out.device, out.dtype)
    gradients = torch.autograd.grad(out, list(arguments.values()), grad)
    return {"out": out.detach(), **dict(zip(arguments, gradients, strict=True))}


def errors(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, float]:
    """:func:`relative_error` by name."""
    return {name: relative_error(actual[name], expected[name]) for name in expected}
