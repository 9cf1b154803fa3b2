"""Device code of the layer normalisation; the operator's ``triton_impl.py`` launches it.

A program takes whole rows, several at a time, so that the maps are read once and written once and
the statistics never leave its registers. Its tile is ROWS pairs of lines of WIDTH channels; a row
takes a line or both of a pair, so that one kernel serves several numbers of channels.
What a call does or leaves out is an argument likewise, and not a kernel of its own.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Sizes and choices that change from call to call: a kernel compiled for one serves all.
_SIZES = (
    "rows",
    "sample_rows",
    "paired",
    "parts",
    "programs",
    "has_branch",
    "has_scale",
    "store_total",
    "has_grad_total",
    "has_grad_branch",
)


@triton.jit
def _rows(block, rows, paired, ROWS: tl.constexpr):
    """The rows of a block's lines, (ROWS, 2), and which of them exist.

    ``paired`` is 1 if a row takes both lines of a pair, else 0.
    """
    pair = tl.arange(0, ROWS)[:, None]
    line = tl.arange(0, 2)[None, :]
    row = tl.cast(block, tl.int64) * (2 * ROWS >> paired) + (2 * pair + line >> paired)
    return row, row < rows


@triton.jit
def _columns(paired, WIDTH: tl.constexpr):
    """The columns of a pair's lines, (2, WIDTH)."""
    return (tl.arange(0, 2) * paired * WIDTH)[:, None] + tl.arange(0, WIDTH)[None, :]


@triton.jit
def _row_sums(values, paired):
    """The sum of every line's row, (ROWS, 2)."""
    sums = tl.sum(values, 2)
    return tl.where(paired == 1, tl.sum(sums, 1)[:, None], sums)


@triton.jit(do_not_specialize=_SIZES)
def layer_norm_fwd_kernel(
    x_ptr,
    branch_ptr,
    scale_ptr,
    weight_ptr,
    bias_ptr,
    total_ptr,
    out_ptr,
    statistics_ptr,
    rows,
    sample_rows,
    channels,
    paired,
    parts,
    has_branch,
    has_scale,
    store_total,
    # A number that is no constant is float32, also where the arithmetic is float64.
    EPS: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The sum of x's ``parts`` maps and of the branch, and its normalisation.

    Pointers to what a call does not have are never followed.
    """
    row, exists = _rows(tl.program_id(0), rows, paired, ROWS)
    column = _columns(paired, WIDTH)
    column_inside = column < channels
    inside = exists[:, :, None] & column_inside[None, :, :]
    place = row[:, :, None] * channels + column[None, :, :]

    total = tl.load(x_ptr + place, inside, 0.0).to(ACC)
    map_size = rows.to(tl.int64) * channels
    for part in range(1, parts):
        # x is maps one after another, whose sum is meant.
        total += tl.load(x_ptr + part * map_size + place, inside, 0.0).to(ACC)
    if has_branch != 0:
        branch = tl.load(branch_ptr + place, inside, 0.0).to(ACC)
        if has_scale != 0:
            branch *= tl.load(scale_ptr + row // sample_rows, exists, 0.0).to(ACC)[:, :, None]
        total += branch
    # The backward pass sees the rounded sum, so it is what is normalised.
    rounded = total.to(total_ptr.dtype.element_ty)
    if store_total != 0:
        tl.store(total_ptr + place, rounded, inside)
    total = rounded.to(ACC)
    mean = _row_sums(total, paired) / channels
    centred = tl.where(inside, total - mean[:, :, None], 0.0)
    inverse = 1.0 / tl.sqrt(_row_sums(centred * centred, paired) / channels + EPS)
    weight = tl.load(weight_ptr + column, column_inside, 0.0).to(ACC)
    bias = tl.load(bias_ptr + column, column_inside, 0.0).to(ACC)
    out = centred * inverse[:, :, None] * weight[None, :, :] + bias[None, :, :]
    tl.store(out_ptr + place, out.to(out_ptr.dtype.element_ty), inside)
    # Of a row's two lines the first writes.
    first = exists & (tl.arange(0, 2) * paired == 0)[None, :]
    tl.store(statistics_ptr + 2 * row, mean, first)
    tl.store(statistics_ptr + 2 * row + 1, inverse, first)


@triton.jit(do_not_specialize=_SIZES)
def layer_norm_bwd_kernel(
    grad_total_ptr,
    grad_out_ptr,
    total_ptr,
    statistics_ptr,
    scale_ptr,
    weight_ptr,
    grad_x_ptr,
    grad_branch_ptr,
    partial_ptr,
    rows,
    sample_rows,
    channels,
    paired,
    programs,
    has_grad_total,
    has_grad_branch,
    has_scale,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Gradients of the sum and of the branch, and a program's part of those of weight and bias."""
    program = tl.program_id(0)
    column = _columns(paired, WIDTH)
    column_inside = column < channels
    weight = tl.load(weight_ptr + column, column_inside, 0.0).to(ACC)
    # Summed over rows at the end: until then nothing crosses lanes for them.
    grad_weights = tl.zeros((ROWS, 2, WIDTH), ACC)
    grad_biases = tl.zeros((ROWS, 2, WIDTH), ACC)
    for block in range(program, tl.cdiv(rows, 2 * ROWS >> paired), programs):
        row, exists = _rows(block, rows, paired, ROWS)
        inside = exists[:, :, None] & column_inside[None, :, :]
        place = row[:, :, None] * channels + column[None, :, :]
        mean = tl.load(statistics_ptr + 2 * row, exists, 0.0)[:, :, None]
        inverse = tl.load(statistics_ptr + 2 * row + 1, exists, 0.0)[:, :, None]
        total = tl.load(total_ptr + place, inside, 0.0).to(ACC)
        normal = tl.where(inside, (total - mean) * inverse, 0.0)
        grad_out = tl.load(grad_out_ptr + place, inside, 0.0).to(ACC)
        grad_weights += grad_out * normal
        grad_biases += grad_out
        grad_normal = grad_out * weight[None, :, :]
        along = (_row_sums(grad_normal * normal, paired) / channels)[:, :, None]
        common = (_row_sums(grad_normal, paired) / channels)[:, :, None]
        grad = (grad_normal - common - normal * along) * inverse
        if has_grad_total != 0:
            grad += tl.load(grad_total_ptr + place, inside, 0.0).to(ACC)
        tl.store(grad_x_ptr + place, grad.to(grad_x_ptr.dtype.element_ty), inside)
        if has_grad_branch != 0:
            if has_scale != 0:
                grad *= tl.load(scale_ptr + row // sample_rows, exists, 0.0).to(ACC)[:, :, None]
            tl.store(grad_branch_ptr + place, grad.to(grad_branch_ptr.dtype.element_ty), inside)
    grad_weight = tl.sum(grad_weights, 0)
    grad_bias = tl.sum(grad_biases, 0)
    # Where lines have a row each, both have part of every column's sum.
    grad_weight = tl.where(paired == 1, grad_weight, tl.sum(grad_weight, 0)[None, :])
    grad_bias = tl.where(paired == 1, grad_bias, tl.sum(grad_bias, 0)[None, :])
    first = column_inside & (tl.arange(0, 2) <= paired)[:, None]
    partial = partial_ptr + program * channels + column
    tl.store(partial, grad_weight, first)
    tl.store(partial + programs * channels, grad_bias, first)
