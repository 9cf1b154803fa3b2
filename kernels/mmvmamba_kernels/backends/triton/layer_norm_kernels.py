"""Device code of the layer normalisation; the operator's ``triton_impl.py`` launches it.

A program takes whole rows, several at a time, so that the maps are read once and written once and
the statistics never leave its registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Sizes that change from image to image: a kernel compiled for one serves all.
_SIZES = ("rows", "sample_rows", "programs")


@triton.jit
def _rows(pid, rows, BLOCK_R: tl.constexpr):
    """This block's rows, and which of them exist."""
    row = tl.cast(pid, tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    return row, row < rows


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
    # A number that is no constant is float32, also where the arithmetic is float64.
    EPS: tl.constexpr,
    PARTS: tl.constexpr,
    HAS_BRANCH: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    STORE_TOTAL: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    row, row_inside = _rows(tl.program_id(0), rows, BLOCK_R)
    column = tl.arange(0, BLOCK_C)
    column_inside = column < channels
    inside = row_inside[:, None] & column_inside[None, :]
    place = row[:, None] * channels + column[None, :]

    total = tl.load(x_ptr + place, inside, 0.0).to(ACC)
    for _ in tl.static_range(1, PARTS):
        # x is PARTS maps, one after another, whose sum is meant.
        x_ptr += rows.to(tl.int64) * channels
        total += tl.load(x_ptr + place, inside, 0.0).to(ACC)
    if HAS_BRANCH:
        branch = tl.load(branch_ptr + place, inside, 0.0).to(ACC)
        if HAS_SCALE:
            branch *= tl.load(scale_ptr + row // sample_rows, row_inside, 0.0).to(ACC)[:, None]
        total += branch
    # The backward pass sees the rounded sum, so it is what is normalised.
    rounded = total.to(total_ptr.dtype.element_ty)
    if STORE_TOTAL:
        tl.store(total_ptr + place, rounded, inside)
    total = rounded.to(ACC)
    mean = tl.sum(total, 1) / channels
    centred = tl.where(inside, total - mean[:, None], 0.0)
    inverse = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / channels + EPS)
    weight = tl.load(weight_ptr + column, column_inside, 0.0).to(ACC)
    bias = tl.load(bias_ptr + column, column_inside, 0.0).to(ACC)
    out = centred * inverse[:, None] * weight[None, :] + bias[None, :]
    tl.store(out_ptr + place, out.to(out_ptr.dtype.element_ty), inside)
    tl.store(statistics_ptr + 2 * row, mean, row_inside)
    tl.store(statistics_ptr + 2 * row + 1, inverse, row_inside)


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
    programs,
    HAS_GRAD_TOTAL: tl.constexpr,
    HAS_GRAD_BRANCH: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    program = tl.program_id(0)
    column = tl.arange(0, BLOCK_C)
    column_inside = column < channels
    weight = tl.load(weight_ptr + column, column_inside, 0.0).to(ACC)
    grad_weight = tl.zeros((BLOCK_C,), ACC)
    grad_bias = tl.zeros((BLOCK_C,), ACC)
    for block in range(program, tl.cdiv(rows, BLOCK_R), programs):
        row, row_inside = _rows(block, rows, BLOCK_R)
        inside = row_inside[:, None] & column_inside[None, :]
        place = row[:, None] * channels + column[None, :]
        mean = tl.load(statistics_ptr + 2 * row, row_inside, 0.0)
        inverse = tl.load(statistics_ptr + 2 * row + 1, row_inside, 0.0)
        total = tl.load(total_ptr + place, inside, 0.0).to(ACC)
        normal = tl.where(inside, (total - mean[:, None]) * inverse[:, None], 0.0)
        grad_out = tl.load(grad_out_ptr + place, inside, 0.0).to(ACC)
        grad_weight += tl.sum(grad_out * normal, 0)
        grad_bias += tl.sum(grad_out, 0)
        grad_normal = grad_out * weight[None, :]
        along = tl.sum(grad_normal * normal, 1) / channels
        common = tl.sum(grad_normal, 1) / channels
        grad = (grad_normal - common[:, None] - normal * along[:, None]) * inverse[:, None]
        if HAS_GRAD_TOTAL:
            grad += tl.load(grad_total_ptr + place, inside, 0.0).to(ACC)
        tl.store(grad_x_ptr + place, grad.to(grad_x_ptr.dtype.element_ty), inside)
        if HAS_GRAD_BRANCH:
            if HAS_SCALE:
                grad *= tl.load(scale_ptr + row // sample_rows, row_inside, 0.0).to(ACC)[:, None]
            tl.store(grad_branch_ptr + place, grad.to(grad_branch_ptr.dtype.element_ty), inside)
    partial = partial_ptr + program * channels + column
    tl.store(partial, grad_weight, column_inside)
    tl.store(partial + programs * channels, grad_bias, column_inside)
