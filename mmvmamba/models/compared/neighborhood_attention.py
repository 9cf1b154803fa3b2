"""Neighbourhood attention in two dimensions, an operator for every device.

Each position attends to the K x K positions around it; at a border the window is moved, not cut, so
that every position has K^2 neighbours ("Neighborhood Attention Transformer", arXiv 2204.07143,
section 3.1). The operator takes tiles of queries, each with the keys that its windows can reach, as
matrix products under a mask. Its FLOPs are those of the K^2 neighbours, as the paper counts them.
"""

from functools import cache
from inspect import signature
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

_OP = "mmvmamba::neighborhood_attention_2d"


def neighborhood_attention_2d(q: Tensor, k: Tensor, v: Tensor, rpb: Tensor) -> Tensor:
    """Attention of every position to its K x K neighbours.

    Differentiable once in every argument. On a GPU the package natten computes it, where one is
    installed that has relative position biases (0.17; they were dropped in 0.20).

    Args:
        q: Queries, already scaled, (B, H, W, heads, channels).
        k: Keys, of the same shape.
        v: Values, of the same shape.
        rpb: Relative position biases, (heads, 2 K - 1, 2 K - 1); their middle is the query's own
            position.

    Returns:
        (B, H, W, heads, channels), in the dtype of `q`.

    Raises:
        ValueError: If the map is smaller than the window, or K is even.
    """
    kernel = (rpb.shape[-1] + 1) // 2
    if kernel % 2 == 0 or min(q.shape[1:3]) < kernel:
        raise ValueError(
            f"windows of {kernel} x {kernel} positions need an odd side and a map of at least "
            f"their size, got one of {q.shape[1]} x {q.shape[2]}: pad it."
        )
    if q.is_cuda and _natten() is not None:
        return through_natten(_natten(), q, k, v, rpb)
    return _attend(q, k, v, rpb)


@cache
def _natten():
    """natten's functions, where they take biases: in 0.17, not in 0.15, and no more in 0.20."""
    try:
        from natten import functional
    except ImportError:
        return None
    product = getattr(functional, "na2d_qk", None)
    return functional if product and "rpb" in signature(product).parameters else None


def through_natten(functional, q: Tensor, k: Tensor, v: Tensor, rpb: Tensor) -> Tensor:
    """The same by `na2d_qk` and `na2d_av` of natten 0.17, in whose maps the heads come first."""
    kernel = (rpb.shape[-1] + 1) // 2
    q, k, v = (x.permute(0, 3, 1, 2, 4).contiguous() for x in (q, k, v))
    scores = functional.na2d_qk(q, k, kernel_size=kernel, dilation=1, rpb=rpb.to(q.dtype))
    out = functional.na2d_av(scores.softmax(-1), v, kernel_size=kernel, dilation=1)
    return out.permute(0, 2, 3, 1, 4)


class _Side(NamedTuple):
    """Tiles along one side of a map.

    Attributes:
        queries: Positions of each tile, (tiles, T); the last tile repeats the last position.
        keys: Positions that their windows can reach, (tiles, S).
        offsets: For each pair, which relative position bias it has, one-hot, or zero where the key
            is no neighbour, (tiles, T, S, 2 K - 1).
    """

    queries: Tensor
    keys: Tensor
    offsets: Tensor


def _side(length: int, kernel: int, like: Tensor) -> _Side:
    tiles = -(-length // kernel)
    reach = min(2 * kernel - 1, length)
    first = torch.arange(tiles, device=like.device) * kernel
    steps = torch.arange(kernel, device=like.device)
    queries = (first[:, None] + steps).clamp(max=length - 1)
    begin = (first - kernel // 2).clamp(0, length - reach)
    keys = begin[:, None] + torch.arange(reach, device=like.device)
    windows = (queries - kernel // 2).clamp(0, length - kernel)
    after = keys[:, None] - windows[..., None]
    offsets = (keys[:, None] - queries[..., None] + kernel - 1).clamp(0, 2 * kernel - 2)
    exact = torch.promote_types(like.dtype, torch.float32)
    one_hot = F.one_hot(offsets, 2 * kernel - 1).to(exact)
    return _Side(queries, keys, one_hot * ((after >= 0) & (after < kernel))[..., None])


def _tiles(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """(B, H, W, heads, C) to (B, tiles * heads, positions of a tile, C)."""
    x = x.index_select(1, rows.flatten()).index_select(2, columns.flatten())
    x = x.unflatten(2, columns.shape).unflatten(1, rows.shape)
    # (B, tile row, row, tile column, column, heads, C)
    return x.permute(0, 1, 3, 5, 2, 4, 6).flatten(4, 5).flatten(1, 3)


def _untiled(x: Tensor, rows: Tensor, columns: Tensor, heads: int) -> Tensor:
    """The reverse, to (B, all rows of tiles, all columns of tiles, heads, C)."""
    x = x.unflatten(1, (len(rows), len(columns), heads))
    x = x.unflatten(4, (rows.shape[1], columns.shape[1]))
    return x.permute(0, 1, 4, 2, 5, 3, 6).flatten(3, 4).flatten(1, 2)


def _sum_of_tiles(x: Tensor, rows: Tensor, columns: Tensor, like: Tensor) -> Tensor:
    """The gradient of `_tiles`: every position's sum over the tiles that it is in."""
    heads = like.shape[3]
    x = _untiled(x, rows, columns, heads)
    wide = x.new_zeros(*x.shape[:2], *like.shape[2:]).index_add_(2, columns.flatten(), x)
    return x.new_zeros(like.shape).index_add_(1, rows.flatten(), wide)


def _by_pairs(x: Tensor, rows: _Side, columns: _Side) -> Tensor:
    """(heads, pairs of rows, pairs of columns) to (tiles * heads, queries, keys)."""
    x = x.unflatten(2, columns.offsets.shape[:3]).unflatten(1, rows.offsets.shape[:3])
    return x.permute(1, 4, 0, 2, 5, 3, 6).flatten(5, 6).flatten(3, 4).flatten(0, 2)


def _biases(rpb: Tensor, rows: _Side, columns: _Side) -> Tensor:
    """The bias of every pair of a tile, minus infinity for those that are no neighbours."""
    of_rows, of_columns = (side.offsets.flatten(0, 2) for side in (rows, columns))
    bias = of_rows @ rpb.to(of_rows.dtype) @ of_columns.mT
    near = of_rows.sum(-1)[:, None] * of_columns.sum(-1)
    return _by_pairs(bias.masked_fill(near == 0, -torch.inf), rows, columns)


def _sides(x: Tensor, rpb: Tensor) -> tuple[_Side, _Side]:
    """Of the rows and the columns of a map (B, H, W, ...)."""
    kernel = (rpb.shape[-1] + 1) // 2
    return _side(x.shape[1], kernel, rpb), _side(x.shape[2], kernel, rpb)


def _sum_of_pairs(x: Tensor, rows: _Side, columns: _Side) -> Tensor:
    """The gradient of `_biases`, from (tiles * heads, queries, keys)."""
    x = x.unflatten(2, (rows.keys.shape[1], columns.keys.shape[1]))
    x = x.unflatten(1, (rows.queries.shape[1], columns.queries.shape[1]))
    x = x.unflatten(0, (len(rows.keys), len(columns.keys), -1))
    # (tile row, tile column, heads, row, column, key row, key column)
    x = x.permute(2, 0, 3, 5, 1, 4, 6).flatten(4, 6).flatten(1, 3)
    of_rows, of_columns = (side.offsets.flatten(0, 2).to(x.dtype) for side in (rows, columns))
    return of_rows.mT @ x @ of_columns


@torch.library.custom_op(_OP, mutates_args=())
def _attend(q: Tensor, k: Tensor, v: Tensor, rpb: Tensor) -> Tensor:
    rows, columns = _sides(q, rpb)
    out = F.scaled_dot_product_attention(
        _tiles(q, rows.queries, columns.queries),
        _tiles(k, rows.keys, columns.keys),
        _tiles(v, rows.keys, columns.keys),
        attn_mask=_biases(rpb, rows, columns).to(q.dtype)[None],
        scale=1.0,
    )
    out = _untiled(out, rows.queries, columns.queries, q.shape[3])
    return out[:, : q.shape[1], : q.shape[2]].contiguous()


@_attend.register_fake
def _(q, _k, _v, _rpb):
    return torch.empty_like(q, memory_format=torch.contiguous_format)


@torch.library.custom_op(f"{_OP}_backward", mutates_args=())
def _attend_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, rpb: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, columns = _sides(q, rpb)
    exact = torch.promote_types(q.dtype, torch.float32)
    queries = _tiles(q, rows.queries, columns.queries).to(exact)
    keys, values = (_tiles(x, rows.keys, columns.keys).to(exact) for x in (k, v))
    weights = (queries @ keys.mT + _biases(rpb, rows, columns)).softmax(-1)

    # Positions that only fill up the last tiles have no gradient.
    height, width = rows.queries.numel(), columns.queries.numel()
    grad = F.pad(grad, (0, 0, 0, 0, 0, width - q.shape[2], 0, height - q.shape[1]))
    every = (torch.arange(n, device=q.device) for n in (height, width))
    grad = _tiles(grad, *(n.unflatten(0, (-1, rows.queries.shape[1])) for n in every)).to(exact)

    grad_weights = grad @ values.mT
    grad_scores = weights * (grad_weights - (weights * grad_weights).sum(-1, keepdim=True))
    return (
        _sum_of_tiles(grad_scores @ keys, rows.queries, columns.queries, q).to(q.dtype),
        _sum_of_tiles(grad_scores.mT @ queries, rows.keys, columns.keys, k).to(k.dtype),
        _sum_of_tiles(weights.mT @ grad, rows.keys, columns.keys, v).to(v.dtype),
        _sum_of_pairs(grad_scores.sum(0), rows, columns).to(rpb.dtype),
    )


@_attend_backward.register_fake
def _(_grad, q, k, v, rpb):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v, rpb))


def _setup_context(ctx, inputs, output):  # noqa: ARG001 (called by keywords)
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad: Tensor):
    return _attend_backward(grad, *ctx.saved_tensors)


_attend.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.mmvmamba.neighborhood_attention_2d)
def _flops(q: torch.Size, _k, _v, rpb: torch.Size, *_, **__) -> int:
    """Two products with the K^2 neighbours; a multiply-add is two, as PyTorch counts."""
    batch, height, width, heads, channels = q
    return 4 * batch * height * width * heads * channels * ((rpb[-1] + 1) // 2) ** 2


@register_flop_formula(torch.ops.mmvmamba.neighborhood_attention_2d_backward)
def _backward_flops(_grad, q: torch.Size, k, v, rpb: torch.Size, *_, **__) -> int:
    """The scores once more, and two products for each of the two."""
    return 5 * _flops(q, k, v, rpb) // 2
